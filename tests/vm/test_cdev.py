# SPDX-License-Identifier: Apache-2.0
"""Devices by their own nodes (iommufd): chosen, created, allowed, used; with VFIO groups and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "single"
KERNELS = ("full", "no-group")
CLASS = Path("/sys/class/vfio-dev")
# include/uapi/linux/vfio.h and iommufd.h: VFIO_DEVICE_BIND_IOMMUFD, IOMMU_IOAS_ALLOC, VFIO_DEVICE_ATTACH_IOMMUFD_PT,
# VFIO_DEVICE_DETACH_IOMMUFD_PT.
USE = """
import fcntl, os, struct
(name,) = os.listdir("/dev/vfio/devices")
iommu, device = os.open("/dev/iommu", os.O_RDWR), os.open("/dev/vfio/devices/" + name, os.O_RDWR)
fcntl.ioctl(device, 0x3B76, bytearray(struct.pack("=IIiI", 16, 0, iommu, 0)))
space = bytearray(struct.pack("=III", 12, 0, 0))
fcntl.ioctl(iommu, 0x3B81, space)
fcntl.ioctl(device, 0x3B77, bytearray(struct.pack("=III", 12, 0, struct.unpack("=III", space)[2])))
fcntl.ioctl(device, 0x3B78, struct.pack("=II", 8, 0))
print(name, *sorted(os.listdir("/dev/vfio")))
"""
USE_COMMAND = ("/usr/bin/python3", "-c", USE)
HOOKS = bundles.guest_hooks("createRuntime", "poststop")


def has_groups() -> bool:
    """Return whether this kernel has VFIO groups."""
    return Path("/sys/class/vfio").exists()


def list_nodes(group: str) -> list[str]:
    """Return the names that the container is to find below /dev/vfio."""
    return sorted(["devices", "devices.json", *([group, "vfio"] if has_groups() else [])])


@pytest.fixture
def nic() -> str:
    """Return the address of the NIC."""
    return guest.find_device(devices.NIC_E1000E)


def test_cdev_by_annotation(containers: Containers, nic: str) -> None:
    done = containers.run(*USE_COMMAND, annotations=ask(f"{nic},cdev"), hooks=HOOKS)
    assert done.code == 0, done.stderr
    assert done.stdout.split()[1:] == list_nodes(guest.group_of(nic))
    assert guest.driver_of(nic) == "e1000e"
    assert guest_calls.list_claims() == []


def test_cdev_listed_with_guest_numbers(containers: Containers, nic: str) -> None:
    """linux.devices lists the node with this guest's numbers, and another group is free as well."""
    guest.bind(nic, "vfio-pci")
    (name,) = os.listdir(guest.PCI / nic / "vfio-dev")
    major, minor = map(int, guest.read_attribute(CLASS / name / "dev").split(":"))
    node = {"path": f"/dev/vfio/devices/{name}", "type": "c", "major": major, "minor": minor}
    with guest_calls.settings("deadline = 60", "[auto]", "never = []"):
        done = containers.run(*USE_COMMAND, devices=[node], hooks=HOOKS)
    assert done.code == 0, done.stderr
    assert done.stdout.split() == [name, *list_nodes(guest.group_of(nic))]
    assert guest.driver_of(nic) == "vfio-pci"
    assert guest_calls.list_claims() == []


BIND = """
import fcntl, os, struct, sys
iommu, device = os.open("/dev/iommu", os.O_RDWR), os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(device, 0x3B76, bytearray(struct.pack("=IIiI", 16, 0, iommu, 0)))
print("bound", flush=True)
sys.stdin.read()
"""


@contextmanager
def hold_device(name: str) -> Iterator[None]:
    """Have another process use a device by its own node, meanwhile."""
    line = [sys.executable, "-c", BIND, f"/dev/vfio/devices/{name}"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == "bound\n"
        yield
        process.stdin.close()
        assert process.wait() == 0


@one_runtime
def test_cdev_other_interface_open_refused(containers: Containers, nic: str) -> None:
    """The kernel gives a device to whoever has its group open, or its own node bound, and not to the other."""
    guest.bind(nic, "vfio-pci")
    (name,) = os.listdir(guest.PCI / nic / "vfio-dev")
    if not has_groups():
        # A device's own node opens for anybody; that it is bound already, only the program is told.
        with hold_device(name):
            done = containers.run(*USE_COMMAND, annotations=ask(f"{nic},cdev"), hooks=HOOKS)
        assert (done.code != 0, "[group-busy]" in done.stderr, "Invalid argument" in done.stderr) == (True, False, True)
        return
    path = f"/dev/vfio/{guest.group_of(nic)}"
    with hold_device(name):
        done = containers.run(*USE_COMMAND, annotations=ask(f"{nic},cdev"), hooks=HOOKS)
    assert done.code != 0
    assert f"[group-busy] {path}: another process has it open; find it with: fuser -v {path} /dev/vfio/devices/*" in (
        done.stderr
    )
    with Path(path).open("r+b", buffering=0):
        done = containers.run(*USE_COMMAND, annotations=ask(f"{nic},cdev"), hooks=HOOKS)
    assert f"[group-busy] {path}" in done.stderr
    assert containers.run(*USE_COMMAND, annotations=ask(f"{nic},cdev"), hooks=HOOKS).code == 0


@one_runtime
@pytest.mark.parametrize(("uid", "opens"), [(1000, True), (0, False)])
def test_cdev_owner_is_the_containers_user(containers: Containers, nic: str, uid: int, opens: bool) -> None:
    """Its entry gives the node to somebody: the program opens it as process.user, and so does the hook."""
    guest.bind(nic, "vfio-pci")
    (name,) = os.listdir(guest.PCI / nic / "vfio-dev")
    major, minor = map(int, guest.read_attribute(CLASS / name / "dev").split(":"))
    node = {"path": f"/dev/vfio/devices/{name}", "type": "c", "major": major, "minor": minor, "uid": uid, "gid": uid}
    done = containers.run(*USE_COMMAND, devices=[{**node, "fileMode": 0o600}], hooks=HOOKS, user=1000)
    assert (done.code == 0) == opens, done.stderr
    assert ("PermissionError" in done.stderr) != opens


@one_runtime
def test_cdev_probed_and_named(containers: Containers, nic: str) -> None:
    """devices.json names both nodes, and the example program opens one after the other."""
    script = "/bin/cat /dev/vfio/devices.json; exec " + " ".join(bundles.PROBE)
    done = containers.run("/bin/sh", "-c", script, annotations=ask(f"{nic},cdev"), hooks=HOOKS)
    assert done.code == 0, done.stderr
    *listed, report = done.stdout.strip().splitlines()
    (named,) = json.loads("\n".join(listed))["devices"]
    (found,) = json.loads(report)["device_nodes"]
    assert named["device_node"] == f"/dev/vfio/devices/{found['device_node']}"
    assert named["node"] == (f"/dev/vfio/{guest.group_of(nic)}" if has_groups() else "")
    assert (found["attach"], found["id"]) == ("ok", devices.NIC_E1000E)
    assert [group["devices"][0]["id"] for group in json.loads(report)["groups"]] == [devices.NIC_E1000E] * has_groups()


def test_cdev_survey_shows_nodes(nic: str) -> None:
    """--all shows which nodes this kernel makes, and how to ask for those that there are."""
    done = guest_calls.call_hook(None, "--all", "--json")
    answer = json.loads(done.stdout)
    assert done.code == 0
    assert answer["guest"]["auto"] == [guest.group_of(nic)]
    assert (answer["guest"]["group_nodes"], answer["guest"]["device_nodes"]) == (has_groups(), True)
    assert answer["guest"]["missing_options"] == []
    hints = [finding["hint"] for finding in answer["findings"]]
    assert ["auto,cdev" in hint for hint in hints] == [True] * (not has_groups())
