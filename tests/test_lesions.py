"Test the measure of Grad-CAM on marked lesions: boxes land where the photograph does, and masses are right."

import numpy as np
import pytest
from helpers import tool
from PIL import Image

pytest.importorskip('skimage')

from dr_transfer.data.fundus import find_disc, read_disc, read_image
from dr_transfer.data.images import read_rgb
from dr_transfer.synthetic.fundus import draw_fundus, lesion_mask

SIZE = 384


@pytest.fixture(scope='module')
def lesions():
    return tool('lesions')


def photograph(camera, seed=4):
    "Return a synthetic photograph with black borders, as cameras save it, and its truth in the same pixels."
    pixels, truth = draw_fundus(3, seed=seed, size=600, camera=camera)
    wide = np.zeros((660, 1000, 3), np.uint8)
    wide[20:620, 170:770] = pixels
    mask = np.zeros(wide.shape[:2], bool)
    mask[20:620, 170:770] = lesion_mask(truth)
    return wide, mask


def painted(pixels, box):
    "Paint a box (left, top, right, bottom) in a photograph green; return the photograph and the box in fractions."
    out = pixels.copy()
    left, top, right, bottom = box
    out[top:bottom, left:right] = (0, 255, 0)
    height, width = pixels.shape[:2]
    return out, [
        (left + right) / 2 / width,
        (top + bottom) / 2 / height,
        (right - left) / width,
        (bottom - top) / height,
    ]


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def is_green(im):
    a = np.asarray(im).astype(int)
    return (a[..., 1] > 128) & (a[..., 0] < 128) & (a[..., 1] - a[..., 0] > 60)


@pytest.mark.parametrize('camera', [0, 1, 3])
@pytest.mark.parametrize('box', [(400, 300, 500, 330), (560, 200, 590, 290)])
def test_a_box_lands_where_the_photograph_does(lesions, camera, box):
    pixels, fractions = painted(photograph(camera)[0], box)
    im = Image.fromarray(pixels)
    mask = lesions.box_mask([fractions], im.size)
    assert np.array_equal(np.asarray(mask) > 0, is_green(im))
    geometry = lesions.Geometry.of(im)
    read = is_green(read_image(im, SIZE, 'fundus', 'pad'))
    assert overlap(lesions.as_read(mask, geometry) > 0.5, read) > 0.9
    cut, disc = read_disc(im, 512)
    placed = lesions.as_segmented(mask, lesions.replace(geometry, disc=disc)) > 0.5
    assert overlap(placed, is_green(cut)) > 0.9
    other = lesions.as_read(lesions.box_mask([fractions], im.size).rotate(180), geometry) > 0.5
    assert overlap(other, read) < 0.1  # the check can fail


def test_the_area_of_a_mask_is_kept(lesions):
    pixels, mask = photograph(0)
    im = Image.fromarray(pixels)
    geometry = lesions.Geometry.of(im)
    whole = Image.fromarray(mask.astype(np.uint8) * 255)
    retina = lesions.retina_mask(geometry)
    fraction = mask.sum() / (np.asarray(retina) > 0).sum()
    placed, inside = lesions.as_read(whole, geometry), lesions.as_read(retina, geometry)
    assert lesions.areas(placed[None], inside[None]) == pytest.approx(fraction, rel=0.03)


def test_the_retina_is_the_circle(lesions):
    im = Image.fromarray(photograph(0)[0])
    geometry = lesions.Geometry.of(im)
    disc = find_disc(im)
    area = (np.asarray(lesions.retina_mask(geometry)) > 0).sum()
    assert area == pytest.approx(np.pi * disc.r**2, rel=0.02)
    black = lesions.Geometry.of(Image.new('RGB', (90, 60)))
    assert np.asarray(lesions.retina_mask(black)).min() == 255  # the whole photograph


def test_a_small_box_is_not_lost(lesions):
    mask = np.asarray(lesions.box_mask([(0.5, 0.5, 1e-4, 1e-4)], (1000, 700))) > 0
    assert mask.sum() == 1
    assert not np.asarray(lesions.box_mask([], (100, 70))).any()


@pytest.fixture
def example():
    "Four masks, the retina of each, and maps: on the mask, the same everywhere, beside it, and empty."
    masks = np.zeros((4, 20, 20), np.float32)
    masks[:, 5:10, 5:9] = 1
    retinas = np.ones_like(masks)
    maps = np.zeros_like(masks)
    maps[0, 6:8, 6:8] = 3
    maps[1] = 0.2
    maps[2, 12:, :] = 1
    return maps, masks, retinas


def test_masses(lesions, example):
    maps, masks, retinas = example
    own, others = lesions.masses(maps, masks)
    area = 20 / 400
    assert own[:3] == pytest.approx([1, area, 0])
    assert np.isnan(own[3])  # an empty map has no mass
    assert others == pytest.approx([area / 2, 0.5, (1 + area) / 2, (1 + area) / 3], abs=1e-6)
    assert lesions.areas(masks, retinas) == pytest.approx([area] * 4)
    retinas[:, :, 10:] = 0
    assert lesions.areas(masks, retinas) == pytest.approx([2 * area] * 4)


def test_rows(lesions, example):
    maps, masks, retinas = example
    row = lesions.region_row(*lesions.masses(maps, masks), lesions.areas(masks, retinas), n=200)
    assert (row['photographs'], row['empty maps']) == (3, 1)
    assert row['mass'] == pytest.approx((1 + 0.05) / 3)
    assert row['ratio'] == pytest.approx(row['mass'] / 0.05)
    assert row['ratio low'] < row['ratio'] < row['ratio high']


def test_maps_that_are_the_same_everywhere_have_a_ratio_of_one(lesions, example):
    _, masks, retinas = example
    masks = np.stack([np.roll(m, 2 * i, 0) for i, m in enumerate(masks)])
    row = lesions.region_row(*lesions.masses(retinas, masks), lesions.areas(masks, retinas), n=200)
    assert row['ratio'] == pytest.approx(1)
    assert row['more than others'] == pytest.approx(0, abs=1e-6)


def test_only_photographs_with_a_box_count(lesions, example):
    maps, masks, retinas = example
    marked = {'lesions': np.array([True, True, False, False])}
    (row,) = lesions.region_rows(maps, {'lesions': masks}, retinas, marked)
    assert row['photographs'] == 2
    assert row['mass'] == pytest.approx((1 + 0.05) / 2)


def test_what_lies_outside_the_retina_is_left_out_and_reported(lesions, example):
    maps, masks, retinas = example
    retinas[:, :, 15:] = 0
    marked = {'lesions': np.array([True, True, True, False])}
    row, outside = lesions.all_rows(maps, {'lesions': masks}, retinas, marked)
    assert row['mass'] == pytest.approx((1 + 20 / 300 + 0) / 3)
    assert row['area'] == pytest.approx(20 / 300)
    assert outside['region'] == 'outside the retina'
    assert outside['mass'] == pytest.approx((0 + 0.25 + 0.25) / 3)


@pytest.mark.photographs
def test_the_marked_optic_disc_is_bright_in_the_photograph_as_read(lesions, data_root):
    "A box in the wrong place would lie on the darker retina."
    photographs = lesions.Photographs(data_root / 'dr' / 'idrid')
    brighter = []
    for file in photographs.files[:12]:
        geometry = lesions.Geometry.of(read_rgb(file, SIZE))
        boxes = photographs.boxes_of(file.name, 'optic disc')
        if len(boxes):
            green = np.asarray(read_image(file, SIZE, 'fundus', 'pad'))[..., 1]
            nerve = lesions.as_read(lesions.box_mask(boxes, geometry.size), geometry) > 0.5
            retina = lesions.as_read(lesions.retina_mask(geometry), geometry) > 0.5
            brighter.append(green[nerve].mean() / green[retina].mean())
    assert np.median(brighter) > 1.3
    assert np.min(brighter) > 1


def test_results_are_read_again(lesions, tmp_path):
    file = tmp_path / 'lesions.csv'
    rows = [
        {
            'method': 'segmentation',
            'stage': 'dark',
            'light': '',
            'region': 'lesions',
            'photographs': 3,
            'empty maps': 0,
        },
        {'method': 'AUC', 'stage': '', 'light': '', 'region': '', 'mass': 0.9},
    ]
    lesions.Results(file, again=False).add(rows)
    results = lesions.Results(file, again=False)
    assert results.has(method='segmentation', light='')
    assert results.has(method='AUC', stage='')
    assert not results.has(method='Grad-CAM')
    before = file.read_text()
    results.add([])
    assert file.read_text() == before
    assert not lesions.Results(file, again=True).has(method='AUC')
