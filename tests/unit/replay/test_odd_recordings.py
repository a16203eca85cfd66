# SPDX-License-Identifier: Apache-2.0
"""A stranger's recording: odd ones are one line and exit 2, large ones are bounded, none writes to a terminal.

Every kind meets every command of vfio-hook-replay.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.findings import make_one_line
from oci_hooks.program import Arguments, Outcome, Run, summarize
from oci_hooks.record import bounds, encoding
from oci_hooks.record import reader as record_reader
from oci_hooks.record import writer as record_writer
from oci_hooks.record.bounds import RecordTooLarge, bounded
from oci_hooks.record.reader import read_record
from oci_hooks.replay import cli as replay_cli
from oci_hooks.schema import MAX_ERRORS, find_mistakes
from oci_hooks.system import Deadline, RecordingRoot

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]
REAL = REPOSITORY / "tests/data/records/guest-success-runc.tar.gz"
BRIDGE = REPOSITORY / "tests/data/records/guest-bridge.tar.gz"
HOST = REPOSITORY / "tests/data/records/host-group-busy.tar.gz"
Edit = Callable[[dict[str, Any], list[dict[str, Any]]], None]


def read_members(path: Path) -> dict[str, bytes]:
    """Return the files in a record."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def pack_changed(path: Path, edit: Edit) -> bytes:
    """Return a changed copy of a record."""
    members = read_members(path)
    about = json.loads(members["record.json"])
    events = [json.loads(line) for line in members["events.jsonl"].splitlines()]
    edit(about, events)
    lines = "".join(f"{json.dumps(event)}\n" for event in events).encode()
    return record_writer.pack({**members, "record.json": json.dumps(about).encode(), "events.jsonl": lines})


def set_about(key: str, value: Any) -> Edit:
    """Return an edit of record.json."""

    def edit(about: dict[str, Any], _events: list[dict[str, Any]]) -> None:
        about[key] = value

    return edit


def set_event(kind: str, key: str, value: Any) -> Edit:
    """Return an edit of every event of a kind: "ask", "do", "note"."""

    def edit(_about: dict[str, Any], events: list[dict[str, Any]]) -> None:
        for event in events:
            if kind in event:
                event[key] = value

    return edit


def set_answer(name: str, value: Any) -> Edit:
    """Return an edit of the answers to one question, of one step."""

    def edit(_about: dict[str, Any], events: list[dict[str, Any]]) -> None:
        for event in events:
            if name in (event.get("ask"), event.get("do"), event.get("note")):
                event.pop("errno", None)
                event["answer"] = value

    return edit


def nest(depth: int) -> Any:
    """Return arrays inside each other."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


HUGE = 10**400
RESULT = {"!": "job-result", "address": "0000:01:00.0", "path": "/x", "started": True}
PROOF = {"!": "node-proof", "error": 0, "is_viable": True}
FINDING = {"level": "error", "code": "in-use", "subject": "x", "problem": "y", "hint": ""}
ODD: dict[str, Edit] = {
    "errno beyond C": set_event("ask", "errno", 1 << 70),
    "errno beyond int": set_event("ask", "errno", 1 << 33),
    "errno below zero": set_event("ask", "errno", -1),
    "errno with digits": set_event("ask", "errno", HUGE),
    "errno true": set_event("ask", "errno", True),
    "errno null": set_event("ask", "errno", None),
    "at beyond float": set_event("ask", "at", HUGE),
    "at of 64 bits": set_event("ask", "at", 1 << 63),
    "at below zero": set_event("ask", "at", -(1 << 63)),
    "at text": set_event("ask", "at", "now"),
    "at not a number": set_event("ask", "at", float("nan")),
    "at without end": set_event("ask", "at", float("inf")),
    "seconds beyond float": set_event("do", "seconds", HUGE),
    "seconds without end": set_event("do", "seconds", float("-inf")),
    "all seconds beyond float": set_about("seconds", HUGE),
    "all seconds of 64 bits": set_about("seconds", 1 << 63),
    "code beyond C": set_answer("write-sysfs", [{**RESULT, "code": 1 << 70}]),
    "code beyond int": set_answer("write-sysfs", [{**RESULT, "code": 1 << 40}]),
    "code below zero": set_answer("write-sysfs", [{**RESULT, "code": -(1 << 40)}]),
    "code text": set_answer("write-sysfs", [{**RESULT, "code": "x"}]),
    "proof beyond C": set_answer("verify-nodes", [{**PROOF, "node": {"name": "x"}, "error": 1 << 62}]),
    "proof without node": set_answer("verify-nodes", [PROOF]),
    "answer 900 deep": set_answer("verify-nodes", nest(900)),
    "decision 900 deep": set_answer("plan", {"!": "plan", "nodes": nest(900)}),
    "arguments 900 deep": set_event("do", "with", nest(900)),
    "answer 30 deep": set_answer("verify-nodes", nest(25)),
    "stat of texts": set_answer("stat", {"!": "stat", "st_mode": "x"}),
    "stat beyond C": set_answer("stat", {"!": "stat", **dict.fromkeys(encoding.STAT_FIELDS, (1 << 64) - 1)}),
    "names are numbers": set_answer("listdir", [1, 2, 3]),
    "names are a number": set_answer("listdir", 7),
    "link is a list": set_answer("readlink", ["x"]),
    "file is a number": set_answer("read", 7),
    "file without text": set_answer("read", {"!": "bytes"}),
    "file of another member": set_answer("read", {"!": "member", "name": "../../etc/passwd"}),
    "kind is a list": set_answer("verify-nodes", {"!": ["x"]}),
    "kind is an object": set_answer("write-sysfs", [{"!": {}}]),
    "entry without words": set_answer("read-claims", [{"!": "entry", "kind": "x"}]),
    "claim of numbers": set_answer("read-claims", [{"!": "claim", "container": 7, "groups": 7}]),
    "decision is a text": set_answer("request", "x"),
    "request without parts": set_answer("request", {"!": "request", "selectors": 7}),
    "selectors of numbers": set_answer("request", {"!": "request", "selectors": [7], "entries": [7]}),
    "error without findings": set_event("do", "error", {"!": "Refusal", "findings": []}),
    "error of numbers": set_event("do", "error", {"!": "OSError", "errno": "x", "text": 7, "path": 7}),
    "error errno of 64 bits": set_event("do", "error", {"!": "OSError", "errno": 1 << 63, "text": "x", "path": None}),
    "error findings of numbers": set_event("do", "error", {"!": "Refusal", "findings": [7]}),
    "finding of numbers": set_about("findings", [{**FINDING, "problem": 7}]),
    "finding with a line feed in its code": set_about("findings", [{**FINDING, "code": "x\n"}]),
    "finding without a code": set_about("findings", [{**FINDING, "code": ""}]),
    "versions of numbers": set_about("versions", {"kernel": 7}),
    "no versions": set_about("versions", {}),
    "exit is a float": set_about("exit", 1.0),
    "pid beyond C": set_about("arguments", {"pid": HUGE}),
    "groups of numbers": set_about("arguments", {"groups": [7]}),
    "arguments of a stranger": set_about("arguments", {"evil": nest(20), "pid": 7}),
    "other program": set_about("program", "vfio-host-check"),
    "full is a text": set_about("full", "yes"),
    "container is a surrogate": set_about("container", "\ud800\udcff"),
}
COMMANDS = ["list", "explain", "show", "show --reads", "run", "diff", "diff self", "export"]


@pytest.fixture(name="put", scope="module")
def make_put(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes], Path]:
    """Return what writes a record into a directory of its own."""

    def put(name: str, data: bytes) -> Path:
        path = tmp_path_factory.mktemp("odd") / f"{name}.tar.gz"
        path.write_bytes(data)
        return path

    return put


def make_command(command: str, path: Path) -> list[str]:
    """Return the arguments for a command with a record."""
    if command == "list":
        return ["--directory", str(path.parent), "list"]
    if command == "export":
        return ["export", "--test", str(path.parent / "made"), str(path)]
    words = {"diff": ["diff", str(REAL)], "diff self": ["diff", str(path)]}.get(command, command.split())
    return [*words, str(path)]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ODD)
def test_odd_recording_one_line(
    name: str, command: str, put: Callable[[str, bytes], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = put("odd", pack_changed(REAL, ODD[name]))
    code = replay_cli.main(make_command(command, path))
    out, err = capfd.readouterr()
    assert code in (0, 1, 2)
    assert len(err.splitlines()) == (code == 2)
    assert err.startswith("vfio-hook-replay: ") or not err
    assert "Traceback" not in out + err
    assert all(line.isprintable() for line in (out + err).split("\n"))
    if command == "list":
        assert (code, len(out.splitlines())) == (0, 2)


REFUSED = ("beyond C", "beyond float", "900 deep", "not a number", "without end")
BEYOND = [name for name in ODD if name.startswith("errno ") or any(word in name for word in REFUSED)]


@pytest.mark.parametrize("command", ["show --reads", "explain", "diff"])
@pytest.mark.parametrize("name", BEYOND)
def test_recording_no_hook_writes_refused(
    name: str, command: str, put: Callable[[str, bytes], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """By whatever looks at it, before it does: a bound has a name."""
    if name == "stat beyond C" or name.startswith("proof"):
        # Numbers of 64 bits, which only a replay puts into C.
        return
    path = put("odd", pack_changed(REAL, ODD[name]))
    assert replay_cli.main(make_command(command, path)) == 2
    err = capfd.readouterr().err
    assert any(word in err for word in ("(NUMBER)", "(DEPTH)", "errno", "is not a finite number")), err


# Bounds ---------------------------------------------------------------------------------------------------------------


def with_member(name: str, data: bytes) -> bytes:
    """Return a record with other content of one member."""
    return record_writer.pack({**read_members(REAL), name: data})


def with_events(answer: bytes) -> bytes:
    """Return a record with one decision."""
    return with_member("events.jsonl", b'{"at":0,"note":"x","answer":' + answer + b"}\n")


def make_tar(entries: list[tuple[str, bytes]], **fields: Any) -> bytes:
    """Return a compressed tar. fields: of each header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def claim_size(size: bytes) -> bytes:
    """Return a tar whose first member's header has this length field, and the right checksum."""
    data = bytearray(gzip.decompress(make_tar([("record.json", b"{}")])))
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return gzip.compress(bytes(data))


NOTE = b'{"at":0,"note":"x"}\n'
LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "events": (lambda: with_member("events.jsonl", NOTE * 800_000), "EVENTS"),
    "events, just too many": (lambda: with_member("events.jsonl", NOTE * (bounds.MAX_EVENTS + 1)), "EVENTS"),
    "lines without anything": (lambda: with_member("events.jsonl", b"\n" * 10_000_000), "EVENTS"),
    "values": (
        lambda: with_member("events.jsonl", b'{"at":0,"note":"x","answer":[' + b"[]," * 500_000 + b"0]}\n"),
        "VALUES",
    ),
    "values of many": (
        lambda: with_member("events.jsonl", b'{"at":0,"note":"x","answer":[%s0]}\n' % (b"0," * 999) * 600),
        "VALUES",
    ),
    "a line": (lambda: with_member("events.jsonl", b'{"at":0,"note":"' + b"x" * 2_000_000 + b'"}\n'), "LINE_BYTES"),
    "event bytes": (lambda: with_member("events.jsonl", b"x" * (17 << 20)), "EVENT_BYTES"),
    "document bytes": (lambda: with_member("config.json", b"x" * (5 << 20)), "DOCUMENT_BYTES"),
    "state bytes": (lambda: with_member("state.json", b"x" * (5 << 20)), "DOCUMENT_BYTES"),
    "document values": (
        lambda: with_member("config.json", b'{"linux":{"devices":[' + b"0," * 600_000 + b"0]}}"),
        "VALUES",
    ),
    "summary bytes": (lambda: with_member("record.json", b" " * (2 << 20)), "SUMMARY_BYTES"),
    "findings": (lambda: pack_changed(REAL, set_about("findings", [FINDING] * 4000)), "SUMMARY_VALUES"),
    "depth": (lambda: pack_changed(REAL, set_answer("plan", nest(40))), "DEPTH"),
    "depth beyond Python's": (
        lambda: with_member("events.jsonl", b'{"at":0,"note":"x","answer":' + b"[" * 90_000),
        "DEPTH",
    ),
    "depth of the summary": (lambda: pack_changed(REAL, set_about("arguments", {"x": nest(40)})), "DEPTH"),
    "number": (lambda: pack_changed(REAL, set_answer("plan", 1 << 64)), "NUMBER"),
    "a number of digits": (
        lambda: with_member("events.jsonl", b'{"at":0,"note":"x","answer":' + b"9" * 200_000 + b"}\n"),
        "NUMBER",
    ),
    "gzip bomb": (lambda: gzip.compress(bytes(300 << 20)), "BYTES"),
    "gzip bomb of many members": (lambda: gzip.compress(bytes(27 << 20)) * 3, "BYTES"),
    "packed": (lambda: os.urandom((8 << 20) + 1), "PACKED_BYTES"),
    "members": (lambda: make_tar([(name, b"") for name in (*record_reader.MEMBERS, "record.json")]), "MEMBERS"),
    "ten thousand members": (lambda: make_tar([("x", b"")] * 10_000), "holds 'x'"),
    "long name": (lambda: make_tar([("x" * 5000, b"")]), "holds '././@LongLink'"),
    "sparse": (
        lambda: make_tar([("record.json", b"")], type=tarfile.GNUTYPE_SPARSE),
        "not a regular file",
    ),
    "size of a terabyte": (lambda: claim_size(b"17777777777\0"), "SUMMARY_BYTES"),
    "size in base 256": (lambda: claim_size(b"\x80" + b"\xff" * 11), "not a tar"),
    "size below zero": (lambda: claim_size(b"-0000000777\0"), "not a regular file"),
    "size of underlines": (lambda: claim_size(b"0000_00001\0\0"), "damaged"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_recording_refused_with_bound(
    name: str, put: Callable[[str, bytes], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    make, word = LARGE[name]
    path = put("large", make())
    assert replay_cli.main(["run", str(path)]) == 2
    err = capfd.readouterr().err
    if word.isupper():
        assert err.startswith(f"vfio-hook-replay: error: [recording-too-large] {path}: "), err
        assert f"({word})" in err
        assert f"limit of {getattr(bounds, f'MAX_{word}')} " in err
    assert word in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["events", "values", "document values", "gzip bomb"])
def test_recording_costs_bounded_time_and_memory(name: str, put: Callable[[str, bytes], Path]) -> None:
    """In a process of its own, whose memory the system bounds: 20 s and 1.6 to 2.4 GB it was."""
    path = put("large", LARGE[name][0]())
    assert path.stat().st_size < 400_000

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))

    done = subprocess.run(
        [sys.executable, "-m", "oci_hooks.replay.cli", "run", path],
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 2
    assert "[recording-too-large]" in done.stderr


@pytest.fixture(name="quick")
def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make seconds short."""
    monkeypatch.setattr(bounds, "MAX_SECONDS", 0.2)


@pytest.mark.usefixtures("quick")
def test_replay_seconds_bounded_inside_hook(
    put: Callable[[str, bytes], Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A hook takes every Exception for its own; this is none."""
    from oci_hooks.guest import hook as guest_hook

    def work(_run: Run) -> int:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                time.sleep(0.05)
            except Exception:  # noqa: BLE001, S112 - as a hook might
                continue
        return 0

    monkeypatch.setattr(guest_hook, "work", work)
    path = put("slow", REAL.read_bytes())
    assert replay_cli.main(["run", str(path)]) == 2
    assert "(SECONDS)" in capfd.readouterr().err
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_replay_memory_bounded_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(RecordTooLarge, match="MEMORY_BYTES"), bounded():
        assert resource.getrlimit(resource.RLIMIT_AS)[0] != before[0]
        bytearray(bounds.MAX_MEMORY_BYTES + (64 << 20))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_written_recording_within_reader_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much a run saw: what is above a bound is not written."""
    monkeypatch.setattr(record_writer, "DIRECTORY", str(tmp_path))
    root = RecordingRoot()
    for number in range(bounds.MAX_EVENTS + 10):
        note = root.add("ask", "readlink", (f"/sys/{number}",))
        note.answer = "x"
    root.add("do", "x", ()).answer = 1 << 90
    long = root.add("ask", "read", ("/x/config.json",))
    long.answer = b"[" + b"0," * 700_000 + b"0]"
    root.notes.insert(0, long)
    root.notes.insert(0, root.notes[-2])
    run = Run("vfio-guest-bind", Arguments(), Deadline(8.0), root)
    run.record_asked = "full"
    (output,) = record_writer.save_recording(summarize(run, Outcome(0, [], 0.1)), root.notes)
    found = read_record(output.subject)
    assert len(found.events) == bounds.MAX_EVENTS
    assert found.events[0]["answer"]["!"] == "opaque"
    assert found.events[1]["answer"] == {"!": "opaque", "type": "1400003 bytes"}
    assert found.documents == {}


def test_bounds_match_manual() -> None:
    names = {name[len("MAX_") :] for name in vars(bounds) if name.startswith("MAX_")}
    manual = (REPOSITORY / "docs/man/vfio-hook-replay.1.rst").read_text()
    assert "recording-too-large" in manual
    for name in names - {"ANSWER_BYTES"}:
        assert f"\n{name}\n    {getattr(bounds, f'MAX_{name}')} " in manual.replace(",", ""), name


def test_schema_mistakes_limited() -> None:
    """Each takes some kB: a list of 600,000 took 2.4 GB."""
    seen = []

    class Devices(list[int]):
        def __iter__(self) -> Iterator[int]:
            for number in range(10**5):
                seen.append(number)
                yield 0

    found = find_mistakes({"linux": {"devices": Devices([0])}}, "config", "x", "bad-config", "")
    assert len(found) == 10
    assert len(seen) <= MAX_ERRORS + 10


# Nothing is written to a terminal, nothing forged ---------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;evil\x07\nvfio-hook-replay: all is well\r\x9b31m\u202egpj\u2028\u200b\x00\x7f"
STRANGE = ["\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2028", "\u200b", "\x00", "\x7f"]


def poison(value: Any) -> Any:
    """Return a JSON value with evil at the end of each string that may be anything."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, list):
        return [poison(item) for item in value]
    if isinstance(value, dict):
        return {key: item if key in ("!", "level", "code") else poison(item) for key, item in value.items()}
    return value


def poison_record(about: dict[str, Any], events: list[dict[str, Any]]) -> None:
    """Put evil into every string of a record."""
    for key in ("hook", "time", "container", "environment", "findings"):
        about[key] = poison(about[key])
    about["traceback"] = EVIL
    about["versions"] = {poison(key): poison(value) for key, value in about["versions"].items()}
    about["arguments"] = {**about["arguments"], "bundle": EVIL, "phase": EVIL, poison("x"): EVIL}
    events[:] = [poison(event) for event in events]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("source", [REAL, HOST], ids=["guest", "host"])
def test_recording_strings_escaped_for_terminal(
    source: Path, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil\x1b[31m\u202e\n0 forged.tar.gz"
    path.write_bytes(pack_changed(source, poison_record))
    code = replay_cli.main(make_command(command, path))
    out, err = capfd.readouterr()
    assert [mark for mark in STRANGE if mark in out + err] == []
    assert not any(line.startswith(("vfio-hook-replay: all", "0 forged")) for line in out.splitlines())
    assert len(err.splitlines()) == (code == 2)
    if command == "list":
        assert len(out.splitlines()) == 2
        assert "\\x1b" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_recording_file_name_escaped(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil\x1b[31m\u202e\n0 forged.tar.gz"
    path.write_bytes(b"nothing")
    code = replay_cli.main(make_command(command, path))
    out, err = capfd.readouterr()
    assert [mark for mark in STRANGE if mark in out + err] == []
    assert len(out.splitlines()) + len(err.splitlines()) == (2 if command == "list" else 1)
    assert code == (0 if command == "list" else 2)


def test_list_directory_among_recordings_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil\x1b[31m\n0 forged.tar.gz").mkdir()
    assert replay_cli.main(["--directory", str(tmp_path), "list"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2
    assert "Is a directory" in out


def test_unknown_errno_described(put: Callable[[str, bytes], Path], capfd: pytest.CaptureFixture[str]) -> None:
    for name, number in (("code beyond int", 1 << 40), ("code below zero", -(1 << 40))):
        path = put("x", pack_changed(REAL, ODD[name]))
        assert replay_cli.main(["show", str(path)]) == 0
        assert f"0000:01:00.0 errno {number}" in capfd.readouterr().out


def test_argparse_errors_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    """As a glob in a directory of a stranger gives them."""
    with pytest.raises(SystemExit) as caught:
        replay_cli.main(["explain", "x", "y\x1b[31m\nforged"])
    assert caught.value.code == 2
    err = capfd.readouterr().err
    assert "\x1b" not in err
    assert len(err.splitlines()) == 1


def test_traceback_forges_no_line(put: Callable[[str, bytes], Path], capfd: pytest.CaptureFixture[str]) -> None:
    path = put("x", pack_changed(REAL, set_about("traceback", "x\nerror: [forged] x: y")))
    assert replay_cli.main(["show", str(path)]) == 0
    out = capfd.readouterr().out
    assert "\n| error: [forged]" in out
    assert "\nerror: [forged]" not in out


def test_escaping_cost_bounded_by_line() -> None:
    assert make_one_line("\x1b" * 10_000_000, 50).endswith("...")
    assert len(make_one_line("\x1b" * 10_000_000, 50)) == 50
    assert make_one_line("ab\n", 5) == "ab\\n"[:5]
    assert make_one_line("abcdef", 5) == "ab..."


@pytest.mark.parametrize("code", ['x"""\nimport os\n', "x\n", "{program}", "../x", "a" * 61, "", "X", "ü", "x\\"])
def test_export_injects_no_code(
    code: str, put: Callable[[str, bytes], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = put("x", pack_changed(REAL, set_about("findings", [{**FINDING, "code": code}])))
    assert replay_cli.main(make_command("export", path)) == 2
    assert "about.findings[0].code" in capfd.readouterr().err
    assert not (path.parent / "made").exists()


def test_export_equals_template(put: Callable[[str, bytes], Path]) -> None:
    path = put("x", pack_changed(REAL, poison_record))
    assert replay_cli.main(make_command("export", path)) == 0
    (made,) = (path.parent / "made").glob("*.py")
    tree = ast.parse(made.read_text())
    assert [type(node).__name__ for node in tree.body] == [
        "Expr", "ImportFrom", "ImportFrom", "ImportFrom", "FunctionDef",
    ]  # fmt: skip
    assert "evil" not in made.read_text()


def test_report_fence_not_escapable(tmp_path: Path) -> None:
    """Neither by a fence in a string of the record, nor by the record's name."""
    name = "-rf \x1b[31m`id` $(id) \\033[31m.tar.gz"
    members: Edit = set_about("versions", {"```": " ", "kernel": "```\n# forged"})
    (tmp_path / name).write_bytes(pack_changed(BRIDGE, members))
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY),
        "VFIO_HOOK_REPLAY": f"{sys.executable} -m oci_hooks.replay",
    }
    done = subprocess.run(
        [REPOSITORY / "examples/replay/report", f"./{name}"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    # The output does not interpret the escape in its name, so there is no such file: refused, not followed.
    assert "\x1b" not in done.stdout + done.stderr
    assert "uid=" not in done.stdout + done.stderr
    (tmp_path / name).rename(tmp_path / "-x \\033[31m`id`.tar.gz")
    done = subprocess.run(
        [REPOSITORY / "examples/replay/report", "./-x \\033[31m`id`.tar.gz"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("```") == 6
    assert "\x1b" not in done.stdout + done.stderr
    assert "the same as recorded" in done.stdout


def test_diff_names_bad_recording(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.tar.gz").write_bytes(LARGE["depth"][0]())
    assert replay_cli.main(["diff", str(REAL), str(tmp_path / "bad.tar.gz")]) == 2
    assert f"[recording-too-large] {tmp_path}/bad.tar.gz: " in capfd.readouterr().err
