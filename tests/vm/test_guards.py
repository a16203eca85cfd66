# SPDX-License-Identifier: Apache-2.0
"""Guards on a real kernel: real mounts, volumes, interfaces. Free before, refused meanwhile, free again after."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oci_hooks.linux import pci
from oci_hooks.linux.usage import UsageFinder
from oci_hooks.system import Deadline, Root
from tests.vm import devices, guest

MACHINE = "standard"

ROOT = Root()
POINT = Path("/run/guards-mnt")


def run(*command: str | Path, check: bool = True) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def find(address: str) -> list[str]:
    """Return the uses of a device now."""
    device = pci.read_device(ROOT, address)
    assert device is not None
    return UsageFinder(ROOT, Deadline(60)).find(device)


# Disks ----------------------------------------------------------------------------------------------------------------


class Disk:
    """The disk of the machine, with nothing on it. address: of its controller; node: /dev/nvme0n1 or the like."""

    def __init__(self) -> None:
        self.address = guest.find_nvme("disk")
        (self.node,) = guest.disks_of(self.address)
        self.name = self.node.name
        self.first = Path(f"{self.node}p1")
        self.sectors = int(Path(f"/sys/class/block/{self.name}/size").read_text())

    def uses(self) -> list[str]:
        """Return the uses of the controller."""
        return find(self.address)


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Give the disk, which is free before and after, and take its partition away again."""
    made = Disk()
    assert made.uses() == []
    POINT.mkdir(exist_ok=True)
    yield made
    # udev may still be reading what was on it.
    guest.settle()
    if made.first.exists():
        run("delpart", made.node, "1")
    assert made.uses() == []


@pytest.fixture
def partition(disk: Disk) -> Path:
    """Give the disk's first partition."""
    run("addpart", disk.node, "1", "2048", "65536")
    guest.settle()
    return disk.first


@contextmanager
def mounted(node: Path | str, *options: str) -> Iterator[None]:
    """Mount something."""
    run("mount", *options, node, POINT)
    try:
        yield
    finally:
        run("umount", POINT)


@contextmanager
def mapped(name: str, uuid: str, table: str) -> Iterator[Path]:
    """Make a device-mapper volume."""
    run("modprobe", "dm-mod")
    run("dmsetup", "create", name, *(["--uuid", uuid] if uuid else []), "--table", table)
    try:
        guest.settle()
        yield Path("/dev/mapper") / name
    finally:
        run("dmsetup", "remove", "--retry", name)


def test_usage_mounted_disk(disk: Disk) -> None:
    run("mkfs.ext4", "-q", disk.node)
    assert disk.uses() == []
    with mounted(disk.node):
        assert disk.uses() == [f"holds {disk.node}, mounted on {POINT}"]


def test_usage_mounted_partition(disk: Disk, partition: Path) -> None:
    run("mkfs.ext4", "-q", partition)
    assert disk.uses() == []
    with mounted(partition):
        assert disk.uses() == [f"holds {partition}, mounted on {POINT}"]


def test_usage_loop_file(disk: Disk) -> None:
    """The disk with the file is mounted; that it is, is enough."""
    run("modprobe", "loop")
    run("mkfs.ext4", "-q", disk.node)
    with mounted(disk.node):
        (POINT / "image").write_bytes(bytes(1 << 20))
        run("mkfs.ext4", "-q", POINT / "image")
        inner = POINT / "inner"
        inner.mkdir()
        run("mount", "-o", "loop", POINT / "image", inner)
        try:
            assert disk.uses() == [f"holds {disk.node}, mounted on {POINT}"]
        finally:
            # udev looks at each loop device; while it has it open, the file behind it stays open, too.
            guest.settle()
            run("umount", inner)
            guest.settle()


def test_usage_mount_in_other_namespace(disk: Disk) -> None:
    run("mkfs.ext4", "-q", disk.node)
    script = f"mount --make-rprivate / && mount {disk.node} {POINT} && echo up && exec sleep 600"
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "up\n"
        try:
            assert disk.uses() == [f"holds {disk.node}, which the kernel or a program uses exclusively"]
        finally:
            other.kill()


def test_usage_swap(disk: Disk, partition: Path) -> None:
    run("mkswap", partition)
    run("swapon", partition)
    try:
        assert disk.uses() == [f"holds {partition}, used as swap"]
    finally:
        run("swapoff", partition)


def test_usage_logical_volume(disk: Disk, partition: Path) -> None:
    """LVM's part in it is the table and the uuid."""
    with mapped("vg-data", "LVM-oGWwHcXBEFkz", f"0 32768 linear {partition} 0") as volume:
        name = volume.resolve().name
        assert disk.uses() == [f"holds {partition}, part of LVM volume vg-data ({name})"]
        run("mkfs.ext4", "-q", volume)
        with mounted(volume):
            assert disk.uses() == [f"holds {partition}, under LVM volume vg-data ({name}), mounted on {POINT}"]


def test_usage_encrypted_disk(disk: Disk) -> None:
    run("modprobe", "dm-crypt")
    table = f"0 {disk.sectors - 8} crypt cipher_null-ecb - 0 {disk.node} 0"
    with (
        mapped("secret", "CRYPT-PLAIN-secret", table) as outer,
        mapped("vg-swap", "LVM-x", f"0 32768 linear {outer} 0") as inner,
    ):
        run("mkswap", inner)
        run("swapon", inner)
        try:
            below = f"under dm-crypt volume secret ({outer.resolve().name})"
            above = f"under LVM volume vg-swap ({inner.resolve().name})"
            assert disk.uses() == [f"holds {disk.node}, {below}, {above}, used as swap"]
        finally:
            run("swapoff", inner)


def test_usage_raid_array(disk: Disk) -> None:
    """Put together by sysfs (Documentation/admin-guide/md.rst), because no mdadm is needed for that."""
    run("modprobe", "-a", "md-mod", "raid1")
    Path("/sys/module/md_mod/parameters/new_array").write_text("md_test")
    array = Path("/sys/block/md_test/md")
    number = Path(f"/sys/class/block/{disk.name}/dev").read_text().strip()
    steps = {"metadata_version": "none", "level": "raid1", "raid_disks": "1", "new_dev": number}
    steps |= {f"dev-{disk.name}/slot": "0", f"dev-{disk.name}/size": "32768", "array_state": "active"}
    try:
        for name, value in steps.items():
            (array / name).write_text(value)
        assert disk.uses() == [f"holds {disk.node}, part of RAID array md_test"]
    finally:
        (array / "array_state").write_text("clear")
        guest.settle()


def test_usage_parent_of_virtual_functions() -> None:
    controller = guest.find_nvme("sriov")
    count = guest.PCI / controller / "sriov_numvfs"
    assert find(controller) == []
    count.write_text("2")
    try:
        assert find(controller) == ["has 2 SR-IOV virtual functions"]
    finally:
        count.write_text("0")
    assert find(controller) == []


# Network --------------------------------------------------------------------------------------------------------------


class Card:
    """A network card and its interface, which is down."""

    def __init__(self) -> None:
        self.address = guest.find_device(devices.NIC_E1000E)
        guest.settle()
        (self.name,) = guest.interfaces_of(self.address)

    def ip(self, *words: str) -> None:
        """Run ip with these words; NIC is replaced by the interface."""
        run("ip", *(self.name if word == "NIC" else word for word in words))

    def uses(self) -> list[str]:
        """Return the uses of the card."""
        return find(self.address)


@pytest.fixture
def card() -> Iterator[Card]:
    """Give a card that is free before and after."""
    made = Card()
    # QEMU's network announces an IPv6 prefix, which would come when it comes.
    Path(f"/proc/sys/net/ipv6/conf/{made.name}/accept_ra").write_text("0")
    assert made.uses() == []
    yield made
    made.ip("link", "set", "NIC", "down", "nomaster")
    made.ip("address", "flush", "dev", "NIC")
    assert made.uses() == []


def wait_for_carrier(card: Card) -> None:
    """Wait until the link is there and the kernel has given it its link-local address."""
    while not any(" 20 " in line for line in read_if_inet6(card)):
        time.sleep(0.1)


def read_if_inet6(card: Card) -> list[str]:
    """Return the IPv6 addresses of a card as the kernel lists them."""
    return [line for line in Path("/proc/net/if_inet6").read_text().splitlines() if line.endswith(f" {card.name}")]


def test_usage_interface_up_only(card: Card) -> None:
    """With its automatic address, its routes to fe80::/64 and multicast: udev brings links up by itself."""
    card.ip("link", "set", "NIC", "up")
    wait_for_carrier(card)
    assert read_if_inet6(card)
    assert [line for line in Path("/proc/net/ipv6_route").read_text().splitlines() if line.endswith(f" {card.name}")]
    assert card.uses() == []


def test_usage_interface_addresses(card: Card) -> None:
    card.ip("address", "add", "192.0.2.15/24", "dev", "NIC")
    assert card.uses() == []
    card.ip("link", "set", "NIC", "up")
    assert card.uses() == [f"is network interface {card.name}, up with address 192.0.2.15"]
    card.ip("address", "flush", "dev", "NIC")
    assert card.uses() == []
    card.ip("address", "add", "2001:db8::5/64", "dev", "NIC")
    assert card.uses() == [f"is network interface {card.name}, up with address 2001:db8::5"]


@pytest.mark.parametrize("route", ["192.0.2.0/24", "2001:db8::/64"])
def test_usage_interface_routes(card: Card, route: str) -> None:
    card.ip("link", "set", "NIC", "up")
    card.ip("route", "add", route, "dev", "NIC")
    assert card.uses() == [f"is network interface {card.name}, up with a route"]
    card.ip("route", "del", route, "dev", "NIC")
    assert card.uses() == []


def test_usage_bridge_port(card: Card) -> None:
    card.ip("link", "add", "guards0", "type", "bridge")
    try:
        card.ip("link", "set", "NIC", "master", "guards0")
        assert card.uses() == []
        card.ip("link", "set", "NIC", "up")
        assert card.uses() == [f"is network interface {card.name}, up as a member of guards0"]
    finally:
        card.ip("link", "del", "guards0")


def test_usage_interface_below_vlan(card: Card) -> None:
    card.ip("link", "set", "NIC", "up")
    card.ip("link", "add", "link", "NIC", "name", "guards0", "type", "vlan", "id", "7")
    try:
        assert card.uses() == [f"is network interface {card.name}, up and used by guards0"]
    finally:
        card.ip("link", "del", "guards0")


def test_usage_interface_in_network_namespace(card: Card) -> None:
    """As where a network plugin moved it into another container."""
    card.ip("netns", "add", "guards")
    try:
        card.ip("link", "set", "NIC", "netns", "guards")
        assert card.uses() == ["is a network interface in another network namespace"]
        card.ip("-n", "guards", "link", "set", "NIC", "netns", "1")
    finally:
        card.ip("netns", "del", "guards")
    guest.settle()


@pytest.mark.usefixtures("native_drivers")
def test_usage_vfio_bound_card_free() -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    assert find(nic) == []


# The machine ----------------------------------------------------------------------------------------------------------


def test_usage_every_function_of_vm() -> None:
    """Every function of this machine gets the result that a person would expect."""
    free = {devices.NIC_E1000E, devices.NIC_E1000, devices.EDU, devices.NVME}
    verdicts = {address: find(address) for address in sorted(path.name for path in guest.PCI.iterdir())}
    words = {"0600": "chipset", "0601": "chipset", "0604": "PCI-to-PCI bridge"}
    for address, uses in verdicts.items():
        kind = guest.class_of(address)
        if kind in words:
            assert [words[kind] in use for use in uses] == [True], (address, uses)
        elif guest.id_of(address) in free:
            assert uses == [], address
    virtio = [address for address in verdicts if (guest.PCI / address / "vendor").read_text().strip() == "0x1af4"]
    bound = [address for address in virtio if list((guest.PCI / address).glob("virtio*/driver"))]
    assert bound
    assert all("9p share" in verdicts[address][0] or "console" in verdicts[address][0] for address in bound)
