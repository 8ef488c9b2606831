"Test learning curves, training curves and comparisons: equal conditions, known results, no repeated training."

import itertools
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from helpers import error_line, good
from torch import nn

import dr_transfer.evaluation.cross_validation as crossval
from dr_transfer.core import build_learner
from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import encode_target, get_task
from dr_transfer.evaluation.compare import _recipes, compare, plot_comparison
from dr_transfer.evaluation.cross_validation import _training_folder, train_once
from dr_transfer.evaluation.experiments import (
    BASELINE,
    METHODS,
    _encoded,
    _splits,
    curve_table,
    first_images,
    learning_curve,
    method_plans,
    plot_learning_curve,
    training_curve,
    unseen_split,
    value_of_pretraining,
)
from dr_transfer.models.backbones import create_body, save_weights
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.training.phases import _epochs
from dr_transfer.training.plans import Phase, Plan, get_plan, plan_table

SHORT = {BASELINE: Plan('short', (Phase(0, 1, 3e-3, fixed_bn=False),), weights='random'), 'frozen': 'head'}
FAST = dict(arch='small_cnn', weights='random', size=32, runtime='plain', say=lambda line: None)


@pytest.fixture(scope='session')
def flowers(home):
    "Flowers of some photographers."
    make_flowers(home / 'curve_flowers', n=160, size=40, seed=11)
    return home / 'curve_flowers'


@pytest.fixture(scope='session')
def labelled(flowers):
    return encode_target(label_table(flowers), get_task('flowers').target())


@pytest.fixture
def trainings(monkeypatch):
    "The sizes of the training sets that were really used."
    train_sizes = []
    build = crossval.build_learner
    monkeypatch.setattr(
        crossval,
        'build_learner',
        lambda t, *a, **kw: train_sizes.append(int((t.split == 'train').sum())) or build(t, *a, **kw),
    )
    return train_sizes


# ---------------------------------------------------------------- subsets


@pytest.mark.parametrize('seed', range(4))
def test_no_group_is_in_two_subsets_and_small_sets_are_parts_of_larger_ones(labelled, seed):
    t = unseen_split(labelled, labelled.group.to_numpy(), seed=seed)
    assert (t.groupby('group').split.nunique() == 1).all()
    assert set(t.split) == {'train', 'valid', 'test'}
    assert t.image.is_unique
    sets = [first_images(t, n) for n in (10, 25, 50)]
    train = [s[s.split == 'train'] for s in sets]
    assert [len(s) for s in train] == [10, 25, 50]
    for a, b in itertools.pairwise(train):
        assert set(a.image) < set(b.image)
    fraction = t[t.split == 'train'].target.value_counts(normalize=True)
    for s in train:
        assert (abs(s.target.value_counts().reindex(fraction.index, fill_value=0) - fraction * len(s)) <= 1).all(), (
            'the subset is not stratified'
        )
    for s in sets:
        assert s[s.split == 'test'].image.tolist() == t[t.split == 'test'].image.tolist(), (
            'the validation images differ'
        )


def test_the_number_of_validation_images_is_limited_and_depends_on_the_seed(labelled):
    a, b = (unseen_split(labelled, labelled.group.to_numpy(), max_test=12, seed=s) for s in (0, 1))
    assert (a.split == 'test').sum() <= 12
    assert set(a[a.split == 'test'].image) != set(b[b.split == 'test'].image)
    again = unseen_split(labelled, labelled.group.to_numpy(), max_test=12, seed=0)
    assert again.image.tolist() == a.image.tolist()


def test_random_initialisation_gets_steps_not_epochs(labelled):
    splits = unseen_split(labelled, labelled.group.to_numpy())
    for n, epochs in ((10, 300), (70, 300), (100, 200)):  # one, two and three steps an epoch
        learn = build_learner(
            first_images(splits, n), get_task('flowers', 32), plan=METHODS[BASELINE], arch='small_cnn', runtime='plain'
        )
        assert _epochs(learn, METHODS[BASELINE].phases[0]) == epochs
    assert plan_table(plans=[METHODS[BASELINE]]).epochs.tolist() == ['by number of images']
    assert METHODS[BASELINE].phases[0].frozen == 0, 'the statistics of random weights must change'
    assert METHODS[BASELINE].phases[0].fixed_bn is False, 'the statistics of random weights must change'


# ---------------------------------------------------------------- curves


def test_an_interrupted_study_is_resumed(flowers, trainings):
    arguments = dict(sizes=(10, 30), methods=SHORT, seeds=1, **FAST)
    real = crossval.build_learner

    def stop(t, *a, **kw):
        if len(trainings) == 3:
            raise KeyboardInterrupt
        return real(t, *a, **kw)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(crossval, 'build_learner', stop)
        with pytest.raises(KeyboardInterrupt):
            learning_curve(flowers, **arguments)
    assert trainings == [10, 10, 30]
    runs = learning_curve(flowers, **arguments)
    assert trainings == [10, 10, 30, 30], 'something was trained twice'
    assert runs[['method', 'images']].values.tolist() == [
        [BASELINE, 10],
        ['frozen', 10],
        [BASELINE, 30],
        ['frozen', 30],
    ]
    assert runs.accuracy.between(0, 1).all()
    more = learning_curve(flowers, **{**arguments, 'sizes': (10, 30, 40)})
    assert trainings[4:] == [40, 40]
    assert more[more.images < 40].reset_index(drop=True).equals(runs)


def test_sizes_and_methods_are_checked_before_anything_is_trained(flowers, trainings):
    with pytest.raises(ValueError, match='1000 training images were given, but there are'):
        learning_curve(flowers, sizes=(10, 1000), methods=SHORT, **FAST)
    with pytest.raises(ValueError, match='frozen'):
        learning_curve(flowers, methods=['frosen'], **FAST)
    with pytest.raises(ValueError, match='fine_tune'):
        method_plans({'mine': 'fine_tunes'})
    assert trainings == []


def test_error_over_epochs_ends_where_the_predictions_do(flowers, trainings):
    methods = {**SHORT, 'tuned': Plan('t', (Phase(-1, None, 1e-3), Phase(0, 1, 1e-4)))}
    h = training_curve(flowers, epochs=2, images=40, methods=methods, augment='none', **FAST)
    assert h.groupby('method', sort=False).epoch.agg(list).to_dict() == {
        BASELINE: [1, 2],
        'frozen': [0],
        'tuned': [0, 1, 2],
    }
    assert h[['train_loss', 'valid_loss']].gt(0).all().all()
    assert len(trainings) == 3
    task = get_task('flowers', 32)
    table = _encoded(flowers, task, None, None, None)
    t = _splits(table, task, 1, 0.3, 600, print)[0]
    t = first_images(t[t.split != 'valid'].replace({'split': {'test': 'valid'}}), 40)
    how = {k: v for k, v in FAST.items() if k != 'size'}
    for name, plan in method_plans(methods).items():
        p, _ = train_once(t, task, None, plan, 2, 0, metrics=[accuracy], augment='none', **how)
        assert h[h.method == name].error.iloc[-1] == pytest.approx(1 - (p.target == p.prediction).mean()), (
            'not the error on the validation images'
        )
    assert len(trainings) == 3, 'these were not the trainings of the curve'


# ---------------------------------------------------------------- stored trainings


def test_a_stored_training_is_found_by_all_that_affects_it(labelled, tmp_path, trainings):
    t = labelled[:30].assign(split=['train'] * 20 + ['valid'] * 10)
    task = get_task('flowers', 32)
    plan = Plan('short', (Phase(0, 1, 3e-3, fixed_bn=False),))

    def kept(**kw):
        return _training_folder(t, [task, plan, kw])

    assert kept(a=1, m=[accuracy]) == kept(a=1, m=[accuracy]) != kept(a=2, m=[accuracy]) != kept(a=2)
    for o in (lambda a, b: 0, nn.Linear(2, 2), CrossEntropyLossFlat(), EarlyStoppingCallback()):
        assert kept(o=o) is None, 'an object without a description is not stored'
    how = dict(arch='small_cnn', runtime='plain', allow_leaks=True, say=lambda line: None)
    file = tmp_path / 'w.safetensors'
    for seed in (1, 2):  # the same name, other weights
        torch.manual_seed(seed)
        save_weights(create_body('small_cnn', 'random'), file, overwrite=True)
        train_once(t, task, None, plan, weights=file, **how)
    assert len(trainings) == 2
    shutil.copy(file, tmp_path / 'elsewhere.safetensors')
    train_once(t, task, None, plan, weights=tmp_path / 'elsewhere.safetensors', **how)
    assert len(trainings) == 2, 'the same weights under another name'
    for _ in range(2):
        train_once(t, task, None, plan, weights='random', loss_func=CrossEntropyLossFlat(), **how)
    assert len(trainings) == 4, 'a loss that its name does not identify is trained each time'


def swap(folder):
    a, b = (folder / n for n in crossval._RESULT_FILES)
    a, b, c = a.read_bytes(), b.read_bytes(), a
    c.write_bytes(b)


DAMAGE = {
    'a number': lambda d: (d / 'predictions.csv').write_bytes(
        (d / 'predictions.csv').read_bytes().replace(b'0.', b'1.', 1)
    ),
    'cut': lambda d: (d / 'predictions.csv').write_bytes((d / 'predictions.csv').read_bytes()[:-40]),
    'zeros': lambda d: (d / 'history.csv').write_bytes(bytes(99)),
    'gone': lambda d: (d / 'history.csv').unlink(),
    'another table': swap,
    'no sums': lambda d: (d / 'sums.json').write_text('[]'),
    'empty': lambda d: [p.unlink() for p in d.iterdir()],
}


@pytest.mark.parametrize('name', [*DAMAGE, 'a file', 'that of another training'])
def test_a_changed_stored_training_is_not_used(tmp_path, name):
    folder = tmp_path / 'trainings' / 'a'
    other = tmp_path / 'trainings' / 'b'
    tables = [
        pd.DataFrame({'image': pd.Series(['x'], dtype=object), 'p_a': [0.25]}),
        pd.DataFrame({'train_loss': [0.5]}),
    ]
    crossval._write_results(folder, tables)
    assert [t.equals(o) for t, o in zip(crossval._read_results(folder), tables)] == [True, True]
    assert crossval._read_results(other) is None
    if name == 'that of another training':
        shutil.copytree(folder, other)
    elif name == 'a file':
        other.write_text('x')
    else:
        DAMAGE[name](folder)
        other = folder
    with pytest.warns(UserWarning, match='is damaged: it is repeated'):
        assert crossval._read_results(other) is None
    crossval._write_results(other, tables)
    assert crossval._read_results(other) is not None


def test_a_changed_prediction_is_trained_again(labelled, trainings, cache_dir):
    "The prediction is the same as before"
    t = labelled[:30].assign(split=['train'] * 20 + ['valid'] * 10)
    how = dict(arch='small_cnn', weights='random', runtime='plain', allow_leaks=True, say=lambda line: None)

    def run():
        return train_once(t, get_task('flowers', 32), None, Plan('short', (Phase(0, 1, 3e-3, fixed_bn=False),)), **how)[
            0
        ]

    first = run()
    (file,) = cache_dir.glob('trainings/*/predictions.csv')
    was = file.read_bytes()
    file.write_bytes(was.replace(b'0.', b'1.', 1))
    with pytest.warns(UserWarning, match='is repeated'):
        assert run().equals(first)
    assert len(trainings) == 2
    assert file.read_bytes() == was
    assert run().equals(first)
    assert len(trainings) == 2


def test_classes_with_odd_names_are_read_back(labelled):
    t = labelled[:30].assign(split=['train'] * 20 + ['valid'] * 10)
    t['target'] = t['label'] = ['None', 'NA', 'null'] * 10
    for _ in range(2):
        p, _h = train_once(
            t,
            get_task('flowers', 32),
            None,
            Plan('short', (Phase(0, 1, 3e-3, fixed_bn=False),)),
            arch='small_cnn',
            weights='random',
            runtime='plain',
            allow_leaks=True,
            say=lambda line: None,
        )
    assert set(p.target) == {'None', 'NA', 'null'}
    assert set(p.prediction) <= set(p.target)
    assert p.filter(like='p_').notna().all().all()


def curve(**scores):
    "Runs of three splits with known means; the splits differ by `noise`"
    sizes = (25, 50, 100, 200)
    noise = scores.pop('noise', 0.0)
    return pd.DataFrame(
        [
            {'method': r.replace('_', ' '), 'images': n, 'seed': s, 'accuracy': v + noise * (s - 1), 'test_ratio': 0.25}
            for s in range(3)
            for r, row in scores.items()
            for n, v in zip(sizes, row)
        ]
    )


@pytest.mark.parametrize(
    'frozen, needed, saved',
    [
        (
            (0.4, 0.5, 0.6, 0.7),
            [50, 100, 200, np.inf],
            [25, 50, 100, np.inf],
        ),  # one doubling ahead; the last is beyond the largest size
        ((0.3, 0.4, 0.5, 0.6), [25, 50, 100, 200], [0, 0, 0, 0]),  # no better
        ((0.1, 0.2, 0.3, 0.4), [25, 50, 100, 200], [0, 0, 0, 0]),  # worse: zero, never negative
        ((0.45, 0.45, 0.45, 0.45), [2**0.5 * 50, 2**0.5 * 50, 100, 200], [2**0.5 * 50 - 25, 2**0.5 * 50 - 50, 0, 0]),
    ],
)  # better at small sizes only
def test_images_saved_equal_those_of_known_curves(frozen, needed, saved):
    w = value_of_pretraining(curve(random_initialisation=(0.3, 0.4, 0.5, 0.6), frozen=frozen)).loc['frozen']
    assert w.images_needed.tolist() == pytest.approx(needed)
    assert w.images_saved.tolist() == pytest.approx(saved)


def test_limits_of_the_images_saved_include_them_and_widen_with_the_noise():
    narrow, wide = (
        value_of_pretraining(curve(random_initialisation=(0.3, 0.4, 0.5, 0.6), frozen=(0.42, 0.5, 0.55, 0.6), noise=s))
        for s in (0.002, 0.02)
    )
    for w in (narrow, wide):
        assert ((w.low <= w.images_saved) & (w.images_saved <= w.high)).all()
    assert (wide.low <= narrow.low).all()
    assert (wide.high >= narrow.high).all()
    assert (wide.high > narrow.high).any()


def test_a_curve_that_dips_does_not_count_twice():
    w = value_of_pretraining(curve(random_initialisation=(0.3, 0.5, 0.45, 0.6), frozen=(0.5, 0.5, 0.5, 0.5)))
    assert w.images_needed.tolist() == pytest.approx([50, 50, 100, 200])


def test_table_and_figure_of_a_curve():
    runs = curve(random_initialisation=(0.3, 0.4, 0.5, 0.6), frozen=(0.5, 0.55, 0.6, 0.6), noise=0.01)
    t = curve_table(runs)
    assert t.loc[('frozen', 25), 'gain'] == pytest.approx(0.2)
    assert t.loc[BASELINE].gain.isna().all()
    assert t.loc[('frozen', 25), 'gain_high'] == pytest.approx(0.2), 'the splits do not agree on the difference'
    assert [ax.get_title() for ax in plot_learning_curve(runs).axes] == [BASELINE, 'frozen']
    with pytest.raises(ValueError, match='accuracy'):
        curve_table(runs, 'kappa')
    with pytest.raises(ValueError, match='they have frozen: give one'):
        value_of_pretraining(runs[runs.method == 'frozen'])


# ---------------------------------------------------------------- methods on one split


def test_one_name_is_a_list_of_one_and_names_are_unique():
    assert list(_recipes('cifarnet', 'head')) == ['head']
    assert list(method_plans('frozen')) == ['frozen']
    with pytest.raises(ValueError, match='two plans have the same name'):
        _recipes('cifarnet', ['top1', get_plan('top1', 3)])


def test_methods_are_named_by_what_differs():
    assert list(_recipes(['cifarnet'], ['head', 'top1'])) == ['head', 'top1']
    assert list(_recipes(['cifarnet', 'small_cnn'], ['head'])) == ['cifarnet', 'small_cnn']
    assert list(_recipes(['cifarnet'], ['head'])) == ['head']
    assert list(_recipes(['cifarnet', 'test_resnet'], ['head', 'scratch'])) == [
        'cifarnet, head',
        'small_cnn, scratch',
        'test_resnet, head',
    ]


def test_a_method_does_not_differ_from_itself(flowers):
    same = {n: Plan(n, (Phase(-1, None, 1e-3),)) for n in ('one', 'two')}
    c = compare(
        flowers,
        plans=same.values(),
        archs=['small_cnn'],
        weights='random',
        size=32,
        runtime='plain',
        say=lambda line: None,
    )
    d = c.table(n=50).loc['two']
    assert (d[['difference', 'difference_low', 'difference_high']].abs() < 1e-9).all().all()
    assert len(plot_comparison(c.table(n=50)).axes) == 2


def test_compare_from_the_command_line(flowers, tmp_path, trainings):
    c_png = tmp_path / 'c.png'
    words = [
        'compare',
        flowers,
        '--archs',
        'small_cnn',
        'test_resnet',
        '--plans',
        'head',
        '--weights',
        'random',
        '--size',
        '32',
        '--runtime',
        'plain',
        '--resamples',
        '100',
    ]
    result = good(*words, '--out', c_png)
    assert 'accuracy, on the same' in result.out
    assert 'test_resnet' in result.out
    assert c_png.stat().st_size > 1000
    t = pd.read_csv(tmp_path / 'c_table.csv').set_index(['method', 'metric'])
    assert t.loc[('small_cnn', 'accuracy')].difference != t.loc[('small_cnn', 'accuracy')].difference, (
        'the first is compared with itself'
    )
    assert (
        t.loc[('test_resnet', 'accuracy'), 'difference_low']
        <= t.loc[('test_resnet', 'accuracy'), 'difference']
        <= t.loc[('test_resnet', 'accuracy'), 'difference_high']
    )
    assert len(trainings) == 2
    assert 'c.png exists already' in error_line(*words, '--out', c_png)
    assert len(trainings) == 2
    again = good(*words, '--out', tmp_path / 'd.png', '--seed', '42')
    assert len(trainings) == 2
    assert pd.read_csv(tmp_path / 'd_table.csv').set_index(['method', 'metric']).equals(t)
    assert again.code == 0
    assert 'metric' in error_line(*words, '--metric', 'speed', '--out', tmp_path / 'e.png')
    assert 'the figure is a PNG file' in error_line(*words, '--out', tmp_path / 'e.csv')
