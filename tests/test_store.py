"Test the store on disk: rows are found, incomplete rows are removed, and nothing is computed twice."

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dr_transfer.data import content
from dr_transfer.data.content import ChangedError, content_key, content_keys, fill_stores, image_data
from dr_transfer.data.images import read_rgb, to_rgb
from dr_transfer.utils import store as module
from dr_transfer.utils.regular import open_regular
from dr_transfer.utils.store import ArrayStore, digest, stored_array

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {'colour': ((3,), 'float32'), 'corner': ((2, 2), 'uint8')}
N = 7
BS = 2


def random_arrays(n, start=0):
    return [np.full((4, 4, 3), (i % 256, i // 256, 9), np.uint8) for i in range(start, start + n)]


def number(a):
    return int(a[0, 0, 0]) + 256 * int(a[0, 0, 1])


def new(root, name='s', **about):
    return ArrayStore(root, name, {'of': 'colour', **about}, FIELDS)


def fill(store, *args):
    return fill_stores([store], *args)[0]


def contents(store):
    return {p.name: p.read_bytes() for p in store.folder.iterdir() if p.name != 'lock'}


WHAT = {
    'colour': lambda s: s.mean((0, 1)),
    'corner': lambda s: s[:2, :2, 0],
}  # the mean colour, and a corner of the first channel


def colours(batches=None, bs=BS, stop=None, log=None, pause=0.0, what=WHAT, requested=None):
    "A function that computes the requested fields"

    def compute(sources, names):
        if requested is not None:
            requested.append(names)
        for i in range(0, len(sources), bs):
            if stop is not None and i // bs >= stop:
                raise KeyboardInterrupt
            part = sources[i : i + bs]
            if batches is not None:
                batches.extend(map(number, part))
            if log:
                with open(log, 'a') as f:
                    f.write(''.join(f'{os.getpid()} {number(s)}\n' for s in part))
            time.sleep(pause)
            yield {n: np.stack([what[n](s) for s in part]) for n in names}

    return compute


def right(store, images, rows):
    "Return whether the rows of the store are those of the images"
    want = np.stack([s[0, 0] for s in images])
    return np.array_equal(stored_array(store, 'colour')[rows], want) and np.array_equal(
        stored_array(store, 'corner')[rows][:, 1, 1], want[:, 0]
    )


def child(code, *args, **kw):
    "Start another process that has the functions of this module"
    head = f'import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]; from test_store import *\n'
    return subprocess.Popen(
        [sys.executable, '-c', head + code, *map(str, args)], stdout=subprocess.PIPE, text=True, **kw
    )


@pytest.fixture(scope='module')
def complete(tmp_path_factory):
    "A store that was filled without interruption"
    store = new(tmp_path_factory.mktemp('complete'))
    fill(store, random_arrays(N), colours(), BS)
    return contents(store)


# ---------------------------------------------------------------- the store


def test_files_of_a_store(complete, tmp_path):
    "Plain numbers and text, readable without this library"
    assert set(complete) == {'about.json', 'images.jsonl', 'colour.bin', 'corner.bin'}
    about = json.loads(complete['about.json'])
    lines = [json.loads(line) for line in complete['images.jsonl'].decode().splitlines()]
    assert about == {'of': 'colour', 'format': 2, 'fields': {'colour': [[3], 'float32'], 'corner': [[2, 2], 'uint8']}}
    assert [line['row'] for line in lines] == list(range(N))
    for line in lines:
        assert len(line['sums']) == 2
    assert [line['key'] for line in lines] == content_keys(random_arrays(N))
    assert np.frombuffer(complete['colour.bin'], np.float32).reshape(-1, 3)[:, 0].tolist() == list(range(N))
    assert len(complete['corner.bin']) == N * 4


def test_rows_are_in_the_requested_order(tmp_path):
    images = random_arrays(5)
    batches = []
    store = new(tmp_path)
    fill(store, images[:3], colours(batches), BS)
    requested = [images[i] for i in (4, 0, 3, 0, 2)]
    rows = fill(store, requested, colours(batches), BS)
    assert right(store, requested, rows)
    assert rows[1] == rows[3] == 0
    assert batches == [0, 1, 2, 4, 3]
    assert right(new(tmp_path), requested, fill(new(tmp_path), requested, colours(batches), BS))
    assert len(batches) == 5


def test_the_same_image_twice_is_computed_once(tmp_path):
    images = random_arrays(2)
    batches = []
    requested = [images[0], Image.fromarray(images[0]), images[1], images[0].copy()]

    def compute(sources, names):
        for s in sources:
            batches.append(number(np.asarray(s)))
            yield {'colour': np.asarray(s)[:1, 0], 'corner': np.asarray(s)[None, :2, :2, 0]}

    rows = fill(new(tmp_path), requested, compute, 1)
    assert rows.tolist() == [0, 0, 1, 0]
    assert batches == [0, 1]
    assert len(new(tmp_path)) == 2


def test_arrays_are_mapped_and_not_written(tmp_path):
    store = new(tmp_path)
    assert stored_array(store, 'corner').shape == (0, 2, 2)
    assert stored_array(store, 'corner').dtype == np.uint8
    fill(store, random_arrays(3), colours(), BS)
    a = stored_array(store, 'colour')
    assert isinstance(a, np.memmap)
    assert a.shape == (3, 3)
    assert a.dtype == np.float32
    with pytest.raises(ValueError):
        a[0] = 1
    before = a.copy()
    fill(new(tmp_path), random_arrays(N), colours(), BS)  # rows of other processes do not change it
    assert np.array_equal(a, before)
    assert len(stored_array(new(tmp_path), 'colour')) == N


def test_nothing_to_do_writes_nothing(tmp_path):
    assert fill(new(tmp_path / 'x'), [], colours(), BS).shape == (0,)
    assert not (tmp_path / 'x').exists()
    new(tmp_path / 'y')
    assert not (tmp_path / 'y').exists()


# ---------------------------------------------------------------- changes


@pytest.mark.parametrize(
    'change',
    [
        dict(of='shape'),
        dict(size=64),
        dict(stages=['a', 'b']),
    ],
    ids=str,
)
def test_another_description_is_another_store(tmp_path, change):
    fill(new(tmp_path), random_arrays(3), colours(), BS)
    other = ArrayStore(tmp_path, 's', {'of': 'colour', **change}, FIELDS)
    assert len(other) == 0
    assert len(new(tmp_path)) == 3
    assert other.folder != new(tmp_path).folder


@pytest.mark.parametrize(
    'fields',
    [
        {'colour': ((3,), 'float32')},
        {**FIELDS, 'corner': ((4,), 'uint8')},
        {**FIELDS, 'colour': ((3,), 'float16')},
    ],
    ids=str,
)
def test_other_fields_are_another_store(tmp_path, fields):
    fill(new(tmp_path), random_arrays(3), colours(), BS)
    assert len(ArrayStore(tmp_path, 's', {'of': 'colour'}, fields)) == 0


def test_the_order_of_a_description_does_not_matter():
    assert digest({'a': 1, 'b': [2, 3]}) == digest({'b': [2, 3], 'a': 1}) != digest({'a': 1, 'b': [3, 2]})
    assert len({digest({'a': v}) for v in (1, 1.5, '1', None, True, [1], {})}) == 7


def test_a_changed_image_is_computed_and_only_that(tmp_path):
    images = random_arrays(N)
    batches = []
    fill(new(tmp_path), images, colours(batches), BS)
    images[3] = images[3].copy()
    images[3][3, 3, 2] += 1  # the smallest possible change
    del batches[:]
    rows = fill(new(tmp_path), images, colours(batches), BS)
    assert batches == [3]
    assert rows.tolist() == [0, 1, 2, 7, 4, 5, 6]


def test_content_keys(tmp_path):
    a_png = tmp_path / 'a.png'
    a = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(a).save(a_png)
    shutil.copy(a_png, tmp_path / 'b.jpg')  # a name does not identify the content
    same = content_keys([a_png, str(tmp_path / 'b.jpg'), a_png.read_bytes()])
    assert len(set(same)) == 1
    assert len(same[0]) == 32
    others = [a, a[::-1], a[:, ::-1], a.reshape(2, 8, 3), a.reshape(8, 2, 3), a[..., ::-1], a[:, :2], a[..., 0]]
    assert len({*content_keys(others), same[0]}) == len(others) + 1
    assert content_key(a[::-1]) == content_key(a[::-1].copy()) == content_key(Image.fromarray(a[::-1].copy()))
    assert content_keys([]) == []


def palettes():
    a = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert('P')
    b = a.copy()
    b.putpalette([255 - v for v in a.getpalette()])
    return a, b


def orientations():
    a = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    b = a.copy()
    b.getexif()[0x112] = 6
    return a, b


def transparencies():
    a = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    b = a.copy()
    b.info['transparency'] = (9, 10, 11)
    return a, b


@pytest.mark.parametrize('pair', [palettes, orientations, transparencies])
def test_the_arrays_are_different_images(pair):
    assert not np.array_equal(*(np.array(to_rgb(im)) for im in pair()))


@pytest.mark.parametrize('pair', [palettes, orientations, transparencies])
def test_pil_images_that_read_differently_have_different_keys(pair):
    a, b = pair()
    assert content_key(a) != content_key(b)


# ---------------------------------------------------------------- interruptions


def finished(root, complete, left=None):
    "The missing rows are computed, and the bytes are those of a store without interruption"
    batches = []
    store = new(root)
    kept = len(store)
    rows = fill(store, random_arrays(N), colours(batches), BS)
    assert contents(store) == complete
    assert rows.tolist() == list(range(N))
    assert right(store, random_arrays(N), rows)
    assert batches == list(range(kept, N))
    assert left is None or len(batches) == left


@pytest.mark.parametrize('stop', range(5))
def test_interrupted_between_batches(tmp_path, complete, stop):
    store = new(tmp_path)
    if stop * BS < N:
        with pytest.raises(KeyboardInterrupt):
            fill(store, random_arrays(N), colours(stop=stop), BS)
    else:
        fill(store, random_arrays(N), colours(stop=stop), BS)
    assert len(new(tmp_path)) == min(N, stop * BS)
    finished(tmp_path, complete, N - min(N, stop * BS))


def opening(act, at):
    "Replace `open` to do something before the nth write to a file of the store"
    n = count()

    class Opened:
        def __init__(self, *a, **k):
            self.file = open_regular(*a, **k)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *a):
            self.file.close()

        def write(self, data):
            if next(n) == at:
                act()
            return self.file.write(data)

    return Opened, n


def halt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('again', [False, True], ids=['a new store', 'the same store'])
@pytest.mark.parametrize('at', range(12))
def test_interrupted_between_files(tmp_path, monkeypatch, complete, at, again):
    "Four batches of two arrays and the lines: each is once the first that is missing"
    store = new(tmp_path)
    opened, _n = opening(halt, at)
    with monkeypatch.context() as m:
        m.setattr(module, 'open_regular', opened)
        with pytest.raises(KeyboardInterrupt):
            fill(store, random_arrays(N), colours(), BS)
    assert len(new(tmp_path)) == at // 3 * BS
    if again:
        assert right(store, random_arrays(N), fill(store, random_arrays(N), colours(), BS))
    finished(tmp_path, complete)


def test_there_are_twelve_writes(tmp_path, monkeypatch):
    opened, n = opening(halt, -1)
    monkeypatch.setattr(module, 'open_regular', opened)
    fill(new(tmp_path), random_arrays(N), colours(), BS)
    assert next(n) == 12


@pytest.mark.parametrize('at', [4, 5])
def test_killed_between_files(tmp_path, complete, at):
    p = child(
        'module.open_regular = opening(kill, int(sys.argv[2]))[0]; '
        'fill(new(sys.argv[1]), random_arrays(N), colours(), BS)',
        tmp_path,
        at,
    )
    assert p.wait(30) == -signal.SIGKILL
    assert len(new(tmp_path)) == BS
    finished(tmp_path, complete, N - BS)


def test_killed_at_any_time(tmp_path):
    "Repeatedly, until the store is complete"
    images = random_arrays(40)
    log = tmp_path / 'log'
    done = [0]
    log.touch()
    while done[-1] < 40:
        assert len(done) < 20
        p = child('fill(new(sys.argv[1]), random_arrays(40), colours(log=sys.argv[2], pause=.01), BS)', tmp_path, log)
        started = time.monotonic()
        before = log.read_text().count('\n')
        while p.poll() is None and log.read_text().count('\n') < before + 14 and time.monotonic() < started + 30:
            time.sleep(0.002)
        p.kill()
        p.wait()
        done.append(len(new(tmp_path)))
        assert done[-1] > done[-2]  # what was computed is kept
        store = new(tmp_path)
        have = [s for s, k in zip(images, content_keys(images)) if k in store.keys]
        assert right(store, have, fill(store, have, colours(stop=0), BS))  # it can be read
    assert len(done) >= 3
    fill(new(tmp_path / 'at once'), images, colours(), BS)
    assert contents(new(tmp_path)) == contents(new(tmp_path / 'at once'))
    computed = Counter(line.split()[1] for line in log.read_text().splitlines())
    assert set(computed) == set(map(str, range(40)))
    assert sum(computed.values()) <= 40 + 2 * BS * len(done)


def cut(name, n):
    return lambda d: os.truncate(d / name, (d / name).stat().st_size + n)


def add(name, data):
    return lambda d: (d / name).write_bytes((d / name).read_bytes() + data)


def both(*fs):
    return lambda d: [f(d) for f in fs]


INCOMPLETE = {
    'part of a number more': (add('colour.bin', b'\1\2\3'), 4),
    'a row more': (add('corner.bin', b'\1' * 4), 4),
    'rows more': (both(add('colour.bin', b'\1' * 36), add('corner.bin', b'\1' * 12)), 4),
    'a byte less': (cut('colour.bin', -1), 3),
    'rows less': (cut('corner.bin', -8), 2),
    'nothing': (cut('corner.bin', -16), 0),
    'less and more': (both(cut('corner.bin', -5), add('colour.bin', b'\1' * 20)), 2),
    'no file': (lambda d: (d / 'colour.bin').unlink(), 0),
    'half a line': (add('images.jsonl', b'{"key": "0123456'), 4),
    'a line without its end': (cut('images.jsonl', -1), 3),
    'a line cut': (cut('images.jsonl', -30), 3),
    'only half a line': (cut('images.jsonl', -350), 0),
    'a line without numbers': (add('images.jsonl', b'{"key": "0123", "name": ""}\n'), 4),
    'no lines': (lambda d: (d / 'images.jsonl').unlink(), 0),
    'zeros': (add('images.jsonl', bytes(100)), 4),
    'half a line and numbers': (both(add('images.jsonl', b'{"k'), add('colour.bin', b'\1' * 25)), 4),
    'no description': (lambda d: (d / 'about.json').unlink(), 4),
}


@pytest.mark.parametrize('name', INCOMPLETE)
def test_incomplete_writes(tmp_path, complete, name):
    damage, kept = INCOMPLETE[name]
    with pytest.raises(KeyboardInterrupt):
        fill(new(tmp_path), random_arrays(N), colours(stop=2), BS)
    assert 350 < (new(tmp_path).folder / 'images.jsonl').stat().st_size < 4 * 110
    damage(new(tmp_path).folder)
    store = new(tmp_path)
    assert len(store) == kept
    assert (
        right(store, random_arrays(kept), fill(store, random_arrays(kept), colours(stop=0), BS)) if kept else True
    )  # read without change
    finished(tmp_path, complete, N - kept)


def test_a_damaged_line(tmp_path):
    "Only its own rows are lost, with a warning"
    fill(new(tmp_path), random_arrays(N), colours(), BS)
    lines = new(tmp_path).folder / 'images.jsonl'
    batches = []
    lines.write_bytes(lines.read_bytes().replace(b'{', b'\0', 3))
    store = new(tmp_path)
    with pytest.warns(UserWarning, match='damaged rows.*: 3 of 7'):
        rows = fill(store, random_arrays(N), colours(batches), BS)
    assert batches == [0, 1, 2]
    assert right(store, random_arrays(N), rows)
    again_is_read(tmp_path)


def test_a_row_without_an_image_has_an_empty_key_in_the_file(tmp_path):
    "The files are those of earlier versions; in memory no image has an empty key"
    fill(new(tmp_path), random_arrays(N), colours(), BS)
    lines = new(tmp_path).folder / 'images.jsonl'
    lines.write_bytes(lines.read_bytes().replace(b'{', b'\0', 1))
    store = new(tmp_path)
    with pytest.warns(UserWarning, match='damaged rows'):
        fill(store, random_arrays(N), colours(), BS)
    zeros = ', '.join('0' for _ in store.fields)
    assert lines.read_text().splitlines()[0] == f'{{"row": 0, "key": "", "name": "", "sums": [{zeros}]}}'
    assert '' not in new(tmp_path).keys


# ---------------------------------------------------------------- stored values are checked


def again_is_read(root, batches=None):
    "Everything is correct, and there is no further warning"
    store = new(root)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert right(store, random_arrays(N), fill(store, random_arrays(N), colours(stop=0), BS))
        fill(new(root), random_arrays(N + 1), colours(), BS)  # the lock is held: nothing is found damaged


def edit(name, change):
    def damage(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def line_of(row, change):
    return edit(
        'images.jsonl',
        lambda d: b''.join(change(line) if i == row else line for i, line in enumerate(d.splitlines(True))),
    )


def other_key(line):
    return line.replace(json.loads(line)['key'].encode(), content_key(random_arrays(N)[5]).encode())


def swapped(folder):
    a, b = (folder / 'images.jsonl').read_text().splitlines()[1:3]
    a = json.loads(a)
    b = json.loads(b)
    a['key'], b['key'] = b['key'], a['key']
    line_of(1, lambda line: json.dumps(a).encode() + b'\n')(folder)
    line_of(2, lambda line: json.dumps(b).encode() + b'\n')(folder)


DAMAGE = {
    'zeroed': (edit('colour.bin', lambda d: bytes(len(d))), range(N)),
    'a bit': (edit('corner.bin', lambda d: d[:9] + bytes([d[9] ^ 1]) + d[10:]), [2]),
    'a row of zeros': (edit('colour.bin', lambda d: d[:12] + bytes(12) + d[24:]), [1]),
    'cut': (edit('colour.bin', lambda d: d[:30]), range(2, N)),
    'a line deleted': (line_of(2, lambda line: b''), [2]),
    'the first line deleted': (line_of(0, lambda line: b''), [0]),
    'a line twice': (line_of(3, lambda line: line * 2), []),
    'no longer JSON': (line_of(4, lambda line: b'{"row": 4' + line[9:20] + b'\n'), [4]),
    'a list': (line_of(1, lambda line: b'[1, 2]\n'), [1]),
    'another key': (line_of(1, other_key), [1]),
    'two keys swapped': (swapped, [1, 2]),
    'another row': (line_of(6, lambda line: line.replace(b'"row": 6', b'"row": 5')), [5, 6]),
    'a row beyond': (line_of(6, lambda line: line.replace(b'"row": 6', b'"row": 99999999')), [6]),
    'a text for a checksum': (line_of(2, lambda line: line.replace(b'"sums": [', b'"sums": ["a", ')), [2]),
    'no bytes': (edit('corner.bin', lambda d: b''), range(N)),
}


QUIET = {'another key'}  # resembles a row that was computed again


@pytest.mark.parametrize('name', DAMAGE)
def test_changed_rows_are_computed_again_and_reported(tmp_path, name):
    "The values are those of the images for any damage; nothing else is computed, and there is one warning"
    damage, lost = DAMAGE[name]
    fill(new(tmp_path), random_arrays(N), colours(), BS)
    damage(new(tmp_path).folder)
    store = new(tmp_path)
    batches = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        rows = fill(store, random_arrays(N), colours(batches), BS)
    assert right(store, random_arrays(N), rows)
    assert batches == list(lost)
    assert len(warned) == (bool(lost) and name not in QUIET)
    for w in warned:
        assert str(store.folder) in str(w.message)
    if lost:
        again_is_read(tmp_path)


def test_swapped_files_of_two_stores(tmp_path):
    "Values of another description fit the files, but not the checksums"
    for size in (1, 2):
        fill(new(tmp_path, size=size), random_arrays(N), colours(), BS)
    a, b = (new(tmp_path, size=size).folder for size in (1, 2))
    for name in ('images.jsonl', 'colour.bin', 'corner.bin'):
        shutil.copy(a / name, b / name)
    batches = []
    with pytest.warns(UserWarning, match='damaged'):
        fill(new(tmp_path, size=2), random_arrays(N), colours(batches), BS)
    assert batches == list(range(N))


def test_only_requested_rows_are_checked(tmp_path):
    fill(new(tmp_path), random_arrays(N), colours(), BS)
    DAMAGE['a row of zeros'][0](new(tmp_path).folder)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert fill(new(tmp_path), random_arrays(1), colours(stop=0), BS).tolist() == [0]


def test_a_row_in_use_is_not_overwritten(tmp_path):
    "Arrays in memory keep the values that were checked"
    fill(new(tmp_path), random_arrays(N), colours(), BS)
    before = stored_array(new(tmp_path), 'colour')
    want = before.copy()
    line_of(2, lambda line: b'')(new(tmp_path).folder)
    with pytest.warns(UserWarning, match='damaged'):
        fill(new(tmp_path), random_arrays(N + 3), colours(), BS)
    assert np.array_equal(before, want)


def test_a_changed_description(tmp_path, complete):
    fill(new(tmp_path), random_arrays(3), colours(), BS)
    (new(tmp_path).folder / 'about.json').write_text('{"of": "shape"}')
    fill(new(tmp_path), random_arrays(N), colours(), BS)
    assert contents(new(tmp_path)) == complete


@pytest.mark.parametrize('again', [True, False])
def test_a_file_replaced_between_hashing_and_reading(tmp_path, monkeypatch, again):
    "Its values are not stored under the key of the old file"
    s_folder = tmp_path / 's'
    files = [tmp_path / f'{i}.png' for i in range(4)]
    for f, a in zip(files, random_arrays(4)):
        Image.fromarray(a).save(f)
    was = files[2].read_bytes()
    keys = content_keys(files)

    def compute(sources, names, change=True):
        for s in sources:
            if change and len(done) == 2:
                Image.fromarray(random_arrays(1, 9)[0]).save(files[2])
            done.append(1)
            a = np.asarray(read_rgb(image_data(s)))
            yield {n: WHAT[n](a)[None] for n in names}

    done = []
    with pytest.raises(ChangedError, match=r'2.png changed') as e:
        fill(new(s_folder), files, compute, 1)
    assert 'run the command again' in str(e.value)
    assert len(new(s_folder)) == 2
    if again:
        files[2].write_bytes(was)
    store = new(s_folder)
    rows = fill(store, files, lambda s, n: compute(s, n, False), 1)
    want = np.stack([np.asarray(Image.open(f))[0, 0] for f in files])
    assert np.array_equal(stored_array(store, 'colour')[rows], want)
    assert (content_keys(files) == keys) == again


# ---------------------------------------------------------------- links, pipes and folders of other users


def test_links_are_not_followed_for_writing(tmp_path):
    "For each file of the store, the target of a link is not changed"
    precious = tmp_path / 'precious'
    for name in ('colour.bin', 'images.jsonl', 'about.json', 'lock'):
        store = new(tmp_path / name)
        store.folder.mkdir(parents=True)
        precious.write_bytes(b'thesis')
        (store.folder / name).symlink_to(precious)
        with pytest.raises(ValueError, match=f'{name}: it is a link.*Delete it'):
            fill(new(tmp_path / name), random_arrays(3), colours(), BS)
        assert precious.read_bytes() == b'thesis'


def test_a_store_that_is_a_link_is_not_used(tmp_path, monkeypatch):
    "The cache itself may be a link to another disk."
    cache = tmp_path / 'cache'
    disk = tmp_path / 'disk'
    user_folder = tmp_path / 'mine'
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(cache))
    disk.mkdir()
    cache.symlink_to(disk)
    store = new(cache / 'store')
    fill(store, random_arrays(3), colours(), BS)
    assert (store.folder / 'images.jsonl').exists()
    assert store.folder.resolve().is_relative_to(disk)
    user_folder.mkdir()
    (user_folder / 'images.jsonl').write_text('thesis')
    store = new(cache / 'other')
    store.folder.parent.mkdir(parents=True, exist_ok=True)
    store.folder.symlink_to(user_folder)
    with pytest.raises(ValueError, match=r'it is a link to .*mine.*Delete it'):
        fill(store, random_arrays(3), colours(), BS)
    assert os.listdir(user_folder) == ['images.jsonl']
    assert (user_folder / 'images.jsonl').read_text() == 'thesis'


@pytest.mark.parametrize('name', ['colour.bin', 'images.jsonl', 'about.json', 'lock'])
@pytest.mark.parametrize('kind', ['pipe', 'folder'])
def test_paths_that_are_not_files(tmp_path, name, kind):
    "The store does not wait for it"
    folder = new(tmp_path).folder
    folder.mkdir()
    if kind == 'pipe':
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    with pytest.raises(ValueError, match=f'{name}: it is a .*{kind}.*Delete it'):
        fill(new(tmp_path), random_arrays(3), colours(), BS)


@pytest.mark.parametrize('place', ['pipe', 'zero'])
def test_a_source_that_is_not_a_file(tmp_path, place):
    path = tmp_path / 'pipe.png'
    if place == 'pipe':
        os.mkfifo(path)
    else:
        path.symlink_to('/dev/zero')
    with pytest.raises(ValueError, match=r'pipe.png.*not a regular file'):
        content_keys([path])


def test_folders_of_the_cache_are_private(tmp_path):
    fill(new(tmp_path / 'cache' / 'features'), random_arrays(3), colours(), BS)
    folder = new(tmp_path / 'cache' / 'features').folder
    assert [p.stat().st_mode & 0o777 for p in (folder, *folder.parents[:2])] == [0o700] * 3


def test_a_world_writable_folder(tmp_path):
    "One warning"
    open_path = tmp_path / 'open'
    open_path.mkdir()
    open_path.chmod(0o777)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        for n in (3, 3, 5):
            fill(new(open_path), random_arrays(n), colours(), BS)
    assert len(warned) == 1
    assert str(open_path) in str(warned[0].message)
    assert 'everybody' in str(warned[0].message)


@pytest.mark.skipif(
    not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root can give a folder to another user'
)
@pytest.mark.parametrize('whose', ['the folder', 'the one above'])
def test_a_folder_of_another_user(tmp_path, monkeypatch, whose):
    "One warning, for the folder itself and for those above it in the cache"
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'cache'))
    root = tmp_path / 'cache' / 'features'
    root.mkdir(parents=True, mode=0o700)
    os.chown(root if whose == 'the folder' else root.parent, 12345, 12345)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        for n in (3, 5):
            fill(new(root), random_arrays(n), colours(), BS)
    assert len(warned) == 1
    assert 'belongs to another user' in str(warned[0].message)
    assert 'DR_TRANSFER_CACHE' in str(warned[0].message)


# ---------------------------------------------------------------- errors of the system


@pytest.mark.parametrize(
    'number, words',
    [
        (errno.EMFILE, 'ulimit -n'),
        (errno.ENOSPC, 'full'),
        (errno.EDQUOT, 'full'),
        (errno.EROFS, 'a writable disk'),
        (errno.EACCES, 'permissions'),
        (errno.ENOTDIR, 'in the place of a folder'),
        (errno.EIO, 'reports an error'),
    ],
)
@pytest.mark.parametrize('at', [0, 2])
def test_each_error_of_the_disk_has_its_advice(tmp_path, monkeypatch, number, words, at):
    def fail():
        raise OSError(number, os.strerror(number))

    opened, _n = opening(fail, at)
    monkeypatch.setattr(module, 'open_regular', opened)
    with pytest.raises(ValueError) as e:
        fill(new(tmp_path), random_arrays(3), colours(), BS)
    assert words in str(e.value)
    assert ('DR_TRANSFER_CACHE' in str(e.value)) == (number != errno.EMFILE)
    monkeypatch.undo()
    store = new(tmp_path)
    assert right(store, random_arrays(3), fill(store, random_arrays(3), colours(), BS))


@pytest.mark.parametrize(
    'error',
    [
        OSError(errno.EMFILE, 'Too many open files'),
        MemoryError(),
    ],
    ids=['files', 'memory'],
)
def test_errors_of_the_system_do_not_name_an_image(tmp_path, monkeypatch, error):
    def fail(*a, **k):
        raise error

    monkeypatch.setattr(content, 'read_bytes', fail)
    with pytest.raises(ValueError, match='not the cause') as e:
        content_key(tmp_path / 'a.png')
    assert 'remove or repair' not in str(e.value)


def test_few_files_are_open_at_the_same_time(tmp_path):
    "Forty stores, with a limit of a few files"
    code = (
        'import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))\n'
        + """
stores = [ArrayStore(sys.argv[1], f's{i}', {'of': i}, {f's{i}': ((3,), 'float32')}) for i in range(40)]
what = {f's{i}': WHAT['colour'] for i in range(40)}
fill_stores(stores, random_arrays(N), colours(what=what), BS)
"""
    )
    assert child(code, tmp_path).wait(60) == 0


def test_an_error_while_computing_keeps_what_was_done(tmp_path, complete):
    def broken(sources, names):
        yield next(colours()(sources, names))
        raise OSError('the disk is gone')

    with pytest.raises(OSError, match='the disk is gone'):
        fill(new(tmp_path), random_arrays(N), broken, BS)
    assert len(new(tmp_path)) == BS
    finished(tmp_path, complete, N - BS)


def test_arrays_of_another_shape_are_errors(tmp_path, complete):
    def broken(sources, names):
        for a in colours()(sources, names):
            yield {**a, 'corner': a['corner'][:, :1]}

    with pytest.raises(ValueError, match='corner has the shape'):
        fill(new(tmp_path), random_arrays(N), broken, BS)
    assert len(new(tmp_path)) == 0
    finished(tmp_path, complete, N)


# ---------------------------------------------------------------- at the same time

AT_ONCE = """
root, log, start, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
images = random_arrays(n, start)
print('ready', flush=True)
while not (root/'go').exists(): time.sleep(.002)
rows = fill(s := new(root), images, colours(log=log, pause=.02), BS)
assert right(s, images, rows)
"""


@pytest.mark.parametrize(
    'second',
    [
        (0, 20),
        (10, 20),
    ],
    ids=['the same', 'some the same'],
)
def test_two_processes(tmp_path, second):
    "The second waits, and nothing is computed twice"
    ps = [child(AT_ONCE, tmp_path, tmp_path / 'log', *a) for a in ((0, 20), second)]
    assert [p.stdout.readline() for p in ps] == ['ready\n'] * 2
    (tmp_path / 'go').touch()
    assert [p.wait(30) for p in ps] == [0, 0]
    computed = [line.split() for line in (tmp_path / 'log').read_text().splitlines()]
    total = max(20, sum(second))
    assert sorted(int(i) for _, i in computed) == list(range(total))  # each once
    turns = [p for i, (p, _) in enumerate(computed) if not i or computed[i - 1][0] != p]
    assert len(turns) == len(set(turns)) == (1 if total == 20 else 2)  # and not alternately
    store = new(tmp_path)
    assert len(store) == total
    assert right(store, random_arrays(total), fill(store, random_arrays(total), colours(stop=0), BS))


def test_the_second_continues_after_the_first_is_killed(tmp_path, complete):
    log = tmp_path / 'log'
    (tmp_path / 'go').touch()
    first = child(AT_ONCE.replace('.02', '.02 if number(images[0]) else 60'), tmp_path, log, 0, N)
    for _ in range(5000):
        if log.exists():
            break
        time.sleep(0.002)
    second = child(AT_ONCE, tmp_path, log, 0, N)
    assert second.stdout.readline() == 'ready\n'
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.3)  # it waits
    first.kill()
    assert second.wait(30) == 0
    assert first.wait() == -signal.SIGKILL
    assert contents(new(tmp_path)) == complete


def test_threads(tmp_path, complete):
    batches = []

    def one(_):
        return fill(new(tmp_path), random_arrays(N), colours(batches, pause=0.01), BS).tolist()

    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(one, range(4)))
    assert rows == [list(range(N))] * 4
    assert batches == list(range(N))
    assert contents(new(tmp_path)) == complete


# ---------------------------------------------------------------- several stores, filled in one pass

STAGES = {'a': (3,), 'b': (2, 2), 'c': (1,)}
DEEP = {'a': WHAT['colour'], 'b': WHAT['corner'], 'c': lambda s: s[:1, 0, 0] + np.float32(1000)}


def several(root, names='abc'):
    return [ArrayStore(root, n, {'of': n}, {n: (STAGES[n], 'float32')}) for n in names]


def fill_some(root, images, names='abc', **kw):
    "The computed (sources, names) of each call, after a check that each row is correct and stored once"
    batches = []
    requested = []
    stores = several(root, names)
    rows = fill_stores(stores, images, colours(batches, what=DEEP, requested=requested, **kw), BS)
    for s, n, r in zip(stores, names, rows):
        assert np.array_equal(stored_array(s, n)[r], np.stack([DEEP[n](i) for i in images]))
        assert (
            len((s.folder / 'images.jsonl').read_text().splitlines())
            == len(s)
            == (s.folder / f'{n}.bin').stat().st_size // s.row_bytes(n)
        )
    assert len(requested) <= 1
    return batches, ''.join(requested[0]) if requested else ''


@pytest.fixture(scope='module')
def filled(tmp_path_factory):
    "Three stores that were filled in one pass"
    root = tmp_path_factory.mktemp('filled')
    assert fill_some(root, random_arrays(N)) == (list(range(N)), 'abc')
    return [contents(s) for s in several(root)]


@pytest.mark.parametrize('names', ['b', 'ca', 'abc', ''])
def test_fewer_stores_are_read(tmp_path, names):
    fill_some(tmp_path, random_arrays(N))
    before = [{p: p.stat().st_mtime_ns for p in s.folder.iterdir()} for s in several(tmp_path)]
    assert fill_some(tmp_path, random_arrays(N)[::-1], names) == ([], '')
    assert [{p: p.stat().st_mtime_ns for p in s.folder.iterdir()} for s in several(tmp_path)] == before


@pytest.mark.parametrize('first', ['a', 'c', 'ba'])
def test_only_missing_stores_are_computed_in_one_pass(tmp_path, filled, first):
    fill_some(tmp_path, random_arrays(N), first)
    assert fill_some(tmp_path, random_arrays(N)) == (list(range(N)), ''.join(n for n in 'abc' if n not in first))
    assert [contents(s) for s in several(tmp_path)] == filled


@pytest.mark.parametrize(
    'have',
    [
        (N, 3, N),
        (N, 0, 4),
        (2, N, 5),
        (0, 6, 6),
        (1, 2, 3),
    ],
    ids=str,
)
def test_one_store_has_fewer_rows(tmp_path, filled, have):
    "One pass over the rows that any of them lacks; existing rows are not changed"
    for n, k in zip('abc', have):
        if k:
            fill_some(tmp_path, random_arrays(k), n)
    assert fill_some(tmp_path, random_arrays(N)) == (
        list(range(min(have), N)),
        ''.join(n for n, k in zip('abc', have) if k < N),
    )
    assert [contents(s) for s in several(tmp_path)] == filled
    assert fill_some(tmp_path, random_arrays(N)) == ([], '')


def test_each_store_lacks_other_rows(tmp_path):
    "Stores with different images in different orders"
    images = random_arrays(N)
    for n, k in zip('abc', ([5, 0, 3], [6, 3, 1], [3])):
        fill_some(tmp_path, [images[i] for i in k], n)
    assert fill_some(tmp_path, images) == ([0, 1, 2, 4, 5, 6], 'abc')
    assert [fill_some(tmp_path, images[::-1], n)[0] for n in 'abc'] == [[]] * 3


@pytest.mark.parametrize('at', range(0, 24, 5))
def test_some_interrupted_between_files(tmp_path, monkeypatch, filled, at):
    "Some stores have a batch that others do not have"
    opened, _n = opening(halt, at)
    with monkeypatch.context() as m:
        m.setattr(module, 'open_regular', opened)
        with pytest.raises(KeyboardInterrupt):
            fill_some(tmp_path, random_arrays(N))
    have = [len(s) for s in several(tmp_path)]
    assert max(have) - min(have) in (0, BS, N % BS)
    assert fill_some(tmp_path, random_arrays(N))[0] == list(range(min(have), N))
    assert [contents(s) for s in several(tmp_path)] == filled


ONE_EACH = """
root, log, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
locked = module._locked
@contextmanager
def slowly(folder):
    with locked(folder):
        time.sleep(.1)  # time for the other one to take its first
        yield
module._locked = slowly
print('ready', flush=True)
while not (root/'go').exists(): time.sleep(.002)
computed, requests = fill_some(root, random_arrays(N), names, log=log)
print(len(computed), requests, flush=True)
"""


@pytest.mark.parametrize(
    'names',
    [
        ('ab', 'ba'),
        ('abc', 'cb'),
    ],
    ids=' '.join,
)
def test_two_processes_with_stores_in_common(tmp_path, filled, names):
    "In any order there is no deadlock; what both processes need is computed by one"
    ps = [child(ONE_EACH, tmp_path, tmp_path / 'log', n) for n in names]
    try:
        assert [p.stdout.readline() for p in ps] == ['ready\n'] * 2
        (tmp_path / 'go').touch()
        assert [p.wait(20) for p in ps] == [0, 0]
    finally:
        for p in ps:
            p.kill()
    done = [p.stdout.read().split() for p in ps]
    requested = ''.join(d[1] for d in done if d[1:])
    assert sorted(requested) == sorted(set(''.join(names)))
    for d in done:
        if d[1:]:
            assert d[0] == str(N)
    for s, was in zip(several(tmp_path), filled):
        assert len(s) == 0 or contents(s) == was


def test_the_required_space_is_that_of_all_stores(tmp_path, monkeypatch):
    "12 + 16 + 4 bytes per image, in the stores that lack it"
    free = [250]
    monkeypatch.setattr(shutil, 'disk_usage', lambda place: shutil._ntuple_diskusage(10**9, 10**9 - free[0], free[0]))
    with pytest.raises(ValueError, match='10 images'):
        fill_some(tmp_path, random_arrays(10))  # though there is enough space for each one
    fill_some(tmp_path, random_arrays(7))
    fill_some(tmp_path, random_arrays(10), 'ac')
    free[0] = 60
    fill_some(tmp_path, random_arrays(10))  # 48 for three images in one store


# ---------------------------------------------------------------- folders that cannot be used


@contextmanager
def without_root():
    "Without the permissions of root, for whom nothing is read-only"
    if not hasattr(os, 'setresuid'):
        pytest.skip('no users here')
    was = os.getuid()
    if not was:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if not was:
            os.setresuid(0, 0, 0)


@pytest.fixture
def locked():
    "A folder that can be read but not written"
    folder = Path(tempfile.mkdtemp())
    yield folder
    for p in (folder, *folder.rglob('*')):
        p.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written(locked):
    locked.chmod(0o555)
    for place in (locked, locked / 'deeper' / 'still'):
        with without_root(), pytest.raises(ValueError, match='nothing can be written') as e:
            fill(new(place), random_arrays(N), colours(), BS)
        assert str(locked) in str(e.value)
        assert not list(locked.iterdir())


def test_stored_rows_can_be_read_from_a_read_only_folder(locked):
    fill(new(locked), random_arrays(3), colours(), BS)
    for p in (locked, *locked.rglob('*')):
        p.chmod(0o555 if p.is_dir() else 0o444)
    with without_root():
        store = new(locked)
        assert right(store, random_arrays(3), fill(store, random_arrays(3), colours(stop=0), BS))
        with pytest.raises(ValueError, match='nothing can be written'):
            fill(store, random_arrays(4), colours(), BS)


def test_a_store_that_cannot_be_written(locked):
    fill(new(locked), random_arrays(3), colours(), BS)
    for p in locked.rglob('*'):
        p.chmod(0o555 if p.is_dir() else 0o444)
    locked.chmod(0o777)
    with without_root(), pytest.raises(ValueError, match='nothing can be written'):
        fill(new(locked), random_arrays(4), colours(), BS)


def test_a_file_where_the_folder_should_be(tmp_path):
    file = tmp_path / 'file'
    file.touch()
    with pytest.raises(ValueError, match='nothing can be written'):
        fill(new(file), random_arrays(3), colours(), BS)
    with pytest.raises(ValueError, match='nothing can be written'):
        fill(new(file / 'x'), random_arrays(3), colours(), BS)


def test_a_folder_of_any_name_may_be_next_to_it(tmp_path):
    folder = tmp_path / 'new'
    notes = folder / 'notes.txt'
    folder.mkdir()
    notes.write_text('mine')
    store = new(tmp_path)
    images = random_arrays(3)
    rows = fill(store, images, colours(), BS)
    assert right(store, images, rows)
    assert [p.name for p in folder.iterdir()] == ['notes.txt']
    assert notes.read_text() == 'mine'


def test_not_enough_disk_space(tmp_path, monkeypatch, complete):
    "16 bytes per image, checked before anything is computed; stored rows need no space"
    free = [N * 16]
    requested = []
    batches = []

    def usage(place):
        requested.append(Path(place))
        return shutil._ntuple_diskusage(10**9, 10**9 - free[0], free[0])

    monkeypatch.setattr(shutil, 'disk_usage', usage)
    with pytest.raises(ValueError) as e:
        fill(new(tmp_path), random_arrays(N), colours(batches), BS)
    text = str(e.value)
    assert '7 images' in text
    assert 'GB' in text
    assert 'DR_TRANSFER_CACHE' in text
    assert str(tmp_path) in text
    assert not batches
    for p in requested:
        assert p.exists()
        assert tmp_path in (p, *p.parents)
    twice = random_arrays(3) * 4
    fill(new(tmp_path), twice, colours(batches), BS)  # twelve images, of which three are computed
    free[0] = 80
    fill(new(tmp_path), random_arrays(3), colours(stop=0), BS)
    fill(new(tmp_path), random_arrays(4), colours(batches), BS)
    free[0] = 50
    with pytest.raises(ValueError, match='3 images'):
        fill(new(tmp_path), random_arrays(N), colours(batches), BS)
    free[0] = 10**6
    finished(tmp_path, complete)
    assert batches == [0, 1, 2, 3]


# ---------------------------------------------------------------- names

NAMES = [
    'con.png',
    'a:b?*.png',
    'a\\b.png',
    ' space .png ',
    '-rf',
    'é ü 眼.png',
    'quote\'".png',
    'line\nbreak.png',
    'tab\t.png',
    '.hidden',
    'percent%20.png',
    b'\xff\xfe.png',
]


def test_names(tmp_path):
    "Only the content counts, and each name is stored so that it can be read again"
    (tmp_path / 'x').mkdir()
    paths = []
    kept = []
    for i, n in enumerate(NAMES):
        p = os.fsdecode(os.path.join(os.fsencode(tmp_path / 'x'), n if isinstance(n, bytes) else os.fsencode(n)))
        try:
            Path(p).write_bytes(bytes([i]))
        except OSError:
            continue  # not a name on this system
        paths.append(p if i % 2 else Path(p))
        kept.append(i)
    assert len(paths) > 3

    def compute(sources, names):
        for s in sources:
            yield {'colour': np.full((1, 3), image_data(s)[0]), 'corner': np.zeros((1, 2, 2))}

    rows = fill(new(tmp_path), paths, compute, 1)
    assert stored_array(new(tmp_path), 'colour')[rows][:, 0].tolist() == kept
    lines = (new(tmp_path).folder / 'images.jsonl').read_bytes().decode('ascii').split('\n')
    assert [json.loads(line)['name'] for line in lines[:-1]] == [os.path.basename(p) for p in paths]
    assert lines[-1] == ''
    assert fill(new(tmp_path), paths[::-1], colours(stop=0), 1).tolist() == rows[::-1].tolist()
