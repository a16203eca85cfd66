# SPDX-License-Identifier: Apache-2.0
"""Devices that come while the hook waits, that never come, and that go while it is at work.

QEMU plugs and unplugs at the test's word. The hook runs in a fork, so that a test can act at an exact step of it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, Callable

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"
KERNELS = ("6.1",)
# A NIC that no machine here has from the start; its driver is a module, and nobody loads it without udev.
DRIVER, IDS = "vmxnet3", "15ad:07b0"


def plug() -> None:
    """Have QEMU plug the NIC in."""
    guest.qmp("device_add", driver=DRIVER, id="plugged", bus=guest.hotplug_ports()[0])


def unplug() -> None:
    """Have QEMU take the NIC out and wait until it is gone."""
    guest.qmp("device_del", id="plugged")
    guest.wait_for_qmp_event("DEVICE_DELETED", device="plugged")


@pytest.fixture
def plugged() -> Iterator[None]:
    """Take out what the test had plugged in."""
    yield
    if guest.find_devices(IDS):
        unplug()


@contextmanager
def no_udev() -> Iterator[None]:
    """Keep udevd from handling and passing on events, as where there is none."""
    subprocess.run(["udevadm", "control", "--stop-exec-queue"], check=True)
    try:
        yield
    finally:
        subprocess.run(["udevadm", "control", "--start-exec-queue"], check=True)
        guest.settle()


def before_step(module: str, name: str, act: Callable[[], object]) -> Callable[[], None]:
    """Return what has a function of the hook do something first."""

    def prepare() -> None:
        owner: Any = importlib.import_module(module)
        for part in name.split(".")[:-1]:
            owner = getattr(owner, part)
        step = getattr(owner, name.rpartition(".")[2])

        def acting(*arguments: Any, **named: Any) -> Any:
            act()
            return step(*arguments, **named)

        setattr(owner, name.rpartition(".")[2], acting)

    return prepare


@one_runtime
@pytest.mark.usefixtures("plugged")
def test_guest_hotplug_device_arrives(containers: Containers) -> None:
    """The kernel's own event wakes the hook, long before its deadline; no udevd is needed for it."""
    container, state = guest_calls.make_created(containers, annotations=ask(f"id:{IDS}"))
    reader, writer = os.pipe()
    came: list[float] = []

    def plug_when_it_waits() -> None:
        os.read(reader, 1)
        plug()
        came.append(time.monotonic())

    thread = Thread(target=plug_when_it_waits)
    thread.start()
    waits = before_step("oci_hooks.linux.uevents", "Listener.wait", lambda: os.write(writer, b"w"))
    with no_udev(), guest_calls.settings("deadline = 60"):
        done = guest_calls.fork_hook(state, prepare=waits)
        ended = time.monotonic()
    thread.join()
    assert (done.code, done.stderr) == (0, "")
    assert ended - came[0] < 20
    (address,) = guest.find_devices(IDS)
    assert guest.driver_of(address) == "vfio-pci"
    assert guest_calls.list_dev(container) == sorted(["devices.json", guest.group_of(address), "vfio"])
    assert guest_calls.release(state).code == 0
    assert guest.override_of(address) == ""


@one_runtime
def test_guest_hotplug_device_never_arrives(containers: Containers) -> None:
    """The hook gives up by itself at its deadline, in its own words, and not later."""
    container, state = guest_calls.make_created(containers, annotations=ask(f"id:{IDS}"))
    # The first hook of all imports everything, which takes seconds in here.
    guest_calls.import_hook()
    with guest_calls.settings("deadline = 3"):
        started = time.monotonic()
        done = guest_calls.fork_hook(state)
        spent = time.monotonic() - started
    assert done.code == 1
    assert (
        f"[no-such-device] annotation {guest_calls.DEVICES}: id:{IDS} matches no PCI device in this guest"
        in done.stderr
    )
    assert "waited " in done.stderr
    # Not the minute that it would have without the setting.
    assert spent < 30
    assert guest_calls.list_claims() == []
    assert guest_calls.list_dev(container) == []


@one_runtime
@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("module", "step"),
    [("oci_hooks.guest.apply.drivers", "bind_devices"), ("oci_hooks.guest.apply.nodes", "expose_nodes")],
)
def test_guest_hotplug_device_unplugged(containers: Containers, module: str, step: str) -> None:
    """Unplugged after the plan was made, or after it was bound: the rest is put back, the other device included."""
    plug()
    guest.settle()
    (address,) = guest.find_devices(IDS)
    before = guest_calls.look_at_drivers()
    nic = guest.find_device(devices.NIC_E1000E)
    container, state = guest_calls.make_created(containers, annotations=ask([nic, address]))
    done = guest_calls.fork_hook(state, prepare=before_step(module, step, unplug))
    assert done.code == 1
    (reported,) = guest_calls.list_findings(done)
    assert "[device-gone]" in reported
    assert not guest.find_devices(IDS)
    del before[address]
    assert guest_calls.look_at_drivers() == before
    assert guest_calls.list_dev(container) == []
    assert guest_calls.list_claims() == []
