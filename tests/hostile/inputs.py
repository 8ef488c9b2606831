"""The registry of hostile inputs: each case is a function that builds files and returns the command to run.

To add a case, write a function with `@case('kind')` and describe the input in its docstring. The functions are in
`inputs_KIND.py`. All cases are deterministic, and the files are small, also if they claim to be large.
"""

import importlib
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract import check, read_rows
from observe import Command, Outcome, run, table_beside

KINDS = (
    'files',
    'images',
    'pixels',
    'dicom',
    'names',
    'tables',
    'columns',
    'arguments',
    'outs',
    'models',
    'onnx',
    'caches',
    'volumes',
    'preparations',
    'sites',
)
ALL_CASES = os.environ.get('DR_TRANSFER_HOSTILE') == 'all'  # also the cases that are usually skipped to save time
SMALL = ('--arch', 'small_cnn', '--weights', 'random', '--size', '48', '--plan', 'head', '--epochs', '1')
PLAIN = ('--runtime', 'plain')
CASES = []


class NotHere(Exception):
    "The case needs what this machine, user or installation does not have."


@dataclass(frozen=True)
class Case:
    "One hostile input."

    kind: str
    name: str
    about: str
    build: Callable
    sampled: bool = True

    def __str__(self):
        return self.name


def case(kind, each=None):
    "Register a builder of a case, or one for each of some named values."

    def register(build):
        for i, (name, value) in enumerate((each or {'': None}).items()):
            make = build if each is None else bound(build, value)
            name = f'{build.__name__}{f"[{name}]" if each else ""}'
            CASES.append(Case(kind, name, build.__doc__ or '', make, is_sampled(i, len(each or [0]))))
        return build

    return register


def is_sampled(i, n) -> bool:
    "Return whether the i-th of n values always runs: a sixth of them, at least two, evenly spaced."
    wanted = min(n, max(2, -(-n // 6)))
    return i * wanted // n != (i - 1) * wanted // n


def bound(build, value):
    "The builder of one value."
    return lambda at: build(at, value)


def cases(*kinds) -> list:
    "The cases of some kinds, or of all: every case with DR_TRANSFER_HOSTILE=all, else those that always run."
    for kind in KINDS:
        importlib.import_module(f'inputs_{kind}')
    return [c for c in CASES if (not kinds or c.kind in kinds) and (ALL_CASES or c.sampled)]


# ---------------------------------------------------------------- the place of a case


@dataclass(frozen=True)
class Place:
    "A separate folder for a case, and the files that all cases share and none may change."

    root: Path
    shared: Path

    def __getattr__(self, name):
        "Folders: data, work (where the command runs), home, tmp, cache, programs, logs."
        if name.startswith('_'):
            raise AttributeError(name)
        return self.root / name

    @property
    def fundus(self) -> Path:
        "Synthetic fundus images: images/ and labels.csv."
        return self.shared / 'fundus_set'

    @property
    def flowers(self) -> Path:
        "Synthetic flowers in two class folders."
        return self.shared / 'flowers'

    @property
    def flower(self) -> Path:
        "A good image."
        return self.flowers / 'daisy' / '0000.jpg'

    def copy_flowers(self) -> Path:
        "The synthetic flowers as the data of this case."
        return Path(shutil.copytree(self.flowers, self.data, dirs_exist_ok=True))

    def copy_fundus(self) -> Path:
        "The synthetic fundus images as the data of this case."
        return Path(shutil.copytree(self.fundus, self.data, dirs_exist_ok=True))

    def copy_site(self) -> Path:
        "Other synthetic fundus images, of another camera, as the data of this case."
        return Path(shutil.copytree(self.shared / 'site_set', self.data, dirs_exist_ok=True))

    def predict(self, *images, model='flower_run', **more) -> Command:
        "Predict some images, or the data folder, into a CSV."
        out = self.root / 'out.csv'
        model = self.shared / model if isinstance(model, str) else model
        more.setdefault('data', None if images else self.data)
        return Command(['predict', model, *(images or [self.data]), '--out', out, *PLAIN], [out], **more)

    def train(self, *words, data=None, **more) -> Command:
        "Train on the data folder into a run."
        out = self.root / 'out'
        data = self.data if data is None else data
        more.setdefault('data', Path(data))
        return Command(['train', data, *SMALL, *PLAIN, '--out', out, *words], [out], **more)

    def evaluate(self, *words, model='fundus_run', **more) -> Command:
        "Evaluate a model on the data folder into a report."
        out = self.root / 'out.html'
        model = self.shared / model if isinstance(model, str) else model
        more.setdefault('data', self.data)
        return Command(
            ['evaluate', model, self.data, '--allow-leaks', '--resamples', '100', '--out', out, *PLAIN, *words],
            [out, table_beside(out)],
            **more,
        )

    def preprocess(self, *words, source=None, out=None, **more) -> Command:
        "Prepare the data folder."
        out = self.root / 'out' if out is None else out
        source = self.data if source is None else source
        more.setdefault('data', Path(source))
        return Command(['preprocess', source, out, '--size', '48', *words], [out], keeps=True, **more)

    def call(self, function, *words, **more) -> Command:
        "A function of the library that has no command."
        return Command([function, *words], call=function, **more)


FOLDERS = ('data', 'work', 'home', 'tmp', 'programs', 'logs')
PROGRAMS = ('gs', 'gswin64c', 'convert', 'magick', 'ffmpeg', 'dwebp', 'djpeg', 'xv', 'display', 'git', 'sh')


def place(root, shared) -> Place:
    "Make a new place. Programs that a library might start are put first on the path: each writes a file if started."
    at = Place(Path(root), Path(shared))
    for name in FOLDERS:
        (at.root / name).mkdir(parents=True)
    for name in PROGRAMS:
        program = at.programs / name
        program.write_text(f'#!/bin/sh\necho "$0 $*" >> "{at.home}/a program was started"\n')
        program.chmod(0o755)
    return at


# ---------------------------------------------------------------- one hostile image next to a good one

IMAGES = []


def image(kind, name, expects='', each=None):
    """Register a builder of one image file, `build(path, good)` or `build(path, good, value)`.

    It is predicted next to a good image. `expects` is 'error' or 'prediction' where only one is right.
    A builder may return the image that its file shows: the two must be predicted alike.
    """

    def register(build):
        def command(at, *value):
            shows = build(at.data / name, at.flower.read_bytes(), *value)
            path = next(at.data.iterdir())  # a builder may add a suffix
            shutil.copy(at.flower, at.data / 'good.jpg')
            if shows is not None:
                shows.save(at.data / 'twin.png')
            return at.predict(also=beside_a_good_one(at, path, expects, shows is not None))

        command.__name__ = build.__name__
        command.__doc__ = build.__doc__
        IMAGES.extend((name, build, *value) for value in ([(v,) for v in each.values()] if each else [()]))
        return case(kind, each)(command)

    return register


def beside_a_good_one(at, path, expects, twin):
    "Check that the good image has its prediction, and that the hostile one has the expected result."

    def complaints(outcome):
        if outcome.code:
            yield 'one image stops the others'
            return
        rows = {os.path.basename(r['image']): r for r in outcome.rows}
        want = read_rows((at.shared / 'good.csv').read_text().splitlines())[0]
        if any(abs(float(rows['good.jpg'][k]) - float(v)) > 1e-5 for k, v in want.items() if k.startswith('p_')):
            yield 'the good image is predicted otherwise'
        row = rows.get(path.name)
        if row is None:
            return
        if expects and expects != ('error' if row['error'] else 'prediction'):
            yield f'expected: {expects}; found: {row["error"] or "a prediction"}'
        if twin and not row['error'] and abs(float(row['p_daisy']) - float(rows['twin.png']['p_daisy'])) > 0.02:
            yield f'it shows twin.png and is predicted as {row["p_daisy"]}, not {rows["twin.png"]["p_daisy"]}'

    return complaints


# ---------------------------------------------------------------- what all cases share


def make_shared(runner, folder):
    "Synthetic sets and trained models; made once, changed by no case."
    at = place(folder.with_name(folder.name + ' making'), folder)
    folder.mkdir()
    done(
        runner,
        at,
        Command(['draw', folder / 'flowers', folder / 'fundus_set', folder / 'site_set'], [folder], call='draw'),
    )
    done(runner, at, Command(['train', folder / 'flowers', *SMALL, *PLAIN, '--out', folder / 'flower_run'], [folder]))
    done(
        runner,
        at,
        Command(
            ['train', folder / 'fundus_set', *SMALL, *PLAIN, '--task', 'dr', '--out', folder / 'fundus_run'], [folder]
        ),
    )
    done(
        runner,
        at,
        Command(['export', folder / 'flower_run', *PLAIN, '--out', folder / 'flowers.onnx'], [folder]),
        needed='onnx',
    )
    done(runner, at, Command(['save_weights', folder / 'body.safetensors'], [folder], call='save_weights'))
    done(runner, at, Command(['preprocess', folder / 'fundus_set', folder / 'prepared', '--size', '48'], [folder]))
    good = folder / 'flowers' / 'daisy' / '0000.jpg'
    done(runner, at, Command(['predict', folder / 'flower_run', good, *PLAIN, '--out', folder / 'good.csv'], [folder]))
    shutil.copytree(at.cache, folder / 'cache')
    compare = [
        'compare',
        folder / 'flowers',
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
        folder / 'compared.png',
    ]
    done(runner, at, Command(compare, [folder]))
    shutil.copytree(at.cache, folder / 'compared cache')
    shutil.rmtree(at.root)


def done(runner, at, command, needed=''):
    "Run a command that must succeed, unless it needs a package that is not installed."
    import importlib.util

    if needed and not importlib.util.find_spec(needed):
        return
    outcome = run(runner, command, at)
    assert outcome.code == 0, outcome.err


def judge(runner, case, root, shared) -> tuple[Outcome | None, list]:
    "Build, run and check a case: return the outcome and the complaints, or no outcome if it cannot be built here."
    at = place(root, shared)
    try:
        command = case.build(at)
    except NotHere as e:
        return None, [str(e)]
    outcome = run(runner, command, at)
    try:
        return outcome, check(outcome, at)
    except Exception:  # a result that cannot even be read
        return outcome, [f'the result cannot be checked: {traceback.format_exc(limit=-2)}']


def need(module, because='is not installed') -> Any:
    "A package that a case needs."
    try:
        return importlib.import_module(module)
    except ImportError:
        raise NotHere(f'{module} {because}') from None
