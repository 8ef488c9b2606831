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
    table = pd.DataFrame(odds / odds.sum(1, keepdims=True), columns=[f'p_{c}' for c in NAMES])
    return table.assign(target=y.astype(str), group=np.repeat(np.arange(n), eyes), image=np.arange(n * eyes))


def arrays(table):
    return table.target.astype(int).to_numpy(), table[[f'p_{c}' for c in NAMES]].to_numpy()


def covered(sets, table):
    y, p = arrays(table)
    return sets.apply(p)[np.arange(len(y)), y]


@pytest.mark.parametrize('n', [9, 10, 57, 200])
@pytest.mark.parametrize('coverage', [0.7, 0.9])
def test_one_image_per_patient_is_ordinary_split_conformal_prediction(n, coverage):
    table = predictions(n, seed=n, eyes=1)
    y, p = arrays(table)
    scores = np.sort(1 - p[np.arange(n), y])
    limit = scores[int(np.ceil((n + 1) * coverage)) - 1]
    new = arrays(predictions(300, seed=1))[1]
    sets = choose_sets(table, NAMES, coverage, allow_empty=True)
    assert np.array_equal(sets.apply(new), 1 - new <= limit + 1e-12)


def test_by_class_each_class_is_calibrated_alone():
    table = predictions(200, seed=0, eyes=1)
    sets = choose_sets(table, NAMES, by_class=True, allow_empty=True)
    for name, threshold in zip(NAMES, sets.thresholds):
        alone = np.sort(table[f'p_{name}'][table.target == name].to_numpy())[::-1]
        assert threshold == alone[int(np.ceil((len(alone) + 1) * 0.9)) - 1]


def test_a_patient_counts_once_however_many_images_there_are():
    table = predictions(60, seed=3, eyes=1)
    copies = pd.concat([table] + [table[:20]] * 9)  # ten copies of the images of some patients
    assert choose_sets(copies, NAMES).thresholds == choose_sets(table, NAMES).thresholds
    assert choose_sets(copies.drop(columns='group'), NAMES).thresholds != choose_sets(table, NAMES).thresholds


@pytest.mark.parametrize('classes', [NAMES, GRADES], ids=['names', 'grades'])
def test_the_coverage_over_many_calibrations_is_the_required_one(classes):
    new = predictions(4000, seed=10_000)
    n = 40
    draws = 150
    rate = [covered(choose_sets(predictions(n, s), classes, allow_empty=True), new).mean() for s in range(draws)]
    chance = 3 * np.std(rate) / draws**0.5
    assert 0.9 - chance < np.mean(rate) < 0.9 + 2 / (n + 1) + chance


def test_the_coverage_of_each_class_is_the_required_one():
    new = predictions(4000, seed=10_000)
    rates = []
    for seed in range(100):
        found = covered(choose_sets(predictions(150, seed), NAMES, by_class=True, allow_empty=True), new)
        rates.append([found[new.target == c].mean() for c in NAMES])
    chance = 3 * np.std(rates, axis=0) / len(rates) ** 0.5
    assert (np.mean(rates, axis=0) > 0.9 - chance).all(), np.mean(rates, axis=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([0.6, 0.8, 0.9]))
def test_sets_of_grades_have_no_gaps_and_are_not_empty(seed, by_class, coverage):
    sets = choose_sets(predictions(120, seed % 7), GRADES, coverage, by_class=by_class)
    probs = np.random.default_rng(seed).dirichlet(np.full(4, 0.3), 50)
    member = sets.apply(probs)
    assert (np.abs(np.diff(member.astype(int), axis=1, prepend=0, append=0)).sum(1) == 2).all()
    level = np.array(sets.thresholds)
    assert (member | ~(probs >= level)).all(), 'what reaches its threshold is in the set'


def test_too_few_patients_are_refused_with_the_number_that_is_needed():
    with pytest.raises(ValueError, match=r'8 groups .* need 9 or more.*Add patients, .* of 88% or less'):
        choose_sets(predictions(8, 0), NAMES)
    assert choose_sets(predictions(8, 0), NAMES, coverage=0.88).groups == 8
    choose_sets(predictions(9, 0), NAMES)
    with pytest.raises(ValueError, match=r'need 99 or more'):
        choose_sets(predictions(50, 0), NAMES, coverage=0.99)
    with pytest.raises(ValueError, match=r'3 images have no probabilities'):
        table = predictions(50, 0)
        choose_sets(table.assign(p_0=table.p_0.where(table.index >= 3)), NAMES)


def test_a_class_with_too_few_patients_is_in_every_set():
    table = predictions(200, 0)
    with_3 = table.target == '3'
    few = table.group[with_3].unique()[:8]
    rare = table[~with_3 | table.group.isin(few)]
    sets = choose_sets(rare, NAMES, by_class=True)
    assert sets.always == ('3',)
    assert sets.apply(arrays(table)[1])[:, 3].all()
    none = choose_sets(table[table.target != '3'], NAMES, by_class=True)
    assert none.always == ('3',)


def test_an_image_without_a_prediction_has_no_set():
    sets = choose_sets(predictions(50, 0), GRADES)
    probs = np.array([[np.nan] * 4, [0.97, 0.01, 0.01, 0.01]])
    assert sets.words(probs) == ['', '0']
    assert not sets.apply(probs)[0].any()


def test_a_set_in_a_file_is_checked():
    sets = choose_sets(predictions(50, 0), GRADES)
    assert PredictionSets.from_dict(sets.to_dict()) == sets
    for change in ({'thresholds': [0.1]}, {'coverage': 2}, {'classes': 'abcd'}, {'extra': 1}):
        with pytest.raises(SchemaError):
            PredictionSets.from_dict({**sets.to_dict(), **change})


def test_the_table_of_coverage_counts_images_and_patients_by_class_and_source():
    table = predictions(100, 1).assign(source=lambda t: np.where(t.group < 40, 'A', 'B'))
    sets = choose_sets(predictions(100, 0), GRADES)
    t = coverage_table(table, sets, ['source'], n=50)
    assert t.loc[('all', 'all'), 'groups'] == 100
    assert t.loc[('source', 'A'), 'images'] == 80
    assert t.loc['class'].images.sum() == 200
    assert np.isclose(t.loc[('all', 'all'), 'coverage'], covered(sets, table).mean())
    assert (t.low <= t.coverage).all()
    assert (t.coverage <= t.high).all()


def test_one_referral_curve_for_each_source():
    table = predictions(100, 1).assign(source=lambda t: np.where(t.group < 40, 'A', 'B'))
    both = referral_table(table, GRADES, column='source')
    assert list(both) == ['source', 'referred', 'remaining', 'accuracy']
    alone = referral_table(table[table.source == 'A'], GRADES)
    pd.testing.assert_frame_equal(both[both.source == 'A'].drop(columns='source').reset_index(drop=True), alone)


# ---------------------------------------------------------------- in a decision


def test_a_decision_has_sets_and_the_table_a_column():
    valid = predictions(100, 0)
    decision = choose_decision(valid, GRADES)
    assert decision.sets.groups == 100
    assert Decision.from_dict(decision.to_dict()) == decision
    new = predictions(50, 1).assign(error='')
    new.loc[0, [f'p_{c}' for c in NAMES]] = np.nan
    t = apply_decision(new, GRADES, decision)
    assert t.set[0] == ''
    probs = t[[f'p_{c}' for c in NAMES]]
    assert t.set.tolist() == decision.sets.words(probs)


def test_few_patients_are_a_reason_and_older_decisions_have_no_sets():
    few = choose_decision(predictions(8, 0, eyes=20), GRADES)
    assert few.sets is None
    assert any(w.startswith('no prediction sets: 8 groups') for w in few.not_chosen)
    assert 'sets' not in Decision().to_dict()
    assert 'set' not in apply_decision(predictions(8, 0), GRADES, Decision())
    with pytest.raises(SchemaError, match=r'decision\.sets\.classes'):
        Decision(sets=choose_sets(predictions(50, 0), GRADES)).check(['a', 'b'])


def test_with_two_classes_the_sets_do_not_depend_on_the_temperature():
    table = predictions(80, 0)
    two = pd.DataFrame({'target': np.where(table.target == '0', 'no', 'yes'), 'group': table.group, 'p_no': table.p_0})
    two = two.assign(p_yes=1 - two.p_no)
    with_temperature = apply_decision(two, ['no', 'yes'], choose_decision(two, ['no', 'yes']))
    plain = choose_sets(two, ['no', 'yes']).words(two[['p_no', 'p_yes']])
    assert with_temperature.set.tolist() == plain


def test_the_report_shows_the_coverage_by_class():
    decision = choose_decision(predictions(100, 0), GRADES)
    t = apply_decision(predictions(60, 1), GRADES, decision)
    t = t.assign(image=t.image.astype(str), prediction=t.target, data_site=np.where(t.group < 30, 'north', 'south'))
    about = {'arch': 'net', 'reader': 'photo', 'decision': decision.to_dict()}
    e = Evaluation(t, GRADES, about, source_col='data_site')
    page = report_html(e, n=20)
    section = page.partition('<h2>Prediction sets</h2>')[2].partition('<h2>')[0]
    for words in ('<th>all images</th>', '<th>class 3</th>', 'calibrated on 100 groups'):
        assert words in section, words
    assert '<h2>Prediction sets</h2>' not in report_html(replace(e, how='by folds'), n=20)
    assert '<h2>Prediction sets</h2>' not in report_html(replace(e, about={'arch': 'net'}), n=20)


def test_words_say_whether_patients_or_images_calibrated_the_sets():
    table = predictions(60, 0)
    with_groups = choose_decision(table, GRADES)
    without = choose_decision(table.assign(group=None), GRADES)
    assert 'calibrated on 60 groups (patients)' in with_groups.set_words
    assert f'calibrated on {len(table)} images' in without.set_words
    assert 'patients' not in without.set_words
    assert type(without).from_dict(without.to_dict()) == without


@pytest.mark.parametrize('groups', ['none', 'missing'])
def test_too_few_images_without_patients_are_called_images(groups):
    table = predictions(8, 0, eyes=1)
    table = table.drop(columns='group') if groups == 'none' else table.assign(group=None)
    with pytest.raises(ValueError, match=r'^8 images: .* need 9 or more.*Add images, or require') as e:
        choose_sets(table, NAMES)
    assert 'patients' not in str(e.value)
