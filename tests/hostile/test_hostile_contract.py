"Test that the rules of contract.py find what they forbid."

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import contract
import pytest
from observe import Command, Outcome

COUNTED = Path(__file__).resolve().parents[2] / 'nbs' / 'results' / 'hostile.csv'


def outcome(line, *words, **more) -> Outcome:
    "A failed command that printed a line on standard error."
    return Outcome(Command(['train', *words], **more), 1, '', line, 1, 1, 0, False, [], {}, {})


@pytest.mark.parametrize(
    'advice, found',
    [
        ('Add patients, or require less: coverage=0.85', True),
        ("use head='linear'", True),
        ("use head='linear' (--head linear)", False),
        ('data/size=48.jpg cannot be read', False),
        ("'size'=48", False),
    ],
)
def test_advice_for_python_only(advice, found):
    line = f'dr_transfer: error: {advice}'
    assert bool(contract.only_python(outcome(line, 'data/size=48.jpg'))) == found
    assert not contract.only_python(outcome(line, call='load'))


def test_the_culprit_is_required_where_it_is_known():
    line = 'dr_transfer: error: data has a label that is not text'
    assert not contract.bad_error(outcome(line, 'data'))
    assert contract.bad_error(outcome(line, 'data', culprit=('roses', 'labels.csv')))
    assert not contract.bad_error(outcome(line + ', in labels.csv', 'data', culprit=('roses', 'labels.csv')))
    assert not contract.bad_error(outcome(line + r', \udcff', 'data', culprit=('\udcff',)))


def test_the_published_numbers_are_of_these_cases():
    code = 'import collections, inputs, json; print(json.dumps(collections.Counter(c.kind for c in inputs.cases())))'
    env = {**os.environ, 'DR_TRANSFER_HOSTILE': 'all'}  # also the cases that are usually skipped
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=here, capture_output=True, text=True, check=True)
    with open(COUNTED, newline='', encoding='utf-8') as f:
        published = {row.pop('kind'): sum(map(int, row.values())) for row in csv.DictReader(f)}
    assert published == json.loads(done.stdout), 'run python tests/hostile/count.py'
    assert sum(published.values()) >= 300
