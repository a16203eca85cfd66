# SPDX-License-Identifier: Apache-2.0
"""32 hooks at once for four groups, one of them killed in each round: one owner a group, no deadlock, no lost claim.

The processes, the claims, their locks and the kill are real; the devices are made (tests/support/fake_kernel.py),
because 32 interpreters in an emulated machine take minutes a round. tests/vm/test_guest_storm.py does some rounds on
real devices.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from tests.support import fault_injection
from tests.support.fake_kernel import CHANGING, ActingMachine, Container
from tests.support.fault_injection import Steps

pytestmark = pytest.mark.unit

# CI is shortened to 12 rounds; OCI_VFIO_FULL=1: 200.
ROUNDS = 200 if os.environ.get("OCI_VFIO_FULL") else 12
HOOKS, GROUPS, CONTAINERS = 32, 4, 16
Note = Callable[[str, object], None]


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Iterator[ActingMachine]:
    """Return a machine with four groups, and sixteen containers that ask for them in turn."""
    machine = ActingMachine(tmp_path, groups=GROUPS)
    for number in range(CONTAINERS):
        machine.make_container(f"c{number:02}", f"0000:{number % GROUPS + 1:02x}:00.0")
    yield machine
    machine.end()


def test_concurrent_hooks_32_for_four_groups(machine: ActingMachine, record_property: Note) -> None:
    """Each container has two hooks at once. The final state is checked, whichever hook comes first."""
    before = machine.take_stock()
    killed = 0
    for number in range(ROUNDS):
        victim = number * 7 % HOOKS
        killing = Steps(number % 30, fault_injection.kill_alone, CHANGING)
        runs = []
        with fault_injection.orphans_are_ours():
            for hook in range(HOOKS):
                container = machine.containers[hook % CONTAINERS]
                prepare = killing.prepare if hook == victim else lambda: None
                runs.append(machine.start(container.state, prepare=prepare))
            ends = [run.finish() for run in runs]
            killing.wait_for_children()
        killed += ends[victim][0] == -signal.SIGKILL
        for hook, (code, output) in enumerate(ends):
            assert code in (0, 1) or hook == victim, (number, hook, code, output)
            # On a machine with little time the lock may not be had within the deadline.
            words = "[claimed]" in output or "[lock-timeout]" in output
            assert code == 0 or hook == victim or words, (number, hook, output)
        check_owners(machine, ends, number)
        for container in machine.containers:
            assert machine.call(container.stopped, "poststop") == (0, ""), number
        assert machine.take_stock() == before, number
    # The loser of a race for a group has few steps, so not every victim comes to its end.
    assert killed > ROUNDS // 4
    record_property("faults", killed)


def check_owners(machine: ActingMachine, ends: list[tuple[int, str]], number: int) -> None:
    """Check that a group is one container's at most, that a hook with success has it, and that no other has a node."""
    winners = {machine.containers[hook % CONTAINERS].name for hook, (code, _) in enumerate(ends) if code == 0}
    owners: dict[str, list[str]] = {}
    for container in machine.containers:
        for group in groups_of(container):
            owners.setdefault(group, []).append(container.name)
        assert bool(groups_of(container)) >= (container.name in winners), (number, container.name)
    claims = set(machine.list_claims())
    for group, names in owners.items():
        # A killed hook's nodes stay until the next hook undoes its claim, which names their owner.
        assert len(set(names) & winners) <= 1, (number, group, names)
        assert set(names) <= claims, (number, group, names)
    assert winners <= claims, number


def groups_of(container: Container) -> list[str]:
    """Return the groups that a container has nodes of."""
    return [name for name in container.list_dev() if name.startswith("vfio/") and name[5:].isdigit()]
