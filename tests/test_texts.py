"Test small capabilities from the source texts and from requests of users of other libraries."

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from torch import nn

from dr_transfer.data.fundus import read_image
from dr_transfer.data.images import image_errors
from dr_transfer.data.split import split_table
from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import encode_target, get_task, task_dataloaders
from dr_transfer.data.views import stack_images
from dr_transfer.models.network import create_head
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.synthetic.fundus import make_dr
from dr_transfer.utils.files import progress


class Rates(Callback):
    "Learning rate, weight decay and momenta of each step, for all trained parameters"

    def __init__(self):
        self.recorded = []

    def before_step(self):
        self.recorded += [
            (h['lr'], h['wd'], h['mom'], h['sqr_mom'])
            for h, ps in zip(self.learn.opt.hypers, self.learn.opt.param_lists)
            if any(p.requires_grad for p in ps)
        ]


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp('flowers')
    make_flowers(folder, n=24, size=48, seed=0)
    return label_table(folder)


def loaders(t, num_workers=0, **kw):
    task = get_task('flowers', 48, 'none')
    return task_dataloaders(
        split_table(encode_target(t, task.target()), seed=1), task, task.target(), bs=8, num_workers=num_workers, **kw
    )


def test_labels_to_codes_to_one_hot_and_back(table):
    dls = loaders(table)
    _x, y = dls.valid.one_batch()
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(y), dls.c)
    assert dls.vocab == sorted(set(table.label))
    assert one_hot.shape == (len(y), len(dls.vocab))
    assert (one_hot.sum(1) == 1).all()
    assert [dls.vocab[i] for i in one_hot.argmax(1)] == dls.valid_ds.items.target[: len(y)].tolist()


def test_a_complete_set_as_an_array(table):
    "From images of different sizes, in the order of the table"
    images = [read_image(i, 40) for i in table.image]
    array = stack_images(images).numpy()
    assert array.shape == (len(table), 3, 40, 40)
    assert array.dtype == np.uint8
    for a, i in zip(array, images):
        assert (a == np.asarray(i).transpose(2, 0, 1)).all()


def test_a_seed_decides_a_split_of_four_fifths(table):
    a, b, c = (split_table(table, 0.2, seed=s).split.tolist() for s in (1, 1, 2))
    assert a == b != c
    assert 0.1 <= a.count('valid') / len(a) <= 0.3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_a_line_with_a_count_in_a_log():
    log = io.StringIO()
    terminal = Terminal()
    assert (
        list(progress(range(3), label='images', every=0, file=log))
        == list(progress(range(3), label='images', file=terminal))
        == [0, 1, 2]
    )
    assert log.getvalue().splitlines() == ['images: 1 of 3', 'images: 2 of 3', 'images: 3 of 3', 'images: 3, done']
    assert '\r' not in log.getvalue()
    assert 'images' in terminal.getvalue()
    assert '3/3' in terminal.getvalue()
    assert '\r' in terminal.getvalue()


def test_reading_images_shows_progress(table, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    image_errors(table.image.tolist())
    assert f'{len(table)}/{len(table)}' in terminal.getvalue()


@pytest.mark.parametrize('n', [0, 2])
def test_the_requested_number_of_workers(table, n):
    dls = loaders(table, num_workers=n)
    assert [dl.fake_l.num_workers for dl in dls] == [n, n]


def test_the_default_batch_size_is_32():
    from inspect import signature

    from dr_transfer.core import build_learner

    assert (
        signature(build_learner).parameters['bs'].default == signature(task_dataloaders).parameters['bs'].default == 32
    )


def test_the_flowers_recipe_is_thirty_epochs_of_adam_at_one_rate(table):
    from dr_transfer.core import build_learner, fit

    rates = Rates()
    learn = build_learner(
        table,
        'flowers',
        plan='flw',
        arch='small_cnn',
        weights='random',
        size=32,
        runtime='plain',
        allow_leaks=True,
        cbs=[rates],
    )
    assert learn.opt_func is Adam
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    assert learn.record.augment == 'flowers'
    history = fit(learn, say=lambda line: None).record.history
    assert len(history) == 30
    for h in history:
        assert 0 <= h['accuracy'] <= 1
    assert set(rates.recorded) == {(1e-3, 0.0, 0.9, 0.99)}, 'more than one learning rate, or weight decay'


def test_the_head_of_the_flowers_recipe_layer_by_layer():
    """Flatten, BN, 2048 ReLU (He et al. 2015), BN, 1024 ReLU, BN, one output per class,
    of which the loss computes the softmax; the positions of the map are not averaged
    """
    head = create_head('flw', 10 * 7 * 7, 5).train()
    kinds = [type(m) for m in head if not isinstance(m, nn.Dropout)]
    assert kinds == [
        nn.Flatten,
        nn.BatchNorm1d,
        nn.Linear,
        nn.ReLU,
        nn.BatchNorm1d,
        nn.Linear,
        nn.ReLU,
        nn.BatchNorm1d,
        nn.Linear,
    ]
    for m in head:
        if isinstance(m, nn.Dropout):
            assert m.p == 0, 'the recipe has dropout'
    dense = [m for m in head if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in dense] == [(490, 2048), (2048, 1024), (1024, 5)]
    for m in dense[:2]:
        assert abs(m.weight.std().item() * (m.in_features / 2) ** 0.5 - 1) < 0.02, (
            'not the variance of He: 2 / number of inputs'
        )
    assert head(torch.randn(3, 10, 7, 7)).shape == (3, 5)


def test_rotations_reduce_the_gap_between_training_and_validation(tmp_path):
    "The gap between the subsets, for a model with rotations and for one without"
    from dr_transfer.core import build_learner, fit, generalization_gap
    from dr_transfer.data.tasks import get_task

    make_dr(tmp_path / 'fundus', n=40, size=48, seed=0, workers=1)
    gaps = []
    task = replace(get_task('dr'), reader='fundus')
    for augment in ('none', 'quarter_turns'):
        learn = build_learner(
            tmp_path / 'fundus',
            task,
            arch='test_resnet',
            weights='random',
            size=48,
            bs=8,
            runtime='plain',
            num_workers=0,
            augment=augment,
            device=torch.device('cpu'),
        )
        gaps.append(generalization_gap(fit(learn, 'head', say=lambda s: None)))
    for g in gaps:
        assert {'train', 'valid', 'gap'} == set(g.index)
        assert np.allclose(g.loc['gap'], g.loc['train'] - g.loc['valid'], equal_nan=True)
    assert gaps[1].loc['gap', 'auc'] < gaps[0].loc['gap', 'auc']  # augmentation against over-fitting
