# SPDX-License-Identifier: Apache-2.0
"""Read what Kata's osbuilder writes around the guest's file system: partition tables, header for NVDIMM.

osbuilder (kata-containers, tools/osbuilder/image-builder/image_builder.sh) makes one partition at 1 MiB, measured from
an MBR. Before these, unless told not to, it puts 2 MiB with another MBR that counts from the beginning of the file and
the kernel's block for a pmem device with DAX (struct nd_pfn_sb in drivers/nvdimm/pfn.h, nsdax.gpl.c). A guest with an
NVDIMM sees the second MBR, one with a virtio disk the first. An image with dm-verity has its hashes in a second
partition.
"""

from __future__ import annotations

import struct

from oci_hooks.findings import InputError, Refusal
from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

SECTOR = 512
MIB = 1 << 20
DAX_OFFSET = 4096
DAX_SIGNATURE = b"NVDIMM_PFN_INFO\0"
DAX_BYTES = 2 * MIB
MBR_TABLE, MBR_SIGNATURE = 446, b"\x55\xaa"
GPT_TYPE, GPT_SIGNATURE = 0xEE, b"EFI PART"
# Entries of a GPT that are looked at: the usual number.
GPT_ENTRIES = 128
# File systems by their first bytes: offset in the partition, bytes.
SUPERBLOCKS = {
    "ext4": (1024 + 56, b"\x53\xef"),
    "erofs": (1024, b"\xe2\xe1\xf5\xe0"),
    "xfs": (0, b"XFSB"),
    "squashfs": (0, b"hsqs"),
    "btrfs": (0x10040, b"_BHRfS_M"),
    "LUKS": (0, b"LUKS\xba\xbe"),
}


class Partition(Frozen):
    """A partition. start, size: bytes from the beginning of the table's disk."""

    start: int
    size: int


class Table(Frozen):
    """A partition table. base: offset of its disk in the file; kind: "MBR" or "GPT"."""

    base: int
    kind: str
    partitions: tuple[Partition, ...]


class Image(Frozen):
    """What was read of an image. tables: of the NVDIMM's header first, if there is one; filesystem: of the first
    partition, "" if it is none that is known."""

    path: str
    size: int
    tables: tuple[Table, ...]
    dax: bool
    filesystem: str

    @property
    def verity(self) -> bool:
        """Return whether it is for dm-verity. osbuilder makes a second partition for nothing but the hashes."""
        return len(self.tables[-1].partitions) > 1

    @property
    def start(self) -> int:
        """Return the offset of the first partition in the file."""
        table = self.tables[-1]
        return table.base + table.partitions[0].start

    @property
    def room(self) -> int:
        """Return the bytes of the first partition."""
        return self.tables[-1].partitions[0].size

    @property
    def end(self) -> int:
        """Return the offset behind the first partition."""
        return self.start + self.room


def read_image(file: BinaryIO) -> Image:
    """Return the layout of an image. Raises InputError [image-unknown] or [image-damaged]."""
    size = file.seek(0, 2)
    table = read_table(file, 0)
    if table is None:
        raise refuse_unpartitioned(file)
    tables = [table]
    dax = read_at(file, DAX_OFFSET, len(DAX_SIGNATURE)) == DAX_SIGNATURE
    if dax:
        inner = read_table(file, DAX_BYTES)
        if inner is None:
            problem = "has a header for NVDIMM, but no partition table behind it at 2 MiB"
            raise InputError("image-damaged", file.name, problem, "build it anew with osbuilder")
        tables.append(inner)
    check_tables(file.name, size, tuple(tables))
    first = tables[-1].partitions[0]
    start = tables[-1].base + first.start
    return Image(file.name, size, tuple(tables), dax, find_filesystem(file, start))


def refuse_unpartitioned(file: BinaryIO) -> InputError:
    """Return the error for a file without a partition table."""
    found = find_filesystem(file, 0)
    problem = f"is {found} without a partition table" if found else "is neither a disk image nor an initrd"
    hint = "name the file that `image` or `initrd` in Kata's configuration.toml names"
    return InputError("image-unknown", file.name, problem, hint)


def check_tables(path: str, size: int, tables: tuple[Table, ...]) -> None:
    """Raise InputError [image-damaged] unless each partition is inside of the file, and both tables mean the same."""
    hint = "it may be a truncated copy: compare it with the original"
    for table in tables:
        if not table.partitions:
            raise InputError("image-damaged", path, "has a partition table without a partition", hint)
        for partition in table.partitions:
            end = table.base + partition.start + partition.size
            if end > size:
                problem = f"ends at byte {size}, and its partition at {end}"
                raise InputError("image-damaged", path, problem, hint)
    # Lengths differ by a MiB where there are two partitions: osbuilder rounds them twice.
    if len({table.base + table.partitions[0].start for table in tables}) > 1:
        problem = "has two partition tables, for NVDIMM and for a disk, that name different places"
        raise InputError("image-damaged", path, problem, "build it anew with osbuilder")


def read_table(file: BinaryIO, base: int) -> Table | None:
    """Return the partition table at an offset, None if there is none."""
    sector = read_at(file, base, SECTOR)
    if len(sector) < SECTOR or sector[510:] != MBR_SIGNATURE:
        return None
    partitions, protective = [], False
    for place in range(MBR_TABLE, 510, 16):
        kind = sector[place + 4]
        start, count = struct.unpack_from("<II", sector, place + 8)
        protective = protective or kind == GPT_TYPE
        if kind and count:
            partitions.append(Partition(start * SECTOR, count * SECTOR))
    if protective:
        return read_gpt(file, base)
    # A boot sector of a file system has the same signature; its "entries" are code.
    if any(sector[place] not in (0, 0x80) for place in range(MBR_TABLE, 510, 16)):
        return None
    return Table(base, "MBR", tuple(partitions))


def read_gpt(file: BinaryIO, base: int) -> Table | None:
    """Return the GPT at an offset (UEFI 2.10, 5.3), None if its header is none."""
    header = read_at(file, base + SECTOR, 92)
    if len(header) < 92 or header[:8] != GPT_SIGNATURE:
        return None
    place, count, length = struct.unpack_from("<QII", header, 72)
    if not 128 <= length <= 4096 or place * SECTOR > file.seek(0, 2):
        return None
    partitions = []
    for number in range(min(count, GPT_ENTRIES)):
        entry = read_at(file, base + place * SECTOR + number * length, 48)
        first, last = struct.unpack_from("<QQ", entry.ljust(48, b"\0"), 32)
        if entry[:16].strip(b"\0") and last >= first:
            partitions.append(Partition(first * SECTOR, (last - first + 1) * SECTOR))
    return Table(base, "GPT", tuple(partitions))


def find_filesystem(file: BinaryIO, start: int) -> str:
    """Return the name of the file system at an offset, "" if it is none of SUPERBLOCKS."""
    for name, (place, magic) in SUPERBLOCKS.items():
        if read_at(file, start + place, len(magic)) == magic:
            return name
    return ""


def read_at(file: BinaryIO, place: int, count: int) -> bytes:
    """Return the bytes at an offset, fewer at the end of the file."""
    file.seek(place)
    return file.read(count)


# Decisions ------------------------------------------------------------------------------------------------------------


def check_writable(image: Image) -> None:
    """Raise Refusal for an image that nothing can be added to: dm-verity, or a file system that needs to be mounted."""
    if image.verity:
        problem = "has a second partition, as an image with dm-verity has: a changed file would not be read"
        hint = (
            "unpack the add-on into the root file system before osbuilder makes the image (MEASURED_ROOTFS=yes), and "
            "put the new root hash into kernel_verity_params"
        )
        raise Refusal("image-verity", image.path, problem, hint)
    if image.filesystem not in ("ext4", "erofs"):
        name = image.filesystem or "an unknown file system"
        hint = "unpack the add-on into the root file system before osbuilder makes the image: tar -C ROOTFS -xf ADDON"
        raise Refusal("image-filesystem", image.path, f"has {name}, which cannot be written without mounting it", hint)
    if image.filesystem == "erofs" and image.tables[-1].kind == "GPT":
        hint = "make it with an MBR, as osbuilder does, or unpack the add-on into its root file system before"
        raise Refusal("image-filesystem", image.path, "has EROFS in a GPT, whose partition is not moved", hint)


def choose_alignment(size: int) -> int:
    """Return to how many bytes an image's size is a multiple: what osbuilder aligned it to stays so.

    128 MiB is what memory hotplug behind an NVDIMM asks on arm64 (osbuilder, 2b0d5b252e); 2 MiB is DAX's page.
    """
    return next((step for step in (128 * MIB, 2 * MIB, MIB) if size % step == 0), 4096)


def make_mbr(old: bytes, start: int, size: int) -> bytes:
    """Return an MBR whose first used entry has another start and size, in bytes from the beginning of its disk."""
    table = bytearray(old)
    for place in range(MBR_TABLE, 510, 16):
        if table[place + 4] and struct.unpack_from("<I", table, place + 12)[0]:
            # Cylinder, head and sector: the value for "see the 32-bit fields"; Linux reads only these.
            table[place + 1 : place + 4] = table[place + 5 : place + 8] = b"\xfe\xff\xff"
            struct.pack_into("<II", table, place + 8, start // SECTOR, size // SECTOR)
            return bytes(table)
    raise ValueError("the table has no partition")
