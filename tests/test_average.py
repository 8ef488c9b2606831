"Test the plan that averages the weights before and after fine-tuning."

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dr_transfer.training.average as average
from dr_transfer.core import build_learner, fit
from dr_transfer.data.acquisition import CHANGES, ChangedImage
from dr_transfer.inference.run import write_run
from dr_transfer.training.average import FRACTIONS, averaged, changed_validation, copied_weights
from dr_transfer.training.record import read_record

pytestmark = pytest.mark.usefixtures('with_shared_cache')
TINY = dict(arch='test_resnet', weights='random', size=32, runtime='plain')


def fine_tuned(learn, say=str):
    "Train by the plan; return the weights before and after fine-tuning, before they are averaged"
    fit(learn, 'head', say=str)
    kept = {'before': copied_weights(learn)}

    def line(text):
        if text.startswith('phase 2'):
            kept['after'] = copied_weights(learn)
        say(text)

    kept['error'] = None
    try:
        fit(learn, 'fine_tune_averaged', epochs=1, say=line)
    except RuntimeError as e:
        kept['error'] = e
    return kept


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_weights_are_the_average_that_the_record_states(flowers, tmp_path):
    learn = build_learner(flowers, **TINY)
    lines = []
    kept = fine_tuned(learn, lines.append)
    assert not same(kept['before'], kept['after'])
    record = learn.record
    assert [row['fraction'] for row in record.average_path] == list(FRACTIONS)
    best = min(record.average_path, key=lambda row: row['loss'])
    assert record.average == best['fraction']
    assert same(copied_weights(learn), averaged(kept['before'], kept['after'], record.average))
    assert lines[-1].startswith(f'weights averaged, {record.average:.0%} of them fine-tuned: on ')
    folder = tmp_path / 'run'
    folder.mkdir()
    write_run(learn, folder)
    again = read_record(folder / 'record.json')
    assert again.average == record.average
    assert again.plan.average
    assert again.average_path == record.average_path


def test_a_chosen_fraction_is_used(flowers, monkeypatch):
    "The loss is that of a half, whatever the images"
    learn = build_learner(flowers, **TINY)
    losses = iter([0.5, 0.4, 0.3, 0.4, 0.5])
    monkeypatch.setattr(average, '_log_loss', lambda *a: next(losses))
    kept = fine_tuned(learn)
    assert learn.record.average == 0.5
    name = next(name for name in kept['after'] if name.endswith('weight'))
    middle = (kept['before'][name] + kept['after'][name]) / 2
    torch.testing.assert_close(copied_weights(learn)[name], middle)
    for key, value in copied_weights(learn).items():
        assert value.dtype == kept['after'][key].dtype


def test_after_an_error_the_fine_tuned_weights_stay(flowers, monkeypatch):
    learn = build_learner(flowers, **TINY)
    calls = []

    def fails(*a):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError('no memory')
        return 1.0

    monkeypatch.setattr(average, '_log_loss', fails)
    kept = fine_tuned(learn)
    assert str(kept['error']) == 'no memory'
    assert same(copied_weights(learn), kept['after'])
    assert learn.record.average is None


def test_each_change_occurs_among_the_validation_images(flowers, monkeypatch):
    learn = build_learner(flowers, valid=0.4, **TINY)
    read = []
    real = ChangedImage.read

    def noted(image, size=None):
        read.append(image)
        return real(image, size)

    monkeypatch.setattr(ChangedImage, 'read', noted)
    monkeypatch.setattr(average, 'ThreadPoolExecutor', lambda n: ThreadPoolExecutor(1))  # in order
    names = list(CHANGES)
    images, y = changed_validation(learn)
    valid = learn.table[learn.table.split == 'valid']
    assert len(images) == len(y) == len(valid) == len(read)
    assert [image.change for image in read] == [names[i % len(names)] for i in range(len(valid))]
    assert {str(image.path) for image in read} == set(map(str, valid.image))
    assert {image.size for image in images} == {(32, 32)}
    monkeypatch.setattr(average, '_MAX_CHANGED', 7)
    images, y = changed_validation(learn)
    assert len(images) == 7


def test_a_record_without_an_average_is_read(flowers, tmp_path):
    "Runs of earlier versions have no such fields"
    learn = fit(build_learner(flowers, **TINY), 'head', say=str)
    folder = tmp_path / 'run'
    folder.mkdir()
    write_run(learn, folder)
    file = folder / 'record.json'
    data = json.loads(file.read_text())
    assert 'average' not in data
    assert 'average' not in data['plan']
    record = read_record(file)
    assert record.average is None
    assert not record.plan.average
