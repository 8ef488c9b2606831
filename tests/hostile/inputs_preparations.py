"Prepared folders: input and output in one folder, and results of an earlier run that were damaged."

import json
import os
import shutil

from contract import must_fail
from inputs import case
from PIL import Image


def prepared(at) -> list:
    "A finished preparation of the synthetic fundus images, as another run left it."
    at.copy_fundus()
    shutil.copytree(at.shared / 'prepared', at.root / 'out')
    for path in at.data.rglob('*.jpg'):  # a copy has the times of the originals, which the journal knows
        times = (at.fundus / path.relative_to(at.data)).stat()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return sorted((at.root / 'out').rglob('*.png'))


def same(at):
    "Check that the results are those of an undisturbed run."

    def complaints(outcome):
        if outcome.code:
            return
        for path in sorted((at.shared / 'prepared').rglob('*.png')):
            other = at.root / 'out' / path.relative_to(at.shared / 'prepared')
            if not other.is_file() or other.read_bytes() != path.read_bytes():
                yield f'{other.name} is not what an undisturbed run gives'

    return complaints


def again(at, **more):
    "The same preparation again, over existing results."
    return at.preprocess(also=same(at), named=('out', 'journal.jsonl', 'preparation.json', 'images.csv'), **more)


@case('preparations')
def finished(at):
    "Nothing was damaged."
    prepared(at)
    return again(at)


RESULTS = {'empty': b'', 'cut': None, 'html': b'<html>', 'one byte': b'\x89'}


@case('preparations', RESULTS)
def result_damaged(at, data):
    "A finished image was damaged: it is made again."
    path = prepared(at)[3]
    path.write_bytes(path.read_bytes()[:500] if data is None else data)
    return again(at)


@case('preparations', {k: k for k in ('folder', 'fifo', 'dangling', 'to the user', 'removed', 'other size')})
def result_replaced(at, what):
    "A finished image is something else now."
    path = prepared(at)[3]
    path.unlink()
    if what == 'folder':
        path.mkdir()
    if what == 'fifo':
        os.mkfifo(path)
    if what == 'dangling':
        path.symlink_to('nowhere')
    if what == 'to the user':
        (at.home / 'mine.png').write_bytes(b'precious')
        path.symlink_to(at.home / 'mine.png')
    if what == 'other size':
        Image.new('RGB', (9, 9)).save(path)
    return again(at)


JSONS = {
    'empty': b'',
    'not json': b'{',
    'list': b'[]',
    'number': b'7\n',
    'null': b'null\n',
    'not text': b'\xff\xfe\n',
    'nul': bytes(50),
    'other keys': b'{"a": 1}\n',
    'deep': b'[' * 100_000 + b'\n',
    'lines': b'{}\n{}\n',
}


@case(
    'preparations',
    {f'{f} {k}': (f, v) for f in ('journal.jsonl', 'preparation.json', 'images.csv') for k, v in JSONS.items()},
)
def notes_damaged(at, how):
    "The journal of an earlier run was damaged."
    name, data = how
    prepared(at)
    (at.root / 'out' / name).write_bytes(data)
    return again(at)


@case(
    'preparations',
    {
        f'{f} {k}': (f, k)
        for f in ('journal.jsonl', 'preparation.json', 'images.csv')
        for k in ('folder', 'fifo', 'link', 'removed', 'cut')
    },
)
def notes_replaced(at, how):
    "The journal of an earlier run was replaced by something else."
    name, what = how
    prepared(at)
    path = at.root / 'out' / name
    data = path.read_bytes()
    path.unlink()
    if what == 'folder':
        path.mkdir()
    if what == 'fifo':
        os.mkfifo(path)
    if what == 'link':
        (at.home / 'mine').write_bytes(data)
        path.symlink_to(at.home / 'mine')
    if what == 'cut':
        path.write_bytes(data[: len(data) // 2])
    return again(at)


@case('preparations', {'another image': 'other', 'error': 'error', 'path': 'path', 'stamp': 'stamp'})
def journal_lies(at, what):
    "The journal is valid JSON with wrong contents."
    prepared(at)
    path = at.root / 'out' / 'journal.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.update(
            {
                'other': {'file': rows[0].get('file')},
                'error': {'error': ''},
                'path': {'file': '../../home/x.png'},
                'stamp': {'stamp': 7},
            }[what]
        )
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return again(at)


# ---------------------------------------------------------------- originals and results


@case('preparations', {k: k for k in ('link', 'dots', 'relative', 'slash', 'link of the parent', 'capitals')})
def one_place(at, how):
    "OUT is IN by another spelling."
    at.copy_fundus()
    out = {
        'link': at.root / 'again',
        'dots': f'{at.work}/../data',
        'relative': '../data',
        'slash': f'{at.data}//',
        'link of the parent': at.root / 'parent' / 'data',
        'capitals': at.root / 'DATA',
    }[how]
    if how == 'link':
        out.symlink_to(at.data)
    if how == 'link of the parent':
        (at.root / 'parent').symlink_to(at.root)
    made = at.preprocess(out=out, named=('data',))
    made.outs, made.also = ([out], None) if how == 'capitals' else ([], must_fail)
    return made


@case('preparations', {k: k for k in ('out in it', 'out in it by link', 'it in out', 'out is its images')})
def inside(at, how):
    "OUT lies in IN, or IN in OUT."
    at.copy_fundus()
    (at.root / 'again').symlink_to(at.data)
    out = {
        'out in it': at.data / 'out',
        'out in it by link': at.root / 'again' / 'out',
        'it in out': at.root,
        'out is its images': at.data / 'images',
    }[how]
    made = at.preprocess(out=out, named=('data',))
    made.outs = []
    made.also = must_fail
    return made


@case('preparations', {k: k for k in ('empty', 'cut', 'fifo', 'dangling', 'loop', 'folder', 'device', 'text')})
def original_damaged(at, what):
    "One original is damaged: the others are prepared."
    at.copy_fundus()
    path = sorted(at.data.rglob('*.jpg'))[2]
    data = path.read_bytes()
    path.unlink()
    if what in ('empty', 'cut', 'text'):
        path.write_bytes({'empty': b'', 'cut': data[: len(data) // 2], 'text': b'<html>'}[what])
    elif what == 'fifo':
        os.mkfifo(path)
    elif what == 'folder':
        path.mkdir()
    else:
        path.symlink_to({'loop': path.name, 'device': '/dev/zero'}.get(what, 'nowhere'))
    return at.preprocess()


@case('preparations', {k: k for k in ('changed', 'removed', 'added', 'renamed')})
def originals_changed(at, what):
    "The originals changed since an earlier run."
    prepared(at)
    first, second, *_ = sorted(at.data.rglob('*.jpg'))
    if what == 'changed':
        shutil.copy(second, first)
    if what == 'removed':
        first.unlink()
    if what == 'added':
        shutil.copy(first, first.with_name('more.jpg'))
    if what == 'renamed':
        first.rename(first.with_name('renamed.jpg'))
    return at.preprocess(named=('out', 'labels.csv'))


@case(
    'preparations',
    {
        'suffixes': ('a.jpg', 'a.png'),
        'capitals': ('a.jpg', 'A.jpg'),
        'composed': ('ä.jpg', 'a\u0308.jpg'),
        'ours': ('images.jpg', 'labels.jpg'),
    },
)
def two_of_one_name(at, names):
    "Two originals whose results would have one name, or names of the library's."
    images = sorted((at.fundus / 'images').iterdir())
    for name, image in zip(names, images):
        with Image.open(image) as im:
            im.save(at.data / name)
    return at.preprocess(named=names)


@case(
    'preparations',
    {
        'size 0': ('--size', '0'),
        'size': ('--size', '1000000000'),
        'workers': ('--workers', '0'),
        'negative workers': ('--workers', '-3'),
        'many workers': ('--workers', '100000'),
        'format': ('--format', 'exe'),
        'correction': ('--correction', 'nope'),
        'path as format': ('--format', '../x'),
    },
)
def words(at, words):
    "An option that cannot be used."
    at.copy_fundus()
    return at.preprocess(*words, named=(words[0].strip('-'), words[1]))
