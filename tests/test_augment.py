"What each augmentation keeps of an image, measured over hundreds of draws, and what it leaves alone."

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
from dr_transfer.data.views import VIEWS

pytestmark = pytest.mark.filterwarnings(
    'ignore:Default grid_sample:UserWarning'
)  # fastai leaves align_corners to torch
N = 200
FINITE = [n for n in AUGMENTATIONS if views_of(n)]
CLASSES = {'quarter_turns': QuarterTurns, 'mirror': Mirror}  # those that only lay the pixels anew
FINITE_CLASSES = {**CLASSES, 'mirror_near': MirrorNear}
ALL = [(t, m) for t in range(4) for m in (False, True)]  # the eight ways to lay a square picture


def laid(a, turn, mirror):
    return np.rot90(a[:, ::-1] if mirror else a, turn)


def picture(h=12, w=12):
    return np.random.default_rng(0).permutation(3 * h * w).reshape(h, w, 3).astype(np.uint8)  # like none of its turns


def tensor(a):
    return torch.from_numpy(np.ascontiguousarray(a)).movedim(-1, 0)


def array(x):
    return x.movedim(0, -1).numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def way(a, out):
    "Which of the eight ways `out` is a picture `a`."
    found = [w for w in ALL if laid(a, *w).shape == out.shape and (laid(a, *w) == out).all()]
    assert len(found) == 1, 'not the same pixels' if not found else 'the picture has a symmetry'
    return found[0]


def draws(tfm, kind, a, n=N):
    "Pictures as `tfm` lays them: one image at a time, one tensor at a time, or a batch."
    if kind == 'batch':
        return [array(o) for o in tfm(TensorImage(torch.stack([tensor(a)] * n)), split_idx=0)]
    x = PILImage.create(a) if kind == 'pil' else TensorImage(tensor(a))
    return [array(tfm(x, split_idx=0)) for _ in range(n)]


# ---------------------------------------------------------------- views

ALLOWED = {'quarter_turns': {(t, False) for t in range(4)}, 'mirror': {(0, False), (0, True)}}


def test_pictures_have_no_symmetry():
    assert len({laid(picture(), *w).tobytes() for w in ALL}) == 8


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.parametrize('kind', ['pil', 'tensor', 'batch'])
def test_no_draw_is_any_other_than_the_named_views(name, kind):
    torch.manual_seed(1)
    a = picture()
    ways = [way(a, o) for o in draws(CLASSES[name](), kind, a)]
    assert set(ways) == ALLOWED[name]
    share = np.array([ways.count(w) / N for w in ALLOWED[name]])
    assert (abs(share - 1 / len(share)) < 0.12).all(), share  # each about as often as the others


@pytest.mark.parametrize('name', ['none', *CLASSES])
@pytest.mark.parametrize('kind', ['pil', 'tensor', 'batch'])
def test_the_pixels_are_the_same_ones(name, kind):
    a = picture()
    pixels = sorted(map(tuple, a.reshape(-1, 3)))
    tfm = CLASSES.get(name, Views)()
    for out in draws(tfm, kind, a, 40):
        assert sorted(map(tuple, out.reshape(-1, 3))) == pixels
        assert out.dtype == a.dtype


@pytest.mark.parametrize('name', FINITE_CLASSES)
def test_draws_are_the_views_of_the_table(name):
    "The transform and the features that are cached of all views must be of the same pictures."
    x = tensor(picture())
    views = {v(x).numpy().tobytes() for v in VIEWS[name]}
    out = FINITE_CLASSES[name]()(TensorImage(torch.stack([x] * N)), split_idx=0)
    assert {o.contiguous().numpy().tobytes() for o in out} == views
    assert len(views) == len(VIEWS[name])


@pytest.mark.parametrize('name', VIEWS)
def test_views_leave_other_dimensions_alone(name):
    x = torch.arange(2 * 5 * 3 * 4 * 4).reshape(2, 5, 3, 4, 4)
    for view in VIEWS[name]:
        assert all(
            torch.equal(view(x)[i, j, k], view(x[i, j, k])) for i in range(2) for j in range(5) for k in range(3)
        )


def test_quarter_turns_are_a_group():
    x = tensor(picture())
    turns = VIEWS['quarter_turns']
    assert torch.equal(turns[0](x), x)
    assert all(torch.equal(turns[i](turns[j](x)), turns[(i + j) % 4](x)) for i in range(4) for j in range(4))


def test_images_in_a_batch_are_turned_independently():
    torch.manual_seed(2)
    a = picture()
    both = [
        tuple(way(a, array(o))[0] for o in QuarterTurns()(TensorImage(torch.stack([tensor(a)] * 2)), split_idx=0))
        for _ in range(N)
    ]
    assert len(set(both)) == 16


def test_the_seed_decides():
    x = TensorImage(torch.stack([tensor(picture())] * 32))

    def drawn(seed):
        torch.manual_seed(seed)
        return QuarterTurns()(x, split_idx=0)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.parametrize('kind', ['pil', 'tensor', 'batch'])
def test_the_mask_goes_with_the_image(name, kind):
    torch.manual_seed(3)
    a = picture()
    m = picture()[..., 1]
    seen = set()
    tfm = CLASSES[name]()
    if kind == 'batch':
        xs, ms = tfm(
            (TensorImage(torch.stack([tensor(a)] * 60)), TensorMask(torch.stack([torch.from_numpy(m.copy())] * 60))),
            split_idx=0,
        )
        pairs = list(zip(xs, ms))
    else:
        pair = (
            (PILImage.create(a), PILMask.create(m))
            if kind == 'pil'
            else (TensorImage(tensor(a)), TensorMask(torch.from_numpy(m.copy())))
        )
        pairs = [tfm(pair, split_idx=0) for _ in range(60)]
    for x, y in pairs:
        assert type(y) in (PILMask, TensorMask)
        w = way(a, array(x))
        np.testing.assert_array_equal(laid(m, *w), np.asarray(y))
        seen.add(w)
    assert seen == ALLOWED[name]


def test_labels_are_left_alone():
    y = torch.tensor([3, 1])
    _x, out = QuarterTurns()((TensorImage(torch.zeros(2, 3, 4, 4)), y), split_idx=0)
    assert out is y


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_validation_is_untouched(name):
    x = TensorImage(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    for _ in range(20):
        out = Pipeline(augmentation(name), split_idx=1)(x.clone())
        assert (
            torch.equal(out, x) if name not in ('random_crop', 'flowers') else (out - x).abs().max() < 1e-4
        )  # fastai maps these onto themselves
    if name in FINITE_CLASSES:
        im = PILImage.create(picture())
        for _ in range(20):
            assert (np.asarray(FINITE_CLASSES[name]()(im, split_idx=1)) == picture()).all()


@pytest.mark.parametrize('shape', [(8, 12), (12, 8)])
def test_oblong_images(shape):
    """One at a time they are turned; in a batch they would not fit together,
    and neither would one that is turned on its own.
    """
    torch.manual_seed(0)
    a = picture(*shape)
    assert {way(a, np.asarray(QuarterTurns()(PILImage.create(a), split_idx=0))) for _ in range(60)} == ALLOWED[
        'quarter_turns'
    ]
    batch = TensorImage(torch.stack([tensor(a)] * 40))
    with pytest.raises(ValueError, match=r'a turned batch needs square images, not .*: resize them first'):
        QuarterTurns()(batch, split_idx=0)
    for t in (Mirror(), MirrorNear()):
        assert t(batch, split_idx=0).shape == batch.shape


@pytest.mark.parametrize('kind', [PILImage, PILImageBW])
def test_kind_of_image_is_kept(kind):
    im = kind.create(picture() if kind is PILImage else picture()[..., 0])
    for _ in range(8):
        out = QuarterTurns()(im, split_idx=0)
        assert type(out) is kind
        assert out.mode == im.mode
        assert out.size == im.size
    x = TensorImage(torch.zeros(3, 4, 4, dtype=torch.float16))
    assert type(QuarterTurns()(x, split_idx=0)) is TensorImage
    assert QuarterTurns()(x, split_idx=0).dtype == torch.float16


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'HSV', 'CMYK', 'P'])
def test_other_modes_are_turned_as_well(mode):
    torch.manual_seed(0)
    im = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 6, 4)).astype(np.uint8), 'RGBA')
    im = PILImage(im if mode == 'RGBA' else im.convert('RGB').convert(mode))
    turns = [np.rot90(np.asarray(im.convert('RGBA')), k) for k in range(4)]
    for _ in range(30):
        out = QuarterTurns()(im, split_idx=0)
        assert out.mode == mode
        assert any((np.asarray(out.convert('RGBA')) == t).all() for t in turns)


# ---------------------------------------------------------------- from nearer


def nearer(im, share=0.78):
    "The middle of a PIL image at full size, as PIL does it."
    edges = [round(n * (1 - share) / 2) for n in im.size]
    return im.crop((*edges, im.width - edges[0], im.height - edges[1])).resize(im.size, Image.Resampling.BILINEAR)


def scene(w, h):
    y, x = np.mgrid[:h, :w]
    return np.stack([255 * x / w, 255 * y / h, 127 + 120 * np.sin(x / 3) * np.cos(y / 4)], -1).round().astype(np.uint8)


@pytest.mark.parametrize('size', [(64, 64), (100, 60), (31, 47), (224, 224)])
def test_the_near_view_is_the_middle_enlarged(size):
    im = Image.fromarray(scene(*size))
    x = tensor(scene(*size))
    views = VIEWS['mirror_near']
    flipped = im.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for view, want in zip(views, (im, flipped, nearer(im), nearer(flipped))):
        out = view(x)
        assert out.dtype == torch.uint8
        assert abs(array(out).astype(int) - np.asarray(want)).max() <= 1
        assert (view(x.float() / 255) - out / 255).abs().max() < 0.5 / 255 + 1e-6
    seen = [np.ptp(array(views[2](x))[..., c].astype(int)) / np.ptp(array(x)[..., c].astype(int)) for c in (0, 1)]
    assert seen == pytest.approx([0.78, 0.78], abs=0.04)


@pytest.mark.parametrize(
    'dtype', [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize('shape', [(16, 20), (3, 16, 20), (2, 3, 16, 20), (1, 16, 16)])
def test_views_keep_shape_and_type(dtype, shape):
    x = torch.arange(np.prod(shape)).reshape(shape).remainder(256).to(dtype)
    for view in VIEWS['mirror_near']:
        assert view(x).shape == x.shape
        assert view(x).dtype == dtype
    assert torch.equal(VIEWS['none'][0](x), x)
    assert torch.equal(VIEWS['mirror_near'][0](x), x)
    assert torch.equal(VIEWS['mirror_near'][1](x), x.flip(-1))
    flat = torch.full(shape, 7).to(dtype)
    for view in VIEWS['mirror_near']:
        assert torch.equal(view(flat), flat)
    assert torch.equal(VIEWS['mirror_near'][2](x).flip(-1), VIEWS['mirror_near'][3](x)) or dtype.is_floating_point


@pytest.mark.parametrize('kind', ['pil', 'tensor', 'batch'])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_each_of_four_views_as_often_as_the_others(kind, dtype):
    torch.manual_seed(4)
    a = scene(16, 16)
    n = 400
    views = [array(v(tensor(a))) for v in VIEWS['mirror_near']]
    if kind == 'batch':
        out = [array(o) for o in MirrorNear()(TensorImage(torch.stack([tensor(a)] * n).to(dtype)), split_idx=0)]
    else:
        out = draws(MirrorNear(), kind, a, n)
    k = [int(np.argmin([abs(o.astype(float) - v).max() for v in views])) for o in out]
    for o, i in zip(out, k):
        assert abs(o.astype(float) - views[i]).max() <= 0.51
    assert np.bincount(k, minlength=4) == pytest.approx([n / 4] * 4, abs=5 * (n * 3 / 16) ** 0.5 / 2)


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
    "Not by chance in one of two draws either, and not beside an image."
    image = (
        TensorImage(torch.zeros(3, 3, 8, 8))
        if isinstance(mask, torch.Tensor) and mask.ndim == 3
        else PILImage.create(scene(8, 8))
    )
    for _ in range(12):
        for b in (mask, (image, mask)):
            with pytest.raises(ValueError, match="cannot be enlarged by interpolation: take augment='mirror'"):
                MirrorNear()(b, split_idx=0)
    assert MirrorNear()((image, mask), split_idx=1)[1] is mask


# ---------------------------------------------------------------- what the table says


def augmented(name, x, seed=0):
    torch.manual_seed(seed)
    return Pipeline(augmentation(name), split_idx=0)(TensorImage(torch.stack([x] * N)))


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_shape_and_type_are_kept(name):
    out = augmented(name, torch.rand(3, 20, 20))
    assert out.shape == (N, 3, 20, 20)
    assert out.dtype == torch.float32
    assert type(out) is TensorImage
    assert not out.isnan().any()


@pytest.mark.parametrize('name,aug', AUGMENTATIONS.items())
def test_colours_are_kept_where_the_table_says_so(name, aug):
    "Of a picture in shades of one hue: its channels stay in proportion, and none gets lighter or darker than it was."
    shade = 0.2 + 0.7 * torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(1))
    x = shade * torch.tensor([1.0, 0.5, 0.2])[:, None, None]
    out = augmented(name, x)
    same = (
        (out[:, 0] * 0.5 - out[:, 1]).abs().max() < 1e-3
        and (out[:, 0] * 0.2 - out[:, 2]).abs().max() < 1e-3
        and x[0].min() - 1e-3 <= out[:, 0].min() <= out[:, 0].max() <= x[0].max() + 1e-3
    )
    assert bool(same) == aug.colour


@pytest.mark.parametrize('name,aug', AUGMENTATIONS.items())
def test_the_whole_is_kept_where_the_table_says_so(name, aug):
    "A bright mark in each corner, of which the whole picture shows four in every draw."
    x = torch.full((3, 24, 24), 0.3)
    for rows in (slice(1, 5), slice(19, 23)):
        for columns in (slice(1, 5), slice(19, 23)):
            x[:, rows, columns] = 0.9
    out = augmented(name, x).mean(1)
    bright = out > out.flatten(1).median(1).values[:, None, None] + 0.1
    marks = (bright[:, :12, :12], bright[:, :12, 12:], bright[:, 12:, :12], bright[:, 12:, 12:])
    whole = torch.stack([(m.flatten(1).sum(1) - 16).abs() <= 2 for m in marks]).all(0)
    assert whole.all() if aug.whole else whole.float().mean() < 0.5


@pytest.mark.parametrize('name,aug', AUGMENTATIONS.items())
def test_left_and_right_are_kept_where_the_table_says_so(name, aug):
    "Red grows to the right and green downwards: the sense of the turn from one to the other changes in a mirror only."
    ramp = torch.linspace(0.2, 0.8, 24)
    x = torch.stack([ramp[None].expand(24, 24), ramp[:, None].expand(24, 24), torch.full((24, 24), 0.5)])
    out = augmented(name, x)
    d = {(c, a): out[:, c].diff(dim=a)[:, :23, :23] for c in (0, 1) for a in (1, 2)}
    sense = (d[0, 2] * d[1, 1] - d[0, 1] * d[1, 2]).flatten(1).sum(1)
    assert (sense.abs() > 1e-3).all()
    mirrored = (sense < 0).float().mean()
    assert mirrored == 0 if aug.handed else 0.3 < mirrored < 0.7


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_the_number_of_views_is_that_of_the_table(name):
    found = len(
        {
            o.contiguous().numpy().tobytes()
            for o in augmented(name, torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(2)))
        }
    )
    said = augmentation_table().loc[name, 'views']
    assert found > 50 if said == 'endless' else found == int(said) == len(VIEWS[views_of(name)])


def test_random_crop_takes_at_least_the_least_part():
    "Measured on ramps: the range of red and green is the share of the width and the height that is seen."
    ramp = torch.linspace(0, 1, 64)
    out = augmented(
        'random_crop', torch.stack([ramp[None].expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])
    )
    area = (out[:, 0].amax((1, 2)) - out[:, 0].amin((1, 2))) * (out[:, 1].amax((1, 2)) - out[:, 1].amin((1, 2)))
    assert area.min() > 0.3 and area.min() < 0.5 and area.max() > 0.85, (area.min(), area.max())


# ---------------------------------------------------------------- names


def test_the_recipe_for_flowers_has_the_limits_of_the_text():
    """Each map taken apart: it is a turn, a shear, a zoom along each axis with or without a mirror, and a shift;
    each up to its limit and not beyond
    """
    torch.manual_seed(0)
    m = flowers_matrix(torch.zeros(2000, 3, 8, 8)).double()
    mirrored = m[:, 0, 0] < 0  # a turn of at most 40 degrees does not change the sign
    x = m[:, :2, 0] * torch.where(mirrored, -1.0, 1.0)[:, None]
    turn = torch.atan2(x[:, 1], x[:, 0])
    y = torch.stack(
        [turn.cos() * m[:, 0, 1] + turn.sin() * m[:, 1, 1], -turn.sin() * m[:, 0, 1] + turn.cos() * m[:, 1, 1]], 1
    )
    shear = torch.atan2(-y[:, 0], y[:, 1])
    for what, values, low, high in (
        ('degrees', turn.rad2deg(), -40, 40),
        ('shear', shear, -0.2, 0.2),
        ('zoom across', x.norm(dim=1), 0.7, 1.3),
        ('zoom down', y.norm(dim=1), 0.7, 1.3),
        ('shift across', m[:, 0, 2], -0.8, 0.8),
        ('shift down', m[:, 1, 2], -0.8, 0.8),
    ):  # a side is 2 long: 0.4 of it
        near = 0.02 * (high - low)
        assert low - 1e-5 <= values.min() < low + near, what
        assert high - near < values.max() <= high + 1e-5, what
    assert 0.45 < mirrored.float().mean() < 0.55


def test_table_has_every_name():
    t = augmentation_table()
    assert list(t.index) == list(AUGMENTATIONS)
    assert set(VIEWS) <= set(AUGMENTATIONS)
    for n, a in AUGMENTATIONS.items():
        assert t.loc[n, ['keeps colour', 'keeps all of it', 'keeps left and right']].tolist() == [
            a.colour,
            a.whole,
            a.handed,
        ]


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


def test_names_joined_make_one_after_the_other():
    kinds = [type(t).__name__ for t in augmentation('mirror+quarter_turns+random_crop+colour_jitter')]
    assert kinds == ['Mirror', 'QuarterTurns', 'AffineCoordTfm', 'Brightness', 'Contrast', 'Saturation', 'Hue']
    a = picture(6, 6)
    out = Pipeline(augmentation('mirror+quarter_turns'), split_idx=0)(TensorImage(torch.stack([tensor(a)] * N)))
    assert {way(a, array(o)) for o in out} == set(ALL)  # all eight, which neither reaches alone


def test_transforms_are_made_anew_each_time():
    assert augmentation('quarter_turns')[0] is not augmentation('quarter_turns')[0]


@pytest.mark.parametrize('f', [augmentation, views_of])
@pytest.mark.parametrize('names', ['quarter_turn', 'mirror+quarter_turn', 'mirror + quarter_turns', '', 'mirror+'])
def test_unknown_names(f, names):
    with pytest.raises(ValueError, match=r'unknown augmentation .*nearest first'):
        f(names)
