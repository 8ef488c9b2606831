"Test what each augmentation changes and keeps, over hundreds of random images."

import numpy as np
import pytest
import torch
from fastai.vision.core import PILImage, PILImageBW, PILMask, TensorImage, TensorMask
from fasttransform import Pipeline
from PIL import Image

from dr_transfer.data.augment import (
    AUGMENTATIONS,
    Mirror,
    MirrorNear,
    QuarterTurns,
    Views,
    augmentation,
    augmentation_table,
    flowers_matrix,
    views_of,
)
from dr_transfer.data.views import LOCAL, VIEWS

pytestmark = pytest.mark.filterwarnings(
    'ignore:Default grid_sample:UserWarning'
)  # fastai leaves align_corners to torch
N = 200
FINITE = [n for n in AUGMENTATIONS if views_of(n)]
CLASSES = {'quarter_turns': QuarterTurns, 'mirror': Mirror}  # those that only rearrange the pixels
FINITE_CLASSES = {**CLASSES, 'mirror_near': MirrorNear}
ALL = [(t, m) for t in range(4) for m in (False, True)]  # the eight orientations of a square image


def laid(a, turn, mirror):
    if mirror:
        a = a[:, ::-1]
    return np.rot90(a, turn)


def asymmetric_image(h=12, w=12):
    "An image that differs from all its rotations."
    values = np.random.default_rng(0).permutation(3 * h * w)
    return values.reshape(h, w, 3).astype(np.uint8)


def tensor(a):
    return torch.from_numpy(np.ascontiguousarray(a)).movedim(-1, 0)


def array(x):
    return x.movedim(0, -1).numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def way(a, out):
    "Return by which of the eight rotations and reflections `out` was made from `a`."
    found = [w for w in ALL if np.array_equal(laid(a, *w), out)]
    assert len(found) == 1, 'not the same pixels' if not found else 'the image has a symmetry'
    return found[0]


def batch_of(x, n=N):
    "The same image `n` times."
    return TensorImage(torch.stack([x] * n))


def as_bytes(x):
    return x.contiguous().numpy().tobytes()


def random_images(tfm, kind, a, n=N):
    "Random images from `tfm`: of one image at a time, one tensor at a time, or a batch."
    if kind == 'batch':
        return [array(o) for o in tfm(batch_of(tensor(a), n), split_idx=0)]
    x = PILImage.create(a) if kind == 'pil' else TensorImage(tensor(a))
    return [array(tfm(x, split_idx=0)) for _ in range(n)]


# ---------------------------------------------------------------- views

ALLOWED = {'quarter_turns': {(t, False) for t in range(4)}, 'mirror': {(0, False), (0, True)}}


def test_the_image_has_no_symmetry():
    a = asymmetric_image()
    result = len({laid(a, *w).tobytes() for w in ALL})
    assert result == 8


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.parametrize('kind', ['pil', 'tensor', 'batch'])
def test_random_views_are_only_the_named_views(name, kind):
    torch.manual_seed(1)
    a = asymmetric_image()
    ways = [way(a, o) for o in random_images(CLASSES[name](), kind, a)]
    assert set(ways) == ALLOWED[name]
    expected = N / len(ALLOWED[name])
    for w in ALLOWED[name]:
        assert abs(ways.count(w) - expected) < 0.12 * N, w  # each about equally often


@pytest.mark.parametrize('name', ['none', *CLASSES])
@pytest.mark.parametrize('kind', ['pil', 'tensor', 'batch'])
def test_the_pixels_are_only_rearranged(name, kind):
    a = asymmetric_image()
    pixels = sorted(map(tuple, a.reshape(-1, 3)))
    tfm = CLASSES.get(name, Views)()
    for out in random_images(tfm, kind, a, 40):
        assert sorted(map(tuple, out.reshape(-1, 3))) == pixels
        assert out.dtype == a.dtype


@pytest.mark.parametrize('name', FINITE_CLASSES)
def test_random_images_are_views_of_the_table(name):
    "The transform and the stored features of all views must be of the same images."
    x = tensor(asymmetric_image())
    views = {as_bytes(v(x)) for v in VIEWS[name]}
    transform = FINITE_CLASSES[name]()
    out = transform(batch_of(x), split_idx=0)
    assert {as_bytes(o) for o in out} == views
    assert len(views) == len(VIEWS[name])


@pytest.mark.parametrize('name', [name for name in VIEWS if name in AUGMENTATIONS])
def test_views_leave_other_dimensions_alone(name):
    x = torch.arange(2 * 5 * 3 * 4 * 4).reshape(2, 5, 3, 4, 4)
    for view in VIEWS[name]:
        together = view(x)
        for place in np.ndindex(2, 5, 3):
            assert torch.equal(together[place], view(x[place]))


def test_quarter_turns_are_a_group():
    x = tensor(asymmetric_image())
    turns = VIEWS['quarter_turns']
    assert torch.equal(turns[0](x), x)
    for i, j in np.ndindex(4, 4):
        one_after_the_other = turns[i](turns[j](x))
        assert torch.equal(one_after_the_other, turns[(i + j) % 4](x))


def test_images_in_a_batch_are_turned_independently():
    torch.manual_seed(2)
    a = asymmetric_image()
    observed = set()
    for _ in range(N):
        one, other = QuarterTurns()(batch_of(tensor(a), 2), split_idx=0)
        observed.add((way(a, array(one)), way(a, array(other))))
    assert len(observed) == 16


def test_the_seed_decides():
    x = batch_of(tensor(asymmetric_image()), 32)

    def random_batch(seed):
        torch.manual_seed(seed)
        return QuarterTurns()(x, split_idx=0)

    assert torch.equal(random_batch(0), random_batch(0))
    assert not torch.equal(random_batch(0), random_batch(1))


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.parametrize('kind', ['pil', 'tensor', 'batch'])
def test_the_mask_is_transformed_with_the_image(name, kind):
    torch.manual_seed(3)
    a = asymmetric_image()
    m = a[..., 1].copy()
    observed = set()
    tfm = CLASSES[name]()
    if kind == 'batch':
        masks = TensorMask(torch.stack([torch.from_numpy(m)] * 60))
        pairs = list(zip(*tfm((batch_of(tensor(a), 60), masks), split_idx=0)))
    else:
        if kind == 'pil':
            pair = (PILImage.create(a), PILMask.create(m))
        else:
            pair = (TensorImage(tensor(a)), TensorMask(torch.from_numpy(m)))
        pairs = [tfm(pair, split_idx=0) for _ in range(60)]
    for x, y in pairs:
        assert type(y) in (PILMask, TensorMask)
        w = way(a, array(x))
        np.testing.assert_array_equal(laid(m, *w), np.asarray(y))
        observed.add(w)
    assert observed == ALLOWED[name]


def random_image(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator)


def test_labels_are_not_changed():
    y = torch.tensor([3, 1])
    x = TensorImage(torch.zeros(2, 3, 4, 4))
    _, out = QuarterTurns()((x, y), split_idx=0)
    assert out is y


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_validation_is_untouched(name):
    x = TensorImage(random_image(0, 4, 3, 16, 16))
    most = 1e-4 if name in ('random_crop', 'flowers') else 0  # fastai maps these onto themselves
    for _ in range(20):
        pipeline = Pipeline(augmentation(name), split_idx=1)
        out = pipeline(x.clone())
        assert (out - x).abs().max() <= most
    if name in FINITE_CLASSES:
        a = asymmetric_image()
        im = PILImage.create(a)
        for _ in range(20):
            out = FINITE_CLASSES[name]()(im, split_idx=1)
            assert (np.asarray(out) == a).all()


@pytest.mark.parametrize(
    'shape',
    [
        (8, 12),
        (12, 8),
    ],
)
def test_oblong_images(shape):
    """Single images are rotated; in a batch, rotated images would have other shapes,
    and so would one that is rotated on its own.
    """
    torch.manual_seed(0)
    a = asymmetric_image(*shape)
    observed = {way(a, out) for out in random_images(QuarterTurns(), 'pil', a, 60)}
    assert observed == ALLOWED['quarter_turns']
    batch = batch_of(tensor(a), 40)
    with pytest.raises(ValueError, match=r'quarter turns of a batch need square images, not .*: resize them first'):
        QuarterTurns()(batch, split_idx=0)
    for t in (Mirror(), MirrorNear()):
        assert t(batch, split_idx=0).shape == batch.shape


@pytest.mark.parametrize('kind', [PILImage, PILImageBW])
def test_kind_of_image_is_kept(kind):
    a = asymmetric_image()
    im = kind.create(a if kind is PILImage else a[..., 0])
    for _ in range(8):
        out = QuarterTurns()(im, split_idx=0)
        assert type(out) is kind
        assert out.mode == im.mode
        assert out.size == im.size
    x = TensorImage(torch.zeros(3, 4, 4, dtype=torch.float16))
    out = QuarterTurns()(x, split_idx=0)
    assert type(out) is TensorImage
    assert out.dtype == torch.float16


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'HSV', 'CMYK', 'P'])
def test_other_modes_are_rotated_too(mode):
    torch.manual_seed(0)
    pixels = np.random.default_rng(1).integers(0, 256, (6, 6, 4))
    im = Image.fromarray(pixels.astype(np.uint8), 'RGBA')
    if mode != 'RGBA':
        im = im.convert('RGB').convert(mode)
    im = PILImage(im)
    turns = [np.rot90(np.asarray(im.convert('RGBA')), k) for k in range(4)]
    for _ in range(30):
        out = QuarterTurns()(im, split_idx=0)
        assert out.mode == mode
        shown = np.asarray(out.convert('RGBA'))
        assert any((shown == t).all() for t in turns)


# ---------------------------------------------------------------- the enlarged view


def enlarged(im, fraction=0.78):
    "The middle of a PIL image at full size, as PIL does it."
    left, top = (round(n * (1 - fraction) / 2) for n in im.size)
    middle = im.crop((left, top, im.width - left, im.height - top))
    return middle.resize(im.size, Image.Resampling.BILINEAR)


def scene(w, h):
    y, x = np.mgrid[:h, :w]
    waves = 127 + 120 * np.sin(x / 3) * np.cos(y / 4)
    channels = [255 * x / w, 255 * y / h, waves]
    return np.stack(channels, -1).round().astype(np.uint8)


def deviation(x, channel):
    return np.ptp(array(x)[..., channel].astype(int))


@pytest.mark.parametrize(
    'size',
    [
        (64, 64),
        (100, 60),
        (31, 47),
        (224, 224),
    ],
)
def test_the_near_view_is_the_enlarged_centre(size):
    a = scene(*size)
    im = Image.fromarray(a)
    x = tensor(a)
    views = VIEWS['mirror_near']
    flipped = im.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for view, want in zip(views, (im, flipped, enlarged(im), enlarged(flipped))):
        out = view(x)
        assert out.dtype == torch.uint8
        difference = array(out).astype(int) - np.asarray(want)
        assert abs(difference).max() <= 1
        of_floats = view(x.float() / 255)
        assert (of_floats - out / 255).abs().max() < 0.5 / 255 + 1e-6
    near = views[2](x)
    for channel in (0, 1):
        observed = deviation(near, channel) / deviation(x, channel)
        assert observed == pytest.approx(0.78, abs=0.04)


@pytest.mark.parametrize(
    'dtype', [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize(
    'shape',
    [
        (16, 20),
        (3, 16, 20),
        (2, 3, 16, 20),
        (1, 16, 16),
    ],
)
def test_views_keep_shape_and_type(dtype, shape):
    x = torch.arange(np.prod(shape)).reshape(shape).remainder(256).to(dtype)
    outs = [view(x) for view in VIEWS['mirror_near']]
    for out in outs:
        assert out.shape == x.shape
        assert out.dtype == dtype
    same, mirrored, near, near_mirrored = outs
    assert torch.equal(VIEWS['none'][0](x), x)
    assert torch.equal(same, x)
    assert torch.equal(mirrored, x.flip(-1))
    if not dtype.is_floating_point:
        assert torch.equal(near.flip(-1), near_mirrored)
    flat = torch.full(shape, 7).to(dtype)
    for view in VIEWS['mirror_near']:
        assert torch.equal(view(flat), flat)


@pytest.mark.parametrize('kind', ['pil', 'tensor', 'batch'])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_each_of_four_views_is_equally_frequent(kind, dtype):
    torch.manual_seed(4)
    a = scene(16, 16)
    n = 400
    x = tensor(a)
    views = [array(view(x)) for view in VIEWS['mirror_near']]
    if kind == 'batch':
        batch = batch_of(x, n).to(dtype)
        outs = [array(o) for o in MirrorNear()(batch, split_idx=0)]
    else:
        outs = random_images(MirrorNear(), kind, a, n)
    counts = np.zeros(4)
    for out in outs:
        away = [abs(out.astype(float) - view).max() for view in views]
        assert min(away) <= 0.51
        counts[np.argmin(away)] += 1
    sd = (n * 3 / 16) ** 0.5
    assert counts == pytest.approx([n / 4] * 4, abs=5 * sd / 2)


@pytest.mark.parametrize(
    'mask',
    [
        PILMask.create(np.zeros((8, 8), np.uint8)),
        TensorMask(torch.zeros(8, 8)),
        TensorMask(torch.zeros(3, 8, 8)),
        PILImage(Image.fromarray(scene(8, 8)).quantize(4)),
    ],
    ids=['PIL', 'one', 'batch', 'palette'],
)
def test_masks_are_not_enlarged(mask):
    "Nor in one of two random images, and nothing is outside the image."
    images = TensorImage(torch.zeros(3, 3, 8, 8))
    image = images if mask.shape == (3, 8, 8) else PILImage.create(scene(8, 8))
    for _ in range(12):
        for b in (mask, (image, mask)):
            with pytest.raises(ValueError, match="cannot be interpolated: use augment='mirror'"):
                MirrorNear()(b, split_idx=0)
    assert MirrorNear()((image, mask), split_idx=1)[1] is mask


# ---------------------------------------------------------------- what the table states


def augmented(name, x, seed=0):
    torch.manual_seed(seed)
    pipeline = Pipeline(augmentation(name), split_idx=0)
    return pipeline(batch_of(x))


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_shape_and_type_are_kept(name):
    out = augmented(name, torch.rand(3, 20, 20))
    assert out.shape == (N, 3, 20, 20)
    assert out.dtype == torch.float32
    assert type(out) is TensorImage
    assert not out.isnan().any()


@pytest.mark.parametrize('name,aug', AUGMENTATIONS.items())
def test_colours_are_kept_where_the_table_states_it(name, aug):
    "Of an image in shades of one hue: the ratio of its channels stays, and none gets lighter or darker than before."
    shade = 0.2 + 0.7 * random_image(1, 1, 24, 24)
    hue = torch.tensor([1.0, 0.5, 0.2])
    x = shade * hue[:, None, None]
    red, green, blue = augmented(name, x).unbind(1)
    one_hue = (red * 0.5 - green).abs().max() < 1e-3 and (red * 0.2 - blue).abs().max() < 1e-3
    darkest = x[0].min() - 1e-3
    lightest = x[0].max() + 1e-3
    as_light = darkest <= red.min() and red.max() <= lightest
    assert bool(one_hue and as_light) == aug.keeps_color


@pytest.mark.parametrize('name,aug', AUGMENTATIONS.items())
def test_the_whole_image_is_kept_where_the_table_states_it(name, aug):
    "A bright mark in each corner: a complete image shows four of them each time."
    x = torch.full((3, 24, 24), 0.3)
    for rows in (slice(1, 5), slice(19, 23)):
        for columns in (slice(1, 5), slice(19, 23)):
            x[:, rows, columns] = 0.9
    out = augmented(name, x).mean(1)
    background = out.flatten(1).median(1).values
    bright = out > background[:, None, None] + 0.1
    complete = torch.ones(len(out), dtype=torch.bool)
    for rows in (slice(0, 12), slice(12, 24)):
        for columns in (slice(0, 12), slice(12, 24)):
            pixels = bright[:, rows, columns].flatten(1).sum(1)
            complete &= (pixels - 16).abs() <= 2
    if aug.keeps_whole_image:
        assert complete.all()
    else:
        assert complete.float().mean() < 0.5


def ramps(ramp, blue):
    "Red grows to the right and green downwards."
    n = len(ramp)
    red = ramp[None].expand(n, n)
    return torch.stack([red, red.T, torch.full((n, n), blue)])


@pytest.mark.parametrize('name,aug', AUGMENTATIONS.items())
def test_left_and_right_are_kept_where_the_table_states_it(name, aug):
    "Red grows to the right and green downwards: the direction from one to the other changes in a mirror image only."
    red, green, _ = augmented(name, ramps(torch.linspace(0.2, 0.8, 24), 0.5)).unbind(1)

    def slopes(channel):
        "How a channel grows downwards and to the right"
        return (channel.diff(dim=axis)[:, :23, :23] for axis in (1, 2))

    red_down, red_right = slopes(red)
    green_down, green_right = slopes(green)
    turn = red_right * green_down - red_down * green_right
    sense = turn.flatten(1).sum(1)
    assert (sense.abs() > 1e-3).all()
    mirrored = (sense < 0).float().mean()
    if aug.keeps_left_right:
        assert mirrored == 0
    else:
        assert 0.3 < mirrored < 0.7


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_the_number_of_views_is_that_of_the_table(name):
    x = random_image(2, 3, 16, 16)
    found = {as_bytes(o) for o in augmented(name, x)}
    n_views = augmentation_table().loc[name, 'views']
    if n_views == 'unlimited':
        assert len(found) > 50
    else:
        assert len(found) == int(n_views) == len(VIEWS[views_of(name)])


def test_random_crop_keeps_the_minimum_fraction():
    "Measured on ramps: the range of red and green is the visible fraction of the width and the height."
    out = augmented('random_crop', ramps(torch.linspace(0, 1, 64), 0.0))
    observed = out.amax((2, 3)) - out.amin((2, 3))
    area = observed[:, 0] * observed[:, 1]
    assert 0.3 < area.min() < 0.5
    assert area.max() > 0.85


# ---------------------------------------------------------------- names


def test_the_recipe_for_flowers_has_the_limits_of_the_text():
    """Each map is decomposed into a rotation, a shear, a zoom along each axis, perhaps a reflection, and a shift;
    each is within its limit
    """
    torch.manual_seed(0)
    m = flowers_matrix(torch.zeros(2000, 3, 8, 8)).double()
    mirrored = m[:, 0, 0] < 0  # a rotation of at most 40 degrees does not change the sign
    x = m[:, :2, 0] * torch.where(mirrored, -1.0, 1.0)[:, None]
    turn = torch.atan2(x[:, 1], x[:, 0])
    cos = turn.cos()
    sin = turn.sin()
    across = cos * m[:, 0, 1] + sin * m[:, 1, 1]
    down = cos * m[:, 1, 1] - sin * m[:, 0, 1]
    y = torch.stack([across, down], 1)
    shear = torch.atan2(-across, down)
    for what, values, low, high in (
        ('degrees', turn.rad2deg(), -40, 40),
        ('shear', shear, -0.2, 0.2),
        ('zoom across', x.norm(dim=1), 0.7, 1.3),
        ('zoom down', y.norm(dim=1), 0.7, 1.3),
        ('shift across', m[:, 0, 2], -0.8, 0.8),
        ('shift down', m[:, 1, 2], -0.8, 0.8),
    ):  # the width is 2: 0.4 of it
        near = 0.02 * (high - low)
        assert low - 1e-5 <= values.min() < low + near, what
        assert high - near < values.max() <= high + 1e-5, what
    assert 0.45 < mirrored.float().mean() < 0.55


def test_table_has_every_name():
    t = augmentation_table()
    assert list(t.index) == list(AUGMENTATIONS)
    assert {name.removesuffix(LOCAL) for name in VIEWS} <= set(AUGMENTATIONS)
    for n, a in AUGMENTATIONS.items():
        row = t.loc[n]
        assert row['keeps colour'] == a.keeps_color
        assert row['keeps all of it'] == a.keeps_whole_image
        assert row['keeps left and right'] == a.keeps_left_right


@pytest.mark.parametrize(
    'names,views',
    [
        ('none', 'none'),
        ('quarter_turns', 'quarter_turns'),
        ('mirror', 'mirror'),
        ('mirror_near', 'mirror_near'),
        ('mirror_near+random_crop', None),
        ('flowers', None),
        ('random_crop', None),
        ('colour_jitter', None),
        ('mirror+random_crop', None),
        ('quarter_turns+colour_jitter', None),
    ],
)
def test_views_of(names, views):
    assert views_of(names) == views


def test_joined_names_are_applied_in_order():
    kinds = [type(t).__name__ for t in augmentation('mirror+quarter_turns+random_crop+colour_jitter')]
    assert kinds == ['Mirror', 'QuarterTurns', 'AffineCoordTfm', 'Brightness', 'Contrast', 'Saturation', 'Hue']
    a = asymmetric_image(6, 6)
    pipeline = Pipeline(augmentation('mirror+quarter_turns'), split_idx=0)
    out = pipeline(batch_of(tensor(a)))
    assert {way(a, array(o)) for o in out} == set(ALL)  # all eight, which neither reaches alone


def test_transforms_are_created_on_each_call():
    (one,) = augmentation('quarter_turns')
    (other,) = augmentation('quarter_turns')
    assert one is not other


@pytest.mark.parametrize('f', [augmentation, views_of])
@pytest.mark.parametrize('names', ['quarter_turn', 'mirror+quarter_turn', 'mirror + quarter_turns', '', 'mirror+'])
def test_unknown_names(f, names):
    with pytest.raises(ValueError, match=r'unknown augmentation .*nearest first'):
        f(names)
