"Test first-layer filters and their score, activations, and Grad-CAM compared with maps by hand."

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from families import NOT_A_CHAIN
from torch import nn
from torch.nn import functional as F

from dr_transfer.explain.activations import (
    activation_table,
    evaluating,
    filter_table,
    first_layer_filters,
    gabor_bank,
    gabor_fraction,
    model_parts,
    nearest_images,
    neighbor_table,
    plot_activations,
    plot_filters,
    plot_nearest,
    plot_neighbors,
)
from dr_transfer.explain.grad_cam import (
    grad_cam,
    grad_cam_on_mask,
    grad_cam_sheet,
    grad_cam_table,
    log_odds,
    overlay,
    plot_grad_cam,
    plot_grad_cam_tables,
)
from dr_transfer.features.extraction import extract_features
from dr_transfer.inference.saved_model import ImageModel
from dr_transfer.models.backbones import create_body
from dr_transfer.models.network import HEADS, Body, create_head, head_inputs
from dr_transfer.models.speed import Runtime
from dr_transfer.models.stages import stage_names
from dr_transfer.models.weights import WeightsError


def image_model(arch, head='linear', size=64, classes=('no', 'referable'), body=None, **kw):
    torch.manual_seed(0)
    stages = create_body(arch, 'random', **kw)
    stages = Body(stages, *body) if body else stages
    inner = getattr(stages, 'stages', stages)
    model = nn.Sequential(stages, create_head(head, head_inputs(inner, head, size), len(classes)))
    return ImageModel(
        model,
        {
            'arch': arch,
            'stage': 'last',
            'n_stages': 1,
            'head': {},
            'task': '',
            'target': '',
            'size': size,
            'reader': 'photo',
            'fit': 'squish',
            'views': 'none',
            'classes': list(classes),
            'mean': [0.5] * 3,
            'std': [0.25] * 3,
        },
    )


def noise_image(size=64, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


def batch(model, *images):
    parts = model_parts(model)
    return parts.batch([parts.read(i) for i in images])


# ---------------------------------------------------------------- first-layer filters


@pytest.mark.parametrize(
    'arch, shape',
    [
        ('small_cnn', (32, 3, 3, 3)),
        ('cifarnet', (32, 3, 5, 5)),
        ('resnet18', (64, 3, 7, 7)),
        ('alexnet', (64, 3, 11, 11)),
        ('googlenet', (64, 3, 7, 7)),
        ('mobilenetv3_small_050', (16, 3, 3, 3)),
        ('test_vit', (64, 3, 16, 16)),
    ],
)
def test_first_layer_filters_are_found_and_random_ones_have_the_score_of_chance(arch, shape):
    torch.manual_seed(1)
    body = create_body(arch, 'random')
    w = first_layer_filters(body)
    assert w.shape == shape
    assert np.array_equal(w, first_layer_filters(SimpleNamespace(model=nn.Sequential(body, nn.Identity()))))
    if shape[-1] > 11:
        return
    t = filter_table({'it': w}, n=40).loc['it']
    assert t.low - 0.02 < t.chance < t.high + 0.02
    assert t.dead == 0
    assert t['size'] == f'{shape[2]} x {shape[3]}'


@pytest.mark.parametrize('arch', ['efficientnet_lite0', 'mobilenet_v2', 'squeezenet1_1'])
def test_pretrained_filters_are_more_edge_like_than_random_ones(arch):
    try:
        w = first_layer_filters(create_body(arch))
    except WeightsError:
        pytest.skip(f'the weights of {arch} are not on this machine')
    t = filter_table({'pretrained': w, 'random': np.random.default_rng(0).normal(size=w.shape)}, n=60)
    assert t.low['pretrained'] > t.chance_high['pretrained'] + 0.2
    assert abs(t.score['random'] - t.chance['random']) < 0.06


@pytest.mark.parametrize('k', [3, 5, 7, 11])
def test_edges_of_any_colour_size_and_contrast_have_a_high_score(k):
    rng = np.random.default_rng(0)
    bank = gabor_bank(k, k)
    noise = rng.normal(size=(30, 3, k, k))
    assert np.allclose(np.linalg.norm(bank, axis=1), 1)
    pure = rng.normal(size=(20, 3, 1, 1)) * bank[rng.integers(len(bank), size=20)].reshape(20, 1, k, k)
    assert np.allclose(gabor_fraction(pure), 1)
    assert np.allclose(gabor_fraction(1e3 * noise), gabor_fraction(noise))
    assert gabor_fraction(noise).mean() < 0.5

    def unit(w):
        return w / np.sqrt((w**2).sum((1, 2, 3), keepdims=True))

    mixed = unit(pure) + unit(noise[:20])
    assert gabor_fraction(noise).mean() < gabor_fraction(mixed).mean() < 1
    assert np.isnan(gabor_fraction(np.concatenate([noise, 1e-6 * noise[:1]]))).tolist() == [False] * 30 + [True]


def test_networks_without_first_layer_filters_are_errors():
    for net, words in (
        ('resnet18', 'give a learner'),
        (nn.Linear(2, 2), 'no convolution'),
        (nn.Conv2d(8, 8, 3), '8 channels'),
    ):
        with pytest.raises(ValueError, match=words):
            first_layer_filters(net)
    with pytest.raises(ValueError, match='only filters of zeros'):
        filter_table({'dead': np.zeros((4, 3, 3, 3))}, n=2)
    grey = np.random.default_rng(0).normal(size=(5, 1, 3, 3))
    assert len(plot_filters({'grey': grey, 'colour': np.zeros((20, 3, 7, 7))}, cols=8).axes) == 2


# ---------------------------------------------------------------- stages


def test_activations_are_those_of_the_stages():
    m = image_model('small_cnn')
    images = [noise_image(seed=i) for i in range(3)]
    with torch.no_grad():
        maps = model_parts(m).stages.maps(batch(m, *images))
    t = activation_table(m, images)
    assert list(t.index) == stage_names(m.model[0])
    assert t.channels.tolist() == [x.shape[1] for x in maps]
    assert t['size'].tolist() == [x.shape[-1] for x in maps]
    assert np.allclose(t['mean'], [float(x.abs().mean()) for x in maps], rtol=1e-4)
    assert np.allclose(t.active, [float((x > 0).float().mean()) for x in maps])
    each = activation_table(m, images, ['a', 'b', 'a'])
    assert np.allclose((2 * each.xs('a', level=1) + each.xs('b', level=1)).active / 3, t.active)
    assert len(plot_activations(m, images[:2]).axes) == 2 * (1 + len(t))
    with pytest.raises(ValueError, match='no images'):
        activation_table(m, [])
    with pytest.raises(ValueError, match='not a chain of stages'):
        activation_table(image_model(NOT_A_CHAIN), images)


def test_neighbours_by_hand_and_their_chance():
    from PIL import Image

    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(
            np.uint8(
                np.clip(np.array([200, 60, 60] if i % 2 else [60, 60, 200]) + rng.normal(0, 25, (32, 32, 3)), 0, 255)
            )
        )
        for i in range(12)
    ]
    torch.manual_seed(0)
    f = extract_features(images, Body(create_body('small_cnn', 'random')), 32)
    labels = ['red' if i % 2 else 'blue' for i in range(12)]
    groups = [i // 4 for i in range(12)]
    t = neighbor_table(f, labels, k=3, groups=groups, n=50)
    assert list(t.index) == list(f.stages)
    assert np.allclose(t.chance, 0.5)
    assert t.value.iloc[0] == 1
    assert ((t.low <= t.value) & (t.value <= t.high)).all()
    assert np.allclose(neighbor_table(f, labels, k=3, n=5).chance, 5 / 11)
    near = nearest_images(f, 5, k=4, groups=groups)
    a = f.numpy('stem').mean(1)
    a = a - a.mean(0)
    s = a @ a[5] / np.linalg.norm(a, axis=1) / np.linalg.norm(a[5])
    s[4:8] = -2
    stem = near[near.stage == 'stem']
    assert [images.index(i) for i in stem.image] == [5, *np.argsort(-s)[:4]]
    assert np.allclose(stem.similarity[1:], np.sort(s)[::-1][:4], atol=1e-5)
    assert plot_nearest(near, size=40).size == (5 * 40, len(f.stages) * 40)
    assert plot_neighbors({'class': t}).axes
    for call, words in (
        (lambda: nearest_images(f, 12), 'there are 12 images'),
        (lambda: nearest_images(f, 0, k=9, groups=groups), '8 images of other groups'),
        (lambda: neighbor_table(f, labels[:3]), '3 labels for 12'),
        (lambda: neighbor_table(f, labels, k=12), 'only 11 images of other groups'),
        (lambda: nearest_images(f, 0, stages='stage9'), 'unknown stage'),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# ---------------------------------------------------------------- Grad-CAM

needs_captum = pytest.mark.skipif(find_spec('captum') is None, reason='the extra explain is not installed')
CHAINS = [
    ('small_cnn', 64, {}),
    ('cifarnet', 32, {}),
    ('efficientnet_lite0', 64, {}),
    ('efficientnet_lite0', 64, {'n_stages': 1}),
    ('mobilenetv3_small_050', 64, {}),
    ('test_resnet', 64, {}),
    ('resnet18', 64, {}),
    ('squeezenet1_1', 64, {}),
    ('densenet121', 64, {}),
    ('alexnet', 64, {}),
    ('googlenet', 64, {}),
]


@needs_captum
@pytest.mark.parametrize('arch, size, kw', CHAINS)
def test_at_the_last_stage_grad_cam_is_the_class_activation_map(arch, size, kw):
    """The weights of a linear head, including its BatchNorm, applied to the maps;
    with the head and with the name of the stage
    """
    m = image_model(arch, size=size, **kw)
    im = noise_image(size)
    stages, (_, norm, _, linear) = m.model[0], m.model[1]
    for v, low in ((norm.running_var, 0.5), (norm.weight.data, 0.5), (norm.running_mean, -1)):
        v.uniform_(low, 1.5)
    with torch.no_grad():
        maps = stages.maps(batch(m, im))[-stages.n_stages :]
        w = ((linear.weight[1] - linear.weight[0]) * norm.weight / (norm.running_var + norm.eps).sqrt()).split(
            [x.shape[1] for x in maps]
        )
        cams = [torch.einsum('c,nchw->nhw', a, x)[:, None] for a, x in zip(w, maps)]
        signed = sum(F.interpolate(c, maps[0].shape[-2:], mode='bilinear') for c in cams)
    assert signed.abs().max() > 0
    for c, evidence in enumerate((-signed, signed)):  # with two classes, evidence for one is evidence against the other
        want = F.interpolate(evidence.relu(), (size, size), mode='bilinear')[0, 0]
        got = grad_cam(m, im, c)
        assert got.dtype == np.float32
        assert np.allclose(got, want / want.max().clamp(min=1e-30), atol=1e-4)
        if stages.n_stages == 1:
            assert np.allclose(grad_cam(m, im, c, stage_names(stages)[-1]), got, atol=1e-4)


@needs_captum
@pytest.mark.parametrize('arch, size, kw', CHAINS)
def test_a_stage_by_name_is_weighted_by_the_gradient_through_the_rest(arch, size, kw):
    "The same with hooks and backward() of PyTorch only"
    m = image_model(arch, size=size, **kw)
    im = noise_image(size, 1)
    stages, head = m.model
    name = stage_names(stages)[max(0, len(stages) - 3)]
    outputs = []

    def watch(module, i, o):
        outputs.append(o)
        o.retain_grad()
        return o.clone()

    hook = getattr(stages, name).register_forward_hook(watch)
    z = log_odds(head(stages(batch(m, im).requires_grad_())))[0, 1]
    hook.remove()
    z.backward()
    signed = (outputs[0].grad.mean((2, 3), keepdim=True) * outputs[0]).sum(1, keepdim=True).detach()
    assert signed.abs().max() > 0
    for c, evidence in enumerate((-signed, signed)):
        want = F.interpolate(evidence.relu(), (size, size), mode='bilinear')[0, 0]
        assert np.allclose(grad_cam(m, im, c, name), (want / want.max().clamp(min=1e-30)).numpy(), atol=1e-4)


@needs_captum
@pytest.mark.parametrize(
    'arch, size',
    [
        ('test_vit', 160),
        ('test_vit2', 160),
        ('test_mambaout', 64),
    ],
)
def test_transformers_have_grad_cam_on_their_tokens(arch, size):
    m = image_model(arch, size=size)
    im = noise_image(size)
    torch.nn.init.normal_(m.model[1][-1].weight)
    attribution = grad_cam(m, im, 'referable')
    other = grad_cam(m, im, 'no')
    assert attribution.shape == (size, size)
    assert np.isfinite(attribution).all()
    assert np.ptp(other - attribution) > 0.5
    for x in m.model.modules():
        assert not x._forward_hooks
    with pytest.raises(ValueError, match="unknown stage 'stage9'"):
        grad_cam(m, im, stage='stage9')


@needs_captum
@pytest.mark.parametrize('head', HEADS)
def test_every_head(head):
    m = image_model('test_resnet', head, classes=tuple('01234'))
    h = [grad_cam(m, noise_image(), c, 'stage2') for c in '01234'] + [grad_cam(m, noise_image(), c) for c in range(5)]
    for x in h:
        assert x.shape == (64, 64)
        assert x.min() >= 0
        assert x.max() <= 1
    assert max(np.ptp(x - h[0]) for x in h[:5]) > 0.1
    assert max(x.max() for x in h[5:]) == 1
    assert np.array_equal(h[5 + m.probs([noise_image()], 'none').argmax()], grad_cam(m, noise_image()))


@needs_captum
@pytest.mark.parametrize('stage', [None, 'stage2'])
def test_a_model_is_not_changed_and_its_fast_copies_are_not_used(stage):
    m = image_model('test_resnet', body=(Runtime(True, True), None))
    m.probs([noise_image()], 'none')
    body = m.model[0]
    copied = body._copy
    assert copied is not None
    m.model.requires_grad_(False)
    body.stages.stage4.requires_grad_(True)
    for x in m.model.modules():
        x.training = False
    m.model[1][1].train()

    def state():
        return (
            [(k, v.clone()) for k, v in m.model.state_dict().items()],
            [x.training for x in m.model.modules()],
            [(p.requires_grad, p.grad) for p in m.model.parameters()],
            [len(x._forward_hooks) + len(x._forward_pre_hooks) + len(x._backward_hooks) for x in m.model.modules()],
        )

    before = state()
    with torch.no_grad():
        attribution = grad_cam(m, noise_image(), 1, stage)
    after = state()
    assert before[1:] == after[1:]
    for (_, a), (_, b) in zip(before[0], after[0]):
        assert torch.equal(a, b)
    assert body._copy is copied
    plain = image_model('test_resnet')
    assert np.allclose(grad_cam(plain, noise_image(), 1, stage), attribution, atol=1e-4)


@needs_captum
def test_a_learner_and_its_saved_model_have_the_same_maps(tmp_path):
    from dr_transfer.core import build_learner, valid_predictions
    from dr_transfer.inference.saved_model import image_model as saved
    from dr_transfer.inference.saved_model import load_model, save_model
    from dr_transfer.synthetic.fundus import make_dr

    make_dr(tmp_path / 'fundus', n=40, size=64, workers=1)
    learn = build_learner(tmp_path / 'fundus', 'dr', arch='test_resnet', weights='random', size=64)
    model = load_model(save_model(learn, tmp_path / 'model'), 'plain')
    im = learn.table.image.iloc[0]
    assert np.allclose(grad_cam(learn, im, 'referable'), grad_cam(model, im, 'referable'), atol=1e-5)
    assert np.array_equal(first_layer_filters(learn), first_layer_filters(model))
    assert activation_table(learn, [im]).equals(activation_table(saved(learn), [im]))
    t = valid_predictions(learn)
    wrong = t.assign(target=['referable' if p == 'no' else 'no' for p in t.prediction])
    assert grad_cam_sheet(model, wrong.head(2), n=2, size=50).size == (200, 50)
    with pytest.raises(ValueError, match='no errors to show'):
        grad_cam_sheet(model, t.assign(target=t.prediction))
    assert plot_grad_cam(model, [im, im], stages=(None, 'stage3'), size=50).size == (150, 100)


@needs_captum
def test_the_figure_of_decisions_shows_the_predicted_class():
    from dr_transfer.metrics.operating_point import OperatingPoint

    m = image_model('test_resnet')
    t = pd.DataFrame(
        {
            'image': [noise_image(seed=0), noise_image(seed=1)],
            'target': ['no', 'referable'],
            'p_no': [0.7, 0.9],
            'p_referable': [0.3, 0.1],
        }
    )
    sheet = np.asarray(grad_cam_sheet(m, t, OperatingPoint(0.2, 'sensitivity', 0.9, 30, 30, 1, 1), size=64))[
        20:
    ]  # below the titles
    hot = [
        np.asarray(overlay(model_parts(m).read(im), grad_cam(m, im, answer)))[20:]
        for im, answer in zip(t.image, ('referable', 'no'))
    ]
    shown = [sheet[:, 64:128], sheet[:, 192:]]
    for h in hot:
        assert any(np.array_equal(h, s) for s in shown)
    assert not np.array_equal(*hot)


def test_grad_cam_on_a_mask_and_its_chance_levels():
    rng = np.random.default_rng(0)
    masks = np.zeros((8, 16, 16), bool)
    for m in masks:
        y, x = rng.integers(0, 12, 2)
        m[y : y + 4, x : x + 4] = True
    perfect = grad_cam_table(masks * 0.7, masks, n=50)
    flat = grad_cam_table(np.ones(masks.shape), masks, n=50)
    blank = grad_cam_table(0.0 * masks, masks, n=50)
    assert perfect.loc['fraction of Grad-CAM on the mask'].value == pytest.approx(1)
    assert perfect.loc['maximum on the mask'].value == 1
    assert perfect.loc['more than other images'].low > 0.3
    for k in (
        'fraction of Grad-CAM on the mask',
        'chance: fraction of the area',
        'chance: Grad-CAM of other images',
        'chance: Grad-CAM rotated',
    ):
        assert flat.loc[k].value == pytest.approx(1 / 16)
    assert blank.loc['without positive evidence'].value == 1
    assert blank.loc['maximum on the mask'].value == 0
    assert np.isnan(blank.loc['fraction of Grad-CAM on the mask'].value)
    field = np.zeros((16, 16), bool)
    field[:, :8] = True
    d = grad_cam_on_mask(np.ones((16, 16)), masks[0] | ~field, field)
    assert d['area'] == (masks[0] & field).mean() * 2
    assert d['fraction'] == pytest.approx(
        ((masks[0] | ~field) & field).sum() / 256
    )  # Grad-CAM outside the field lowers the score
    assert plot_grad_cam_tables({'a': perfect, 'b': flat}).axes
    for call, words in (
        (lambda: grad_cam_on_mask(np.ones((4, 4)), masks[0]), 'as the model reads it'),
        (lambda: grad_cam_on_mask(np.ones((16, 16)), 0 * masks[0]), 'mask is empty'),
        (lambda: grad_cam_table(masks[:2], masks[:2]), '3 or more'),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@needs_captum
def test_bad_input_and_a_missing_library(monkeypatch):
    m = image_model('small_cnn')
    for call, words in (
        (lambda: grad_cam(m, noise_image(), 'severe'), "unknown class 'severe'"),
        (lambda: grad_cam(m, noise_image(), 2), "unknown class '2'"),
        (lambda: grad_cam(m, noise_image(), stage='stage9'), "unknown stage 'stage9'"),
        (lambda: grad_cam(m.model, noise_image()), 'give a learner'),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for name in [o for o in sys.modules if o.split('.')[0] == 'captum']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'captum', None)
    with pytest.raises(ValueError, match=r"pip install 'dr_transfer\[explain\]'"):
        grad_cam(m, noise_image())


def test_modes_are_restored_after_an_error():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.ReLU()))
    net[1].eval()
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert [m.training for m in net.modules()] == [True, True, False, False]
