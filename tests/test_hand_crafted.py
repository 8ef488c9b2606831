"Test hand-crafted features: known numbers of spots, disjoint masks, stored features, errors, and the classifier."

import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone

pytest.importorskip('skimage')

from dr_transfer.evaluation import hand_crafted as hand_crafted
from dr_transfer.evaluation.hand_crafted import (
    FEATURES,
    HandCraftedClassifier,
    cross_validate_hand_crafted,
    feature_frame,
    lesion_features,
    lesion_table,
)
from dr_transfer.evaluation.segmentation import (
    SEGMENT_SIZE,
    Segmentation,
    _eccentricity,
    overlay,
    score_lesions,
    segment,
)
from dr_transfer.metrics.scores import auc
from dr_transfer.metrics.screening import compare_tables, measure_table
from dr_transfer.synthetic.fundus import draw_fundus, make_dr

Y, X = np.mgrid[:SEGMENT_SIZE, :SEGMENT_SIZE]


def disk(x, y, r):
    return np.hypot(X - x, Y - y) <= r


@pytest.fixture(scope='module')
def example():
    "A fundus image with lesions, its truth, and its segmentation."
    pixels, truth = draw_fundus(3, seed=21, size=256, camera=7)
    return pixels, truth, segment(pixels)


def painted(dark=(), bright=(), vessels=None):
    "Return a segmentation with disks (x, y, radius) as spots"
    masks = [
        np.any([np.zeros((SEGMENT_SIZE, SEGMENT_SIZE), bool), *(disk(*o) for o in spots)], 0)
        for spots in (dark, bright)
    ]
    empty = np.zeros((SEGMENT_SIZE, SEGMENT_SIZE), bool)
    image = np.zeros((SEGMENT_SIZE, SEGMENT_SIZE, 3), np.uint8)
    strength = np.where(masks[0], 1.7, np.where(masks[1], 2.5, 0)).astype(np.float32)
    return Segmentation(
        image, None, disk(255.5, 255.5, 250), empty if vessels is None else vessels, empty, (150, 256), *masks, strength
    )


# ---------------------------------------------------------------- features


def test_painted_spots_are_counted_and_measured():
    seg = painted(dark=[(100, 100, 2), (300, 100, 2), (350, 350, 8), (360, 120, 10)], bright=[(150, 300, 5)])
    f = lesion_features(seg)
    assert (f['microaneurysm_count'], f['haemorrhage_count'], f['exudate_count']) == (2, 2, 1)
    field = seg.field.sum()
    assert f['haemorrhage_area'] == pytest.approx(1000 * (disk(350, 350, 8).sum() + disk(360, 120, 10).sum()) / field)
    assert f['haemorrhage_largest'] == pytest.approx(1000 * disk(360, 120, 10).sum() / field)
    assert f['haemorrhage_eccentricity'] < 0.1 < 0.9 < f['haemorrhage_solidity']
    assert (f['dark_over_1.5'], f['dark_over_2'], f['bright_over_2'], f['bright_over_3']) == (4, 0, 1, 0)
    assert f['dark_quadrants'] == 3
    assert f['bright_nearest_fovea'] == pytest.approx(44 / 256)
    assert f['dark_near_fovea'] == 0
    t = lesion_table(seg)
    assert len(t) == 5
    assert t[t.kind == 'exudate'][['x', 'y']].round().values.tolist() == [[150, 300]]
    assert t.diameter.max() == pytest.approx(20 / 256, rel=0.05)


def test_without_lesions_their_features_are_zero():
    f = lesion_features(painted())
    away = {k for k in FEATURES if k.endswith('nearest_fovea')}
    assert tuple(f) == FEATURES
    assert np.isfinite(list(f.values())).all()
    for k, v in f.items():
        if k not in away | {'vessel_tortuosity'}:
            assert v == 0
    for k in away:
        assert f[k] == 2
    assert lesion_table(painted()).empty


def test_vessels_are_measured():
    straight = (np.abs(Y - 256) <= 2) & (np.abs(X - 256) < 150)
    bent = (np.abs(np.hypot(X - 256, Y - 256) - 100) <= 2) & (Y < 256)
    s, b = (lesion_features(painted(vessels=v)) for v in (straight, bent))
    assert s['vessel_length'] == pytest.approx(295 / 256, rel=0.03)
    assert s['vessel_width'] == pytest.approx(5 / 256, rel=0.05)
    assert s['vessel_area'] == pytest.approx(1000 * straight.sum() / painted().field.sum())
    assert s['vessel_tortuosity'] == 1
    assert b['vessel_tortuosity'] > 1.1
    assert s['vessel_branches'] == 0
    assert lesion_features(painted(vessels=straight | straight.T))['vessel_branches'] > 0
    assert s['vessel_dimension'] == pytest.approx(1, abs=0.1)
    assert hand_crafted._box_dimension(np.ones((SEGMENT_SIZE, SEGMENT_SIZE), bool)) == pytest.approx(2)


def test_eccentricity_is_that_of_scikit_image():
    from scipy import ndimage as ndi
    from skimage.measure import regionprops_table

    label, n = ndi.label(np.random.default_rng(0).random((80, 80)) > 0.7, np.ones((3, 3)))
    assert np.allclose(
        _eccentricity(label, n),
        regionprops_table(label, properties=('eccentricity',))['eccentricity'],
        atol=1e-6,
    )


def test_scores_of_lesions():
    mask = painted(dark=[(50, 50, 3), (90, 50, 3), (200, 200, 4)]).dark
    detected, correct = score_lesions(mask, [(52, 50, 3), (300, 300, 5)])
    assert detected.tolist() == [True, False]
    assert correct.tolist() == [True, False, False]
    detected, correct = score_lesions(np.zeros((SEGMENT_SIZE, SEGMENT_SIZE), bool), [(5, 5, 2)])
    assert detected.tolist() == [False]
    assert len(correct) == 0
    assert len(score_lesions(mask, [])[0]) == 0


# ---------------------------------------------------------------- segmentation


def test_masks_are_within_the_field_and_disjoint(example):
    _, _, seg = example
    for mask in (seg.vessels, seg.dark, seg.bright, seg.nerve):
        assert mask.dtype == bool
        assert not (mask & ~seg.field).any()
    assert not (seg.dark & (seg.vessels | seg.bright | seg.nerve)).any()
    assert not (seg.bright & seg.nerve).any()
    assert seg.strength[seg.dark].max() >= 1
    assert (seg.strength[~(seg.dark | seg.bright)] == 0).all()
    assert np.asarray(overlay(seg)).shape == (SEGMENT_SIZE, SEGMENT_SIZE, 3)


def test_most_haemorrhages_of_a_synthetic_fundus_image_are_found(example):
    _, truth, seg = example
    blood = [
        (*seg.disc.to_crop([[q['x'], q['y']]], SEGMENT_SIZE)[0], q['radius'] * SEGMENT_SIZE / (2 * seg.disc.r))
        for q in truth['lesions']
        if q['kind'] == 'haemorrhage'
    ]
    detected, _correct = score_lesions(seg.dark, blood)
    assert len(detected) > 20
    assert detected.mean() > 0.5
    f = lesion_features(seg)
    healthy = lesion_features(segment(draw_fundus(0, seed=21, size=256, camera=7)[0]))
    assert f['haemorrhage_count'] > 2 * healthy['haemorrhage_count']
    assert abs(f['vessel_length'] / healthy['vessel_length'] - 1) < 0.25


def test_half_of_the_small_and_bright_lesions_of_synthetic_fundus_images_are_found():
    found = {'microaneurysm': [], 'exudate': []}
    for seed, camera in ((22, 5), (24, 9)):
        pixels, truth = draw_fundus(3, seed=seed, size=512, camera=camera)
        seg = segment(pixels)
        for kind in found:
            places = [
                (*seg.disc.to_crop([[q['x'], q['y']]], SEGMENT_SIZE)[0], q['radius'] * SEGMENT_SIZE / (2 * seg.disc.r))
                for q in truth['lesions']
                if q['kind'] == kind
            ]
            found[kind] += score_lesions(seg.bright if kind == 'exudate' else seg.dark, places)[0].tolist()
    for kind, n in (('microaneurysm', 30), ('exudate', 10)):
        assert len(found[kind]) > n, kind
        assert np.mean(found[kind]) > 0.4, kind


def test_a_frame_and_less_light_change_little(example):
    pixels, _, seg = example
    frame = Image.new('RGB', (500, 420))
    frame.paste(Image.fromarray((pixels * 0.7).astype(np.uint8)), (120, 60))
    a = seg
    b = segment(frame)
    assert 2 * (a.vessels & b.vessels).sum() / (a.vessels.sum() + b.vessels.sum()) > 0.8
    assert 2 * (a.dark & b.dark).sum() / (a.dark.sum() + b.dark.sum()) > 0.7


@pytest.mark.parametrize(
    'pixels',
    [
        np.zeros((200, 200, 3), np.uint8),
        np.pad(np.full((40, 40, 3), 99, np.uint8), ((0, 300), (0, 300), (0, 0))),
    ],
)
def test_an_image_without_a_retina_is_an_error(pixels):
    with pytest.raises(ValueError, match='no retina was detected'):
        segment(pixels)


def test_a_retina_of_one_colour_has_no_lesions():
    f = lesion_features(segment(np.where(disk(255.5, 255.5, 250)[..., None], np.uint8([150, 80, 40]), np.uint8(0))))
    assert f['exudate_count'] == f['haemorrhage_count'] == f['vessel_area'] == 0


# ---------------------------------------------------------------- many images


def test_features_are_stored_and_only_new_images_are_processed(example, tmp_path, monkeypatch):
    b_png = tmp_path / 'b.png'
    kept = tmp_path / 'kept'
    pixels = example[0]
    other = draw_fundus(0, seed=3, size=200)[0]
    Image.fromarray(other).save(b_png)
    count = []
    real = hand_crafted.segment
    monkeypatch.setattr(hand_crafted, 'segment', lambda *a: count.append(1) or real(*a))
    one = feature_frame([pixels], folder=kept)
    assert one.columns.tolist() == list(FEATURES)
    assert np.allclose(one.iloc[0], list(lesion_features(example[2]).values()), atol=1e-3)
    both = feature_frame([b_png, pixels], folder=kept)
    assert len(count) == 2
    assert both.index.tolist() == [str(b_png), 1]
    assert (both.iloc[1] == one.iloc[0]).all()
    b_png.rename(tmp_path / 'c.png')
    assert (feature_frame([tmp_path / 'c.png'], folder=kept).values[0] == both.values[0]).all()
    assert len(count) == 2
    feature_frame([pixels], hand_crafted.SegmentationLimits(dark=3.0), folder=kept)
    assert len(count) == 3, 'the number does not depend on the limit'


def test_errors_name_the_image_and_the_remedy(tmp_path):
    black = tmp_path / 'black.png'
    Image.new('RGB', (200, 200)).save(black)
    with pytest.raises(
        ValueError, match=r'black.png cannot be segmented .no retina was detected.*exclude or repair it'
    ):
        feature_frame([black], folder=tmp_path / 'kept')
    with pytest.raises(ValueError, match='give a list'):
        feature_frame(black)
    with pytest.raises(ValueError, match='no images'):
        feature_frame([])


def test_without_scikit_image_the_error_names_what_to_install(example, monkeypatch):
    monkeypatch.setitem(sys.modules, 'skimage', None)
    with pytest.raises(ValueError, match=r"pip install 'dr_transfer\[segmentation\]'"):
        feature_frame([example[0]])


# ---------------------------------------------------------------- the classifier


def toy(n=150, k=2, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    return pd.DataFrame(
        {'count': rng.poisson(1 + 5 * y), 'area': rng.gamma(1 + y), 'noise': rng.normal(size=n)}
    ), np.array(['no', 'referable', 'severe'])[y]


@pytest.mark.parametrize('k', [2, 3])
def test_the_classifier_learns_and_returns_probabilities(k):
    (x, y), (xt, yt) = toy(k=k), toy(k=k, seed=1)
    model = HandCraftedClassifier(grid=((0.3, 0.3), (3.0, 0.3))).fit(x, y)
    p = model.predict_proba(xt)
    assert p.shape == (150, k)
    assert np.allclose(p.sum(1), 1)
    assert model.classes_.tolist() == ['no', 'referable', 'severe'][:k]
    assert set(model.predict(xt)) <= set(y)
    assert auc((yt == 'no').astype(int), p[:, 0]) > 0.9
    assert model.aucs_[model.best_] == max(model.aucs_.values())
    assert (clone(model).fit(x, y).predict_proba(xt) == p).all()


def test_groups_stay_together_in_the_inner_folds(monkeypatch):
    x, y = toy()
    recorded = []
    real = hand_crafted.grouped_folds

    def recording(*args):
        folds = real(*args)
        recorded.extend(folds)
        return folds

    monkeypatch.setattr(hand_crafted, 'grouped_folds', recording)
    g = np.arange(150) // 2 // 2
    HandCraftedClassifier(grid=((1.0, 1.0),), folds=3).fit(x, y, g)
    assert len(recorded) == 3
    assert all(not set(g[a]) & set(g[b]) for a, b in recorded)


def test_invalid_features_are_errors():
    x, y = toy()
    with pytest.raises(ValueError, match='NaN'):
        HandCraftedClassifier().fit(x.assign(area=np.nan), y)
    with pytest.raises(ValueError, match='shape'):
        HandCraftedClassifier().fit(x['count'], y)
    with pytest.raises(ValueError, match='only the class'):
        HandCraftedClassifier().fit(x, ['no'] * 150)
    with pytest.raises(ValueError, match='trained on 3'):
        HandCraftedClassifier(grid=((1.0, 1.0),)).fit(x, y).predict_proba(x[['count']])


def test_cross_validation_gives_a_table_that_can_be_compared(tmp_path, monkeypatch):
    make_dr(tmp_path / 'fundus', n=40, size=48, seed=4, grade_p=(1, 0, 0, 1, 0))
    monkeypatch.setattr(
        hand_crafted,
        'feature_frame',
        lambda images: pd.DataFrame(np.random.default_rng(0).normal(size=(len(images), 3))),
    )  # images of 48 pixels have no detectable lesions
    a, b = (
        cross_validate_hand_crafted(
            tmp_path / 'fundus', folds=2, classifier=HandCraftedClassifier(grid=((c, 0.3),), folds=2)
        )
        for c in (0.1, 10.0)
    )
    assert {'image', 'target', 'group', 'fold', 'prediction', 'p_no', 'p_referable'} <= set(a)
    assert (a.groupby('group').fold.nunique() == 1).all()
    assert measure_table(a, ['no', 'referable'], n=20).images.iloc[0] == 40 == a.image.nunique()
    assert compare_tables(a, b, ['no', 'referable'], n=20).loc['auc'].notna().all()


def test_predictions_of_folds_are_found_by_another_process(tmp_path):
    "Functions have other addresses in the next run; stored predictions must not depend on them."
    from dataclasses import replace

    from dr_transfer.data.tasks import get_task
    from dr_transfer.evaluation.cross_validation import _training_folder

    task = get_task('dr')
    image = np.zeros((4, 4, 3), np.uint8)
    t = pd.DataFrame({'image': [image], 'target': ['no'], 'split': ['train'], 'group': ['a']})

    def again():
        return replace(task, targets=tuple(replace(g, of=eval('lambda l: l')) for g in task.targets))

    first = again()
    second = again()
    assert repr(first) != repr(second)
    assert (
        _training_folder(t, [first]) == _training_folder(t, [second]) != _training_folder(t, [get_task('dr', size=64)])
    )
