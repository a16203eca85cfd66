# SPDX-License-Identifier: Apache-2.0
"""Properties of the machine "single"."""

from __future__ import annotations

from tests.vm import devices, guest

MACHINE = "single"
KERNELS = ("6.1", "6.12", "full")


def test_single_half_bound_group() -> None:
    """A USB controller with a driver, a device without one, one group."""
    controller, idle = guest.find_device(devices.XHCI), guest.find_device(devices.TESTDEV)
    assert guest.group_of(controller) == guest.group_of(idle)
    assert (guest.driver_of(controller), guest.driver_of(idle)) == ("xhci_hcd", "")


def test_single_nic_alone() -> None:
    """The one endpoint that is not QEMU's own."""
    (nic,) = guest.find_devices(devices.NIC_E1000E)
    assert guest.members_of(guest.group_of(nic)) == [nic]
