"Test logistic regression in blocks: the optimum is that of scikit-learn, and no more than some blocks are in memory."

import tracemalloc
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from learners import learner_builder, make_sets, same_state, state_of
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import dr_transfer.features.classifiers as classifiers
import dr_transfer.features.extraction as extraction
import dr_transfer.features.logistic as logistic
from dr_transfer.core import fit, valid_predictions
from dr_transfer.data.sources import source_folds
from dr_transfer.features.classifiers import FeatureClassifier, grouped_folds
from dr_transfer.features.extraction import FeatureArray, Features, image_blocks
from dr_transfer.training.plans import HEAD_PHASE, Plan
from dr_transfer.utils.store import ArrayStore, fill_rows

CHANNELS = {'stage1': 48, 'stage2': 80}
VALUES = (1e-4, 1e-3, 1e-2)


def correlated(n, views, classes, seed=0):
    "Features with correlated channels of unlike scale, and classes; (images, views, 128)"
    r = np.random.default_rng(seed)
    y = r.integers(0, classes, n)
    hidden = r.normal(size=(classes, 16))[y] + 1.5 * r.normal(size=(n, 16))
    x = (hidden @ r.normal(size=(16, 128)))[:, None] + r.normal(size=(n, views, 128))
    x = 30 * r.random(128) + x * r.geometric(0.1, 128)
    return x.astype(np.float32), y


def stored(folder, x) -> Features:
    "Write features into stores, a store for each stage and view"
    stores, arrays, start = {}, {}, 0
    for stage, d in CHANNELS.items():
        for view in range(x.shape[1]):
            field = extraction._field(stage, view)
            about = {'pools': ['mean'], 'stage': stage, 'view': view, 'weights': 'none'}
            stores[field] = ArrayStore(folder, field, about, {field: ((1, 1, d), 'float32')})
            arrays[field] = x[:, view, None, None, start : start + d]
        start += d
    keys = [f'image {i}' for i in range(len(x))]
    rows = fill_rows(list(stores.values()), keys, keys, lambda items, fields: iter([arrays]), len(x))
    views = {1: 'none', 2: 'mirror', 4: 'quarter_turns'}[x.shape[1]]
    return Features(stores, dict(zip(stores, rows)), keys, views)


@pytest.fixture(autouse=True)
def few_values(monkeypatch):
    "Some values of C, to save time"
    monkeypatch.setattr(classifiers, 'C_VALUES', VALUES)


@pytest.fixture
def small_memory(monkeypatch):
    "Nothing is kept in memory, and a block has 16,384 numbers."
    monkeypatch.setattr(extraction, '_MAX_NUMBERS', 0)
    monkeypatch.setattr(extraction, '_BLOCK_NUMBERS', 2**14)


@dataclass
class Counter:
    "Features that were read from stores"

    total: int = 0
    largest: int = 0  # In one piece


@pytest.fixture
def counter(monkeypatch):
    read = FeatureArray.read
    counter = Counter()

    def noted(self, *args, **kwargs):
        out = read(self, *args, **kwargs)
        counter.total += out.size
        counter.largest = max(counter.largest, out.size)
        return out

    monkeypatch.setattr(FeatureArray, 'read', noted)
    return counter


def objective(x, y, w, C, coef, intercept):
    "The loss of scikit-learn's logistic regression, divided by the total weight"
    z = x.astype(float) @ coef.T + intercept
    if len(coef) == 1:
        z = np.concatenate([np.zeros_like(z), z], 1)
    log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    loss = -(w * log_p[np.arange(len(y)), y]).sum()
    return (loss + (coef**2).sum() / (2 * C)) / w.sum()


def log_loss_of(model, x, y):
    "Log-loss of images (n, views, channels), clipped as for the choice of C"
    p = model.predict_proba(x.reshape(-1, x.shape[2])).reshape(*x.shape[:2], -1).mean(1)
    return -np.log(p[np.arange(len(y)), y].clip(0.001)).mean()


@pytest.mark.parametrize('classes, views', [(2, 1), (2, 4), (5, 2)])
@pytest.mark.parametrize('by_source', [False, True])
def test_the_optimum_is_that_of_scikit_learn(small_memory, classes, views, by_source):
    "On every fold and on all images, C included; the loss differs by less than 1e-4"
    x, y = correlated(300, views, classes)
    assert len(image_blocks(x)) > 2
    groups = np.arange(300) // 3
    sources = np.arange(300) % 3 if by_source else None
    model = FeatureClassifier().fit(x, y, groups, sources)
    found = model.estimator_

    scaled = StandardScaler().fit_transform(x.reshape(-1, 128)).astype(float).reshape(x.shape)
    folds = source_folds(y, sources) if by_source else grouped_folds(y, groups)

    def path(images):
        "Yield a model for each value of C, each fit starting from the one before"
        own = LogisticRegression(max_iter=5000, warm_start=True)
        rows = scaled[images].reshape(-1, 128)
        for C in VALUES:
            yield own.set_params(C=C).fit(rows, y[images].repeat(views), np.full(len(rows), 1 / views))

    losses = np.zeros(len(VALUES))
    for train, test in folds:
        losses += [len(test) / 300 * log_loss_of(own, scaled[test], y[test]) for own in path(train)]
    best = int(losses.argmin())
    assert VALUES[best] == found.C
    assert list(found.losses_.values()) == pytest.approx(losses, abs=2e-3)

    *_, (_, own) = zip(range(best + 1), path(np.arange(300)))
    rows = scaled.reshape(-1, 128), y.repeat(views), np.full(300 * views, 1 / views), found.C
    theirs = objective(*rows, own.coef_, own.intercept_)
    assert objective(*rows, found.coef_, found.intercept_) == pytest.approx(theirs, abs=1e-4)
    assert found.coef_.shape == own.coef_.shape
    assert model.predict_proba(x).argmax(1) == pytest.approx(model.predict(x))


def test_the_gradient_is_that_of_the_loss(small_memory):
    x, y = correlated(60, 2, 3)
    training = np.random.default_rng(1).random((60, 2)) < 0.8
    scaler = StandardScaler().fit(x.reshape(-1, 128))
    problem = logistic.LogisticProblem(logistic.FeatureRows(x, scaler), y, training)
    w = 0.05 * np.random.default_rng(2).normal(size=np.prod(problem.shape))
    _, gradient = problem.loss_gradient(w, 0.1)
    direction = np.random.default_rng(3).normal(size=w.size)
    step = 1e-5
    change = [problem.loss_gradient(w + s * step * direction, 0.1)[0] for s in (1, -1)]
    assert (change[0] - change[1]) / (2 * step) == pytest.approx(gradient @ direction, rel=1e-5)
    for i in range(2):  # a set alone
        alone = logistic.LogisticProblem(problem.rows, y, training[:, [i]])
        _, own = alone.loss_gradient(w.reshape(problem.shape)[i].ravel(), 0.1)
        assert gradient.reshape(problem.shape)[i].ravel() == pytest.approx(own, rel=1e-9, abs=1e-12)


def test_the_number_of_threads_does_not_matter(small_memory, monkeypatch):
    x, y = correlated(200, 2, 3)
    coefs = []
    for cores in (1, 4):
        monkeypatch.setattr(logistic.os, 'cpu_count', lambda n=cores: n)
        coefs.append(FeatureClassifier().fit(x, y).estimator_.coef_)
    assert np.array_equal(*coefs)


def test_features_larger_than_the_memory(tmp_path, small_memory, counter, monkeypatch):
    "Blocks are read from the stores; the peak is below the size of the features, and the result the same"
    x, y = correlated(1200, 4, 2)
    features = stored(tmp_path, x)
    monkeypatch.setattr(logistic.os, 'cpu_count', lambda: 2)
    tracemalloc.start()
    try:
        model = FeatureClassifier().fit(features, y)
        p = model.predict_proba(features)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counter.largest <= 2**14
    assert counter.total > 20 * x.size  # it was read in every pass
    assert peak < 0.6 * x.nbytes  # in memory it would be several times the size
    with monkeypatch.context() as m:
        m.setattr(extraction, '_MAX_NUMBERS', 2**26)
        m.setattr(extraction, '_BLOCK_NUMBERS', 2**26)
        in_memory = FeatureClassifier().fit(features, y)
    assert model.estimator_.C == in_memory.estimator_.C
    assert model.estimator_.coef_ == pytest.approx(in_memory.estimator_.coef_, abs=1e-4)
    assert p == pytest.approx(in_memory.predict_proba(x), abs=1e-4)


@pytest.mark.parametrize('views', [1, 4])
def test_a_feature_array_is_indexed_like_an_array(tmp_path, views):
    x, _ = correlated(40, views, 2)
    features = stored(tmp_path, x).take(np.random.default_rng(0).permutation(40))
    want = features.numpy()
    lazy = FeatureArray(features)
    assert (lazy.shape, lazy.size, lazy.ndim, lazy.dtype, len(lazy)) == (want.shape, want.size, 3, want.dtype, 40)
    rows = np.array([3, 3, 39, -1, 0])
    for index in (slice(None), slice(5, 9), slice(8, 2, -2), rows, np.arange(40) % 3 == 0, slice(3, 3)):
        assert np.array_equal(lazy[index], want[index])
        assert np.array_equal(lazy.read(index, np.float64), want[index].astype(float))
    views = np.arange(5) % views
    assert np.array_equal(lazy[rows, views], want[rows, views])
    one = FeatureArray(features, ['stage2'])
    assert np.array_equal(one[:], want[:, :, 48:])
    blocks = [want[b] for b in image_blocks(want)]
    assert np.array_equal(np.concatenate(blocks), want)
    with pytest.raises(ValueError, match='nearest first: stage'):
        FeatureArray(features, 'stage9')


def test_not_finite_features_are_found_in_any_block(tmp_path, small_memory):
    x, y = correlated(300, 2, 2)
    x[250, 1, 7] = np.nan
    for X in (x, FeatureArray(stored(tmp_path, x))):
        with pytest.raises(ValueError, match='1 of 300 images are NaN or infinite, the first in row 250'):
            FeatureClassifier().fit(X, y)


def test_the_path_ends_when_the_loss_rises(monkeypatch):
    "Only for features that do not fit into memory; the result is the same"
    monkeypatch.setattr(classifiers, 'C_VALUES', (1e-3, 1e-2, 1e-1, 1.0, 10.0))
    x, y = correlated(200, 1, 2)
    y = np.where(np.random.default_rng(0).random(200) < 0.2, 1 - y, y)  # labels are wrong, so the loss rises
    whole = FeatureClassifier().fit(x, y).estimator_
    monkeypatch.setattr(extraction, '_MAX_NUMBERS', 0)
    part = FeatureClassifier().fit(x, y).estimator_
    assert list(whole.losses_) == list(classifiers.C_VALUES)
    n = len(part.losses_)
    assert 3 <= n < 5
    assert part.losses_ == dict(list(whole.losses_.items())[:n])
    assert part.C == whole.C
    assert np.array_equal(part.coef_, whole.coef_)
    losses = list(part.losses_.values())
    assert losses[-3] < losses[-2] < losses[-1]


def test_too_few_steps_are_a_warning(monkeypatch):
    monkeypatch.setitem(logistic._OPTIONS, 'maxiter', 1)
    with pytest.warns(ConvergenceWarning, match='C=0.0001'):
        FeatureClassifier().fit(*correlated(60, 1, 2))


# ---------------------------------------------------------------- a learner


@pytest.fixture(scope='module')
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp('logistic')
    make_sets(folder, n_flowers=30)
    return learner_builder(folder, bs=8)


@pytest.mark.usefixtures('with_shared_cache')
@pytest.mark.parametrize('epochs', [None, 2])
def test_a_learner_reads_blocks(build, epochs, counter, monkeypatch):
    "A head that is solved, or trained in steps, and its predictions, are the same as in memory"
    plan = Plan('head', (replace(HEAD_PHASE, epochs=epochs),))
    learn = fit(build(), plan, say=str)
    predictions = valid_predictions(learn)
    monkeypatch.setattr(extraction, '_MAX_NUMBERS', 0)
    monkeypatch.setattr(extraction, '_BLOCK_NUMBERS', 1500)
    counter.largest = 0
    other = fit(build(), plan, say=str)
    read = valid_predictions(other)
    n = int((learn.table.split == 'train').sum())
    assert 0 < counter.largest <= n * learn.body.stages.n_out  # one view of each image, never all views
    assert learn.record.history[-1]['how'] == ('solved' if epochs is None else 'stored')
    if epochs:
        running = [k for k in state_of(learn) if 'running' in k]
        a, b = ({k: v for k, v in state_of(o).items() if k not in running} for o in (learn, other))
        assert same_state(a, b)
    for k, v in state_of(learn).items():
        assert torch.allclose(v.double(), state_of(other)[k].double(), atol=1e-4), k
    columns = [c for c in predictions if c.startswith('p_')]
    assert predictions[columns].to_numpy() == pytest.approx(read[columns].to_numpy(), abs=1e-4)
