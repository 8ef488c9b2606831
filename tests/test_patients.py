"Test which column names the patients, which names are equal, and that the choice is always reported."

import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dr_transfer.data.columns import GROUP_COLUMNS, NO_GROUPS
from dr_transfer.data.sources import NO_SOURCES
from dr_transfer.data.split import SplitError, check_split, split_table
from dr_transfer.data.table import label_table, report_table
from dr_transfer.data.tasks import Target, task_table
from dr_transfer.metrics.groups import same_groups
from dr_transfer.metrics.intervals import group_codes


def write_images(folder, n=40, classes=None):
    "Write `n` images of different noise, as files or in class folders."
    for i in range(n):
        place = folder / (classes[i % len(classes)] if classes else '')
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(
            place / f'{i:02}.png'
        )
    return folder


def twenty(column='pid', n=40):
    return pd.DataFrame(
        {
            'image': [f'{i:02}' for i in range(n)],
            'label': list('ab') * (n // 2),
            column: [f'p{i // 2}' for i in range(n)],
        }
    )


def messages(t):
    "What is reported of a table, without the line on sources (see test_sources)."
    lines = []
    report_table(t, lines.append)
    return [line for line in lines if line != t.attrs['sources']]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('patients'))


# ---------------------------------------------------------------- which column


@pytest.mark.parametrize(
    'column',
    [
        'pid',
        'PatientID',
        'case',
        'person_id',
        'study_id',
        'p_id',
        'Patient ID',
        'patient-id',
        'SUBJECT',
        'CaseID',
        'Study',
        'person',
        *GROUP_COLUMNS,
    ],
)
@pytest.mark.parametrize('way', ['csv', 'frame', 'labels'])
def test_usual_names_keep_patients_together(tmp_path, column, way):
    write_images(tmp_path)
    twenty(column).to_csv(tmp_path / ('labels.csv' if way == 'csv' else 'other.csv'), index=False)
    t = label_table(
        tmp_path, {'csv': None, 'frame': twenty(column), 'labels': tmp_path / 'other.csv'}[way], verify=False
    )
    assert t.group.nunique() == 20
    assert split_table(t).groupby('group').split.nunique().max() == 1
    (line,) = messages(t)
    assert line.endswith(f"column '{column}', 20 groups")
    assert line.split(':')[0] in ('patients', 'groups')


def test_another_column_is_named(folder):
    t = label_table(folder, twenty('who knows'), verify=False)
    assert messages(t) == [NO_GROUPS]
    assert t.group.isna().all()
    t = label_table(folder, twenty('who knows'), group_col='who knows', verify=False)
    assert messages(t) == ["patients: column 'who knows', 20 groups"]
    assert t.group.nunique() == 20
    with pytest.raises(ValueError, match="no column 'whom' for the groups"):
        label_table(folder, twenty(), group_col='whom')


def test_no_column_is_used_on_request(folder):
    t = label_table(folder, twenty(), group_col='none', verify=False)
    assert t.group.isna().all()
    assert 'none used' in messages(t)[0]
    assert label_table(t, verify=False).attrs['patients'] == t.attrs['patients']


def test_patient_is_preferred_to_group(folder):
    t = label_table(folder, twenty().assign(group='control'), verify=False)
    assert messages(t) == ["patients: column 'pid', 20 groups"]


def test_the_label_is_not_a_patient(folder):
    df = twenty('case').rename(columns={'label': 'arm'})
    t = label_table(folder, df, label_col='case', group_col=None, verify=False)
    assert t.label.nunique() == 20
    assert messages(t) == [NO_GROUPS]


def test_a_column_without_content(folder):
    df = twenty().assign(patient=None)
    assert messages(label_table(folder, df, verify=False)) == ["patients: column 'pid', 20 groups"]
    with pytest.raises(ValueError, match="column 'patient' is empty"):
        label_table(folder, df, group_col='patient')
    assert messages(label_table(folder, df.drop(columns='pid'), verify=False)) == [
        f"column 'patient' is empty: {NO_GROUPS}"
    ]


def test_two_possible_columns(folder):
    with pytest.raises(ValueError, match="'pid' and 'PID' both match"):
        label_table(folder, twenty().assign(PID='x'))


def test_a_table_that_was_read_keeps_its_patients(folder):
    t = label_table(folder, twenty(), verify=False)
    again = label_table(split_table(t), verify=False)
    assert again.group.tolist() == t.group.tolist()
    assert messages(again) == messages(t)
    half = label_table(t[:20], verify=False)
    assert messages(half) == ["patients: column 'pid', 10 groups"]


@pytest.mark.parametrize('column', ['study', 'case', 'pid'])
def test_a_guessed_column_that_makes_a_split_impossible_is_named(folder, column):
    t = label_table(folder, twenty(column).assign(**{column: 'one'}), verify=False)
    why = f"too few groups: 1.*column '{column}', which was chosen by its name"
    instead = r"--patient COLUMN.*group_col='none' \(--patient none\)"
    with pytest.raises(SplitError, match=f'{why}.*{instead}'):
        split_table(t)
    given = label_table(folder, twenty(column).assign(**{column: 'one'}), group_col=column, verify=False)
    with pytest.raises(SplitError) as e:
        split_table(given)
    assert 'chosen by its name' not in str(e.value)


FOUR = ['train', 'train', 'valid', 'valid']


@pytest.mark.parametrize(
    'change, words',
    [
        ({'split': 'test'}, "every image is in the split 'test'"),
        ({'split': 'valid'}, "no images in the split 'train'"),
        ({'split': ['train', 'valid', 'train', 'later'] * 10}, 'a split other than'),
        ({'label': 'a'}, 'only one class'),
        ({'label': ['a'] * 39 + ['b']}, 'has one image'),
        ({'label': list('ab') * 19 + ['c'] * 2, 'split': FOUR * 9 + ['valid'] * 4}, 'no image of class c'),
    ],
)
def test_errors_that_groups_do_not_cause_name_no_column_of_groups(folder, change, words):
    t = label_table(folder, twenty().assign(pid=range(40)), verify=False).assign(**change)
    with pytest.raises(SplitError, match=words) as e:
        split_table(t)
    assert 'chosen by its name' not in str(e.value)


def test_errors_that_groups_cause_name_their_column(folder):
    t = label_table(folder, twenty(), verify=False)
    with pytest.raises(SplitError, match=r'20 groups are in more than one.*--patient COLUMN'):
        split_table(t.assign(split=['train', 'valid'] * 20))
    with pytest.raises(ValueError, match='give fractions with a sum below 1') as e:
        task_table(folder, Target('class'), twenty(), valid=2.0)
    assert 'chosen by its name' not in str(e.value)


# ---------------------------------------------------------------- class folders


def test_csvs_beside_class_folders(tmp_path):
    write_images(tmp_path, 12, ('rose', 'tulip'))
    assert messages(label_table(tmp_path)) == [NO_GROUPS]
    pd.DataFrame({'file': [f'{i:02}' for i in range(10)], 'Photo-Grapher': [f'p{i // 2}' for i in range(10)]}).to_csv(
        tmp_path / 'credits.CSV', index=False
    )
    (tmp_path / 'weather.csv').write_text('day,rain\n1,2\n')
    (tmp_path / '._credits.csv').write_bytes(b'\0\5\x16\7')
    t = label_table(tmp_path)
    assert messages(t) == [
        "groups: column 'Photo-Grapher' of credits.CSV, 5 groups, 2 images without one treated as independent"
    ]
    assert t.group.isna().sum() == 2
    assert messages(label_table(tmp_path, group_col='photographer')) == messages(t)
    assert label_table(tmp_path, group_col='none').group.isna().all()
    with pytest.raises(
        ValueError, match=r"no column 'pid' for the groups: .* holds class folders and credits.CSV, weather.csv"
    ):
        label_table(tmp_path, group_col='pid')


def test_a_csv_beside_class_folders_that_hides_the_patients(tmp_path):
    who = tmp_path / 'who.csv'
    write_images(tmp_path, 8, ('rose', 'tulip'))
    with pytest.raises(ValueError, match='no CSV file'):
        label_table(tmp_path, group_col='pid')
    who.write_text('photo,pid\n00,a\n')
    with pytest.raises(ValueError, match=r"who.csv has a column 'pid' but none for the image names: .*--image-col"):
        label_table(tmp_path)
    assert label_table(tmp_path, image_col='photo').group.notna().sum() == 1
    who.write_text('image,pid\n00,a\n01,b,c\n')
    with pytest.raises(ValueError, match=r'line 3 has 3 fields.*beside the class folders and may name the patients'):
        label_table(tmp_path)
    assert len(label_table(tmp_path, group_col='none')) == 8
    who.write_text('image,pid\n00,a\n00,b\n')
    with pytest.raises(ValueError, match=r"00.png has two groups: 'a' and 'b' .row 3 of who.csv"):
        label_table(tmp_path)
    os.remove(who)
    os.mkfifo(who)
    with pytest.raises(ValueError, match='not a regular file'):
        label_table(tmp_path)


def test_a_split_of_folders_is_not_a_column(tmp_path):
    for s in ('train', 'valid'):
        write_images(tmp_path / s, 8, ('rose', 'tulip'))
    pd.DataFrame(
        {
            'image': [
                f'{s}/{c}/{i:02}.png' for s in ('train', 'valid') for i in range(8) for c in [('rose', 'tulip')[i % 2]]
            ],
            'pid': ['a'] * 16,
        }
    ).to_csv(tmp_path / 'who.csv', index=False)
    t = label_table(tmp_path)
    with pytest.raises(SplitError, match='Move their images into one of the folders'):
        check_split(t)


# ---------------------------------------------------------------- which names are equal


@pytest.mark.parametrize(
    'names', [['P7', 'p7', ' P7 ', 'Ｐ７'], [1, 1.0, '1', '01', '1.0', ' 001'], ['Ann  Lee', 'ann lee', 'ANN LEE\t']]
)
def test_equal_names_of_patients(names):
    assert len(set(same_groups(names))) == 1
    assert set(group_codes(names, len(names))) == {0}


def test_different_names_of_patients():
    names = ['1', '11', '1a', '1.5', 'a1', '10', '100']
    assert len(set(same_groups(names))) == len(names)


@pytest.mark.parametrize('empty', [None, '', '  ', float('nan'), 'nan', 'NaN', 'None', 'NULL', '<NA>', pd.NA, pd.NaT])
def test_empty_names_of_patients(empty):
    assert same_groups([empty, empty]) == [None, None]
    assert len(set(group_codes([empty, empty, 'a'], 3))) == 3


def test_several_spellings_of_one_patient(folder):
    df = twenty().assign(pid=[('P' if i % 2 else 'p') + str(i // 2) for i in range(40)])
    t = label_table(folder, df, verify=False)
    assert t.group.nunique() == 20
    assert "'p0' and 'P0' are treated as one" in messages(t)[0]
    numbers = label_table(folder, df.assign(pid=[float(i // 2) if i else None for i in range(40)]), verify=False)
    assert numbers.group.nunique() == 20
    assert '1 image without one treated as independent' in messages(numbers)[0]


# ---------------------------------------------------------------- rows that contradict one another


@pytest.mark.parametrize(
    'column,two,what',
    [
        ('label', ['a', 'b'], 'two labels'),
        ('pid', ['p1', 'p2'], 'two groups'),
        ('pid', ['p1', None], 'two groups'),
        ('split', ['train', 'valid'], 'two splits'),
        ('split', ['train', None], 'two splits'),
    ],
)
@pytest.mark.parametrize('way', ['csv', 'frame'])
def test_rows_of_one_image_that_differ(folder, tmp_path, column, two, what, way):
    df = pd.DataFrame(
        {'image': ['00', '01', '00.png'], 'label': ['a', 'b', 'a'], 'pid': ['p1', 'p3', 'p1'], 'split': ['train'] * 3}
    )
    df.loc[[0, 2], column] = two
    df.to_csv(tmp_path / 'l.csv', index=False)
    rows = 'rows 2, 4' if way == 'csv' else 'rows 0, 2'
    with pytest.raises(ValueError, match=f'1 images have {what}: .*00.png. Keep one row per image .first in {rows}'):
        label_table(folder, tmp_path / 'l.csv' if way == 'csv' else df)


def test_rows_of_one_image_that_agree(folder):
    df = pd.DataFrame(
        {
            'image': ['00', '01', '00.png'],
            'label': ['a', 'b', ' a'],
            'pid': ['p1', 'p3', ' P1'],
            'split': ['train', 'valid', 'Training'],
        }
    )
    assert len(label_table(folder, df)) == 2


# ---------------------------------------------------------------- from tables to commands


@pytest.fixture
def small(tmp_path):
    set_path = tmp_path / 'set'
    write_images(set_path, 24)
    twenty(n=24).to_csv(set_path / 'labels.csv', index=False)
    return set_path


REQUEST = dict(arch='test_resnet', weights='random', size=32)


def test_learner_prints_and_records_the_patients(small):
    from dr_transfer.core import build_learner

    lines = []
    learn = build_learner(small, 'flowers', bs=8, say=lines.append, **REQUEST)
    assert lines == ["patients: column 'pid', 12 groups", NO_SOURCES]
    assert learn.record.data.patients == lines[0]
    assert learn.table.groupby('group').split.nunique().max() == 1
    from dr_transfer.inference.saved_model import image_model

    assert image_model(learn).about['training']['data']['patients'] == lines[0]
    lines.clear()
    learn = build_learner(small, 'flowers', bs=8, say=lines.append, group_col='none', **REQUEST)
    assert 'none used' in lines[0]
    assert learn.table.group.isna().all()
    with pytest.raises(ValueError, match="no column 'q' for the groups"):
        build_learner(small, 'flowers', group_col='q', **REQUEST)


@pytest.mark.parametrize('way', ['advise', 'compare', 'folds', 'curve'])
@pytest.mark.parametrize('column', ['pid', 'who'])
def test_each_function_uses_and_reports_the_patients(small, way, column):
    from dr_transfer.data.tasks import get_task
    from dr_transfer.evaluation.compare import compare
    from dr_transfer.evaluation.cross_validation import fold_tables
    from dr_transfer.evaluation.experiments import learning_curve
    from dr_transfer.training.advisor import advise

    class Printed(Exception):
        pass

    def say(line):
        raise Printed(line)

    twenty(column, 24).to_csv(small / 'labels.csv', index=False)
    task = get_task('flowers', 32)
    request = dict(group_col=column, say=say)
    with pytest.raises(Printed, match=f"patients: column '{column}', 12 groups"):
        if way == 'advise':
            advise(small, task, 'test_resnet', 'random', **request)
        if way == 'compare':
            compare(small, task, ['test_resnet'], ['head'], weights='random', **request)
        if way == 'folds':
            fold_tables(small, task, **request)
        if way == 'curve':
            learning_curve(small, task, **request)


def test_copies_with_a_partly_filled_group_column_are_not_a_leak(small):
    "Copies of images of which only some have a patient: no split is given, so no subset can become empty."
    from dr_transfer.data.leaks import split_data
    from dr_transfer.data.tasks import TASKS

    df = twenty(n=24).assign(pid=['p0', 'p0'] + [None] * 22)
    for i in range(2, 10):
        (small / f'copy{i:02}.png').write_bytes((small / f'{i:02}.png').read_bytes())
    more = pd.DataFrame({'image': [f'copy{i:02}' for i in range(2, 10)], 'label': df.label[2:10], 'pid': None})
    for seed in range(5):
        t = split_data(small, TASKS['flowers'], TASKS['flowers'].target(), labels=pd.concat([df, more]), seed=seed)
        assert t.attrs['leaks'] == {}


def test_identical_images_of_two_classes_are_reported(small):
    from dr_transfer.data.leaks import split_data
    from dr_transfer.data.tasks import TASKS

    (small / 'copy.png').write_bytes((small / '00.png').read_bytes())
    df = pd.concat([twenty(n=24), pd.DataFrame({'image': ['copy'], 'label': ['b'], 'pid': ['p0']})])
    t = split_data(small, TASKS['flowers'], TASKS['flowers'].target(), labels=df)
    (note,) = t.attrs['notes']
    assert '1 pairs of identical images have different classes' in note
    assert '00.png (a)' in note
    assert 'copy.png (b)' in note
