"Files that are not images but have the name of one: other file types, pipes, links and folders."

import io
import os
import pickle
import shutil
import socket
import tarfile
import zipfile

from bombs import Payload, gzipped
from inputs import NotHere, case, image

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 60 60
%%EndComments
/Courier findfont 12 scalefont setfont (hello) show
(out) (w) file
showpage
%%EOF
"""
EPS_DOS = b'\xc5\xd0\xd3\xc6' + (30).to_bytes(4, 'little') + len(EPS).to_bytes(4, 'little') + bytes(18) + EPS
TEXTS = {
    'html': b'<!doctype html><html><title>404 Not Found</title></html>',
    'svg': b'<?xml version="1.0"?><svg width="60" height="60"><script>alert(1)</script></svg>',
    'pdf': b'%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/Launch/F(sh)>>>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF',
    'json': b'{"image": 1}',
    'python': b'import os\nos.system("true")\n',
    'shell': b'#!/bin/sh\nexit 0\n',
    'elf': b'\x7fELF\x02\x01\x01' + bytes(57),
    'xpm': b'/* XPM */\nstatic char *x[] = {"1000000 1000000 2 1",\n"a c #000000",\n};',
    'xbm': b'#define im_width 100000000\n#define im_height 100000000\nstatic char im_bits[] = {\n0x00};',
    'ppm': b'P6\n100000 100000\n255\n',
    'pgm': b'P2\n3 3\n99999999999999999999\n1 2 3 4 5 6 7 8 9\n',
    'pfm': b'PF\n60 60\n-1.0\n',
    'fits': b'SIMPLE  =                    T'.ljust(80)
    + b'BITPIX  =                 -640'.ljust(80)
    + b'END'.ljust(2720),
    'heic': b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(64),
    'avif': b'\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf' + bytes(64),
    'jp2': b'\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 ' + bytes(64),
    'wmf': b'\xd7\xcd\xc6\x9a\0\0' + b'\x00\x00\x00\x00\xff\x7f\xff\x7f' + bytes(40),
    'raw': bytes(range(256)) * 64,
    'ico': b'\0\0\1\0\xff\xff' + bytes(64),
    'psd': b'8BPS\0\1' + bytes(6) + b'\0\3\xff\xff\xff\xff\xff\xff\xff\xff\0\x08\0\3' + bytes(64),
    'mpeg': b'\0\0\1\xb3\xff\xff\xff' + bytes(64),
    'icns': b'icns\xff\xff\xff\xffic10\xff\xff\xff\xff' + bytes(64),
    'sgi': b'\x01\xda\1\1\0\3\xff\xff\xff\xff\0\3' + bytes(512),
    'dds': b'DDS |\0\0\0\x07\x10\0\0' + b'\xff' * 112,
    'fli': b'\x80\0\0\0\x11\xaf\xff\xff\xff\xff\xff\xff' + bytes(116),
}


@image('files', 'x.jpg', 'error')
def eps(path, good):
    "A PostScript program: PIL hands it to Ghostscript."
    path.write_bytes(EPS)


@image('files', 'x.png', 'error')
def eps_of_dos(path, good):
    "PostScript with the binary header of DOS."
    path.write_bytes(EPS_DOS)


@image('files', 'x.tif', 'error')
def eps_after_a_mark(path, good):
    "PostScript with spaces before it."
    path.write_bytes(b'\x04' + EPS)


@image('files', 'x.jpg', 'error', TEXTS)
def other(path, good, data):
    "A file of another kind."
    path.write_bytes(data)


@image('files', 'x.png', 'error')
def zip_archive(path, good):
    "An archive that holds an image."
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('x.jpg', good)


@image('files', 'x.jpg', 'error')
def gzip_bomb(path, good):
    "A compressed file that grows to 100 MB."
    path.write_bytes(gzipped(100))


@image('files', 'x.jpg', 'error')
def tar_archive(path, good):
    "An archive with a path that leads out of it."
    with tarfile.open(path, 'w') as t:
        info = tarfile.TarInfo('../../escaped.jpg')
        info.size = len(good)
        t.addfile(info, io.BytesIO(good))


@image('files', 'x.png', 'error')
def pickle_file(path, good):
    "A pickle that starts a program."
    path.write_bytes(pickle.dumps(Payload()))


@image('files', 'x.png', 'prediction')
def jpeg_named_png(path, good):
    "A good image with the suffix of another format."
    path.write_bytes(good)


@image('files', 'x.jpg', 'error')
def empty(path, good):
    "An empty file."
    path.touch()


@image('files', 'x.jpg', 'error', {'ff': b'\xff', 'nul': b'\0', 'p': b'P', 'B': b'B', 'percent': b'%'})
def one_byte(path, good, data):
    "A file of one byte."
    path.write_bytes(data)


@image('files', 'x.jpg', 'error')
def fifo(path, good):
    "A named pipe: to open it waits for a writer."
    os.mkfifo(path)


@image('files', 'x.dcm', 'error')
def fifo_named_dicom(path, good):
    "A named pipe with the suffix of DICOM."
    os.mkfifo(path)


@image('files', 'x.jpg', 'error')
def unix_socket(path, good):
    "A socket."
    here = os.getcwd()
    os.chdir(path.parent)  # its name may have 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@image('files', 'x.jpg', 'error', {d: f'/dev/{d}' for d in ('zero', 'full', 'null', 'random', 'stdin')})
def device(path, good, target):
    "A link to a device."
    path.symlink_to(target)


@image('files', 'x.jpg', 'error')
def dangling_link(path, good):
    "A link to a file that is not there."
    path.symlink_to('nowhere.jpg')


@image('files', 'x.jpg', 'error')
def link_to_itself(path, good):
    "A link that leads to itself."
    path.symlink_to(path.name)


@image('files', 'x.jpg', 'error', {'mem': '/proc/self/mem', 'environ': '/proc/self/environ', 'kmsg': '/proc/kmsg'})
def link_into_proc(path, good, target):
    "A link to a file of the system, whose size is 0 or which waits."
    path.symlink_to(target)


@image('files', 'x.jpg', 'prediction')
def link_to_an_image(path, good):
    "A link to a good image elsewhere."
    real = path.parent.parent / 'real.jpg'
    real.write_bytes(good)
    path.symlink_to(real)


@image('files', 'x.jpg')
def folder_named_as_an_image(path, good):
    "A folder with an image in it: not an image, but it is searched."
    path.mkdir()
    (path / 'inside.jpg').write_bytes(good)


@image('files', 'x.jpg', 'error')
def unreadable(path, good):
    "A file that may not be read."
    path.write_bytes(good)
    path.chmod(0)
    if os.access(path, os.R_OK):
        raise NotHere('permissions do not hold for this user')


@case('files')
def link_loop_of_folders(at):
    "A folder that holds a link to itself."
    shutil.copy(at.flower, at.data / 'good.jpg')
    (at.data / 'again').symlink_to(at.data)
    return at.predict()


@case('files')
def link_to_the_root(at):
    "A link to the root of the file system: it is not searched."
    shutil.copy(at.flower, at.data / 'good.jpg')
    (at.data / 'all').symlink_to('/')
    return at.predict()


@case('files')
def deep_folders(at):
    "Five hundred folders within one another."
    deep = at.data.joinpath(*['d'] * 500)
    deep.mkdir(parents=True)
    shutil.copy(at.flower, deep / 'good.jpg')
    return at.predict()


@case('files')
def nothing_but_a_fifo(at):
    "A folder whose only image is a named pipe."
    os.mkfifo(at.data / 'x.jpg')
    return at.predict(named=('x.jpg',))


@case('files', {'fifo': 'fifo', 'dangling': 'dangling', 'missing': 'missing', 'empty name': ''})
def image_argument(at, what):
    "An image argument that is not an image file."
    path = at.data / 'x.jpg'
    if what == 'fifo':
        os.mkfifo(path)
    if what == 'dangling':
        path.symlink_to('nowhere')
    return at.predict(path if what else '', named=('x.jpg', 'images', 'IMAGES'), images=[path], data=None)


@case('files')
def same_image_twice(at):
    "One image by two names on the command line."
    path = at.data / 'x.jpg'
    shutil.copy(at.flower, path)
    return at.predict(path, at.data / '..' / 'data' / 'x.jpg', images=[path], data=None)
