# SPDX-License-Identifier: Apache-2.0
"""Destinations of findings: the journal with its fields, syslog without one, the kernel's log in a guest."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import syslog
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hooks import log
from oci_hooks.findings import Finding
from oci_hooks.record import timeline
from oci_hooks.system import RecordingRoot, Root, step

FINDING = Finding("error", "group-busy", "/dev/vfio/18", "another process has it open", "fuser -v /dev/vfio/18")


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Return a socket in place of the journal's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        path = str(tmp_path / "socket")
        sock.bind(path)
        sock.settimeout(5)
        monkeypatch.setattr(log, "JOURNAL_SOCKET", path)
        yield sock


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Return the text sent to syslog, if there is no journal."""
    sent: list[tuple[int, str]] = []
    monkeypatch.setattr(log, "JOURNAL_SOCKET", str(tmp_path / "absent"))
    monkeypatch.setattr(syslog, "openlog", lambda *_: None)
    monkeypatch.setattr(syslog, "syslog", lambda priority, line: sent.append((priority, line)))
    return sent


def read_fields(journal: socket.socket) -> dict[str, str]:
    """Return the fields of the next entry, as journald reads them: a line each, up to the first equals sign."""
    text = journal.recv(65536).decode()
    assert text.endswith("\n")
    return dict(line.split("=", 1) for line in text.splitlines())


def test_log_journal_fields(journal: socket.socket, capfd: pytest.CaptureFixture[str]) -> None:
    log.report("vfio-guest-bind", "web", [FINDING])
    assert read_fields(journal) == {
        "MESSAGE": f"container web: {FINDING.as_line()}",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "vfio-guest-bind",
        "SYSLOG_PID": str(os.getpid()),
        "CONTAINER_ID": "web",
        "CODE": "group-busy",
        "GROUP": "18",
    }
    assert capfd.readouterr().err == f"vfio-guest-bind: {FINDING.as_line()}\n"


@pytest.mark.parametrize(
    ("subject", "group"),
    [("group 12", "12"), ("/dev/vfio/12", "12"), ("/dev/vfio/noiommu-0", "noiommu-0"), ("0000:01:00.0", None)],
)
def test_log_journal_group_field(journal: socket.socket, subject: str, group: str | None) -> None:
    log.report("vfio-guest-bind", "", [FINDING.replace(subject=subject)])
    fields = read_fields(journal)
    assert fields.get("GROUP") == group
    assert "CONTAINER_ID" not in fields


def test_log_journal_field_not_forgeable(journal: socket.socket) -> None:
    """An id or a subject with a newline stays one line, and one field."""
    log.report("vfio-guest-bind", "x\nCODE=evil", [FINDING.replace(subject="group 1\nPRIORITY=0\nEVIL=1")])
    fields = read_fields(journal)
    assert fields["CODE"] == "group-busy"
    assert fields["PRIORITY"] == "3"
    assert "EVIL" not in fields


def test_log_without_journal_uses_syslog(lines: list[tuple[int, str]]) -> None:
    log.report("vfio-guest-bind", "web", [FINDING, FINDING.replace(level="warning"), FINDING.replace(level="info")])
    assert [priority for priority, _ in lines] == [syslog.LOG_ERR, syslog.LOG_WARNING, syslog.LOG_INFO]
    assert lines[0][1] == f"container web: {FINDING.as_line()}"


def test_log_dead_journal_socket(lines: list[tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "dead"))
    monkeypatch.setattr(log, "JOURNAL_SOCKET", str(tmp_path / "dead"))
    log.report("vfio-guest-bind", "web", [FINDING])
    assert len(lines) == 1


def test_log_full_journal_does_not_block(journal: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads: the queue is full after some datagrams, and the rest goes to syslog."""
    sent: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda _priority, line: sent.append(line))
    for _ in range(5000):
        log.report("vfio-guest-bind", "web", [FINDING])
        if sent:
            break
    assert sent


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("x" * 2000, "x"),
        ("\u675f" * 2000, "\u675f"),
        ("x" + "\u675f" * 2000, "\u675f"),
        ("xx" + "\U0001f980" * 2000, "\U0001f980"),
    ],
)
def test_log_kmsg_line_cut_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, end: str) -> None:
    """The kernel refuses a longer one, and it would be lost; half a character would spoil it."""
    kmsg = tmp_path / "kmsg"
    kmsg.write_bytes(b"")
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *more: real(kmsg if path == "/dev/kmsg" else path, *more))
    log.write_kmsg("vfio-guest-bind", "error", line)
    data = kmsg.read_bytes()
    assert 896 < len(data) <= 901
    assert data.decode().endswith(f"{end}\n")
    # One that is short is whole.
    kmsg.write_bytes(b"")
    log.write_kmsg("vfio-guest-bind", "error", "kurz: \u675f \udc80")
    assert kmsg.read_text() == f"<11>vfio-guest-bind[{os.getpid()}]: kurz: \u675f \\udc80\n"


@step("do-something")
def do_something(_root: Root) -> None:
    """Do nothing, as a step."""


def test_log_steps_with_duration(journal: socket.socket, capfd: pytest.CaptureFixture[str]) -> None:
    root = RecordingRoot()
    do_something(root)
    root.note("plan", {"groups": ["18"]})
    log.report_steps("vfio-guest-bind", "web", timeline.list_steps(root.notes))
    reported = capfd.readouterr().err.splitlines()
    assert reported[0].startswith("vfio-guest-bind: debug: ")
    assert "did   do something (0.00" in reported[0]
    assert "groups: 18" in reported[2]
    assert read_fields(journal)["PRIORITY"] == "7"


def test_log_imports_nothing() -> None:
    """Only the interpreter's own socket type: the module proper costs as much as a hook."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from oci_hooks import log\n"
        "from oci_hooks.findings import Finding\n"
        "log.JOURNAL_SOCKET = '/nonexistent'; log.report('p', 'c', [Finding('error', 'a', 'b', 'c')])\n"
        "print(sorted({'socket', 'json', 'subprocess', 'logging', 'syslog'} & set(sys.modules)))\n"
    )
    repository = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-IS", "-c", script, repository], capture_output=True, text=True, check=True)
    assert done.stdout == "['syslog']\n"


@pytest.mark.parametrize(
    ("subject", "group"),
    [
        ("group 12", "12"),
        ("/dev/vfio/12", "12"),
        ("/dev/vfio/noiommu-3", "noiommu-3"),
        ("/dev/vfio/vfio", ""),
        ("/dev/vfio/devices.json", ""),
        ("/dev/vfio/devices/vfio0", ""),
    ],
)
def test_group_field_of_the_journal_names_only_groups(subject: str, group: str) -> None:
    from oci_hooks.log import find_group_name

    assert find_group_name(subject) == group
