"""Sources (cameras, sites, hospitals): found, stated everywhere, and left out one at a time."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers import error_line, good
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import dr_transfer as dt
from dr_transfer.data.sources import SourceError, image_sources
from dr_transfer.evaluation.by_source import by_source_words
from dr_transfer.evaluation.cross_validation import cross_validate
from dr_transfer.synthetic.fundus import make_dr
from dr_transfer.training.stored import learner_features

pytestmark = pytest.mark.usefixtures('with_shared_cache')
FAST = ('--task', 'dr', '--size', '48', '--weights', 'random', '--arch', 'test_resnet', '--runtime', 'plain')


@pytest.fixture(scope='module')
def sites(tmp_path_factory):
    "Two hospitals with 40 images each, whose patients have the same names."
    root = tmp_path_factory.mktemp('sites')
    for seed, name in enumerate(('north', 'south')):
        make_dr(root / name, n=80, size=48, seed=seed)
    return root


@pytest.fixture(scope='module')
def cameras(sites, tmp_path_factory):
    "One folder whose labels name the camera."
    labels = pd.read_csv(sites / 'north' / 'labels.csv')
    labels['Camera'] = np.where(labels.patient.str[1:].astype(int) % 2, 'A', 'B')
    file = tmp_path_factory.mktemp('cameras') / 'cameras.csv'
    labels.to_csv(file, index=False)
    return file


def test_folders_side_by_side_are_sources(sites):
    t = dt.label_table([sites / 'north', sites / 'south'])
    assert image_sources(t).value_counts().to_dict() == {'north': 80, 'south': 80}
    assert t.attrs['sources'] == "sources: column 'folder', 2 sources: north (80), south (80)"
    assert t.group.nunique() == 80  # patients of two hospitals are two patients, whatever their names
    assert dt.label_table(t).attrs['sources'] == t.attrs['sources']


def test_folders_of_one_name_or_a_single_one_are_an_error(sites):
    with pytest.raises(ValueError, match="two folders are named 'north'"):
        dt.label_table([sites / 'north', sites / 'north'])
    with pytest.raises(ValueError, match='give two or more'):
        dt.label_table([sites / 'north'])


def test_a_column_of_the_user_is_not_replaced(sites, tmp_path):
    folders = [tmp_path / 'a', tmp_path / 'b']
    for folder in folders:
        make_dr(folder, n=10, size=48)
        file = folder / 'labels.csv'
        labels = pd.read_csv(file)
        labels['folder'] = 'mine'
        labels.to_csv(file, index=False)
    with pytest.raises(ValueError, match="have a column 'folder'"):
        dt.label_table(folders)


def test_column_is_found_named_or_not_used(sites, cameras):
    def line(**how):
        return dt.label_table(sites / 'north', cameras, **how).attrs['sources']

    assert line() == "sources: column 'Camera', 2 sources: A (40), B (40)"
    assert line(source_col='eye').startswith("sources: column 'eye', 2 sources")
    assert line(source_col='none').startswith('no source column found')
    with pytest.raises(ValueError, match="no column 'site'"):
        line(source_col='site')


def test_train_says_and_keeps_the_sources(sites, tmp_path):
    printed = good('train', sites / 'north', sites / 'south', *FAST, '--plan', 'head', '--out', tmp_path / 'run').out
    line = "sources: column 'folder', 2 sources: north (80), south (80)"
    assert line in printed
    assert json.loads((tmp_path / 'run' / 'record.json').read_text())['data']['sources'] == line


def test_output_is_named_after_all_folders_and_outside_of_them(sites, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good('train', sites / 'north', sites / 'south', *FAST, '--plan', 'head')
    assert (tmp_path / 'north_south_run' / 'record.json').is_file()
    error_line('train', sites / 'north', sites / 'south', *FAST, '--out', sites / 'south' / 'run')


def test_cross_validate_by_source_reports_what_is_lost(sites, cameras, tmp_path):
    page = tmp_path / 'r.html'
    recipe = (*FAST, '--plan', 'head', '--folds', '2', '--resamples', '100')
    printed = good('cross-validate', sites / 'north', '--labels', cameras, *recipe, '--by', 'source', '--out', page).out
    assert 'in ordinary cross-validation' in printed
    assert 'by leaving one source out; lost:' in printed
    text = page.read_text()
    assert '<h2>Elsewhere</h2>' in text
    assert 'trained on the other sources' in text
    t = pd.read_csv(tmp_path / 'r_predictions.csv')
    assert (t.fold == t.data_Camera).all()


def test_no_source_to_leave_out_is_an_error_before_training(sites, cameras, tmp_path):
    recipe = (*FAST, '--plan', 'head', '--by', 'source', '--out', tmp_path / 'r.html')
    assert 'no source column found' in error_line('cross-validate', sites / 'north', *recipe)
    labels = pd.read_csv(cameras)
    labels.assign(Camera='A').to_csv(tmp_path / 'one.csv', index=False)
    line = error_line('cross-validate', sites / 'north', '--labels', tmp_path / 'one.csv', *recipe)
    assert "all images have the source 'A'" in line
    assert not (tmp_path / 'r.html').exists()


def test_a_class_of_one_source_only_is_an_error(sites, cameras):
    t = dt.label_table(sites / 'north', cameras)
    t.loc[t.data_Camera == 'B', 'label'] = '0'
    with pytest.raises(SourceError, match="occurs only in the source 'A'"):
        cross_validate(t, 'dr', by='source', weights='random', arch='test_resnet', size=48)


# ---------------------------------------------------------------- what is lost

CLASSES = ['no', 'referable']


def predicted(sources, y, noise, groups=None):
    "Predictions as of `cross_validate`, with errors of a size."
    rng = np.random.default_rng(0)
    errors = rng.normal(0, noise, len(y))
    p = 1 / (1 + np.exp(1 - 2 * y - errors))
    t = pd.DataFrame({'image': range(len(y))})
    t['target'] = np.where(y, 'referable', 'no')
    t['p_no'] = 1 - p
    t['p_referable'] = p
    t['data_site'] = sources
    t['group'] = groups
    t.attrs['source_col'] = 'data_site'
    return t


def compared(sources, y, groups=None):
    known = predicted(sources, y, 0.5, groups)
    left_out = predicted(sources, y, 3.0, groups)
    return dt.by_source_table(known, left_out, CLASSES, n=100)


def test_a_source_named_all_is_not_the_row_of_all_images():
    y = np.arange(60) % 2
    t = compared(np.repeat(['all', 'B'], [20, 40]), y)
    assert t.images.to_dict() == {('all', 'all'): 60, ('source', 'B'): 40, ('source', 'all'): 20}


def test_sources_without_positives_have_no_metric_of_their_own():
    y = np.repeat([0, 1], 30)
    t = compared(np.repeat(['A', 'B'], 30), y)  # the AUC is not defined in either
    assert t.loc['source', 'left out'].isna().all()
    words = by_source_words(t)
    assert 'Lowest' not in words
    assert 'nan' not in words
    sources = np.repeat(['A', 'B'], [20, 40])
    y = np.arange(60) % 2
    y[:20] = 0
    one = compared(sources, y)
    assert "Lowest on 'B'" in by_source_words(one)


def test_nothing_is_claimed_without_an_interval():
    y = np.arange(60) % 2
    sources = np.repeat(['A', 'B'], 30)
    t = compared(sources, y, groups=['one patient'] * 60)
    words = by_source_words(t)
    assert 'too few patients' in words
    assert '(no interval)' in words
    assert 'holds on sources' not in words


def test_a_head_is_solved_for_a_source_that_it_was_not_trained_on(sites, cameras):
    "With sources, C is what is best by leaving one out; without, what is best in folds of groups"
    lines = []
    data = dt.label_table(sites / 'north', cameras)
    kw = dict(task='dr', size=48, arch='test_resnet', runtime='plain', weights='random', allow_leaks=True)
    learn = dt.fit(dt.build_learner(data, **kw, say=lines.append), 'head', say=lines.append)
    assert learn.record.C_by == 'source'
    assert sum('is chosen by leaving one of 2 sources out' in line for line in lines) == 1
    train = learn.table[learn.table.split == 'train']
    x = learner_features(learn, train.image.tolist()).numpy()
    views = x.shape[1]
    x = StandardScaler().fit_transform(x.reshape(-1, x.shape[-1]).astype(np.float64))
    y = train.target.to_numpy()
    sources = train.data_Camera.to_numpy()
    loss = {}
    for C in (r['C'] for r in learn.record.C_path):
        right = np.zeros(len(y))
        for source in 'AB':
            seen = np.repeat(sources != source, views)
            weight = np.full(seen.sum(), 1 / views)
            model = LogisticRegression(C=C, max_iter=5000).fit(x[seen], np.repeat(y, views)[seen], weight)
            probs = model.predict_proba(x[~seen]).reshape(-1, views, 2).mean(1)
            of_truth = np.searchsorted(model.classes_, y[sources == source])
            right[sources == source] = probs[np.arange(len(probs)), of_truth]
        loss[C] = -np.log(right.clip(0.001)).mean()
    assert loss == pytest.approx({r['C']: r['loss'] for r in learn.record.C_path}, abs=1e-3)
    assert min(loss, key=loss.get) == learn.record.C
    one = dt.build_learner(dt.label_table(sites / 'north', cameras, source_col='none'), **kw, say=lines.append)
    assert dt.fit(one, 'head', say=lines.append).record.C_by == 'group'


def test_cached_folds_are_those_of_the_same_patients_and_sources(sites, cameras, shared_cache):
    "C depends on groups and sources, so a training with others is computed again"
    labels = pd.read_csv(cameras)
    how = dict(task='dr', size=48, arch='test_resnet', weights='random', runtime='plain', plan='head', folds=2)

    def trained(**columns):
        before = set(shared_cache.rglob('sums.json'))
        cross_validate(dt.label_table(sites / 'north', labels, **columns), say=lambda line: None, **how)
        return len(set(shared_cache.rglob('sums.json')) - before)

    assert trained(source_col='Camera') == 2
    assert trained(source_col='Camera') == 0
    assert trained(source_col='none') == 2
    assert trained(source_col='Camera', group_col='none') == 2
