# SPDX-License-Identifier: Apache-2.0
"""Something happens to the hook at its nth step: kill -9, a signal, an error of the system, a device that goes.

A step is a call that changes something: a write (sysfs, cgroup, undo log), a node, a directory, a device program, a
mount. The hook runs in a fork of the test with these calls wrapped. They are counted over all of its processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from tempfile import TemporaryFile
from typing import Any, Callable

PR_SET_CHILD_SUBREAPER = 36
CHANGES = {
    "os": ("write", "mknod", "unlink", "mkdir", "rmdir", "rename", "chown", "ftruncate"),
    "oci_hooks.guest.apply.bpf": ("load_program", "replace_program"),
    "oci_hooks.guest.apply.mount_ns": ("call_libc",),
}
COUNT, LEADER, FIRED = slice(0, 8), slice(8, 16), slice(16, 24)


class Steps:
    """Calls `act` before the nth step of a hook. wrapped: module → functions that are steps."""

    def __init__(
        self, nth: int, act: Callable[[Steps], None], wrapped: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        self.nth = nth
        self.act = act
        self.wrapped = wrapped or CHANGES
        self.shared = mmap.mmap(-1, 24)
        self.turn = threading.Lock()
        self.log = TemporaryFile("a+b", buffering=0)  # noqa: SIM115 - lives as long as this object

    def prepare(self) -> None:
        """Wrap the steps. Runs in the hook's process, before the hook."""
        os.setpgid(0, 0)
        self.write(LEADER, os.getpid())
        for module, names in self.wrapped.items():
            for name in names:
                owner = importlib.import_module(module)
                setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name: str, step: Callable[..., Any], write: Callable[..., int] = os.write) -> Callable[..., Any]:
        """Return the step with the event before it."""

        def counted(*arguments: Any, **named: Any) -> Any:
            # Two of its processes or threads may be at a step at once, and only one of them is at the nth.
            with self.turn:
                fcntl.lockf(self.log, fcntl.LOCK_EX)
                done = self.read(COUNT)
                self.write(COUNT, done + 1)
                fcntl.lockf(self.log, fcntl.LOCK_UN)
            write(self.log.fileno(), f"{name} {' '.join(map(describe, arguments))}\n".encode())
            if done == self.nth:
                self.write(FIRED, 1)
                self.act(self)
            return step(*arguments, **named)

        return counted

    def list_done(self) -> list[str]:
        """Return the steps that were begun, each as its name and arguments."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace").splitlines()

    @property
    def leader(self) -> int:
        """The hook's own process."""
        return self.read(LEADER)

    @property
    def has_fired(self) -> bool:
        """Return whether the hook reached the nth step."""
        return bool(self.read(FIRED))

    def wait_for_children(self) -> None:
        """Wait for what a killed hook left running. Call it with orphans_are_ours around the hook's run."""
        with contextlib.suppress(ChildProcessError):
            while True:
                # Asked again and again: the kernel wakes nobody for a child that leaves the group before it ends.
                if os.waitpid(-self.leader, os.WNOHANG) == (0, 0):
                    time.sleep(0.002)

    def read(self, place: slice) -> int:
        """Return a number that the hook's processes have in common."""
        return int.from_bytes(self.shared[place], "little")

    def write(self, place: slice, number: int) -> None:
        """Set a number that the hook's processes have in common."""
        self.shared[place] = number.to_bytes(8, "little")


def describe(argument: object) -> str:
    """Return an argument of a step on one line; a descriptor as the path that it is of."""
    if type(argument) is int:
        try:
            return os.readlink(f"/proc/self/fd/{argument}")
        except OSError:
            return str(argument)
    return repr(argument[:200]) if isinstance(argument, (str, bytes)) else type(argument).__name__


# What may happen ------------------------------------------------------------------------------------------------------


def kill_all(steps: Steps) -> None:
    """Kill the hook and its children: a machine that loses its processes, a cgroup that is killed."""
    os.killpg(steps.leader, signal.SIGKILL)


def kill_alone(steps: Steps) -> None:
    """Kill the hook's own process. Its children go on."""
    os.kill(steps.leader, signal.SIGKILL)


def terminate(steps: Steps) -> None:
    """Ask the hook to end."""
    os.kill(steps.leader, signal.SIGTERM)


def fail_with(code: int) -> Callable[[Steps], None]:
    """Return an event: this step fails with this errno, once."""

    def fail(_: Steps) -> None:
        raise OSError(code, os.strerror(code), "a step")

    return fail


def list_children() -> set[int]:
    """Return the children of this process, zombies too."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(map(int, file.read().split()))


@contextlib.contextmanager
def orphans_are_ours() -> Iterator[None]:
    """Have the children of a killed hook become this process's, so that it can wait for their end."""
    library = ctypes.CDLL(None)
    library.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        library.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
