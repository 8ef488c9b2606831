"Each hostile input of the kind 'files' against the contract."

import pytest
from inputs import cases


@pytest.mark.parametrize('case', cases('files'), ids=str)
def test_contract(case, keeps_the_contract):
    keeps_the_contract(case)
