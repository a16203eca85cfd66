# SPDX-License-Identifier: Apache-2.0
"""Find the processes that have device nodes, or the memory of PCI functions, open or mapped. Changes nothing.

Source: proc(5).
"""

from __future__ import annotations

import os
import stat
import time

from oci_hooks.linux.pci import PCI_DEVICES
from oci_hooks.linux.processes import find_descriptors
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# Depth of the scan of processes: descriptors; also mapped memory of PCI functions; all mappings.
DESCRIPTORS, RESOURCES, MAPPINGS = range(3)
# Searched for in addition to device nodes: the memory and ports of a function.
RESOURCE = "/resource"
# Number of descriptors of one process after which the clock is checked again.
DESCRIPTORS_PER_SCAN = 256
# Number of links to a directory with a single one in it.
ONE_THREAD = 3


@tagged("list-openers")
def list_openers(proc: str, wanted: frozenset[str], depth: int, seconds: float) -> dict[str, Any]:
    """Return the processes that have nodes or resources open.

    open: [node ("char 4:64") or resource ("0000:01:00.0/resource0"), pid, "open" or "mapped"], without this process;
    looked, total: number of processes examined in time, and of all; hidden: number of those that may not be examined.
    proc: of /proc; wanted: nodes to look for. Raises OSError.
    """
    end = time.monotonic() + seconds
    pids = sorted(int(name) for name in os.listdir(proc) if name.isdigit())
    found: list[list[Any]] = []
    seen: dict[tuple[bytes, bytes], str] = {}
    looked, hidden, own = 0, 0, os.getpid()
    for pid in pids:
        if time.monotonic() >= end:
            break
        looked += 1
        if pid != own:
            try:
                things = set(list_open_nodes(f"{proc}/{pid}", depth, seen, end))
            except TimeoutError:
                looked -= 1
                break
            except PermissionError:
                hidden += 1
            except (FileNotFoundError, ProcessLookupError):
                # It has ended.
                continue
            else:
                found += [[key, pid, how] for key, how in sorted(things) if key in wanted or RESOURCE in key]
    return {"open": found, "looked": looked, "total": len(pids), "hidden": hidden}


def list_open_nodes(
    location: str, depth: int, seen: dict[tuple[bytes, bytes], str], end: float
) -> Iterator[tuple[str, str]]:
    """Yield a process's open or mapped nodes and resources. Raises OSError, TimeoutError.

    location: its directory; seen: mapped files known so far; end: the time, of time.monotonic(), at which to give up.
    """
    if has_no_files(location):
        return
    directory, names = find_descriptors(location)
    location = directory.rpartition("/")[0]
    for number, name in enumerate(names, 1):
        # One process may have a million of them.
        if not number % DESCRIPTORS_PER_SCAN and time.monotonic() >= end:
            raise TimeoutError
        key = name_open_file(f"{location}/fd/{name}", depth)
        if key:
            yield key, "open"
    if depth >= RESOURCES:
        with open(f"{location}/maps", "rb") as file:
            text = file.read()
        if depth >= MAPPINGS or RESOURCE.encode() in text:
            for key in list_mapped(location, text, seen):
                yield key, "mapped"


def has_no_files(location: str) -> bool:
    """Return whether a process is a kernel thread, as half of all are, or has ended. Raises OSError.

    Two questions take a third of what listings take: it has no program (fs/proc/base.c, proc_exe_link), which is true
    of a process whose first thread has ended, too, and one thread, which the number of links shows (proc_task_getattr).
    """
    try:
        os.readlink(f"{location}/exe")
    except FileNotFoundError:
        return os.stat(f"{location}/task").st_nlink == ONE_THREAD
    except OSError:
        # It may have files that this process may not examine.
        return False
    return False


def name_open_file(path: str, depth: int) -> str:
    """Return the node or resource of a descriptor; "" for anything else. path: of the link in /proc.

    Raises PermissionError if this process may not examine it.
    """
    try:
        # By its number: a node may have any name, in any mount namespace.
        status = os.stat(path)
        location = path.rpartition("/fd/")[0]
        if depth >= RESOURCES and stat.S_ISREG(status.st_mode):
            return name_resource(location, os.readlink(path), status.st_ino, name_device(status.st_dev))
    except PermissionError:
        # A readable link means that only the file system (FUSE) refuses; no node is on one.
        os.readlink(path)
        return ""
    except OSError:
        # Closed meanwhile, or a file that does not support stat(); a node always does.
        return ""
    return name_number(status)


def name_number(status: os.stat_result) -> str:
    """Return "char 4:64" or "block 8:0" of a device node, "" for anything else."""
    kind = "char" if stat.S_ISCHR(status.st_mode) else "block" if stat.S_ISBLK(status.st_mode) else ""
    return f"{kind} {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if kind else ""


def name_device(device: int) -> str:
    """Return the number of a file system as mountinfo writes it, "0:22"."""
    return f"{os.major(device)}:{os.minor(device)}"


def name_resource(location: str, path: str, inode: int, device: str) -> str:
    """Return "0000:01:00.0/resource0" for an open file of sysfs, "" for anything else.

    location: the process's directory in /proc; path: the file's name for the process; inode, device: the file's, as
    from name_device. Any process may have a file with such a name: it counts only if it is the kernel's, whose inode
    number is the same in each network namespace's sysfs.
    """
    above, found, number = path.rpartition(RESOURCE)
    # The file `resource`, without a number, is a list that lspci reads.
    if not number or "/devices/" not in above:
        return ""
    name = f"{above.rpartition('/')[2]}{found}{number}"
    try:
        real = os.stat(f"{location.rpartition('/proc/')[0]}{PCI_DEVICES}/{name}")
    except (OSError, ValueError):
        return ""
    return name if real.st_ino == inode and may_be_sysfs(location, device) else ""


def may_be_sysfs(location: str, device: str) -> bool:
    """Return whether a file system is sysfs, or may be because the process's mounts do not show it."""
    number = device.encode()
    try:
        with open(f"{location}/mountinfo", "rb") as file:
            lines = [line.split(b" ") for line in file.read().split(b"\n")]
    except OSError:
        # If it is unknown, assume that it is sysfs.
        return True
    # proc(5): the type of the file system comes after a field "-".
    kinds = {line[line.index(b"-") + 1] for line in lines if line[2:3] == [number] and b"-" in line}
    return not kinds or kinds == {b"sysfs"}


def list_mapped(location: str, text: bytes, seen: dict[tuple[bytes, bytes], str]) -> Iterator[str]:
    """Yield nodes and resources that a process has mapped. text: its maps; seen: device and inode -> what it is."""
    for line in text.split(b"\n"):
        # Addresses, permissions, offset, file system's number, inode, path.
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5].startswith(b"/"):
            file = (fields[3], fields[4])
            if file not in seen:
                seen[file] = name_mapped(location, fields)
            if seen[file]:
                yield seen[file]


def name_mapped(location: str, fields: list[bytes]) -> str:
    """Return the node or resource behind one mapping, "" for anything else. fields: of its line in maps."""
    name = os.fsdecode(fields[5])
    first, _, last = os.fsdecode(fields[0]).partition("-")
    # The file itself; if that requires a missing privilege, the file that has its name now.
    for file in (f"{location}/map_files/{first.lstrip('0')}-{last.lstrip('0')}", f"{location}/root{name}"):
        try:
            number = name_number(os.stat(file))
        except (OSError, ValueError):
            continue
        if number:
            return number
        break
    try:
        major, minor = (int(word, 16) for word in fields[3].split(b":"))
        return name_resource(location, name, int(fields[4]), f"{major}:{minor}")
    except ValueError:
        return ""
