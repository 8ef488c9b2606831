"Test that the rules of contract.py find what they forbid."

import contract
import pytest
from observe import Command, Outcome


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
