# SPDX-License-Identifier: Apache-2.0
"""How a hook ends that is killed, with on_failure = "kill"; and what a release finds on a read-only file system."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.support import fault_injection, guest_calls
from tests.support.fault_injection import Steps
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Container, Containers, Done

MACHINE = "standard"
LIMIT = 30.0
# No device has this address: the hook waits for it.
ABSENT = "0000:7f:1f.7"
KILL = ("deadline = 60", 'on_failure = "kill"')


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until something is so. Fails after a while."""
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def list_children(pid: int) -> list[int]:
    """Return the children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(container: Container) -> bool:
    """Return whether a container's init is there and no zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{container.read_pid()}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def list_open_paths(pid: int) -> set[str]:
    """Return what a process's descriptors are of, without those that are closed meanwhile."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(path))
    return found


def start_hook(state: dict[str, Any]) -> subprocess.Popen[str]:
    """Start the real executable as Kata's agent does, and wait until it waits for a device."""
    command, pipe = [bundles.find_hook(bundles.GUEST_HOOK), "prestart"], subprocess.PIPE
    hook = subprocess.Popen(command, text=True, env={}, stdin=pipe, stdout=pipe, stderr=pipe)
    assert hook.stdin
    hook.stdin.write(json.dumps(state))
    hook.stdin.close()
    # By then it listens to the kernel's events.
    wait_until(lambda: any(name.startswith("socket:") for name in list_open_paths(hook.pid)))
    return hook


@one_runtime
@pytest.mark.parametrize("on_failure", ["kill", "report"])
def test_guest_hook_stopped_then_killed(containers: Containers, on_failure: str) -> None:
    """As by Kata's agent, which reads the hook's output to its end: that must come with the hook's own end."""
    container, state = guest_calls.make_created(containers, annotations=ask(ABSENT))
    with guest_calls.settings("deadline = 60", f'on_failure = "{on_failure}"'), fault_injection.orphans_are_ours():
        hook = start_hook(state)
        guards = list_children(hook.pid)
        assert len(guards) == (on_failure == "kill")
        hook.send_signal(signal.SIGSTOP)
        wait_until(lambda: "State:\tT" in Path(f"/proc/{hook.pid}/status").read_text())
        assert is_alive(container)
        assert hook.stdout and hook.stderr
        held = {os.readlink(f"/proc/{os.getpid()}/fd/{file.fileno()}") for file in (hook.stdout, hook.stderr)}
        assert not any(held & list_open_paths(guard) for guard in guards)
        hook.kill()
        assert (hook.stdout.read(), hook.stderr.read()) == ("", "")
        assert hook.wait(LIMIT) == -signal.SIGKILL
        for guard in guards:
            assert os.waitpid(guard, 0) == (guard, 0)
    if on_failure == "kill":
        container.wait(LIMIT)
    assert is_alive(container) == (on_failure == "report")
    for guard in guards:
        reported = f"vfio-guest-bind[{guard}]: container {container.name}: error: [hook-killed] the hook: was killed "
        assert reported in guest.read_kernel_log()


@one_runtime
def test_guest_hook_killed_at_steps_with_guard(containers: Containers) -> None:
    """On a real device: the container dies, and the release restores what was begun; alone or as a group."""
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    for turn, nth in enumerate(random.Random(seed).sample(range(24), 3)):  # noqa: S311
        container, state = guest_calls.make_created(containers, annotations=ask(nic))
        killing = Steps(nth, fault_injection.kill_all if turn % 2 else fault_injection.kill_alone)
        with guest_calls.settings(*KILL), fault_injection.orphans_are_ours():
            known = fault_injection.list_children()
            done = guest_calls.fork_hook(state, prepare=killing.prepare)
            for child in fault_injection.list_children() - known:
                os.waitpid(child, 0)
        assert done.code == -signal.SIGKILL, (nth, done)
        container.wait(LIMIT)
        assert guest_calls.fork_hook({**state, "status": "stopped"}, "poststop") == Done(0, "", ""), nth
        assert guest_calls.look_at_drivers() == before, nth
        # A draft of a claim is none; the next hook that binds takes it away.
        assert [name for name in guest_calls.list_claims() if name[0] != "."] == []


@one_runtime
def test_guest_hook_done_leaves_no_guard(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    container, state = guest_calls.make_created(containers, annotations=ask(nic))
    with guest_calls.settings(*KILL), fault_injection.orphans_are_ours():
        known = fault_injection.list_children()
        assert guest_calls.call_hook(state, "prestart") == Done(0, "", "")
        assert fault_injection.list_children() == known
    assert is_alive(container)
    assert "vfio" in guest_calls.list_dev(container)
    assert guest_calls.release(state).code == 0


def test_release_on_read_only_root(containers: Containers) -> None:
    """The container's /dev is gone, and its root file system has no /dev/vfio: nothing is left to remove."""
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    hooks = bundles.guest_hooks()
    container = containers.make(*bundles.PROBE, annotations=ask(nic), hooks=hooks, readonly_root=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", container.root], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (container.root / "dev/vfio").mkdir()
    done = container.create()
    assert done.code == 0, done.stderr
    state = container.read_state()
    assert container.start().code == 0
    container.wait()
    # As Kata's agent calls it: status `running`, a pid that is gone, another directory, no argument.
    ended = {**state, "status": "running"}
    assert guest_calls.call_hook(ended, cwd="/") == Done(0, "", "")
    assert guest_calls.list_claims() == []
    assert guest_calls.look_at_drivers() == before
    # Without a claim there is nothing to release, and nothing to bind to.
    again = guest_calls.call_hook(ended, cwd="/")
    assert again.code == 1
    assert "[no-process]" in again.stderr
