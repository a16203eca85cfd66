# SPDX-License-Identifier: Apache-2.0
"""The content of a recording, and its writing, which never obstructs the run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.credentials import Credentials
from oci_hooks.findings import Finding, InputError, Refusal, StepError
from oci_hooks.guest import hook as guest_hook
from oci_hooks.guest.apply.sysfs_writer import Result
from oci_hooks.guest.claims import Claim
from oci_hooks.guest.undo_log import Entry
from oci_hooks.program import Arguments, Hook, Outcome, Run, record_run, summarize
from oci_hooks.record import encoding
from oci_hooks.record import writer as record_writer
from oci_hooks.record.encoding import encode_arguments
from oci_hooks.record.reader import Recording, read_record
from oci_hooks.replay.kinds import KINDS
from oci_hooks.system import Deadline, Descriptor, RecordingRoot, Root, step

REPOSITORY = Path(__file__).resolve().parents[3]
FINDING = Finding("error", "in-use", "0000:01:00.0", "is mounted", "stop using it first")


def make_run(root: Root | None = None, record: str = "failure", asked: str = "", **arguments: Any) -> Run:
    """Return a run of the guest hook that came as far as its settings."""
    run = Run("vfio-guest-bind", Arguments(**arguments), Deadline(8.0), root or RecordingRoot())
    run.container, run.record, run.record_asked = "web", record, asked
    return run


def record_failure(run: Run | None = None, error: Exception | None = None) -> list[Finding]:
    """Record a run that failed, and return what is reported of that."""
    run = run or make_run()
    notes = run.root.notes if isinstance(run.root, RecordingRoot) else []
    return record_writer.save_recording(summarize(run, Outcome(1, [FINDING], 0.5, error)), notes)


def keep(run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Write a record into a directory and read it back."""
    monkeypatch.setattr(record_writer, "DIRECTORY", str(directory / "records"))
    (output,) = record_failure(run)
    assert (output.level, output.code) == ("info", "recorded"), output
    return read_record(output.subject)


# Noting ---------------------------------------------------------------------------------------------------------------


@step("inner")
def inner(_root: Root) -> int:
    """Do a part of something."""
    return 7


@step("outer")
def outer(root: Root, fail: bool) -> int:
    """Do something that has a part."""
    number = inner(root)
    if fail:
        raise StepError("bind-failed", "it", "did not work")
    return number


def test_recording_root_notes_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"\xff text\n")
    (tmp_path / "link").symlink_to("else/where")
    root = RecordingRoot()
    assert root.read_text(f"{tmp_path}/file") == "\udcff text"
    assert root.read_link(f"{tmp_path}/link") == "else/where"
    assert root.read_link(f"{tmp_path}/file") == ""
    assert root.list_names(str(tmp_path)) == ["file", "link"]
    assert not root.exists(f"{tmp_path}/absent")
    assert not root.exists(f"{tmp_path}/absent")
    events = keep(make_run(root, asked="full"), tmp_path, monkeypatch).events
    assert [(event["ask"], event["path"].rpartition("/")[2]) for event in events] == [
        ("read", "file"),
        ("readlink", "link"),
        ("readlink", "file"),
        ("listdir", tmp_path.name),
        ("stat", "absent"),
    ]
    assert encoding.decode(events[0]["answer"], KINDS) == b"\xff text\n"
    assert events[1]["answer"] == "else/where"
    assert events[2]["errno"] == errno.EINVAL
    assert events[4]["errno"] == errno.ENOENT


def test_recording_root_notes_steps() -> None:
    root = RecordingRoot()
    assert outer(root, False) == 7
    with pytest.raises(StepError):
        outer(root, True)
    events = record_writer.list_events(root.notes, {}, False)
    assert [(event["do"], event.get("inside", False), event.get("answer")) for event in events] == [
        ("outer", False, 7),
        ("inner", True, 7),
        ("outer", False, None),
        ("inner", True, 7),
    ]
    assert events[2]["error"]["findings"][0]["code"] == "bind-failed"
    assert all(event["seconds"] >= 0 for event in events)


def test_list_events_changed_answer_repeated(tmp_path: Path) -> None:
    root, path = RecordingRoot(), tmp_path / "file"
    for text in ("a", "a", "b", "a"):
        path.write_text(text)
        root.read_text(str(path))
    texts = [event["answer"]["text"] for event in record_writer.list_events(root.notes, {}, False)]
    assert texts == ["a", "b", "a"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1.5,
        "text \udcff",
        b"\x00\xff",
        [1, ["a"]],
        {"a": None},
        Result("0000:01:00.0", 110, "/sys/x"),
        Claim("/run/c", "c", 1, 2, ("18",), (Entry("group", ("18",)),), True, False),
        Finding("error", "a", "b", "c", "d"),
    ],
)
def test_encoding_values_round_trip(value: object) -> None:
    assert encoding.decode(json.loads(json.dumps(encoding.encode(value))), KINDS) == value


def test_encoding_stat_and_descriptor_round_trip() -> None:
    found = os.stat("/dev/null")
    again = encoding.decode(json.loads(json.dumps(encoding.encode(found))), KINDS)
    assert (again.st_mode, again.st_rdev, again.st_uid) == (found.st_mode, found.st_rdev, found.st_uid)
    made = encoding.decode(encoding.encode(Descriptor(77)), KINDS)
    assert os.fstat(made).st_rdev == found.st_rdev
    os.close(made)


@pytest.mark.parametrize(
    "error",
    [
        Refusal("claimed", "group 1", "is taken"),
        InputError("bad-json", "x", "y", "z"),
        OSError(errno.EACCES, "Permission denied", "/x"),
        OSError(errno.EBUSY, "Device busy"),
    ],
)
def test_encoding_errors_round_trip(error: Exception) -> None:
    again = encoding.decode_error(json.loads(json.dumps(encoding.encode_error(error))))
    assert (type(again), str(again)) == (type(error), str(error))


@pytest.mark.parametrize(
    "value",
    [
        {"!": "subprocess.Popen", "args": ["id"]},
        {"!": "files.Root"},
        {"!": "job-result", "wrong": 1},
        {"!": "stat", "st_mode": "x"},
        {"!": 7},
        {"!": "bytes"},
        {"!": "undo-log", "path": "/x"},
    ],
)
def test_decode_only_step_results(value: Any) -> None:
    with pytest.raises(encoding.NotationError):
        encoding.decode(value, KINDS)


# Privacy --------------------------------------------------------------------------------------------------------------

CONFIG = {
    "process": {
        "args": ["/bin/app", "--password=secret"],
        "env": ["PATH=/secret", "PCIDEVICE_NIC=0000:01:00.0,0000:02:00.0", "FLAG", "EMPTY="],
        "commandLine": "secret",
    },
    "annotations": {
        "io.katacontainers.x.vfio.devices": "auto",
        "io.katacontainers.config.hypervisor.enable_iommu": "true",
        "io.katacontainers.config.hypervisor.cc_init_data": "secret",
        "io.katacontainers.config.agent.policy": "secret",
        "io.kubernetes.cri.container-type": "container",
        "note": "secret",
    },
    "hooks": {"prestart": [{"path": "/hook", "args": ["hook", "prestart"], "env": ["A=secret"]}, None], "x": None},
    "linux": {"devices": [{"path": "/dev/vfio/1", "type": "c", "major": 1, "minor": 2}]},
}


@pytest.mark.parametrize(("asked", "kept"), [("", False), ("on", False), ("full", True)])
def test_recording_full_only_on_request(
    asked: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    root = RecordingRoot()
    root.read_bytes(f"{tmp_path}/config.json")
    again = keep(make_run(root, **({"asked": asked} if asked else {})), tmp_path, monkeypatch)
    assert (b"secret" in again.documents["config.json"]) is kept
    assert again.about["full"] is kept
    assert all(name == name.partition("=")[0] for name in again.about["environment"])


# Writing --------------------------------------------------------------------------------------------------------------


def test_recording_keeps_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(record_writer.KEPT_RECORDINGS + 3):
        last = keep(make_run(), tmp_path, monkeypatch)
    kept = sorted((tmp_path / "records").iterdir())
    assert len(kept) == record_writer.KEPT_RECORDINGS
    assert str(kept[-1]) == last.path
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    assert (tmp_path / "records").stat().st_mode & 0o777 == 0o700


def test_recording_name_container_id_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    run.container = "../../../etc/\n\x1b[0m"
    again = keep(run, tmp_path, monkeypatch)
    assert Path(again.path).parent == tmp_path / "records"
    assert Path(again.path).name.isprintable()


def test_recording_fallback_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(record_writer, "DIRECTORY", f"{tmp_path}/file/records")
    monkeypatch.setattr(record_writer, "SPARE_DIRECTORY", f"{tmp_path}/spare")
    (output,) = record_failure()
    assert output.subject.startswith(f"{tmp_path}/spare/")


def test_recording_full_disk_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "DIRECTORY", f"{tmp_path}/one")
    monkeypatch.setattr(record_writer, "SPARE_DIRECTORY", f"{tmp_path}/two")
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def write(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    (output,) = record_failure()
    assert (output.level, output.code) == ("warning", "not-recorded")
    assert "No space left" in output.problem
    assert list(tmp_path.glob("*/*")) == list(tmp_path.glob("*/.*")) == []


def test_recording_foreign_directory_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "records").symlink_to("elsewhere")
    monkeypatch.setattr(record_writer, "DIRECTORY", f"{tmp_path}/records")
    monkeypatch.setattr(record_writer, "SPARE_DIRECTORY", f"{tmp_path}/records")
    output = record_failure()
    assert [finding.code for finding in output] in (["not-recorded"], [])
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_recording_other_user_directory_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "records").mkdir()
    os.chown(tmp_path / "records", 1234, 1234)
    monkeypatch.setattr(record_writer, "DIRECTORY", f"{tmp_path}/records")
    monkeypatch.setattr(record_writer, "SPARE_DIRECTORY", f"{tmp_path}/records")
    (output,) = record_failure()
    assert (output.code, "another user's" in output.problem or "not permitted" in output.problem) == (
        "not-recorded",
        True,
    )
    assert list((tmp_path / "records").iterdir()) == []


def test_recording_internal_error_has_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "DIRECTORY", str(tmp_path))
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError as error:
        (output,) = record_failure(error=error)
    assert "ZeroDivisionError: a defect" in read_record(output.subject).about["traceback"]


@pytest.mark.parametrize(
    ("code", "wishes", "recorded"),
    [
        (0, {}, False),
        (1, {}, True),
        (2, {}, True),
        (1, {"record": "failure"}, True),
        (0, {"record": "failure"}, False),
        (0, {"record": "always"}, True),
        (0, {"record": "failure", "asked": "on"}, True),
        (1, {"record": "never"}, False),
        (1, {"record": "never", "asked": "on"}, False),
    ],
)
def test_is_recorded_cases(code: int, wishes: dict[str, str], recorded: bool) -> None:
    assert make_run(None, wishes.get("record", ""), wishes.get("asked", "")).is_recorded(code) is recorded


def test_is_recorded_survey_not() -> None:
    assert not make_run(all=True).is_recorded(1)


def test_recording_never_applies_before_settings_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run failed on its config.json, before it came to its settings."""
    monkeypatch.setattr(record_writer, "DIRECTORY", str(tmp_path / "records"))
    settings = tmp_path / "guest.toml"
    settings.write_text('record = "never"\n')
    run = make_run(record="", settings=str(settings))
    record_run(make_hook(guest_hook.read_record_mode), run, Outcome(2, [FINDING], 0.5), [])
    assert not (tmp_path / "records").exists()
    settings.write_text('record = "failure"\n')
    record_run(make_hook(guest_hook.read_record_mode), run, Outcome(2, [FINDING], 0.5), [])
    assert len(list((tmp_path / "records").iterdir())) == 1


def make_hook(read_record_mode: Callable[[str], str]) -> Hook:
    """Return a hook that only its recording is tried of."""
    return Hook("vfio-guest-bind", 8.0, lambda _: 0, lambda _: None, read_record_mode, kmsg=False)


def test_settings_that_cannot_be_read_keep_no_run_from_its_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(_path: str) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(record_writer, "DIRECTORY", str(tmp_path / "records"))
    record_run(make_hook(explode), make_run(record=""), Outcome(2, [FINDING], 0.5), [])
    assert len(list((tmp_path / "records").iterdir())) == 1


def test_recording_any_failure_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook's result is kept: it must not become a traceback here."""

    def explode(_run: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(record_writer, "make_name", explode)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (output,) = record_failure()
    assert (output.level, output.code) == ("warning", "not-recorded")
    assert "ZeroDivisionError" in output.problem


# What it costs --------------------------------------------------------------------------------------------------------

FEATURE = ("record", "replay")


@pytest.fixture
def without(tmp_path: Path) -> Path:
    """Return a copy of the project that can't record anything."""
    for name in ("hooks", "oci_hooks"):
        shutil.copytree(REPOSITORY / name, tmp_path / "without" / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(REPOSITORY / name, tmp_path / "with" / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "without/oci_hooks"
    for name in FEATURE:
        shutil.rmtree(package / name)
    command = package / "program.py"
    text = command.read_text().replace("RecordingRoot", "Root").replace("run.is_recorded(outcome.code)", "False")
    command.write_text(text)
    for copy in ("with", "without"):
        subprocess.run([sys.executable, "-m", "compileall", "-q", tmp_path / copy / "oci_hooks"], check=True)
    return tmp_path


def list_opens(hook: Path, state: str, scratch: Path, *arguments: str) -> list[str]:
    """Return what a hook opens, as strace sees it."""
    trace = scratch / "trace"
    subprocess.run(
        ["strace", "-f", "-e", "trace=open,openat,creat", "-o", trace, sys.executable, "-IS", hook, *arguments],
        input=state,
        text=True,
        capture_output=True,
        check=False,
    )
    return [line.partition("(")[2] for line in trace.read_text().splitlines() if "open" in line]


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("hook", ["vfio-host-check", "vfio-guest-bind"])
@pytest.mark.parametrize("vfio", [False, True])
def test_recording_never_opens_no_more_files(without: Path, hook: str, vfio: bool) -> None:
    """Counted, with the feature and without: for a container without VFIO, and for one that fails with `never`."""
    bundle = without / "bundle"
    bundle.mkdir()
    device = {"path": "/dev/vfio/4711", "type": "c", "major": 511, "minor": 4711}
    config = {"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "linux": {"devices": [device] if vfio else []}}
    (bundle / "config.json").write_text(json.dumps(config))
    (bundle / "settings.toml").write_text('record = "never"\n')
    state = {"ociVersion": "1.0.2", "id": "c", "bundle": str(bundle), "pid": 4194303, "status": "creating"}
    more = ("--settings", str(bundle / "settings.toml")) if vfio else ()
    opens = {
        copy: list_opens(without / copy / "hooks" / hook, json.dumps(state), without, *more)
        for copy in ("with", "without")
    }
    assert len(opens["with"]) == len(opens["without"])
    assert len(opens["with"]) > 10
    assert not [line for line in opens["with"] if any(f"oci_hooks/{name}/" in line for name in FEATURE)]


def test_encoding_leaves_out_credentials() -> None:
    """A step's argument: groups and capabilities of the container's user are part of config.json, which is redacted."""
    user = Credentials(1000, 1000, (4,), ("CAP_SYS_ADMIN",), False, (), False)
    assert encode_arguments((user, "vfio", 7)) == ["vfio", 7]
