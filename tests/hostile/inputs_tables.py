"Labels files that are damaged, ambiguous or in other encodings, and splits that cannot be made."

import csv
import io
import os
import shutil

from inputs import case

DR = ('--task', 'dr')


def rows_of(at) -> list:
    "The labels of the synthetic fundus images: image, grade, patient, eye."
    return list(csv.reader((at.fundus / 'labels.csv').read_text().splitlines()))


def as_text(rows) -> str:
    "Rows as CSV."
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows(rows)
    return out.getvalue()


def table(expects=None, each=None, words=DR, named=()):
    """Register a builder of a labels file, `build(rows)` or `build(rows, value)`: rows, text or bytes.

    A training on fundus images uses it. `expects` is how many images the run must account for if it is made.
    """

    def register(build):
        def command(at, *value):
            at.copy_fundus()
            write(at.data / 'labels.csv', build(rows_of(at), *value))
            return at.train(*words, images=expects, data=at.data, culprit=('labels.csv', 'row', 'column', *named))

        command.__name__ = build.__name__
        command.__doc__ = build.__doc__
        return case('tables', each)(command)

    return register


def write(path, data):
    "Rows, text or bytes into a file."
    if isinstance(data, list):
        data = as_text(data)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


# ---------------------------------------------------------------- the file

CODES = {
    'bom': 'utf-8-sig',
    'utf-16': 'utf-16',
    'utf-16 without bom': 'utf-16-le',
    'latin-1': 'latin-1',
    'ebcdic': 'cp500',
    'utf-7': 'utf-7',
}


@table(24, CODES)
def encoding(rows, code):
    "Labels in another encoding; a patient has an umlaut."
    return as_text([*rows[:-1], [rows[-1][0], rows[-1][1], 'Jürgen', rows[-1][3]]]).encode(code)


STRAY = {'one quote': '"', 'in a cell': 'a"b', 'before': '"a"b', 'single': "'", 'many': '"' * 1001}


@table(None, STRAY)
def stray_quote(rows, quote):
    "A quote that is never closed, in the patient of the fifth row: the following rows are not lost."
    lines = as_text(rows).splitlines()
    lines[5] = lines[5].replace(rows[5][2], quote)
    return '\n'.join(lines)


@table(None)
def quote_that_swallows(rows):
    "A quote in one row that is closed in another: the rows between are one cell."
    lines = as_text(rows).splitlines()
    lines[5] = lines[5].replace(rows[5][2], '"' + rows[5][2])
    lines[12] = lines[12].replace(rows[12][2], rows[12][2] + '"')
    return '\n'.join(lines)


@table(
    None,
    {
        'short': ['x'],
        'long': list('abcdefgh'),
        'empty': [],
        'one more in the first row': None,
        'one more in all': 'all',
    },
)
def ragged(rows, row):
    "A row with more or fewer cells than there are columns."
    if row is None:
        return [rows[0], [*rows[1], 'more'], *rows[2:]]
    if row == 'all':
        return [rows[0], *(['more', *r] for r in rows[1:])]
    return [*rows[:6], row, *rows[6:]]


@table(24, {'crlf': '\r\n', 'cr': '\r', 'mixed': None, 'blank lines': '\n\n'})
def line_ends(rows, end):
    "Lines that end as on other systems."
    lines = as_text(rows).splitlines()
    return end.join(lines) if end else ''.join(t + ('\r\n' if i % 2 else '\n') for i, t in enumerate(lines))


@table(24, {'semicolon': ';', 'tab': '\t', 'bar': '|', 'space': ' '})
def delimiter(rows, sign):
    "Other separators."
    return '\n'.join(sign.join(r) for r in rows)


BYTES = {
    'empty': b'',
    'nul': b'image,grade\n\0\0,1\n',
    'only a header': b'image,grade,patient\n',
    'blank': b'\n\n\n',
    'zeros': bytes(5000),
    'zip': b'PK\3\4' + bytes(99),
    'sheet': b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1' + bytes(600),
    'html': b'<html><table><tr><td>image',
    'json': b'[{"image": "a"}]',
    'bom': b'\xef\xbb\xbf',
    'half a letter': b'image,grade\na\xc3,1\n',
    'commas': b',,,\n,,,\n',
    'quotes': b'"""""',
}


@table(None, BYTES)
def other_bytes(rows, data):
    "A labels file that contains something else."
    return data


@table(None)
def nul_in_a_cell(rows):
    "A NUL byte in the name of an image."
    return as_text(rows).encode().replace(rows[3][0].encode(), rows[3][0].encode() + b'\0')


@table(None)
def a_hundred_thousand_columns(rows):
    "A table with more columns than rows."
    return as_text(rows[:1]).strip() + ''.join(f',c{i}' for i in range(100_000)) + '\n' + as_text(rows[1:])


@table(None)
def a_huge_cell(rows):
    "A cell of 10 MB."
    return [*rows[:-1], [rows[-1][0], rows[-1][1], 'x' * 10_000_000, rows[-1][3]]]


@table(24, {'digits': '9' * 32_000, 'a negative number': '-' + '9' * 32_000, 'zeros': '0' * 32_000})
def cells_of_32000_characters(rows, cell):
    "Patients whose names have as many characters as a cell can have, nearly numbers."
    return [rows[0], *([name, grade, f'{cell}x{patient}', eye] for name, grade, patient, eye in rows[1:])]


@table(None, {'patient': (2, '9' * 200_000 + 'x'), 'header': (None, 'h' * 100_000), 'grade': (1, '-' + '9' * 200_000)})
def a_cell_of_200000_characters(rows, what):
    "A cell of a table with more characters than any cell can have: it took a minute."
    column, cell = what
    if column is None:
        return [[*rows[0], cell], *([*r, ''] for r in rows[1:])]
    return [*rows[:-1], [cell if i == column else c for i, c in enumerate(rows[-1])]]


@case('tables', {k: k for k in ('fifo', 'folder', 'loop', 'dangling', 'zero', 'full', 'mem', 'socket')})
def labels_that_are_no_file(at, what):
    "labels.csv is a pipe, a folder, a link or a device."
    at.copy_fundus()
    path = at.data / 'labels.csv'
    path.unlink()
    if what == 'fifo':
        os.mkfifo(path)
    elif what == 'folder':
        path.mkdir()
    elif what == 'socket':
        os.mknod(path, 0o140644)
    else:
        path.symlink_to(
            {'loop': 'labels.csv', 'dangling': 'nowhere.csv', 'mem': '/proc/self/mem'}.get(what, f'/dev/{what}')
        )
    return at.train(*DR, named=('labels.csv', 'images'))


@case('tables', {k: k for k in ('missing', 'fifo', 'folder', 'zero', 'image', 'empty')})
def labels_argument(at, what):
    "--labels that does not name a CSV file."
    at.copy_fundus()
    path = at.root / 'my labels.csv'
    if what == 'fifo':
        os.mkfifo(path)
    if what == 'folder':
        path.mkdir()
    if what == 'zero':
        path.symlink_to('/dev/zero')
    if what == 'image':
        shutil.copy(at.flower, path)
    return at.train(*DR, '--labels', '' if what == 'empty' else path, named=('labels',))


# ---------------------------------------------------------------- images

NAMED = {
    'missing': 'nowhere.jpg',
    'above': '../../home/x.jpg',
    'root': '/',
    'empty': '',
    'space': ' ',
    'dot': '.',
    'folder': 'images',
    'formula': '=HYPERLINK("x")',
    'nan': 'NaN',
    'url': 'https://example.org/x.jpg',
    'number': '17',
    'star': '*',
    'null': '\\N',
    'long': 'x' * 5000,
}


@table(24, NAMED, named=('row', 'rows'))
def image_named(rows, name):
    "A row with a name that is not an image of the folder."
    return [*rows, [name, '1', 'p', 'left']]


@table(25)
def absolute_name(rows):
    "A row with the full path of a file that is not an image: it is listed with the reason."
    return [*rows, ['/etc/passwd', '1', 'p', 'left']]


@table(24)
def without_suffix(rows):
    "Names without suffix, as in many competitions."
    return [rows[0], *([r[0].removesuffix('.jpg'), *r[1:]] for r in rows[1:])]


@table(24)
def with_backslashes(rows):
    "Paths as Windows writes them."
    return [rows[0], *([r[0].replace('/', '\\'), *r[1:]] for r in rows[1:])]


@table(None, {'label': 1, 'patient': 2, 'nothing': 0}, named=('twice', 'two'))
def image_twice(rows, column):
    "An image in two rows that differ in one column: a patient must not be lost silently."
    again = list(rows[3])
    if column:
        again[column] = '4' if column == 1 else 'another'
    return [*rows, again]


@table(None, named=('split', 'two'))
def image_in_two_splits(rows):
    "An image in two rows that name two splits."
    return [
        [*rows[0], 'split'],
        *([*r, 'valid' if i % 4 == 0 else 'train'] for i, r in enumerate(rows[1:])),
        [*rows[1], 'train'],
    ]


@table(24)
def absolute_paths(rows):
    "Images with paths of another machine."
    return [rows[0], *([f'/data/fundus_set/{r[0]}', *r[1:]] for r in rows[1:])]


# ---------------------------------------------------------------- labels

LABELS = {
    'text': 'bolt;red',
    'empty': '',
    'space': ' ',
    'fraction': '1.5',
    'negative': '-1',
    'nan': 'nan',
    'infinite': 'inf',
    'large': '1e308',
    'bool': 'True',
    'formula': '=1',
    'zero-led': '007',
    'wide digit': '１',
    'newline': '1\n2',
    'hex': '0x1',
    'underscore': '0_1',
    'five': '5',
    'sign': '+1',
}


@table(24, LABELS, named=('grade', 'row', 'label'))
def one_label(rows, label):
    "One grade is something else."
    return [*rows[:-1], [rows[-1][0], label, *rows[-1][2:]]]


@table(
    24,
    {'floats': '{}.0', 'spaces': ' {} ', 'underscore': '0_{}', 'words': 'grade {}', 'quoted': "'{}'"},
    named=('grade',),
)
def all_labels(rows, form):
    "All grades in another form."
    return [rows[0], *([r[0], form.format(r[1]), *r[2:]] for r in rows[1:])]


@table(
    None,
    {
        'one class': ('0',),
        'one image of a class': ('0',) * 23 + ('4',),
        'none': ('',),
        'two images of a class': ('0',) * 22 + ('4', '4'),
    },
    named=('class', 'no', 'referable'),
)
def classes(rows, labels):
    "Too few different grades."
    return [rows[0], *([r[0], labels[min(i, len(labels) - 1)], *r[2:]] for i, r in enumerate(rows[1:]))]


@case(
    'tables',
    {
        'numbers': '{}',
        'floats': '{}.0',
        'semicolon': 'bolt;red {}',
        'numbers and names': None,
        'formula': '={}',
        'percent': '{}%',
    },
)
def flower_labels(at, form):
    "Flowers whose classes are numbers, or words with odd signs."
    at.copy_flowers()
    files = sorted(p.relative_to(at.data).as_posix() for p in at.data.rglob('*.jpg'))
    labels = [form.format(i % 2) if form else ('1', 'rose')[i % 2] for i in range(len(files))]
    write(at.data / 'labels.csv', [['image', 'label'], *map(list, zip(files, labels))])
    return at.train('--labels', at.data / 'labels.csv', images=18, named=('labels.csv', 'class'))


@case('tables')
def one_image_a_class(at):
    "Every class has one image."
    at.copy_flowers()
    files = sorted(p.relative_to(at.data).as_posix() for p in at.data.rglob('*.jpg'))
    write(at.data / 'labels.csv', [['image', 'label'], *([f, f'class {i}'] for i, f in enumerate(files))])
    return at.train('--labels', at.data / 'labels.csv', named=('class',))


# ---------------------------------------------------------------- splits

SPLITS = {
    'all test': ('test',),
    'all train': ('train',),
    'all valid': ('valid',),
    'unknown': ('train', 'holdout'),
    'some': ('train', '', 'valid'),
    'train and test': ('train', 'test'),
    'numbers': ('0', '1'),
    'case': ('Train', 'VALID'),
    'spaces': (' train', 'valid '),
}


@table(None, SPLITS, words=(*DR, '--allow-leaks'), named=('split', 'valid', 'train'))
def splits(rows, names):
    "A column `split` that cannot be used, or only partly."
    return [[*rows[0], 'split'], *([*r, names[i % len(names)]] for i, r in enumerate(rows[1:]))]
