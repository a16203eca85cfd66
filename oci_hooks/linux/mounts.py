# SPDX-License-Identifier: Apache-2.0
"""Read the mounts of a process. Source: proc(5), /proc/<pid>/mountinfo."""

from __future__ import annotations

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root


class Mount(Frozen):
    """One line of mountinfo.

    number: "major:minor" of the file system, an anonymous one for btrfs, overlay and the like; top: the mounted
    directory of the file system; point: mount point; kind: type of file system; source: as the mounting program named
    it; options: of the file system itself.
    """

    number: str
    top: str
    point: str
    kind: str
    source: str
    options: tuple[str, ...]


def read_mounts(root: Root, having: str = "") -> list[Mount]:
    """Return the mounts in this process's namespace, in the order in which they were made. Raises OSError.

    having: text that a line must contain to be parsed: parsing a hundred lines takes as long as a step of the hook.
    """
    return parse_mounts(root.read_text("/proc/self/mountinfo"), having)


def parse_mounts(text: str, having: str = "") -> list[Mount]:
    """Return the mounts of a mountinfo file (proc(5))."""
    mounts = []
    # The kernel escapes a line feed in a path, but none of the other characters at which splitlines() splits.
    for line in text.split("\n"):
        if having not in line:
            continue
        # A variable number of optional fields ends with a single dash.
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
    """Return the text after a backslash with its three octal digits as a character; unchanged without these digits."""
    digits = part[:3]
    if len(digits) == 3 and all(digit in "01234567" for digit in digits):
        return chr(int(digits, 8)) + part[3:]
    return f"\\{part}"
