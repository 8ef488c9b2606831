"Columns of a labels file with names that the library uses, and columns of patients under various names."

import csv
import io
import os

from inputs import case
from inputs_tables import DR, as_text, rows_of, table, write

TAKEN = (
    'decision',
    'known',
    'p_age',
    'p_no',
    'prediction',
    'gradability',
    'reason',
    'light',
    'error',
    'target',
    'split',
    'fold',
    'group',
    'label',
    'name',
    'index',
    'weight',
    'column',
    'eye',
    'camera',
    'data_eye',
    '',
    ' ',
    '0',
    'threshold',
    'size',
    'groupby',
)


def with_column(rows, name, value) -> list:
    "Rows with one more column; `value` gets the index of the row."
    return [[*rows[0], name], *([*r, value(i)] for i, r in enumerate(rows[1:]))]


def number(i) -> str:
    "A number between 0 and 100, different for neighbours."
    return str(i * 37 % 101)


@case('columns', {repr(n): n for n in TAKEN})
def evaluated(at, name):
    "A user's column with a name that the library uses itself: the predictions of the model must not be taken from it."
    at.copy_fundus()
    write(at.data / 'labels.csv', with_column(rows_of(at), name, number))
    command = at.evaluate(named=('labels.csv', name, 'split', 'column'))
    command.also = of_the_model(at, name)
    return command


def of_the_model(at, name):
    "Check that no result of the model contains the user's values, and that the probabilities are its own."
    values = {i: number(i) for i in range(24)}

    def complaints(outcome):
        names = [r[0] for r in rows_of(at)[1:]]
        rows = {os.path.basename(r['image']): r for r in outcome.rows}
        ours = [rows[os.path.basename(n)] for n in names if os.path.basename(n) in rows]
        for column in (
            'prediction',
            'p_no',
            'p_referable',
            'decision',
            'grade',
            'gradability',
            'known',
            'error',
            'reason',
            'light',
        ):
            if len(ours) == 24 and [r.get(column) for r in ours] == list(values.values()):
                yield f'the column {column!r} of the result is that of the user'
        if ours and {k for k in ours[0] if k.startswith('p_')} != {'p_no', 'p_referable'}:
            yield f'the result has the probabilities {sorted(k for k in ours[0] if k.startswith("p_"))}'

    return complaints


@case('columns', {repr(n): n for n in ('decision', 'p_age', 'prediction', 'target', 'label', 'error', 'p_no')})
def trained(at, name):
    "The same in a training."
    at.copy_fundus()
    write(at.data / 'labels.csv', with_column(rows_of(at), name, number))
    return at.train(*DR, images=24, named=('labels.csv', name))


DOUBLES = {
    'grade': ['image', 'grade', 'patient', 'grade'],
    ' grade': ['image', 'grade', 'patient', ' grade'],
    'image ': ['image', 'grade', 'patient', 'image '],
    'Image': ['image', 'grade', 'patient', 'Image'],
    'Grade': ['image', 'grade', 'patient', 'Grade'],
    'level': ['image', 'grade', 'patient', 'level'],
    'no names': ['', '', '', ''],
    'one name': ['image'] * 4,
    'formula': ['image', 'grade', 'patient', '=cmd()'],
    'patient': ['image', 'grade', 'patient', 'patient'],
    'Patient': ['image', 'grade', 'patient', 'Patient'],
    'id_code': ['image', 'grade', 'patient', 'id_code'],
    'quote': ['image', 'grade', 'patient', '"'],
    'newline': ['image', 'grade', 'patient', 'a\nb'],
    'empty': ['image', 'grade', 'patient', ''],
    'nan': ['image', 'grade', 'patient', 'nan'],
}


@table(None, DOUBLES, named=('column', 'columns'))
def header(rows, names):
    "Columns with equal or nearly equal names; the last column has other values."
    return [names, *([*r[:3], number(i)] for i, r in enumerate(rows[1:]))]


# ---------------------------------------------------------------- patients

PATIENTS = (
    'patient',
    'Patient',
    'PATIENT_ID',
    'patient id',
    'PatientID',
    'patient_nr',
    'subject',
    'Subject ID',
    'group',
    ' patient ',
    'person',
    'pid',
    'case',
    'mrn',
)


def together(at, labels='labels.csv', column=2):
    "Check that no patient has images in both training and validation."

    def complaints(outcome):
        rows = list(csv.reader(io.StringIO((at.data / labels).read_text())))[1:]
        valid = [r['image'] for r in outcome.rows]
        on = {}
        for r in rows:
            on.setdefault(r[column].strip(), set()).add(any(v.endswith(f'/{r[0]}') for v in valid))
        both = [p for p, found in on.items() if p and len(found) > 1]
        if both:
            yield f'{len(both)} patients stand in training and in validation, such as {both[0]!r}'

    return complaints


def patients(at, name, value=None) -> list:
    "Labels whose third column has another name; eight patients."
    rows = rows_of(at)
    value = value or (lambda i: f'person {i % 8}')
    return [['image', 'grade', name], *([r[0], r[1], value(i)] for i, r in enumerate(rows[1:]))]


@case('columns', {repr(n): n for n in PATIENTS})
def patients_asked_for(at, name):
    "Patients in a column that is named: they stay together."
    at.copy_fundus()
    write(at.data / 'labels.csv', patients(at, name))
    return at.train(*DR, '--patient', name, images=24, also=together(at), named=('labels.csv',))


@case('columns', {repr(n): n for n in PATIENTS})
def patients_found(at, name):
    "Patients in a column that is not named: they stay together, or the command reports that there is none."
    at.copy_fundus()
    write(at.data / 'labels.csv', patients(at, name))

    def found_or_reported(outcome):
        text = outcome.out + outcome.err
        return [] if 'no patient column' in text else list(together(at)(outcome))

    return at.train(*DR, images=24, also=found_or_reported, named=('labels.csv',))


@case('columns', {k: k for k in ('evaluate', 'cross-validate', 'compare', 'advise')})
def patients_in_every_command(at, which):
    "The name of the patient column is given, in each command that reads labels."
    at.copy_fundus()
    write(at.data / 'labels.csv', patients(at, 'pid'))
    out = at.root / ('out.png' if which in ('compare', 'advise') else 'out.html')
    if which == 'evaluate':
        return at.evaluate('--patient', 'pid')
    words = [
        which,
        at.data,
        *DR,
        '--weights',
        'random',
        '--size',
        '48',
        '--runtime',
        'plain',
        '--patient',
        'pid',
        '--out',
        out,
    ]
    words += {
        'compare': ['--archs', 'small_cnn', '--plans', 'head', '--epochs', '1', '--resamples', '100'],
        'advise': ['--arch', 'small_cnn'],
        'cross-validate': [
            '--arch',
            'small_cnn',
            '--plan',
            'head',
            '--epochs',
            '1',
            '--folds',
            '2',
            '--resamples',
            '100',
        ],
    }[which]
    from observe import Command, table_beside

    return Command(words, [out, table_beside(out)])


@case('columns')
def patients_of_nobody(at):
    "A column of patients that does not exist."
    at.copy_fundus()
    return at.train(*DR, '--patient', 'nobody')


VALUES = {
    'numbers': lambda i: f'{i % 8}',
    'floats': lambda i: f'{i % 8}.0' if i % 2 else f'{i % 8}',
    'spaces': lambda i: f'p{i % 8}' + ' ' * (i % 2),
    'zeros': lambda i: f'00{i % 8}',
    'one': lambda i: 'p',
    'each': lambda i: f'p{i}',
    'nan': lambda i: 'nan' if i % 8 == 0 else f'p{i % 8}',
}


@case('columns', VALUES)
def patients_written(at, value):
    "Patients written in several ways."
    at.copy_fundus()
    write(at.data / 'labels.csv', patients(at, 'patient', value))
    return at.train(*DR, images=24, also=together(at), named=('labels.csv', 'group', 'patient'))


@case('columns')
def patients_partly_known(at):
    "Half of the images have no patient, and are copies of images that have one."
    import shutil

    at.copy_fundus()
    rows = [r[:3] for r in rows_of(at)]
    for r in rows[1:13]:
        name = r[0].replace('.jpg', ' copy.jpg')
        source = next(at.data.rglob(os.path.basename(r[0])))
        shutil.copy(source, source.with_name(os.path.basename(name)))
        rows.append([name, r[1], ''])
    write(at.data / 'labels.csv', rows)

    def complaints(outcome):
        valid = {os.path.basename(r['image']) for r in outcome.rows}
        for r in rows[1:13]:
            name = os.path.basename(r[0])
            if (name in valid) != (name.replace('.jpg', ' copy.jpg') in valid):
                yield f'{name} and its copy stand in training and in validation'

    return at.train(*DR, images=36, also=complaints, named=('labels.csv', 'copies', 'images'))


@case('columns')
def patients_beside_folders(at):
    "Class folders and a CSV that names the patients but not the labels."
    at.copy_flowers()
    files = sorted(p.relative_to(at.data).as_posix() for p in at.data.rglob('*.jpg'))
    (at.data / 'credits.csv').write_text(
        as_text([['image', 'patient'], *([f, f'p{i % 5}'] for i, f in enumerate(files))])
    )
    return at.train(images=18, also=together(at, 'credits.csv', 1))


@case('columns', {k: k for k in ('two files', 'two columns', 'not of the images')})
def patients_ambiguous(at, how):
    "Class folders and more than one possible column of patients."
    at.copy_flowers()
    files = sorted(p.relative_to(at.data).as_posix() for p in at.data.rglob('*.jpg'))
    first = [['image', 'patient'], *([f, f'p{i % 5}'] for i, f in enumerate(files))]
    second = [['image', 'patient'], *([f, f'q{i % 3}'] for i, f in enumerate(files))]
    if how == 'two columns':
        first = [['image', 'patient', 'subject'], *([*a, b[1]] for a, b in zip(first[1:], second[1:]))]
    if how == 'not of the images':
        first = [['image', 'patient'], *([f'other/{i}.jpg', 'p'] for i in range(9))]
    write(at.data / 'credits.csv', first)
    if how == 'two files':
        write(at.data / 'more.csv', second)
    return at.train(images=18, named=('credits.csv', 'more.csv', 'patient', 'subject', 'groups'))
