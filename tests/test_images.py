"Images of every mode, orientation and size, and what the network gets to see of them."

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dr_transfer.data.fundus import READERS, disc_box, read_image
from dr_transfer.data.images import FITS, fit_square, read_rgb, to_rgb
from dr_transfer.synthetic.fundus import draw_fundus


def smooth(w=48, h=32):
    "A picture with no two corners alike, smooth enough for JPEG."
    y, x = np.mgrid[:h, :w]
    return (
        np.stack([40 + 180 * x / w, 200 - 160 * y / h, 60 + 60 * (x / w + y / h) + 20 * np.sin(6 * x / w)], -1)
        .round()
        .astype(np.uint8)
    )


def through(im, kind, **kwargs):
    "The bytes of a file."
    out = io.BytesIO()
    im.save(out, kind, **kwargs)
    return out.getvalue()


def far(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))


A = smooth()
GREY = A[..., 0]


# ---------------------------------------------------------------- modes


def test_rgb_is_left_as_it_is(tmp_path):
    for source in (
        A,
        Image.fromarray(A),
        through(Image.fromarray(A), 'PNG'),
        through(Image.fromarray(A), 'BMP'),
        through(Image.fromarray(A), 'TIFF'),
    ):
        np.testing.assert_array_equal(read_rgb(source), A)
    Image.fromarray(A).save(tmp_path / '眼 底.png')
    for path in (tmp_path / '眼 底.png', str(tmp_path / '眼 底.png')):
        np.testing.assert_array_equal(read_rgb(path), A)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'BMP', 'JPEG'])
def test_grey(kind):
    im = read_rgb(through(Image.fromarray(GREY), kind, **({'quality': 100} if kind == 'JPEG' else {})))
    assert im.mode == 'RGB' and far(im, GREY[..., None]).max() <= (3 if kind == 'JPEG' else 0)


def test_one_bit():
    bits = GREY > 128
    assert 0 < bits.mean() < 1
    np.testing.assert_array_equal(
        read_rgb(through(Image.fromarray(bits), 'PNG')), 255 * np.repeat(bits[..., None], 3, -1)
    )


@pytest.mark.parametrize('kind', ['PNG', 'GIF'])
def test_palette(kind):
    few = np.array([[200, 30, 40], [30, 200, 40], [250, 250, 5]], np.uint8)[np.arange(48 * 32).reshape(32, 48) % 3]
    im = Image.fromarray(few).quantize(3)
    assert im.mode == 'P'
    np.testing.assert_array_equal(read_rgb(through(im, kind)), few)


@pytest.mark.parametrize('kind', ['PNG', 'GIF'])
def test_palette_with_transparency(kind):
    "What is transparent becomes black, whatever colour lies under it."
    index = (np.arange(48 * 32).reshape(32, 48) % 3).astype(np.uint8)
    im = Image.fromarray(index)
    im.putpalette([200, 30, 40, 30, 200, 40, 250, 250, 5])
    opened = Image.open(io.BytesIO(data := through(im, kind, transparency=1)))
    assert 'transparency' in opened.info
    np.testing.assert_array_equal(read_rgb(data), np.array([[200, 30, 40], [0, 0, 0], [250, 250, 5]], np.uint8)[index])


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_alpha_is_over_black(mode):
    alpha = np.linspace(0, 255, 48).round().astype(np.uint8)[None].repeat(32, 0)
    base = A if mode == 'RGBA' else GREY[..., None]
    im = Image.merge(mode, [Image.fromarray(np.ascontiguousarray(c)) for c in (*np.moveaxis(base, -1, 0), alpha)])
    out = np.asarray(read_rgb(through(im, 'PNG')))
    assert out.shape == (32, 48, 3) and far(out, (base * (alpha[..., None] / 255)).round()).max() <= 1
    assert out[:, 0].max() == 0 and far(out[:, -1], np.broadcast_to(base, A.shape)[:, -1]).max() <= 1


def test_rgb_with_a_transparent_colour():
    a = A.copy()
    a[:8] = (1, 2, 3)
    out = np.asarray(read_rgb(through(Image.fromarray(a), 'PNG', transparency=(1, 2, 3))))
    assert out[:8].max() == 0
    np.testing.assert_array_equal(out[8:], a[8:])


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_16_bits_keep_their_shades(kind):
    deep = np.linspace(0, 65535, 48 * 32).round().astype(np.uint16).reshape(32, 48)
    data = through(Image.fromarray(deep), kind)
    assert Image.open(io.BytesIO(data)).mode.startswith('I')
    out = np.asarray(read_rgb(data))
    assert (
        far(out, (deep / 257)[..., None]).max() <= 1 and len(np.unique(out)) == 256
    )  # clipping would leave a white picture


def test_cmyk_jpeg():
    im = Image.fromarray(A).convert('CMYK')
    data = through(im, 'JPEG', quality=100, subsampling=0)
    assert Image.open(io.BytesIO(data)).mode == 'CMYK'
    for size in (None, 8):
        assert far(read_rgb(data, size).resize((48, 32)), A).mean() < 4


@pytest.mark.parametrize('mode', ['RGB', 'L', '1', 'P', 'LA', 'RGBA', 'CMYK', 'YCbCr', 'HSV'])
@pytest.mark.parametrize('fit', FITS)
def test_any_mode_to_a_square(mode, fit):
    im = read_image(Image.fromarray(A).convert(mode), 24, fit=fit)
    assert im.mode == 'RGB' and im.size == (24, 24) and np.asarray(im).std() > 10


def test_first_frame_of_an_animation():
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
    assert np.asarray(read_rgb(through(frames[0], 'GIF', save_all=True, append_images=frames[1:])))[4, 4].tolist() == [
        255,
        0,
        0,
    ]


def test_a_file_is_closed_and_an_image_is_not_changed(tmp_path):
    im = Image.fromarray(A).convert('RGBA')
    before = np.array(im)
    out = to_rgb(im)
    out.paste((0, 0, 0), (0, 0, 9, 9))
    np.testing.assert_array_equal(im, before)
    Image.fromarray(A).save(tmp_path / 'a.png')
    im = read_rgb(tmp_path / 'a.png')
    (tmp_path / 'a.png').unlink()
    np.testing.assert_array_equal(im, A)  # pixels are there, not only the promise of them


# ---------------------------------------------------------------- orientation

# How the standard (EXIF, tag 274) says that the stored rows and columns are to be shown, and so how to store them
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
STORE = {**SHOW, 6: SHOW[8], 8: SHOW[6]}


def turned(a, orientation, kind, **kwargs):
    exif = Image.Exif()
    exif[274] = orientation
    return through(Image.fromarray(np.ascontiguousarray(STORE[orientation](a))), kind, exif=exif, **kwargs)


@pytest.mark.parametrize('orientation', SHOW)
def test_store_and_show_are_inverse(orientation):
    np.testing.assert_array_equal(SHOW[orientation](STORE[orientation](A)), A)


@pytest.mark.parametrize('orientation', SHOW)
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_every_orientation_is_upright(orientation, kind):
    options = {'JPEG': dict(quality=100, subsampling=0), 'WEBP': dict(lossless=True, exact=True)}.get(kind, {})
    im = read_rgb(turned(A, orientation, kind, **options))
    assert im.size == (48, 32) and far(im, A).max() <= (5 if kind == 'JPEG' else 0)
    assert to_rgb(im) is im or far(to_rgb(im), im).max() == 0  # once upright, it is not turned again


@pytest.mark.parametrize('orientation', SHOW)
def test_orientation_holds_when_decoded_small(orientation):
    a = smooth(800, 600)
    im = read_rgb(turned(a, orientation, 'JPEG', quality=95), 100)
    assert im.size == (400, 300) and far(im.resize((80, 60)), Image.fromarray(a).resize((80, 60))).mean() < 2


@pytest.mark.parametrize('orientation', SHOW)
def test_orientation_of_grey_16_bits(orientation):
    im = read_rgb(turned((A[..., 0].astype(np.uint16) * 257), orientation, 'PNG'))
    np.testing.assert_array_equal(im, GREY[..., None].repeat(3, -1))


# ---------------------------------------------------------------- large files


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('fit', FITS)
def test_draft_decoding_agrees_with_full_decoding(mode, fit):
    rng = np.random.default_rng(0)
    a = np.clip(smooth(1200, 900) + rng.normal(0, 8, (900, 1200, 1)), 0, 255).astype(np.uint8)  # the noise of a camera
    data = through(Image.fromarray(a).convert(mode), 'JPEG', quality=92)
    full, draft = read_rgb(data), read_rgb(data, 96)
    assert full.size == (1200, 900) and draft.size == (300, 225)  # a quarter: half of that would be less than twice 96
    a, b = fit_square(full, 96, fit), read_image(data, 96, fit=fit)
    assert far(a, b).mean() < 2 and far(a, b).max() < 16, (far(a, b).mean(), far(a, b).max())


@pytest.mark.parametrize('size', [16, 64, 100, 150, 224, 300, 1000])
def test_a_draft_is_never_smaller_than_what_is_needed(size):
    im = read_rgb(through(Image.fromarray(smooth(640, 480)), 'JPEG'), size)
    assert min(im.size) >= min(480, 2 * size) and max(im.size) <= 640


# ---------------------------------------------------------------- fit


def test_fits_of_a_wide_image():
    a = np.zeros((40, 80, 3), np.uint8)
    a[:, :20] = (250, 0, 0)
    a[:, 20:60] = (0, 250, 0)
    a[:, 60:] = (0, 0, 250)
    pad, squish, crop = (np.asarray(fit_square(Image.fromarray(a), 40, f)) for f in ('pad', 'squish', 'crop'))
    assert all(o.shape == (40, 40, 3) for o in (pad, squish, crop))
    assert (
        pad[:9].max() == pad[31:].max() == 0
        and pad[12:28].max(-1).min() > 100
        and pad[20, 2, 0] > 200
        and pad[20, 37, 2] > 200
    )  # all of it, on black
    assert squish.max(-1).min() > 100 and squish[20, 2, 0] > 200 and squish[20, 37, 2] > 200  # all of it, narrower
    assert (crop == (0, 250, 0)).all()  # the middle of it


@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('shape', [(1, 1), (3, 200), (200, 3), (32, 32), (33, 31)])
def test_fit_takes_any_shape_and_leaves_nothing_to_chance(fit, shape):
    im = Image.fromarray(np.full((*shape, 3), 120, np.uint8))
    a, b = np.asarray(fit_square(im, 32, fit)), np.asarray(fit_square(im, 32, fit))
    assert a.shape == (32, 32, 3) and (a == b).all() and set(np.unique(a)) <= ({0, 120} if fit == 'pad' else {120})


def test_a_square_of_the_right_size_is_left_alone():
    a = smooth(32, 32)
    for fit in FITS:
        np.testing.assert_array_equal(fit_square(Image.fromarray(a), 32, fit), a)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown fit 'croop'. Known, nearest first: crop"):
        fit_square(Image.fromarray(A), 32, 'croop')
    with pytest.raises(ValueError, match="unknown reader 'fundsu'. Known, nearest first: fundus"):
        read_image(A, 32, 'fundsu')


# ---------------------------------------------------------------- fundus


def framed(a, top, bottom, left, right):
    return np.pad(a, ((top, bottom), (left, right), (0, 0)))


BORDERS = [(0, 0, 60, 60), (40, 40, 0, 0), (0, 80, 0, 0), (0, 0, 100, 10), (30, 50, 70, 90), (128, 128, 128, 128)]


@pytest.mark.parametrize('borders', BORDERS)
@pytest.mark.parametrize('camera', range(3))
def test_black_borders_around_a_retina_change_nothing(borders, camera):
    for seed in range(2):
        a = draw_fundus(3, seed, 256, camera=camera)[0]
        b = framed(a, *borders)
        step = max(1, min(b.shape[:2]) // 256)  # the disc is found on a picture that is smaller by this factor
        moved = np.array(disc_box(Image.fromarray(b))) - disc_box(Image.fromarray(a)) - [borders[2], borders[0]] * 2
        assert abs(moved).max() < step, moved
        plain, more = (read_image(o, 64, 'fundus', 'pad') for o in (a, b))
        without = far(*(read_image(o, 64, 'photo', 'pad') for o in (a, b))).mean()
        assert without > 15 and far(plain, more).mean() <= (0 if step == 1 else without / 10)


def test_borders_of_a_large_photograph():
    "Found on a picture that is reduced to find them; a JPEG's borders are not quite black."
    a = draw_fundus(2, 1, 700)[0]
    data = [through(Image.fromarray(o), 'JPEG', quality=92) for o in (a, framed(a, 20, 20, 300, 260))]
    plain, more = (read_image(d, 96, 'fundus', 'pad') for d in data)
    assert far(plain, more).mean() < 3, far(plain, more).mean()


@pytest.mark.parametrize('picture', [np.zeros((40, 60, 3), np.uint8), np.full((40, 60, 3), 255, np.uint8), A])
def test_a_picture_without_a_disc_is_kept_whole(picture):
    np.testing.assert_array_equal(
        read_image(picture, 32, 'fundus', 'squish'), read_image(picture, 32, 'photo', 'squish')
    )


def test_the_reader_is_the_same_from_file_bytes_image_and_array(tmp_path):
    a = draw_fundus(1, 3, 128)[0]
    Image.fromarray(a).save(tmp_path / 'a.png')
    first, *rest = (
        np.asarray(read_image(s, 64, 'fundus'))
        for s in (a, Image.fromarray(a), tmp_path / 'a.png', str(tmp_path / 'a.png'), (tmp_path / 'a.png').read_bytes())
    )
    assert set(READERS) >= {'photo', 'fundus'} and all((first == o).all() for o in rest)


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_one_picture_in_many_threads(tmp_path, kind):
    "A picture that PIL has not read yet, asked for by several threads at once, upright in each"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.kron(A, np.ones((8, 8, 1), np.uint8))).save(tmp_path / 'p', kind, exif=exif)
    want = np.asarray(read_rgb(tmp_path / 'p'))
    for _ in range(5):
        im = Image.open(tmp_path / 'p')
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(read_rgb, [im] * 16))
        for g in got:
            np.testing.assert_array_equal(g, want)
