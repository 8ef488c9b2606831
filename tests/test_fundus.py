"Test the retina disc, light correction, gradability, the preparation of folders, and DICOM files."

import threading

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from dr_transfer.data.dicom import dicom_facts, is_dicom, read_dicom
from dr_transfer.data.fundus import (
    CORRECTIONS,
    MEANS,
    READERS,
    STDS,
    correct_color,
    correct_local,
    correction_table,
    crop_disc,
    disc_mask,
    find_disc,
    read_disc,
    read_image,
    to_right,
    trim_borders,
    undo_color,
)
from dr_transfer.data.gradability import QUALITY_LIMITS, REASONS, gradability, gradability_table
from dr_transfer.data.images import image_error, read_rgb
from dr_transfer.data.preprocess import Preparation, preprocess_folder
from dr_transfer.data.table import find_images, label_table
from dr_transfer.synthetic.fundus import draw_fundus, make_dr


def fundus_image(seed=0, size=256, grade=2):
    image, truth = draw_fundus(grade, seed=seed, size=size)
    return Image.fromarray(image), truth['disc']


def framed(im, disc, width, height, at, cut=0.0):
    "In a black frame, with `cut` of the radius cropped at the top and bottom"
    frame = Image.new('RGB', (width, height))
    frame.paste(im, at)
    x = disc[0] + at[0]
    y = disc[1] + at[1]
    r = disc[2]
    if not cut:
        return frame, (x, y, r)
    top = round(y - (1 - cut) * r)
    return frame.crop((0, top, width, round(y + (1 - cut) * r))), (x, y - top, r)


CHANGES = {
    'as it is': lambda a: a,
    'dark': lambda a: a * 0.25,
    'bright': lambda a: a * 1.8,
    'green': lambda a: a * [0.5, 1.1, 0.7],
    'noisy': lambda a: a + np.random.default_rng(0).normal(0, 3, a.shape),
}


# ---------------------------------------------------------------- the disc


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('cut', [0, 0.15, 0.35])
@pytest.mark.parametrize(
    'width, height, at',
    [
        (256, 256, (0, 0)),
        (500, 300, (100, 20)),
        (900, 700, (500, 300)),
    ],
)
def test_the_circle_is_found_complete_or_cut_framed_dark_or_bright(width, height, at, cut, change):
    for seed in range(3):
        im, (x, y, r) = framed(*fundus_image(seed), width, height, at, cut)
        d = find_disc(Image.fromarray(CHANGES[change](np.asarray(im, float)).clip(0, 255).astype(np.uint8)))
        assert d and np.hypot(d.x - x, d.y - y) < 5 and abs(d.r - r) < 5, (seed, d, (x, y, r))


@pytest.mark.parametrize(
    'im',
    [
        Image.new('RGB', (60, 40)),
        Image.new('RGB', (60, 40), 'white'),
        Image.fromarray(np.random.default_rng(0).integers(60, 255, (90, 120, 3)).astype(np.uint8)),
    ],
    ids=['black', 'white', 'no surround'],
)
def test_without_a_surround_there_is_no_disc_and_nothing_is_cut_off(im):
    assert find_disc(im) is None
    assert trim_borders(im).size == im.size
    assert crop_disc(im).size == (max(im.size),) * 2


def test_crops_have_the_same_scale_and_map_points_back():
    sizes = []
    for width, at, cut in ((256, (0, 0), 0), (700, (300, 20), 0), (700, (300, 20), 0.2)):
        im, (x, y, r) = framed(*fundus_image(1), width, 300, at, cut)
        d = find_disc(im)
        crop = crop_disc(im)
        assert crop.size[0] == crop.size[1]
        light = np.asarray(crop.resize((256, 256))).max(2) > 20
        sizes.append(light[128].sum())
        points = np.array([[x, y], [x + r / 2, y]])
        assert np.allclose(d.from_crop(d.to_crop(points, 512), 512), points)
        assert np.allclose(d.to_crop(points, 512)[0], 256, atol=12)
    assert np.ptp(sizes) <= 6, sizes


@pytest.mark.parametrize('size', [64, 200, 512])
@pytest.mark.parametrize('name', ['f.jpg', 'f.png'])
def test_a_file_is_read_at_any_size_and_the_disc_is_in_its_pixels(tmp_path, name, size):
    im, (x, y, r) = framed(*fundus_image(2, 400), 1400, 900, (600, 300))
    im.save(tmp_path / name, quality=95)
    crop, d = read_disc(tmp_path / name, size)
    assert crop.size == (size, size)
    assert abs(d.r - r) < 8
    assert np.hypot(d.x - x, d.y - y) < 8
    expected = np.asarray(crop_disc(im).resize((size, size), Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(crop, float) - expected).mean() < 6
    as_bytes, again = read_disc((tmp_path / name).read_bytes(), size)
    assert np.array_equal(as_bytes, crop)
    assert again == d


def test_a_rotated_image_is_upright(tmp_path):
    turned = tmp_path / 'turned.jpg'
    im, _ = framed(*fundus_image(3), 400, 300, (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(turned, exif=exif)
    _, d = read_disc(turned, 64)
    upright = find_disc(read_rgb(turned))
    assert abs(d.x - upright.x) < 8
    assert abs(d.y - upright.y) < 8


# ---------------------------------------------------------------- light


def test_colour_correction_takes_the_tint_away_and_can_be_undone():
    crop = crop_disc(fundus_image(4)[0])
    inside = disc_mask(crop.width, 0.96)
    fixed, moments = correct_color(crop)
    a = np.asarray(fixed, float)[inside]
    assert np.allclose(a.mean(0), MEANS, atol=4)
    assert np.allclose(a.std(0), STDS, atol=6)
    for tint in ([0.6, 0.8, 0.9], [0.9, 0.5, 0.7]):
        tinted = Image.fromarray((np.asarray(crop) * tint).astype(np.uint8))
        assert np.abs(np.asarray(correct_color(tinted)[0], float)[inside] - a).mean() < 3
    kept = (np.asarray(fixed) > 1) & (np.asarray(fixed) < 255)
    back = np.abs(np.asarray(undo_color(fixed, moments), int) - np.asarray(crop, int))
    assert back[kept].max() <= 3
    assert (np.asarray(fixed)[~disc_mask(crop.width, 1.05)] == 0).all()


def test_local_correction_takes_uneven_light_away_and_keeps_detail():
    crop = crop_disc(fundus_image(5)[0])
    n = crop.width
    side = (0.5 + np.arange(n) / n)[None, :, None]
    uneven = Image.fromarray((np.asarray(crop) * side).clip(0, 255).astype(np.uint8))
    inside = disc_mask(n, 0.8)
    a, b = (np.asarray(correct_local(i), float)[..., 1][inside] for i in (crop, uneven))
    before = [np.asarray(i, float)[..., 1][inside] for i in (crop, uneven)]
    assert np.corrcoef(a, b)[0, 1] > max(0.85, np.corrcoef(*before)[0, 1] + 0.1)
    assert abs(a.mean() - 128) < 6
    assert (np.asarray(correct_local(crop))[0, 0] == 128).all()


def test_each_correction_keeps_what_it_documents():
    t = correction_table()
    assert list(t.index) == list(CORRECTIONS)
    assert (t.map(len) > 5).all().all()
    im = crop_disc(fundus_image(3)[0]).resize((128, 128))
    assert CORRECTIONS['none'](im) is im
    even, moments = correct_color(im)
    assert np.array_equal(CORRECTIONS['colour'](im), even)
    back = np.abs(np.asarray(undo_color(even, moments), int) - np.asarray(im, int))
    there = (np.asarray(even) > 1) & (np.asarray(even) < 255)
    assert 'undo_color' in t['undone by']['colour']
    assert back[there & disc_mask(128)[..., None]].max() <= 2
    a, b = (
        np.asarray(i, float)[disc_mask(128, 0.9)] for i in (im, even)
    )  # order within a channel: brightness relative to the surroundings
    for c in range(3):
        assert np.corrcoef(a[:, c], b[:, c])[0, 1] > 0.98


@pytest.mark.parametrize('name', CORRECTIONS)
@pytest.mark.parametrize(
    'im',
    [
        Image.new('RGB', (64, 64)),
        Image.new('RGB', (64, 64), 'white'),
        Image.new('RGB', (33, 33), (90, 40, 20)),
    ],
    ids=['black', 'white', 'odd'],
)
def test_corrections_accept_any_image(name, im):
    out = CORRECTIONS[name](im)
    assert out.size == im.size
    assert out.mode == 'RGB'


def test_the_corrections_are_readers_too():
    im = framed(*fundus_image(6), 500, 300, (100, 20))[0]
    for r in READERS:
        assert read_image(im, 96, r, 'pad').size == (96, 96)
    assert not np.array_equal(read_image(im, 96, 'fundus_local', 'pad'), read_image(im, 96, 'fundus', 'pad'))


@pytest.mark.parametrize(
    'eye, mirrored',
    [
        ('left', True),
        (' OS', True),
        ('L', True),
        ('right', False),
        ('OD', False),
        (None, False),
        ('', False),
    ],
)
def test_left_eyes_are_mirrored(eye, mirrored):
    im = fundus_image(7)[0]
    assert np.array_equal(np.asarray(to_right(im, eye)), np.asarray(im)[:, ::-1] if mirrored else np.asarray(im))


# ---------------------------------------------------------------- gradability

DEGRADED = {
    'out of focus': lambda im: im.filter(ImageFilter.GaussianBlur(im.width / 60)),
    'too dark': lambda im: im.point(lambda v: v * 0.1),
    'too bright': lambda im: im.point(lambda v: min(255, v * 4)),
    'no contrast': lambda im: Image.fromarray(
        (np.asarray(im) * 0.15 + 110 * (np.asarray(im).max(2, keepdims=True) > 15)).astype(np.uint8)
    ),
    'no whole disc': lambda im: Image.fromarray(
        (np.asarray(im) * (np.arange(im.width) < 0.4 * im.width)[None, :, None]).astype(np.uint8)
    ),
}


@pytest.mark.parametrize('size', [256, 500])
@pytest.mark.parametrize('reason', DEGRADED)
def test_a_degraded_image_is_ungradable_for_the_right_reason(reason, size):
    for seed in range(4):
        crop = crop_disc(fundus_image(seed, size, seed)[0])
        good = gradability(crop)
        bad = gradability(DEGRADED[reason](crop))
        assert good['gradability'] > 0.9
        assert good['reason'] == ''
        assert bad['gradability'] < 0.5
        assert bad['reason'] == reason
    assert set(REASONS) == set(QUALITY_LIMITS)


def test_gradability_of_many_is_in_order():
    crop = crop_disc(fundus_image(1)[0])
    t = gradability_table([crop, DEGRADED['too dark'](crop), crop])
    assert t.reason.tolist() == ['', 'too dark', '']
    assert t.gradability[0] == t.gradability[2]


# ---------------------------------------------------------------- a folder


@pytest.fixture
def image_folder(tmp_path):
    make_dr(tmp_path / 'fundus', n=10, size=120, unreadable=1, seed=3)
    return tmp_path / 'fundus'


@pytest.mark.parametrize(
    'how',
    [
        Preparation(64),
        Preparation(96, 'colour', format='jpg'),
        Preparation(64, 'local', True),
    ],
)
def test_a_folder_is_prepared_and_the_originals_stay(image_folder, tmp_path, how):
    out = tmp_path / 'out'
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in image_folder.rglob('*') if p.is_file()}
    t = preprocess_folder(image_folder, out, how)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in image_folder.rglob('*') if p.is_file()} == before
    good = t[t.error == '']
    assert len(t) == 10
    assert len(good) == 9
    for f in good.file:
        assert Image.open(out / f).size == (how.size,) * 2
    assert good.gradability.notna().all()
    assert pd.read_csv(out / 'images.csv').image.tolist() == t.image.tolist()
    prepared = label_table(out, missing='skip')
    assert len(prepared) == 9
    assert prepared.label.tolist() == label_table(image_folder).label.tolist()
    assert prepared.group.notna().all()


def test_left_eyes_are_mirrored_on_request(image_folder, tmp_path):
    a, _b = (
        preprocess_folder(image_folder, tmp_path / n, Preparation(64, to_right=r))
        for n, r in (('a', False), ('b', True))
    )
    for f, e in zip(a.file, a.error):
        if e:
            continue
        x, y = (np.asarray(Image.open(tmp_path / n / f)) for n in 'ab')
        assert np.array_equal(x[:, ::-1] if 'left' in f else x, y)


def test_an_interrupted_run_is_resumed_with_the_same_result(image_folder, tmp_path, monkeypatch):
    import dr_transfer.data.preprocess as module

    out = tmp_path / 'out'
    expected = preprocess_folder(image_folder, tmp_path / 'complete', Preparation(64))
    real = module.prepare_image
    done = []
    lock = threading.Lock()

    def stop(*a):
        with lock:
            done.append(a)
        if len(done) > 4:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(module, 'prepare_image', stop)
    with pytest.raises(KeyboardInterrupt):
        preprocess_folder(image_folder, out, Preparation(64), workers=1)
    kept = len((out / 'journal.jsonl').read_text().splitlines())
    assert 1 <= kept <= 4
    assert not list(out.rglob('*.tmp'))
    again = []
    monkeypatch.setattr(module, 'prepare_image', lambda *a: again.append(a) or real(*a))
    t = preprocess_folder(image_folder, out, Preparation(64), workers=1)
    assert len(again) == 10 - kept
    assert t.equals(expected)
    for f in t.file[t.error == '']:
        assert (out / f).read_bytes() == (tmp_path / 'complete' / f).read_bytes()


def test_invalid_requests_are_errors(image_folder, tmp_path):
    (tmp_path / 'empty').mkdir()
    preprocess_folder(image_folder, tmp_path / 'out', Preparation(64))
    for run, words in (
        (lambda: preprocess_folder(image_folder, image_folder), 'never changed'),
        (lambda: preprocess_folder(image_folder, tmp_path / 'out', Preparation(72)), 'prepared with other settings'),
        (lambda: preprocess_folder(tmp_path / 'empty', tmp_path / 'o2'), 'no images'),
        (lambda: Preparation(correction='clour'), 'nearest first: colour'),
        (lambda: Preparation(format='gif'), "unknown format 'gif'"),
        (lambda: Preparation(8), '32 or more'),
    ):
        with pytest.raises(ValueError, match=words):
            run()
    assert not (tmp_path / 'o2').exists()
    Image.new('RGB', (50, 50)).save(image_folder / 'images' / f'{find_images(image_folder)[0].stem}.bmp')
    with pytest.raises(ValueError, match='would have the same name'):
        preprocess_folder(image_folder, tmp_path / 'o3', Preparation(64))


# ---------------------------------------------------------------- DICOM


def camera_file(path, pixels, patient='A17', side='L', interpretation='RGB', bits=8):
    pytest.importorskip('pydicom')
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, OphthalmicPhotography8BitImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = OphthalmicPhotography8BitImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(path, {}, file_meta=meta, preamble=b'\0' * 128)
    ds.SOPClassUID = meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ds.PatientID = patient
    ds.ImageLaterality = side
    ds.Manufacturer = 'Lens'
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = (
        *pixels.shape[:2],
        3 if pixels.ndim == 3 else 1,
        interpretation,
    )
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 if bits == 8 else 16
    ds.BitsStored = bits
    ds.HighBit = bits - 1
    ds.PixelRepresentation = 0
    ds.PixelData = pixels.tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


def test_a_dicom_fundus_image_is_read_like_any_other(tmp_path):
    pixels = np.asarray(fundus_image(1)[0])
    file = camera_file(tmp_path / 'eye.dcm', pixels)
    assert is_dicom(file)
    assert np.array_equal(read_rgb(file), pixels)
    assert np.array_equal(read_rgb(file.read_bytes()), pixels)
    assert image_error(file) == ''
    assert dicom_facts(file) == {'group': 'A17', 'eye': 'left', 'camera': 'Lens'}
    assert np.array_equal(
        read_image(file, 96, 'fundus', 'pad'), read_image(Image.fromarray(pixels), 96, 'fundus', 'pad')
    )
    assert read_disc(file, 64)[0].size == (64, 64)


@pytest.mark.parametrize(
    'bits, interpretation',
    [
        (8, 'MONOCHROME2'),
        (12, 'MONOCHROME2'),
        (8, 'MONOCHROME1'),
    ],
)
def test_grey_dicom_fundus_images(tmp_path, bits, interpretation):
    a = (np.arange(2400).reshape(40, 60) % 2**bits).astype(np.uint8 if bits == 8 else np.uint16)
    got = np.asarray(read_dicom(camera_file(tmp_path / 'g.dcm', a, interpretation=interpretation, bits=bits)), float)
    want = a.astype(float) * 255 / (2**bits - 1)
    assert np.abs(got - (255 - want if interpretation == 'MONOCHROME1' else want)).max() <= 0.5


def test_patient_eye_and_camera_come_from_the_file(tmp_path):
    data = tmp_path / 'data'
    for i in range(4):
        folder = data / ('disease' if i % 2 else 'healthy')
        folder.mkdir(parents=True, exist_ok=True)
        camera_file(folder / f'{i}.dcm', np.asarray(fundus_image(i)[0]), f'P{i // 2}', 'LR'[i % 2])
    t = label_table(data).sort_values('image', key=lambda s: s.str[-5:])
    assert t.group.tolist() == ['P0', 'P0', 'P1', 'P1']
    assert t.data_eye.tolist() == ['left', 'right'] * 2
    assert set(t.data_camera) == {'Lens'}
    (data / 'disease' / '1.dcm').write_bytes(b'nothing')
    assert len(label_table(data)) == 3


def test_without_pydicom_the_error_names_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'pydicom', None)
    with pytest.raises(ValueError, match=r"pip install 'dr_transfer\[dicom\]'"):
        read_dicom('eye.dcm')
