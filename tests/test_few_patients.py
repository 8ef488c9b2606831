"Test operating points and intervals with few patients, and the messages of reports and `train` about them."

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from dr_transfer.commands import subcommands as commands
from dr_transfer.data.ct_images import froc_table
from dr_transfer.evaluation.compare import Comparison, plot_comparison
from dr_transfer.evaluation.cross_validation import decide_across
from dr_transfer.evaluation.report import Evaluation, describe_images, endpoint_table
from dr_transfer.evaluation.report_page import report_html
from dr_transfer.explain.activations import plot_neighbors
from dr_transfer.explain.grad_cam import plot_grad_cam_tables
from dr_transfer.inference.run import validation_table
from dr_transfer.metrics.decision import Decision, choose_decision, question
from dr_transfer.metrics.intervals import bootstrap, fraction_interval, paired_difference
from dr_transfer.metrics.operating_point import (
    OperatingPointError,
    choose_operating_point,
    groups_in,
    operating_table,
)
from dr_transfer.metrics.scores import accuracy, auc
from dr_transfer.metrics.screening import (
    compare_tables,
    interval_note,
    measure_table,
    plot_roc,
    roc_band,
    subgroup_table,
)

TWO = ['no', 'referable']


def table(patients, each, seed=0, positive=0.5):
    "Predictions of several images of each patient, all of one class."
    rng = np.random.default_rng(seed)
    positive_image = np.repeat(np.arange(patients) < positive * patients, each)
    p = 1 / (1 + np.exp(-np.where(positive_image, 1, -1) - rng.normal(0, 1, len(positive_image))))
    return pd.DataFrame(
        {
            'image': [f'{i}.jpg' for i in range(len(positive_image))],
            'target': np.where(positive_image, *TWO[::-1]),
            'group': np.repeat([f'p{i}' for i in range(patients)], each),
            'p_no': 1 - p,
            'p_referable': p,
        }
    )


def arrays(t):
    q = question(t, TWO)
    return q.y, q.score


# ---------------------------------------------------------------- the operating point


@pytest.mark.parametrize(
    'wanted, side',
    [
        ('sensitivity', 'positive'),
        ('specificity', 'negative'),
    ],
)
def test_patients_are_counted_and_not_their_images(wanted, side):
    few = table(20, 10)
    many = table(60, 2)
    words = rf'100 {side} validation images of 10 groups \(patients\).*fewer than 30 groups.*Add patients'
    with pytest.raises(OperatingPointError, match=words):
        choose_operating_point(*arrays(few), **{wanted: 0.9}, groups=few.group)
    assert choose_operating_point(*arrays(few), **{wanted: 0.9}).positives == 100, (
        'images without groups are not independent'
    )
    with_groups = choose_operating_point(*arrays(many), **{wanted: 0.9}, groups=many.group)
    assert with_groups == choose_operating_point(*arrays(many), **{wanted: 0.9}), 'groups change the threshold'


def test_29_and_30_patients():
    for n, right in ((29, False), (30, True)):
        y = np.repeat([1, 0], [3 * n, 9])
        groups = [*np.repeat(np.arange(n), 3), *['other'] * 9]
        if right:
            choose_operating_point(y, np.arange(len(y)), sensitivity=0.9, groups=groups)
        else:
            with pytest.raises(OperatingPointError, match='of 29 groups'):
                choose_operating_point(y, np.arange(len(y)), sensitivity=0.9, groups=groups)


def test_an_image_without_a_group_is_its_own_group_and_a_patient_may_count_in_both_classes():
    y = np.array([1, 0, 1, 1, 0, 0])
    groups = ['a', 'a', 'a', None, None, float('nan')]
    assert groups_in(y == 1, groups) == 2
    assert groups_in(y == 0, groups) == 3
    assert groups_in(y == 1) is None
    assert groups_in(y == 1, [None] * 6) is None
    assert groups_in(y == 1, ['1', 1, 1.0, '01', 2, 2]) == 1
    with pytest.raises(ValueError, match='5 groups for 6 images'):
        groups_in(y == 1, groups[:5])


def test_without_groups_the_unit_is_the_image():
    with pytest.raises(OperatingPointError, match=r'^12 positive validation images: .* fewer than 30. Add images'):
        choose_operating_point([1] * 12 + [0] * 99, np.arange(111.0), sensitivity=0.9, groups=[None] * 111)


def test_a_decision_takes_the_groups_of_its_table_and_keeps_their_number():
    few = table(20, 10)
    d = choose_decision(few, TWO, sensitivity=0.9)
    assert d.operating is None
    assert 'of 10 groups (patients)' in d.not_chosen[0]
    assert d.point_words == ''
    d = choose_decision(few.drop(columns='group'), TWO, sensitivity=0.9)
    assert d.operating is not None
    assert d.positive_groups is None
    assert 'not as patients' in d.point_words
    d = choose_decision(table(100, 4, positive=0.4), TWO, specificity=0.8)
    assert (d.operating.positives, d.operating.negatives, d.positive_groups, d.negative_groups) == (160, 240, 40, 60)
    assert '160 positive and 240 other validation images, of 40 and 60 groups (patients)' in d.point_words
    assert Decision.from_dict(json.loads(json.dumps(d.to_dict()))) == d


def test_folds_decide_by_patients():
    t = table(60, 4).assign(fold=lambda t: t.group.str[1:].astype(int) % 3)
    out, decision = decide_across(t, TWO, sensitivity=0.9)
    assert 'decision' not in out, 'two of three folds have 20 positive patients, in 80 images'
    assert decision.operating is not None
    assert decision.positive_groups == 30


def test_a_decision_of_version_0_1_0_is_read():
    d = choose_decision(table(100, 2), TWO, sensitivity=0.9)
    new = {k: v for k, v in d.to_dict().items() if k not in ('positive_groups', 'negative_groups')}
    assert Decision.from_dict(new).operating == d.operating
    assert Decision.from_dict(new).to_dict() == new
    old_names = {'metric': 'wanted', 'minimum': 'at_least'}
    point = {old_names.get(k, k): v for k, v in new['operating'].items()}
    old = {'temperature': new['temperature'], 'cuts': None, 'operating': point, 'refused': ['why']}
    assert Decision.from_dict(old).operating == d.operating
    assert Decision.from_dict(old).not_chosen == ('why',)


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    'values, groups',
    [
        ([1, 0, 1, 1], ['a'] * 4),
        ([1], None),
        ([0], ['a']),
        ([1, 1], ['01', 1]),
        ([1, 1, 1], ['a'] * 3),
    ],
)
def test_one_group_has_no_interval(values, groups):
    r = bootstrap(np.mean, values, groups=groups, n=20).loc['value']
    assert r.value == np.mean(values)
    assert np.isnan([r.low, r.high]).all()
    value, low, high = fraction_interval(values, groups, n=20)
    assert value == np.mean(values)
    assert np.isnan([low, high]).all()
    d = paired_difference(accuracy, values, values, [0] * len(values), groups=groups, n=20).loc['value']
    assert d.value == np.mean(values)
    assert np.isnan([d.low, d.high]).all()
    assert not np.isnan(bootstrap(np.mean, [0, 1], n=20).loc['value', 'low']), 'two images have no interval'


def test_a_class_of_one_patient_has_no_interval():
    t = table(10, 4, positive=0.1)
    m = measure_table(
        t.assign(decision=np.where(t.p_referable > 0.5, 'referable', 'not referable')), TWO, prevalence=0.1, n=200
    )
    for k in ('sensitivity', 'auc', *(k for k in m.index if 'predictive' in k)):
        assert np.isnan(m.loc[k, 'low']), k
        assert not np.isnan(m.loc[k, 'value']), k
    assert m.loc[['specificity', 'accuracy'], 'low'].notna().all()
    assert any(
        n.startswith('no interval for sensitivity, ') and n.endswith('too few groups (patients) determine it')
        for n in m.attrs['notes']
    )
    y, score = arrays(t)
    assert paired_difference(auc, y, score, score**2, groups=t.group, n=200).low.isna().all()
    band = roc_band(question(t, TWO), t.group, n=50)
    assert band.low.isna().all()
    assert band.sensitivity.notna().all()
    assert plot_roc(question(t, TWO), None, t.group, n=20).axes[0].get_legend() is None
    assert np.isnan(operating_table(y, y == 1, t.group, n=20).loc['sensitivity', 'low'])


def test_the_note_gives_the_reason_for_a_missing_interval():
    t = table(1, 6, positive=1)
    assert 'all images are of one group (patient)' in interval_note(t)
    assert 'there is one image' in interval_note(t[:1].drop(columns='group'))
    m = measure_table(t, TWO, n=20)
    assert m.low.isna().all()
    assert len(m.attrs['notes']) == 1
    assert interval_note(table(6, 2)) == '95 % intervals over 6 groups (patients)'


def test_other_tables_and_figures_work_without_an_interval():
    a = table(1, 8, positive=1)
    b = table(1, 8, 1, positive=1)
    a.loc[:3, 'target'] = b.loc[:3, 'target'] = 'no'
    assert compare_tables(a, b, TWO, n=20)[['low', 'high']].isna().all(axis=None)
    c = Comparison({'one': a, 'two': b}, TWO).table(20)
    assert c[['low', 'high', 'difference_low']].isna().all(axis=None)
    assert c.value.notna().any()
    assert plot_comparison(c).axes
    assert 'nan' not in c.xs('auc', level='metric').round(3).to_string(na_rep='')
    froc = froc_table(pd.DataFrame({'target': ['node', 'lung'], 'p_node': [0.9, 0.2], 'group': 'p1'}), n=20)
    assert froc.low.isna().all()
    assert froc.value.notna().all()
    gone = pd.DataFrame({'value': [0.5], 'low': np.nan, 'high': np.nan, 'chance': 0.2}, index=['stage1'])
    assert plot_neighbors({'net': gone}).axes
    names = (
        'fraction of Grad-CAM on the mask',
        'maximum on the mask',
        *(
            f'chance: {c}'
            for c in (
                'fraction of the area',
                'Grad-CAM of other images',
                'Grad-CAM rotated',
                'fraction of the area with the margin',
                'maximum of other images',
                'fraction of the area',
            )
        ),
    )
    assert plot_grad_cam_tables(
        {'net': pd.DataFrame({'value': 0.5, 'low': np.nan, 'high': np.nan}, index=list(dict.fromkeys(names)))}
    ).axes


# ---------------------------------------------------------------- the report


def page(t, reader='fundus', n=20, **kw):
    decision = choose_decision(table(80, 2, 3), TWO, sensitivity=0.9)
    return report_html(Evaluation(t, TWO, {'arch': 'net', 'reader': reader, 'decision': decision}, **kw), n=n)


def test_the_report_of_one_patient_shows_no_certainty():
    t = table(1, 40, positive=1).assign(data_camera=['A', 'B'] * 20)
    t.loc[:19, 'target'] = 'no'
    text = page(t)
    shown = re.sub('base64,[^"]*', '', text)
    assert 'no interval: too few' in shown
    assert 'undecided: too few for an interval' in shown
    assert 'all images are of one group (patient)' in shown
    assert 'nan' not in re.sub('<[^>]*>', ' ', shown).lower().split()
    assert '[nan' not in shown
    assert not re.search(r'(\d\.\d{3}) \[\1, \1\]', shown)
    s = subgroup_table(t, TWO, ['data_camera'], n=20)
    assert s[('auc', 'low')].isna().all()
    assert s[('auc', 'value')].notna().all()


def test_an_endpoint_without_an_interval_is_open():
    m = pd.DataFrame(
        {'value': [1.0, 0.5], 'low': np.nan, 'high': np.nan, 'images': 3}, index=['sensitivity', 'specificity']
    )
    assert endpoint_table(m)['result'].tolist() == ['undecided: too few for an interval'] * 2
    assert endpoint_table(m).measured.tolist() == ['100.0%', '50.0%']


ABOUT_EYES = ('other diseases of the eye', 'first cleared autonomous system', 'if at least one eye is')


@pytest.mark.parametrize(
    'reader, about_eyes',
    [
        ('fundus', True),
        ('fundus_ben_graham', True),
        ('photo', False),
        (None, False),
    ],
)
def test_only_a_report_of_fundus_images_mentions_eyes(reader, about_eyes):
    text = page(table(60, 2), reader)
    for words in ABOUT_EYES:
        assert (words in text) == about_eyes, words
    assert 'These results apply to images like these 120' in text
    assert ('They do not apply to images from other sources' in text) != about_eyes
    assert 'Operating point: positive from' in text
    assert 'of 40 and 40 groups (patients)' in text


def test_the_reader_reaches_the_report(tmp_path):
    from PIL import Image

    t = table(4, 1).assign(image=lambda t: [str(tmp_path / i) for i in t.image])
    for i in t.image:
        Image.new('RGB', (32, 32), (90, 60, 30)).save(i)
    assert describe_images(t, TWO, {'arch': 'net'}, 'fundus').fundus
    assert not describe_images(t, TWO, {'arch': 'net'}, 'photo').fundus


def test_the_column_of_the_patients_is_shown_once():
    line = "patients: column 'pid', 60 groups"
    text = page(table(60, 2), patients=line)
    assert '<th>column of the patients or groups</th><td>patients: column &#39;pid&#39;, 60 groups</td>' in text
    assert text.count('60 groups<') == 1
    assert 'column of the patients' not in page(table(60, 2))


def test_subgroups_show_how_many_images_they_have():
    "The column was empty because its values had another index than the rows."
    t = table(60, 2).assign(data_camera=['A'] * 40 + ['B'] * 80)
    shown = re.search(r'<th>camera: A</th><td>(.*?)</td>.*<th>camera: B</th><td>(.*?)</td>', page(t))
    assert shown.groups() == ('40', '80')


# ---------------------------------------------------------------- what training prints


EPOCHS = 'metrics of the epochs are of the most probable class, from one view'


@pytest.mark.parametrize(
    'views, words',
    [
        (
            'none',
            'predictions from one view of each image; metrics of the epochs are of the most probable class',
        ),
        ('quarter_turns', f'predictions averaged over 4 views of each image; {EPOCHS}'),
        ('mirror', f'predictions averaged over 2 views of each image; {EPOCHS}'),
    ],
)
def test_the_views_of_the_validation_metrics_are_reported(views, words):
    assert validation_table(table(5, 4), TWO, views, n=20).attrs['notes'][0] == f'20 validation images, {words}'


@pytest.mark.parametrize('gap', [{'auc': 0.1234, 'accuracy': -0.05}, None])
def test_train_prints_the_gap_and_the_decision(monkeypatch, capsys, gap):
    t = table(100, 2)
    record = SimpleNamespace(decision=choose_decision(t, TWO, sensitivity=0.9), gap=gap)
    monkeypatch.setattr(
        'dr_transfer.inference.run.write_run',
        lambda learn, folder, point: validation_table(t, TWO, 'quarter_turns', n=20),
    )
    commands._write_run(SimpleNamespace(record=record), None, {})
    output = capsys.readouterr().out
    start = 'training minus validation (of the most probable class; a large gap means overfitting): '
    assert (f'{start}auc 0.123, accuracy -0.050\n' in output) == bool(gap)
    assert 'validation: 200 validation images, predictions averaged over 4 views' in output
    assert 'operating point: positive from' in output
    assert 'of 50 and 50 groups (patients)\n' in output
