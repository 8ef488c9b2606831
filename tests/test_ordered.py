"Test heads for ordered grades, class balance, and cut points."

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import GRADES
from learners import groups, moved
from sklearn.metrics import cohen_kappa_score
from torch import nn

from dr_transfer.core import build_learner, fit, valid_predictions
from dr_transfer.inference.saved_model import image_model, load_model, save_model
from dr_transfer.metrics.decision import apply_decision, choose_decision, expected_grade, fit_cut_points
from dr_transfer.models.balance import balanced_loss, class_weights, image_weights
from dr_transfer.models.head import Head
from dr_transfer.models.network import HEADS, create_head
from dr_transfer.models.ordered import ORDERED, Cumulative, GradeLoss
from dr_transfer.synthetic.fundus import make_dr
from dr_transfer.training.plans import Phase, Plan

COLUMNS = [f'p_{grade}' for grade in GRADES]
TINY = dict(task='dr', target='grade', arch='test_resnet', weights='random', size=48, bs=16, runtime='plain')
SHORT = Plan('short', (Phase(-1, 3, 3e-3),), 'three epochs of the head; the plan of the library takes 600 steps')


@pytest.fixture(scope='module')
def fundus_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ordered') / 'fundus'
    make_dr(folder, n=120, size=64, seed=4)
    return folder


@pytest.mark.parametrize('name', ORDERED)
@pytest.mark.parametrize('k', [3, 5])
def test_a_higher_score_is_a_higher_grade_and_probabilities_sum_to_one(name, k):
    layer = ORDERED[name](k)
    scores = torch.linspace(-20, 20, 400)[:, None]
    extreme = torch.tensor([[-1e4], [1e4]])
    grades = torch.arange(float(k))
    for near in (True, False):
        if near and name == 'cumulative':
            gaps = torch.full((k - 2,), 0.01)
            layer.load_state_dict({'first': torch.tensor(0.0), 'gaps': gaps})
        p = layer(scores).exp().detach()
        assert torch.allclose(p.sum(1), torch.ones(400), atol=1e-3)
        assert (p >= 0).all()
        mean = p @ grades
        assert (mean.diff() > -1e-4).all()
        assert torch.isfinite(layer(extreme)).all()


def loss_of(name):
    return GradeLoss() if name == 'regression' else nn.CrossEntropyLoss()


def kappa(y, grades):
    return cohen_kappa_score(y, grades, weights='quadratic')


@pytest.mark.parametrize('name', ORDERED)
def test_gradients_are_finite_far_from_the_cuts(name):
    score = torch.tensor([[-50.0], [0.0], [50.0]], requires_grad=True)
    target = torch.tensor([4, 2, 0])
    layer = ORDERED[name](5)
    loss = loss_of(name)(layer(score), target)
    loss.backward()
    assert torch.isfinite(score.grad).all()


def test_the_cuts_are_always_increasing():
    layer = Cumulative(5)
    opt = torch.optim.SGD(layer.parameters(), lr=5.0)
    for _ in range(50):
        opt.zero_grad()
        output = layer(torch.randn(64, 1))
        target = torch.randint(0, 5, (64,))
        loss = nn.functional.cross_entropy(output, target)
        loss.backward()
        opt.step()
        assert (layer.cuts.diff() > 0).all()


@pytest.mark.parametrize('name', [*HEADS, Head((8,), 0.1, ordered='cumulative')], ids=str)
def test_every_head_has_an_output_for_each_class(name):
    h = create_head(name, 48, 5).eval()
    assert h(torch.randn(4, 48)).shape == (4, 5)
    assert h.about in (*HEADS.values(), name)
    with pytest.raises(ValueError, match='nearest first: cumulative'):
        Head(ordered='cumulativ')


@pytest.mark.parametrize(
    'head, plan, epochs',
    [
        ('cumulative', SHORT, None),
        ('regression', SHORT, None),
        ('cumulative', 'fine_tune', 1),
    ],
)
def test_a_model_of_ordered_grades_is_trained_saved_and_loaded(fundus_data, tmp_path, head, plan, epochs):
    learn = build_learner(fundus_data, head=head, **TINY)
    before = groups(learn)
    fit(learn, plan, epochs, say=lambda s: None)
    *_, head_moved = moved(before, groups(learn))
    assert head_moved
    t = valid_predictions(learn)
    p = t[COLUMNS].to_numpy()
    assert np.allclose(p.sum(1), 1, atol=1e-3)
    folder = save_model(learn, tmp_path / 'm')
    model = load_model(folder, 'plain')
    error = model.probs(t.image.tolist()) - p
    assert np.abs(error).max() < 1e-4
    assert image_model(learn).card.head.ordered == head


def test_an_ordered_head_learns_the_order(fundus_data):
    y = torch.tensor(np.repeat(np.arange(5), 200))
    noise = torch.randn(1000)
    x = torch.randn(1000, 4)
    x[:, 0] = y + 0.5 * noise
    for name in ORDERED:
        torch.manual_seed(0)
        h = create_head(name, 4, 5)
        opt = torch.optim.Adam(h.parameters(), 0.05)
        loss_function = loss_of(name)
        for _ in range(150):
            opt.zero_grad()
            loss = loss_function(h(x), y)
            loss.backward()
            opt.step()
        h.eval()
        p = h(x).softmax(1).detach()
        found = expected_grade(p)
        assert kappa(y, found.round()) > 0.85


# ---------------------------------------------------------------- balance


def test_weights_balance_the_classes():
    classes = ['a', 'b', 'c']
    targets = np.repeat([*classes, 'a'], [90, 9, 1, 1])
    t = pd.DataFrame({'target': targets, 'split': 'train'})
    t.loc[100, 'split'] = 'valid'
    w = class_weights(t)
    n = t.target[t.split == 'train'].value_counts()
    assert np.allclose(w * n, 100 / 3)
    assert image_weights(t, 'sampling') == w[t.target].tolist()
    assert image_weights(t, 'weights') is None
    loss = balanced_loss(t, classes, 'weights')
    weight = loss.func.weight
    assert weight.dtype == torch.float32
    assert weight.tolist() == pytest.approx(w[classes].tolist())
    assert balanced_loss(t, classes) is None
    assert isinstance(balanced_loss(t, ['a'], 'sampling', 'regression'), GradeLoss)


@pytest.mark.parametrize('stored', [True, False])
def test_sampling_balances_the_classes(fundus_data, stored):
    learn = build_learner(fundus_data, balance='sampling', **TINY)
    fit(learn, SHORT, stored=stored, say=lambda s: None)
    assert learn.record.balance == 'sampling'
    sampled = []
    for _ in range(6):
        for _, codes in learn.dls.train:
            sampled.extend(codes.tolist())
    n_classes = len(learn.dls.vocab)
    drawn = np.bincount(sampled, minlength=n_classes)
    assert drawn.max() / drawn.min() < 2
    train = learn.table[learn.table.split == 'train']
    have = train.target.value_counts()
    assert have.max() / have.min() > 2


@pytest.mark.parametrize('balance', ['weights', 'sampling'])
def test_every_balance_trains_with_every_kind_of_phase(fundus_data, balance):
    last_stage = Plan('last stage', (Phase(-2, 1, 1e-3),))
    for plan in (SHORT, last_stage):
        learn = build_learner(fundus_data, balance=balance, plan=plan, **TINY)
        fit(learn, say=lambda s: None)
        last = learn.record.history[-1]
        assert np.isfinite(last['train_loss'])


def test_an_invalid_balance_is_an_error(fundus_data):
    with pytest.raises(ValueError, match='nearest first: weights'):
        build_learner(fundus_data, balance='weight', **TINY)
    with pytest.raises(ValueError, match=r"use balance='sampling' \(--balance sampling\)"):
        build_learner(fundus_data, balance='weights', head='regression', **TINY)


# ---------------------------------------------------------------- cut points


def test_fitted_cuts_are_as_good_as_any_on_a_grid_and_better_than_halves():
    rng = np.random.default_rng(0)
    y = rng.choice(3, 400, p=[0.6, 0.3, 0.1])
    x = 0.6 * y + rng.normal(0, 0.35, 400)
    cuts = fit_cut_points(x, y, 3)
    places = np.quantile(x, np.linspace(0.02, 0.98, 60))
    on_the_grid = []
    for pair in combinations(places, 2):
        grades = np.digitize(x, pair)
        on_the_grid.append(kappa(y, grades))
    ours = kappa(y, np.digitize(x, cuts))
    halves = np.digitize(x, [0.5, 1.5])
    assert ours > max(on_the_grid) - 0.01
    assert ours > kappa(y, halves)
    assert (np.diff(cuts) > 0).all()


def test_cut_points_are_kept_with_the_model_and_give_grades():
    rng = np.random.default_rng(1)

    def table(n):
        y = rng.choice(5, n, p=[0.5, 0.2, 0.2, 0.06, 0.04])
        x = 0.6 * y + rng.normal(0, 0.4, n)
        distance = np.arange(5) - x[:, None]
        odds = np.exp(-(distance**2))
        p = odds / odds.sum(1, keepdims=True)
        t = pd.DataFrame(p, columns=COLUMNS)
        return t.assign(target=y.astype(str))

    valid = table(800)
    t = table(800)
    d = choose_decision(valid, GRADES)
    out = apply_decision(t, GRADES, d)
    y = t.target.astype(int)
    p = t[COLUMNS].to_numpy()
    likeliest = p.argmax(1)
    assert kappa(y, out.grade.astype(int)) > kappa(y, likeliest) + 0.03
    assert set(out.grade) <= set(range(5))
    without_4 = valid[valid.target != '4']
    assert choose_decision(without_4, GRADES).cuts is None


# ---------------------------------------------------------------- no order, no ordered head


@pytest.mark.parametrize('head', [*ORDERED, Head((8,), ordered='regression')], ids=str)
def test_classes_without_an_order_are_an_error(tmp_path, head):
    """A score with cut points is meaningless for daisies, roses and tulips,
    so an error is raised before anything is trained.
    """
    from dr_transfer.data.tasks import Target, Task
    from dr_transfer.synthetic.flowers import make_flowers

    flowers = tmp_path / 'flowers'
    make_flowers(flowers, n=24, size=64, seed=0, classes=('daisy', 'roses', 'tulips'))
    tiny = dict(arch='small_cnn', weights='random', runtime='plain', head=head)
    kind = getattr(head, 'ordered', head)
    why = rf"head='{kind}' \(--head {kind}\) is for ordered classes"
    these = r"'class' \(daisy, roses, tulips\) is not"
    with pytest.raises(
        ValueError, match=rf"{why}.*{these}.*head='linear' \(--head linear\).*ordered = true in a task file"
    ):
        build_learner(flowers, size=48, **tiny)
    with pytest.raises(ValueError, match='is for ordered classes'):
        build_learner(flowers, size=48, **{**tiny, 'head': create_head(head, 128, 3)})
    buds = Task('buds', (Target('age', ('daisy', 'roses', 'tulips'), ordered=True),), size=48)
    assert build_learner(flowers, buds, **tiny).record.head.ordered == kind


def test_two_classes_are_ordered_in_either_direction(fundus_data):
    "For two classes the ordered head is a logistic regression, which is correct for any classes."
    learn = build_learner(fundus_data, **{**TINY, 'target': 'referable', 'head': 'cumulative'})
    assert learn.model[1].about.ordered == 'cumulative'
    assert learn.dls.c == 2
