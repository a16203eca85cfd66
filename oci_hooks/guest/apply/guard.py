# SPDX-License-Identifier: Apache-2.0
"""Guard a container against the end of its hook: a process that kills the container's init when the hook is killed.

With on_failure = "kill" nothing may run without its devices, whatever ends the hook. Kata's agent kills a hook after
10 s and starts the container (kata-sys-util, hooks.rs, execute_hook); the hook itself can't act then, nor when it is
killed for lack of memory.

The verdict of the hook is that it ends its guard. So there is nothing to be lost or read late on the way to the guard:
it acts exactly when the hook is gone and it is not. Where both are killed (cgroup.kill), nobody acts, as without it.
"""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import Finding
from oci_hooks.guest.apply.child import Child, end_child, start_child
from oci_hooks.linux.processes import read_start_time
from oci_hooks.log import log_findings
from oci_hooks.system import Deadline, read_pipe, step

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal

    from oci_hooks.oci import State
    from oci_hooks.system import Root
else:
    # The same functions; the module proper imports enum.
    import _signal as signal

# Seconds for a guard to be in place, and for a killed one to end.
START_SECONDS = 1.0
KILL_SECONDS = 0.5


class Guard:
    """The guard of one container. program: the executable's name, for the logs; state: of the container."""

    def __init__(self, root: Root, program: str, state: State) -> None:
        self.root = root
        self.program = program
        self.state = state
        self.child: Child | None = None

    @step("start-guard")
    def start(self) -> None:
        """Start the guard, unless the container's init is not running. Raises OSError where there can be none."""
        # Never this machine's init.
        if self.state.pid <= 1 or not read_start_time(self.root, self.state.pid):
            return
        # Descriptors of processes: a number may be another process by the time that it is needed.
        hook = open_process(os.getpid())
        try:
            init = open_process(self.state.pid)
            try:
                self.child = start_child(lambda writer: self.watch(hook, init, writer))
            finally:
                os.close(init)
        finally:
            os.close(hook)
        # Not before it has left the hook's process group, which may be killed as a whole.
        if not read_pipe(self.child.pipe, Deadline(START_SECONDS), 0):
            self.end()
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def end(self) -> None:
        """Kill the guard, if there is one, and reap it: the hook has a result. Idempotent."""
        if self.child:
            end_child(self.child, KILL_SECONDS)
            self.child = None

    def watch(self, hook: int, init: int, writer: int) -> None:
        """Wait for the end of the hook, then kill the container's init and log it. Runs in the guard.

        hook, init: descriptors of both processes; writer: end of the pipe to the hook. A child of the hook that hangs
        in the kernel keeps all that it inherited, so the end of a pipe would not be the end of the hook.
        """
        import select

        os.setsid()
        try:  # noqa: SIM105 - contextlib costs an import
            os.write(writer, b".")
        except BrokenPipeError:
            # The hook was killed meanwhile: what follows notices.
            pass
        poller = select.poll()
        poller.register(hook, select.POLLIN)
        poller.poll()
        try:
            signal.pidfd_send_signal(init, signal.SIGKILL)
            ending = "was killed too"
        except ProcessLookupError:
            ending = "had ended already"
        except OSError as error:
            ending = f"cannot be killed: {error.strerror}"
        problem = f'was killed before it had finished; the container\'s init {ending} (on_failure = "kill")'
        hint = "see dmesg for lack of memory; Kata's agent kills a hook after 10 s; the next run restores the devices"
        finding = Finding("error", "hook-killed", "the hook", problem, hint)
        log_findings(self.program, self.state.id, (finding,), kmsg=True)


def open_process(pid: int) -> int:
    """Return a descriptor of a process. Raises OSError: ENOSYS before Linux 5.3, or in a Python built for such."""
    if not hasattr(os, "pidfd_open") or not hasattr(signal, "pidfd_send_signal"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.pidfd_open(pid)


def warn_unguarded(error: OSError) -> Finding:
    """Return the warning for a hook without a guard."""
    problem = f"cannot start the process that ends the container if the hook is killed: {error.strerror}"
    hint = 'check the limits on processes and open files; on_failure = "kill" needs Linux 5.3 for this'
    return Finding("warning", "guard-unstarted", "the hook", problem, hint)
