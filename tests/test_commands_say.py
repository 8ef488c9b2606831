"Test what commands print about patients, classes and results, and that wrong arguments are refused before training."

import shutil

import pandas as pd
import pytest
from helpers import FAST, cli, error_line, good, table
from PIL import Image

from dr_transfer.inference.predictions import predict_table
from dr_transfer.inference.saved_model import load_model

pytestmark = pytest.mark.usefixtures('with_shared_cache')
RANDOM = ('--weights', 'random', '--runtime', 'plain')
TASK = ('--task', 'dr', '--target', 'referable')
NETWORKS = ('--archs', 'test_resnet', '--size', '64', '--plans', 'head', '--epochs', '1', '--resamples', '100')
ONE_NETWORK = (*FAST[:4], *RANDOM)
OF_COMMANDS = {
    'train': (*FAST, *RANDOM),
    'compare': (*NETWORKS, *RANDOM),
    'advise': ONE_NETWORK,
    'cross-validate': (*FAST, *RANDOM, '--folds', '2', '--resamples', '100'),
}


@pytest.fixture(scope='module')
def unusual(fundus_data, tmp_path_factory):
    "The fundus images with the patients in a column whose name is not a usual one."
    folder = tmp_path_factory.mktemp('unusual') / 'data'
    shutil.copytree(fundus_data, folder)
    labels = pd.read_csv(folder / 'labels.csv')
    labels.rename(columns={'patient': 'who'}).to_csv(folder / 'labels.csv', index=False)
    return folder


@pytest.fixture
def never_trained(with_shared_cache, tmp_path, monkeypatch):
    "Fail if anything is trained; the cache is empty, because a stored training would be used again."
    monkeypatch.setenv('DR_TRANSFER_CACHE', str(tmp_path / 'empty cache'))

    def fit(*args, **kwargs):
        raise AssertionError('it was trained')

    for name in ('core', 'evaluation.compare', 'evaluation.cross_validation'):
        monkeypatch.setattr(f'dr_transfer.{name}.fit', fit, raising=False)


def out_of(command, tmp_path):
    suffix = {'train': '', 'compare': '.png', 'advise': '.png'}.get(command, '.html')
    return '--out', tmp_path / f'out{suffix}'


# ---------------------------------------------------------------- patients and classes


@pytest.mark.parametrize('command', OF_COMMANDS)
def test_each_command_takes_and_prints_the_column_of_the_patients(command, unusual, tmp_path):
    words = (*TASK, *OF_COMMANDS[command], *out_of(command, tmp_path))
    asked = good(command, unusual, *words, '--patient', 'who')
    assert asked.out.count("patients: column 'who', 20 groups") == 1
    shown = good(command, unusual, *words, '--patient', 'none', '--overwrite')
    assert "column 'who'" not in shown.out
    assert 'patient' in shown.out.splitlines()[0]


def test_evaluate_takes_the_column_of_the_patients(unusual, run, tmp_path):
    words = ('evaluate', run, unusual, '--allow-leaks', '--out', tmp_path / 'e.html', '--resamples', '100')
    assert "patients: column 'who', 20 groups" in good(*words, '--patient', 'who').out
    assert set(table(tmp_path / 'e_predictions.csv').group) == set(pd.read_csv(unusual / 'labels.csv').who)


@pytest.mark.parametrize('command', ['train', 'compare', 'advise'])
def test_each_command_prints_identical_images_of_two_classes(command, flowers, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(flowers, data)
    first = sorted((data / 'daisy').glob('*.jpg'))[0]
    shutil.copy(first, data / 'roses' / 'copy.jpg')
    out = good(command, data, *OF_COMMANDS[command], *out_of(command, tmp_path)).out
    assert out.count('1 pairs of identical images have different classes') == 1
    assert 'copy.jpg (roses)' in out


def test_train_prints_the_intervals_that_the_record_has(output_of_run, run):
    from dr_transfer.training.record import read_record

    auc = read_record(run / 'record.json').validation_table['auc']
    line = next(line for line in output_of_run.out.splitlines() if line.split()[:1] == ['auc'])
    printed = [float(v) for v in line.split()[1:4]]
    assert printed == pytest.approx([auc[name] for name in ('value', 'low', 'high')], abs=6e-4)
    assert auc['low'] < auc['value'] < auc['high'] or auc['high'] == 1


def test_compare_names_the_files_that_nobody_named(flowers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = good('compare', flowers, *OF_COMMANDS['compare']).out
    made = sorted(p.name for p in tmp_path.iterdir() if p.is_file())
    assert made == ['flowers_comparison.png', 'flowers_comparison_table.csv']
    for name in made:
        assert name in out
    (tmp_path / made[0]).write_bytes(b'mine')
    assert 'flowers_comparison.png' in error_line('compare', flowers, *OF_COMMANDS['compare'])
    assert (tmp_path / made[0]).read_bytes() == b'mine'


# ---------------------------------------------------------------- refused before the work


@pytest.mark.usefixtures('never_trained')
@pytest.mark.parametrize('command', ['train', 'compare', 'cross-validate'])
def test_training_is_noticed(command, flowers, tmp_path):
    result = cli(command, flowers, *OF_COMMANDS[command], *out_of(command, tmp_path))
    assert result.code == 1
    assert 'it was trained' in result.err


@pytest.mark.usefixtures('never_trained')
@pytest.mark.parametrize(
    'command, words, expected',
    [
        ('train', ('--sensitivity', '0.9'), 'positive class'),
        ('train', ('--sensitivity', '2'), '--sensitivity'),
        ('train', ('--seed', str(10**30)), 'seed'),
        ('cross-validate', ('--prevalence', '2'), '--prevalence'),
        ('cross-validate', ('--resamples', '0'), '--resamples'),
        ('compare', ('--metric', 'nope'), 'nope'),
        ('compare', ('--resamples', '0'), '--resamples'),
    ],
)
def test_wrong_arguments_are_refused_before_training(command, words, expected, flowers, tmp_path):
    result = cli(command, flowers, *OF_COMMANDS[command], *words, *out_of(command, tmp_path))
    assert result.code in (1, 2)
    last = result.err.splitlines()[-1]
    assert expected in last
    assert last.startswith('dr_transfer')
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('out')] == []


# ---------------------------------------------------------------- images


def test_advise_reads_an_image_with_damaged_exif(flowers, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(flowers, data)
    file = sorted((data / 'daisy').glob('*.jpg'))[0]
    with Image.open(file) as im:
        im.save(file, exif=b'Exif\0\0II*\0\xff\xff\xff\xff')
    assert "advice: plan 'head'" in good('advise', data, *ONE_NETWORK, *out_of('advise', tmp_path)).out


def test_commands_write_no_formula(run, fundus_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = sorted((fundus_data / 'images').iterdir())[0]
    shutil.copy(image, '=cmd.png')
    printed = good('predict', run, '=cmd.png').out
    good('predict', run, '=cmd.png', '--out', 'p.csv')
    for text in (printed, (tmp_path / 'p.csv').read_text(encoding='utf-8')):
        row = text.splitlines()[1]
        assert row.startswith("'=cmd.png,")


def test_a_generator_of_images_is_read_once(run, fundus_data):
    model = load_model(run / 'model', runtime='plain')
    images = sorted(str(p) for p in (fundus_data / 'images').iterdir())[:3]
    expected = predict_table(model, images)
    pd.testing.assert_frame_equal(predict_table(model, (i for i in images)), expected)
    assert expected.image.tolist() == images
    assert (model.probs(i for i in images) == model.probs(images)).all()
