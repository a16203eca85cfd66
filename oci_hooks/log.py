# SPDX-License-Identifier: Apache-2.0
"""Log findings: to stderr for the runtime, to the journal or else syslog and, in a guest, to /dev/kmsg.

A failure to write a log must not make the hook fail: the exit code still reports the result.
"""

from __future__ import annotations

import os

from oci_hooks.findings import make_one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oci_hooks.findings import Finding

# Priorities of syslog(3), also used by the journal and the kernel log.
PRIORITIES = {"error": 3, "warning": 4, "info": 6, "debug": 7}
# <level> of a kernel log line (Documentation/ABI/testing/dev-kmsg); facility 1, user.
KMSG_FACILITY = 8
# The kernel refuses lines longer than about 990 bytes: EINVAL (kernel: devkmsg_write, LOG_LINE_MAX).
KMSG_LIMIT = 900
# systemd's native protocol: a datagram of NAME=value lines (systemd.io/JOURNAL_NATIVE_PROTOCOL).
JOURNAL_SOCKET = "/run/systemd/journal/socket"
GROUP_SUBJECTS = ("group ", "/dev/vfio/")
NOIOMMU_PREFIX = "noiommu-"


def report(program: str, container: str, findings: Iterable[Finding], kmsg: bool = False) -> None:
    """Print every finding on stderr, and log it in the system's log and, if requested, the kernel's.

    program: the executable's name; container: its id for the logs, "" if unknown.
    """
    for finding in findings:
        write_stderr(f"{program}: {finding.as_line()}")
    log_findings(program, container, findings, kmsg)


def log_findings(program: str, container: str, findings: Iterable[Finding], kmsg: bool = False) -> None:
    """Log every finding without printing it: for reports in addition to the answer, which stderr is for."""
    for finding in findings:
        fields = {"CODE": finding.code, "GROUP": find_group_name(finding.subject)}
        write_line(program, container, finding.level, finding.as_line(), fields, kmsg)


def report_steps(program: str, container: str, steps: Iterable[str], kmsg: bool = False) -> None:
    """Log the steps of a run with the seconds that each took, if requested."""
    for step in steps:
        line = f"debug: {make_one_line(step)}"
        write_stderr(f"{program}: {line}")
        write_line(program, container, "debug", line, {}, kmsg)


def write_line(program: str, container: str, level: str, line: str, fields: dict[str, str], kmsg: bool) -> None:
    """Write one line to the logs. fields: for the journal."""
    tagged = make_one_line(f"container {container}: {line}") if container else line
    known = {name: make_one_line(value) for name, value in {**fields, "CONTAINER_ID": container}.items()}
    if not write_journal(program, level, tagged, known):
        write_syslog(program, level, tagged)
    if kmsg:
        write_kmsg(program, level, tagged)


def find_group_name(subject: str) -> str:
    """Return the VFIO group that a finding is about; "" if it is about another object."""
    for prefix in GROUP_SUBJECTS:
        group = subject[len(prefix) :]
        # /dev/vfio/vfio, /dev/vfio/devices.json and "group 12 of ..." are not names of groups.
        number = group[len(NOIOMMU_PREFIX) :] if group.startswith(NOIOMMU_PREFIX) else group
        if subject.startswith(prefix) and number.isdigit():
            return group
    return ""


def write_stderr(line: str) -> None:
    """Write one line to stderr, which may be closed."""
    try:
        os.write(2, line.encode("utf-8", "backslashreplace") + b"\n")
    except OSError:
        return


def write_stdout(text: str) -> None:
    """Write text to stdout, which may be closed."""
    try:
        os.write(1, text.encode("utf-8", "backslashreplace"))
    except OSError:
        return


def write_journal(program: str, level: str, line: str, fields: dict[str, str]) -> bool:
    """Write one line with fields to the journal, and return whether the journal accepted it."""
    # The socket module proper imports enum and selectors.
    import _socket

    values = {"MESSAGE": line, "PRIORITY": str(PRIORITIES[level]), "SYSLOG_IDENTIFIER": program}
    values["SYSLOG_PID"] = str(os.getpid())
    # No value contains a newline, which would need another format.
    text = "".join(f"{name}={value}\n" for name, value in {**values, **fields}.items() if value)
    try:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK)
    except OSError:
        return False
    try:
        sock.connect(JOURNAL_SOCKET)
        sock.send(text.encode("utf-8", "backslashreplace"))
    except OSError:
        return False
    finally:
        sock.close()
    return True


def write_syslog(program: str, level: str, line: str) -> None:
    """Write one line to syslog; the C library drops it silently if no daemon listens."""
    import syslog

    syslog.openlog(program, syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(PRIORITIES[level], line)


def write_kmsg(program: str, level: str, line: str) -> None:
    """Write one line to the kernel log, the only log that leaves a Kata guest through its console."""
    record = f"<{KMSG_FACILITY + PRIORITIES[level]}>{program}[{os.getpid()}]: {line}"
    # Only a character split by the cut is omitted. Without the newline, nobody sees the line before the next one comes:
    # the kernel keeps it open for a continuation (vprintk_store, LOG_NEWLINE).
    data = record.encode("utf-8", "backslashreplace")[:KMSG_LIMIT].decode("utf-8", "ignore").encode() + b"\n"
    try:
        fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return
    try:
        os.write(fd, data)
    except OSError:
        return
    finally:
        os.close(fd)
