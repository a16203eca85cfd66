# SPDX-License-Identifier: Apache-2.0
"""Find the device nodes below a PCI function, and describe the processes that have them open. Changes nothing.

The kernel lists all nodes (/sys/dev, Documentation/ABI/testing/sysfs-dev); there is no list of classes here, so a
device of any class is in use as soon as a process has its node open. open_files.py examines the processes.
"""

from __future__ import annotations

import os

from oci_hooks.linux.open_files import DESCRIPTORS, MAPPINGS, RESOURCE, RESOURCES, list_openers
from oci_hooks.linux.processes import Process, read_program, read_status
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
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
