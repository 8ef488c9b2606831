"Test that the guarantee of an operating point holds in simulations, and that too few patients are refused."

import re

import numpy as np
import pytest
from helpers import tool
from scipy.stats import binom, binomtest, norm

from dr_transfer.metrics.classes import Classes, Positive
from dr_transfer.metrics.decision import Decision
from dr_transfer.metrics.guarantee import guaranteed_operating_point
from dr_transfer.metrics.operating_point import OperatingPointError, choose_operating_point

DELTA = 0.1


def patients(n, seed, both=0.6, positives=0.5):
    """Two eyes of each patient with correlated scores.

    The second eye of a positive patient is positive in a fraction `both`, and these patients have higher scores.
    """
    rng = np.random.default_rng(seed)
    first = rng.random(n) < positives
    second = first & (rng.random(n) < both)
    y = np.c_[first, second].astype(int)
    of_patient = rng.normal(size=(n, 1))
    of_image = rng.normal(size=(n, 2))
    noise = 0.8 * of_patient + 0.6 * of_image
    height = 1.5 + second[:, None]
    scores = y * height + noise
    groups = np.repeat(np.arange(n), 2)
    return y.ravel(), scores.ravel(), groups


def true_sensitivity(t, both=0.6):
    "Mean over positive patients of the fraction of positive images that are found."
    of_two = norm.sf(t - 2.5)
    of_one = norm.sf(t - 1.5)
    return both * of_two + (1 - both) * of_one


def misses(thresholds, minimum):
    sensitivity = true_sensitivity(np.array(thresholds))
    return int((sensitivity < minimum).sum())


def positive_point(n, minimum, **options):
    "The operating point of n positive images with the scores 0, 1, ..., n - 1."
    return guaranteed_operating_point(np.ones(n, int), np.arange(float(n)), minimum, **options)


def assert_rare(failed, n):
    "The number of failures in n draws is not above a fraction DELTA, by more than chance"
    test = binomtest(failed, n, DELTA, alternative='greater')
    assert test.pvalue > 0.01, failed


@pytest.mark.parametrize(('n', 'minimum'), [(70, 0.9), (120, 0.9), (120, 0.8)])
def test_the_sensitivity_of_new_patients_is_below_the_required_one_in_at_most_delta_of_the_draws(n, minimum):
    n_draws = 600
    found = []
    usual = []
    for seed in range(n_draws):
        y, score, groups = patients(n, seed)
        point = guaranteed_operating_point(y, score, minimum, delta=DELTA, groups=groups)
        found.append(point.threshold)
        point = choose_operating_point(y, score, minimum, min_groups=1)
        usual.append(point.threshold)
    assert_rare(misses(found, minimum), n_draws)
    assert misses(usual, minimum) > 2 * DELTA * n_draws, 'the usual threshold has no guarantee'


def test_the_specificity_of_new_patients_too():
    n_draws = 400
    found = []
    for seed in range(n_draws):
        y, score, groups = patients(120, seed)
        point = guaranteed_operating_point(1 - y, -score, specificity=0.9, groups=groups)
        found.append(-point.threshold)
    assert_rare(misses(found, 0.9), n_draws)


def test_the_guarantee_uses_what_delta_allows():
    "With one image per patient and continuous scores, the probability of a failure is known."
    n = 100
    minimum = 0.9
    failures = binom.cdf(np.arange(n), n, 1 - minimum)  # by the number of positive images that are missed
    missed = np.flatnonzero(failures[:-1] <= DELTA).max()
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2000, n))
    ordered = np.sort(scores, axis=1)
    sensitivity = norm.sf(ordered[:, missed])
    failed = (sensitivity < minimum).mean()
    assert abs(failed - failures[missed]) < 0.02
    y = np.ones(n, int)
    for score in scores[:20]:
        point = guaranteed_operating_point(y, score, minimum)
        assert (score < point.threshold).sum() == missed


def test_tied_scores_keep_the_guarantee():
    rng = np.random.default_rng(1)
    y = np.ones(60, int)
    failed = 0
    for _ in range(300):
        score = rng.integers(0, 20, 60).astype(float)  # 0 to 19, so that 18 of 20 values are 2 or more
        point = guaranteed_operating_point(y, score, 0.9)
        failed += point.threshold > 2
    assert_rare(failed, 300)


@pytest.mark.parametrize(('minimum', 'delta'), [(0.9, 0.1), (0.95, 0.05), (0.8, 0.2), (0.5, 0.5)])
def test_the_error_has_the_number_that_is_needed(minimum, delta):
    needed = 1
    while minimum**needed > delta + 1e-12:
        needed += 1
    if needed > 1:
        with pytest.raises(OperatingPointError, match=f'needs {needed} or more'):
            positive_point(needed - 1, minimum, delta=delta)
    enough = positive_point(needed, minimum, delta=delta)
    decided = enough.decide(np.arange(needed))
    assert decided.all(), 'none of so few patients may be missed'


def test_what_the_error_suggests_is_possible():
    for n in (1, 5, 12, 21):
        with pytest.raises(OperatingPointError) as e:
            positive_point(n, 0.9)
        advice = re.search(r'\(sensitivity=(\S+), --sensitivity (\S+)\)', str(e.value))
        in_python, on_the_command_line = advice.groups()
        assert in_python == on_the_command_line
        allowed = float(in_python)
        point = positive_point(n, allowed)
        assert point.minimum == allowed


def test_many_images_of_few_patients_are_few():
    y = np.ones(400, int)
    score = np.arange(400.0)
    groups = np.arange(400) // 20
    with pytest.raises(OperatingPointError, match='20 positive patients'):
        guaranteed_operating_point(y, score, 0.9, groups=groups)
    with pytest.raises(OperatingPointError, match=r'0 negative patients.*Add patients with negative images'):
        guaranteed_operating_point(y, score, specificity=0.9, groups=groups)


def test_without_patients_the_error_counts_images():
    advice = {0: 'Add positive images', 12: 'Add images, or require less'}
    for n, more in advice.items():
        y = [0] * 5 + [1] * n
        score = np.arange(5.0 + n)
        groups = [None] * len(y)
        with pytest.raises(OperatingPointError, match=f'^{n} positive images: .*{more}') as e:
            guaranteed_operating_point(y, score, 0.9, groups=groups)
        assert 'patients' not in str(e.value)


@pytest.mark.parametrize(
    'wrong',
    [
        {'delta': 0},
        {'delta': 1},
        {'delta': True},
        {'sensitivity': 90},
    ],
)
def test_fractions_are_checked(wrong):
    fractions = {'sensitivity': 0.9, **wrong}
    score = np.arange(30.0)
    with pytest.raises(ValueError, match='between 0 and 1, such as'):
        guaranteed_operating_point([1] * 30, score, **fractions)


def test_a_saved_decision_keeps_the_confidence():
    point = positive_point(30, 0.9)
    decision = Decision(operating=point)
    saved = decision.to_dict()
    assert saved['operating']['confidence'] == 0.9
    assert Decision.from_dict(saved).operating == point
    usual = choose_operating_point(np.ones(30, int), np.arange(30.0), 0.9)
    plain = Decision(operating=usual).to_dict()
    assert 'confidence' not in plain['operating'], 'files stay as they were'
    referable = Positive('referable', ('1', '2'))
    classes = Classes(('0', '1', '2'), referable)
    decision.check(classes)


def test_neighbouring_scores_have_a_threshold_between_them():
    score = np.full(30, 0.5)
    score[-1] = np.nextafter(0.5, 1)
    y = np.zeros(30, int)
    y[-1] = 1
    point = guaranteed_operating_point(y, score, specificity=0.9)
    assert not point.decide(score[:-1]).any()
    assert point.decide(score[-1])


def test_the_study_on_photographs_measures_and_counts_what_is_refused():
    "tools/guarantee.py, on simulated predictions."
    study = tool('guarantee')
    y, score, groups = patients(300, 0)
    site = study.Site(y, score, groups)
    t = study.results(site, numbers=(80, 10), draws=40)
    by_method = t.set_index(['method', 'patients', 'required'])
    usual = by_method.loc['usual']
    guaranteed = by_method.loc['guaranteed']
    assert (guaranteed.loc[10].refused == 40).all()
    assert (usual.refused == 0).all()
    below = 'below, all'
    assert (guaranteed.loc[80][below] <= 0.2).all()
    assert (usual.loc[80][below] >= 0.2).all()
    everyone = np.ones(300, bool)
    assert site.sensitivity(-np.inf, everyone) == 1
    assert site.specificity(-np.inf, everyone) == 0
