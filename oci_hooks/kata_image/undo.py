# SPDX-License-Identifier: Apache-2.0
"""What `remove` needs to restore an image byte by byte: the original's blocks that `add` changed.

They are in the image itself, between the partition table and the first partition, where osbuilder leaves 1 MiB free;
what does not fit there is at the end of the file. A block that was zero, as free blocks of a new file system are, takes
no room. `remove` compares the result's digest with the original's, so a change after `add` is never lost unseen.
"""

from __future__ import annotations

import hashlib
import struct
import zlib

from oci_hooks.findings import Refusal
from oci_hooks.frozen import Frozen
from oci_hooks.kata_image.disk import MIB, read_at
from oci_hooks.kata_image.initrd import encode_record, make_change, parse_record
from oci_hooks.kata_image.model import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

BLOCK = 4096
# Behind MBR and GPT, from the beginning of the table's disk.
PLACE = 32 << 10
SIGNATURE = b"OCI-VFIO-UNDO\0\0\1"
# Signature; lengths of the record and of the blocks; where these begin in the file; the SHA-256 of both.
HEADER = struct.Struct("<16sIIQ32s")
RUN = struct.Struct("<QI?")
# Of one run, and of all blocks together when they are unpacked.
RUN_BLOCKS = 1 << 16
DATA_LIMIT = 1 << 30
DAMAGED = "its undo data is damaged"


class Undo(Frozen):
    """The undo data of an image. blocks: as `find_changes` packs them; place, length: what it takes in the gap;
    outside: offset of the blocks if they did not fit there, else 0."""

    record: Record
    blocks: bytes
    place: int
    length: int
    outside: int


def find_changes(old: BinaryIO, new: BinaryIO) -> bytes:
    """Return the blocks of the old file that are different in the new one, packed and compressed."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(RUN.pack(number, count, bool(data)) + data) for number, count, data in compare(old, new)]
    return b"".join([*parts, packer.flush()])


def compare(old: BinaryIO, new: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yield runs of changed blocks: number of the first, how many, and the old content; b"" for zeros."""
    first, count, data = 0, 0, bytearray()
    zeros = False
    for number, before, after in read_blocks(old, new):
        changed = before != after
        is_zero = changed and not before.strip(b"\0")
        if count and (not changed or is_zero != zeros or number != first + count or count == RUN_BLOCKS):
            yield first, count, bytes(data)
            count = 0
        if changed:
            if not count:
                first, zeros, data = number, is_zero, bytearray()
            count += 1
            data += b"" if is_zero else before
    if count:
        yield first, count, bytes(data)


def read_blocks(old: BinaryIO, new: BinaryIO) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the number and both contents of each block of the old file, but for long stretches that are the same."""
    old.seek(0)
    new.seek(0)
    number = 0
    while before := old.read(MIB):
        after = new.read(len(before))
        if before != after:
            for place in range(0, len(before), BLOCK):
                yield number + place // BLOCK, before[place : place + BLOCK], after[place : place + BLOCK]
        number += MIB // BLOCK


def unpack_blocks(path: str, blocks: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield offset and original content of each run. Raises InputError [image-changed] for damaged data."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(blocks, DATA_LIMIT)
    except zlib.error:
        data = b""
    if not stream.eof:
        raise make_change(path, DAMAGED)
    place = 0
    while place + RUN.size <= len(data):
        number, count, has_data = RUN.unpack_from(data, place)
        place += RUN.size
        length = count * BLOCK if has_data else 0
        if count > RUN_BLOCKS:
            raise make_change(path, DAMAGED)
        yield number * BLOCK, data[place : place + length] if has_data else bytes(count * BLOCK)
        place += length


# Where it is ----------------------------------------------------------------------------------------------------------


def pack_undo(record: Record, blocks: bytes, base: int, start: int, end: int) -> tuple[bytes, bytes]:
    """Return what to write at PLACE from the table, and what to write at an offset behind the image ("" mostly).

    base: offset of the table; start: of the partition; end: of the file, where there is room for what does not fit.
    Raises Refusal [image-gap] where there is no room for a header.
    """
    note = encode_record(record)
    room = start - base - PLACE - HEADER.size
    if room < len(note):
        hint = "osbuilder begins the partition at 1 MiB; --no-undo adds without a way back"
        raise Refusal("image-gap", "partition", f"begins {start - base} bytes behind its table", hint)
    inside = len(note) + len(blocks) <= room
    digest = hashlib.sha256(note + blocks).digest()
    head = HEADER.pack(SIGNATURE, len(note), len(blocks), 0 if inside else end, digest)
    return (head + note + (blocks if inside else b""), b"" if inside else blocks)


def read_undo(file: BinaryIO, base: int) -> Undo | None:
    """Return the undo data of an image, None if it has none. Raises InputError [image-changed] if it is damaged."""
    place = base + PLACE
    head = read_at(file, place, HEADER.size)
    if len(head) < HEADER.size or not head.startswith(SIGNATURE):
        return None
    _, note_length, length, outside, digest = HEADER.unpack(head)
    size = file.seek(0, 2)
    if note_length > MIB or length > size:
        raise make_change(file.name, DAMAGED)
    note = read_at(file, place + HEADER.size, note_length)
    blocks = read_at(file, outside or place + HEADER.size + note_length, length)
    record = parse_record(note)
    if record is None or hashlib.sha256(note + blocks).digest() != digest:
        raise make_change(file.name, DAMAGED)
    return Undo(record, blocks, place, HEADER.size + note_length + (0 if outside else length), outside)
