# SPDX-License-Identifier: Apache-2.0
"""The rig's own promises, inside the standard machine."""

from __future__ import annotations

import subprocess

import pytest

from tests.vm import devices, guest

MACHINE = "standard"


def test_nic_is_alone_in_its_group() -> None:
    """A NIC behind its own root port."""
    nic = guest.find_device(devices.NIC_E1000E)
    assert guest.members_of(guest.group_of(nic)) == [nic]
    assert guest.driver_of(nic) == "e1000e"


def test_bridge_group_has_two_endpoints() -> None:
    """Two NICs and the bridge above them."""
    first, second = guest.find_devices(devices.NIC_E1000)
    members = guest.members_of(guest.group_of(first))
    assert {first, second} < set(members)
    assert [guest.class_of(member) for member in members] == ["0604", "0200", "0200"]


def test_edu_has_no_driver() -> None:
    """A device no driver wants."""
    assert guest.driver_of(guest.find_device(devices.EDU)) == ""


def test_disk_has_a_node() -> None:
    """An NVMe disk found by its serial."""
    assert len(guest.disks_of(guest.find_nvme("disk"))) == 1


@pytest.mark.usefixtures("native_drivers")
def test_rig_vfio_binds_and_releases_nic() -> None:
    """The node of a group appears with vfio-pci and goes with the native driver."""
    nic = guest.find_device(devices.NIC_E1000E, 1)
    guest.bind(nic, "vfio-pci")
    assert guest.live_groups() == [guest.group_of(nic)]
    assert guest.override_of(nic) == "vfio-pci"
    assert guest.bind_native(nic) == "e1000e"
    assert guest.live_groups() == []


def test_virtual_functions_have_groups_of_their_own() -> None:
    """SR-IOV: two functions made, two groups."""
    controller = guest.find_nvme("sriov")
    before = guest.find_devices(devices.NVME)
    (guest.PCI / controller / "sriov_numvfs").write_text("2")
    try:
        functions = set(guest.find_devices(devices.NVME)) - set(before)
        assert len({guest.group_of(function) for function in functions}) == 2
    finally:
        (guest.PCI / controller / "sriov_numvfs").write_text("0")


def test_rig_hotplug_from_inside() -> None:
    """QEMU adds a NIC at a test's word, the kernel sees it, QEMU takes it away."""
    before = guest.find_devices(devices.NIC_E1000E)
    with subprocess.Popen(
        ["udevadm", "monitor", "--kernel", "--subsystem-match=net"], stdout=subprocess.PIPE, text=True
    ) as monitor:
        assert monitor.stdout is not None
        try:
            # Its heading shows that it listens.
            while "KERNEL" not in monitor.stdout.readline():
                pass
            guest.qmp("device_add", driver="e1000e", id="plugged", bus=guest.hotplug_ports()[0])
            while "add" not in monitor.stdout.readline():
                pass
        finally:
            monitor.terminate()
    (added,) = set(guest.find_devices(devices.NIC_E1000E)) - set(before)
    assert guest.driver_of(added) == "e1000e"
    guest.qmp("device_del", id="plugged")
    assert guest.wait_for_qmp_event("DEVICE_DELETED", device="plugged")["event"] == "DEVICE_DELETED"
    assert guest.find_devices(devices.NIC_E1000E) == before


def test_qmp_error_reaches_the_test() -> None:
    """QEMU's words come through."""
    with pytest.raises(AssertionError, match="nowhere"):
        guest.qmp("device_del", id="nowhere")
