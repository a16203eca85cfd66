# SPDX-License-Identifier: Apache-2.0
"""A guest that has cgroups of version 1 alone, as a Kata guest has before Kata 3.14."""

from __future__ import annotations

from pathlib import Path

from tests.support.guest_calls import ask, list_claims
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers
from tests.vm.iommus.scenario import test_group_opens_with_hook_only  # noqa: F401 - pytest finds it here

MACHINE = "cgroup-v1"
CONTROLLER = Path("/sys/fs/cgroup/devices")
WAIT = ("/bin/sleep", "600")


def read_list(name: str) -> set[str]:
    """Return the rules that the kernel has for a container's cgroup."""
    return set((CONTROLLER / name / "devices.list").read_text().splitlines())


def test_permits_exactly_the_nodes(containers: Containers) -> None:
    """Beside what the runtime permits: the group's node and the control node; nothing after the release."""
    assert not (CONTROLLER.parent / "cgroup.controllers").exists()
    nic = guest.find_device(devices.NIC_E1000E)
    plain = containers.make(*WAIT, hooks={})
    bound = containers.make(*WAIT, annotations=ask(nic), hooks=bundles.guest_hooks("createRuntime", "poststop"))
    for container in (plain, bound):
        done = container.create()
        assert done.code == 0, done.stderr
    number = Path(f"/sys/class/vfio/{guest.group_of(nic)}/dev").read_text().strip()
    assert read_list(bound.name) - read_list(plain.name) == {"c 10:196 rw", f"c {number} rw"}
    # A second container must not have it, and keeps the rules that it had.
    second = containers.make(*WAIT, annotations=ask(nic))
    done = second.create()
    assert done.code != 0
    assert "[claimed]" in done.stderr, done.stderr
    assert bound.delete().code == 0
    assert guest.driver_of(nic) == "e1000e"
    assert list_claims() == []
