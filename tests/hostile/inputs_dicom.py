"DICOM files as clinics send them, damaged, or made to attack the reader. They need pydicom."

import io

import numpy as np
from bombs import deflated
from inputs import case, image, need
from inputs_images import shown


def dataset(pixels=None, bits=8, signed=0, kind='MONOCHROME2', **more):
    "A DICOM dataset with pixels (rows, columns) or (rows, columns, 3)."
    need('pydicom')
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.77.1.5.1'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid(entropy_srcs=['a'])
    ds.PatientID = 'p1'
    ds.Modality = 'OP'
    if pixels is not None:
        ds.Rows, ds.Columns = pixels.shape[:2]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, 'RGB') if pixels.ndim == 3 else (1, kind)
        if pixels.ndim == 3:
            ds.PlanarConfiguration = 0
        ds.BitsAllocated = 8 * pixels.itemsize
        ds.BitsStored = bits
        ds.HighBit = bits - 1
        ds.PixelRepresentation = signed
        ds.PixelData = pixels.tobytes()
    for name, value in more.items():
        setattr(ds, name, value)
    return ds


def save(ds, path):
    "Write a dataset as a file."
    ds.save_as(path, enforce_file_format=True)


def grey(good) -> np.ndarray:
    "The good image as greys of an even number of columns."
    return np.asarray(shown(good).convert('L').resize((64, 64)))


def grey_image(good):
    "What `grey` shows."
    from PIL import Image

    return Image.fromarray(grey(good))


@image('dicom', 'x.dcm', 'prediction')
def colour(path, good):
    "A valid fundus image."
    save(dataset(np.asarray(shown(good).resize((64, 64)))), path)
    return shown(good).resize((64, 64))


@image('dicom', 'x.dcm', 'prediction', {'12 bits': (12, 16), '16 bits': (16, 257), '10 bits': (10, 4)})
def deep(path, good, how):
    "Greys of more bits: as bright as in 8."
    bits, factor = how
    save(dataset(grey(good).astype(np.uint16) * factor, bits), path)
    return grey_image(good)


@image('dicom', 'x.dcm', 'error')
def signed(path, good):
    "Greys below and above 0, and no window that defines black."
    save(dataset(((grey(good).astype(np.int32) - 128) * 256).astype(np.int16), 16, 1), path)
    return grey_image(good)


@image('dicom', 'x.dcm', 'prediction')
def inverted(path, good):
    "MONOCHROME1: 0 is white."
    save(dataset(255 - grey(good), kind='MONOCHROME1'), path)
    return grey_image(good)


@image('dicom', 'x.jpg', '')
def named_jpg(path, good):
    "A DICOM file with the suffix of a JPEG."
    save(dataset(grey(good)), path)


@image('dicom', 'x.dcm', '')
def jpeg_named_dicom(path, good):
    "A JPEG with the suffix of DICOM."
    path.write_bytes(good)


@image('dicom', 'x.dcm', 'error')
def without_pixels(path, good):
    "A report: DICOM without an image."
    save(dataset(), path)


@image('dicom', 'x.dcm', 'error', {'half': 0.5, 'header': 0.1, 'a byte': 0.0001})
def truncated(path, good, part):
    "A file that was cut off."
    save(dataset(grey(good)), path)
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(len(data) * part))])


CLAIMS = {
    'rows': {'Rows': 65535, 'Columns': 65535},
    'frames': {'NumberOfFrames': 2_000_000_000},
    'no rows': {'Rows': 0},
    'samples': {'SamplesPerPixel': 200},
    'bits': {'BitsAllocated': 24},
    'stored': {'BitsStored': 99},
    'colour': {'PhotometricInterpretation': 'MAGIC'},
    'palette': {'PhotometricInterpretation': 'PALETTE COLOR'},
}


@image('dicom', 'x.dcm', '', CLAIMS)
def claims(path, good, values):
    "A header that does not match the pixels."
    save(dataset(grey(good), **values), path)


@image(
    'dicom',
    'x.dcm',
    'error',
    {
        k: k
        for k in ('JPEG2000Lossless', 'JPEGLSLossless', 'HTJ2KLossless', 'MPEG2MPML', 'RLELossless', 'JPEGBaseline8Bit')
    },
)
def compressed(path, good, syntax):
    "Pixels that are declared as compressed, but are not."
    need('pydicom')
    from pydicom import uid
    from pydicom.encaps import encapsulate

    ds = dataset(grey(good), PixelData=encapsulate([b'no such code' + bytes(100)]))
    ds['PixelData'].VR = 'OB'
    ds.file_meta.TransferSyntaxUID = getattr(uid, syntax)
    save(ds, path)


@image('dicom', 'x.dcm', 'error')
def deflated_bomb(path, good):
    "A deflated file of 300 KB that grows to 300 MB."
    need('pydicom')
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    ds = dataset(grey(good))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    out = io.BytesIO()
    save(ds, out)
    head = out.getvalue()
    length = 132 + 12 + int.from_bytes(head[140:144], 'little')
    body = b'\x09\0\x10\0OB\0\0' + (3 * 10**8).to_bytes(4, 'little')
    path.write_bytes(head[:length] + deflated(300, body))


@image('dicom', 'x.dcm', 'error')
def nested(path, good):
    "Three thousand sequences within one another."
    need('pydicom')
    save(dataset(), path)
    data = path.read_bytes()
    path.write_bytes(data + (b'\x0a\0\x10\0SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff') * 3000)


@image(
    'dicom',
    'x.dcm',
    'error',
    {
        'html': b'<html>',
        'preamble': bytes(128) + b'DICM',
        'length': bytes(128) + b'DICM\2\0\0\0UL\4\0\xff\xff\xff\xff',
        'zeros': bytes(5000),
    },
)
def other(path, good, data):
    "A file that is not DICOM."
    need('pydicom')
    path.write_bytes(data)


PATIENTS = {'newline': 'a\nb', 'formula': '=cmd()', 'long': 'x' * 64, 'html': '<b>', 'latin': 'ä', 'number': '007'}


@case('dicom', PATIENTS)
def patient(at, name):
    "A set of DICOM images whose patients have unusual names."
    from PIL import Image

    for i, path in enumerate(sorted((at.fundus / 'images').iterdir())):
        folder = at.data / ('daisy' if i % 2 else 'rose')
        folder.mkdir(exist_ok=True)
        with Image.open(path) as im:
            ds = dataset(np.asarray(im.convert('RGB')), PatientID=f'{name}{i // 4}'[-64:], Manufacturer=name)
        ds.SpecificCharacterSet = 'ISO_IR 192'
        save(ds, folder / f'{i}.dcm')
    return at.train(named=(name,))
