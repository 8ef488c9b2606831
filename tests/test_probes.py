"Test probes: known truth, tiny sets, groups, and the ridge path compared with scikit-learn."

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from learners import Known
from PIL import Image
from sklearn.linear_model import Ridge, RidgeClassifier
from torch import nn

from dr_transfer.features import probes
from dr_transfer.features.probes import (
    PENALTIES,
    PROBE_METRICS,
    SIMILAR,
    depth_profile,
    domain_distance,
    domain_profile,
    fold_interval,
    learning_speed,
    plot_depth_profile,
    ridge_path,
    stage_gain,
)
from dr_transfer.models.backbones import create_body
from dr_transfer.models.network import Body
from dr_transfer.models.stages import Stages

pytestmark = pytest.mark.filterwarnings('ignore:The groups parameter is ignored')


def known(n=120, k=2, seed=0, separations=(0.0, 0.4, 2.0, 0.8), channels=24, views=2, y=None):
    "Features in which the third stage separates the classes best."
    rng = np.random.default_rng(seed)
    if y is None:
        y = np.arange(n) % k
    means = rng.standard_normal((k, channels))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    stages = {}
    for i, separation in enumerate(separations):
        noise = rng.standard_normal((n, views, channels))
        features = separation * means[y][:, None] + noise * 0.7
        stages[f'stage{i}'] = features.astype('float32')
    return Known(**stages), y


def plus_minus_one(y, k):
    "Targets of a ridge classifier: 1 in the column of the class, -1 in the others."
    return 2.0 * np.eye(k)[y] - 1


# ---------------------------------------------------------------- ridge


@pytest.mark.parametrize(
    'n, channels',
    [
        (40, 6),
        (40, 40),
        (40, 39),
        (30, 200),
        (5, 1),
    ],
)
def test_ridge_path_is_that_of_scikit_learn(n, channels):
    rng = np.random.default_rng(n + channels)
    x = rng.standard_normal((n, channels)) * 3 + 5
    new = rng.standard_normal((7, channels))
    t = rng.standard_normal((n, 3))
    scores, gcv = ridge_path(x, t, new)
    assert scores.shape == (len(PENALTIES), 7, 3)
    assert gcv.shape == (len(PENALTIES),)
    mean = x.mean(0)
    sd = x.std(0)
    for penalty, score in zip(PENALTIES[4:], scores[4:]):
        ridge = Ridge(alpha=n * penalty, solver='svd')
        ridge.fit((x - mean) / sd, t)
        want = ridge.predict((new - mean) / sd)
        assert score == pytest.approx(want, abs=1e-6, rel=1e-6)


def test_ridge_path_is_that_of_ridge_classifier():
    f, y = known(90, 3)
    x = f.numpy('stage2').mean(1).astype(float)
    train = x[:60]
    test = x[60:]
    mean = train.mean(0)
    sd = train.std(0)
    scores, _ = ridge_path(train, plus_minus_one(y[:60], 3), test, np.array([0.1]))
    want = RidgeClassifier(alpha=6)
    want.fit((train - mean) / sd, y[:60])
    z = (test - mean) / sd
    assert scores[0] == pytest.approx(want.decision_function(z), abs=1e-8)
    assert (scores[0].argmax(1) == want.predict(z)).all()


@pytest.mark.parametrize(
    'n, channels',
    [
        (50, 8),
        (30, 200),
    ],
)
def test_gcv_is_that_of_the_hat_matrix(n, channels):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, channels))
    t = rng.standard_normal((n, 2))
    _, gcv = ridge_path(x, t, x[:1])
    z = (x - x.mean(0)) / x.std(0)
    r = t - t.mean(0)
    for penalty, got in zip(PENALTIES[6:], gcv[6:]):
        gram = z.T @ z + n * penalty * np.eye(channels)
        hat = z @ np.linalg.solve(gram, z.T) + 1 / n
        residuals = t - hat @ t
        free = n - np.trace(hat)
        want = n * (residuals**2).sum() / free**2
        assert got == pytest.approx(want, rel=1e-6)
        assert residuals == pytest.approx(r - (hat - 1 / n) @ r)


def test_ridge_ignores_channels_that_are_constant_or_repeated():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 5))
    t = rng.standard_normal((40, 1))
    constant = np.full((40, 1), 7.3)
    flat = np.concatenate([x, constant, np.zeros((40, 2))], 1)
    other = flat[:6].copy()
    other[:, 5:] += 100.0
    got, _ = ridge_path(flat, t, other)
    want, _ = ridge_path(x, t, x[:6])
    assert got == pytest.approx(want, abs=1e-9)
    repeated = np.repeat(x, 2, 1)
    twice, _ = ridge_path(repeated, t, repeated[:6])
    assert np.isfinite(twice).all()
    assert abs(twice).max() < 10
    few = t[:10]
    nothing, gcv = ridge_path(np.ones((10, 3)), few, np.ones((4, 3)))
    mean = np.full((len(PENALTIES), 4, 1), few.mean())
    assert nothing == pytest.approx(mean)
    assert np.isfinite(gcv).all()


# ---------------------------------------------------------------- intervals


def test_interval_is_that_of_nadeau_and_bengio():
    s = np.array([0.7, 0.8, 0.75, 0.9, 0.6])
    mean, low, high = fold_interval(s, 0.25)
    variance = (1 / 5 + 0.25) * s.var(ddof=1)
    half = 2.7764451 * np.sqrt(variance)
    assert (mean, low, high) == pytest.approx((0.75, 0.75 - half, 0.75 + half))
    assert fold_interval([*s, np.nan]) == pytest.approx((mean, low, high))
    assert np.isnan(fold_interval([np.nan, np.nan])).all()
    assert fold_interval([0.5, np.nan])[0] == 0.5


def test_intervals_cover():
    "The expected score of a fold's classifier, from many images not used in training, is in nearly all intervals."
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(4) * 0.6

    def sample(n):
        y = np.arange(n) % 2
        x = y[:, None] * mean + rng.standard_normal((n, 4))
        return x.astype('float32')[:, None], y

    big, y_big = sample(4000)
    inside = []
    for i in range(60):
        x, y = sample(80)
        table = depth_profile(Known(a=x), y, seed=i, metric='accuracy')
        train = x[:64, 0].astype(float)
        scores, gcv = ridge_path(train, plus_minus_one(y[:64], 2), big[:, 0])
        best = scores[gcv.argmin()]
        accuracy = (best.argmax(1) == y_big).mean()
        row = table.iloc[0]
        inside.append(row.low <= accuracy <= row.high)
    assert np.mean(inside) > 0.88


# ---------------------------------------------------------------- depth profile


@pytest.mark.parametrize(
    'k, metric',
    [
        (2, None),
        (2, 'accuracy'),
        (2, 'kappa'),
        (4, None),
        (4, 'kappa'),
    ],
)
def test_the_best_stage_is_found(k, metric):
    f, y = known(160, k)
    table = depth_profile(f, y, metric=metric)
    assert list(table.index) == list(f.stages)
    assert list(table.columns) == ['channels', 'score', 'low', 'high']
    assert table.score.idxmax() == 'stage2'
    assert (table.channels == 24).all()
    assert (table.low <= table.score).all()
    assert (table.score <= table.high).all()
    assert table.high.max() <= 1
    default = 'auc' if k == 2 else 'accuracy'
    assert table.attrs['metric'] == (metric or default)
    chance = 0 if metric == 'kappa' else 1 / k
    assert table.low['stage0'] < chance < table.high['stage0']
    assert metric == 'kappa' or table.low.min() >= 0
    gain, low, high = stage_gain(table, 'stage2', 'stage0')
    difference = table.score['stage2'] - table.score['stage0']
    assert gain == pytest.approx(difference)
    assert 0 < low < gain < high


def test_concatenated_stages():
    f, y = known(160, separations=(0, 1.0, 1.0), seed=3)
    table = depth_profile(f, y, stages=['stage1', ('stage1', 'stage2')])
    assert list(table.index) == ['stage1', 'stage1+stage2']
    assert list(table.channels) == [24, 48]
    one, two = table.score
    assert two > one
    alone = depth_profile(f, y, stages='stage1')
    assert alone.score.iloc[0] == one


def test_the_same_seed_gives_the_same_numbers_and_views_are_averaged():
    f, y = known(60)
    a = depth_profile(f, y, seed=3)
    b = depth_profile(f, y, seed=3)
    pd.testing.assert_frame_equal(a, b)
    assert a.attrs == b.attrs
    other = depth_profile(f, y, seed=4)
    assert not a.score.equals(other.score)
    averaged = {k: v.mean(1, keepdims=True) for k, v in f.arrays.items()}
    mean = depth_profile(Known(**averaged), y, seed=3)
    assert mean.score.to_numpy() == pytest.approx(a.score.to_numpy())
    repeated = depth_profile(f, y, repeats=3)
    assert len(repeated.attrs['folds']['stage0']) == 15


def test_labels_may_be_names_and_grades_have_their_distance():
    f, y = known(90, 3)
    names = np.array(['daisy', 'roses', 'tulips'])[y]
    want = depth_profile(f, y).score
    assert depth_profile(f, names).score.equals(want)
    column = pd.Series(names, index=range(500, 590))
    assert depth_profile(f, column).score.equals(want)
    near = depth_profile(f, np.array([0, 1, 2])[y], metric='kappa')
    far = depth_profile(f, np.array([0, 1, 9])[y], metric='kappa')
    assert near.score['stage1'] != far.score['stage1']


def test_groups_are_not_divided():
    "Each group has its own mark and one class: a classifier that was trained on the group can predict its class."
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(30), 4)
    y = rng.permutation(np.arange(30) % 2)[group]
    marks = rng.standard_normal((30, 40))
    noise = rng.standard_normal((120, 40))
    features = marks[group] + 0.1 * noise
    f = Known(a=features[:, None].astype('float32'))
    assert depth_profile(f, y).score['a'] > 0.9
    assert depth_profile(f, y, group).score['a'] < 0.75
    table = learning_speed(f, y, [f'patient {g}' for g in group])
    assert table.score.max() < 0.75


def test_subsets_are_nested_stratified_and_by_group():
    group = np.random.default_rng(0).integers(0, 60, 300)
    y = (group % 3 == 0).astype(int)
    quarter, half, everything = probes._parts(y, group, (0.25, 0.5, 1), 0)
    assert set(quarter) < set(half) < set(everything) == set(range(300))
    for rows, fraction in ((quarter, 0.25), (half, 0.5)):
        others = np.delete(group, rows)
        assert not set(group[rows]) & set(others)
        assert len(rows) / 300 == pytest.approx(fraction, abs=0.08)
        assert y[rows].mean() == pytest.approx(y.mean(), abs=0.1)
    some = np.where(group < 30, group.astype(object), None)
    (rows,) = probes._parts(y, some, (0.5,), 0)
    alone = np.flatnonzero(group >= 30)
    chosen = np.intersect1d(alone, rows)
    assert 0 < len(chosen) < len(alone)


@pytest.mark.parametrize(
    'n, k',
    [
        (20, 2),
        (40, 2),
        (50, 5),
        (10, 2),
    ],
)
def test_tiny_sets_with_many_channels(n, k):
    f, y = known(n, k, separations=(0.0, 3.0), channels=600)
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        table = depth_profile(f, y)
        speed = learning_speed(f, y)
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    assert table.score['stage1'] > 0.75
    assert (speed.images > 0).all()
    assert np.isfinite(speed.score.iloc[-1])


def test_a_fold_of_one_class_is_ignored():
    x = np.random.default_rng(0).standard_normal((20, 3))
    y = np.array([0] * 10 + [1] * 10)
    classes = np.array([0, 1])
    rows = np.arange(20)
    folds = [
        (rows[:10], rows[10:]),
        (rows[5:], rows[:5]),
        (rows[::2], rows[1::2]),
    ]
    scores = probes._fold_scores(probes._Validation(y, classes, 'auc', folds), x)
    assert np.isnan(scores[:2]).all()
    assert 0 <= scores[2] <= 1
    assert fold_interval(scores)[0] == scores[2]
    row = probes._row([np.nan, np.nan], 0.25, 'auc')
    assert np.isnan(list(row.values())).all()


def test_metrics_equal_those_of_scikit_learn():
    y = np.array([0, 1, 2, 2])
    scores = np.eye(3)[[0, 1, 1, 2]]
    classes = np.array([0, 2, 4])
    assert PROBE_METRICS['accuracy'](y, scores, classes) == 0.75
    by_chance = 4 * 36 + 4 * 24 - 2 * 10 * 8
    kappa = 1 - 4 * 4 / by_chance
    assert PROBE_METRICS['kappa'](y, scores, classes) == pytest.approx(kappa)
    two = np.array([0, 1])
    assert PROBE_METRICS['auc'](two, np.eye(2), classes[:2]) == 1


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(y=np.zeros(60)), 'the same class'),
        (dict(y=[0, 1]), 'one for each image'),
        (dict(groups=[1, 2]), 'groups'),
        (dict(y=[np.nan] + [0.0, 1.0] * 29 + [1.0]), 'missing'),
        (dict(metric='acuracy'), 'accuracy'),
        (dict(stages=['stage9']), 'stage9'),
        (dict(y=np.arange(60) % 3, metric='auc'), 'two classes'),
        (dict(y=['a', 'b'] * 30, metric='kappa'), 'numbers'),
    ],
)
def test_invalid_input(change, says):
    f, y = known(60)
    with pytest.raises((ValueError, KeyError), match=says):
        depth_profile(f, **{'y': y, **change})


def test_features_that_are_not_finite():
    f, y = known(60)
    f.arrays['stage1'][3, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r'stage1.*1 images'):
        depth_profile(f, y)


def test_plot():
    f, y = known(60)
    table = depth_profile(f, y, stages=[*f.stages, ('stage1', 'stage2')])
    fig = plot_depth_profile(table)
    fig.canvas.draw()
    ax = fig.axes[0]
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert labels[0] == 'stage0\n24'
    assert labels[-1] == 'stage1\n+ stage2\n48'
    assert 'ROC' in ax.get_ylabel()
    table.loc['stage0', ['score', 'low', 'high']] = np.nan
    plot_depth_profile(table).canvas.draw()


# ---------------------------------------------------------------- learning speed


def test_learning_speed_is_positive_where_labels_can_be_predicted():
    f, y = known(600, separations=(0.0, 0.7), channels=100, views=1)
    table = learning_speed(f, y, fractions=(0.1, 0.5, 1))
    assert list(table.columns) == ['images', 'score', 'low', 'high']
    assert list(table.index) == [0.1, 0.5, 1]
    assert list(table.images) == [48, 240, 480]
    assert table.score.is_monotonic_increasing
    gain = table.attrs['gain']
    assert gain == pytest.approx(table.score[1] - table.score[0.5])
    assert table.attrs['gain_low'] < gain < table.attrs['gain_high']
    at_depth = depth_profile(f, y)
    assert learning_speed(f, y).score[1] == pytest.approx(at_depth.score['stage1'])
    both = ('stage0', 'stage1')
    at_depth = depth_profile(f, y, stages=[both])
    speed = learning_speed(f, y, stages=both, fractions=(1,))
    assert speed.score[1] == pytest.approx(at_depth.score.iloc[0])
    quarter = learning_speed(f, y, fractions=(0.25, 1))
    two_doublings = quarter.score[1] - quarter.score[0.25]
    assert quarter.attrs['gain'] == pytest.approx(two_doublings / 2)
    pd.testing.assert_frame_equal(table, learning_speed(f, y, fractions=(0.1, 0.5, 1)))


@pytest.mark.parametrize(
    'fractions',
    [
        (),
        (1, 0.5),
        (0, 1),
        (0.5, 2),
        (1, 1),
    ],
)
def test_invalid_fractions(fractions):
    f, y = known(60)
    with pytest.raises(ValueError, match='fractions'):
        learning_speed(f, y, fractions=fractions)


# ---------------------------------------------------------------- domain distance


class Spec:
    name = 'small'
    size = 32
    mean = (0.5,) * 3
    std = (0.25,) * 3


def small(seed=0):
    "Two stages with their own BatchNorm, used as a body."
    torch.manual_seed(seed)
    stages = Stages()
    for i, (a, b) in enumerate(((3, 8), (8, 12))):
        convolution = nn.Conv2d(a, b, 3, padding=1)
        stage = nn.Sequential(convolution, nn.BatchNorm2d(b), nn.ReLU())
        stages.add_module(f'stage{i}', stage)
    stages.spec = Spec()
    return Body(stages).eval()


def random_images(n, seed=0, shift=0):
    rng = np.random.default_rng(seed)
    base = rng.integers(40, 160, (n, 8, 8, 3))
    small = (base + shift).astype(np.uint8)
    return [np.asarray(Image.fromarray(a).resize((32, 32))) for a in small]


def normalised(images):
    "Normalised images, the input of the network"
    x = torch.stack([torch.tensor(p).permute(2, 0, 1) for p in images])
    return (x / 255 - 0.5) / 0.25


@torch.no_grad()
def before_the_first_norm(body, images):
    "The input of the first BatchNorm, by channel"
    convolution = body.stages.stage0[0]
    maps = convolution(normalised(images)).double()
    return maps.transpose(0, 1).flatten(1)


@pytest.fixture(scope='module')
def trained():
    "A body whose statistics are those of `random_images(200)`"
    body = small()
    for m in body.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    body.train()
    with torch.no_grad():
        body.stages(normalised(random_images(200)))
    return body.eval()


def test_distance_is_near_zero_on_the_training_images_and_grows_with_the_shift(trained):
    far = [domain_distance(trained, random_images(200, shift=s), n=200) for s in (0, 20, 50, 90)]
    assert far[0] < 1e-3
    assert far[1] > 10 * far[0]
    assert far == sorted(far)
    assert domain_distance(trained, random_images(64, seed=1)) < SIMILAR / 2


def test_profile_is_by_layer_and_by_the_formula(trained):
    images = random_images(30, seed=2, shift=40)
    table = domain_profile(trained, images)
    assert list(table.index) == ['stage0.1', 'stage1.1']
    assert list(table.channels) == [8, 12]
    assert table.distance.mean() == domain_distance(trained, images)
    bn = trained.stages.stage0[1]
    h = before_the_first_norm(trained, images)

    def normal(mean, variance):
        sd = (variance.double() + bn.eps).sqrt()
        return torch.distributions.Normal(mean.double(), sd)

    here = normal(h.mean(1), h.var(1, False))
    home = normal(bn.running_mean, bn.running_var)
    kl = torch.distributions.kl_divergence
    distances = (kl(here, home) + kl(home, here)) / 2
    assert table.distance.iloc[0] == pytest.approx(np.median(distances.numpy()), rel=1e-3)


def test_a_random_subset_by_seed(trained):
    images = random_images(40, seed=3)
    one, two, other = (domain_distance(trained, images, n=10, seed=s) for s in (0, 0, 1))
    assert one == two != other
    of_all = domain_distance(trained, images, n=40)
    assert of_all == domain_distance(trained, images, n=1000, seed=7)
    assert domain_distance(trained.train(), images, n=10) == one
    assert not trained.training


@pytest.mark.parametrize('threads', [1, 4])
def test_threads_do_not_mix_their_batches(trained, threads):
    "Batches run through one network at the same time; each is counted once"
    images = [np.full((32, 32, 3), v, np.uint8) for v in range(0, 240, 2)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        table = domain_profile(trained, images)
    finally:
        torch.set_num_threads(before)
    bn = trained.stages.stage0[1]
    h = before_the_first_norm(trained, images)
    a = h.var(1, False) + bn.eps
    b = bn.running_var.double() + bn.eps
    shift = (h.mean(1) - bn.running_mean.double()) ** 2
    distances = (a / b + b / a + shift * (1 / a + 1 / b) - 2) / 4
    assert table.distance.iloc[0] == pytest.approx(np.median(distances.numpy()), rel=1e-3)
    for m in trained.modules():
        assert not m._forward_pre_hooks


def test_no_distance_without_running_statistics(trained):
    images = random_images(4)
    assert np.isnan(domain_distance(small(), images))
    without_norms = Body(create_body('small_cnn', 'random'))
    assert np.isnan(domain_distance(without_norms, images, size=32))
    body = small()
    for s in body.stages:
        s[1] = nn.Identity()
    assert np.isnan(domain_distance(body, images))
    table = domain_profile(body, images)
    assert len(table) == 0
    assert list(table.columns) == ['channels', 'distance']
    half = small()
    half.stages.stage1[1] = trained.stages.stage1[1]
    assert list(domain_profile(half, images).index) == ['stage1.1']


def test_hooks_are_removed_after_an_error_too(trained, tmp_path):
    (tmp_path / 'bad.jpg').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'bad.jpg'):
        domain_distance(trained, [tmp_path / 'bad.jpg'])
    with pytest.raises(ValueError, match='at least one'):
        domain_distance(trained, [])
    domain_distance(trained, random_images(2))
    assert not [m for m in trained.modules() if m._forward_pre_hooks]


def test_images_of_flowers_are_similar_to_imagenet_and_fundus_images_are_not(data_root):
    body = Body(create_body('efficientnet_lite0'))
    flowers = sorted((data_root / 'flowers').glob('*/*.jpg'))
    fundus_images = sorted((data_root / 'dr' / 'idrid' / 'images').iterdir())
    if not flowers or not fundus_images:
        pytest.skip('no flowers or no fundus images')
    assert domain_distance(body, flowers, n=32) < 0.7 * SIMILAR
    assert domain_distance(body, fundus_images, n=32, reader='fundus', fit='pad') > 1.4 * SIMILAR


def test_images_of_a_table(trained):
    "A column of some rows, with their index"
    images = random_images(12)
    column = pd.Series(images, index=range(5, 17))
    assert domain_distance(trained, column) == domain_distance(trained, images)
    assert domain_distance(trained, column, n=6) == domain_distance(trained, images, n=6)


def test_the_penalty_with_images_that_are_nearly_alike():
    "Ten pairs of almost the same image let generalised cross-validation choose almost no penalty: a score of .68."
    rng = np.random.default_rng(0)
    groups = np.arange(200)
    groups[1:20:2] = groups[0:20:2]
    y = groups % 4 // 2
    x = rng.standard_normal((200, 240)) + 0.25 * y[:, None] * (np.arange(240) < 60)
    x[1:20:2] = x[0:20:2] + 0.001 * rng.standard_normal((10, 240))
    profile = depth_profile(Known(all=x[:, None].astype(np.float32)), y, groups)
    assert profile.score['all'] > 0.75
