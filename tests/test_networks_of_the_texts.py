"Train and use the networks of the source texts, with random weights and with weights from a file."

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import dr_transfer.models.backbones as module
from dr_transfer.core import build_learner, fit, predict_probs
from dr_transfer.features.extraction import image_features
from dr_transfer.inference.saved_model import load_model, save_model
from dr_transfer.models.backbones import create_body
from dr_transfer.models.registry import build_network, find_backbone
from dr_transfer.models.stages import layer_groups, stage_names
from dr_transfer.synthetic.fundus import make_dr

NAMES = ['googlenet', 'alexnet', 'cifarnet', 'resnet50', 'vgg16', 'inception_v3', 'xception']
LARGE = NAMES[4:]  # these take 40 s, so only the longer run with real images has them


@pytest.fixture(scope='module')
def fundus_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fundus')
    make_dr(folder, n=16, size=80, seed=0, workers=1)
    return folder


@pytest.mark.parametrize('name', NAMES)
def test_each_network_trains_and_predicts(fundus_data, tmp_path, monkeypatch, request, name):
    w_safetensors = tmp_path / 'w.safetensors'
    if name in LARGE:
        request.getfixturevalue('data_root')
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'cache'))
    torch.manual_seed(0)
    net = build_network(find_backbone(name))
    state = {
        k: v.contiguous() for k, v in net.state_dict().items() if v.numel() < 20e6
    }  # without the largest layers of the classifier
    save_file(state, w_safetensors)
    body = create_body(name, w_safetensors)
    names = stage_names(body)
    assert names[0] == 'stem'
    assert len(names) >= 3
    assert list(layer_groups(body)) == names
    assert body.weights.kind == 'file'
    theirs = {v.data_ptr(): v for v in net.state_dict().values()}
    loaded = list(body.state_dict().values())  # the weights in the file without the classifier
    for v in loaded[:4]:
        assert any(v.shape == t.shape and torch.equal(v, t) for t in theirs.values())
    assert len(loaded) < len(state)

    learn = build_learner(
        fundus_data, 'dr', arch=name, weights=w_safetensors, size=80, bs=4, runtime='plain', stage=names[-1]
    )
    assert learn.model[1][-1].out_features == 2  # instead of a thousand
    before = {k: v.clone() for k, v in learn.model[0].state_dict().items()}
    fit(learn, 'head', epochs=1, say=lambda s: None)  # frozen: bit for bit
    for k, v in learn.model[0].state_dict().items():
        assert torch.equal(v, before[k])
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4)
    after = learn.model[0].state_dict()
    assert sum(not torch.equal(v, before[k]) for k, v in after.items() if v.is_floating_point()) > len(before) // 2

    images = sorted((fundus_data / 'images').iterdir())[:3]
    f = image_features(images, name, weights=w_safetensors, size=80, reader='fundus', fit='pad')
    assert set(f.stages) == set(names)
    for n in names:
        assert np.isfinite(f.numpy([n])).all()
    p = predict_probs(learn, images)
    assert np.abs(load_model(save_model(learn, tmp_path / 'model'), 'plain').probs(images) - p).max() < 1e-5


@pytest.mark.parametrize('name', ['googlenet', 'alexnet', 'resnet50'])
def test_weights_of_a_hub_are_those_of_the_body(name, monkeypatch, tmp_path):
    torch.manual_seed(1)
    state = build_network(find_backbone(name)).state_dict()
    save_file(state, tmp_path / 'w.safetensors')
    monkeypatch.setattr(module, '_download', lambda spec: tmp_path / 'w.safetensors')
    monkeypatch.setattr(module, '_find_file', lambda spec: None)
    body = create_body(name)
    assert body.weights.kind == 'hub'
    assert torch.equal(next(iter(body.state_dict().values())), next(iter(state.values())))


def test_auxiliary_classifiers_in_a_file_are_ignored(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    save_file(net.state_dict(), tmp_path / 'w.safetensors')
    assert any(k.startswith('aux1') for k in net.state_dict())
    body = create_body('googlenet', tmp_path / 'w.safetensors').eval()
    x = torch.randn(1, 3, 64, 64)
    inner = nn.Sequential(
        *[m for n, m in net.eval().named_children() if n not in ('aux1', 'aux2', 'avgpool', 'dropout', 'fc')]
    )
    with torch.no_grad():
        assert torch.equal(body(x), inner(x))
        assert inner(x).std() > 0


def test_cifarnet_has_no_weights_to_download():
    with pytest.raises(module.WeightsError, match="no pretrained weights for 'cifarnet'"):
        create_body('cifarnet')
