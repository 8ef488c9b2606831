"Fixtures of the hostile tests: a process that runs the commands, and the models that they use."

import sys
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))

from inputs import judge, make_shared
from observe import Runner


@pytest.fixture(scope='session')
def runner():
    "A process with the library imported, one for each worker."
    runner = Runner()
    yield runner
    runner.close()


@pytest.fixture(scope='session')
def shared(runner, tmp_path_factory):
    "Synthetic sets and trained models, made by the first worker that needs them."
    base = tmp_path_factory.getbasetemp()
    base = base.parent if 'gw' in base.name else base
    folder = base / 'hostile shared'
    with FileLock(base / 'hostile.lock'):
        if not folder.with_suffix('.made').exists():
            make_shared(runner, folder)
            folder.with_suffix('.made').touch()
    return folder


@pytest.fixture
def keeps_the_contract(runner, shared, tmp_path):
    "A check of a case: what it did against the contract is what pytest shows."

    def check(case):
        outcome, complaints = judge(runner, case, tmp_path / 'case', shared)
        if outcome is None:
            pytest.skip(complaints[0])
        if complaints:
            words = ' '.join(map(repr, map(str, outcome.command.words)))
            report = [f'{case}: {case.about}', words, *complaints, f'stderr: {outcome.err[-1500:]!r}']
            pytest.fail('\n'.join(report), pytrace=False)

    return check
