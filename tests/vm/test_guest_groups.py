# SPDX-License-Identifier: Apache-2.0
"""Groups that are not one device with its own driver: SR-IOV functions, mixed drivers, members in use, on vfio-pci."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"


@pytest.fixture
def functions() -> Iterator[list[str]]:
    """Return two virtual functions of the NVMe controller that can make some."""
    controller = guest.PCI / guest.find_nvme("sriov")
    before = set(guest.find_devices(devices.NVME))
    # The nvme driver takes them up and, as nobody has put them online, gives up some time later.
    (controller / "sriov_drivers_autoprobe").write_text("0")
    (controller / "sriov_numvfs").write_text("2")
    guest.settle()
    yield sorted(set(guest.find_devices(devices.NVME)) - before)
    (controller / "sriov_numvfs").write_text("0")
    (controller / "sriov_drivers_autoprobe").write_text("1")


@one_runtime
def test_guest_bind_virtual_function(containers: Containers, functions: list[str]) -> None:
    """One function for the container; its sibling stays as it is, and the controller above them is off-limits."""
    taken, sibling = functions
    controller = guest.find_nvme("sriov")
    before = guest_calls.look_at_drivers()
    container, state = guest_calls.make_created(containers, annotations=ask(taken))
    assert guest_calls.call_hook(state).code == 0
    assert guest_calls.list_dev(container) == sorted(["devices.json", guest.group_of(taken), "vfio"])
    after = guest_calls.look_at_drivers()
    assert after.pop(taken) == ("vfio-pci", "vfio-pci")
    assert after == {address: what for address, what in before.items() if address != taken}
    refused = guest_calls.call_hook({**state, "id": "another", "annotations": ask(controller)})
    assert f"[in-use] {controller}" in refused.stderr
    assert "has 2 SR-IOV virtual functions" in refused.stderr
    assert sibling in after
    assert guest_calls.release(state).code == 0
    assert guest_calls.look_at_drivers() == before


@one_runtime
def test_guest_bind_mixed_drivers_in_group(containers: Containers) -> None:
    """One member is on vfio-pci already, one on its native driver: whole afterwards, and each as before at the end.

    A member that is in use prevents the whole group from being bound, and the message names it.
    """
    first, second = guest.find_devices(devices.NIC_E1000)
    guest.settle()
    (interface,) = guest.interfaces_of(second)
    guest.bind(first, "vfio-pci")
    before = guest_calls.look_at_drivers()
    assert (before[first], before[second]) == (("vfio-pci", "vfio-pci"), ("e1000", ""))
    container, state = guest_calls.make_created(containers, annotations=ask(first))

    subprocess.run(["ip", "address", "add", "192.0.2.1/24", "dev", interface], check=True)
    subprocess.run(["ip", "link", "set", interface, "up"], check=True)
    done = guest_calls.call_hook(state)
    subprocess.run(["ip", "address", "flush", "dev", interface], check=True)
    subprocess.run(["ip", "link", "set", interface, "down"], check=True)
    assert done.code == 1
    assert f"[in-use] {second}" in done.stderr
    assert f"is network interface {interface}, up with address 192.0.2.1" in done.stderr
    assert f"(group {guest.group_of(first)} can only be bound as a whole)" in done.stderr
    assert guest_calls.look_at_drivers() == before

    done = guest_calls.call_hook(state)
    assert (done.code, done.stderr) == (0, "")
    assert guest_calls.list_dev(container) == sorted(["devices.json", guest.group_of(first), "vfio"])
    assert (guest.driver_of(first), guest.driver_of(second)) == ("vfio-pci", "vfio-pci")
    assert guest_calls.release(state).code == 0
    assert guest_calls.look_at_drivers() == before
