"Test images of every mode, orientation and size, and the input of the network for them."

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import saved
from PIL import Image

from dr_transfer.data.fundus import READERS, disc_box, read_image
from dr_transfer.data.images import FITS, fit_square, read_rgb, to_rgb
from dr_transfer.synthetic.fundus import draw_fundus


def smooth(w=48, h=32):
    "An image with no two corners alike, smooth enough for JPEG."
    y, x = np.mgrid[:h, :w]
    across = x / w
    down = y / h
    red = 40 + 180 * across
    green = 200 - 160 * down
    blue = 60 + 60 * (across + down) + 20 * np.sin(6 * across)
    return np.stack([red, green, blue], -1).round().astype(np.uint8)


def far(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))


A = smooth()
GREY = A[..., 0]


# ---------------------------------------------------------------- modes


def test_rgb_is_not_changed(tmp_path):
    im = Image.fromarray(A)
    files = [saved(im, kind) for kind in ('PNG', 'BMP', 'TIFF')]
    for source in (A, im, *files):
        np.testing.assert_array_equal(read_rgb(source), A)
    path = tmp_path / '眼 底.png'
    im.save(path)
    np.testing.assert_array_equal(read_rgb(path), A)
    np.testing.assert_array_equal(read_rgb(str(path)), A)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'BMP', 'JPEG'])
def test_grey(kind):
    options = {'quality': 100} if kind == 'JPEG' else {}
    loss = 3 if kind == 'JPEG' else 0
    im = read_rgb(saved(Image.fromarray(GREY), kind, **options))
    assert im.mode == 'RGB'
    assert far(im, GREY[..., None]).max() <= loss


def test_one_bit():
    bits = GREY > 128
    assert 0 < bits.mean() < 1
    im = read_rgb(saved(Image.fromarray(bits), 'PNG'))
    want = 255 * np.repeat(bits[..., None], 3, -1)
    np.testing.assert_array_equal(im, want)


INDEX = (np.arange(48 * 32).reshape(32, 48) % 3).astype(np.uint8)
PALETTE = np.array([[200, 30, 40], [30, 200, 40], [250, 250, 5]], np.uint8)


@pytest.mark.parametrize('kind', ['PNG', 'GIF'])
def test_palette(kind):
    few = PALETTE[INDEX]
    im = Image.fromarray(few).quantize(3)
    assert im.mode == 'P'
    np.testing.assert_array_equal(read_rgb(saved(im, kind)), few)


@pytest.mark.parametrize('kind', ['PNG', 'GIF'])
def test_palette_with_transparency(kind):
    "Transparent pixels become black, whatever their colour."
    im = Image.fromarray(INDEX)
    im.putpalette(PALETTE.flatten().tolist())
    data = saved(im, kind, transparency=1)
    opened = Image.open(io.BytesIO(data))
    assert 'transparency' in opened.info
    shown = PALETTE.copy()
    shown[1] = 0
    np.testing.assert_array_equal(read_rgb(data), shown[INDEX])


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_alpha_is_over_black(mode):
    row = np.linspace(0, 255, 48).round().astype(np.uint8)
    alpha = row[None].repeat(32, 0)
    base = A if mode == 'RGBA' else GREY[..., None]
    channels = (*np.moveaxis(base, -1, 0), alpha)
    im = Image.merge(mode, [Image.fromarray(np.ascontiguousarray(c)) for c in channels])
    out = np.asarray(read_rgb(saved(im, 'PNG')))
    assert out.shape == (32, 48, 3)
    opacity = alpha[..., None] / 255
    assert far(out, (base * opacity).round()).max() <= 1
    assert out[:, 0].max() == 0
    opaque = np.broadcast_to(base, A.shape)[:, -1]
    assert far(out[:, -1], opaque).max() <= 1


def test_rgb_with_a_transparent_colour():
    a = A.copy()
    a[:8] = (1, 2, 3)
    data = saved(Image.fromarray(a), 'PNG', transparency=(1, 2, 3))
    out = np.asarray(read_rgb(data))
    assert out[:8].max() == 0
    np.testing.assert_array_equal(out[8:], a[8:])


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_16_bits_keep_their_grey_levels(kind):
    shades = np.linspace(0, 65535, 48 * 32).round()
    deep = shades.astype(np.uint16).reshape(32, 48)
    data = saved(Image.fromarray(deep), kind)
    opened = Image.open(io.BytesIO(data))
    assert opened.mode.startswith('I')
    out = np.asarray(read_rgb(data))
    want = (deep / 257)[..., None]
    assert far(out, want).max() <= 1
    assert len(np.unique(out)) == 256  # clipping would give a white image


def test_cmyk_jpeg():
    im = Image.fromarray(A).convert('CMYK')
    data = saved(im, 'JPEG', quality=100, subsampling=0)
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == 'CMYK'
    for size in (None, 8):
        out = read_rgb(data, size).resize((48, 32))
        assert far(out, A).mean() < 4


@pytest.mark.parametrize('mode', ['RGB', 'L', '1', 'P', 'LA', 'RGBA', 'CMYK', 'YCbCr', 'HSV'])
@pytest.mark.parametrize('fit', FITS)
def test_any_mode_to_a_square(mode, fit):
    im = read_image(Image.fromarray(A).convert(mode), 24, fit=fit)
    assert im.mode == 'RGB'
    assert im.size == (24, 24)
    assert np.asarray(im).std() > 10


def test_first_frame_of_an_animation():
    first, second = (Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue'))
    data = saved(first, 'GIF', save_all=True, append_images=[second])
    assert read_rgb(data).getpixel((4, 4)) == (255, 0, 0)


def test_a_file_is_closed_and_an_image_is_not_changed(tmp_path):
    a_png = tmp_path / 'a.png'
    im = Image.fromarray(A).convert('RGBA')
    before = np.array(im)
    out = to_rgb(im)
    out.paste((0, 0, 0), (0, 0, 9, 9))
    np.testing.assert_array_equal(im, before)
    Image.fromarray(A).save(a_png)
    im = read_rgb(a_png)
    a_png.unlink()
    np.testing.assert_array_equal(im, A)  # the pixels are loaded


# ---------------------------------------------------------------- orientation

# How the standard (EXIF, tag 274) displays the stored rows and columns, and so how to store them
SHOW = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
BEST = {'JPEG': dict(quality=100, subsampling=0), 'WEBP': dict(lossless=True, exact=True)}
STORE = {**SHOW, 6: SHOW[8], 8: SHOW[6]}


def turned(a, orientation, kind, **kwargs):
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORE[orientation](a))
    return saved(Image.fromarray(stored), kind, exif=exif, **kwargs)


@pytest.mark.parametrize('orientation', SHOW)
def test_store_and_show_are_inverse(orientation):
    stored = STORE[orientation](A)
    np.testing.assert_array_equal(SHOW[orientation](stored), A)


@pytest.mark.parametrize('orientation', SHOW)
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_every_orientation_is_upright(orientation, kind):
    im = read_rgb(turned(A, orientation, kind, **BEST.get(kind, {})))
    loss = 5 if kind == 'JPEG' else 0
    assert im.size == (48, 32)
    assert far(im, A).max() <= loss
    again = to_rgb(im)
    assert far(again, im).max() == 0  # an upright image is not rotated again


@pytest.mark.parametrize('orientation', SHOW)
def test_orientation_holds_when_decoded_small(orientation):
    a = smooth(800, 600)
    im = read_rgb(turned(a, orientation, 'JPEG', quality=95), 100)
    assert im.size == (400, 300)
    want = Image.fromarray(a).resize((80, 60))
    assert far(im.resize((80, 60)), want).mean() < 2


@pytest.mark.parametrize('orientation', SHOW)
def test_orientation_of_grey_16_bits(orientation):
    deep = GREY.astype(np.uint16) * 257
    im = read_rgb(turned(deep, orientation, 'PNG'))
    want = GREY[..., None].repeat(3, -1)
    np.testing.assert_array_equal(im, want)


# ---------------------------------------------------------------- large files


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('fit', FITS)
def test_draft_decoding_agrees_with_full_decoding(mode, fit):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 8, (900, 1200, 1))  # the size of a camera image
    a = np.clip(smooth(1200, 900) + noise, 0, 255).astype(np.uint8)
    im = Image.fromarray(a).convert(mode)
    data = saved(im, 'JPEG', quality=92)
    full = read_rgb(data)
    draft = read_rgb(data, 96)
    assert full.size == (1200, 900)
    assert draft.size == (300, 225)  # a quarter: half of that would be less than twice 96
    a = fit_square(full, 96, fit)
    b = read_image(data, 96, fit=fit)
    distance = far(a, b)
    assert distance.mean() < 2
    assert distance.max() < 16


@pytest.mark.parametrize('size', [16, 64, 100, 150, 224, 300, 1000])
def test_a_draft_is_never_smaller_than_needed(size):
    data = saved(Image.fromarray(smooth(640, 480)), 'JPEG')
    im = read_rgb(data, size)
    assert min(im.size) >= min(480, 2 * size)
    assert max(im.size) <= 640


# ---------------------------------------------------------------- fit


def test_fits_of_a_wide_image():
    a = np.zeros((40, 80, 3), np.uint8)
    a[:, :20] = (250, 0, 0)
    a[:, 20:60] = (0, 250, 0)
    a[:, 60:] = (0, 0, 250)
    im = Image.fromarray(a)
    pad, squish, crop = (np.asarray(fit_square(im, 40, fit)) for fit in ('pad', 'squish', 'crop'))
    for o in (pad, squish, crop):
        assert o.shape == (40, 40, 3)
    assert pad[:9].max() == pad[31:].max() == 0
    assert pad[12:28].max(-1).min() > 100
    assert pad[20, 2, 0] > 200
    assert pad[20, 37, 2] > 200  # the complete image, on black
    assert squish.max(-1).min() > 100
    assert squish[20, 2, 0] > 200
    assert squish[20, 37, 2] > 200  # the complete image, narrower
    assert (crop == (0, 250, 0)).all()  # its middle


@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize(
    'shape',
    [
        (1, 1),
        (3, 200),
        (200, 3),
        (32, 32),
        (33, 31),
    ],
)
def test_fit_takes_any_shape_and_is_deterministic(fit, shape):
    im = Image.fromarray(np.full((*shape, 3), 120, np.uint8))
    a = np.asarray(fit_square(im, 32, fit))
    b = np.asarray(fit_square(im, 32, fit))
    assert a.shape == (32, 32, 3)
    assert (a == b).all()
    shades = {0, 120} if fit == 'pad' else {120}
    assert set(np.unique(a)) <= shades


def test_a_square_of_the_right_size_is_not_changed():
    a = smooth(32, 32)
    im = Image.fromarray(a)
    for fit in FITS:
        np.testing.assert_array_equal(fit_square(im, 32, fit), a)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown fit 'croop'. Known, nearest first: crop"):
        fit_square(Image.fromarray(A), 32, 'croop')
    with pytest.raises(ValueError, match=r"unknown reader 'fundsu'. Known, nearest first: fundus"):
        read_image(A, 32, 'fundsu')


# ---------------------------------------------------------------- fundus


def framed(a, top, bottom, left, right):
    return np.pad(a, ((top, bottom), (left, right), (0, 0)))


BORDERS = [(0, 0, 60, 60), (40, 40, 0, 0), (0, 80, 0, 0), (0, 0, 100, 10), (30, 50, 70, 90), (128, 128, 128, 128)]


@pytest.mark.parametrize('borders', BORDERS)
@pytest.mark.parametrize('camera', range(3))
def test_black_borders_around_a_retina_change_nothing(borders, camera):
    top, _, left, _ = borders
    for seed in range(2):
        a, _ = draw_fundus(3, seed, 256, camera=camera)
        b = framed(a, *borders)
        step = max(1, min(b.shape[:2]) // 256)  # the disc is found on an image that is smaller by this factor
        before = np.array(disc_box(Image.fromarray(a)))
        after = np.array(disc_box(Image.fromarray(b)))
        moved = after - before - [left, top] * 2
        assert abs(moved).max() < step, moved
        plain, more = (read_image(o, 64, 'fundus', 'pad') for o in (a, b))
        plain_read, framed_read = (read_image(o, 64, 'photo', 'pad') for o in (a, b))
        without = far(plain_read, framed_read).mean()
        assert without > 15
        most = 0 if step == 1 else without / 10
        assert far(plain, more).mean() <= most


def test_borders_of_a_large_image():
    "Found on a reduced image; borders in a JPEG are not exactly black."
    a, _ = draw_fundus(2, 1, 700)
    both = (a, framed(a, 20, 20, 300, 260))
    data = [saved(Image.fromarray(o), 'JPEG', quality=92) for o in both]
    plain, more = (read_image(d, 96, 'fundus', 'pad') for d in data)
    assert far(plain, more).mean() < 3


@pytest.mark.parametrize('image', [np.zeros((40, 60, 3), np.uint8), np.full((40, 60, 3), 255, np.uint8), A])
def test_an_image_without_a_disc_is_not_cropped(image):
    got = read_image(image, 32, 'fundus', 'squish')
    want = read_image(image, 32, 'photo', 'squish')
    np.testing.assert_array_equal(got, want)


def test_the_reader_is_the_same_from_file_bytes_image_and_array(tmp_path):
    a_png = tmp_path / 'a.png'
    a, _ = draw_fundus(1, 3, 128)
    im = Image.fromarray(a)
    im.save(a_png)
    sources = (a, im, a_png, str(a_png), a_png.read_bytes())
    first, *rest = (np.asarray(read_image(source, 64, 'fundus')) for source in sources)
    assert set(READERS) >= {'photo', 'fundus'}
    for o in rest:
        assert (first == o).all()


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_one_image_in_many_threads(tmp_path, kind):
    "An image that PIL has not loaded yet, requested by several threads at once, is upright in each"
    file = tmp_path / 'p'
    exif = Image.Exif()
    exif[0x0112] = 6
    large = np.kron(A, np.ones((8, 8, 1), np.uint8))
    Image.fromarray(large).save(file, kind, exif=exif)
    want = np.asarray(read_rgb(file))
    for _ in range(5):
        im = Image.open(file)
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(read_rgb, [im] * 16))
        for g in got:
            np.testing.assert_array_equal(g, want)
