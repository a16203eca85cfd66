# SPDX-License-Identifier: Apache-2.0
"""Run in a child process what may block for ever, or cannot be undone in the hook's own process.

A child that hangs in the kernel outlives even SIGKILL: it must hold nothing that anybody waits for, and nobody waits
for it.
"""

from __future__ import annotations

import os

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Child(Frozen):
    """A child at work. pipe: what it has to say; only the child has the other end, so that its end closes that."""

    pid: int
    pipe: int


def start_child(work: Callable[[int], object], close_fds: tuple[int, ...] = ()) -> Child:
    """Start a child that does some work and ends. Raises OSError where there is no process or descriptor to be had.

    work: is given the descriptor to write its answer to; what it raises ends the child; close_fds: descriptors that the
    child must not keep open: one that hangs keeps what it inherited, locks among it.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            # Each descriptor that is free is one more for the work.
            os.close(reader)
            detach_from_runtime(close_fds)
            work(writer)
    except OSError:
        os.close(reader)
        raise
    finally:
        # Whatever happens in the child, also a signal's exception: it must not return into the hook.
        if os.getpid() != parent:
            os._exit(0)
        os.close(writer)
    return Child(pid, reader)


def detach_from_runtime(close_fds: tuple[int, ...]) -> None:
    """Let go of what the runtime waits for: it reads the hook's output to its end."""
    # Where the limit on open files is reached there is no number for a fourth.
    os.close(0)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)
    for fd in close_fds:
        os.close(fd)


def end_child(child: Child, seconds: float) -> None:
    """Kill a child unless it has ended, and reap it, unless it hangs in the kernel. Idempotent.

    seconds: how long it may take to end. Only one that hangs inside a driver needs more, and nothing ends that.
    The kill takes effect when the kernel lets go of it, so that what it had still to do is not done late.
    """
    if not is_open(child.pipe):
        return
    if not has_ended(child, 0):
        # As a number: the signal module costs an import.
        os.kill(child.pid, 9)
    if has_ended(child, seconds):
        reap(child.pid)
    # Last: as long as it is open, the child has still to be ended.
    os.close(child.pipe)


def has_ended(child: Child, seconds: float) -> bool:
    """Return whether a child has closed its end of the pipe within some seconds: it is gone, or about to be."""
    import select

    poller = select.poll()
    # Nothing is asked for but the hang-up, which is always told.
    poller.register(child.pipe, 0)
    return bool(poller.poll(seconds * 1000))


def reap(pid: int) -> None:
    """Take a child's exit code from the kernel."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        # The runtime ignores its children (SIGCHLD, inherited), and so the kernel has; or a signal came right after.
        return


def is_open(fd: int) -> bool:
    """Return whether a descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
