# SPDX-License-Identifier: Apache-2.0
"""What the parts of vfio-kata-image hand to each other: files of a guest, files of the add-on, the record of a change.

Paths in a guest have no leading slash: "opt/oci-vfio-hooks", as in a cpio or tar archive.
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROGRAM = "vfio-kata-image"
# Where the add-on is in a guest, and what this tool writes beside it.
HOME = "opt/oci-vfio-hooks"
RECORD = f"{HOME}/image.json"
MANIFEST = f"{HOME}/manifest.sha256"
HOOKS = "usr/share/oci/hooks"
HOOK_NAME = "vfio-guest-bind"
HOOK_FILES = (f"{HOOKS}/prestart/{HOOK_NAME}", f"{HOOKS}/poststop/{HOOK_NAME}")
SETTINGS = "etc/oci-vfio-hooks/guest.toml"
# Below these the add-on may have files, and nowhere else.
PLACES = (
    *(f"{HOME}/", f"{HOOKS}/prestart/", f"{HOOKS}/poststop/", "etc/oci-vfio-hooks/"),
    # What lets systemd declare the CDI specification before the agent starts.
    "usr/lib/systemd/system/kata-agent.service.d/oci-vfio-",
)
RECORD_VERSION = 1


class Node(Frozen):
    """A name in the guest's tree. kind: "file", "directory", "link" or "other"; target: of a link."""

    kind: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    target: str = ""


class AddonFile(Frozen):
    """A regular file to put into a guest, owned by root. mode: permission bits; mtime: seconds since 1970."""

    path: str
    mode: int
    mtime: int
    data: bytes


class Addon(Frozen):
    """The add-on's files by path, with its version ("" if it names none) and the SHA-256 of its manifest."""

    files: tuple[AddonFile, ...]
    version: str
    manifest: str

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(len(file.data) for file in self.files)

    @property
    def mtime(self) -> int:
        """Return the time of the newest file: what is written into an image has this time, not that of the run."""
        return max((file.mtime for file in self.files), default=0)


class Record(Frozen):
    """What was done to an image. It is in the guest at RECORD, for `show` and `remove`.

    tool: version of this tool; addon: version; manifest: SHA-256 of the add-on's manifest; settings: whether guest.toml
    was put in; size, sha256: of the image as it was before; archive_size, archive_sha256: of an initrd's last archive.
    """

    tool: str
    addon: str
    manifest: str
    settings: bool
    size: int
    sha256: str
    archive_size: int = 0
    archive_sha256: str = ""

    def as_document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {"made_by": PROGRAM, "version": RECORD_VERSION, **self.as_dict()}


def list_parents(paths: tuple[str, ...]) -> list[str]:
    """Return every directory above these paths, a parent before what is in it."""
    parents = {path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)}
    return sorted(parents)
