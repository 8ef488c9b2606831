"""A model adapted to another site without labels: what it changes, when it refuses, and what is written."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers import content, error_line, good, save_changed
from learners import same_state, state_of
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
    home = root / 'home'
    same = root / 'same'
    make_dr(home, n=160, size=48, seed=1)
    good('train', home, *FAST, '--plan', 'head', '--valid', '0.4', '--out', root / 'run')
    make_dr(same, n=80, size=48, seed=2)
    images = dt.label_table(same).image.tolist()
    save_changed(images, 'warmer', root / 'other')
    return root


@pytest.fixture(scope='module')
def other(sites):
    folder = sites / 'other'
    return sorted(folder.iterdir())


def test_features_of_the_new_site_are_standardised_and_nothing_else_changes(sites, other):
    n = len(other)
    old = dt.load_model(sites / 'run' / 'model')
    card = old.card
    before = state_of(old)
    new = adapt_model(old, other)
    after = new.model.state_dict()
    _, features = view_outputs(old.model, other, old.read, card.mean, card.std, card.views)
    features = features.reshape(-1, features.shape[-1])
    statistics = {
        '1.1.running_mean': features.mean(0),
        '1.1.running_var': features.var(0),
    }
    weight = n / (n + 16)
    for name, here in statistics.items():
        expected = weight * here + (1 - weight) * before[name].numpy()
        assert after[name].numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    changed = {k for k in after if not np.array_equal(before[k], after[k])}
    assert changed == set(statistics)
    assert same_state(before, state_of(old))
    assert new.card.decision == card.decision
    assert new.card.made_from.images == n


def test_shift_is_the_root_mean_square_of_the_features():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (4000, 50))
    mean = np.full(50, 3.0)
    variance = np.full(50, 4.0)
    half = pytest.approx(0.5, abs=0.03)
    assert feature_shift(x + 1, mean, variance) == half
    assert feature_shift(x, mean, variance) < 0.05
    variance[:10] = 0  # ten features that never vary in training
    assert feature_shift(x + 1, mean, variance) == half


def test_images_of_the_same_site_are_refused(sites):
    run = sites / 'run'
    same = sites / 'same'
    out = sites / 'none'
    model = dt.load_model(run / 'model')
    images = dt.label_table(same).image.tolist()
    with pytest.raises(AdaptationError, match='adapting would not help: the images are like the training images'):
        adapt_model(model, images)
    line = error_line('adapt', run, same / 'images', '--out', out)
    assert 'Use the model as it is' in line
    assert not out.exists()


def test_a_new_run_is_written_and_the_old_one_is_unchanged(sites, tmp_path):
    run = sites / 'run'
    folder = sites / 'other'
    new = tmp_path / 'new'
    predictions = tmp_path / 'p.csv'
    page = tmp_path / 'check.html'
    before = content(run)
    broken = folder / 'broken.png'
    broken.write_bytes(b'no image')
    try:
        printed = good('adapt', run, folder, '--resamples', '100', '--out', new).out
    finally:
        broken.unlink()
    assert content(run) == before
    assert 'images: 81, of which 1 cannot be read' in printed
    assert 'skipped: ' in printed
    assert 'accuracy to expect: ' in printed
    text = (new / 'record.json').read_text()
    record = json.loads(text)
    assert record['made_from']['command'] == 'adapt'
    assert record['validation'] is None
    assert not (new / 'predictions.csv').exists()
    good('predict', new, folder, '--out', predictions)
    model = dt.load_model(new / 'model')
    assert len(pd.read_csv(predictions)) == 80
    assert model.card.made_from.images == 80
    again = good('check', new, folder, '--resamples', '100', '--out', page)
    assert 'the run has no reference.csv' in again.out


@pytest.mark.parametrize('n', [1, 3, 49])
def test_a_few_images_are_too_few(sites, other, tmp_path, n):
    few = tmp_path / 'few'
    few.mkdir()
    for file in other[:n]:
        image = Image.open(file)
        image.save(few / file.name)
    out = tmp_path / 'new'
    line = error_line('adapt', sites / 'run', few, '--out', out)
    assert f'{n} images: adapting a model needs 50 or more' in line
    assert not out.exists()


def test_places_that_are_not_written_and_models_that_cannot_be_adapted(sites, tmp_path):
    run = sites / 'run'
    folder = sites / 'other'
    for place in (run, folder):
        line = error_line('adapt', run, folder, '--out', place / 'new')
        assert 'lies in' in line
    out = tmp_path / 'x'
    line = error_line('adapt', run / 'model', folder, '--out', out)
    assert 'no predictions.csv' in line
    line = error_line('adapt', sites / 'home', folder, '--out', out)
    assert 'not a model folder' in line
    assert not out.exists()
