"Test preprocess, evaluate and cross-validate from the command line, and that a run keeps its decision."

import json
import shutil

import pandas as pd
import pytest
from helpers import FAST, error_line, good
from PIL import Image

from dr_transfer.synthetic.fundus import make_dr

pytestmark = pytest.mark.usefixtures('with_shared_cache')
OPTIONS = ('--task', 'dr', *FAST)


@pytest.fixture(scope='session')
def many(home):
    "Enough patients for an operating point: 30 with a referable eye, and 30 with another, among the validation images."
    make_dr(home / 'many', n=240, size=64, seed=8, workers=1, grade_p=(0.3, 0.15, 0.2, 0.15, 0.2))
    return home / 'many'


@pytest.fixture(scope='session')
def sure(home, many, weights, shared_cache):
    "A run on them."
    asked = (*OPTIONS, '--valid', '0.5', '--sensitivity', '0.85')
    good('train', many, '--weights', weights, *asked, '--out', home / 'sure')
    return home / 'sure'


def test_a_run_keeps_its_decision_and_predict_gives_it(sure, many):
    decision = json.loads((sure / 'record.json').read_text())['decision']
    assert decision['operating']['metric'] == 'sensitivity'
    assert decision['operating']['sensitivity'] >= 0.85
    assert decision['temperature'] > 0
    assert decision['not_chosen'] == []
    assert json.loads((sure / 'model' / 'model.json').read_text())['decision'] == decision
    p = pd.read_csv(sure / 'predictions.csv')
    assert ((p.p_referable >= decision['operating']['threshold']) == (p.decision == 'referable')).all()
    r = json.loads((sure / 'record.json').read_text())
    assert p.group.notna().all()
    assert r['validation_table']['sensitivity']['low'] < r['validation_table']['sensitivity']['value']
    assert decision['positive_groups'] >= 30
    assert decision['positive_groups'] < decision['operating']['positives']
    out = good('predict', sure, many / 'images').out
    assert out.splitlines()[0] == 'image,prediction,p_no,p_referable,decision,set,unlike,error'


def test_too_few_positives_are_reported_and_the_run_is_written(run):
    d = json.loads((run / 'record.json').read_text())['decision']
    assert d['operating'] is None
    assert any('cannot be set on fewer than 30' in w for w in d['not_chosen'])


def test_evaluate_writes_a_page_and_its_table(sure, fundus_data, tmp_path):
    r_html = tmp_path / 'r.html'
    labels = pd.read_csv(fundus_data / 'labels.csv').rename(columns={'patient': 'person'})
    labels.assign(camera=['A', 'B'] * 20).to_csv(tmp_path / 'l.csv', index=False)
    result = good(
        'evaluate',
        sure,
        fundus_data,
        '--labels',
        tmp_path / 'l.csv',
        '--patient',
        'person',
        '--prevalence',
        '0.1',
        '--resamples',
        '100',
        '--out',
        r_html,
    )
    page = r_html.read_text()
    t = pd.read_csv(tmp_path / 'r_predictions.csv')
    assert 'sensitivity' in result.out
    assert 'operating point' in result.out
    assert str(r_html) in result.out
    assert len(t) == 40
    assert t.group.nunique() == 20
    assert {'decision', 'gradability', 'data_camera', 'p_referable'} <= set(t)
    for words in ('Not a medical device', 'camera: A', 'By patient', 'label 4', 'predictive value at 10%', 'gradable'):
        assert words in page, words
    error_line('evaluate', sure, fundus_data, '--out', r_html)
    error_line('evaluate', sure, fundus_data, '--patient', 'nobody', '--out', tmp_path / 's.html')
    assert not (tmp_path / 's.html').exists()


def test_images_that_a_model_was_trained_on_are_excluded(sure, many, fundus_data, tmp_path):
    r_html = tmp_path / 'r.html'
    assert 'the model was trained or validated on all of these images' in error_line(
        'evaluate', sure, many, '--out', r_html
    )
    result = good('evaluate', sure, many, '--split', 'valid', '--resamples', '100', '--out', tmp_path / 'valid.html')
    t = pd.read_csv(tmp_path / 'valid_predictions.csv')
    own = pd.read_csv(sure / 'predictions.csv')
    assert sorted(t.image) == sorted(own.image)
    assert 'slightly optimistic' in (tmp_path / 'valid.html').read_text()
    assert 'not validation images' in result.out
    both = own.merge(t, on='image', suffixes=('', '_again'))
    assert both.p_referable_again.to_numpy() == pytest.approx(both.p_referable.to_numpy(), abs=0.02)
    assert set(own.group) == set(t.group)
    result = good('evaluate', sure, many, '--allow-leaks', '--resamples', '100', '--out', tmp_path / 'all.html')
    assert 'so the metrics are too optimistic' in (tmp_path / 'all.html').read_text()
    assert 'excluded' not in result.out
    both = tmp_path / 'both'  # 40 new ones, 8 known ones, a broken one
    shutil.copytree(fundus_data / 'images', both)
    known = [f'known_{i}.png' for i in range(8)]
    labels = pd.read_csv(many / 'labels.csv').head(8)
    for to, (i, name) in zip(known, enumerate(labels.image)):  # four of them a little lighter
        source = next((many / 'images').glob(f'{name}*'))
        if i % 2:
            shutil.copy(source, both / to)
        else:
            Image.open(source).point(lambda v: min(255, int(1.05 * v + 2))).save(both / to)
    (both / 'broken.png').write_bytes(b'no image')
    pd.concat(
        [pd.read_csv(fundus_data / 'labels.csv'), labels.assign(image=known), labels.head(1).assign(image='broken.png')]
    ).to_csv(tmp_path / 'l.csv', index=False)
    result = good('evaluate', sure, both, '--labels', tmp_path / 'l.csv', '--resamples', '100', '--out', r_html)
    assert len(pd.read_csv(tmp_path / 'r_predictions.csv')) == 40
    assert 'excluded: 8 images' in result.out
    assert '1 images that cannot be read' in result.out
    assert '<th>excluded: used in training or validation</th><td>8</td>' in r_html.read_text()
    assert 'broken.png' in r_html.read_text()


def test_cross_validate_writes_the_same_kind_of_page(many, weights, tmp_path):
    words = (
        'cross-validate',
        many,
        '--weights',
        weights,
        *OPTIONS,
        '--folds',
        '3',
        '--resamples',
        '100',
        '--sensitivity',
        '0.85',
    )
    result = good(*words, '--out', tmp_path / 'r.html')
    t = pd.read_csv(tmp_path / 'r_predictions.csv')
    assert len(t) == 240
    assert set(t.fold) == {1, 2, 3}
    assert (t.groupby('group').fold.nunique() == 1).all()
    assert t.decision.notna().all()
    assert 'of the 3 folds is chosen on the other folds' in (tmp_path / 'r.html').read_text()
    assert 'fold 3' in result.out
    again = good(*words, '--out', tmp_path / 'again.html')
    assert 'fold 1' not in again.out, 'finished folds are used'
    assert pd.read_csv(tmp_path / 'again_predictions.csv').equals(t), 'finished folds are used'


def test_preprocess_prepares_what_train_reads(fundus_data, weights, tmp_path):
    small = tmp_path / 'small'
    result = good('preprocess', fundus_data, small, '--size', '64', '--correction', 'colour', '--to-right')
    assert '40 images' in result.out
    assert len(pd.read_csv(small / 'images.csv')) == 40
    good('train', small, '--weights', weights, *OPTIONS, '--out', tmp_path / 'run')
    error_line('preprocess', fundus_data, fundus_data)
    error_line('preprocess', fundus_data, small, '--size', '128')


@pytest.mark.parametrize(
    'words',
    [
        ('--sensitivity', '0.9', '--specificity', '0.9'),
        ('--balance', 'weight'),
        ('--head', 'cumulativ'),
    ],
)
def test_wrong_options_are_errors(fundus_data, weights, tmp_path, words):
    error_line('train', fundus_data, '--weights', weights, *OPTIONS, *words, '--out', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_an_ordered_model_of_grades_predicts_grades(many, fundus_data, weights, tmp_path):
    run = tmp_path / 'run'
    good(
        'train',
        many,
        '--weights',
        weights,
        *OPTIONS,
        '--target',
        'grade',
        '--head',
        'regression',
        '--balance',
        'sampling',
        '--valid',
        '0.4',
        '--out',
        run,
    )
    t = pd.read_csv(run / 'predictions.csv')
    assert set(t.grade) <= set(range(5))
    assert t.decision.isin(['referable', 'not referable']).all()
    good('evaluate', run, fundus_data, '--resamples', '100', '--out', tmp_path / 'r.html')
    assert 'kappa at the cut points' in (tmp_path / 'r.html').read_text()
