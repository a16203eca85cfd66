# SPDX-License-Identifier: Apache-2.0
"""Shared behaviour of both executables: exit codes, the deadline, and no exception without a message."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from oci_hooks import program
from oci_hooks.findings import Finding, InputError, Refusal
from oci_hooks.program import Arguments, Hook, Run, parse_arguments, read_input, run_hook
from oci_hooks.system import Deadline

pytestmark = pytest.mark.unit


def run(work: Any, *arguments: str) -> int:
    """Run a hook that does this, without options of its own."""

    def unrecorded(run: Run) -> Any:
        run.record = "never"
        return work(run)

    return run_hook(Hook("a-hook", 5, unrecorded, lambda _: None, lambda _: "", kmsg=False), list(arguments))


def fail_with(error: BaseException) -> Any:
    """Return work that fails so."""

    def work(_: Run) -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("bad", "x", "y", "z"), 2, "a-hook: error: [bad] x: y; z"),
        (Refusal("no", "x", "y", "z"), 1, "a-hook: error: [no] x: y; z"),
        (PermissionError(13, "Permission denied", "/x"), 1, "a-hook: error: [system] /x: Permission denied; "),
        (OSError(5, "Input/output error"), 1, "a-hook: error: [system] a system call: Input/output error; "),
        (ZeroDivisionError("a\nb"), 1, "ZeroDivisionError: a\\nb; this is a defect of the hook: report it"),
        (KeyboardInterrupt(), 1, "a-hook: error: [interrupted] the hook: interrupted by SIGINT; "),
        (TimeoutError(), 1, "a-hook: error: [system] a system call: "),
    ],
    ids=repr,
)
def test_run_hook_any_error_is_one_line(
    capfd: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    assert run(fail_with(error)) == code
    reported = capfd.readouterr()
    assert reported.err.count("\n") == 1
    assert said in reported.err
    assert reported.err.rstrip().partition("; ")[2]
    assert reported.out == ""


def test_run_hook_findings_before_error(capfd: pytest.CaptureFixture[str]) -> None:
    def work(call: Run) -> int:
        call.report(Finding("warning", "first", "x", "y"))
        raise Refusal("second", "x", "y", "z")

    assert run(work) == 1
    assert [line.split()[2] for line in capfd.readouterr().err.splitlines()] == ["[first]", "[second]"]


def test_run_hook_success_silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: 0) == 0
    assert capfd.readouterr() == ("", "")


def test_run_hook_json_matches_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(fail_with(Refusal("no", "x", "y", "z")), "--json") == 1
    reported = json.loads(capfd.readouterr().out)
    assert reported["exit"] == 1
    assert reported["findings"] == [{"level": "error", "code": "no", "subject": "x", "problem": "y", "hint": "z"}]


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], Arguments()),
        (["prestart"], Arguments(phase="prestart")),
        (["poststop", "--bundle", "/b"], Arguments(phase="poststop", bundle="/b")),
        (["--json", "--debug", "--settings", "x"], Arguments(json=True, debug=True, settings="x")),
    ],
)
def test_parse_arguments(argv: list[str], wanted: Arguments) -> None:
    assert parse_arguments("a-hook", argv, lambda _: None) == wanted


@pytest.mark.parametrize("argv", [["x"], [""], ["--js"], ["prestart", "createRuntime"], ["--bundle"]])
def test_parse_arguments_wrong_refused(argv: list[str]) -> None:
    if argv == [""]:
        # An empty kind is as good as none.
        assert parse_arguments("a-hook", argv, lambda _: None).phase == ""
        return
    with pytest.raises(InputError) as caught:
        parse_arguments("a-hook", argv, lambda _: None)
    assert caught.value.findings[0].code == "bad-arguments"
    assert caught.value.findings[0].hint


def test_read_input_in_pieces(stdin: int) -> None:
    child = os.fork()
    if child == 0:
        for piece in (b"ab", b"", b"c" * 70000):
            os.write(stdin, piece)
            time.sleep(0.05)
        os._exit(0)
    os.close(stdin)
    assert read_input(Deadline(20)) == b"ab" + b"c" * 70000
    os.waitpid(child, 0)


def test_read_input_open_pipe_refused_at_deadline(stdin: int) -> None:
    os.write(stdin, b"{}")
    begun = time.monotonic()
    with pytest.raises(InputError, match="was not closed before the deadline"):
        read_input(Deadline(0.2))
    assert 0.15 < time.monotonic() - begun < 5
    os.close(stdin)


def test_read_input_oversized_refused(stdin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "STATE_LIMIT", 1000)
    os.write(stdin, b"x" * 1001)
    os.close(stdin)
    with pytest.raises(InputError, match="is longer than 1000 bytes"):
        read_input(Deadline(5))


def test_read_input_terminal_or_directory_refused(stdin: int, tmp_path: Path) -> None:
    os.close(stdin)
    master, slave = os.openpty()
    os.dup2(slave, 0)
    with pytest.raises(InputError, match=r"is a terminal.*--bundle DIR"):
        read_input(Deadline(5))
    os.close(master)
    os.close(slave)
    directory = os.open(tmp_path, os.O_RDONLY)
    os.dup2(directory, 0)
    os.close(directory)
    with pytest.raises(InputError, match="Is a directory"):
        read_input(Deadline(5))


def test_deadline_extend_keeps_start() -> None:
    deadline = Deadline(100)
    time.sleep(0.05)
    assert 60 < deadline.remaining() < 99.96
    assert 0.04 < deadline.elapsed() < 40
    deadline.extend(0.01)
    assert deadline.remaining() == 0.0
    assert deadline.elapsed() == 0.01
    deadline.extend(200)
    assert 160 < deadline.remaining() < 199.96
