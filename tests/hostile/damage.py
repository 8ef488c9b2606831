"Functions that damage a file; each takes its path."

import os


def zeroed(path):
    "The same number of zero bytes."
    path.write_bytes(bytes(path.stat().st_size))


def cut(path):
    "The first half."
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_by_a_byte(path):
    "All but the last byte."
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    "Nothing."
    path.write_bytes(b'')


def removed(path):
    "No file."
    path.unlink()


def one_byte(path):
    "Change one byte in the middle."
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(bytes(data))


def nan(path):
    "NaN values."
    path.write_bytes(b'\0\0\xc0\x7f' * (path.stat().st_size // 4))


def longer(path):
    "A thousand bytes more."
    path.write_bytes(path.read_bytes() + bytes(1000))


def reversed_rows(path):
    "The bytes from the end to the beginning."
    path.write_bytes(path.read_bytes()[::-1])


def first_line_gone(path):
    "All lines but the first."
    path.write_bytes(b''.join(path.read_bytes().splitlines(True)[1:]))


def last_line_gone(path):
    "All lines but the last."
    path.write_bytes(b''.join(path.read_bytes().splitlines(True)[:-1]))


def lines_swapped(path):
    "The lines from the end to the beginning."
    path.write_bytes(b''.join(path.read_bytes().splitlines(True)[::-1]))


def a_line_twice(path):
    "The first line twice."
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b''.join([lines[0], *lines]))


def no_json(path):
    "A line that is not JSON."
    path.write_bytes(b'{"key": \n' + path.read_bytes())


def other_json(path):
    "JSON of other kinds."
    path.write_bytes(b'[1, 2]\n7\nnull\n')


def not_text(path):
    "Bytes that are not text."
    path.write_bytes(b'\xff\xfe\n' * 5)


def as_folder(path):
    "A folder."
    path.unlink()
    path.mkdir()


def as_fifo(path):
    "A named pipe."
    path.unlink()
    os.mkfifo(path)


def as_device(path):
    "A link to a device."
    path.unlink()
    path.symlink_to('/dev/zero')


def as_loop(path):
    "A link to itself."
    path.unlink()
    path.symlink_to(path.name)


def named(changes):
    "Changes of a file by their names."
    return {f.__name__: f for f in changes}
