# SPDX-License-Identifier: Apache-2.0
"""A guest without a virtual IOMMU: nothing can be bound, and the message names the line to change on the host."""

from __future__ import annotations

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "no-iommu"


@one_runtime
def test_guest_without_iommu_refused(containers: Containers) -> None:
    """By annotation and by counting; at once, not at the deadline; nothing is touched."""
    nic = guest.find_device(devices.NIC_E1000E)
    assert guest.group_of(nic) == ""
    before = guest_calls.look_at_drivers()
    container, state = guest_calls.make_created(containers, devices=bundles.vfio_devices("77"))
    listed = guest_calls.list_dev(container)
    for wishes in (ask(nic), ask(f"id:{devices.NIC_E1000E}"), {}):
        done = guest_calls.call_hook({**state, "annotations": wishes})
        assert done.code == 1
        assert "[viommu-off]" in done.stderr
        assert nic in done.stderr
        assert "set enable_iommu = true in [hypervisor.qemu] of Kata's configuration.toml" in done.stderr
        assert "waited" not in done.stderr
    assert guest_calls.look_at_drivers() == before
    assert guest_calls.list_dev(container) == listed
    assert guest_calls.list_claims() == []


@one_runtime
def test_guest_without_iommu_container_not_started(containers: Containers) -> None:
    """The container is not started."""
    done = containers.probe(annotations=ask("auto"))
    assert done.code != 0
    assert done.stdout == ""
    assert "[viommu-off]" in done.stderr


def test_guest_without_iommu_survey_shows_devices() -> None:
    """--all names the line to change, and lists the devices all the same."""
    nic = guest.find_device(devices.NIC_E1000E)
    done = guest_calls.call_hook(None, "--all")
    assert done.code == 1
    assert "error: [viommu-off]" in done.stderr
    assert "set enable_iommu = true in [hypervisor.qemu] of Kata's configuration.toml" in done.stderr
    (line,) = (line for line in done.stdout.splitlines() if nic in line)
    assert line.startswith("-      no IOMMU")
    assert "has no IOMMU group" in line
