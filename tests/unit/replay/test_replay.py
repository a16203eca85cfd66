# SPDX-License-Identifier: Apache-2.0
"""Recordings from the virtual machine have the same result here, for any user; hostile ones are refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.record import writer as record_writer
from oci_hooks.record.bounds import RecordError
from oci_hooks.record.reader import read_record
from oci_hooks.replay import cli as replay_cli
from oci_hooks.replay.rerun import ReplayRoot, find_differences, sealed

REPOSITORY = Path(__file__).resolve().parents[3]
RECORDS = sorted((REPOSITORY / "tests/data/records").glob("*.tar.gz"))
BY_NAME = {path.name.partition(".")[0]: path for path in RECORDS}


def read_members(path: Path) -> dict[str, bytes]:
    """Return the files in a record."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def change(path: Path, target: Path, edit: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> Path:
    """Write a changed copy of a record. edit: gets record.json and the events."""
    members = read_members(path)
    about = json.loads(members["record.json"])
    events = [json.loads(line) for line in members["events.jsonl"].splitlines()]
    edit(about, events)
    members["record.json"] = json.dumps(about).encode()
    members["events.jsonl"] = "".join(f"{json.dumps(event)}\n" for event in events).encode()
    target.write_bytes(record_writer.pack(members))
    return target


# The same again -------------------------------------------------------------------------------------------------------


def test_recordings_cover_many_codes() -> None:
    codes = {finding.code for path in RECORDS for finding in read_record(path).findings}
    assert len(codes) >= 12, sorted(codes)
    assert max(path.stat().st_size for path in RECORDS) < 60_000
    assert any(read_record(path).about["exit"] == 0 for path in RECORDS)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_rerun_recordings_unchanged(path: Path) -> None:
    assert find_differences(read_record(path)) == []


AS_NOBODY = """
import os, sys
from oci_hooks.record.reader import read_record
from oci_hooks.replay.rerun import find_differences
records = [read_record(path) for path in sys.argv[1:]]
# Python itself may lie where only root can read: what is loaded late is loaded now.
for record in records:
    find_differences(record)
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
for record in records:
    assert find_differences(record) == [], record.path
print(len(records), os.getuid() != 0, os.listdir("."))
"""


def test_rerun_recordings_unprivileged() -> None:
    """As a user without any rights, in a directory where it may write: it writes nothing."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        shutil.copytree(REPOSITORY / "oci_hooks", directory / "oci_hooks")
        (directory / "empty").mkdir()
        (directory / "empty").chmod(0o777)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *map(str, RECORDS)],
            cwd=directory / "empty",
            env={"PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.stdout, done.stderr) == (f"{len(RECORDS)} True []\n", "")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_show_recordings(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = read_record(path)
    for command in (["explain"], ["show"], ["show", "--reads"]):
        assert replay_cli.main([*command, str(path)]) == 0
        reported = capfd.readouterr().out
        for finding in found.findings:
            assert f"[{finding.code}]" in reported
        assert all(line.isprintable() for line in reported.splitlines())
    assert f"kernel {found.about['versions']['kernel']}"[:12] in reported


# What differs ---------------------------------------------------------------------------------------------------------


def test_rerun_changed_answer_differs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As if this version of the code saw another bridge there: a unified diff of the findings."""

    def edit(_about: dict[str, Any], events: list[dict[str, Any]]) -> None:
        for event in events:
            if event.get("path", "").endswith("/uevent") and "PCI_CLASS=60400" in event.get("answer", {}).get(
                "text", ""
            ):
                event["answer"]["text"] = event["answer"]["text"].replace("PCI_CLASS=60400", "PCI_CLASS=20000")

    path = change(BY_NAME["guest-bridge"], tmp_path / "x.tar.gz", edit)
    assert replay_cli.main(["run", str(path)]) == 1
    reported = capfd.readouterr().out
    assert reported.startswith("--- recorded\n+++ replayed\n")
    assert "-error: [bridge]" in reported


def test_rerun_unknown_question_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As if this version of the code read and did more than the one that was recorded."""

    def edit(_about: dict[str, Any], events: list[dict[str, Any]]) -> None:
        events[:] = [event for event in events if not event.get("path", "").endswith("config.json")]

    path = change(BY_NAME["guest-ambiguous"], tmp_path / "x.tar.gz", edit)
    assert replay_cli.main(["run", str(path)]) == 1
    reported = capfd.readouterr().out
    assert "+error: [bundle-unreadable]" in reported
    assert "config.json: not in the recording, assumed absent" in reported


def test_rerun_extra_step_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def edit(_about: dict[str, Any], events: list[dict[str, Any]]) -> None:
        events[:] = [event for event in events if event.get("do") != "prepare-claims"]

    assert replay_cli.main(["run", str(change(BY_NAME["guest-ambiguous"], tmp_path / "x.tar.gz", edit))]) == 0
    reported = capfd.readouterr().out.splitlines()
    assert "# did prepare-claims: not in the recording, assumed done" in reported
    assert reported[-1] == "the same as recorded"


def test_replay_root_answers_follow_steps() -> None:
    """The same link was read before the device was bound, after that, and after it was given back."""
    found = read_record(BY_NAME["guest-no-cdev"])
    root = ReplayRoot(found)
    (link,) = {
        event["path"] for event in found.events if event.get("ask") == "readlink" and event["path"].endswith("/driver")
    }
    seen = []
    for _, event in root.steps:
        root.do(type(event["do"], (), {}))
        if event["do"] == "write-sysfs":
            seen.append(root.read_link_name(link))
    assert seen == ["vfio-pci", "e1000e"]


# Hostile --------------------------------------------------------------------------------------------------------------


def make_tar(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Return a compressed tar of anything."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_entry(name: str, data: bytes = b"{}", kind: bytes = tarfile.REGTYPE, link: str = "") -> Any:
    """Return one member of a tar."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, data


def make_sparse_bomb() -> bytes:
    """Return a tar with a member that claims a terabyte and has a byte, as GNU tar writes sparse files."""
    info, data = make_entry("record.json", b"x")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 40)}
    info.pax_headers |= {"GNU.sparse.map": f"0,1,{1 << 40},0", "GNU.sparse.numblocks": "2"}
    return make_tar((info, data))


def make_record(**changes: Any) -> bytes:
    """Return a record with some of record.json changed."""
    members = read_members(BY_NAME["guest-bridge"])
    about = {**json.loads(members["record.json"]), **changes}
    return record_writer.pack({**members, "record.json": json.dumps(about).encode()})


def with_events(text: str) -> bytes:
    """Return a record with other events."""
    return record_writer.pack({**read_members(BY_NAME["guest-bridge"]), "events.jsonl": text.encode()})


GOOD = make_record() if "guest-bridge" in BY_NAME else b""
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "damaged"),
    "text": (b"hello", "damaged"),
    "cut": (GOOD[: len(GOOD) // 2], "damaged"),
    "flipped": (GOOD[:100] + bytes([GOOD[100] ^ 0xFF]) + GOOD[101:], "damaged"),
    "no tar": (gzip.compress(b"hello" * 1000), "damaged"),
    "empty tar": (make_tar(), "lacks record.json"),
    "gzip bomb": (gzip.compress(bytes((64 << 20) + 1024)), "BYTES"),
    "large": (os.urandom((8 << 20) + 1), "PACKED_BYTES"),
    "sparse bomb": (make_sparse_bomb(), "PaxHeader"),
    "traversal": (make_tar(make_entry("../evil")), "holds '../evil'"),
    "absolute": (make_tar(make_entry("/tmp/evil")), "holds '/tmp/evil'"),  # noqa: S108
    "traversal to a known name": (make_tar(make_entry("x/../record.json")), "holds 'x/../record.json'"),
    "link out": (make_tar(make_entry("record.json", b"", tarfile.SYMTYPE, "/etc/passwd")), "not a regular file"),
    "hard link": (make_tar(make_entry("record.json", b"", tarfile.LNKTYPE, "/etc/passwd")), "not a regular file"),
    "device": (make_tar(make_entry("record.json", b"", tarfile.CHRTYPE)), "not a regular file"),
    "pipe": (make_tar(make_entry("record.json", b"", tarfile.FIFOTYPE)), "not a regular file"),
    "directory": (make_tar(make_entry("record.json", b"", tarfile.DIRTYPE)), "holds 'record.json/'"),
    "twice": (make_tar(make_entry("record.json"), make_entry("record.json")), "holds 'record.json'"),
    "other file": (make_tar(make_entry("evil.py")), "holds 'evil.py'"),
    "deep": (make_tar(make_entry("record.json", b"[" * 1_000_000)), "DEPTH"),
    "not JSON": (make_tar(make_entry("record.json", b"{")), "damaged"),
    "no version": (make_tar(make_entry("record.json")), "no version"),
    "earlier version": (make_record(version=1), "record the run again"),
    "later version": (make_record(version=3, hook="9.9"), "use vfio-hook-replay of oci-vfio-hooks 9.9 or later"),
    "other program": (make_record(program="/bin/sh"), "about.program"),
    "wrong types": (make_record(arguments={"pid": "x"}), "about.arguments.pid"),
    "wrong finding": (make_record(findings=[{"level": "error"}]), "finding"),
    # It goes into the test that `export` writes.
    "code that is a program": (
        make_record(
            findings=[{"level": "error", "code": 'x"""\nevil()\n"""', "subject": "", "problem": "", "hint": ""}]
        ),
        "about.findings[0].code",
    ),
    "event of no kind": (with_events('{"at": 0}\n'), "events[0]"),
    "event of two kinds": (with_events('{"at": 0, "do": "x", "seconds": 0, "note": "y"}\n'), "events[0]"),
    "answer of no kind": (
        with_events('{"at": 0, "do": "read-state", "seconds": 0, "answer": {"!": "os.system"}}\n'),
        "os",
    ),
    "answer of a wrong kind": (with_events('{"at": 0, "do": "read-state", "seconds": 0, "answer": 7}\n'), ""),
    "error of no kind": (with_events('{"at": 0, "do": "read-state", "seconds": 0, "error": {"!": "x"}}\n'), "error"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_rerun_hostile_recording_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data, words = HOSTILE[name]
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside/x.tar.gz"
    path.write_bytes(data)
    monkeypatch.chdir(tmp_path / "inside")
    code = replay_cli.main(["run", str(path)])
    reported = capfd.readouterr()
    assert code == (1 if name == "answer of a wrong kind" else 2), reported
    assert words in reported.err + (reported.out if not words else "")
    assert len(reported.err.splitlines()) <= 1
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "inside", path]


def test_show_escapes_terminal_codes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    escape = "\x1b]0;evil\x07\nnext"

    def edit(about: dict[str, Any], events: list[dict[str, Any]]) -> None:
        about["container"] = about["time"] = about["hook"] = about["traceback"] = escape
        about["versions"]["kernel"] = about["arguments"]["bundle"] = escape
        about["findings"][0]["problem"] = escape
        for event in events:
            for key in ("path", "do", "note"):
                if key in event:
                    event[key] += escape

    (tmp_path / "r").mkdir()
    path = change(BY_NAME["guest-bridge"], tmp_path / "r/x.tar.gz", edit)
    for command in (["--directory", str(path.parent), "list"], ["explain", str(path)], ["show", "--reads", str(path)]):
        assert replay_cli.main(command) == 0
    assert replay_cli.main(["run", str(path)]) == 1
    assert replay_cli.main(["diff", str(path), str(BY_NAME["guest-bridge"])]) == 1
    reported = capfd.readouterr().out
    assert "evil" in reported
    assert "\x1b" not in reported
    assert "\x07" not in reported


@pytest.mark.parametrize(
    "change_something",
    [
        lambda path: (path / "x").write_text(""),
        lambda path: (path / "x").mkdir(),
        lambda path: path.rename(f"{path}2"),
        lambda path: path.chmod(0o777),
        lambda path: os.symlink("a", path / "x"),
        lambda path: os.open(path / "x", os.O_CREAT | os.O_WRONLY),
        lambda _: os.kill(os.getpid(), 0),
        lambda _: subprocess.run(["true"], check=True),
    ],
)
def test_sealed_refuses_direct_change(change_something: Callable[[Path], object], tmp_path: Path) -> None:
    with sealed(), pytest.raises(PermissionError, match="a replay changes nothing"):
        change_something(tmp_path)
    assert list(tmp_path.iterdir()) == []


# The tool -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with three records, as hooks leave them."""
    target = tmp_path / "records"
    target.mkdir()
    for number, name in enumerate(("guest-bridge", "guest-ambiguous", "host-group-missing")):
        shutil.copy(BY_NAME[name], target / f"2026010{number + 1}T000000.000000Z-{name}.tar.gz")
    return target


def run_tool(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the tool as a user does."""
    command = [sys.executable, "-m", "oci_hooks.replay.cli", *words]
    env = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)


def test_replay_tool_walkthrough(directory: Path) -> None:
    """list, explain, show, run, in this order, without reading anything before."""
    listed = run_tool("--directory", str(directory), "list").stdout.splitlines()
    assert len(listed) == 4
    assert "bridge" in listed[1]
    assert "ambiguous" in listed[2]
    explained = run_tool("--directory", str(directory), "explain", "20260102").stdout
    assert "[ambiguous]" in explained
    assert 'do this: select by annotation: "io.katacontainers.x.vfio.devices"' in explained
    shown = run_tool("--directory", str(directory), "show", "20260102").stdout
    assert "read claims" in shown
    assert "read  " in shown
    again = run_tool("--directory", str(directory), "run", "20260102")
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "the same as recorded")
    container = read_record(BY_NAME["guest-bridge"]).about["container"]
    assert run_tool("--directory", str(directory), "explain", container).returncode == 0
    newest = run_tool("--directory", str(directory), "explain").stdout
    assert "[group-missing]" in newest


def test_diff_two_recordings(directory: Path) -> None:
    done = run_tool("--directory", str(directory), "diff", "20260101", "20260102")
    assert done.returncode == 1
    assert "-error: [bridge]" in done.stdout
    assert "+error: [ambiguous]" in done.stdout
    assert run_tool("--directory", str(directory), "diff", "20260101", "20260101").returncode == 0


def test_export_runs_as_test(directory: Path, tmp_path: Path) -> None:
    done = run_tool("--directory", str(directory), "export", "20260101", "--test", str(tmp_path / "tests"))
    assert done.stdout.strip() == str(tmp_path / "tests/test_vfio_guest_bind_bridge.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", done.stdout.strip()]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(REPOSITORY)})
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr


def test_run_live(directory: Path) -> None:
    """The recorded state and config against the real system here, as a dry run: nothing like the recorded machine."""
    done = run_tool("--directory", str(directory), "run", "20260103", "--live")
    assert done.returncode in (0, 1), done.stderr
    assert "error: [" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("exit ")
    done = run_tool("--directory", str(directory), "run", "20260101", "--live")
    assert "error: [" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "--apply"], "--apply and --pid need --live"),
        (["explain", "nothing-like-that"], "no such recording"),
        (["explain", "2026"], "3 recordings begin with this name"),
    ],
)
def test_replay_tool_wrong_usage(words: list[str], told: str, directory: Path) -> None:
    done = run_tool("--directory", str(directory), *words)
    assert done.returncode == 2
    assert told in done.stderr


def test_replay_tool_help() -> None:
    text = run_tool("--help").stdout
    for word in ("list", "explain", "show", "run", "diff", "export"):
        assert f"    {word} " in text


def test_replay_tool_unreadable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert replay_cli.main(["--directory", str(tmp_path), "list"]) == 2
    assert "use sudo" in capfd.readouterr().err


def test_replay_tool_missing_file(capfd: Any) -> None:
    with pytest.raises(RecordError):
        read_record("/dev/null")
    assert replay_cli.main(["--directory", "/nonexistent", "list"]) == 2
    assert "No such file" in capfd.readouterr().err
