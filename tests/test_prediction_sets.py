"Test that prediction sets have the coverage that they promise, over patients and by class."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_transfer.evaluation.report import Evaluation
from dr_transfer.evaluation.report_page import report_html
from dr_transfer.metrics.classes import Classes
from dr_transfer.metrics.decision import Decision, apply_decision, choose_decision
from dr_transfer.metrics.prediction_sets import PredictionSets, choose_sets, coverage_table
from dr_transfer.metrics.screening import referral_table
from dr_transfer.utils.schema import SchemaError

NAMES = ('0', '1', '2', '3')
GRADES = Classes(NAMES, ordered=True)
PRIOR = np.array([0.5, 0.25, 0.15, 0.1])
COLUMNS = [f'p_{name}' for name in NAMES]


def predictions(n, seed, eyes=2, shared=0.9):
    "Predictions of several images of n patients, whose errors are nearly the same."
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.choice(4, n, p=PRIOR), eyes)
    of_patient = np.repeat(rng.normal(size=n), eyes)
    of_image = rng.normal(size=n * eyes)
    noise = of_patient * shared**0.5 + of_image * (1 - shared) ** 0.5
    x = y + 0.8 * noise
    grades = np.arange(4)
    odds = PRIOR * np.exp(2 * x[:, None] * grades - grades**2)
    probs = odds / odds.sum(1, keepdims=True)
    table = pd.DataFrame(probs, columns=COLUMNS)
    groups = np.repeat(np.arange(n), eyes)
    images = np.arange(n * eyes)
    return table.assign(target=y.astype(str), group=groups, image=images)


def of_target(array, table):
    "The value of each image in the column of its target."
    y = table.target.astype(int).to_numpy()
    rows = np.arange(len(y))
    return array[rows, y]


def probs_of(table):
    return table[COLUMNS].to_numpy()


def covered(sets, table):
    member = sets.apply(probs_of(table))
    return of_target(member, table)


def conformal_rank(n, coverage):
    "The place of the threshold among n scores, from 0."
    return int(np.ceil((n + 1) * coverage)) - 1


@pytest.mark.parametrize('n', [9, 10, 57, 200])
@pytest.mark.parametrize('coverage', [0.7, 0.9])
def test_one_image_per_patient_is_ordinary_split_conformal_prediction(n, coverage):
    table = predictions(n, seed=n, eyes=1)
    of_truth = of_target(probs_of(table), table)
    scores = np.sort(1 - of_truth)
    limit = scores[conformal_rank(n, coverage)]
    new = probs_of(predictions(300, seed=1))
    sets = choose_sets(table, NAMES, coverage, allow_empty=True)
    expected = 1 - new <= limit + 1e-12
    assert np.array_equal(sets.apply(new), expected)


def test_by_class_each_class_is_calibrated_alone():
    table = predictions(200, seed=0, eyes=1)
    sets = choose_sets(table, NAMES, by_class=True, allow_empty=True)
    for name, threshold in zip(NAMES, sets.thresholds):
        images = table[table.target == name]
        alone = images[f'p_{name}'].sort_values(ascending=False)
        rank = conformal_rank(len(alone), 0.9)
        assert threshold == alone.iloc[rank]


def test_a_patient_counts_once_however_many_images_there_are():
    table = predictions(60, seed=3, eyes=1)
    copies = pd.concat([table] + [table[:20]] * 9)  # ten copies of the images of some patients
    without_groups = copies.drop(columns='group')
    thresholds = choose_sets(table, NAMES).thresholds
    assert choose_sets(copies, NAMES).thresholds == thresholds
    assert choose_sets(without_groups, NAMES).thresholds != thresholds


@pytest.mark.parametrize('classes', [NAMES, GRADES], ids=['names', 'grades'])
def test_the_coverage_over_many_calibrations_is_the_required_one(classes):
    new = predictions(4000, seed=10_000)
    n = 40
    draws = 150
    rates = []
    for seed in range(draws):
        table = predictions(n, seed)
        sets = choose_sets(table, classes, allow_empty=True)
        found = covered(sets, new)
        rates.append(found.mean())
    chance = 3 * np.std(rates) / draws**0.5
    mean = np.mean(rates)
    assert 0.9 - chance < mean
    assert mean < 0.9 + 2 / (n + 1) + chance


def test_the_coverage_of_each_class_is_the_required_one():
    new = predictions(4000, seed=10_000)
    rates = []
    for seed in range(100):
        table = predictions(150, seed)
        sets = choose_sets(table, NAMES, by_class=True, allow_empty=True)
        found = pd.Series(covered(sets, new))
        by_class = found.groupby(new.target)
        rates.append(by_class.mean())
    chance = 3 * np.std(rates, axis=0) / len(rates) ** 0.5
    mean = np.mean(rates, axis=0)
    assert len(mean) == 4
    assert (mean > 0.9 - chance).all(), mean


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([0.6, 0.8, 0.9]))
def test_sets_of_grades_have_no_gaps_and_are_not_empty(seed, by_class, coverage):
    table = predictions(120, seed % 7)
    sets = choose_sets(table, GRADES, coverage, by_class=by_class)
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(4, 0.3), 50)
    member = sets.apply(probs)
    steps = np.diff(member.astype(int), axis=1, prepend=0, append=0)
    n_steps = np.abs(steps).sum(1)
    assert (n_steps == 2).all()
    reached = probs >= np.array(sets.thresholds)
    assert member[reached].all(), 'what reaches its threshold is in the set'


def test_too_few_patients_are_refused_with_the_number_that_is_needed():
    eight = predictions(8, 0)
    with pytest.raises(ValueError, match=r'8 groups .* need 9 or more.*Add patients, .* of 88% or less'):
        choose_sets(eight, NAMES)
    assert choose_sets(eight, NAMES, coverage=0.88).groups == 8
    nine = predictions(9, 0)
    assert choose_sets(nine, NAMES).groups == 9


def test_bad_coverages_and_missing_probabilities_are_refused():
    table = predictions(50, 0)
    with pytest.raises(ValueError, match=r'need 99 or more'):
        choose_sets(table, NAMES, coverage=0.99)
    table.loc[:2, 'p_0'] = np.nan
    with pytest.raises(ValueError, match=r'3 images have no probabilities'):
        choose_sets(table, NAMES)


def test_a_class_with_too_few_patients_is_in_every_set():
    table = predictions(200, 0)
    with_3 = table.target == '3'
    patients = table.group[with_3].unique()
    few = table.group.isin(patients[:8])
    rare = table[~with_3 | few]
    sets = choose_sets(rare, NAMES, by_class=True)
    assert sets.always == ('3',)
    member = sets.apply(probs_of(table))
    assert member[:, 3].all()
    without_3 = table[~with_3]
    none = choose_sets(without_3, NAMES, by_class=True)
    assert none.always == ('3',)


def test_an_image_without_a_prediction_has_no_set():
    table = predictions(50, 0)
    sets = choose_sets(table, GRADES)
    probs = np.full((2, 4), 0.01)
    probs[0] = np.nan
    probs[1, 0] = 0.97
    assert sets.words(probs) == ['', '0']
    member = sets.apply(probs)
    assert not member[0].any()


def test_a_set_in_a_file_is_checked():
    table = predictions(50, 0)
    sets = choose_sets(table, GRADES)
    saved = sets.to_dict()
    assert PredictionSets.from_dict(saved) == sets
    changes = {
        'thresholds': [0.1],
        'coverage': 2,
        'classes': 'abcd',
        'extra': 1,
    }
    for field, value in changes.items():
        bad = {**saved, field: value}
        with pytest.raises(SchemaError):
            PredictionSets.from_dict(bad)


def with_sources(table):
    source = np.where(table.group < 40, 'A', 'B')
    return table.assign(source=source)


def test_the_table_of_coverage_counts_images_and_patients_by_class_and_source():
    table = with_sources(predictions(100, 1))
    valid = predictions(100, 0)
    sets = choose_sets(valid, GRADES)
    t = coverage_table(table, sets, ['source'], n=50)
    of_all = t.loc['all', 'all']
    assert of_all.groups == 100
    assert t.loc['source', 'A'].images == 80
    assert t.loc['class'].images.sum() == 200
    found = covered(sets, table)
    assert np.isclose(of_all.coverage, found.mean())
    assert (t.low <= t.coverage).all()
    assert (t.coverage <= t.high).all()


def test_one_referral_curve_for_each_source():
    table = with_sources(predictions(100, 1))
    both = referral_table(table, GRADES, column='source')
    assert list(both) == ['source', 'referred', 'remaining', 'accuracy']
    images_of_a = table[table.source == 'A']
    alone = referral_table(images_of_a, GRADES)
    rows_of_a = both[both.source == 'A']
    rows_of_a = rows_of_a.drop(columns='source')
    rows_of_a = rows_of_a.reset_index(drop=True)
    pd.testing.assert_frame_equal(rows_of_a, alone)


# ---------------------------------------------------------------- in a decision


def test_a_decision_has_sets_and_the_table_a_column():
    valid = predictions(100, 0)
    decision = choose_decision(valid, GRADES)
    assert decision.sets.groups == 100
    saved = decision.to_dict()
    assert Decision.from_dict(saved) == decision
    new = predictions(50, 1)
    new['error'] = ''
    new.loc[0, COLUMNS] = np.nan
    t = apply_decision(new, GRADES, decision)
    assert t.set[0] == ''
    probs = t[COLUMNS]
    assert t.set.tolist() == decision.sets.words(probs)


def test_few_patients_are_a_reason_and_older_decisions_have_no_sets():
    table = predictions(8, 0, eyes=20)
    few = choose_decision(table, GRADES)
    assert few.sets is None
    assert any(reason.startswith('no prediction sets: 8 groups') for reason in few.not_chosen)
    older = Decision()
    assert 'sets' not in older.to_dict()
    t = apply_decision(predictions(8, 0), GRADES, older)
    assert 'set' not in t


def test_the_classes_of_the_sets_are_those_of_the_decision():
    table = predictions(50, 0)
    sets = choose_sets(table, GRADES)
    decision = Decision(sets=sets)
    with pytest.raises(SchemaError, match=r'decision\.sets\.classes'):
        decision.check(['a', 'b'])


def test_with_two_classes_the_sets_do_not_depend_on_the_temperature():
    table = predictions(80, 0)
    classes = ['no', 'yes']
    two = table[['group']].copy()
    two['target'] = np.where(table.target == '0', 'no', 'yes')
    two['p_no'] = table.p_0
    two['p_yes'] = 1 - table.p_0
    decision = choose_decision(two, classes)
    with_temperature = apply_decision(two, classes, decision)
    sets = choose_sets(two, classes)
    plain = sets.words(two[['p_no', 'p_yes']])
    assert with_temperature.set.tolist() == plain


def test_the_report_shows_the_coverage_by_class():
    heading = '<h2>Prediction sets</h2>'
    valid = predictions(100, 0)
    new = predictions(60, 1)
    decision = choose_decision(valid, GRADES)
    t = apply_decision(new, GRADES, decision)
    t['image'] = t.image.astype(str)
    t['prediction'] = t.target
    t['data_site'] = np.where(t.group < 30, 'north', 'south')
    about = {
        'arch': 'net',
        'reader': 'photo',
        'decision': decision.to_dict(),
    }
    e = Evaluation(t, GRADES, about, source_col='data_site')
    page = report_html(e, n=20)
    _, _, rest = page.partition(heading)
    section, _, _ = rest.partition('<h2>')
    assert '<th>all images</th>' in section
    assert '<th>class 3</th>' in section
    assert 'calibrated on 100 groups' in section
    by_folds = replace(e, how='by folds')
    assert heading not in report_html(by_folds, n=20)
    without = replace(e, about={'arch': 'net'})
    assert heading not in report_html(without, n=20)


def test_words_say_whether_patients_or_images_calibrated_the_sets():
    table = predictions(60, 0)
    with_groups = choose_decision(table, GRADES)
    images = table.assign(group=None)
    without = choose_decision(images, GRADES)
    words = without.set_words
    assert 'calibrated on 60 groups (patients)' in with_groups.set_words
    assert f'calibrated on {len(table)} images' in words
    assert 'patients' not in words
    saved = without.to_dict()
    assert Decision.from_dict(saved) == without


@pytest.mark.parametrize('groups', ['none', 'missing'])
def test_too_few_images_without_patients_are_called_images(groups):
    table = predictions(8, 0, eyes=1)
    table = table.drop(columns='group') if groups == 'none' else table.assign(group=None)
    with pytest.raises(ValueError, match=r'^8 images: .* need 9 or more.*Add images, or require') as e:
        choose_sets(table, NAMES)
    assert 'patients' not in str(e.value)
