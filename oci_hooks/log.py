# SPDX-License-Identifier: Apache-2.0
"""Where findings go: stderr for the runtime, syslog (which the journal reads) and, in a guest, /dev/kmsg.

A log that can't be written must not make the hook fail: who reads it has the exit code.
"""

from __future__ import annotations

import os

from oci_hooks.errors import make_one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oci_hooks.errors import Finding

# <level> of a kernel log line (Documentation/ABI/testing/dev-kmsg); facility 1, user.
KMSG_PRIORITIES = {"error": 8 + 3, "warning": 8 + 4, "info": 8 + 6}


def report(program: str, container: str, findings: Iterable[Finding], kmsg: bool = False) -> None:
    """Tell every finding on stderr, in the system's log and, if asked, in the kernel's.

    program: the executable's name; container: its id for the logs, "" when not known.
    """
    for finding in findings:
        line = finding.as_line()
        write_stderr(f"{program}: {line}")
        tagged = make_one_line(f"container {container}: {line}") if container else line
        write_syslog(program, finding.level, tagged)
        if kmsg:
            write_kmsg(program, finding.level, tagged)


def write_stderr(line: str) -> None:
    """Write one line to stderr. Nobody may be listening there."""
    try:
        os.write(2, line.encode("utf-8", "backslashreplace") + b"\n")
    except OSError:
        return


def write_stdout(text: str) -> None:
    """Write text to stdout. Nobody may be listening there."""
    try:
        os.write(1, text.encode("utf-8", "backslashreplace"))
    except OSError:
        return


def write_syslog(program: str, level: str, line: str) -> None:
    """Write one line to syslog; the C library drops it silently where no daemon listens."""
    import syslog

    priorities = {"error": syslog.LOG_ERR, "warning": syslog.LOG_WARNING, "info": syslog.LOG_INFO}
    syslog.openlog(program, syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(priorities[level], line)


def write_kmsg(program: str, level: str, line: str) -> None:
    """Write one line to the kernel's log, the only one that leaves a Kata guest by its console."""
    # The kernel cuts a record at about 1000 bytes.
    record = f"<{KMSG_PRIORITIES[level]}>{program}[{os.getpid()}]: {line}"[:900]
    try:
        fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return
    try:
        os.write(fd, record.encode("utf-8", "backslashreplace"))
    except OSError:
        return
    finally:
        os.close(fd)
