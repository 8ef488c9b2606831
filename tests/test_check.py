"Test `dr_transfer check`: the drift test, image statistics, the reference of a run, and the verdict on a site."

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import cli, content, error_line, good, save_changed, tool
from PIL import Image
from scipy import stats

from dr_transfer.data.acquisition import changed_images
from dr_transfer.data.image_statistics import STATISTIC_WORDS, image_statistics
from dr_transfer.data.tasks import get_task
from dr_transfer.evaluation.site_check import _VERDICTS, Verdict, _verdict
from dr_transfer.inference.run import read_reference, read_validation
from dr_transfer.inference.saved_model import describe_features, load_model
from dr_transfer.metrics.drift import _holm, drift_table, drift_words
from dr_transfer.synthetic.flowers import make_flowers
from dr_transfer.synthetic.fundus import draw_fundus, make_dr

pytestmark = pytest.mark.usefixtures('with_shared_cache')
FAST = ('--arch', 'test_resnet', '--weights', 'random', '--size', '48', '--plan', 'head', '--runtime', 'plain')
LIKE, DIFFERENT, TOO_DIFFERENT = _VERDICTS


@pytest.fixture(scope='module')
def sites(tmp_path_factory, shared_cache):
    "A trained run, and images of other sites."
    root = tmp_path_factory.mktemp('sites')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('DR_TRANSFER_CACHE', str(shared_cache))
        make_dr(root / 'home', n=240, size=48, seed=0)
        good('train', root / 'home', '--task', 'dr', *FAST, '--out', root / 'run')
    make_dr(root / 'same', n=60, size=48, seed=1)
    make_flowers(root / 'flowers', n=12, size=48)
    images = sorted((root / 'same' / 'images').iterdir())
    save_changed(images, 'darker', root / 'darker')
    return root


def checked(sites, *words, code=0, run='run'):
    "The output of a check that ends with a code; its page is not kept."
    page = sites / 'page.html'
    result = cli('check', sites / run, *words, '--out', page, '--resamples', '100', '--overwrite')
    assert result.code == code, result.err
    assert f'page: {page}' in result.out
    return result.out


# ---------------------------------------------------------------- the command


def test_new_patients_of_the_same_site(sites):
    out = checked(sites, sites / 'same')
    assert "patients: column 'patient' of labels.csv, 30 groups" in out
    assert 'differences from the validation images:\n  none was found' in out
    assert out.splitlines()[-3] == f'verdict: {LIKE}'
    assert 'images: 60, of which 0 cannot be read' in out


def test_a_darker_camera(sites):
    out = checked(sites, sites / 'darker')
    assert '\n  darker by ' in out
    assert f'verdict: {DIFFERENT}' in out
    page = (sites / 'page.html').read_text()
    assert '<li>darker by ' in page
    assert 'Different: evaluate on labelled images or recalibrate before use. Why:' in page
    t = pd.read_csv(sites / 'page_predictions.csv')
    assert {'image', 'p_referable', 'unlike', 'light', 'feature_1', 'error'} <= set(t)
    assert len(t) == 60


def test_another_kind_of_image_ends_with_3(sites):
    out = checked(sites, sites / 'flowers', code=3)
    assert f'verdict: {TOO_DIFFERENT}' in out
    assert 'do not rely on them' in out
    page = (sites / 'page.html').read_text()
    assert page.count('<img') == 2  # differences, and the most unlike images
    assert str(sites) not in page


def test_a_site_of_three_images(sites):
    files = sorted((sites / 'same' / 'images').iterdir())[:3]
    out = checked(sites, *files)
    assert f'verdict: {LIKE}, as far as 3 images can show (give 30 or more)' in out
    out = checked(sites, files[0])
    assert '(no interval: too few)' in out


def test_images_that_cannot_be_read(sites, tmp_path):
    shutil.copytree(sites / 'darker', tmp_path / 'new')
    (tmp_path / 'new' / 'bad.png').write_text('text')
    out = checked(sites, tmp_path / 'new')
    assert 'images: 61, of which 1 cannot be read' in out
    assert 'bad.png: not an image' in out
    assert '<td>not an image</td>' in (sites / 'page.html').read_text()
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none' / 'bad.png').write_text('text')
    line = error_line('check', sites / 'run', tmp_path / 'none', '--out', tmp_path / 'x.html')
    assert 'none of the 1 images can be used' in line
    assert not (tmp_path / 'x.html').exists()


def test_an_earlier_run_without_a_reference(sites, tmp_path):
    shutil.copytree(sites / 'run', sites / 'earlier')
    (sites / 'earlier' / 'reference.csv').unlink()
    out = checked(sites, sites / 'darker', run='earlier')
    assert 'not compared: image statistics and features: the run has no reference.csv; train the model again' in out
    assert 'unlike the training images (distance 1 or more)' in out
    assert 'metrics to expect:' in out
    assert 'Not compared: image statistics' in (sites / 'page.html').read_text()
    (sites / 'earlier' / 'predictions.csv').unlink()
    assert 'predictions.csv' in checked(sites, sites / 'darker', run='earlier')
    out = checked(sites, sites / 'same', run='run/model')
    assert f'verdict: {LIKE}, as far as it could be compared' in out


def write_darker_site(folder, **images):
    "A labelled folder as of a darker camera"
    make_dr(folder, size=48, **images)
    files = sorted((folder / 'images').iterdir())
    for file, image in zip(files, changed_images(files, 'darker')):
        image.read().save(file)


def test_later_images_of_a_site_after_recalibration(sites):
    "They are compared with the images of the recalibration, not with those of the training site."
    write_darker_site(sites / 'local', n=160, seed=5)
    write_darker_site(sites / 'later', n=60, seed=6)
    words = ('--sensitivity', '0.8', '--confidence', '0.8', '--out', sites / 'local_run')
    good('recalibrate', sites / 'run', sites / 'local', *words)
    reference = read_reference(sites / 'local_run')
    assert len(reference) == 160
    assert set(reference) == set(read_reference(sites / 'run'))
    assert f'verdict: {DIFFERENT}' in checked(sites, sites / 'later')
    out = checked(sites, sites / 'later', run='local_run')
    assert 'verdict: like the site that the model was made for\n' in out
    assert 'darker by' not in out
    assert '\n  brighter by ' in checked(sites, sites / 'same', run='local_run')


def test_an_adapted_run_says_how_to_get_a_reference(sites):
    write_darker_site(sites / 'unlabelled', n=60, seed=7)
    good('adapt', sites / 'run', sites / 'unlabelled', '--out', sites / 'adapted_run')
    out = checked(sites, sites / 'unlabelled', run='adapted_run')
    assert 'the run has no reference.csv; recalibrate the run on labelled images' in out


def test_a_model_of_0_1_0_cannot_be_compared(sites, tmp_path):
    folder = Path(__file__).parent / 'model_0_1_0'
    line = error_line('check', folder, sites / 'darker', '--out', tmp_path / 'x.html')
    assert 'nothing can be compared with the training site' in line
    assert 'train the model again with this version' in line


def test_names_that_cannot_be_written(sites, tmp_path, monkeypatch):
    before = content(sites / 'run')
    line = error_line('check', sites / 'run', sites / 'darker', '--out', sites / 'run' / 'x.html')
    assert 'choose a folder outside it' in line
    line = error_line('check', sites / 'run', sites / 'darker', '--out', sites / 'darker' / 'x.html')
    assert 'choose a folder outside it' in line
    assert 'give a name such as' in error_line('check', sites / 'run', sites / 'darker', '--out', tmp_path / 'x.txt')
    (tmp_path / 'x.html').write_text('mine')
    assert 'exists already' in error_line('check', sites / 'run', sites / 'darker', '--out', tmp_path / 'x.html')
    assert (tmp_path / 'x.html').read_text() == 'mine'
    assert content(sites / 'run') == before
    monkeypatch.chdir(tmp_path)
    good('check', sites / 'run', sites / 'darker', '--resamples', '100')
    written = {p.name for p in tmp_path.glob('*_check*')}
    assert written == {'darker_check.html', 'darker_check_predictions.csv'}


def test_patients_can_be_named_or_not_used(sites, tmp_path):
    same = sites / 'same'
    assert 'patients: none used, as requested' in checked(sites, same, '--patient', 'none')
    line = error_line('check', sites / 'run', same, '--patient', 'who', '--out', tmp_path / 'x.html')
    assert "there is no column 'who'" in line
    file = next((same / 'images').iterdir())
    line = error_line('check', sites / 'run', file, '--patient', 'who', '--out', tmp_path / 'x.html')
    assert 'needs a folder with a CSV file' in line


def test_an_onnx_file_is_an_error(sites, tmp_path):
    line = error_line('check', tmp_path / 'm.onnx', sites / 'darker', '--out', tmp_path / 'x.html')
    assert 'can only predict' in line


# ---------------------------------------------------------------- the reference of a run


def test_the_reference_describes_the_validation_images(sites):
    reference = read_reference(sites / 'run')
    valid = read_validation(sites / 'run')
    assert reference.group.tolist() == valid.group.tolist()
    assert set(reference) == {'group', 'unlike', *STATISTIC_WORDS, *(f'feature_{i}' for i in range(1, 9))}
    images = valid.image.tolist()
    model = load_model(sites / 'run' / 'model', 'plain')
    probs, about = model.described(images)
    np.testing.assert_allclose(reference[about.columns], about, atol=1e-3)  # the same, in one pass with the predictions
    np.testing.assert_array_equal(probs, model.probs(images))
    measured = image_statistics(images, 'fundus')
    assert reference.format.tolist() == measured.format.tolist()
    np.testing.assert_allclose(reference.light, measured.light)


def test_a_changed_reference_is_an_error(sites, tmp_path):
    shutil.copytree(sites / 'run', tmp_path / 'run')
    file = tmp_path / 'run' / 'reference.csv'
    file.write_text(file.read_text().replace('JPEG,0.', 'JPEG,dark', 1))
    line = error_line('check', tmp_path / 'run', sites / 'darker', '--out', tmp_path / 'x.html')
    assert 'reference.csv was changed' in line


def test_features_without_a_distribution():
    t = describe_features(None, np.zeros((3, 5)))
    assert t.columns.tolist() == ['unlike']
    assert t.unlike.isna().all()
    result = len(describe_features(None, np.zeros((0, 0))))
    assert result == 0


# ---------------------------------------------------------------- image statistics


def test_a_change_moves_its_own_statistic(tmp_path):
    images = [tmp_path / f'{i}.png' for i in range(4)]
    for i, image in enumerate(images):
        Image.fromarray(draw_fundus(i % 3, size=256, seed=i)[0]).save(image)

    def value(change, statistic):
        changed = changed_images(images, change) if change else images
        return image_statistics(changed, 'fundus')[statistic].mean()

    assert value('darker', 'light') < value('', 'light') < value('brighter', 'light')
    assert value('warmer', 'red_green') > value('', 'red_green') > value('cooler', 'red_green')
    assert value('warmer', 'blue_green') < value('', 'blue_green') < value('cooler', 'blue_green')
    assert value('flatter', 'contrast') < value('', 'contrast')
    assert value('resampled', 'sharpness') < value('', 'sharpness')
    assert value('noisy', 'noise') > value('', 'noise')
    assert value('vignetted', 'vignetting') < value('', 'vignetting')
    assert image_statistics(changed_images(images, 'darker')).pixels.isna().all()  # not files


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'I;16', '1'])
def test_files_of_other_modes_are_measured(tmp_path, mode):
    levels = np.linspace(0, 255, 64 * 48).reshape(48, 64)
    a = levels.astype(np.uint16) * 257 if mode == 'I;16' else levels.astype(np.uint8)
    im = Image.fromarray(a) if mode in ('L', 'I;16') else Image.fromarray(a).convert(mode)
    im.save(tmp_path / 'a.png')
    (row,) = image_statistics([tmp_path / 'a.png']).to_dict('records')
    assert row['pixels'] == 64 * 48
    assert row['format'] == 'PNG'
    assert 0.2 < row['light'] < 0.8


# ---------------------------------------------------------------- drift


def simulated(n, seed, shift=0.0):
    "Two images of each of n patients, with three properties; the first may be shifted."
    rng = np.random.default_rng(seed)
    of_patient = rng.normal(size=(n, 3)).repeat(2, axis=0)
    of_image = rng.normal(size=(2 * n, 3))
    values = of_patient + 0.3 * of_image + [shift, 0, 0]
    t = pd.DataFrame(values, columns=['a', 'b', 'c'])
    return t.assign(group=np.arange(n).repeat(2))


def reported(draws, shift=0.0):
    "Fraction of comparisons of 60 with 40 patients that report a drift."
    pairs = ((simulated(60, 2 * i), simulated(40, 2 * i + 1, shift)) for i in range(draws))
    return np.mean([drift_table(a, b, n=2).p.min() < 0.05 for a, b in pairs])


def test_false_positives_are_rare():
    "5 % or fewer, with patients of two images; 18 of 200 is the most by chance (one-sided, 1 %)."
    limit = stats.binom.ppf(0.99, 200, 0.05) / 200
    assert reported(200) <= limit


def test_a_shift_of_one_standard_deviation_is_found():
    assert reported(40, shift=1.0) > 0.8


def test_p_values_are_those_of_scipy_on_patients():
    a = simulated(40, 0)
    b = simulated(30, 1, 1.0)
    t = drift_table(a, b, n=50)
    means = [s.groupby('group').mean() for s in (a, b)]
    raw = [stats.ks_2samp(means[0][c], means[1][c]).pvalue for c in 'abc']
    np.testing.assert_allclose(t.loc[list('abc'), 'p'], _holm(raw))
    np.testing.assert_allclose(stats.false_discovery_control([raw[0]]), raw[0])
    assert t.index[0] == 'a'
    assert t.loc['a', 'difference low'] < t.difference['a'] < t.loc['a', 'difference high']


def test_holm_is_that_of_the_textbook():
    result = _holm([0.01, 0.02, 0.03, 0.005]).tolist()
    assert result == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert _holm([0.9, 0.8]).tolist() == [1, 1]


def test_columns_without_values_are_not_compared():
    a = pd.DataFrame({'a': [1.0, 2, 3, np.nan], 'b': np.nan, 'only': 1.0})
    t = drift_table(a, pd.DataFrame({'a': [2.0, np.nan], 'b': [1.0, 2.0]}), n=10)
    assert t.index.tolist() == ['a']


def test_a_category_in_words():
    a = pd.DataFrame({'format': ['JPEG'] * 40})
    b = pd.DataFrame({'format': ['PNG'] * 30 + ['JPEG'] * 10})
    result = drift_words(drift_table(a, b, n=10), STATISTIC_WORDS)
    assert result == ['another file format (p < .001)']
    assert drift_words(drift_table(a, a, n=10), STATISTIC_WORDS) == []


# ---------------------------------------------------------------- the verdict


def expected(value, high):
    "Metrics to expect, with an AUC of 0.9 on the validation images."
    rows = [('validation', 'auc', 0.9, 0.85, 0.95), ('difference', 'auc', value, 0.0, high)]
    return pd.DataFrame(rows, columns=['method', 'metric', 'value', 'low', 'high'])


@pytest.mark.parametrize(
    ('unlike', 'high', 'level'),
    [
        (0.5, 0.95, 0),
        (0.5, 0.89, 1),
        (0.5, 0.79, 2),
        (1.2, 0.95, 1),
        (3.0, 0.95, 2),
        (np.nan, np.nan, 0),
    ],
)
def test_verdict(unlike, high, level):
    verdict = _verdict(np.full(9, unlike), None, expected(0.7, high))
    assert verdict.level == level
    assert bool(verdict.reasons) == (level > 0)


def test_a_small_difference_is_none():
    "With many images a small difference is significant."
    rng = np.random.default_rng(0)
    a, b = (pd.DataFrame({'light': rng.normal(m, 1, 4000)}) for m in (0, 0.2))
    drift = drift_table(a, b, n=20)
    assert drift.p.iloc[0] < 0.001
    result = _verdict(np.full(9, 0.5), drift)
    assert result == Verdict(0)


# ---------------------------------------------------------------- the scripts


def test_the_script_that_compares_with_labels(monkeypatch):
    "Features of three groups of numbers: where nothing changes, the estimates are near the truth"
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / 'tools')  # it uses another script
    script = tool('expected')
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 600)
    x = rng.normal(size=(1200, 20)) + y[:, None]
    patients = np.array([f'p{i // 2}' for i in range(1200)], object)
    data = SimpleNamespace(y=y, groups=patients)
    parts = script.Parts(data, x, pd.DataFrame({'light': rng.normal(size=1200)}))
    train, valid, same = (parts.images(rows) for rows in parts.divided(np.arange(1200)))
    assert not set(train.groups) & set(same.groups)
    assert not set(valid.groups) & set(same.groups)
    classes = get_task('dr').target().class_set()
    trained = script.Trained(classes, train, valid, script.CANDIDATES['dr'])
    rows = script.checked(trained, same, {'checked on': 'the same'}, resamples=100)
    t = pd.DataFrame(rows)
    assert t.metric.tolist() == ['accuracy', 'auc']
    result = (t.difference - t.true).abs().max()
    assert result < 0.03
    assert t.verdict.tolist() == ['like the training site'] * 2
    assert set(script.summary(t).index.get_level_values(1)) == {'validation', *script.METHODS}


def test_the_script_that_measures_acquisition(sites):
    t = tool('acquisition').set_statistics(sites / 'same', 'fundus')
    assert set(t.statistic) == set(STATISTIC_WORDS) - {'format'}
    assert (t.images == 60).all()
