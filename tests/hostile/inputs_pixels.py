"Good images with pixels of other kinds: modes, depths, shapes. They are predicted as what they show."

import shutil

import numpy as np
from inputs import case, image
from inputs_images import shown
from PIL import Image


def grey(good) -> np.ndarray:
    "The good image as greys, 0 to 255."
    return np.asarray(shown(good).convert('L'))


def as_image(array) -> Image.Image:
    "Greys, 0 to 255, as an image."
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


@image('pixels', 'x.tif', 'prediction')
def float_0_to_1(path, good):
    "A TIFF of real numbers from 0 to 1: black if they are taken for bytes."
    Image.fromarray(grey(good).astype(np.float32) / 255).save(path)
    return as_image(grey(good))


@image('pixels', 'x.tif', 'error')
def float_0_to_255(path, good):
    "A TIFF of real numbers from 0 to 255 without a declared range."
    Image.fromarray(grey(good).astype(np.float32)).save(path)
    return as_image(grey(good))


@image('pixels', 'x.tif', '', {'negative': -5.0, 'huge': 1e30, 'tiny': 1e-30})
def float_scaled(path, good, factor):
    "A TIFF of real numbers that are not greys."
    Image.fromarray(grey(good).astype(np.float32) * np.float32(factor)).save(path)


@image('pixels', 'x.tif', 'error', {'all': slice(None), 'one row': slice(0, 1)})
def float_nan(path, good, rows):
    "A TIFF with pixels that are not numbers."
    a = grey(good).astype(np.float32)
    a[rows] = np.nan
    Image.fromarray(a).save(path)


@image('pixels', 'x.tif', 'error')
def float_infinite(path, good):
    "A TIFF with an infinite pixel."
    a = grey(good).astype(np.float32)
    a[0, 0] = np.inf
    Image.fromarray(a).save(path)


@image('pixels', 'x.tif', '', {'bytes': 1, '65535': 257, 'negative': -1, 'billions': 8_000_000})
def int32(path, good, factor):
    "A TIFF of 32-bit integers."
    Image.fromarray(grey(good).astype(np.int32) * factor).save(path)


@image('pixels', 'x', 'prediction', {'png': '.png', 'tif': '.tif'})
def deep(path, good, suffix):
    "An image of 16 bits."
    Image.fromarray(grey(good).astype(np.uint16) * 257).save(path.with_suffix(suffix))
    return as_image(grey(good))


@image('pixels', 'x', '', {'10 bits': 4, '12 bits': 16})
def deep_of_fewer_bits(path, good, factor):
    "An image of 16 bits of which 10 or 12 are used: dark, if 65535 is taken for white. A prediction, or a reason."
    Image.fromarray(grey(good).astype(np.uint16) * factor).save(path.with_suffix('.png'))


@image(
    'pixels',
    'x.png',
    '',
    {
        '1 x 1': (1, 1),
        '2 x 1': (2, 1),
        '1 x 5000': (1, 5000),
        '5000 x 1': (5000, 1),
        '3 x 3': (3, 3),
        '2 x 65000': (2, 65000),
    },
)
def odd_shape(path, good, size):
    "An image with very few rows or columns."
    shown(good).resize(size).save(path)


@image(
    'pixels',
    'x',
    '',
    {
        'cmyk.jpg': ('CMYK', '.jpg'),
        'cmyk.tif': ('CMYK', '.tif'),
        'lab.tif': ('LAB', '.tif'),
        'ycc.tif': ('YCbCr', '.tif'),
        'hsv': ('HSV', ''),
    },
)
def other_colours(path, good, how):
    "An image in another colour space."
    mode, suffix = how
    if not suffix:
        return shown(good).convert('HSV').convert('RGB').save(path.with_suffix('.png'))
    im = Image.merge('LAB', shown(good).split()) if mode == 'LAB' else shown(good).convert(mode)
    im.save(path.with_suffix(suffix))


@image(
    'pixels',
    'x',
    'prediction',
    {
        f'{m}.{s}': (m, s)
        for m, s in (
            ('L', 'png'),
            ('L', 'jpg'),
            ('1', 'png'),
            ('1', 'tif'),
            ('P', 'png'),
            ('P', 'gif'),
            ('LA', 'png'),
            ('RGBA', 'png'),
            ('RGBA', 'webp'),
            ('RGBA', 'tif'),
        )
    },
)
def mode(path, good, how):
    "A good image in another mode: predicted as what it shows."
    mode, suffix = how
    im = shown(good).quantize(64) if mode == 'P' else shown(good).convert(mode)
    im.save(
        path.with_suffix(f'.{suffix}'),
        **({'lossless': True} if suffix == 'webp' else {'quality': 95} if suffix == 'jpg' else {}),
    )
    return im.convert('RGB')


@image('pixels', 'x.png', 'prediction', {'number': 3, 'bytes': bytes(range(16))})
def transparent_palette(path, good, transparency):
    "A palette with transparent colours."
    shown(good).quantize(16).save(path, transparency=transparency)


@image('pixels', 'x.png', 'prediction', {'grey': ('L', 90), 'colour': ('RGB', (1, 2, 3)), 'bit': ('1', 0)})
def transparent_colour(path, good, how):
    "One colour is transparent."
    mode, colour = how
    shown(good).convert(mode).save(path, transparency=colour)


@image('pixels', 'x.png', 'prediction')
def all_transparent(path, good):
    "An image that is transparent everywhere."
    im = shown(good)
    im.putalpha(0)
    im.save(path)


@image('pixels', 'x.png', 'prediction', {'black': 0, 'white': 255})
def one_colour(path, good, value):
    "An image of one colour: nothing to trim to."
    Image.new('RGB', (64, 64), (value,) * 3).save(path)


@image('pixels', 'x.gif', 'prediction')
def animation(path, good):
    "A GIF with frames that differ from the first."
    first = shown(good).quantize(64)
    first.save(path, save_all=True, append_images=[Image.new('P', first.size, i) for i in range(5)])
    return first.convert('RGB')


@image('pixels', 'x.jpg', 'prediction')
def two_images(path, good):
    "A JPEG of several images (MPO): the first counts."
    shown(good).save(path, 'MPO', save_all=True, quality=95, append_images=[Image.new('RGB', (30, 30))])
    return shown(good)


@case('pixels', {c: c for c in ('predict fundus_run', 'predict flowers.onnx', 'train', 'evaluate', 'preprocess')})
def all_images_at_once(at, which):
    "Every hostile image of the corpus in one folder, through each command."
    from inputs import need

    if 'onnx' in which:
        need('onnxruntime')
        need('onnx')
    every_image(at)
    if which.startswith('predict'):
        return at.predict(model=which.split()[1])
    if which == 'preprocess':
        return at.preprocess()
    if which == 'train':
        (at.data / 'daisy').mkdir()
        for path in [p for p in at.data.iterdir() if p.name != 'daisy']:
            path.rename(at.data / 'daisy' / path.name)
        shutil.copytree(at.flowers / 'roses', at.data / 'roses')
        return at.train()
    names = [p.name for p in sorted(at.data.iterdir())]
    lines = [f'"{n}",{i % 5}' for i, n in enumerate(names)]
    (at.data / 'labels.csv').write_text('\n'.join(['image,grade', *lines]))
    return at.evaluate()


def every_image(at):
    "Write every registered image into the data folder, each under its own name."
    from inputs import IMAGES, NotHere

    good = at.flower.read_bytes()
    for i, (name, build, *value) in enumerate(IMAGES):
        folder = at.tmp / str(i)
        folder.mkdir()
        try:
            build(folder / name, good, *value)
        except NotHere:
            shutil.rmtree(folder)
            continue
        path = next(folder.iterdir())
        path.rename(at.data / f'{i:03d}{path.suffix}')
        folder.rmdir()
    shutil.copytree(at.flowers / 'roses', at.data, dirs_exist_ok=True)
