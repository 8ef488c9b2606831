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
    noise = 0.8 * rng.normal(size=(n, 1)) + 0.6 * rng.normal(size=(n, 2))
    return y.ravel(), (y * (1.5 + second[:, None]) + noise).ravel(), np.repeat(np.arange(n), 2)


def true_sensitivity(t, both=0.6):
    "Mean over positive patients of the fraction of positive images that are found."
    return both * norm.sf(t - 2.5) + (1 - both) * norm.sf(t - 1.5)


def misses(thresholds, minimum):
    return int((true_sensitivity(np.array(thresholds)) < minimum).sum())


def assert_rare(failed, n):
    "The number of failures in n draws is not above a fraction DELTA, by more than chance"
    test = binomtest(failed, n, DELTA, alternative='greater')
    assert test.pvalue > 0.01, failed


@pytest.mark.parametrize(('n', 'minimum'), [(70, 0.9), (120, 0.9), (120, 0.8)])
def test_the_sensitivity_of_new_patients_is_below_the_required_one_in_at_most_delta_of_the_draws(n, minimum):
    draws = [patients(n, seed) for seed in range(600)]
    found = [guaranteed_operating_point(y, s, minimum, delta=DELTA, groups=g).threshold for y, s, g in draws]
    failed = misses(found, minimum)
    assert_rare(failed, len(draws))
    usual = [choose_operating_point(y, s, minimum, min_groups=1).threshold for y, s, g in draws]
    assert misses(usual, minimum) > 2 * DELTA * len(draws), 'the usual threshold has no guarantee'


def test_the_specificity_of_new_patients_too():
    draws = [patients(120, seed) for seed in range(400)]
    found = [guaranteed_operating_point(1 - y, -s, specificity=0.9, groups=g).threshold for y, s, g in draws]
    failed = misses([-t for t in found], 0.9)
    assert_rare(failed, len(draws))


def test_the_guarantee_uses_what_delta_allows():
    "With one image per patient and continuous scores, the probability of a failure is known."
    n = 100
    minimum = 0.9
    k = max(k for k in range(1, n) if binom.cdf(k - 1, n, 1 - minimum) <= DELTA)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2000, n))
    at = np.sort(scores, axis=1)[:, k - 1]
    failed = (norm.sf(at) < minimum).mean()
    assert abs(failed - binom.cdf(k - 1, n, 1 - minimum)) < 0.02
    for score in scores[:20]:
        point = guaranteed_operating_point(np.ones(n, int), score, minimum)
        assert (score < point.threshold).sum() == k - 1


def test_tied_scores_keep_the_guarantee():
    rng = np.random.default_rng(1)
    failed = 0
    for _ in range(300):
        score = rng.integers(0, 20, 60).astype(float)  # 0 to 19, so that 18 of 20 values are 2 or more
        t = guaranteed_operating_point(np.ones(60, int), score, 0.9).threshold
        failed += t > 2
    assert_rare(failed, 300)


@pytest.mark.parametrize(('minimum', 'delta'), [(0.9, 0.1), (0.95, 0.05), (0.8, 0.2), (0.5, 0.5)])
def test_the_error_has_the_number_that_is_needed(minimum, delta):
    needed = next(n for n in range(1, 1000) if minimum**n <= delta + 1e-12)
    if needed > 1:
        few = np.ones(needed - 1, int)
        with pytest.raises(OperatingPointError, match=f'needs {needed} or more'):
            guaranteed_operating_point(few, np.arange(needed - 1.0), minimum, delta=delta)
    enough = guaranteed_operating_point(np.ones(needed, int), np.arange(float(needed)), minimum, delta=delta)
    assert enough.decide(np.arange(needed)).all(), 'none of so few patients may be missed'


def test_what_the_error_suggests_is_possible():
    for n in (1, 5, 12, 21):
        with pytest.raises(OperatingPointError) as e:
            guaranteed_operating_point(np.ones(n, int), np.arange(float(n)), 0.9)
        in_python, on_the_command_line = re.search(r'\(sensitivity=(\S+), --sensitivity (\S+)\)', str(e.value)).groups()
        assert in_python == on_the_command_line
        allowed = float(in_python)
        assert guaranteed_operating_point(np.ones(n, int), np.arange(float(n)), allowed).minimum == allowed


def test_many_images_of_few_patients_are_few():
    y, score, groups = np.ones(400, int), np.arange(400.0), np.arange(400) // 20
    with pytest.raises(OperatingPointError, match='20 positive patients'):
        guaranteed_operating_point(y, score, 0.9, groups=groups)
    with pytest.raises(OperatingPointError, match=r'0 negative patients.*Add patients with negative images'):
        guaranteed_operating_point(y, score, specificity=0.9, groups=groups)


def test_without_patients_the_error_counts_images():
    for n, more in ((0, 'Add positive images'), (12, 'Add images, or require less')):
        with pytest.raises(OperatingPointError, match=f'^{n} positive images: .*{more}') as e:
            guaranteed_operating_point([0] * 5 + [1] * n, np.arange(5.0 + n), 0.9, groups=[None] * (5 + n))
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
    with pytest.raises(ValueError, match='between 0 and 1, such as'):
        guaranteed_operating_point([1] * 30, np.arange(30.0), **{'sensitivity': 0.9, **wrong})


def test_a_saved_decision_keeps_the_confidence():
    point = guaranteed_operating_point(np.ones(30, int), np.arange(30.0), 0.9)
    saved = Decision(operating=point).to_dict()
    assert saved['operating']['confidence'] == 0.9
    assert Decision.from_dict(saved).operating == point
    plain = choose_operating_point(np.ones(30, int), np.arange(30.0), 0.9)
    assert 'confidence' not in Decision(operating=plain).to_dict()['operating'], 'files stay as they were'
    Decision(operating=point).check(Classes(('0', '1', '2'), Positive('referable', ('1', '2'))))


def test_neighbouring_scores_have_a_threshold_between_them():
    score = np.full(30, 0.5)
    y = np.r_[np.zeros(29, int), 1]
    score[-1] = np.nextafter(0.5, 1)
    point = guaranteed_operating_point(y, score, specificity=0.9)
    assert not point.decide(score[:-1]).any()
    assert point.decide(score[-1])


def test_the_study_on_photographs_measures_and_counts_what_is_refused():
    "tools/guarantee.py, on simulated predictions."
    study = tool('guarantee')
    y, score, groups = patients(300, 0)
    site = study.Site(y, score, groups)
    t = study.results(site, numbers=(80, 10), draws=40).set_index(['patients', 'required', 'method'])
    assert (t.refused[10].xs('guaranteed', level='method') == 40).all()
    assert (t.refused.xs('usual', level='method') == 0).all()
    enough = t.loc[80]
    assert (enough['below, all'].xs('guaranteed', level='method') <= 0.2).all()
    assert (enough['below, all'].xs('usual', level='method') >= 0.2).all()
    everyone = np.ones(300, bool)
    assert site.sensitivity(-np.inf, everyone) == 1
    assert site.specificity(-np.inf, everyone) == 0
