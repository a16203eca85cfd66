# SPDX-License-Identifier: Apache-2.0
"""Uses of a device on a real kernel: open and mapped nodes, loop devices, CAN, labels, tables. Free otherwise."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oci_hooks.linux import netlink, pci
from oci_hooks.linux.usage import UsageFinder
from oci_hooks.system import Deadline, Root
from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import devices, guest
from tests.vm.bundles import Containers

MACHINE = "uses"
POINT = Path("/run/uses-mnt")


def run(*command: str | Path) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def find(address: str, seconds: float = 60) -> list[str]:
    """Return the uses of a device now."""
    device = pci.read_device(Root(), address)
    assert device is not None
    return UsageFinder(Root(), Deadline(seconds)).find(device)


@contextmanager
def running(script: str, *arguments: str | Path) -> Iterator[str]:
    """Run Python until it prints "ready"; give the words for it: "python3.11 (pid 5)"."""
    start = "import os, sys, mmap, time\n"
    end = "\nprint('ready', flush=True)\ntime.sleep(600)"
    command = [sys.executable, "-IS", "-c", start + script + end, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield f"{Path(f'/proc/{process.pid}/exe').resolve().name} (pid {process.pid})"
        finally:
            process.kill()


OPEN = "fd = os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)"


# Device nodes ---------------------------------------------------------------------------------------------------------


def find_node(address: str, kind: str) -> Path:
    """Return the node of a class that is below a function."""
    guest.settle()
    (path,) = (guest.PCI / address).resolve().glob(f"**/{kind}/*/dev")
    return Path("/dev") / path.parent.name


def test_uses_serial_port_of_getty() -> None:
    card = guest.find_device(devices.SERIAL)
    node = find_node(card, "tty")
    assert find(card) == []
    with subprocess.Popen(["agetty", "--noreset", "--noclear", node.name, "9600"], stdin=subprocess.DEVNULL) as getty:
        try:
            while not any(entry.resolve() == node for entry in Path(f"/proc/{getty.pid}/fd").iterdir()):
                assert getty.poll() is None
            assert find(card) == [f"holds {node}, which agetty (pid {getty.pid}) has open"]
        finally:
            getty.kill()
    assert find(card) == []


def test_uses_node_any_name_any_namespace() -> None:
    """A container's private node, removed after it was opened."""
    card = guest.find_device(devices.SERIAL)
    node = find_node(card, "tty")
    numbers = node.stat().st_rdev
    script = f"os.unshare(0x20000) if hasattr(os, 'unshare') else None\nos.mknod('/run/private', 0o20600, {numbers})\n"
    script += "fd = os.open('/run/private', os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY); os.unlink('/run/private')"
    with running(script) as who:
        assert find(card) == [f"holds {node}, which {who} has open"]
    assert find(card) == []


def test_uses_ptp_clock() -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    node = find_node(nic, "ptp")
    assert find(nic) == []
    with running(OPEN, node) as who:
        assert find(nic) == [f"holds {node}, which {who} has open"]
        # Without the time to look, it is not called free.
        (use,) = find(nic, 0)
        assert use.startswith(f"holds {node}, which may be open: there was only time to check 0 of "), use
    assert find(nic) == []


@pytest.mark.usefixtures("native_drivers")
def test_uses_uio_device() -> None:
    """As DPDK does without vfio."""
    nic = guest.find_device(devices.NIC_E1000E)
    run("modprobe", "uio_pci_generic")
    guest.bind(nic, "uio_pci_generic")
    guest.settle()
    (node,) = (Path("/dev") / path.name for path in (guest.PCI / nic).glob("uio/uio*"))
    assert find(nic) == []
    with running(OPEN, node) as who:
        assert find(nic) == [f"holds {node}, which {who} has open"]
    with running(OPEN + "\nm = mmap.mmap(fd, 4096)\nos.close(fd)", guest.PCI / nic / "resource0") as who:
        assert find(nic) == [f"holds the PCI resource resource0, which {who} has mapped"] or find(nic) == [
            f"holds the PCI resource resource0, which {who} has open"
        ]
    assert find(nic) == []


@pytest.mark.usefixtures("native_drivers")
@pytest.mark.parametrize("keep", [True, False])
def test_uses_mapped_memory_without_driver(keep: bool) -> None:
    """A program that drives it by sysfs alone. keep: whether the descriptor stays open."""
    nic = guest.find_device(devices.NIC_E1000E)
    (guest.PCI / nic / "driver/unbind").write_text(nic)
    assert find(nic) == []
    # Python's own mapping keeps a descriptor.
    close = "" if keep else "\nfor n in range(3, 9):\n  try: os.close(n)\n  except OSError: pass"
    script = OPEN + "\nm = mmap.mmap(fd, 4096)" + close
    with running(script, guest.PCI / nic / "resource0") as who:
        assert find(nic) == [f"holds the PCI resource resource0, which {who} has {'open' if keep else 'mapped'}"]
    assert find(nic) == []


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(name="disk")
def find_disk() -> tuple[str, Path]:
    """Return the disk's controller and its node."""
    address = guest.find_nvme("disk")
    (node,) = guest.disks_of(address)
    guest.settle()
    assert find(address) == []
    POINT.mkdir(exist_ok=True)
    return address, node


def test_uses_mounted_loop_device(disk: tuple[str, Path]) -> None:
    """The kernel lets others have the disk exclusively all the same."""
    address, node = disk
    run("modprobe", "loop")
    run("mkfs.ext4", "-q", node, "65536")
    loop = Path(run("losetup", "--find", "--show", node))
    try:
        guest.settle()
        assert not Root().is_exclusively_open(str(node))
        assert find(address) == [f"holds {node}, part of loop device {loop.name}"]
        run("mount", loop, POINT)
        try:
            assert find(address) == [f"holds {node}, under loop device {loop.name}, mounted on {POINT}"]
        finally:
            run("umount", POINT)
    finally:
        run("losetup", "--detach", loop)
        guest.settle()
    assert find(address) == []


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_uses_disk_read_by_program(disk: tuple[str, Path], how: str) -> None:
    address, node = disk
    script = "fd = os.open(sys.argv[1], os.O_RDONLY)"
    if how == "mapped":
        script += f"\nm = mmap.mmap(fd, 4096, {mmap.MAP_SHARED}, {mmap.PROT_READ})"
        script += "\nfor n in range(3, 9):\n  try: os.close(n)\n  except OSError: pass"
    with running(script, node) as who:
        assert find(address) == [f"holds {node}, which {who} has {how}"]
    guest.settle()
    assert find(address) == []


def test_uses_disk_controller(disk: tuple[str, Path]) -> None:
    address, _ = disk
    (path,) = (guest.PCI / address).glob("nvme/nvme*")
    with running(OPEN, Path("/dev") / path.name) as who:
        assert find(address) == [f"holds /dev/{path.name}, which {who} has open"]
    assert find(address) == []


# Interfaces -----------------------------------------------------------------------------------------------------------


def test_uses_can_interface_up() -> None:
    card = guest.find_device(devices.CAN)
    run("modprobe", "kvaser_pci")
    guest.settle()
    (name,) = guest.interfaces_of(card)
    assert find(card) == []
    run("ip", "link", "set", name, "up", "type", "can", "bitrate", "125000")
    try:
        assert find(card) == [f"is network interface {name}, up as a CAN interface"]
    finally:
        run("ip", "link", "set", name, "down")
    assert find(card) == []


@pytest.fixture(name="nic")
def make_nic() -> Iterator[tuple[str, str]]:
    """Give the address of a network card and its interface, which is up with nothing else, and down afterwards."""
    address = guest.find_device(devices.NIC_E1000E)
    guest.settle()
    (name,) = guest.interfaces_of(address)
    Path(f"/proc/sys/net/ipv6/conf/{name}/accept_ra").write_text("0")
    run("ip", "link", "set", name, "up")
    # The kernel takes no nexthop without a carrier.
    while Path(f"/sys/class/net/{name}/carrier").read_text().strip() != "1":
        time.sleep(0.1)
    assert find(address) == []
    yield address, name
    run("ip", "link", "set", name, "down")
    run("ip", "address", "flush", "dev", name)
    assert find(address) == []


# What ip is called with, and what the hook makes of it; "del" takes it away again.
USES = [
    ("address add 192.0.2.9/24 dev NIC label NIC:v", "with address 192.0.2.9"),
    ("address add 192.0.2.9 peer 192.0.2.1 dev NIC", "with address 192.0.2.9"),
    ("address add 2001:db8::9/64 dev NIC", "with address 2001:db8::9"),
    ("route add 192.0.2.0/24 dev NIC table 100", "with a route"),
    ("route add local 192.0.2.0/24 dev NIC", "with a route"),
    ("-6 route add 2001:db8::/64 dev NIC table 100", "with a route"),
    ("-6 route add default dev NIC table 100", "with a route"),
    ("-4 route add 192.0.2.0/24 table 100 nexthop dev NIC nexthop dev lo", "with a route"),
    ("nexthop add id 77 dev NIC", "with a route"),
]


@pytest.mark.parametrize(("words", "use"), USES, ids=[words.split(" dev")[0] for words, _ in USES])
def test_uses_interface_states(nic: tuple[str, str], words: str, use: str) -> None:
    address, name = nic
    run("ip", "link", "set", "lo", "up")
    command = ["ip", *words.replace("NIC", name).split(" ")]
    run(*command)
    try:
        assert find(address) == [f"is network interface {name}, up {use}"]
    finally:
        undo = command[:5] if command[1] == "nexthop" else command
        run(*(word if word != "add" else "del" for word in undo))
    assert find(address) == []


def test_uses_more_routes_than_limit(nic: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    address, name = nic
    monkeypatch.setattr(netlink, "MAX_DUMP_BYTES", 20_000)
    batch = Path("/run/routes")
    batch.write_text("".join(f"route add 10.{n // 256}.{n % 256}.0/24 dev lo\n" for n in range(1000)))
    run("ip", "link", "set", "lo", "up")
    run("ip", "-batch", batch)
    try:
        assert find(address) == [f"is network interface {name}, up with a route"]
    finally:
        batch.write_text(batch.read_text().replace("add", "del"))
        run("ip", "-batch", batch)


# The whole hook -------------------------------------------------------------------------------------------------------


@one_runtime
def test_uses_hook_refuses(containers: Containers) -> None:
    """Also where the annotation names it, and it takes what is free."""
    nic, serial = guest.find_device(devices.NIC_E1000E), guest.find_device(devices.SERIAL)
    node = find_node(serial, "tty")
    _, state = guest_calls.make_created(containers, annotations=ask(serial))
    with running(OPEN, node) as who:
        done = guest_calls.call_hook(state)
        assert (done.code, guest.driver_of(serial)) == (1, "serial")
        assert f"[in-use] {serial} (1b36:0002, serial): holds {node}, which {who} has open" in done.stderr, done.stderr
    assert guest_calls.call_hook(state).code == 0
    assert guest.driver_of(serial) == "vfio-pci"
    # A second run of the same container finds its own device, and no use.
    assert guest_calls.call_hook(state).code == 0
    assert guest_calls.release(state).code == 0
    assert guest.driver_of(nic) == "e1000e"
