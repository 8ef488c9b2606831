"Run all hostile inputs of the kind 'files' and check the rules."

import pytest
from inputs import cases


@pytest.mark.parametrize('case', cases('files'), ids=str)
def test_contract(case, keeps_the_contract):
    keeps_the_contract(case)
