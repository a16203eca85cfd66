# SPDX-License-Identifier: Apache-2.0
"""Read the mounts of a process. Source: proc(5), /proc/<pid>/mountinfo."""

from __future__ import annotations

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root


class Mount(Frozen):
    """One line of mountinfo.

    number: "major:minor" of the file system, an anonymous one for btrfs, overlay and the like; top: the directory of
    the file system that is mounted; point: where; kind: of file system; source: as its mounter named it; options: of
    the file system itself.
    """

    number: str
    top: str
    point: str
    kind: str
    source: str
    options: tuple[str, ...]


def read_mounts(root: Root, having: str = "") -> list[Mount]:
    """Return the mounts in this process's namespace, in the order in which they were made. Raises OSError.

    having: what a line must hold to be looked at; to parse a hundred takes as long as many a step.
    """
    return parse_mounts(root.read_text("/proc/self/mountinfo"), having)


def parse_mounts(text: str, having: str = "") -> list[Mount]:
    """Return the mounts of a mountinfo file (proc(5))."""
    mounts = []
    # The kernel escapes a line feed in a path, but no other character that splitlines() would end a line at.
    for line in text.split("\n"):
        if having not in line:
            continue
        # A number of optional fields ends with a lone dash.
        location, _, rest = line.partition(" - ")
        fields, types = location.split(" "), rest.split(" ")
        if len(fields) >= 5 and len(types) >= 3:
            top, point = unescape(fields[3]), unescape(fields[4])
            mounts.append(Mount(fields[2], top, point, types[0], unescape(types[1]), tuple(types[2].split(","))))
    return mounts


def unescape(field: str) -> str:
    r"""Return a field of mountinfo or of /proc/swaps with its \040 and the like as characters."""
    first, *rest = field.split("\\")
    return first + "".join(unescape_part(part) for part in rest)


def unescape_part(part: str) -> str:
    """Return what stands behind a backslash with its three octal digits as a character; as it is without these."""
    digits = part[:3]
    if len(digits) == 3 and all(digit in "01234567" for digit in digits):
        return chr(int(digits, 8)) + part[3:]
    return f"\\{part}"
