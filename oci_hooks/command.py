# SPDX-License-Identifier: Apache-2.0
"""What both executables share: arguments, standard input, the deadline, and exceptions turned into exit codes."""

from __future__ import annotations

import os
import time

from oci_hooks.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_REFUSED, Finding, HookError, InputError
from oci_hooks.log import report, write_stdout
from oci_hooks.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable
    from typing import Any

# Kata's agent passes the kind of hook as the only argument (src/agent/src/sandbox.rs, find_hooks).
PHASES = ("prestart", "createRuntime", "poststop")
# A state is some hundred bytes; annotations may be large, but not this large.
STATE_LIMIT = 4 << 20


class Arguments(Record):
    """The command line. phase: "" when not given; bundle: "" for a state on stdin; the rest as their options say."""

    phase: str = ""
    bundle: str = ""
    pid: int = 0
    dry_run: bool = False
    json: bool = False
    settings: str = ""
    debug: bool = False
    groups: tuple[str, ...] = ()
    all: bool = False
    format: str = ""


class Deadline:
    """A moment by which the hook must have ended. seconds: from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = time.monotonic()

    def remaining(self) -> float:
        """Return the seconds left, never below zero."""
        return max(0.0, self.start + self.seconds - time.monotonic())

    def elapsed(self) -> float:
        """Return the seconds that are over, never more than there are."""
        return self.seconds - self.remaining()

    def extend(self, seconds: float) -> None:
        """Set how many seconds there are in all, from the same start: settings are read after the clock has begun."""
        self.seconds = seconds


class Call(Record):
    """One run of a hook.

    findings: what it has to say besides an error; container: its id, once known; plan: what --dry-run --json prints;
    details: more for --json, by key.
    """

    program: str
    arguments: Arguments
    deadline: Deadline
    findings: list[Finding]
    container: list[str]
    plan: list[dict[str, str]]
    details: dict[str, Any]

    def tell(self, finding: Finding) -> None:
        """Keep a finding for the report at the end."""
        self.findings.append(finding)


def run_hook(
    program: str,
    argv: list[str],
    seconds: float,
    work: Callable[[Call], int],
    add_options: Callable[[ArgumentParser], None],
    *,
    kmsg: bool,
) -> int:
    """Run one hook and return its exit code; whatever goes wrong in it becomes findings.

    program: name of the executable; argv: its arguments; seconds: the deadline; work: the hook itself;
    add_options: gives the parser the hook's own options; kmsg: whether findings also go to /dev/kmsg.
    """
    guard_descriptors()
    call = None
    try:
        call = Call(program, parse_arguments(program, argv, add_options), Deadline(seconds), [], [], [], {})
        code = work(call)
        findings = call.findings
    except HookError as error:
        code = error.exit_code
        findings = (call.findings if call else []) + list(error.findings)
    except Exception as error:
        if call and call.arguments.debug:
            raise
        code = EXIT_REFUSED
        findings = (call.findings if call else []) + [make_internal(error)]
    if call and call.arguments.json:
        print_json(call, code, findings)
    if findings:
        report(program, call.container[-1] if call and call.container else "", findings, kmsg)
    return code


def make_internal(error: Exception) -> Finding:
    """Return the finding for an exception that nobody foresaw: the system's, or a defect of ours."""
    if isinstance(error, OSError):
        return Finding("error", "system", error.filename or "a system call", error.strerror or str(error))
    where = ""
    trace = error.__traceback__
    while trace is not None:
        where = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    hint = "please report it with the output of a run with --debug"
    return Finding("error", "internal", where, f"{type(error).__name__}: {error}", hint)


def guard_descriptors() -> None:
    """Give descriptors 0 to 2 something to point at, so that no file that is opened later takes their place."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is taken, which is this one.
            os.open("/dev/null", os.O_RDWR)


def parse_arguments(program: str, argv: list[str], add_options: Callable[[ArgumentParser], None]) -> Arguments:
    """Return the arguments. A runtime gives none or the hook's kind, and does not pay for argparse."""
    if not argv:
        return Arguments()
    if len(argv) == 1 and argv[0] in PHASES:
        return Arguments(phase=argv[0])
    from argparse import ArgumentParser

    from oci_hooks import __version__

    class Parser(ArgumentParser):
        """A parser whose refusal is a finding like every other."""

        def error(self, message: str) -> None:  # type: ignore[override]
            raise InputError("bad-arguments", "arguments", message, f"see {program} --help")

    parser = Parser(prog=program, allow_abbrev=False)
    parser.add_argument("phase", nargs="?", default="", metavar="KIND", help=f"kind of hook: {', '.join(PHASES)}")
    parser.add_argument("--bundle", default="", metavar="DIR", help="read DIR/config.json, and no state from stdin")
    parser.add_argument("--settings", default="", metavar="FILE", help="settings to use instead of those in /etc")
    parser.add_argument("--json", action="store_true", help="print findings as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="tell more; show a traceback where there is one")
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    add_options(parser)
    values = vars(parser.parse_args(argv))
    if values["phase"] not in ("", *PHASES):
        raise InputError(
            "bad-arguments", "arguments", f"{values['phase']!r} is no kind of hook", f"use {', '.join(PHASES)}"
        )
    return Arguments(**values)


def read_input(deadline: Deadline) -> bytes:
    """Return what stands on stdin. Raises InputError [no-state] if nothing comes, or nobody closes it in time."""
    if os.isatty(0):
        raise InputError(
            "no-state", "stdin", "is a terminal, and an OCI state is expected there", "by hand: --bundle DIR"
        )
    import select

    poller = select.poll()
    poller.register(0, select.POLLIN | select.POLLHUP)
    chunks = []
    total = 0
    while True:
        if not poller.poll(deadline.remaining() * 1000):
            raise InputError("no-state", "stdin", "was not closed in time", "write the OCI state and close the pipe")
        try:
            chunk = os.read(0, 65536)
        except OSError as error:
            raise InputError("no-state", "stdin", error.strerror or str(error), "an OCI state is expected") from None
        if not chunk:
            break
        chunks.append(chunk)
        total += len(chunk)
        if total > STATE_LIMIT:
            raise InputError("no-state", "stdin", f"is longer than {STATE_LIMIT} bytes", "an OCI state is expected")
    return b"".join(chunks)


def print_json(call: Call, code: int, findings: list[Finding]) -> None:
    """Print findings for a program that reads them. Schema: schemas/findings.json."""
    import json

    told = [finding.as_dict() for finding in findings]
    answer: dict[str, object] = {"version": 1, "program": call.program, "exit": code, "findings": told}
    answer.update(call.details)
    if call.arguments.dry_run:
        answer["plan"] = call.plan
    write_stdout(json.dumps(answer, indent=2) + "\n")


__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_DONE",
    "EXIT_REFUSED",
    "Arguments",
    "Call",
    "Deadline",
    "parse_arguments",
    "read_input",
    "run_hook",
]
