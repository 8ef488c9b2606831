"Test copies, near copies and groups in two subsets, confounders, and the check in build_learner."

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from dr_transfer.core import build_learner
from dr_transfer.data.fundus import read_image
from dr_transfer.data.leaks import (
    HASH_BITS,
    LeakError,
    Together,
    confounders,
    detail_hash,
    file_facts,
    find_copies,
    image_hashes,
    joined_groups,
    leak_report,
    near_pairs,
    split_data,
    split_leaks,
)
from dr_transfer.data.split import split_table
from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import REFERABLE, TASKS, task_table
from dr_transfer.features.extraction import image_features
from dr_transfer.metrics.scores import auc
from dr_transfer.synthetic.fundus import draw_fundus, make_dr


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'cache'))


@pytest.fixture(scope='module')
def fundus_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('leaks') / 'fundus'
    make_dr(folder, n=60, size=192, exact_duplicates=3, near_duplicates=3, cameras=2, seed=5)
    return folder


def bits(im, reader='photo'):
    return detail_hash(read_image(im, 96, reader, 'pad' if reader != 'photo' else 'squish'))


def differ(a, b):
    return int(np.bitwise_count(a ^ b).sum())


def jpeg(im):
    f = io.BytesIO()
    im.save(f, 'JPEG', quality=50)
    return Image.open(f).convert('RGB')


@pytest.mark.parametrize(
    'change',
    [
        lambda im: im.resize((im.width // 2, im.height // 2)),
        jpeg,
        lambda im: im.point(lambda v: min(255, int(v * 1.2))),
        lambda im: im.crop((3, 3, im.width - 3, im.height - 3)),
    ],
    ids=['half', 'jpeg', 'brighter', 'trimmed'],
)
def test_a_changed_copy_is_near_and_another_image_is_not(change):
    sources = [Image.fromarray(draw_fundus(s % 5, size=300, seed=s)[0]) for s in range(4)]
    first = [bits(im, 'fundus') for im in sources]
    assert max(differ(h, bits(change(im), 'fundus')) for h, im in zip(first, sources)) <= 40
    assert min(differ(first[i], first[j]) for i in range(4) for j in range(i)) > 60


def test_near_pairs_are_those_of_comparing_each_with_each():
    rng = np.random.default_rng(0)
    h = rng.integers(0, 256, (2300, 32), dtype=np.uint8)
    for k in range(40):
        h[2200 + k] = h[k * 7] ^ np.packbits(rng.permutation(256) < 30 + k // 2)
    h[5] = 0
    want = {
        (i, j, d)
        for i in range(len(h))
        for j, d in zip(range(i + 1, len(h)), np.bitwise_count(h[i] ^ h[i + 1 :]).sum(1).tolist())
        if d <= 40 and h[i].any() and h[j].any()
    }
    assert set(map(tuple, near_pairs(h).tolist())) == want
    assert len(want) > 15
    for bad in (-1, HASH_BITS // 2):
        with pytest.raises(ValueError, match='give 0 to 127'):
            near_pairs(h, bad)


def test_images_of_one_colour_are_not_near_copies():
    flat = [Image.new('RGB', (50, 50), c) for c in ('red', 'black', 'white')]
    assert not np.any([bits(im) for im in flat])
    assert find_copies(flat).empty
    assert find_copies([flat[0], flat[0].copy()]).kind.tolist() == ['same file']


def test_hashes_are_kept_by_content_and_a_changed_image_is_hashed_again(tmp_path, monkeypatch):
    import dr_transfer.data.leaks as leaks

    files = [tmp_path / f'{i}.png' for i in range(3)]
    for i, f in enumerate(files):
        Image.fromarray(draw_fundus(0, size=96, seed=i)[0]).save(f)
    a, _ = image_hashes(files)
    hashed = []
    monkeypatch.setattr(
        leaks, 'detail_hash', lambda im: (im.getbbox() and hashed.append(1)) or detail_hash(im)
    )  # not the black images that fill up a batch
    b, _ = image_hashes(files)
    assert not hashed
    assert (a == b).all()
    Image.fromarray(draw_fundus(0, size=96, seed=9)[0]).save(files[1])
    c, _ = image_hashes(files)
    assert len(hashed) == 1
    assert (c[[0, 2]] == a[[0, 2]]).all()
    assert differ(c[1], a[1]) > 60


def test_exactly_the_duplicates_of_a_synthetic_set_are_found(fundus_data):
    import json

    truth = json.loads((fundus_data / 'truth.json').read_text())
    t = label_table(fundus_data)
    found = find_copies(t.image.tolist(), 'fundus')
    names = t.image.map(lambda p: p.rsplit('/', 1)[-1])
    pairs = {frozenset((names[r.a], names[r.b])) for r in found.itertuples()}
    images = truth.get('images', truth)
    rows = images if isinstance(images, list) else [{'image': k, **v} for k, v in images.items()]
    want = {
        frozenset((r['image'].rsplit('/', 1)[-1], r['duplicate_of'].rsplit('/', 1)[-1]))
        for r in rows
        if r.get('duplicate_of')
    }
    assert pairs == want
    assert len(want) == 6
    assert set(found.kind) == {'same file', 'near copy'}


def test_a_split_made_here_keeps_copies_and_patients_together(fundus_data):
    for seed in range(6):
        t = split_data(fundus_data, TASKS['dr'], REFERABLE, seed=seed)
        assert split_leaks(t, find_copies(t.image.tolist(), 'fundus')).empty
        assert t.attrs['leaks'] == {}
    without_groups = label_table(fundus_data).assign(group=None)
    n_leaks = 0
    for seed in range(6):
        t = task_table(without_groups, REFERABLE, seed=seed)
        copies = find_copies(t.image.tolist(), 'fundus')
        n_leaks += len(split_leaks(t, copies))
    assert n_leaks, 'otherwise the test above shows nothing'


def test_groups_are_returned_unchanged(fundus_data):
    assert split_data(fundus_data, TASKS['dr'], REFERABLE).group.tolist() == label_table(fundus_data).group.tolist()


@pytest.mark.parametrize('groups', [[None, None, None, None], ['x', 'x', 'y', None]])
def test_joined_groups(groups):
    j = joined_groups(groups, pd.DataFrame({'a': [0], 'b': [3]}))
    assert j[0] == j[3]
    assert (j[0] == j[1]) == (groups[0] is not None)
    assert j[2] not in (j[0], j[1])
    assert len(set(joined_groups(groups, pd.DataFrame({'a': [], 'b': []}, dtype=int)))) == (
        4 if groups[0] is None else 3
    )


@pytest.mark.parametrize('kind', ['group', 'copies'])
def test_build_learner_raises_an_error_for_a_leaking_split(fundus_data, kind):
    t = split_data(fundus_data, TASKS['dr'], REFERABLE)
    copies = find_copies(t.image.tolist(), 'fundus')
    if kind == 'copies':
        t, (a, b) = t.assign(group=None), (copies.a[0], copies.b[0])
    else:
        a, b = t[t.group == t.group.dropna().iloc[0]].index[:2]
    t.loc[[a, b], 'split'] = ['train', 'valid']
    arguments = dict(task='dr', arch='test_resnet', weights='random', size=48, bs=8)
    with pytest.raises(LeakError, match='are in two subsets') as e:
        build_learner(t, **arguments)
    for word in (t.image[a], t.image[b], "Empty the column 'split'", 'allow_leaks=True'):
        assert word in str(e.value)
    learn = build_learner(t, allow_leaks=True, **arguments)
    assert sum(learn.record.data.leaks.values()) >= 1
    assert build_learner(t.assign(split=None), **arguments).record.data.leaks == {}


def test_a_given_test_set_is_checked_for_leaks_too(fundus_data):
    t = label_table(fundus_data)
    a, _b = find_copies(t.image.tolist(), 'fundus')[['a', 'b']].iloc[0]
    t = t.assign(group=None, split=None)
    t.loc[a, 'split'] = 'test'
    with pytest.raises(LeakError, match='test'):
        split_data(t, TASKS['dr'], REFERABLE)
    assert split_data(t, TASKS['dr'], REFERABLE, allow_leaks=True).split[a] == 'test'


def test_a_leak_raises_the_score(tmp_path):
    "Random labels: on copies of its training images a model seems to predict them."
    rng = np.random.default_rng(0)
    rows = []
    for s in range(80):
        im = Image.fromarray(draw_fundus(0, size=64, seed=s)[0])
        y = str(2 * rng.integers(0, 2))
        for k, copy in enumerate((im, im.point(lambda v: min(255, int(1.1 * v))))):
            copy.save(tmp_path / f'{s}_{k}.png')
            rows.append((str(tmp_path / f'{s}_{k}.png'), y))
    t = pd.DataFrame(rows, columns=['image', 'label'])
    x = image_features(t.image.tolist(), size=64, reader='fundus', fit='pad', stages='stage4').numpy()[:, 0]

    def score(split):
        know = split == 'train'
        held_out = split == 'valid'
        model = KNeighborsClassifier(3, weights='distance').fit(x[know], t.label[know])
        return auc(t.label[held_out] == '2', model.predict_proba(x[held_out])[:, 1])

    seeds = range(5)
    leaky = np.mean([score(split_table(label_table(t), seed=s).split) for s in seeds])
    honest = np.mean([score(split_data(t, TASKS['dr'], REFERABLE, seed=s).split) for s in seeds])
    assert leaky > 0.75 > 0.65 > honest, (leaky, honest)


def test_confounders_are_columns_that_chance_does_not_explain():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 600)
    facts = pd.DataFrame(
        {
            'camera': np.where(rng.random(600) < 0.6, y, 0),
            'size': 10.0 * y + rng.normal(0, 8, 600),
            'day': rng.integers(0, 5, 600),
            'name': [f'{i}' for i in range(600)],
            'same': 1,
        }
    )
    found = confounders(facts, y)
    assert set(found.column) == {'camera', 'size'}
    assert found.v.is_monotonic_decreasing
    assert found.v.between(0.1, 1).all()
    assert confounders(facts[['day', 'same']], y).empty
    from sklearn.metrics import mutual_info_score

    assert confounders(pd.DataFrame({'twin': y}), y).v.tolist() == pytest.approx([1])
    assert mutual_info_score(y, y) > 1


def test_the_report_names_what_it_found(fundus_data):
    t = label_table(fundus_data)
    t['data_camera'] = np.where(t.label.astype(int) > 1, 'new', 'old')
    t['split'] = np.where(np.arange(len(t)) % 2, 'train', 'valid')
    r = leak_report(t, 'fundus')
    assert {'group', 'same file', 'near copy'} <= set(r.leaks.kind) | set(r.copies.kind)
    assert r.confounders.column[0] == 'data_camera'
    assert "column 'camera'" in str(r)
    assert str(len(r.copies)) in str(r)
    without = leak_report(t.assign(split=None), 'fundus')
    assert without.leaks.empty
    assert len(without.copies) == 6
    assert list(file_facts(t.image[:2]).columns) == ['suffix', 'width', 'height', 'kilobytes']


def test_together_caches_the_copies_of_the_last_table(fundus_data):
    t = label_table(fundus_data)
    together = Together('fundus')
    assert len(together(t)) == len(t)
    assert len(together.copies) == 6
