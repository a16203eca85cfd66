# SPDX-License-Identifier: Apache-2.0
"""Lock files, and wait for a lock until a deadline."""

from __future__ import annotations

import errno
import fcntl

from oci_hooks.findings import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Deadline

# Seconds after which the alarm is repeated if it had no effect.
ALARM_SECONDS = 0.1


def try_lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take a file's lock if it is free, and return whether it was. kind: LOCK_SH to see only whether others have it."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def take_lock(fd: int, deadline: Deadline, path: str) -> None:
    """Take a file's lock, waiting for it until the deadline. path: its name. Raises Refusal [lock-timeout]."""
    if try_lock(fd):
        return
    try:
        with alarm(deadline):
            fcntl.flock(fd, fcntl.LOCK_EX)
    except TimeoutError:
        hint = f"find the process that holds it with: fuser -v {path}"
        raise Refusal("lock-timeout", path, "another run of the hook held this lock until the deadline", hint) from None


class alarm:  # noqa: N801 - reads as a statement
    """Raise TimeoutError out of a blocking system call at the deadline.

    The alarm repeats: a signal between Python's last check and the system call itself does not interrupt the call.
    """

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline

    def __enter__(self) -> None:
        import signal

        signal.signal(signal.SIGALRM, self.handle_alarm)
        signal.setitimer(signal.ITIMER_REAL, max(self.deadline.remaining(), 0.001), ALARM_SECONDS)

    def __exit__(self, *_: object) -> None:
        import signal

        signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def handle_alarm(*_: object) -> None:
        """Handle SIGALRM."""
        import signal

        signal.setitimer(signal.ITIMER_REAL, 0)
        raise TimeoutError
