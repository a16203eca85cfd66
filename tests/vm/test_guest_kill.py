# SPDX-License-Identifier: Apache-2.0
"""kill -9 at every step: what the killed hook left is put back by the next hook or the release.

A step is a call that changes something: a write (sysfs, cgroup, journal), a node, a directory, a device program, a
mount. The hook runs in a fork of the test with these calls wrapped; before the nth one it is killed.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

from tests.vm import bundles, calls, devices, guest
from tests.vm.bundles import Container, Containers, Done
from tests.vm.calls import ask, one_runtime

MACHINE = "standard"
PR_SET_CHILD_SUBREAPER = 36
STEPS = {
    "os": ("write", "mknod", "unlink", "mkdir", "rmdir", "rename", "chown", "ftruncate"),
    "oci_hooks.bpf": ("load_program", "replace_program"),
    "oci_hooks.namespaces": ("call",),
}
COUNT, PROCESS_GROUP = slice(0, 8), slice(8, 16)


class Killer:
    """Kills the hook before its nth step, counted over all of its processes. alone: not its children, which go on."""

    def __init__(self, nth: int, alone: bool = False) -> None:
        self.nth = nth
        self.alone = alone
        self.shared = mmap.mmap(-1, 16)

    def prepare(self) -> None:
        """Wrap the steps. Runs in the hook's process, before the hook."""
        os.setpgid(0, 0)
        self.write(PROCESS_GROUP, os.getpid())
        for module, names in STEPS.items():
            for name in names:
                owner = importlib.import_module(module)
                setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step with the kill before it."""

        def counted(*arguments: Any, **named: Any) -> Any:
            done = self.read(COUNT)
            self.write(COUNT, done + 1)
            if done == self.nth:
                kill = os.kill if self.alone else os.killpg
                kill(self.read(PROCESS_GROUP), signal.SIGKILL)
            return step(*arguments, **named)

        return counted

    def run(self, state: dict[str, Any], *arguments: str) -> Done:
        """Run the hook to its end or its death, and wait for its children too if they are to die with it."""
        with orphans_are_ours():
            done = calls.fork_hook(state, *arguments, prepare=self.prepare)
            while not self.alone:
                try:
                    os.waitpid(-self.read(PROCESS_GROUP), 0)
                except ChildProcessError:
                    break
        return done

    def read(self, place: slice) -> int:
        """Return a number that the hook's processes have in common."""
        return int.from_bytes(self.shared[place], "little")

    def write(self, place: slice, number: int) -> None:
        """Set a number that the hook's processes have in common."""
        self.shared[place] = number.to_bytes(8, "little")


@contextmanager
def orphans_are_ours() -> Iterator[None]:
    """Have the children of a killed hook become this process's, so that it can wait for their end."""
    library = ctypes.CDLL(None)
    library.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        library.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


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
    for name in calls.list_dev(container):
        status = Path(f"/proc/{pid}/root/dev/vfio/{name}").stat()
        nodes[name] = (status.st_mode, status.st_rdev, status.st_uid, status.st_gid)
    mounts = [line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    permitted = open_in_cgroup(container.name, "/dev/vfio/vfio")
    # A draft of a claim is none; the next hook that binds takes it away.
    claims = [name for name in calls.list_claims() if not name.startswith(".")]
    return guest.driver_of(address), guest.override_of(address), nodes, permitted, mounts, claims


def kill_at_every_step(
    container: Container, state: dict[str, Any], other: dict[str, Any], address: str, first: int = 0
) -> int:
    """Kill the hook before each of its steps; return how many it has. It has run to its end when this returns.

    By turns all of the hook's processes are killed, and the hook of another container comes next; or only the hook's
    own process, and the container's release comes next.
    """
    before = take_stock(container, address)
    nth = first
    while True:
        alone = bool(nth % 2)
        done = Killer(nth, alone).run(state)
        if done.code == 0:
            assert calls.list_claims() == [container.name]
            return nth
        assert done.code == -signal.SIGKILL, (nth, done)
        if alone:
            assert calls.fork_hook({**state, "status": "stopped"}, "poststop") == Done(0, "", ""), nth
        else:
            refused = calls.fork_hook(other)
            (told,) = calls.list_findings(refused)
            assert "[bridge]" in told, nth
        assert take_stock(container, address) == before, nth
        nth += 1


def find_bridge() -> str:
    """Return the address of a bridge, which every hook refuses after it has looked after what others left."""
    return guest.members_of(guest.group_of(guest.find_device(devices.NIC_E1000)))[0]


@one_runtime
def test_kill_at_every_step(containers: Containers) -> None:
    """Of a hook that binds, then of one that releases."""
    nic = guest.find_device(devices.NIC_E1000E)
    # The driver stays loaded, so that the control node can be tried before and after.
    guest.bind(nic, "vfio-pci")
    guest.bind_native(nic)
    container, state = calls.make_created(containers, annotations=ask(nic), devices=bundles.vfio_devices("77"))
    _, other = calls.make_created(containers)
    other["annotations"] = ask(find_bridge())
    before = take_stock(container, nic)
    assert before[:2] == ("e1000e", "") and before[3] == "EPERM" and sorted(before[2]) == ["77", "vfio"]
    # Each write and node of one device is a step; fewer would mean that they were not counted.
    assert kill_at_every_step(container, state, other, nic) > 25
    assert take_stock(container, nic)[3] == "ok"

    stopped = {**state, "status": "stopped"}
    nth = 0
    while True:
        killed = Killer(nth).run(stopped, "poststop")
        if killed.code == 0:
            break
        assert killed.code == -signal.SIGKILL, (nth, killed)
        assert calls.fork_hook(stopped, "poststop") == Done(0, "", ""), nth
        assert take_stock(container, nic) == before, nth
        assert calls.fork_hook(state) == Done(0, "", ""), nth
        nth += 1
    assert nth > 10
    assert take_stock(container, nic) == before


@one_runtime
def test_kill_with_a_user_namespace(containers: Containers) -> None:
    """The same where nodes are mounted instead of made; until there they are the same steps."""
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    container, state = calls.make_created(containers, annotations=ask(nic), user_namespace=100000)
    _, other = calls.make_created(containers)
    other["annotations"] = ask(find_bridge())
    assert kill_at_every_step(container, state, other, nic, first=4) > 15
    assert calls.release(state).code == 0
