"""Test that all kinds of image files are read correctly or skipped with the reason.

No file may block, start a program or use unlimited memory.
"""

import errno
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import saved
from PIL import Image, TiffImagePlugin

from dr_transfer.data.ct import Volume, read_volume
from dr_transfer.data.dicom import dicom_facts, is_dicom, read_dicom
from dr_transfer.data.fundus import crop_disc, disc_box, read_disc, read_image
from dr_transfer.data.images import FORMATS, image_error, image_header, read_rgb, to_rgb
from dr_transfer.data.preprocess import Preparation, prepare_image
from dr_transfer.data.source import IMAGE_LIMITS, ImageError, check_size
from dr_transfer.data.table import find_images, label_table, skipped_images
from dr_transfer.data.tasks import Task
from dr_transfer.features.extraction import image_features, whole_body
from dr_transfer.features.probes import domain_profile
from dr_transfer.models.network import make_body, min_size

WIDTH = 48
HEIGHT = 32
RAMP = np.linspace(0, 1, WIDTH)[None].repeat(HEIGHT, 0)  # grey from black at the left to white at the right
GREY = (RAMP * 255).round().astype(np.uint8)
COLOUR = np.stack([GREY, GREY[:, ::-1], GREY // 2 + 60], -1)


def distance(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


def reason(data):
    "Why bytes are not read; the check of a file gives the same reason."
    with pytest.raises(ImageError) as e:
        read_rgb(data)
    assert str(e.value) == f'an image given as bytes: {e.value.reason}'
    return e.value.reason


def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def png(*chunks, size=(WIDTH, HEIGHT), bits=8, colour=2, rows=None):
    "A PNG file made by hand: chunks before the pixels, and rows of bytes."
    rows = COLOUR.reshape(HEIGHT, -1) if rows is None else rows
    pixels = zlib.compress(b''.join(b'\0' + bytes(np.ascontiguousarray(r).tobytes()) for r in rows))
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', *size, bits, colour, 0, 0, 0))
    return (
        b'\x89PNG\r\n\x1a\n' + head + b''.join(chunk(*c) for c in chunks) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')
    )


def tiff(a, **tags):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag[1:])] = value
    return saved(Image.fromarray(a), 'TIFF', tiffinfo=info)


# ---------------------------------------------------------------- every mode in every format

MODES = ('1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'LA', 'PA', 'I', 'F', 'I;16', 'I;16B')
UNDECLARED = {'I', 'F'}  # in this grid their values are 0 to 255, which the file does not declare


def in_mode(mode):
    if mode.startswith('I;16'):
        return Image.fromarray((RAMP * 65535).round().astype('>u2' if mode.endswith('B') else np.uint16))
    if mode == 'LAB':
        return Image.merge(
            'LAB', [Image.fromarray(a) for a in (GREY, np.full_like(GREY, 128), np.full_like(GREY, 128))]
        )
    im = Image.fromarray(GREY)
    return im.convert('L').convert('PA') if mode == 'PA' else im.convert(mode)


def grid():
    for mode in MODES:
        for kind in FORMATS:
            if mode.startswith('I;16') and kind not in ('PNG', 'TIFF', 'PPM'):
                continue  # Pillow clips the values when it writes
            try:
                yield pytest.param(mode, kind, saved(in_mode(mode), kind), id=f'{mode} {kind}')
            except (OSError, ValueError, KeyError):
                continue  # cannot be saved


GRID = list(grid())


def test_the_grid_has_every_mode_and_format():
    assert {p.values[0] for p in GRID} >= set(MODES) - {'PA', 'I;16B'}
    assert {p.values[1] for p in GRID} == set(FORMATS)
    assert len(GRID) > 40


@pytest.mark.parametrize('mode, kind, data', GRID)
def test_every_mode_and_format_shows_the_ramp_or_has_a_reason(tmp_path, mode, kind, data):
    x_png = tmp_path / 'x.png'
    x_png.write_bytes(data)
    with Image.open(io.BytesIO(data)) as im:
        opened = im.mode
    if opened in UNDECLARED and kind != 'PPM':
        assert 'white' in image_error(x_png)
        return
    if opened in UNDECLARED:
        im = None if image_error(x_png) else read_rgb(data)
        assert im is None or distance(im, COLOUR * 0 + GREY[..., None]) < 40
        return
    im = read_rgb(data)
    wrong = {'1': 255, 'P': 40, 'LAB': 60}.get(mode, 12 if kind in ('JPEG', 'WEBP', 'GIF') or mode == 'CMYK' else 2)
    assert image_error(x_png) == ''
    assert im.mode == 'RGB'
    assert im.size == (WIDTH, HEIGHT)
    assert distance(im, GREY[..., None].repeat(3, -1)) <= wrong, distance(im, GREY[..., None])
    assert np.asarray(im)[:, :8].mean() < 40
    assert np.asarray(im)[:, -8:].mean() > 200  # neither black nor white


# ---------------------------------------------------------------- more than eight bits


def test_ordinary_images_are_read_as_before():
    "The same as version 0.1.0 for eight bits and for full sixteen bits, bit for bit."
    for kind in ('PNG', 'TIFF', 'BMP'):
        np.testing.assert_array_equal(read_rgb(saved(Image.fromarray(COLOUR), kind)), COLOUR)
    deep = (RAMP * 65535).round().astype(np.uint16)
    old = (deep.astype(np.float32).clip(0, 65535) * (255 / 65535)).round().astype(np.uint8)
    np.testing.assert_array_equal(read_rgb(saved(Image.fromarray(deep), 'PNG')), old[..., None].repeat(3, -1))


def test_floating_point_from_0_to_1_is_grey():
    for a in (RAMP.astype(np.float32), RAMP.astype(np.float64)):
        im = read_rgb(tiff(a.astype(np.float32)))
        assert distance(im, GREY[..., None]) <= 1
    assert distance(read_rgb(RAMP.astype(np.float32)), GREY[..., None]) <= 1


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda a: a * 255, 'values from 0 to 255'),
        (lambda a: a - 0.5, 'values from -0.5 to 0.5'),
        (lambda a: a * 0 + np.nan, 'not numbers'),
        (lambda a: np.where(a > 0.5, np.inf, a), 'not numbers'),
        (lambda a: -a, 'values from -1 to'),
    ],
)
def test_other_floating_point_is_skipped(change, words):
    text = reason(tiff(change(RAMP).astype(np.float32)))
    assert words in text
    assert 'save it as 8 bits' in text


@pytest.mark.parametrize('kind', [np.int32, np.int16])
@pytest.mark.parametrize(
    'low, high',
    [
        (0, 255),
        (0, 4095),
        (-1000, 3000),
        (0, 30000),
    ],
)
def test_signed_and_long_integers_are_skipped(kind, low, high):
    a = (low + RAMP * (high - low)).astype(kind)
    info = TiffImagePlugin.ImageFileDirectory_v2()
    if kind == np.int32:
        data = tiff(a)
    else:
        info[339] = 2
        data = saved(Image.fromarray(a.astype(np.uint16)), 'TIFF', tiffinfo=info)
        if Image.open(io.BytesIO(data)).mode != 'I':
            pytest.skip('this Pillow does not write signed values')
    assert '32-bit or signed integers' in reason(data)


@pytest.mark.parametrize('bits', [10, 12, 14])
@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_fewer_bits_in_sixteen_are_skipped_unless_they_are_declared(bits, kind):
    a = (RAMP * (2**bits - 1)).round().astype(np.uint16)
    text = reason(saved(Image.fromarray(a), kind))
    assert f'the brightest value is {2**bits - 1} of 65535' in text
    if kind == 'TIFF':
        data = tiff(a, t281=2**bits - 1)
        assert 'the brightest value' in reason(tiff(a, t281=2**bits - 77))  # a statistic of the pixels, not a range
    else:
        data = png((b'sBIT', bytes([bits])), bits=16, colour=0, rows=a.astype('>u2'))
    assert distance(read_rgb(data), GREY[..., None]) <= 1


def test_values_scaled_up_as_the_standard_of_png_wants_are_not_scaled_again():
    a = (RAMP * 4095 / 20).round().astype(np.uint16)  # dark: 204 of 4095
    up = (a << 4 | a >> 8).astype('>u2')
    dark = np.asarray(read_rgb(png((b'sBIT', bytes([12])), bits=16, colour=0, rows=up)))
    assert 11 <= dark.max() <= 14


def test_black_is_black_whatever_its_bits():
    for kind in (np.uint16, np.uint8):
        assert np.asarray(read_rgb(saved(Image.fromarray(np.zeros((8, 8), kind)), 'PNG'))).max() == 0


def test_a_tiff_where_zero_is_white_is_inverted():
    a = (RAMP * 65535).round().astype(np.uint16)
    data = bytearray(saved(Image.fromarray(a), 'TIFF'))
    im = Image.open(io.BytesIO(bytes(data)))
    count = struct.unpack_from('<H', data, struct.unpack_from('<I', data, 4)[0])[0]
    for i in range(count):
        at = struct.unpack_from('<I', data, 4)[0] + 2 + 12 * i
        if struct.unpack_from('<H', data, at)[0] == 262:
            struct.pack_into('<H', data, at + 8, 0)
    assert im.mode == 'I;16'
    assert distance(read_rgb(bytes(data)), 255 - GREY[..., None]) <= 1


@pytest.mark.parametrize(
    'bits, good',
    [
        (16, True),
        (14, False),
        (12, False),
        (8, False),
    ],
)
@pytest.mark.parametrize(
    'colour, channels',
    [
        (2, 3),
        (6, 4),
    ],
)
def test_colour_of_sixteen_bits(bits, good, colour, channels):
    a = np.stack([RAMP * (2**bits - 1)] * 3 + [np.full_like(RAMP, 65535)] * (channels - 3), -1).round()
    data = png(bits=16, colour=colour, rows=a.astype('>u2').reshape(HEIGHT, -1))
    if good:
        assert distance(read_rgb(data), GREY[..., None]) <= 1
    else:
        assert 'fewer bits seem to be used' in reason(data)


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_few_bits_of_grey(bits):
    a = (np.arange(WIDTH)[None].repeat(HEIGHT, 0) % 2**bits).astype(np.uint8)
    packed = np.packbits((a[..., None] >> np.arange(bits)[::-1] & 1).reshape(HEIGHT, -1), axis=1)
    assert distance(read_rgb(png(bits=bits, colour=0, rows=packed)), (a * (255 / (2**bits - 1)))[..., None]) <= 1


@pytest.mark.parametrize('maxval', [255, 1023, 4095, 65535])
def test_a_pgm_declares_its_maximum(maxval):
    a = (RAMP * maxval).round().astype('>u2' if maxval > 255 else np.uint8)
    assert distance(read_rgb(f'P5 {WIDTH} {HEIGHT} {maxval}\n'.encode() + a.tobytes()), GREY[..., None]) <= 1


@pytest.mark.parametrize(
    'a, words',
    [
        (np.zeros((4, 4), np.int64), 'cannot be decoded'),
        (np.zeros((4, 4, 3)), 'cannot be decoded'),
        (np.zeros((0, 4, 3), np.uint8), ''),
        (np.array([['a']], object), 'cannot be decoded'),
        (np.zeros((2, 3, 4, 3), np.uint8), 'cannot be decoded'),
        (3, 'give a path'),
        (None, 'give a path'),
    ],
)
def test_arrays_and_values_that_are_not_images(a, words):
    with pytest.raises(ImageError, match=f'given as {type(a).__name__}.*{words}'):
        read_rgb(a)


@pytest.mark.parametrize('mode', ['RGBX', 'RGBa', 'La'])
def test_modes_that_no_file_has(mode):
    grey = Image.fromarray(GREY)
    im = {'RGBX': grey.convert('RGB'), 'RGBa': grey.convert('RGBA'), 'La': grey.convert('LA')}[mode].convert(mode)
    assert im.mode == mode
    rgb = read_rgb(im)
    assert rgb.mode == 'RGB'
    assert distance(rgb, GREY[..., None].repeat(3, -1)) <= 2


# ---------------------------------------------------------------- damage, orientation, wrong suffixes


def test_damaged_exif_leaves_an_image_as_it_is_stored(tmp_path):
    x_png = tmp_path / 'x.png'
    profile = b'Raw profile type exif\0\nexif\n      8\nzzzz not hex\n'
    for data in (
        png((b'eXIf', b'garbage')),
        png((b'tEXt', profile)),
        png((b'eXIf', b'II*\0' + b'\xff' * 40)),
        png((b'eXIf', b'')),
    ):
        x_png.write_bytes(data)
        assert image_error(x_png) == ''
        np.testing.assert_array_equal(read_rgb(x_png), COLOUR)
        np.testing.assert_array_equal(read_image(x_png, 32, 'fundus', 'pad'), read_image(COLOUR, 32, 'fundus', 'pad'))
        assert read_disc(x_png, 32)[0].size == (32, 32)
        assert image_header(x_png).size == (
            WIDTH,
            HEIGHT,
        )
    for exif in (b'Exif\0\0garbage', b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0'):
        data = saved(Image.fromarray(COLOUR), 'JPEG', exif=exif)
        assert read_rgb(data).size == read_rgb(data, 16).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize('value', [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(value):
    exif = Image.Exif()
    exif[274] = value
    np.testing.assert_array_equal(read_rgb(saved(Image.fromarray(COLOUR), 'PNG', exif=exif)), COLOUR)


def test_a_turned_image_is_turned_once():
    exif = Image.Exif()
    exif[274] = 6
    for kind in ('PNG', 'TIFF', 'JPEG'):
        im = read_rgb(saved(Image.fromarray(COLOUR), kind, exif=exif))
        assert im.size == to_rgb(im).size == (HEIGHT, WIDTH)


def isobmff(brand):
    return struct.pack('>I', 24) + b'ftyp' + brand + b'\0\0\0\0' + brand + b'mif1' + b'\0' * 100


COMPLETE = saved(Image.fromarray(COLOUR), 'PNG')
JPEG = saved(Image.fromarray(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8))), 'JPEG')


@pytest.mark.parametrize(
    'data, words',
    [
        (b'', 'empty file'),
        (b'<html>404 Not Found</html>', 'not an image'),
        (b'\0' * 5000, 'not an image'),
        (JPEG[: len(JPEG) // 2], 'cannot be decoded'),
        (JPEG[:20], 'a damaged JPEG file'),
        (COMPLETE[:40], 'a damaged PNG file'),
        (COMPLETE[:29] + b'\0\0\0\0' + COMPLETE[33:], 'a damaged PNG file'),
        (COMPLETE[:-20] + b'\xff' * 4 + COMPLETE[-16:], 'cannot be decoded'),
        (COMPLETE[:60], 'cannot be decoded'),
        (saved(Image.fromarray(COLOUR), 'JPEG2000'), 'a JPEG 2000 file, which is not supported'),
        (isobmff(b'heic'), 'a HEIC file'),
        (isobmff(b'avif'), 'an? AVIF file'),
        (b'%PDF-1.7\n', 'a PDF file'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n', 'a PostScript file'),
        (saved(Image.fromarray(COLOUR), 'TGA'), 'not an image'),
        (png((b'iCCP', b'x\0\0' + zlib.compress(b'\0' * (2**21)))), 'too large'),
        (png((b'zTXt', b'x\0\0' + zlib.compress(b'\0' * (2**21)))), 'too large'),
        (Image.new('1', (20_000, 20_000)), 'more than 120 million|too many pixels'),
        (Image.new('1', (12_000, 11_000)), 'more than 120 million'),
        (Image.new('RGB', (1, 5000)), 'a strip of 1 x 5000'),
        (Image.new('RGB', (5000, 1)), 'a strip of 5000 x 1'),
        (Image.new('L', (2000, 90)), 'a strip'),
    ],
)
def test_skipped_files_have_a_reason(tmp_path, data, words):
    import re

    file = tmp_path / 'image.jpg'
    data = saved(data, 'PNG') if isinstance(data, Image.Image) else data
    text = reason(data)
    file.write_bytes(data)
    assert re.search(words, text)
    assert image_error(file) == text
    for read in (lambda p: read_image(p, 32), lambda p: read_image(p, 32, 'fundus', 'pad'), lambda p: read_disc(p, 32)):
        with pytest.raises(ImageError, match=r'image.jpg: '):
            read(file)


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'TIFF', 'PNG'])
def test_the_first_of_several_frames(kind):
    frames = [Image.new('RGB', (20, 10), c) for c in ((250, 0, 0), (0, 0, 250), (0, 250, 0))]
    options = {'lossless': True} if kind == 'WEBP' else {}
    im = np.asarray(read_rgb(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)))
    assert distance(im, (250, 0, 0)) <= 6


def test_a_bmp_from_the_top_down():
    data = bytearray(saved(Image.fromarray(COLOUR), 'BMP'))
    struct.pack_into('<i', data, 22, -HEIGHT)
    np.testing.assert_array_equal(read_rgb(bytes(data)), COLOUR[::-1])


def without_adobe(data):
    "A JPEG without its segment APP14."
    at = data.index(b'\xff\xee')
    return data[:at] + data[at + 2 + struct.unpack('>H', data[at + 2 : at + 4])[0] :]


def test_cmyk_with_and_without_adobes_mark():
    data = saved(Image.fromarray(COLOUR).convert('CMYK'), 'JPEG', quality=100, subsampling=0)
    assert distance(read_rgb(data), COLOUR) < 30
    assert "without Adobe's marker" in reason(without_adobe(data))
    ycck = bytearray(data)
    ycck[data.index(b'\xff\xee') + 15] = 2  # the transform: YCCK
    assert np.asarray(read_rgb(bytes(ycck))).std() > 5


def test_postscript_named_jpg_starts_no_program(tmp_path, monkeypatch):
    file = tmp_path / 'image.jpg'

    def started(*args, **kwargs):
        raise AssertionError(f'a program is started: {args}')

    for name in ('Popen', 'run', 'check_call', 'check_output'):
        monkeypatch.setattr(subprocess, name, started)
    file.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\nshowpage\n')
    Image.open(file)  # Pillow alone would open it
    assert 'PostScript' in image_error(file)


def test_no_module_opens_images_of_any_format():
    import re

    root = Path(__file__).parent.parent
    calls = [
        (p.name, call)
        for p in [*(root / 'dr_transfer').rglob('*.py'), *(root / 'tools').rglob('*.py')]
        for call in re.findall(r'Image\.open\([^\n]*', p.read_text(encoding='utf-8'))
    ]
    assert calls
    assert not [c for c in calls if 'formats=' not in c[1]]


# ---------------------------------------------------------------- paths that are not files, names


@pytest.fixture
def special(tmp_path):
    "Valid images, and other kinds of files with a name ending in .jpg."
    folder = tmp_path / 'data' / 'a'
    folder.mkdir(parents=True)
    Image.fromarray(COLOUR).save(folder / 'good.jpg')
    os.mkfifo(folder / 'pipe.jpg')
    (folder / 'folder.jpg').mkdir()
    (folder / 'link.jpg').symlink_to(folder / 'good.jpg')
    (folder / 'device.jpg').symlink_to('/dev/zero')
    (folder / 'nowhere.jpg').symlink_to(folder / 'none.jpg')
    (folder / 'circle.jpg').symlink_to(folder / 'circle.jpg')
    (folder / 'up').symlink_to(folder.parent)
    (folder / '.hidden.jpg').write_bytes(b'x')
    (folder / ('n' * 250 + '.jpg')).write_bytes(JPEG)
    (folder / 'GOOD.jpg').write_bytes(JPEG)
    with socket.socket(socket.AF_UNIX) as s:
        old = os.getcwd()
        os.chdir(folder)  # the path of a socket is short
        s.bind('socket.jpg')
        os.chdir(old)
    return folder.parent


def test_pipes_sockets_devices_and_loops_have_a_reason(special):
    errors = {p.name: image_error(p) for p in find_images(special)}
    assert set(errors) == {
        'good.jpg',
        'GOOD.jpg',
        'link.jpg',
        'n' * 250 + '.jpg',
        'pipe.jpg',
        'device.jpg',
        'nowhere.jpg',
        'circle.jpg',
        'socket.jpg',
    }
    assert {k for k, v in errors.items() if not v} == {'good.jpg', 'GOOD.jpg', 'link.jpg', 'n' * 250 + '.jpg'}
    assert 'a pipe, not a regular file' in errors['pipe.jpg']
    assert 'a device' in errors['device.jpg']
    assert 'a socket' in errors['socket.jpg']
    assert errors['nowhere.jpg'] == 'no such file'
    assert errors['circle.jpg']
    assert 'a folder' in image_error(special / 'a' / 'folder.jpg')
    with pytest.raises(ImageError, match=r'pipe.jpg: it is a pipe'):
        image_header(special / 'a' / 'pipe.jpg')
    t = label_table(special)
    assert len(t) == 4
    assert len(skipped_images(t)) == 5


def test_a_name_that_is_not_text(tmp_path):
    (tmp_path / 'a').mkdir()
    name = os.fsencode(tmp_path / 'a') + b'/\xff\xfe.jpg'
    with open(name, 'wb') as f:
        f.write(JPEG)
    assert [image_error(p) for p in find_images(tmp_path)] == ['']


def test_an_image_deleted_after_the_check_is_named_and_the_others_are_kept(tmp_path):
    from dr_transfer.data.content import fill_stores, image_data
    from dr_transfer.data.views import map_batches
    from dr_transfer.utils.store import ArrayStore

    paths = []
    for i in range(6):
        paths.append(tmp_path / f'{i}.png')
        Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(paths[-1])
    store = ArrayStore(tmp_path / 'store', 'means', {}, {'mean': ((1,), 'float32')})

    def read(p):
        if p.path.name == '5.png':
            p.path.write_bytes(b'gone')
        return read_image(image_data(p), 16)

    def compute(sources, fields):
        return map_batches(lambda x: {'mean': x.float().mean((1, 2, 3)).numpy()[:, None]}, sources, read, 2)

    assert [image_error(p) for p in paths] == [''] * 6
    with pytest.raises(ValueError, match=r'5.png changed while it was being used'):
        fill_stores([store], paths, compute, 2)
    again = ArrayStore(tmp_path / 'store', 'means', {}, {'mean': ((1,), 'float32')})
    assert len(again) == 4


def test_an_error_can_be_pickled():
    e = pickle.loads(pickle.dumps(ImageError('no such file', 'a.jpg')))
    assert isinstance(e, ValueError)
    assert (str(e), e.name, e.reason) == ('a.jpg: no such file', 'a.jpg', 'no such file')


# ---------------------------------------------------------------- sizes and shapes


def sizes_of_a_network(size) -> list:
    "Calls for which None is the size of the network itself."
    return [
        lambda: image_features([COLOUR], 'test_resnet', 'random', size=size),
        lambda: domain_profile(make_body(whole_body('test_resnet', 'random'), 32, 'plain'), [COLOUR], size=size),
    ]


@pytest.mark.parametrize('size', [0, -1, 15, 4097, 224.0, True, False, None, '224', 10**9, np.nan])
def test_one_validator_of_sizes(size):
    for call in (
        lambda: check_size(size),
        lambda: Task('x', size=size),
        lambda: read_image(COLOUR, size),
        lambda: read_disc(COLOUR, size),
        *([] if size is None else sizes_of_a_network(size)),
    ):
        with pytest.raises(ValueError, match='give a whole number of pixels from 16'):
            call()


def test_the_smallest_size_of_a_network_is_one_that_is_accepted():
    smallest = min_size(whole_body('test_resnet', 'random'))
    assert check_size(smallest) == smallest


def test_valid_sizes():
    assert check_size(np.int64(224)) == 224
    assert type(Task('x', size=np.int64(32)).size) is int
    for size in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match='give a whole number of pixels'):
            read_rgb(COLOUR, size)


def test_a_bright_line_is_not_a_disc():
    a = np.zeros((400, 400, 3), np.uint8)
    a[200:202] = 255
    a[:90, :3] = 255
    low, high = sorted(np.subtract(disc_box(Image.fromarray(a))[2:], disc_box(Image.fromarray(a))[:2]))
    assert high <= IMAGE_LIMITS.ratio * low
    assert np.asarray(read_image(a, 32, 'fundus', 'pad')).max() > 0


def test_the_square_around_a_long_image_is_limited():
    crop = crop_disc(Image.new('RGB', (40_000, 2000), (90, 60, 30)))
    assert crop.width == crop.height
    assert crop.width**2 <= 2 * IMAGE_LIMITS.pixels


# ---------------------------------------------------------------- DICOM


def dicom(a, syntax='1.2.840.10008.1.2.1', **more):
    "The bytes of a DICOM file."
    pytest.importorskip('pydicom')
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, OphthalmicPhotography8BitImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = OphthalmicPhotography8BitImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = UID(syntax)
    ds = FileDataset(None, {}, file_meta=meta, preamble=b'\0' * 128)
    ds.SOPClassUID = meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    frames = a.shape[0] if a.ndim == 4 else 1
    rows = a[0] if a.ndim == 4 else a
    ds.Rows, ds.Columns = rows.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, 'RGB') if rows.ndim == 3 else (1, 'MONOCHROME2')
    if rows.ndim == 3:
        ds.PlanarConfiguration = 0
    if frames > 1:
        ds.NumberOfFrames = frames
    ds.BitsAllocated = ds.BitsStored = 8 * a.dtype.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(a.dtype.kind == 'i')
    for k, v in more.items():
        setattr(ds, k, v)
    ds.PixelData = more.get('PixelData', a.tobytes())
    if 'HighBit' not in more:
        ds.HighBit = ds.BitsStored - 1
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


U8 = GREY
U16 = (RAMP * 65535).round().astype(np.uint16)
TWELVE = (RAMP * 4095).round().astype(np.uint16)
HU = (RAMP * 2000 - 1000).round().astype(np.int16)


@pytest.mark.parametrize(
    'data',
    [
        lambda: dicom(U8),
        lambda: dicom(U16),
        lambda: dicom(TWELVE, BitsStored=12),
        lambda: dicom((RAMP * 63).round().astype(np.uint8), BitsStored=6),
        lambda: dicom(255 - U8, PhotometricInterpretation='MONOCHROME1'),
        lambda: dicom(4095 - TWELVE, BitsStored=12, PhotometricInterpretation='MONOCHROME1'),
        lambda: dicom(U8, RescaleSlope=3, RescaleIntercept=-7),
        lambda: dicom(255 - U8, RescaleSlope=-1, RescaleIntercept=0),
        lambda: dicom(HU, WindowCenter=0, WindowWidth=2000),
        lambda: dicom(HU, WindowCenter=[0, 50], WindowWidth=[2000, 10]),
        lambda: dicom(
            (HU + 1000).astype(np.uint16), RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=0, WindowWidth=2000
        ),
        lambda: dicom(TWELVE, WindowCenter=2048, WindowWidth=4096),
        lambda: dicom(HU * -1, WindowCenter=0, WindowWidth=2000, PhotometricInterpretation='MONOCHROME1'),
        lambda: dicom(U8[..., None].repeat(3, -1)),
        lambda: dicom(U16[..., None].repeat(3, -1)),
        lambda: dicom(np.stack([U8, U8 * 0 + 128, U8 * 0 + 128], -1), PhotometricInterpretation='YBR_FULL'),
        lambda: dicom(U8[..., None].repeat(3, -1), PlanarConfiguration=1, PixelData=np.stack([U8] * 3).tobytes()),
        lambda: dicom(TWELVE | 0x8000, BitsStored=12),
    ],
    ids=range(18),
)
def test_dicom_grey_and_colour_show_the_ramp(tmp_path, data):
    im0001 = tmp_path / 'IM0001'
    data = data()
    assert distance(read_rgb(data), GREY[..., None]) <= 2
    im0001.write_bytes(data)  # archives export without a suffix
    assert is_dicom(im0001)
    assert image_error(im0001) == ''
    assert distance(read_rgb(im0001), GREY[..., None]) <= 2
    h = image_header(im0001)
    assert h.format == 'DICOM'
    assert h.size == (WIDTH, HEIGHT)


def test_dicom_palette():
    pytest.importorskip('pydicom')
    table = np.arange(256, dtype=np.uint16) * 257
    keys = {
        f'{c}PaletteColorLookupTable{k}': v
        for c in ('Red', 'Green', 'Blue')
        for k, v in (('Descriptor', [256, 0, 16]), ('Data', table.tobytes()))
    }
    assert distance(read_rgb(dicom(U8, PhotometricInterpretation='PALETTE COLOR', **keys)), GREY[..., None]) <= 2


def test_dicom_lookup_table_of_values_of_interest():
    from pydicom.dataset import Dataset

    item = Dataset()
    item.LUTDescriptor = [256, 0, 8]
    item.LUTData = np.arange(255, -1, -1, dtype='<u2').tobytes()
    item['LUTData'].VR = 'OW'
    assert distance(read_rgb(dicom(U8, VOILUTSequence=[item])), 255 - GREY[..., None]) <= 2


def test_dicom_first_frame():
    a = np.stack([U8[..., None].repeat(3, -1), np.zeros((HEIGHT, WIDTH, 3), np.uint8)])
    assert distance(read_rgb(dicom(a)), GREY[..., None]) == 0


@pytest.mark.parametrize(
    'data, words',
    [
        (lambda: dicom(HU), 'signed values without a window'),
        (lambda: dicom(TWELVE), 'the brightest value is 4095 of 65535'),
        (lambda: dicom(U16, BitsStored=12, HighBit=15), 'not at 11'),
        (lambda: dicom((RAMP * 2**31).astype(np.uint32)), 'at most 16 are supported'),
        (lambda: dicom(U8, Rows=30_000, Columns=30_000), 'more than 120 million'),
        (lambda: dicom(U8, NumberOfFrames=100_000), 'declares 100000 frames'),
        (lambda: dicom(U8, Rows=1, Columns=1536), 'a strip'),
        (lambda: dicom(U8, Rows=64), 'cannot be decoded'),
        (lambda: dicom(U8)[:-500], 'cannot be decoded'),
        (lambda: dicom(U8)[:140], ''),
        (lambda: b'\0' * 128 + b'DICM' + b'\xff' * 100, ''),
        (lambda: dicom(U8, WindowCenter=10, WindowWidth=0), 'cannot be decoded'),
        (lambda: dicom(np.zeros((9000, 10_000, 3), np.uint8), syntax='1.2.840.10008.1.2.1.99'), 'unpacks to more than'),
    ],
    ids=range(13),
)
def test_dicom_that_is_skipped(tmp_path, data, words):
    file = tmp_path / 'image.dcm'
    file.write_bytes(data())
    assert words in image_error(file) != ''
    with pytest.raises(ImageError, match=r'image.dcm: '):
        read_dicom(file)


def test_a_deflated_file_of_usual_size_is_read():
    assert distance(read_rgb(dicom(U8, syntax='1.2.840.10008.1.2.1.99')), GREY[..., None]) == 0


def test_a_jpeg_named_dcm_is_a_jpeg(tmp_path):
    a_folder = tmp_path / 'a'
    x_dcm = tmp_path / 'a' / 'x.dcm'
    a_folder.mkdir()
    for name in ('x.dcm', 'y.dcm'):
        (a_folder / name).write_bytes(JPEG)
    (a_folder / 'z.dcm').write_bytes(b'nothing')
    assert not is_dicom(x_dcm)
    assert image_error(x_dcm) == ''
    assert image_header(x_dcm).format == 'JPEG'
    t = label_table(tmp_path)
    assert len(t) == 2
    assert skipped_images(t).reason.tolist() == ['not an image']
    assert 'eye' not in t


@pytest.mark.parametrize('patient', ['A' * 3000, 'A\x1b]0;x\x07', 'A\nB', 'A\u202e', '\0\0', ' A17 '])
def test_facts_of_a_header_are_short_and_printable(patient):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        facts = dicom_facts(
            dicom(
                U8,
                PatientID=patient,
                Manufacturer='M\x1b[2J' * 50,
                ImageLaterality='L',
                SpecificCharacterSet='ISO_IR 192',
            )
        )
    texts = [facts['group'] or '', *(facts['camera'] or '').split()]
    for t in texts:
        assert len(t) <= 64
        assert t.isprintable()
    assert facts['eye'] == 'left'
    assert patient != ' A17 ' or facts['group'] == 'A17'


def test_different_patients_stay_different():
    ids = [dicom_facts(dicom(U8, PatientID=p))['group'] for p in ('A' * 63 + '1' * 40, 'A' * 63 + '2' * 40, 'A17')]
    assert len(set(ids)) == 3
    assert ids[2] == 'A17'


# ---------------------------------------------------------------- volumes

CUBE = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)


def npy_header(shape, kind="'<i2'"):
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + '\n'
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text.encode()


@pytest.mark.parametrize(
    'name, data, words',
    [
        ('a.npy', npy_header((4000, 4000, 4000)), 'declares 4000 x 4000 x 4000 voxels, more than 500 million'),
        ('a.npy', npy_header((4, 4, 4)), 'cannot be decoded'),
        ('a.npy', pickle.dumps(CUBE), 'cannot be read as an array'),
        ('a.npy', b'', 'empty file'),
        ('a.npy', npy_header((2, 2), "'|O'"), 'not of numbers'),
        ('a.npy', npy_header((2, 2, 2), "'<U3'"), 'not of numbers'),
    ],
)
def test_arrays_that_are_not_volumes(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=f'{name}: .*{words}'):
        read_volume(tmp_path / name, (1, 1, 1))


@pytest.mark.parametrize(
    'arrays, words',
    [
        ({'hu': CUBE, 'spacing': np.array(['1', '1', '1'])}, 'not of numbers'),
        ({'hu': CUBE, 'spacing': np.array([1, None, 1], object)}, 'not of numbers'),
        ({'hu': CUBE.astype(object), 'spacing': (1, 1, 1)}, 'not of numbers'),
        ({'hu': CUBE > 0, 'spacing': (1, 1, 1)}, 'not of numbers'),
        ({'hu': CUBE.astype(complex), 'spacing': (1, 1, 1)}, 'not of numbers'),
        ({'hu': CUBE, 'spacing': np.ones(9)}, '9 numbers where 3'),
        ({'hu': CUBE, 'spacing': (1, np.nan, 1)}, 'three numbers in mm'),
        ({'hu': CUBE * np.float32(np.nan), 'spacing': (1, 1, 1)}, 'not numbers'),
        ({'spacing': (1, 1, 1)}, "no array 'hu'"),
    ],
)
def test_npz_files_that_are_not_volumes(tmp_path, arrays, words):
    np.savez(tmp_path / 'a.npz', **arrays)
    with pytest.raises(ValueError, match=words):
        read_volume(tmp_path / 'a.npz')


def test_a_small_npz_that_unpacks_to_gigabytes(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.npz', 'w', zipfile.ZIP_DEFLATED) as z, z.open('hu.npy', 'w') as f:
        f.write(npy_header((4000, 1000, 1000)))
        f.write(b'\0' * 10**6)
    with pytest.raises(ImageError, match='more than 500 million'):
        read_volume(tmp_path / 'a.npz')


def test_objects_are_not_a_volume():
    for a in (CUBE.astype(object), CUBE.astype(str), CUBE > 0):
        with pytest.raises(ValueError, match='is not a volume'):
            Volume(a, (1, 1, 1))


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_nifti_that_declares_too_much(tmp_path, suffix):
    nib = pytest.importorskip('nibabel')
    import gzip

    nib.save(nib.Nifti1Image(CUBE, np.diag([-1, -1, 1, 1])), tmp_path / f'a{suffix}')
    data = (tmp_path / f'a{suffix}').read_bytes()
    plain = bytearray(gzip.decompress(data) if suffix == '.nii.gz' else data)

    def changed(at, form, *values):
        b = bytearray(plain)
        struct.pack_into(form, b, at, *values)
        (tmp_path / f'b{suffix}').write_bytes(gzip.compress(bytes(b)) if suffix == '.nii.gz' else bytes(b))
        return tmp_path / f'b{suffix}'

    assert read_volume(changed(40, '<h', 3)).hu.size == CUBE.size
    with pytest.raises(ImageError, match='more than 500 million'):
        read_volume(changed(42, '<hhh', 4000, 4000, 4000))
    with pytest.raises(ImageError, match='start at byte 2e'):
        read_volume(changed(108, '<f', 2e9))
    with pytest.raises(ImageError, match='cannot be read as NIfTI'):
        read_volume(changed(0, '<i', 7))
    with pytest.raises(ImageError, match='not numbers'):
        read_volume(changed(70, '<hh', 128, 24))  # RGB


def test_a_pipe_is_not_a_volume(tmp_path):
    os.mkfifo(tmp_path / 'a.npy')
    os.mkfifo(tmp_path / 'a.nii')
    for name in ('a.npy', 'a.nii'):
        with pytest.raises(ImageError, match='a pipe'):
            read_volume(tmp_path / name, (1, 1, 1))


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='memory is limited as Linux does it')
def test_hostile_files_take_little_memory(tmp_path):
    "All of them in one process, which prints how much its memory grew; Pillow's warning of many pixels is not printed."
    deflated = dicom(np.zeros((9000, 10_000, 3), np.uint8), syntax='1.2.840.10008.1.2.1.99')
    frames = [Image.new('RGB', (20, 20), c) for c in ('red', 'blue')]
    webp = bytearray(saved(frames[0], 'WEBP', save_all=True, append_images=frames[1:]))
    webp[24:30] = (16_382).to_bytes(3, 'little') * 2  # the canvas
    files = {
        'a.dcm': deflated,
        'b.png': png(size=(60_000, 60_000), rows=[]),
        'c.webp': bytes(webp),
        'd.png': png(size=(10_000, 9_500), rows=[]),
        'e.gif': b'GIF89a' + struct.pack('<HHBBB', 65535, 65535, 0, 0, 0) + b';',
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    code = (
        'import resource, sys\nfrom dr_transfer.data.images import image_error\nimport pydicom.pixels\n'
        'start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'errors = [image_error(p) for p in sys.argv[1:]]\nassert all(errors), errors\n'
        'print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)//1024)'
    )
    run = subprocess.run(
        [sys.executable, '-c', code, *[str(tmp_path / n) for n in files]], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == '', run.stderr
    assert int(run.stdout) < 300


# ---------------------------------------------------------------- facts about files


def test_facts_of_files_do_not_fail_for_a_damaged_file(special):
    from dr_transfer.data.leaks import file_facts

    facts = file_facts(find_images(special))
    good = facts[facts.width.notna()]
    assert len(facts) == 9
    assert len(good) == 4
    assert set(good.width) == {WIDTH, 8 * WIDTH}
    assert set(facts.suffix) == {'.jpg'}


def test_facts_of_files_decode_nothing(tmp_path):
    from dr_transfer.data.leaks import file_facts

    (tmp_path / 'cut.jpg').write_bytes(JPEG[: len(JPEG) // 2])
    (tmp_path / 'cut.dcm').write_bytes(dicom(U8)[:-500])
    facts = file_facts([tmp_path / 'cut.jpg', tmp_path / 'cut.dcm'])
    assert facts.width.tolist() == [8 * WIDTH, WIDTH]
    assert facts.height.tolist() == [8 * HEIGHT, HEIGHT]


# ---------------------------------------------------------------- compressed DICOM


def coded(a, code, syntax, **more):
    "A DICOM file whose pixels are `code`, with a declared transfer syntax."
    pydicom = pytest.importorskip('pydicom')
    from pydicom.encaps import encapsulate

    ds = pydicom.dcmread(io.BytesIO(dicom(a, **more)))
    ds.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    ds.PixelData = encapsulate([code])
    ds['PixelData'].VR = 'OB'
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def as_rle(a, **more):
    pydicom = pytest.importorskip('pydicom')
    ds = pydicom.dcmread(io.BytesIO(dicom(a, **more)))
    ds.compress(pydicom.uid.RLELossless)
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def as_code(a, kind='JPEG', **how):
    return saved(Image.fromarray(a), kind, **({'quality': 98} if kind == 'JPEG' else {}), **how)


@pytest.mark.parametrize(
    'data, want',
    [
        (lambda: coded(U8, as_code(U8), 'JPEGBaseline8Bit'), GREY[..., None]),
        (
            lambda: coded(255 - U8, as_code(255 - U8), 'JPEGBaseline8Bit', PhotometricInterpretation='MONOCHROME1'),
            GREY[..., None],
        ),
        (lambda: coded(COLOUR, as_code(COLOUR), 'JPEGBaseline8Bit', PhotometricInterpretation='YBR_FULL_422'), COLOUR),
        (
            lambda: coded(
                COLOUR, as_code(COLOUR, subsampling=0), 'JPEGBaseline8Bit', PhotometricInterpretation='YBR_FULL'
            ),
            COLOUR,
        ),
        (
            lambda: coded(COLOUR, as_code(COLOUR, keep_rgb=True), 'JPEGBaseline8Bit', PhotometricInterpretation='RGB'),
            COLOUR,
        ),
        (
            lambda: coded(COLOUR, as_code(COLOUR, 'JPEG2000'), 'JPEG2000Lossless', PhotometricInterpretation='RGB'),
            COLOUR,
        ),
        (
            lambda: coded(
                COLOUR,
                as_code(COLOUR, 'JPEG2000', no_jp2=True, mct=1),
                'JPEG2000Lossless',
                PhotometricInterpretation='YBR_RCT',
            ),
            COLOUR,
        ),
        (lambda: as_rle(U8), GREY[..., None]),
        (lambda: as_rle(COLOUR), COLOUR),
        (lambda: as_rle(U16), GREY[..., None]),
        (lambda: as_rle(TWELVE, BitsStored=12), GREY[..., None]),
    ],
    ids=[
        'grey',
        'inverted',
        'YBR 4:2:2',
        'YBR 4:4:4',
        'RGB',
        'JPEG 2000',
        'JPEG 2000 YBR',
        'RLE',
        'RLE colour',
        'RLE 16 bits',
        'RLE 12 bits',
    ],
)
def test_compressed_dicom_is_decoded(data, want):
    assert distance(read_rgb(data()), want) <= 3


@pytest.mark.parametrize('syntax', ['JPEGLosslessSV1', 'JPEGLSLossless', 'HTJ2KLossless'])
def test_an_error_for_a_missing_decoder_names_what_to_install(tmp_path, monkeypatch, syntax):
    data = coded(U8, b'\xff\xd8\xff' + bytes(200), syntax)
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, 'is_available', False)
    (tmp_path / 'image.dcm').write_bytes(data)
    text = image_error(tmp_path / 'image.dcm')
    assert text.startswith('no decoder is installed for ')
    assert 'pip install pylibjpeg' in text
    assert '\n' not in text


@pytest.mark.parametrize('syntax', ['MPEG2MPML', '1.2.3.4'])
def test_compressions_that_pydicom_does_not_decode_are_named(tmp_path, syntax):
    (tmp_path / 'image.dcm').write_bytes(
        dicom(U8, syntax=syntax) if syntax[0] == '1' else coded(U8, b'\0' * 200, syntax)
    )
    assert 'which is not supported: save it without compression' in image_error(tmp_path / 'image.dcm')


# ---------------------------------------------------------------- TIFF of 9 to 15 bits


def packed_tiff(bits, order='<', photometric=1):
    "A grey TIFF whose values of a number of bits are packed without gaps, as the standard defines."
    a = (RAMP * (2**bits - 1)).round().astype(np.uint32)
    a = 2**bits - 1 - a if photometric == 0 else a
    rows = (a[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    data = np.packbits(rows.reshape(len(a), -1).astype(np.uint8), axis=1).tobytes()
    tags = [
        (256, WIDTH),
        (257, HEIGHT),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, HEIGHT),
        (279, len(data)),
    ]
    data += b'\0' * (len(data) % 2)
    head = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(order + 'I', 8 + len(data))
    entry = '<HHIHxx' if order == '<' else '>HHIHxx'
    long = order + 'HHII'
    ifd = struct.pack(order + 'H', len(tags))
    ifd += b''.join(struct.pack(long, t, 4, 1, v) if v > 65535 else struct.pack(entry, t, 3, 1, v) for t, v in tags)
    return head + data + ifd + bytes(4)


@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('photometric', [0, 1])
@pytest.mark.parametrize('bits', range(9, 17))
def test_a_tiff_of_9_to_16_bits_is_scaled_by_its_range_or_has_a_reason(tmp_path, bits, photometric, order):
    "Pillow reads 12 and 16 of them; others are skipped, and none is too dark"
    x_tif = tmp_path / 'x.tif'
    x_tif.write_bytes(
        packed_tiff(bits, order, photometric)
        if bits < 16
        else saved(Image.fromarray((RAMP * 65535).round().astype(order + 'u2')), 'TIFF')
    )
    text = image_error(x_tif)
    if text:
        assert bits not in (16,), text
        assert 'TIFF' in text or 'decoded' in text, text
        return
    assert distance(read_rgb(x_tif), GREY[..., None]) <= 2


# ---------------------------------------------------------------- a lack of open files


def test_an_error_of_too_many_open_files_does_not_name_an_image(tmp_path, monkeypatch):
    "The image is neither skipped nor predicted: the command stops."
    x_jpg = tmp_path / 'x.jpg'
    x_jpg.write_bytes(JPEG)

    def none_left(*args, **kwargs):
        raise OSError(errno.EMFILE, 'Too many open files', 'x.jpg')

    monkeypatch.setattr('dr_transfer.data.images.Image.open', none_left)
    for call in (
        lambda: image_error(x_jpg),
        lambda: read_rgb(x_jpg),
        lambda: label_table(tmp_path, pd.DataFrame({'image': ['x.jpg'], 'label': ['a']})),
        lambda: prepare_image(x_jpg, tmp_path / 'y.png', Preparation()),
    ):
        with pytest.raises(OSError, match='Too many open files'):
            call()
