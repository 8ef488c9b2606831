"Test that heavy packages are imported only when needed, by looking at sys.modules."

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import COMMAND, parsed

import dr_transfer

HEAVY = (
    'torch',
    'torchvision',
    'fastai',
    'fastcore',
    'timm',
    'pandas',
    'numpy',
    'scipy',
    'sklearn',
    'matplotlib',
    'PIL',
    'safetensors',
    'tqdm',
)
pytestmark = pytest.mark.usefixtures('with_shared_cache')
SHOW = "import sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})), file=sys.stderr)"


def loaded(code, **kwargs):
    "Result of a program in a new process, and the packages that are loaded at its end."
    r = subprocess.run([sys.executable, '-c', f'{code}\n{SHOW}'], capture_output=True, text=True, timeout=120, **kwargs)
    assert r.returncode == 0, r.stderr
    return r.stdout, set(json.loads(r.stderr.splitlines()[-1]))


def test_the_check_finds_loaded_packages():
    assert 'numpy' in loaded('import numpy')[1]


def test_importing_the_package_loads_nothing_heavy():
    _, modules = loaded('import dr_transfer; assert dr_transfer.__version__')
    assert 'dr_transfer' in modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize(
    'words',
    [
        ['--help'],
        ['train', '--help'],
        ['predict', '--help'],
        ['demo', '--help'],
        ['advise', '--help'],
        ['--version'],
        ['train'],
        ['nonsense'],
    ],
)
def test_help_loads_nothing_heavy(words):
    out, modules = loaded(
        f"from dr_transfer.cli import main\ntry: main({words})\nexcept SystemExit as e: print('code', e.code)"
    )
    assert out.splitlines()[-1] == f'code {0 if words[-1].startswith("--") else 2}'
    assert not modules & set(HEAVY)


@pytest.mark.parametrize(
    'words, options',
    [
        ([], ['demo', 'advise', 'train', 'predict']),
        (
            ['advise'],
            [
                'DATA',
                '--task',
                '--labels CSV',
                '--target',
                '--arch NAME',
                '--weights FILE',
                '--size N',
                '--valid FRACTION',
                '--seed N',
                '--out PNG',
                '--overwrite',
            ],
        ),
        (['demo'], ['--out', '--images', '--size', '--seed', '--debug', '--overwrite']),
        (
            ['train'],
            [
                'DATA',
                '--task',
                '--labels CSV',
                '--target',
                '--arch NAME',
                '--weights FILE',
                '--plan NAME',
                '--epochs N',
                '--size N',
                '--seed N',
                '--out DIR',
                '--debug',
                '--overwrite',
            ],
        ),
        (['predict'], ['DIR', 'IMAGES', '--out FILE', '--shard K/N', '--debug', '--overwrite']),
    ],
)
def test_the_installed_command(words, options):
    """Help of the real console script: what it imports, that it exits with 0,
    and that each subcommand shows an example that its parser takes.
    """
    r = subprocess.run(
        [COMMAND, *words, '--help'],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, 'PYTHONPROFILEIMPORTTIME': '1', 'COLUMNS': '200'},
    )
    imported = {
        line.split('|')[-1].strip().split('.')[0] for line in r.stderr.splitlines() if line.startswith('import time:')
    }
    assert r.returncode == 0
    assert 'argparse' in imported
    assert not imported & set(HEAVY)
    assert [o for o in options if o not in r.stdout] == []
    if not words:
        return
    example = r.stdout.split('example:\n')[1].split()
    assert example[:2] == ['dr_transfer', words[0]]
    function, _ = parsed(*example[1:])
    assert function.__name__ == words[0]


def test_failure_has_an_exit_code_and_one_line(tmp_path):
    "Of the real console script; a success is above, and Ctrl-C in test_cli."
    (tmp_path / 'mine.txt').write_text('mine')
    r = subprocess.run([COMMAND, 'demo', '--out', tmp_path], capture_output=True, text=True, timeout=120)
    assert r.returncode == 1
    assert r.stdout == ''
    assert len(r.stderr.splitlines()) == 1
    assert 'exists already' in r.stderr
    assert subprocess.run([COMMAND, 'paint'], capture_output=True).returncode == 2
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']


def test_predicting_needs_no_fastai(run, fundus_data):
    "A complete prediction with the command."
    image = sorted((fundus_data / 'images').iterdir())[0]
    out, modules = loaded(
        f'from dr_transfer.cli import main; assert main(["predict", {str(run)!r}, {str(image)!r}]) == 0'
    )
    assert out.startswith('image,prediction,p_no,p_referable')
    assert str(image) in out
    assert {'torch', 'timm', 'dr_transfer'} <= modules
    assert not modules & {
        'fastai',
        'fastcore',
        'matplotlib',
        'sklearn',
        'IPython',
    }


def imported_at_once(name):
    "Modules that a module of the library imports when it is imported, those of the library by their names in it"
    tree = ast.parse((Path(dr_transfer.__file__).parent / f'{name}.py').read_text())
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.removeprefix('dr_transfer.')


def test_the_command_imports_the_library_only_inside_functions():
    "Late imports keep the command fast; the test names the module that violates this."
    commands = ('subcommands', 'validation', 'check', 'parts', 'sites', 'ensemble', 'backbones', 'shared', 'arguments')
    light = {'utils.checks', 'arguments', 'shared', 'sites', *(f'commands.{name}' for name in commands)}
    for name in ('cli', 'utils/checks', *(f'commands/{name}' for name in commands)):
        heavy = [m for m in imported_at_once(name) if m not in light and m.split('.')[0] not in sys.stdlib_module_names]
        assert not heavy, f'{name}: {heavy}'
