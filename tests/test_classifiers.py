"Test classifiers on features and suspect labels, on synthetic arrays with known truth and on real flowers."

import sys
import warnings
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifier, RidgeClassifierCV
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import dr_transfer.features.classifiers as module
from dr_transfer.features.classifiers import CLASSIFIERS, FeatureClassifier, grouped_folds, out_of_fold
from dr_transfer.features.extraction import image_features
from dr_transfer.features.label_errors import suspect_labels
from dr_transfer.synthetic.flowers import make_flowers

NAMES = sorted(CLASSIFIERS)


@pytest.fixture(autouse=True)
def no_warnings():
    "No warnings of deprecation or convergence"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def blobs(n=60, views=2, channels=12, classes=3, seed=0, deviation=1.0, apart=1.5):
    "float32 (n, views, channels), cyclic classes 0, 1, ...; the views of an image are nearly the same"
    r = np.random.default_rng(seed)
    y = np.arange(n) % classes
    centres = r.normal(size=(classes, channels)) * apart
    images = centres[y] + deviation * r.normal(size=(n, channels))
    x = images[:, None] + 0.1 * r.normal(size=(n, views, channels))
    return x.astype(np.float32), y


def distance(a, b):
    "Return the largest difference of two arrays"
    return np.abs(a - b).max()


# ---------------------------------------------------------------- folds


def same_parts(folds, others):
    "Return whether two divisions hold out the same rows."
    return all(np.array_equal(a, b) for (_, a), (_, b) in zip(folds, others))


@pytest.mark.parametrize('n', [2, 3, 5])
@pytest.mark.parametrize('size', [1, 2, 5])
@pytest.mark.parametrize('seed', [0, 1])
def test_folds(n, size, seed):
    y = np.random.default_rng(seed).choice(list('aab'), 60)
    g = np.arange(60) // size
    folds = grouped_folds(y, g, n, seed)
    assert len(folds) == n
    rows = list(range(60))
    assert sorted(np.concatenate([b for _, b in folds])) == rows
    for a, b in folds:
        assert sorted([*a, *b]) == rows
        assert not set(g[a]) & set(g[b])
        if size == 1:
            fraction = (y[b] == 'a').mean()
            assert abs(fraction - (y == 'a').mean()) < 0.09
    again = grouped_folds(y, g, n, seed)
    assert same_parts(folds, again)
    other = grouped_folds(y, g, n, seed + 1)
    assert not same_parts(folds, other)


@pytest.mark.parametrize('groups', [None, 'unique', 'none'])
def test_folds_without_groups(groups):
    y = np.arange(30) % 3
    g = {'unique': np.arange(30), 'none': [None] * 30}.get(groups)
    folds = grouped_folds(y, g)
    assert same_parts(folds, grouped_folds(y))


def test_images_without_a_group_are_on_their_own():
    g = []
    for i in range(5):
        g += [f'p{i}', f'p{i}', None, np.nan, f'q{i}', f'q{i}']
    folds = grouped_folds([0, 1] * 15, g, 5)
    assert len(folds) == 5
    for _, b in folds:
        assert len(b) < 12


@pytest.mark.parametrize('seed', range(20))
def test_every_training_set_has_every_class(seed):
    r = np.random.default_rng(seed)
    g = r.integers(0, 14, 70)
    rare = np.isin(g, [0, 1, 2]) & (r.random(70) < 0.5)
    y = np.where(rare, 'rare', r.choice(['a', 'b'], 70))
    if pd.Series(g[y == 'rare']).nunique() < 2:
        pytest.skip('the draw has no second group')
    folds = grouped_folds(y, g, 5, seed)
    assert 2 <= len(folds) <= 5
    for a, _ in folds:
        assert set(y[a]) == set(y)


@pytest.mark.parametrize(
    'y, groups, text',
    [
        (list('aaab'), None, "class 'b' has 1 images"),
        (list('aabb'), [0, 1, 2, 2], "class 'b' has 1 groups"),
        (list('aabb'), [0, 1], '2 groups for 4 images'),
    ],
)
def test_invalid_folds(y, groups, text):
    with pytest.raises(ValueError, match=text):
        grouped_folds(y, groups)


def test_one_fold_is_an_error():
    with pytest.raises(ValueError, match='2 or more'):
        grouped_folds(list('aabb'), n=1)


# ---------------------------------------------------------------- all classifiers


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
    'classes, views',
    [
        (2, 1),
        (4, 4),
    ],
)
def test_each_classifier(name, classes, views):
    x, y = blobs(64, views, classes=classes)
    train = (x[:48], y[:48], np.arange(48) // classes)
    new = x[48:]
    truth = y[48:]
    m = FeatureClassifier(name)
    assert m.fit(*train) is m
    p = m.predict_proba(new)
    assert p.shape == (16, classes)
    assert p.min() >= 0
    assert p.sum(1) == pytest.approx(np.ones(16), abs=1e-5)
    accuracy = m.score(new, truth)
    assert accuracy >= 0.8
    predicted = m.classes_[p.argmax(1)]
    assert accuracy == (predicted == truth).mean()
    by_view = [m.predict_proba(new[:, i]) for i in range(views)]
    assert p == pytest.approx(np.mean(by_view, axis=0), abs=1e-6)
    assert p == pytest.approx(m.predict_proba(new[:, ::-1]), abs=1e-6)
    again = clone(m).fit(*train)
    assert np.array_equal(again.predict_proba(new), p)


@pytest.mark.parametrize('name', NAMES)
def test_labels_of_any_kind(name):
    x, y = blobs(40, classes=2)
    want = FeatureClassifier(name).fit(x, y).predict_proba(x)
    kinds = [['no', 'yes']]
    if name == 'logistic':
        kinds += [[3, 7], [False, True], [2.0, 5.0], np.array(['n', 'y'], dtype=object)]
    for kind in map(np.array, kinds):
        m = FeatureClassifier(name).fit(x, kind[y])
        assert np.array_equal(m.classes_, kind)
        assert m.predict(x).dtype == kind.dtype
        assert np.array_equal(m.predict_proba(x), want)
    column = pd.Series(['no', 'yes'])[y]
    m = FeatureClassifier(name).fit(x, column)
    result = m.score(x, column)
    assert result == (want.argmax(1) == y).mean()


@pytest.mark.parametrize('name', NAMES)
def test_constant_channels(name):
    x, y = blobs()
    x[..., 3], x[..., 5] = 7.0, 0.0
    m = FeatureClassifier(name).fit(x, y)
    moved = x.copy()
    moved[..., 3] += 1e-6
    p = m.predict_proba(x)
    assert np.isfinite(p).all()
    result = m.score(x, y)
    assert result > 0.9
    if name != 'forest':
        assert m.predict_proba(moved) == pytest.approx(p, abs=1e-3)


@pytest.mark.parametrize('views', [1, 2])
def test_every_view_twice_leaves_logistic_regression_as_it_is(views):
    x, y = blobs(90, views, 30, apart=0.5)
    doubled = np.concatenate([x, x], 1)
    once, twice = (FeatureClassifier().fit(o, y).estimator_ for o in (x, doubled))
    assert once.C == twice.C
    losses = list(once.losses_.values())
    assert losses == pytest.approx(list(twice.losses_.values()), abs=1e-3)
    largest = np.abs(once.coef_).max()
    assert distance(once.coef_, twice.coef_) < 1e-2 * largest


def test_the_order_of_views_does_not_matter():
    x, y = blobs(views=4)
    reordered = x[:, [2, 0, 3, 1]]
    a, b = (FeatureClassifier().fit(o, y) for o in (x, reordered))
    assert a.predict_proba(x) == pytest.approx(b.predict_proba(x), abs=1e-3)


def test_the_scale_of_a_feature_does_not_matter():
    x, y = blobs()
    s = np.geomspace(1e-3, 1e3, 12).astype(np.float32)
    scaled = x * s + 5 * s
    got = FeatureClassifier().fit(scaled, y).predict_proba(scaled)
    want = FeatureClassifier().fit(x, y).predict_proba(x)
    assert got == pytest.approx(want, abs=1e-3)


def test_the_regularisation_strength_has_the_least_loss():
    x, y = blobs(90, 2, 60, apart=0.3)
    m = FeatureClassifier().fit(x, y).estimator_
    assert min(m.losses_, key=m.losses_.get) == m.C
    assert module.C_VALUES[0] < m.C < module.C_VALUES[-1]
    by_hand = LogisticRegression(C=m.C, tol=1e-6, max_iter=9999)
    rows = StandardScaler().fit_transform(x.reshape(-1, 60))
    by_hand.fit(rows, y.repeat(2), np.full(180, 0.5))
    largest = np.abs(by_hand.coef_).max()
    assert distance(m.coef_, by_hand.coef_) < 1e-2 * largest


# ---------------------------------------------------------------- groups are not divided


@pytest.mark.parametrize('name', ['logistic', 'linear_svm', 'rbf_svm', 'neighbours', 'dense'])
def test_no_image_and_no_group_in_two_subsets(name, monkeypatch):
    "The rows of every inner fold, with the image and the group of each; logistic regression divides images"
    x, y = blobs(48, 3)
    g = np.arange(48) // 6
    recorded = []
    method = 'image_splits' if name == 'logistic' else 'splits'
    rows_of_an_image = 1 if name == 'logistic' else 3
    splits = getattr(module._ViewSet, method)

    def noted(self, n):
        folds = list(splits(self, n))
        recorded.extend(folds)
        return folds

    monkeypatch.setattr(module._ViewSet, method, noted)
    FeatureClassifier(name).fit(x, y, g)
    assert recorded
    for a, b in recorded:
        assert sorted([*a, *b]) == list(range(48 * rows_of_an_image))
        assert not set(a // rows_of_an_image) & set(b // rows_of_an_image)
        assert not set(g[a // rows_of_an_image]) & set(g[b // rows_of_an_image])


class Spy(GaussianNB):
    fits: ClassVar = []

    def fit(self, X, y, sample_weight=None):
        groups = X[:, -1].astype(np.float64)
        Spy.fits.append(set(groups.round(2)))
        return super().fit(X, y, sample_weight)


@pytest.mark.parametrize(
    'cv, folds',
    [
        (None, 5),
        (4, 4),
        (GroupKFold(4), 4),
    ],
)
def test_searches_of_scikit_learn_get_folds_of_groups(cv, folds, monkeypatch):
    monkeypatch.setattr(Spy, 'fits', [])
    x, y = blobs(48, 2)
    g = np.arange(48) // 6
    x[..., -1] = g[:, None]  # the last channel identifies the group
    search = GridSearchCV(Spy(), {'var_smoothing': [1e-3]}, cv=cv)
    FeatureClassifier(search).fit(x, y, g)
    *inner, last = Spy.fits
    assert len(last) == 8
    assert len(inner) == folds
    left_out = [last - o for o in inner]
    assert all(left_out)
    assert sum(map(len, left_out)) == 8  # each group is held out once, with all its rows


@pytest.mark.parametrize(
    'given',
    [
        LogisticRegression(C=0.01),
        LinearSVC(C=0.01),
        RidgeClassifier(),
        GaussianNB(),
        LogisticRegressionCV(Cs=3, max_iter=1000, use_legacy_attributes=False, l1_ratios=(0,), scoring='neg_log_loss'),
        make_pipeline(StandardScaler(), GaussianNB()),
    ],
)
def test_estimators_of_scikit_learn(given):
    x, y = blobs()
    labels = np.array(list('abc'))[y]
    m = FeatureClassifier(given).fit(x, labels)
    result = m.score(x, labels)
    assert result > 0.9
    assert m.predict_proba(x).shape == (60, 3)
    assert not hasattr(given, 'classes_')  # the given estimator is not changed


def test_a_search_without_probabilities_is_an_error():
    with pytest.raises(ValueError, match='has no probabilities'):
        FeatureClassifier(RidgeClassifierCV()).fit(*blobs())


# ---------------------------------------------------------------- the interface of scikit-learn


def test_parameters():
    m = FeatureClassifier('forest', ['stage6'], 'max', 3)
    assert m.get_params(deep=False) == dict(classifier='forest', stages=['stage6'], pool='max', seed=3)
    assert clone(m).get_params() == m.get_params()
    assert m.set_params(classifier='logistic', stages=None).classifier == 'logistic'
    assert FeatureClassifier(LogisticRegression(C=3)).get_params()['classifier__C'] == 3


def test_tools_of_scikit_learn():
    x, y = blobs(views=1)
    x = x[:, 0]
    scores = cross_val_score(FeatureClassifier(), x, y, cv=3)
    assert scores.mean() > 0.9
    pipeline = make_pipeline(StandardScaler(), FeatureClassifier())
    scores = cross_val_score(pipeline, x, y, cv=3, scoring='neg_log_loss')
    assert scores.mean() > -0.5
    search = GridSearchCV(FeatureClassifier(), {'classifier': ['logistic', 'neighbours']}, cv=2)
    search.fit(x, y)
    assert search.best_score_ > 0.9
    of_rows = FeatureClassifier().fit(x, y).predict(pd.DataFrame(x))
    of_views = FeatureClassifier().fit(x[:, None], y).predict(x)
    assert np.array_equal(of_rows, of_views)
    with pytest.raises(NotFittedError):
        FeatureClassifier().predict(x)


@pytest.mark.parametrize(
    'change, text',
    [
        (dict(classifier='logistics'), 'nearest first: logistic'),
        (dict(classifier=3), "unknown classifier '3'"),
        (dict(classifier=LogisticRegression), 'unknown classifier'),
        (dict(X=np.zeros(5)), 'give Features'),
        (dict(X=np.zeros((0, 2, 5))), 'with one image or more'),
        (dict(X=np.full((60, 5), np.nan)), 'NaN'),
        (dict(y=np.zeros(60)), 'all images have class'),
        (dict(y=np.zeros(3)), 'one for each image'),
        (dict(y=[None] * 30 + [1] * 30), '30 images have no label'),
        (dict(y=np.linspace(0, 1, 60)), 'continuous'),
        (dict(groups=[1, 2]), '2 groups for 60'),
        (dict(groups=np.arange(60) % 3), 'has 1 groups'),
    ],
)
def test_invalid_arguments(change, text):
    x, y = blobs()
    X = change.get('X', x)
    y = change.get('y', y)
    groups = change.get('groups')
    classifier = change.get('classifier', 'logistic')
    with pytest.raises(ValueError, match=text):
        FeatureClassifier(classifier).fit(X, y, groups)


def test_another_number_of_channels_is_an_error():
    x, y = blobs()
    with pytest.raises(ValueError, match='11 channels'):
        FeatureClassifier('forest').fit(x, y).predict_proba(x[..., :11])


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize('kind', ['logistic', 'dense', 'given'])
@pytest.mark.parametrize('classes', [2, 5])
def test_head(kind, classes):
    x, y = blobs(80, 2, classes=classes)
    x = x * np.geomspace(1e-2, 1e2, 12).astype(np.float32)
    x[..., 3], x[..., 4] = 7.0, 0.0
    classifier = LogisticRegression(C=0.1, max_iter=1000) if kind == 'given' else kind
    labels = np.array(list('vwxyz'))[y]
    m = FeatureClassifier(classifier).fit(x, labels)
    head = m.head()
    assert not head.training
    hidden = (256,) if kind == 'dense' else ()
    assert head.about.hidden == hidden
    views = torch.tensor(x)
    with torch.no_grad():
        for i in range(2):
            want = m.predict_proba(x[:, i])
            assert want.max() > 0.5
            p = head(views[:, i]).softmax(1)
            assert distance(p.numpy(), want) < 1e-5
        maps = views[:, 0, :, None, None].expand(-1, -1, 3, 3)
        p = head(maps).softmax(1)
        assert distance(p.numpy(), m.predict_proba(x[:, 0])) < 1e-5
    head.train()
    head(views[:, 0]).sum().backward()  # training can continue from there


@pytest.mark.parametrize('kind', ['forest', 'neighbours', 'rbf_svm', 'linear_svm', GaussianNB()])
def test_classifiers_without_a_head(kind):
    with pytest.raises(ValueError, match="Use classifier='logistic' or 'dense'"):
        FeatureClassifier(kind).fit(*blobs()).head()


# ---------------------------------------------------------------- out of fold


@pytest.mark.parametrize('groups', [False, True])
def test_out_of_fold_equals_an_explicit_loop(groups):
    x, y = blobs(apart=0.5)
    names = np.array(['r', 'q', 'p'])[y]
    g = np.arange(60) // 4 if groups else None
    m = FeatureClassifier(seed=1)
    p = out_of_fold(m, x, names, g, 3, 5)
    for a, b in grouped_folds(names, g, 3, 5):
        inner = None if g is None else g[a]
        trained = clone(m).fit(x[a], names[a], inner)
        assert np.array_equal(p[b], trained.predict_proba(x[b]))
    assert not hasattr(m, 'classes_')


def test_memorised_groups_do_not_help():
    "The class depends only on the patient, who can be recognised: memorised patients must not count."
    r = np.random.default_rng(0)
    g = np.arange(80) // 4
    y = (np.arange(20) % 2)[g]
    patients = r.normal(size=(20, 40))
    noise = r.normal(size=(80, 40))
    x = (patients[g] + 0.05 * noise).astype(np.float32)
    without_groups = out_of_fold(FeatureClassifier(), x, y, None).argmax(1)
    by_image = out_of_fold(FeatureClassifier(), x, y, g).argmax(1)
    result = (without_groups == y).mean()
    assert result > 0.95
    assert (by_image == y).mean() < 0.75


# ---------------------------------------------------------------- suspect labels

COLUMNS = ['image', 'label', 'likely', 'p_label', 'p_likely', 'score', 'reason']


def exchanged(y, fraction, seed):
    r = np.random.default_rng(seed)
    kinds = np.unique(y)
    y = np.array(y, dtype=object)
    rows = r.choice(len(y), round(fraction * len(y)), replace=False)
    for i in rows:
        y[i] = r.choice(kinds[kinds != y[i]])
    return y, set(rows)


@pytest.mark.parametrize('seed', range(2))
def test_suspect_labels_of_synthetic_features(seed):
    x, y = blobs(150, 2, 10, seed=seed, apart=2.0)
    y, wrong = exchanged(np.array(list('abc'))[y], 0.08, seed)
    t = suspect_labels(x, y)
    hits = len(wrong & set(t.image))
    assert list(t) == COLUMNS
    assert t.score.is_monotonic_increasing
    assert t.image.is_unique
    assert hits / len(t) >= 0.75
    assert hits / len(wrong) >= 0.75
    assert (t.label == y[t.image]).all()
    assert (t.likely != t.label).all()
    assert (t.p_likely > t.p_label).all()
    first = t.iloc[0]
    start = f'looks like {first.likely} ({first.p_likely:.2f})'
    assert first.reason == f'{start}, labelled {first.label} ({first.p_label:.2f})'
    more = suspect_labels(x, y, most=40)
    assert len(more) == 40
    assert set(t.image) - set(more.image) == set()
    assert (more.score.diff()[1:] >= 0).all()


def test_suspect_labels_of_synthetic_flowers(tmp_path):
    d = make_flowers(tmp_path / 'flowers', n=150, size=64)
    y, wrong = exchanged(d.label, 0.08, 1)
    folder = tmp_path / 'flowers'
    paths = [str(folder / i) for i in d.image]
    f = image_features(paths, size=64, runtime='plain', stages=['stage5'])
    t = suspect_labels(f, y, d.photographer)
    bad = {paths[i] for i in wrong}
    hits = len(bad & set(t.image))
    assert hits / len(t) >= 0.75
    assert hits / len(bad) >= 0.7
    result = len(suspect_labels(f, d.label, d.photographer))
    assert result <= 5


def test_the_same_image_with_two_labels(tmp_path):
    x, y = blobs(apart=3.0)
    x = np.concatenate([x, x[:1], x[1:2]])
    y = [*y, 1, 1]  # 60 contradicts 0; 61 agrees with 1
    t = suspect_labels(x, y)
    result = set(t.image[:2])
    assert result == {0, 60}
    assert 1 not in set(t.image)
    assert 61 not in set(t.image)
    reasons = dict(zip(t.image, t.reason))
    assert reasons[60] == 'the same image as 0, which has another label, 0'


def test_copies_are_in_the_same_fold(monkeypatch):
    x, y = blobs()
    import dr_transfer.features.label_errors as labels

    recorded = []

    def noted(classifier, X, y, groups, *args):
        recorded.append(groups)
        return out_of_fold(classifier, X, y, groups, *args)

    monkeypatch.setattr(labels, 'out_of_fold', noted)
    groups = [*(np.arange(60) // 4), 'other']
    suspect_labels(np.concatenate([x, x[:1]]), [*y, 0], groups)
    joined = recorded[0]
    assert joined[60] == joined[0] == joined[3] != joined[4]


def test_an_image_of_no_class():
    x, y = blobs(150, 1, 4, apart=4.0)
    x[0] = x[1:].mean(0)  # in the middle between all classes
    cautious = FeatureClassifier(LogisticRegression(C=0.003))
    t = suspect_labels(x, y, classifier=cautious, most=150)
    reasons = dict(zip(t.image, t.reason))
    assert reasons[0].startswith('undecided, or none of the classes')


def test_without_cleanlab(monkeypatch):
    for name in [o for o in sys.modules if o.split('.')[0] == 'cleanlab']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'cleanlab', None)
    with pytest.raises(ValueError, match=r"pip install 'dr_transfer\[labels\]'"):
        suspect_labels(*blobs())


@pytest.mark.parametrize('most', [0, -3])
def test_no_rows_are_an_error(most):
    with pytest.raises(ValueError, match='1 or more'):
        suspect_labels(*blobs(), most=most)


def test_suspect_labels_of_real_flowers(data_root):
    t = pd.read_csv(data_root / 'flowers' / 'credits.csv')
    t = t[t.photographer.isin(t.photographer.drop_duplicates().sample(frac=0.4, random_state=0))]
    f = image_features([str(data_root / 'flowers' / i) for i in t.image], size=160, stages=['stage6'])
    found = suspect_labels(f, t.label, t.photographer)
    assert 0.01 < len(found) / len(t) < 0.06
    assert found.reason.str.contains('looks like|undecided, or of none|the same picture').all()
