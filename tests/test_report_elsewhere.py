"Test the section of the report about sources: the model as it is, with local labels, and whether it holds."

import re
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dr_transfer.data.sources import sources_line, was_trained_on
from dr_transfer.evaluation.by_source import by_source_table
from dr_transfer.evaluation.elsewhere import (
    LABELLED,
    hold_words,
    plot_referral,
    recalibrated_values,
    references,
    source_values,
)
from dr_transfer.evaluation.elsewhere_page import elsewhere_html
from dr_transfer.evaluation.report import Evaluation
from dr_transfer.evaluation.report_page import report_html
from dr_transfer.metrics.classes import Classes
from dr_transfer.metrics.decision import apply_decision, choose_decision
from dr_transfer.metrics.operating_point import operating_table
from dr_transfer.metrics.prediction_sets import coverage_table
from dr_transfer.metrics.screening import referral_table

TWO = ['no', 'referable']
FLOWERS = Classes(('daisy', 'rose', 'tulip'))


def predictions(n, seed, source='home', shift=0.0, prevalence=0.4):
    "Predictions of two images for each of n patients; a shift of the log-odds is what another camera does."
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.random(n) < prevalence, 2)
    noise = rng.normal(0, 1.2, 2 * n)
    log_odds = np.where(y, 1.5, -1.5) + noise + shift
    p = 1 / (1 + np.exp(-log_odds))
    patients = np.repeat(np.arange(n), 2)
    return pd.DataFrame(
        {
            'image': [f'{source}{i}.png' for i in range(2 * n)],
            'target': np.where(y, 'referable', 'no'),
            'prediction': np.where(p > 0.5, 'referable', 'no'),
            'group': [f'{source} {i}' for i in patients],
            'source': source,
            'p_no': 1 - p,
            'p_referable': p,
        }
    )


DECISION = choose_decision(predictions(400, 0), TWO, sensitivity=0.9)


def decided(*parts):
    "Predictions of several sources with the decision of the model."
    t = pd.concat(parts, ignore_index=True)
    return apply_decision(t, TWO, DECISION)


def section(e, n=20):
    "The section as a reader sees it."
    return text_of(elsewhere_html(e, n))


def evaluation(table, trained=None, **kw):
    "An evaluation whose source column is `data_site`."
    about = {'arch': 'net', 'reader': 'photo', 'decision': DECISION}
    if trained:
        about['training'] = {'data': {'sources': trained}}
    t = table.rename(columns={'source': 'data_site'})
    return Evaluation(t, TWO, about, source_col='data_site', **kw)


def text_of(html):
    "What a reader sees, without figures."
    shown = re.sub('<[^>]*>', ' ', re.sub('base64,[^"]*', '', str(html)))
    return ' '.join(shown.split())


def curve_names(t):
    "Names of the referral curves."
    ax = plot_referral(t, TWO, DECISION).axes[0]
    _, names = ax.get_legend_handles_labels()
    return names


HOME = predictions(150, 4)
AWAY = predictions(250, 2, 'away', shift=-2)


# ---------------------------------------------------------------- values


def test_a_threshold_fails_where_scores_are_lower_and_local_labels_restore_it():
    t = decided(HOME, AWAY)
    values = source_values(t, TWO, DECISION)
    local = recalibrated_values(t, TWO, DECISION)
    assert values.loc['away', 'sensitivity high'] < 0.6
    assert values.loc['home', 'sensitivity'] > 0.85
    for number in LABELLED:
        row = local.loc[('away', number)]
        low = row['sensitivity low']
        high = row['sensitivity high']
        assert row.sensitivity == pytest.approx(0.9, abs=0.04)
        assert low < row.sensitivity < high
        assert row.specificity < values.loc['away', 'specificity']
    words = hold_words(values, references(DECISION))
    assert words.startswith('Does the performance (sensitivity, specificity, coverage) hold? It holds at home; it does')
    assert 'it does not hold at away: sensitivity 0.' in words
    assert 'instead of 0.900 (required)' in words


def test_values_of_a_source_are_those_of_its_images_alone():
    t = decided(HOME, AWAY)
    values = source_values(t, TWO, DECISION, n=50)
    for source in ('home', 'away'):
        one = t[t.source == source]
        y = (one.target == 'referable').to_numpy()
        positive = (one.decision == 'referable').to_numpy()
        expected = operating_table(y, positive, one.group, n=50)
        coverage = coverage_table(one, DECISION.sets, n=50).loc[('all', 'all')]
        row = values.loc[source]
        for metric in ('sensitivity', 'specificity'):
            of_metric = expected.loc[metric]
            assert row[metric] == of_metric.value
            assert row[f'{metric} low'] == of_metric.low
            assert row[f'{metric} high'] == of_metric.high
        assert row['coverage low'] == coverage.low
        assert row.groups == one.group.nunique()


def test_draws_are_of_patients_and_do_not_depend_on_other_sources():
    "With one patient's images twice, nothing changes; with one score for all images, all are positive."
    alone = recalibrated_values(decided(AWAY), TWO, DECISION)
    both = recalibrated_values(decided(HOME, AWAY), TWO, DECISION)
    pd.testing.assert_frame_equal(alone.loc[['away']], both.loc[['away']])
    twice = decided(AWAY, AWAY)
    pd.testing.assert_frame_equal(recalibrated_values(twice, TWO, DECISION), alone)
    same = decided(AWAY).assign(p_no=0.5, p_referable=0.5)
    row = recalibrated_values(same, TWO, DECISION).loc[('away', 50)]
    assert row.sensitivity == 1
    assert row.specificity == 0


def test_images_count_alone_without_groups():
    t = decided(AWAY.drop(columns='group'))
    local = recalibrated_values(t[:40], TWO, DECISION)
    assert local.loc[('away', 50), 'why'] == 'too few patients (40)'
    both = decided(HOME, AWAY)
    without = both.drop(columns='group')
    assert '25 labelled images' in section(evaluation(without))


def with_specificity(**images):
    "A decision for a required specificity, and the values of another source as it is and with local labels"
    decision = choose_decision(predictions(400, 0), TWO, specificity=0.8)
    t = apply_decision(predictions(source='away', **images), TWO, decision)
    return decision, source_values(t, TWO, decision), recalibrated_values(t, TWO, decision)


def test_a_required_specificity_is_decided_by_negatives():
    _, values, local = with_specificity(n=250, seed=2, shift=2)
    assert values.loc['away', 'specificity'] < 0.5
    assert local.loc[('away', 100), 'specificity'] == pytest.approx(0.8, abs=0.04)


def test_a_required_specificity_needs_negatives():
    decision, values, local = with_specificity(n=60, seed=3, prevalence=1)
    assert local.loc[('away', 25), 'why'] == 'too few negatives'
    compared = {'specificity': references(decision)['specificity']}
    assert 'cannot be told at away: too few negatives' in hold_words(values, compared)


# ---------------------------------------------------------------- too few


def test_a_source_without_positives_has_no_sensitivity_and_no_new_threshold():
    healthy = predictions(120, 3, 'healthy', prevalence=0)
    t = decided(HOME, healthy)
    values = source_values(t, TWO, DECISION)
    local = recalibrated_values(t, TWO, DECISION)
    assert np.isnan(values.loc['healthy', 'sensitivity'])
    assert set(local.loc['healthy', 'why']) == {'too few positives'}
    assert 'it cannot be told at healthy: too few positives' in hold_words(values, references(DECISION))
    shown = section(evaluation(t))
    assert 'sensitivity not defined, specificity 0.' in shown
    assert 'nan' not in shown.lower().split()


def test_few_positives_are_never_enough():
    "Four positive patients of 40: their images may all be found, but this proves nothing."
    t = predictions(40, 5, 'small', shift=4)
    sick = t.group.isin([f'small {i}' for i in range(4)])
    t = decided(t.assign(target=np.where(sick, 'referable', 'no')))
    assert (t.decision[sick] == 'referable').all()
    compared = {'sensitivity': references(DECISION)['sensitivity']}
    values = source_values(t, TWO, DECISION)
    local = recalibrated_values(t, TWO, DECISION)
    words = hold_words(values, compared)
    assert words == 'Does the performance (sensitivity) hold? It cannot be told at small: too few positives'
    assert local.loc[('small', 25), 'why'] == 'too few positives'


def test_a_source_with_three_images():
    t = decided(HOME, predictions(2, 4, 'tiny')[:3])
    shown = text_of(report_html(evaluation(t), n=50))
    assert 'it cannot be told at tiny: too few' in shown
    assert shown.count('too few patients (2)') == len(LABELLED)
    assert curve_names(t) == ['home (300)']
    assert plot_referral(t[-3:], TWO, DECISION) is None


# ---------------------------------------------------------------- which sources are shown


def test_one_source_is_shown_only_if_the_model_was_not_trained_on_it():
    line = "sources: column 'site', 2 sources: home (300), other (90)"
    of_camera = line.replace('site', 'camera')
    away = decided(AWAY)
    home = decided(HOME)
    assert 'It does not hold at away' in section(evaluation(away, line))
    assert section(evaluation(home, line)) == ''
    assert section(evaluation(away)) == ''  # the sources of the training images are not known
    assert section(evaluation(away, of_camera)) == ''
    without = replace(evaluation(away), source_col='')
    assert '<h2>Elsewhere</h2>' not in report_html(without, n=20)


def test_a_source_with_a_comma_or_brackets_is_found_in_the_line():
    names = ['St. Mary (old), north', 'B', 'B (2)']
    t = pd.DataFrame({'data_site': names * 2})
    t.attrs['source_col'] = 'data_site'
    line = sources_line(t)
    for name in names:
        assert was_trained_on(name, 'data_site', line), name
    assert was_trained_on('C', 'data_site', line) is False
    assert was_trained_on('B', 'data_site', None) is None
    assert was_trained_on('B', 'data_site', 'no source column found: all images count as one source') is None


def test_training_is_stated_where_it_is_known():
    t = decided(HOME, AWAY)
    line = "sources: column 'site', 1 source: home (300)"
    known = section(evaluation(t, line))
    assert 'in training' in known
    assert re.search(r'home 300 150 \d+ yes', known)
    assert re.search(r'away 500 250 \d+ no', known)
    assert 'in training' not in section(evaluation(t))


def test_only_the_largest_sources_are_shown():
    parts = [predictions(20 + i, i, f'site {i:02}') for i in range(14)]
    shown = section(evaluation(decided(*parts)))
    assert 'The 2 smallest sources are not shown' in shown
    assert 'site 13' in shown
    assert 'site 01 ' not in shown
    assert curve_names(decided(*parts)) == [
        'site 13 (66)',
        'site 12 (64)',
        'site 11 (62)',
        'site 10 (60)',
        'site 09 (58)',
        'site 08 (56)',
    ]


def test_folds_that_were_trained_on_each_source_are_not_shown():
    t = decided(HOME, AWAY)
    e = evaluation(t, how=' in folds')
    assert section(e) == ''


def test_folds_by_source_are_shown_without_sets_and_validation():
    "Each source was predicted by a model that was not trained on it; each fold has its own sets."
    t = decided(HOME, AWAY)
    e = evaluation(t, how=' by source')
    e.table.attrs['source_col'] = 'data_site'
    e.by_source = by_source_table(e.table, e.table, TWO, n=20)
    shown = section(e)
    assert 'Sources that were left out of training' in shown
    assert 'Does the performance (sensitivity) hold? It holds at home; it does not hold at away' in shown
    assert re.search(r'home 300 150 \d+ no', shown)
    assert 'in validation' not in shown
    assert 'prediction sets' not in shown


# ---------------------------------------------------------------- the page


def test_the_section_of_the_report():
    e = evaluation(decided(HOME, AWAY))
    page = report_html(e, n=50)
    _, _, rest = page.partition('<h2>Elsewhere</h2>')
    html, _, _ = rest.partition('<h2>')
    shown = text_of(html)
    for words in (
        'It holds at home; it does not hold at away: sensitivity',
        'coverage of the prediction sets [95 % interval]',
        'sensitivity 0.900 (required)',
        'as it is 25 labelled patients 50 labelled patients 100 labelled patients',
        'the labels are those of the evaluated images themselves',
        'for a sensitivity of 90 %',
    ):
        assert words in shown, words
    assert html.count('<img') == 1


def test_the_curves_are_those_of_each_source():
    t = decided(HOME, AWAY)
    ax = plot_referral(t, TWO, DECISION).axes[0]
    assert len(ax.lines) == 2
    for line, source in zip(ax.lines, ('away', 'home')):
        expected = referral_table(t[t.source == source], TWO, DECISION.operating)
        assert line.get_ydata().tolist() == expected.accuracy.tolist()


def test_names_of_sources_are_escaped():
    t = decided(HOME, AWAY).replace({'source': {'away': '<b>$a_b^</b>', 'home': '_' * 300}})
    html = elsewhere_html(evaluation(t), n=20)
    assert '<b>$' not in html
    assert '&lt;b&gt;$a_b^' in html


def flowers(n, seed, source, noise):
    "Predictions of three classes, none of which is positive."
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=n)
    truth = np.eye(3)[y]
    errors = rng.normal(0, noise, (n, 3))
    odds = np.exp(3 * truth + errors)
    probs = odds / odds.sum(1, keepdims=True)
    names = np.array(FLOWERS.names)
    t = pd.DataFrame(probs, columns=['p_daisy', 'p_rose', 'p_tulip'])
    t['image'] = [f'{source}{i}.png' for i in range(n)]
    t['target'] = names[y]
    t['prediction'] = names[probs.argmax(1)]
    t['data_site'] = source
    return t


def test_without_a_positive_class_there_is_accuracy_and_no_threshold():
    decision = choose_decision(flowers(200, 0, 'garden', 1), FLOWERS)
    garden = flowers(200, 1, 'garden', 1)
    meadow = flowers(200, 2, 'meadow', 4)
    both = pd.concat([garden, meadow], ignore_index=True)
    t = apply_decision(both, FLOWERS, decision)
    e = Evaluation(t, FLOWERS, {'arch': 'net', 'decision': decision}, source_col='data_site')
    shown = section(e)
    assert 'accuracy [95 % interval]' in shown
    assert 'It holds at garden; it does not hold at meadow: coverage 0.' in shown
    for words in ('sensitivity', 'labelled', 'threshold'):
        assert words not in shown, words
    assert 'Does the performance (coverage; there is no reference for the accuracy) hold?' in shown
    plain = Evaluation(both, FLOWERS, {'arch': 'net'}, source_col='data_site')
    words = 'Whether the accuracy holds cannot be told: the model has no operating point'
    assert words in section(plain)


def test_a_thousand_images_take_seconds():
    parts = [predictions(125, i, f'site {i}') for i in range(4)]
    t = decided(*parts)
    start = time.process_time()
    recalibrated_values(t, TWO, DECISION)
    assert time.process_time() - start < 4  # 0.4 s on an idle machine
