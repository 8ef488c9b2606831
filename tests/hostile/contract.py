"""What every command promises, whatever it is given, and how that is checked from outside.

Within a limit of time and memory a command ends in one of two ways:

* exit code 0, and every image is accounted for: predicted, or in a row with the reason in `error`, or listed as skipped;
* another exit code, and the last line on standard error is the only one that starts with `dr_transfer: error:` (or
  `dr_transfer COMMAND: error:`, for words that the parser does not take). It names what was given.

There is never a traceback. No program is started and no connection opened. Outside of `--out` and the cache no file is
created, changed or deleted; after an error `--out` is as it was.
"""
import csv
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

CPU = 20                # seconds of processor time
IDLE = 10               # seconds without any: a command that waits for ever
WALL = 300              # seconds in all
MEMORY = 1_500_000_000  # bytes beyond those of the imported library
STOP = 6_000_000_000    # bytes of address space beyond those of the imported library: where the system says no
ERROR = re.compile(r'dr_transfer( [a-z-]+)?: error: \S')
FORBIDDEN = ('Traceback (most recent call last)', 'Traceback of the server', 'Exception ignored', 'Segmentation fault')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp', '.gif', '.ppm', '.dcm', '.dicom')
FORMULA = "=+-@\t\r"    # how a cell starts that a spreadsheet would compute: written with a quote before it


@dataclass
class Command:
    "A command, and what it may do."
    words: list                                     # of `dr_transfer`, or arguments of `call`
    outs: list = field(default_factory=list)        # paths that it may create or replace
    data: Path | None = None                        # folder whose images must be accounted for
    images: list | int | None = None                # those images, or how many, if not all below `data`
    named: tuple = ()                               # an error must contain one of these, or a path or option of `words`
    call: str = ''                                  # a function in calls.py instead of the command
    environment: dict = field(default_factory=dict)
    stdout: str | None = 'file'                     # 'file', 'broken pipe', a device, or None: closed
    encoding: str = 'utf-8'                         # of standard output and error
    silent: bool = False                            # may it fail without a word? (a reader that has gone away)
    keeps: bool = False                             # does it keep what is finished when it fails?
    also: Callable | None = None                    # own assertion: takes the Outcome, returns complaints


@dataclass
class Outcome:
    "How a command ended."
    command: Command
    code: int
    out: str
    err: str
    seconds: float
    cpu: float
    peak: int
    stopped: bool
    events: list
    before: dict
    after: dict
    rows: list | None = None    # of the table that it wrote

    @property
    def error(self) -> str:
        "The error line, or ''."
        lines = self.err.splitlines()
        return lines[-1] if lines and ERROR.match(lines[-1]) else ''

    @property
    def kind(self) -> str:
        "In one word."
        return 'completed' if self.code == 0 else 'error' if self.error else 'failed'


# ---------------------------------------------------------------- what is on disk

def content(path, info):
    "What a file holds: a digest, or where a link points."
    if stat.S_ISLNK(info.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(info.st_mode):
        return ''
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def snapshot(folder, digests=True) -> dict:
    "Each path below a folder -> type, permissions, and of a file size, time and content; times of folders are not kept."
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            info = os.lstat(path)
            of_file = (info.st_size, info.st_mtime_ns) if stat.S_ISREG(info.st_mode) else ()
            found[path] = (info.st_mode, *of_file, content(path, info) if digests else '')
    return found


def below(path, places) -> bool:
    "Is a path one of some places, or inside one?"
    return any(path == p or path.startswith(p + os.sep) for p in map(os.fspath, places))


def differences(before, after, allowed) -> list:
    "What was created, changed or deleted outside the allowed places."
    verbs = [(p, 'deleted' if p not in after else 'created' if p not in before else 'changed')
             for p in sorted({*before, *after}) if before.get(p) != after.get(p) and not below(p, allowed)]
    return [f'{verb}: {path!r}' for path, verb in verbs]


# ---------------------------------------------------------------- the process that runs the commands

class Runner:
    "Runs commands, each in a fork of a process that has the library imported."
    def __init__(self):
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'MPLBACKEND': 'Agg'}
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name('server.py')], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=environment, text=True, encoding='ascii')
        self.ready = False

    def ask(self, job) -> dict:
        "The reply to a job."
        if not self.ready:
            assert self.process.stdout.readline(), 'the server did not start'
            self.ready = True
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        "End the process."
        self.process.stdin.close()
        self.process.wait()


def job_of(command, at, wall, cpu) -> dict:
    "A command at a place, as the server takes it."
    path = f"{at.root/'programs'}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {'HOME': str(at.home), 'TMPDIR': str(at.tmp), 'DR_TRANSFER_CACHE': str(at.cache), 'PATH': path,
                   'XDG_CACHE_HOME': str(at.home/'.cache'), **command.environment}
    stdout = str(at.logs/'stdout') if command.stdout == 'file' else command.stdout
    words = command.words[1:] if command.call else command.words
    return {'words': [str(w) for w in words], 'call': command.call, 'folder': str(at.work), 'environment': environment,
            'stdout': stdout, 'stderr': str(at.logs/'stderr'), 'events': str(at.logs/'events'), 'encoding': command.encoding,
            'wall': wall, 'idle': IDLE, 'cpu': cpu, 'address_space': STOP}


def text(path, encoding='utf-8') -> str:
    "The text of a file, '' if there is none; a name that is no text stays what it is."
    return path.read_text(encoding=encoding, errors='surrogateescape') if path.exists() else ''


def run(runner, command, at, wall=WALL, cpu=CPU + 20) -> Outcome:
    "Run a command and look at everything before and after."
    for name in ('stdout', 'stderr', 'events'):
        (at.logs/name).unlink(missing_ok=True)
    before = {**snapshot(at.root), **snapshot(at.shared, digests=False)}
    reply = runner.ask(job_of(command, at, wall, cpu))
    after = {**snapshot(at.root), **snapshot(at.shared, digests=False)}
    events = text(at.logs/'events').splitlines()
    return Outcome(command, reply['code'], text(at.logs/'stdout'), text(at.logs/'stderr'), reply['seconds'], reply['cpu'],
                   reply['peak'], reply['stopped'], events, before, after)


# ---------------------------------------------------------------- every image is accounted for

def images_below(folder) -> list:
    "The image files below a folder, by their names; hidden ones are left out, and folders with the name of an image."
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [d for d in folders if not d.startswith('.')]
        found += [os.path.join(parent, f) for f in files if f.lower().endswith(SUFFIXES) and not f.startswith('.')]
    return sorted(found)


def plain(cell) -> str:
    "A cell as it was before it was written for a spreadsheet."
    return cell[1:] if len(cell) > 1 and cell[0] == "'" and cell[1] in FORMULA else cell


def read_rows(source) -> list:
    "The rows of a CSV, as a user's own reader gets them."
    csv.field_size_limit(10**9)
    return [{plain(k): plain(v or '') for k, v in row.items() if k is not None} for row in csv.DictReader(source)]


def table_of(outcome) -> list:
    "The table that a command wrote."
    words, outs = outcome.command.words, outcome.command.outs
    if words[0] == 'predict' and not outs:
        return read_rows(outcome.out.splitlines(True))
    path = {'predict': lambda o: o, 'evaluate': lambda o: o.with_suffix('.csv'), 'cross-validate': lambda o: o.with_suffix('.csv'),
            'preprocess': lambda o: o/'images.csv', 'train': lambda o: o/'predictions.csv'}[words[0]](Path(outs[0]))
    with open(path, encoding='utf-8', errors='surrogateescape', newline='') as f:
        return read_rows(f)


def number(cell) -> float:
    "A cell as a number; NaN if it is none."
    try:
        return float(cell)
    except ValueError:
        return float('nan')


def bad_prediction(row) -> str:
    "Why a row is neither a prediction nor an error; '' if it is one of them."
    probs = [number(v) for k, v in row.items() if k.startswith('p_')]
    if row.get('error'):
        return 'a prediction beside an error' if row.get('prediction') else ''
    if not row.get('prediction'):
        return 'neither prediction nor error'
    return '' if probs and all(0 <= p <= 1 for p in probs) and abs(sum(probs) - 1) < .01 else f'probabilities {probs}'


def absolute(name, at) -> str:
    "A path in a table, from the folder in which the command ran."
    return os.path.normpath(os.path.join(at.work, name))


def unaccounted(outcome, at) -> list:
    "What is missing or odd in the result of a command that ended well."
    command, kind = outcome.command, outcome.command.words[0]
    if command.call or kind not in ('predict', 'evaluate', 'preprocess', 'train'):
        return []
    outcome.rows = rows = table_of(outcome)
    complaints = []
    if kind in ('predict', 'evaluate', 'train'):
        complaints += [f"{row.get('image')!r}: {bad_prediction(row)}" for row in rows if bad_prediction(row)]
    expected = command.images if command.images is not None else images_below(command.data) if command.data else None
    if expected is None:
        return complaints
    if kind == 'train':
        return complaints + count_of_run(Path(command.outs[0]), expected if isinstance(expected, int) else len(expected))
    if kind == 'predict':
        return complaints + sets_differ({absolute(r['image'], at) for r in rows}, {absolute(e, at) for e in expected})
    if kind == 'preprocess':
        return complaints + sets_differ({r['image'] for r in rows}, {os.path.relpath(e, command.data) for e in expected})
    said = {os.path.basename(r['image']) for r in rows}
    told = outcome.out + text(Path(command.outs[0]))
    return complaints + [f'not accounted for: {e!r}' for e in expected
                         if os.path.basename(e) not in said and os.path.basename(e) not in told]


def count_of_run(folder, expected) -> list:
    "Do the images of a run and those it skipped add up?"
    record = json.loads(text(folder/'record.json'))
    skipped = record.get('set_aside', record.get('skipped', []))
    found = record['data']['images'] + len(skipped)
    return [] if found == expected else [f'the run accounts for {found} images of {expected}']


def sets_differ(found, expected) -> list:
    "What is in one set only."
    return [f'not accounted for: {e!r}' for e in sorted(expected - found)] + [f'unknown row: {e!r}' for e in sorted(found - expected)]


# ---------------------------------------------------------------- the contract

def words_of(command) -> list:
    "What an error may name: paths and options that were given, long enough to be no accident."
    words = [str(w) for w in command.words[1:]] + [str(n) for n in command.named]
    near = {w for o in words for w in (o, os.path.basename(o.rstrip('/')), o.lstrip('-'))}
    return sorted(w for w in near if len(w) > 1 and not w.replace('.', '').isdigit()) + [str(n) for n in command.named]


def visible(line) -> str:
    "A line without what an error may do with a name: quotes, escapes, white space."
    return re.sub(r'\s+', ' ', line)


def bad_error(outcome) -> list:
    "What is wrong with the way in which a command failed."
    lines = [l for l in outcome.err.splitlines() if ERROR.match(l)]
    if outcome.command.silent and not outcome.err:
        return []
    if not outcome.error or len(lines) != 1:
        last = outcome.err.splitlines()[-1:] or ['nothing']
        return [f'exit code {outcome.code} with {len(lines)} error lines; the last line is {last[0][:300]!r}']
    known = words_of(outcome.command)
    line = visible(outcome.error)
    return [] if any(visible(w) in line for w in known) else [f'the error names nothing that was given: {outcome.error[:300]}']


def has_rows(outcome) -> bool:
    "Did a prediction fail that still wrote its table, with the reason for each image?"
    command = outcome.command
    path = os.fspath(command.outs[0]) if command.outs and command.words[0] == 'predict' else None
    return path in outcome.after and path not in outcome.before


def allowed(outcome) -> list:
    "What may have changed, besides the cache."
    return outcome.command.outs if outcome.code == 0 or outcome.command.keeps or has_rows(outcome) else []


def limits(outcome) -> list:
    "Time and memory."
    complaints = [f'stopped after {outcome.seconds:.0f} s: it waits or computes for ever'] if outcome.stopped else []
    complaints += [f'ended by signal {-outcome.code}'] if outcome.code < 0 and not outcome.stopped else []
    complaints += [f'{outcome.cpu:.0f} s of processor time'] if outcome.cpu > CPU else []
    return complaints + ([f'{outcome.peak/1e9:.1f} GB of memory'] if outcome.peak > MEMORY else [])


def check(outcome, at) -> list:
    "All that a command did against the contract; empty if it kept it."
    command = outcome.command
    complaints = limits(outcome)
    complaints += [f'{word!r} in what it printed' for word in FORBIDDEN if word in outcome.out + outcome.err]
    complaints += [f'a program or connection: {e[:200]}' for e in outcome.events]
    complaints += differences(outcome.before, outcome.after, [at.cache, at.logs, *allowed(outcome)])
    if outcome.stopped:
        return complaints
    if outcome.code:
        complaints += bad_error(outcome) + (unaccounted(outcome, at) if has_rows(outcome) else [])
    else:
        complaints += ['exit code 0 with an error line'] if any(map(ERROR.match, outcome.err.splitlines())) else []
        complaints += unaccounted(outcome, at)
    if command.also and not complaints:
        complaints += list(command.also(outcome) or [])
    return complaints


def wait_until(done: Callable[[], Any], seconds=120) -> Any:
    "What `done` returns, once it is true."
    stop = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < stop, f'waited {seconds} s in vain'
        time.sleep(.1)
    return found
