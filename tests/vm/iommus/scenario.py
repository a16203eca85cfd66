# SPDX-License-Identifier: Apache-2.0
"""The demo's scenario, and what both hooks report, on whatever IOMMU the machine has."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

# Steps of the probe up to the device's configuration space, read through VFIO.
STEPS = ("open", "get_status", "open_control", "set_container", "set_iommu")


def test_group_opens_with_hook_only(containers: Containers) -> None:
    """Without the hook the node is not even there; with it the device is read through VFIO, and given back."""
    nic = guest.find_device(devices.NIC_E1000E)
    assert containers.probe(hooks={}).read_json()["groups"] == []
    done = containers.probe(annotations=ask(nic), hooks=bundles.guest_hooks("createRuntime", "poststop"))
    assert done.code == 0, done.stderr
    (group,) = done.read_json()["groups"]
    assert [group.get(step) for step in STEPS] == ["ok"] * len(STEPS), group
    (found,) = list_endpoints(group)
    assert (found["address"], found["id"]) == (nic, devices.NIC_E1000E)
    assert guest.driver_of(nic) == "e1000e"
    assert guest_calls.list_claims() == []


def list_endpoints(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the probe reports of a group's devices but bridges: arm64 has a device's root port in its group."""
    return [member for member in group["devices"] if guest.class_of(member["address"]) != "0604"]


@one_runtime
def test_auto_leaves_iommu_alone(containers: Containers) -> None:
    """AMD's and virtio's IOMMU are PCI functions themselves."""
    done = containers.probe(annotations=ask("auto"))
    assert done.code == 0, done.stderr
    (group,) = done.read_json()["groups"]
    assert [member["address"] for member in list_endpoints(group)] == [guest.find_device(devices.NIC_E1000E)]


def test_host_check_ready() -> None:
    """The same machine as a host: its IOMMU is used, and the NIC's group can be passed."""
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    try:
        command = [bundles.find_hook(bundles.HOST_HOOK), "--group", guest.group_of(nic)]
        done = subprocess.run(command, capture_output=True, text=True, env={}, check=False)
    finally:
        guest.bind_native(nic)
    assert "[iommu-off]" not in done.stderr
    assert done.returncode == 0, done.stderr


def refuse_unused_iommu(containers: Containers, table: str, advice: str) -> None:
    """Check that the guest hook explains an IOMMU which the firmware reports in a table and the kernel does not use."""
    assert Path("/sys/firmware/acpi/tables", table).exists()
    assert not guest.GROUPS.is_dir() or not list(guest.GROUPS.iterdir())
    nic = guest.find_device(devices.NIC_E1000E)
    for wish in (nic, "auto"):
        done = containers.probe(annotations=ask(wish))
        assert done.code != 0
        assert "[viommu-off]" in done.stderr
        assert advice in done.stderr
        assert "waited" not in done.stderr
    assert guest.driver_of(nic) == "e1000e"
    assert guest_calls.list_claims() == []
