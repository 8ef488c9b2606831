"Output names that exist, belong to the user, or are invalid."

import os
import shutil

from contract import must_fail
from inputs import ALL_CASES, PLAIN, case
from observe import Command, table_beside

COMMANDS = ('train', 'predict', 'evaluate', 'preprocess', *(('export',) if ALL_CASES else ()))  # an export takes long
SUFFIX = {'predict': '.csv', 'evaluate': '.html', 'export': '.onnx'}


def of(at, command, out, *words, allowed=False):
    "A small command that writes to `out`; nothing may change there unless it is allowed."
    made = {
        'train': lambda: at.train(data=at.flowers, images=18),
        'predict': lambda: at.predict(at.flower, images=[at.flower]),
        'evaluate': lambda: evaluated(at),
        'preprocess': lambda: at.preprocess(source=at.fundus),
        'export': lambda: exported(at),
    }[command]()
    made.words = [out if w == made.outs[0] else w for w in made.words] + list(words)
    made.outs = [out, table_beside(out)] if allowed else []
    made.data = made.data if allowed else None
    made.images = made.images if allowed else None
    made.named = (os.path.basename(str(out)) or 'out', 'out')
    return made


def exported(at):
    "An export of the trained run."
    out = at.root / 'out.onnx'
    return Command(['export', at.shared / 'flower_run', *PLAIN, '--out', out], [out])


def evaluated(at):
    "An evaluation on the shared fundus images."
    out = at.root / 'out.html'
    return Command(
        ['evaluate', at.shared / 'fundus_run', at.fundus, '--allow-leaks', '--resamples', '100', '--out', out, *PLAIN],
        [out, table_beside(out)],
    )


def each(*names):
    "Each command with each of some names."
    return {f'{c} {n}': (c, n) for c in COMMANDS for n in names}


BAD = {
    'empty': '',
    'root': '/',
    'proc': '/proc/x',
    'full': '/dev/full',
    'null': '/dev/null',
    'zero': '/dev/zero/x',
    'sys': '/sys/x',
    'long': 'x' * 300,
    'deep': 'x/' * 2500,
    'dot': '.',
    'above': '..',
    'newline of path': 'nowhere\n/x',
}


@case('outs', each(*BAD))
def bad_place(at, which):
    "--out that is not a valid name of a file or folder."
    command, name = which
    made = of(at, command, at.root / 'out')
    path = BAD[name] + (SUFFIX.get(command, '') if name in ('proc', 'sys', 'long') else '')
    made.words = [path if w == at.root / 'out' else w for w in made.words]
    made.outs = {'newline of path': [at.work / path, at.work / 'nowhere\n'], 'dot': [at.work]}.get(name, [])
    made.named += (path, 'out', 'OUT', '--out')
    return made


@case(
    'outs',
    each('file', 'file overwritten', 'folder', 'folder overwritten', 'run', 'run overwritten', 'home overwritten'),
)
def taken(at, which):
    "--out is a file or folder of the user. With --overwrite a file may be replaced, but never a folder."
    command, name = which
    out = at.root / f'mine{SUFFIX.get(command, "")}'
    if name.startswith('file'):
        out.write_text('precious')
    if name.startswith('folder'):
        out.mkdir()
        (out / 'thesis.txt').write_text('precious')
    if name.startswith('run'):
        make_lookalike(out)
    if name.startswith('home'):
        out = at.home
        (out / 'thesis.txt').write_text('precious')
    replaceable = name == 'file overwritten' and command in SUFFIX
    made = of(at, command, out, *(['--overwrite'] if 'overwritten' in name else []), allowed=replaceable)
    made.also = None if replaceable else must_fail
    return made


def make_lookalike(out):
    "A folder of the user with the names of a run, and a thesis in it."
    (out / 'model').mkdir(parents=True)
    (out / 'model' / 'thesis.txt').write_text('precious')
    for name in ('record.json', 'predictions.csv', 'images.csv', 'preparation.json', 'journal.jsonl', 'labels.csv'):
        (out / name).write_text('{"precious": 1}')


@case('outs', {c: c for c in COMMANDS})
def ours_with_a_file_of_the_user(at, command):
    "A real run, or a model, with one more file in it: the file stays."
    out = at.root / f'mine{SUFFIX.get(command, "")}'
    shutil.copytree(at.shared / 'flower_run', out)
    (out / 'model' / 'notes of mine.txt').write_text('precious')
    made = of(at, command, out, '--overwrite')
    made.also = must_fail
    return made


@case('outs', each('to file', 'to folder', 'dangling', 'loop', 'to data'))
def link(at, which):
    "--out is a link."
    command, name = which
    out = at.root / f'link{SUFFIX.get(command, "")}'
    target = at.root / 'target'
    if name == 'to file':
        target.write_text('precious')
    if name == 'to folder':
        target.mkdir()
        (target / 'thesis.txt').write_text('precious')
    at.copy_fundus()
    out.symlink_to({'loop': out.name, 'to data': at.data}.get(name, target))
    made = of(at, command, out, '--overwrite')
    if name == 'dangling' or (name == 'to file' and command in SUFFIX):
        made.outs = [out, table_beside(out), target]
    made.also = None if name in ('dangling', 'to file') else must_fail
    return made


@case(
    'outs',
    {
        f'{c} {n}': (c, n)
        for c in ('train', 'evaluate', 'preprocess', 'predict')
        for n in ('inside', 'inside by link', 'same', 'same by link', 'above')
    },
)
def near_the_data(at, which):
    "--out lies in the data, is the data, or holds the data; by name, or by a link."
    command, name = which
    (at.copy_flowers if command == 'train' else at.copy_fundus)()
    linked = at.root / 'by link'
    linked.symlink_to(at.data)
    end = SUFFIX.get(command, '')
    base = linked if 'link' in name else at.data
    out = base / f'out{end}' if 'inside' in name else base if 'same' in name else at.root
    make = {'train': at.train, 'evaluate': at.evaluate, 'preprocess': at.preprocess, 'predict': at.predict}[command]
    made = make(named=('out', 'data'))
    made.words = [out if w == made.outs[0] else w for w in made.words] + (
        ['--overwrite'] if 'inside' not in name else []
    )
    made.outs = []
    made.also = must_fail
    return made


@case('outs', {c: c for c in COMMANDS})
def name_that_is_no_text(at, command):
    "--out with bytes that are not text: a valid name on Linux."
    out = at.root / (os.fsdecode(b'\xff\xfe') + SUFFIX.get(command, ''))
    return of(at, command, out, allowed=True)


@case('outs', {c: c for c in COMMANDS})
def folder_that_is_not_there(at, command):
    "--out in a folder that does not exist; it is created and may remain."
    out = at.root / 'new' / 'folders' / f'out{SUFFIX.get(command, "")}'
    made = of(at, command, out, allowed=True)
    made.outs.append(at.root / 'new')
    return made


@case('outs', {'csv': 'out.csv', 'png': 'out.png', 'none': 'out', 'upper': 'out.HTML', 'hidden': '.html'})
def suffix_of_a_report(at, name):
    "A report with the suffix of its table, or of another kind of file."
    out = at.root / name
    made = of(at, 'evaluate', out, allowed=True)
    return made


@case('outs')
def table_beside_a_report_is_taken(at):
    "The name of the report is free, but not that of its table."
    table_beside(at.root / 'out.html').write_text('precious')
    made = of(at, 'evaluate', at.root / 'out.html')
    made.also = must_fail
    return made


@case('outs', {c: c for c in COMMANDS if c != 'preprocess'})
def model_is_the_place(at, command):
    "--out --overwrite names the model that is used, or the data that are trained on."
    run = shutil.copytree(at.shared / 'flower_run', at.root / 'run')
    if command == 'train':
        at.copy_flowers()
        made = at.train('--overwrite')
        made.words = [at.data if w == made.outs[0] else w for w in made.words]
    else:
        made = of(at, command, run, '--overwrite')
        made.words[1] = run
    made.outs = []
    made.also = must_fail
    made.named = ('run', 'data', 'out')
    return made
