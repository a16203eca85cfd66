# SPDX-License-Identifier: Apache-2.0
"""Read processes: their names, parents, children and open files; and the status of a group from the kernel.

The only part of the host hook that opens a device: for the duration of one ioctl, because a group that one process has
open is busy for every other.
"""

from __future__ import annotations

import errno
import fcntl
import os

from oci_hooks.frozen import Frozen
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root

# _IO(VFIO_TYPE, VFIO_BASE + 3) of linux/vfio.h
VFIO_GROUP_GET_STATUS = 0x3B67
VFIO_GROUP_FLAGS_VIABLE = 1


class Process(Frozen):
    """A process. pid: as this process sees it; name: of its executable; arguments: its command line."""

    tag = "process"

    pid: int
    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


def read_group_status(root: Root, node: str) -> str:
    """Return the status of a group, by opening its node for a moment.

    node: path of the group's node. Returns "viable", "not-viable", "busy", "denied", "missing", or "unknown" if the
    kernel gave no answer.
    """
    return root.ask(open_group_node, node)


@tagged("group-status")
def open_group_node(path: str) -> str:
    """Return the status of the group whose node is at this path; words as in read_group_status."""
    import struct

    words = {
        errno.EBUSY: "busy",
        errno.EACCES: "denied",
        errno.EPERM: "denied",
        errno.ENOENT: "missing",
        errno.ENXIO: "missing",
        errno.ENODEV: "missing",
    }
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        return words.get(error.errno or 0, "unknown")
    try:
        # struct vfio_group_status: argsz, flags
        answer = fcntl.ioctl(fd, VFIO_GROUP_GET_STATUS, struct.pack("=II", 8, 0))
    except OSError:
        return "unknown"
    finally:
        os.close(fd)
    return "viable" if struct.unpack("=II", answer)[1] & VFIO_GROUP_FLAGS_VIABLE else "not-viable"


def list_family(root: Root, pid: int) -> tuple[int, ...]:
    """Return a process and its children; a thread's id stands for its process. Empty for 0.

    Source: proc(5), /proc/PID/task/TID/children, which some kernels lack (CONFIG_PROC_CHILDREN).
    """
    if pid <= 0:
        return ()
    top = read_status(root, pid, "Tgid") or pid
    words = [
        word
        for thread in root.list_names(f"/proc/{top}/task")
        for word in root.read_text_or(f"/proc/{top}/task/{thread}/children", "").split()
    ]
    return (top, *(int(word) for word in words if word.isdigit()))


def find_descriptors(location: str) -> tuple[str, list[str]]:
    """Return the directory that has a process's descriptors, and their names. Raises OSError.

    location: its directory in /proc. A process whose first thread has ended shows its files only in the directories of
    its other threads.
    """
    directory = f"{location}/fd"
    names = os.listdir(directory)
    if names:
        return directory, names
    threads = os.listdir(f"{location}/task")
    for thread in threads if len(threads) > 1 else ():
        names = os.listdir(f"{location}/task/{thread}/fd")
        if names:
            return f"{location}/task/{thread}/fd", names
    return directory, []


def read_process(root: Root, pid: int) -> Process:
    """Return a process with its name and arguments; one that is gone has no name."""
    try:
        text = root.read_bytes(f"/proc/{pid}/cmdline").decode("utf-8", "surrogateescape")
    except OSError:
        text = ""
    arguments = tuple(text.rstrip("\0").split("\0")) if text else ()
    return Process(pid, read_program(root, pid), arguments)


def read_program(root: Root, pid: int) -> str:
    """Return the name of a process's program, "" if it is gone.

    Not from its command line, which is in its own memory: reading a page there may block for ever (FUSE, userfaultfd).
    """
    executable = root.read_link_name(f"/proc/{pid}/exe").replace(" (deleted)", "")
    return executable or root.read_text_or(f"/proc/{pid}/comm", "").rstrip("\n")


def read_status(root: Root, pid: int, key: str) -> int:
    """Return a number from /proc/PID/status, e.g. "PPid" or "Tgid"; 0 without one."""
    # Not splitlines(): a process's own name may contain characters that would start a line of their own.
    for line in root.read_text_or(f"/proc/{pid}/status", "").split("\n"):
        name, _, value = line.partition(":")
        if name == key and value.strip().isdigit():
            return int(value)
    return 0


def list_process_ancestors(root: Root, pid: int) -> tuple[int, ...]:
    """Return a process, its parent and so on up to init; a thread's id stands for its process."""
    chain: list[int] = []
    current = read_status(root, pid, "Tgid") or pid
    while current > 1 and current not in chain:
        chain.append(current)
        current = read_status(root, current, "PPid")
    return tuple(chain)


def read_environment(root: Root, pid: int, name: str) -> str:
    """Return a variable of the environment that a process was started with; "" without it."""
    try:
        data = root.read_bytes(f"/proc/{pid}/environ")
    except OSError:
        return ""
    for entry in data.decode("utf-8", "surrogateescape").split("\0"):
        key, _, value = entry.partition("=")
        if key == name:
            return value
    return ""


def read_start_time(root: Root, pid: int) -> int:
    """Return the start time of a process, in clock ticks since boot; 0 if it is gone or a zombie (proc(5), stat)."""
    # The name in parentheses may contain any character.
    fields = root.read_text_or(f"/proc/{pid}/stat", "").rpartition(")")[2].split()
    known = len(fields) > 19 and fields[19].isdecimal() and fields[0] not in ("Z", "X", "x")
    return int(fields[19]) if known else 0
