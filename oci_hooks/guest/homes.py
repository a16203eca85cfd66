# SPDX-License-Identifier: Apache-2.0
"""Find a container's own cgroups, as its claim records them, and check whether a process is left in them.

A container may outlive its init: in a shared pid namespace (a Kubernetes pod with shareProcessNamespace, `--pid host`)
the kernel does not kill the other processes with it.
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.linux.pci import read_inode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from oci_hooks.system import Root

# Maximum number of directories examined below a cgroup. A container may have created any number of them.
MAX_DIRECTORIES = 1000


class Home(Frozen):
    """The cgroups that belong to one container alone.

    unified, devices: directories of the version 2 hierarchy and of the version 1 devices hierarchy, each "" if there is
    none or if others share it; unified_inode, devices_inode: the inode numbers of these directories, 0 if unknown.
    """

    tag = "home"

    unified: str = ""
    unified_inode: int = 0
    devices: str = ""
    devices_inode: int = 0


def find_home(root: Root, pid: int) -> Home:
    """Return the cgroups of a container. pid: its init. Raises StepError if they cannot be found."""
    from oci_hooks.guest.apply import cgroup

    location = cgroup.find_cgroup(root, pid)
    unified, devices = (path if path not in location.shared else "" for path in (location.unified, location.devices))
    unified_inode, devices_inode = (read_inode(root, path) if path else 0 for path in (unified, devices))
    return Home(unified, unified_inode, devices, devices_inode)


def is_occupied(root: Root, home: Home) -> bool:
    """Return whether any process is left in a container's cgroups, or below them."""
    locations = ((home.unified, home.unified_inode), (home.devices, home.devices_inode))
    return any(path and has_process(root, path, inode) for path, inode in locations)


def has_process(root: Root, path: str, inode: int) -> bool:
    """Return whether any process is in a cgroup or below it. inode: its own; another inode is a later cgroup."""
    try:
        found = root.stat(path).st_ino
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        # It exists. If it cannot be read, assume that it is occupied.
        return True
    if inode not in (0, found):
        return False
    # Documentation/admin-guide/cgroup-v2.rst, "[Un]populated Notification": of the cgroup and all below it.
    events = root.read_text_or(f"{path}/cgroup.events", "").split("\n")
    if "populated 0" in events or "populated 1" in events:
        return "populated 1" in events
    return any(True for _ in list_processes(root, path))


def list_processes(root: Root, path: str) -> Iterator[int]:
    """Yield the processes in a cgroup and below it; at last 0 if there may be more.

    A container may create more cgroups below its own than this examines.
    """
    waiting, looked = [path], 0
    while waiting:
        path = waiting.pop()
        looked += 1
        if looked > MAX_DIRECTORIES:
            yield 0
            return
        for word in root.read_text_or(f"{path}/cgroup.procs", "").split():
            yield int(word) if word.isdecimal() else 0
        below = (f"{path}/{name}" for name in root.list_names(path))
        waiting += [directory for directory in below if root.exists(f"{directory}/cgroup.procs")]
