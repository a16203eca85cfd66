# SPDX-License-Identifier: Apache-2.0
"""Compressed parts of an initrd: which format, where it ends, what is in it.

The kernel accepts one member, stream or frame after another (lib/decompress.c has the formats by their first bytes).
zstd's frames are unpacked by zstd(1), since Python has no zstd before 3.14; where a frame ends is read here (RFC 8878).
"""

from __future__ import annotations

import bz2
import lzma
import zlib

from oci_hooks.findings import InputError
from oci_hooks.kata_image.tools import run_filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

CPIO, GZIP, ZSTD, XZ, BZIP2 = "cpio", "gzip", "zstd", "xz", "bzip2"
FORMATS = {
    b"070701": CPIO,
    b"070702": CPIO,
    b"\x1f\x8b": GZIP,
    b"\x28\xb5\x2f\xfd": ZSTD,
    b"\xfd7zXZ\0": XZ,
    b"BZh": BZIP2,
    b"\x5d\0\0": "lzma",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x89LZO": "lzo",
}
MAGIC_BYTES = 6
CHUNK = 1 << 20
# No initrd is as large when unpacked: whoever has one means a machine that runs out of memory.
UNPACKED_LIMIT = 16 << 30
# Of zstd's frame header: bytes of the dictionary's id and of the content's size, by their flags.
ZSTD_ID_BYTES = (0, 1, 2, 4)
ZSTD_SIZE_BYTES = (0, 2, 4, 8)


def find_format(head: bytes) -> str:
    """Return the format that begins with these bytes, "" if it is none that a kernel unpacks."""
    return next((name for magic, name in FORMATS.items() if head.startswith(magic)), "")


def compress(data: bytes, format_name: str) -> bytes:
    """Return an archive compressed in a format; as it is where this tool cannot make the format.

    The kernel accepts an archive that is not compressed after one that is.
    """
    if format_name == GZIP:
        # zlib's header without a time: the same archive always gives the same bytes.
        stream = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        return stream.compress(data) + stream.flush()
    if format_name == XZ:
        # The kernel's decompressor knows this check, not xz's default (Documentation/staging/xz.rst).
        return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, 6)
    if format_name == BZIP2:
        return bz2.compress(data)
    if format_name == ZSTD:
        return b"".join(run_filter(["zstd", "-q", "-c", "-19", "--single-thread"], [data], "zstd"))
    return data


class Part:
    """One compressed part of a file, unpacked in chunks. end: offset behind it, known when all chunks were read."""

    def __init__(self, file: BinaryIO, start: int, format_name: str) -> None:
        self.file = file
        self.start = self.end = start
        self.format = format_name

    def read_chunks(self) -> Iterator[bytes]:
        """Yield the content. Raises InputError [image-damaged] or [image-unknown]."""
        makers: dict[str, Callable[[], Any]] = {
            GZIP: lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
            XZ: lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
            BZIP2: bz2.BZ2Decompressor,
            "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
        }
        if self.format == ZSTD:
            chunks = self.read_zstd()
        elif self.format in makers:
            chunks = self.read_stream(makers[self.format]())
        else:
            hint = "compress it anew with gzip, xz, bzip2 or zstd"
            raise InputError("image-unknown", self.file.name, f"has a part compressed with {self.format}", hint)
        total = 0
        for chunk in chunks:
            total += len(chunk)
            if total > UNPACKED_LIMIT:
                raise make_damage(self.file.name, f"the part at byte {self.start} has more than {UNPACKED_LIMIT} bytes")
            yield chunk

    def read_stream(self, stream: Any) -> Iterator[bytes]:
        """Yield what one of Python's decompressors makes of the file, up to the stream's end."""
        self.file.seek(self.start)
        rest, consumed = b"", self.start
        try:
            while not stream.eof:
                data = rest
                if not data and getattr(stream, "needs_input", True):
                    data = self.file.read(CHUNK)
                    consumed += len(data)
                    if not data:
                        raise make_damage(self.file.name, f"ends in the middle of the {self.format} part")
                chunk = stream.decompress(data, CHUNK)
                rest = getattr(stream, "unconsumed_tail", b"")
                if chunk:
                    yield chunk
        except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
            raise make_damage(self.file.name, f"the {self.format} part at byte {self.start}: {error}") from None
        # At the end zlib may name what follows twice, as unconsumed and as unused.
        self.end = consumed - len(stream.unused_data)

    def read_zstd(self) -> Iterator[bytes]:
        """Yield what zstd(1) makes of one frame."""
        self.end = find_zstd_end(self.file, self.start)
        yield from run_filter(["zstd", "-q", "-d", "-c"], read_range(self.file, self.start, self.end), "zstd")


def find_zstd_end(file: BinaryIO, start: int) -> int:
    """Return the offset behind the zstd frame that begins at an offset. Raises InputError [image-damaged]."""
    file.seek(start + 4)
    descriptor = read_exactly(file, 1)[0]
    single = descriptor >> 5 & 1
    size_bytes = ZSTD_SIZE_BYTES[descriptor >> 6] or single
    read_exactly(file, (not single) + ZSTD_ID_BYTES[descriptor & 3] + size_bytes)
    last = False
    while not last:
        block = int.from_bytes(read_exactly(file, 3), "little")
        last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        # A block of one repeated byte has that byte only.
        read_exactly(file, 1 if kind == 1 else size)
    read_exactly(file, 4 if descriptor & 4 else 0)
    return file.tell()


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """Return this many bytes. Raises InputError [image-damaged] if there are fewer."""
    data = file.read(count)
    if len(data) < count:
        raise make_damage(file.name, "is cut short")
    return data


def read_range(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a file between two offsets, in chunks."""
    while start < end:
        file.seek(start)
        data = read_exactly(file, min(CHUNK, end - start))
        start += len(data)
        yield data


def make_damage(path: str, problem: str) -> InputError:
    """Return the error for an image that cannot be what it begins as."""
    return InputError("image-damaged", path, problem, "compare it with the original, and copy that anew")
