"What a frozen network says of an image: against the same thing computed by hand."
import numpy as np
import pytest
import torch
from torch import nn

from dr_transfer.backbones import create_body
from dr_transfer.features import AveragePool, Body, linear_head, view_features, view_probs
from dr_transfer.speed import SETTINGS
from dr_transfer.views import VIEWS, read_image

MEAN, STD = (.5, .4, .3), (.2, .3, .4)
TURNS = {'none': [lambda a: a], 'mirror': [lambda a: a, lambda a: a[:, ::-1]], 'quarter_turns': [lambda a, k=k: np.rot90(a, k) for k in range(4)]}


@pytest.fixture(scope='module')
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + 7*i, 60, 3), dtype=np.uint8) for i in range(5)]


@pytest.fixture(scope='module')
def stages():
    torch.manual_seed(0)
    return create_body('test_resnet', 'random')


def read(source): return read_image(source, 32)


def by_hand(net, images, views):
    "(images, views, whatever comes out), one image and one view at a time"
    def tensor(a): return (torch.from_numpy(a.copy()).permute(2, 0, 1)[None].float()/255 - torch.tensor(MEAN)[:, None, None])/torch.tensor(STD)[:, None, None]
    with torch.no_grad(): return torch.stack([torch.stack([net(tensor(v(np.array(read(s)))))[0] for v in TURNS[views]]) for s in images])


def test_every_set_of_views_is_tested(): assert set(TURNS) == set(VIEWS)


@pytest.mark.parametrize('views', sorted(TURNS))
@pytest.mark.parametrize('bs', [None, 1, 2, 99])
def test_view_features(stages, images, views, bs):
    f = view_features(Body(stages), images, read, MEAN, STD, views, bs)
    want = by_hand(nn.Sequential(stages, AveragePool()).eval(), images, views)
    assert f.shape == (5, len(TURNS[views]), 96) and f.dtype == torch.float32
    assert torch.allclose(f, want, atol=1e-4, rtol=1e-4)
    if len(TURNS[views]) > 1: assert (f[:, 0] - f[:, 1]).abs().max() > 1e-3        # the views do differ


@pytest.mark.parametrize('views', sorted(TURNS))
def test_view_probs(stages, images, views):
    torch.manual_seed(1)
    model = nn.Sequential(Body(stages), linear_head(96, 3)).train()
    p = view_probs(model, images, read, MEAN, STD, views, bs=2)
    assert not model.training
    assert p.shape == (5, 3) and p.dtype == np.float32
    assert p.sum(1) == pytest.approx(np.ones(5), abs=1e-5)
    assert p == pytest.approx(by_hand(model, images, views).softmax(-1).mean(1).numpy(), abs=1e-5)


def test_features_of_a_body_in_training_mode(stages, images):
    "The body is put into evaluation mode, and its statistics stay"
    body = Body(stages).train()
    before = {k: v.clone() for k, v in body.state_dict().items()}
    view_features(body, images, read, MEAN, STD)
    assert not body.training
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())


def test_features_can_be_trained_on(stages, images):
    f = view_features(Body(stages), images, read, MEAN, STD)
    nn.Linear(96, 2)(f[:, 0]).sum().backward()
    assert not f.requires_grad


def test_a_transformer_has_features_too(images):
    torch.manual_seed(0)
    body = create_body('test_vit', 'random')
    size = body.spec.size
    f = view_features(Body(body), images[:2], lambda s: read_image(s, size), MEAN, STD, 'quarter_turns')
    assert f.shape == (2, 4, body.n_out) and len(np.unique(f.numpy().round(5), axis=0)) == 2


def test_no_images(stages): assert len(view_probs(nn.Sequential(Body(stages), linear_head(96, 2)), [], read, MEAN, STD)) == 0


# ---------------------------------------------------------------- the parts

def test_average_pool():
    x = torch.rand(2, 3, 4, 5)
    assert torch.allclose(AveragePool()(x), x.flatten(2).mean(2))
    assert torch.equal(AveragePool()(x[..., 0, 0]), x[..., 0, 0])


def test_linear_head_is_linear():
    torch.manual_seed(0)
    head = linear_head(6, 4).eval()
    head[1].running_mean.normal_(); head[1].running_var.uniform_(.5, 2)
    a, b = torch.randn(2, 3, 6)
    with torch.no_grad():
        assert torch.allclose(head(.3*a + .7*b), .3*head(a) + .7*head(b), atol=1e-5)      # affine: the weights sum to one
        maps = a[..., None, None].expand(-1, -1, 5, 5)
        assert torch.allclose(head(maps), head(a), atol=1e-5)
    assert head(a).shape == (3, 4)


@pytest.mark.parametrize('name', sorted(SETTINGS))
def test_a_body_in_each_setting(name):
    torch.manual_seed(0)
    stages = create_body('test_resnet', 'random')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = stages(x)
        body, kinds = Body(stages, SETTINGS[name]), []
        hook = stages[-1].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
        out = body(x)
        hook.remove()
    assert out.dtype == torch.float32 and kinds == [torch.bfloat16 if name == 'bf16' else torch.float32]
    if name == 'plain': assert torch.equal(out, want)
    assert (out - want).norm() < (.05 if name == 'bf16' else 1e-4)*want.norm()
    conv = next(m for m in stages.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.in_channels > 3)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) == SETTINGS[name].channels_last


def test_training_has_a_setting_of_its_own():
    torch.manual_seed(0)
    stages = create_body('test_resnet', 'random')
    x, bf16, plain = torch.randn(2, 3, 64, 64), SETTINGS['bf16'], SETTINGS['plain']
    body = Body(stages, bf16, plain)
    assert body.setting(x) == plain                                             # gradients are needed
    with torch.no_grad(): assert body.setting(x) == bf16
    stages.requires_grad_(False)
    assert body.setting(x) == bf16                                              # frozen: a forward pass and no more
    assert Body(stages.requires_grad_(True), bf16).setting(x) == plain          # not yet known: plain
