"Images of another site for check, recalibrate and adapt: other files among them, none at all, outputs in wrong places."

import os
import shutil
from itertools import product

from inputs import PLAIN, case
from inputs_files import EPS
from observe import Command, table_beside

COMMANDS = ('check', 'recalibrate', 'adapt')


def site_command(at, command, data, out=None, *words) -> Command:
    "A command with the shared fundus model and the images of a site."
    name = 'out.html' if command == 'check' else 'out'
    out = at.root / name if out is None else out
    outs = [out, table_beside(out)] if command == 'check' else [out]
    named = ('on all of these images', 'images of the new site')  # the model knows these images; too few
    return Command([command, at.shared / 'fundus_run', data, '--out', out, *PLAIN, *words], outs, named=named)


def other_files(at):
    "A pipe, a PostScript program and a truncated image among the images"
    at.copy_fundus()
    images = at.data / 'images'
    first, second, third = sorted(images.iterdir())[:3]
    for path in (first, second):
        path.unlink()
    os.mkfifo(first)
    second.write_bytes(EPS)
    third.write_bytes(third.read_bytes()[:200])
    return at.data


def nothing(at):
    "An empty folder"
    return at.data


def run_as_data(at):
    "The run itself in place of images"
    return shutil.copytree(at.shared / 'fundus_run', at.data, dirs_exist_ok=True)


def three_images(at):
    "Three images"
    at.copy_fundus()
    for path in sorted((at.data / 'images').iterdir())[3:]:
        path.unlink()
    rows = (at.data / 'labels.csv').read_text().splitlines()
    (at.data / 'labels.csv').write_text('\n'.join(rows[:4]) + '\n')
    return at.data


INPUTS = {f.__name__: f for f in (other_files, nothing, run_as_data, three_images)}


@case('sites', {f'{command} {name}': (command, make) for (name, make), command in product(INPUTS.items(), COMMANDS)})
def site(at, given):
    "Images of another site."
    command, make = given
    return site_command(at, command, make(at))


@case('sites', {command: command for command in COMMANDS})
def output_among_the_images(at, command):
    "The output would be in the folder of the images."
    at.copy_fundus()
    return site_command(at, command, at.data, at.data / ('page.html' if command == 'check' else 'run'))


ARGUMENTS = {
    'recalibrate --sensitivity': ('recalibrate', '--sensitivity', '2'),
    'recalibrate --confidence': ('recalibrate', '--confidence', '1'),
    'recalibrate --patient': ('recalibrate', '--patient', 'nobody'),
    'check --resamples': ('check', '--resamples', '-1'),
    'adapt --runtime': ('adapt', '--runtime', 'nope'),
}


@case('sites', ARGUMENTS)
def site_argument(at, words):
    "An argument that is wrong."
    command, *more = words
    return site_command(at, command, at.copy_fundus(), None, *more)
