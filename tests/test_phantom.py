"Test the synthetic fundus images: what the seed determines, and what each parameter changes."

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from helpers import content
from PIL import Image

from dr_transfer.synthetic.eye import LESION_KINDS
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.synthetic.fundus import contact_sheet, draw_fundus, lesion_mask, make_dr


def distance(truth, part):
    "Distance of the centre of each lesion from the centre of `part`"
    x, y, *_ = truth[part]
    return np.array([np.hypot(q['x'] - x, q['y'] - y) for q in truth['lesions']])


def lesions_by_kind(truth):
    "The number of lesions of each kind"
    kinds = pd.Series([q['kind'] for q in truth['lesions']], dtype=object)
    return kinds.value_counts().reindex(LESION_KINDS, fill_value=0)


@pytest.mark.parametrize('grade', range(5))
def test_lesions_follow_the_grade_and_lie_in_the_disc(grade):
    for seed in range(5):
        img, truth = draw_fundus(grade, seed, 96, camera=seed)
        count = lesions_by_kind(truth)
        radii = np.array([q['radius'] for q in truth['lesions']])
        reach = distance(truth, 'disc') + radii
        assert (reach < truth['disc'][2]).all()
        mask = lesion_mask(truth)
        assert mask.any() == (grade > 0)
        if grade < 2:
            assert count.drop('microaneurysm').sum() == 0
        if grade >= 1:
            assert count.microaneurysm > 0
        if grade >= 2:
            assert count.haemorrhage > 0
        if grade == 3:
            assert count.haemorrhage > 20
        else:
            assert count.haemorrhage <= 20
        assert (count.new_vessel > 0) == (grade == 4)
        if mask.any():
            lit = img[mask].max(1) > 0
            assert lit.mean() > 0.98  # in the field, also when the camera cuts it


@pytest.mark.parametrize('size', [48, 49, 100, 181])
@pytest.mark.parametrize('camera', range(3))
def test_sizes_and_cameras(size, camera):
    for seed in range(3):
        img, truth = draw_fundus(4 - seed, seed, size, camera=camera)
        y, x = np.mgrid[:size, :size]
        x0, y0, r = truth['disc']
        outside = np.hypot(x - x0, y - y0) > r
        assert img.shape == (size, size, 3)
        assert img.dtype == np.uint8
        assert img[outside].max() == 0
        inside = img.max(2)[~outside]
        lit = (inside > 0).mean()
        if camera % 2:  # a camera with an odd number crops the top and bottom
            assert 0.75 < lit < 0.97
        else:
            assert lit > 0.97


def test_a_seed_gives_the_same_eye_at_any_size():
    small, large = (draw_fundus(3, 7, size)[1] for size in (96, 288))
    assert len(small['lesions']) == len(large['lesions'])
    for a, b in zip(small['lesions'], large['lesions']):
        assert a['kind'] == b['kind']
        for axis in ('x', 'y'):
            enlarged = (a[axis] + 0.5) * 3 - 0.5
            assert abs(enlarged - b[axis]) < 0.1


@pytest.mark.parametrize('seed', range(4))
def test_a_left_eye_is_a_mirrored_right_eye(seed):
    right, a = draw_fundus(3, seed, 128, 'right')
    left, b = draw_fundus(3, seed, 128, 'left')
    assert a['optic_nerve'][0] > a['disc'][0] > b['optic_nerve'][0]
    np.testing.assert_array_equal(lesion_mask(a), lesion_mask(b)[:, ::-1])

    def alike(p, q):
        greens = [image[..., 1].ravel() for image in (p, q)]
        return np.corrcoef(greens)[0, 1]

    mirrored = alike(right, left[:, ::-1])
    assert mirrored > 0.9
    assert mirrored > alike(right, left)


@pytest.mark.parametrize('grade', range(1, 5))
def test_nothing_but_the_lesions_depends_on_the_grade(grade):
    for seed in range(2):
        sick, truth = draw_fundus(grade, seed, 128)
        normal, _ = draw_fundus(0, seed, 128)
        y, x = np.mgrid[:128, :128]
        near = np.zeros((128, 128), bool)
        for q in truth['lesions']:
            away = np.hypot(x - q['x'], y - q['y'])
            near |= away < q['radius'] + 5
        np.testing.assert_array_equal(sick[~near], normal[~near])
        assert (sick != normal).any()


def test_blood_is_darker_and_exudates_brighter_than_what_was_there():
    change = {k: [] for k in LESION_KINDS}
    for seed in range(8):
        sick, truth = draw_fundus(3 + seed % 2, seed, 128)
        normal, _ = draw_fundus(0, seed, 128)
        for k in LESION_KINDS:
            others = tuple(set(LESION_KINDS) - {k})
            lonely = lesion_mask(truth, (k,)) & ~lesion_mask(truth, others)
            if lonely.any():
                difference = sick[lonely].astype(float) - normal[lonely]
                change[k].append(difference[:, 1].mean())
    for k in ('haemorrhage', 'microaneurysm', 'new_vessel'):
        assert np.array(change[k]).max() < 0
    assert np.array(change['exudate']).min() > 0


def test_two_eyes_of_a_person_are_alike():
    def colour(person, eye):
        image, _ = draw_fundus(0, (person, eye), 64)
        return image[20:44, 20:44].mean((0, 1))

    pairs = np.array([[colour(p, 0), colour(p, 1)] for p in range(12)])
    tint = pairs[..., 1] / pairs[..., 0]  # green against red: pigment, not exposure
    assert np.corrcoef(tint[:, 0], tint[:, 1])[0, 1] > 0.7
    one, _ = draw_fundus(0, (5, 0), 64)
    other, _ = draw_fundus(0, (5, 1), 64)
    assert (one != other).any()


@pytest.mark.parametrize(
    'bad, hint',
    [
        (dict(grade=5), 'give 0, 1, 2, 3 or 4'),
        (dict(eye='both'), "give 'right' or 'left'"),
        (dict(size=47), 'give 48'),
        (dict(camera=-1), 'give 0 or more'),
        (dict(seed=-1), 'give 0 or more'),
    ],
)
def test_invalid_fundus_images_are_errors(bad, hint):
    with pytest.raises(ValueError, match=hint):
        draw_fundus(**dict(grade=0) | bad)


def test_bytes_do_not_depend_on_workers(tmp_path):
    knobs = dict(n=18, size=64, cameras=3, exact_duplicates=1, near_duplicates=1, unreadable=1, wrong_labels=1)
    for w in (1, 2, 3):
        make_dr(tmp_path / str(w), workers=w, **knobs)
    assert content(tmp_path / '1') == content(tmp_path / '2') == content(tmp_path / '3')
    make_dr(tmp_path / 'seed', seed=1, **knobs)
    assert content(tmp_path / '1') != content(tmp_path / 'seed')
    for f in 'ab':
        make_flowers(tmp_path / f, 20, 48)
    assert content(tmp_path / 'a') == content(tmp_path / 'b')


@pytest.mark.parametrize('knob', ['exact_duplicates', 'near_duplicates', 'unreadable', 'wrong_labels'])
@pytest.mark.parametrize('count', [1, 5])
def test_each_parameter_changes_only_what_it_documents(tmp_path, knob, count):
    images = tmp_path / 'flawed/images'
    plain = make_dr(tmp_path / 'plain', 7, 48)
    df = make_dr(tmp_path / 'flawed', 7, 48, **{knob: count})
    truth = json.loads((tmp_path / 'flawed/truth.json').read_text())
    before = content(tmp_path / 'plain/images')
    after = content(images)
    extra = set(after) - set(before)
    changed = {f for f in before if after[f] != before[f]}
    assert list(truth) == sorted(truth) == df.image.tolist() == sorted(after)
    relabelled = {r.image for r in df.itertuples() if truth[r.image]['grade'] != r.grade}
    assert len(extra) == (count if 'duplicates' in knob else 0)
    assert len(changed) == (count if knob == 'unreadable' else 0)
    assert len(relabelled) == (count if knob == 'wrong_labels' else 0)
    for f in extra:
        source = truth[f]['duplicate_of']
        assert (after[f] == after[source]) == (knob == 'exact_duplicates')
        assert truth[f]['patient'] not in set(plain.patient)
        assert truth[f]['grade'] == truth[source]['grade']
    for f in changed:
        assert truth[f]['flaw'] == 'unreadable'
        with pytest.raises((OSError, SyntaxError)):  # the error of Pillow for a damaged file
            Image.open(images / f).load()
    for f in set(after) - changed:
        Image.open(images / f).load()


def test_truth_reproduces_the_image(tmp_path):
    make_dr(tmp_path / 'd', 3, 64, cameras=(4, 5))
    truths = json.loads((tmp_path / 'd/truth.json').read_text())
    for name, t in truths.items():
        img, truth = draw_fundus(t['grade'], t['seed'], t['size'], t['eye'], t['camera'])
        stored = np.asarray(Image.open(tmp_path / 'd/images' / name), float)
        difference = np.abs(stored - img)
        assert difference.mean() < 6  # up to the loss of JPEG
        assert t['lesions'] == truth['lesions']
        assert t['camera'] in (4, 5)


@pytest.mark.parametrize('n', [1, 2, 7])
def test_small_and_unusual_numbers(tmp_path, n):
    df = make_dr(tmp_path / 'd', n, 48)
    assert len(df) == n
    assert df.image.is_unique
    assert df.groupby('patient').size().max() <= 2


def test_folders(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    for make in (make_dr, make_flowers):
        with pytest.raises(ValueError, match='give the path of a new folder'):
            make(tmp_path, 10)
        folder = tmp_path / make.__name__
        first = make(folder, 10, 48)
        assert make(folder, 10, 48).equals(first)
        next(folder.rglob('*.jpg')).unlink()  # no longer complete
        with pytest.raises(ValueError, match='delete this one'):
            make(folder, 10, 48)
    (tmp_path / 'empty').mkdir()
    assert len(make_dr(str(tmp_path / 'empty'), 2, 48)) == 2
    assert content(tmp_path)['notes.txt'] == b'mine'


@pytest.mark.parametrize(
    'bad, hint',
    [
        (dict(n=0), 'give 1 or more'),
        (dict(cameras=0), 'give 1 or more'),
        (dict(grade_p=(1, 1)), 'five fractions'),
        (dict(grade_p=(1, 1, 1, 1, -1)), 'five fractions'),
        (dict(n=3, unreadable=4), 'larger n'),
    ],
)
def test_make_dr_errors(tmp_path, bad, hint):
    with pytest.raises(ValueError, match=hint):
        make_dr(tmp_path / 'd', **dict(n=4) | bad)
    assert not (tmp_path / 'd').exists()


def test_flowers(tmp_path):
    flowers = tmp_path / 'f'
    df = make_flowers(flowers, 23, 40, classes=('roses', 'tulips'))
    assert df.label.value_counts().to_dict() == {'roses': 12, 'tulips': 11}
    folders = df.image.str.split('/').str[0]
    assert (folders == df.label).all()
    assert df.photographer.nunique() == 6
    image_files = [f for f in content(flowers) if f.endswith('.jpg')]
    assert sorted(df.image) == sorted(image_files)

    def corner(f):
        "The mean colour of the four corners"
        small = Image.open(flowers / f).resize((40, 40))
        corners = np.asarray(small, float)[::39, ::39]
        return corners.mean((0, 1))

    df['colour'] = [corner(f) for f in df.image]
    gaps = {True: [], False: []}
    for (_, a), (_, b) in combinations(df.iterrows(), 2):
        gap = np.abs(a.colour - b.colour).mean()
        gaps[a.photographer == b.photographer].append(gap)
    assert np.mean(gaps[True]) < 0.7 * np.mean(gaps[False])  # a photographer has a style
    with pytest.raises(ValueError, match='give some of daisy'):
        make_flowers(tmp_path / 'g', classes=('orchid',))
    with pytest.raises(ValueError, match='at least one image per class'):
        make_flowers(tmp_path / 'g', n=4)


def test_contact_sheet():
    white = np.full((10, 20, 3), 255, np.uint8)
    grey = Image.new('L', (30, 30), 128)
    black = Image.new('RGB', (5, 9))
    sheet = contact_sheet([white, grey, black], titles='abc', cols=2, size=40)
    assert sheet.size == (80, 80)
    pixels = np.asarray(sheet)
    assert pixels[20, 30].tolist() == [255] * 3
    assert pixels[2, 30].max() == 0  # padded, not stretched
