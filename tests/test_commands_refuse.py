"Test errors that commands raise before they start, and their messages about contradictions."

import os
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dr_transfer.cli import main
from dr_transfer.data.preprocess import Preparation, preprocess_folder
from dr_transfer.data.table import find_images, label_table
from dr_transfer.data.task_file import TaskFileError, load_task
from dr_transfer.evaluation.compare import plot_comparison
from dr_transfer.inference.predictions import gather_images, predict_table
from dr_transfer.synthetic.ct import make_ct
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.synthetic.fundus import make_dr
from dr_transfer.utils.files import TransferWarning, has_marker

SMALL = ['--arch', 'test_resnet', '--weights', 'random', '--size', '32', '--plan', 'head', '--runtime', 'plain']


@pytest.fixture(autouse=True)
def limit():
    "An opened pipe waits forever, so the test is ended"
    import signal

    def waits(*args):
        raise AssertionError('it waits for a pipe')

    old = signal.signal(signal.SIGALRM, waits)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope='module')
def flowers(tmp_path_factory):
    folder = tmp_path_factory.mktemp('refuse') / 'flowers'
    make_flowers(folder, n=24, size=32, classes=('daisy', 'roses'))
    return folder


def failed(capsys, *words) -> str:
    "Return the error line of a command that fails"
    result = main([str(w) for w in words])
    assert result == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('dr_transfer: error:')]
    return line


# ---------------------------------------------------------------- only regular files are opened


def test_a_pipe_as_task_file(tmp_path, capsys, flowers):
    os.mkfifo(tmp_path / 'task.toml')
    assert 'not a regular file' in failed(
        capsys, 'train', flowers, *SMALL, '--task', tmp_path / 'task.toml', '--out', tmp_path / 'run'
    )
    os.mkfifo(tmp_path / 'task.py')
    assert 'task.py' in failed(
        capsys, 'train', flowers, *SMALL, '--task', f'{tmp_path / "task.py"}:T', '--out', tmp_path / 'run'
    )


def test_a_pipe_named_like_our_marker(tmp_path, flowers):
    data = tmp_path / 'data'
    shutil.copytree(flowers, data)
    os.mkfifo(data / 'daisy' / '.dr_transfer.json')
    assert not has_marker(data / 'daisy')
    assert len(find_images(data)) == 24


@pytest.mark.parametrize('name', ['journal.jsonl', 'preparation.json', '.dr_transfer.json'])
def test_a_pipe_among_the_notes_of_preprocess(tmp_path, capsys, name):
    in_folder = tmp_path / 'in'
    out = tmp_path / 'out'
    in_folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(in_folder / 'a.png')
    words = ['preprocess', str(in_folder), str(out), '--size', '48']
    assert main(words) == 0
    (out / name).unlink()
    os.mkfifo(out / name)
    code = main(words)
    assert code == 0 or name == '.dr_transfer.json'
    assert code == 0 or str(out) in capsys.readouterr().err


# ---------------------------------------------------------------- custom tasks


@pytest.mark.parametrize(
    'name, text, words',
    [
        ('t.toml', 'a=' + '[' * 5000, 'nested too deep'),
        ('t.toml', 'name="x', 'cannot be read as TOML'),
        ('t.toml', '\0', 'TOML'),
        ('t.toml', '#' * 2_000_000, 'bytes'),
        ('t.toml', 'name="x"\nsize=0', 'size=0'),
        ('t.toml', 'name="x"\nnope=1', 'nope'),
        ('t.py', 'raise SystemExit(3)', 'raises SystemExit'),
        ('t.py', 'def', 'SyntaxError'),
        ('t.py', 'x = 1', 'no Task'),
    ],
)
def test_an_invalid_task_file_is_named(tmp_path, capsys, flowers, name, text, words):
    (tmp_path / name).write_text(text)
    task = f'{tmp_path / name}:T' if name.endswith('.py') else str(tmp_path / name)
    with pytest.raises(TaskFileError, match=words):
        load_task(task)
    line = failed(capsys, 'train', flowers, *SMALL, '--task', task, '--out', tmp_path / 'run')
    assert str(tmp_path / name) in line
    assert words in line
    assert not (tmp_path / 'run').exists()


BEDS = {
    'toml': """
name = "beds"
size = 32
[[targets]]
name = "kind"
classes = ["white", "red"]
labels = {daisy = "white", roses = "red"}
""",
    'py': """
from dr_transfer.data.tasks import Target, Task
COLOURS = {'daisy': 'white', 'roses': 'red'}
T = Task('beds', (Target('kind', ('white', 'red'), COLOURS.__getitem__, 'daisy, roses'),), size=32)
""",
}


@pytest.mark.parametrize('form', ['toml', 'py'])
def test_a_custom_task_on_the_command_line(tmp_path, capsys, flowers, form):
    "Trained, predicted and evaluated with its own classes"
    run = tmp_path / 'run'
    (tmp_path / f't.{form}').write_text(BEDS[form])
    task = str(tmp_path / 't.toml') if form == 'toml' else f'{tmp_path / "t.py"}:T'
    small = [w for w in SMALL if w not in ('--size', '32')]
    result = main(['train', str(flowers), *small, '--task', task, '--out', str(run)])
    assert result == 0
    assert set(pd.read_csv(run / 'predictions.csv').target) == {'white', 'red'}
    done = main(
        [
            'evaluate',
            str(run),
            str(flowers),
            '--task',
            task,
            '--split',
            'valid',
            '--resamples',
            '100',
            '--runtime',
            'plain',
            '--out',
            str(tmp_path / 'r.html'),
        ]
    )
    assert done == 0, capsys.readouterr().err


# ---------------------------------------------------------------- errors before the work


def test_cross_validation_checks_its_arguments_before_it_trains(tmp_path, capsys, flowers):
    three = tmp_path / 'three'
    shutil.copytree(flowers, three)
    (three / 'tulips').mkdir()
    for p in sorted((three / 'roses').glob('*.jpg'))[:5]:
        p.rename(three / 'tulips' / p.name)
    (three / 'credits.csv').unlink(missing_ok=True)
    for more, words in ((['--specificity', '0.9'], 'need two classes'), (['--plan', 'advise'], '--plan advise')):
        assert (
            main(
                [
                    'cross-validate',
                    str(three),
                    *SMALL,
                    *more,
                    '--folds',
                    '2',
                    '--out',
                    str(tmp_path / 'r.html'),
                ]
            )
            == 1
        )
        captured = capsys.readouterr()
        assert words in captured.err
        assert 'phase' not in captured.out
        assert not (tmp_path / 'r.html').exists()


@pytest.mark.parametrize('size', [48.5, True, '48', None, float('nan')])
def test_invalid_sizes_of_a_preparation(tmp_path, size):
    "Before, a folder was made that no other size could use"
    with pytest.raises(ValueError, match='size='):
        preprocess_folder(tmp_path, tmp_path / 'out', Preparation(size))


def test_preprocess_has_no_option_runtime(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(['preprocess', str(tmp_path), str(tmp_path / 'out'), '--runtime', 'nope'])
    assert e.value.code == 2
    assert '--runtime' in capsys.readouterr().err


# ---------------------------------------------------------------- messages


def test_each_command_reports_identical_images_of_two_classes(tmp_path, capsys, flowers):
    "Patients are reported once; identical images of two classes in evaluations too"
    data = shutil.copytree(flowers, tmp_path / ('a long name ' * 12) / 'data')
    (data / 'credits.csv').unlink(missing_ok=True)
    result = main(['train', str(data), *SMALL, '--out', str(tmp_path / 'run')])
    assert result == 0
    shutil.copy(sorted((data / 'daisy').glob('*.jpg'))[0], data / 'roses' / 'copy.jpg')
    capsys.readouterr()
    for words in (
        ['evaluate', tmp_path / 'run', data, '--allow-leaks', '--runtime', 'plain'],
        ['cross-validate', data, *SMALL, '--folds', '2'],
    ):
        assert main([*map(str, words), '--resamples', '100', '--out', str(tmp_path / f'{words[0]}.html')]) == 0
        out = capsys.readouterr().out
        assert out.count('1 pairs of identical images have different classes') == 1
        assert 'copy.jpg (roses)' in out
        assert out.count('no patient column found') == 1


def test_one_path_is_a_list_of_one(flowers):
    class Model:
        classes = ('a', 'b')
        card = SimpleNamespace(decision=None)

        def outputs(self, images):
            return np.full((len(images), 2), 0.5), np.zeros(len(images))

    path = find_images(flowers)[0]
    for one in (path, str(path)):
        assert predict_table(Model(), one).image.tolist() == [one]
        assert gather_images(one) == [str(path)]
    assert len(gather_images(flowers)) == 24


def test_a_value_outside_its_interval_is_plotted(tmp_path):
    "The figure of a comparison is written, and each line joins the value and the far end of its interval"
    index = pd.MultiIndex.from_tuples([('a', 'auc'), ('b', 'auc')], names=['method', 'metric'])
    t = pd.DataFrame(
        {
            'value': [0.6, 0.7],
            'low': [0.7, 0.6],
            'high': [0.9, 0.65],
            'difference': [np.nan, 0.1],
            'difference_low': [np.nan, 0.2],
            'difference_high': [np.nan, 0.3],
        },
        index,
    )
    fig = plot_comparison(t, 'auc')
    file = tmp_path / 'comparison.png'
    fig.savefig(file, format='png')
    with Image.open(file) as image:
        image.load()
        assert image.format == 'PNG'
    limits = []
    for axes in fig.axes:
        (intervals,) = axes.collections
        segments = np.array(intervals.get_segments())
        limits.append(segments[:, :, 0])
    assert limits[0] == pytest.approx(np.array([[0.6, 0.9], [0.6, 0.7]]))
    assert limits[1] == pytest.approx(np.array([[0.1, 0.3]]))


def test_the_module_is_the_command():
    "Before, `python -m dr_transfer.cli` did nothing, with exit code 0"
    import subprocess
    import sys

    done = subprocess.run([sys.executable, '-m', 'dr_transfer.cli', 'train'], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('dr_transfer: error:')


def test_the_commands_own_warnings_are_printed(tmp_path, capsys):
    "One line for each, and only for those of the library"
    in_folder = tmp_path / 'in'
    in_folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(in_folder / 'a.png')
    words = ['preprocess', str(in_folder), str(tmp_path / 'out'), '--size', '48']
    assert main(words) == 0
    assert 'warning' not in capsys.readouterr().err
    (tmp_path / 'out' / 'preparation.json').write_text('{')
    assert main(words) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if 'arning' in line]
    assert line.startswith(f'dr_transfer: warning: {tmp_path / "out" / "preparation.json"} is damaged')


@pytest.mark.parametrize(
    'labels', [['bolt;red', 'bolt', 'red'], ['a|b', 'b', 'c'], ['a,b', 'a', 'c'], ['bolt;red', 'bolt;blue']]
)
def test_several_labels_in_one_cell_are_an_error(tmp_path, labels):
    for i in range(len(labels)):
        (tmp_path / f'{i}.png').write_bytes(b'x')
    t = pd.DataFrame({'image': [f'{i}.png' for i in range(len(labels))], 'label': labels})
    with pytest.raises(ValueError, match='several labels in one cell'):
        label_table(tmp_path, t, verify=False)


# ---------------------------------------------------------------- arguments in Python, and ambiguous names


@pytest.mark.parametrize(
    'wrong, words',
    [
        (dict(valid='x'), "valid='x': give a fraction"),
        (dict(valid=True), 'valid=True: give a fraction'),
        (dict(weights=5), 'weights=5: give a'),
        (dict(arch=5), "unknown backbone '5'"),
        (dict(arch=['resnet18', 5]), 'unknown backbone'),
    ],
)
def test_arguments_of_another_type_are_named(tmp_path, wrong, words):
    from dr_transfer.core import build_learner

    make_dr(tmp_path / 'fundus', n=12, size=64, seed=0, workers=1)
    with pytest.raises(ValueError, match=re.escape(words)):
        build_learner(tmp_path / 'fundus', **{**dict(task='dr', arch='small_cnn', weights='random', size=32), **wrong})


@pytest.mark.parametrize(
    'labels, shown',
    [
        (['bolt;red', 'nut'], 'bolt;red'),
        (['a|b', 'c'], 'a|b'),
        (['a/b', 'a'], 'a/b'),
        (['a + b', 'a'], 'a + b'),
        (['a/b', 'c/d'], ''),
        (['a; ', 'b'], ''),
        (['nut', 'bolt'], ''),
    ],
)
def test_an_ambiguous_class_is_reported(labels, shown):
    from dr_transfer.data.tasks import Target, encode_target

    t = encode_target(pd.DataFrame({'image': map(str, range(len(labels))), 'label': labels}), Target('class'))
    assert t.attrs['notes'] == (
        [f"labels: '{shown}' is treated as one class; several labels in one cell are not supported"] if shown else []
    )


def test_a_changed_result_of_preprocess_is_named(tmp_path):
    fundus_data = tmp_path / 'fundus'
    small = tmp_path / 'small'
    make_dr(fundus_data, n=4, size=64, seed=0, workers=1)
    how = Preparation(size=32)
    first = preprocess_folder(fundus_data, small, how)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        preprocess_folder(fundus_data, small, how)
    cut, gone = (small / first.file[i] for i in (1, 3))
    before = cut.read_bytes()
    cut.write_bytes(before[:-9])
    gone.unlink()
    with pytest.warns(
        TransferWarning, match=f'2 results in .* were changed or removed .*first: {first.file[1]}.*made again'
    ):
        preprocess_folder(fundus_data, small, how)
    assert cut.read_bytes() == before
    assert gone.exists()


def test_an_export_does_not_go_into_the_model(tmp_path, capsys):
    (tmp_path / 'run' / 'model').mkdir(parents=True)
    for model in ('run', 'run/model'):
        assert 'lies in the data folder' in failed(
            capsys, 'export', tmp_path / model, '--out', tmp_path / model / 'x.onnx'
        )
    assert [p.name for p in tmp_path.rglob('*')] == ['run', 'model']


# ---------------------------------------------------------------- outputs, folders and arguments


UNNAMED = {
    'advise': 'advice.png',
    'compare': 'comparison.png',
    'cross-validate': 'report.html',
    'evaluate': 'report.html',
    'check': 'check.html',
    'recalibrate': 'recalibrated',
    'adapt': 'adapted',
}


@pytest.mark.parametrize('command', UNNAMED)
def test_overwrite_without_a_name_replaces_nothing(tmp_path, capsys, flowers, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    mine = f'flowers_{UNNAMED[command]}'
    (tmp_path / mine).write_text('mine')
    model = [] if command in ('advise', 'compare', 'cross-validate') else [tmp_path / 'run']
    line = failed(capsys, command, *model, flowers, '--overwrite')
    assert f'--overwrite replaces only what --out names: give --out {mine}' in line
    result = (tmp_path / mine).read_text()
    assert result == 'mine'


def test_a_class_folder_whose_name_is_not_text(tmp_path, capsys, flowers):
    data = shutil.copytree(flowers, tmp_path / 'data')
    os.rename(data / 'roses', os.fsencode(data) + b'/\xff\xfe')
    line = failed(capsys, 'train', data, *SMALL, '--out', tmp_path / 'run')
    assert 'rename the folder' in line
    assert 'CSV' not in line


def test_a_label_that_is_not_text_names_the_table(tmp_path):
    make_flowers(tmp_path / 'flowers', n=4, size=32, classes=('daisy', 'roses'))
    images = find_images(tmp_path / 'flowers')
    rows = ''.join(f'{image},label{i % 2}\n' for i, image in enumerate(images))
    (tmp_path / 'mine.csv').write_bytes(b'image,label\n' + rows.encode().replace(b'label1', b'label\xff'))
    with pytest.raises(ValueError, match=r'mine\.csv cannot be read as a CSV file in UTF-8'):
        label_table(tmp_path / 'flowers', tmp_path / 'mine.csv')


@pytest.mark.parametrize('column', ['label', 'patient', 'camera'])
def test_a_text_that_is_not_valid_in_a_table_of_the_user(flowers, column):
    images = find_images(flowers)
    table = pd.DataFrame({'image': images, 'label': 'a', 'patient': 'p', 'camera': 'c'})
    table.loc[1::2, column] = 'x\udcff'
    with pytest.raises(ValueError, match='is not valid text') as e:
        label_table(table)
    assert 'CSV' not in str(e.value)


@pytest.mark.parametrize('column', ['label', 'patient', 'camera'])
def test_each_column_that_is_not_text_names_the_file(tmp_path, flowers, column):
    images = find_images(flowers)
    table = pd.DataFrame({'image': images, 'label': 'a', 'patient': 'p', 'camera': 'c'})
    table.loc[1::2, column] = 'xyz'
    (tmp_path / 'mine.csv').write_bytes(table.to_csv(index=False).encode().replace(b'xyz', b'x\xff'))
    with pytest.raises(ValueError, match=r'mine\.csv cannot be read as a CSV file in UTF-8'):
        label_table(flowers, tmp_path / 'mine.csv')


@pytest.mark.parametrize('workers', [-1, 1.5, 'two', True])
def test_workers_are_checked_wherever_they_are_an_argument(tmp_path, flowers, workers):
    with pytest.raises(ValueError, match=r'workers=.*give the number of processes or threads'):
        preprocess_folder(flowers, tmp_path / 'out', workers=workers)
    with pytest.raises(ValueError, match=r'workers=.*give the number of processes or threads'):
        make_dr(tmp_path / 'eyes', n=4, size=48, workers=workers)
    with pytest.raises(ValueError, match=r'workers=.*give the number of processes or threads'):
        make_ct(tmp_path / 'volumes', n=1, workers=workers)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('make', [make_dr, make_flowers, make_ct])
def test_seeds_of_synthetic_images(tmp_path, make):
    for seed in (None, 1.5, -1, 'one'):
        with pytest.raises(ValueError, match=r'seed=.*: give a whole number'):
            make(tmp_path / 'made', seed=seed)
    assert not any(tmp_path.iterdir())


def test_preprocess_prints_a_reason_without_the_name_of_its_class(tmp_path, capsys):
    make_dr(tmp_path / 'eyes', n=6, size=64, unreadable=1, workers=1)
    result = main(['preprocess', str(tmp_path / 'eyes' / 'images'), str(tmp_path / 'out'), '--size', '48'])
    assert result == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('not prepared')]
    assert 'Error:' not in line
