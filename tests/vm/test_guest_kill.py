# SPDX-License-Identifier: Apache-2.0
"""kill -9 and SIGTERM at every step, on real devices: what is left is put back by the next hook or the release.

A step is a call that changes something (tests/support/fault_injection.py). What happens after the nth happens before
the next one. That each action of the plan is among them is checked against the plan that --dry-run prints.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from tests.support import fault_injection, guest_calls
from tests.support.fault_injection import Steps
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Container, Containers, Done

MACHINE = "standard"
# CI tries every third step with SIGTERM; OCI_VFIO_FULL=1 all of them.
STRIDE = 1 if os.environ.get("OCI_VFIO_FULL") else 3
# What carries an action of the plan out, as Steps notes it. Loading drivers is not among them: they are there.
CARRIED_OUT = {
    "override": "write .*/{subject}/driver_override b'vfio-pci",
    "unbind": "write .*/unbind b'{subject}'",
    "probe": "write .*/drivers_probe b'{subject}'",
    "remove": "unlink '{name}'",
    "create": "mknod '{name}'",
    "mount": "call_libc 'syscall' 429 ",
    "write": "write .*/devices.json ",
    "allow": "replace_program ",
}


def run_until(state: dict[str, Any], nth: int, alone: bool, *arguments: str) -> tuple[Done, Steps]:
    """Run the hook and kill it before its nth step; wait for its children too. alone: they are left to go on."""
    killing = Steps(nth, fault_injection.kill_alone if alone else fault_injection.kill_all)
    with fault_injection.orphans_are_ours():
        done = guest_calls.fork_hook(state, *arguments, prepare=killing.prepare)
        if not alone:
            killing.wait_for_children()
    return done, killing


def check_covered(state: dict[str, Any], done: list[str], kinds: set[str], there: str = "") -> None:
    """Check that every action of the plan is among the steps at which the hook was killed.

    kinds: actions that the plan must have; there: the node that the runtime has made as it should be.
    """
    printed = guest_calls.fork_hook(state, "--dry-run", "--json")
    plan = json.loads(printed.stdout)["plan"]
    assert {action["action"] for action in plan} >= kinds
    for action in plan:
        if action["action"] == "load" or (action["action"] == "create" and action["subject"] == there):
            continue
        subject = action["subject"]
        wanted = CARRIED_OUT[action["action"]].format(subject=subject, name=os.path.basename(subject))
        assert any(re.match(wanted, line) for line in done), (wanted, done)


def open_in_cgroup(name: str, path: str) -> str:
    """Return what opening a node comes to inside a container's cgroup: "ok" or the error's name."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            Path(f"/sys/fs/cgroup/{name}/cgroup.procs").write_text("0")
            os.close(os.open(path, os.O_RDWR))
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return errno.errorcode.get(code, str(code)) if code else "ok"


def take_stock(container: Container, address: str) -> tuple[Any, ...]:
    """Return all that the hook changes: driver, override, nodes, permission, mounts, claims."""
    pid = container.read_pid()
    nodes = {}
    for name in guest_calls.list_dev(container):
        status = Path(f"/proc/{pid}/root/dev/vfio/{name}").stat()
        nodes[name] = (status.st_mode, status.st_rdev, status.st_uid, status.st_gid)
    mounts = [line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    permitted = open_in_cgroup(container.name, "/dev/vfio/vfio")
    # A draft of a claim is none; the next hook that binds takes it away.
    claims = [name for name in guest_calls.list_claims() if not name.startswith(".")]
    return guest.driver_of(address), guest.override_of(address), nodes, permitted, mounts, claims


def kill_at_every_step(
    container: Container, state: dict[str, Any], other: dict[str, Any], address: str, first: int = 0
) -> list[str]:
    """Kill the hook before each of its steps; return them. It has run to its end when this returns.

    By turns all of the hook's processes are killed, and the hook of another container comes next; or only the hook's
    own process, and the container's release comes next.
    """
    before = take_stock(container, address)
    nth = first
    while True:
        alone = bool(nth % 2)
        done, killing = run_until(state, nth, alone)
        if done.code == 0:
            assert guest_calls.list_claims() == [container.name]
            return killing.list_done()
        assert done.code == -signal.SIGKILL, (nth, done)
        if alone:
            assert guest_calls.fork_hook({**state, "status": "stopped"}, "poststop") == Done(0, "", ""), nth
        else:
            refused = guest_calls.fork_hook(other)
            (reported,) = guest_calls.list_findings(refused)
            assert "[bridge]" in reported, nth
        assert take_stock(container, address) == before, nth
        nth += 1


def find_bridge() -> str:
    """Return the address of a bridge, which every hook refuses after it has looked after what others left."""
    return guest.members_of(guest.group_of(guest.find_device(devices.NIC_E1000)))[0]


@one_runtime
def test_guest_hook_killed_at_every_step(containers: Containers) -> None:
    """Of a hook that binds, then of one that releases."""
    nic = guest.find_device(devices.NIC_E1000E)
    # The driver stays loaded, so that the control node can be tried before and after.
    guest.bind(nic, "vfio-pci")
    guest.bind_native(nic)
    container, state = guest_calls.make_created(containers, annotations=ask(nic), devices=bundles.vfio_devices("77"))
    _, other = guest_calls.make_created(containers)
    other["annotations"] = ask(find_bridge())
    before = take_stock(container, nic)
    assert before[:2] == ("e1000e", "") and before[3] == "EPERM" and sorted(before[2]) == ["77", "vfio"]
    # Each write and node of one device is a step; fewer would mean that they were not counted.
    done = kill_at_every_step(container, state, other, nic)
    assert len(done) > 25
    assert take_stock(container, nic)[3] == "ok"

    stopped = {**state, "status": "stopped"}
    guest_calls.forget_success(container.name)
    assert guest_calls.fork_hook(stopped, "poststop") == Done(0, "", "")
    check_covered(state, done, {"override", "unbind", "probe", "remove", "create", "allow"}, there="/dev/vfio/vfio")
    assert guest_calls.fork_hook(state) == Done(0, "", "")
    nth = 0
    while True:
        guest_calls.forget_success(container.name)
        killed, _ = run_until(stopped, nth, False, "poststop")
        if killed.code == 0:
            break
        assert killed.code == -signal.SIGKILL, (nth, killed)
        assert guest_calls.fork_hook(stopped, "poststop") == Done(0, "", ""), nth
        assert take_stock(container, nic) == before, nth
        assert guest_calls.fork_hook(state) == Done(0, "", ""), nth
        nth += 1
    assert nth > 10
    assert take_stock(container, nic) == before


@one_runtime
def test_guest_hook_killed_with_user_namespace(containers: Containers) -> None:
    """The same where nodes are mounted instead of made; until there they are the same steps."""
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    container, state = guest_calls.make_created(containers, annotations=ask(nic), user_namespace=100000)
    _, other = guest_calls.make_created(containers)
    other["annotations"] = ask(find_bridge())
    done = kill_at_every_step(container, state, other, nic, first=4)
    assert len(done) > 15
    assert guest_calls.release(state).code == 0
    check_covered(state, done, {"mount", "allow"})


@one_runtime
def test_guest_hook_sigterm_at_every_step(containers: Containers) -> None:
    """SIGTERM, as a service manager or a runtime that is stopped sends it: the hook itself puts everything back."""
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    guest.bind_native(nic)
    container, state = guest_calls.make_created(containers, annotations=ask(nic), devices=bundles.vfio_devices("77"))
    before = take_stock(container, nic)
    reported, nth = 0, 0
    while True:
        ending = Steps(nth, fault_injection.terminate)
        done = guest_calls.fork_hook(state, prepare=ending.prepare)
        if not ending.has_fired:
            break
        if done.code == 1:
            assert "[interrupted] the hook: was ended by SIGTERM" in done.stderr
            reported += 1
        else:
            # Before its first change, or after its last one.
            assert done.code in (0, -signal.SIGTERM), (nth, done)
            guest_calls.forget_success(container.name)
            assert guest_calls.fork_hook({**state, "status": "stopped"}, "poststop") == Done(0, "", ""), nth
        assert take_stock(container, nic) == before, nth
        nth += STRIDE
    assert reported > 15 // STRIDE
    assert guest_calls.release(state).code == 0


# A hook that hangs after all but the permission is done, and so has the most to undo.
HANGING = """#!/usr/bin/python3 -I
import sys, time
sys.path.insert(0, {repository!r})
from oci_hooks.guest import access
from oci_hooks.guest.apply import drivers
from oci_hooks.guest import hook
access.grant_nodes = lambda *_: time.sleep(600)
sys.exit(hook.main([]))
"""


def test_guest_hook_runtime_timeout(containers: Containers) -> None:
    """runc and crun kill a hook that takes longer than config.json allows, and the container with it."""
    nic = guest.find_device(devices.NIC_E1000E)
    _, other = guest_calls.make_created(containers)
    other["annotations"] = ask(find_bridge())
    before = guest_calls.look_at_drivers()
    hook = Path("/run/hanging-hook")
    hook.write_text(HANGING.format(repository=str(bundles.REPOSITORY)))
    hook.chmod(0o755)
    hooks = {"createRuntime": [bundles.make_hook(str(hook), timeout=40)]}
    container = containers.make("/bin/true", hooks=hooks, annotations=ask(nic))
    assert container.create().code != 0
    # It had come so far, and nobody has put anything back yet.
    assert guest.driver_of(nic) == "vfio-pci"
    assert guest_calls.list_claims() == [container.name]
    (reported,) = guest_calls.list_findings(guest_calls.fork_hook(other))
    assert "[bridge]" in reported
    assert guest_calls.look_at_drivers() == before
    assert guest_calls.list_claims() == []


@one_runtime
def test_guest_hook_clock_set_back(containers: Containers) -> None:
    """A day, while the hook waits for a device: its deadline does not move."""
    _, state = guest_calls.make_created(containers, annotations=ask("0000:7f:1f.7"))
    now = time.clock_gettime(time.CLOCK_REALTIME)
    with guest_calls.settings("deadline = 5"):
        # The step is the hook's: what it writes first comes long before its deadline.
        back = Steps(0, lambda _: time.clock_settime(time.CLOCK_REALTIME, now - 86400))
        try:
            done = guest_calls.fork_hook(state, prepare=back.prepare)
        finally:
            time.clock_settime(time.CLOCK_REALTIME, now)
    assert back.has_fired
    assert done.code == 1
    assert "[no-such-device]" in done.stderr


@one_runtime
def test_guest_hook_memory_limit(containers: Containers) -> None:
    """The real executable in a cgroup with that much memory and no swap; with 4 it is killed, and nothing is left."""
    nic = guest.find_device(devices.NIC_E1000E)
    container, state = guest_calls.make_created(containers, annotations=ask(nic))
    before = take_stock(container, nic)
    cgroup = Path("/sys/fs/cgroup/narrow")
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
    cgroup.mkdir()
    try:
        for limit, code in (("24M", 0), ("4M", -signal.SIGKILL)):
            (cgroup / "memory.max").write_text(limit)
            done = guest_calls.call_hook(state, preexec_fn=lambda: (cgroup / "cgroup.procs").write_text("0"))
            assert done.code == code, (limit, done)
            assert guest_calls.release(state).code == 0
            assert take_stock(container, nic) == before, limit
    finally:
        cgroup.rmdir()
