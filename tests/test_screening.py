"Test intervals, calibration, the operating point, and the metrics and report of a table of predictions."

import json
import re

import numpy as np
import pandas as pd
import pytest
from helpers import GRADES
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import cohen_kappa_score, recall_score, roc_auc_score

from dr_transfer.evaluation.report import Evaluation, endpoint_table
from dr_transfer.evaluation.report_page import report_html, write_report
from dr_transfer.metrics.calibration import (
    apply_temperature,
    calibration_error,
    fit_temperature,
    referral_curve,
    reliability,
)
from dr_transfer.metrics.classes import Classes, Positive
from dr_transfer.metrics.decision import (
    Decision,
    apply_decision,
    choose_decision,
    decisions,
    positive_score,
    question,
    table_arrays,
)
from dr_transfer.metrics.intervals import bootstrap, fraction_interval, group_codes, paired_difference, resamples
from dr_transfer.metrics.operating_point import (
    OperatingPoint,
    OperatingPointError,
    choose_operating_point,
    operating_table,
    predictive_values,
)
from dr_transfer.metrics.scores import accuracy, auc
from dr_transfer.metrics.screening import (
    by_patient,
    compare_tables,
    consistency,
    measure_table,
    metric_values,
    patient_classes,
    roc_band,
    subgroup_table,
    worst_errors,
)

TWO = ['no', 'referable']


def two(n=300, seed=0, sharp=1.0, person=1.0, n_images=2):
    "Predictions for two eyes of n people"
    rng = np.random.default_rng(seed)
    positive = np.repeat(rng.random(n) < 0.35, n_images)
    x = np.where(positive, 1.2, -1.2) + np.repeat(rng.normal(0, person, n), n_images) + rng.normal(0, 0.7, n_images * n)
    p = 1 / (1 + np.exp(-sharp * x))
    return pd.DataFrame(
        {
            'image': [f'{i}.jpg' for i in range(n_images * n)],
            'target': np.where(positive, *TWO[::-1]),
            'group': np.repeat([f'p{i}' for i in range(n)], n_images),
            'data_camera': np.repeat(rng.choice(['A', 'B'], n), n_images),
            'p_no': 1 - p,
            'p_referable': p,
        }
    )


def five(n=300, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 5, n)
    p = rng.dirichlet(np.ones(5), n) + 2 * np.eye(5)[np.clip(y + rng.integers(-1, 2, n), 0, 4)]
    return pd.DataFrame(
        {
            'image': [f'{i}' for i in range(n)],
            'target': y.astype(str),
            **dict(zip([f'p_{g}' for g in GRADES], (p / p.sum(1, keepdims=True)).T)),
        }
    )


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    'groups, n',
    [
        (None, 4),
        (['a', 'b', 'a', None], 4),
        ([None] * 5, 5),
        (['x', float('nan'), float('nan')], 3),
        (['a'], 1),
    ],
)
def test_group_codes_number_the_groups(groups, n):
    c = group_codes(groups, n)
    assert sorted(set(c)) == list(range(c.max() + 1))
    for i in range(n):
        for j in range(i):
            assert (c[i] == c[j]) == (groups is not None and isinstance(groups[i], str) and groups[i] == groups[j])


def test_resamples_contain_complete_groups():
    codes = np.array([0, 0, 1, 2, 2, 2])
    for rows in resamples(codes, 50, seed=3):
        n = np.bincount(rows, minlength=6)
        assert n[0] == n[1]
        assert n[3] == n[4] == n[5]
        assert n[0] + n[2] + n[3] == 3
    assert (
        [r.tolist() for r in resamples(codes, 5)]
        == [r.tolist() for r in resamples(codes, 5)]
        != [r.tolist() for r in resamples(codes, 5, seed=1)]
    )


def test_the_bootstrap_of_a_mean_is_that_of_scipy():
    x = np.random.default_rng(0).normal(3, 2, 80)
    ours = bootstrap(np.mean, x, n=4000).loc['value']
    theirs = stats.bootstrap((x,), np.mean, n_resamples=4000, method='percentile', random_state=1).confidence_interval
    assert ours.value == pytest.approx(x.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_intervals_over_patients_contain_the_true_value_and_those_over_eyes_do_not():
    held = {True: 0, False: 0}
    for s in range(150):
        rng = np.random.default_rng(s)
        right = np.repeat(rng.random(50) < 0.8, 4)
        who = np.repeat(np.arange(50), 4)
        for grouped in held:
            low, high = fraction_interval(right, who if grouped else None, n=200, seed=s)[1:]
            held[grouped] += low <= 0.8 <= high
    assert held[True] / 150 > 0.9, held
    assert held[False] / 150 < 0.8, held


@pytest.mark.parametrize('k', [3, 12, 100])
def test_a_fraction_of_0_or_1_has_the_exact_interval(k):
    for happened in (True, False):
        exact = stats.binomtest(k * happened, k).proportion_ci(0.95, 'exact')
        assert fraction_interval([happened] * k)[1:] == pytest.approx((exact.low, exact.high))
        assert fraction_interval([happened] * 2 * k, np.repeat(np.arange(k), 2))[1:] == pytest.approx(
            (exact.low, exact.high)
        )
    for v in fraction_interval([]):
        assert np.isnan(v)


def test_a_metric_that_is_mostly_undefined_has_no_interval():
    y = np.r_[1, np.zeros(30, int)]
    r = bootstrap(auc, y, np.arange(31.0), n=200).loc['value']
    assert r.value == 0
    assert np.isnan([r.low, r.high]).all()


def test_a_paired_difference_is_narrower_than_two_intervals():
    a = two(seed=1)
    b = two(seed=1)
    b['p_referable'] = (b.p_referable + np.random.default_rng(0).normal(0, 0.1, len(b))).clip(0, 1)
    y = (a.target == 'referable').astype(int).to_numpy()
    d = paired_difference(auc, y, a.p_referable, b.p_referable, groups=a.group, n=400).loc['value']
    alone = bootstrap(auc, y, a.p_referable, groups=a.group, n=400).loc['value']
    assert d.value == pytest.approx(auc(y, a.p_referable) - auc(y, b.p_referable))
    assert d.high - d.low < 0.6 * (alone.high - alone.low)
    same = paired_difference(auc, y, a.p_referable, a.p_referable, n=50).loc['value']
    assert (same == 0).all()


# ---------------------------------------------------------------- calibration


def test_reliability_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    forecast = rng.random(1000)
    right = rng.random(1000) < forecast**2
    r = reliability(right, forecast, 10)
    fractions, mean = calibration_curve(right, forecast, n_bins=10, strategy='quantile')
    assert r.images.sum() == 1000
    assert np.allclose(r.observed, fractions, atol=0.02)
    assert np.allclose(r.predicted, mean, atol=0.01)
    assert calibration_error(right, forecast) == pytest.approx(np.abs(fractions - mean).mean(), abs=0.01)


@pytest.mark.parametrize('sharp', [0.4, 1, 2.5])
def test_the_temperature_is_recovered(sharp):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (20_000, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    bold = apply_temperature(p, 1 / sharp)
    assert fit_temperature(bold, y) == pytest.approx(sharp, rel=0.06)
    assert np.allclose(apply_temperature(bold, sharp), p, atol=1e-3)
    assert (apply_temperature(bold, 7).argmax(1) == p.argmax(1)).all()


@pytest.mark.parametrize(
    'right, forecast, words',
    [
        ([1], [2.0], 'outside 0 to 1'),
        ([1, 0], [0.5], 'shape'),
        ([], [], 'at least one'),
    ],
)
def test_invalid_probabilities_are_errors(right, forecast, words):
    with pytest.raises(ValueError, match=words):
        reliability(right, forecast)


def test_selective_prediction_keeps_the_most_certain():
    c = referral_curve([True, True, False, True], [0.9, 0.8, 0.1, 0.7], fractions=(0, 0.25))
    assert c.accuracy.tolist() == [0.75, 1]
    assert c.remaining.tolist() == [4, 3]


# ---------------------------------------------------------------- the operating point


@pytest.mark.parametrize('minimum', [0.5, 0.8, 0.87, 0.95])
@pytest.mark.parametrize('what', ['sensitivity', 'specificity'])
def test_the_operating_point_reaches_the_target_and_is_optimal(minimum, what):
    t = two(110, seed=2)
    y = (t.target == 'referable').astype(int).to_numpy()
    s = t.p_referable.to_numpy()
    p = choose_operating_point(y, s, **{what: minimum})

    def both(threshold):
        return (s[y == 1] >= threshold).mean(), (s[y == 0] < threshold).mean()

    assert both(p.threshold) == pytest.approx((recall_score(y, s >= p.threshold), recall_score(1 - y, s < p.threshold)))
    assert (p.sensitivity, p.specificity) == pytest.approx(both(p.threshold))
    assert getattr(p, what) >= minimum
    other = 1 if what == 'sensitivity' else 0
    reach = [both(v) for v in np.r_[s, 2.0] if both(v)[1 - other] >= minimum]
    assert max(r[other] for r in reach) <= both(p.threshold)[other] + 1e-12


def test_too_few_positives_raise_an_error_with_the_reason():
    with pytest.raises(OperatingPointError, match=r'29 positive validation images.*fewer than 30'):
        choose_operating_point([1] * 29 + [0] * 99, np.arange(128.0), sensitivity=0.9)
    with pytest.raises(OperatingPointError, match='5 negative'):
        choose_operating_point([1] * 99 + [0] * 5, np.arange(104.0), specificity=0.9)
    for bad, words in (
        ({}, 'one of the two'),
        (dict(sensitivity=0.9, specificity=0.9), 'one of the two'),
        (dict(sensitivity=90), 'between 0 and 1'),
    ):
        with pytest.raises(ValueError, match=words):
            choose_operating_point([1] * 40 + [0] * 40, np.arange(80.0), **bad)


def test_predictive_values_are_those_of_a_population():
    rng = np.random.default_rng(0)
    positive = rng.random(400_000) < 0.07
    found = np.where(positive, rng.random(len(positive)) < 0.87, rng.random(len(positive)) < 0.09)
    v = predictive_values(0.87, 0.91, 0.07)
    assert v['positive'] == pytest.approx(positive[found].mean(), abs=0.01)
    assert v['negative'] == pytest.approx(1 - positive[~found].mean(), abs=0.003)
    with pytest.raises(ValueError, match='between 0 and 1'):
        predictive_values(0.9, 0.9, 7)


def test_the_table_at_the_point():
    t = two(seed=3)
    q = question(t, TWO)
    called = q.score > 0.5
    m = operating_table(q.y, called, t.group, prevalence=0.1, n=200)
    assert m.loc['sensitivity'].value == pytest.approx(recall_score(q.y, called))
    assert m.loc['specificity'].value == pytest.approx(recall_score(1 - q.y, ~called))
    assert (m.low <= m.value).all()
    assert (m.value <= m.high).all()
    assert m.loc['sensitivity'].images == q.y.sum()
    assert m.loc['positive predictive value at 10%'].value == pytest.approx(
        predictive_values(*m.value[:2], 0.1)['positive']
    )


def test_predictive_values_have_intervals_over_patients():
    t = two(120)
    y = (t.target == 'referable').to_numpy(int)
    called = t.p_referable.to_numpy() > 0.6
    o = operating_table(y, called, t.group, prevalence=0.1, n=400)

    def ppv(y, c):
        return predictive_values(c[y == 1].mean(), (~c[y == 0]).mean(), 0.1)['positive']

    own = bootstrap(ppv, y, called, groups=t.group, n=400).loc['value']
    assert np.allclose(o.loc['positive predictive value at 10%', ['value', 'low', 'high']].astype(float), own)
    for c in (y == 1, np.ones(len(y), bool), np.zeros(len(y), bool)):  # no resample has an error: the exact limits
        r = operating_table(y, c, t.group, prevalence=0.1, n=50).iloc[2:]
        ok = r.value.notna()
        assert ((r.low <= r.value) & (r.value <= r.high))[ok].all()
        assert (r.high - r.low)[ok].max() > 0


# ---------------------------------------------------------------- decisions


def test_the_decision_for_two_classes_and_for_five_grades():
    t = five()
    q = question(t, GRADES)
    assert q.name == 'referable'
    assert (q.y == (t.target.astype(int) >= 2)).all()
    assert np.allclose(q.score, t[['p_2', 'p_3', 'p_4']].sum(axis=1))
    assert positive_score(np.eye(3), ['a', 'b', 'c']) is None
    assert question(two(), TWO).name == 'referable'
    with pytest.raises(ValueError, match="no column 'p_4'"):
        table_arrays(t.drop(columns='p_4'), GRADES)


@pytest.mark.parametrize(
    'make, classes',
    [
        (two, TWO),
        (five, GRADES),
    ],
)
def test_a_decision_is_restored_from_json(make, classes):
    valid = make(seed=4)
    t = make(seed=5)
    d = Decision.from_dict(json.loads(json.dumps(choose_decision(valid, classes, sensitivity=0.9).to_dict())))
    out = apply_decision(t, classes, d)
    q = question(out, classes)
    assert ((out.decision == 'referable') == d.operating.decide(q.score)).all()
    assert (decisions(out, classes) == (out.decision == 'referable')).all()
    on_valid = decisions(apply_decision(valid, classes, d), classes)
    assert recall_score(question(valid, classes).y, on_valid) >= 0.9
    assert np.allclose(out[[f'p_{c}' for c in classes]].sum(axis=1), 1)
    assert t.equals(make(seed=5))


def test_an_image_without_a_prediction_gets_no_decision():
    t = two(20, seed=6)
    t.loc[3, ['p_no', 'p_referable']] = np.nan
    out = apply_decision(t, TWO, choose_decision(two(seed=4), TWO, sensitivity=0.9))
    assert pd.isna(out.decision[3])
    assert out.decision.notna().sum() == len(t) - 1
    assert apply_decision(t, TWO, None) is t


def test_estimates_from_too_few_validation_images_are_omitted_with_the_reason():
    d = choose_decision(two(20), TWO, sensitivity=0.9)
    assert d.operating is None
    assert d.temperature == 1
    assert len(d.not_chosen) == 2
    with pytest.raises(ValueError, match='needs a positive class'):
        choose_decision(
            pd.DataFrame({'target': ['a'] * 60, 'p_a': 1.0, 'p_b': 0.0, 'p_c': 0.0}), ['a', 'b', 'c'], sensitivity=0.9
        )


# ---------------------------------------------------------------- metrics


def test_metrics_are_those_of_scikit_learn():
    t = two()
    f = five()
    y, p = table_arrays(t, TWO)
    m = metric_values(y, p, TWO)
    assert m['auc'] == pytest.approx(roc_auc_score(y, p[:, 1]))
    assert m['accuracy'] == accuracy(y, p.argmax(1))
    y, p = table_arrays(f, GRADES)
    m = metric_values(y, p, GRADES)
    assert m['kappa'] == pytest.approx(cohen_kappa_score(y, p.argmax(1), weights='quadratic'))
    assert m['auc'] == pytest.approx(roc_auc_score(y >= 2, p[:, 2:].sum(1)))


@pytest.mark.parametrize(
    'make, classes',
    [
        (two, TWO),
        (five, GRADES),
    ],
)
def test_every_metric_is_within_its_interval(make, classes):
    t = apply_decision(make(), classes, choose_decision(make(seed=9), classes, sensitivity=0.9))
    m = measure_table(t, classes, prevalence=0.1, n=200)
    assert {'sensitivity', 'specificity', 'auc', 'accuracy', 'calibration error'} <= set(m.index)
    assert ('kappa' in m.index) == (len(classes) == 5)
    m = m.drop('calibration error')  # a resample repeats images, and can only be worse calibrated
    assert (m.low <= m.value).all()
    assert (m.value <= m.high).all()
    assert measure_table(t, classes, prevalence=0.1, n=200).equals(measure_table(t, classes, prevalence=0.1, n=200))


def test_one_decision_for_both_eyes():
    t = apply_decision(two(), TWO, choose_decision(two(seed=9), TWO, sensitivity=0.9))
    p = by_patient(t, TWO)
    want = t.groupby('group', sort=False).p_referable.max()
    assert len(p) == 300
    assert p.set_index('group').p_referable.round(9).to_dict() == want.round(9).to_dict()
    assert (
        p.set_index('group').decision.eq('referable').to_dict()
        == t.decision.eq('referable').groupby(t.group).max().to_dict()
    )
    assert ' + ' in p.image[0]
    assert len(by_patient(t.assign(group=None), TWO)) == len(t)
    with pytest.raises(ValueError, match='needs two classes'):
        by_patient(
            pd.DataFrame({'image': ['i'], 'target': ['a'], 'p_a': [1.0], 'p_b': [0.0], 'p_c': [0.0]}), list('abc')
        )


def test_the_order_of_rows_does_not_matter_for_a_comparison_but_other_images_do():
    a = two(seed=1)
    b = a.assign(p_referable=a.p_referable**2, p_no=1 - a.p_referable**2)
    d = compare_tables(a, b.sample(frac=1, random_state=0), TWO, n=100)
    assert d.loc['auc'].value == pytest.approx(0, abs=1e-12), 'a rising function changes no rank'
    with pytest.raises(ValueError, match='one table only'):
        compare_tables(a, b.assign(image=b.image + 'x'), TWO)
    with pytest.raises(ValueError, match='different targets for the same images'):
        compare_tables(a, b.assign(target='no'), TWO)


def test_subgroups_have_the_metrics_of_their_rows():
    t = two()
    t.loc[0, 'data_camera'] = None
    s = subgroup_table(t, TWO, ['data_camera'], n=50)
    assert s.loc[('data_camera', 'A'), ('auc', 'value')] == pytest.approx(
        measure_table(t[t.data_camera == 'A'], TWO, n=5).loc['auc'].value
    )
    assert s.loc[('data_camera', 'not known'), ('images', '')] == 1
    assert s[('images', '')].sum() == len(t)


def test_the_worst_errors_are_wrong_and_in_order():
    t = two()
    w = worst_errors(t, TWO, n=10)
    assert len(w) == 10
    assert (w.target != w.predicted).all()
    assert w.probability.is_monotonic_decreasing
    called = apply_decision(t, TWO, choose_decision(two(seed=9), TWO, sensitivity=0.9))
    w = worst_errors(called, TWO, n=4)
    for r in w.itertuples():
        assert (r.predicted == 'referable') != (r.target == 'referable')
    assert w.predicted.value_counts().to_dict() == {'referable': 4, 'not referable': 4}


def test_the_roc_band_contains_the_curve_and_widens_with_fewer_patients():
    wide, narrow = (roc_band(question(t, TWO), t.group, n=200) for t in (two(40), two(600)))
    inner = slice(5, 96)
    for b in (wide, narrow):
        assert ((b.low - 0.02 <= b.sensitivity) & (b.sensitivity <= b.high + 0.02))[inner].all()
        assert b.sensitivity.is_monotonic_increasing
    assert (wide.high - wide.low)[inner].mean() > 2 * (narrow.high - narrow.low)[inner].mean()


def test_consistency_of_views():
    p = np.zeros((4, 4, 2))
    p[..., 1] = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.6, 0.4, 0.4], [0.9] * 4, [0.5, 0.5, 0.5, 0.2]]
    p[..., 0] = 1 - p[..., 1]
    point = OperatingPoint(0.3, 'sensitivity', 0.9, 1, 1, 1, 1)
    assert consistency(p, TWO, point)['same decision'] == 0.5
    assert consistency(p, TWO)['same decision'] == 0.75
    assert consistency(p, TWO)['score range'] == pytest.approx((0.3 + 0.2 + 0 + 0.3) / 4)


# ---------------------------------------------------------------- the report


def test_endpoints_are_met_by_the_complete_interval_only():
    m = pd.DataFrame(
        {'value': [0.9, 0.8], 'low': [0.851, 0.7], 'high': [0.95, 0.824], 'images': 1},
        index=['sensitivity', 'specificity'],
    )
    assert endpoint_table(m)['result'].tolist() == ['reached', 'missed']


@pytest.mark.parametrize(
    'make, classes',
    [
        (two, TWO),
        (five, GRADES),
        (lambda: two()[:3], TWO),
    ],
)
def test_the_report_is_one_page_that_loads_nothing_and_shows_no_image(tmp_path, make, classes):
    t = make()
    t['image'] = [f'/secret/folder/<b>{i}' for i in t.image]
    decision = (
        choose_decision(two(seed=9), TWO, sensitivity=0.9)
        if classes == TWO
        else choose_decision(five(seed=9), GRADES, sensitivity=0.9)
    )
    e = Evaluation(
        t,
        classes,
        {'arch': 'net', 'decision': decision},
        'eyes & more',
        skipped=['/secret/broken.jpg'],
        turns={'same decision': 0.9, 'score range': 0.1, 'images': 7},
    )
    file = write_report(e, tmp_path / 'r.html', n=50)
    page = file.read_text()
    assert 'Not a medical device' in page
    assert 'eyes &amp; more' in page
    assert '/secret' not in page
    assert '<b>' not in page
    assert 'broken.jpg' in page
    assert not re.search(r'(src|href)="(?!data:image/png)', page)
    assert '<script' not in page
    assert '@media print' in page
    assert 'width=device-width' in page
    assert len(pd.read_csv(tmp_path / 'r_predictions.csv')) == len(t)


def test_a_threshold_that_does_not_transfer_is_reported():
    decision = choose_decision(two(seed=9), TWO, sensitivity=0.9)
    words = 'choose a new threshold'
    t = two()
    assert words not in report_html(Evaluation(apply_decision(t, TWO, decision), TWO, {'decision': decision}), n=50)
    lighter = t.assign(p_referable=t.p_referable**3, p_no=1 - t.p_referable**3)  # another camera
    assert words in report_html(Evaluation(apply_decision(lighter, TWO, decision), TWO, {'decision': decision}), n=50)


def test_the_report_gives_the_reason_for_no_operating_point():
    page = report_html(Evaluation(two(), TWO, {'decision': choose_decision(two(20), TWO, sensitivity=0.9)}), n=20)
    assert 'has no operating point' in page
    assert 'cannot be set on fewer than 30' in page
    assert 'An operating point must be chosen on validation images' in page
    assert 'sensitivity at the operating point' not in page
    assert 'sensitivity</th>' not in page


def test_predictive_values_need_a_prevalence():
    e = Evaluation(two(), TWO, {'decision': choose_decision(two(seed=9), TWO, sensitivity=0.9)})
    assert '--prevalence' in report_html(e, n=20)
    assert 'predictive value at' not in report_html(e, n=20)
    e.prevalence = 0.08
    assert 'positive predictive value at 8%' in report_html(e, n=20)


def test_five_classes_are_grades_only_for_the_target_grade():
    "Names '0' to '4' may be the quality of an image: nothing is referable, and nothing has cut points."
    t = five()
    names = list(GRADES)
    assert question(t, names) is None
    assert not {'auc', 'kappa'} & set(measure_table(t, names, n=100).index)
    decision = choose_decision(t, names)
    assert decision.cuts is None
    assert choose_decision(t, GRADES).cuts is not None
    with pytest.raises(ValueError, match='these have none: 0, 1, 2, 3, 4'):
        choose_decision(t, names, sensitivity=0.9)


def test_another_threshold_of_the_grades_is_another_target():
    t = five()
    sight = Classes(GRADES.names, Positive('sight-threatening', ('3', '4')), ordered=True)
    q = question(t, sight)
    assert q.name == 'sight-threatening'
    assert q.y.sum() == t.target.isin(['3', '4']).sum()
    assert q.score == pytest.approx(t.p_3 + t.p_4)
    point = choose_decision(t, sight, sensitivity=0.9)
    assert set(apply_decision(t, sight, point).decision) == {'sight-threatening', 'not sight-threatening'}
    assert set(by_patient(t.assign(group=np.arange(len(t)) // 2), sight).target) == {'no', 'sight-threatening'}


def test_a_named_positive_class_is_used_for_patients_too():
    classes = Classes(('no', 'referable'), Positive('tumour', ('referable',)))
    t = two(400)
    t = t.assign(group=np.arange(len(t)) // 2)
    decision = choose_decision(t, classes, sensitivity=0.9)
    decided = apply_decision(t, classes, decision)
    assert set(decided.decision) == {'tumour', 'not tumour'}
    patients = by_patient(decided, classes)
    m = measure_table(patients, patient_classes(classes), n=100)
    assert {'sensitivity', 'specificity'} <= set(m.index)
