"Compare the metrics with scikit-learn over sizes, classes, ties and missing classes, and test their errors."

import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from helpers import GRADES
from sklearn import metrics as sk

from dr_transfer.metrics.classes import Classes
from dr_transfer.metrics.scores import accuracy, auc, confusion, quadratic_kappa, sensitivity, specificity, summary

SETS = [(n, k, seed) for n in (1, 2, 3, 7, 50, 400) for k in (2, 3, 5) for seed in range(8)]


def random_labels(n, k, seed):
    "Truth and predictions; every second seed omits classes, independently in both."
    rng = np.random.default_rng((n, k, seed))

    def random_codes():
        return rng.choice(rng.choice(k, rng.integers(1, k + 1), replace=False) if seed % 2 else k, n)

    y = random_codes()
    p = random_codes()
    return y, np.where(rng.random(n) < 0.4, y, p)


def same(a, b, eps=1e-12):
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) < eps


def by_hand(f, *args, **kwargs):
    "scikit-learn's value, NaN where it only warns that there is none"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return float(f(*args, **kwargs))


def test_the_random_sets_cover_the_special_cases():
    sets = [random_labels(*s) for s in SETS]
    assert any(len(set(y)) == 1 for y, p in sets)
    assert any(set(p) - set(y) for y, p in sets)
    assert any(set(y) - set(p) for y, p in sets)


@pytest.mark.parametrize('n,k,seed', SETS)
def test_classes_agree_with_scikit_learn(n, k, seed):
    y, p = random_labels(n, k, seed)
    assert same(accuracy(y, p), sk.accuracy_score(y, p))
    np.testing.assert_array_equal(confusion(y, p, range(k)), sk.confusion_matrix(y, p, labels=range(k)))
    for c in range(k):
        assert same(sensitivity(y, p, c), by_hand(sk.recall_score, y == c, p == c, zero_division=np.nan))
        assert same(specificity(y, p, c), by_hand(sk.recall_score, y != c, p != c, zero_division=np.nan))
    if len(set(y) | set(p)) == 1:
        assert math.isnan(quadratic_kappa(y, p, k))
    else:
        assert same(quadratic_kappa(y, p, k), by_hand(sk.cohen_kappa_score, y, p, labels=range(k), weights='quadratic'))


@pytest.mark.parametrize('levels', [2, 5, 10**6])
@pytest.mark.parametrize('n', [2, 3, 10, 200])
def test_auc_agrees_with_scikit_learn(n, levels):
    for seed in range(10):
        rng = np.random.default_rng((n, levels, seed))
        y = rng.integers(0, 2, n)
        s = rng.integers(0, levels, n) / levels
        if len(set(y)) == 1:
            assert math.isnan(auc(y, s))
        else:
            assert same(auc(y, s), sk.roc_auc_score(y, s))


def test_auc_is_a_probability_over_pairs():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 60)
    s = rng.integers(0, 6, 60)
    pairs = [(a > b) + (a == b) / 2 for a in s[y == 1] for b in s[y == 0]]
    assert same(auc(y, s), np.mean(pairs))


def test_auc_depends_on_the_order_only():
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 80)
    s = rng.random(80).round(1)
    assert auc(y, s) == auc(y, np.exp(5 * s) - 3) == auc(y.astype(bool), s)
    assert same(auc(y, s), 1 - auc(1 - y, s))
    assert same(auc(y, s), 1 - auc(y, -s))
    assert auc([0, 1], [-np.inf, 0]) == 1  # the logarithm of a probability of zero is a score too


def test_kappa_by_its_definition():
    "With the matrices of Cohen 1968, which the library does not use."
    for seed in range(20):
        y, p = random_labels(60, 5, 2 * seed)
        observed = confusion(y, p, range(5)).to_numpy() / 60
        weight = np.subtract.outer(np.arange(5), np.arange(5)) ** 2
        assert same(
            quadratic_kappa(y, p),
            1 - (weight * observed).sum() / (weight * np.outer(observed.sum(1), observed.sum(0))).sum(),
        )
        assert same(quadratic_kappa(y, p), quadratic_kappa(p, y))
        assert same(quadratic_kappa(y, p), quadratic_kappa(y + 3, p + 3))


def test_kappa_does_not_round_large_sets():
    y = np.tile(np.arange(5, dtype=np.int8), 200_000)  # int8: squares and sums must not overflow
    assert quadratic_kappa(y, y) == 1
    assert abs(quadratic_kappa(y, y[::-1]) + 1) < 1e-12
    y = np.tile(np.arange(1000), 20)  # sums of squares beyond 32 bits
    assert quadratic_kappa(y, y) == 1
    assert abs(quadratic_kappa(y, y[::-1]) + 1) < 1e-12


@pytest.mark.parametrize(
    'as_', [list, tuple, np.array, pd.Series, lambda v: np.array(v, dtype=float), lambda v: np.array(v, dtype='int8')]
)
def test_any_kind_of_sequence(as_):
    y = as_([0, 1, 1, 0])
    p = as_([0, 1, 0, 0])
    assert (accuracy(y, p), sensitivity(y, p), specificity(y, p), auc(y, p), quadratic_kappa(y, p)) == (
        0.75,
        0.5,
        1,
        0.75,
        0.5,
    )
    assert confusion(y, p, 'ab').values.tolist() == [[2, 0], [1, 1]]
    for f in (accuracy, sensitivity, specificity, auc, quadratic_kappa):
        assert type(f(y, p)) is float


def test_series_are_taken_by_position():
    assert accuracy(pd.Series([0, 1], index=[5, 6]), pd.Series([0, 1], index=[6, 5])) == 1


def test_names_as_classes():
    y = pd.Series(['no', 'disease', 'disease'])
    p = np.array(['no', 'disease', 'no'])
    assert (accuracy(y, p), sensitivity(y, p, 'disease'), specificity(y, p, 'disease')) == (2 / 3, 0.5, 1)


@pytest.mark.parametrize(
    'f', [accuracy, quadratic_kappa, sensitivity, specificity, auc, lambda y, p: confusion(y, p, range(2))]
)
@pytest.mark.parametrize(
    'y,p,why',
    [
        ([0, 1], [0], r'\(2,\).* \(1,\): give one value for each image'),
        ([[0, 1]], [[0, 1]], 'one value for each image'),
        (0, 1, 'one value for each image'),
        ([0, 1], [[0], [1]], r'\(2, 1\)'),
        ([], [], 'empty: give'),
        ([0, np.nan], [0, 1], 'truth: 1 of 2 values are NaN'),
        ([0, 1], [np.nan, 1], '1 of 2 values are NaN'),
        ([0, None], [0, 1], 'truth: 1 of 2 values are NaN'),
        (['0', '1'], [0, 1], 'both as text or both as numbers'),
        ([0, 1], ['0', '1'], 'both as'),
    ],
)
def test_inconsistent_arguments_are_errors(f, y, p, why):
    with pytest.raises(ValueError, match=why):
        f(y, p)


@pytest.mark.parametrize(
    'call,why',
    [
        (lambda: quadratic_kappa([0, 5], [0, 1], 5), 'truth: .*5.* is not a class number. Give 0 to 4'),
        (lambda: quadratic_kappa([0, 1], [0, -1]), 'predictions: .*-1'),
        (lambda: quadratic_kappa([0, 1], [0, 0.5]), '0.5'),
        (lambda: quadratic_kappa(['a'], ['a']), "'a'"),
        (lambda: quadratic_kappa([0, np.inf], [0, 1]), 'inf'),
        (lambda: auc([0, 2], [0.1, 0.2]), 'truth: .*2.* Give 0 to 1'),
        (lambda: auc(['no', 'disease'], ['.1', '.2']), 'is text. Give numbers'),
        (lambda: sensitivity(['no', 'disease'], ['no', 'disease']), 'the positive class 1'),
        (lambda: specificity([0, 1], [0, 1], 'disease'), "the positive class 'disease'"),
        (lambda: confusion([0, 2], [0, 1], 'ab'), 'truth: .*2.* Give 0 to 1'),
        (lambda: confusion(['a'], ['a'], 'ab'), "'a'"),
    ],
)
def test_values_that_are_not_classes_are_errors(call, why):
    with pytest.raises(ValueError, match=why):
        call()


def test_confusion_labels_its_axes():
    c = confusion([0, 0, 2], [1, 1, 2], ['no', 'mild', 3])
    assert (c.index.name, c.columns.name) == ('truth', 'predicted')
    assert (
        list(c.index)
        == list(c.columns)
        == [
            'no',
            'mild',
            '3',
        ]
    )
    assert c.loc['no', 'mild'] == 2
    assert c.loc['mild', 'no'] == 0
    assert c.to_numpy().sum() == 3


# ---------------------------------------------------------------- summary


def probs(n, k, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, k, n), rng.dirichlet(np.ones(k), n)


@pytest.mark.parametrize('seed', range(5))
def test_summary_of_two_classes(seed):
    y, p = probs(60, 2, seed)
    s = summary(y, p, ['no', 'referable'])
    assert list(s) == ['accuracy', 'auc', 'sensitivity', 'specificity']
    q = p[:, 1] > 0.5
    assert same(s['accuracy'], np.mean(q == y))
    assert same(s['auc'], sk.roc_auc_score(y, p[:, 1]))
    assert same(s['sensitivity'], q[y == 1].mean())
    assert same(s['specificity'], 1 - q[y == 0].mean())
    assert summary(y, p, ['0', '1']) == s  # two grades are two classes


@pytest.mark.parametrize(
    'classes,graded',
    [
        (Classes(('0', '1', '2'), ordered=True), True),
        (Classes((0, 1, 2), ordered=True), True),
        (Classes(('1', '2', '3'), ordered=True), False),
        (['0', '1', '2'], False),  # their names do not say that they have an order
        (['0', '2', '1'], False),
        (['daisy', 'rose', 'tulip'], False),
        (['00', '01', '02'], False),
    ],
)
def test_summary_has_kappa_for_grades_only(classes, graded):
    y, p = probs(90, 3, 7)
    s = summary(y, p, classes)
    assert same(s.pop('accuracy'), sk.accuracy_score(y, p.argmax(1)))
    if graded:
        assert same(s.pop('kappa'), sk.cohen_kappa_score(y, p.argmax(1), labels=range(3), weights='quadratic'))
    assert not s


@pytest.mark.parametrize(
    'here,nan',
    [
        (0, {'auc', 'sensitivity'}),
        (1, {'auc', 'specificity'}),
    ],
)
def test_summary_of_one_class_present(here, nan):
    _, p = probs(20, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # and there is no warning of an empty mean
        s = summary([here] * 20, p, ['no', 'disease'])
    assert {k for k, v in s.items() if math.isnan(v)} == nan
    for v in s.values():
        assert type(v) is float


def test_summary_of_half_precision_and_float32():
    y, p = probs(200, 5, 2)
    full = summary(y, p, GRADES)
    assert summary(y, p.astype('float32'), GRADES) == full
    assert same(summary(y, p.astype('float16'), GRADES)['kappa'], full['kappa'], 0.1)


@pytest.mark.parametrize(
    'y,p,classes,why',
    [
        ([0, 1], [[0.5, 0.5]], 'ab', 'one value for each image'),
        ([0], [0.5, 0.5], 'ab', r'shape \(2,\), with 2 classes: give \(images, 2\)'),
        ([0], [[0.2, 0.3, 0.5]], 'ab', r'shape \(1, 3\)'),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], 'ab', '1 of 2 rows of probabilities have NaN'),
        ([0], [[3.0, -2.0]], 'ab', 'softmax'),
        ([0], [[0.9, 0.9]], 'ab', 'sums to 1.8.*softmax'),
        ([2], [[0.5, 0.5]], 'ab', 'Give 0 to 1'),
        (['a'], [[0.5, 0.5]], 'ab', 'both as'),
        ([], np.zeros((0, 2)), 'ab', 'empty'),
        ([0], [[1.0]], 'a', 'two or more'),
    ],
)
def test_summary_errors(y, p, classes, why):
    with pytest.raises(ValueError, match=why):
        summary(y, p, classes)


def test_import_loads_no_framework():
    frameworks = ('torch', 'fastai', 'timm', 'sklearn', 'matplotlib')
    code = f'import sys, dr_transfer.metrics.scores; print([m for m in {frameworks} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
