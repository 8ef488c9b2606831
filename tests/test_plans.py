"Run the transfer plans: frozen layers, stored features, solved heads, exact averages, interruptions."

import warnings
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from families import NOT_A_CHAIN
from fastai.callback.core import Callback
from fastai.data.core import TfmdDL
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fasttransform import Transform
from learners import ARCHS, CPU, groups, learner_builder, make_sets, moved, quiet, state_of
from PIL import Image
from torch import nn

from dr_transfer.core import build_learner, classifier_learner, fit, predict_probs, valid_predictions
from dr_transfer.data.fundus import read_image
from dr_transfer.data.tasks import get_task
from dr_transfer.features.classifiers import FeatureClassifier
from dr_transfer.features.extraction import image_features
from dr_transfer.inference.saved_model import load_model, save_model
from dr_transfer.models.head import Head
from dr_transfer.models.network import AveragePool
from dr_transfer.models.speed import RUNTIMES
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.training import phases
from dr_transfer.training import stored as stored_part
from dr_transfer.training.callbacks import HeadFirst
from dr_transfer.training.learner import learner_groups
from dr_transfer.training.plans import HEAD_PHASE, PLANS, Phase, Plan, plan_table
from dr_transfer.training.stored import learner_features, why_not_stored

STEPS = replace(HEAD_PHASE, epochs=3, lr=1e-2)
warns_head = pytest.mark.filterwarnings('ignore:the body is trained before the head')


@pytest.fixture(scope='session')
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('plans')
    make_sets(folder, n_flowers=30)
    return folder


@pytest.fixture
def build(data_folder):
    return learner_builder(data_folder, bs=8)


def silent(learn, plan=None, *args, **kw):
    torch.manual_seed(7)  # the same views for any earlier calls
    return fit(learn, plan, *args, say=kw.pop('say', lambda s: None), **kw)


def probs(learn, subset='valid'):
    return predict_probs(learn, images(learn, subset), 'none')


def images(learn, subset='valid'):
    return learn.table.image[learn.table.split == subset].tolist()


def farthest(a, b, but=''):
    "Largest difference of two state dicts"
    a, b = (state_of(learner) for learner in (a, b))
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if not (but and but in k))


def frozen_first(learn, plan):
    return min(p.first_trained(len(learner_groups(learn))) for p in plan.phases)


# ---------------------------------------------------------------- every plan, by one fit


def for_task(name, task):
    return pytest.param(name, task, id=f'{name}-{task}')


@pytest.mark.parametrize(
    'name,task', [*(for_task(n, 'flowers') for n in PLANS), *(for_task(n, 'dr') for n in ('head', 'top2', 'fine_tune'))]
)
def test_every_plan(build, name, task):
    """It runs; frozen weights and statistics are bit-identical, and all others have changed;
    the table states the number of trained weights (F47)
    """
    own = PLANS[name]
    plan = PLANS[name].with_epochs(1)
    learn = build(
        task,
        None if own.arch else 'test_resnet',
        plan=name,
        **({'weights': None, 'runtime': 'plain'} if own.weights else {}),
    )
    lines = []
    before = groups(learn)
    n = len(learner_groups(learn))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'the body is trained before')
        assert fit(learn, epochs=1, say=lines.append) is learn
    k = frozen_first(learn, plan)
    assert moved(before, groups(learn)) == [False] * k + [True] * (n - k)
    rows = learn.record.history
    assert [r['phase'] for r in rows] == list(range(1, len(plan.phases) + 1))
    for r in rows:
        assert np.isfinite([v for k, v in r.items() if k != 'how']).all()
    endless = own.augment is not None
    assert [r['how'] != 'network' for r in rows] == [not endless and f.first_trained(n) > 0 for f in plan.phases]
    assert [r['how'] == 'solved' for r in rows] == [f.solves for f in plan.phases]
    assert learn.record.passes == sum(r['how'] == 'network' for r in rows) <= 1, 'more epochs than requested'
    assert learn.record.plan.name == name
    assert sum(s.startswith('phase ') for s in lines) == len(plan.phases)
    assert np.isfinite(probs(learn)).all()
    t = plan_table(learn, [name])
    for i, f in enumerate(plan.phases, 1):
        learn.freeze_to(f.first_trained(n))
        sizes = [(p.numel(), p.requires_grad) for p in learn.model.parameters()]
        # BatchNorm of frozen groups is frozen too: the learner is built with train_bn=False
        assert t.loc[(name, i), 'trainable'] == sum(m for m, g in sizes if g)
        assert t.loc[(name, i), 'total'] == sum(m for m, _ in sizes)


@pytest.mark.parametrize('arch', ARCHS)
def test_the_table_is_that_of_this_learner(build, arch):
    "Also if it was built with another stage, n_stages or head."
    width = build(arch=arch).body.stages.n_out
    own = nn.Sequential(AveragePool(), nn.Linear(width, 3))
    cases = [({}, 'linear'), ({'head': 'dense'}, 'dense'), ({'head': own}, 'custom module')]
    if arch != 'test_vit':
        eight = {'head': Head((8,), flatten=True)}
        cases += [
            ({'stage': 'stage2'}, 'linear'),
            ({'n_stages': 2}, 'linear'),
            (eight, 'custom, hidden layers of 8 units'),
        ]
    for kw, words in cases:
        learn = build(arch=arch, **kw)
        t = plan_table(learn, ['head', 'top1', 'fine_tune'])
        assert set(t['head']) == {words}
        assert t.epochs['head'].tolist() == ['solved' if words == 'linear' else 'by number of images']
        n = len(learner_groups(learn))
        for name in ('head', 'top1', 'fine_tune'):
            for i, f in enumerate(PLANS[name].phases, 1):
                learn.freeze_to(f.first_trained(n))
                assert t.loc[(name, i), 'trainable'] == learner_groups(learn).trainable.sum(), (kw, name)
                assert t.loc[(name, i), 'total'] == sum(p.numel() for p in learn.model.parameters())
    assert set(plan_table().columns) < set(plan_table(learn).columns)
    if arch == 'test_vit':
        learn = build(arch=NOT_A_CHAIN)
        assert plan_table(learn).total.isna().groupby('plan').all().loc[
            ['head', 'earlier_head', 'fine_tune']
        ].tolist() == [False, True, False]


def test_a_custom_plan_is_one_expression(build):
    plan = Plan(
        'mine',
        (replace(HEAD_PHASE, epochs=2), Phase(-4, 1, 2e-4, lr_mult=10)),
        stage='stage3',
        n_stages=2,
        head='dense',
        augment='mirror',
    )
    learn = silent(build(plan=plan))
    assert learn.record.plan.name == 'mine'
    assert [r['phase'] for r in learn.record.history] == [1, 1, 2]
    assert (learn.record.stage, learn.record.n_stages, learn.record.head.hidden, learn.record.augment) == (
        'stage3',
        2,
        (256,),
        'mirror',
    )


@pytest.mark.parametrize(
    'plan,word',
    [
        ('earlier_head', 'stage'),
        ('flw', "head 'flw'"),
        ('scratch', 'small_cnn'),
        ('augmented_head', 'random_crop'),
        (Plan('p', (HEAD_PHASE,), n_stages=2), '2 stages'),
        (Plan('p', (HEAD_PHASE,), augment='mirror'), "'mirror'"),
        (Plan('p', (HEAD_PHASE,), weights='random'), 'random weights'),
    ],
)
def test_a_plan_for_another_learner_is_an_error(build, plan, word):
    learn = build()
    before = state_of(learn)
    with pytest.raises(ValueError, match=word) as e:
        silent(learn, plan)
    assert 'build_learner' in str(e.value)
    for k, v in state_of(learn).items():
        assert torch.equal(v, before[k])


@pytest.mark.parametrize('frozen', [6, -7])
def test_more_groups_than_the_network_has(build, frozen):
    with pytest.raises(ValueError, match='6 groups'):
        silent(build(), Plan('p', (Phase(frozen, 1, 1e-3),)))


# ---------------------------------------------------------------- learning rates


class Rates(HeadFirst):
    "Record the learning rates and weight decays of each step"

    recorded: ClassVar = []
    order = 55
    name = 'head_first'  # it replaces the learner's callback

    def before_step(self):
        Rates.recorded.append([(h['lr'], h['wd']) for h in self.learn.opt.hypers] + [len(self.learn.opt.param_lists)])


@pytest.fixture
def rates(monkeypatch):
    Rates.recorded = []
    monkeypatch.setattr(stored_part, 'HeadFirst', Rates)
    monkeypatch.setattr('dr_transfer.training.learner.HeadFirst', Rates)
    return Rates.recorded


@warns_head
@pytest.mark.parametrize('stored', [True, False])
@pytest.mark.parametrize('frozen', [-1, -3, 2, 0])
def test_rates_are_those_of_the_phase(build, rates, frozen, stored):
    "If only the trained groups exist, they have the last of the learning rates"
    learn = build()
    f = Phase(frozen, 1, 1e-3, lr_mult=20, wd=0.07, schedule='none')
    silent(learn, Plan('p', (f,)), stored=stored)
    k = f.first_trained(6)
    want = f.rates(6)
    there = 6 - k if stored and k else 6
    assert rates
    for r in rates:
        assert r[-1] == there
    for *r, _ in rates:
        assert [lr for lr, _ in r][k - 6 :] == pytest.approx(want[k:])
        assert {wd for _, wd in r} == {0.07}
        assert [lr for lr, _ in r] == pytest.approx(want[6 - there :])
    assert want[-1] / want[0] == pytest.approx(20)
    assert want == sorted(want)


@warns_head
@pytest.mark.parametrize('stored', [True, False])
def test_one_cycle_keeps_the_ratio_of_learning_rates(build, rates, stored):
    f = Phase(2, 2, 1e-3, lr_mult=20)
    silent(build(), Plan('p', (f,)), stored=stored)
    steps = np.array([[lr for lr, _ in r[:-1]][-4:] for r in rates])
    assert len(steps) > 3
    assert steps / steps[:, -1:] == pytest.approx(np.array([f.rates(6)[2:]] * len(steps)) / 1e-3)
    assert steps[0, -1] == pytest.approx(1e-3 / 25)
    assert steps.max() <= 1e-3
    assert steps[:, -1].argmax() not in (0, len(steps) - 1)


# ---------------------------------------------------------------- training on stored features gives the same result
# SGD where a gradient is only a rounding error (of a shift before a BatchNorm, say), because Adam makes steps of
# the same length from it

VARIANTS = [
    *(dict(frozen=f, n_stages=t) for f, t in ((-2, 1), (-2, 4), (-3, 2), (2, 4))),
    *(dict(frozen=-3, views=v) for v in ('none', 'quarter_turns', 'mirror')),
    *(dict(frozen=-2, head=h, n_stages=2) for h in (Head((16,)), Head((16,), flatten=True))),
    dict(frozen=-1, head=Head((16,), flatten=True)),
    dict(frozen=-2, task='dr', views='quarter_turns', size=80, n_stages=4, opt_func=SGD),
    dict(frozen=-3, arch='test_efficientnet', n_stages=3),
    dict(frozen=2, arch='test_efficientnet', views='none'),
    dict(frozen=2, fixed_bn=True, opt_func=SGD),
    dict(frozen=-2, stage='stage3', n_stages=2, schedule='flat_cos'),
    dict(frozen=-2, bs=1000),
]


@warns_head
@pytest.mark.parametrize('v', VARIANTS, ids=lambda v: '-'.join(getattr(o, '__name__', str(o)) for o in v.values()))
def test_training_on_stored_features_is_the_same(build, v):
    v = dict(v)
    f = Phase(
        v.pop('frozen'),
        2,
        0.1 if 'opt_func' in v else 1e-3,
        lr_mult=20,
        wd=0.05,
        schedule=v.pop('schedule', 'one_cycle'),
    )
    task = v.pop('task', 'flowers')
    arch = v.pop('arch', 'test_resnet')
    a, b = (
        build(task, arch, augment=v.get('views', 'mirror_near'), **{k: o for k, o in v.items() if k != 'views'})
        for _ in range(2)
    )
    assert farthest(a, b) == 0
    before = state_of(a)
    for learner, s in ((a, True), (b, False)):
        silent(learner, Plan('p', (f,)), stored=s)
    assert [r['how'] for r in a.record.history + b.record.history] == ['stored'] * 2 + ['network'] * 2
    assert farthest(a, b) < 1e-5
    assert (
        max(float((x - before[k]).abs().max()) for k, x in state_of(a).items() if k.endswith('weight')) > 1e-4
    )  # and the weights have changed
    assert pd.DataFrame(a.record.history).drop(columns='how').to_numpy() == pytest.approx(
        pd.DataFrame(b.record.history).drop(columns='how').to_numpy(), abs=1e-4
    )


def test_steps_of_a_linear_head_are_the_same(build):
    "Except for the statistics of its BatchNorm, which are exact where they can be computed"
    a = build('dr')
    b = build('dr')
    for learner, s in ((a, True), (b, False)):
        silent(learner, Plan('p', (replace(STEPS, lr=1e-3),)), stored=s)
    assert farthest(a, b, but='1.1.running') < 1e-5
    assert farthest(a, b) > 1e-5
    f = learner_features(a, images(a, 'train')).numpy()
    assert a.model[1][1].running_mean.numpy() == pytest.approx(f.mean((0, 1)), abs=1e-4)
    assert a.model[1][1].running_var.numpy() == pytest.approx(f.reshape(-1, f.shape[-1]).var(0, ddof=1), rel=1e-3)


@warns_head
def test_two_phases_are_the_same(build):
    "Order and views continue where the previous phase ended"
    a = build()
    b = build()
    for learner, s in ((a, True), (b, False)):
        silent(learner, Plan('p', (Phase(-2, 1, 1e-3), Phase(-3, 1, 1e-3), Phase(0, 1, 1e-3))), stored=s)
    assert [r['how'] for r in a.record.history] == ['stored', 'stored', 'network']
    assert farthest(a, b) < 2e-5


@warns_head
def test_bf16_is_nearly_the_same(build):
    a, b = (build(runtime='bf16', n_stages=2) for _ in range(2))
    before = state_of(a)
    for learner, s in ((a, True), (b, False)):
        silent(learner, Plan('p', (Phase(-2, 2, 1e-3),)), stored=s)
    assert a.record.runtime.train == 'bf16, channels last' == b.record.runtime.train
    w = state_of(a)
    u = state_of(b)
    names = [k for k in w if k.endswith('weight')]
    apart, far = (np.sqrt(sum(float((w[k] - o[k]).square().sum()) for k in names)) for o in (u, before))
    assert far > 0
    assert apart < 0.2 * far
    assert probs(a) == pytest.approx(probs(b), abs=0.03)
    assert a.record.history[-1]['valid_loss'] == pytest.approx(b.record.history[-1]['valid_loss'], abs=0.03)


class Own(Callback):
    steps = 0

    def after_step(self):
        self.steps += 1


@warns_head
@pytest.mark.parametrize(
    'what,word',
    [
        ('augment', 'finite set'),
        ('chain', 'not a chain'),
        ('room', 'GB'),
        ('asked', 'stored=False'),
        ('callback', "'own'"),
    ],
)
def test_reasons_for_not_storing(build, monkeypatch, what, word):
    lines = []
    arch = 'test_resnet'
    kw = {}
    stored = True
    frozen = -2
    if what == 'augment':
        kw['augment'] = 'mirror+random_crop'
    if what == 'chain':
        arch = NOT_A_CHAIN
        frozen = 1
    if what == 'room':
        monkeypatch.setattr(stored_part, 'MAX_STORED_GB', 1e-9)
    if what == 'asked':
        stored = False
    if what == 'callback':
        kw['cbs'] = [Own()]
    learn = build(arch=arch, **kw)
    before = groups(learn)
    n = len(learner_groups(learn))
    fit(learn, Plan('p', (Phase(frozen, 1, 1e-3),)), stored=stored, say=lines.append)
    assert any('computed in every epoch' in s and word in s for s in lines)
    assert learn.record.history[0]['how'] == 'network'
    k = frozen % n
    assert moved(before, groups(learn)) == [False] * k + [True] * (n - k)
    if what != 'asked':
        assert word in why_not_stored(learn, frozen)
    if what == 'callback':
        assert learn.own.steps > 0


def test_why_not_stored(build):
    learn = build()
    assert [why_not_stored(learn, k) for k in (-1, -2, 2, 1)] == [''] * 4
    assert why_not_stored(learn, 0) == 'nothing is frozen'
    assert why_not_stored(build(arch=NOT_A_CHAIN)) == ''  # not divisible, but frozen: features are stored


# ---------------------------------------------------------------- the head first


def early_warnings(f, *args, **kwargs):
    "Return the warnings that the body is trained before the head"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [w for w in ws if 'before the head' in str(w.message)]


def test_a_body_before_its_head_warns(build):
    "F37: no warning after the head was trained in any way, or without pretrained weights"

    def first(learner):
        learner.unfreeze()
        quiet(learner, 'fit_one_cycle', 1, 1e-3)

    learn = build()
    ws = early_warnings(first, learn)
    assert len(ws) == 1
    assert 'learn.freeze()' in str(ws[0].message)
    assert 'fine_tune' in str(ws[0].message)
    one_epoch = Plan('p', (replace(HEAD_PHASE, epochs=1),))
    for train_head, *how in ((quiet, 'fit_one_cycle', 1, 1e-3), (silent, 'head'), (silent, one_epoch)):
        learn = build()
        assert not early_warnings(train_head, learn, *how)
        assert not early_warnings(first, learn)
    assert not early_warnings(quiet, build(), 'fine_tune', 1)
    assert not early_warnings(first, build(weights='random'))
    assert not early_warnings(silent, build(plan='fine_tune'), epochs=1)


def test_validation_and_prediction_are_not_training(build):
    "Validation and prediction do not count as training of the head, and do not warn"

    def look(learner):
        with learner.no_bar(), learner.no_logging():
            learner.validate()
            learner.predict(learner.table.image[0])

    learn = build()
    assert not early_warnings(lambda: look(learn))
    assert not learn.head_first.trained
    learn.unfreeze()
    assert not early_warnings(lambda: look(learn))
    assert learn.record.runtime.train == ''
    assert len(early_warnings(lambda: quiet(learn, 'fit_one_cycle', 2, 1e-3))) == 1
    assert learn.head_first.trained


@pytest.mark.parametrize('what', ['transform', 'loader', 'bs'])
def test_changed_loaders_are_used(build, what):
    learn = build()
    recorded = []

    class Watch(Transform):
        def encodes(self, x: TensorImage):
            recorded.append(len(x))
            return x

    assert why_not_stored(learn) == ''
    if what == 'transform':
        learn.dls.add_tfms([Watch()], 'after_batch')
    else:
        learn.dls.loaders[0] = learn.dls.train.new(
            dataset=learn.dls.train.dataset, **({'bs': 3} if what == 'bs' else {'cls': type('Own', (TfmdDL,), {})})
        )
    lines = []
    fit(learn, Plan('p', (replace(HEAD_PHASE, epochs=1),)), say=lines.append)
    if what == 'bs':
        assert why_not_stored(learn) == ''  # it is also the batch size of stored features
    else:
        assert 'the DataLoaders were changed' in ' '.join(lines)
    if what == 'transform':
        assert recorded


@pytest.mark.parametrize('stored', [True, False])
def test_a_plan_that_begins_with_the_body_warns(build, stored):
    learn = build()
    assert len(early_warnings(lambda: silent(learn, Plan('p', (Phase(-2, 1, 1e-3),)), stored=stored))) == 1
    assert not early_warnings(lambda: silent(learn, Plan('p', (Phase(-2, 1, 1e-3),)), stored=stored))


def damage(build, head_first):
    """How much training all layers changes the features of the first stages,
    as a fraction of how much these differ
    """
    learn = build(arch='efficientnet_lite0', opt_func=SGD, augment='none', fixed_bn=True)
    x = (
        torch.stack([torch.from_numpy(np.array(read_image(n, 64))).permute(2, 0, 1) for n in images(learn, 'train')])
        / 127.5
        - 1.0
    )

    def features_of_stages():
        learn.model.eval()
        with torch.no_grad():
            return learn.body.stages[:3](x).mean((2, 3))

    before = features_of_stages()
    if head_first:
        silent(learn, 'head')
    assert torch.equal(features_of_stages(), before)
    learn.unfreeze()
    quiet(learn, 'fit', 2, 1e-2, wd=0)
    return float((features_of_stages() - before).norm() / (before - before.mean(0)).norm())


@warns_head
def test_a_random_head_damages_early_features(build):
    """F38: the same steps at the same high learning rate, of all layers of a pretrained network,
    after its head or with a random one. Steps in proportion to the gradient (SGD), statistics fixed: Adam takes steps
    of the same length for any gradient, and new statistics change more than either
    """
    first = damage(build, True)
    at_once = damage(build, False)
    assert at_once > 3 * first > 0, (at_once, first)


# ---------------------------------------------------------------- exact averaging


def tta(learn, *args, **kw):
    with learn.no_bar():
        return learn.tta(*args, **kw)


def squares(folder, t):
    "Files of images at the size of the input, so that a quarter turn keeps each pixel; with their labels"
    for i, r in t.iterrows():
        read_image(r.image, 64, 'fundus', 'pad').save(folder / f'{i}.png')
    return t.assign(image=[str(folder / f'{i}.png') for i in t.index])[['image', 'label', 'group']]


def test_tta_is_exact(build, tmp_path):
    "U9: the mean over the four rotations is reproducible, and the same for rotated images"
    learn = silent(
        build(replace(get_task('dr'), reader='photo', fit='crop'), data=squares(tmp_path, build('dr').table)),
        Plan('p', (STEPS,)),
    )

    def alone(k):
        with learn.no_bar():
            return learn.get_preds(dl=learn.dls.test_dl([Image.open(n).rotate(90 * k) for n in images(learn)]))[0]

    p, y = tta(learn)
    assert torch.equal(p, tta(learn)[0])
    assert torch.allclose(p.sum(1), torch.ones(len(p)))
    assert y.tolist() == [learn.dls.vocab.o2i[t] for t in learn.table.target[learn.table.split == 'valid']]
    each = [alone(k) for k in range(4)]
    assert torch.allclose(p, torch.stack(each).mean(0), atol=1e-5)
    assert not torch.allclose(p, each[0], atol=1e-3)
    assert p.numpy() == pytest.approx(predict_probs(learn, images(learn)), abs=1e-5)
    for k in (1, 2, 3):
        ims = [Image.open(n).rotate(90 * k) for n in images(learn)]
        assert torch.allclose(tta(learn, dl=learn.dls.test_dl(ims))[0], p, atol=1e-5)
    assert torch.allclose(tta(learn, dl=learn.dls.test_dl(images(learn)))[0], p, atol=1e-5)
    one = tta(learn, views='none')[0]
    with learn.no_bar():
        assert torch.allclose(one, learn.get_preds()[0], atol=1e-6)


@pytest.mark.parametrize(
    'task,augment',
    [
        ('dr', None),
        ('flowers', None),
        ('flowers', 'mirror'),
    ],
)
def test_tta_of_the_training_images(build, task, augment):
    "Each image in the order of the table, without randomness; training is augmented afterwards as before"
    learn = silent(build(task, augment=augment), Plan('p', (STEPS,)))
    p, y = tta(learn, 0)
    assert torch.equal(p, tta(learn, ds_idx=0)[0])
    assert p.numpy() == pytest.approx(predict_probs(learn, images(learn, 'train')), abs=1e-5)
    assert y.tolist() == [learn.dls.vocab.o2i[t] for t in learn.table.target[learn.table.split == 'train']]
    assert torch.allclose(tta(learn, dl=learn.dls.train)[0], p, atol=1e-5)
    dl = learn.dls.train.new(shuffle=False, drop_last=False)
    one, two = ([torch.Tensor(x) for x, _ in dl] for _ in range(2))
    assert not all(map(torch.equal, one, two))


def test_tta_of_fastai(build):
    "With its own arguments, or for random augmentation"
    for learn, kw in ((build(), dict(n=2, beta=0.0)), (build(augment='random_crop'), {})):
        silent(learn, Plan('p', (STEPS,)))
        torch.manual_seed(3)
        a = tta(learn, **kw)[0]
        torch.manual_seed(3)
        with learn.no_bar():
            b = super(type(learn), learn).tta(**kw)[0]
        torch.manual_seed(4)
        c = tta(learn, **kw)[0]
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    jitter = silent(
        build(augment='colour_jitter+random_crop'), Plan('p', (STEPS,))
    )  # several random ones, and requested views
    assert tta(jitter, 0, views='mirror')[0].numpy() == pytest.approx(
        predict_probs(jitter, images(jitter, 'train'), 'mirror'), abs=1e-5
    )


# ---------------------------------------------------------------- classifiers as learners


def classified(data_folder, task, kind, stages, target='referable', arch='test_resnet', table=None, **kw):
    f = image_features(
        table.image.tolist(),
        arch,
        data_folder / f'{arch}.safetensors',
        'plain',
        64,
        stages=stages,
        **({'reader': 'fundus', 'fit': 'pad', 'views': 'quarter_turns'} if task == 'dr' else {'views': 'mirror'}),
    )
    return FeatureClassifier(kind, **kw).fit(f, table.target, table.group), f


@pytest.mark.parametrize(
    'kind,target,stages',
    [
        ('logistic', 'grade', ['stage3', 'stage4']),
        ('dense', 'referable', ['stage1', 'stage2', 'stage3', 'stage4']),
        ('dense', 'grade', ['stage4']),
        ('logistic', 'referable', ['stage2']),
    ],
)
def test_a_classifier_as_a_learner(build, data_folder, tmp_path, kind, target, stages):
    t = build('dr', target=target).table
    c, f = classified(data_folder, 'dr', kind, stages, table=t)
    want = c.predict_proba(f)
    learn = classifier_learner(
        c,
        data_folder / 'dr',
        'dr',
        weights=data_folder / 'test_resnet.safetensors',
        target=target,
        runtime='plain',
        num_workers=0,
        device=CPU,
        bs=16,
        path=tmp_path,
    )
    assert list(learn.dls.vocab) == list(c.classes_)
    assert learn.record.n_stages == len(stages)
    assert learn.record.stage == stages[-1]
    assert predict_probs(learn, t.image) == pytest.approx(want, abs=1e-4)
    assert tta(learn)[0].numpy() == pytest.approx(want[(learn.table.split == 'valid').to_numpy()], abs=1e-4)
    save_model(learn, tmp_path / 'model')
    assert load_model(tmp_path / 'model', 'plain').probs(t.image.tolist()) == pytest.approx(want, abs=1e-4)
    learn.export(tmp_path / 'learner.pkl')
    again = load_learner(tmp_path / 'learner.pkl')
    with again.no_bar(), learn.no_bar():
        assert torch.equal(again.predict(t.image[0])[2], learn.predict(t.image[0])[2])
    before = groups(learn)
    learn.unfreeze()
    assert not early_warnings(lambda: quiet(learn, 'fit_one_cycle', 1, slice(1e-5, 1e-4)))  # its head is trained
    assert all(moved(before, groups(learn)))
    silent(learn, Plan('p', (Phase(-2, 1, 1e-4),)))
    save_model(learn, tmp_path / 'tuned')
    assert load_model(tmp_path / 'tuned', 'plain').probs(t.image.tolist()) == pytest.approx(
        predict_probs(learn, t.image), abs=1e-5
    )


def test_classifiers_that_cannot_be_learners(build, data_folder):
    t = build('dr').table
    own = dict(runtime='plain', num_workers=0, device=CPU)

    def make(c, weights=data_folder / 'test_resnet.safetensors', **kw):
        return classifier_learner(c, data_folder / 'dr', 'dr', weights=weights, **own, **kw)

    c, f = classified(data_folder, 'dr', 'logistic', ['stage1', 'stage3', 'stage4'], table=t)
    with pytest.raises(ValueError, match='not consecutive'):
        make(c)
    good = FeatureClassifier(stages=['stage4']).fit(f, t.target, t.group)
    make(good)
    with pytest.raises(ValueError, match='other weights'):
        make(good, weights='random')
    with pytest.raises(ValueError, match="the classifier has classes \\['no', 'referable'\\]"):
        make(good, target='grade')
    with pytest.raises(ValueError, match='not fitted on Features'):
        make(FeatureClassifier().fit(f.numpy('stage4'), t.target, t.group))
    with pytest.raises(ValueError, match='not fitted on Features'):
        make(FeatureClassifier())
    with pytest.raises(ValueError, match=r'no head|head of a network'):
        make(FeatureClassifier('forest', ['stage4']).fit(f, t.target, t.group))
    both = image_features(
        t.image.tolist(),
        'test_resnet',
        data_folder / 'test_resnet.safetensors',
        'plain',
        64,
        stages=['stage4'],
        pools=('max', 'mean'),
    )
    make(FeatureClassifier().fit(both, t.target, t.group))  # on means, whatever the order
    with pytest.raises(ValueError, match='max'):
        make(FeatureClassifier(pool='max').fit(both, t.target, t.group))


# ---------------------------------------------------------------- a head that is solved


@pytest.mark.parametrize(
    'task,arch',
    [
        ('flowers', 'test_resnet'),
        ('dr', 'test_efficientnet'),
        ('dr', 'test_vit'),
    ],
)
def test_a_solved_head_is_the_classifier(build, task, arch):
    learn = build(task, arch, seed=5)
    lines = []
    before = groups(learn)
    fit(learn, 'head', say=lines.append)
    n = len(before)
    assert moved(before, groups(learn)) == [False] * (n - 1) + [True]
    for s in lines:
        assert 'steps' not in s
    rows = learn.table[learn.table.split == 'train']
    c = FeatureClassifier(seed=5).fit(learner_features(learn, rows.image.tolist()), rows.target, rows.group)
    assert learn.record.C == c.estimator_.C
    assert {r['C']: r['loss'] for r in learn.record.C_path} == c.estimator_.losses_
    assert min(learn.record.C_path, key=lambda r: r['loss'])['C'] == learn.record.C
    for subset in ('valid', 'train'):
        assert predict_probs(learn, images(learn, subset)) == pytest.approx(
            c.predict_proba(learner_features(learn, images(learn, subset))), abs=1e-4
        )
    (row,) = learn.record.history
    with learn.no_bar(), learn.no_logging():
        values = learn.validate()
    assert row['how'] == 'solved'
    assert row['epoch'] == 1
    assert [row[k] for k in ('valid_loss', *(m.name for m in learn.metrics))] == pytest.approx(list(values), abs=1e-4)
    assert valid_predictions(learn).filter(like='p_').to_numpy() == pytest.approx(
        predict_probs(learn, images(learn)), abs=1e-5
    )


def few(data_folder):
    "A table in which one class has two groups for training, or fewer"
    files = sorted((data_folder / 'flowers').rglob('*.png')) or sorted((data_folder / 'flowers').rglob('*.jpg'))
    t = pd.DataFrame({'image': [str(f) for f in files], 'label': [f.parent.name for f in files]})
    t['group'] = [f'{r.label}{i % (2 if r.label == "daisy" else 9)}' for i, r in t.iterrows()]
    return t


@pytest.mark.parametrize('why', ['weights', 'smoothing', 'groups', 'own', 'dropout', 'many', 'endless', 'asked'])
def test_a_head_that_cannot_be_solved(build, data_folder, monkeypatch, why):
    kw = {}
    lines = []
    data = None
    plan = 'head'
    word = {
        'weights': 'loss',
        'smoothing': 'loss',
        'groups': "'daisy' has",
        'own': 'not a linear',
        'dropout': 'not a linear',
        'many': 'too many',
        'endless': 'finite set',
        'asked': '',
    }[why]
    if why == 'weights':
        kw['loss_func'] = CrossEntropyLossFlat(weight=torch.tensor([1.0, 2.0, 3.0]))
    if why == 'smoothing':
        kw['loss_func'] = CrossEntropyLossFlat(label_smoothing=0.1)
    if why == 'groups':
        data = few(data_folder)
    if why == 'own':
        kw['head'] = nn.Sequential(AveragePool(), nn.Linear(96, 3))
    if why == 'dropout':
        kw['head'] = Head((), 0.2)
    if why == 'many':
        monkeypatch.setattr(phases, 'MAX_SOLVED_NUMBERS', 100)
    if why == 'endless':
        kw['augment'] = 'mirror+random_crop'
    if why == 'asked':
        plan = Plan('p', (replace(HEAD_PHASE, epochs=2),))
    monkeypatch.setattr(phases, 'head_epochs', lambda n, bs: 2)
    monkeypatch.setattr(phases, 'HEAD_PASSES', 2)
    learn = build(data=data, **kw)
    before = groups(learn)
    fit(learn, plan, say=lines.append)
    assert len(learn.record.history) == 2
    assert learn.record.C is None
    assert moved(before, groups(learn)) == [False] * 5 + [True]
    assert any(word in s for s in lines)
    assert why in ('asked', 'endless') or any('in steps, because' in s for s in lines)
    assert [r['how'] for r in learn.record.history] == ['network' if why == 'endless' else 'stored'] * 2


# ---------------------------------------------------------------- interrupted


class Stop:
    "Count the images that pass a module, and interrupt before a given one"

    def __init__(self, module, at=None):
        self.n = 0
        self.at = at
        self.hook = module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        if not args[0].abs().sum():
            return  # only a test of shapes
        if self.at is not None and self.n >= self.at:
            raise KeyboardInterrupt
        self.n += len(args[0])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


@warns_head
@pytest.mark.parametrize(
    'plan',
    [
        Plan('p', (HEAD_PHASE,)),
        Plan('p', (STEPS,)),
        Plan('p', (Phase(-3, 2, 1e-3),)),
    ],
    ids=['solved', 'steps', 'boundary'],
)
def test_interrupted_while_features_are_computed(build, monkeypatch, tmp_path, plan):
    "Nothing is computed twice, and the result is that of a run without interruption"
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'other'))
    learner = build('dr')
    with Stop(learner.body.stages[0]) as all_:
        silent(learner, plan)
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'mine'))
    learn = build('dr')
    before = state_of(learn)
    cbs = [type(c) for c in learn.cbs]
    with Stop(learn.body.stages[0], at=70) as some, pytest.raises(KeyboardInterrupt):
        silent(learn, plan)  # 8 images x 8 views a batch
    for k, v in state_of(learn).items():
        assert torch.equal(v, before[k])
    assert [type(c) for c in learn.cbs] == cbs
    assert not learn.record.history
    with Stop(learn.body.stages[0]) as rest:
        silent(learn, plan)
    assert all_.n == 8 * len(learn.table)
    assert some.n == 72 - 72 % 8
    assert rest.n == all_.n - 64
    assert farthest(learn, learner) < 1e-6
    assert pd.DataFrame(learn.record.history).drop(columns='how').to_numpy(float) == pytest.approx(
        pd.DataFrame(learner.record.history).drop(columns='how').to_numpy(float)
    )
    with Stop(build('dr').body.stages[0]) as none:
        silent(build('dr'), plan)
    assert none.n == 0


@warns_head
@pytest.mark.parametrize('stored', [True, False])
def test_interrupted_while_it_trains(build, stored):
    "The learner can be used and trained further, and frozen layers are not changed"
    learn = build('dr')
    plan = Plan('p', (Phase(-2, 3, 1e-3),))
    before = groups(learn)
    cbs = sorted(type(c).__name__ for c in learn.cbs)
    dls = (learn.dls.train, learn.dls.valid)
    with Stop(learn.model[1], at=12), pytest.raises(KeyboardInterrupt):
        silent(learn, plan, stored=stored)
    assert moved(before, groups(learn)) == [False] * 4 + [True] * 2
    assert not learn.record.history
    assert sorted(type(c).__name__ for c in learn.cbs) == cbs
    assert (learn.dls.train, learn.dls.valid) == dls
    assert learn.opt is not None
    assert probs(learn).sum(1) == pytest.approx(np.ones(len(images(learn))), abs=1e-5)
    assert len(valid_predictions(learn)) == len(images(learn))
    tta(learn)
    silent(learn, plan, stored=stored)
    assert len(learn.record.history) == 3
    assert moved(before, groups(learn)) == [False] * 4 + [True] * 2
    learn.unfreeze()
    quiet(learn, 'fit_one_cycle', 1, 1e-4)
    assert all(moved(before, groups(learn)))


@pytest.mark.parametrize('plan', ['head', 'top1'])
def test_a_learner_after_a_stored_phase(build, tmp_path, plan):
    "It can be saved with its optimiser, loaded, trained by fastai, and used for prediction"
    learn = silent(build(path=tmp_path), plan, epochs=1 if plan != 'head' else None)
    learn.save('here')
    again = build(path=tmp_path).load('here')
    assert farthest(learn, again) == 0
    k = 6 + PLANS[plan].phases[-1].frozen
    before = groups(learn)
    quiet(learn, 'fit_one_cycle', 1, 1e-3)
    assert moved(before, groups(learn)) == [False] * k + [True] * (6 - k)
    with learn.no_bar():
        assert learn.predict(learn.table.image[0])[2].shape == (3,)


def test_an_error_in_a_stored_phase_leaves_a_learner(build):
    learn = build()
    good = learn.loss_func
    learn.loss_func = lambda *_: 1 / 0
    steps = Plan('p', (replace(HEAD_PHASE, epochs=1),))
    with pytest.raises(ZeroDivisionError):
        silent(learn, steps)
    learn.loss_func = good
    silent(learn, steps)
    with pytest.raises(ValueError, match='one_cycle'):
        silent(learn, Plan('p', (Phase(-1, 1, 1e-3, schedule='one_cyle'),)))
    assert len(learn.record.history) == 1
    assert np.isfinite(probs(learn)).all()


def test_a_head_is_solved_for_images_without_groups(tmp_path):
    "A table without patients: every image is its own group."
    t = make_flowers(tmp_path / 'flowers', n=40, size=48, classes=('daisy', 'tulips'))
    table = pd.DataFrame({'image': [str(tmp_path / 'flowers' / i) for i in t.image], 'label': t.label})
    lines = []
    learn = fit(
        build_learner(table, arch='test_resnet', weights='random', size=48, runtime='plain'), 'head', say=lines.append
    )
    assert learn.record.C > 0
    for s in lines:
        assert 'in steps' not in s


@pytest.mark.parametrize('frozen', [-2, 2, 0])
def test_predictions_follow_the_weights(build, frozen):
    "Forward passes use a copy of the body, which is never out of date"
    learn = build(arch='test_resnet', runtime='channels_last')
    images = learn.table[learn.table.split == 'valid'].image.tolist()
    fit(learn, Plan('own', (HEAD_PHASE, Phase(frozen, 1, 1e-2, fixed_bn=True))), say=lambda s: None)
    ours = predict_probs(learn, images)
    learn.body.forward_runtime = RUNTIMES['plain']  # no copy
    assert np.allclose(ours, predict_probs(learn, images), atol=1e-4)


def test_the_table_of_plans_uses_the_augmentation_of_a_plan(build):
    "Random crops cannot be stored, so the head is not solved, with a learner as without."
    plan = replace(PLANS['head'], augment='+random_crop')
    assert plan_table(plans=[plan]).epochs.tolist() == ['at most 10']
    assert plan_table(build(), plans=[plan]).epochs.tolist() == ['at most 10']
