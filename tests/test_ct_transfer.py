"Test the study of transfer to CT: methods differ in the weights only, patients are apart, and a run is resumed."

from itertools import islice

import numpy as np
import pytest
import torch
from helpers import tool

from dr_transfer.models.backbones import save_weights


@pytest.fixture(scope='module')
def study():
    return tool('ct_transfer')


@pytest.fixture(scope='module')
def images(study):
    "Forty images: squares that are bright on the left in half of them."
    x = torch.randint(0, 120, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 2
    x[y == 1, :, :, :20] += 130
    return study.Images(x, y, np.arange(40))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('ct')


@pytest.fixture
def small(study, monkeypatch, tmp_path):
    "The study with few patients and steps, and its results in a folder of their own."
    for name, value in {'N_TRAIN': 3, 'N_TEST': 2, 'STEPS': 3, 'SIZES': (12, 24), 'CHOOSING_SIZE': 12}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, 'RESULTS', tmp_path)
    return study


def test_each_image_is_used_once_before_any_is_used_again(study):
    rows = torch.cat(list(islice(study.endless(20), 5)))
    assert len(rows) == 5 * study.BATCH
    for i in range(0, 80, 20):
        assert sorted(rows[i : i + 20].tolist()) == list(range(20))


def test_turned_images_are_quarter_turns(study, images):
    torch.manual_seed(1)
    out = study.turned(images.x)
    found = [[torch.equal(torch.rot90(a, k, (1, 2)), b) for k in range(4)] for a, b in zip(images.x, out)]
    assert np.array(found).sum(1).tolist() == [1] * 40
    assert np.array(found).any(0).all()


def test_random_and_fine_tuned_differ_in_the_weights_only(study, images, tmp_path):
    "If the pretrained weights are those of the random initialisation, the two give the same."
    file = save_weights(study.Network('cifarnet').body(random=True, seed=5), tmp_path / 'same.safetensors')
    other = save_weights(study.Network('cifarnet').body(random=True, seed=6), tmp_path / 'other.safetensors')
    results = []
    for weights, method in ((None, study.RANDOM), (file, study.TUNED), (other, study.TUNED)):
        body, head, _ = study.train(study.Network('cifarnet', weights), method, 1e-3, images, seed=5, steps=6)
        results.append(study.probabilities(body, head, images.x))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_batchnorm_is_free(study, images):
    before = study.Network('test_resnet').body(random=True, seed=3).state_dict()
    after = study.train(study.Network('test_resnet'), study.RANDOM, 1e-3, images, seed=3, steps=2)[0].state_dict()
    moved = [not torch.equal(before[k], after[k]) for k in before if 'running_mean' in k]
    assert moved
    assert all(moved)


def test_no_patient_is_in_both_parts_or_in_two_seeds(small, folder):
    patients = [small.Patients(folder, seed) for seed in (0, 1)]
    for p in patients:
        train, test = p.images('train'), p.images('test')
        assert len(set(train.patients)) == 3
        assert len(set(test.patients)) == 2
        assert not set(train.patients) & set(test.patients)
        some, more = p.images('train', 12), p.images('train', 24)
        assert some.y.float().mean() == 0.5
        assert {x.numpy().tobytes() for x in some.x} <= {x.numpy().tobytes() for x in more.x}
    a, b = ({x.numpy().tobytes() for x in p.pixels} for p in patients)
    assert not a & b
    assert small.CHOOSING not in range(100)


def test_a_run_is_resumed(small, folder, monkeypatch):
    patients = small.Patients(folder, 0)
    network = small.Network('cifarnet')
    small.report(network, small.RANDOM, 1e-3, patients, small.SIZES, small.STEPS)
    rows = small.LEARNING.read()
    assert rows.images.tolist() == [12, 24]
    assert rows.steps.tolist() == [3, 3]
    rows.iloc[:1].to_csv(small.LEARNING.file, index=False)
    calls = []

    def run(network, method, rate, patients, n, steps, with_errors):
        calls.append(n)
        return {'auc': 0.5, 'accuracy': 0.5}, []

    monkeypatch.setattr(small, 'run', run)
    small.report(network, small.RANDOM, 1e-3, patients, small.SIZES, small.STEPS)
    assert calls == [24]
    assert small.LEARNING.read().auc.tolist() == [rows.auc[0], 0.5]


@pytest.mark.parametrize('best, tried', [(1e-3, 3), (3e-3, 4), (1e-2, 5), (3e-4, 4), (3e-2, 5)])
def test_the_rate_is_the_best_on_the_patients_for_choosing(small, monkeypatch, best, tried):
    seeds = []

    def run(network, method, rate, patients, n, steps):
        seeds.append(patients.seed)
        return {'auc': 1 - 0.01 * abs(np.log(rate / best)), 'accuracy': 0.5}, []

    monkeypatch.setattr(small, 'run', run)
    choosing = small.Patients(None, small.CHOOSING)
    for _ in range(2):  # the second time the rates are read from the file
        assert small.choose_rate(small.Network('cifarnet'), small.TUNED, choosing) == best
    assert seeds == [small.CHOOSING] * tried
