# SPDX-License-Identifier: Apache-2.0
"""Find the device nodes below a PCI function, and the processes that have them open or mapped. Changes nothing.

The kernel lists all nodes (/sys/dev, Documentation/ABI/testing/sysfs-dev); there is no list of classes here, so a
device of any class is in use as soon as a process has its node open. Processes: proc(5).
"""

from __future__ import annotations

import os
import stat
import time

from oci_hooks.linux.pci import PCI_DEVICES
from oci_hooks.linux.processes import Process, find_descriptors, read_program, read_status
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from oci_hooks.linux.pci import PciDevice
    from oci_hooks.system import Deadline, Root

SYS_DEV = "/sys/dev"
# Virtual devices are below no function; NVMe namespaces that several controllers share are an exception.
VIRTUAL, SHARED = "/devices/virtual/", "/devices/virtual/nvme-subsystem/"
# VFIO's own nodes: claims show their owners, and the kernel gives each to one process only.
VFIO_NODES = "/vfio-dev/"
# Nodes of these classes cannot be mapped (kernel: no mmap in their file_operations). A mapping outlives its descriptor.
MAPLESS_CLASSES = ("ptp", "tty", "nvme")
# Without a driver, or with one that leaves the device to programs, sysfs allows mapping its memory (sysfs-pci.rst).
RAW_DRIVERS = ("", "uio_pci_generic", "igb_uio", "pci-stub")
# udev opens each new node to identify the device. The hook may take a device from it.
UDEV_NAMES = ("systemd-udevd", "udevd", "udevadm")
# Depth of the scan of processes: descriptors; also mapped memory of PCI functions; all mappings.
DESCRIPTORS, RESOURCES, MAPPINGS = range(3)
# Number of descriptors of one process after which the clock is checked again.
DESCRIPTORS_PER_SCAN = 256
# Searched for in addition to device nodes: the memory and ports of a function.
RESOURCE = "/resource"


def read_nodes(root: Root) -> dict[str, str]:
    """Return "char 4:64" -> the device's path below /sys, links resolved, for all nodes that a function may have.

    Raises OSError. Empty if a recording of an earlier version has no answer.
    """
    try:
        return root.ask(list_nodes, SYS_DEV)
    except FileNotFoundError:
        return {}


@tagged("list-nodes")
def list_nodes(path: str) -> dict[str, str]:
    """Return the result of read_nodes. path: of /sys/dev. Raises OSError."""
    nodes = {}
    for kind in ("block", "char"):
        for number in os.listdir(f"{path}/{kind}"):
            try:
                target = os.readlink(f"{path}/{kind}/{number}")
            except FileNotFoundError:
                # Unplugged meanwhile.
                continue
            if VIRTUAL not in target or SHARED in target:
                nodes[f"{kind} {number}"] = "/sys/" + target.lstrip("./")
    return nodes


class Openers:
    """The processes that have device nodes open. Scanned when first needed, once for all functions.

    nodes: as from read_nodes; deadline: of the run; the scan may take half of the remaining time.
    """

    def __init__(self, root: Root, nodes: dict[str, str], deadline: Deadline) -> None:
        self.root = root
        self.nodes = nodes
        self.deadline = deadline
        self.answers: dict[int, dict[str, Any]] = {}

    def find(self, device: PciDevice, above: tuple[str, ...]) -> list[str]:
        """Return descriptions of a function's nodes that are open, to follow its address. Raises OSError.

        above: the directories below which its nodes are.
        """
        own = {key: path for key, path in self.nodes.items() if path.startswith(above) and VFIO_NODES not in path}
        consoles = find_consoles(self.root, own)
        if consoles:
            return consoles
        raw = device.driver in RAW_DRIVERS
        if not own and not raw:
            return []
        answer = self.scan(choose_depth(own, raw))
        things = {key: f"holds {name_node(self.root, path)}" for key, path in own.items()}
        for key, _, _ in answer["open"]:
            if key.startswith(f"{device.address}{RESOURCE}"):
                things[key] = f"holds the PCI resource {key.rpartition('/')[2]}"
        return self.describe(things, answer) or describe_unseen(
            list(things.values()) or ["holds PCI resources"], answer
        )

    def scan(self, depth: int) -> dict[str, Any]:
        """Return the result of list_openers, at this depth or more. Raises OSError."""
        known = next((answer for level, answer in self.answers.items() if level >= depth), None)
        if known is None:
            seconds = self.deadline.remaining() / 2
            try:
                known = self.root.ask(list_openers, "/proc", frozenset(self.nodes), depth, seconds)
            except FileNotFoundError:
                # A recording of an earlier version. On a live system mounts were read from /proc before.
                known = {"open": [], "looked": 0, "total": 0, "hidden": 0}
            self.answers[depth] = known
        return known

    def describe(self, things: dict[str, str], answer: dict[str, Any]) -> list[str]:
        """Return descriptions of the open things with their users. things: key -> description."""
        reasons = []
        for key, words in things.items():
            for how in ("open", "mapped"):
                pids = [pid for thing, pid, manner in answer["open"] if (thing, manner) == (key, how)]
                users = [user for user in (read_user(self.root, pid) for pid in pids) if user]
                if users:
                    verb = "has" if len(users) == 1 else "have"
                    reasons.append(f"{words}, which {', '.join(str(user) for user in users)} {verb} {how}")
                    # A process that has it open may have it mapped, too: report it once.
                    break
        return reasons


def choose_depth(own: dict[str, str], raw: bool) -> int:
    """Return the depth of the scan that these nodes need. raw: whether sysfs allows mapping the device's memory."""
    classes = {path.split("/")[-2] for path in own.values()}
    if classes - set(MAPLESS_CLASSES):
        return MAPPINGS
    return RESOURCES if raw else DESCRIPTORS


def describe_unseen(things: list[str], answer: dict[str, Any]) -> list[str]:
    """Return that things may be open, if not every process could be examined; else nothing."""
    looked, total, hidden = answer["looked"], answer["total"], answer["hidden"]
    if looked < total:
        return [f"{things[0]}, which may be open: there was only time to check {looked} of {total} processes"]
    if hidden:
        return [
            f"{things[0]}, which may be open: the hook lacks the privilege to check {hidden} of {total} processes"
            " (CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH)"
        ]
    return []


def name_node(root: Root, path: str) -> str:
    """Return the path of a device's node in /dev, as its uevent names it."""
    for line in root.read_text_or(f"{path}/uevent", "").split("\n"):
        if line.startswith("DEVNAME="):
            return f"/dev/{line[len('DEVNAME=') :]}"
    return f"/dev/{path.rpartition('/')[2].replace('!', '/')}"


def find_consoles(root: Root, own: dict[str, str]) -> list[str]:
    """Return descriptions of a function's nodes that are kernel consoles: processes have these open as /dev/console.

    Sources: proc(5), /proc/consoles; Documentation/ABI/testing/sysfs-tty, console/active.
    """
    if not any("/tty/" in path for path in own.values()):
        return []
    lines = root.read_text_or("/proc/consoles", "").split("\n")
    numbers = {f"char {line.split()[-1]}" for line in lines if line.split()}
    names = root.read_text_or("/sys/class/tty/console/active", "").split()
    return [
        f"holds {name_node(root, path)}, which is a kernel console"
        for key, path in own.items()
        if key in numbers or path.rpartition("/")[2] in names
    ]


def read_user(root: Root, pid: int) -> Process | None:
    """Return a process that uses a device; None if it is udev, which probes devices, or gone by now."""
    name = read_program(root, pid)
    if not name or name in UDEV_NAMES:
        return None
    # udev's programs (RUN, PROGRAM in its rules) are children of a worker.
    parent = read_status(root, pid, "PPid")
    return None if parent > 1 and read_program(root, parent) in UDEV_NAMES else Process(pid, name, ())


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
