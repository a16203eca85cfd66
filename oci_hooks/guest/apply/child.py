# SPDX-License-Identifier: Apache-2.0
"""Run in a child process any work that may block for ever, or that the hook's own process could not undo.

A child that hangs in the kernel survives even SIGKILL: it must hold nothing that another process waits for, and no
process waits for it.
"""

from __future__ import annotations

import os

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
else:
    # The same functions; the module proper imports enum.
    import _signal as signal

# The signals by which the hook is told to end.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Child(Frozen):
    """A running child. pipe: for its answer; only the child has the write end, so its exit closes the pipe."""

    pid: int
    pipe: int


def start_child(work: Callable[[int], object], close_fds: tuple[int, ...] = ()) -> Child:
    """Start a child that does some work and ends. Raises OSError if no process or descriptor is available.

    work: called with the descriptor for its answer; an exception in it ends the child; close_fds: descriptors that the
    child must close: one that hangs keeps what it inherited, including locks.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    try:
        pid = fork()
        if pid == 0:
            # Leave the work as many free descriptors as possible.
            os.close(reader)
            detach_from_runtime(close_fds)
            work(writer)
    except OSError:
        os.close(reader)
        raise
    finally:
        # Whatever happens in the child, even a signal's exception: it must not return into the hook.
        if os.getpid() != parent:
            os._exit(0)
        os.close(writer)
    return Child(pid, reader)


def fork() -> int:
    """Fork, and return as os.fork does.

    Meanwhile signals wait: what a handler raises inside of os.fork may be lost (os.register_at_fork), and the hook
    would never end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        return os.fork()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def detach_from_runtime(close_fds: tuple[int, ...]) -> None:
    """Close what the runtime waits for: it reads the hook's output to its end."""
    # At the limit on open files no fourth descriptor is available.
    os.close(0)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)
    for fd in close_fds:
        os.close(fd)


def end_child(child: Child, seconds: float) -> None:
    """Kill a child unless it has ended, and reap it unless it hangs in the kernel. Idempotent.

    seconds: time for it to end. Only a child that hangs inside a driver takes longer, and nothing can end that one. The
    kill takes effect as soon as the kernel's call returns, so the child's remaining steps are not done late.
    """
    if not is_open(child.pipe):
        return
    if not has_ended(child, 0):
        # As a number: the signal module costs an import.
        os.kill(child.pid, 9)
    if has_ended(child, seconds):
        reap(child.pid)
    # Last, because an open pipe means that the child must still be ended.
    os.close(child.pipe)


def has_ended(child: Child, seconds: float) -> bool:
    """Return whether a child closes its end of the pipe within some seconds: it has ended, or is about to."""
    import select

    poller = select.poll()
    # No event is requested: poll() always reports the hang-up.
    poller.register(child.pipe, 0)
    return bool(poller.poll(seconds * 1000))


def reap(pid: int) -> None:
    """Collect a child's exit status."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        # Already reaped: by the kernel, as the runtime ignores SIGCHLD (inherited), or by an interrupted earlier call.
        return


def is_open(fd: int) -> bool:
    """Return whether a descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
