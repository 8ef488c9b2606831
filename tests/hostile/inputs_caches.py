"Caches that are damaged, foreign or read-only: the result equals that with an empty cache, or there is an error."

import json
import os
import shutil

from contract import read_rows
from damage import (
    a_line_twice,
    as_device,
    as_fifo,
    as_folder,
    as_loop,
    cut,
    cut_by_a_byte,
    emptied,
    first_line_gone,
    last_line_gone,
    lines_swapped,
    longer,
    named,
    nan,
    no_json,
    not_text,
    one_byte,
    other_json,
    removed,
    reversed_rows,
    zeroed,
)
from inputs import PLAIN, SMALL, NotHere, case
from observe import Command, table_beside


def train(at, cache=None, **more):
    "The training that made the shared run and the shared cache; it must give the same result."
    out = at.root / 'out'
    cache = at.cache if cache is None else cache
    return Command(
        ['train', at.flowers, *SMALL, *PLAIN, '--out', out],
        [out, at.cache],
        data=at.flowers,
        images=18,
        also=same(at),
        environment={'DR_TRANSFER_CACHE': str(cache)},
        named=('cache', 'DR_TRANSFER_CACHE', 'ulimit -n'),
        **more,
    )


def same(at):
    "Check that a run equals the shared one."

    def complaints(outcome):
        if outcome.code:
            return
        out = at.root / 'out'
        for name in ('model/model.safetensors', 'predictions.csv', 'model/model.json'):
            if (out / name).read_bytes() != (at.shared / 'flower_run' / name).read_bytes():
                yield f'{name} is not what an empty cache gives'

    return complaints


def copied(at):
    "A copy of the shared cache, with the folder of its one store."
    shutil.copytree(at.shared / 'cache', at.cache)
    stores = sorted(p.parent for p in at.cache.rglob('images.jsonl'))
    assert stores, 'the training did not use the cache'
    return stores


@case('caches')
def empty(at):
    "No cache: the result must be the shared run, or the following cases are meaningless."
    return train(at)


@case('caches')
def full(at):
    "The unchanged cache."
    copied(at)
    return train(at)


def every(store, suffix):
    "The files of a store with a suffix."
    return sorted(p for p in store.iterdir() if p.suffix == suffix)


BINS = (
    zeroed,
    cut,
    cut_by_a_byte,
    emptied,
    removed,
    one_byte,
    nan,
    longer,
    reversed_rows,
    as_folder,
    as_fifo,
    as_device,
    as_loop,
)
LINES = (
    zeroed,
    cut,
    cut_by_a_byte,
    emptied,
    removed,
    first_line_gone,
    last_line_gone,
    lines_swapped,
    a_line_twice,
    no_json,
    other_json,
    not_text,
    as_folder,
    as_fifo,
    as_device,
    as_loop,
)
ABOUTS = (zeroed, cut, emptied, removed, other_json, not_text, as_folder, as_fifo, as_loop)


@case('caches', named(BINS))
def numbers(at, change):
    "The values in a store were changed."
    for store in copied(at):
        for path in every(store, '.bin'):
            change(path)
    return train(at)


@case('caches', named(LINES))
def index(at, change):
    "The index of a store was changed."
    for store in copied(at):
        change(store / 'images.jsonl')
    return train(at)


@case('caches', named(ABOUTS))
def description(at, change):
    "The description of a store was changed."
    for store in copied(at):
        change(store / 'about.json')
    return train(at)


@case('caches')
def another_store_in_its_place(at):
    "The values of one store under the name of another."
    stores = copied(at)
    for store in stores:
        lines = (store / 'images.jsonl').read_text().splitlines(True)
        keys = [json.loads(line) for line in lines]
        moved = [{**k, 'key': keys[(i + 1) % len(keys)]['key']} for i, k in enumerate(keys)]
        (store / 'images.jsonl').write_text(''.join(json.dumps(m) + '\n' for m in moved))
    return train(at)


@case('caches', {k: k for k in ('bin', 'index', 'lock', 'folder', 'about')})
def links_to_the_user(at, what):
    "Files of the cache are links to files of the user: those are not changed."
    mine = at.home / 'mine'
    mine.write_text('precious\n' * 1000)
    store = copied(at)[0]
    path = {
        'bin': every(store, '.bin')[0],
        'index': store / 'images.jsonl',
        'lock': store / 'lock',
        'about': store / 'about.json',
    }.get(what)
    if what == 'folder':
        shutil.rmtree(store)
        (at.home / 'folder').mkdir()
        (at.home / 'folder' / 'images.jsonl').write_text('precious\n')
        store.symlink_to(at.home / 'folder')
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(mine)
    return train(at)


@case(
    'caches',
    {
        k: k
        for k in (
            'file',
            'link',
            'loop',
            'dangling',
            'fifo',
            'device',
            'proc',
            'read only',
            'full disk',
            'newline',
            'relative',
            'not text',
            'long',
        )
    },
)
def place(at, what):
    "DR_TRANSFER_CACHE names something that is not a folder, or one that cannot be written to."
    cache = at.cache
    if what == 'file':
        cache.write_text('precious')
    if what == 'link':
        (at.root / 'real').mkdir()
        cache.symlink_to(at.root / 'real')
    if what in ('loop', 'dangling'):
        cache.symlink_to('cache' if what == 'loop' else 'nowhere')
    if what == 'fifo':
        os.mkfifo(cache)
    if what == 'read only':
        cache.mkdir(mode=0o500)
    given = {
        'device': '/dev/full',
        'proc': '/proc/x',
        'full disk': '/sys/x',
        'newline': f'{cache}\nx',
        'relative': 'my cache',
        'long': f'{cache}/' + 'x' * 300,
        'not text': os.fsdecode(os.fsencode(cache) + b'\xff'),
    }.get(what, cache)
    command = train(at, given)
    command.outs += [at.root / 'real', at.root / 'cache\nx', at.work / 'my cache', at.root / 'nowhere', given]
    command.named += ('real', 'proc', 'sys', '/dev/full')
    return command


SPEEDS = {
    'no json': b'{',
    'list': b'[]',
    'number': b'7',
    'not text': b'\xff\xfe',
    'values': b'{"a": []}',
    'deep': b'[' * 100_000,
    'nul': bytes(99),
    'folder': None,
}


@case('caches', {'of another user': 0o755, 'open to everybody': 0o777})
def not_private(at, mode):
    "The folder of the cache can be changed by others: used, with a warning."
    if os.geteuid():
        raise NotHere('only root can give a folder to another user')
    at.cache.mkdir()
    at.cache.chmod(mode)
    if mode == 0o755:
        os.chown(at.cache, 12345, 12345)
    command = train(at)
    check_warning = command.also

    def complaints(outcome):
        yield from check_warning(outcome)
        if f'warning: the cache folder {at.cache} ' not in outcome.err:
            yield 'no warning that others can change the cache'

    command.also = complaints
    return command


@case('caches', {f'{verb} {n}': (verb, n) for n in (40, 14) for verb in ('train', 'predict', 'preprocess', 'evaluate')})
def few_open_files(at, what):
    "A process that may open few files: the usual result, or an error that says what to do."
    verb, files = what
    at.copy_fundus()
    more = {'files': files, 'named': ('ulimit -n',)}
    if verb == 'train':
        return train(at, files=files)
    if verb == 'predict':
        return at.predict(model='fundus_run', **more)
    return at.evaluate(**more) if verb == 'evaluate' else at.preprocess(**more)


@case('caches', SPEEDS)
def speed(at, data):
    "speed.json is damaged."
    at.cache.mkdir()
    if data is None:
        (at.cache / 'speed.json').mkdir()
    else:
        (at.cache / 'speed.json').write_bytes(data)
    command = at.predict(at.flower, images=[at.flower], also=good(at))
    command.words = [w for w in command.words if w not in PLAIN] + ['--runtime', 'auto']
    return command


def good(at):
    "Check that the good image has its prediction."

    def complaints(outcome):
        want = read_rows((at.shared / 'good.csv').read_text().splitlines())[0]
        if not outcome.code and abs(float(outcome.rows[0]['p_daisy']) - float(want['p_daisy'])) > 0.02:
            yield f'predicted as {outcome.rows[0]["p_daisy"]}, not {want["p_daisy"]}'

    return complaints


# ---------------------------------------------------------------- stored trainings


def compare(at, runner_words=()):
    "A comparison that stores its trainings."
    out = at.root / 'out.png'
    return Command(
        [
            'compare',
            at.flowers,
            '--archs',
            'small_cnn',
            '--plans',
            'head',
            '--epochs',
            '1',
            '--weights',
            'random',
            '--size',
            '48',
            '--resamples',
            '100',
            *PLAIN,
            '--out',
            out,
        ],
        [out, table_beside(out)],
        named=('cache', 'trainings', 'DR_TRANSFER_CACHE'),
    )


@case(
    'caches',
    named(
        (
            zeroed,
            cut,
            emptied,
            removed,
            no_json,
            not_text,
            as_folder,
            as_fifo,
            as_device,
            as_loop,
            one_byte,
            lines_swapped,
        )
    ),
)
def kept_training(at, change):
    "A stored training is damaged: the comparison gives the same result."
    shutil.copytree(at.shared / 'compared cache', at.cache)
    files = sorted(p for p in (at.cache / 'trainings').rglob('*') if p.is_file() and p.suffix == '.csv')
    assert files, 'no training was stored'
    for path in files:
        change(path)
    command = compare(at)
    want = table_beside(at.shared / 'compared.png').read_bytes()
    command.also = lambda o: (
        []
        if o.code or table_beside(at.root / 'out.png').read_bytes() == want
        else ['another result than with an empty cache']
    )
    return command
