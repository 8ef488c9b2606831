"""A model adapted to another site without labels: what it changes, when it refuses, and what is written."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers import content, error_line, good, save_changed
from PIL import Image

import dr_transfer as dt
from dr_transfer.evaluation.adaptation import AdaptationError, adapt_model, feature_shift
from dr_transfer.models.network import view_outputs
from dr_transfer.synthetic.fundus import make_dr

pytestmark = pytest.mark.usefixtures('with_shared_cache')
FAST = ('--task', 'dr', '--size', '48', '--weights', 'random', '--arch', 'test_resnet', '--runtime', 'plain')


@pytest.fixture(scope='module')
def sites(tmp_path_factory):
    "A run, other images of its site, and images of a camera with warmer light."
    root = tmp_path_factory.mktemp('adapt')
    make_dr(root / 'home', n=160, size=48, seed=1)
    good('train', root / 'home', *FAST, '--plan', 'head', '--valid', '0.4', '--out', root / 'run')
    make_dr(root / 'same', n=80, size=48, seed=2)
    images = dt.label_table(root / 'same').image.tolist()
    save_changed(images, 'warmer', root / 'other')
    return root


@pytest.fixture(scope='module')
def other(sites):
    return sorted((sites / 'other').iterdir())


def test_features_of_the_new_site_are_standardised_and_nothing_else_changes(sites, other):
    old = dt.load_model(sites / 'run' / 'model')
    before = {k: v.clone() for k, v in old.model.state_dict().items()}
    new = adapt_model(old, other)
    _, features = view_outputs(old.model, other, old.read, old.card.mean, old.card.std, old.card.views)
    features = features.reshape(-1, features.shape[-1])
    weight = len(other) / (len(other) + 16)
    for name, here in (('running_mean', features.mean(0)), ('running_var', features.var(0))):
        expected = weight * here + (1 - weight) * before[f'1.1.{name}'].numpy()
        assert getattr(new.model[1][1], name).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    after = new.model.state_dict()
    assert {k for k in after if not np.array_equal(before[k], after[k])} == {'1.1.running_mean', '1.1.running_var'}
    assert all(np.array_equal(before[k], v) for k, v in old.model.state_dict().items())
    assert (new.card.decision, new.card.made_from.images) == (old.card.decision, len(other))


def test_shift_is_the_root_mean_square_of_the_features():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (4000, 50))
    result = feature_shift(x + 1, np.full(50, 3.0), np.full(50, 4.0))
    assert result == pytest.approx(0.5, abs=0.03)
    assert feature_shift(x, np.full(50, 3.0), np.full(50, 4.0)) < 0.05
    constant = np.where(np.arange(50) < 10, 0, 4.0)  # ten features that never vary in training
    assert feature_shift(x + 1, np.full(50, 3.0), constant) == pytest.approx(0.5, abs=0.03)


def test_images_of_the_same_site_are_refused(sites):
    model = dt.load_model(sites / 'run' / 'model')
    with pytest.raises(AdaptationError, match='adapting would not help: the images are like the training images'):
        adapt_model(model, dt.label_table(sites / 'same').image.tolist())
    line = error_line('adapt', sites / 'run', sites / 'same' / 'images', '--out', sites / 'none')
    assert 'Use the model as it is' in line
    assert not (sites / 'none').exists()


def test_a_new_run_is_written_and_the_old_one_is_unchanged(sites, tmp_path):
    before = content(sites / 'run')
    (sites / 'other' / 'broken.png').write_bytes(b'no image')
    try:
        printed = good('adapt', sites / 'run', sites / 'other', '--resamples', '100', '--out', tmp_path / 'new').out
    finally:
        (sites / 'other' / 'broken.png').unlink()
    assert content(sites / 'run') == before
    assert 'images: 81, of which 1 cannot be read' in printed
    assert 'skipped: ' in printed
    assert 'accuracy to expect: ' in printed
    record = json.loads((tmp_path / 'new' / 'record.json').read_text())
    assert record['made_from']['command'] == 'adapt'
    assert record['validation'] is None
    assert not (tmp_path / 'new' / 'predictions.csv').exists()
    good('predict', tmp_path / 'new', sites / 'other', '--out', tmp_path / 'p.csv')
    model = dt.load_model(tmp_path / 'new' / 'model')
    p = pd.read_csv(tmp_path / 'p.csv')
    assert len(p) == 80
    assert model.card.made_from.images == 80
    again = good('check', tmp_path / 'new', sites / 'other', '--resamples', '100', '--out', tmp_path / 'check.html')
    assert 'the run has no reference.csv' in again.out


@pytest.mark.parametrize('n', [1, 3, 49])
def test_a_few_images_are_too_few(sites, other, tmp_path, n):
    (tmp_path / 'few').mkdir()
    for image in other[:n]:
        Image.open(image).save(tmp_path / 'few' / image.name)
    line = error_line('adapt', sites / 'run', tmp_path / 'few', '--out', tmp_path / 'new')
    assert f'{n} images: adapting a model needs 50 or more' in line
    assert not (tmp_path / 'new').exists()


def test_places_that_are_not_written_and_models_that_cannot_be_adapted(sites, tmp_path):
    assert 'lies in' in error_line('adapt', sites / 'run', sites / 'other', '--out', sites / 'run' / 'new')
    assert 'lies in' in error_line('adapt', sites / 'run', sites / 'other', '--out', sites / 'other' / 'new')
    assert 'no predictions.csv' in error_line(
        'adapt', sites / 'run' / 'model', sites / 'other', '--out', tmp_path / 'x'
    )
    line = error_line('adapt', sites / 'home', sites / 'other', '--out', tmp_path / 'x')
    assert 'not a model folder' in line
    assert not (tmp_path / 'x').exists()
