"Images that are damaged, or that claim to be larger than they are."

import io
import struct
import zlib

import numpy as np
from bombs import compressed
from inputs import image
from PIL import Image, PngImagePlugin

FORMATS = {'jpeg': '.jpg', 'png': '.png', 'tiff': '.tif', 'gif': '.gif', 'webp': '.webp', 'bmp': '.bmp', 'ppm': '.ppm'}
MARK = b'\x89PNG\r\n\x1a\n'


def saved(good, kind, **how) -> bytes:
    "The good image in another format."
    out = io.BytesIO()
    with Image.open(io.BytesIO(good)) as im:
        im.save(out, kind.upper(), **how)
    return out.getvalue()


def chunk(name, data, crc=None) -> bytes:
    "A chunk of a PNG."
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', crc)


def png(width, height, rows, before=b'', depth=8, colour=2, end=True) -> bytes:
    "A PNG of any claimed size; `rows` are compressed."
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    return (
        MARK
        + chunk(b'IHDR', header)
        + before
        + chunk(b'IDAT', zlib.compress(rows, 9))
        + (chunk(b'IEND', b'') if end else b'')
    )


def rows_of(width, height, first=b'\0') -> bytes:
    "The rows of a small grey-green RGB image."
    return (first + bytes([40, 90, 60]) * width) * height


def shown(good) -> Image.Image:
    "What the good image shows."
    with Image.open(io.BytesIO(good)) as im:
        return im.convert('RGB')


def tags(*entries, offset=8, following=0) -> bytes:
    "A TIFF directory: entries (tag, type, count, value)."
    body = b''.join(struct.pack('<HHII', *e) for e in entries)
    return b'II*\0' + struct.pack('<I', offset) + struct.pack('<H', len(entries)) + body + struct.pack('<I', following)


# ---------------------------------------------------------------- truncated


@image('images', 'x', 'error', {f'{k} at {part}': (k, part) for k in FORMATS for part in (0.5, 0.97)})
def truncated(path, good, how):
    "A file that was cut off; its suffix is that of its format."
    kind, part = how
    data = saved(good, kind)
    path.with_suffix(FORMATS[kind]).write_bytes(data[: int(len(data) * part) - (kind == 'png' and part > 0.9) * 20])


@image(
    'images',
    'x',
    'error',
    {
        k: (k, n)
        for k, n in (('jpeg', 20), ('png', 20), ('tiff', 9), ('gif', 11), ('webp', 20), ('bmp', 20), ('ppm', 5))
    },
)
def only_a_header(path, good, how):
    "The first bytes of a file."
    kind, n = how
    path.with_suffix(FORMATS[kind]).write_bytes(saved(good, kind)[:n])


@image('images', 'x', '', {f'{k} {i}': (k, i) for k in FORMATS for i in range(2)})
def bytes_changed(path, good, how):
    "A file with ten bytes changed at random."
    kind, seed = how
    data = bytearray(saved(good, kind))
    rng = np.random.default_rng([seed, *kind.encode()])
    for i in rng.integers(20, len(data), 10):
        data[i] = rng.integers(256)
    path.with_suffix(FORMATS[kind]).write_bytes(bytes(data))


@image('images', 'x.jpg', 'prediction')
def something_after_the_end(path, good):
    "A JPEG followed by other bytes."
    path.write_bytes(good + b'PK\3\4' + bytes(1000))


@image('images', 'x.png', 'error')
def no_end(path, good):
    "A PNG whose data stop within the rows."
    path.write_bytes(png(64, 64, rows_of(64, 20), end=False))


# ---------------------------------------------------------------- PNG


@image('images', 'x.png')
def wrong_crc_of_data(path, good):
    "A PNG with correct data and a wrong checksum."
    data = saved(good, 'png')
    at = data.index(b'IDAT') + 4 + struct.unpack('>I', data[data.index(b'IDAT') - 4 : data.index(b'IDAT')])[0]
    path.write_bytes(data[:at] + b'\0\0\0\0' + data[at + 4 :])
    return shown(good)


@image('images', 'x.png', 'error')
def wrong_crc_of_header(path, good):
    "A PNG whose header has a wrong checksum."
    data = saved(good, 'png')
    path.write_bytes(data[:29] + b'\0\0\0\0' + data[33:])


@image(
    'images',
    'x.png',
    'error',
    {'no width': (0, 9, 8, 2), 'depth 3': (9, 9, 3, 2), 'colour 5': (9, 9, 8, 5), 'negative': (2**31 + 9, 9, 8, 2)},
)
def odd_header(path, good, header):
    "A PNG with an impossible header."
    width, height, depth, colour = header
    path.write_bytes(png(width, height, rows_of(9, 9), depth=depth, colour=colour))


@image('images', 'x.png', '')
def unknown_filter(path, good):
    "A PNG whose rows have a filter that does not exist."
    path.write_bytes(png(64, 64, rows_of(64, 64, b'\x09')))


@image('images', 'x.png', '', {k.decode(): k for k in (b'iCCP', b'zTXt', b'iTXt')})
def text_bomb(path, good, name):
    "A PNG with a chunk that grows from 200 KB to 200 MB."
    bomb = compressed(200)
    data = {b'iCCP': b'x\0\0' + bomb, b'zTXt': b'x\0\0' + bomb, b'iTXt': b'x\0\1\0\0\0' + bomb}[name]
    path.write_bytes(png(64, 64, rows_of(64, 64), before=chunk(name, data)))


@image('images', 'x.png', '')
def many_texts(path, good):
    "A PNG with 20,000 texts."
    path.write_bytes(png(64, 64, rows_of(64, 64), before=chunk(b'tEXt', b'k\0' + b'v' * 50) * 20_000))


@image(
    'images',
    'x.png',
    '',
    {'not hexadecimal': 'exif\n      10\nzz zz', 'empty': '', 'too long': 'exif\n 99999999\n00', 'one line': 'exif'},
)
def raw_profile(path, good, text):
    "A PNG with the EXIF data of ImageMagick, damaged."
    info = PngImagePlugin.PngInfo()
    info.add_text('Raw profile type exif', text)
    shown(good).save(path, pnginfo=info)


@image('images', 'x.png', '', {'frames': (2**31 - 1, 0), 'no frame': (0, 0), 'plays': (2, 2**32 - 1)})
def animated_png(path, good, how):
    "An animated PNG with an impossible number of frames."
    path.write_bytes(png(64, 64, rows_of(64, 64), before=chunk(b'acTL', struct.pack('>II', *how))))


# ---------------------------------------------------------------- larger than they are


@image(
    'images',
    'x.png',
    'error',
    {'60000': (60_000, 60_000), '2 billion': (2**31 - 1, 2**31 - 1), '178 million pixels': (13_000, 13_000)},
)
def pretended_png(path, good, size):
    "A PNG of a few bytes that claims billions of pixels."
    path.write_bytes(png(*size, bytes(1000)))


@image('images', 'x.png', 'error')
def png_bomb(path, good):
    "A PNG of 50 KB with 400 million pixels of one bit."
    path.write_bytes(png(20_000, 20_000, bytes(2501 * 20_000), depth=1, colour=0))


@image('images', 'x', 'error', {k: k for k in ('jpeg', 'gif', 'bmp', 'ppm', 'tiff', 'webp')})
def pretended(path, good, kind):
    "A file of a few bytes that claims billions of pixels."
    data = bytearray(saved(good, kind, **({'lossless': True} if kind == 'webp' else {})))
    if kind == 'jpeg':
        at = data.index(b'\xff\xc0')
        data[at + 5 : at + 9] = b'\xff\xdc\xff\xdc'
    if kind == 'gif':
        data[6:10] = b'\xff\xff\xff\xff'
        at = data.index(b',\0\0\0\0')
        data[at + 5 : at + 9] = b'\xff\xff\xff\xff'
    if kind == 'bmp':
        data[18:26] = struct.pack('<ii', 60_000, 60_000)
    if kind == 'ppm':
        data = bytearray(b'P6\n60000 60000\n255\n' + bytes(100))
    if kind == 'tiff':
        data = bytearray(
            tags(
                (256, 4, 1, 60_000),
                (257, 4, 1, 60_000),
                (258, 3, 1, 8),
                (259, 3, 1, 1),
                (262, 3, 1, 1),
                (273, 4, 1, 8),
                (277, 3, 1, 1),
                (278, 4, 1, 60_000),
                (279, 4, 1, 100),
            )
        )
    if kind == 'webp':
        at = data.index(b'VP8L') + 9
        data[at : at + 4] = b'\xff\xff\xff\x0f'
    path.with_suffix(FORMATS[kind]).write_bytes(bytes(data))


@image('images', 'x.gif')
def many_frames(path, good):
    "A GIF with 10,000 frames."
    header = b'GIF89a' + struct.pack('<HHBBB', 40, 40, 0x80, 0, 0) + bytes([0, 0, 0, 90, 140, 60])
    frame = b',' + struct.pack('<HHHHB', 0, 0, 1, 1, 0) + b'\x02\x02\x44\x01\x00'
    path.write_bytes(header + frame * 10_000 + b';')


@image('images', 'x.gif', '', {'no size': (0, 0), 'no frame': None})
def odd_gif(path, good, size):
    "A GIF without size, or without a frame."
    path.write_bytes(b'GIF89a' + struct.pack('<HHBBB', *(size or (40, 40)), 0, 0, 0) + b';')


# ---------------------------------------------------------------- TIFF and BMP

SIZE = ((256, 4, 1, 60), (257, 4, 1, 60), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1))
TIFFS = {
    'directory loop': tags(*SIZE, following=8),
    'directory at the end': tags(*SIZE, offset=2**32 - 2),
    'no entries': tags(),
    'huge strips': tags(*SIZE, (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 60), (279, 4, 1, 2**31)),
    'huge count': tags(*SIZE, (273, 4, 2**32 - 1, 8), (279, 4, 2**32 - 1, 8)),
    'huge text': tags(*SIZE, (270, 2, 2**31, 8)),
    'odd compression': tags(*SIZE[:3], (259, 3, 1, 9999), SIZE[4], (273, 4, 1, 8), (279, 4, 1, 10)),
    'odd type': tags(*((t, 99, c, v) for t, _, c, v in SIZE)),
    'tile of nothing': tags(*SIZE, (322, 4, 1, 0), (323, 4, 1, 0), (324, 4, 1, 8)),
    'samples': tags(*SIZE, (277, 3, 1, 65535), (273, 4, 1, 8), (279, 4, 1, 10)),
    'big tiff': b'II+\0\x08\0\0\0' + struct.pack('<Q', 2**60),
}


@image('images', 'x.tif', 'error', TIFFS)
def odd_tiff(path, good, data):
    "A TIFF whose directory has impossible values."
    path.write_bytes(data)


@image('images', 'x.tif', 'prediction')
def tiff_of_many_pages(path, good):
    "A TIFF with 300 pages: the first counts."
    pages = [Image.new('RGB', (8, 8), (i % 256, 0, 0)) for i in range(300)]
    shown(good).save(path, save_all=True, append_images=pages)
    return shown(good)


@image(
    'images',
    'x.bmp',
    'error',
    {
        '33 bits': (28, '<H', 33),
        'no width': (18, '<i', 0),
        'odd compression': (30, '<I', 77),
        'header': (14, '<I', 2**31),
    },
)
def odd_bmp(path, good, change):
    "A BMP whose header has impossible values."
    at, form, value = change
    data = bytearray(saved(good, 'bmp'))
    struct.pack_into(form, data, at, value)
    path.write_bytes(bytes(data))


@image('images', 'x.bmp', '')
def rle_bmp(path, good):
    "A BMP compressed with run lengths that exceed it."
    data = bytearray(saved(with_palette(good), 'bmp'))
    struct.pack_into('<I', data, 30, 1)
    path.write_bytes(bytes(data[:1100]) + b'\xff\x07' * 1000 + b'\0\x02\xff\xff' * 100 + b'\0\1')


def with_palette(good) -> bytes:
    "The good image with a palette."
    out = io.BytesIO()
    shown(good).quantize(16).save(out, 'PNG')
    return out.getvalue()


# ---------------------------------------------------------------- JPEG and EXIF


@image(
    'images',
    'x',
    '',
    {
        f'{k} {name}': (k, data)
        for k in ('jpeg', 'png', 'webp', 'tiff')
        for name, data in (
            ('garbage', b'Exif\0\0garbage' + bytes(range(64))),
            ('loop', b'Exif\0\0' + tags((34665, 4, 1, 8), following=8)),
            ('huge', b'Exif\0\0' + tags((274, 3, 2**31, 6), (37500, 7, 2**32 - 1, 8))),
            ('text', b'Exif\0\0' + tags((274, 2, 4, 0x36363636))),
        )
    },
)
def garbage_exif(path, good, how):
    "An image with damaged EXIF data."
    kind, data = how
    kwargs = {} if kind == 'tiff' else {'exif': data}
    saved_data = saved(good, kind, **kwargs)
    path.with_suffix(FORMATS[kind]).write_bytes(saved_data if kwargs else saved_data + data)


@image('images', 'x.jpg', 'prediction', {str(i): i for i in range(10)})
def orientation(path, good, turn):
    "A JPEG with each orientation, the impossible ones too: it shows the upright image."
    exif = Image.Exif()
    exif[0x0112] = turn
    im = shown(good)
    im.save(path, quality=95, exif=exif)
    way = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    return im.transpose(Image.Transpose(way[turn])) if turn in way else im


@image(
    'images',
    'x.jpg',
    '',
    {'no size': (5, b'\0\0\0\0'), 'precision': (4, b'\x0c'), 'components': (9, b'\xff'), 'length': (2, b'\0\2')},
)
def odd_jpeg(path, good, change):
    "A JPEG whose frame has impossible values."
    at, value = change
    data = bytearray(good)
    start = data.index(b'\xff\xc0')
    data[start + at : start + at + len(value)] = value
    path.write_bytes(bytes(data))


@image('images', 'x.jpg', '')
def many_scans(path, good):
    "A progressive JPEG whose last scan is there two thousand times."
    data = saved(good, 'jpeg', progressive=True)
    last = data.rindex(b'\xff\xda')
    path.write_bytes(data[:last] + data[last:-2] * 2000 + data[-2:])


@image('images', 'x.jpg', 'prediction')
def long_comment(path, good):
    "A JPEG with 500 comments of 64 KB."
    path.write_bytes(good[:2] + (b'\xff\xfe\xff\xff' + bytes(65533)) * 500 + good[2:])
