"Test that the user's files are never replaced, that output names are reserved, and that killed runs are cleaned up."

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dr_transfer.utils.csvfile import write_csv
from dr_transfer.utils.files import (
    MARKER,
    TransferWarning,
    companion,
    file_digest,
    growing_folder,
    has_marker,
    mark_folder,
    new_file,
    new_folder,
    new_pair,
    output_kind,
    plain_text,
    unlisted_files,
    written_together,
)
from dr_transfer.utils.places import OutputError, atomic_file, check_outside, is_inside


def tree(folder):
    "Every path below a folder, and the contents of the files."
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in sorted(Path(folder).rglob('*'))
    }


def enter(context):
    "Enter a context and exit it."
    with context:
        pass


def make_run(path, text='run', **kwargs):
    "A folder as a command makes it."
    with new_folder(path, **kwargs) as tmp:
        (tmp / 'model').mkdir()
        (tmp / 'model' / 'model.json').write_text(text)
        (tmp / 'record.json').write_text(text)


def make_report(path, text='report', overwrite=False):
    "A page and its table as a command writes them."
    with new_pair(path, '_predictions.csv', overwrite) as (page, table):
        table.write_text(f'{text} table')
        page.write_text(f'<meta content="{file_digest(table)}">{text}')


@pytest.fixture
def image_folder(tmp_path):
    "A few small images in a folder."
    folder = tmp_path / 'photos'
    (folder / 'images').mkdir(parents=True)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(60, 200, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / f'{i}.png')
    return folder


# ---------------------------------------------------------------- files


def test_a_file_is_replaced_only_if_its_own_name_was_given_with_overwrite(tmp_path):
    file = tmp_path / 'p.csv'
    file.write_text('mine')
    with pytest.raises(OutputError, match=r'exists already.*--overwrite'):
        enter(new_file(file))
    assert tree(tmp_path) == {'p.csv': b'mine'}
    with new_file(file, overwrite=True) as f:
        f.write_text('new')
        assert file.read_text() == 'mine', 'the old file is gone before the new one is complete'
    assert tree(tmp_path) == {'p.csv': b'new'}


def test_only_regular_files_are_replaced(tmp_path):
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    for name in ('folder', 'pipe'):
        with pytest.raises(OutputError, match=r'is a folder|not a regular file'):
            enter(new_file(tmp_path / name, overwrite=True))
    with pytest.raises(OutputError, match='not a regular file'):
        enter(new_file('/dev/null', overwrite=True))


@pytest.mark.parametrize(
    'context', [new_file, new_folder, lambda p: new_pair(p, '_t.csv'), lambda p: growing_folder(p, 'preprocess')]
)
def test_a_folder_that_cannot_be_written_is_an_error_before_the_work(tmp_path, context):
    loop = tmp_path / 'loop'
    (tmp_path / 'file').write_text('mine')
    os.symlink(tmp_path / 'nowhere', tmp_path / 'dangling')
    os.symlink(loop, loop)
    before = tree(tmp_path)
    for place in (
        '/',
        '/proc/run',
        '/proc/a/b',
        tmp_path / 'file' / 'run',
        tmp_path / 'dangling',
        loop,
        tmp_path / ('x' * 300),
        f'{tmp_path}/a\0b',
    ):
        with pytest.raises(OutputError):
            enter(context(place))
    assert tree(tmp_path) == before
    assert not (tmp_path / 'nowhere').exists()


def test_a_full_disk_is_an_error_before_the_work(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    for context in (new_file(tmp_path / 'p.csv'), new_folder(tmp_path / 'new' / 'run')):
        with pytest.raises(OutputError, match=r'No space left on device.*make room'):
            enter(context)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    'name', ['x' * 254, 'x' * 250 + '.csv', 'é' * 127, '.hidden', ' ', 'a\nb', os.fsdecode(b'\xff\xfe')]
)
def test_any_name_that_the_file_system_accepts_is_valid(tmp_path, name):
    with new_file(tmp_path / name) as f:
        f.write_text('1')
    with new_file(tmp_path / name, overwrite=True) as f:
        f.write_text('2')
    with atomic_file(tmp_path / name) as f:
        f.write_text('3')
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == '3'
    (tmp_path / name).unlink()
    make_run(tmp_path / name)
    make_run(tmp_path / name, overwrite=True)
    assert os.listdir(tmp_path) == [name]


def test_the_result_is_kept_under_another_name_if_it_cannot_be_renamed(tmp_path):
    run = tmp_path / 'run'
    kept = pytest.raises(OutputError, match=r'exists already.*kept in .*p\.csv\.kept')
    with kept, new_file(tmp_path / 'p.csv') as f:
        f.write_text('hours of work')
        (tmp_path / 'p.csv').write_text('put there meanwhile')
    assert tree(tmp_path) == {'p.csv': b'put there meanwhile', 'p.csv.kept': b'hours of work'}
    kept = pytest.raises(OutputError, match=r"holds 'x.txt'.*kept in .*run\.kept")
    with kept, new_folder(run, overwrite=True) as f:
        (f / 'record.json').write_text('hours of work')
        run.mkdir()
        (run / 'x.txt').write_text('put there meanwhile')
    assert (tmp_path / 'run.kept' / 'record.json').read_text() == 'hours of work'
    assert (run / 'x.txt').read_text() == 'put there meanwhile'


def test_what_was_finished_of_a_run_is_kept_if_the_rest_fails(tmp_path):
    kept = pytest.raises(OutputError, match=r'the disk is full.*What was finished is kept in .*run.kept')
    with kept, new_folder(tmp_path / 'run', keep_parts=True) as f:
        (f / 'model.json').write_text('the model')
        raise OSError('the disk is full')
    assert (tmp_path / 'run.kept' / 'model.json').read_text() == 'the model'
    assert output_kind(tmp_path / 'run.kept') == 'unfinished'
    with pytest.raises(RuntimeError), new_folder(tmp_path / 'other', keep_parts=True):
        raise RuntimeError('before anything was written')
    assert os.listdir(tmp_path) == ['run.kept']


def test_what_was_finished_of_a_run_is_kept_after_ctrl_c(tmp_path):
    kept = pytest.raises(KeyboardInterrupt, match=r'what was finished is kept in .*run\.kept')
    with kept, new_folder(tmp_path / 'run', keep_parts=True) as f:
        (f / 'model.json').write_text('the model')
        raise KeyboardInterrupt
    assert tree(tmp_path / 'run.kept')['model.json'] == b'the model'
    assert os.listdir(tmp_path) == ['run.kept']


@pytest.mark.parametrize(
    'error',
    [
        ValueError('it cannot be drawn'),
        OSError(28, 'No space left on device'),
    ],
)
@pytest.mark.parametrize('begun', [False, True])
def test_a_table_is_kept_if_its_page_fails(tmp_path, error, begun):
    why = r'r.html could not be written \((it cannot be drawn|No space left on device)\)'
    kept = pytest.raises(OutputError, match=rf'{why}. The table is kept in .*kept')
    with kept, new_pair(tmp_path / 'r.html', '_t.csv') as (page, table):
        table.write_text('hours of work')
        if begun:
            page.write_text('<html>')
        raise error
    assert tree(tmp_path) == {'r_t.csv.kept': b'hours of work'}


def test_half_a_table_is_not_kept(tmp_path, monkeypatch):
    "If the disk fills up while a table is written, no incomplete table is left."

    def full(self, data):
        with open(self, 'wb') as f:
            f.write(data[:3])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space left'), new_pair(tmp_path / 'r.html', '_t.csv') as (_page, table):
        write_csv(pd.DataFrame({'image': ['a.jpg']}), table)
    assert os.listdir(tmp_path) == []


def test_a_link_is_followed(tmp_path):
    disk = tmp_path / 'disk'
    old = tmp_path / 'disk' / 'old.csv'
    p_csv = tmp_path / 'p.csv'
    run = tmp_path / 'run'
    disk.mkdir()
    old.write_text('old')
    os.symlink(old, p_csv)
    os.symlink(disk, tmp_path / 'link')
    make_run(tmp_path / 'link' / 'run')
    os.symlink(disk / 'run', run)
    make_run(run, 'second', overwrite=True)
    with new_file(p_csv, overwrite=True) as f:
        f.write_text('new')
    assert run.is_symlink()
    assert p_csv.is_symlink()
    assert old.read_text() == 'new'
    assert (disk / 'run' / 'record.json').read_text() == 'second'
    assert sorted(os.listdir(tmp_path)) == ['disk', 'link', 'p.csv', 'run']
    assert sorted(os.listdir(disk)) == ['old.csv', 'run']


# ---------------------------------------------------------------- folders


def test_a_folder_without_a_marker_is_never_replaced(tmp_path):
    "Even if it contains the names of the files of a run."
    mine = tmp_path / 'mine'
    (mine / 'model').mkdir(parents=True)
    (mine / 'model' / 'years of work').write_text('mine')
    (mine / 'record.json').write_text('mine')
    before = tree(tmp_path)
    with pytest.raises(OutputError, match='was not created by dr_transfer'):
        make_run(mine, overwrite=True)
    (mine / MARKER).write_text('{"made_by": "somebody"')
    with pytest.raises(OutputError, match='was not created'):
        make_run(mine, overwrite=True)
    (mine / MARKER).unlink()
    assert tree(tmp_path) == before


@pytest.mark.parametrize('put', ['notes.txt', 'model/notes.txt', 'plots/mine.png', 'link'])
def test_other_files_in_an_output_folder_are_an_error_that_names_them(tmp_path, put):
    run = tmp_path / 'run'
    make_run(run)
    (run / put).parent.mkdir(exist_ok=True)
    if put == 'link':
        os.symlink(tmp_path, run / put)
    else:
        (run / put).write_text('mine')
    before = tree(tmp_path)
    assert unlisted_files(run) == [put]
    with pytest.raises(OutputError, match=f"holds '{put}', which dr_transfer did not write"):
        make_run(run, overwrite=True)
    assert tree(tmp_path) == before


def test_a_run_within_a_run_is_not_lost_with_it(tmp_path):
    runs = tmp_path / 'runs'
    make_run(runs)
    make_run(runs / 'second')
    with pytest.raises(OutputError, match='second/'):
        make_run(runs, overwrite=True)
    assert (runs / 'second' / 'record.json').exists()


def test_another_kind_of_output_is_not_replaced(tmp_path):
    with growing_folder(tmp_path / 'small', 'preprocess') as f:
        (f / 'a.png').write_text('hours of work')
    with pytest.raises(OutputError, match='is a preprocess folder'):
        make_run(tmp_path / 'small', overwrite=True)
    make_run(tmp_path / 'run')
    with pytest.raises(OutputError, match='is not a preprocess folder'):
        enter(growing_folder(tmp_path / 'run', 'preprocess'))


def test_a_growing_folder_is_restored_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), growing_folder(tmp_path / 'a' / 'b', 'demo'):
        raise RuntimeError
    assert tree(tmp_path) == {}
    (tmp_path / 'empty').mkdir()
    enter(growing_folder(tmp_path / 'empty', 'demo'))
    assert tree(tmp_path) == {'empty': None}


def test_only_own_files_of_a_growing_folder_are_deleted(tmp_path):
    mine = tmp_path / 'demo' / 'run' / 'mine.txt'

    def once(overwrite):
        with growing_folder(tmp_path / 'demo', 'demo', ['demo.png', 'run/'], overwrite) as f:
            if not (f / 'run').exists():
                make_run(f / 'run')
            (f / 'demo.png').write_text('figure')

    once(False)
    mine.write_text('mine')
    with pytest.raises(OutputError, match=r"holds 'run/mine.txt'"):
        once(True)
    assert mine.read_text() == 'mine'
    mine.unlink()
    once(True)
    assert sorted(os.listdir(tmp_path / 'demo')) == [MARKER, 'demo.png', 'run']


# ---------------------------------------------------------------- a main file and its table


def test_a_table_is_replaced_only_if_it_was_written_with_its_report(tmp_path):
    page = tmp_path / 'labels.html'
    table = tmp_path / 'labels_predictions.csv'
    (tmp_path / 'labels.csv').write_text('the labels of the user')
    make_report(page)
    make_report(page, 'again', overwrite=True)
    assert (tmp_path / 'labels.csv').read_text() == 'the labels of the user'
    assert table.read_text() == 'again table'
    table.write_text('corrected by hand')
    with pytest.raises(OutputError, match=r'labels_predictions.csv was not written together with .*labels.html'):
        make_report(page, 'third', overwrite=True)
    page.unlink()
    with pytest.raises(OutputError, match=r'labels_predictions.csv'):
        make_report(page, 'third', overwrite=True)
    assert tree(tmp_path) == {'labels.csv': b'the labels of the user', table.name: b'corrected by hand'}


def test_a_report_without_its_table_may_be_replaced(tmp_path):
    r_html = tmp_path / 'r.html'
    make_report(r_html)
    companion(r_html, '_predictions.csv').unlink()
    with pytest.raises(OutputError, match='exists already'):
        make_report(r_html)
    make_report(r_html, overwrite=True)
    assert written_together(r_html, tmp_path / 'r_predictions.csv')


def test_a_page_that_does_not_name_its_table_is_an_error(tmp_path):
    error = pytest.raises(OutputError, match='does not contain the hash of its table')
    with error, new_pair(tmp_path / 'r.html', '_t.csv') as (page, table):
        table.write_text('a')
        page.write_text('b')
    assert not (tmp_path / 'r.html').exists()


def test_figures_contain_the_hash_too(tmp_path):
    from matplotlib.figure import Figure

    with new_pair(tmp_path / 'c.png', '_table.csv') as (figure, table):
        table.write_text('a,b\n')
        Figure().savefig(figure, format='png', metadata={'dr_transfer-table': file_digest(table)})
    assert written_together(tmp_path / 'c.png', tmp_path / 'c_table.csv')


def test_evaluate_does_not_replace_the_labels(tmp_path, image_folder, capsys, monkeypatch):
    "evaluate ... --out DATA/labels.html --overwrite replaced labels.csv."
    from dr_transfer.cli import main

    (image_folder / 'labels.csv').write_text('image,label\n0.png,a\n')
    (tmp_path / 'labels.csv').write_text('mine')
    import dr_transfer.commands.validation as commands
    import dr_transfer.evaluation.report_page as report

    monkeypatch.setattr(commands, '_load', lambda model, runtime: None)
    before = tree(tmp_path)
    assert (
        main(['evaluate', 'model', str(image_folder), '--out', str(image_folder / 'labels.html'), '--overwrite']) == 1
    )
    assert 'lies in the data folder' in capsys.readouterr().err
    assert tree(tmp_path) == before

    class E:
        table = __import__('pandas').DataFrame({'image': ['0.png']})

    monkeypatch.setattr(report, 'report_html', lambda e, n: '<html><head></head></html>')
    for _ in range(2):
        report.write_report(E, tmp_path / 'labels.html', overwrite=True)
    assert (tmp_path / 'labels.csv').read_text() == 'mine'
    assert (tmp_path / 'labels_predictions.csv').read_text() == 'image\n0.png\n'


# ---------------------------------------------------------------- two runs at once


def test_the_second_run_raises_an_error_at_once(tmp_path):
    calls = [new_file, new_folder, lambda p: new_pair(p, '_t.csv'), lambda p: growing_folder(p, 'demo')]
    for i, context in enumerate(calls):
        held = context(tmp_path / str(i))
        held.__enter__()
        start = time.monotonic()
        with pytest.raises(
            OutputError, match=r'another run is writing .*: wait until it is done, or choose another name'
        ):
            enter(context(tmp_path / str(i)))
        assert time.monotonic() - start < 5
        with contextlib.suppress(KeyboardInterrupt):
            held.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert tree(tmp_path) == {}


HOLD = """
import sys, time
from dr_transfer.utils.files import new_folder
with new_folder(sys.argv[1]) as tmp:
    (tmp/'record.json').write_text('first')
    print('held', flush=True)
    sys.stdin.readline()
"""


def test_two_processes_with_one_name(tmp_path):
    "Also with another spelling of the name; the command raises the error before it trains."
    run = tmp_path / 'run'
    first = subprocess.Popen(
        [sys.executable, '-c', HOLD, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == 'held\n'
        os.symlink(tmp_path, tmp_path / 'link')
        with pytest.raises(OutputError, match='another run is writing'):
            make_run(tmp_path / 'link' / 'run')
        import dr_transfer.cli as cli

        (tmp_path / 'data').mkdir()
        with pytest.raises(OutputError, match='another run is writing'):
            cli.main(['train', str(tmp_path / 'data'), '--out', str(run), '--debug'])
    finally:
        first.communicate('go on\n', timeout=60)
    assert first.returncode == 0
    assert (run / 'record.json').read_text() == 'first'
    assert sorted(os.listdir(tmp_path)) == ['data', 'link', 'run']


LOCKING = """
import os, sys
from pathlib import Path
from dr_transfer.utils.places import locked
folder = Path(sys.argv[1])
for i in range(150):
    with locked(folder/'lock', folder, wait=60):
        os.close(os.open(folder/'alone', os.O_CREAT | os.O_EXCL))
        (folder/'alone').unlink()
"""


def test_a_lock_that_is_removed_while_others_wait_is_held_by_one(tmp_path):
    "Each process that holds the lock makes a file that must not exist yet."
    runs = [
        subprocess.Popen([sys.executable, '-c', LOCKING, tmp_path], stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    errors = [r.communicate(timeout=120)[1] for r in runs]
    assert [r.returncode for r in runs] == [0] * 4, errors
    assert os.listdir(tmp_path) == []


def test_files_of_a_cache_wait_for_each_other(tmp_path):
    def write(i):
        with atomic_file(tmp_path / 'known.json') as f:
            f.write_text(str(i) * 10000)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert os.listdir(tmp_path) == ['known.json']
    assert len(set((tmp_path / 'known.json').read_text())) == 1


# ---------------------------------------------------------------- killed


def killed_at(point, work):
    """Do the work in a process that kills itself at its n-th call that changes the disk; return its exit status,
    and the number of calls if it finished.
    """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        count = 0

        def counted(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in ('replace', 'mkdir', 'unlink', 'rmdir', 'fsync', 'open'):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os.write(write, str(count).encode())
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    os.close(write)
    with open(read) as f:
        return os.waitstatus_to_exitcode(status), f.read()


def test_after_a_kill_the_next_run_finds_the_old_or_new_result_and_cleans_up(tmp_path):
    "At each call that changes the disk, from the first to the last."

    complete = tmp_path / 'complete'

    def replace(folder, text, overwrite=True):
        make_run(folder / 'run', text, overwrite=overwrite)
        make_report(folder / 'r.html', text, overwrite=overwrite)

    complete.mkdir()
    replace(complete, 'old', overwrite=False)
    code, steps = killed_at(-1, lambda: replace(complete, 'new'))
    want = tree(complete)
    assert code == 0
    assert int(steps) > 30
    assert b'new' in want['r.html']
    for point in range(1, int(steps) + 1):
        folder = tmp_path / f'at {point}'
        folder.mkdir()
        replace(folder, 'old', overwrite=False)
        exit_code, _ = killed_at(point, partial(replace, folder, 'new'))
        assert exit_code == -signal.SIGKILL
        for name in ('run/record.json', 'r.html'):
            file = folder / name
            assert not file.exists() or file.read_bytes()[-3:] in (b'old', b'new'), 'an incomplete result'
        replace(folder, 'new')
        assert tree(folder) == want, f'killed at step {point} of {steps}'


def test_a_kill_between_two_renames(tmp_path):
    "The old folder is restored; a renamed report gets its table."
    run = tmp_path / 'run'
    r_html = tmp_path / 'r.html'
    make_run(run, 'old')
    os.rename(run, tmp_path / '.run.dr_transfer-old')
    with pytest.raises(OutputError, match='exists already'):
        make_run(run)
    assert (run / 'record.json').read_text() == 'old'
    assert os.listdir(tmp_path) == ['run']
    make_report(r_html)
    os.rename(tmp_path / 'r_predictions.csv', tmp_path / '.r_predictions.csv.dr_transfer-tmp')
    (tmp_path / '.r_predictions.csv.dr_transfer-old').write_text('old table')
    with pytest.raises(OutputError, match='exists already'):
        make_report(r_html)
    assert written_together(r_html, tmp_path / 'r_predictions.csv')
    assert sorted(os.listdir(tmp_path)) == [
        'r.html',
        'r_predictions.csv',
        'run',
    ]


def test_files_of_a_killed_process_are_removed_from_the_cache(tmp_path):
    (tmp_path / '.known.json.dr_transfer-tmp').write_text('half')
    (tmp_path / '.known.json.dr_transfer-lock').write_text('')
    with atomic_file(tmp_path / 'known.json') as f:
        f.write_text('complete')
    assert tree(tmp_path) == {'known.json': b'complete'}


# ---------------------------------------------------------------- outputs and data apart


def test_outputs_cannot_be_in_the_data(tmp_path, image_folder, monkeypatch):
    link = tmp_path / 'link'
    os.symlink(image_folder, link)
    monkeypatch.chdir(image_folder)
    for out in (
        '.',
        'run',
        'images/run',
        link / 'run',
        tmp_path / 'photos' / '..' / 'photos' / 'run',
        '../link/images',
    ):
        with pytest.raises(OutputError, match='lies in the data folder'):
            check_outside(out, image_folder)
    for out in (tmp_path / 'run', '..', '../photos_run'):
        check_outside(out, image_folder)
    with pytest.raises(OutputError, match='is an input'):
        check_outside(link / 'images' / '0.png', image_folder / 'images' / '0.png')
    assert is_inside(image_folder, tmp_path)
    assert not is_inside(tmp_path, image_folder)
    assert not is_inside('x', tmp_path / 'nowhere')


@pytest.mark.parametrize('command', ['train', 'advise', 'compare', 'cross-validate'])
def test_the_commands_do_not_write_into_the_data(image_folder, capsys, command):
    from dr_transfer.cli import main

    before = tree(image_folder)
    assert main([command, str(image_folder), '--out', str(image_folder / 'out')]) == 1
    assert 'lies in the data folder' in capsys.readouterr().err
    assert tree(image_folder) == before


def test_predict_does_not_replace_what_it_reads(image_folder, capsys):
    from dr_transfer.cli import main

    before = tree(image_folder)
    image = str(image_folder / 'images' / '0.png')
    assert main(['predict', 'model', image, '--out', image, '--overwrite']) == 1
    assert 'is an input' in capsys.readouterr().err
    assert tree(image_folder) == before


def test_runs_are_never_read_as_data(tmp_path):
    from dr_transfer.data.table import find_images, label_table

    data = tmp_path / 'data'
    for label in ('daisy', 'rose'):
        (data / label).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(data / label / f'{label}.png')
    with new_folder(data / 'run') as f:
        for name in ('history.png', 'confusion.png'):
            Image.new('RGB', (8, 8)).save(f / name)
    assert sorted(label_table(data).label) == ['daisy', 'rose']
    with pytest.raises(OutputError, match='is a run folder of dr_transfer, not data'):
        find_images(data / 'run')
    mark_folder(data / 'rose', 'preprocess')
    assert len(find_images(data)) == 2, 'prepared images are not data'


# ---------------------------------------------------------------- preprocess


def prepare(folder, out, **kwargs):
    from dr_transfer.data.preprocess import Preparation, preprocess_folder

    return preprocess_folder(folder, out, Preparation(48), **kwargs)


def test_preprocess_never_writes_over_the_originals(tmp_path, image_folder, monkeypatch):
    "With a link, another spelling, or a folder inside."
    link = tmp_path / 'link'
    inner = tmp_path / 'inner'
    os.symlink(image_folder, link)
    os.symlink(image_folder / 'images', inner)
    monkeypatch.chdir(image_folder)
    before = tree(tmp_path)
    for folder, out in (
        (image_folder, link),
        (link, image_folder),
        (image_folder, tmp_path / 'photos' / '..' / 'photos'),
        ('.', image_folder),
        (image_folder, '.'),
    ):
        with pytest.raises(OutputError, match='contains the originals, which are never changed'):
            prepare(folder, out)
    for out in (image_folder / 'small', link / 'small', inner, image_folder / 'images'):
        with pytest.raises(OutputError, match='would be read as images'):
            prepare(image_folder, out)
    for folder in ('images', inner):
        with pytest.raises(OutputError, match='contains the folder of images'):
            prepare(folder, '.')
    assert tree(tmp_path) == before


def test_preprocess_does_not_write_through_a_link(tmp_path, image_folder):
    images = tmp_path / 'small' / 'images'
    prepare(image_folder, tmp_path / 'small')
    for p in images.iterdir():
        p.unlink()
    images.rmdir()
    os.symlink(image_folder / 'images', images)
    before = tree(image_folder)
    with pytest.raises(OutputError, match='is a link to a folder outside'):
        prepare(image_folder, tmp_path / 'small')
    assert tree(image_folder) == before


def test_preprocess_writes_into_no_folder_of_the_user(tmp_path, image_folder):
    mine = tmp_path / 'mine'
    small = tmp_path / 'small'
    (mine / 'images').mkdir(parents=True)
    (mine / 'images' / '0.png').write_text('mine')
    with pytest.raises(OutputError, match="exists already, holds 'images'"):
        prepare(image_folder, mine)
    assert tree(mine) == {'images': None, 'images/0.png': b'mine'}
    prepare(image_folder, small)
    assert output_kind(small) == 'preprocess'
    assert unlisted_files(small) == []


def test_a_damaged_result_is_prepared_again(tmp_path, image_folder):
    small = tmp_path / 'small'
    prepare(image_folder, small)
    want = tree(small)
    file = small / 'images' / '1.png'
    for damage in (b'', want['images/1.png'][:-1], want['images/1.png'][:-1] + b'x'):
        file.write_bytes(damage)
        prepare(image_folder, small)
        assert tree(small) == want


@pytest.mark.parametrize('name', ['journal.jsonl', 'preparation.json'])
@pytest.mark.parametrize(
    'damage', [b'', b'[]', b'\xff\xfe\0', b'{"image": 1}\n', b'not JSON\n' * 3, b'[' * 100000 + b'\n']
)
def test_damaged_results_are_named_and_made_again(tmp_path, image_folder, recwarn, name, damage):
    small = tmp_path / 'small'
    prepare(image_folder, small)
    want = tree(small)
    (small / name).write_bytes(damage)
    prepare(image_folder, small)
    told = [str(w.message) for w in recwarn if w.category is TransferWarning]
    assert tree(small) == want
    if damage.endswith(b'\n') or name == 'preparation.json':
        assert any(t.startswith(f'{tmp_path / "small" / name} is damaged') for t in told)


def test_a_truncated_line_after_a_kill_is_not_reported(tmp_path, image_folder, recwarn):
    small = tmp_path / 'small'
    prepare(image_folder, small)
    want = tree(small)
    lines = want['journal.jsonl'].splitlines(True)
    (small / 'journal.jsonl').write_bytes(b''.join(lines[:2]) + lines[2][:20])
    prepare(image_folder, small)
    assert tree(small) == want
    assert not [w for w in recwarn if w.category is TransferWarning]


def test_preprocess_on_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, image_folder, monkeypatch):
    small = tmp_path / 'small'
    real = Image.Image.save
    n = []

    def save(self, *args, **kwargs):
        n.append(1)
        if len(n) == 3:
            raise OSError(28, 'No space left on device')
        return real(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', save)
        with pytest.raises(OutputError, match=r'2\.png could not be written \(No space left on device\).*run it again'):
            prepare(image_folder, small, workers=1)
    assert len((small / 'journal.jsonl').read_text().splitlines()) == 2
    prepare(image_folder, small)
    prepare(image_folder, tmp_path / 'complete')
    assert tree(small) == tree(tmp_path / 'complete')


PREPARE = (
    'import sys; sys.path.insert(0, sys.argv[3]); from test_outputs import prepare; prepare(sys.argv[1], sys.argv[2])'
)


def test_files_of_a_killed_preprocess_are_removed_by_the_next_run(tmp_path, image_folder):
    small = tmp_path / 'small'
    images = tmp_path / 'small' / 'images'
    want = prepare(image_folder, tmp_path / 'complete')
    run = subprocess.Popen(
        [sys.executable, '-c', PREPARE, image_folder, small, str(Path(__file__).parent)],
        stderr=subprocess.DEVNULL,
    )
    for _ in range(1000):
        if (small / MARKER).exists() or run.poll() is not None:
            break
        time.sleep(0.02)
    time.sleep(0.01)
    run.kill()
    run.wait()
    images.mkdir(exist_ok=True)
    (images / '.9.png.dr_transfer-tmp').write_text('of an image that was deleted')
    (images / '.9.png.dr_transfer-lock').write_text('')
    assert prepare(image_folder, small).equals(want)
    assert tree(small) == tree(tmp_path / 'complete')


# ---------------------------------------------------------------- plots


@pytest.mark.parametrize('name', ['$', '1$ & 2$', r'\$x$', '$\\frac$', os.fsdecode(b'\xff')])
def test_a_class_may_have_any_name_in_a_figure(name, tmp_path):
    from matplotlib.figure import Figure

    fig = Figure()
    fig.subplots().set_xticks([0], [plain_text(name)])
    fig.savefig(tmp_path / 'a.png')
    assert (tmp_path / 'a.png').stat().st_size > 0


def test_a_plot_that_fails_is_a_warning(tmp_path):
    from dr_transfer.inference.run import _plot

    def fails():
        raise RuntimeError('no such font')

    with pytest.warns(
        TransferWarning, match=r'confusion.png could not be drawn \(RuntimeError: no such font\); all other'
    ):
        _plot(tmp_path / 'confusion.png', fails)
    assert tree(tmp_path) == {}


def test_the_marker_lists_what_was_written(tmp_path):
    run = tmp_path / 'run'
    make_run(run)
    assert json.loads((run / MARKER).read_text()) == {
        'made_by': 'dr_transfer',
        'kind': 'run',
        'files': ['model/model.json', 'record.json'],
    }
    assert has_marker(run)
    assert not has_marker(tmp_path)
    assert not has_marker(tmp_path / 'nowhere')
