# SPDX-License-Identifier: Apache-2.0
"""Defects that a review found on a real kernel: uses that were not detected, and one that was none."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"
NET = Path("/sys/class/net")
# A program that keeps a file open which is called as a device's memory is, as any user can.
PRETEND = "import os, sys, time; os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); print(flush=True); time.sleep(600)"


@one_runtime
def test_review_fake_resource_file_no_use(containers: Containers, tmp_path: Path) -> None:
    edu = guest.find_device(devices.EDU)
    _, state = guest_calls.make_created(containers)
    directory = tmp_path / f"devices/{edu}"
    directory.mkdir(parents=True)
    command = ["/usr/bin/python3", "-ISc", PRETEND, str(directory / "resource0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        done = guest_calls.fork_hook({**state, "annotations": ask(edu)})
        process.kill()
    assert (done.code, done.stderr) == (0, "")


@one_runtime
def test_review_mapped_resource_is_use(containers: Containers) -> None:
    edu = guest.find_device(devices.EDU)
    _, state = guest_calls.make_created(containers)
    command = ["/usr/bin/python3", "-ISc", PRETEND, f"{guest.PCI}/{edu}/resource0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        done = guest_calls.fork_hook({**state, "annotations": ask(edu)})
        process.kill()
    assert (
        done.code,
        f"holds the PCI resource resource0, which python3.11 (pid {process.pid}) has open" in done.stderr,
    ) == (
        1,
        True,
    ), done.stderr


@pytest.fixture
def usb_interface() -> Iterator[None]:
    """Plug in a USB controller with a network interface, and take both out again: the port is other tests' too."""
    before = set(guest.PCI.iterdir())
    guest.qmp("device_add", driver="qemu-xhci", id="review-xhci", bus=guest.hotplug_ports()[0])
    guest.settle()
    guest.qmp("device_add", driver="usb-net", id="review-net", bus="review-xhci.0")
    yield
    guest.qmp("device_del", id="review-xhci")
    # QEMU 7.2 sends no DEVICE_DELETED for this controller.
    end = time.monotonic() + 60
    while set(guest.PCI.iterdir()) != before:
        assert time.monotonic() < end, "the controller is not gone"
        guest.settle()


@one_runtime
@pytest.mark.usefixtures("usb_interface")
def test_review_usb_interface_in_other_namespace_is_use(containers: Containers) -> None:
    """Of its controller: sysfs has no more of it there than an empty directory, some levels below the function."""
    end = time.monotonic() + 60
    while not (found := [path for path in NET.iterdir() if "/usb" in os.readlink(path)]):
        assert time.monotonic() < end, "no interface came"
        guest.settle()
    words = os.readlink(found[0]).split("/")
    controller = words[next(number for number, word in enumerate(words) if word.startswith("usb")) - 1]
    _, state = guest_calls.make_created(containers)
    subprocess.run(["ip", "netns", "add", "review"], check=True)
    try:
        guest.settle()
        (name,) = [path.name for path in NET.iterdir() if "/usb" in os.readlink(path)]
        subprocess.run(["ip", "link", "set", name, "netns", "review"], check=True)
        done = guest_calls.fork_hook({**state, "annotations": ask(controller)})
    finally:
        subprocess.run(["ip", "netns", "del", "review"], check=True)
    assert (done.code, "is a network interface in another network namespace" in done.stderr) == (1, True), done.stderr
