"""Test tables and records that Hypothesis generates: each image is predicted or listed, or there is an error.

Tables are read in this process; models are loaded in the process of the commands, with limited memory and time.
"""

import csv
import hashlib
import io
import json
import shutil

import pandas as pd
import pytest
from contract import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import ALL_CASES, place
from observe import Command, run
from PIL import Image

RUNTIMES = {'deadline': None, 'derandomize': True, 'suppress_health_check': list(HealthCheck)}
IMAGES = ('a.png', 'b.png', 'sub/c.png', 'd e.png', '=f.png')
HEADERS = (
    'image',
    'grade',
    'patient',
    'label',
    'split',
    'group',
    'name',
    ' image',
    'Image',
    'target',
    'decision',
    'p_no',
    '',
    'eye',
    '=x',
)
CELLS = st.one_of(
    st.sampled_from(
        (*IMAGES, '0', '1', '4', '', ' ', 'nan', 'train', 'valid', 'test', 'p1', 'p2', '"', '=cmd()', "'", '\ufeff')
    ),
    st.text(max_size=8),
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Five images."
    folder = tmp_path_factory.mktemp('images')
    for i, name in enumerate(IMAGES):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (8, 8), (i * 50,) * 3).save(folder / name)
    return folder


@st.composite
def tables(draw):
    "Rows of cells under a header, most of them with images and labels."
    header = draw(st.lists(st.sampled_from(HEADERS), min_size=1, max_size=6))
    if draw(st.booleans()):
        header[:0] = ['image', 'grade']
    rows = draw(st.lists(st.lists(CELLS, min_size=1, max_size=len(header) + 1), max_size=8))
    return [header, *rows]


def written(rows, form) -> bytes:
    "Rows as a CSV in one of several forms."
    out = io.StringIO(newline='')
    csv.writer(out, lineterminator=form['end'], delimiter=form['sign'], quoting=form['quoting']).writerows(rows)
    return out.getvalue().encode(form['code'], errors='replace')


FORMS = st.fixed_dictionaries(
    {
        'end': st.sampled_from(('\n', '\r\n')),
        'sign': st.sampled_from((',', ',', ',', ';', '\t')),
        'quoting': st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
        'code': st.sampled_from(('utf-8', 'utf-8', 'utf-8-sig', 'utf-16', 'latin-1')),
    }
)


def is_one_line(error) -> bool:
    "Does an error read as one line that says something?"
    return bool(str(error).strip()) and 'Traceback' not in str(error)


@settings(max_examples=2000 if ALL_CASES else 150, **RUNTIMES)
@given(rows=tables(), form=FORMS)
def test_a_table_is_read_or_an_error(rows, form, folder, tmp_path_factory):
    from dr_transfer.data.table import label_table, skipped_images

    file = tmp_path_factory.getbasetemp() / 'made up.csv'
    file.write_bytes(written(rows, form))
    try:
        table = label_table(folder, file)
    except ValueError as e:
        assert is_one_line(e)
        return
    assert isinstance(table, pd.DataFrame)
    assert table.image.is_unique
    assert table.label.notna().all()
    known = {str(folder / name) for name in IMAGES}
    assert set(table.image) | set(skipped_images(table).image) <= known
    assert not set(table.image) & set(skipped_images(table).image), 'used and skipped'


@settings(max_examples=2000 if ALL_CASES else 150, **RUNTIMES)
@given(data=st.binary(max_size=300))
def test_any_bytes_as_a_table(data, folder, tmp_path_factory):
    from dr_transfer.data.table import label_table

    file = tmp_path_factory.getbasetemp() / 'any bytes.csv'
    file.write_bytes(b'image,grade\n' + data if len(data) % 2 else data)
    try:
        label_table(folder, file)
    except ValueError as e:
        assert is_one_line(e)


# ---------------------------------------------------------------- records

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def paths(value, so_far=()):
    "The path of each value in a description."
    yield so_far
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*so_far, key))


def changed(about, way, value):
    "A description with another value at one place."
    about = json.loads(json.dumps(about))
    inner = about
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    return about


def test_a_model_with_any_description_is_used_or_an_error(runner, shared, tmp_path_factory):
    about = json.loads((shared / 'flower_run' / 'model' / 'model.json').read_text())
    about.pop('sha256')
    ways = [w for w in paths(about) if w and w[0] not in ('versions', 'licence', 'training', 'tensors_sha256')]

    @settings(max_examples=500 if ALL_CASES else 25, **RUNTIMES)
    @given(way=st.sampled_from(ways), value=JSON)
    def one(way, value):
        at = place(tmp_path_factory.mktemp('record') / 'case', shared)
        folder = shutil.copytree(shared / 'flower_run' / 'model', at.root / 'model')
        new = changed(about, way, value)
        digest = hashlib.sha256(json.dumps(new, sort_keys=True).encode()).hexdigest()
        (folder / 'model.json').write_text(json.dumps({**new, 'sha256': digest}))
        command = Command(['load', folder], call='load', named=('model.json', 'model'))
        outcome = run(runner, command, at)
        complaints = check(outcome, at)
        assert not complaints, f'{way}: {value!r}: {complaints}; {outcome.err[-800:]}'

    one()
