"Test the contents of figures: intervals within the axes, no line without an order, standard terms."

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from scipy.stats import binomtest

from dr_transfer.data.augment import plot_views
from dr_transfer.data.views import VIEWS, correct_light, stack_images
from dr_transfer.evaluation.compare import plot_comparison
from dr_transfer.evaluation.experiments import BASELINE, METHODS, plot_learning_curve, plot_training_curve
from dr_transfer.explain.activations import plot_neighbors
from dr_transfer.explain.grad_cam import plot_grad_cam_tables
from dr_transfer.features.probes import plot_depth_profile
from dr_transfer.metrics.calibration import reliability
from dr_transfer.metrics.plots import plot_confusion, plot_history
from dr_transfer.metrics.screening import plot_reliability


def limits(container):
    "Lower and upper limit of each error bar (n, 2)"
    _, _, (bars,) = container
    return np.array([segment[:, 1] for segment in bars.get_segments()])


def joins(ax):
    "Number of points of each line, without reference lines (dotted)"
    return [len(line.get_xdata()) for line in ax.lines if line.get_linestyle() in ('-', '--')]


# ---------------------------------------------------------------- reliability


@pytest.mark.parametrize('n', [5, 40, 203])
def test_reliability_bars_are_wilson_intervals_and_stay_within_0_and_1(n):
    rng = np.random.default_rng(n)
    predicted = rng.random(n) ** 4  # most are near 0, where no positive is observed
    positive = rng.random(n) < predicted
    r = reliability(positive, predicted)
    ax = plot_reliability(positive, predicted, 'of referable').axes[0]
    intervals = limits(ax.containers[0])
    assert ((intervals >= 0) & (intervals <= 1)).all()
    for (low, high), row in zip(intervals, r.itertuples()):
        ci = binomtest(round(row.observed * row.images), int(row.images)).proportion_ci(method='wilson')
        assert (low, high) == pytest.approx((max(ci.low, 0), ci.high), abs=1e-12)
    assert ax.get_xlabel() == 'mean predicted probability of referable'
    assert ax.get_ylabel() == 'observed frequency of referable'


# ---------------------------------------------------------------- methods


def learning_runs():
    "Accuracy of three methods on two sizes and three splits"
    rows = [
        {'method': name, 'images': n, 'seed': s, 'test_ratio': 0.43, 'accuracy': 0.4 + 0.1 * i + 0.001 * n + 0.01 * s}
        for i, name in enumerate(METHODS)
        for n in (25, 100)
        for s in range(3)
    ]
    return pd.DataFrame(rows)


def training_runs():
    "Error of two methods over three epochs on two splits"
    rows = [
        {'method': name, 'seed': s, 'epoch': e, 'error': 0.5 - 0.1 * e + 0.02 * s}
        for name in (BASELINE, 'fine-tuned')
        for e in range(3)
        for s in range(2)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize('plot, runs', [(plot_learning_curve, learning_runs), (plot_training_curve, training_runs)])
def test_each_method_has_a_panel_and_no_band_hides_another(plot, runs):
    runs = runs()
    names = list(dict.fromkeys(runs.method))
    axes = plot(runs, title='title').axes
    assert [ax.get_title() for ax in axes] == names
    assert [len(ax.collections) for ax in axes] == [1] * len(names)
    assert len({ax.get_xlim() for ax in axes}) == len({ax.get_ylim() for ax in axes}) == 1
    assert axes[0].figure.get_suptitle() == 'title'


@pytest.mark.parametrize('plot, runs', [(plot_learning_curve, learning_runs), (plot_training_curve, training_runs)])
def test_in_one_panel_intervals_are_bars_beside_one_another(plot, runs):
    from matplotlib.figure import Figure

    runs = runs()
    ax = Figure().subplots()
    assert plot(runs, ax=ax) is ax.figure
    first_points = [c[0].get_xdata()[0] for c in ax.containers]
    assert len(set(first_points)) == runs.method.nunique()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(dict.fromkeys(runs.method))


def test_methods_are_not_joined_by_a_line():
    rows = {
        (name, 'auc'): {'value': v, 'low': v - 0.1, 'high': v + 0.1}
        | {'difference': d, 'difference_low': d, 'difference_high': d}
        for name, v, d in (('a', 0.7, np.nan), ('b', 0.8, 0.1), ('c', 0.75, 0.05))
    }
    t = pd.DataFrame.from_dict(rows, orient='index').rename_axis([None, 'metric'])
    for ax in plot_comparison(t).axes:
        assert max(joins(ax), default=0) <= 2, 'more lines than that of no difference'


def grad_cam_rows(value):
    names = ['fraction of Grad-CAM on the mask', 'maximum on the mask']
    names += ['chance: fraction of the area', 'chance: Grad-CAM rotated', 'chance: Grad-CAM of other images']
    names += ['chance: fraction of the area with the margin', 'chance: maximum of other images']
    return pd.DataFrame({'value': value, 'low': value - 0.1, 'high': value + 0.1}, names)


def test_tables_of_grad_cam_are_not_joined_by_a_line():
    fig = plot_grad_cam_tables({'a': grad_cam_rows(0.3), 'b': grad_cam_rows(0.5)})
    assert [joins(ax) for ax in fig.axes] == [[], []]
    assert [ax.get_xlabel() for ax in fig.axes] == [
        'fraction of Grad-CAM on the mask',
        'images with the maximum on the mask (fraction)',
    ]


# ---------------------------------------------------------------- stages


def profile(*stages):
    score = np.linspace(0.6, 0.9, len(stages))
    t = pd.DataFrame({'channels': 8, 'score': score, 'low': score - 0.1, 'high': score + 0.1}, list(stages))
    t.attrs['metric'] = 'auc'
    return t


def test_a_line_joins_single_stages_alone_and_one_row_is_marked():
    t = profile('stem', 'stage1', 'stage2', 'stage1+stage2', 'stem+stage1')
    ax = plot_depth_profile(t).axes[0]
    assert joins(ax)[0] == 3
    assert ax.lines[-1].get_xdata().tolist() == [4], 'not only the best stage is marked'
    marked = plot_depth_profile(t, 'stage1').axes[0]
    assert marked.lines[-1].get_xdata().tolist() == [1]
    assert marked.texts[0].get_text() == f'{t.score["stage1"]:.3f}'
    with pytest.raises(KeyError):
        plot_depth_profile(t, 'stage9')


def test_neighbours_have_standard_labels():
    t = pd.DataFrame({'value': [0.5, 0.7], 'low': [0.4, 0.6], 'high': [0.6, 0.8], 'chance': 0.3}, ['stage1', 'stage2'])
    ax = plot_neighbors({'class': t, 'camera': t}).axes[0]
    assert ax.get_ylabel() == 'nearest images with the same label (fraction)'
    assert sorted(x.get_text() for x in ax.get_legend().get_texts()) == ['by chance', 'camera', 'class']


# ---------------------------------------------------------------- views, history, confusion


@pytest.mark.parametrize('views', VIEWS)
def test_each_view_is_shown_with_a_name(views):
    a = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    axes = plot_views(a, views).axes
    assert len({ax.get_title() for ax in axes}) == len(axes) == len(VIEWS[views])
    by_name = {ax.get_title(): np.asarray(ax.images[0].get_array()) for ax in axes}
    turned = {
        'mirrored': lambda image: image[:, ::-1],
        'rotated by 90°': np.rot90,
        'rotated by 180°': lambda image: np.rot90(image, 2),
        'rotated by 270°': lambda image: np.rot90(image, 3),
    }
    grey = correct_light(stack_images([a]))[0].permute(1, 2, 0).numpy()
    known = {'as it is': a, 'light corrected': grey}
    for name, turn in turned.items():
        known |= {name: turn(a), f'{name}, light corrected': turn(grey)}
    enlarged = {'middle enlarged', 'mirrored, middle enlarged'}
    enlarged |= {f'{name}, light corrected' for name in enlarged}
    assert by_name.keys() - known.keys() <= enlarged, 'a title does not name a view'
    for name in by_name.keys() & known.keys():
        assert np.array_equal(by_name[name], known[name]), name


def rows(*how):
    return [
        {'phase': p, 'epoch': e, 'how': h, 'stored': True, 'train_loss': 0.5, 'valid_loss': 0.6, 'accuracy': 1.0}
        for p, e, h in how
    ]


PATH = [{'C': c, 'loss': loss} for c, loss in ((1e-3, 0.6), (1e-2, 0.4), (1e-1, 0.5))]


def test_the_history_of_a_solved_head_is_its_regularisation_path():
    solved = rows((1, 1, 'solved'))
    (ax,) = plot_history(solved, PATH).axes
    line, chosen = ax.lines
    assert line.get_ydata().tolist() == [0.6, 0.4, 0.5]
    assert (chosen.get_xdata().item(), chosen.get_label()) == (1e-2, 'chosen: C = 0.01')
    assert ax.get_xscale() == 'log'
    assert ax.get_xlabel() == 'C (inverse regularisation strength)'
    with pytest.raises(ValueError, match='no epochs'):
        plot_history(solved)


def test_a_solved_head_is_epoch_0_of_what_follows():
    history = rows((1, 1, 'solved'), (2, 1, 'network'), (2, 2, 'network'))
    path, loss, metrics = plot_history(history, PATH).axes
    assert loss.lines[0].get_xdata().tolist() == metrics.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert path.get_legend() is not None
    assert metrics.get_ylabel() == 'metric'
    assert len(plot_history(rows((1, 1, 'stored'), (1, 2, 'stored'))).axes) == 2


def test_confusion_has_standard_labels():
    ax = plot_confusion([0, 1], [0, 0], ['no', 'yes']).axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('predicted class', 'true class')
    assert to_hex(ax.texts[0].get_color()) == '#ffffff', 'not white on dark blue'
