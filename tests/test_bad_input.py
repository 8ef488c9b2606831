"""Pass damaged or odd images, tables and arguments to the commands.

The result must be one line of error and no output, or a row with the reason.
"""

import json
import math
import os
import pickle
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import FAST, Payload, cli, content, error_line, good, rows_of, table
from PIL import Image

pytestmark = pytest.mark.usefixtures('with_shared_cache')
QUICK = (*FAST, '--weights', 'random')


def broken(tmp_path, folder, *words, out='run', quick=QUICK):
    "Return the error line of a training that must fail before it starts and write nothing."
    target = tmp_path / out
    before = content(folder)
    beside = sorted(p.name for p in tmp_path.iterdir())
    result = cli('train', folder, *quick, '--out', target, *words)
    lines = result.err.splitlines()
    assert result.code in (1, 2), result
    assert len(lines) == 1, result
    assert lines[0].startswith('dr_transfer: error: '), result  # 2: an error in an option
    assert 'phase' not in result.out
    assert 'Traceback' not in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == beside
    assert content(folder) == before
    return lines[0]


def some(folder, flowers, **counts):
    "A folder of class folders with a few of the synthetic flowers each."
    files = sorted(flowers.rglob('*.jpg'))
    for name, n in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            shutil.copy(files[i], folder / name / f'{i}.jpg')
    return folder


def damaged(good_bytes):
    "The three kinds of files that are not images, by name."
    return {'text.jpg': b'<html>404 Not Found</html>', 'cut.jpg': good_bytes[: len(good_bytes) // 2], 'empty.jpg': b''}


# ---------------------------------------------------------------- odd but good images, through training and prediction


def odd_images(source):
    "The same image in every form that a camera, a scanner or an editor may leave: name -> (image, how to save it)."
    with Image.open(source) as im:
        rgb = im.convert('RGB').resize((80, 60))
    a = np.asarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 80).astype(np.uint8), (60, 1))))
    deep = Image.fromarray(a[..., 1].astype(np.uint16) * 257)
    assert deep.mode.startswith('I;16')
    return {
        'grey.jpg': (rgb.convert('L'), {}),
        'grey.png': (rgb.convert('L'), {}),
        'bits.png': (rgb.convert('1'), {}),
        'palette.png': (rgb.quantize(16), {}),
        'palette.gif': (rgb.quantize(16), {}),
        'clear palette.png': (rgb.quantize(16), {'transparency': 3}),
        'deep.png': (deep, {}),
        'deep.tif': (deep, {}),
        'print.jpg': (rgb.convert('CMYK'), {}),
        'print.tif': (rgb.convert('CMYK'), {}),
        'alpha.png': (alpha, {}),
        'grey alpha.png': (alpha.convert('LA'), {}),
        'alpha.webp': (alpha, {}),
        'float.tif': (Image.fromarray(a[..., 0].astype(np.float32) / 255), {}),
        'turned.jpg': (rgb, {'exif': exif}),
        'turned.png': (rgb, {'exif': exif}),
        'UPPER.JPG': (rgb, {}),
        'a name with  spaces .jpg': (rgb, {}),
        '眼底 图像.jpg': (rgb, {}),
        'Löwenzahn №5.png': (rgb, {}),
        'it\'s "quoted".png': (rgb, {}),
        'comma, semicolon; and #.png': (rgb, {}),
        'tiny.png': (rgb.resize((1, 1)), {}),
        'wide.png': (rgb.resize((300, 20)), {}),
    }


BAD = ('text.jpg', 'cut.jpg', 'empty.jpg')
CLASSES = ('daisy', '玫瑰 rose', "tulip's")


@pytest.fixture(scope='session')
def mixed(home, flowers):
    """Synthetic flowers in three classes with odd images and damaged files among them; a class has a Chinese name,
    one a quote.
    """

    folder = home / 'mixed set'
    for name, new in zip(('daisy', 'roses', 'tulips'), CLASSES):
        shutil.copytree(flowers / name, folder / new)
    first = folder / 'daisy' / '0000.jpg'
    odd = []
    for i, (name, (im, how)) in enumerate(odd_images(first).items()):
        path = folder / CLASSES[i % 3] / name
        im.save(path, **how)
        odd.append(str(path))
    for (name, data), c in zip(damaged(first.read_bytes()).items(), CLASSES):
        (folder / c / name).write_bytes(data)
    return folder, sorted(odd), content(folder)


@pytest.fixture(scope='session')
def mixed_run(home, mixed, shared_cache):
    out = home / 'mixed run'
    return out, good('train', mixed[0], *QUICK, '--valid', '0.5', '--out', out)


def test_the_odd_images_have_the_modes_of_their_names(mixed):
    modes = {}
    for path in mixed[1]:
        with Image.open(path) as im:
            modes[Path(path).name] = im.mode
    assert {
        modes[k]
        for k in ('grey.jpg', 'bits.png', 'palette.png', 'print.jpg', 'alpha.png', 'grey alpha.png', 'float.tif')
    } == {'L', '1', 'P', 'CMYK', 'RGBA', 'LA', 'F'}
    assert modes['deep.png'].startswith('I')
    assert modes['deep.tif'].startswith('I;16')
    for name in ('turned.jpg', 'turned.png'):
        with Image.open(next(p for p in mixed[1] if p.endswith(name))) as im:
            assert im.getexif()[0x0112] == 6


def test_training_skips_damaged_files(mixed, mixed_run):
    folder, odd, before = mixed
    out, result = mixed_run
    assert content(folder) == before, 'a file in the data was changed'
    r = json.loads((out / 'record.json').read_text(encoding='utf-8'))
    assert sorted(Path(x['image']).name for x in r['skipped']) == sorted(BAD)
    assert r['data']['skipped'] == 3
    reason = {Path(x['image']).name: x['reason'] for x in r['skipped']}
    assert reason['text.jpg'] == 'not an image'
    assert reason['empty.jpg'] == 'empty file'
    assert reason['cut.jpg'].startswith('cannot be decoded')
    lines = [line for line in result.out.splitlines() if line.startswith('skipped: ')]
    assert len(lines) == 3
    for x in r['skipped']:
        assert any(x['image'] in line and x['reason'] in line for line in lines)
    assert r['data']['images'] == 27 + len(odd)
    t = table(out / 'predictions.csv')
    assert {Path(i).name for i in t.image} & set(BAD) == set()
    assert {'玫瑰 rose', "tulip's", 'daisy'} == set(t.target)
    assert list(t.columns)[4:] == ['p_daisy', "p_tulip's", 'p_玫瑰 rose', 'set']
    assert np.isfinite(t.iloc[:, 4:7].to_numpy()).all()
    assert set(t.image) & set(odd), 'odd images in both subsets'
    assert set(odd) - set(t.image), 'odd images in both subsets'


def test_every_odd_image_is_predicted_and_every_damaged_one_has_a_reason(mixed, mixed_run):
    folder, odd, before = mixed
    result = good('predict', mixed_run[0], folder)
    rows = {r['image']: r for r in rows_of(result.out)}
    assert list(rows) == sorted(rows, key=Path)
    assert len(rows) == 27 + len(odd) + 3
    assert '3 could not be predicted' in result.err
    assert set(odd) <= set(rows)
    assert content(folder) == before
    for image, r in rows.items():
        p = [r['p_daisy'], r["p_tulip's"], r['p_玫瑰 rose']]
        if Path(image).name in BAD:
            assert r['prediction'] == '', r
            assert p == ['', '', ''], r
            assert r['error'], r
        else:
            assert r['error'] == '', r
            for x in p:
                assert math.isfinite(float(x)), r
            assert sum(map(float, p)) == pytest.approx(1, abs=1e-4), r
            assert r['prediction'] == ('daisy', "tulip's", '玫瑰 rose')[int(np.argmax(list(map(float, p))))], r
    t = table(mixed_run[0] / 'predictions.csv')
    for image, p in zip(t.image, t.p_daisy):
        assert float(rows[image]['p_daisy']) == pytest.approx(p, abs=1e-3), image


def test_an_odd_image_is_predicted_as_what_it_shows(mixed, mixed_run, tmp_path):
    "The same image in another form has the same prediction: rotated by EXIF, in an alpha channel, in CMYK, in 16 bits."
    _, odd, _ = mixed
    path = {Path(p).name: Path(p) for p in odd}
    with Image.open(path['turned.png']) as im:
        im.transpose(Image.Transpose.ROTATE_270).save(tmp_path / 'upright.png')
    with Image.open(path['turned.png']) as im:
        im.convert('RGB').save(tmp_path / 'ignored.png', exif=b'')
    with Image.open(path['deep.png']) as im:
        Image.fromarray((np.asarray(im) // 257).astype(np.uint8)).save(tmp_path / 'shallow.png')
    with Image.open(path['alpha.png']) as im:
        Image.alpha_composite(Image.new('RGBA', im.size, (0, 0, 0, 255)), im).convert('RGB').save(tmp_path / 'flat.png')
    new = ('upright.png', 'ignored.png', 'shallow.png', 'flat.png')
    rows = rows_of(good('predict', mixed_run[0], *odd, *[tmp_path / n for n in new]).out)
    p_daisy = {Path(row['image']).name: float(row['p_daisy']) for row in rows}

    def near(a, b):
        "Return whether the predictions are equal"
        return abs(p_daisy[a] - p_daisy[b]) < 1e-7

    assert near('turned.png', 'upright.png')
    assert near('deep.png', 'shallow.png')
    assert near('deep.tif', 'shallow.png')
    assert near('alpha.png', 'flat.png')
    assert near('it\'s "quoted".png', 'ignored.png'), 'the model does not distinguish other images'
    assert near('grey.png', 'shallow.png') is False, 'the model does not distinguish other images'
    assert not near('turned.png', 'ignored.png'), 'rotation has no effect, so the first assertion cannot fail'


def test_one_odd_image_of_each_kind_among_fundus_images(run, mixed):
    "The reader of fundus images, which trims and pads, accepts them too."
    rows = rows_of(good('predict', run, *mixed[1]).out)
    assert len(rows) == len(mixed[1])
    for r in rows:
        assert r['error'] == ''
        assert 0 <= float(r['p_referable']) <= 1


@pytest.mark.parametrize('kind', ['lab', 'thin', 'animation', 'huge'])
@pytest.mark.parametrize('which', ['dr', 'flowers'])
def test_one_damaged_image_does_not_stop_the_others(tmp_path, run, mixed_run, fundus_data, kind, which):
    "Each damaged file has a row with a prediction or an error."
    image = tmp_path / {'animation': 'x.gif', 'lab': 'x.tif'}.get(kind, 'x.png')
    model = run if which == 'dr' else mixed_run[0]
    if kind == 'lab':
        Image.new('LAB', (40, 40), (90, 130, 120)).save(image)
    if kind == 'thin':
        Image.new('RGB', (2000, 1), (90, 30, 20)).save(image)
    if kind == 'animation':
        frames = [Image.new('P', (40, 40), i) for i in range(3)]
        frames[0].save(image, save_all=True, append_images=frames[1:])
    if kind == 'huge':
        Image.new('1', (20000, 20000)).save(image)  # PIL refuses to open so many pixels
    fine = sorted((fundus_data / 'images').iterdir())[0]
    a, b = rows_of(good('predict', model, image, fine).out)
    assert b['prediction']
    assert not b['error']
    assert bool(a['prediction']) != bool(a['error'])
    assert bool(a['error']) == (kind in ('huge', 'thin'))
    assert ('strip' in a['error']) == (kind == 'thin')


def test_a_name_that_is_not_text(tmp_path, run, fundus_data):
    "Linux accepts any bytes as a name: there is a row, and the table can be written."
    in_folder = tmp_path / 'in'
    try:
        in_folder.mkdir()
        with open(os.fsencode(in_folder) + b'/\xff\xfe.jpg', 'wb') as f:
            f.write(next((fundus_data / 'images').iterdir()).read_bytes())
    except OSError:
        pytest.skip('this file system takes only text')
    result = cli('predict', run, in_folder, '--out', tmp_path / 'p.csv')
    assert result.code in (0, 1)
    assert 'Traceback' not in result.err
    assert len(result.err.splitlines()) == 1
    assert (tmp_path / 'p.csv').exists() == (result.code == 0)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith('.')) == []


# ---------------------------------------------------------------- folders


def test_a_folder_that_does_not_exist(tmp_path):
    assert 'there is no' in error_line('train', tmp_path / 'none', *QUICK, '--out', tmp_path / 'run')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('task', ['flowers', 'dr'])
@pytest.mark.parametrize(
    'files',
    [
        (),
        ('notes.txt',),
        ('sub/notes.txt', '.hidden.jpg'),
    ],
)
def test_an_empty_folder(tmp_path, task, files):
    data = tmp_path / 'data'
    data.mkdir()
    for f in files:
        (data / f).parent.mkdir(exist_ok=True)
        (data / f).write_text('x')
    line = broken(tmp_path, data, '--task', task)
    assert 'no images' in line
    assert str(data) in line


def test_a_class_with_one_image(tmp_path, flowers):
    line = broken(tmp_path, some(tmp_path / 'data', flowers, daisy=6, rose=1, tulip=6))
    assert "'rose' has one image" in line
    assert 'Add images' in line


def test_a_class_with_one_image_that_can_be_read(tmp_path, flowers):
    data = tmp_path / 'data'
    some(data, flowers, daisy=6, rose=2)
    (data / 'rose' / '1.jpg').write_bytes(b'')
    assert "'rose' has one image" in broken(tmp_path, data)


def test_one_class(tmp_path, flowers):
    assert "only one class, 'daisy'" in broken(tmp_path, some(tmp_path / 'data', flowers, daisy=6))


def test_images_in_no_class(tmp_path, flowers):
    data = tmp_path / 'data'
    some(data, flowers, daisy=3, rose=3)
    shutil.copy(data / 'daisy' / '0.jpg', data / 'loose.jpg')
    line = broken(tmp_path, data)
    assert 'loose.jpg' in line
    assert 'class' in line


def test_nothing_that_can_be_read(tmp_path, flowers):
    data = tmp_path / 'data'
    some(data, flowers, daisy=2, rose=2)
    for f, b in zip(sorted(data.rglob('*.jpg')), (b'', b'text', b'', b'\xff\xd8\xff')):
        f.write_bytes(b)
    line = broken(tmp_path, data)
    assert 'none of 4 images' in line
    assert 'empty file' in line


def no_entry(folder):
    "os.scandir without permission to read `folder`."
    real = os.scandir

    def scandir(path='.'):
        if not isinstance(path, int) and Path(os.fsdecode(path)) == Path(folder):
            raise PermissionError(13, 'Permission denied', str(folder))
        return real(path)

    return scandir


def test_a_folder_without_permission(tmp_path, flowers, run, monkeypatch):
    "The error of the system is simulated, because an administrator does not get it."
    data = some(tmp_path / 'data', flowers, daisy=6, rose=6)
    with monkeypatch.context() as m:
        m.setattr(os, 'scandir', no_entry(data / 'rose'))
        for words in (
            ('train', data, *QUICK, '--out', tmp_path / 'run'),
            ('predict', run, data, '--out', tmp_path / 'p.csv'),
        ):
            line = error_line(*words)
            assert str(data / 'rose') in line
            assert 'permission' in line.lower()
    assert [p.name for p in tmp_path.iterdir()] == ['data']


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='permissions do not hold for root')
def test_a_folder_without_permission_on_disk(tmp_path, flowers, run):
    data = some(tmp_path / 'data', flowers, daisy=6, rose=6)
    (data / 'rose').chmod(0)
    try:
        for words in (
            ('train', data, *QUICK, '--out', tmp_path / 'run'),
            ('predict', run, data, '--out', tmp_path / 'p.csv'),
        ):
            line = error_line(*words)
            assert str(data / 'rose') in line
            assert 'permission' in line.lower()
    finally:
        (data / 'rose').chmod(stat.S_IRWXU)
    assert [p.name for p in tmp_path.iterdir()] == ['data']


def test_a_folder_without_write_permission(tmp_path, flowers, monkeypatch):
    data = some(tmp_path / 'data', flowers, daisy=6, rose=6)

    def denied(fd):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(os, 'fsync', denied)
    assert 'Permission denied' in error_line('train', data, *QUICK, '--out', tmp_path / 'run')
    assert [p.name for p in tmp_path.iterdir()] == ['data']


def test_an_image_without_permission(run, fundus_data, monkeypatch):
    a, b = sorted((fundus_data / 'images').iterdir())[:2]
    real = os.open

    def opened(f, *args, **kwargs):
        if str(f) == str(a):
            raise PermissionError(13, 'Permission denied', str(a))
        return real(f, *args, **kwargs)

    monkeypatch.setattr(os, 'open', opened)
    x, y = rows_of(good('predict', run, a, b).out)
    assert x['prediction'] == ''
    assert 'permission' in x['error']
    assert y['prediction']
    assert not y['error']


# ---------------------------------------------------------------- CSV of labels


@pytest.fixture
def graded(fundus_data):
    return pd.read_csv(fundus_data / 'labels.csv')


@pytest.mark.parametrize(
    'change, why',
    [
        (lambda t: t.assign(image=['gone.jpg', 'lost.jpg', *t.image[2:]]), ['2 of 40 rows', 'gone.jpg', 'lost.jpg']),
        (lambda t: t.drop(columns='grade'), ['no column for the labels', 'image, patient, eye']),
        (lambda t: t.drop(columns='image'), ['no column for the image names', 'grade, patient, eye']),
        (lambda t: t.assign(grade=[5, *t.grade[1:]]), ["unknown referable: '5'", '0, 1, 2, 3, 4']),
        (lambda t: t.assign(grade=['severe', *t.grade[1:]]), ["unknown referable: 'severe'", '0, 1, 2, 3, 4']),
        (lambda t: t.assign(grade=[-1, 2.5, *t.grade[2:]]), ["unknown referable: '-1.0', '2.5'", '2 images']),
        (lambda t: pd.concat([t, t[:1].assign(grade=(t.grade[0] + 1) % 5)]), ['two labels', 'p0000']),
        (lambda t: t.assign(grade=0), ["only one class, 'no'"]),
        (lambda t: t[:0], ['no images']),
        (lambda t: t.assign(split=['valid', *['train'] * 39]), ['two subsets']),
        (lambda t: t.assign(split='holdout'), ['holdout']),
    ],
    ids=[
        'missing files',
        'no label column',
        'no image column',
        'grade 5',
        'grade in words',
        'grades -1 and 2.5',
        'two labels',
        'one class',
        'no rows',
        'leak',
        'unknown side',
    ],
)
def test_invalid_csv_files(tmp_path, fundus_data, graded, change, why):
    change(graded).to_csv(tmp_path / 'labels of mine.csv', index=False)
    line = broken(tmp_path, fundus_data, '--task', 'dr', '--labels', tmp_path / 'labels of mine.csv')
    assert [w for w in why if w not in line] == []


def test_an_unknown_grade_with_the_target_grade(tmp_path, fundus_data, graded):
    graded.assign(grade=[7, *graded.grade[1:]]).to_csv(tmp_path / 'l.csv', index=False)
    assert "unknown grade: '7'" in broken(
        tmp_path, fundus_data, '--task', 'dr', '--target', 'grade', '--labels', tmp_path / 'l.csv'
    )


@pytest.mark.parametrize(
    'data',
    [b'', b'image,grade\n\xff\xfe\x00,1\n', b'image,grade\na.jpg,1,2,3\nb.jpg,1\n"c', b'\x89PNG\r\n\x1a\n\x00\x00'],
    ids=['empty', 'not UTF-8', 'ragged', 'an image'],
)
def test_files_that_are_not_csv(tmp_path, fundus_data, data):
    l_csv = tmp_path / 'l.csv'
    l_csv.write_bytes(data)
    assert str(l_csv) in broken(tmp_path, fundus_data, '--task', 'dr', '--labels', l_csv)


def test_a_csv_that_does_not_exist(tmp_path, fundus_data):
    assert str(tmp_path / 'none.csv') in broken(
        tmp_path, fundus_data, '--task', 'dr', '--labels', tmp_path / 'none.csv'
    )


def test_damaged_images_in_a_csv(tmp_path, fundus_data):
    "They are skipped, listed and left where they are; training goes on with the others."
    source = tmp_path / 'fundus'
    shutil.copytree(fundus_data, source)
    files = sorted((source / 'images').iterdir())
    for f, b in zip(files, damaged(files[3].read_bytes()).values()):
        f.write_bytes(b)
    before = content(source)
    result = good('train', source, '--task', 'dr', *QUICK, '--out', tmp_path / 'run')
    r = json.loads((tmp_path / 'run' / 'record.json').read_text())
    assert sorted(x['image'] for x in r['skipped']) == sorted(map(str, files[:3]))
    assert r['data']['images'] == 37
    assert [line.split(': ')[1] for line in result.out.splitlines() if line.startswith('skipped')] == list(
        map(str, files[:3])
    )
    assert content(source) == before


def test_the_record_is_json_where_a_metric_has_no_value(tmp_path, fundus_data, graded):
    "A validation set without the disease has no sensitivity and no AUC."
    positive = graded.groupby('patient').grade.transform('max') >= 2
    graded.assign(split=np.where(~positive & (graded.patient > 'p0009'), 'valid', 'train')).to_csv(
        tmp_path / 'l.csv', index=False
    )
    good('train', fundus_data, '--task', 'dr', '--labels', tmp_path / 'l.csv', *QUICK, '--out', tmp_path / 'run')

    def raise_error(name):
        raise AssertionError(f'{name} is no JSON')

    r = json.loads((tmp_path / 'run' / 'record.json').read_text(), parse_constant=raise_error)
    assert r['validation']['accuracy'] >= 0
    assert r['validation']['sensitivity'] is None


# ---------------------------------------------------------------- names and numbers


@pytest.mark.parametrize(
    'words, why',
    [
        (
            ('--arch', 'efficientnet_lite9'),
            "unknown backbone 'efficientnet_lite9'. Known, nearest first: efficientnet_lite",
        ),
        (('--arch', 'test_resnett'), 'nearest first: test_resnet,'),
        (('--arch', 'torchvision.resnet81'), 'nearest first: '),
        (('--arch', '../../etc/passwd'), "unknown backbone '../../etc/passwd'"),
        (('--task', 'flower'), "unknown task 'flower'. Known, nearest first: flowers, "),
        (('--task', 'dri'), "unknown task 'dri'. Known, nearest first: dr, "),
        (('--plan', 'fine_tun'), "unknown plan 'fine_tun'. Known, nearest first: fine_tune, "),
        (('--plan', 'haed'), "unknown plan 'haed'. Known, nearest first: head, "),
        (('--task', 'dr', '--target', 'grades'), "'grades'. Known, nearest first: grade, referable"),
        (('--target', 'grade'), "unknown target of task 'flowers' 'grade'. Known, nearest first: class"),
        (('--size', '3'), "--size: '3'"),
        (('--bs', '0'), "--bs: '0'"),
        (('--epochs', '0'), "--epochs: '0'"),
        (('--epochs', '-2'), "--epochs: '-2'"),
        (('--valid', '1'), "--valid: '1'"),
        (('--valid', '-0.2'), "--valid: '-0.2'"),
    ],
)
def test_names_and_numbers(tmp_path, flowers, words, why):
    line = broken(tmp_path, flowers, *words)
    assert why in line


@pytest.mark.parametrize(
    'words',
    [
        ('--images', '0'),
        ('--images', '1'),
        ('--size', '8'),
    ],
)
def test_a_demo_without_images(tmp_path, words):
    error_line('demo', '--out', tmp_path / 'demo', *words)


@pytest.mark.parametrize(
    'words',
    [
        ('--images', '0'),
        ('--size', '8'),
    ],
)
def test_a_demo_can_be_repeated_after_an_error(tmp_path, words, monkeypatch):
    import dr_transfer.core

    error_line('demo', '--out', tmp_path / 'demo', *words)

    def reached(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(dr_transfer.core, 'build_learner', reached)
    assert cli('demo', '--images', '4', '--size', '64', '--out', tmp_path / 'demo').code == 130, (
        'it made the images and reached the training'
    )


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize('name', ['w.pth', 'w.pt', 'w.bin', 'w.safetensors', 'w'])
@pytest.mark.parametrize('way', ['pickle', 'torch', 'tensors'])
def test_a_malicious_weights_file(tmp_path, flowers, name, way):
    "It raises an error, and its code does not run."
    import torch

    hit = tmp_path / 'hit'
    file = tmp_path / name
    if way == 'pickle':
        file.write_bytes(pickle.dumps(Payload(hit)))
    elif way == 'torch':
        torch.save(Payload(hit), file)
    else:
        torch.save({'conv1.weight': torch.zeros(3), 'x': Payload(hit)}, file)
    if name == 'w.pth':  # it would run with pickle
        if way == 'pickle':
            pickle.loads(file.read_bytes())
        else:
            torch.load(file, weights_only=False)
        hit.rmdir()
    line = broken(tmp_path, flowers, '--weights', file, quick=FAST)
    assert str(file) in line
    assert not hit.exists()


def test_files_that_are_not_weights(tmp_path, flowers, weights):
    import torch
    from safetensors.torch import load_file, save_file

    sd = load_file(weights)
    few = dict(list(sd.items())[:3])
    other = {k: torch.zeros(7) for k in sd}
    save_file(few, tmp_path / 'few.safetensors')
    save_file(other, tmp_path / 'other.safetensors')
    (tmp_path / 'text.safetensors').write_text('no tensors')
    (tmp_path / 'text.pth').write_text('no tensors')
    (tmp_path / 'empty.pth').touch()
    (tmp_path / 'cut.safetensors').write_bytes(weights.read_bytes()[:500])
    for name, why in (
        ('none.safetensors', 'there is no weights file'),
        ('few.safetensors', 'does not fit'),
        ('other.safetensors', 'shape (7,)'),
        ('text.safetensors', 'cannot be read'),
        ('text.pth', 'cannot be read'),
        ('empty.pth', 'cannot be read'),
        ('cut.safetensors', 'cannot be read'),
    ):
        line = broken(tmp_path, flowers, '--weights', tmp_path / name, quick=FAST)
        assert name in line, line
        assert why in line, line


def test_weights_in_a_list(tmp_path, flowers):
    import torch

    torch.save([torch.zeros(3)], tmp_path / 'list.pth')
    assert 'list.pth' in broken(tmp_path, flowers, '--weights', tmp_path / 'list.pth', quick=FAST)


def test_pretrained_weights_that_cannot_be_downloaded(tmp_path, flowers, monkeypatch):
    "Without a network: an error that says where to put the file, without a long wait."
    from dr_transfer.models import downloads

    monkeypatch.setattr(downloads, 'reachable', lambda *a, **k: False)
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    line = broken(tmp_path, flowers, quick=FAST)
    assert 'test_resnet' in line
    assert '--weights FILE' in line
    assert 'random' in line


# ---------------------------------------------------------------- predict


def test_damaged_files_among_good_ones(tmp_path, run, fundus_data):
    fine = sorted((fundus_data / 'images').iterdir())[0]
    for name, data in damaged(fine.read_bytes()).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / 'readme.txt').write_text('given by name, so it has a row')
    given = [tmp_path / 'text.jpg', fine, tmp_path / 'cut.jpg', tmp_path / 'empty.jpg', tmp_path / 'readme.txt']
    result = good('predict', run, *given, '--out', tmp_path / 'p.csv')
    rows = rows_of((tmp_path / 'p.csv').read_text(encoding='utf-8'))
    assert [r['image'] for r in rows] == list(map(str, given))
    assert '1 images predicted, 4 could not be predicted' in result.err
    assert [r['error'] for r in rows[:2]] == ['not an image', '']
    assert rows[2]['error'].startswith('cannot be decoded')
    assert rows[3]['error'] == 'empty file'
    assert (
        [bool(r['prediction']) for r in rows]
        == [bool(r['p_no']) for r in rows]
        == [bool(r['p_referable']) for r in rows]
        == [False, True, False, False, False]
    )
    assert float(rows[1]['p_no']) == pytest.approx(float(rows_of(good('predict', run, fine).out)[0]['p_no']), abs=1e-5)
    assert (tmp_path / 'empty.jpg').read_bytes() == b''


@pytest.mark.parametrize('out', [False, True])
def test_no_readable_image_is_an_error(tmp_path, run, fundus_data, out):
    for name, data in damaged(next((fundus_data / 'images').iterdir()).read_bytes()).items():
        (tmp_path / name).write_bytes(data)
    table = tmp_path.with_name(f'{tmp_path.name} table.csv')
    result = cli('predict', run, tmp_path, *(['--out', table] if out else []))
    rows = rows_of(table.read_text() if out else result.out)
    number, error = result.err.splitlines()
    assert result.code == 1
    assert '3 could not be predicted' in number
    assert 'error: 3 of 3 images have no prediction' in error
    assert len(rows) == 3
    for r in rows:
        assert r['error']
        assert not r['prediction']


def test_predict_without_a_model_or_images(tmp_path, run, fundus_data):
    empty = tmp_path / 'empty'
    empty.mkdir()
    image = next((fundus_data / 'images').iterdir())
    assert 'is not a model folder' in error_line('predict', tmp_path / 'none', image)
    assert 'is not a model folder' in error_line('predict', empty, image)
    assert 'no images' in error_line('predict', run, empty)
    assert 'does not exist' in error_line('predict', run, tmp_path / 'none.jpg', image)
    assert 'is not a model folder' in error_line('predict', image, image)
    assert [p.name for p in tmp_path.iterdir()] == ['empty']


# ---------------------------------------------------------------- training without a result


@pytest.mark.parametrize('epochs', ['1', '2'])
def test_googlenet_from_random_weights_is_an_error(tmp_path, fundus_data, epochs):
    "Version 0.1.0 wrote a run of valid_loss 182542319616 with exit code 0"
    result = cli(
        'train',
        fundus_data,
        '--task',
        'dr',
        '--arch',
        'googlenet',
        '--weights',
        'random',
        '--size',
        '64',
        '--plan',
        'fine_tune',
        '--epochs',
        epochs,
        '--runtime',
        'plain',
        '--out',
        tmp_path / 'run',
    )
    errors = result.err.splitlines()
    assert result.code == 1
    assert len(errors) == 1
    assert errors[0].startswith('dr_transfer: error: training diverged in epoch')
    assert '--plan random_init' in errors[0]
    assert '--plan head' not in errors[0]
    assert "warning: the weights are random, and plan 'fine_tune' is for pretrained weights" in result.out
    assert not (tmp_path / 'run').exists()


# ---------------------------------------------------------------- no validation or no training images


def with_split(folder, fundus_data, split, damage=''):
    "The synthetic fundus images with a split by patient, the images of one subset damaged."
    shutil.copytree(fundus_data, folder)
    t = pd.read_csv(folder / 'labels.csv')
    t['split'] = t.patient.map(split)
    t.to_csv(folder / 'labels.csv', index=False)
    for name in t.image[t.split == damage]:
        (folder / 'images' / name).write_bytes(b'nothing')
    return folder


def held_out(patient):
    return 'valid' if patient in ('p0003', 'p0004', 'p0005', 'p0006') else 'train'


DR_TASK = ('--task', 'dr')


def test_training_images_used_for_validation_are_reported(tmp_path, fundus_data):
    for name, split, damage in (('all', lambda p: 'train', ''), ('unreadable', held_out, 'valid')):
        folder = with_split(tmp_path / name, fundus_data, split, damage)
        out = tmp_path / f'{name} run'
        result = good('train', folder, *DR_TASK, *QUICK, '--out', out)
        start = "no usable image is in the split 'valid': "
        (line,) = [s for s in result.out.splitlines() if s.startswith(start)]
        assert line.endswith("of the split 'train' become validation images")
        assert ('skipped: ' in result.out) == (damage != '')
        notes = json.loads((out / 'record.json').read_text())['data']['notes']
        assert any('become validation images' in s for s in notes)
    for name, folder in (('no split', fundus_data), ('a split', with_split(tmp_path / 'good', fundus_data, held_out))):
        result = good('train', folder, *DR_TASK, *QUICK, '--out', tmp_path / f'run with {name}')
        assert 'become validation images' not in result.out


@pytest.mark.parametrize(
    'split, damage, why',
    [
        (lambda p: 'test', '', "every image is in the split 'test'"),
        (lambda p: 'valid', '', "no images in the split 'train' \\(valid: 40\\)"),
        (
            held_out,
            'train',
            "no images in the split 'train' \\(valid: 8\\).* 32 are skipped, such as .*: not an image",
        ),
    ],
)
def test_no_training_images(tmp_path, fundus_data, split, damage, why):
    line = broken(tmp_path, with_split(tmp_path / 'data', fundus_data, split, damage), *DR_TASK)
    assert re.search(why, line), line


def test_evaluation_of_validation_images_that_cannot_be_read(tmp_path, fundus_data):
    run = tmp_path / 'run'
    good('train', fundus_data, *DR_TASK, *QUICK, '--out', run)
    folder = shutil.copytree(fundus_data, tmp_path / 'data')
    for row in rows_of((run / 'predictions.csv').read_text()):
        (folder / 'images' / Path(row['image']).name).write_bytes(b'nothing')
    line = error_line('evaluate', run, folder, '--split', 'valid', '--out', tmp_path / 'report.html')
    assert 'valid' in line, line
    assert not (tmp_path / 'report.html').exists(), line


def test_cross_validation_excludes_the_test_images(tmp_path, fundus_data):
    "Test images are kept for the final test; images named train or valid are used in the folds."
    from dr_transfer.data.tasks import get_task
    from dr_transfer.evaluation.cross_validation import fold_tables

    def folds(folder):
        lines = []
        return list(fold_tables(folder, get_task('dr', 64), folds=3, say=lines.append).values()), lines

    names = pd.read_csv(fundus_data / 'labels.csv').patient.unique()
    for n, split in ((0, 'valid'), (8, 'test')):
        splits = {patient: split if patient in names[:4] else 'train' for patient in names}
        tables, lines = folds(with_split(tmp_path / split, fundus_data, splits))
        reported = f"{n} images with the split 'test' are excluded, the other {40 - n} are in the folds"
        assert lines[2] == reported
        assert [len(t) for t in tables] == [40 - n] * 3
        assert n == 0 or not set(tables[0].group) & set(names[:4])
    tables, lines = folds(fundus_data)
    assert len(lines) == 2
    assert lines[0].startswith('patients: ')
    assert lines[1].startswith('no source column found')
    with pytest.raises(ValueError, match="every image is in the split 'test'"):
        folds(with_split(tmp_path / 'all', fundus_data, lambda p: 'test'))
