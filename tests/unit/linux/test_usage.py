# SPDX-License-Identifier: Apache-2.0
"""Guards: what is in use, in which words it is refused, and what is free although it looks busy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from oci_hooks.linux import block_devices, pci
from oci_hooks.linux.mounts import Mount, read_mounts
from oci_hooks.linux.usage import UsageFinder
from oci_hooks.system import Deadline, Root, name_tag

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.unit

NVME = "0000:01:00.0"
NIC = "0000:02:00.0"
BUS = "/sys/devices/pci0000:00"
ROOT_MOUNT = "22 1 0:21 / / rw - 9p root rw"


class FakeRoot(Root):
    """A made tree that also answers what only a kernel can."""

    def __init__(self, top: Path) -> None:
        super().__init__(str(top))
        self.network: list[list[str]] = []
        self.held: set[str] = set()

    def ask(self, question: Callable[..., Any], path: str, *more: object) -> Any:
        """Return the test's answer for the network, and the tree's for all else. Raises OSError."""
        return self.network if name_tag(question) == "network" else super().ask(question, path, *more)

    def is_exclusively_open(self, path: str) -> bool:
        """Return the test's answer."""
        return path in self.held


class Tree:
    """A system that grows: PCI functions, disks, interfaces, and what uses them."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = FakeRoot(top)
        self.mounts = [ROOT_MOUNT]
        self.minor = 0
        self.mount()

    def write(self, path: str, text: str = "") -> None:
        """Make a file and the directories above it."""
        location = self.top / path.lstrip("/")
        location.parent.mkdir(parents=True, exist_ok=True)
        location.write_text(text + "\n")

    def link(self, path: str, target: str) -> None:
        """Make a link as sysfs makes them: relative."""
        location = self.top / path.lstrip("/")
        location.parent.mkdir(parents=True, exist_ok=True)
        location.symlink_to(os.path.relpath(target, os.path.dirname(path)))

    def add_device(
        self, address: str, class_code: str, driver: str = "", ids: str = "8086:10D3", above: str = "0000:00:01.0"
    ) -> str:
        """Add a PCI function behind a root port, or on the root bus with above="", and return its path."""
        path = f"{BUS}/{above}/{address}" if above else f"{BUS}/{address}"
        self.write(f"{path}/uevent", f"DRIVER={driver}\nPCI_CLASS={class_code}\nPCI_ID={ids}")
        self.link(f"/sys/bus/pci/devices/{address}", path)
        return path

    def add_block(self, path: str) -> str:
        """Add a block device at this path and return its number."""
        self.minor += 1
        name = os.path.basename(path)
        self.write(f"{path}/dev", f"259:{self.minor}")
        (self.top / path.lstrip("/") / "holders").mkdir()
        self.link(f"/sys/class/block/{name}", path)
        self.write(f"/dev/{name.replace('!', '/')}")
        return f"259:{self.minor}"

    def add_volume(self, name: str, volume: str, uuid: str, *below: str) -> str:
        """Add a device-mapper volume over these block devices and return its number."""
        number = self.add_block(f"/sys/devices/virtual/block/{name}")
        if volume:
            self.write(f"/sys/devices/virtual/block/{name}/dm/name", volume)
            self.write(f"/sys/devices/virtual/block/{name}/dm/uuid", uuid)
        for path in below:
            self.link(f"{path}/holders/{name}", f"/sys/devices/virtual/block/{name}")
        return number

    def add_interface(self, path: str, flags: int = 0x1003, kind: int = 1) -> None:
        """Add a network interface at this path, with flags that mean up. kind: ARPHRD_*."""
        self.write(f"{path}/flags", hex(flags))
        self.write(f"{path}/type", str(kind))
        self.link(f"/sys/class/net/{os.path.basename(path)}", path)

    def mount(self, *lines: str, process: str = "self") -> None:
        """Add lines to a process's mountinfo."""
        self.write(f"/proc/{process}/mountinfo", "\n".join([ROOT_MOUNT, *lines]))

    def find(self, address: str) -> list[str]:
        """Return the uses of one function."""
        device = pci.read_device(self.root, address)
        assert device is not None
        return UsageFinder(self.root, Deadline(60)).find(device)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Return a system with nothing in it."""
    return Tree(tmp_path)


@pytest.fixture
def disk(tree: Tree) -> str:
    """Return the path of a disk nvme0n1 with partitions p1 and p2, of the function NVME."""
    path = f"{tree.add_device(NVME, '10802', 'nvme')}/nvme/nvme0/nvme0n1"
    tree.add_block(path)
    tree.add_block(f"{path}/nvme0n1p1")
    tree.add_block(f"{path}/nvme0n1p2")
    return path


# The machine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_code", "files", "uses"),
    [
        ("20000", {}, []),
        ("60400", {}, ["is a PCI-to-PCI bridge"]),
        ("60000", {}, ["is a chipset function (class 0600)"]),
        ("60100", {}, ["is a chipset function (class 0601)"]),
        ("68000", {}, ["is a chipset function (class 0680)"]),
        ("80600", {}, ["is an IOMMU"]),
        ("80000", {}, []),
        ("30000", {"boot_vga": "1"}, ["is the boot VGA device"]),
        ("30200", {"boot_vga": "1"}, ["is the boot VGA device"]),
        ("30000", {"boot_vga": "0"}, []),
        ("30000", {}, []),
        ("20000", {"boot_vga": "1"}, []),
        ("20000", {"sriov_numvfs": "0", "sriov_totalvfs": "8"}, []),
        ("20000", {"sriov_numvfs": "1"}, ["has 1 SR-IOV virtual function"]),
        ("20000", {"sriov_numvfs": "4"}, ["has 4 SR-IOV virtual functions"]),
    ],
)
def test_find_machine_uses_host(tree: Tree, class_code: str, files: dict[str, str], uses: list[str]) -> None:
    path = tree.add_device(NIC, class_code)
    for name, text in files.items():
        tree.write(f"{path}/{name}", text)
    assert tree.find(NIC) == uses


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ("virtio_console", "console"),
        ("vmw_vsock_virtio_transport", "vsock"),
        ("9pnet_virtio", "9p"),
        ("virtiofs", "virtiofs"),
        ("virtio_balloon", "balloon"),
        ("virtio_mem", "memory"),
        ("virtio_pmem", "persistent memory"),
        ("virtio_iommu", "IOMMU"),
        ("virtio_net", ""),
        ("virtio_blk", ""),
        ("virtio_scsi", ""),
        ("virtio_rng", ""),
        ("", ""),
    ],
)
def test_find_machine_uses_guest(tree: Tree, driver: str, words: str) -> None:
    path = tree.add_device(NIC, "ff00", "virtio-pci", "1AF4:1043")
    tree.write(f"{path}/virtio3/modalias")
    if driver:
        tree.link(f"{path}/virtio3/driver", f"/sys/bus/virtio/drivers/{driver}")
    uses = tree.find(NIC)
    assert (words in uses[0] and len(uses) == 1) if words else uses == []


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("disk")
def test_usage_unused_disk_free(tree: Tree) -> None:
    assert tree.find(NVME) == []


@pytest.mark.parametrize("process", ["self", "1"])
@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("40 22 259:1 / /mnt rw - ext4 /dev/nvme0n1 rw", "holds /dev/nvme0n1, mounted on /mnt"),
        ("40 22 259:3 /sub /mnt rw - ext4 /dev/nvme0n1p2 rw", "holds /dev/nvme0n1p2, mounted on /mnt"),
        ("40 22 259:2 / /a\\040b rw shared:1 master:2 - xfs /dev/root rw", "holds /dev/nvme0n1p1, mounted on /a b"),
        # btrfs has an anonymous number; only the source names the device.
        ("40 22 0:44 /@ /mnt rw - btrfs /dev/nvme0n1p1 rw", "holds /dev/nvme0n1p1, mounted on /mnt"),
        ("40 22 0:44 /@ /mnt rw - btrfs /dev/disk/by-label/data rw", "holds /dev/nvme0n1p2, mounted on /mnt"),
        ("40 22 0:44 / /mnt rw - overlay overlay rw,lowerdir=/dev/nvme0n1", ""),
        # A path may hold what is the end of a line to others than the kernel.
        ("40 22 259:2 / /a\x0cb rw - xfs /dev/root rw", "holds /dev/nvme0n1p1, mounted on /a\x0cb"),
        ("40 22 259:11 / /mnt rw - ext4 /dev/sda rw", ""),
        ("40 22 0:44 / /mnt rw - btrfs /dev/nvme0n10 rw", ""),
        ("40 22 0:44 / /mnt rw - tmpfs nvme0n1 rw", ""),
    ],
)
@pytest.mark.usefixtures("disk")
def test_usage_mounted_disk(tree: Tree, process: str, line: str, use: str) -> None:
    tree.link("/dev/disk/by-label/data", "/dev/nvme0n1p2")
    tree.mount(line, process=process)
    assert tree.find(NVME) == ([use] if use else [])


@pytest.mark.parametrize(
    ("swap", "use"),
    [
        ("/dev/nvme0n1p2", "holds /dev/nvme0n1p2, used as swap"),
        ("/dev/disk/by-label/swap", "holds /dev/nvme0n1p1, used as swap"),
        ("/swapfile", ""),
        ("/swap\x1cfile", ""),
        ("\x1d", ""),
        ("/dev/sda2", ""),
    ],
)
@pytest.mark.usefixtures("disk")
def test_usage_swap(tree: Tree, swap: str, use: str) -> None:
    tree.link("/dev/disk/by-label/swap", "/dev/nvme0n1p1")
    tree.write("/proc/swaps", f"Filename\tType\tSize\tUsed\tPriority\n{swap}   partition\t65532\t0\t-2")
    assert tree.find(NVME) == ([use] if use else [])


@pytest.mark.parametrize(
    ("name", "volume", "uuid", "what"),
    [
        ("dm-0", "vg-root", "LVM-oGWwHcXBEFkz", "LVM volume vg-root (dm-0)"),
        ("dm-0", "secret", "CRYPT-LUKS2-0815-secret", "dm-crypt volume secret (dm-0)"),
        ("dm-0", "mpatha", "mpath-3600140", "multipath device mpatha (dm-0)"),
        ("dm-0", "mpatha1", "part1-mpath-3600140", "partition mpatha1 (dm-0)"),
        ("dm-0", "linear", "", "device-mapper volume linear (dm-0)"),
        ("md127", "", "", "RAID array md127"),
        ("bcache0", "", "", "bcache0"),
    ],
)
def test_usage_disk_under_volume(tree: Tree, disk: str, name: str, volume: str, uuid: str, what: str) -> None:
    """An active volume is refused, mounted or not."""
    number = tree.add_volume(name, volume, uuid, f"{disk}/nvme0n1p2")
    assert tree.find(NVME) == [f"holds /dev/nvme0n1p2, part of {what}"]
    tree.mount(f"40 22 {number} / / rw - ext4 /dev/mapper/x rw")
    assert tree.find(NVME) == [f"holds /dev/nvme0n1p2, under {what}, mounted on /"]


def test_usage_stacked_volumes(tree: Tree, disk: str) -> None:
    tree.add_volume("md0", "", "", f"{disk}/nvme0n1p1", f"{disk}/nvme0n1p2")
    swap = tree.add_volume("dm-1", "vg-swap", "LVM-x", "/sys/devices/virtual/block/md0")
    tree.add_volume("dm-2", "vg-data", "LVM-y", "/sys/devices/virtual/block/md0")
    tree.write("/proc/swaps", "Filename\tType\n/dev/dm-1 partition")
    assert swap
    assert tree.find(NVME) == [
        f"holds /dev/nvme0n1{part}, {use}"
        for part in ("p1", "p2")
        for use in (
            "under RAID array md0, under LVM volume vg-swap (dm-1), used as swap",
            "under RAID array md0, part of LVM volume vg-data (dm-2)",
        )
    ]


def test_usage_loop_device_over_disk(tree: Tree, disk: str) -> None:
    """It holds nothing of the disk, in the kernel's eyes; whoever uses it uses the disk."""
    loop = "/sys/devices/virtual/block/loop0"
    number = tree.add_block(loop)
    tree.write(f"{loop}/loop/backing_file", "/dev/nvme0n1p2 (deleted)")
    tree.add_block("/sys/devices/virtual/block/loop1")
    assert disk
    assert tree.find(NVME) == ["holds /dev/nvme0n1p2, part of loop device loop0"]
    tree.mount(f"40 22 {number} / /mnt rw - ext4 /dev/loop0 rw")
    assert tree.find(NVME) == ["holds /dev/nvme0n1p2, under loop device loop0, mounted on /mnt"]


@pytest.mark.parametrize(("backing", "use"), [((259, 3), "part of loop device loop0"), ((0, 0), "")])
@pytest.mark.usefixtures("disk")
def test_usage_loop_backing_asked_from_kernel(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, backing: tuple[int, int], use: str
) -> None:
    """Its path may be another namespace's."""
    tree.add_block("/sys/devices/virtual/block/loop0")
    tree.write("/sys/devices/virtual/block/loop0/loop/backing_file", "/elsewhere/disk")
    asked: list[str] = []

    def ask_backing(path: str) -> int:
        asked.append(path)
        return os.makedev(*backing)

    monkeypatch.setattr(block_devices, "read_backing_device", ask_backing)
    assert tree.find(NVME) == ([f"holds /dev/nvme0n1p2, {use}"] if use else [])
    assert asked == [f"{tree.top}/dev/loop0"]


def test_usage_partitions_of_volumes(tree: Tree, disk: str) -> None:
    tree.add_volume("md0", "", "", disk)
    part = tree.add_block("/sys/devices/virtual/block/md0/md0p1")
    tree.mount(f"40 22 {part} / /mnt rw - ext4 /dev/md0p1 rw")
    assert tree.find(NVME) == ["holds /dev/nvme0n1, under RAID array md0, mounted on /mnt"]


@pytest.mark.usefixtures("disk")
def test_usage_exclusively_open_disk(tree: Tree) -> None:
    tree.root.held.add("/dev/nvme0n1p1")
    assert tree.find(NVME) == ["holds /dev/nvme0n1p1, which the kernel or a program uses exclusively"]


def test_usage_disk_name_with_slash(tree: Tree) -> None:
    path = tree.add_device(NVME, "10400", "cciss")
    number = tree.add_block(f"{path}/block/cciss!c0d0")
    tree.mount(f"40 22 {number} / /mnt rw - ext4 /dev/cciss/c0d0 rw")
    assert tree.find(NVME) == ["holds /dev/cciss/c0d0, mounted on /mnt"]


def test_usage_disks_of_other_functions_ignored(tree: Tree, disk: str) -> None:
    """Also not those of a function whose address begins like this one's, or on a bus above."""
    assert disk
    longer = f"{BUS}/0000:00:01.0/{NVME}0"
    tree.add_block(f"{longer}/nvme/nvme1/nvme1n1")
    tree.add_device("0000:03:00.0", "10802", "nvme")
    tree.mount(
        "40 22 259:4 / /mnt rw - ext4 /dev/nvme1n1 rw",
        "41 22 259:9 / /srv rw - ext4 /dev/nvme9n1 rw",
    )
    assert tree.find(NVME) == []
    assert tree.find("0000:03:00.0") == []


def test_usage_nvme_multipath(tree: Tree) -> None:
    """Namespaces hang below the subsystem; its controllers, one a function, are only linked."""
    for index, address in enumerate((NVME, NIC)):
        path = tree.add_device(address, "10802", "nvme")
        tree.link(f"/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme{index}", f"{path}/nvme/nvme{index}")
    tree.link("/sys/class/nvme-subsystem/nvme-subsys0", "/sys/devices/virtual/nvme-subsystem/nvme-subsys0")
    tree.add_device("0000:03:00.0", "10802", "nvme")
    tree.add_block("/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1")
    tree.add_block("/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1/nvme0n1p1")
    assert tree.find(NVME) == []
    tree.mount("40 22 259:2 / /mnt rw - ext4 /dev/nvme0n1p1 rw")
    assert tree.find(NVME) == tree.find(NIC) == ["holds /dev/nvme0n1p1, mounted on /mnt"]
    assert tree.find("0000:03:00.0") == []


def test_usage_virtio_disk(tree: Tree) -> None:
    path = tree.add_device(NVME, "10000", "virtio-pci", "1AF4:1042")
    tree.add_block(f"{path}/virtio1/block/vda")
    assert tree.find(NVME) == []
    tree.mount("40 22 259:1 / /mnt rw - ext4 /dev/vda rw")
    assert tree.find(NVME) == ["holds /dev/vda, mounted on /mnt"]


def test_usage_usb_disk(tree: Tree) -> None:
    path = tree.add_device(NVME, "c0330", "xhci_hcd")
    tree.add_block(f"{path}/usb1/1-1/1-1:1.0/host2/target2:0:0/2:0:0:0/block/sda/sda1")
    tree.mount("40 22 259:1 / /mnt rw - vfat /dev/sda1 rw")
    assert tree.find(NVME) == ["holds /dev/sda1, mounted on /mnt"]


def test_usage_without_mountinfo_fails(tree: Tree) -> None:
    tree.add_device(NVME, "10802", "nvme")
    (tree.top / "proc/self/mountinfo").unlink()
    with pytest.raises(FileNotFoundError):
        tree.find(NVME)


# Network --------------------------------------------------------------------------------------------------------------

DOWN = 0x1002


@pytest.fixture
def nic(tree: Tree) -> str:
    """Return the path of a NIC whose interface eth1 is up."""
    path = tree.add_device(NIC, "20000", "e1000e")
    tree.add_interface(f"{path}/net/eth1")
    return path


@pytest.mark.usefixtures("nic")
def test_usage_interface_up_only_free(tree: Tree) -> None:
    assert tree.find(NIC) == []


@pytest.mark.parametrize(
    ("line", "use"),
    [
        (["address", "eth1", "10.0.2.15"], "with address 10.0.2.15"),
        (["address", "eth1", "2001:db8::1"], "with address 2001:db8::1"),
        (["address", "eth10", "10.0.2.15"], ""),
        (["route", "eth1", ""], "with a route"),
        (["route", "eth10", ""], ""),
        # More routes than are looked at.
        (["route", "", ""], "with a route"),
    ],
)
def test_usage_interface_in_use(tree: Tree, nic: str, line: list[str], use: str) -> None:
    tree.root.network = [["address", "lo", "127.0.0.1"], line]
    assert tree.find(NIC) == ([f"is network interface eth1, up {use}"] if use else [])
    # The same, and down: nobody is using it.
    tree.write(f"{nic}/net/eth1/flags", hex(DOWN))
    assert tree.find(NIC) == []


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        (1, ""),
        (32, ""),
        (280, "as a CAN interface"),
        (513, "as an interface of type 513"),
        (65534, "as an interface of type 65534"),
    ],
)
def test_usage_can_interface_up(tree: Tree, kind: int, use: str) -> None:
    """Nobody brings up a CAN interface by accident, and it never has an address."""
    path = tree.add_device(NIC, "c0900", "kvaser_pci")
    tree.add_interface(f"{path}/net/can0", kind=kind)
    assert tree.find(NIC) == ([f"is network interface can0, up {use}"] if use else [])
    tree.write(f"{path}/net/can0/flags", hex(DOWN))
    assert tree.find(NIC) == []


def test_usage_bond_port(tree: Tree, nic: str) -> None:
    tree.link(f"{nic}/net/eth1/master", "/sys/devices/virtual/net/bond0")
    tree.link(f"{nic}/net/eth1/upper_bond0", "/sys/devices/virtual/net/bond0")
    tree.write("/sys/class/net/bonding_masters", "bond0")
    assert tree.find(NIC) == ["is network interface eth1, up as a member of bond0"]
    tree.write(f"{nic}/net/eth1/flags", hex(DOWN))
    assert tree.find(NIC) == []


def test_usage_interface_below_vlan(tree: Tree, nic: str) -> None:
    tree.link(f"{nic}/net/eth1/upper_eth1.7", "/sys/devices/virtual/net/eth1.7")
    assert tree.find(NIC) == ["is network interface eth1, up and used by eth1.7"]


def test_usage_virtio_network_card(tree: Tree) -> None:
    path = tree.add_device(NIC, "20000", "virtio-pci", "1AF4:1041")
    tree.add_interface(f"{path}/virtio0/net/eth0")
    assert tree.find(NIC) == []
    tree.root.network = [["address", "eth0", "10.0.2.15"]]
    assert tree.find(NIC) == ["is network interface eth0, up with address 10.0.2.15"]


@pytest.mark.parametrize("below", ["net", "virtio0/net", "usb3/3-1/3-1:1.0/net", "mlx5_core.sf.4/net"])
def test_usage_interface_in_other_namespace(tree: Tree, below: str) -> None:
    path = tree.add_device(NIC, "20000", "virtio-pci", "1AF4:1041")
    (tree.top / path.lstrip("/") / below).mkdir(parents=True)
    assert tree.find(NIC) == ["is a network interface in another network namespace"]


def test_usage_unplugged_directory_ignored(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that goes while the function is looked at is not the function."""
    path = tree.add_device(NIC, "20000", "virtio-pci", "1AF4:1041")
    for below in ("gone", "virtio0/net"):
        (tree.top / path.lstrip("/") / below).mkdir(parents=True)
    scan = os.scandir

    def scan_late(place: str) -> object:
        if place.endswith("/gone"):
            os.rmdir(place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", scan_late)
    assert tree.find(NIC) == ["is a network interface in another network namespace"]


def test_usage_address_of_other_card_ignored(tree: Tree, nic: str) -> None:
    assert nic
    path = tree.add_device("0000:03:00.0", "20000", "e1000e")
    tree.add_interface(f"{path}/net/eth2")
    tree.root.network = [["address", "eth2", "10.0.2.16"]]
    assert tree.find(NIC) == []


def test_usage_card_without_driver_free(tree: Tree) -> None:
    tree.add_device(NIC, "20000")
    assert tree.find(NIC) == []


# Asking ---------------------------------------------------------------------------------------------------------------


def test_usage_scanned_once(tree: Tree, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk
    tree.add_device(NIC, "20000", "e1000e")
    listed: list[str] = []
    real = Root.list_names

    def list_names(root: Root, path: str) -> list[str]:
        listed.append(path)
        return real(root, path)

    monkeypatch.setattr(Root, "list_names", list_names)
    inventory = pci.scan(tree.root)
    uses = UsageFinder(tree.root, Deadline(60))
    assert "/sys/class/block" not in listed
    for device in inventory.devices.values():
        uses.find(device)
    assert [listed.count(path) for path in ("/sys/class/block", "/sys/class/net")] == [1, 1]


def test_parse_mounts_as_documented(tree: Tree) -> None:
    tree.mount(
        r"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:2 - ext3 /dev/a\134b rw,errors=continue",
        "37 35 0:5 / /x rw - tmpfs none rw",
        "cut off",
        "38 35 0:6 / /y rw",
    )
    assert read_mounts(tree.root)[1:] == [
        Mount("98:0", "/mnt1", "/mnt 2", "ext3", "/dev/a\\b", ("rw", "errors=continue")),
        Mount("0:5", "/", "/x", "tmpfs", "none", ("rw",)),
    ]
