"""The rules that every command must follow for any input, and checks of these rules from outside.

Within a limit of time and memory a command ends in one of two ways:

* exit code 0 (or 3, for a `check` that finds a site too different), and every image is predicted, listed in a row with
  the reason in `error`, or listed as skipped;
* another exit code, and the last line on standard error is the only one that starts with `dr_transfer: error:` (or
  `dr_transfer COMMAND: error:` for arguments that the parser rejects). It names the input.

What an error or a warning advises can be typed: advice for Python is not all that there is.

There is never a traceback. No program is started and no connection opened. Outside `--out` and the cache no file is
created, changed or deleted; after an error `--out` is unchanged.
"""

import csv
import json
import os
import re
from pathlib import Path

from observe import CPU, ERROR, MEMORY, differences, table_beside, text

FORBIDDEN = ('Traceback (most recent call last)', 'Traceback of the server', 'Exception ignored', 'Segmentation fault')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp', '.gif', '.ppm', '.dcm', '.dicom')
FORMULA = (
    '=+-@\t\r'  # the first characters of a cell that a spreadsheet would compute: it is written with a quote before it
)

# ---------------------------------------------------------------- every image is accounted for


def images_below(folder) -> list:
    "The image files below a folder, by their names; hidden ones are skipped, and folders with the name of an image."
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [d for d in folders if not d.startswith('.')]
        found += [os.path.join(parent, f) for f in files if f.lower().endswith(SUFFIXES) and not f.startswith('.')]
    return sorted(found)


def plain(cell) -> str:
    "The original text of a cell that was written for a spreadsheet."
    bare = cell.lstrip("'")
    return cell[1:] if cell[:1] == "'" and bare[:1] and bare[0] in FORMULA else cell


def read_rows(source) -> list:
    "The rows of a CSV, as a user's own reader gets them."
    csv.field_size_limit(10**9)
    return [{plain(k): plain(v or '') for k, v in row.items() if k is not None} for row in csv.DictReader(source)]


def table_of(outcome) -> list:
    "The table that a command wrote."
    words = outcome.command.words
    outs = outcome.command.outs
    if words[0] == 'predict' and not outs:
        return read_rows(outcome.out.splitlines(True))
    path = {
        'predict': lambda o: o,
        'evaluate': table_beside,
        'check': table_beside,
        'cross-validate': table_beside,
        'preprocess': lambda o: o / 'images.csv',
        'train': lambda o: o / 'predictions.csv',
    }[words[0]](Path(outs[0]))
    with open(path, encoding='utf-8', errors='surrogateescape', newline='') as f:
        return read_rows(f)


def number(cell) -> float:
    "A cell as a number; NaN if it is not a number."
    try:
        return float(cell)
    except ValueError:
        return float('nan')


def bad_prediction(row) -> str:
    "Return why a row is neither a prediction nor an error; '' if it is one of them."
    probs = [number(v) for k, v in row.items() if k.startswith('p_')]
    if row.get('error'):
        return 'a prediction beside an error' if row.get('prediction') else ''
    if not row.get('prediction'):
        return 'neither prediction nor error'
    return '' if probs and all(0 <= p <= 1 for p in probs) and abs(sum(probs) - 1) < 0.01 else f'probabilities {probs}'


def absolute(name, at) -> str:
    "A path in a table, from the folder in which the command ran."
    return os.path.normpath(os.path.join(at.work, name))


def unaccounted(outcome, at) -> list:
    "Return what is missing or wrong in the result of a command that succeeded."
    command = outcome.command
    kind = outcome.command.verb
    readable = command.outs or (kind == 'predict' and command.stdout == 'file')
    if command.call or '--help' in command.words or not readable:
        return []
    if kind not in ('predict', 'evaluate', 'preprocess', 'train', 'check'):
        return []
    outcome.rows = rows = table_of(outcome)
    complaints = []
    if kind in ('predict', 'evaluate', 'train'):
        complaints += [f'{row.get("image")!r}: {bad_prediction(row)}' for row in rows if bad_prediction(row)]
    expected = command.images if command.images is not None else images_below(command.data) if command.data else None
    if expected is None:
        return complaints
    if kind == 'train':
        return complaints + count_of_run(
            Path(command.outs[0]), expected if isinstance(expected, int) else len(expected)
        )
    if kind in ('predict', 'check'):
        return complaints + sets_differ({absolute(r['image'], at) for r in rows}, {absolute(e, at) for e in expected})
    if kind == 'preprocess':
        return complaints + sets_differ(
            {r['image'] for r in rows}, {os.path.relpath(e, command.data) for e in expected}
        )
    listed = {os.path.basename(r['image']) for r in rows}
    printed = outcome.out + text(Path(command.outs[0]))
    return complaints + [
        f'not accounted for: {e!r}'
        for e in expected
        if os.path.basename(e) not in listed and os.path.basename(e) not in printed
    ]


def count_of_run(folder, expected) -> list:
    "Do the images of a run and those it skipped add up?"
    record = json.loads(text(folder / 'record.json'))
    skipped = record.get('skipped_images', record.get('skipped', []))
    found = record['data']['images'] + len(skipped)
    return [] if found == expected else [f'the run accounts for {found} images of {expected}']


def sets_differ(found, expected) -> list:
    "The elements of one set only."
    return [f'not accounted for: {e!r}' for e in sorted(expected - found)] + [
        f'unknown row: {e!r}' for e in sorted(found - expected)
    ]


# ---------------------------------------------------------------- the contract


def words_of(command) -> list:
    "What an error may name: its culprit, or paths and options that were given, long enough not to match by chance."
    if command.culprit:
        return [w for o in map(str, command.culprit) for w in (o, o.encode(errors='backslashreplace').decode())]
    words = [str(w) for w in command.words[1:]] + [str(n) for n in command.named]
    words += [
        w.encode(errors='backslashreplace').decode() for w in words
    ]  # as standard error shows bytes that are not text
    near = {w for o in words for w in (o, os.path.basename(o.rstrip('/')), o.lstrip('-'), o[:200])}
    return sorted(w for w in near if len(w) > 1 and not w.replace('.', '').isdigit()) + [str(n) for n in command.named]


def visible(line) -> str:
    "A line without the changes that an error may make to a name: quotes, escapes, white space."
    return re.sub(r'\s+', ' ', line)


def bad_error(outcome) -> list:
    "Return what is wrong with an error of a command."
    lines = [line for line in outcome.err.splitlines() if ERROR.match(line)]
    if outcome.command.silent and not outcome.err:
        return []
    if not outcome.error or len(lines) != 1:
        last = outcome.err.splitlines()[-1:] or ['nothing']
        return [f'exit code {outcome.code} with {len(lines)} error lines; the last line is {last[0][:300]!r}']
    known = words_of(outcome.command)
    line = visible(outcome.error)
    return (
        []
        if any(visible(w) in line for w in known)
        else [f'the error names nothing that was given: {outcome.error[:300]}']
    )


PYTHON = re.compile(
    r"""(?<![-\w])[a-z]\w*=(?:['"\d]|True|None)"""
)  # such as size=48: how an argument is written in Python


def only_python(outcome) -> list:
    "Return errors and warnings that say only in Python what to do, though a command was typed."
    found = []
    for line in outcome.err.splitlines():
        if not re.match(r'dr_transfer( [a-z-]+)?: (error|warning):', line) or outcome.command.call:
            continue
        rest = line
        for word in sorted(map(str, outcome.command.words), key=len, reverse=True):
            rest = rest.replace(word, '')
        if PYTHON.search(rest) and '--' not in line:
            found.append(f'advice for Python only: {line[:300]}')
    return found


def has_rows(outcome) -> bool:
    "Return whether a failed prediction still wrote its table, with the reason for each image."
    command = outcome.command
    path = os.fspath(command.outs[0]) if command.outs and command.verb == 'predict' else None
    return path in outcome.after and path not in outcome.before


def allowed(outcome) -> list:
    "What may have changed, besides the cache."
    return outcome.command.outs if outcome.succeeded or outcome.command.keeps or has_rows(outcome) else []


def limits(outcome) -> list:
    "Time and memory."
    complaints = [f'stopped after {outcome.seconds:.0f} s: it waits or computes for ever'] if outcome.stopped else []
    complaints += [f'ended by signal {-outcome.code}'] if outcome.code < 0 and not outcome.stopped else []
    complaints += [f'{outcome.cpu:.0f} s of processor time'] if outcome.cpu > CPU else []
    return complaints + ([f'{outcome.peak / 1e9:.1f} GB of memory'] if outcome.peak > MEMORY else [])


def must_fail(outcome) -> list:
    "An additional check of a command that must fail: there is no result."
    if outcome.code:
        return []
    return ['exit code 0, though it must fail: ' + outcome.out[:200] + json.dumps(outcome.rows)[:300]]


def check(outcome, at) -> list:
    "Return all violations of the rules by a command."
    command = outcome.command
    complaints = limits(outcome)
    complaints += [f'{word!r} in what it printed' for word in FORBIDDEN if word in outcome.out + outcome.err]
    complaints += only_python(outcome)
    complaints += [f'a program or connection: {e[:200]}' for e in outcome.events]
    complaints += differences(outcome.before, outcome.after, [at.cache, at.logs, *allowed(outcome)])
    if outcome.stopped:
        return complaints
    if not outcome.succeeded:
        complaints += bad_error(outcome) + (unaccounted(outcome, at) if has_rows(outcome) else [])
    else:
        complaints += ['exit code 0 with an error line'] if any(map(ERROR.match, outcome.err.splitlines())) else []
        complaints += unaccounted(outcome, at)
    if command.also and not complaints:
        complaints += list(command.also(outcome) or [])
    return complaints
