"Test that the checklist has each row once, and that its pages and tests exist."

import ast
import csv
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IDS = [*(f'F{i:02}' for i in range(1, 68)), *(f'U{i}' for i in range(1, 17)), *(f'N{i:02}' for i in range(1, 16))]
with open(ROOT / 'nbs' / 'results' / 'checklist.csv', encoding='utf-8', newline='') as f:
    ROWS = list(csv.DictReader(f))


@cache
def names(file):
    "Return the names of the tests of a file, without importing it."
    return {
        n.name
        for n in ast.walk(ast.parse((ROOT / 'tests' / file).read_text(encoding='utf-8')))
        if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')
    }


def test_every_row_once_and_in_order():
    assert [r['id'] for r in ROWS] == IDS


@pytest.mark.parametrize('row', ROWS, ids=lambda r: r['id'])
def test_named_pages_and_tests_exist(row):
    "An open row has neither."
    assert row['what']
    assert len(row['what']) < 120
    if 'open' in (row['pages'], row['tests']):
        assert row['pages'] == row['tests'] == 'open'
        return
    assert row['pages']
    assert row['tests']
    for page in row['pages'].split():
        assert (ROOT / 'nbs' / page).is_file(), page
    for test in row['tests'].split():
        file, _, name = test.partition('::')
        assert (ROOT / 'tests' / file).is_file(), test
        assert name in names(file), test


@pytest.mark.parametrize(
    'file, function',
    [
        ('test_table.py', 'test_gone'),
        ('test_texts.py', 'Terminal'),
    ],
)
def test_the_check_can_fail(file, function):
    assert function not in names(file)


def test_the_six_mistakes_have_a_test_each():
    numbers = {n.split('_')[2] for n in names('test_mistakes.py') if n.startswith('test_mistake_')}
    assert numbers == set('123456')
    page = (ROOT / 'nbs' / 'studies' / 'checklist.ipynb').read_text(encoding='utf-8')
    assert 'test_mistakes.py' in page


def test_no_row_is_open():
    assert not [r['id'] for r in ROWS if r['tests'] == 'open']
