"Test `recalibrate`: a new run whose decision fits another site, and a guarantee that holds in a simulation."

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import cli, content, error_line, good, table
from PIL import Image
from scipy.stats import binomtest

from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import encode_target, get_task
from dr_transfer.evaluation.recalibration import _local_decision, recalibrate, site_words
from dr_transfer.inference.predictions import predict_table
from dr_transfer.inference.saved_model import ImageModel, load_model
from dr_transfer.metrics.calibration import apply_temperature
from dr_transfer.metrics.classes import Classes, Positive
from dr_transfer.metrics.decision import apply_decision
from dr_transfer.metrics.operating_point import OperatingPointError
from dr_transfer.training.record import read_record

pytestmark = pytest.mark.usefixtures('with_shared_cache')
SMALL = ('--arch', 'test_resnet', '--weights', 'random', '--size', '48', '--plan', 'head', '--runtime', 'plain')
OLD_MODEL = Path(__file__).parent / 'model_0_1_0'


def draw(folder, n, seed, classes=('0', '1', '2', '3', '4')):
    "Two noisy images of each of n patients, lighter for higher classes, with labels.csv."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(2 * n):
        k = int(rng.integers(len(classes)))
        light = 90 + 20 * k + rng.normal(0, 25)
        pixels = np.clip(light + rng.normal(0, 40, (24, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(folder / f'{seed}_{i}.png')
        rows.append((f'{seed}_{i}.png', classes[k], f'{seed} p{i // 2}'))
    pd.DataFrame(rows, columns=['image', 'label', 'patient']).to_csv(folder / 'labels.csv', index=False)
    return folder


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return tmp_path_factory.mktemp('sites')


@pytest.fixture(scope='module')
def home_images(root):
    return draw(root / 'home', 60, 0)


@pytest.fixture(scope='module')
def site(root):
    return draw(root / 'site', 50, 1)


@pytest.fixture(scope='module')
def trained(root, home_images, shared_cache):
    good('train', home_images, '--task', 'dr', *SMALL, '--valid', '0.5', '--out', root / 'run')
    return root / 'run'


@pytest.fixture(scope='module')
def made(root, trained, site):
    "The output of a recalibration, and its run."
    before = content(trained)
    printed = good('recalibrate', trained, site, '--out', root / 'new').out
    assert content(trained) == before, 'the old run is never changed'
    return printed, root / 'new'


def targets(folder):
    return encode_target(label_table(folder), get_task('dr').target('referable'))


def test_a_new_run_is_written(made, site, trained):
    printed, new = made
    assert sorted(p.name for p in new.iterdir()) == [
        '.dr_transfer.json',
        'model',
        'predictions.csv',
        'record.json',
        'reference.csv',
    ]
    record = read_record(new / 'record.json')
    about = record.made_from
    old = load_model(trained / 'model')
    assert (about.command, about.images, about.groups) == ('recalibrate', 100, 50)
    assert about.model == old.card.tensors_sha256
    card = load_model(new / 'model').card
    assert card.made_from == about
    assert card.decision == record.decision
    assert np.isclose(sum(about.prevalence.values()), 1, atol=1e-4)
    assert record.data == read_record(trained / 'record.json').data
    assert record.validation_table['sensitivity']['images'] == card.decision.operating.positives
    point = card.decision.operating
    assert (point.metric, point.minimum, point.confidence) == ('sensitivity', 0.9, 0.9)
    assert card.decision.positive_groups >= 22
    for words in ('temperature: ', 'prevalence among', 'operating point before: ', 'guarantee: with 90% confidence'):
        assert words in printed, words
    assert 'evaluate the new model on images of other patients' in printed


def test_no_path_is_in_the_files(made, root):
    for name in ('record.json', 'model/model.json'):
        assert str(root) not in (made[1] / name).read_text(encoding='utf-8'), name


def test_its_predictions_are_those_of_predict(made, site, tmp_path):
    _, new = made
    good('predict', new, site, '--out', tmp_path / 'p.csv')
    found = table(tmp_path / 'p.csv').set_index('image')
    kept = table(new / 'predictions.csv').set_index('image')
    found = found.loc[kept.index]
    for column in ('prediction', 'decision', 'set'):
        assert found[column].tolist() == kept[column].tolist(), column
    assert np.allclose(found.p_referable, kept.p_referable, atol=1e-6)
    assert (
        (found.p_referable >= read_record(new / 'record.json').decision.operating.threshold)
        .eq(found.decision == 'referable')
        .all()
    )


def test_the_local_images_are_known_to_the_new_model(made, site, home_images, trained, tmp_path):
    _, new = made
    assert 'validated on all of these images' in error_line('evaluate', new, site, '--out', tmp_path / 'r.html')
    report = ('--resamples', '100', '--out', tmp_path / 'r.html')
    printed = good('evaluate', new, site, '--split', 'valid', *report).out
    assert 'excluded' not in printed
    page = (tmp_path / 'r.html').read_text()
    assert 'recalibrate, with 100 images of 50 groups (patients)' in page
    assert '<h2>Prediction sets</h2>' in page
    assert 'all of these images' in error_line('recalibrate', new, site, '--out', tmp_path / 'again')
    assert 'all of these images' in error_line('recalibrate', trained, home_images, '--out', tmp_path / 'again')


def test_the_old_temperature_has_no_effect(trained, site):
    model = load_model(trained / 'model')
    hot = ImageModel(model.model, replace(model.card, decision=replace(model.card.decision, temperature=7.0)))
    t = targets(site)
    a = recalibrate(model, t)
    b = recalibrate(hot, t)
    assert a.model.card.decision == b.model.card.decision
    raw = model.probs(t.image.tolist())
    want = apply_temperature(raw, a.model.card.decision.temperature)
    assert np.allclose(a.table[['p_no', 'p_referable']], want, atol=1e-6)
    assert not np.allclose(b.before.p_referable, a.before.p_referable)


def test_a_recalibrated_run_can_be_recalibrated(made, tmp_path):
    _, new = made
    other = draw(tmp_path / 'other', 50, 2)
    good('recalibrate', new, other, '--specificity', '0.8', '--confidence', '0.95', '--out', tmp_path / 'third')
    card = load_model(tmp_path / 'third' / 'model').card
    assert card.made_from.model == load_model(new / 'model').card.tensors_sha256
    assert (card.decision.operating.metric, card.decision.operating.confidence) == ('specificity', 0.95)
    assert len(load_model(tmp_path / 'third' / 'model').seen) == 120 + 100 + 100
    again = good('recalibrate', tmp_path / 'third', draw(tmp_path / 'fourth', 50, 3), '--out', tmp_path / 'r').out
    assert 'guarantee: with 90% confidence, 80% or more of the images that are not referable' in again, (
        'that of the model'
    )


# ---------------------------------------------------------------- what is refused


def some_labels(site, folder, keep):
    "The same images with fewer labels."
    labels = pd.read_csv(site / 'labels.csv')
    file = folder / 'some.csv'
    labels[keep(labels)].to_csv(file, index=False)
    return file


@pytest.mark.parametrize(
    'keep, words',
    [
        (lambda t: t.index < 20, 'positive patients: a sensitivity of 90% with 90% confidence needs 22 or more'),
        (lambda t: t.index < 3, 'needs 22 or more'),
        (lambda t: t.label < 2, '0 positive patients'),
        (lambda t: t.label >= 2, 'images of 1 class: a temperature needs 50 or more, of two or more classes'),
    ],
    ids=['few', 'three', 'negatives only', 'positives only'],
)
def test_too_few_images_are_an_error_and_nothing_is_written(trained, site, tmp_path, keep, words):
    labels = some_labels(site, tmp_path, keep)
    line = error_line('recalibrate', trained, site, '--labels', labels, '--out', tmp_path / 'new')
    assert words in line
    assert [p.name for p in tmp_path.iterdir() if p.name != 'cache'] == ['some.csv']


def test_too_few_patients_are_told_before_the_images_are_predicted(trained, site, monkeypatch):
    model = load_model(trained / 'model')
    monkeypatch.setattr(ImageModel, 'outputs', lambda *given: pytest.fail('predicted'))
    with pytest.raises(OperatingPointError, match='needs 299 or more'):
        recalibrate(model, targets(site), sensitivity=0.99, confidence=0.95)


@pytest.mark.parametrize(
    'options, words',
    [
        (('--sensitivity', '0.9', '--specificity', '0.9'), 'give only one of the two'),
        (('--confidence', '90'), 'between 0 and 1'),
        (('--sensitivity', '1'), 'between 0 and 1'),
    ],
)
def test_options_that_cannot_be(trained, site, tmp_path, options, words):
    assert words in error_line('recalibrate', trained, site, *options, '--out', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_the_old_run_cannot_be_replaced(trained, site, tmp_path):
    before = content(trained)
    for out in (trained, trained / 'new', site / 'new'):
        assert 'lies in' in error_line('recalibrate', trained, site, '--overwrite', '--out', out)
    assert content(trained) == before
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'file').write_text('x')
    assert 'not created by' in error_line('recalibrate', trained, site, '--overwrite', '--out', tmp_path / 'mine')


def test_an_onnx_file_is_refused(site, tmp_path):
    assert 'an ONNX file can only predict' in error_line('recalibrate', 'a.onnx', site, '--out', tmp_path / 'new')


# ---------------------------------------------------------------- which images are used


def test_known_and_unreadable_images_are_excluded(trained, site, home_images, tmp_path):
    both = tmp_path / 'both'
    shutil.copytree(site, both)
    labels = pd.read_csv(site / 'labels.csv')
    extra = pd.read_csv(home_images / 'labels.csv')[:6]
    for name in extra.image:
        shutil.copy(home_images / name, both / name)
    (both / 'bad.png').write_text('no image')
    bad = pd.DataFrame({'image': ['bad.png'], 'label': [3], 'patient': ['x']})
    pd.concat([labels, extra, bad]).to_csv(both / 'labels.csv', index=False)
    printed = good('recalibrate', trained, both, '--out', tmp_path / 'new').out
    assert '100 images of 50 groups' in printed
    assert 'excluded: 6 images, or near copies of them' in printed
    assert 'excluded: 1 images that cannot be read' in printed
    assert set(table(tmp_path / 'new' / 'predictions.csv').image) == {str(both / n) for n in labels.image}


def test_a_model_folder_has_no_record(trained, site, tmp_path):
    good('recalibrate', trained / 'model', site, '--out', tmp_path / 'new')
    assert not (tmp_path / 'new' / 'record.json').exists()
    shutil.copytree(trained, tmp_path / 'run')
    (tmp_path / 'run' / 'record.json').write_text('{"format": "dr_transfer run 1"}')
    printed = good('recalibrate', tmp_path / 'run', site, '--out', tmp_path / 'newer').out
    assert 'no record.json: ' in printed
    assert content(tmp_path / 'new' / 'model') == content(tmp_path / 'newer' / 'model')


def test_a_model_of_0_1_0(site, tmp_path):
    before = content(OLD_MODEL)
    printed = good('recalibrate', OLD_MODEL, site, '--out', tmp_path / 'new').out
    assert content(OLD_MODEL) == before
    assert 'temperature: 1.574 before' in printed
    assert 'operating point before: referable from 0.355 on' in printed
    model = load_model(tmp_path / 'new' / 'model')
    assert model.classes.positive == Positive('referable', ('2', '3', '4'))
    assert model.classes.are_grades
    assert model.card.decision.sets.ordered
    p = predict_table(model, [str(site / '1_0.png')])
    assert [c for c in p if not c.startswith('p_')] == [
        'image',
        'prediction',
        'grade',
        'decision',
        'set',
        'unlike',
        'error',
    ]
    json.loads((tmp_path / 'new' / 'model' / 'model.json').read_text())


def test_without_a_positive_class_only_the_temperature_is_chosen(tmp_path):
    colours = ('blue', 'green', 'red')
    train = draw(tmp_path / 'train', 30, 5, colours)
    good('train', train, *SMALL, '--out', tmp_path / 'run')
    local = draw(tmp_path / 'local', 30, 6, colours)
    printed = good('recalibrate', tmp_path / 'run', local, '--out', tmp_path / 'new').out
    assert 'no operating point, because no class is positive' in printed
    assert 'prevalence among these images: blue ' in printed
    assert 'guarantee' not in printed
    decision = load_model(tmp_path / 'new' / 'model').card.decision
    assert decision.operating is None
    assert decision.temperature != 1
    line = error_line('recalibrate', tmp_path / 'run', local, '--sensitivity', '0.9', '--out', tmp_path / 'other')
    assert 'this model has none: blue, green, red' in line
    labels = some_labels(local, tmp_path, lambda t: t.index < 3)
    line = error_line('recalibrate', tmp_path / 'run', local, '--labels', labels, '--out', tmp_path / 'other')
    assert 'a temperature needs 50 or more' in line


def test_help_says_what_it_does():
    text = cli('recalibrate', '--help').out
    assert 'Make a trained model fit another site' in text
    assert '--confidence FRACTION' in text


# ---------------------------------------------------------------- does the guarantee hold?

THREE = Classes(('none', 'mild', 'severe'), Positive('referable', ('mild', 'severe')))


def patients(n, rng):
    "Predictions (3n, 3) for three images of each of n patients, whose errors are nearly the same; overconfident."
    y = np.repeat(rng.choice(3, n, p=[0.4, 0.4, 0.2]), 3)
    noise = np.repeat(rng.normal(size=n), 3) * 0.9**0.5 + rng.normal(size=3 * n) * 0.1**0.5
    odds = -3 * (np.arange(3) - (y + 0.9 * noise)[:, None]) ** 2
    p = np.exp(odds - odds.max(1, keepdims=True))
    return y, p / p.sum(1, keepdims=True)


def prediction_rows(y, p):
    t = pd.DataFrame(p, columns=[f'p_{c}' for c in THREE])
    return t.assign(image=np.arange(len(y)), target=np.array(THREE.names)[y], group=np.arange(len(y)) // 3)


def test_the_sensitivity_of_a_recalibrated_model_holds_for_new_patients():
    "With three classes the score depends on the temperature, which is fitted on the same patients."
    rng = np.random.default_rng(0)
    y, p = patients(20_000, rng)
    new = p[y > 0]
    draws, below, delta = 200, 0, 0.1
    for _ in range(draws):
        local = prediction_rows(*patients(90, rng))
        decision = _local_decision(local, THREE, {'sensitivity': 0.9}, delta)
        score = apply_temperature(new, decision.temperature)[:, 1:].sum(1)
        below += (score >= decision.operating.threshold).mean() < 0.9
    assert binomtest(below, draws, delta, alternative='greater').pvalue > 0.01, below
    assert below > 0, 'otherwise more specificity was possible'
    decided = apply_decision(local, THREE, decision)
    assert (decided.decision == 'referable')[decided.target != 'none'].mean() >= 0.9


def test_images_without_a_patient_count_as_one_patient_each(trained, site):
    r = recalibrate(load_model(trained / 'model'), targets(site).assign(group=None))
    assert r.model.card.made_from.groups == 100
    assert site_words(r)[0] == '100 images'
