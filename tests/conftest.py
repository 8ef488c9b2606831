"What all tests share: where photographs and caches lie, and how many threads torch may take."

import os
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'Agg')  # no test opens a window
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test waits for a model hub

# Two workers that each take all cores are slower than one: they share them. torch reads this when it is imported.
_workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
os.environ['OMP_NUM_THREADS'] = str(max(1, (os.cpu_count() or 1) // _workers))

import pytest  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line('markers', 'photographs: needs the real photographs in DR_TRANSFER_DATA')
    config.addinivalue_line('markers', 'slow: takes more than some seconds')


# The files that take longest, the longest first: one that began last would keep one worker busy while the others wait.
LONGEST = (
    'test_photographs',
    'test_networks_of_the_texts',
    'test_commands',
    'test_cli',
    'test_plans',
    'test_core',
    'test_classifiers',
    'test_backbones',
    'test_ordered',
    'test_bad_input',
    'test_advisor',
    'test_training',
    'test_onnx',
)


def pytest_collection_modifyitems(items):
    "A test that asks for `data_root` is one of photographs, so that `-m 'not photographs'` leaves it out; long files come first."
    for item in items:
        if 'data_root' in getattr(item, 'fixturenames', ()):
            item.add_marker('photographs')
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope='session')
def data_root():
    "Folder with the real photographs, which are not part of the repository."
    root = os.environ.get('DR_TRANSFER_DATA')
    if not root:
        pytest.skip('DR_TRANSFER_DATA is not set: it names the folder with the photographs')
    if not Path(root).is_dir():
        pytest.fail(f'DR_TRANSFER_DATA={root} is not a folder')
    return Path(root)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    "A cache of its own for each test, so that none finds what another computed."
    folder = tmp_path / 'cache'
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(folder))
    return folder
