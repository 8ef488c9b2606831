"Test CSV files: a round trip without formulas, and an error that names the line if a file cannot be read."

import csv
import io
import os
import socket
import time

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_transfer.metrics.groups import group_key
from dr_transfer.utils.csvfile import (
    MAX_CELL,
    MAX_COLUMNS,
    CsvError,
    csv_text,
    escape_cell,
    known_columns,
    plain_name,
    plain_number,
    read_csv,
    text_errors,
    unescape_cell,
    write_csv,
)

# Cells that are likely to go wrong, and any text that a file name or a class name can be
odd = st.sampled_from(
    [
        '=1+1',
        '+1',
        '-1',
        '-x',
        '@SUM(A1)',
        '\t',
        '\r',
        "'=x",
        "''=x",
        "'",
        '"',
        '""',
        ',',
        ';',
        'a,b\nc,d',
        'a\r\nb',
        '\n',
        ' x ',
        '\ufeffx',
        'R\udcf6schen.png',
        '眼底',
        '0_1',
        'nan',
        'None',
        'x"y',
        'x"',
        '1,5;2',
    ]
)
text = st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=8)
cell = st.one_of(odd, text, st.lists(odd, max_size=3).map(''.join)).filter(bool)
name = cell.filter(lambda s: s.strip())


@st.composite
def tables(draw):
    names = draw(st.lists(name, min_size=1, max_size=4, unique_by=str.strip))
    rows = draw(st.lists(st.tuples(*[st.one_of(st.none(), cell)] * len(names)), min_size=1, max_size=5))
    return pd.DataFrame(rows, columns=names, dtype=object)


@settings(max_examples=400, deadline=None)
@given(table=tables())
def test_written_tables_are_read_back(tmp_path_factory, table):
    file = tmp_path_factory.mktemp('csv') / 't.csv'
    write_csv(table, file)
    back = read_csv(file)
    assert list(back.columns) == list(table.columns)
    assert back.to_numpy().tolist() == table.where(table.notna(), None).to_numpy().tolist()


@settings(max_examples=300, deadline=None)
@given(text=cell)
def test_no_cell_is_a_formula_and_the_original_is_read_back(text):
    escaped = escape_cell(text)
    assert unescape_cell(escaped) == text
    if escaped[0] in '=+-@\t\r':
        assert plain_number(escaped) == float(text)  # a number only


@settings(max_examples=200, deadline=None)
@given(table=tables())
def test_other_readers_read_the_same_cells(table):
    "The csv module of Python, with its defaults, reads as many rows and cells."
    rows = list(csv.reader(io.StringIO(csv_text(table), newline='')))
    assert [len(r) for r in rows] == [table.shape[1]] * (len(table) + 1)
    assert [[unescape_cell(c) or None for c in r] for r in rows[1:]] == table.where(
        table.notna(), None
    ).to_numpy().tolist()


def test_numbers_stay_numbers(tmp_path):
    t = pd.DataFrame(
        {'p_a': [-0.1, 1 / 3, float('nan')], 'n': [1, -2, 3], 'ok': [True, False, None], '=x': ['-3', '=2', '-1e5']}
    )
    write_csv(t, tmp_path / 't.csv')
    back = pd.read_csv(tmp_path / 't.csv')
    assert back.p_a.tolist()[:2] == [-0.1, 1 / 3]
    assert back.n.tolist() == [1, -2, 3]
    assert list(back.columns)[3] == "'=x"
    assert back["'=x"].tolist() == ['-3', "'=2", '-1e5']
    write_csv(t.set_index('n'), tmp_path / 'i.csv', index=True)
    result = read_csv(tmp_path / 'i.csv').n.tolist()
    assert result == ['1', '-2', '3']


def test_file_names_that_are_not_utf8(tmp_path, capsysbinary):
    t_csv = tmp_path / 't.csv'
    t = pd.DataFrame({'image': [os.fsdecode(b'R\xf6schen.png')]})
    write_csv(t, t_csv)
    assert t_csv.read_bytes() == b'image\nR\xf6schen.png\n'
    assert read_csv(t_csv).image[0] == t.image[0]
    assert text_errors(t.image) == [0]


def test_what_cannot_be_written():
    for bad in ('a\0b', '\ud800'):
        with pytest.raises(CsvError):
            write_csv(pd.DataFrame({'x': [bad]}), io.StringIO())


# ---------------------------------------------------------------- reading


def read(tmp_path, text, encoding='utf-8'):
    (tmp_path / 't.csv').write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return read_csv(tmp_path / 't.csv').to_dict('list')


TWO = {'image': ['1.png', '2.png'], 'label': ['a b', 'ä']}


@pytest.mark.parametrize('sep', [',', ';', '\t'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_separators_encodings_and_line_ends(tmp_path, sep, encoding, end):
    assert read(tmp_path, end.join([f'image{sep}label', f'1.png{sep} a b', '', f'2.png{sep}"ä"']), encoding) == TWO


@pytest.mark.parametrize(
    'text,found',
    [
        ('image,label\n1,"a;b"\n', {'image': ['1'], 'label': ['a;b']}),
        ('image;label\n1;0,5\n', {'image': ['1'], 'label': ['0,5']}),
        ('image\n1\n""\n2\n', {'image': ['1', None, '2']}),
        ('image,label,\n1,a,\n2,b,\n', {'image': ['1', '2'], 'label': ['a', 'b']}),
        ('image,label\n1,a,,\n2,b\n', {'image': ['1', '2'], 'label': ['a', 'b']}),
        (',image\n0,a\n1,b\n', {'image': ['a', 'b']}),
        (',image\n7,a\n9,b\n', {'column 1': ['7', '9'], 'image': ['a', 'b']}),
        ('image,label\n', {'image': [], 'label': []}),
        ('image,note\n1,"first, then\nsecond"\n', {'image': ['1'], 'note': ['first, then\nsecond']}),
        ('image,label\n1,5" lens\n', {'image': ['1'], 'label': ['5" lens']}),
    ],
)
def test_ambiguous_files_are_read_as_intended(tmp_path, text, found):
    assert read(tmp_path, text) == found


@pytest.mark.parametrize(
    'text,why',
    [
        (
            'image,label\na,b,c\nd,e,f\n',
            'line 2 has 3 fields, and the header has 2',
        ),  # pandas uses the first column as the index
        ('image,label,x\na,b,c\n\nd,e\n', 'line 4 has 2 fields'),
        ('image,label\n"1.png,a\n2.png,b\n3.png",c\n', 'lines 2 to 4 are one row, because of a quote'),
        ('image,label\n' + '0.png,a\n' + '"1.png,a\n' + 'x.png,b\n' * 9 + '2.png",a\n', 'lines 3 to 13 are one row'),
        ('image,label\n1.png,"a\n2.png,b\n', 'line 2 does not end'),
        ('image,label\n1.png,"a" b\n', 'is followed by other text'),
        ('grade, grade\n1,2\n', "two columns with the same name, 'grade' and 'grade'"),
        ('image,x,image \n1,2,3\n', 'two columns with the same name'),
        ('', 'it is empty'),
        ('\n  \n', 'it is empty'),
        ('a,b\n1,\0\n', 'line 2 has NUL characters'),
        ('a,b\n' + f'1,{"x" * (MAX_CELL + 1)}\n', 'line 2 has a cell of'),
        ('a,b\n' + f'1,{"x" * 200_000}\n', 'line 2 has a cell of more than'),
        (','.join(map(str, range(MAX_COLUMNS + 1))) + '\n', 'columns'),
        ('image,label\n1,ä\n'.encode('utf-16-le'), 'NUL characters'),
        (b'\xff\xfea', 'UTF-16'),
    ],
)
def test_errors_name_the_line(tmp_path, text, why):
    with pytest.raises(CsvError, match=why) as e:
        read(tmp_path, text)
    assert 't.csv' in str(e.value)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / 'pipe.csv')
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / 'socket.csv'))
    for name in ('pipe.csv', 'socket.csv', '/dev/zero'):
        with pytest.raises(CsvError, match='not a regular file'):
            read_csv(tmp_path / name)
    server.close()
    with pytest.raises(CsvError, match='is a folder'):
        read_csv(tmp_path)
    with pytest.raises(CsvError, match='there is no labels file'):
        read_csv(tmp_path / 'none.csv')
    (tmp_path / 'link.csv').symlink_to(tmp_path / 'pipe.csv')
    with pytest.raises(CsvError, match='not a regular file'):
        read_csv(tmp_path / 'link.csv')


@pytest.mark.parametrize(
    'limit,value,why',
    [
        ('MAX_CSV_BYTES', 5, 'allowed'),
        ('MAX_ROWS', 1, 'more than 1 rows'),
    ],
)
def test_limits(tmp_path, monkeypatch, limit, value, why):
    monkeypatch.setattr(f'dr_transfer.utils.csvfile.{limit}', value)
    with pytest.raises(CsvError, match=why):
        read(tmp_path, 'a,b\n1,2\n3,4\n')


@pytest.mark.parametrize('text', ['0_1', '1_000', 'nan', 'inf', '-Infinity', '', '1,5', '0x1', '١', '1e'])
def test_texts_that_are_not_numbers(text):
    with pytest.raises(ValueError, match='not a number'):
        plain_number(text)


def test_known_columns():
    t = pd.DataFrame({'Patient-ID': ['a'], 'p_id': ['b'], 'x': ['c']})
    result = known_columns(t, ('patient_id', 'pid'))
    assert result == ['Patient-ID', 'p_id']
    assert known_columns(t, ('group',)) == []
    assert known_columns(t.assign(**{'Patient-ID': None}), ('patient_id', 'pid')) == [
        'p_id'
    ]  # one without content is not preferred
    assert known_columns(t.assign(PID='d'), ('patientid', 'pid'))[0] == 'Patient-ID'
    with pytest.raises(CsvError, match="'p_id' and 'PID' both match"):
        known_columns(t.assign(PID='d'), ('pid', 'patientid'))


@pytest.mark.parametrize('columns', [['=1+1', ';'], ['=1+1', ';;0'], ['=1+1', ';;'], ['a', '\t;x;'], ['"', ';";']])
def test_separators_within_quotes_do_not_divide(tmp_path, columns):
    write_csv(pd.DataFrame([['x', ';0,']], columns=columns), tmp_path / 't.csv')
    t = read_csv(tmp_path / 't.csv')
    assert list(t) == columns
    assert t.values.tolist() == [['x', ';0,']]


LONGEST = MAX_CELL - 2  # with a sign and a letter
LONG = {
    'digits': '9' * LONGEST + 'x',
    'a negative number': '-' + '9' * LONGEST + 'x',
    'zeros': '0' * LONGEST + 'x',
    'decimals': '=.' + '9' * LONGEST,
    'an exponent': '+1e' + '9' * (LONGEST - 2) + 'x',
    'quotes': "'" * LONGEST,
    'spaces': ' ' * LONGEST + 'x',
    'letters': 'n' * LONGEST,
}


@pytest.mark.parametrize('cell', LONG.values(), ids=LONG)
def test_the_longest_cell_costs_next_to_nothing(tmp_path, cell):
    """A pattern that tries every division of the digits took a minute for one cell;
    all of this takes a tenth of a second
    """
    began = time.process_time()
    assert unescape_cell(escape_cell(cell)) == cell
    with pytest.raises(ValueError, match='not a number'):
        plain_number(cell)
    assert group_key(cell)
    assert plain_name(cell) is not None
    write_csv(pd.DataFrame({'image': [cell], cell: ['x']}), tmp_path / 'long.csv')
    t = read_csv(tmp_path / 'long.csv')
    assert t['image'].tolist() == [cell]
    assert t.shape == (1, 2)
    assert time.process_time() - began < 5


@pytest.mark.parametrize('n', [MAX_CELL + 1, 100_000, 200_000])
@pytest.mark.parametrize('text', ['{},b\n1,2\n', 'a,{}\n1,2\n', 'a,b\n{},2\n', 'a,b\n1,2\n1,"{}\n'])
def test_longer_cells_are_errors_in_the_header_too(tmp_path, text, n):
    with pytest.raises(CsvError, match=r'line [123] has a cell of more than 32767|that begins with a quote'):
        read(tmp_path, text.format('x' * n))
