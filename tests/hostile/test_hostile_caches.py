"Each hostile input of the kind 'caches' against the contract."

import pytest
from inputs import cases


@pytest.mark.parametrize('case', cases('caches'), ids=str)
def test_contract(case, keeps_the_contract):
    keeps_the_contract(case)
