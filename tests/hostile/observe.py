"Run a command in a separate process, and compare the files on disk before and after it."

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CPU = 20  # seconds of processor time
IDLE = 10  # seconds without any: a command that waits forever
WALL = 300  # seconds in all
MEMORY = 1_500_000_000  # bytes beyond those of the imported library
STOP = 6_000_000_000  # bytes of address space beyond those of the imported library: where the system fails
ERROR = re.compile(r'dr_transfer( [a-z-]+)?: error: \S')


def table_beside(out) -> Path:
    "The table that is written next to a report or a figure."
    out = Path(out)
    return out.with_name(out.stem + ('_table.csv' if out.suffix == '.png' else '_predictions.csv'))


@dataclass
class Command:
    "A command, and what it may change."

    words: list  # of `dr_transfer`, or arguments of `call`
    outs: list = field(default_factory=list)  # paths that it may create or replace
    data: Path | None = None  # folder whose images must be accounted for
    images: list | int | None = None  # those images, or how many, if not all below `data`
    named: tuple = ()  # an error must contain one of these, or a path or option of `words`
    culprit: tuple = ()  # an error must contain one of these: a path or option of `words` is not enough
    call: str = ''  # a function in calls.py instead of the command
    environment: dict = field(default_factory=dict)
    stdout: str | None = 'file'  # 'file', 'broken pipe', a device, or None: closed
    encoding: str = 'utf-8'  # of standard output and error
    silent: bool = False  # may it fail without a message? (no reader)
    keeps: bool = False  # does it keep what is finished when it fails?
    files: int = 0  # how many files may be open at once; 0 for the usual limit
    also: Callable | None = None  # additional check: takes the Outcome, returns complaints

    @property
    def verb(self) -> str:
        "The first word."
        return str(self.words[0]) if self.words else ''


@dataclass
class Outcome:
    "The outcome of a command."

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
    rows: list = field(default_factory=list)  # of the table that it wrote

    @property
    def error(self) -> str:
        "The error line, or ''."
        lines = self.err.splitlines()
        return lines[-1] if lines and ERROR.match(lines[-1]) else ''

    @property
    def succeeded(self) -> bool:
        "Did the command do what it was asked? `check` says by exit code 3 that a site is too different."
        return self.code == 0 or (self.command.verb == 'check' and self.code == 3)

    @property
    def kind(self) -> str:
        "In one word."
        return 'completed' if self.succeeded else 'error' if self.error else 'failed'


# ---------------------------------------------------------------- files on disk


def content(path, info):
    "The content of a file: a digest, or the target of a link."
    if stat.S_ISLNK(info.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(info.st_mode):
        return ''
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def snapshot(folder, digests=True) -> dict:
    "Each path below a folder -> type, permissions, and of a file size, time and content."
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
    verbs = [
        (p, 'deleted' if p not in after else 'created' if p not in before else 'changed')
        for p in sorted({*before, *after})
        if before.get(p) != after.get(p) and not below(p, allowed)
    ]
    return [f'{verb}: {path!r}' for path, verb in verbs]


# ---------------------------------------------------------------- the process that runs the commands


class Runner:
    "Runs commands, each in a fork of a process that has the library imported."

    def __init__(self):
        environment = {
            **os.environ,
            'OMP_NUM_THREADS': '1',
            'MKL_NUM_THREADS': '1',
            'HF_HUB_OFFLINE': '1',
            'MPLBACKEND': 'Agg',
        }
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name('server.py')],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            encoding='ascii',
        )
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
    path = f'{at.root / "programs"}{os.pathsep}{os.environ.get("PATH", "")}'
    environment = {
        'HOME': str(at.home),
        'TMPDIR': str(at.tmp),
        'DR_TRANSFER_CACHE': str(at.cache),
        'PATH': path,
        'XDG_CACHE_HOME': str(at.home / '.cache'),
        **command.environment,
    }
    stdout = str(at.logs / 'stdout') if command.stdout == 'file' else command.stdout
    words = command.words[1:] if command.call else command.words
    return {
        'words': [str(w) for w in words],
        'call': command.call,
        'folder': str(at.work),
        'environment': environment,
        'stdout': stdout,
        'stderr': str(at.logs / 'stderr'),
        'events': str(at.logs / 'events'),
        'encoding': command.encoding,
        'wall': wall,
        'idle': IDLE,
        'cpu': cpu,
        'files': command.files,
        'address_space': STOP,
    }


def text(path, encoding='utf-8') -> str:
    "The text of a file, '' if there is none; a name that is not text is not changed."
    return path.read_text(encoding=encoding, errors='surrogateescape') if path.exists() else ''


def run(runner, command, at, wall=WALL, cpu=CPU + 20) -> Outcome:
    "Run a command and look at everything before and after."
    for name in ('stdout', 'stderr', 'events'):
        (at.logs / name).unlink(missing_ok=True)
    before = {**snapshot(at.root), **snapshot(at.shared, digests=False)}
    reply = runner.ask(job_of(command, at, wall, cpu))
    after = {**snapshot(at.root), **snapshot(at.shared, digests=False)}
    events = text(at.logs / 'events').splitlines()
    return Outcome(
        command,
        reply['code'],
        text(at.logs / 'stdout'),
        text(at.logs / 'stderr'),
        reply['seconds'],
        reply['cpu'],
        reply['peak'],
        reply['stopped'],
        events,
        before,
        after,
    )
