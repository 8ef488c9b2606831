"""Images unlike the training images: other kinds of images are flagged, new patients of the same site are not."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import good, tool
from PIL import Image, ImageDraw

import dr_transfer as dt
from dr_transfer.features.unlike import training_distribution
from dr_transfer.metrics.scores import auc
from dr_transfer.synthetic.fundus import make_dr

pytestmark = pytest.mark.usefixtures('with_shared_cache')
N = 40  # images of each kind


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A model of synthetic fundus images."
    root = tmp_path_factory.mktemp('unlike')
    make_dr(root / 'fundus', n=240, size=96, seed=1)
    how = ('--task', 'dr', '--size', '64', '--valid', '0.35', '--plan', 'head', '--runtime', 'plain')
    good('train', root / 'fundus', *how, '--out', root / 'run')
    return dt.load_model(root / 'run' / 'model')


def shapes(rng):
    "Rectangles of random colours"
    im = Image.new('RGB', (96, 96), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(im)
    for _ in range(6):
        x = np.sort(rng.integers(0, 96, (2, 2)), axis=0)
        color = rng.integers(0, 256, 3).tolist()
        draw.rectangle(x.ravel().tolist(), fill=tuple(color))
    return im


def other_images(kind, folder):
    rng = np.random.default_rng(3)
    if kind == 'flowers':
        dt.make_flowers(folder, n=N, size=96)
        return dt.label_table(folder).image.tolist()
    if kind == 'noise':
        return [Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(N)]
    return [shapes(rng) for _ in range(N)]


def distances_of(model, images):
    _, distances = model.outputs(images)
    return distances


@pytest.fixture(scope='module')
def unseen(tmp_path_factory, model):
    "Distances of new patients of the same site."
    folder = tmp_path_factory.mktemp('unseen') / 'fundus'
    make_dr(folder, n=120, size=96, seed=7)
    images = dt.label_table(folder).image.tolist()
    return distances_of(model, images)


def test_few_new_patients_of_the_site_are_flagged(unseen):
    flagged = unseen >= 1
    assert flagged.mean() <= 0.08  # 3 % are expected; 120 images of 60 patients


@pytest.mark.parametrize('kind', ['flowers', 'noise', 'shapes'])
def test_other_kinds_of_images_are_flagged(model, unseen, kind, tmp_path):
    images = other_images(kind, tmp_path / 'images')
    distances = distances_of(model, images)
    flagged = distances >= 1
    assert flagged.mean() >= 0.95
    y = np.repeat([0, 1], [len(unseen), len(distances)])
    scores = np.concatenate([unseen, distances])
    assert auc(y, scores) > 0.99


def test_the_limit_is_a_quantile_of_the_held_out_images():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(400, 30))
    held_out = rng.normal(size=(200, 30))
    new = rng.normal(size=(2000, 30))
    d = training_distribution(train, held_out, quantile=0.9)
    within = d.distance(held_out) < 1
    assert within.mean() == pytest.approx(0.9, abs=0.01)
    within = d.distance(new) < 1
    assert within.mean() == pytest.approx(0.9, abs=0.05)
    beyond = d.distance(new + 3) > 1
    assert beyond.mean() > 0.99
    assert training_distribution(train[:49], held_out) is None
    assert training_distribution(train, held_out[:24]) is None


def test_it_is_saved_with_the_model_and_small(model, tmp_path):
    folder = dt.save_model(model, tmp_path / 'model')
    again = dt.load_model(folder)
    rng = np.random.default_rng(0)
    images = [shapes(rng) for _ in range(3)]
    before = distances_of(model, images)
    after = distances_of(again, images)
    assert np.array_equal(after, before)
    size = 0
    for value in vars(model.distribution).values():
        if isinstance(value, np.ndarray):
            size += value.nbytes
    assert size < 1_000_000


# ---------------------------------------------------------------- the study on photographs


@pytest.fixture
def study(monkeypatch):
    "tools/unlike_study.py, which uses another script."
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / 'tools')
    return tool('unlike_study')


def simulated(study):
    "Features of 400 photographs of 200 patients; others are far away, or of the same kind."
    rng = np.random.default_rng(0)
    groups = np.array([f'p{i // 2}' for i in range(400)], object)
    others = {
        'far': rng.normal(4, 1, (60, 12)),
        'same': rng.normal(size=(200, 12)),
    }
    return study.Model(
        name='model',
        x=rng.normal(size=(400, 12)),
        y=np.arange(400) % 2,
        groups=groups,
        others=others,
    )


def test_the_study_compares_each_photograph_once_with_a_model_of_other_patients(study):
    model = simulated(study)
    parts = study.parts(model)
    unseen = np.concatenate([part[2] for part in parts])
    assert sorted(unseen) == list(range(400))
    for train, valid, new in parts:
        assert not set(model.groups[new]) & set(model.groups[train])
        assert not set(model.groups[new]) & set(model.groups[valid])
        assert not set(model.groups[valid]) & set(model.groups[train])
        assert len(train) > 1.5 * len(valid)


def test_the_study_measures_each_score_against_each_kind_of_image(study):
    t = pd.DataFrame(study.measured(simulated(study)))
    assert sorted(t.score) == sorted([*study.SCORES] * 2)
    far = t[t['other images'] == 'far']
    same = t[t['other images'] == 'same']
    assert (far.auc > 0.999).all()
    assert (far.flagged == 1).all()
    assert (far.fpr < 0.02).all()
    assert same.auc.between(0.4, 0.6).all()
    assert (same.fpr > 0.85).all()
    assert (t['unseen flagged'] < 0.08).all()
    assert (t['unseen flagged, most'] >= t['unseen flagged']).all()
    assert (t['flagged, least'] <= t.flagged).all()


def test_the_study_counts_what_is_flagged(study):
    found = study.compared(unseen=np.arange(100), other=np.arange(90, 110), limit=100)
    assert found['auc'] == pytest.approx(0.975)
    assert found['fpr'] == 0.1
    assert found['flagged'] == 0.5
    assert found['unseen flagged'] == 0


def test_the_score_of_the_study_is_the_distance_of_the_library(study):
    rng = np.random.default_rng(0)
    train, valid, new = rng.normal(size=(3, 200, 10))
    library = training_distribution(train, valid)
    fitted = study.Library().fit(train, valid)
    limit = np.quantile(fitted.distance(valid), study.QUANTILE, method='higher')
    assert limit == pytest.approx(library.limit)
    assert fitted.distance(new) / limit == pytest.approx(library.distance(new))


@pytest.mark.parametrize('kind', ['synthetic CT', 'drawn shapes', 'noise'])
def test_the_images_of_the_study_differ_and_are_the_same_each_time(study, kind):
    images = study.MADE[kind](12)
    content = [im.tobytes() for im in images]
    again = [im.tobytes() for im in study.MADE[kind](12)]
    assert content == again
    assert len(set(content)) == 12
    assert {im.mode for im in images} == {'RGB'}
