# SPDX-License-Identifier: Apache-2.0
"""The add-on's manifest, and its archive: the same bytes for the same tree."""

from __future__ import annotations

import hashlib
import lzma
import os
import tarfile
from pathlib import Path

MANIFEST = "opt/oci-vfio-hooks/manifest.sha256"


def list_files(root: Path) -> list[Path]:
    """Return all files of a tree, by name."""
    return sorted(path for path in root.rglob("*") if not path.is_dir())


def write_manifest(root: Path) -> None:
    """Write the sums of all files, as `cd /; sha256sum -c` reads them."""
    lines = []
    for path in list_files(root):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{digest}  {path.relative_to(root)}\n")
    (root / MANIFEST).write_text("".join(lines))
    (root / MANIFEST).chmod(0o644)


def set_times(root: Path, epoch: int) -> None:
    """Give everything in a tree the same time, in seconds."""
    for path in (root, *root.rglob("*")):
        os.utime(path, (epoch, epoch))


def write_archive(root: Path, target: Path, epoch: int) -> None:
    """Write an archive of a tree, all of root's, with the directories that are the add-on's own.

    /usr and what is below may be a link in an image, or have another mode. xz, because tar on every machine that builds
    guest images unpacks it, and so does Python.
    """

    def clean(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mtime = epoch
        return member

    own = root / MANIFEST.rpartition("/")[0]
    directories = [own, *(path for path in own.rglob("*") if path.is_dir())]
    with (
        lzma.open(target, "wb") as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path in sorted([*directories, *list_files(root)]):
            archive.add(path, str(path.relative_to(root)), recursive=False, filter=clean)
