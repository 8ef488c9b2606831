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

TWO = ['no', 'referable']
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
    return y, odds / odds.sum(1, keepdims=True), np.repeat(np.arange(n), eyes)


def as_table(y, p, groups):
    columns = {f'p_{c}': v for c, v in zip(GRADES, p.T)}
    return pd.DataFrame({'target': y.astype(str), 'group': groups, **columns})


def table(n, seed, **kw):
    return as_table(*graded(n, seed, **kw))


def by_name(found):
    return found.set_index(['method', 'metric'])


def true_metrics(p, y):
    "Accuracy, and AUC of the classes above 0"
    accuracy = (p.argmax(1) == y).mean()
    return accuracy, roc_auc_score(y > 0, p[:, 1:].sum(1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.sampled_from([8, 10, 16]))
def test_the_expected_auc_is_the_mean_over_all_labels(numbers, scale):
    "Against the weighted AUC of scikit-learn, without the pairs of an image with itself."
    p = np.array(numbers) / scale
    same = (p * (1 - p)).sum()
    pairs = p.sum() * (1 - p).sum() - same
    if pairs <= 1e-12:
        assert np.isnan(_expected_auc(p))
        return
    labels = np.repeat([1, 0], len(p))
    weights = np.r_[p, 1 - p]
    weighted = roc_auc_score(labels, np.r_[p, p], sample_weight=weights)
    assert np.isclose(_expected_auc(p), (weighted * (pairs + same) - same / 2) / pairs)


def test_the_intervals_contain_the_truth_if_nothing_changes():
    y, p, _ = graded(50_000, 1_000_000)
    accuracy, area = true_metrics(p, y)
    true = {'accuracy': accuracy, 'auc': area}
    inside = []
    for seed in range(20):
        found = expected_metrics(table(100, 2 * seed), table(100, 2 * seed + 1), GRADES, n=40)
        inside.append([low <= true[m] <= high for m, low, high in zip(found.metric, found.low, found.high)])
    fractions = np.mean(inside, axis=0)
    names = zip(found.method, found.metric)
    assert (fractions >= 0.75).all(), dict(zip(names, fractions))


def test_without_noise_from_sampling_the_estimates_are_the_truth():
    valid, (y, p, groups) = table(5000, 0), graded(5000, 1)
    clear = (p.max(1) > 0.8) & (np.random.default_rng(0).random(len(y)) < 0.7)  # P(y | image) stays
    y, p, groups = y[~clear], p[~clear], groups[~clear]
    found = by_name(expected_metrics(valid, as_table(y, p, groups), GRADES, n=2)).value
    accuracy, area = true_metrics(p, y)
    assert found['validation', 'accuracy'] - accuracy > 0.05, 'harder images'
    assert abs(found['confidence', 'accuracy'] - accuracy) < 0.015
    assert abs(found['difference', 'accuracy'] - accuracy) < 0.015
    assert abs(found['confidence', 'auc'] - area) < 0.015
    assert abs(found['difference', 'auc'] - area) < 0.015


def test_errors_of_which_the_model_is_confident_are_not_noticed():
    "What the documentation says: another camera with more noise looks better than it is."
    y, p, groups = graded(3000, 1, blur=2.0)
    found = by_name(expected_metrics(table(3000, 0), as_table(y, p, groups), GRADES, n=20))
    assert found.low['difference', 'accuracy'] > (p.argmax(1) == y).mean() + 0.1


def test_a_threshold_has_the_accuracy_of_the_validation_set_there():
    valid = table(300, 0)
    found = by_name(expected_metrics(valid, valid.drop(columns='target'), GRADES, n=2)).value
    assert found['threshold', 'accuracy'] == found['validation', 'accuracy']
    assert np.isclose(found['difference', 'accuracy'], found['validation', 'accuracy'])
    assert np.isclose(found['difference', 'auc'], found['validation', 'auc'])


def test_classes_without_a_positive_one_have_no_auc():
    assert set(expected_metrics(table(50, 0), table(50, 1), list(GRADES), n=2).metric) == {'accuracy'}


def test_patients_make_intervals_wider_than_images():
    copies = [pd.concat([table(100, seed, eyes=1)] * 4, ignore_index=True) for seed in (0, 1)]
    over_patients = by_name(expected_metrics(*copies, GRADES, n=80))
    over_images = by_name(expected_metrics(*(t.drop(columns='group') for t in copies), GRADES, n=80))
    width = (over_patients.high - over_patients.low) / (over_images.high - over_images.low)
    assert 1.5 < width['confidence', 'accuracy'] < 2.6, 'four copies: twice as wide'


def test_bad_tables_are_refused():
    good = table(50, 0)
    with pytest.raises(ValueError, match="no column 'p_2'"):
        expected_metrics(good, good.drop(columns='p_2'), GRADES)
    with pytest.raises(ValueError, match='1 images of the new table'):
        expected_metrics(good, good.assign(p_0=good.p_0.where(good.index > 0)), GRADES)
    with pytest.raises(ValueError, match='2 or more'):
        expected_metrics(good, good, GRADES, n=1)


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
    assert np.abs(found - observed).max() < 0.04, found
    corrected = shift_prevalence(p, PRIOR, found)
    assert np.allclose(corrected.mean(0), found, atol=1e-4), 'the estimate is the mean of the corrected probabilities'
    assert (corrected.argmax(1) == y).mean() >= (p.argmax(1) == y).mean() - 0.005


def test_the_estimate_has_the_greatest_likelihood():
    _, p, _ = graded(300, 6, prior=[0.3, 0.4, 0.3])

    def log_likelihood(prevalence):
        return np.log((p * (prevalence / PRIOR)).sum(1)).sum()

    best = log_likelihood(estimate_prevalence(p, PRIOR))
    others = np.random.default_rng(0).dirichlet([1, 1, 1], 500)
    assert max(map(log_likelihood, others)) <= best


def test_a_shift_can_be_undone_and_done_in_steps():
    p = np.random.default_rng(0).dirichlet([1, 1, 1], 50)
    a = [0.2, 0.3, 0.5]
    b = [0.7, 0.2, 0.1]
    assert np.allclose(shift_prevalence(shift_prevalence(p, PRIOR, a), a, PRIOR), p)
    assert np.allclose(shift_prevalence(shift_prevalence(p, PRIOR, a), a, b), shift_prevalence(p, PRIOR, b))
    with pytest.raises(ValueError, match='1 images have the probability 0'):
        shift_prevalence([[0.0, 0.0, 1.0]], PRIOR, [0.5, 0.5, 0.0])


def test_an_estimated_prevalence_makes_the_expected_accuracy_right():
    y, p, groups = graded(4000, 8, prior=[0.9, 0.07, 0.03])
    corrected = shift_prevalence(p, PRIOR, estimate_prevalence(p, PRIOR))
    valid = table(4000, 7)
    truth = (corrected.argmax(1) == y).mean()
    before = by_name(expected_metrics(valid, as_table(y, p, groups), GRADES, n=2)).value['confidence', 'accuracy']
    after = by_name(expected_metrics(valid, as_table(y, corrected, groups), GRADES, n=2)).value[
        'confidence', 'accuracy'
    ]
    assert abs(after - truth) < 0.015
    assert abs(before - (p.argmax(1) == y).mean()) > 0.03
