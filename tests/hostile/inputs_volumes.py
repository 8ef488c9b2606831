"CT volumes and tables of them, which have no command: they are read in a separate process like that of a command."

import gzip
import os
import pickle
import struct
import zipfile

import numpy as np
from bombs import Payload, gzipped
from contract import must_fail
from inputs import case, need

HU = np.full((4, 20, 20), -500, np.int16)


def npz(path, **arrays):
    "A volume file; by default it has only a spacing."
    np.savez(path, **{'hu': HU, 'spacing': (3.0, 1.0, 1.0), **{k: v for k, v in arrays.items() if v is not None}})


def windows_of(at, path, *words, **more):
    "Three windows of the middle slice of a volume."
    return at.call('draw_slice', path, *words, named=('v.', 'volume', os.path.basename(path)), **more)


ARRAYS = {
    'text spacing': {'spacing': np.array(['3', 'x', '1'])},
    'numbers as text': {'spacing': np.array(['3', '1', '1'])},
    'no spacing': {'spacing': np.zeros(0)},
    'spacing 0': {'spacing': (0, 1, 1)},
    'negative': {'spacing': (-3, 1, 1)},
    'nan spacing': {'spacing': (np.nan, 1, 1)},
    'one spacing': {'spacing': 3.0},
    'matrix': {'spacing': np.eye(3)},
    'complex spacing': {'spacing': (3j, 1, 1)},
    'origin': {'origin': ('a', 'b', 'c')},
    'origin nan': {'origin': (np.nan, 0, 0)},
    'two dimensions': {'hu': HU[0]},
    'four dimensions': {'hu': HU[None, None]},
    'no voxels': {'hu': HU[:0]},
    'nan': {'hu': np.full(HU.shape, np.nan)},
    'infinite': {'hu': np.full(HU.shape, -np.inf)},
    'complex': {'hu': HU.astype(complex)},
    'text': {'hu': HU.astype(str)},
    'bool': {'hu': HU < 0},
    'times': {'hu': HU.astype('datetime64[s]')},
    'records': {'hu': np.zeros((2, 2, 2), [('a', int)])},
    'scalar': {'hu': 7},
}


@case('volumes', ARRAYS)
def array(at, arrays):
    "A .npz whose arrays are not a volume."
    npz(at.data / 'v.npz', **arrays)
    return windows_of(at, at.data / 'v.npz')


@case(
    'volumes',
    {
        k: ARRAYS[k]
        for k in ('text spacing', 'complex', 'text', 'nan', 'negative', 'times', 'records', 'two dimensions')
    },
)
def values_that_are_not_hounsfield(at, arrays):
    "Arrays that are not Hounsfield units: an error."
    npz(at.data / 'v.npz', **arrays)
    return windows_of(at, at.data / 'v.npz', also=must_fail)


@case('volumes', {'npz': 'v.npz', 'npy': 'v.npy', 'pickle': 'v.npy '})
def pickled(at, name):
    "An array of objects: loading it would run code."
    path = at.data / name.strip()
    array = np.array([Payload()], dtype=object)
    if name == 'v.npz':
        np.savez(path, hu=array, spacing=np.ones(3))
    elif name == 'v.npy':
        np.save(path, array)
    else:
        path.write_bytes(pickle.dumps(Payload()))
    return windows_of(at, path, '[3, 1, 1]', also=must_fail)


def header(shape, kind='<i2') -> bytes:
    "The beginning of a .npy file of any claimed shape."
    text = repr({'descr': kind, 'fortran_order': False, 'shape': shape}).encode()
    text += b' ' * (-(len(text) + 11) % 64) + b'\n'
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text


HEADERS = {
    'huge': header((100_000, 100_000, 100_000)),
    'overflow': header((2**40, 2**40, 2**40)),
    'negative': header((-1, 2, 3)),
    'large': header((4000, 1000, 1000)),
    'text': b'\x93NUMPY\x01\x00\xff\xff',
    'code': b'\x93NUMPY\x01\x00\x20\x00__import__("os").system("true")\n',
    'deep': b'\x93NUMPY\x02\x00\x00\x80\x00\x00' + b'(' * 0x8000,
    'empty': b'',
    'html': b'<html>',
    'type': header((2, 2, 2), '|V0'),
}


@case('volumes', HEADERS)
def npy(at, data):
    "A .npy of a few bytes with a wrong header."
    (at.data / 'v.npy').write_bytes(data + bytes(100))
    return windows_of(at, at.data / 'v.npy', '[3, 1, 1]', also=must_fail)


@case('volumes')
def zip_bomb(at):
    "A .npz of 200 KB whose array has 200 million bytes more than its header states."
    with zipfile.ZipFile(at.data / 'v.npz', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('hu.npy', header((2000, 1000, 1000)) + bytes(2 * 10**8), compresslevel=1)
        z.writestr('spacing.npy', header((3,), '<f8') + np.ones(3).tobytes())
    return windows_of(at, at.data / 'v.npz', also=must_fail)


@case('volumes', {'truncated': 0.5, 'a byte': 0.001, 'flipped': None})
def damaged_npz(at, part):
    "A .npz that was cut off or changed."
    npz(at.data / 'v.npz')
    data = bytearray((at.data / 'v.npz').read_bytes())
    if part is None:
        data[len(data) // 3] ^= 0xFF
    (at.data / 'v.npz').write_bytes(data if part is None else data[: max(1, int(len(data) * part))])
    return windows_of(at, at.data / 'v.npz', also=must_fail)


PATHS = {
    'fifo': 'v.npz',
    'fifo nii': 'v.nii',
    'fifo npy': 'v.npy',
    'device': 'v.npy',
    'folder': 'v.npz',
    'loop': 'v.nii',
    'dangling': 'v.nii.gz',
    'other': 'v.mha',
    'empty folder': 'series',
    'missing': 'v.npz',
}


@case('volumes', {k: k for k in PATHS})
def path(at, kind):
    "A path that is not a volume."
    path = at.data / PATHS[kind]
    if kind.startswith('fifo'):
        os.mkfifo(path)
    elif kind in ('folder', 'empty folder'):
        path.mkdir()
    elif kind in ('device', 'loop', 'dangling'):
        path.symlink_to({'device': '/dev/zero', 'loop': path.name}.get(kind, 'nowhere'))
    elif kind == 'other':
        path.write_bytes(bytes(100))
    return windows_of(at, path, '[3, 1, 1]', also=must_fail)


# ---------------------------------------------------------------- NIfTI


def nifti(path, affine=None, data=None, change=None):
    "A NIfTI file; `change` takes its bytes, uncompressed."
    need('nibabel')
    import nibabel

    image = nibabel.Nifti1Image(
        HU.T.copy() if data is None else data, np.diag([1, 1, 3, 1]) if affine is None else affine
    )
    raw = bytearray(image.to_bytes())
    if change:
        change(raw)
    path.write_bytes(gzip.compress(bytes(raw), 1) if path.suffix == '.gz' else bytes(raw))


def put(at, form, *values):
    "A change of bytes."
    return lambda raw: struct.pack_into(form, raw, at, *values)


def shorter(raw):
    "Cut off within the voxels."
    del raw[600:]


NIFTIS = {
    'huge shape': put(40, '<8h', 3, 32767, 32767, 32767, 1, 1, 1, 1),
    'no dimension': put(40, '<h', 0),
    'nine dimensions': put(40, '<h', 9),
    'negative': put(42, '<h', -5),
    'type': put(70, '<h', 9999),
    'colours': put(70, '<hh', 128, 24),
    'complex': put(70, '<hh', 32, 64),
    'offset': put(108, '<f', 1e30),
    'offset nan': put(108, '<f', float('nan')),
    'slope nan': put(112, '<ff', float('nan'), 0.0),
    'slope': put(112, '<ff', 1e30, 0.0),
    'no form': put(252, '<hh', 0, 0),
    'affine nan': put(280, '<4f', *[float('nan')] * 4),
    'affine 0': put(280, '<12f', *[0.0] * 12),
    'truncated': shorter,
    'tilted': put(280, '<12f', 0.9, 0.3, 0, 0, -0.3, 0.9, 0, 0, 0, 0, 3, 0),
    'magic': put(344, '<4s', b'abc\0'),
    'header': put(0, '<i', 2**31 - 1),
}


@case(
    'volumes',
    {
        f'{k}{s}': (v, s)
        for k, v in NIFTIS.items()
        for s in ('.nii', '.nii.gz')
        if s == '.nii' or k in ('huge shape', 'truncated')
    },
)
def nifti_header(at, how):
    "A NIfTI file whose header has impossible values."
    change, suffix = how
    nifti(at.data / f'v{suffix}', change=change)
    return windows_of(at, at.data / f'v{suffix}')


@case('volumes')
def gzip_bomb(at):
    "A .nii.gz of 2 MB that expands to 2 GB, as its header states."
    need('nibabel')
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((1000, 1000, 1000))
    header.set_sform(np.eye(4), 1)
    header['vox_offset'], header['magic'] = 352, b'n+1'
    (at.data / 'v.nii.gz').write_bytes(gzipped(2000, header.binaryblock + bytes(4)))
    return windows_of(at, at.data / 'v.nii.gz')


@case(
    'volumes',
    {
        'gzip': gzip.compress(b'x' * 10),
        'not gzip': b'abc',
        'empty': b'',
        'half': gzip.compress(bytes(1000))[:20],
        'html': b'<html>',
    },
)
def other_nifti(at, data):
    "A .nii.gz that contains something else."
    need('nibabel')
    (at.data / 'v.nii.gz').write_bytes(data)
    return windows_of(at, at.data / 'v.nii.gz', also=must_fail)


# ---------------------------------------------------------------- DICOM series


def series(folder, n=5, change=None):
    "A CT series; `change` takes the number of a slice and its dataset, and may return False: skipped."
    from inputs_dicom import dataset, save

    for i in range(n):
        ds = dataset(np.full((16, 16), 24, np.uint16), 16)
        ds.Modality = 'CT'
        ds.SeriesInstanceUID = '1.2.3'
        ds.PixelSpacing = [1, 1]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [0, 0, 3 * i]
        ds.RescaleSlope = 1
        ds.RescaleIntercept = -1024
        if change is None or change(i, ds) is not False:
            save(ds, folder / f'{i}.dcm')


def of(**values):
    "A change of the third slice."
    return lambda i, ds: [setattr(ds, k, v) for k, v in values.items()] if i == 2 else None


def without(*names):
    "The third slice lacks elements."
    return lambda i, ds: [delattr(ds, n) for n in names] if i == 2 else None


def everywhere(**values):
    "A change of every slice."
    return lambda i, ds: [setattr(ds, k, v) for k, v in values.items()] and None


SERIES = {
    'slice missing': lambda i, ds: i != 2,
    'slice twice': of(ImagePositionPatient=[0, 0, 3]),
    'one slice': lambda i, ds: i == 2,
    'other series': of(SeriesInstanceUID='1.2.4'),
    'other modality': everywhere(Modality='MR'),
    'other rows': of(Rows=8),
    'other spacing': of(PixelSpacing=[2, 2]),
    'no spacing': without('PixelSpacing'),
    'no position': without('ImagePositionPatient'),
    'no orientation': without('ImageOrientationPatient'),
    'no pixels': without('PixelData'),
    'no slope': without('RescaleSlope', 'RescaleIntercept'),
    'spacing 0': everywhere(PixelSpacing=[0, 0]),
    'other slope': of(RescaleSlope=2),
    'other intercept': of(RescaleIntercept=0),
    'orientation 0': everywhere(ImageOrientationPatient=[0] * 6),
    'orientation of two': everywhere(ImageOrientationPatient=[1, 0]),
    'tilted': everywhere(ImageOrientationPatient=[0.9, 0.3, 0, -0.3, 0.9, 0]),
    'huge rows': everywhere(Rows=65535, Columns=65535),
    'other orientation': of(ImageOrientationPatient=[-1, 0, 0, 0, 1, 0]),
    'signed': of(PixelRepresentation=1),
    'colour': everywhere(PhotometricInterpretation='RGB'),
}


@case('volumes', SERIES)
def dicom_series(at, change):
    "A folder of slices that are not a regular series."
    series(at.data, change=change)
    return windows_of(at, at.data)


@case('volumes', {k: k for k in ('fifo', 'other file', 'dangling', 'loop', 'device', 'empty')})
def beside_a_series(at, what):
    "A good series with something else in its folder."
    series(at.data)
    path = at.data / 'x.dcm'
    if what == 'fifo':
        os.mkfifo(path)
    elif what in ('dangling', 'loop', 'device'):
        path.symlink_to({'loop': path.name, 'device': '/dev/zero'}.get(what, 'nowhere'))
    else:
        path.write_bytes(b'' if what == 'empty' else b'notes')
    return windows_of(at, at.data)


# ---------------------------------------------------------------- tables of volumes

ROWS = {
    'above': '../home/v.npz,0',
    'absolute': '/etc/passwd,0',
    'missing': 'nowhere.npz,0',
    'outside': 'v.npz,1e9',
    'nan': 'v.npz,nan',
    'text': 'v.npz,x',
    'empty': ',0',
    'folder': '.,0',
    'formula': '=1,0',
}


@case('volumes', {f'{k} {f}': (v, f) for k, v in ROWS.items() for f in ('slices', 'candidates')})
def row(at, how):
    "A table with a row without a valid position."
    row, kind = how
    npz(at.data / 'v.npz')
    columns = 'z' if kind == 'slices' else 'z,x,y'
    more = '' if kind == 'slices' else ',5,5'
    (at.data / 't.csv').write_text(f'volume,{columns},label\nv.npz,3{more},a\n{row}{more},b\n')
    out = at.root / 'out'
    return at.call(
        f'draw_{kind}',
        at.data / 't.csv',
        at.data,
        out,
        outs=[out],
        keeps=True,
        named=('row', 'v.npz', 'volume', 't.csv'),
    )
