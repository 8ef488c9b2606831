"Compressed streams that are small and expand to very many zeros, and a pickle that starts a program."

import os
import zlib
from functools import cache

MILLION = 10**6


@cache
def block() -> bytes:
    "A million zeros, deflated so that blocks can follow one another."
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return pack.compress(bytes(MILLION)) + pack.flush(zlib.Z_FULL_FLUSH)


def deflated(millions, before=b'') -> bytes:
    "Some bytes and some million zeros as a raw deflate stream."
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    first = pack.compress(before) + pack.flush(zlib.Z_FULL_FLUSH)
    return first + block() * millions + b'\x03\x00'


def compressed(millions) -> bytes:
    "Some million zeros in zlib format."
    check = (millions * MILLION % 65521) << 16 | 1
    return b'\x78\xda' + deflated(millions) + check.to_bytes(4, 'big')


def gzipped(millions, before=b'') -> bytes:
    "Some bytes and some million zeros in gzip format, with a wrong checksum."
    return b'\x1f\x8b\x08' + bytes(6) + b'\x03' + deflated(millions, before) + bytes(8)


class Payload:
    "Starts a program when it is unpickled."

    def __reduce__(self):
        return os.system, ('touch unpickled',)
