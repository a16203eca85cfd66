# SPDX-License-Identifier: Apache-2.0
"""Write a copy of a disk image with the add-on in its file system, or as it was before."""

from __future__ import annotations

import contextlib
import os
import tempfile

from oci_hooks.findings import InputError, Refusal, StepError
from oci_hooks.kata_image.apply import erofs, ext4
from oci_hooks.kata_image.apply.output import DRAFT, copy_range, digest_file, write_back
from oci_hooks.kata_image.decision import check_guest
from oci_hooks.kata_image.disk import MIB, SECTOR, choose_alignment, make_mbr, read_at, read_image
from oci_hooks.kata_image.ext4 import check_growth, is_enough, measure_need, read_superblock
from oci_hooks.kata_image.initrd import encode_record, make_change
from oci_hooks.kata_image.model import RECORD, AddonFile
from oci_hooks.kata_image.report import read_guest
from oci_hooks.kata_image.undo import DAMAGED, PLACE, find_changes, pack_undo, read_undo, unpack_blocks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from oci_hooks.findings import Finding
    from oci_hooks.kata_image.disk import Image
    from oci_hooks.kata_image.model import Record
    from oci_hooks.kata_image.report import Module
    from oci_hooks.kata_image.trees import Tree


@contextlib.contextmanager
def open_tree(source: BinaryIO, image: Image) -> Iterator[Tree | None]:
    """Give access to the files in an image; None where its file system is none that can be read."""
    if image.filesystem == "ext4":
        yield ext4.Ext4Tree(source, image.start)
    elif image.filesystem == "erofs":
        with tempfile.TemporaryDirectory(prefix="vfio-kata-image-") as work:
            copy_range(source, image.start, image.room, f"{work}/partition")
            yield erofs.extract(f"{work}/partition", f"{work}/tree", preserve=False)
    else:
        yield None


def add_to_image(
    source: BinaryIO, image: Image, files: tuple[AddonFile, ...], work: str, record: Record, undo: bool
) -> tuple[Module, ...]:
    """Write DRAFT, a copy with files in it, verified, and return the kernel modules that the guest has.

    Raises HookError for what cannot be done, OSError.
    """
    draft, partition = f"{work}/{DRAFT}", f"{work}/partition"
    digest = copy_range(source, 0, image.size, draft)
    copy_range(source, image.start, image.room, partition)
    whole = record.replace(size=image.size, sha256=digest)
    time = max(file.mtime for file in files)
    note = AddonFile(RECORD, 0o644, time, encode_record(whole))
    if image.filesystem == "ext4":
        modules = change_ext4(source, image, (*files, note), work, time)
        start = image.start
    else:
        modules = erofs.change(partition, work, image.path, (*files, note))
        # The old partition stays where it is: `remove` needs all of it, for nothing in the new one is at its place.
        start = image.end if undo else image.start
        start = image.tables[-1].base + -(-(start - image.tables[-1].base) // MIB) * MIB
    lay_out(draft, partition, image, start)
    if undo:
        store_undo(source, draft, image, start, whole)
    verify_image(draft, image, files, work)
    return modules


def list_warnings(image: Image) -> list[Finding]:
    """Return what a user has to know of an image before it is changed."""
    return erofs.list_warnings(image.path) if image.filesystem == "erofs" else []


def change_ext4(
    source: BinaryIO, image: Image, files: tuple[AddonFile, ...], work: str, time: int
) -> tuple[Module, ...]:
    """Put files into WORK/partition, larger if it must be."""
    partition = f"{work}/partition"
    tree = ext4.Ext4Tree(source, image.start)
    found = read_superblock(source, image.start)
    ext4.check_filesystem(partition, image.path)
    directories = check_guest(image.path, tree, files)
    need = measure_need(files, directories, found.block)
    if not is_enough(found, need):
        check_growth(image, found, need)
    ext4.make_room(partition, image.path, files, directories)
    ext4.write_files(partition, work, files, directories, time)
    ext4.check_filesystem(partition, image.path)
    return read_guest(tree).modules


def lay_out(draft: str, partition: str, image: Image, start: int) -> None:
    """Put a changed partition into the copy, and into its tables if it is another place or length. Raises OSError."""
    size = max(os.stat(partition).st_size, image.room if start == image.start else 0)
    size = -(-size // SECTOR) * SECTOR
    with open(draft, "r+b") as file:
        write_back(partition, file, start)
        if (start, size) != (image.start, image.room):
            alignment = choose_alignment(image.size)
            file.truncate(max(image.size, -(-(start + size) // alignment) * alignment))
            for table in image.tables:
                sector = make_mbr(read_at(file, table.base, SECTOR), start - table.base, size)
                file.seek(table.base)
                file.write(sector)


def store_undo(source: BinaryIO, draft: str, image: Image, start: int, record: Record) -> None:
    """Write into the copy what `remove` needs. Raises Refusal [image-gap], OSError."""
    with open(draft, "r+b") as file:
        blocks = find_changes(source, file)
        base, size = image.tables[-1].base, file.seek(0, 2)
        gap, behind = pack_undo(record, blocks, base, min(start, image.start), size)
        # A GPT has its copy at the end of the disk.
        if read_at(source, base + PLACE, len(gap)).strip(b"\0") or (behind and image.tables[-1].kind == "GPT"):
            problem = "has no room for the undo data between partition table and partition"
            raise Refusal("image-gap", image.path, problem, "--no-undo adds without a way back")
        file.seek(base + PLACE)
        file.write(gap)
        if behind:
            alignment = choose_alignment(image.size)
            file.seek(size)
            file.write(behind)
            file.truncate(-(-(size + len(behind)) // alignment) * alignment)


def verify_image(draft: str, image: Image, files: tuple[AddonFile, ...], work: str) -> None:
    """Read the new image from its tables on. Raises StepError [not-written] unless each file is in it."""
    with open(draft, "rb") as file:
        found = read_image(file)
        if (found.filesystem, found.dax, len(found.tables)) != (image.filesystem, image.dax, len(image.tables)):
            raise StepError("not-written", image.path, "the copy's layout was read back as another one", "report this")
        if found.filesystem == "ext4":
            ext4.verify_files(file, found.start, work, files)
            return
        copy_range(file, found.start, found.room, f"{work}/verified")
    erofs.verify(f"{work}/verified", work, files)


def remove_from_image(source: BinaryIO, image: Image, draft: str) -> Record:
    """Write a copy as it was before `add`. Raises InputError [not-added] or [image-changed], OSError."""
    undo = read_undo(source, image.tables[-1].base)
    if undo is None:
        hint = "use the original: it was added with --no-undo, or in another way, or not at all"
        raise InputError("not-added", image.path, "has no undo data", hint)
    copy_range(source, 0, image.size, draft)
    with open(draft, "r+b") as file:
        file.seek(undo.place)
        file.write(bytes(undo.length))
        for place, data in unpack_blocks(image.path, undo.blocks):
            if place + len(data) > image.size:
                raise make_change(image.path, DAMAGED)
            file.seek(place)
            file.write(data)
        file.truncate(undo.record.size)
    if digest_file(draft) != undo.record.sha256:
        raise make_change(image.path, "restored, it is not the file that `add` was given: it was changed since")
    return undo.record
