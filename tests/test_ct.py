"Test CT volumes of any orientation and spacing, windows, planes, synthetic chests, and training on them."

import os
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dr_transfer.data.ct import (
    PLANES,
    WINDOWS,
    Volume,
    get_window,
    plane,
    read_volume,
    three_planes,
    three_windows,
    window,
)
from dr_transfer.data.ct_images import average_views, candidate_images, froc_table, slice_images
from dr_transfer.data.leaks import split_data
from dr_transfer.data.tasks import get_task
from dr_transfer.metrics.scores import auc
from dr_transfer.synthetic.ct import PATTERNS, draw_ct, make_ct

COARSE = (6, 3, 3)


def noise(shape=(20, 24, 28), spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), seed=0):
    return Volume(np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16), spacing, origin)


def ramp(spacing, origin=(-31.0, -42.0, -53.0), size=(62, 84, 106), slope=(3.0, -2.0, 1.0)):
    "A volume whose values are a linear function of the position in mm, which linear interpolation reproduces exactly"
    shape = [int(s / d) + 1 for s, d in zip(size, spacing)]
    v = Volume(np.zeros(shape, np.float32), spacing, origin)
    return Volume((v.mm(np.moveaxis(np.indices(shape), 0, -1)) @ slope).astype(np.float32), spacing, origin), np.array(
        slope
    )


def pixels(im):
    return np.asarray(Image.open(im) if isinstance(im, (str, Path)) else im)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize('which', [*WINDOWS, (0, 1), (40.5, 399.5)])
def test_a_window_is_a_ramp_from_its_lower_to_its_upper_edge(which):
    level, width = get_window(which)
    hu = np.linspace(level - 2 * width, level + 2 * width, 101)
    assert np.allclose(window(hu, which), np.clip((hu - level) / width + 0.5, 0, 1), atol=1e-4)
    result = window(np.int16([-32768, 32767]), which).tolist()
    assert result == [0, 1]


@pytest.mark.parametrize(
    'which, words',
    [
        ('lungs', 'nearest first: lung'),
        (50, 'or .level, width.'),
        ((50, 0), 'more than 0'),
        ((50, -3), 'more than 0'),
        (('a', 1), 'or .level'),
        ((1, 2, 3), 'or .level'),
    ],
)
def test_invalid_windows_are_errors(which, words):
    with pytest.raises(ValueError, match=words):
        get_window(which)


def test_three_windows_are_three_windows_of_the_nearest_slice():
    v = noise(spacing=(5, 1, 1), origin=(100, 0, 0))
    a = pixels(three_windows(v, 112.6, ('lung', 'bone', (0, 100))))
    for k, w in enumerate(('lung', 'bone', (0, 100))):
        assert (a[..., k] == (window(v.hu[3], w) * 255).round()).all()
    for z in (95, 199):
        with pytest.raises(ValueError, match='its slices lie from 100 to 195 mm'):
            three_windows(v, z)


@pytest.mark.parametrize(
    'spacing, size',
    [
        ((5, 1, 1), (28, 24)),
        ((5, 2, 1), (28, 48)),
        ((5, 1, 2.5), (70, 24)),
    ],
)
def test_the_pixels_of_a_slice_are_square(spacing, size):
    assert three_windows(noise(spacing=spacing), 0).size == size


# ---------------------------------------------------------------- planes


@pytest.mark.parametrize(
    'spacing',
    [
        (1, 1, 1),
        (5, 1, 2),
        (2.5, 0.7, 0.7),
        (1, 3, 2),
    ],
)
@pytest.mark.parametrize('size', [8, 21, 64])
def test_planes_are_in_millimetres_for_any_voxel_size(spacing, size):
    v, slope = ramp(spacing)
    place = np.array([2.0, -3, 5])
    g = (np.arange(size) - (size - 1) / 2) * 30 / size
    want = {
        'coronal': -g[:, None] * slope[0] + g * slope[2],
        'sagittal': -g[:, None] * slope[0] + g * slope[1],
        'axial': g[:, None] * slope[1] + g * slope[2],
    }
    for p in PLANES:
        assert np.allclose(plane(v, place, p, 30, size), place @ slope + want[p], atol=0.01), p


@pytest.mark.parametrize(
    'spacing',
    [
        (1, 1, 1),
        (4, 1, 2),
        (1.5, 3, 0.8),
    ],
)
@pytest.mark.parametrize('radius', [6, 11])
def test_a_ball_is_a_circle_in_all_three_planes(spacing, radius):
    shape = [int(60 / d) for d in spacing]
    v = Volume(np.zeros(shape, np.int16), spacing, (7, -5, 100))
    centre = v.mm(np.array(shape) / 2) + np.array([0.3, -0.7, 0.4])
    d = np.linalg.norm(v.mm(np.moveaxis(np.indices(shape), 0, -1)) - centre, axis=-1)
    v = Volume(((radius - d) * 10).astype(np.float32), spacing, v.origin)
    for p in PLANES:
        r = np.sqrt((plane(v, centre, p, 40, 80) > 0).sum() * 0.25 / np.pi)
        assert abs(r - radius) < sum(d * d for d in spacing) / 8 / radius + 0.15, (
            p
        )  # linear interpolation makes a sphere smaller by as much


def test_the_planes_of_a_mirrored_volume_are_mirrored():
    v = noise((21, 21, 21))
    c = (10, 10, 10)
    was = {p: plane(v, c, p, 15, 15) for p in PLANES}
    for axis, changed in (
        (0, {'coronal': 0, 'sagittal': 0}),
        (1, {'sagittal': 1, 'axial': 0}),
        (2, {'coronal': 1, 'axial': 1}),
    ):
        now = Volume(np.flip(v.hu, axis), (1, 1, 1))
        for p in PLANES:
            assert (plane(now, c, p, 15, 15) == (np.flip(was[p], changed[p]) if p in changed else was[p])).all(), (
                axis,
                p,
            )


@pytest.mark.parametrize(
    'axes, same',
    [
        ((1, 2), 'axial'),
        ((0, 2), 'coronal'),
        ((0, 1), 'sagittal'),
    ],
)
def test_rotating_a_volume_rotates_its_planes(axes, same):
    v = noise((21, 21, 21))
    c = (10, 10, 10)
    r = np.zeros((3, 3))
    first, second = axes
    kept = 3 - first - second
    r[first, second] = -1
    r[second, first] = 1
    r[kept, kept] = 1
    a, b = (three_planes(Volume(np.rot90(v.hu, n, axes), (1, 1, 1)), c, 15, 15) for n in (1, 3))
    assert any((pixels(three_planes(v, c, 15, 15, turn=r)) == pixels(o)).all() for o in (a, b))
    was = plane(v, c, same, 15, 15)
    now = plane(Volume(np.rot90(v.hu, 1, axes), (1, 1, 1)), c, same, 15, 15)
    assert any((now == np.rot90(was, n)).all() for n in (1, 3))


def test_a_half_turn_of_the_image_is_a_point_reflection_of_the_volume():
    v = noise((21, 21, 21))
    assert (
        pixels(three_planes(Volume(v.hu[::-1, ::-1, ::-1], (1, 1, 1)), (10, 10, 10)))
        == pixels(three_planes(v, (10, 10, 10)).rotate(180))
    ).all()


def test_air_is_beyond_the_border_and_points_outside_are_errors():
    v = Volume(np.full((10, 10, 10), 500, np.int16), (2, 2, 2), (50, 0, 0))
    a = plane(v, (50, 9, 9), 'coronal', 20, 20)
    assert (a[:9] > 400)[:, 1:-1].all()
    assert (a[11:] == -1000).all()
    for place in ((48, 9, 9), (50, 20, 9), (50, 9, -3)):
        with pytest.raises(ValueError, match='is outside the Volume of 10 x 10 x 10 voxels of 2 x 2 x 2 mm'):
            three_planes(v, place)


def test_large_pixels_are_means_of_voxels():
    v = noise((40, 40, 40))
    assert plane(v, (20, 20, 20), 'axial', 32, 4).std() < 0.35 * plane(v, (20, 20, 20), 'axial', 32, 32).std()


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: Volume(np.zeros((2, 3)), (1, 1, 1)), 'not a volume'),
        (lambda: Volume(np.zeros((2, 3, 4)), (1, 1)), 'three numbers'),
        (lambda: Volume(np.zeros((2, 3, 4)), (1, -1, 1)), 'three numbers'),
        (lambda: Volume(np.zeros((2, 3, 4)), (1, 1, 1), (0, np.nan, 0)), 'three numbers'),
        (lambda: plane(noise(), (5, 5, 5), 'top'), 'unknown plane'),
        (lambda: plane(noise(), (5, 5, 5), side=0), 'millimetres and pixels'),
    ],
)
def test_invalid_volumes_and_planes_are_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ---------------------------------------------------------------- files


def save_nifti(v, path, codes='LPS', slope=1.0):
    "Save with axes in another order or direction, with functions of nibabel"
    nib = pytest.importorskip('nibabel')
    ras = np.diag([-1, -1, 1, 1]) @ np.block(
        [[np.diag(v.spacing[::-1]), np.array(v.origin)[::-1, None]], [np.zeros(3), 1]]
    )
    image = nib.Nifti1Image(v.hu.transpose(2, 1, 0), ras)
    image = image.as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt('LPS'), nib.orientations.axcodes2ornt(codes))
    )
    nib.save(image, path)
    return path


def save_series(v, folder, way=(1, 0, 0, 0, 1, 0), uid='1.2.3', slope=1, names='{}.dcm', **other):
    "Save as slices along the axis that `way` does not name; the array is divided accordingly"
    pydicom = pytest.importorskip('pydicom')
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(exist_ok=True)
    right, down = np.array(way, float).reshape(2, 3)
    normal = np.cross(right, down)
    axes = [2 - int(np.abs(d).argmax()) for d in (normal, down, right)]  # of (z, y, x)
    signs = [int(np.sign(d.sum())) for d in (normal, down, right)]
    hu = v.hu.transpose(axes)[tuple(slice(None, None, s) for s in signs)]
    for k, a in enumerate(hu):
        corner = np.zeros(3)
        for axis, s, n in zip(axes, signs, (k, 0, 0)):
            corner[axis] = n if s > 0 else v.hu.shape[axis] - 1 - n
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = f'{uid}.{k + 1}'
        ds.Modality = 'CT'
        ds.SeriesInstanceUID = uid
        ds.ImagePositionPatient = [float(p) for p in v.mm(corner)[::-1]]
        ds.ImageOrientationPatient = list(way)
        ds.PixelSpacing, ds.Rows, ds.Columns, ds.RescaleSlope, ds.RescaleIntercept = (
            [v.spacing[a] for a in axes[1:]],
            *a.shape,
            slope,
            -1024,
        )
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = 'MONOCHROME2'
        ds.BitsAllocated = 16
        ds.BitsStored = 16
        ds.HighBit = 15
        ds.PixelRepresentation = 0
        ds.PixelData = np.ascontiguousarray((a.astype(int) + 1024) // slope).astype(np.uint16).tobytes()
        for key, value in other.items():
            setattr(ds, key, value)
        ds.save_as(folder / names.format((k * 7) % 97), enforce_file_format=True)
    return folder


def assert_same(a, b):
    assert (a.hu == b.hu).all()
    assert np.allclose(a.spacing, b.spacing, atol=1e-4)
    assert np.allclose(a.origin, b.origin, atol=1e-3)


ODD = dict(shape=(6, 7, 8), spacing=(5.0, 1.25, 0.75), origin=(-112.5, 30.0, -77.25))


@pytest.mark.parametrize('codes', ['LPS', 'RAS', 'LAS', 'SPL', 'AIR', 'IRP', 'PSL'])
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_nifti_of_any_orientation_is_the_same_volume(tmp_path, codes, suffix):
    v = noise(**ODD)
    assert_same(read_volume(save_nifti(v, tmp_path / f'a{suffix}', codes)), v)


def test_nifti_with_a_factor_an_offset_and_an_extra_dimension(tmp_path):
    a_nii = tmp_path / 'a.nii'
    nib = pytest.importorskip('nibabel')
    a = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
    image = nib.Nifti1Image(a, np.diag([-1, -1, 1, 1]))
    image.header.set_slope_inter(2, -1000)
    nib.save(image, a_nii)
    v = read_volume(a_nii)
    assert v.hu.shape == (4, 3, 2)
    assert v.hu.dtype == np.int16
    assert (v.hu == nib.load(a_nii).get_fdata()[..., 0].transpose(2, 1, 0).round()).all()


def test_nifti_without_orientation_or_units_is_an_error(tmp_path):
    nib = pytest.importorskip('nibabel')

    def saved(a, affine, codes=1):
        image = nib.Nifti1Image(a, affine)
        image.set_sform(affine, codes)
        image.set_qform(affine, codes)
        nib.save(image, tmp_path / 'a.nii')
        return tmp_path / 'a.nii'

    cube = np.zeros((3, 4, 5), np.int16)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    with pytest.raises(ValueError, match='does not define left and right'):
        read_volume(saved(cube, np.eye(4), 0))
    with pytest.raises(ValueError, match=r'tilted by 11.5 degrees'):
        read_volume(saved(cube, tilt))
    with pytest.raises(ValueError, match='is not a volume'):
        read_volume(saved(np.zeros((3, 4, 5, 2), np.int16), np.eye(4)))
    (tmp_path / 'b.nii').write_text('no image')
    with pytest.raises(ValueError, match='cannot be read as NIfTI'):
        read_volume(tmp_path / 'b.nii')


def test_values_that_may_not_be_hounsfield_units_give_a_warning(tmp_path):
    v = noise(**ODD)
    with pytest.warns(UserWarning, match='no value below 0'):
        read_volume(save_nifti(Volume(v.hu - v.hu.min(), v.spacing), tmp_path / 'raw.nii'))


@pytest.mark.parametrize(
    'way',
    [
        (1, 0, 0, 0, 1, 0),
        (-1, 0, 0, 0, -1, 0),
        (-1, 0, 0, 0, 1, 0),
        (1, 0, 0, 0, 0, -1),
        (0, 1, 0, 0, 0, -1),
    ],
)
def test_a_dicom_series_of_any_orientation_is_the_same_volume(tmp_path, way):
    v = noise(**ODD)
    (save_series(v, tmp_path / 's', way) / 'notes.txt').write_text('no image')
    assert_same(read_volume(tmp_path / 's'), v)


def test_a_series_without_suffixes_and_with_a_factor(tmp_path):
    v = noise(**ODD)
    v = Volume((v.hu // 2 * 2).astype(np.int16), v.spacing, v.origin)
    assert_same(read_volume(save_series(v, tmp_path / 's', slope=2, names='IM{}')), v)


def test_folders_that_are_not_a_series_are_errors(tmp_path):
    v = noise(**ODD)

    def files(name, **kw):
        return sorted(save_series(v, tmp_path / name, **kw).iterdir())

    files('gap')[2].unlink()
    f = files('twice')
    (tmp_path / 'twice' / 'again.dcm').write_bytes(f[0].read_bytes())
    files('two')
    save_series(v, tmp_path / 'two', uid='9.9', names='b{}.dcm', SeriesDescription='thick')
    files('mr', Modality='MR')
    for p in files('one')[1:]:
        p.unlink()
    files('sizes')
    save_series(noise((6, 7, 9), ODD['spacing'], (-200, 0, 0)), tmp_path / 'sizes', names='b{}.dcm')
    save_series(Volume(v.hu, v.spacing, (0, 0, 0)), tmp_path / 'uneven')
    save_series(Volume(v.hu, v.spacing, (30.9, 0, 0)), tmp_path / 'uneven', names='b{}.dcm')
    save_series(v, tmp_path / 'tilt', way=(1, 0, 0, 0, np.cos(0.2), np.sin(0.2)))
    (tmp_path / 'none').mkdir()
    for name, words in (
        ('gap', 'slices are missing'),
        ('twice', 'have the same position'),
        ('two', '2 series: .*thick'),
        ('mr', 'of the kind MR'),
        ('one', 'one slice only'),
        ('sizes', 'differ in Columns'),
        ('uneven', 'resample them to even steps'),
        ('tilt', 'tilted'),
        ('none', 'no DICOM files'),
    ):
        with pytest.raises(ValueError, match=words):
            read_volume(tmp_path / name)


@pytest.mark.parametrize(
    'spacing',
    [
        1.0,
        [1.0, 1.0],
        'text',
        ['a', 'b', 'c'],
        [[1.0, 1.0, 1.0]],
        [0, 1, 1],
        [np.nan, 1, 1],
    ],
)
def test_an_invalid_spacing_names_the_file(tmp_path, spacing):
    np.savez(tmp_path / 'a.npz', hu=noise().hu, spacing=spacing)
    for given in (None, (1, 1, 1)):
        with pytest.raises(ValueError, match=r'a.npz: .*(give three numbers in mm|not of numbers)'):
            read_volume(tmp_path / 'a.npz', given)


def test_numpy_files(tmp_path):
    a_npz = tmp_path / 'a.npz'
    v = noise(**ODD)
    np.savez(a_npz, hu=v.hu, spacing=v.spacing, origin=v.origin)
    np.savez(tmp_path / 'b.npz', hu=v.hu)
    np.savez(tmp_path / 'c.npz', image=v.hu)
    np.save(tmp_path / 'd.npy', v.hu)
    assert_same(read_volume(a_npz), v)
    assert read_volume(tmp_path / 'd.npy', (1, 2, 3)).spacing == (1, 2, 3)
    for name, words in (
        ('b.npz', 'give spacing='),
        ('c.npz', "no array 'hu'"),
        ('d.npy', 'give spacing='),
        ('e.npy', 'there is no'),
    ):
        with pytest.raises(ValueError, match=words):
            read_volume(tmp_path / name)
    with pytest.raises(ValueError, match='omit spacing='):
        read_volume(a_npz, (9, 9, 9))


def test_voxels_that_are_nan_are_not_read_as_water(tmp_path):
    nibabel = pytest.importorskip('nibabel')
    hu = np.full((6, 6, 6), -1000, np.float32)
    hu[0] = np.nan
    nibabel.save(nibabel.Nifti1Image(hu, np.eye(4)), tmp_path / 'a.nii')
    np.savez(tmp_path / 'a.npz', hu=hu, spacing=(1, 1, 1))
    for name in ('a.nii', 'a.npz'):
        with pytest.raises(ValueError, match='36 voxels are not numbers'):
            read_volume(tmp_path / name)


def test_the_mean_of_views_does_not_keep_the_decision_of_one_view():
    t = pd.DataFrame(
        {
            'image': ['a_0123456789ab-0.png', 'a_0123456789ab-1.png'],
            'prediction': ['other', 'node'],
            'p_other': [0.6, 0.1],
            'p_node': [0.4, 0.9],
            'decision': ['not node', 'node'],
        }
    )
    m = average_views(t)
    assert len(m) == 1
    assert m.prediction[0] == 'node'
    assert m.p_node[0] == pytest.approx(0.65)
    assert 'decision' not in m
    with pytest.raises(ValueError, match=r'IMG-0001.png was not named'):
        average_views(t.assign(image=['IMG-0001.png', 'IMG-0002.png']))


@pytest.mark.parametrize('suffix', ['.nii.gz', '.npz', '.npy'])
def test_a_truncated_file_is_named(tmp_path, suffix):
    file = tmp_path / f'scan{suffix}'
    v = noise(**ODD)
    if suffix == '.nii.gz':
        pytest.importorskip('nibabel')
        save_nifti(v, file, 'RAS')
    elif suffix == '.npz':
        np.savez(file, hu=v.hu, spacing=v.spacing)
    else:
        np.save(file, v.hu)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f'scan{suffix}(: cannot be decoded| cannot be read)'):
        read_volume(file, None if suffix == '.npz' else (1, 1, 1))


def test_one_chest_in_three_formats_gives_the_same_images(tmp_path):
    hu, truth = draw_ct(2, spacing=COARSE)
    v = Volume(hu, truth['spacing'], truth['origin'])
    others = [
        read_volume(save_nifti(v, tmp_path / 'a.nii.gz', 'RAS')),
        read_volume(save_series(v, tmp_path / 's', (-1, 0, 0, 0, -1, 0))),
    ]
    for node, o in product(truth['nodes'], others):
        assert (
            np.abs(pixels(three_planes(v, node['place'])).astype(int) - pixels(three_planes(o, node['place']))).max()
            <= 1
        )
    for o in others:
        assert (pixels(three_windows(o, 0)) == pixels(three_windows(v, 0))).all()


@pytest.mark.parametrize(
    'package, name',
    [
        ('nibabel', 'a.nii'),
        ('pydicom', 's'),
    ],
)
def test_without_the_extra_the_error_names_what_to_install(tmp_path, monkeypatch, package, name):
    (tmp_path / 'a.nii').touch()
    (tmp_path / 's').mkdir()
    monkeypatch.setitem(__import__('sys').modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'dr_transfer\[ct\]'"):
        read_volume(tmp_path / name)


# ---------------------------------------------------------------- synthetic chests


def voxel(truth, place):
    return tuple(np.rint((np.array(place) - truth['origin']) / truth['spacing']).astype(int))


@pytest.mark.parametrize('seed', range(4))
def test_objects_are_at_their_true_positions(seed):
    hu, truth = draw_ct(seed, spacing=(3, 2, 2), noise=0)
    v = Volume(hu, truth['spacing'], truth['origin'])
    assert len(truth['nodes']) == len(truth['vessels']) == 6
    for q in truth['nodes']:
        assert q['place'] in v
        assert 15 < hu[voxel(truth, q['place'])] < 65
        assert 3.5 <= min(q['half']) <= 7
        assert max(q['half']) <= 1.6 * min(q['half']) + 0.02
    for p in truth['vessels']:
        assert p in v
        assert hu[voxel(truth, p)] > 0
        for q in truth['nodes']:
            assert np.linalg.norm(np.subtract(p, q['place'])) > max(q['half']) + 3.9


@pytest.mark.parametrize('pattern', PATTERNS[1:])
def test_the_same_patient_with_a_disease_differs_in_the_lung_of_the_slices_that_have_it(pattern):
    (healthy, _), (diseased, truth) = (draw_ct(5, p, spacing=(6, 2, 2), noise=0) for p in ('normal', pattern))
    fraction = {q['z']: q['fraction'] for q in truth['slices']}
    z = np.round(np.arange(len(diseased)) * 6 + truth['origin'][0], 2)
    for k, where in enumerate(z):
        changed = np.abs(diseased[k].astype(int) - healthy[k]) > 30
        if fraction.get(where, -1) == 0:
            assert not changed.any()
        if fraction.get(where, 0) > 0.2:
            assert changed.sum() > 40
    assert max(fraction.values()) > 0.2


def test_density_and_brightness_do_not_separate_nodes_from_vessels():
    y = []
    centre = []
    means = []
    for seed in range(8):
        hu, truth = draw_ct(seed, spacing=(4, 2, 2))
        v = Volume(hu, truth['spacing'], truth['origin'])
        for label, places in ((1, [q['place'] for q in truth['nodes']]), (0, truth['vessels'])):
            for p in places:
                a = pixels(three_planes(v, p, size=32)).astype(float)
                y.append(label)
                centre.append(a[14:18, 14:18].mean())
                means.append(a.mean())
    assert 0.35 < auc(np.array(y), np.array(centre)) < 0.65
    assert 0.2 < auc(np.array(y), np.array(means)) < 0.8


@pytest.mark.parametrize(
    'kw, words',
    [
        ({'pattern': 'cysts'}, 'unknown pattern'),
        ({'spacing': (1, 1)}, 'three numbers'),
        ({'spacing': (0, 1, 1)}, 'three numbers'),
        ({'nodes': 40}, '0 to 12 nodes'),
    ],
)
def test_impossible_chests_are_errors(kw, words):
    with pytest.raises(ValueError, match=words):
        draw_ct(0, **kw)


@pytest.fixture(scope='module')
def synthetic_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ct') / 'synthetic'
    return folder, *make_ct(folder, n=10, seed=3, spacing=COARSE, nodes=5, every=24)


def test_a_set_is_reproducible_and_never_overwritten_by_another(synthetic_set, tmp_path):
    _folder, candidates, slices = synthetic_set
    sets = [make_ct(tmp_path / k, n=2, seed=3, spacing=(6, 4, 4), workers=w) for k, w in (('a', 1), ('b', 2))]
    for a, b in zip(*sets):
        assert a.equals(b)
    for p in (tmp_path / 'a' / 'volumes').iterdir():
        assert p.read_bytes() == (tmp_path / 'b' / 'volumes' / p.name).read_bytes()
    with pytest.raises(ValueError, match='exists already'):
        make_ct(tmp_path / 'a', n=2, seed=4, spacing=(6, 4, 4))
    assert candidates.groupby('patient').label.value_counts().eq(5).all()
    assert set(slices.label) == set(PATTERNS)
    assert (slices.groupby('patient').label.agg(lambda labels: len(set(labels) - {'normal'})) <= 1).all()


# ---------------------------------------------------------------- images


def test_images_are_made_once_and_again_when_their_volume_changes(synthetic_set, tmp_path):
    p_folder = tmp_path / 'p'
    folder, candidates, _ = synthetic_set
    few = candidates[candidates.patient < 'p0002']
    copy = tmp_path / 'v'
    (copy / 'volumes').mkdir(parents=True)
    for v in few.volume.unique():
        (copy / v).write_bytes((folder / v).read_bytes())

    def times(t):
        return [Path(i).stat().st_mtime_ns for i in t.image]

    first = candidate_images(few, copy, p_folder)
    before = times(first)
    assert times(candidate_images(few, copy, p_folder)) == before
    os.utime(copy / few.volume.iloc[-1], ns=(max(before) + 10**9,) * 2)
    now = times(candidate_images(few, copy, p_folder))
    assert [a != b for a, b in zip(now, before)] == (few.volume == few.volume.iloc[-1]).tolist()
    assert not [p for p in p_folder.rglob('*') if p.suffix == '.tmp']


def test_a_table_with_a_bad_row_leaves_no_labels_and_goes_on_once_it_is_corrected(synthetic_set, tmp_path):
    folder, candidates, _ = synthetic_set
    bad = candidates.copy()
    bad.loc[len(bad) - 1, 'z'] = 900.0
    with pytest.raises(ValueError, match=r'p0009.npz: \(900.0, .* is outside the Volume'):
        candidate_images(bad, folder, tmp_path)
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'images').iterdir()}
    assert made
    assert not (tmp_path / 'labels.csv').exists()
    t = candidate_images(candidates, folder, tmp_path)
    for n, when in made.items():
        assert (tmp_path / 'images' / n).stat().st_mtime_ns == when
    assert len(pd.read_csv(tmp_path / 'labels.csv')) == len(t) == 100


def test_tables_come_as_files_and_volumes_in_every_format(synthetic_set, tmp_path):
    folder, candidates, _ = synthetic_set
    v = read_volume(folder / candidates.volume[0])
    save_nifti(v, tmp_path / 'scan.nii.gz', 'RAS')
    save_series(v, tmp_path / 'series')
    rows = candidates[candidates.volume == candidates.volume[0]].head(2)
    pd.concat([rows.assign(volume=n) for n in ('scan.nii.gz', 'series')]).to_csv(tmp_path / 't.csv', index=False)
    t = candidate_images(tmp_path / 't.csv', tmp_path, tmp_path / 'p')
    want = candidate_images(rows, folder, tmp_path / 'q')
    result = len(set(t.image))
    assert result == 4
    for i in range(4):
        assert np.abs(pixels(t.image[i]).astype(int) - pixels(want.image[i % 2])).max() <= 1


def test_candidates_without_labels_get_images_for_prediction(synthetic_set, tmp_path):
    folder, candidates, _ = synthetic_set
    assert 'label' not in candidate_images(
        candidates[
            [
                'volume',
                'x',
                'y',
                'z',
            ]
        ].head(3),
        folder,
        tmp_path,
    )


def test_without_patients_the_images_of_a_volume_stay_together(synthetic_set, tmp_path):
    folder, candidates, slices = synthetic_set
    for t in (
        candidate_images(candidates.drop(columns='patient'), folder, tmp_path / 'a', views=3),
        slice_images(slices.drop(columns='patient'), folder, tmp_path / 'b'),
    ):
        task = get_task('ct_nodes' if 'view' in t else 'ct_lungs')
        parts = split_data(Path(t.image[0]).parent.parent, task, task.target())
        assert (parts.group == parts.data_volume).all()
        assert (parts.groupby('data_volume').split.nunique() == 1).all()
        assert parts.split.nunique() == 2


def test_views_are_of_one_candidate_and_are_averaged(synthetic_set, tmp_path):
    folder, candidates, _ = synthetic_set
    t = candidate_images(candidates.head(3), folder, tmp_path, views=5)
    again = candidate_images(candidates.head(3), folder, tmp_path / 'again', views=5)
    result = len({pixels(i).tobytes() for i in t.image})
    assert result == 15
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(t.image, again.image))
    p = np.random.default_rng(0).random(15)
    rows = pd.DataFrame(
        {'image': t.image, 'target': t.label, 'prediction': 'node', 'p_other': 1 - p, 'p_node': p}
    ).sample(frac=1, random_state=0)
    a = average_views(rows)
    assert len(a) == 3
    assert list(a) == list(rows)
    for r in a.itertuples():
        k = t.image.tolist().index(r.image) // 5
        assert r.p_node == pytest.approx(p[5 * k : 5 * k + 5].mean())
        assert r.prediction == ('node' if r.p_node > 0.5 else 'other')


def test_the_froc_is_that_of_counting():
    rng = np.random.default_rng(1)
    t = pd.DataFrame({'group': rng.integers(20, size=300).astype(str), 'target': rng.choice(['node', 'other'], 300)})
    t['p_node'] = (rng.random(300) + (t.target == 'node')).round(1)  # with ties
    f = froc_table(t, at=(0, 1, 4, 99), n=20)
    y = t.target == 'node'
    s = t.p_node
    for a in f.index:
        assert f.value[a] == max([0.0, *[(s[y] >= v).mean() for v in s if (s[~y] >= v).sum() / 20 <= a]])
    assert f.value[99] == 1
    assert froc_table(t, at=(1,), n=20).equals(f.loc[[1]])
    for bad, words in (
        (t.drop(columns='group'), "no column 'group'"),
        (t.assign(group=None), '300 candidates have no patient'),
    ):
        with pytest.raises(ValueError, match=words):
            froc_table(bad)


@pytest.mark.parametrize(
    'kw, words',
    [
        ({'views': 0}, 'the number of images'),
        ({'side': -1}, 'millimetres and pixels'),
        ({'window': 'fat'}, 'unknown window'),
    ],
)
def test_invalid_image_settings(synthetic_set, tmp_path, kw, words):
    with pytest.raises(ValueError, match=words):
        candidate_images(synthetic_set[1], synthetic_set[0], tmp_path, **kw)


def test_slices_are_those_of_the_table(synthetic_set, tmp_path):
    folder, _, slices = synthetic_set
    t = slice_images(slices, folder, tmp_path, windows=('lung', 'soft_tissue', (0, 100)))
    for i in (0, len(t) - 1):
        assert (
            pixels(t.image[i])
            == pixels(three_windows(read_volume(folder / t.volume[i]), t.z[i], ('lung', 'soft_tissue', (0, 100))))
        ).all()


def test_adjacent_slices_are_near_copies_and_those_of_two_patients_are_not(tmp_path):
    from dr_transfer.data.leaks import find_copies

    _, slices = make_ct(tmp_path / 'ct', n=4, seed=6, spacing=COARSE, nodes=0, every=6)
    t = slice_images(slices, tmp_path / 'ct', tmp_path / 'p')
    pairs = find_copies(t.image.tolist())
    assert len(pairs) > 5
    assert (t.patient[pairs.a].to_numpy() == t.patient[pairs.b].to_numpy()).all()


def test_equivalent_settings_give_the_same_images(synthetic_set, tmp_path):
    few = synthetic_set[1].head(2)
    a = candidate_images(few, synthetic_set[0], tmp_path, side=40, window='soft tissue')
    b = candidate_images(few.astype(str), synthetic_set[0], tmp_path, side=40.0, window=(50, 400))
    assert a.image.tolist() == b.image.tolist()
    result = len(list((tmp_path / 'images').iterdir()))
    assert result == 2


@pytest.mark.parametrize('text', ['image,label\na.jpg,1\n', 'image,volume,label\na.jpg,v.npz,1\n'])
def test_labels_of_the_user_are_not_replaced(synthetic_set, tmp_path, text):
    "For any columns: the folder has no marker of the library."
    (tmp_path / 'labels.csv').write_text(text)
    with pytest.raises(ValueError, match='is not a CT images folder'):
        candidate_images(synthetic_set[1], synthetic_set[0], tmp_path)
    assert (tmp_path / 'labels.csv').read_text() == text
    assert not (tmp_path / 'images').exists()


# ---------------------------------------------------------------- from volumes to predictions


@pytest.mark.parametrize(
    'task, make',
    [
        ('ct_nodes', candidate_images),
        ('ct_lungs', slice_images),
    ],
)
def test_from_volumes_to_predictions_by_patient(synthetic_set, tmp_path, task, make):
    from dr_transfer.core import build_learner, fit, valid_predictions
    from dr_transfer.metrics.screening import measure_table

    folder, candidates, slices = synthetic_set
    make(candidates.groupby(['patient', 'label']).head(3) if task == 'ct_nodes' else slices, folder, tmp_path / 'p')
    learn = fit(
        build_learner(tmp_path / 'p', task, size=64, valid=0.5, runtime='plain', seed=1), 'head', say=lambda s: None
    )
    result = learn.table.groupby('group').split.nunique().max()
    assert result == 1
    assert learn.table.group.nunique() == 10
    t = valid_predictions(learn)
    m = measure_table(t, list(learn.dls.vocab), n=50)
    assert t.group.nunique() == 5
    assert (m.low <= m.value).drop('calibration error').all()
    assert m.loc['accuracy'].value > t.target.value_counts(normalize=True).max()


def test_a_split_that_divides_a_patient_is_an_error(synthetic_set, tmp_path):
    from dr_transfer.core import build_learner

    folder, candidates, _ = synthetic_set
    candidate_images(candidates.assign(split=['train', 'valid'] * 50), folder, tmp_path / 'p')
    with pytest.raises(ValueError, match='are in two subsets'):
        build_learner(tmp_path / 'p', 'ct_nodes', 'small_cnn', 'random', size=32)
