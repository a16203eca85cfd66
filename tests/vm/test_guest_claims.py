# SPDX-License-Identifier: Apache-2.0
"""Owners of groups: two containers, ended containers, two hooks at once, the release."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"


@one_runtime
def test_guest_claims_two_containers(containers: Containers) -> None:
    """A group is one container's; `auto` is what the others have left. Dead containers have nothing.

    Most runtimes are killed before they ever call poststop, so a claim ends with the container's init.
    """
    nic, other = guest.find_devices(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    first, first_state = guest_calls.make_created(containers, annotations=ask(nic))
    second, second_state = guest_calls.make_created(containers)
    assert guest_calls.call_hook(first_state).code == 0
    assert guest_calls.list_dev(first) == sorted(["devices.json", guest.group_of(nic), "vfio"])

    done = guest_calls.call_hook({**second_state, "annotations": ask(nic)})
    assert done.code == 1
    assert f"[claimed] group {guest.group_of(nic)}: belongs to container {first.name}" in done.stderr
    assert guest_calls.list_claims() == [first.name]
    assert guest_calls.list_dev(second) == []

    done = guest_calls.call_hook({**second_state, "annotations": ask(f"id:{devices.NIC_E1000E}")})
    assert (done.code, done.stderr) == (0, "")
    assert guest_calls.list_dev(second) == sorted(["devices.json", guest.group_of(other), "vfio"])
    assert guest_calls.release(second_state).code == 0
    assert guest.driver_of(nic) == "vfio-pci"
    assert guest.driver_of(other) == "e1000e"

    # A killed container, of whose end no runtime informs the hook.
    pid = first.read_pid()
    os.kill(pid, signal.SIGKILL)
    first.wait()
    done = guest_calls.call_hook({**second_state, "annotations": ask(nic)})
    assert (done.code, done.stderr) == (0, "")
    assert guest_calls.list_claims() == [second.name]
    undo_log = (guest_calls.CLAIMS / second.name).read_text()
    assert f"device\t{nic}\te1000e\t\t" in undo_log

    assert guest_calls.release(second_state).code == 0
    assert guest_calls.look_at_drivers() == before
    assert guest.live_groups() == []
    assert guest_calls.list_claims() == []
    # Once more is as good, and so it is for a container that never had anything.
    assert guest_calls.release(second_state).code == 0
    assert guest_calls.release({**second_state, "id": "never"}).code == 0


@one_runtime
def test_guest_claims_concurrent_hooks_one_device(containers: Containers) -> None:
    """Two simultaneous requests for one device: one gets it, the other is refused, every time."""
    nic = guest.find_device(devices.NIC_E1000E)
    states = [guest_calls.make_created(containers, annotations=ask(nic))[1] for _ in range(2)]
    with ThreadPoolExecutor() as candidates:
        for _ in range(3):
            done = list(candidates.map(guest_calls.call_hook, states))
            assert sorted(one.code for one in done) == [0, 1], done
            (lost,) = (one for one in done if one.code)
            assert "[claimed]" in lost.stderr
            (claim,) = guest_calls.list_claims()
            assert all(one.code == 0 for one in candidates.map(guest_calls.release, states))
            assert guest.driver_of(nic) == "e1000e"
    assert claim in [state["id"] for state in states]


@one_runtime
def test_guest_claims_concurrent_hooks_by_counting(containers: Containers) -> None:
    """Two plain containers count at the same moment: one has all there is, the other finds nothing free."""
    before = guest_calls.look_at_drivers()
    groups = bundles.vfio_devices("77", "78", "79", "80")
    made = [guest_calls.make_created(containers, devices=groups) for _ in range(2)]
    # The one that finds nothing waits for a device to be plugged in, until its deadline.
    with guest_calls.settings("deadline = 40"), ThreadPoolExecutor() as candidates:
        done = list(candidates.map(guest_calls.call_hook, [state for _, state in made]))
    assert sorted(one.code for one in done) == [0, 1], done
    (lost,) = (one for one in done if one.code)
    assert "[no-candidate]" in lost.stderr
    assert "belongs to container" in lost.stderr
    (winner,) = guest_calls.list_claims()
    for container, state in made:
        # The host's nodes of the one that lost are as the runtime made them.
        count = 6 if container.name == winner else 5
        assert len(guest_calls.list_dev(container)) == count
        assert guest_calls.release(state).code == 0
    assert guest_calls.look_at_drivers() == before
