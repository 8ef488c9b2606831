"Helpers for tests of the command, which runs in this process while its output is captured."

import csv
import importlib.util
import io
import os
import sys
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pandas as pd

from dr_transfer.cli import main
from dr_transfer.data.acquisition import changed_images
from dr_transfer.metrics.classes import Classes, Positive

COMMAND = Path(sys.executable).with_name('dr_transfer')
GRADES = Classes(('0', '1', '2', '3', '4'), Positive('referable', ('2', '3', '4')), ordered=True)
FAST = ('--arch', 'test_resnet', '--size', '64', '--plan', 'head', '--epochs', '1')
Result = namedtuple('Result', 'code out err')


def cli(*words):
    "Run the command in this process and return its exit code and output."
    out = io.StringIO()
    err = io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(w) for w in words])
        except SystemExit as e:
            code = e.code
    return Result(code, out.getvalue(), err.getvalue())


def good(*words):
    "Return the output of a command that must succeed."
    result = cli(*words)
    assert result.code == 0, result.err
    return result


def parsed(*words):
    "Return the function and the options of a command line, which is not run."
    with patch('dr_transfer.cli.call_command', return_value=0) as call:
        good(*words)
    call.assert_called_once()
    function, options = call.call_args.args
    return function, vars(options)


def error_line(*words, start='dr_transfer: '):
    "Return the error message, in one line, of a command that must fail."
    result = cli(*words)
    assert result.code in (1, 2), result  # 2: an error in an option
    assert 'Traceback' not in result.err
    lines = result.err.splitlines()
    assert len(lines) == 1, result
    assert lines[0].startswith(start), result
    return lines[0]


def tool(name):
    "Load a script of tools/, which is not a package."
    path = Path(__file__).resolve().parent.parent / 'tools' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def content(folder):
    "Return the bytes of all files below a folder, by path."
    files = [p for p in sorted(Path(folder).rglob('*')) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def table(path):
    "Read a CSV of predictions, with empty cells as empty strings."
    text = {'image': str, 'prediction': str, 'target': str, 'error': str}
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values={})


def rows_of(text):
    "Read a printed CSV with the csv module instead of pandas."
    return list(csv.DictReader(io.StringIO(text)))


class Payload:
    "A pickle that makes a folder when it is loaded."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(image, kind, **options):
    "Return the bytes of an image file of a kind, such as PNG."
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def save_changed(images, change, folder):
    "Save images as another site could have made them, as PNG files with their numbers as names."
    folder.mkdir()
    for i, image in enumerate(changed_images(images, change)):
        image.read().save(folder / f'{i}.png')
