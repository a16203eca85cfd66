# SPDX-License-Identifier: Apache-2.0
"""Write a copy of an initrd with the add-on behind it, or without it again."""

from __future__ import annotations

import hashlib

from oci_hooks.findings import StepError
from oci_hooks.kata_image.apply.output import append, copy_range
from oci_hooks.kata_image.compression import CPIO, compress
from oci_hooks.kata_image.initrd import find_appendix, make_appendix, make_archive, make_change, read_initrd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from oci_hooks.kata_image.initrd import Initrd
    from oci_hooks.kata_image.model import Addon, AddonFile, Record


def add_to_initrd(
    source: BinaryIO, initrd: Initrd, addon: Addon, settings: tuple[AddonFile, ...], draft: str, record: Record
) -> Record:
    """Write a copy with the add-on behind it, and return its record. record: without digests. Raises OSError."""
    # As the last archive is, for the kernel has a decompressor for that: Kata's own kernel knows gzip only.
    packed = compress(
        make_archive(initrd.tree, (*addon.files, *settings)), initrd.archives[-1].format if initrd.archives else CPIO
    )
    digest = copy_range(source, 0, initrd.size, draft)
    whole = record.replace(
        size=initrd.size, sha256=digest, archive_size=len(packed), archive_sha256=hashlib.sha256(packed).hexdigest()
    )
    append(draft, [make_appendix(initrd, addon, settings, whole, packed)])
    return whole


def verify_initrd(draft: str, addon: Addon, settings: tuple[AddonFile, ...]) -> None:
    """Read the new initrd as the kernel does. Raises StepError [not-written] unless each file is in it."""
    with open(draft, "rb") as file:
        tree = read_initrd(file).tree
    for each in (*addon.files, *settings):
        node = tree.look_up(each.path)
        if node is None or (node.kind, node.mode, node.uid, node.gid, node.size) != (
            "file",
            each.mode,
            0,
            0,
            len(each.data),
        ):
            raise StepError("not-written", each.path, "is not in the new initrd as it should be", "report this")


def remove_from_initrd(source: BinaryIO, draft: str) -> Record:
    """Write a copy without the add-on, the original's bytes. Raises InputError [not-added] or [image-changed]."""
    record = find_appendix(source)
    if copy_range(source, 0, record.size, draft) != record.sha256:
        raise make_change(source.name, "without the add-on, it is not the file that `add` was given")
    return record
