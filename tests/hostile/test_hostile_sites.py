"Run all hostile inputs of the kind 'sites' and check the rules."

import pytest
from inputs import cases


@pytest.mark.parametrize('case', cases('sites'), ids=str)
def test_contract(case, keeps_the_contract):
    keeps_the_contract(case)
