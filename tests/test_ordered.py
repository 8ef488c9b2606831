"Test heads for ordered grades, class balance, and cut points."

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import GRADES
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
    for cuts in ([0.0] + [0.01] * (k - 2), None):
        if cuts and name == 'cumulative':
            layer.load_state_dict({'first': torch.tensor(cuts[0]), 'gaps': torch.tensor(cuts[1:])})
        p = layer(torch.linspace(-20, 20, 400)[:, None]).exp().detach()
        assert torch.allclose(p.sum(1), torch.ones(400), atol=1e-3)
        assert (p >= 0).all()
        assert ((p @ torch.arange(float(k))).diff() > -1e-4).all()
        assert torch.isfinite(layer(torch.tensor([[-1e4], [1e4]]))).all()


@pytest.mark.parametrize('name', ORDERED)
def test_gradients_are_finite_far_from_the_cuts(name):
    score = torch.tensor([[-50.0], [0.0], [50.0]], requires_grad=True)
    loss = GradeLoss() if name == 'regression' else nn.CrossEntropyLoss()
    loss(ORDERED[name](5)(score), torch.tensor([4, 2, 0])).backward()
    assert torch.isfinite(score.grad).all()


def test_the_cuts_are_always_increasing():
    layer = Cumulative(5)
    opt = torch.optim.SGD(layer.parameters(), lr=5.0)
    for _ in range(50):
        opt.zero_grad()
        nn.functional.cross_entropy(layer(torch.randn(64, 1)), torch.randint(0, 5, (64,))).backward()
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
    start = {k: v.clone() for k, v in learn.model[1].state_dict().items()}
    fit(learn, plan, epochs, say=lambda s: None)
    assert any(not torch.equal(v, start[k]) for k, v in learn.model[1].state_dict().items())
    t = valid_predictions(learn)
    p = t[[f'p_{g}' for g in GRADES]].to_numpy()
    assert np.allclose(p.sum(1), 1, atol=1e-3)
    assert np.abs(load_model(save_model(learn, tmp_path / 'm'), 'plain').probs(t.image.tolist()) - p).max() < 1e-4
    assert image_model(learn).card.head.ordered == head


def test_an_ordered_head_learns_the_order(fundus_data):
    y = torch.tensor(np.repeat(np.arange(5), 200))
    x = torch.cat([(y + 0.5 * torch.randn(1000))[:, None], torch.randn(1000, 3)], 1)
    for name in ORDERED:
        torch.manual_seed(0)
        h = create_head(name, 4, 5)
        opt = torch.optim.Adam(h.parameters(), 0.05)
        loss = GradeLoss() if name == 'regression' else nn.CrossEntropyLoss()
        for _ in range(150):
            opt.zero_grad()
            loss(h(x), y).backward()
            opt.step()
        e = expected_grade(h.eval()(x).softmax(1).detach())
        assert cohen_kappa_score(y, e.round(), weights='quadratic') > 0.85


# ---------------------------------------------------------------- balance


def test_weights_balance_the_classes():
    t = pd.DataFrame({'target': ['a'] * 90 + ['b'] * 9 + ['c'] + ['a'], 'split': ['train'] * 100 + ['valid']})
    w = class_weights(t)
    n = t.target[t.split == 'train'].value_counts()
    assert np.allclose(w * n, 100 / 3)
    assert image_weights(t, 'sampling') == w[t.target].tolist()
    assert image_weights(t, 'weights') is None
    loss = balanced_loss(t, ['a', 'b', 'c'], 'weights')
    assert loss.func.weight.dtype == torch.float32
    assert loss.func.weight.tolist() == pytest.approx(w[['a', 'b', 'c']].tolist())
    assert balanced_loss(t, ['a', 'b', 'c']) is None
    assert isinstance(balanced_loss(t, ['a'], 'sampling', 'regression'), GradeLoss)


@pytest.mark.parametrize('stored', [True, False])
def test_sampling_balances_the_classes(fundus_data, stored):
    learn = build_learner(fundus_data, balance='sampling', **TINY)
    fit(learn, SHORT, stored=stored, say=lambda s: None)
    assert learn.record.balance == 'sampling'
    sampled = np.concatenate(
        [np.array([learn.dls.vocab[int(i)] for i in b[1]]) for _ in range(6) for b in learn.dls.train]
    )
    fraction = pd.Series(sampled).value_counts(normalize=True)
    have = learn.table.target[learn.table.split == 'train'].value_counts(normalize=True)
    assert fraction.max() / fraction.min() < 2 < have.max() / have.min()


@pytest.mark.parametrize('balance', ['weights', 'sampling'])
def test_every_balance_trains_with_every_kind_of_phase(fundus_data, balance):
    for plan in (SHORT, Plan('last stage', (Phase(-2, 1, 1e-3),))):
        learn = fit(build_learner(fundus_data, balance=balance, plan=plan, **TINY), say=lambda s: None)
        assert np.isfinite(learn.record.history[-1]['train_loss'])


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
    best = max(
        cohen_kappa_score(y, np.digitize(x, [a, b]), weights='quadratic')
        for i, a in enumerate(places)
        for b in places[i + 1 :]
    )
    ours = cohen_kappa_score(y, np.digitize(x, cuts), weights='quadratic')
    assert ours > best - 0.01
    assert ours > cohen_kappa_score(y, np.digitize(x, [0.5, 1.5]), weights='quadratic')
    assert (np.diff(cuts) > 0).all()


def test_cut_points_are_kept_with_the_model_and_give_grades():
    rng = np.random.default_rng(1)

    def table(n):
        y = rng.choice(5, n, p=[0.5, 0.2, 0.2, 0.06, 0.04])
        p = np.exp(-((np.arange(5) - (0.6 * y + rng.normal(0, 0.4, n))[:, None]) ** 2))
        return pd.DataFrame(
            {'target': y.astype(str), **dict(zip([f'p_{g}' for g in GRADES], (p / p.sum(1, keepdims=True)).T))}
        )

    valid = table(800)
    t = table(800)
    d = choose_decision(valid, GRADES)
    out = apply_decision(t, GRADES, d)
    y = t.target.astype(int)
    kappa = {
        k: cohen_kappa_score(y, v, weights='quadratic')
        for k, v in (('cuts', out.grade.astype(int)), ('likeliest', t.filter(like='p_').to_numpy().argmax(1)))
    }
    assert kappa['cuts'] > kappa['likeliest'] + 0.03
    assert set(out.grade) <= set(range(5))
    assert choose_decision(valid[valid.target != '4'], GRADES).cuts is None


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
