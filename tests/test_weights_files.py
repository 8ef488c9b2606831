"Load weights files in the forms that other repositories write; run no code that is in them; say what was used."

import argparse
import io
import os
import pickle
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dr_transfer.models.backbones import create_body
from dr_transfer.models.weights import WeightsError, fill, read_weights, read_weights_file, table_line

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def network(name='test_resnet', **kw):
    "The reference: a network of timm with random weights"
    torch.manual_seed(3)
    return timm.create_model(name, **kw).eval()


@pytest.fixture(scope='module')
def trunk():
    "A residual network, and its tensors without the classifier"
    net = network()
    return net, {k: v for k, v in net.state_dict().items() if not k.startswith('fc.')}


def loaded(content, tmp_path, arch='test_resnet', suffix='.pth'):
    "The body with the weights of a file with this content"
    path = tmp_path / f'w{suffix}'
    torch.save(content, path)
    return create_body(arch, path)


def equal(body, net):
    with torch.no_grad():
        return torch.equal(body(X), net.forward_features(X))


# ---------------------------------------------------------------- entries and prefixes


@pytest.mark.parametrize('entry', ['teacher', 'model_ema', 'state_dict_ema', 'state_dict', 'model', 'model_state_dict'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'module.backbone.', '_orig_mod.module.', 'model.'])
def test_entries_and_prefixes_of_checkpoints(trunk, tmp_path, entry, prefix):
    net, sd = trunk
    heads = {'dino_head.mlp.0.weight': torch.ones(3, 3), 'ibot_head.last_layer.weight_g': torch.ones(3)}
    content = {entry: {**{prefix + k: v for k, v in sd.items()}, **heads}, 'epoch': 3, 'student': {'x': torch.ones(1)}}
    assert equal(loaded(content, tmp_path), net)


@pytest.mark.parametrize(
    'best, other',
    [
        ('teacher', 'student'),
        ('teacher', 'model'),
        ('model_ema', 'model'),
        ('state_dict_ema', 'state_dict'),
        ('model_ema', 'state_dict'),
    ],
)
def test_the_averaged_weights_of_a_checkpoint_are_used(trunk, tmp_path, capsys, best, other):
    net, sd = trunk
    wrong = {k: torch.zeros_like(v) for k, v in sd.items()}
    assert equal(loaded({other: wrong, best: sd}, tmp_path), net)
    assert f"w.pth (entry '{best}'):" in capsys.readouterr().out
    assert equal(loaded({best: sd, other: wrong}, tmp_path), net)


def test_an_empty_entry_is_not_used(trunk, tmp_path):
    net, sd = trunk
    assert equal(loaded({'model_ema': None, 'model': sd}, tmp_path), net)


def test_teacher_and_student_in_one_list(trunk, tmp_path):
    "As a sharded checkpoint of DINOv2 names them"
    net, sd = trunk
    content = {f'student.backbone.{k}': torch.zeros_like(v) for k, v in sd.items()}
    content |= {f'teacher.backbone.{k}': v for k, v in sd.items()}
    assert equal(loaded({'model': content}, tmp_path), net)


def test_a_prefix_that_the_network_has_is_kept(tmp_path):
    net = nn.Module()
    net.backbone = nn.Linear(2, 2)
    fill(
        net, {'module.backbone.weight': torch.ones(2, 2), 'module.backbone.bias': torch.ones(2)}, {'backbone.bias'}, 'w'
    )
    assert net.backbone.weight.detach().eq(1).all()


@pytest.mark.parametrize('classes', [0, 2, 1000, 7])
def test_any_classifier(trunk, tmp_path, classes):
    net = network(num_classes=classes)
    assert equal(loaded(net.state_dict(), tmp_path), net)


# ---------------------------------------------------------------- code in a file


class Evil:
    "Would write a file if a pickle with it were read"

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return eval, (f'open({self.path!r}, "w").close()',)


class System(Evil):
    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('kind', [Evil, System])
@pytest.mark.parametrize('form', ['zip', 'old', 'pickle', 'in the options', 'beside names'])
def test_code_in_a_file_is_refused_with_the_reason(trunk, tmp_path, kind, form):
    _, sd = trunk
    path, made = tmp_path / 'evil.pth', tmp_path / 'made'
    evil = kind(made)
    content = {
        'in the options': {'model': sd, 'args': argparse.Namespace(lr=evil)},
        'beside names': {**sd, 'x': evil},
    }.get(form, {'state_dict': sd, 'extra': evil})
    if form == 'pickle':
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != 'old')
    with pytest.raises(WeightsError) as e:
        create_body('test_resnet', path)
    assert not made.exists()
    text = str(e.value)
    assert 'evil.pth' in text
    assert 'weights_only' not in text  # the words of torch advise to run it
    if form != 'pickle':
        assert ('eval' if kind is Evil else 'system') in text
        assert 'could run commands' in text
        assert 'torch.save(model.state_dict()' in text
    read = pickle.load if form == 'pickle' else partial(torch.load, weights_only=False)
    read(io.BytesIO(path.read_bytes()))  # it runs where it is allowed to
    assert made.exists()


def test_a_whole_network_is_refused(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / 'net.pth')
    with pytest.raises(WeightsError, match=r'torch\.nn\.modules.*state_dict'):
        create_body('test_resnet', tmp_path / 'net.pth')


def test_options_beside_the_tensors(trunk, tmp_path):
    net, sd = trunk
    options = argparse.Namespace(lr=1e-3, data_path='images', sizes=[1, 2])
    assert equal(loaded({'model': sd, 'args': options, 'epoch': 3}, tmp_path), net)


def test_no_other_class_is_allowed(trunk, tmp_path):
    "And reading a file does not allow more classes afterwards"
    torch.save({'model': trunk[1], 'args': tmp_path}, tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match='pathlib'):
        read_weights(tmp_path / 'w.pth')
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# ---------------------------------------------------------------- names of other repositories


def swiglu(**kw):
    torch.manual_seed(4)
    more = {'img_size': 56, 'patch_size': 14, 'embed_dim': 48, 'depth': 2, 'num_heads': 2, 'num_classes': 0}
    return VisionTransformer(**{**more, 'init_values': 1e-5, 'mlp_ratio': 2, 'mlp_layer': SwiGLUPacked, **kw}).eval()


def of_dinov2(net):
    "The tensors of a transformer under the names of DINOv2"
    names = {k: k.replace('mlp.fc1', 'mlp.w12').replace('mlp.fc2', 'mlp.w3') for k in net.state_dict()}
    return {new: net.state_dict()[k].clone() for k, new in names.items()}


@pytest.mark.parametrize('mask_token', [True, False])
@pytest.mark.parametrize('chunks', [True, False])
def test_names_of_dinov2(mask_token, chunks):
    net, other = swiglu(), swiglu()
    with torch.no_grad():
        for v in net.parameters():
            v.add_(torch.randn_like(v))
    sd = of_dinov2(net)
    assert any('w12' in k for k in sd)
    if chunks:
        sd = {k.replace('blocks.', 'blocks.0.'): v for k, v in sd.items()}
    if mask_token:
        sd['mask_token'] = torch.ones(1, 48)
    table = fill(other, {f'backbone.{k}': v for k, v in sd.items()}, set(other.state_dict()), 'w')
    for k, v in net.state_dict().items():
        assert torch.equal(v, other.state_dict()[k]), k
    assert 'missing' not in table.status.tolist()


@pytest.mark.parametrize('mask_token', [True, False])
def test_registers_of_dinov2(mask_token):
    "In Meta's files the class token has a position embedding, in timm it is added to the token"
    net = swiglu(reg_tokens=4, no_embed_class=True)
    sd = of_dinov2(net)
    sd['register_tokens'] = sd.pop('reg_token') + 1
    position = torch.full((1, 1, 48), 0.5)
    sd['pos_embed'] = torch.cat([position, sd['pos_embed']], 1)
    if mask_token:
        sd['mask_token'] = torch.ones(1, 48)
    other = swiglu(reg_tokens=4, no_embed_class=True)
    fill(other, sd, set(other.state_dict()), 'w')
    assert torch.equal(other.reg_token, sd['register_tokens'])
    assert torch.allclose(other.cls_token, net.cls_token + 0.5)
    assert torch.equal(other.pos_embed, net.pos_embed)


@pytest.mark.parametrize('size', [96, 224])
def test_position_embeddings_of_another_size(tmp_path, size):
    "Resized by timm, as by `timm.create_model(pretrained=True, img_size=...)`"
    source, want = network('test_vit', img_size=size), network('test_vit')
    sd = source.state_dict()
    assert sd['pos_embed'].shape != want.pos_embed.shape
    want.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(sd), want))
    body = loaded(sd, tmp_path, 'test_vit')
    state = body.state_dict()
    position = next(v for k, v in state.items() if k.endswith('pos_embed'))
    assert torch.equal(position, want.pos_embed)
    assert not torch.equal(position[:, :5], sd['pos_embed'][:, :5])


@pytest.mark.parametrize('kind', ['depth', 'width'])
def test_a_transformer_of_another_size_is_refused(tmp_path, kind):
    more = {'depth': {'depth': 1}, 'width': {'embed_dim': 32}}[kind]
    with pytest.raises(WeightsError, match='does not fit'):
        loaded(network('test_vit', **more).state_dict(), tmp_path, 'test_vit')


def test_a_conversion_that_fails_is_not_the_error(tmp_path):
    "Half a file: timm cannot convert it, and the error names a missing tensor"
    sd = {k: v for k, v in network('test_vit').state_dict().items() if k.startswith('blocks.0')}
    with pytest.raises(WeightsError, match=r"does not fit.*'.*cls_token' is missing"):
        loaded({**sd, 'register_tokens': torch.ones(1, 4, 64)}, tmp_path, 'test_vit')


# ---------------------------------------------------------------- what was used


def test_table_of_used_dropped_and_missing_tensors(trunk):
    _net, sd = trunk
    content = {**sd, 'fc.weight': torch.ones(3, 96), 'head.mlp.0.weight': torch.ones(1), 'head.x': torch.ones(1)}
    lost = [k for k in sd if k.startswith('layer1')]
    needed = set(sd) - set(lost)
    table = fill(network(), {k: v for k, v in content.items() if k not in lost}, needed, 'w').set_index('part')
    assert table.tensors['head'] == 2
    assert table.status['head'] == 'dropped'
    assert table.why['head'] == 'not in the network'
    assert table.status['layer2'] == 'used'
    assert table.tensors['layer2'] == sum(k.startswith('layer2') for k in sd)
    assert table.status['layer1'] == 'missing'
    assert table.why['layer1'] == 'not needed'
    assert set(table.loc['fc'].status) == {'dropped', 'missing'}
    assert 'has shape 3x96, not 1000x96' in table.loc['fc'].why.tolist()
    assert table[table.status == 'used'].tensors.sum() == len(needed)


def test_a_users_file_is_described_in_one_line(trunk, tmp_path, capsys):
    loaded({'teacher': {**trunk[1], 'dino_head.w': torch.ones(1)}}, tmp_path)
    out = capsys.readouterr().out
    assert out.startswith(f"w.pth (entry 'teacher'): {len(trunk[1])} tensors used; 1 tensor dropped (dino_head 1); ")
    assert out.count('\n') == 1
    assert 'missing (fc 2)' in out
    create_body('efficientnet_lite0')  # not a file of the user
    create_body('test_resnet', 'random')
    assert capsys.readouterr().out == ''


def test_the_error_for_missing_tensors_says_what_was_found(trunk, tmp_path):
    _, sd = trunk
    part = {k: v for k, v in sd.items() if not k.startswith('layer4')}
    with pytest.raises(WeightsError, match=r"'layer4.*is missing \(.*tensors used; .*missing \(.*layer4") as e:
        loaded({**part, 'decoder.w': torch.ones(1)}, tmp_path)
    assert 'another network' not in str(e.value)
    with pytest.raises(WeightsError, match='weights of another network: give its name with arch='):
        loaded(network('test_vit').state_dict(), tmp_path)


def test_half_a_file(trunk, tmp_path):
    save_file(trunk[1], tmp_path / 'w.safetensors')
    torch.save(trunk[1], tmp_path / 'w.pth')
    for name in ('w.safetensors', 'w.pth'):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(
            WeightsError, match=f'{name} cannot be read.*incomplete or damaged: copy or download it again'
        ):
            create_body('test_resnet', tmp_path / name)


def test_the_entry_of_a_plain_file(trunk, tmp_path):
    torch.save(trunk[1], tmp_path / 'w.pth')
    assert read_weights_file(tmp_path / 'w.pth').entry == ''
    torch.save({'model': {'state_dict': trunk[1]}}, tmp_path / 'w.pth')
    file = read_weights_file(tmp_path / 'w.pth')
    assert file.entry == 'model.state_dict'
    assert file.tensors.keys() == trunk[1].keys()


def test_one_line_for_many_parts():
    net = nn.ModuleDict({f'part{i}': nn.Linear(1, 1) for i in range(9)})
    line = table_line(fill(net, {'other.x': torch.ones(1)}, set(), 'w'))
    assert 'part4 2 and 4 more parts' in line
    assert 'used' not in line
