# SPDX-License-Identifier: Apache-2.0
"""Room in an ext4 file system: what there is, what the add-on needs, how far to grow.

Source: the kernel's Documentation/filesystems/ext4/super.rst. Decides only; apply/ext4.py writes.
"""

from __future__ import annotations

import struct

from oci_hooks.findings import InputError, Refusal
from oci_hooks.frozen import Frozen
from oci_hooks.kata_image.disk import MIB, read_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from oci_hooks.kata_image.disk import Image
    from oci_hooks.kata_image.model import AddonFile

SUPERBLOCK = 1024
INCOMPAT_RECOVER, INCOMPAT_64BIT = 0x4, 0x80
CLEAN = 1
# Blocks that directories and extent trees may take in addition to one each.
SPARE_BLOCKS = 64
# A file of more blocks than this may need a block of its extent tree.
EXTENT_BLOCKS = 64
# What growing adds in addition, for the tables of new block groups: a share, and blocks.
SPARE_SHARE, GROWTH_BLOCKS = 16, 1024


class Superblock(Frozen):
    """The numbers of a file system. block: bytes; reserved: blocks for root's processes, left alone."""

    block: int
    blocks: int
    free: int
    reserved: int
    inodes: int
    free_inodes: int
    group_blocks: int
    group_inodes: int
    inode_size: int
    clean: bool

    @property
    def usable(self) -> int:
        """Return the free blocks without the reserved ones."""
        return max(0, self.free - self.reserved)


class Need(Frozen):
    """What is to be stored takes."""

    blocks: int
    inodes: int


def read_superblock(file: BinaryIO, start: int) -> Superblock:
    """Return the superblock of a file system at an offset. Raises InputError [image-damaged]."""
    data = read_at(file, start + SUPERBLOCK, 1024)
    if len(data) < 1024:
        raise InputError("image-damaged", file.name, "ends in the superblock", "compare it with the original")
    inodes, blocks, reserved, free, free_inodes, _, shift = struct.unpack_from("<7I", data)
    group_blocks, _, group_inodes = struct.unpack_from("<3I", data, 32)
    (state,), (inode_size,) = struct.unpack_from("<H", data, 58), struct.unpack_from("<H", data, 88)
    (incompat,) = struct.unpack_from("<I", data, 96)
    if incompat & INCOMPAT_64BIT:
        high = struct.unpack_from("<3I", data, 0x150)
        blocks, reserved, free = (low + (top << 32) for low, top in zip((blocks, reserved, free), high))
    if shift > 6 or not (blocks and group_blocks and group_inodes):
        raise InputError("image-damaged", file.name, "has an ext4 superblock that cannot be right", "use e2fsck -fn")
    clean = state == CLEAN and not incompat & INCOMPAT_RECOVER
    numbers = (blocks, free, reserved, inodes, free_inodes, group_blocks, group_inodes, inode_size)
    return Superblock(1024 << shift, *numbers, clean)


def measure_need(files: tuple[AddonFile, ...], directories: list[str], block: int) -> Need:
    """Return what files and new directories take in blocks of this many bytes."""
    counts = [-(-len(file.data) // block) for file in files]
    trees = sum(count > EXTENT_BLOCKS for count in counts)
    return Need(sum(counts) + trees + len(directories) + SPARE_BLOCKS, len(files) + len(directories))


def is_enough(found: Superblock, need: Need) -> bool:
    """Return whether a file system has the room."""
    return found.usable >= need.blocks and found.free_inodes >= need.inodes


def plan_growth(found: Superblock, need: Need) -> int:
    """Return how many blocks a file system must have in all for a need, a whole number of MiB."""
    missing = max(0, need.blocks - found.usable)
    blocks = found.blocks + missing + missing // SPARE_SHARE + GROWTH_BLOCKS
    if need.inodes > found.free_inodes:
        # Inodes come with whole groups of blocks.
        groups = -(-(need.inodes - found.free_inodes) // found.group_inodes)
        blocks = max(blocks, (-(-found.blocks // found.group_blocks) + groups) * found.group_blocks)
    # The tables of the groups that come with it take room in them.
    groups = -(-blocks // found.group_blocks) - -(-found.blocks // found.group_blocks)
    blocks += groups * (-(-found.group_inodes * found.inode_size // found.block) + 2)
    step = max(1, MIB // found.block)
    return -(-blocks // step) * step


def check_growth(image: Image, found: Superblock, need: Need) -> None:
    """Raise Refusal [image-full] for an image whose partition this tool does not make larger."""
    if image.tables[-1].kind != "GPT":
        return
    missing = max(0, need.blocks - found.usable) * found.block
    problem = f"lacks {missing} bytes and {max(0, need.inodes - found.free_inodes)} inodes for the add-on"
    hint = "only images with an MBR, as osbuilder makes them, are made larger: enlarge a copy by sfdisk and resize2fs"
    raise Refusal("image-full", image.path, problem, hint)
