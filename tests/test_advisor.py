"Test that the advisor uses the training images only, and that the advised plan runs."

import io
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import cli, content, error_line, good
from learners import Known
from matplotlib.figure import Figure
from PIL import Image

import dr_transfer.data.content as hashing_module
from dr_transfer.core import build_learner, fit
from dr_transfer.data import leaks
from dr_transfer.data.tasks import TASKS, task_table
from dr_transfer.features import extraction as features
from dr_transfer.features.probes import SIMILAR, fold_interval
from dr_transfer.training import advisor, candidates
from dr_transfer.training.advisor import advise, choose_advised, choose_scenario, plot_advice
from dr_transfer.training.plans import LARGE, PLANS
from dr_transfer.training.record import read_record

TINY = dict(arch='test_resnet', weights='random', size=32, runtime='plain')
WORDS = ('--arch', 'test_resnet', '--weights', 'random', '--size', '32')
pytestmark = pytest.mark.usefixtures('with_shared_cache')
ROWS = ['stem', 'stage1', 'stage2', 'stage3', 'stage4']


@pytest.fixture(scope='session')
def dots(home):
    "A table of 80 small images, two of each of 40 patients: reddish or greenish noise."

    (home / 'dots').mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(80):
        a = rng.integers(0, 200, (24, 24, 3)).astype(np.uint8)
        a[..., i // 2 % 2] += 8
        file = home / 'dots' / f'{i}.png'
        Image.fromarray(a).save(file)
        label = ('red', 'green')[i // 2 % 2]
        rows.append({'image': str(file), 'label': label, 'group': f'person {i // 2}'})
    return pd.DataFrame(rows)


@pytest.fixture
def one_network(monkeypatch):
    "Random weights, the same each time."
    monkeypatch.setattr(advisor, 'whole_body', lambda *a, f=advisor.whole_body: (torch.manual_seed(0), f(*a))[1])


def train_images(data, seed=42, valid=0.2, task='flowers', **kwargs):
    t = build_learner(data, task=task, seed=seed, valid=valid, **TINY, **kwargs).table
    return set(t.image[t.split == 'train'])


@pytest.fixture
def read_files(monkeypatch):
    """The files that are read from now on to compute features or to find stored ones,
    but not those that are read only to check or hash them.
    """
    names = set()
    hashing = []
    real_hashes = leaks.image_hashes

    def hashes(*a, **k):
        hashing.append(True)
        try:
            return real_hashes(*a, **k)
        finally:
            hashing.pop()

    monkeypatch.setattr(leaks, 'image_hashes', hashes)

    def spy(module, name):
        real = getattr(module, name)

        def f(source, *a, **k):
            if not hashing and not isinstance(source, bytes):
                names.add(hashing_module.source_name(source))  # bytes of a file that was named before
            return real(source, *a, **k)

        monkeypatch.setattr(module, name, f)

    spy(features, 'image_data')
    spy(hashing_module, 'content_key')
    return names


# ---------------------------------------------------------------- scenarios and choices


@pytest.mark.parametrize(
    'n, distance, words',
    [
        (LARGE - 1, SIMILAR - 1e-9, 'small, similar'),
        (LARGE - 1, SIMILAR, 'small, different'),
        (LARGE, SIMILAR - 1e-9, 'large, similar'),
        (LARGE, SIMILAR, 'large, different'),
        (LARGE - 1, np.nan, 'small'),
        (LARGE, np.nan, 'large'),
        (1, 0.0, 'small, similar'),
        (10**6, np.inf, 'large, different'),
    ],
)
def test_the_scenario_in_words(n, distance, words):
    assert choose_scenario(n, distance) == words


def test_the_plan_of_a_scenario():
    for s in ('small', 'small, similar', 'small, different'):
        assert choose_advised(s, 'stage7', 4, True) == PLANS['head']
        p = choose_advised(s, 'stage5', 2, False)
        assert (p.stage, p.n_stages, p.phases, p.head) == ('stage5', 2, PLANS['head'].phases, 'linear')
        assert p.name not in PLANS
        assert 'stage5' in p.name
    for s in ('large', 'large, similar', 'large, different'):
        for own in (True, False):
            assert choose_advised(s, 'stage5', 2, own) == PLANS['fine_tune_averaged']


def profile(test_ratio=0.25, **folds):
    rows = {k: dict(zip(('score', 'low', 'high'), fold_interval(v, test_ratio))) for k, v in folds.items()}
    out = pd.DataFrame.from_dict(rows, orient='index')
    out.attrs = {'metric': 'accuracy', 'test_ratio': test_ratio, 'folds': folds}
    return out


BASE = np.array([0.70, 0.80, 0.75, 0.72, 0.78])


@pytest.mark.parametrize(
    'other, chosen',
    [
        (BASE + np.array([0.05, 0.06, 0.05, 0.04, 0.05]), 'b'),  # better in each fold
        (BASE + np.array([0.3, -0.1, 0.2, -0.05, 0.05]), 'a'),  # better on average, but by chance
        (BASE, 'a'),
        (BASE - 0.1, 'a'),
        (np.full(5, np.nan), 'a'),
        ([0.95, np.nan, np.nan, np.nan, np.nan], 'a'),
    ],
)  # one fold does not show the variation
def test_another_stage_is_chosen_only_if_it_is_significantly_better(other, chosen):
    row, why = advisor._choose_stage(profile(a=BASE, b=np.array(other)), 'a')
    assert row == chosen
    assert why == ('no other stage is significantly better' if chosen == 'a' else '+0.050 [+0.037, +0.063] against a')


def test_a_profile_without_scores():
    assert advisor._choose_stage(profile(a=np.full(5, np.nan), b=np.full(5, np.nan)), 'a')[0] == 'a'
    assert 'none' in advisor._confidence(pd.Series({'low': np.nan, 'high': np.nan}))


def test_candidates_are_adjacent_stages():
    c = advisor._candidates(dict.fromkeys((*ROWS, 'neck'), 1))
    assert list(c)[:6] == [*ROWS, 'neck']
    assert {k for k in c if '+' in k} == {
        'stage1+stage2',
        'stage2+stage3',
        'stem+stage1+stage2+stage3',
        'stage3+stage4',
        'stage1+stage2+stage3+stage4',
        'stage3+stage4+neck',
    }
    for name, (last, k) in c.items():
        assert name.split('+')[-1] == last
        assert len(name.split('+')) == k


# ---------------------------------------------------------------- what is measured


def test_advice_on_a_table(dots, one_network):
    a = advise(dots, **TINY)
    n = len(train_images(dots))
    assert n == 64
    assert sum(a.counts.values()) == n
    assert set(a.counts) == {'red', 'green'}
    assert a.scenario == 'small'
    assert np.isnan(a.distance)
    assert a.plan.name == 'head'
    assert list(a.profile.index)[:5] == ROWS
    assert a.profile.attrs['metric'] == 'auc'
    assert a.profile.score.between(0, 1).all()
    assert a.profile.home.max() > 0.9, 'red and green can be told apart'
    result = a.speed.index.tolist()
    assert result == [0.25, 0.5, 1]
    assert a.speed.images.is_monotonic_increasing
    assert (a.profile.low <= a.profile.score).all()
    assert (a.profile.score <= a.profile.high).all()


def test_the_text_states_what_was_measured(dots):
    a = advise(dots, **TINY)
    text = str(a)
    lines = str(a).splitlines()
    assert lines[0] == 'scenario: small'
    assert f'images: 64, 32 to 32 per class ({LARGE} or more are large)' in lines
    assert 'distance from natural images: unknown, the network has no BatchNorm statistics' in lines
    assert f'auc {a.profile.loc["stage4"].score:.3f} [' in text
    assert 'at stage4; no other stage is significantly better' in text
    gain, low, high = (a.speed.attrs[k] for k in ('gain', 'gain_low', 'gain_high'))
    assert f'with twice the images: {gain:+.3f} [{low:+.3f}, {high:+.3f}]' in lines
    assert f"advice: plan 'head', {PLANS['head'].about}" in lines
    assert lines[-1] == f'confidence: {a.confidence}'
    assert 'nan' not in text
    half = (a.profile.loc['stage4'].high - a.profile.loc['stage4'].low) / 2
    assert f'{half:.2f}' in a.confidence
    assert a.confidence.startswith('good' if half < 0.05 else 'low')


def test_the_same_seed_gives_the_same_advice(dots, tmp_path, monkeypatch, one_network):
    a = advise(dots, **TINY)
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path))  # no group is found there
    np.random.seed(1)
    b, c = (advise(dots, seed=s, **TINY) for s in (42, 7))
    assert str(a) == str(b)
    assert a.plan == b.plan
    assert a.profile.equals(b.profile)
    assert a.speed.equals(b.speed)
    assert not c.profile.equals(a.profile)
    assert c.counts == a.counts


def test_efficientnet_keeps_the_statistics_of_imagenet(fundus_data):
    "The BatchNorm statistics of the default network come from ImageNet; synthetic fundus images differ from it."
    a = advise(fundus_data, 'dr', size=64, runtime='plain')
    assert a.distance > SIMILAR
    assert a.scenario == 'small, different'
    assert f'{a.distance:.3f}, more than {SIMILAR}' in str(a)
    assert a.profile.loc['stage4+stage5+stage6+stage7', 'channels'] == 704
    assert a.profile.loc['neck', 'channels'] == 1280
    assert set(a.counts) == {'no', 'referable'}
    assert a.plan.arch == 'efficientnet_lite0'


def test_a_transformer(flowers):
    a = advise(flowers, arch='test_vit', weights='random', size=64, runtime='plain')
    result = list(a.profile.index)
    assert result[:3] == ['stem', 'stage1', 'stage2']
    assert 'stage3+stage4' in result
    assert a.scenario == 'small'
    assert a.plan == replace(PLANS['head'], arch='test_vit', weights='random')  # the last stage, as by default
    learn = build_learner(flowers, arch='test_vit', weights='random', size=64, runtime='plain', plan=a)
    fit(learn, epochs=1, say=str)
    assert learn.record.plan.name == 'head'
    assert isinstance(plot_advice(a), Figure)


@pytest.mark.parametrize(
    'metric, target',
    [
        ('auc', 'referable'),
        ('accuracy', 'grade'),
    ],
)
def test_targets(fundus_data, metric, target):
    labels = pd.read_csv(fundus_data / 'labels.csv').assign(
        grade=lambda t: t.patient.str[1:].astype(int) % 5
    )  # each grade has four patients
    a = advise(fundus_data, 'dr', target=target, labels=labels, **TINY)
    assert a.profile.attrs['metric'] == metric
    assert len(a.counts) == (2 if target == 'referable' else 5)


# ---------------------------------------------------------------- only training images


@pytest.mark.parametrize(
    'seed, valid',
    [
        (42, 0.2),
        (1, 0.2),
        (2, 0.5),
    ],
)
def test_validation_images_are_not_read(dots, read_files, seed, valid):
    advise(dots, seed=seed, valid=valid, **TINY)
    read = set(read_files)
    assert read == train_images(dots, seed, valid)
    assert 0 < len(read) < 80


def test_validation_images_of_a_given_split_are_not_read(fundus_data, read_files):
    labels = pd.read_csv(fundus_data / 'labels.csv')
    labels['split'] = (
        labels.patient.str[1:].astype(int).map(lambda i: 'valid' if i % 5 == 0 else 'test' if i % 5 == 1 else 'train')
    )
    advise(fundus_data, 'dr', labels=labels, **TINY)
    assert {s.rsplit('/', 1)[-1] for s in read_files} == set(
        labels.image[labels.split == 'train'].map(lambda n: n.rsplit('/', 1)[-1])
    )


def test_other_validation_images_change_nothing(dots, tmp_path, one_network):
    "Every access to the images, by any function."
    t = dots.assign(image=[str(tmp_path / i.rsplit('/', 1)[-1]) for i in dots.image])
    for a, b in zip(dots.image, t.image):
        Image.open(a).save(b)

    def advice_of():
        a = advise(t, **TINY)
        return str(a), a.profile.to_csv(), a.speed.to_csv(), a.counts

    subset = task_table(t, TASKS['flowers'].target()).set_index('image').split
    first = advice_of()
    rng = np.random.default_rng(1)

    def other(i):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)).save(i)

    for i in subset.index[subset == 'valid']:
        other(i)
    assert advice_of() == first
    for i in subset.index[subset == 'train'][:20]:
        other(i)
    assert advice_of() != first, 'otherwise the test shows nothing'


def test_a_subset_of_many_images_keeps_groups_together(dots, read_files, monkeypatch):
    monkeypatch.setattr(candidates, 'MAX_IMAGES', 44)
    monkeypatch.setattr(advisor, 'LARGE', 50)
    a = advise(dots, **TINY)
    t = dots[dots.image.isin(read_files)]
    assert len(read_files) == len(t) == 44
    assert (t.group.value_counts() == 2).all()
    assert read_files < train_images(dots)
    result = sum(a.counts.values())
    assert result == 64
    assert 'images: 64, 32 to 32 per class (50 or more are large), 44 of them were used' in str(a)
    assert a.scenario == 'large', 'the number of training images is large, not that of the images used'


def test_a_subset_of_a_table(monkeypatch):
    "About the requested number of images, chosen by the seed, with complete groups and enough images of rare classes."
    monkeypatch.setattr(candidates, 'MAX_IMAGES', 300)
    rng = np.random.default_rng(0)
    group = np.sort(rng.integers(0, 700, 2000))
    t = pd.DataFrame(
        {
            'image': [f'{i}.jpg' for i in range(2000)],
            'group': [f'g{g}' if g % 3 else None for g in group],
            'target': np.where(group > 690, 'rare', 'usual'),
        }
    )
    some = candidates.training_sample(t, 1)
    assert 250 < len(some) < 380
    assert some.image.is_unique
    assert list(some.index) == list(range(len(some)))
    for g in some.group.dropna().unique():
        assert (some.group == g).sum() == (t.group == g).sum()
    rare = some[some.target == 'rare']
    result = rare.group.fillna(rare.image).nunique()
    assert result >= 10
    assert candidates.training_sample(t, 1).equals(some)
    assert not candidates.training_sample(t, 2).equals(some)
    monkeypatch.setattr(candidates, 'MAX_IMAGES', 2000)
    assert candidates.training_sample(t, 1).equals(t)


# ---------------------------------------------------------------- the advice runs


@pytest.mark.parametrize(
    'large, distance, row',
    [
        (False, 0.5 * SIMILAR, 'stage4'),
        (False, 2 * SIMILAR, 'stage1+stage2'),
        (False, np.nan, 'stage1+stage2'),
        (True, 0.5 * SIMILAR, 'stage4'),
        (True, 2 * SIMILAR, 'stage1+stage2'),
    ],
)
def test_the_advice_runs(dots, monkeypatch, large, distance, row):
    monkeypatch.setattr(advisor, 'LARGE', 50 if large else LARGE)
    monkeypatch.setattr(advisor, 'domain_distance', lambda *a, **k: distance)
    monkeypatch.setattr(advisor, '_choose_stage', lambda *a: (row, 'the given reason'))
    a = advise(dots, **TINY)
    assert a.scenario == choose_scenario(10**4 if large else 10, distance)
    assert row in str(a)
    assert 'the given reason' in str(a)
    learn = build_learner(dots, plan=a, **TINY)
    fit(learn, epochs=1, say=str)
    r = learn.record
    other = row != 'stage4' and not large
    assert r.plan.name == a.plan.name == ('fine_tune_averaged' if large else 'head_stage2_2' if other else 'head')
    assert (
        r.stage,
        r.n_stages,
    ) == (('stage2', 2) if other else ('stage4', 1))
    assert len(r.history) == len(a.plan.phases)
    assert np.isfinite([h['valid_loss'] for h in r.history]).all()


def known_features(table, useful):
    "A substitute for `extract_features`: the features of stage `useful(images)` depend on the class"

    def features(images, *a, **k):
        files = [getattr(image, 'path', image) for image in images]
        y = table.set_index('image').label[files].eq('red').to_numpy()
        rng = np.random.default_rng(0)
        stages = {}
        for stage in ROWS:
            x = rng.standard_normal((len(y), 1, 6))
            if stage in useful(images):
                x += 3 * y[:, None, None]
            stages[stage] = x.astype(np.float32)
        return Known(**stages)

    return features


def are_changed(images):
    return hasattr(images[0], 'change')


def test_a_stage_with_better_features_is_found_and_used(dots, monkeypatch):
    "Only the features of the second stage depend on the class."
    monkeypatch.setattr(candidates, 'extract_features', known_features(dots, lambda images: ('stage2',)))
    a = advise(dots, **TINY)
    assert (a.plan.stage, a.plan.n_stages) == ('stage2', 1)
    assert ' at stage2; +0.' in str(a)
    assert 'against stage4; tested on changed images' in str(a)
    assert a.confidence.startswith('good')
    learn = build_learner(dots, plan=a, **TINY)
    assert (learn.record.stage, learn.record.n_stages) == ('stage2', 1)
    assert a.plan.name in plot_advice(a).get_suptitle()
    assert marked(a) == a.stages == 'stage2'
    result = a.plans.stages.tolist()
    assert result == ['stage2', 'stage4']
    text = str(a)
    assert f"advised plan '{a.plan.name}': auc {a.profile.score['stage2']:.3f} [" in text
    assert f"default plan 'head': auc {a.profile.score['stage4']:.3f} [" in text
    assert f'on changed images, {a.profile.home["stage2"]:.3f} at home, of stage2' in text


def test_a_stage_that_is_better_at_home_only_is_not_chosen(dots, monkeypatch):
    "Under a change of acquisition, the second stage says nothing about the class; the last one does."

    def useful(images):
        return ('stage4',) if are_changed(images) else ('stage2', 'stage4')

    monkeypatch.setattr(candidates, 'extract_features', known_features(dots, useful))
    a = advise(dots, **TINY)
    assert a.profile.home['stage2'] > 0.95
    assert a.profile.score['stage2'] < 0.75
    assert a.stages == 'stage4'


def test_two_sources_are_left_out_in_turn(dots, monkeypatch):
    "Then no image is changed. A stage that depends on the class in one source only is useless at the other."
    camera = ['old', 'new'] * 40
    in_order = dots.assign(camera=camera)

    def features(images, *a, **k):
        assert not are_changed(images)
        x = known_features(dots, lambda images: ('stage2', 'stage4'))(images)
        old = in_order.set_index('image').camera[list(images)].eq('old').to_numpy()
        x.arrays['stage2'][old] *= -1
        return x

    monkeypatch.setattr(candidates, 'extract_features', features)
    a = advise(in_order, **TINY)
    assert a.tested == 'each of 2 sources that was left out'
    assert a.tested in str(a)
    assert a.profile.score['stage2'] < 0.2 < 0.9 < a.profile.score['stage4']
    assert a.profile.home['stage2'] > a.profile.score['stage2'] + 0.2
    assert a.stages == 'stage4'


def test_a_class_of_one_source_only_is_said(dots):
    "Then images are changed instead."
    lines = []
    a = advise(dots.assign(camera=dots.label), say=lines.append, **TINY)
    assert a.tested == 'changed images'
    assert any('candidates are compared on changed images: class' in line for line in lines)


class KnownPools(Known):
    "Known features whose class token alone depends on the class"

    def numpy(self, stages, pool):
        x = super().numpy(stages)
        return x if pool == 'token' else x[:, :, ::-1] * 0.0 + self.noise[:, :, : x.shape[-1]]


@pytest.mark.parametrize('best', ['token', 'mean'])
def test_the_pooling_of_a_transformer_is_chosen(dots, monkeypatch, best):
    "Another than the network's own is recommended if it is significantly better."

    def features(images, body, *a, pools, **k):
        assert pools == ['mean', 'token']
        files = [getattr(image, 'path', image) for image in images]
        y = dots.set_index('image').label[files].eq('red').to_numpy() * 3.0
        x = np.random.default_rng(0).standard_normal((len(y), 1, 6)) + y[:, None, None] * (best == 'token')
        out = KnownPools(**dict.fromkeys(('stem', 'stage1', 'stage2'), x.astype(np.float32)))
        noise = np.random.default_rng(1).standard_normal((len(y), 1, 60)) + y[:, None, None] * (best == 'mean')
        out.noise = noise.astype(np.float32)
        return out

    monkeypatch.setattr(candidates, 'extract_features', features)
    how = TINY | {'arch': 'test_vit', 'size': 64}
    own = build_learner(dots, say=str, **how).record.pool
    a = advise(dots, **how)
    assert own in ('mean', 'token')
    assert f'pooling: {best}, ' in str(a)
    assert a.plan.pool == (None if best == own else best)
    assert build_learner(dots, plan=a, say=str, **how).record.pool == best


def marked(a):
    "The row of the profile that the figure marks"
    at = plot_advice(a).axes[0].lines[-1].get_xdata()
    return a.profile.index[int(at[0])]


def test_the_figure_marks_the_advised_stages_and_not_the_best_score(dots):
    "If the best score may be better by chance, the default stages are advised."
    a = advise(dots, **TINY)
    best = next(s for s in a.profile.index if s != a.stages)
    a.profile.loc[best, ['score', 'low', 'high']] = [0.999, 0.99, 1.0]
    assert a.profile.score.idxmax() == best
    assert marked(a) == a.stages == 'stage4'
    assert f' at {a.stages};' in str(a)


def test_advice_names_the_gain_and_cost_of_each_plan(dots, monkeypatch):
    a = advise(dots, **TINY)
    row = a.profile.loc['stage4']
    line = f"advised plan 'head': auc {row.score:.3f} [{row.low:.3f}, {row.high:.3f}] on changed images, "
    line += f'{row.home:.3f} at home, of stage4; '
    assert line + '4 forward and 0 training passes of each training image' in str(a).splitlines()
    assert 'default plan: the same' in str(a).splitlines()
    monkeypatch.setattr(advisor, 'LARGE', 50)
    b = advise(dots, **TINY)
    result = b.plans.plan.to_dict()
    assert result == {'advised': 'fine_tune_averaged', 'default': 'head'}
    assert b.plans['training passes'].tolist() == [5, 0]
    assert 'the gain from fine-tuning is not measured; 4 forward and 5 training passes' in str(b)


def test_the_figure(dots):
    a = advise(dots, **TINY)
    mine = plt.figure()
    before = plt.get_fignums()
    fig = plot_advice(a)
    assert isinstance(fig, Figure)
    assert plt.get_fignums() == before
    assert fig.get_suptitle() == "small: plan 'head'"
    assert len(fig.axes) == 1
    result = len(fig.axes[0].get_xticks())
    assert result == len(a.profile)
    plt.close(mine)


# ---------------------------------------------------------------- errors


def classes(folder, **counts):
    rng = np.random.default_rng(0)
    for name, n in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8)).save(folder / name / f'{i}.png')
    return folder


@pytest.mark.parametrize(
    'counts, words',
    [
        ({'a': 9, 'b': 2}, ("class 'b' has 1 images", 'Add images')),
        ({'a': 9, 'b': 1}, ("'b' has one image",)),
        ({'a': 9}, ("only one class, 'a'",)),
        ({}, ('no images',)),
    ],
)
def test_too_few_images(tmp_path, read_files, counts, words):
    (tmp_path / 'data').mkdir()
    with pytest.raises(ValueError) as e:
        advise(classes(tmp_path / 'data', **counts), **TINY)
    for w in words:
        assert w in str(e.value), 'before anything is computed'
    assert not read_files, 'before anything is computed'


def test_too_few_groups(dots, read_files):
    t = dots[(dots.label == 'green') | dots.group.isin(['person 0', 'person 2'])]
    t = t.assign(split=np.where(t.group.isin(['person 1', 'person 2']), 'valid', 'train'))
    with pytest.raises(
        ValueError, match=r"class 'red' has 1 groups: cross-validation needs 2 groups or more of each class. Add groups"
    ):
        advise(t, **TINY)
    assert not read_files


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(task='flower'), "unknown task 'flower'. Known, nearest first: flowers"),
        (dict(target='clas'), "'clas'. Known, nearest first: class"),
        (dict(arch='test_resnett'), "unknown backbone 'test_resnett'. Known, nearest first: test_resnet"),
        (dict(weights='none.pth'), 'there is no weights file'),
        (dict(size=3), 'size=3'),
    ],
)
def test_names_are_checked_before_images_are_read(change, words):
    with pytest.raises(ValueError) as e:
        advise('no such folder', **{**TINY, **change})
    assert words in str(e.value)


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(runtime='plian'), 'nearest first: plain'),
        (dict(valid=1), 'valid=1'),
        (dict(labels='none.csv'), 'none.csv'),
    ],
)
def test_other_arguments(flowers, change, words):
    with pytest.raises(ValueError) as e:
        advise(flowers, **{**TINY, **change})
    assert words in str(e.value)


# ---------------------------------------------------------------- the command


def test_the_command_advise(tmp_path, flowers, monkeypatch):
    before = content(flowers)
    monkeypatch.chdir(tmp_path)
    result = good('advise', flowers, *WORDS)
    assert [p.name for p in tmp_path.iterdir()] == ['flowers_advice.png']
    assert content(flowers) == before
    with Image.open('flowers_advice.png') as im:
        assert im.format == 'PNG'
        assert min(im.size) > 200
        assert len(im.convert('L').getcolors(256)) > 20
    lines = result.out.splitlines()
    assert lines[0].startswith('groups: ')
    assert lines[1].startswith('no source column found')
    assert lines[2] == 'scenario: small'
    assert lines[-1] == 'figure: flowers_advice.png'
    assert "advice: plan 'head'" in result.out
    assert 'confidence: ' in result.out
    assert [line.split()[0] for line in lines if line.split()[0] in ROWS] == ROWS, 'the score at every depth'


def test_the_figure_is_replaced_only_with_overwrite(tmp_path, flowers):
    folder = tmp_path / 'folder'
    out = tmp_path / 'new' / 'p.png'
    good('advise', flowers, *WORDS, '--out', out)
    out.write_bytes(b'mine')
    with pytest.MonkeyPatch.context() as m:

        def never(*a, **k):
            raise AssertionError('it was computed before the error')

        m.setattr(advisor, 'advise', never)
        line = error_line('advise', flowers, *WORDS, '--out', out)
        assert str(out) in line
        assert '--overwrite' in line
    assert content(tmp_path) == {'new/p.png': b'mine'}
    good('advise', flowers, *WORDS, '--out', out, '--overwrite')
    assert list(content(tmp_path)) == ['new/p.png']
    assert out.read_bytes()[:4] == b'\x89PNG'
    folder.mkdir()
    (folder / 'mine.txt').write_text('mine')
    for words in ((), ('--overwrite',)):
        assert str(folder) in error_line('advise', flowers, *WORDS, '--out', folder, *words)
    assert (folder / 'mine.txt').read_text() == 'mine'


def test_interrupted_advice_writes_nothing(tmp_path, flowers, monkeypatch):
    def interrupt(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, 'savefig', interrupt)
    result = cli('advise', flowers, *WORDS, '--out', tmp_path / 'p.png')
    assert result.code == 130
    assert result.err == 'dr_transfer: interrupted; nothing was written\n'
    assert list(tmp_path.iterdir()) == []


def test_train_as_advised(tmp_path, fundus_data, monkeypatch):
    "The advice is for the same images, the record has the plan, and the model can be loaded."
    run = tmp_path / 'run'
    given = {}

    def spy(*a, f=advisor.advise, **k):
        given['advice'] = f(*a, **k)
        return given['advice']

    monkeypatch.setattr(advisor, 'advise', spy)
    choose = advisor._choose_stage

    def given_stage(profile, default):
        if 'stage1+stage2' in profile.index:
            return 'stage1+stage2', 'the given reason'
        return choose(profile, default)

    monkeypatch.setattr(advisor, '_choose_stage', given_stage)
    result = good(
        'train',
        fundus_data,
        '--task',
        'dr',
        *WORDS,
        '--plan',
        'advise',
        '--epochs',
        1,
        '--seed',
        5,
        '--valid',
        0.25,
        '--out',
        run,
    )
    r = read_record(run / 'record.json')
    plan = given['advice'].plan
    assert str(given['advice']) in result.out
    assert result.out.index('advice: plan') < result.out.index('phase 1 of')
    assert r.plan.name == plan.name == 'head_stage2_2'
    assert (
        (r.plan.stage, r.plan.n_stages)
        == (
            r.stage,
            r.n_stages,
        )
        == ('stage2', 2)
    )
    assert [p.epochs for p in r.plan.phases] == [None]
    assert r.data.classes['train'] == given['advice'].counts
    about = json.loads((run / 'model' / 'model.json').read_text())
    assert (about['stage'], about['n_stages']) == ('stage2', 2)
    p = pd.read_csv(run / 'predictions.csv')
    again = good('predict', run, *p.image, '--runtime', 'plain').out
    np.testing.assert_allclose(pd.read_csv(io.StringIO(again)).p_no, p.p_no, atol=0.02)


def test_advice_is_for_a_network(flowers):
    "By default the learner has that network; another one raises an error."
    a = advise(flowers, **TINY)
    learn = build_learner(flowers, size=32, runtime='plain', plan=a)
    assert learn.record.arch == 'test_resnet'
    assert learn.record.weights.kind == 'random'
    other = build_learner(flowers, arch='small_cnn', weights='random', size=32, runtime='plain')
    with pytest.raises(ValueError, match=r"the backbone 'test_resnet'.*plan=PLAN"):
        fit(other, a)


def test_training_finds_what_the_advice_computed(tmp_path, flowers, weights, monkeypatch):
    "The features of the original images are found; those of the mirrored and enlarged images are new"
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'cache'))
    words = ('--arch', 'test_resnet', '--weights', weights, '--size', '32')

    def stores():
        return {p.parent.name: p.read_bytes() for p in (tmp_path / 'cache' / 'features').glob('*/images.jsonl')}

    good('advise', flowers, *words, '--out', tmp_path / 'advice.png')
    first = stores()
    good('train', flowers, *words, '--plan', 'head', '--out', tmp_path / 'run')
    new = {k: v for k, v in stores().items() if k not in first}
    assert len(first) == 5
    assert new
    assert all('px-mirror_near-' in k for k in new)  # one store for a stage and a view
    assert all(v.startswith(first[k]) for k, v in stores().items() if k in first)  # the other subset was appended


@pytest.mark.parametrize(
    'words, why',
    [
        (('--arch', 'test_resnett'), 'nearest first: test_resnet,'),
        (('--task', 'flower'), 'nearest first: flowers'),
        (('--target', 'clas'), 'nearest first: class'),
        (('--size', '3'), "--size: '3' is invalid"),
        (('--valid', '0'), "--valid: '0' is invalid"),
        (('--runtime', 'plian'), 'nearest first: plain'),
    ],
)
def test_invalid_arguments(tmp_path, flowers, words, why):
    for command in (('advise', '--out', tmp_path / 'p.png'), ('train', '--plan', 'advise', '--out', tmp_path / 'run')):
        assert why in error_line(command[0], flowers, *WORDS, *command[1:], *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('epochs', [0, -1])
def test_epochs_are_checked_before_anything_is_measured(tmp_path, flowers, monkeypatch, epochs):
    def never(*a, **k):
        raise AssertionError('it was computed before the error')

    monkeypatch.setattr(advisor, 'advise', never)
    assert f"--epochs: '{epochs}' is invalid" in error_line(
        'train', flowers, *WORDS, '--plan', 'advise', '--epochs', epochs, '--out', tmp_path / 'run'
    )


def test_a_damaged_file_is_skipped(tmp_path, dots, read_files):
    text = tmp_path / 'text.png'
    t = dots.copy()
    text.write_text('not an image')
    t.loc[0, 'image'] = str(text)
    result = sum(advise(t, **TINY).counts.values())
    assert result == len(read_files)
    assert str(text) not in read_files


# ---------------------------------------------------------------- reader


def test_another_reader_is_advised_if_it_is_better_in_each_fold(fundus_data, monkeypatch):
    "The plan has it, and so do a learner and its record."
    choose = advisor._choose_stage

    def corrected_light_is_better(table, default):
        if 'fundus_local' in table.index:
            table.attrs['folds']['fundus_local'] = np.add(table.attrs['folds'][default], 0.1)
            table.loc['fundus_local', 'score'] = table.loc[default, 'score'] + 0.1
        return choose(table, default)

    own = advise(fundus_data, 'dr', **TINY)
    assert own.plan.reader is None
    assert 'reader: fundus_and_local, fundus_and_local 0.' in str(own)
    monkeypatch.setattr(advisor, '_choose_stage', corrected_light_is_better)
    advice = advise(fundus_data, 'dr', **TINY)
    assert advice.plan.reader == 'fundus_local'
    assert 'reader: fundus_local, fundus_and_local 0.' in str(advice)
    assert advice.plans.loc['advised', 'forward passes'] == 4
    assert advice.plans.loc['default', 'forward passes'] == 8
    learn = build_learner(fundus_data, 'dr', plan=advice, **TINY)
    assert (learn.task.reader, learn.record.reader) == ('fundus_local', 'fundus_local')
    with pytest.raises(ValueError, match="needs the reader 'fundus_local', which this learner does not have"):
        fit(build_learner(fundus_data, 'dr', **TINY), plan=advice)


def test_both_kinds_of_light_are_measured(fundus_data, monkeypatch):
    "The head of the default plan reads both, so the candidates are compared on both."
    views = []

    def spy(features, *a, f=advisor.depth_profile, **k):
        views.append(features.views)
        return f(features, *a, **k)

    monkeypatch.setattr(advisor, 'depth_profile', spy)
    advise(fundus_data, 'dr', **TINY)
    assert views == [2, 2, 2, 2, 1, 1, 1, 1]  # the stages, then three readers: elsewhere and at home


def test_photographs_of_flowers_have_one_reader(dots):
    assert 'reader' not in str(advise(dots, **TINY))
