"Each hostile input of the kind 'images' against the contract."

import pytest
from inputs import cases


@pytest.mark.parametrize('case', cases('images'), ids=str)
def test_contract(case, keeps_the_contract):
    keeps_the_contract(case)
