"Test the accuracy and AUC that are expected without labels, and the estimated prevalence."

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dr_transfer.metrics.classes import Classes, Positive
from dr_transfer.metrics.expected import _expected_auc, expected_metrics
from dr_transfer.metrics.prevalence import estimate_prevalence, shift_prevalence

GRADES = Classes(('0', '1', '2'), Positive('referable', ('1', '2')), ordered=True)
PRIOR = np.array([0.6, 0.25, 0.15])


def graded(n, seed, prior=PRIOR, blur=1.0, eyes=2):
    "Two eyes of each patient; the probabilities are calibrated for PRIOR."
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.choice(3, n, p=prior), eyes)
    of_patient = np.repeat(rng.normal(size=n), eyes)
    of_image = rng.normal(size=n * eyes)
    noise = (of_patient + of_image) / 2**0.5
    x = 1.5 * y + blur * noise
    distance = x[:, None] - 1.5 * np.arange(3)
    odds = PRIOR * np.exp(-(distance**2) / 2)
    p = odds / odds.sum(1, keepdims=True)
    groups = np.repeat(np.arange(n), eyes)
    return y, p, groups


def as_table(y, p, groups):
    probs = pd.DataFrame(p, columns=['p_0', 'p_1', 'p_2'])
    return probs.assign(target=y.astype(str), group=groups)


def table(n, seed, **kw):
    return as_table(*graded(n, seed, **kw))


def expected(valid, new, n=2):
    "The expected metrics, by method and metric."
    found = expected_metrics(valid, new, GRADES, n=n)
    return found.set_index(['method', 'metric'])


def true_accuracy(p, y):
    predicted = p.argmax(1)
    return (predicted == y).mean()


def true_auc(p, y):
    "The AUC of the classes above 0."
    positive = p[:, 1:].sum(1)
    return roc_auc_score(y > 0, positive)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.sampled_from([8, 10, 16]))
def test_the_expected_auc_is_the_mean_over_all_labels(numbers, scale):
    "Against the weighted AUC of scikit-learn, without the pairs of an image with itself."
    p = np.array(numbers) / scale
    q = 1 - p
    same = (p * q).sum()
    all_pairs = p.sum() * q.sum()
    pairs = all_pairs - same
    result = _expected_auc(p)
    if pairs <= 1e-12:
        assert np.isnan(result)
        return
    labels = np.repeat([1, 0], len(p))
    scores = np.r_[p, p]
    weights = np.r_[p, q]
    weighted = roc_auc_score(labels, scores, sample_weight=weights)
    assert np.isclose(result, (weighted * all_pairs - same / 2) / pairs)


def test_the_intervals_contain_the_truth_if_nothing_changes():
    y, p, _ = graded(50_000, 1_000_000)
    true = {
        'accuracy': true_accuracy(p, y),
        'auc': true_auc(p, y),
    }
    n_inside = 0
    for seed in range(0, 40, 2):
        valid = table(100, seed)
        new = table(100, seed + 1)
        found = expected(valid, new, n=40)
        metric = found.index.get_level_values('metric')
        truth = metric.map(true)
        inside = (found.low <= truth) & (truth <= found.high)
        n_inside = n_inside + inside
    fractions = n_inside / 20
    assert (fractions >= 0.75).all(), fractions


def test_without_noise_from_sampling_the_estimates_are_the_truth():
    valid = table(5000, 0)
    y, p, groups = graded(5000, 1)
    rng = np.random.default_rng(0)
    chance = rng.random(len(y))
    kept = (p.max(1) <= 0.8) | (chance >= 0.7)  # P(y | image) stays
    y = y[kept]
    p = p[kept]
    new = as_table(y, p, groups[kept])
    found = expected(valid, new).value
    accuracy = true_accuracy(p, y)
    area = true_auc(p, y)
    assert found['validation', 'accuracy'] - accuracy > 0.05, 'harder images'
    assert abs(found['confidence', 'accuracy'] - accuracy) < 0.015
    assert abs(found['difference', 'accuracy'] - accuracy) < 0.015
    assert abs(found['confidence', 'auc'] - area) < 0.015
    assert abs(found['difference', 'auc'] - area) < 0.015


def test_errors_of_which_the_model_is_confident_are_not_noticed():
    "What the documentation says: another camera with more noise looks better than it is."
    y, p, groups = graded(3000, 1, blur=2.0)
    valid = table(3000, 0)
    new = as_table(y, p, groups)
    found = expected(valid, new, n=20)
    assert found.low['difference', 'accuracy'] > true_accuracy(p, y) + 0.1


def test_a_threshold_has_the_accuracy_of_the_validation_set_there():
    valid = table(300, 0)
    without_labels = valid.drop(columns='target')
    found = expected(valid, without_labels).value
    accuracy = found['validation', 'accuracy']
    assert found['threshold', 'accuracy'] == accuracy
    assert np.isclose(found['difference', 'accuracy'], accuracy)
    assert np.isclose(found['difference', 'auc'], found['validation', 'auc'])


def test_classes_without_a_positive_one_have_no_auc():
    valid = table(50, 0)
    new = table(50, 1)
    found = expected_metrics(valid, new, list(GRADES), n=2)
    assert set(found.metric) == {'accuracy'}


def test_patients_make_intervals_wider_than_images():
    copies = []
    for seed in (0, 1):
        t = table(100, seed, eyes=1)
        copies.append(pd.concat([t] * 4, ignore_index=True))
    without_groups = [t.drop(columns='group') for t in copies]
    over_patients = expected(*copies, n=80)
    over_images = expected(*without_groups, n=80)
    wide = over_patients.high - over_patients.low
    narrow = over_images.high - over_images.low
    ratio = wide / narrow
    assert 1.5 < ratio['confidence', 'accuracy'] < 2.6, 'four copies: twice as wide'


def test_bad_tables_are_refused():
    good = table(50, 0)
    with pytest.raises(ValueError, match="no column 'p_2'"):
        expected(good, good.drop(columns='p_2'))
    missing = good.copy()
    missing.loc[0, 'p_0'] = np.nan
    with pytest.raises(ValueError, match='1 images of the new table'):
        expected(good, missing)
    with pytest.raises(ValueError, match='2 or more'):
        expected(good, good, n=1)


@pytest.mark.parametrize(
    'new',
    [
        [0.6, 0.25, 0.15],
        [0.9, 0.07, 0.03],
        [0.1, 0.3, 0.6],
        [0.5, 0.5, 0.0],
    ],
)
def test_the_prevalence_of_three_classes_is_found(new):
    y, p, _ = graded(4000, 5, prior=new)
    found = estimate_prevalence(p, PRIOR)
    observed = np.bincount(y, minlength=3) / len(y)
    assert np.isclose(found.sum(), 1)
    error = np.abs(found - observed)
    assert error.max() < 0.04, found
    corrected = shift_prevalence(p, PRIOR, found)
    mean = corrected.mean(0)
    assert np.allclose(mean, found, atol=1e-4), 'the estimate is the mean of the corrected probabilities'
    assert true_accuracy(corrected, y) >= true_accuracy(p, y) - 0.005


def test_the_estimate_has_the_greatest_likelihood():
    _, p, _ = graded(300, 6, prior=[0.3, 0.4, 0.3])

    def log_likelihood(prevalence):
        ratio = prevalence / PRIOR
        of_images = (p * ratio).sum(1)
        return np.log(of_images).sum()

    estimate = estimate_prevalence(p, PRIOR)
    best = log_likelihood(estimate)
    rng = np.random.default_rng(0)
    for other in rng.dirichlet([1, 1, 1], 500):
        assert log_likelihood(other) <= best


def test_a_shift_can_be_undone_and_done_in_steps():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 50)
    a = [0.2, 0.3, 0.5]
    b = [0.7, 0.2, 0.1]
    shifted = shift_prevalence(p, PRIOR, a)
    undone = shift_prevalence(shifted, a, PRIOR)
    in_steps = shift_prevalence(shifted, a, b)
    at_once = shift_prevalence(p, PRIOR, b)
    assert np.allclose(undone, p)
    assert np.allclose(in_steps, at_once)
    with pytest.raises(ValueError, match='1 images have the probability 0'):
        shift_prevalence([[0.0, 0.0, 1.0]], PRIOR, [0.5, 0.5, 0.0])


def test_an_estimated_prevalence_makes_the_expected_accuracy_right():
    y, p, groups = graded(4000, 8, prior=[0.9, 0.07, 0.03])
    prevalence = estimate_prevalence(p, PRIOR)
    corrected = shift_prevalence(p, PRIOR, prevalence)
    valid = table(4000, 7)
    errors = []
    for probs in (p, corrected):
        new = as_table(y, probs, groups)
        found = expected(valid, new).value
        error = found['confidence', 'accuracy'] - true_accuracy(probs, y)
        errors.append(abs(error))
    before, after = errors
    assert after < 0.015
    assert before > 0.03
