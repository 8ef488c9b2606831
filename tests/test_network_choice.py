"Test the choice among several pretrained networks: on other sources or changed images, within a budget of time."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import error_line, good
from learners import Known, make_sets
from PIL import Image

from dr_transfer.core import build_learner, fit
from dr_transfer.data.tasks import get_task
from dr_transfer.models import backbones
from dr_transfer.models.registry import JOIN, find_backbone
from dr_transfer.training import candidates, network_choice, plans
from dr_transfer.training.advisor import advise
from dr_transfer.training.network_choice import check_networks, choose_network, usable_networks
from dr_transfer.training.record import read_record

pytestmark = pytest.mark.usefixtures('with_shared_cache')
NETWORKS = ['test_resnet', 'squeezenet1_1', 'small_cnn']
HOW = dict(size=32, runtime='plain')


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    "A table of 80 small images of 40 patients."
    folder = tmp_path_factory.mktemp('noise')
    rng = np.random.default_rng(0)
    rows = []
    for i in range(80):
        file = folder / f'{i}.png'
        Image.fromarray(rng.integers(0, 255, (24, 24, 3)).astype(np.uint8)).save(file)
        label = ('red', 'green')[i // 2 % 2]
        rows.append({'image': str(file), 'label': label, 'group': f'person {i // 2}'})
    return pd.DataFrame(rows).assign(target=lambda t: t.label)


@pytest.fixture(scope='module')
def flowers(tmp_path_factory):
    folder = tmp_path_factory.mktemp('choice')
    make_sets(folder, n_flowers=60)
    return folder / 'flowers'


def known(table, useful):
    "A substitute for `extract_features`: features depend on the class where `useful(network, images, y)` is not 0."

    def features(images, body, *a, stages, **k):
        files = [getattr(image, 'path', image) for image in images]
        y = table.set_index('image').label[files].eq('red').to_numpy() * 2.0 - 1
        name = body.stages.spec.name
        x = np.random.default_rng(len(name)).standard_normal((len(y), 1, 6))
        x[:, :, 0] += 3 * (useful(name, images, y))[:, None]
        return Known(**dict.fromkeys(stages, x.astype(np.float32)))

    return features


def choose(table, **kwargs):
    "Choose among three networks with random weights."
    return choose_network(table, get_task('flowers', 32), NETWORKS, 'random', runtime='plain', say=str, **kwargs)


def test_the_network_with_better_features_is_chosen(noise, monkeypatch):
    monkeypatch.setattr(
        candidates, 'extract_features', known(noise, lambda name, images, y: y * (name == 'squeezenet1_1'))
    )
    choice = choose(noise)
    assert choice.single == 'squeezenet1_1'
    assert 'squeezenet1_1' in choice.arch.split(JOIN)
    assert choice.table.score['squeezenet1_1'] > 0.95
    assert choice.table.score['test_resnet'] < 0.7
    assert choice.table.attrs['first'] == 'test_resnet'
    assert choice.table.gain_low['squeezenet1_1'] > 0.1
    words = choice.words(choice.single)
    assert words.startswith('network: squeezenet1_1, auc ')
    assert 'on changed images, +' in words
    assert 'against test_resnet; 6 candidates, 80 images' in words


def test_a_network_that_is_better_at_home_only_is_not_chosen(noise, monkeypatch):
    def useful(name, images, y):
        changed = hasattr(images[0], 'change')
        return y * (name == 'small_cnn' or (name == 'test_resnet' and not changed))

    monkeypatch.setattr(candidates, 'extract_features', known(noise, useful))
    choice = choose(noise)
    assert choice.table.home['test_resnet'] > 0.95
    assert choice.table.score['test_resnet'] < 0.7
    assert choice.single == 'small_cnn'


def test_each_source_is_left_out(noise, monkeypatch):
    "No image is changed. What holds within a source only is worse than nothing on the other one."
    t = noise.assign(camera=['old', 'new'] * 40)
    t.attrs['source_col'] = 'camera'

    def useful(name, images, y):
        assert not hasattr(images[0], 'change')
        sign = np.where(np.arange(len(y)) % 2, 1, -1)
        return y * (sign if name == 'test_resnet' else name == 'squeezenet1_1')

    monkeypatch.setattr(candidates, 'extract_features', known(t, useful))
    choice = choose(t)
    assert choice.tested == 'each of 2 sources that was left out'
    assert choice.single == 'squeezenet1_1'
    assert choice.table.score['test_resnet'] < 0.2


def test_networks_side_by_side_can_be_better_than_each(noise, monkeypatch):
    "Each of two networks knows half of the images."

    def useful(name, images, y):
        half = np.arange(len(y)) // 4 % 2
        return y * {'test_resnet': half, 'squeezenet1_1': 1 - half, 'small_cnn': 0 * half}[name]

    monkeypatch.setattr(candidates, 'extract_features', known(noise, useful))
    choice = choose(noise)
    assert choice.arch == 'test_resnet+squeezenet1_1'
    assert choice.chosen(joined=True) == choice.arch
    assert choice.chosen(joined=False) == choice.single
    assert JOIN not in choice.single


def test_the_budget_excludes_the_slowest(noise, monkeypatch):
    seconds = {'test_resnet': 0.01, 'squeezenet1_1': 0.02, 'small_cnn': 5.0}

    def timed(name, *a, make=network_choice.network_candidate, **k):
        return replace(make(name, *a, **k), seconds=seconds[name])

    monkeypatch.setattr(network_choice, 'network_candidate', timed)
    choice = choose(noise, minutes=0.2)
    assert set(choice.table.index) == {'test_resnet', 'squeezenet1_1', 'test_resnet+squeezenet1_1'}
    assert choice.excluded == {'small_cnn': '5.00 s an image (minutes=0.2, --minutes)'}
    assert 'small_cnn was excluded' in choice.words(choice.arch)
    assert set(choose(noise, minutes=100).table.index) > set(NETWORKS)


def test_a_budget_for_a_single_network(noise, monkeypatch):
    "Nothing can be joined then."
    monkeypatch.setattr(network_choice, '_seconds', lambda body, *a: 100.0 if len(body.stages.spec.name) > 9 else 60.0)
    choice = choose_network(noise, get_task('flowers', 32), NETWORKS, 'random', minutes=0.1, runtime='plain')
    assert list(choice.table.index) == [choice.arch] == ['test_resnet']  # the first, although another one is faster
    assert 'small_cnn was excluded: 60.00 s an image' in choice.words(choice.arch)


def test_validation_images_are_not_used(flowers, monkeypatch):
    used = []

    def spy(images, *a, extract=candidates.extract_features, **k):
        used.extend(getattr(image, 'path', image) for image in images)
        return extract(images, *a, **k)

    monkeypatch.setattr(candidates, 'extract_features', spy)
    monkeypatch.setattr('dr_transfer.core.usable_networks', lambda task: NETWORKS[:2])
    lines = []
    learn = build_learner(flowers, arch='auto', weights='random', plan='head', say=lines.append, **HOW)
    train = learn.table[learn.table.split == 'train']
    assert set(used) == set(train.image)
    line = next(line for line in lines if line.startswith('network: '))
    assert line.startswith(f'network: {learn.record.arch}, accuracy ')
    assert learn.record.arch in line
    fit(learn, say=str)
    assert learn.record.history


def test_a_plan_that_trains_the_network_gets_a_single_one(flowers, monkeypatch):
    monkeypatch.setattr('dr_transfer.core.usable_networks', lambda task: NETWORKS[:2])
    learn = build_learner(flowers, arch='auto', weights='random', plan='top1', say=str, **HOW)
    assert learn.record.arch in NETWORKS


def test_a_plan_of_its_own_network_is_not_compared(flowers):
    learn = build_learner(flowers, arch='auto', plan='scratch', say=str, **HOW)
    assert learn.record.arch == 'small_cnn'


def test_advice_for_the_best_of_several(flowers):
    a = advise(flowers, archs=NETWORKS[:2], weights='random', say=str, **HOW)
    assert a.plan.arch == a.networks.arch
    assert a.networks.words(a.plan.arch) in str(a)
    learn = build_learner(flowers, plan=a, say=str, **HOW)
    assert learn.record.arch == a.plan.arch
    again = build_learner(flowers, arch='auto', plan=a, say=str, **HOW)
    assert again.record.arch == a.plan.arch


def test_a_large_set_is_not_given_networks_side_by_side(flowers, monkeypatch):
    "They cannot be fine-tuned."
    monkeypatch.setattr('dr_transfer.training.advisor.LARGE', 20)
    a = advise(flowers, archs=NETWORKS[:2], weights='random', say=str, **HOW)
    assert a.plan.name == 'fine_tune_averaged'
    assert a.plan.arch == a.networks.single


def test_advice_for_networks_side_by_side(flowers):
    "The profile has a row for each, and for all."
    arch = 'test_resnet+squeezenet1_1'
    a = advise(flowers, arch=arch, weights='random', say=str, **HOW)
    assert list(a.profile.index) == [*arch.split(JOIN), arch]
    assert a.stages == arch
    assert (a.plan.name, a.plan.arch) == ('head', arch)
    learn = fit(build_learner(flowers, plan=a, say=str, **HOW), say=str)
    assert learn.record.arch == arch


@pytest.mark.parametrize(
    'archs, weights, message',
    [
        (['test_resnet'], None, 'two networks or more'),
        ('test_resnet', None, 'as a list'),
        (['test_resnet', 'test_resnett'], None, "unknown backbone 'test_resnett'"),
        (['test_resnet', 'auto'], None, 'give the name of one backbone'),
        (['test_resnet', 'small_cnn'], 'weights.pth', 'a file for one network'),
    ],
)
def test_bad_names(archs, weights, message):
    with pytest.raises(ValueError, match=message):
        check_networks(archs, weights)
    with pytest.raises(ValueError, match=message):
        advise('no such folder', archs=archs, weights=weights)


def test_bad_arguments(flowers):
    with pytest.raises(ValueError, match='above 0'):
        advise(flowers, archs=NETWORKS[:2], weights='random', minutes=0, **HOW)
    with pytest.raises(ValueError, match='omit stage'):
        build_learner(flowers, arch='auto', stage='stage2', **HOW)
    with pytest.raises(ValueError, match='for build_learner, advise'):
        find_backbone('auto')
    assert plans.plan_arch(plans.PLANS['scratch'], 'auto') == 'small_cnn'


def test_networks_whose_weights_are_here(monkeypatch, tmp_path):
    "Nothing is downloaded, and networks of other tasks are excluded."
    monkeypatch.setattr(backbones, 'hub_file', None)
    monkeypatch.setattr(backbones, 'weights_folders', lambda: [tmp_path])
    lites = ['efficientnet_lite0', 'efficientnet_lite1', 'efficientnet_lite2']
    assert usable_networks(get_task('flowers')) == lites
    (tmp_path / 'squeezenet1_1.safetensors').touch()
    assert usable_networks(get_task('flowers')) == [*lites, 'squeezenet1_1']
    fundus = find_backbone('fundus_dr_mobilenet')
    (tmp_path / f'{fundus.name}.safetensors').touch()
    assert fundus.name in usable_networks(get_task('dr'))
    assert fundus.name not in usable_networks(get_task('flowers'))


def test_the_command(flowers, tmp_path):
    words = ('advise', flowers, '--weights', 'random', '--size', 32, '--runtime', 'plain')
    printed = good(*words, '--archs', *NETWORKS[:2], '--minutes', 1, '--out', tmp_path / 'a.png').out
    assert 'images_a_second' in printed
    assert 'network: ' in printed
    assert (tmp_path / 'a.png').exists()
    for wrong in (('--minutes', '0'), ('--minutes', 'soon')):
        assert 'give a number above 0' in error_line(*words, '--archs', *NETWORKS[:2], *wrong, start='')


def test_folds_have_one_network(flowers):
    "Else each fold would have its own."
    message = error_line('cross-validate', flowers, '--arch', 'auto')
    assert 'dr_transfer advise --arch auto' in message


def test_the_options_of_a_transformer(flowers, tmp_path):
    words = ('--arch', 'test_vit', '--weights', 'random', '--size', 64, '--plan', 'head', '--runtime', 'plain')
    good('train', flowers, *words, '--pool', 'both', '--block-stages', 3, '--out', tmp_path / 'run')
    record = read_record(tmp_path / 'run' / 'record.json')
    assert (record.pool, record.block_stages) == ('both', 3)
    message = error_line('train', flowers, *words, '--pool', 'most', '--out', tmp_path / 'other')
    assert "unknown pool of test_vit 'most'" in message
