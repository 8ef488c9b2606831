"Test fully connected layers as convolutions: equal logits at the native size, and for each window of a larger image."

import numpy as np
import pytest
import torch
from torch import nn

from dr_transfer.inference.saved_model import ImageModel
from dr_transfer.inference.score_maps import as_convolutions, dense_model, score_map
from dr_transfer.models.backbones import create_body
from dr_transfer.models.network import HEADS, create_head, head_inputs
from dr_transfer.models.networks import CifarNet


def stirred(net):
    "Random values for BatchNorm"
    torch.manual_seed(1)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for t, low in ((m.running_mean, -1), (m.bias.data, -1), (m.running_var, 0.5), (m.weight.data, 0.5)):
                t.uniform_(low, 1.5)
    return net.eval()


def parts(name):
    """The convolutions and the other layers of a network of torchvision,
    with weights that keep the variance of an image
    """
    import torchvision

    net = stirred(
        getattr(torchvision.models, name)(
            weights=None, **({'aux_logits': False, 'init_weights': False} if name == 'googlenet' else {})
        )
    )
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    last.weight /= net(torch.randn(2, 3, 224, 224)).std()  # logits of ordinary size
    if name == 'alexnet' or name.startswith('vgg'):
        return net, net.features, nn.Sequential(net.avgpool, nn.Flatten(), net.classifier)
    inner = nn.Sequential(
        *[m for n, m in net.named_children() if n not in ('avgpool', 'dropout', 'fc', 'aux1', 'aux2')]
    )
    return net, inner, nn.Sequential(net.avgpool, nn.Flatten(), getattr(net, 'dropout', nn.Identity()), net.fc)


@torch.no_grad()
@pytest.mark.parametrize(
    'name, input_size',
    [
        ('alexnet', 6),
        ('vgg16', 7),
        ('googlenet', 7),
        ('resnet18', 7),
    ],
)
def test_score_maps_of_the_networks_of_the_texts(name, input_size):
    net, inner, end = parts(name)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    everywhere = as_convolutions(end, (input_size, input_size))
    for m in everywhere.modules():
        assert not isinstance(m, (nn.Linear, nn.AdaptiveAvgPool2d))
    out = everywhere(inner(x))
    assert out.shape == (2, 1000, 1, 1)
    assert (out[0] - out[1]).std() > 1e-2 * out.std(), 'two images do not differ by a thousand tolerances'
    assert torch.allclose(out[..., 0, 0], net(x), atol=1e-5, rtol=1e-5)
    assert everywhere(inner(torch.zeros(1, 3, 288, 256))).shape[2:] == (3, 2)


@torch.no_grad()
@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize(
    'arch, size',
    [
        ('test_resnet', 64),
        ('cifarnet', 32),
        ('efficientnet_lite0', 96),
    ],
)
def test_each_position_of_a_score_map_equals_the_head_on_its_window(arch, size, head):
    torch.manual_seed(0)
    stages = create_body(arch, 'random')
    stages = stirred(stages)
    head = stirred(create_head(head, head_inputs(stages, head, size), 5))
    model = nn.Sequential(stages, head)
    everywhere = dense_model(model, size)
    x = torch.randn(2, 3, size, size)
    assert torch.allclose(everywhere(x)[..., 0, 0], model(x), atol=1e-5, rtol=1e-5)
    big = torch.randn(1, 3, 2 * size, size + size // 2)
    maps = stages(big)
    out = everywhere(big)
    h, w = stages(x).shape[-2:]
    assert out.shape[2:] == (maps.shape[2] - h + 1, maps.shape[3] - w + 1)
    result = min(out.shape[2:])
    assert result > 1
    for i, j in ((0, 0), (out.shape[2] - 1, out.shape[3] - 1)):
        assert torch.allclose(out[..., i, j], head(maps[..., i : i + h, j : j + w]), atol=1e-5, rtol=1e-5)


def test_layers_that_cannot_be_convolutions_are_named():
    for layers, words in (
        (nn.Sequential(nn.Flatten(), nn.Softmax(1)), 'Softmax'),
        (nn.Sequential(nn.AdaptiveAvgPool2d(3)), 'pooled to 3 by 3'),
        (nn.LSTM(2, 2), 'LSTM'),
    ):
        with pytest.raises(ValueError, match=words):
            as_convolutions(layers, (5, 5))
    with pytest.raises(ValueError, match='is not a chain of convolutions'):
        dense_model(nn.Sequential(create_body('test_vit', 'random'), nn.Linear(64, 2)), 160)


def test_a_score_map_is_of_probabilities_and_finds_the_bright_half():
    stages = create_body('cifarnet', 'random')
    head = create_head('linear', stages.n_out, 2)
    about = {
        'arch': 'cifarnet',
        'stage': 'last',
        'n_stages': 1,
        'head': {},
        'task': '',
        'target': '',
        'size': 32,
        'reader': 'photo',
        'fit': 'squish',
        'mean': [0.5] * 3,
        'std': [0.5] * 3,
        'classes': ['a', 'b'],
        'views': 'none',
    }
    im = np.zeros((128, 128, 3), np.uint8)
    im[:, 64:] = 255
    p = score_map(ImageModel(nn.Sequential(stages, head), about), im, scale=4)
    assert p.shape[0] == 2
    assert np.allclose(p.sum(0), 1, atol=1e-5)
    assert p.shape[1] == p.shape[2] > 8
    left = p[0, 2:-2, 1]
    right = p[0, 2:-2, -2]  # windows far from the edge between the halves
    assert np.ptp(left) < 0.02
    assert np.ptp(right) < 0.02
    result = abs(left.mean() - right.mean())
    assert result > np.ptp(left)


@pytest.mark.parametrize('n', [2, 5])
def test_cifarnet_is_as_large_as_the_study_states(n):
    net = CifarNet(n)
    assert 0.14e6 < sum(p.numel() for p in net.parameters()) < 0.16e6  # "about 0.15 million"
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, n)
    assert net.features(torch.zeros(1, 3, 32, 32)).shape == (
        1,
        64,
        4,
        4,
    )
