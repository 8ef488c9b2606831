"Several runs as one: what the mean is, which images calibrate it, what is written, and what is refused."

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import content, error_line, good, parsed
from learners import same_state
from safetensors.torch import load_file, save_file

import dr_transfer as dt
from dr_transfer.commands.ensemble import ensemble as command
from dr_transfer.evaluation.adaptation import adapt_model
from dr_transfer.evaluation.ensemble import average_models, ensemble
from dr_transfer.explain.grad_cam import grad_cam
from dr_transfer.inference.card import ModelError
from dr_transfer.inference.saved_model import ImageModel, write_card
from dr_transfer.inference.score_maps import score_map
from dr_transfer.metrics.calibration import apply_temperature, fit_temperature
from dr_transfer.metrics.decision import table_arrays
from dr_transfer.synthetic.fundus import make_dr
from dr_transfer.training.record import read_record

pytestmark = pytest.mark.usefixtures('with_shared_cache')
OLD_MODEL = Path(__file__).parent / 'model_0_1_0'
FAST = ('--task', 'dr', '--size', '48', '--weights', 'random', '--runtime', 'plain')
SPLIT = ('--valid', '0.5', '--patient', 'none')
RUNS = ('resnet', 'cifarnet', 'tuned')  # of different normalisations, heads and plans


def train(data, run, arch, *options):
    good('train', data, *FAST, '--arch', arch, *options, '--out', run)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "Images, three runs with the same split, one with another split, and images of a new site."
    root = tmp_path_factory.mktemp('ensemble')
    make_dr(root / 'home', n=120, size=48, seed=1)
    make_dr(root / 'new', n=60, size=48, seed=2)
    train(root / 'home', root / 'resnet', 'test_resnet', '--plan', 'head', *SPLIT, '--specificity', '0.7')
    train(root / 'home', root / 'cifarnet', 'cifarnet', '--plan', 'head', '--head', 'dense', *SPLIT)
    train(root / 'home', root / 'tuned', 'test_efficientnet', '--plan', 'top1', '--epochs', '1', *SPLIT)
    train(root / 'home', root / 'other', 'test_resnet', '--plan', 'head', '--seed', '7', *SPLIT)
    return root


@pytest.fixture(scope='module')
def models(site):
    return {name: dt.load_model(site / name / 'model') for name in RUNS}


@pytest.fixture(scope='module')
def made(site):
    return ensemble([site / name for name in RUNS])


def paths(folder):
    return dt.label_table(folder).image.tolist()


# ---------------------------------------------------------------- the mean


@pytest.mark.parametrize('views', [None, 'none', 'quarter_turns'])
def test_predictions_are_the_mean_of_those_of_the_runs(site, models, made, views):
    images = paths(site / 'new')[:12]
    each = [m.probs(images, views) for m in models.values()]
    assert made.model.probs(images, views) == pytest.approx(np.mean(each, 0), abs=1e-6)
    per_view = made.model.probs(images[:3], views, average=False)
    assert per_view == pytest.approx(np.mean([m.probs(images[:3], views, average=False) for m in models.values()], 0))
    assert np.ptp(each, 0).max() > 0.05  # they differ


def test_normalisation_of_each(models):
    assert len({m.card.mean for m in models.values()}) > 1


def test_order_of_the_runs_does_not_matter_and_distances_are_those_of_the_first(site, models):
    images = paths(site / 'new')[:5]
    forward, backward = (average_models(dict(items)) for items in (models.items(), reversed(models.items())))
    for model, name in ((forward, RUNS[0]), (backward, RUNS[-1])):
        probs, unlike = model.outputs(images)
        assert unlike == pytest.approx(models[name].outputs(images)[1])
        assert probs == pytest.approx(forward.probs(images), abs=1e-6)


def test_one_temperature_is_fitted_to_the_mean(models, made):
    images = made.table.image.tolist()
    mean = np.mean([m.probs(images) for m in models.values()], 0)
    y, probs = table_arrays(made.table, made.model.classes)
    temperature = made.model.card.decision.temperature
    assert temperature == pytest.approx(fit_temperature(mean, y), rel=1e-4)
    assert probs == pytest.approx(apply_temperature(mean, temperature), abs=1e-6)


def test_operating_point_is_that_of_the_first_run_unless_given(site, made):
    first = dt.load_model(site / RUNS[0] / 'model').card.decision.operating
    point = made.model.card.decision.operating
    assert (point.metric, point.minimum) == (first.metric, first.minimum) == ('specificity', 0.7)
    given = ensemble([site / name for name in RUNS[:2]], specificity=0.6).model.card.decision.operating
    assert (given.metric, given.minimum) == ('specificity', 0.6)


def test_card_describes_each_network(models, made):
    card = made.model.card
    assert [m.arch for m in card.members] == [m.card.arch for m in models.values()]
    assert [m.tensors_sha256 for m in card.members] == [m.card.tensors_sha256 for m in models.values()]
    assert [c.mean for c in card.networks] == [m.card.mean for m in models.values()]
    assert card.training.plan == 'head, top1'
    assert card.seed == 42
    assert card.training.data.images == 120


# ---------------------------------------------------------------- the new run


@pytest.fixture(scope='module')
def written(site, tmp_path_factory):
    "A run written by the command from copies of the runs, which were deleted afterwards; and what was printed."
    root = tmp_path_factory.mktemp('written')
    runs = [shutil.copytree(site / name, root / name) for name in RUNS]
    before = [content(run) for run in runs]
    printed = good('ensemble', *runs, '--out', root / 'both').out
    assert [content(run) for run in runs] == before
    for run in runs:
        shutil.rmtree(run)
    return root / 'both', printed


def test_a_run_is_written_that_needs_no_other(site, written, made):
    run, printed = written
    assert sorted(p.name for p in run.iterdir() if p.name[0] != '.') == [
        'model',
        'predictions.csv',
        'record.json',
        'reference.csv',
    ]
    assert 'validation images that are common to the runs: 60 of 60' in printed
    assert 'operating point: ' in printed
    assert 'auc' in printed
    loaded = dt.load_model(run / 'model')
    assert same_state(loaded.model.state_dict(), made.model.model.state_dict())
    images = paths(site / 'new')[:5]
    assert np.array_equal(loaded.probs(images), made.model.probs(images))
    assert pd.read_csv(run / 'predictions.csv').p_referable.tolist() == pytest.approx(made.table.p_referable.tolist())


def test_record_has_the_records_of_the_runs_and_no_path_of_this_machine(site, written):
    run, _ = written
    record = read_record(run / 'record.json')
    assert [m.name for m in record.members] == list(RUNS)
    assert [m.record for m in record.members] == [read_record(site / name / 'record.json') for name in RUNS]
    assert record.members[2].record.history
    assert (record.history, record.plan, record.C) == ((), None, None)
    assert record.validation_table['auc']['images'] == 60
    assert record.decision == dt.load_model(run / 'model').card.decision
    for file in ('record.json', 'model/model.json'):
        assert str(site.parent) not in (run / file).read_text()


def test_every_command_works_on_it(site, written, tmp_path):
    run, _ = written
    page = tmp_path / 'report.html'
    good('evaluate', run, site / 'new', '--resamples', '100', '--out', page)
    assert 'ensemble of 3 networks: test_resnet, cifarnet, test_efficientnet' in page.read_text()
    printed = good(
        'evaluate', run, site / 'home', '--split', 'valid', '--resamples', '100', '--out', tmp_path / 'valid.html'
    ).out
    assert 'excluded: 60 images that are not validation images' in printed
    line = error_line('evaluate', run, site / 'home', '--out', tmp_path / 'none.html')
    assert 'trained or validated on all of these images' in line
    printed = good('check', run, site / 'new', '--resamples', '100', '--out', tmp_path / 'check.html').out
    assert 'like the training site' in printed
    good('recalibrate', run, site / 'new', '--specificity', '0.7', '--out', tmp_path / 'local')
    local = dt.load_model(tmp_path / 'local' / 'model')
    assert local.card.made_from.command == 'recalibrate'
    assert [m.arch for m in local.card.members] == ['test_resnet', 'cifarnet', 'test_efficientnet']
    assert [m.name for m in read_record(tmp_path / 'local' / 'record.json').members] == list(RUNS)


def test_manifests_and_features(site, written, tmp_path):
    "Features are those of a single network."
    run, _ = written
    manifest = tmp_path / 'images.csv'
    pd.DataFrame({'image': paths(site / 'new')[:9]}).to_csv(manifest, index=False)
    good('predict', run, manifest, '--out', tmp_path / 'manifest.csv')
    good('predict', run, *paths(site / 'new')[:9], '--out', tmp_path / 'files.csv')
    own, other = (pd.read_csv(tmp_path / name) for name in ('manifest.csv', 'files.csv'))
    assert np.allclose(own.filter(like='p_'), other.filter(like='p_'), atol=1e-6)
    good('predict', run, manifest, '--shard', '1/2', '--out', tmp_path / 'parts')
    message = error_line('features', manifest, '--model', run, '--out', tmp_path / 'f.parquet')
    assert 'needs a single network, and this model is an ensemble of 3' in message


def test_onnx_file_predicts_the_same(site, written, tmp_path):
    pytest.importorskip('onnxscript')
    run, _ = written
    file = tmp_path / 'both.onnx'
    good('export', run, '--out', file)
    images = paths(site / 'new')[:10]
    model, exported = dt.load_model(run / 'model'), dt.OnnxModel(file)
    assert exported.probs(images) == pytest.approx(model.probs(images), abs=1e-4)
    assert exported.outputs(images)[1] == pytest.approx(model.outputs(images)[1], rel=1e-3)
    assert exported.card == model.card


def test_grades_with_heads_of_two_kinds(site, tmp_path):
    for head in ('linear', 'cumulative'):
        options = ('--target', 'grade', '--head', head, '--plan', 'head' if head == 'linear' else 'top1')
        train(site / 'home', tmp_path / head, 'test_resnet', *options, '--epochs', '1', *SPLIT)
    model = ensemble([tmp_path / 'linear', tmp_path / 'cumulative']).model
    parts = [dt.load_model(tmp_path / head / 'model') for head in ('linear', 'cumulative')]
    images = paths(site / 'new')[:9]
    assert model.probs(images) == pytest.approx(np.mean([m.probs(images) for m in parts], 0), abs=1e-6)
    assert model.classes == parts[0].classes
    assert model.card.ordered
    assert len(model.card.decision.cuts) == 4
    assert 'grade' in dt.predict_table(model, images)


# ---------------------------------------------------------------- the images that calibrate it


def test_no_image_that_a_network_was_trained_on(site):
    both = ensemble([site / 'resnet', site / 'other'])
    valid = [set(pd.read_csv(site / name / 'predictions.csv').image) for name in ('resnet', 'other')]
    assert set(both.table.image) == valid[0] & valid[1] != valid[0]
    assert any('--seed' in note for note in both.notes)
    use = both.model.seen_use
    assert len(use) == 120
    assert (use == 2).sum() == len(both.table)
    assert (use == 3).sum() == len(valid[0] ^ valid[1])


def test_runs_without_common_images_are_not_calibrated(site, tmp_path):
    labels = pd.read_csv(site / 'home' / 'labels.csv')
    patient = next(c for c in labels if c in ('patient', 'patient_id'))
    first = labels[patient].isin(labels[patient].unique()[::2])
    for name, valid in (('a', first), ('b', ~first)):
        file = tmp_path / f'{name}.csv'
        labels.assign(split=np.where(valid, 'valid', 'train')).to_csv(file, index=False)
        arch = 'test_resnet' if name == 'a' else 'test_efficientnet'
        train(site / 'home', tmp_path / name, arch, '--plan', 'head', '--labels', file)
    out = tmp_path / 'both'
    printed = good('ensemble', tmp_path / 'a', tmp_path / 'b', '--out', out).out
    assert 'not calibrated: no image is a validation image of all runs' in printed
    assert 'dr_transfer recalibrate' in printed
    assert not (out / 'predictions.csv').exists()
    record = read_record(out / 'record.json')
    decision = dt.load_model(out / 'model').card.decision
    assert record.decision == decision
    assert (decision.temperature, decision.operating, decision.sets) == (1.0, None, None)
    assert (record.validation, len(record.members)) == (None, 2)
    good('predict', out, site / 'new' / 'images', '--out', tmp_path / 'p.csv')
    good('recalibrate', out, site / 'new', '--specificity', '0.7', '--out', tmp_path / 'local')
    assert dt.load_model(tmp_path / 'local' / 'model').card.decision.temperature != 1


def test_models_of_0_1_0_do_not_tell_their_validation_images(site, tmp_path):
    old = dt.load_model(OLD_MODEL)
    image = paths(site / 'new')[0]
    for name, factor in (('a', 1), ('b', 1.5)):
        model = dt.load_model(OLD_MODEL)
        with torch.no_grad():
            model.model[1][-1].weight.mul_(factor)
        dt.save_model(model, tmp_path / name / 'model')
        pd.DataFrame({'image': [image], 'target': ['0'], 'p_0': [1.0]}).to_csv(
            tmp_path / name / 'predictions.csv', index=False
        )
    printed = good('ensemble', tmp_path / 'a', tmp_path / 'b', '--out', tmp_path / 'both').out
    assert 'not calibrated: a was made by dr_transfer 0.1' in printed
    assert 'no record.json' in printed
    model = dt.load_model(tmp_path / 'both' / 'model')
    assert model.classes == old.classes
    assert model.card.decision.cuts is None
    assert not (tmp_path / 'both' / 'record.json').exists()


def test_images_that_cannot_be_read(site, tmp_path):
    runs = [shutil.copytree(site / name, tmp_path / name) for name in RUNS[:2]]
    file = runs[0] / 'predictions.csv'
    t = pd.read_csv(file)
    t.loc[0, 'image'] = 'gone.png'
    t.to_csv(file, index=False)
    assert len(ensemble(runs).table) == len(t) - 1
    t.assign(image=[f'gone/{i}.png' for i in range(len(t))]).to_csv(file, index=False)
    line = error_line('ensemble', *runs, '--out', tmp_path / 'new')
    assert 'none of the 60 validation images of ' in line
    assert 'gone/0.png' in line
    assert 'in the folder where the runs were trained' in line
    file.unlink()
    assert 'no predictions.csv with labels' in error_line('ensemble', *runs, '--out', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


# ---------------------------------------------------------------- bad input


def changed(model, **fields):
    return ImageModel(model.model, replace(model.card, decision=None, **fields))


@pytest.mark.parametrize(
    'fields, words',
    [
        (
            {'classes': ('no', 'yes'), 'positive': None},
            'a and b predict different classes: only a has referable; only b has yes. .*runs of the same target',
        ),
        ({'classes': ('no', 'mild', 'referable')}, 'only b has mild'),
        ({'classes': ('referable', 'no'), 'positive': None}, 'differ in the order of the classes'),
        ({'positive': None, 'ordered': True}, 'positive classes, or in whether classes are grades'),
        ({'task': 'flowers'}, r'the task \(dr and flowers\).*the same --task'),
        ({'target': 'wrinkles'}, 'the same --target'),
        ({'size': 64}, r'the size of the images in pixels \(48 and 64\).*the same --size'),
        ({'reader': 'photo'}, 'how images are read'),
        ({'fit': 'squish'}, 'how images are made square'),
        ({'views': 'none'}, 'the views that predictions are averaged over'),
    ],
)
def test_models_that_differ(models, fields, words):
    first, second = (models[name] for name in RUNS[:2])
    with pytest.raises(ValueError, match=words):
        average_models({'a': first, 'b': changed(second, **fields)})


def test_runs_that_cannot_be_used(site, written, tmp_path):
    one = site / 'resnet'
    local = tmp_path / 'local'
    good('recalibrate', one, site / 'new', '--specificity', '0.7', '--out', local)
    cases = {
        'needs 2 to 50 different runs': [one],
        'a run is given twice': [one, site / 'tuned' / '..' / 'resnet'],
        'are the same model: give each run once': [one, shutil.copytree(one, tmp_path / 'copy')],
        'an ONNX file can only predict': [one, 'messidor.onnx'],
        'is not a run: it has no folder model': [one, site / 'home'],
        'nowhere is not a run': [one, 'nowhere'],
        'made for another site by dr_transfer recalibrate': [local, one],
        'is an ensemble itself: give the runs that it was made from': [one, written[0]],
    }
    (tmp_path / 'empty' / 'model').mkdir(parents=True)
    cases['model.json is missing'] = [one, tmp_path / 'empty']
    cases['resnet/model is not a run: it has no folder model'] = [site / 'tuned', one / 'model']
    for words, runs in cases.items():
        assert words in error_line('ensemble', *runs, '--out', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_places_and_options(site, written, tmp_path):
    runs = [site / name for name in RUNS[:2]]
    before = [content(run) for run in runs]
    for place in (runs[0], runs[1] / 'new'):
        assert 'lies in' in error_line('ensemble', *runs, '--overwrite', '--out', place)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'note.txt').write_text('mine')
    assert 'not created by' in error_line('ensemble', *runs, '--overwrite', '--out', tmp_path / 'mine')
    assert 'exists already' in error_line('ensemble', *runs, '--out', written[0])
    line = error_line('ensemble', *runs, '--sensitivity', '.8', '--specificity', '.8', '--out', tmp_path / 'x')
    assert 'give only one of the two' in line
    assert [content(run) for run in runs] == before
    function, options = parsed('ensemble', 'a', 'b')
    assert function is command
    assert (options['runs'], options['out']) == (['a', 'b'], None)


def test_a_run_without_a_name_is_named_after_the_runs(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [site / name for name in RUNS[:2]]
    assert 'written: resnet_cifarnet_ensemble' in good('ensemble', *runs).out
    line = error_line('ensemble', *runs, '--overwrite')
    assert '--overwrite replaces only what --out names' in line


def test_what_needs_a_single_network(site, made):
    images = paths(site / 'new')
    for call in (
        lambda: grad_cam(made.model, images[0]),
        lambda: score_map(made.model, images[0]),
        lambda: adapt_model(made.model, images),
    ):
        with pytest.raises(ValueError, match='needs a single network, and this model is an ensemble of 3'):
            call()


@pytest.mark.parametrize('change', ['member', 'tensor', 'more', 'arch', 'text'])
def test_a_damaged_folder(written, tmp_path, change):
    run, _ = written
    folder = shutil.copytree(run / 'model', tmp_path / 'model')
    card = dt.load_model(folder).card
    tensors = load_file(folder / 'model.safetensors')
    first = next(name for name in tensors if name.startswith('networks.1.'))
    if change == 'member':
        card = replace(card, members=card.members[:2])
    if change == 'arch':
        card = replace(card, members=(card.members[0], *card.members[:2]))
    if change == 'tensor':
        del tensors[first]
    if change == 'more':
        tensors['networks.9.' + first.removeprefix('networks.1.')] = tensors[first].clone()
    save_file(tensors, folder / 'model.safetensors')
    write_card(card, folder)
    if change == 'text':
        file = folder / 'model.json'
        about = json.loads(file.read_text())
        about['members'][1]['std'][0] = 0.3
        file.write_text(json.dumps(about))
    words = 'was changed' if change == 'text' else "the tensor '"
    with pytest.raises(ModelError, match=words):
        dt.load_model(folder)
