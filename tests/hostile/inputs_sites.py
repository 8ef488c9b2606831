"Images of another site for check, recalibrate and adapt: other files among them, none at all, outputs in wrong places."

import os
import shutil
from itertools import product

from contract import must_fail
from inputs import PLAIN, case
from inputs_columns import number, with_column
from inputs_files import EPS
from inputs_tables import write
from observe import Command, table_beside

COMMANDS = ('check', 'recalibrate', 'adapt')


def site_command(at, command, data, out=None, *words, **more) -> Command:
    "A command with the shared fundus model and the images of a site."
    out = at.root / name_of('out', command) if out is None else out
    outs = [out, table_beside(out)] if command == 'check' else [out]
    words = [*(['--sensitivity', '0.5'] if command == 'recalibrate' else []), *words]
    more.setdefault('named', ('adapting',))  # it may be expected not to help
    more.setdefault('data', data)
    return Command([command, at.shared / 'fundus_run', data, '--out', out, *PLAIN, *words], outs, **more)


def name_of(stem, command) -> str:
    "The name of an output."
    return f'{stem}.html' if command == 'check' else stem


def must_succeed(outcome):
    "Check that the command was not stopped by what it can skip."
    return [] if outcome.succeeded else [f'no result: {outcome.error}']


# ---------------------------------------------------------------- the images


def unchanged(at):
    "Good images"
    return at.copy_site()


def other_files(at):
    "A pipe, a PostScript program and a truncated image among the images"
    at.copy_site()
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
    at.copy_site()
    for path in sorted((at.data / 'images').iterdir())[3:]:
        path.unlink()
    rows = (at.data / 'labels.csv').read_text().splitlines()
    (at.data / 'labels.csv').write_text('\n'.join(rows[:4]) + '\n')
    return at.data


GOOD = ('unchanged', 'other_files')
INPUTS = {f.__name__: f for f in (other_files, nothing, run_as_data, three_images, unchanged)}


@case('sites', {f'{command} {name}': (command, make) for (name, make), command in product(INPUTS.items(), COMMANDS)})
def site(at, given):
    "Images of another site."
    command, make = given
    also = must_succeed if make.__name__ in GOOD and command != 'adapt' else None
    named = ('adapting', 'images of the new site', 'positive patients')
    return site_command(at, command, make(at), also=also, named=named)


@case('sites', {'all known': 'recalibrate', 'all known, adapted': 'adapt'})
def images_that_the_model_knows(at, command):
    "The images that the model was trained on."
    return site_command(at, command, at.copy_fundus(), also=must_fail, named=('of these images', 'of the new site'))


# ---------------------------------------------------------------- the output


@case('sites', {command: command for command in COMMANDS})
def output_among_the_images(at, command):
    "The output would be in the folder of the images."
    at.copy_site()
    made = site_command(at, command, at.data, at.data / name_of('run', command), also=must_fail)
    made.outs = []
    return made


@case('sites', {f'{c} {how}': (c, how) for how, c in product(('taken', 'overwritten', 'link'), COMMANDS)})
def output_of_the_user(at, given):
    "--out is a folder of the user, or a link to one."
    command, how = given
    mine = at.home / name_of('mine', command)
    mine.mkdir()
    (mine / 'thesis.txt').write_text('precious')
    out = mine
    if how == 'link':
        out = at.root / name_of('link', command)
        out.symlink_to(mine)
    words = [] if how == 'taken' else ['--overwrite']
    made = site_command(at, command, at.copy_site(), out, *words, also=must_fail, culprit=(mine.name, out.name))
    made.outs = []
    return made


# ---------------------------------------------------------------- columns and arguments


@case('sites', {name: name for name in ('decision', 'p_no', 'target', 'known', 'set', 'unlike', 'made_from')})
def taken_column(at, name):
    "A column of the user with a name that the library uses itself."
    at.copy_site()
    rows = [line.split(',') for line in (at.data / 'labels.csv').read_text().splitlines()]
    write(at.data / 'labels.csv', with_column(rows, name, number))
    return site_command(at, 'recalibrate', at.data, also=must_succeed)


ARGUMENTS = {
    'recalibrate --sensitivity': ('recalibrate', '--sensitivity', '2'),
    'recalibrate --confidence': ('recalibrate', '--confidence', '1'),
    'recalibrate --patient': ('recalibrate', '--patient', 'nobody'),
    'recalibrate too few': ('recalibrate', '--sensitivity', '0.99'),
    'check --resamples': ('check', '--resamples', '-1'),
    'check --patient': ('check', '--patient', 'nobody'),
    'adapt --runtime': ('adapt', '--runtime', 'nope'),
}


@case('sites', ARGUMENTS)
def site_argument(at, words):
    "An argument that is wrong, or that these images cannot fulfil."
    command, option, value = words
    culprit = (option.strip('-'), 'column', value)
    return site_command(at, command, at.copy_site(), None, option, value, also=must_fail, culprit=culprit)
