"Test the table of images: all layouts, skipped files, errors, and the splits of many random sets."

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import content
from PIL import Image

from dr_transfer.data import table as module
from dr_transfer.data.columns import GROUP_COLUMNS, IMAGE_COLUMNS, LABEL_COLUMNS
from dr_transfer.data.images import image_error, image_errors
from dr_transfer.data.split import SplitError, check_split, split_summary, split_table
from dr_transfer.data.table import class_counts, find_images, label_table, skipped_images

pytestmark = pytest.mark.filterwarnings(
    'ignore:The least populated class:UserWarning'
)  # scikit-learn, of a small class
COLUMNS = ['image', 'label', 'group', 'split']


def write_images(folder, *names, size=6):
    "Write small images with these names below `folder`, each of another colour."
    for i, n in enumerate(names):
        (folder / n).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (size, size), (i % 256, i * 37 % 256, 9)).save(folder / n)
    return folder


def csv(path, text, encoding='utf-8'):
    path.write_bytes(text.encode(encoding))
    return path


def labels(t, folder):
    return {Path(i).relative_to(folder).as_posix(): label for i, label in zip(t.image, t.label)}


# ---------------------------------------------------------------- files


def test_find_images(tmp_path):
    write_images(tmp_path, 'b/2.png', 'a/1.jpg', 'a/deep/er/3.tif', '4.bmp', '.hidden/5.png', 'a/.6.png', 'B/7.JPG')
    for n in ('a/notes.txt', 'a/png', 'a/x.png.bak', 'a/Thumbs.db'):
        (tmp_path / n).touch()
    found = [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)]
    assert sorted(found) == ['4.bmp', 'B/7.JPG', 'a/1.jpg', 'a/deep/er/3.tif', 'b/2.png']
    assert find_images(tmp_path) == sorted(find_images(tmp_path))


@pytest.mark.parametrize(
    'suffix', [s for s in module.IMAGE_SUFFIXES if s not in ('.dcm', '.dicom')]
)  # tested in test_fundus
@pytest.mark.parametrize('upper', [False, True])
def test_every_suffix_is_found_and_read(tmp_path, suffix, upper):
    name = f'a/1{suffix.upper() if upper else suffix}'
    write_images(tmp_path, name)
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == [name]
    assert image_error(tmp_path / name) == ''


def test_image_errors_are_in_order_and_readable(tmp_path):
    write_images(tmp_path, *[f'{i}.png' for i in range(40)])
    complete = (write_images(tmp_path, 'big.jpg', size=200) / 'big.jpg').read_bytes()
    for i in range(0, 40, 5):
        (tmp_path / f'{i}.png').write_bytes([b'', b'some text', complete[: len(complete) // 2]][i // 5 % 3])
    paths = [tmp_path / f'{i}.png' for i in range(40)]
    errors = image_errors(paths)
    assert [bool(e) for e in errors] == [i % 5 == 0 for i in range(40)]
    assert errors[0] == 'empty file'
    assert errors[5] == 'not an image'
    assert errors[10].startswith('cannot be decoded')
    assert image_error(tmp_path / 'none.png') == 'no such file'
    for end in (len(complete) // 2, len(complete) - 40):
        (tmp_path / 'cut.jpg').write_bytes(complete[:end])
        assert image_error(tmp_path / 'cut.jpg').startswith('cannot be decoded'), end
    (tmp_path / 'folder.png').mkdir()
    assert image_error(tmp_path / 'folder.png')


def test_file_without_permission(tmp_path, monkeypatch):
    write_images(tmp_path, 'a/1.png', 'a/2.png', 'b/3.png')
    real = os.open

    def opened(p, *args, **kwargs):
        if Path(p).name == '2.png':
            raise PermissionError(13, 'Permission denied')
        return real(p, *args, **kwargs)

    monkeypatch.setattr(os, 'open', opened)
    t = label_table(tmp_path)
    assert len(t) == 2
    assert skipped_images(t).reason.tolist() == ['no permission to read it']


def test_folder_without_permission(tmp_path, monkeypatch):
    "Root may read everything, so the error of the system is simulated."
    write_images(tmp_path, 'a/1.png', 'b/2.png')
    real = os.scandir

    def scandir(p='.'):
        if Path(p).name == 'b':
            raise PermissionError(13, 'Permission denied', str(p))
        return real(p)

    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(
        ValueError, match=r'b cannot be read \(Permission denied\): change its permissions or give another folder'
    ):
        label_table(tmp_path)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_folder_without_permission_on_disk(tmp_path):
    write_images(tmp_path, 'a/1.png', 'b/2.png')
    (tmp_path / 'b').chmod(0)
    try:
        with pytest.raises(ValueError, match='change its permissions'):
            label_table(tmp_path)
    finally:
        (tmp_path / 'b').chmod(0o755)


# ---------------------------------------------------------------- layouts

FILES = [f'{c}/{c}{i}.png' for c in ('rose', 'tulip') for i in range(3)]
TRUE = {f: f.split('/')[0] for f in FILES}


def test_class_folders(tmp_path):
    t = label_table(write_images(tmp_path, *reversed(FILES)))
    assert list(t.columns) == COLUMNS
    assert labels(t, tmp_path) == TRUE
    assert t.image.is_monotonic_increasing
    assert t.group.isna().all()
    assert t.split.isna().all()
    assert class_counts(t).images.to_dict() == {'rose': 3, 'tulip': 3}
    assert labels(label_table(str(tmp_path)), tmp_path) == TRUE


def test_class_folders_may_have_folders(tmp_path):
    t = label_table(write_images(tmp_path, 'rose/2024/1.png', 'rose/2.png', 'tulip/a/b/3.png'))
    assert labels(t, tmp_path) == {'rose/2024/1.png': 'rose', 'rose/2.png': 'rose', 'tulip/a/b/3.png': 'tulip'}


@pytest.mark.parametrize(
    'names',
    [
        ('train', 'valid', 'test'),
        ('training', 'validation', 'test'),
        ('Train', 'Val', 'TEST'),
    ],
)
def test_split_folders(tmp_path, names):
    t = label_table(write_images(tmp_path, *[f'{s}/{f}' for s in names for f in FILES]))
    for path, label, split in zip(t.image, t.label, t.split):
        p = Path(path).relative_to(tmp_path).parts
        assert label == p[1]
        assert split == ('train', 'valid', 'test')[names.index(p[0])]
    assert split_table(t).split.tolist() == t.split.tolist()  # given splits are kept


def test_a_class_named_test_is_a_class(tmp_path):
    assert label_table(write_images(tmp_path, 'test/1.png', 'rose/2.png')).label.tolist() == ['rose', 'test']


def as_path(f):
    return f


def as_name(f):
    return f.split('/')[-1]


def as_stem(f):
    return as_name(f)[:-4]


def as_windows_path(f):
    return f.replace('/', '\\')


@pytest.mark.parametrize('form', [as_path, as_name, as_stem, as_windows_path])
@pytest.mark.parametrize('way', ['labels.csv', 'csv as source', 'csv elsewhere', 'frame'])
def test_csv_layouts(tmp_path, form, way):
    folder = tmp_path / 'set'
    folder.mkdir()
    write_images(folder, *FILES, 'rose/unused.png')
    df = pd.DataFrame(
        {
            'image': [form(f) for f in FILES],
            'label': [f'{f[0]}-{i}' for i, f in enumerate(FILES)],
            'patient': list('aabbcc'),
        }
    )
    where = (tmp_path if way == 'csv elsewhere' else folder) / ('labels.csv' if way == 'labels.csv' else 'grades.csv')
    if way != 'frame':
        df.to_csv(where, index=False)
    t = {
        'labels.csv': lambda: label_table(folder),
        'csv as source': lambda: label_table(where),
        'csv elsewhere': lambda: label_table(folder, where),
        'frame': lambda: label_table(folder, df),
    }[way]()
    assert list(t.columns) == COLUMNS
    assert labels(t, folder) == dict(zip(FILES, df.label))
    assert t.group.tolist() == list('aabbcc')


def test_a_frame_of_paths(tmp_path):
    write_images(tmp_path, *FILES)
    df = pd.DataFrame(
        {
            'file': [tmp_path / f for f in FILES],
            'grade': [0, 1, 2, 3, 4, 0],
            'subject': [1, 1, 2, 2, np.nan, None],
            'split': ['train', 'valid'] * 3,
        }
    )
    before = df.copy()
    t = label_table(df.sample(frac=1, random_state=0))
    assert t.image.tolist() == [str(tmp_path / f) for f in FILES]
    assert t.label.tolist() == list('012340')
    assert t.split.tolist() == ['train', 'valid'] * 3
    assert t.group[0] == t.group[1] != t.group[2] == t.group[3]
    assert t.group[4:].isna().all()
    pd.testing.assert_frame_equal(df, before)


@pytest.mark.parametrize('image', [*IMAGE_COLUMNS, 'Image name', 'ID_CODE'])
def test_usual_image_columns(tmp_path, image):
    write_images(tmp_path, *FILES)
    assert labels(label_table(tmp_path, pd.DataFrame({image: FILES, 'label': 'x'})), tmp_path) == dict.fromkeys(
        FILES, 'x'
    )


@pytest.mark.parametrize('label', [*LABEL_COLUMNS, 'Retinopathy grade'])
@pytest.mark.parametrize('group', [*GROUP_COLUMNS, 'Patient'])
def test_usual_label_and_group_columns(tmp_path, label, group):
    if label == group:
        return
    df = pd.DataFrame({'image': [str(write_images(tmp_path, 'a.png') / 'a.png')], label: ['x'], group: ['p']})
    assert label_table(df, verify=False)[['label', 'group']].values.tolist() == [['x', 'p']]


def test_columns_by_name(tmp_path):
    write_images(tmp_path, *FILES)
    csv(
        tmp_path / 'labels.csv',
        'image,label,group,photo,what,who\n' + ''.join(f'x,y,z,{f},{i},p{i // 2}\n' for i, f in enumerate(FILES)),
    )
    t = label_table(tmp_path, image_col='photo', label_col='what', group_col='who')
    assert labels(t, tmp_path) == {f: str(i) for i, f in enumerate(FILES)}
    assert t.group.tolist() == [
        'p0',
        'p0',
        'p1',
        'p1',
        'p2',
        'p2',
    ]


def test_groups_from_a_csv_beside_class_folders(tmp_path):
    write_images(tmp_path, *FILES)
    csv(
        tmp_path / 'credits.csv',
        'file,photographer,licence\nrose/rose0.png,Ann,CC\nrose1.png,Ann,CC\ntulip2,Bob,CC\nnot there.png,Eve,CC\n',
    )
    csv(tmp_path / 'weather.csv', 'day,rain\n1,2\n')
    t = label_table(tmp_path)
    assert {as_name(Path(i).as_posix()): g for i, g in zip(t.image, t.group) if pd.notna(g)} == {
        'rose0.png': 'Ann',
        'rose1.png': 'Ann',
        'tulip2.png': 'Bob',
    }


@pytest.mark.parametrize(
    'name',
    [
        'a b c.png',
        'Größe.png',
        '眼底 图像.png',
        "it's.png",
        'say "no".png',
        'comma, in it.png',
        '#1.png',
        '100%.png',
        'a.b.c.png',
        '0007.png',
        'é.png',
    ],
)
@pytest.mark.parametrize('form', [as_path, as_name, as_stem])
@pytest.mark.parametrize('bom', [False, True])
def test_names_of_any_kind(tmp_path, name, form, bom):
    write_images(tmp_path, f'眼 底/{name}', 'b/other.png')
    pd.DataFrame({'image': [form(f'眼 底/{name}'), 'other'], 'label': ['健康', "l'œil"]}).to_csv(
        tmp_path / 'labels.csv', index=False, encoding='utf-8-sig' if bom else 'utf-8'
    )
    assert labels(label_table(tmp_path), tmp_path) == {f'眼 底/{name}': '健康', 'b/other.png': "l'œil"}


def test_names_of_any_kind_as_class_folders(tmp_path):
    t = label_table(write_images(tmp_path, '健康 眼/1.png', "l'œil/2.png", 'a,b/3.png'))
    assert set(t.label) == {'健康 眼', "l'œil", 'a,b'}


@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_spaces_around_columns_and_labels(tmp_path, end):
    write_images(tmp_path, 'x/1.png', 'x/2.png')
    csv(tmp_path / 'labels.csv', end.join(['image , label , patient', '1.png, a , p', '"2.png", "b c", p', '']))
    t = label_table(tmp_path)
    assert t.label.tolist() == ['a', 'b c']
    assert t.group.nunique() == 1


def test_labels_are_text_as_written(tmp_path):
    write_images(tmp_path, *[f'x/{i}.png' for i in range(4)])
    csv(tmp_path / 'labels.csv', 'image,label\n0,007\n1,1.0\n2,1e3\n3,True\n')
    assert label_table(tmp_path).label.tolist() == ['007', '1.0', '1e3', 'True']


def test_numbers_keep_their_zeros(tmp_path):
    write_images(tmp_path, 'x/0007.png', 'x/0010.png')
    csv(tmp_path / 'labels.csv', 'image,label,patient\n0007,1,001\n0010,02,02\n')
    assert label_table(tmp_path)[['label', 'group']].values.tolist() == [['1', '001'], ['02', '02']]


def test_same_name_in_two_folders(tmp_path):
    write_images(tmp_path, 'images/1.png', 'images/2.png', 'images/3.png', 'thumbs/1.png', 'thumbs/2.png')
    df = pd.DataFrame({'image': ['1', '2.png', '3.png'], 'label': ['a', 'b', 'c']})
    assert labels(label_table(tmp_path, df), tmp_path) == {
        'images/1.png': 'a',
        'images/2.png': 'b',
        'images/3.png': 'c',
    }
    write_images(tmp_path, 'thumbs/3.png')
    with pytest.raises(ValueError, match=r"'1' matches .*: give the path relative to .* in the CSV"):
        label_table(tmp_path, df)
    assert labels(
        label_table(tmp_path, df.assign(image=['thumbs/1.png', 'images/2.png', 'thumbs/3.png'])), tmp_path
    ) == {'thumbs/1.png': 'a', 'images/2.png': 'b', 'thumbs/3.png': 'c'}
    assert len(label_table(tmp_path)) == 6  # without the CSV they are six images


def test_a_row_twice_is_one_image(tmp_path):
    write_images(tmp_path, 'x/1.png', 'x/2.png')
    assert len(label_table(tmp_path, pd.DataFrame({'image': ['1.png', '1', '2'], 'label': ['a', 'a', 'b']}))) == 2


@pytest.mark.parametrize('split', [['train', 'valid', 'test'], ['train', 'valid', None]])
def test_split_column(tmp_path, split):
    write_images(tmp_path, *(f'x/{i}.png' for i in range(3)))
    pd.DataFrame({'image': range(3), 'label': list('aba'), 'split': split}).to_csv(tmp_path / 'labels.csv')
    assert [None if pd.isna(s) else s for s in label_table(tmp_path).split] == split


# ---------------------------------------------------------------- skipped


def test_unreadable_files_are_listed_and_not_changed(tmp_path):
    write_images(tmp_path, *FILES)
    (tmp_path / 'rose' / 'empty.jpg').touch()
    (tmp_path / 'rose' / 'text.jpg').write_text('no image')
    complete = (write_images(tmp_path, 'tulip/complete.jpg', size=300) / 'tulip' / 'complete.jpg').read_bytes()
    (tmp_path / 'tulip' / 'cut.jpg').write_bytes(complete[: len(complete) * 2 // 3])
    before = content(tmp_path)
    t = label_table(tmp_path)
    skipped = skipped_images(t)
    assert {Path(i).name: (label, r.split(':')[0]) for i, label, r in skipped.values} == {
        'empty.jpg': ('rose', 'empty file'),
        'text.jpg': ('rose', 'not an image'),
        'cut.jpg': ('tulip', 'cannot be decoded'),
    }
    assert content(tmp_path) == before
    assert set(t.image).isdisjoint(skipped.image)
    assert len(t) + len(skipped) == 10
    assert list(skipped_images(split_table(t)).image) == list(skipped.image)  # the list stays with the table
    assert len(label_table(tmp_path, verify=False)) == 10
    assert not len(skipped_images(label_table(tmp_path, verify=False)))


def test_images_without_a_label_are_skipped(tmp_path):
    write_images(tmp_path, 'x/1.png', 'x/2.png', 'x/3.png')
    csv(tmp_path / 'labels.csv', 'image,label\n1.png,a\n2.png,\n3.png,  \n')
    t = label_table(tmp_path)
    assert t.label.tolist() == ['a']
    assert skipped_images(t).reason.tolist() == ['no label'] * 2


def test_a_name_longer_than_any_path(tmp_path):
    write_images(tmp_path, 'x/1.png')
    df = pd.DataFrame({'image': ['1', 'n' * 4097], 'label': 'a'})
    with pytest.raises(ValueError, match=r"row \d+ has an image name of 4097 characters in column 'image', more than"):
        label_table(tmp_path, df)


def test_missing_files(tmp_path):
    write_images(tmp_path, 'x/1.png')
    df = pd.DataFrame({'image': ['1'] + [f'lost{i}' for i in range(5)], 'label': 'a'})
    with pytest.raises(ValueError, match=r"5 of 6 rows .* lost0, lost1, lost2 and 2 more. Correct .* missing='skip'"):
        label_table(tmp_path, df)
    assert len(label_table(tmp_path, df, missing='skip')) == 1


# ---------------------------------------------------------------- messages


def frame(**kwargs):
    return pd.DataFrame({'image': ['1.png', '2.png'], 'label': ['a', 'b']} | kwargs)


@pytest.mark.parametrize(
    'call,why',
    [
        (lambda d: label_table(d / 'none'), 'there is no .*none: give a folder of images'),
        (lambda d: label_table(d / 'x' / '1.png'), 'cannot be read as a CSV file'),
        (lambda d: label_table(d, d / 'none.csv'), 'there is no labels file .*none.csv: give the path of a CSV file'),
        (lambda d: label_table(d, csv(d / 'l.csv', '')), 'l.csv cannot be read as a CSV file'),
        (lambda d: label_table(d, csv(d / 'l.csv', 'image,label\n1.png,ä\n', 'latin-1')), 'as a CSV file in UTF-8'),
        (
            lambda d: label_table(d, csv(d / 'l.csv', 'image,label\n1.png,a\n2.png,a,b,c\n')),
            'l.csv cannot be read as a CSV file',
        ),
        (
            lambda d: label_table(d, csv(d / 'l.csv', 'photo;label\n1.png;a\n')),
            'no column for the image names: columns are photo, label. '
            r"Choose one with image_col='...' \(--image-col COLUMN\)",
        ),
        (
            lambda d: label_table(d, frame().rename(columns={'label': 'x'})),
            "no column for the labels: columns are image, x. Choose one with label_col='...'",
        ),
        (
            lambda d: label_table(d, frame(), image_col='q'),
            "there is no column 'q' for the image names. Columns: image, label",
        ),
        (lambda d: label_table(d, frame(), label_col='q'), "there is no column 'q' for the labels"),
        (lambda d: label_table(d, frame(), group_col='q'), "there is no column 'q' for the groups"),
        (
            lambda d: label_table(d, frame(image=['1', '1'])),
            '1 images have two labels: .*1.png. Keep one row per image',
        ),
        (lambda d: label_table(d, frame()[:0]), 'no images in'),
        (lambda d: label_table(d, frame(label=[None, None])), r'none of 2 images can be used: .*1.png \(no label\)'),
        (
            lambda d: label_table(write_images(d, 'loose.png')),
            r'1 images are in .*, not in a class folder: loose.png. Put each .* \(labels=..., --labels\)',
        ),
        (lambda d: label_table((d / 'new').mkdir() or d / 'new'), 'no images in .*new: give a folder with .jpg'),
        (lambda d: find_images(d / 'x' / '1.png'), 'is not a folder: give the folder of the images'),
    ],
)
def test_messages(tmp_path, call, why):
    write_images(tmp_path, 'x/1.png', 'x/2.png')
    with pytest.raises(ValueError, match=why):
        call(tmp_path)


# ---------------------------------------------------------------- common contents of a CSV


def split_of(folder, **columns):
    write_images(folder, *(f'x/{i:02}.png' for i in range(40)))
    pd.DataFrame({'image': [f'{i:02}' for i in range(40)], 'label': list('ab') * 20} | columns).to_csv(
        folder / 'labels.csv', index=False
    )
    return split_table(label_table(folder))


@pytest.mark.parametrize(
    'names',
    [
        ('train', 'val', 'test'),
        ('Train', 'Valid', 'Test'),
        ('training', 'validation', 'test'),
        ('train ', 'valid ', 'test '),
    ],
)
def test_splits_in_a_csv_as_in_folders(tmp_path, names):
    given = [names[0]] * 20 + [names[1]] * 10 + [names[2]] * 10
    assert split_of(tmp_path, split=given).split.tolist() == ['train'] * 20 + ['valid'] * 10 + ['test'] * 10


def test_an_unknown_split_in_a_csv_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='holdout'):
        split_of(tmp_path, split=['train'] * 30 + ['holdout'] * 10)


def test_a_space_after_a_group_does_not_change_it(tmp_path):
    assert split_of(tmp_path, patient=[f'p{i // 4}{" " * (i % 2)}' for i in range(40)]).group.nunique() == 10


@pytest.mark.parametrize('name', ['None', 'NA', 'null', 'nan'])
def test_a_class_may_be_called_none(tmp_path, name):
    write_images(tmp_path, 'x/1.png', 'x/2.png', 'x/3.png')
    assert label_table(
        tmp_path, csv(tmp_path / 'l.csv', f'image,label\n1.png,{name}\n2.png,mild\n3.png,\n')
    ).label.tolist() == [name, 'mild']


def test_two_labels_in_a_frame_are_an_error(tmp_path):
    p = str(write_images(tmp_path, '1.png') / '1.png')
    with pytest.raises(ValueError, match='two labels'):
        label_table(pd.DataFrame({'image': [p, p], 'label': ['a', 'b']}))


def test_the_current_folder_as_data(tmp_path, monkeypatch):
    monkeypatch.chdir(write_images(tmp_path, 'x/1.png', 'x/2.png'))
    assert label_table('.', pd.DataFrame({'image': ['1', '2'], 'label': ['a', 'b']})).label.tolist() == ['a', 'b']


def test_two_csvs_beside_class_folders(tmp_path):
    write_images(tmp_path, *FILES)
    csv(tmp_path / 'rose.csv', 'file,photographer\nrose0,Ann\n')
    csv(tmp_path / 'tulip.csv', 'file,photographer\ntulip0,Bob\n')
    assert label_table(tmp_path).group.dropna().tolist() == ['Ann', 'Bob']


def test_a_space_after_an_image_name(tmp_path):
    assert len(label_table(write_images(tmp_path, 'x/1.png'), csv(tmp_path / 'l.csv', 'image,label\n1.png ,a\n'))) == 1


def test_a_folder_in_place_of_a_csv(tmp_path):
    with pytest.raises(ValueError):
        label_table(write_images(tmp_path, 'x/1.png'), tmp_path / 'x')


def test_missing_has_two_values(tmp_path):
    with pytest.raises(ValueError, match='ignore'):
        label_table(write_images(tmp_path, 'x/1.png'), pd.DataFrame({'image': ['1'], 'label': ['a']}), missing='ignore')


def test_absolute_paths_outside_the_folder(tmp_path):
    here = tmp_path / 'here'
    write_images(here, 'x/1.png', 'x/2.png')
    far = write_images(tmp_path / 'far', 'a.png') / 'a.png'
    df = pd.DataFrame({'image': [far, here / 'x' / '1.png', '2'], 'label': list('aba')}).astype(str)
    assert sorted(label_table(here, df).image) == sorted(map(str, [far, *find_images(here)]))
    with pytest.raises(ValueError, match=r"1 of 1 rows .*missing='skip' \(--missing skip\)"):
        label_table(here, df[:1].assign(image=str(far) + 'x'))


@pytest.mark.parametrize(
    'name', ['a\\b.png', ' a.png', 'a\nb.png', 'a"b",c.png', "=cmd|'x'!A1.png", '-1.png', os.fsdecode(b'R\xf6se.png')]
)
def test_names_that_are_hard_to_write(tmp_path, name):
    from dr_transfer.utils.csvfile import write_csv

    write_images(tmp_path, name, 'b.png')
    write_csv(pd.DataFrame({'image': [name, 'b.png'], 'label': ['a', '=b']}), tmp_path / 'labels.csv')
    t = label_table(tmp_path)
    assert sorted(zip(t.image, t.label)) == sorted([(str(tmp_path / name), 'a'), (str(tmp_path / 'b.png'), '=b')])


@pytest.mark.parametrize(
    'sep,encoding',
    [
        (';', 'utf-8'),
        ('\t', 'utf-8-sig'),
        (',', 'utf-16'),
        (';', 'utf-16'),
    ],
)
def test_csvs_as_spreadsheets_write_them(tmp_path, sep, encoding):
    write_images(tmp_path, *FILES)
    csv(
        tmp_path / 'labels.csv',
        '\r\n'.join(f'{sep}'.join(r) for r in [('Image', 'Label'), *((f, 'ä ' + f[0]) for f in FILES)]),
        encoding,
    )
    assert label_table(tmp_path).label.tolist() == ['ä r'] * 3 + ['ä t'] * 3


@pytest.mark.parametrize(
    'text,why',
    [
        ('image,label\n', 'labels.csv: it has a header but no rows'),
        ('image,grade, grade\n1.png,1,2\n', "two columns with the same name, 'grade' and 'grade'"),
        ('image,label,image \n1.png,a,2.png\n', "two columns with the same name, 'image' and 'image '"),
        ('image,label,Label\n1.png,a,b\n', "'label' and 'Label' both match"),
        ('image,label\n1.png,a,x\n2.png,b,y\n', 'line 2 has 3 fields'),
        ('image,label\n"1.png,a\n2.png",b\n', 'lines 2 to 3 are one row'),
        ('image,label\n,a\n1.png,b\n', 'row 2 has no image name'),
        ('image,label\n' + 'x' * 5000 + ',a\n', 'row 2 has an image name of 5000 characters'),
        ('image,label\n1.png,' + 'x' * 300 + '\n', r'row 2: the label has 300 characters.*\(--label-col COLUMN\)'),
        ('image,label\n1.png,bolt;red\n2.png,bolt;blue\n', 'looks like several labels in one cell .*not supported yet'),
        ('image,label\n1.png,"bolt,red"\n2.png,bolt\n', 'looks like several labels in one cell'),
        ('image\n1.png\n', 'no column for the labels'),
        ('image,label,split\n1.png,a,test\n2.png,b,test\n', "every image is in the split 'test'"),
    ],
)
def test_csvs_that_are_errors(tmp_path, text, why):
    write_images(tmp_path, 'x/1.png', 'x/2.png')
    csv(tmp_path / 'labels.csv', text)
    with pytest.raises(ValueError, match=why):
        split_table(label_table(tmp_path))


def test_a_pipe_in_place_of_a_csv(tmp_path):
    labels_csv = tmp_path / 'labels.csv'
    write_images(tmp_path, 'x/1.png')
    os.mkfifo(labels_csv)
    for call in (
        lambda: label_table(tmp_path),
        lambda: label_table(labels_csv),
        lambda: label_table(tmp_path, labels_csv),
    ):
        with pytest.raises(ValueError, match=r'not a regular file|is not a folder'):
            call()
    from dr_transfer.data.preprocess import preprocess_folder

    with pytest.raises(ValueError, match='not a regular file'):
        preprocess_folder(tmp_path, tmp_path.with_name('out of the pipe'))


def test_empty_rows_are_ignored(tmp_path):
    write_images(tmp_path, 'x/1.png')
    assert len(label_table(tmp_path, csv(tmp_path / 'l.csv', 'image,label,patient\n1.png,a,p\n,,\n,,\n'))) == 1


@pytest.mark.parametrize('label', [['a', 'b'], ('a',), {'a'}, np.array([1, 2])])
def test_lists_of_labels(tmp_path, label):
    df = pd.DataFrame({'image': ['1', '2'], 'label': [None, None]}, dtype=object)
    df.at[1, 'label'] = label
    with pytest.raises(
        ValueError, match=r'row 1: the label .* is a list. Several labels for an image are not supported yet'
    ):
        label_table(write_images(tmp_path, '1.png', '2.png'), df)


def test_types_of_data_and_labels(tmp_path):
    write_images(tmp_path, 'x/1.png')
    for call in (
        lambda: label_table(iter([])),
        lambda: label_table(frame(), frame()),
        lambda: label_table(tmp_path, 5),
        lambda: label_table(csv(tmp_path / 'l.csv', 'image,label\n1,a\n'), frame()),
        lambda: label_table('a\0b'),
        lambda: label_table('x' * 300_000),
    ):
        with pytest.raises(ValueError, match=r'give|besides') as e:
            call()
        assert len(str(e.value)) < 1000


def test_skipped_files_are_kept_when_a_table_is_read_again(tmp_path):
    (write_images(tmp_path, 'x/1.png', 'y/2.png') / 'x' / 'bad.png').touch()
    assert len(skipped_images(label_table(label_table(tmp_path)))) == 1


@pytest.mark.parametrize('seed', [None, -1, 2**32, 10**30, 1.5, '1'])
def test_invalid_seeds(seed):
    with pytest.raises(ValueError, match=r'seed=.*give a whole number from 0 to 4294967295'):
        split_table(random_set(0), seed=seed)


def test_a_generator_of_images(tmp_path):
    files = find_images(write_images(tmp_path, 'x/1.png', 'x/2.png'))
    assert image_errors(f for f in files) == ['', '']
    with pytest.raises(ValueError, match='is one image or folder'):
        image_errors(str(files[0]))


# ---------------------------------------------------------------- splits


def random_set(seed, n=150, grouped=True, classes=3):
    "A table as `label_table` makes it: groups of one to four, some of mixed classes, some images without a group."
    rng = np.random.default_rng(seed)
    p = np.arange(classes, 0, -1) / np.arange(classes + 1).sum()
    group = np.repeat(np.arange(n), rng.integers(1, 5, n))[:n]
    label = np.where(rng.random(n) < 0.8, rng.choice(classes, n, p=p)[group], rng.choice(classes, n, p=p))
    alone = rng.random(n) < 0.1
    t = pd.DataFrame(
        {
            'image': [f'{i:04}.jpg' for i in range(n)],
            'label': label.astype(str),
            'group': [f'p{g}' if grouped and not a else None for g, a in zip(group, alone)],
            'split': None,
        },
        dtype=object,
    )
    return t.sample(frac=1, random_state=seed, ignore_index=True)


def split_fraction(t, size):
    return (t.split == size).mean()


@pytest.mark.parametrize(
    'valid,test',
    [
        (0.2, 0),
        (0.25, 0),
        (0.5, 0),
        (0.1, 0.1),
        (0.2, 0.2),
        (0.15, 0.15),
        (1 / 3, 1 / 3),
        (0.33, 0),
        (0.07, 0.21),
    ],
)
def test_a_group_is_never_in_two_subsets(valid, test):
    for seed in range(6):
        before = random_set(seed)
        t = split_table(before, valid, test, seed)
        assert t.groupby('group').split.nunique().max() == 1
        assert abs(split_fraction(t, 'valid') - valid) < 0.06 and abs(split_fraction(t, 'test') - test) < 0.06, (
            split_fraction(t, 'valid'),
            split_fraction(t, 'test'),
        )
        assert set(t.split) == ({'train', 'valid', 'test'} if test else {'train', 'valid'})
        assert set(t.label[t.split == 'train']) == set(t.label)
        assert before.split.isna().all()  # the given table is not changed
        pd.testing.assert_frame_equal(t.drop(columns='split'), before.drop(columns='split'))


@pytest.mark.parametrize('seed', range(10))
def test_without_groups_classes_are_in_proportion(seed):
    t = split_table(random_set(seed, 200, grouped=False), 0.2, 0.2, seed)
    n = pd.crosstab(t.label, t.split)
    assert (abs(n[['valid', 'test']].sub(0.2 * n.sum(axis=1), axis=0)) <= 1).all(axis=None), n


@pytest.mark.parametrize('seed', range(5))
def test_with_groups_classes_are_nearly_in_proportion(seed):
    t = split_table(random_set(seed, 300), 0.2, 0, seed)
    n = pd.crosstab(t.label, t.split, normalize='columns')
    assert (abs(n.valid - n.train) < 0.1).all(), n


@pytest.mark.parametrize('grouped', [True, False])
def test_only_the_seed_determines_the_split(grouped):
    t = random_set(1, grouped=grouped)
    np.random.seed(0)
    a = split_table(t, seed=5).split.tolist()
    np.random.seed(1)
    b = split_table(t, seed=5).split.tolist()
    assert a == b
    assert len({tuple(split_table(t, seed=s).split) for s in range(6)}) == 6


@pytest.mark.parametrize('seed', range(5))
def test_small_sets_are_split_correctly_or_raise_an_error(seed):
    "Never a leak and never an empty subset, for any number of images."
    made = 0
    for n in range(4, 24):
        t = random_set(100 * seed + n, n, classes=2)
        try:
            t = split_table(t, 0.2, seed=seed)
        except SplitError as e:
            assert ':' in str(e)
            continue
        made += 1
        check_split(t)
        assert t.groupby('group').split.nunique().max() <= 1
        assert {'train', 'valid'} == set(t.split)
    assert made >= 10


def test_an_image_listed_twice_stays_in_one_subset():
    t = random_set(2, 60, grouped=False)
    for seed in range(10):
        s = split_table(pd.concat([t, t], ignore_index=True), seed=seed)
        assert s.groupby('image').split.nunique().max() == 1


def test_a_given_test_set_is_kept():
    t = random_set(3, 120)
    t['split'] = np.where(t.group.isin(sorted(set(t.group.dropna()))[:12]), 'test', None)
    s = split_table(t, 0.25)
    assert s.split[t.split == 'test'].eq('test').all()
    assert s.split[t.split != 'test'].isin(['train', 'valid']).all()


def test_split_summary_counts_images_and_groups():
    t = split_table(random_set(4), 0.2, 0.2)
    s = split_summary(t)
    assert list(s.index) == ['train', 'valid', 'test']
    assert s.images.sum() == len(t)
    assert abs(s.fraction.sum() - 1) < 0.002
    for size in s.index:
        part = t[t.split == size]
        assert s.loc[size, 'images'] == len(part)
        assert s.loc[size, 'groups'] == part.group.nunique() + part.group.isna().sum()
        assert {c: s.loc[size, c] for c in '012'} == part.label.value_counts().to_dict()


def done(**kwargs):
    return split_table(random_set(5)).assign(**kwargs)


@pytest.mark.parametrize(
    'call,why',
    [
        (lambda: split_table(random_set(0), 0), 'valid=0, test=0.0: give fractions with a sum below 1'),
        (lambda: split_table(random_set(0), 1), 'valid=1'),
        (lambda: split_table(random_set(0), 0.6, 0.4), 'a sum below 1'),
        (lambda: split_table(random_set(0), 0.2, -0.1), 'test=-0.1'),
        (lambda: split_table(random_set(0), float('nan')), 'valid=nan'),
        (
            lambda: split_table(random_set(0).assign(label='x')),
            "only one class, 'x': a classifier needs two. Is the folder one level too deep?",
        ),
        (
            lambda: split_table(random_set(0).assign(label=['9'] + ['0'] * 149)),
            "class '9' has one image: it cannot be in both training and validation set",
        ),
        (lambda: split_table(random_set(0).assign(group='same')), 'too few groups: 1, but 5 are needed'),
        (lambda: split_table(random_set(0).assign(group=['a', 'b', 'c'] * 50)), 'too few groups: 3'),
        (lambda: check_split(done(split='train')), "no images in the split 'valid'"),
        (lambda: check_split(done(split='valid')), "no images in the split 'train'"),
        (
            lambda: check_split(done(split=['train'] * 149 + ['holdout'])),
            '1 images have a split other than train, valid or test: holdout',
        ),
        (lambda: check_split(done(split=['train'] * 149 + [None])), '1 images have a split other than'),
        (
            lambda: check_split(done(group='p', split=['train', 'valid'] * 75)),
            "1 groups are in more than one of train, valid and test: p. Empty the column 'split'",
        ),
        (
            lambda: split_table(done(group=None, split=['train', 'valid'] * 75, label=['0', '1'] * 75)),
            'no image of class 1 is left for training: add images',
        ),
    ],
)
def test_invalid_splits(call, why):
    with pytest.raises(SplitError, match=why):
        call()


def test_a_leak_into_a_given_test_set_is_an_error():
    t = random_set(6).assign(group=[f'p{i // 2}' for i in range(150)])
    t['split'] = ['test'] + [None] * 149  # the other image of p0 may be in another subset
    with pytest.raises(SplitError, match='1 groups are in more than one of train, valid and test: p0'):
        split_table(t)
