# SPDX-License-Identifier: Apache-2.0
"""A host made of files: its PCI devices, IOMMU groups, VFIO nodes, processes and Kata's files, for tests to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oci_hooks.system import Root

VFIO_MAJOR = 237


class HostTree:
    """A host below a directory. Addresses and links are as a live sysfs has them."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = Root(str(top))
        for directory in ("proc", "sys/kernel/iommu_groups", "sys/bus/pci/devices", "sys/class", "dev/vfio"):
            (top / directory).mkdir(parents=True, exist_ok=True)

    def write(self, path: str, content: str | bytes = "") -> Path:
        """Write a file and the directories above it."""
        location = self.top / path.lstrip("/")
        location.parent.mkdir(parents=True, exist_ok=True)
        location.write_bytes(content.encode() if isinstance(content, str) else content)
        return location

    def link(self, path: str, target: str) -> None:
        """Create a symbolic link; an absolute target is in this tree."""
        location = self.top / path.lstrip("/")
        location.parent.mkdir(parents=True, exist_ok=True)
        location.symlink_to(str(self.top) + target if target.startswith("/") else target)

    def pci(
        self, address: str, driver: str = "", group: str = "", class_code: str = "020000", vfio_dev: str = ""
    ) -> None:
        """Add a PCI function. vfio_dev: name of its own VFIO node, e.g. "vfio0"."""
        real = f"/sys/devices/pci0000:00/{address}"
        self.write(
            f"{real}/uevent",
            (f"DRIVER={driver}\n" if driver else "")
            + f"PCI_CLASS={class_code.lstrip('0').upper()}\nPCI_ID=8086:10D3\n",
        )
        self.link(f"/sys/bus/pci/devices/{address}", f"../../../devices/pci0000:00/{address}")
        if driver:
            self.write(f"/sys/bus/pci/drivers/{driver}/uevent")
            self.link(f"{real}/driver", f"/sys/bus/pci/drivers/{driver}")
        if group:
            self.link(f"{real}/iommu_group", f"/sys/kernel/iommu_groups/{group}")
            self.link(f"/sys/kernel/iommu_groups/{group}/devices/{address}", real)
        if vfio_dev:
            self.write(f"{real}/vfio-dev/{vfio_dev}/dev", f"511:{vfio_dev[4:]}\n")
            self.link(f"{real}/vfio-dev/{vfio_dev}/device", real)
            self.link(f"/sys/class/vfio-dev/{vfio_dev}", f"{real}/vfio-dev/{vfio_dev}")
            self.link(f"/sys/dev/char/511:{vfio_dev[4:]}", f"../..{real[len('/sys') :]}/vfio-dev/{vfio_dev}")

    def mdev(
        self, uuid: str, group: str, parent: str = "/sys/devices/pci0000:00/0000:00:02.0", driver: str = ""
    ) -> None:
        """Add a mediated device below its parent device."""
        real = f"{parent}/{uuid}"
        self.write(f"{real}/uevent")
        self.link(f"{real}/subsystem", "/sys/bus/mdev")
        if driver:
            self.link(f"{real}/driver", f"/sys/bus/mdev/drivers/{driver}")
        self.link(f"/sys/kernel/iommu_groups/{group}/devices/{uuid}", real)

    def vfio(self, group: str, minor: int) -> tuple[int, int]:
        """Give a group its VFIO node and return the node's numbers. It is a plain file: no kernel answers there."""
        self.write(f"/sys/class/vfio/{group}/dev", f"{VFIO_MAJOR}:{minor}\n")
        self.link(f"/sys/dev/char/{VFIO_MAJOR}:{minor}", f"../../devices/virtual/vfio/{group}")
        self.write(f"/dev/vfio/{group}")
        self.write("/sys/class/misc/vfio/dev", "10:196\n")
        return VFIO_MAJOR, minor

    def process(
        self, pid: int, *arguments: str, parent: int = 1, opened: tuple[str, ...] = (), environment: str = ""
    ) -> None:
        """Add a process. arguments: its command line, the first one its executable; opened: paths of descriptors."""
        self.write(f"/proc/{pid}/cmdline", "".join(f"{word}\0" for word in arguments))
        self.write(f"/proc/{pid}/status", f"Name:\tx\nTgid:\t{pid}\nPPid:\t{parent}\n")
        self.write(f"/proc/{pid}/environ", environment)
        self.write(f"/proc/{pid}/task/{pid}/children")
        if (self.top / f"proc/{parent}/task/{parent}/children").exists():
            known = (self.top / f"proc/{parent}/task/{parent}/children").read_text()
            self.write(f"/proc/{parent}/task/{parent}/children", f"{known}{pid} ")
        (self.top / f"proc/{pid}/exe").symlink_to(arguments[0])
        for number, path in enumerate(opened, 3):
            location = self.top / f"proc/{pid}/fd/{number}"
            location.parent.mkdir(parents=True, exist_ok=True)
            location.symlink_to(path)

    def thread(self, tid: int, pid: int) -> None:
        """Add the id of a thread, as /proc shows it when asked by name."""
        self.write(f"/proc/{tid}/status", f"Name:\tx\nTgid:\t{pid}\nPPid:\t1\n")


def fill_host(tree: HostTree, devices: int, members: int, ours: int) -> list[tuple[str, int, int]]:
    """Give a host PCI functions in groups of so many members, and return the nodes of the groups that vfio-pci has.

    ours: number of these groups, the first ones; the others have a driver of the host's.
    """
    for number in range(devices):
        address = f"0000:{number >> 5:02x}:{number & 31:02x}.0"
        group = number // members
        tree.pci(address, driver="vfio-pci" if group < ours else "e1000e", group=str(group))
    return [(f"/dev/vfio/{group}", *tree.vfio(str(group), group)) for group in range(ours)]


def make_state(pid: int = 0, status: str = "creating", annotations: dict[str, str] | None = None) -> Any:
    """Return the state of a container whose id is c1."""
    from oci_hooks.oci import State

    return State("c1", "/run/b", pid, status, annotations or {})


def make_spec(*entries: tuple[str, int, int], annotations: dict[str, str] | None = None, **parts: Any) -> Any:
    """Return a config.json's content. entries: path, major and minor of devices; parts: top-level members."""
    from oci_hooks import oci

    devices = [{"path": path, "type": "c", "major": major, "minor": minor} for path, major, minor in entries]
    document: dict[str, Any] = {"ociVersion": "1.0.2", **parts}
    document["linux"] = {"devices": devices, **parts.get("linux", {})}
    document["annotations"] = annotations or {}
    return oci.make_spec(document, "/run/b/config.json")


def codes(findings: Any) -> list[str]:
    """Return findings as `level code`, for comparisons."""
    return [f"{finding.level} {finding.code}" for finding in findings]
