"Test that a column of the user is never mistaken for a prediction of the model."

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import GRADES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dr_transfer.data.leaks import leak_report
from dr_transfer.data.split import split_table
from dr_transfer.data.table import data_names, label_table
from dr_transfer.data.tasks import Target, encode_target
from dr_transfer.evaluation.report import (
    Evaluation,
    describe_images,
    evaluate_model,
)
from dr_transfer.evaluation.report_page import _subgroups, report_html, write_report
from dr_transfer.metrics.classes import as_classes
from dr_transfer.metrics.decision import Decision, decisions, question, table_arrays
from dr_transfer.metrics.plots import pick_examples
from dr_transfer.metrics.screening import (
    by_patient,
    main_metric,
    measure_table,
    metric_names,
    patient_classes,
    worst_errors,
)

N = 40


def number(path):
    return int(str(path).rsplit('/', 1)[-1].split('.')[0])


class Model:
    "What `evaluate_model` needs of a model; its probabilities depend on the name of the image"

    def __init__(self, classes, decision=None, **about):
        self.classes = as_classes(classes)
        self.about = {'reader': 'photo', 'classes': list(classes), 'decision': decision, **about}
        self.card = SimpleNamespace(decision=decision and Decision.from_dict(decision))

    def probs(self, images, views=None, average=True):
        k = len(self.classes)
        rows = [np.random.default_rng(number(i)).dirichlet(np.ones(k)) + 1.1 * np.eye(k)[number(i) % k] for i in images]
        p = np.array(rows) / 2.1
        return p if average else np.repeat(p[:, None], 4, 1)

    def outputs(self, images):
        return self.probs(images), np.full(len(images), 0.5)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Small images of two patients in twenty, all different"
    root = tmp_path_factory.mktemp('set')
    for i in range(N):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(root / f'{i}.png')
    return root


def labels(k):
    rng = np.random.default_rng(1)
    right = rng.random(N) < 0.8
    grade = np.where(right, np.arange(N), rng.integers(0, k, N)) % k
    return pd.DataFrame(
        {
            'image': [f'{i}.png' for i in range(N)],
            'label': grade.astype(str),
            'patient': [f'p{i // 2}' for i in range(N)],
        }
    )


def evaluated(folder, model, table, **kwargs):
    known = dict(image_col='image', label_col='label', group_col='patient')
    t = label_table(folder, table, verify=False, **known)
    with_class = encode_target(t, Target('class', tuple(model.classes)))
    e = evaluate_model(model, with_class, **{'turns': 4, **kwargs})
    return e, measure_table(e.table, e.classes, e.point, n=5)


DECISION = {
    'temperature': 1.3,
    'cuts': None,
    'not_chosen': [],
    'operating': {
        'threshold': 0.4,
        'metric': 'sensitivity',
        'minimum': 0.9,
        'positives': 50,
        'negatives': 50,
        'sensitivity': 0.92,
        'specificity': 0.8,
    },
}
MODELS = {
    'two': Model(['0', '1'], DECISION),
    'three': Model(['0', '1', '2']),
    'grades': Model(GRADES, {**DECISION, 'cuts': [0.5, 1.5, 2.5, 3.5]}),
}
ADDED = [
    'decision',
    'grade',
    'known',
    'prediction',
    'gradability',
    'gradable',
    'reason',
    'light',
    'focus',
    'p_no',
    'p_0',
    'p_1',
    'p_age',
    'p_id',
    'format',
    'pixels',
    'error',
    'fold',
    'target',
    'name',
    'group',
    'images',
    'index',
    'self',
    'data_site',
    'width',
    'level',
    '_row',
    'said',
    'set',
]


CONTENTS = {
    'labels': lambda t: t.label,
    'decisions': lambda t: ['referable'] * N,
    'empty': lambda t: [''] * N,
    'numbers': lambda t: np.linspace(0, 1, N),
}


def test_no_image_is_turned_if_that_is_asked(folder):
    model = MODELS['two']
    table = labels(2)
    e, _ = evaluated(folder, model, table, turns=0)
    assert e.turns is None
    assert len(e.table) == N
    with pytest.raises(ValueError, match='turns=-1: give the number'):
        evaluated(folder, model, table, turns=-1)


@pytest.fixture(scope='module')
def plain(folder):
    return {kind: evaluated(folder, m, labels(len(m.classes))) for kind, m in MODELS.items()}


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('content', CONTENTS)
def test_columns_of_the_user_change_no_value_and_are_kept(folder, tmp_path, plain, kind, content):
    "All of them at once, from a file; the next test has each alone."
    model = MODELS[kind]
    table = labels(len(MODELS[kind].classes))
    before, want = plain[kind]
    table.assign(**{'x': CONTENTS[content](table)}).pipe(
        lambda t: t.assign(**{c: t.x for c in ADDED if c != 'self'}, **{'data_self': t.x})
    ).drop(columns='x').to_csv(tmp_path / 'l.csv', index=False)
    e, m = evaluated(folder, model, tmp_path / 'l.csv')
    pd.testing.assert_frame_equal(m, want)
    pd.testing.assert_frame_equal(e.table[list(before.table)], before.table)
    assert set(e.table) - set(before.table) == {c if c.startswith('data_') else f'data_{c}' for c in ADDED}


@pytest.mark.parametrize('column', ADDED)
def test_each_column_of_the_user_keeps_its_own_name(folder, plain, column):
    before, want = plain['grades']
    table = labels(5)
    table[column] = table.label
    e, m = evaluated(folder, MODELS['grades'], table)
    pd.testing.assert_frame_equal(m, want)
    name = column if column.startswith('data_') else f'data_{column}'
    assert [c for c in e.facts if c not in before.facts] == [name]
    result = e.table[name].tolist()
    assert result == e.table.label.tolist()


COLUMN = st.one_of(
    st.sampled_from(ADDED), st.text(st.characters(blacklist_categories=['Cs', 'Cc']), min_size=1, max_size=12)
)
CELL = st.one_of(st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.none())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns=st.lists(COLUMN, min_size=1, max_size=4, unique_by=lambda c: c.strip()), data=st.data())
def test_any_columns_of_a_user_change_no_value(folder, plain, columns, data):
    "Only the column `split` is found by its name; the other names of the library are given explicitly."
    model, table, (_, want) = MODELS['two'], labels(2), plain['two']
    taken = {*map(str.casefold, table), 'split'}
    columns = [c for c in columns if c.strip().casefold() not in taken and c.strip()]
    for c in columns:
        table[c] = data.draw(st.lists(CELL, min_size=N, max_size=N)) if data.draw(st.booleans()) else data.draw(CELL)
    try:
        e, m = evaluated(folder, model, table)
    except ValueError as error:
        assert 'columns' in str(error), error
        assert len({c.strip() for c in columns} | {f'data_{c.strip()}' for c in columns}) < 2 * len(columns), (
            'two names become equal'
        )
        return
    pd.testing.assert_frame_equal(m, want)
    _subgroups(e, 2)


def test_names_that_would_be_equal_are_an_error(folder):
    with pytest.raises(ValueError, match=r"'eye' and 'data_eye' would both be named 'data_eye'"):
        label_table(folder, labels(2).assign(eye=1, data_eye=2))
    assert data_names(['eye', 'data_age', 3]) == {'eye': 'data_eye', 'data_age': 'data_age', 3: 'data_3'}


def test_a_table_of_the_library_can_be_given_to_it_again(folder):
    t = label_table(folder, labels(2).assign(eye='left', prediction='1', target='x'))
    assert t.columns.tolist() == ['image', 'label', 'group', 'split', 'data_eye', 'data_prediction', 'data_target']
    again = label_table(encode_target(t, Target('class')))
    pd.testing.assert_frame_equal(again, t)
    split = split_table(t, valid=0.5)
    pd.testing.assert_frame_equal(label_table(split), split)


def test_a_table_that_label_table_did_not_make_is_kept_apart_too(folder):
    "evaluate_model and describe_images rename what is not the library's."
    t = label_table(folder, labels(2))
    own = encode_target(t, Target('class')).assign(decision='1', p_0=5, prediction='9', known=1)
    e = evaluate_model(MODELS['two'], own)
    assert {'data_decision', 'data_p_0', 'data_prediction', 'data_known'} <= set(e.table)
    assert 'used to train or validate the model' not in report_html(e, n=20)
    assert set(e.table.decision) == {
        '1',
        'not 1',
    }
    p = MODELS['two'].probs(t.image)
    d = describe_images(t.assign(target=t.label, p_0=p[:, 0], p_1=p[:, 1], p_age=7.0, light=1), ['0', '1'], {}, 'photo')
    assert d.facts == ['data_p_age', 'data_light', 'format', 'pixels']


def test_leaks_are_reported_with_the_names_of_the_user(folder):
    t = label_table(folder, labels(2).assign(width=labels(2).label, suffix='x'))
    r = leak_report(t)
    result = r.confounders.column.tolist()
    assert result == ['data_width']
    assert "column 'width' " in str(r)


def test_the_report_shows_the_names_of_the_user_and_both_kinds_of_pixels(folder):
    table = labels(2).assign(pixels=['few', 'many'] * (N // 2), decision=labels(2).label)
    e, _ = evaluated(folder, MODELS['two'], table)
    page = report_html(e, n=20)
    assert 'pixels: few' in page
    assert 'data_' not in page
    assert 'The property "decision"' in page


# ---------------------------------------------------------------- which images are included


def test_validation_images_are_found_by_their_content(folder, tmp_path):
    from dr_transfer.data.leaks import image_hashes

    table = encode_target(label_table(folder, labels(2)), Target('class'))
    train = table.image[:20].tolist()
    valid = table.image[20:32].tolist()
    new = table.image[32:].tolist()
    hashes = image_hashes(train + valid)[0]
    model = Model(['0', '1'], DECISION)
    model.seen = hashes
    model.seen_use = np.r_[np.full(20, 1), np.full(12, 2)].astype(np.uint8)
    moved = tmp_path / 'moved'
    moved.mkdir()
    names = {}
    for i, p in enumerate(table.image):
        names[p] = moved / f'{i}.png'
        names[p].write_bytes(Path(p).read_bytes())
    there = table.assign(image=table.image.map(names).map(str))
    e = evaluate_model(model, there, split='valid')
    result = sorted(e.table.image)
    assert result == sorted(str(names[p]) for p in valid)
    assert len(e.other) == N - 12
    assert not e.known
    page = report_html(e, n=20)
    assert 'validation images of the model' in page
    assert 'slightly optimistic' in page
    assert f'excluded: not validation images of the model</th><td>{N - 12}' in page
    e = evaluate_model(model, there)
    assert sorted(e.table.image) == sorted(str(names[p]) for p in new)
    assert len(e.known) == 32
    assert 'optimistic' not in report_html(e, n=20)
    leaks = evaluate_model(model, there, allow_leaks=True)
    assert len(leaks.table) == N
    assert (leaks.table.known == 'yes').sum() == 32
    assert '32 of these images, or near copies of them, were used to train or' in report_html(leaks, n=20)
    with pytest.raises(ValueError, match=r'--split valid'):
        evaluate_model(model, there[there.image.isin([str(names[p]) for p in train + valid])])
    with pytest.raises(ValueError, match='none of these images is a validation image'):
        evaluate_model(model, there[there.image.isin([str(names[p]) for p in train + new])], split='valid')
    model.seen_use = np.where(np.arange(32) == 20, 3, model.seen_use).astype(
        np.uint8
    )  # one of them is a training image too
    assert len(evaluate_model(model, there, split='valid').table) == 11
    with pytest.raises(ValueError, match='omit allow_leaks=True'):
        evaluate_model(model, there, split='valid', allow_leaks=True)
    with pytest.raises(ValueError, match="split 'vali'"):
        evaluate_model(model, there, split='vali')


def test_a_model_of_an_earlier_version_reports_what_it_lacks(folder):
    model = Model(['0', '1'])
    model.seen = np.zeros((3, 32), np.uint8)
    with pytest.raises(ValueError, match=r'saved by dr_transfer 0\.1\.0'):
        evaluate_model(model, encode_target(label_table(folder, labels(2)), Target('class')), split='valid')


# ---------------------------------------------------------------- tables made by hand


def predictions(n=60, classes=('no', 'disease'), groups=True, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    p = np.clip(0.5 + (y - 0.5) * 0.6 + rng.normal(0, 0.25, n), 0.01, 0.99)
    return pd.DataFrame(
        {
            'image': [f'{i}.jpg' for i in range(n)],
            'target': np.array(classes, object)[y],
            'group': [f'g{i // 2}' if groups else None for i in range(n)],
            f'p_{classes[0]}': 1 - p,
            f'p_{classes[1]}': p,
        }
    )


TWO = ['no', 'disease']


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(p_disease='A17'), r"the column 'p_disease' holds 'A17', which is not a number"),
        (dict(decision='refer'), r"the column 'decision' holds 'refer': a model decides 'disease' or 'not disease'"),
        (dict(target='severe'), r"the target 'severe' is not a class"),
        (dict(p_disease=np.nan), r'60 of 60 rows of probabilities have NaN'),
    ],
)
def test_a_table_given_by_hand_gets_a_clear_error(change, words):
    with pytest.raises(ValueError, match=words):
        measure_table(predictions().assign(**change), TWO, n=5)
    if 'p_disease' in change:
        return
    for f in (decisions, by_patient, question, table_arrays, worst_errors):
        if 'decision' in change and f in (question, table_arrays):
            continue
        with pytest.raises(ValueError, match=words):
            f(predictions().assign(**change), TWO)


def test_probabilities_as_text_are_numbers():
    t = predictions()
    pd.testing.assert_frame_equal(
        measure_table(t.assign(p_disease=t.p_disease.map(repr)), TWO, n=5), measure_table(t, TWO, n=5)
    )


@pytest.mark.parametrize(
    'arguments, words',
    [
        (dict(n=0), '2 or more'),
        (dict(n=-5), '2 or more'),
        (dict(n=1.5), '2 or more'),
        (dict(n='many'), '2 or more'),
        (dict(prevalence=2), 'between 0 and 1'),
        (dict(prevalence=-0.1), 'between 0 and 1'),
        (dict(prevalence=float('nan')), 'between 0 and 1'),
        (dict(prevalence='0.1'), 'between 0 and 1'),
    ],
)
def test_invalid_numbers_of_resamples_are_errors_before_the_work(arguments, words):
    for t in (predictions(), predictions().drop(columns='p_disease')):  # also before the table is checked
        with pytest.raises(ValueError, match=words):
            measure_table(t, TWO, **arguments)


def test_an_empty_table_is_an_error():
    with pytest.raises(ValueError, match='is empty'):
        measure_table(predictions()[:0], TWO)


def test_metrics_are_checked_before_anything_is_trained():
    assert metric_names(TWO) == ['accuracy', 'auc', 'calibration error']
    assert metric_names(list('abc')) == [
        'accuracy',
        'calibration error',
    ]
    for classes in (TWO, GRADES, list('abc')):
        assert main_metric(metric_names(classes)) in metric_names(classes)
    assert set(metric_names()) == {'accuracy', 'auc', 'kappa', 'calibration error'}
    assert main_metric(name='kappa') == 'kappa'
    with pytest.raises(ValueError, match="metric 'nope'"):
        main_metric(name='nope')
    with pytest.raises(ValueError, match='accuracy'):
        main_metric(['kappa'])


def test_intervals_name_their_resampling_unit():
    t = predictions()
    assert measure_table(t, TWO, n=5).attrs['notes'] == ['95 % intervals over 30 groups (patients)']
    t.loc[:1, 'group'] = None
    assert 'over 29 groups (patients) and 2 images without one' in measure_table(t, TWO, n=5).attrs['notes'][0]
    for alone in (t.assign(group=None), t.drop(columns='group')):
        assert 'count images as independent' in measure_table(alone, TWO, n=5).attrs['notes'][0]
    decided = measure_table(t.assign(decision='disease'), TWO, n=5)
    assert 'at the operating point' in decided.attrs['notes'][1]
    assert decided.index[0] == 'sensitivity'


@pytest.mark.parametrize(
    'views, how',
    [
        (
            'quarter_turns',
            'averaged over 4 views of each image; metrics of the epochs are of the most probable class, from one view',
        ),
        (
            'none',
            'from one view of each image; metrics of the epochs are of the most probable class',
        ),
    ],
)
def test_a_sensitivity_is_reported_with_its_images_views_and_threshold(views, how):
    "The output of an epoch had sensitivity 0.742 together with 'operating point ... 90 % or more'."
    from dr_transfer.inference.run import validation_table

    notes = validation_table(predictions().assign(decision='disease'), TWO, views, n=5).attrs['notes']
    assert notes == [
        f'{len(predictions())} validation images, predictions {how}',
        '95 % intervals over 30 groups (patients)',
        'sensitivity and specificity are those at the operating point, accuracy is that of the most probable class',
    ]


@pytest.mark.parametrize(
    'classes', [['disease', 'no'], ['yes', 'no'], ['no', 'not no'], ['not ripe', 'ripe'], ['ripe', 'not ripe']]
)
def test_two_classes_of_any_names_stay_two_for_patients(classes):
    "The positive class may be called 'no', or begin with 'not'."
    t = predictions(classes=classes)
    found = by_patient(t, classes)
    assert list(patient_classes(classes)) == classes
    assert set(found.target) <= set(classes)
    assert len(found) == 30
    positive = t.assign(y=t.target == classes[1]).groupby('group').y.max()
    assert (found.set_index('group').target == classes[1]).eq(positive).all()
    assert np.allclose(found[f'p_{classes[0]}'] + found[f'p_{classes[1]}'], 1)
    e = Evaluation(
        t.assign(decision=np.where(t[f'p_{classes[1]}'] > 0.5, classes[1], f'not {classes[1]}')), classes, {}
    )
    measure_table(found, classes, n=5)
    tables = re.search(r'Most confident errors</h2>(.*?)<h2>', report_html(e, n=5), re.S)[1].split('<table>')[1:]
    assert len(tables) == 2
    assert all(
        len(set(re.findall(r'<td>((?:not )?' + re.escape(classes[1]) + r')</td><td>\d', t))) == 1 for t in tables
    )


def test_examples_are_of_the_classes_and_not_of_other_columns():
    t = predictions().assign(prediction='disease', data_p_age=np.arange(60), top_no=np.arange(60))
    pd.testing.assert_frame_equal(
        pick_examples(t, 6)[['image']], pick_examples(predictions().assign(prediction='disease'), 6)[['image']]
    )


# ---------------------------------------------------------------- the page

NAMES = [
    '<script>alert(1)</script>',
    '"><img src=x onerror=y>',
    '$a_b^',
    r'\frac',
    '🌸',
    'שושנה',
    'x' * 300,
    '_hidden',
    '&amp;',
    'a\nb',
    '\udcff',
]


@pytest.mark.parametrize('name', NAMES, ids=range(len(NAMES)))
def test_text_of_the_user_is_escaped_in_the_page_and_the_figures(tmp_path, name):
    t = predictions(classes=['no', name])
    t['image'] = [f'{name.replace("/", "")}{i}.jpg' for i in range(len(t))]
    t = t.assign(
        group=[f'{name}{i // 2}' for i in range(len(t))],
        decision=np.where(t[f'p_{name}'] > 0.5, name, f'not {name}'),
        label=t.target,
        **{f'data_{name}': [name, 'other'] * 30},
    )
    e = Evaluation(t, ['no', name], {'arch': name, 'task': name}, name, skipped=[name], patients=name)
    page = write_report(e, tmp_path / 'r.html', n=20).read_bytes().decode('utf-8', 'surrogateescape')
    body = re.sub(r'src="data:image/png;base64,[^"]*"', '', page)
    assert '<script' not in body
    assert 'onerror=y>' not in body.replace('onerror=y&gt;', '')
    assert body.count('<img') == len(re.findall(r'<img alt=', body))
    result = len(pd.read_csv(tmp_path / 'r_predictions.csv', encoding_errors='surrogateescape'))
    assert result == len(t)


EDGES = {
    'no group': lambda t: t.drop(columns='group'),
    'empty groups': lambda t: t.assign(group=None),
    'one class': lambda t: t[t.target == 'disease'],
    'the other class': lambda t: t[t.target == 'no'],
    'one image': lambda t: t[:1],
    'two images': lambda t: t[:2],
    'all right': lambda t: t[(t.p_disease > 0.5) == (t.target == 'disease')],
    'all alike': lambda t: t.assign(p_no=0.5, p_disease=0.5),
    'one group': lambda t: t.assign(group='g'),
}


@pytest.mark.parametrize('decided', [False, True])
@pytest.mark.parametrize('edge', EDGES)
def test_a_page_can_be_made_of_any_table(edge, decided):
    t = EDGES[edge](predictions()).reset_index(drop=True)
    about = (
        {
            'decision': {
                'temperature': 1.0,
                'cuts': None,
                'not_chosen': [],
                'operating': {
                    'threshold': 0.5,
                    'metric': 'sensitivity',
                    'minimum': 0.9,
                    'positives': 50,
                    'negatives': 50,
                    'sensitivity': 0.92,
                    'specificity': 0.8,
                },
            }
        }
        if decided
        else {}
    )
    page = report_html(Evaluation(t, TWO, about, prevalence=0.1), n=20)
    assert 'Not a medical device' in page
    assert '>nan<' not in page
    assert 'nan of 100' not in page
    assert ('count images as independent' in page) == (edge in ('no group', 'empty groups'))


def test_predictions_that_are_not_numbers_are_a_clear_error(folder):
    empty = predictions().assign(p_no=np.nan, p_disease=np.nan)
    with pytest.raises(ValueError, match='60 of 60 rows of probabilities have NaN'):
        report_html(Evaluation(empty, TWO, {}), n=5)
    model = Model(['0', '1'])
    model.probs = lambda images, *a, **k: np.full((len(images), 2), np.nan)
    with pytest.raises(ValueError, match='returns no probabilities for 40 of 40 images'):
        evaluate_model(model, encode_target(label_table(folder, labels(2)), Target('class')))


def test_the_summary_shows_the_source_of_the_patients(folder):
    table = encode_target(label_table(folder, labels(2)), Target('class'))
    table.attrs['patients'] = "patients: column 'patient', 20 groups"
    assert 'column &#39;patient&#39;, 20 groups' in report_html(evaluate_model(MODELS['two'], table), n=5)


def test_importing_the_library_does_not_warn():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, '-c', 'import dr_transfer.data.augment'], capture_output=True, text=True, check=True
    )
    assert 'torch.jit.script' not in done.stderr
