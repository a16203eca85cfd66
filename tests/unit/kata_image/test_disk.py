# SPDX-License-Identifier: Apache-2.0
"""Layouts of disk images from their bytes: osbuilder's, GPT, and what is none."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks.findings import InputError, Refusal
from oci_hooks.kata_image.apply.output import NamedFile
from oci_hooks.kata_image.disk import (
    MIB,
    Image,
    check_writable,
    choose_alignment,
    make_mbr,
    read_image,
)
from oci_hooks.kata_image.ext4 import Need, Superblock, check_growth, is_enough, plan_growth, read_superblock

SIZE = 8 * MIB


def make_table(*partitions: tuple[int, int], kind: int = 0x83) -> bytes:
    """Return an MBR. partitions: start and size in bytes."""
    sector = bytearray(512)
    for number, (start, size) in enumerate(partitions):
        struct.pack_into("<4xB3xII", sector, 446 + 16 * number, kind, start // 512, size // 512)
    return bytes(sector[:510]) + b"\x55\xaa"


def make_bytes(*pieces: tuple[int, bytes], size: int = SIZE) -> bytes:
    """Return a file with pieces at offsets."""
    data = bytearray(size)
    for place, piece in pieces:
        data[place : place + len(piece)] = piece
    return bytes(data[:size])


def read(data: bytes) -> Image:
    """Read an image from bytes."""
    return read_image(NamedFile(io.BytesIO(data), "image"))  # type: ignore[arg-type]


EXT4 = (1024 + 56, b"\x53\xef")
FIRST = (MIB, 6 * MIB)
DAX = (4096, b"NVDIMM_PFN_INFO\0")
DAX_FIRST = (3 * MIB, 4 * MIB)
PLAIN = make_bytes((0, make_table(FIRST)), (MIB + EXT4[0], EXT4[1]))
WITH_DAX = make_bytes(
    (0, make_table(DAX_FIRST)), DAX, (2 * MIB, make_table((MIB, 4 * MIB))), (3 * MIB + EXT4[0], EXT4[1])
)


def make_gpt(first: int, last: int) -> list[tuple[int, bytes]]:
    """Return the pieces of a GPT with a partition from sector to sector."""
    header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, 99, 34, 98, bytes(16), 2, 128, 128, 0)
    entry = struct.pack("<16s16sQQ", b"x" * 16, b"y" * 16, first, last)
    return [(0, make_table((512, SIZE - 512), kind=0xEE)), (512, header), (1024, entry)]


def test_layout_without_header() -> None:
    image = read(PLAIN)
    assert (image.dax, image.filesystem, image.start, image.room, image.verity) == (False, "ext4", *FIRST, False)


def test_layout_with_header() -> None:
    image = read(WITH_DAX)
    assert (image.dax, image.filesystem, image.start, image.room) == (True, "ext4", 3 * MIB, 4 * MIB)
    assert [table.base for table in image.tables] == [0, 2 * MIB]


def test_layout_with_gpt() -> None:
    image = read(make_bytes(*make_gpt(2048, 4095), (MIB + EXT4[0], EXT4[1])))
    assert (image.tables[0].kind, image.filesystem, image.start, image.room) == ("GPT", "ext4", MIB, MIB)


@pytest.mark.parametrize(
    ("place", "magic", "name"),
    [(1024, b"\xe2\xe1\xf5\xe0", "erofs"), (0, b"XFSB", "xfs"), (0, b"hsqs", "squashfs"), (0, b"????", "")],
)
def test_file_systems(place: int, magic: bytes, name: str) -> None:
    image = read(make_bytes((0, make_table(FIRST)), (MIB + place, magic)))
    assert image.filesystem == name
    if name != "erofs":
        with pytest.raises(Refusal, match=r"\[image-filesystem\]"):
            check_writable(image)


def test_erofs_in_a_gpt_is_refused() -> None:
    image = read(make_bytes(*make_gpt(2048, 4095), (MIB + 1024, b"\xe2\xe1\xf5\xe0")))
    with pytest.raises(Refusal, match=r"\[image-filesystem\].*GPT"):
        check_writable(image)


def test_verity_is_refused() -> None:
    image = read(make_bytes((0, make_table((MIB, 4 * MIB), (5 * MIB, MIB))), (MIB + EXT4[0], EXT4[1])))
    assert image.verity
    with pytest.raises(Refusal, match=r"\[image-verity\].*kernel_verity_params"):
        check_writable(image)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "neither a disk image nor an initrd"),
        (b"MZ", "neither"),
        (bytes(SIZE), "neither"),
        (make_bytes(EXT4), "is ext4 without a partition table"),
        # A boot sector of a file system: signature, but code where the entries would be.
        (b"\xeb\x3c\x90" + b"A" * 507 + b"\x55\xaa" + bytes(MIB), "neither"),
        (PLAIN[: 5 * MIB], "ends at byte 5242880, and its partition at 7340032"),
        (WITH_DAX[: 6 * MIB], "ends at byte 6291456"),
        (make_bytes((0, make_table())), "partition table without a partition"),
        (make_bytes((0, make_table(DAX_FIRST)), DAX), "no partition table behind it"),
        (
            make_bytes((0, make_table((4 * MIB, MIB))), DAX, (2 * MIB, make_table((MIB, MIB)))),
            "name different places",
        ),
        (make_bytes((0, make_table((512, MIB), kind=0xEE))), "neither"),
        (make_bytes(*make_gpt(2048, 1 << 40)), "ends at byte"),
    ],
)
def test_what_is_no_image(data: bytes, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read(data)


@given(st.binary(min_size=512, max_size=600), st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_refused(start: bytes, gpt: bytes, dax: bool) -> None:
    data = bytearray(make_bytes((0, start), (512, b"EFI PART" + gpt), *([DAX] if dax else []), size=3 * MIB))
    data[510:512] = b"\x55\xaa"
    with contextlib.suppress(InputError):
        read(bytes(data))


def test_new_table_differs_in_the_entry_only() -> None:
    old = make_table(FIRST)
    new = make_mbr(old, 5 * MIB, 7 * MIB)
    assert new[:446] == old[:446] and new[462:] == old[462:] and new[446] == old[446] and new[450] == old[450]
    image = read(make_bytes((0, new), size=16 * MIB))
    assert (image.start, image.room) == (5 * MIB, 7 * MIB)


@pytest.mark.parametrize(
    ("size", "step"), [(256 * MIB, 128 * MIB), (130 * MIB, 2 * MIB), (5 * MIB, MIB), (5 * MIB + 512, 4096)]
)
def test_alignment_stays(size: int, step: int) -> None:
    assert choose_alignment(size) == step


# Room -----------------------------------------------------------------------------------------------------------------

FOUND = Superblock(4096, 32768, 5000, 1000, 8192, 500, 32768, 8192, 256, True)


def test_reserved_blocks_are_left_alone() -> None:
    assert is_enough(FOUND, Need(4000, 500))
    assert not is_enough(FOUND, Need(4001, 500))
    assert not is_enough(FOUND, Need(4000, 501))


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 16))
def test_growth_is_enough_after_the_new_tables(blocks: int, inodes: int) -> None:
    need = Need(blocks, inodes)
    total = plan_growth(FOUND, need)
    groups = -(-total // FOUND.group_blocks) - 1
    tables = groups * (FOUND.group_inodes * FOUND.inode_size // FOUND.block)
    assert total * FOUND.block % MIB == 0
    assert FOUND.usable + total - FOUND.blocks - tables >= blocks
    assert FOUND.free_inodes + groups * FOUND.group_inodes >= inodes


def test_gpt_is_not_grown() -> None:
    image = read(make_bytes(*make_gpt(2048, 4095), (MIB + EXT4[0], EXT4[1])))
    with pytest.raises(Refusal, match=r"\[image-full\] image: lacks 409600 bytes and 0 inodes"):
        check_growth(image, FOUND, Need(4100, 0))


@pytest.mark.parametrize(
    ("length", "values"), [(0, ()), (1023, ()), (1024, (0, 0, 0, 0, 0, 0, 0)), (1024, (1, 1, 0, 0, 0, 0, 9))]
)
def test_superblock_that_cannot_be_right(length: int, values: tuple[int, ...]) -> None:
    data = struct.pack(f"<{len(values)}I", *values).ljust(length, b"\0")
    file = NamedFile(io.BytesIO(bytes(1024) + data), "image")
    with pytest.raises(InputError, match=r"\[image-damaged\]"):
        read_superblock(file, 0)  # type: ignore[arg-type]


# Undo data ------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 9), st.sampled_from([0, 1, 2])), max_size=12),
    st.integers(0, 4095),
)
def test_changed_blocks_come_back(changes: list[tuple[int, int, int]], odd: int) -> None:
    from oci_hooks.kata_image.undo import BLOCK, find_changes, unpack_blocks

    old = bytearray(bytes(200 * BLOCK) + b"\1" * (120 * BLOCK + odd))
    new = bytearray(old) + bytes(BLOCK)
    for first, count, value in changes:
        place = min(first * BLOCK, len(new))
        new[place : place + count * BLOCK] = bytes([value]) * (min(len(new), place + count * BLOCK) - place)
    packed = find_changes(io.BytesIO(bytes(old)), io.BytesIO(bytes(new)))
    for place, data in unpack_blocks("image", packed):
        new[place : place + len(data)] = data
    assert new[: len(old)] == old


def test_damaged_undo_data_is_refused() -> None:
    from oci_hooks.kata_image.undo import RUN, unpack_blocks

    for data in (b"", b"nonsense", zlib.compress(RUN.pack(0, 1 << 30, False))):
        with pytest.raises(InputError, match=r"\[image-changed\]"):
            list(unpack_blocks("image", data))


def test_undo_data_without_room(tmp_path: Path) -> None:
    from oci_hooks.kata_image.model import Record
    from oci_hooks.kata_image.undo import pack_undo, read_undo

    record = Record("0", "0", "0" * 64, False, 10, "0" * 64)
    with pytest.raises(Refusal, match=r"\[image-gap\]"):
        pack_undo(record, b"", 0, (32 << 10) + 100, MIB)
    gap, behind = pack_undo(record, b"x" * MIB, 0, MIB, 5 * MIB)
    assert behind == b"x" * MIB
    file = io.BytesIO(make_bytes((32 << 10, gap), (5 * MIB, behind)))
    undo = read_undo(NamedFile(file, "image"), 0)  # type: ignore[arg-type]
    assert undo is not None and undo.blocks == behind and undo.record == record
    file = io.BytesIO(make_bytes((32 << 10, gap), (5 * MIB, b"y")))
    with pytest.raises(InputError, match=r"\[image-changed\]"):
        read_undo(NamedFile(file, "image"), 0)  # type: ignore[arg-type]
