"Test that epochs are passes through the network, that diverging training stops, and that nothing is trained twice."

from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from learners import same_state, state_of
from torch import nn

from dr_transfer.core import build_learner, fit, predict_probs, valid_predictions
from dr_transfer.evaluation import cross_validation as crossval
from dr_transfer.evaluation.compare import compare
from dr_transfer.evaluation.cross_validation import cross_validate
from dr_transfer.evaluation.experiments import learning_curve, training_curve
from dr_transfer.features import classifiers
from dr_transfer.models.backbones import create_body, save_weights
from dr_transfer.models.head import Head
from dr_transfer.models.network import AveragePool, check_network_size, min_size
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.training import phases
from dr_transfer.training import stored as stored_part
from dr_transfer.training.callbacks import TrainingError
from dr_transfer.training.phases import phase_runs
from dr_transfer.training.plans import HEAD_PHASE, Phase, Plan, get_plan, plan_table

CLASSES = ('daisy', 'roses', 'sunflowers')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two regularisation strengths and few steps: the tests check how a phase is run,
    not its result
    """
    monkeypatch.setattr(classifiers, 'C_VALUES', (1e-3, 1e-2))
    monkeypatch.setattr(phases, 'head_epochs', lambda n, bs: 4)


@pytest.fixture(scope='session')
def set_of_flowers(tmp_path_factory):
    "Some flowers of 32 pixels, and a tiny network with a weights file, as if pretrained"
    folder = tmp_path_factory.mktemp('training')
    make_flowers(folder / 'flowers', n=45, size=32, classes=CLASSES)
    torch.manual_seed(0)
    save_weights(create_body('test_resnet', 'random'), folder / 'weights.safetensors')
    return folder


@pytest.fixture
def build(set_of_flowers, tmp_path):
    def make(**kw):
        given = {
            'arch': 'test_resnet',
            'weights': set_of_flowers / 'weights.safetensors',
            'size': 32,
            'bs': 16,
            'runtime': 'plain',
            'num_workers': 0,
            'device': torch.device('cpu'),
            'path': tmp_path,
            **kw,
        }
        return build_learner(given.pop('data', set_of_flowers / 'flowers'), 'flowers', **given)

    return make


class Images:
    "Count the training images that pass the first stage of a body with gradients, or in training mode"

    def __init__(self, learn):
        self.n = 0
        self.learn = learn
        self.hook = learn.body.stages[0].register_forward_pre_hook(self)

    def __call__(self, module, args):
        if self.learn.training and torch.is_grad_enabled():
            self.n += len(args[0])


class Batches(Callback):
    "A callback of the user that counts the steps"

    steps = 0

    def after_step(self):
        self.steps += 1


def printed_lines(learn, *args, **kw):
    "Return what `fit` prints"
    lines = []
    fit(learn, *args, say=lines.append, **kw)
    return lines


def ways(learn):
    return [row['how'] for row in learn.record.history]


def train_size(learn):
    return int((learn.table.split == 'train').sum())


# ---------------------------------------------------------------- epochs are passes through the network


@pytest.mark.parametrize('callback', [SaveModelCallback, MixUp, Batches])
@pytest.mark.parametrize('plan', ['top1', 'fine_tune'])
def test_one_epoch_is_one_pass(build, plan, callback):
    "The head is solved first, and the callback gets the batches of its phase"
    learn = build(cbs=[callback()])
    images = Images(learn)
    lines = printed_lines(learn, plan, epochs=1)
    assert ways(learn) == ['solved', 'network']
    assert learn.record.passes == 1
    batches = train_size(learn) // learn.dls.train.bs
    assert images.n == batches * learn.dls.train.bs, 'not one pass through the images, except for the incomplete batch'
    for line in lines:
        assert 'of 300' not in line
    if callback is Batches:
        assert learn.batches.steps == batches


def test_the_total_is_printed_before_anything_is_trained(build):
    learn = build(cbs=[Batches()])
    lines = []

    def say(line):
        lines.append((line, learn.batches.steps, learn.head_first.trained))

    fit(learn, 'top2', epochs=2, say=say)
    first, steps, trained = lines[0]
    assert steps == 0
    assert not trained
    assert first.startswith(
        "plan 'top2': phase 1 of 2: head, solved on stored features; phase 2 of 2: head and last 2 groups, 2 epochs"
    )
    assert first.endswith(f'Total: 2 passes of {train_size(learn)} images through the network')
    assert 'no pass through the network' in printed_lines(build(), 'head')[0]


@pytest.mark.parametrize(
    'how',
    [
        {'augment': 'mirror+random_crop'},
        {'head': 'dense'},
        {'balance': 'weights'},
        {'balance': 'sampling'},
        {},
    ],
)
@pytest.mark.parametrize('stored', [True, False])
def test_no_phase_has_more_passes_than_requested(build, how, stored):
    "For each reason why a head is not solved or stored"
    learn = build(cbs=[Batches()], **how)
    images = Images(learn)
    fit(learn, 'top1', epochs=1, stored=stored, say=str)
    passes = ways(learn).count('network')
    assert passes == learn.record.passes == (1 if stored else 2)
    assert images.n <= passes * train_size(learn)


def test_a_head_that_cannot_be_stored_has_a_small_number_of_passes(build):
    learn = build(augment='mirror+random_crop')
    assert [(r.how, r.epochs) for r in phase_runs(learn, get_plan('head'))] == [('network', phases.HEAD_PASSES)]
    assert [(r.how, r.epochs) for r in phase_runs(learn, get_plan('head'), 3)] == [('network', 3)]
    assert [r.how for r in phase_runs(learn, get_plan('top1'))] == ['solved', 'network'], (
        'a head that only prepares is not solved'
    )


def test_a_number_of_its_own_is_bounded_too(build):
    plan = Plan('p', (Phase(-1, 7, 1e-3), Phase(0, 2, 1e-4)))
    runs = phase_runs(build(), plan.with_epochs(3), 3, stored=False)
    assert [r.epochs for r in runs] == [3, 3]


def test_epochs_do_not_change_a_head_that_is_solved(build):
    "In an earlier version, the accuracy of 1.000 was .458 with epochs=2"
    plain = build()
    two_epochs = build()
    fit(plain, 'head', say=str)
    lines = printed_lines(two_epochs, 'head', epochs=2)
    assert same_state(state_of(plain), state_of(two_epochs))
    assert ways(two_epochs) == ['solved']
    assert two_epochs.record.history == plain.record.history
    assert any('epochs=2' in line and 'has no effect' in line for line in lines)


def test_epochs_do_not_change_a_head_in_steps_on_what_is_stored(build):
    a = build(head='dense')
    b = build(head='dense')
    fit(a, 'head', say=str)
    fit(b, 'head', epochs=1, say=str)
    assert ways(a) == ways(b) == ['stored'] * 4
    assert same_state(state_of(a), state_of(b))


def test_compare_with_epochs_does_not_damage_the_head(set_of_flowers):
    ask = dict(archs='small_cnn', plans='head', weights='random', size=32, runtime='plain', say=str)
    with_epochs, without = (compare(set_of_flowers / 'flowers', epochs=e, **ask) for e in (2, None))
    assert with_epochs.tables['head'].equals(without.tables['head'])


@pytest.mark.parametrize('epochs', [0, -1, 1.5, True, '2', float('nan')])
def test_invalid_numbers_of_epochs(build, set_of_flowers, epochs):
    learn = build()
    before = state_of(learn)
    for plan in ('head', 'top1'):
        with pytest.raises(ValueError, match='1 or more'):
            fit(learn, plan, epochs=epochs, say=str)
    assert same_state(before, state_of(learn))
    for ask in (
        lambda: Phase(0, epochs, 1e-3),
        lambda: compare(set_of_flowers, epochs=epochs),
        lambda: training_curve(set_of_flowers, epochs=epochs),
    ):
        with pytest.raises(ValueError, match='1 or more'):
            ask()


@pytest.mark.parametrize(
    'wrong',
    [
        {'lr': float('nan')},
        {'lr': 0.0},
        {'lr': -1e-3},
        {'lr': float('inf')},
        {'lr': '1e-3'},
        {'wd': -1.0},
        {'wd': float('nan')},
        {'lr_mult': 0.0},
        {'frozen': 0.5},
        {'frozen': True},
    ],
)
def test_invalid_learning_rates(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Phase(**{'frozen': 0, 'epochs': 1, 'lr': 1e-3, **wrong})


def test_the_table_of_plans_shows_how_epochs_are_determined():
    epochs = plan_table().epochs
    assert epochs['head'].tolist() == ['solved']
    assert epochs['top1'].tolist() == ['solved', 5]
    assert epochs['random_init'].tolist() == ['by number of images']
    assert epochs['flw'].tolist() == [30]
    mine = [
        Plan('dense', (HEAD_PHASE,), head='dense'),
        Plan('crops', (HEAD_PHASE,), augment='+random_crop'),
        Plan('then', (HEAD_PHASE, Phase(0, 2, 1e-3)), augment='+random_crop'),
    ]
    t = plan_table(plans=mine).epochs
    assert t['dense'].tolist() == ['by number of images']
    assert t['crops'].tolist() == ['at most 10']
    assert t['then'].tolist() == ['solved', 2]


# ---------------------------------------------------------------- a trained head is not trained again


def test_a_trained_head_is_not_trained_again(build):
    "After augmented_head, top2 for two epochs goes through the network twice"
    learn = build(plan='augmented_head')
    fit(learn, epochs=1, say=str)
    assert learn.record.passes == 1
    lines = printed_lines(learn, 'top2', epochs=2)
    assert learn.record.passes == 3
    assert [r['phase'] for r in learn.record.history] == [1, 2, 2]
    assert 'phase 1 of 2: head, skipped, because the head is already trained' in lines[0]


def test_the_second_fit_continues_the_first(build):
    learn = build()
    fit(learn, 'top1', epochs=1, say=str)
    fit(learn, 'top1', epochs=2, say=str)
    assert [(r['phase'], r['how']) for r in learn.record.history] == [
        (1, 'solved'),
        (2, 'stored'),
        (2, 'stored'),
        (2, 'stored'),
    ]


def test_a_requested_head_is_solved_again(build):
    learn = build()
    fit(learn, 'head', say=str)
    solved = state_of(learn)
    with torch.no_grad():
        learn.model[1][-1].bias += 1.0
    fit(learn, 'head', say=str)
    assert same_state(solved, state_of(learn))
    assert ways(learn) == ['solved'] * 2


def test_epochs_that_a_plan_gives_its_head_are_trained(build):
    learn = build()
    fit(learn, 'head', say=str)
    fit(learn, Plan('p', (replace(HEAD_PHASE, epochs=2), Phase(-2, 1, 1e-4))), say=str)
    assert ways(learn) == ['solved', 'stored', 'stored', 'stored']


# ---------------------------------------------------------------- training that diverges


def wild(schedule='none', frozen=0, epochs=2, lr=1e4):
    return Plan('wild', (HEAD_PHASE, Phase(frozen, epochs, lr, schedule=schedule)))


@pytest.mark.parametrize('frozen', [0, -2])
def test_a_training_that_diverges_is_an_error(build, frozen):
    "With the reason, and with the weights from before the phase; through the network and on stored features"
    learn = build()
    fit(learn, 'head', say=str)
    before = state_of(learn)
    trained = len(learn.record.history)
    with pytest.raises(TrainingError, match='diverged in epoch') as e:
        fit(learn, wild(frozen=frozen), say=str)
    assert isinstance(e.value, ValueError)
    assert 'lower learning rate' in str(e.value)
    assert '\n' not in str(e.value)
    assert same_state(before, state_of(learn))
    assert len(learn.record.history) == trained
    assert np.isfinite(predict_probs(learn, learn.table.image.tolist())).all()
    fit(learn, 'top1', epochs=1, say=str)
    assert ways(learn)[-1] == 'stored', 'it cannot be trained again'


def test_a_head_that_diverged_does_not_count_as_trained(build):
    "The next plan does not skip it"
    learn = build(head='dense', loss_func=lambda p, y: (p * float('nan')).sum())
    with pytest.raises(TrainingError, match='went at once to nan'):
        fit(learn, 'head', say=str)
    assert not learn.head_first.trained


def test_a_loss_that_is_high_at_the_end_on_the_validation_images_is_an_error(build):
    "The statistics of BatchNorm were never near those of the images"
    learn = build(weights='random')

    class Damage(Callback):
        def before_validate(self):
            for m in self.model[0].modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.running_var.fill_(1e-12)

    learn.add_cb(Damage())
    with pytest.raises(TrainingError, match='validation loss'):
        fit(learn, 'random_init', epochs=1, say=str)


def test_random_weights_under_a_plan_for_pretrained_ones(build):
    for plan in ('fine_tune', 'head'):
        lines = printed_lines(build(weights='random'), plan, epochs=1)
        warned = [line for line in lines if line.startswith('warning')]
        assert len(warned) == 1
        assert f"plan '{plan}'" in warned[0]
        assert '--plan random_init' in warned[0]
    for learn, plan in ((build(weights='random'), 'random_init'), (build(), 'fine_tune')):
        for line in printed_lines(learn, plan, epochs=1):
            assert not line.startswith('warning')


def test_the_best_epoch_is_in_the_record(build):
    learn = build()
    lines = printed_lines(learn, 'top1', epochs=3)
    rows = learn.record.history
    assert learn.record.best == min(rows, key=lambda r: r['valid_loss'])
    reported = any('valid_loss was lowest in' in line for line in lines)
    assert reported == (learn.record.best != rows[-1])


def test_the_best_epoch_can_be_kept(build):
    "With fastai's callback, which once turned one epoch into three hundred"
    learn = build(cbs=[SaveModelCallback(monitor='valid_loss')])
    fit(learn, Plan('p', (HEAD_PHASE, Phase(0, 4, 3e-3, schedule='none', fixed_bn=True))), say=str)
    rows = learn.record.history[1:]
    with learn.no_bar(), learn.no_logging():
        loss = float(learn.validate()[0])
    assert loss == pytest.approx(min(r['valid_loss'] for r in rows), abs=1e-4)


def test_stopped_early(build):
    learn = build(cbs=[EarlyStoppingCallback(monitor='valid_loss', min_delta=100.0, patience=1)])
    fit(learn, 'fine_tune', epochs=9, say=str)
    assert learn.record.passes == ways(learn).count('network') == 2


# ---------------------------------------------------------------- sizes, batches, backbones


@pytest.mark.parametrize('bs', [1, 0, -2, True, 2.5])
def test_invalid_batches(build, bs):
    with pytest.raises(ValueError, match='bs='):
        build(bs=bs)


def test_a_batch_larger_than_the_set(build):
    learn = build(bs=4096)
    fit(learn, 'fine_tune', epochs=1, say=str)
    assert learn.dls.train.bs == train_size(learn)
    assert learn.record.passes == 1


def test_batches_of_one_image_are_an_error(build):
    learn = build()
    learn.dls.loaders[0] = learn.dls.train.new(bs=1)
    with pytest.raises(ValueError, match='BatchNorm needs batches of 2 images or more'):
        fit(learn, 'top1', epochs=1, say=str)
    bare = build(head=nn.Sequential(AveragePool(), nn.Linear(create_body('test_resnet', 'random').n_out, 3)))
    bare.dls.loaders[0] = bare.dls.train.new(bs=1)
    fit(bare, Plan('p', (Phase(-1, 1, 1e-3),)), say=str)


def test_the_least_size_that_works_is_named():
    body = create_body('alexnet', 'random')
    least = min_size(body)
    assert least < 224
    check_network_size(body, least)
    for size in (16, least - 1):
        with pytest.raises(
            ValueError, match=f'smallest size that works is {least}: give size={least} .--size {least}.'
        ):
            check_network_size(body, size)


def test_compare_checks_the_size_before_it_trains(set_of_flowers, monkeypatch):
    monkeypatch.setattr(crossval, 'build_learner', lambda *a, **kw: pytest.fail('trained'))
    with pytest.raises(ValueError, match="'alexnet' does not accept images of 32 pixels"):
        compare(set_of_flowers / 'flowers', archs=['small_cnn', 'alexnet'], weights='random', size=32, say=str)


def test_compare_prints_each_row_when_it_is_finished(set_of_flowers):
    lines = []

    class Broken(Exception):
        pass

    def say(line):
        lines.append(line)
        if line.startswith('test_resnet'):
            raise Broken

    with pytest.raises(Broken):
        compare(
            set_of_flowers / 'flowers',
            archs=['small_cnn', 'test_resnet'],
            plans='head',
            weights='random',
            size=32,
            runtime='plain',
            say=say,
        )
    assert any(
        line.startswith('small_cnn (1 of 2): accuracy 0.') or line.startswith('small_cnn (1 of 2): accuracy 1.')
        for line in lines
    )


@pytest.mark.parametrize('run', [learning_curve, training_curve])
def test_a_plan_with_its_own_backbone_is_not_run_with_another(set_of_flowers, run):
    with pytest.raises(ValueError, match="plan 'scratch' needs the backbone 'small_cnn', not arch='googlenet'"):
        run(set_of_flowers / 'flowers', arch='googlenet', methods={'random': 'scratch'})


def test_a_backbone_or_weights_that_contradict_the_plan(build, set_of_flowers):
    with pytest.raises(ValueError, match="'small_cnn'"):
        build(plan='scratch')
    with pytest.raises(ValueError, match="'small_cnn'"):
        cross_validate(set_of_flowers / 'flowers', arch='test_resnet', plan='scratch', say=str)
    with pytest.raises(ValueError, match='omit weights'):
        cross_validate(
            set_of_flowers / 'flowers',
            arch='test_resnet',
            weights=set_of_flowers / 'weights.safetensors',
            plan='random_init',
            say=str,
        )


# ---------------------------------------------------------------- reproducibility


@pytest.mark.parametrize('plan', ['head', 'dense', 'top1', 'fine_tune'])
def test_the_same_weights_for_any_content_of_the_cache(build, plan, monkeypatch, tmp_path):
    """Bit for bit: with nothing stored, with half of the features, with all,
    and whatever random numbers were drawn in between
    """
    got = []
    for folder, n_stored in (('new', 0), ('half', 20), ('half', 0)):
        monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / folder))
        learn = build(head='dense' if plan == 'dense' else Head())
        if n_stored:
            stored_part.learner_features(learn, learn.table.image[:n_stored].tolist())
            list(learn.dls.train)
        torch.rand(n_stored + 1)
        np.random.rand(n_stored + 1)
        fit(learn, Plan('p', (Phase(-1, 3, 1e-3),)) if plan == 'dense' else plan, epochs=1, say=str)
        got.append(state_of(learn))
    assert same_state(got[0], got[1])
    assert same_state(got[0], got[2])


def test_the_global_random_state_is_not_changed(build):
    learn = build()
    torch.manual_seed(3)
    np.random.seed(3)
    want = torch.rand(2), np.random.rand(2)
    torch.manual_seed(3)
    np.random.seed(3)
    fit(learn, 'fine_tune', epochs=1, say=str)
    assert torch.equal(torch.rand(2), want[0])
    assert (np.random.rand(2) == want[1]).all()


@pytest.mark.parametrize('stored', [True, False])
def test_a_second_fit_after_ctrl_c_gives_the_same_result(build, stored):
    """Interrupted before the second phase, the head is not solved again,
    and order and views are those of the run without interruption
    """
    plain = build()
    learn = build()
    fit(plain, 'top1', epochs=2, stored=stored, say=str)

    def say(line):
        if line.startswith('phase 1'):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(learn, 'top1', epochs=2, stored=stored, say=say)
    fit(learn, 'top1', epochs=2, stored=stored, say=str)
    assert same_state(state_of(plain), state_of(learn))


# ---------------------------------------------------------------- Ctrl-C


def press(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.filterwarnings('ignore:the body is trained before the head')
@pytest.mark.parametrize('how', ['solved', 'stored', 'network'])
def test_a_learner_after_ctrl_c(build, monkeypatch, how):
    "It predicts, frozen layers are frozen, no callback is left, and training can continue"
    learn = build(bs=8)
    phase = {'solved': HEAD_PHASE, 'stored': Phase(-2, 2, 1e-3), 'network': Phase(0, 2, 1e-3)}[how]
    before = state_of(learn)
    callbacks = sorted(type(c).__name__ for c in learn.cbs)
    with monkeypatch.context() as m:
        m.setattr(phases.FeatureClassifier, 'fit', press)
        m.setattr(phases.LossGuard, 'after_batch', press)
        with pytest.raises(KeyboardInterrupt):
            fit(learn, Plan('p', (phase,)), say=str)
    assert learn.record.interrupted == 'in phase 1 of 1'
    assert not learn.record.history
    assert sorted(type(c).__name__ for c in learn.cbs) == callbacks
    free = [any(p.requires_grad for p in s.parameters()) for s in learn.body.stages]
    assert free == [i >= phase.first_trained(6) for i in range(5)]
    for p in learn.model[1].parameters():
        assert p.requires_grad
    assert same_state(before, state_of(learn)) == (how == 'solved')
    assert not learn.head_first.trained
    assert len(valid_predictions(learn)) == int((learn.table.split == 'valid').sum())
    fit(learn, 'top1', epochs=1, say=str)
    assert ways(learn) == ['solved', 'stored']
    assert np.isfinite(predict_probs(learn, learn.table.image.tolist())).all()


# ---------------------------------------------------------------- the learning rate finder


def found_rate(learn, **kw):
    return learn.lr_find(show_plot=False, **kw).valley


def test_the_rate_finder_reads_each_image_once(build):
    learn = build()
    images = Images(learn)
    before = state_of(learn)
    order = learn.dls.train.rng.getstate()
    rate = found_rate(learn)
    assert images.n == 0
    assert 1e-7 < rate < 10
    assert same_state(before, state_of(learn))
    assert not learn.head_first.trained
    assert learn.dls.train.rng.getstate() == order
    assert len(learn.recorder.losses) > 50, 'too few points for the plot of fastai'
    fit(learn, 'top1', epochs=1, say=str)
    assert ways(learn) == ['solved', 'stored'], 'the learning rate finder counts as training of the head'


def test_the_rate_finder_through_the_network(build):
    learn = build()
    learn.unfreeze()
    before = state_of(learn)
    with pytest.warns(UserWarning, match='before the head'):
        assert found_rate(learn, num_it=10) > 0
    assert same_state(before, state_of(learn))
    assert not learn.head_first.trained


def pressed_after(n, step):
    "A step of a learner that is interrupted after `n` steps"
    taken = []

    def step_or_press(self):
        step(self)
        taken.append(1)
        if len(taken) > n:
            raise KeyboardInterrupt

    return step_or_press


def test_the_rate_finder_interrupted(build, monkeypatch):
    "Its steps at high learning rates are undone"
    for unfreeze in (False, True):
        learn = build()
        if unfreeze:
            learn.unfreeze()
            learn.head_first.trained = True
        before = state_of(learn)
        with monkeypatch.context() as m:
            m.setattr('fastai.learner.Learner._step', pressed_after(20, type(learn)._step))
            with pytest.raises(KeyboardInterrupt):
                found_rate(learn)
        assert same_state(before, state_of(learn))
        assert learn.head_first.trained == unfreeze


def test_no_learning_rate_for_a_frozen_learner(build):
    learn = build()
    learn.model.requires_grad_(False)
    with pytest.raises(ValueError, match='all groups are frozen'):
        learn.lr_find()
