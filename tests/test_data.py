"Test tasks: targets, how images are read, and the contents of batches."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock
from fastai.data.transforms import Normalize
from PIL import Image

from dr_transfer.data.augment import AUGMENTATIONS
from dr_transfer.data.fundus import read_image
from dr_transfer.data.split import SplitError, split_table
from dr_transfer.data.table import label_table
from dr_transfer.data.tasks import (
    GRADE,
    REFERABLE,
    TASKS,
    ReadImage,
    Target,
    Task,
    class_names,
    encode_target,
    get_task,
    task_datablock,
    task_dataloaders,
    task_table,
)
from dr_transfer.data.views import VIEWS
from dr_transfer.synthetic.fundus import make_dr

CHANGES = 'mirror+random_crop+colour_jitter+flowers'  # every augmentation that changes pixels


@pytest.fixture(scope='module')
def dr(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'dr'
    make_dr(folder, n=48, size=64)
    return folder


def loaders(folder, task='dr', target=None, size=48, augment=None, bs=8, **kw):
    task = get_task(task, size, augment)
    chosen_target = task.target(target)
    t = task_table(folder, chosen_target)
    return t, task, task_dataloaders(t, task, chosen_target, bs, **{'device': 'cpu', **kw})


def pixels(x, mean=0.5, std=0.5):
    "Images (n, 3, h, w) of uint8 from a normalised batch"
    return (torch.Tensor(x.cpu()) * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)


def read(task, name):
    return torch.from_numpy(np.array(read_image(name, task.size, task.reader, task.fit))).permute(2, 0, 1)


# ---------------------------------------------------------------- what is predicted


def test_known_tasks():
    assert set(TASKS) >= {'flowers', 'dr'}
    f = TASKS['flowers']
    d = TASKS['dr']
    assert [t.name for t in f.targets] == ['class']
    assert {t.name for t in d.targets} == {'grade', 'referable'}
    for t in (f, d):
        assert t.size >= 128
        assert AUGMENTATIONS[t.augment]
        for chosen_target in t.targets:
            assert t.metrics[chosen_target.name]
    assert f.metrics['class'] == ('accuracy',)
    assert f.augment == 'mirror_near'
    assert AUGMENTATIONS[f.augment].keeps_color
    assert 'kappa' in d.metrics['grade']
    assert {'auc', 'sensitivity', 'specificity'} <= set(d.metrics['referable'])


def test_dr_keeps_the_complete_disc_and_its_colours():
    d = TASKS['dr']
    for n in d.augment.split('+'):
        a = AUGMENTATIONS[n]
        assert a.keeps_whole_image, n
        assert a.keeps_color, n
        assert a.keeps_left_right, n
    assert d.reader == 'fundus_and_local'
    assert d.fit == 'pad'


@pytest.mark.parametrize(
    'label,grade,referable',
    [
        ('0', '0', 'no'),
        ('1', '1', 'no'),
        ('2', '2', 'referable'),
        ('3', '3', 'referable'),
        ('4', '4', 'referable'),
        ('2.0', '2', 'referable'),
        ('1.0', '1', 'no'),
    ],
)
def test_grades(label, grade, referable):
    t = pd.DataFrame({'image': ['a.jpg'], 'label': [label]})
    result = encode_target(t, GRADE).target.tolist()
    assert result == [grade]
    assert encode_target(t, REFERABLE).target.tolist() == [referable]
    assert GRADE.classes == ('0', '1', '2', '3', '4')
    assert len(REFERABLE.classes) == 2


@pytest.mark.parametrize('label', ['5', '-1', '1.5', 'mild', '', 'nan', 'inf', 'None'])
@pytest.mark.parametrize('target', [GRADE, REFERABLE], ids=lambda t: t.name)
def test_labels_that_are_not_grades(label, target):
    t = pd.DataFrame({'image': ['a.jpg', 'b.jpg'], 'label': ['2', label]})
    with pytest.raises(ValueError) as e:
        encode_target(t, target)
    assert '1 images' in str(e.value)
    assert 'b.jpg' in str(e.value)
    assert '0, 1, 2, 3, 4' in str(e.value)
    assert 'target' not in t.columns  # the table is not changed


def test_class_names():
    t = pd.DataFrame({'image': list('abc'), 'label': ['x', 'b', 'x'], 'target': ['x', 'b', 'x']})
    result = class_names(t, Target('class'))
    assert result == ['b', 'x']
    assert class_names(t.assign(target='0'), GRADE) == ['0', '1', '2', '3', '4']  # also those that do not occur
    out = encode_target(t.drop(columns='target'), Target('class'))
    assert out.target.tolist() == out.label.tolist()


# ---------------------------------------------------------------- the table of a task


def test_a_table_is_split_by_the_target(dr):
    "The labels stay, the split is stratified by the target and keeps patients together; the seed determines it."
    t = task_table(dr, REFERABLE)
    assert list(t.columns) == ['image', 'label', 'group', 'split', 'data_eye', 'target']
    assert set(t.label) > {'0', '2'}
    assert set(t.target) == {'no', 'referable'}
    assert t.target.tolist() == encode_target(t.drop(columns='target'), REFERABLE).target.tolist()
    assert len(t) == 48
    result = t.groupby('group').split.nunique().max()
    assert result == 1
    assert set(t.split) == {'train', 'valid'}
    fraction = t.target.eq('referable').groupby(t.split).mean()
    assert abs(fraction.train - fraction.valid) < 0.2
    assert (t.split == 'valid').mean() == pytest.approx(0.2, abs=0.05)
    assert task_table(dr, REFERABLE).equals(t)
    assert not task_table(dr, REFERABLE, seed=1).split.equals(t.split)
    assert (task_table(dr, REFERABLE, valid=0.5).split == 'valid').mean() == pytest.approx(0.5, abs=0.1)
    assert task_table(label_table(dr), REFERABLE)[['image', 'split']].equals(t[['image', 'split']]), (
        'a table gives another split than its folder'
    )


def test_a_table_from_labels_beside_a_folder(dr, tmp_path):
    labels = pd.read_csv(dr / 'labels.csv').assign(
        grade=lambda t: (t.grade + 1) % 5, split=lambda t: np.where(t.patient < 'p0005', 'valid', 'train')
    )
    labels.to_csv(tmp_path / 'l.csv', index=False)
    for given in (labels, tmp_path / 'l.csv'):
        t = task_table(dr, GRADE, given)
        assert dict(zip((n.rsplit('/', 1)[-1] for n in t.image), t.target)) == dict(
            zip(labels.image, labels.grade.astype(str))
        )
        assert (t.split == 'valid').tolist() == (t.group < 'p0005').tolist()
    with pytest.raises(ValueError, match="unknown grade: '9'"):
        task_table(dr, GRADE, labels.assign(grade=9))
    with pytest.raises(SplitError, match='valid=1'):
        task_table(dr, GRADE, valid=1)
    with pytest.raises(SplitError, match='only one class'):
        task_table(dr, REFERABLE, labels.assign(grade=0).drop(columns='split'))


# ---------------------------------------------------------------- tasks by name, and custom tasks


def test_get_task():
    assert get_task('dr') is TASKS['dr']
    t = get_task('dr', 128, 'none')
    assert (t.size, t.augment, t.name, t.targets) == (128, 'none', 'dr', TASKS['dr'].targets)
    assert TASKS['dr'].size != 128
    assert TASKS['dr'].augment != 'none'
    assert get_task(t) is t
    assert get_task(t, 64).size == 64
    assert t.target().name == t.targets[0].name
    assert t.target('grade') is GRADE


@pytest.mark.parametrize(
    'make,words',
    [
        (lambda: get_task('flower'), ('flower', 'flowers')),
        (lambda: get_task('dr').target('grades'), ('grades', 'grade', 'dr')),
        (lambda: Task('x', reader='fundu'), ('fundu', 'fundus')),
        (lambda: Task('x', fit='stretch'), ('stretch', 'squish')),
        (lambda: Task('x', size=8), ('8', '16')),
        (lambda: Task('x', size=64.0), ('64.0',)),
        (lambda: Task('x', augment='mirrors'), ('mirrors', 'mirror')),
        (lambda: get_task('dr', size=0), ('0',)),
        (lambda: get_task('dr', augment='mirror+what'), ('what',)),
    ],
)
def test_invalid_arguments(make, words):
    with pytest.raises(ValueError) as e:
        make()
    for w in words:
        assert w in str(e.value)


def test_custom_task_in_a_few_lines(dr):
    hand = Task(
        'hands',
        (Target('eye', ('left', 'right'), lambda s: s.split('_')[-1], 'NUMBER_left, NUMBER_right'),),
        size=32,
        augment='none',
    )
    t = label_table(dr)
    t['label'] = [n.rsplit('/', 1)[-1].removesuffix('.jpg') for n in t.image]
    t = encode_target(t, hand.target())
    assert set(t.target) == {'left', 'right'}
    for n, c in zip(t.image, t.target):
        assert n.endswith(f'{c}.jpg')
    dls = task_dataloaders(split_table(t.assign(label=t.target)), hand, hand.target(), bs=4, device='cpu')
    x, _y = dls.one_batch()
    assert x.shape == (4, 3, 32, 32)
    assert list(dls.vocab) == ['left', 'right']
    with pytest.raises(ValueError, match='NUMBER_left'):
        encode_target(t.assign(label='p1_middle'), hand.target())


# ---------------------------------------------------------------- reading


def fundus(w, h, radius, cut, size=160):
    "A round field on black, cropped at the top and bottom, with a white mark at each end of its width and height"
    y, x = np.mgrid[:h, :w]
    a = np.zeros((h, w, 3), np.uint8)
    field = (np.hypot(x - w / 2, y - h / 2) < radius) & (abs(y - h / 2) < cut)
    a[field] = (180, 90, 40)
    ys, xs = np.nonzero(field)
    r = 5
    for mark in ((h // 2, xs.min() + r), (h // 2, xs.max() - r), (ys.min() + r, w // 2), (ys.max() - r, w // 2)):
        a[np.hypot(x - mark[1], y - mark[0]) < r] = 255
    box = (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1)
    return Image.fromarray(a), box


@pytest.mark.parametrize(
    'w,h,radius,cut',
    [
        (600, 400, 180, 999),
        (600, 400, 180, 130),
        (420, 420, 150, 100),
        (400, 700, 150, 999),
        (900, 300, 140, 999),
    ],
)
def test_a_fundus_image_keeps_its_disc(w, h, radius, cut):
    im, (bw, bh) = fundus(w, h, radius, cut)
    d = get_task('dr', size=160)
    a = np.asarray(ReadImage(d.size, d.reader, d.fit).image(im)).astype(int)
    assert a.shape == (160, 160, 3)
    lit = a.max(2) > 60
    ys, xs = np.nonzero(lit)
    got = (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1)
    assert max(got) >= 157  # the black borders are gone
    assert got[0] / got[1] == pytest.approx(bw / bh, rel=0.04)  # the aspect ratio is kept
    white = a.min(2) > 150
    for part in (white[:, :80], white[:, 80:], white[:80], white[80:]):
        assert part.any()  # all four marks are visible
    edge = xs.min() + 7 * 160 // max(bw, bh)
    assert white[:, :edge].any()
    assert white[:, 160 - edge :].any()


def test_a_flower_image_is_neither_trimmed_nor_squeezed():
    a = np.zeros((80, 160, 3), np.uint8)
    a[20:60, 60:100] = 255  # a square in the middle of a wide image
    f = get_task('flowers', size=64)
    out = np.asarray(read_image(Image.fromarray(a), 64, f.reader, f.fit)).max(2) > 127
    ys, xs = np.nonzero(out)
    result = abs(np.ptp(xs) - np.ptp(ys))
    assert result <= 1
    assert abs(np.ptp(ys) + 1 - 32) <= 2


# ---------------------------------------------------------------- batches


def test_datablock(dr):
    t, task, _ = loaders(dr)
    block = task_datablock(task, ['no', 'referable'])
    assert isinstance(block, DataBlock)
    ds = block.datasets(t)
    assert len(ds.train) == (t.split == 'train').sum()
    assert len(ds.valid) == (t.split == 'valid').sum()
    x, y = ds.valid[0]
    row = t[t.split == 'valid'].iloc[0]
    assert x.size == (48, 48)
    assert ds.vocab[y] == row.target
    assert np.array_equal(np.asarray(x), read(task, row.image).permute(1, 2, 0).numpy())


def test_every_image_with_its_own_label(dr):
    t, task, dls = loaders(dr, target='grade', augment='none')
    for subset, dl in (('valid', dls.valid), ('train', dls.train.new(shuffle=False, drop_last=False))):
        rows, xs, ys = t[t.split == subset], *map(torch.cat, zip(*[(torch.Tensor(x), torch.Tensor(y)) for x, y in dl]))
        assert [dls.vocab[int(y)] for y in ys] == rows.target.tolist()
        assert torch.equal(pixels(xs), torch.stack([read(task, n) for n in rows.image]))


def test_training_batches_of_dr_are_exact_quarter_turns(dr):
    t, task, dls = loaders(dr)
    known = {
        torch.rot90(read(task, n), k, (1, 2)).contiguous().numpy().tobytes(): (n, k)
        for n in t[t.split == 'train'].image
        for k in range(4)
    }
    assert len(known) == 4 * (t.split == 'train').sum()
    target = dict(zip(t.image, t.target))
    turns = []
    for _ in range(3):
        indices = []
        for x, y in dls.train:
            for im, c in zip(pixels(x), y):
                n, k = known[im.numpy().tobytes()]
                assert target[n] == dls.vocab[int(c)]
                indices.append(n)
                turns.append(k)
        assert len(indices) == len(set(indices)) >= (t.split == 'train').sum() - 7
    assert set(turns) == {0, 1, 2, 3}
    assert np.bincount(turns).min() > len(turns) / 10


def test_training_batches_of_flowers_are_the_four_views(dr):
    task = get_task('flowers', 48)
    t, task, dls = loaders(dr, replace(task, targets=(REFERABLE,)))
    subset = t[t.split == 'train']
    indices = []
    known = torch.stack(
        [torch.stack([v(o) for v in VIEWS['mirror_near']]) for o in (read(task, n) for n in subset.image)]
    ).int()  # (images, views, 3, 48, 48)
    for x, y in [b for _ in range(2) for b in dls.train]:
        for im, c in zip(pixels(x).int(), y):
            far = (known - im).abs().amax((2, 3, 4))
            i, k = divmod(int(far.argmin()), 4)
            assert far.min() <= 1
            assert subset.target.iloc[i] == dls.vocab[int(c)]
            indices.append(k)
    assert np.bincount(indices, minlength=4).min() > len(indices) / 10


@pytest.mark.parametrize('augment', ['quarter_turns', 'mirror_near', CHANGES])
def test_validation_batches_are_not_augmented(dr, augment):
    t, task, dls = loaders(dr, augment=augment)
    want = torch.stack([read(task, n) for n in t[t.split == 'valid'].image])
    for _ in range(2):
        assert torch.equal(pixels(torch.cat([torch.Tensor(x) for x, _ in dls.valid])), want)
    first = torch.cat([torch.Tensor(x) for x, _ in dls.train.new(shuffle=False, drop_last=False)])
    read_as = torch.stack([read(task, n) for n in t[t.split == 'train'].image])
    assert not torch.equal(pixels(first), read_as)  # the training images are


def test_batches_are_normalised_as_requested(dr):
    mean = (0.1, 0.2, 0.3)
    std = (0.4, 0.5, 0.6)
    t, task, dls = loaders(dr, augment='none', mean=mean, std=std)
    norms = [f for f in dls.train.after_batch.fs if isinstance(f, Normalize)]
    assert len(norms) == 1
    x = torch.Tensor(next(iter(dls.valid))[0])
    want = torch.stack([read(task, n) for n in t[t.split == 'valid'].image[: len(x)]]).float() / 255
    want = (want - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(x, want, atol=1e-5)


def test_workers_read_the_same(dr):
    def all_of(n):
        *_, dls = loaders(dr, augment='none', num_workers=n)
        return [
            torch.cat([torch.Tensor(x) for x, _ in dl])
            for dl in (dls.valid, dls.train.new(shuffle=False, drop_last=False))
        ]

    for a, b in zip(all_of(0), all_of(2)):
        assert torch.equal(a, b)


@pytest.mark.parametrize('bs', [0, -1, 2.5, '8', None])
def test_invalid_batch_sizes(dr, bs):
    with pytest.raises(ValueError, match='bs='):
        loaders(dr, bs=bs)


def test_a_set_smaller_than_a_batch(dr):
    t, _, dls = loaders(dr, bs=500)
    assert len(dls.train) == 1
    result = len(dls.train.one_batch()[0])
    assert result == (t.split == 'train').sum()


# ---------------------------------------------------------------- labels that are not classes


@pytest.mark.parametrize('label', ['0_1', '1_0', 'nan', '1e400', '٢', '1,0', '0x1', ''])
def test_invalid_grades(label):
    with pytest.raises(ValueError, match='1 images have an unknown grade'):
        encode_target(pd.DataFrame({'image': ['a.png'], 'label': [label]}), GRADE)


@pytest.mark.parametrize(
    'label,grade',
    [
        ('1', '1'),
        (' 2.0 ', '2'),
        (3, '3'),
        (4.0, '4'),
        ('0e0', '0'),
    ],
)
def test_grades_in_common_spellings(label, grade):
    result = encode_target(pd.DataFrame({'image': ['a.png'], 'label': [label]}), GRADE).target.tolist()
    assert result == [grade]


def test_measurements_are_not_classes():
    t = pd.DataFrame({'image': [f'{i}.png' for i in range(60)], 'label': [str(i) for i in range(60)]})
    with pytest.raises(ValueError, match=r'60 different numbers .*regression.*--label-col'):
        encode_target(t, Target('class'))
    with pytest.raises(ValueError, match='regression'):
        encode_target(t.assign(label=[f'{i % 6}.5' for i in range(60)]), Target('class'))
    assert encode_target(t.assign(label=[str(i % 6) for i in range(60)]), Target('class')).attrs['notes'] == []
    many = encode_target(pd.concat([t] * 4), Target('class'))
    assert '60 numbers are treated as the names of 60 classes' in many.attrs['notes'][0]


@pytest.mark.parametrize('n', [-1, 1.5, '2', 1000])
def test_invalid_numbers_of_workers(dr, n):
    with pytest.raises(ValueError, match=r'num_workers=.*give the number of processes'):
        loaders(dr, num_workers=n)
