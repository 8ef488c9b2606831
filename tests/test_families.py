"One small network of each family of timm goes through the library: stages, cuts, groups, stores, maps and files."

import numpy as np
import pytest
import timm
import torch
from families import FAMILIES, TOKENS, size_of
from learners import groups, learner_builder, make_sets, moved, quiet
from safetensors.torch import load_file, save_file

from dr_transfer.core import fit, predict_probs, valid_predictions
from dr_transfer.explain.grad_cam import grad_cam
from dr_transfer.features.boundary import split_body
from dr_transfer.inference.onnx_file import OnnxModel, export_onnx
from dr_transfer.inference.saved_model import load_model, save_model
from dr_transfer.models.backbones import create_body, save_weights
from dr_transfer.models.network import AveragePool, Body
from dr_transfer.models.registry import build_network, find_backbone
from dr_transfer.models.stages import layer_groups, stage_names
from dr_transfer.training.stored import why_not_stored

pytestmark = pytest.mark.usefixtures('with_shared_cache')
FOUR_BLOCKS = [name for name in TOKENS if name != 'small_hiera']
WITH_NECK = ('small_siglip', 'small_pe')
WITH_CLASS_TOKEN = ('small_vit', 'small_registers', 'small_clip', 'small_eva', 'small_rope', 'small_dinov3', 'small_pe')


@pytest.fixture(scope='session')
def sets(tmp_path_factory):
    "Synthetic flowers, and weights of every family with which the output depends on the image"
    folder = tmp_path_factory.mktemp('families')
    make_sets(folder, n_flowers=30)
    for name in FAMILIES:
        torch.manual_seed(0)
        net = timm.create_model(name)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / f'{name}.safetensors')
    return folder


@pytest.fixture(scope='session')
def build(sets):
    return learner_builder(sets)


def network(sets, name):
    "timm's own network with these weights"
    net = build_network(find_backbone(name)).eval()
    net.load_state_dict(load_file(sets / f'{name}.safetensors'))
    return net


def body_of(sets, name, **options):
    return create_body(name, sets / f'{name}.safetensors', **options)


def batch(name, n=2):
    size = size_of(name)
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def ends_of_stages(body, net):
    "For each stage but the stem the number of its last block"
    ends = []
    for stage in list(body)[1:]:
        inner = stage.blocks if hasattr(stage, 'blocks') else stage
        ends.append(sum(name.startswith('blocks_') for name, _ in inner.named_children()))
    return (np.cumsum(ends) - 1).tolist()


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_the_stages_are_the_network(name, sets):
    body, net, x = body_of(sets, name), network(sets, name), batch(name)
    names = stage_names(body)
    assert names == ['stem', *[f'stage{i}' for i in range(1, len(names))]]
    assert len(names) >= 4
    activations = body.activations(x)
    out = net.forward_features(x)
    assert torch.allclose(activations[-1], out, atol=1e-5 * float(out.abs().max()))
    assert (activations[-1][0] - activations[-1][1]).norm() > 0.01 * activations[-1].norm()
    assert sorted(id(p) for ps in layer_groups(body).values() for p in ps) == sorted(map(id, body.parameters()))
    assert all(layer_groups(body).values())


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_a_cut_at_each_stage(name, sets):
    body, x = body_of(sets, name), batch(name)
    activations = body.activations(x)
    sizes = []
    for stage, expected in zip(stage_names(body), activations):
        cut = body_of(sets, name, stage=stage)
        assert torch.equal(cut.activations(x)[-1], expected)
        assert torch.equal(cut(x), cut.joined([expected]))
        assert cut.n_out == cut(x).shape[1]
        sizes.append(cut.layout.to_maps(expected).shape[-1])
    assert sizes == sorted(sizes, reverse=True)
    assert stage_names(body_of(sets, name, stage=-2)) == stage_names(body)[:-1]


@pytest.mark.parametrize('name', FOUR_BLOCKS)
@pytest.mark.parametrize('n', [None, 1, 2, 3])
@torch.no_grad()
def test_blocks_in_stages(name, n, sets):
    "The maps are those that timm returns after the same blocks."
    body, net, x = body_of(sets, name, block_stages=n), network(sets, name), batch(name)
    names = stage_names(body)
    assert len(names) == 1 + (n or 4)
    ends = ends_of_stages(body, net)
    assert ends[-1] == 3
    expected = net.forward_intermediates(x, indices=ends, intermediates_only=True)
    maps = body.maps(x)[1:]
    for a, b in zip(maps[:-1], expected[:-1], strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))
    normed = net.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)[0]
    assert torch.allclose(maps[-1], normed, atol=1e-5 * float(normed.abs().max()))


@torch.no_grad()
def test_hiera_maps_are_those_of_timm(sets):
    body, net, x = body_of(sets, 'small_hiera'), network(sets, 'small_hiera'), batch('small_hiera')
    expected = net.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(body.maps(x)[1:], expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert torch.equal(body.layout.to_maps(body.layout.back(a, a.flatten(2).transpose(1, 2))), a)


@pytest.mark.parametrize('n', [0, 5, -1])
def test_more_stages_than_blocks(n):
    with pytest.raises(
        ValueError, match=f'block_stages={n} .--block-stages.: the 4 blocks of .small_vit. can form 1 to 4 stages'
    ):
        create_body('small_vit', 'random', block_stages=n)


def test_stages_of_blocks_for_a_network_without_blocks():
    with pytest.raises(ValueError, match=r"block_stages=2 .--block-stages.: 'test_resnet' has no blocks"):
        create_body('test_resnet', 'random', block_stages=2)


@pytest.mark.parametrize('name', WITH_NECK)
@torch.no_grad()
def test_the_pooling_of_the_network_is_its_neck(name, sets):
    body, net, x = body_of(sets, name, stage='neck'), network(sets, name), batch(name)
    assert stage_names(body)[-1] == 'neck'
    expected = net.forward_head(net.forward_features(x), pre_logits=True)
    assert torch.allclose(body(x), expected, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(Body(body).pooled(x, ['neck'])['neck'][:, 0], body(x))
    assert body.maps(x)[-1].shape == (2, 32, 1, 1)
    assert layer_groups(body)['neck']
    assert 'neck' not in stage_names(body_of(sets, name))


@pytest.mark.parametrize('name', [*TOKENS, 'small_swin'])
@torch.no_grad()
def test_models_of_earlier_versions_have_one_stage(name, sets):
    "A transformer was one stage, `last`: its own pooled features."
    body, net, x = body_of(sets, name, stage='last'), network(sets, name), batch(name)
    assert stage_names(body) == ['last']
    net.reset_classifier(0)
    assert torch.equal(body(x), net.forward_head(net.forward_features(x), pre_logits=True))
    assert all(key.startswith('net.') for key in body.state_dict())


@pytest.mark.parametrize('name', TOKENS)
@torch.no_grad()
def test_pools(name, sets):
    x = batch(name)
    tokens = body_of(sets, name).activations(x)[-1]
    prefix = getattr(network(sets, name), 'num_prefix_tokens', 0)
    mean, token = tokens[:, prefix:].mean(1), tokens[:, 0]
    expected = {'mean': mean, 'max': tokens[:, prefix:].amax(1)}
    if name in WITH_CLASS_TOKEN:
        expected |= {'token': token, 'both': torch.cat([token, mean], 1)}
    for pool, value in expected.items():
        body = body_of(sets, name, pool=pool)
        assert torch.allclose(body(x), value, atol=1e-6)
        assert body.n_out == value.shape[1]
        last = stage_names(body)[-1]
        assert torch.equal(Body(body).pooled(x, [last])[last][:, 0], body(x))
    last_two = body_of(sets, name, n_stages=2, pool='mean')
    assert torch.allclose(last_two(x)[:, -mean.shape[1] :], mean, atol=1e-6)
    if name not in WITH_CLASS_TOKEN:
        with pytest.raises(ValueError, match=f"unknown pool of {name} 'token'.*mean, max"):
            body_of(sets, name, pool='token')


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_every_stage_in_one_pass(name, sets):
    body, x = body_of(sets, name), batch(name)
    names = stage_names(body)
    pooled = Body(body).pooled(x, names)
    for stage, activations in zip(names, body.activations(x)):
        assert torch.equal(pooled[stage][:, 0], body.pooled(activations))


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_training_from_a_boundary(name, sets):
    "The output of the frozen part, and the rest run on it, give the output of the whole."
    body = Body(body_of(sets, name, n_stages=2)).eval()
    x = batch(name)
    expected = AveragePool()(body(x))
    for k in range(1, len(body.stages) + 1):
        for means in (False, True):
            frozen, trained = split_body(body, k, means)
            boundary, *sides = frozen(x).values()
            out = AveragePool()(trained.eval()(boundary, *sides))
            assert torch.allclose(out, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope='session', params=FAMILIES)
def trained(request, build):
    "A learner, fine-tuned on stored boundary maps, and copies of its groups before and after"
    name = request.param
    learn = build(arch=name, size=size_of(name), bs=8)
    before = groups(learn)
    assert why_not_stored(learn, -2) == ''
    fit(learn, 'top1', epochs=1, say=str)
    return name, learn, before, groups(learn)


def test_frozen_means_frozen(trained):
    _, _, before, after = trained
    assert moved(before, after) == [False] * (len(before) - 2) + [True, True]


def test_discriminative_rates(trained):
    _, learn, _, _ = trained
    learn.unfreeze()
    quiet(learn, 'fit', 0, slice(1e-6, 1e-4))
    rates = [group['lr'] for group in learn.opt.hypers]
    assert len(rates) == len(layer_groups(learn.body.stages)) + 1
    assert rates == sorted(rates)
    assert len(set(rates)) == len(rates)


def test_grad_cam(trained, sets):
    _, learn, _, _ = trained
    image = sorted((sets / 'flowers').glob('*/*'))[0]
    cams = [grad_cam(learn, image, target_class=c) for c in learn.dls.vocab]
    assert {cam.shape for cam in cams} == {(learn.task.size, learn.task.size)}
    assert max(cam.max() for cam in cams) == 1
    assert min(cam.min() for cam in cams) >= 0
    stage = stage_names(learn.body.stages)[-2]
    assert grad_cam(learn, image, stage=stage).shape == cams[0].shape


def test_saved_and_loaded(trained, sets, tmp_path):
    name, learn, _, _ = trained
    images = sorted((sets / 'flowers').glob('*/*'))[:5]
    expected = predict_probs(learn, images)
    assert expected.std(0).max() > 1e-4
    model = load_model(save_model(learn, tmp_path / 'model'))
    assert np.abs(model.probs(images) - expected).max() < 1e-5
    onnx = OnnxModel(export_onnx(learn, tmp_path / 'model.onnx', images))
    assert np.abs(onnx.probs(images) - expected).max() < 1e-4
    body = create_body(name, save_weights(learn.body.stages, tmp_path / 'own.safetensors'))
    x = batch(name)
    with torch.no_grad():
        assert torch.allclose(body(x), learn.body.stages.eval()(x), atol=1e-5)


def test_options_are_kept(build, tmp_path):
    "How blocks are grouped and tokens pooled is part of the record and of the saved model."
    learn = build(arch='small_dinov3', block_stages=4, n_stages=3, pool='both')
    fit(learn, 'head', say=str)
    assert (learn.record.block_stages, learn.record.pool, learn.record.n_stages) == (4, 'both', 3)
    assert learn.body.stages.n_out == 3 * 2 * 32
    images = learn.table.image.tolist()[:4]
    model = load_model(save_model(learn, tmp_path / 'model'))
    assert (model.card.block_stages, model.card.pool) == (4, 'both')
    assert np.abs(model.probs(images) - predict_probs(learn, images)).max() < 1e-5


def test_a_head_on_the_neck(build, tmp_path):
    "Its stored features are those that the network computes when it predicts."
    learn = fit(build(arch='small_siglip', stage='neck'), 'head', say=str)
    stored = valid_predictions(learn)
    computed = predict_probs(learn, stored.image.tolist())
    assert np.abs(stored[[f'p_{c}' for c in learn.dls.vocab]].to_numpy() - computed).max() < 1e-5
    model = load_model(save_model(learn, tmp_path / 'model'))
    assert np.abs(model.probs(stored.image.tolist()) - computed).max() < 1e-5


def test_the_nearest_size_of_patches(build):
    said = []
    learn = build(arch='small_vit', size=75, say=said.append)
    assert learn.task.size == learn.record.size == 80
    assert "size 80 instead of 75: 'small_vit' reads patches of 16 by 16 pixels" in said
    assert learn.dls.one_batch()[0].shape[-1] == 80
    assert not [line for line in said if 'patches' in line and '64' in line]


@pytest.mark.parametrize('name', ['small_vit', 'small_rope', 'small_dinov3', 'small_swin'])
@torch.no_grad()
def test_another_size(name, sets):
    "timm adapts position embedding and windows: the network is that of timm at this size."
    body, net = body_of(sets, name, size=96), network(sets, name)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    net.set_input_size(img_size=96)
    assert torch.allclose(body.activations(x)[-1], net.forward_features(x), atol=1e-4)
