"Fixtures of all tests: caches, synthetic sets, a trained run, real images, and the number of torch threads."

import os
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'Agg')  # no test opens a window
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test waits for a model hub

# Two workers that each take all cores are slower than one, so they share the cores. torch reads this at import.
_workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
os.environ['OMP_NUM_THREADS'] = str(max(1, (os.cpu_count() or 1) // _workers))

import pytest  # noqa: E402  (numpy and torch read the environment when they are imported, so it is set first)

pytest.register_assert_rewrite('helpers', 'learners', 'families')

from helpers import FAST, good  # noqa: E402  (as above)

from dr_transfer.synthetic.flowers import make_flowers  # noqa: E402  (as above)
from dr_transfer.synthetic.fundus import make_dr  # noqa: E402  (as above)


def pytest_configure(config):
    config.addinivalue_line('markers', 'photographs: needs the real photographs in DR_TRANSFER_DATA')
    config.addinivalue_line('markers', 'slow: takes more than some seconds')
    config.addinivalue_line('markers', 'fastai: trains or builds learners, so another version of fastai matters')


# The files that take longest, the longest first, because one that starts last would keep a worker busy alone.
LONGEST = (
    'test_photographs',
    'test_networks_of_the_texts',
    'test_commands',
    'test_cli',
    'test_plans',
    'test_core',
    'test_docstrings',
    'test_classifiers',
    'test_backbones',
    'test_ordered',
    'test_bad_input',
    'test_advisor',
    'test_training',
    'test_onnx',
)

# The files that call fastai directly: CI runs them a second time, with its newest version. The command and the advisor
# call it through these functions.
CALL_FASTAI = (
    'test_core',
    'test_training',
    'test_plans',
    'test_data',
    'test_augment',
    'test_average',
    'test_imports',
    'test_light',
    'test_ordered',
    'test_texts',
    'test_explain',
)


def pytest_collection_modifyitems(items):
    "Mark tests that need real images (fixture `data_root`) and tests that call fastai; long files come first."
    for item in items:
        if 'data_root' in getattr(item, 'fixturenames', ()):
            item.add_marker('photographs')
        if item.path.stem in CALL_FASTAI:
            item.add_marker('fastai')
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope='session')
def data_root():
    "Folder with the real images, which are not part of the repository."
    root = os.environ.get('DR_TRANSFER_DATA')
    if not root:
        pytest.skip('DR_TRANSFER_DATA is not set: it names the folder with the real images')
    if not Path(root).is_dir():
        pytest.fail(f'DR_TRANSFER_DATA={root} is not a folder')
    return Path(root)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    "A separate cache for each test, so that no test uses results of another one."
    folder = tmp_path / 'cache'
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(folder))
    return folder


# ---------------------------------------------------------------- for the tests of the command


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    "The folder for sets and models that are made once per session."
    return tmp_path_factory.mktemp('command')


@pytest.fixture(scope='session')
def shared_cache(home):
    "One stored choice of the fastest runtime for all tests, so that repeated runs have the same precision."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('DR_TRANSFER_CACHE', str(home / 'cache'))
        yield home / 'cache'


@pytest.fixture
def with_shared_cache(cache_dir, shared_cache, monkeypatch):
    "The shared cache, for tests that compare their results with runs of the session."
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(shared_cache))


@pytest.fixture(scope='session')
def fundus_data(home):
    "Forty synthetic fundus images of twenty patients, with labels.csv."
    make_dr(home / 'fundus', n=40, size=64, seed=0, workers=1)
    return home / 'fundus'


@pytest.fixture(scope='session')
def flowers(home):
    "Synthetic flowers in three folders of classes."
    make_flowers(home / 'flowers', n=27, size=64, seed=0, classes=('daisy', 'roses', 'tulips'))
    return home / 'flowers'


@pytest.fixture(scope='session')
def weights(home):
    "A weights file of the network that the tests train."
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(5)
    file = home / 'weights of mine.safetensors'
    save_file(timm.create_model('test_resnet').state_dict(), file)
    return file


@pytest.fixture(scope='session')
def output_of_run(home, fundus_data, weights, shared_cache):
    "The output of the training of `run`."
    return good('train', fundus_data, '--task', 'dr', '--weights', weights, *FAST, '--seed', '3', '--out', home / 'run')


@pytest.fixture(scope='session')
def run(home, output_of_run):
    "A trained run, which tests must not change."
    return home / 'run'
