# SPDX-License-Identifier: Apache-2.0
"""32 hooks at once on real devices: six containers, three groups, one hook killed in each round.

Hundreds of rounds run on made devices (tests/unit/guest/test_concurrent_hooks.py); these show that the kernel, its
cgroups and its drivers do not make a difference.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
from typing import Any

from tests.support import fault_injection, guest_calls
from tests.support.fault_injection import Steps
from tests.support.guest_calls import ask, one_runtime
from tests.vm import devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"
ROUNDS = 10 if os.environ.get("OCI_VFIO_FULL") else 2
HOOKS = 32


def start_hook(state: dict[str, Any], steps_of_it: Steps | None) -> int:
    """Start the hook in a fork and return its pid. Its output goes to the logs: the exit code is what counts."""
    reader, writer = os.pipe()
    os.write(writer, json.dumps(state).encode())
    os.close(writer)
    child = os.fork()
    if child == 0:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for target, fd in enumerate((reader, null, null)):
                os.dup2(fd, target)
            if steps_of_it:
                steps_of_it.prepare()
            os._exit(importlib.import_module("oci_hooks.guest.hook").main([]))
        finally:
            os._exit(70)
    os.close(reader)
    return child


@one_runtime
def test_guest_storm_32_hooks(containers: Containers) -> None:
    nics = [*guest.find_devices(devices.NIC_E1000E), guest.find_device(devices.NIC_E1000)]
    made = [guest_calls.make_created(containers, annotations=ask(nics[number % 3])) for number in range(6)]
    before = guest_calls.look_at_drivers()
    guest_calls.import_hook()
    for number in range(ROUNDS):
        killing = Steps(4 + number * 9 % 30, fault_injection.kill_alone)
        with guest_calls.settings("deadline = 100"), fault_injection.orphans_are_ours():
            hooks = [start_hook(made[hook % 6][1], None if hook else killing) for hook in range(HOOKS)]
            ends = [os.waitstatus_to_exitcode(os.waitpid(hook, 0)[1]) for hook in hooks]
            killing.wait_for_children()
        assert set(ends[1:]) <= {0, 1}, ends
        assert ends[0] in (0, 1, -signal.SIGKILL)
        winners = {made[hook % 6][0].name for hook, end in enumerate(ends) if end == 0}
        owners: dict[str, list[str]] = {}
        for container, _ in made:
            for name in guest_calls.list_dev(container):
                if name.isdigit():
                    owners.setdefault(name, []).append(container.name)
        for group, names in owners.items():
            assert len(set(names) & winners) <= 1, (number, group, names, ends)
            assert set(names) <= set(guest_calls.list_claims()), (number, group, names)
        # Somebody has each group: the killed one's was taken over, unless it was killed last.
        assert len(winners) >= 2, ends
        for _, state in made:
            guest_calls.forget_success(str(state["id"]))
            assert guest_calls.fork_hook({**state, "status": "stopped"}, "poststop").code == 0
        assert guest_calls.look_at_drivers() == before
        assert guest_calls.list_claims() == []
        assert all(not guest_calls.list_dev(container) for container, _ in made)
