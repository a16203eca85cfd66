# SPDX-License-Identifier: Apache-2.0
"""Run a hook: arguments, standard input, the deadline, and exceptions turned into findings and exit codes."""

from __future__ import annotations

import gc
import os
import time

from oci_hooks.findings import EXIT_DONE, EXIT_REFUSED, Finding, HookError, InputError
from oci_hooks.frozen import Frozen
from oci_hooks.system import OWN_STAT, Deadline, RecordingRoot, read_pipe, tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Iterable
    from typing import Any

    from oci_hooks.oci import Spec, State
    from oci_hooks.record.summary import Summary
    from oci_hooks.system import Note, Root

# Kata's agent passes the kind of hook as the only argument (src/agent/src/sandbox.rs, find_hooks).
PHASES = ("prestart", "createRuntime", "poststop")
# A state has some hundred bytes and the container's annotations, which may have any size: runc accepts megabytes.
STATE_LIMIT = 64 << 20


class Arguments(Frozen):
    """The command line. phase: "" if absent; bundle: "" for a state on stdin; the rest as their options document."""

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
    kata_config: str | None = None
    runtime: str = ""
    annotations: tuple[str, ...] = ()
    metrics: str | None = None
    cdi: str | None = None
    output: str = ""
    selects: tuple[str, ...] = ()
    cdev: bool = False
    annotate: bool = False
    no_hook: bool = False
    force: bool = False


class Hook(Frozen):
    """The definition of a hook.

    name: of its executable; seconds: its deadline until the settings are read; work: the hook itself, which returns the
    exit code; add_options: adds the hook's own options to the parser; read_record_mode: returns the setting `record` of
    a settings file ("": the usual one), raises InputError; kmsg: whether findings also go to /dev/kmsg; by_hand:
    started by a user, without a container.
    """

    name: str
    seconds: float
    work: Callable[[Run], int]
    add_options: Callable[[ArgumentParser], None]
    read_record_mode: Callable[[str], str]
    kmsg: bool
    by_hand: bool = False


class Run:
    """One run of a hook.

    program: name of the executable; root: access to the system; container: its id, "" until known; findings:
    findings to report in addition to an error; plan: printed by --dry-run --json; details: more members for --json;
    is_answered: an answer in another format was already printed; is_verbose: also report the steps; record: the
    setting ("failure", "always", "never"), "" until it is read; record_asked: the annotation: "full" redacts nothing,
    any other word records the run whatever its result, "" requests nothing; begun: what was read from stdin already;
    when_reported: called when the result is reported, before the run is recorded.
    """

    def __init__(self, program: str, arguments: Arguments, deadline: Deadline, root: Root, begun: bytes = b"") -> None:
        self.program = program
        self.arguments = arguments
        self.deadline = deadline
        self.root = root
        self.container = ""
        self.findings: list[Finding] = []
        self.plan: list[dict[str, str]] = []
        self.details: dict[str, Any] = {}
        self.is_answered = False
        self.is_verbose = arguments.debug
        self.record = ""
        self.record_asked = ""
        self.begun = begun
        self.when_reported: Callable[[], object] | None = None

    def report(self, finding: Finding) -> None:
        """Keep a finding for the report at the end."""
        self.findings.append(finding)

    def apply_annotations(self, state: State, spec: Spec) -> None:
        """Set logging and recording as the container's annotations request."""
        from oci_hooks import oci

        annotations = oci.merge_annotations(state, spec)
        if is_enabled(annotations.get(oci.LOG_ANNOTATION)):
            self.is_verbose = True
        record = annotations.get(oci.RECORD_ANNOTATION)
        if is_enabled(record) or record == "full":
            self.record_asked = str(record)

    def is_recorded(self, code: int) -> bool:
        """Return whether a run with this exit code is recorded. A survey by hand is not."""
        asked = self.arguments
        by_hand = asked.all or asked.groups or (asked.kata_config, asked.metrics, asked.cdi) != (None, None, None)
        if self.record == "never" or by_hand:
            return False
        return code != EXIT_DONE or self.record == "always" or bool(self.record_asked)


def is_enabled(value: str | None) -> bool:
    """Return whether an annotation's value enables its feature."""
    return value is not None and value.strip().lower() in ("1", "true", "yes", "on", "debug")


# From a JSON document to a record ------------------------------------------------------------------------------------


class Outcome(Frozen):
    """The result of a run. findings: all to report; error: an unexpected exception, a defect."""

    code: int
    findings: list[Finding]
    seconds: float
    error: Exception | None = None


def run_hook(hook: Hook, argv: list[str], begun: bytes = b"") -> int:
    """Run one hook and return its exit code; any failure in it becomes findings.

    argv: its arguments; begun: what was read from stdin already (idle.py).
    """
    # A run ends before garbage collection would pay off.
    gc.disable()
    open_standard_descriptors()
    try:
        arguments = parse_arguments(hook.name, argv, hook.add_options, hook.by_hand)
    except InputError as error:
        from oci_hooks.log import report

        # With --json, errors are reported in JSON too, even if other arguments are unreadable.
        if "--json" in argv:
            print_json(hook.name, error.exit_code, error.findings, {})
        report(hook.name, "", error.findings, hook.kmsg)
        return error.exit_code
    root = RecordingRoot()
    deadline = Deadline(hook.seconds, root.host_path(OWN_STAT))
    run = Run(hook.name, arguments, deadline, root, begun)
    outcome = run_work(run, hook.work)
    if arguments.json and not run.is_answered:
        more = {**run.details, "plan": run.plan} if arguments.dry_run else run.details
        print_json(hook.name, outcome.code, outcome.findings, more)
    if run.is_verbose:
        from oci_hooks.log import report_steps
        from oci_hooks.record.timeline import list_steps

        report_steps(hook.name, run.container, list_steps(root.notes), hook.kmsg)
    if outcome.findings:
        from oci_hooks.log import report

        report(hook.name, run.container, outcome.findings, hook.kmsg)
    if run.when_reported:
        run.when_reported()
    if run.is_recorded(outcome.code):
        record_run(hook, run, outcome, root.notes)
    if outcome.error and arguments.debug:
        raise outcome.error
    return outcome.code


def record_run(hook: Hook, run: Run, outcome: Outcome, notes: list[Note]) -> None:
    """Record a run. A Python without its whole library cannot, and has already reported the missing part."""
    from oci_hooks.log import log_findings

    try:
        from oci_hooks.record.writer import save_recording
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("oci_hooks"):
            raise
        return
    if not run.record and find_record_mode(hook, run.arguments.settings) == "never":
        return
    # Not on stderr, which has only the errors, for the runtime's message.
    log_findings(hook.name, run.container, save_recording(summarize(run, outcome), notes), hook.kmsg)


def find_record_mode(hook: Hook, settings: str) -> str:
    """Return the setting `record` for a run that failed before reading its settings; "" if they are unusable."""
    try:
        return hook.read_record_mode(settings)
    except Exception:  # noqa: BLE001 - a failed recording does not change the result
        return ""


def summarize(run: Run, outcome: Outcome) -> Summary:
    """Return the part of a recording other than the run's steps."""
    from oci_hooks.record.summary import Summary

    return Summary(
        run.program,
        run.container,
        run.arguments.as_dict(),
        outcome.code,
        outcome.seconds,
        outcome.findings,
        outcome.error,
        run.record_asked == "full",
    )


def run_work(run: Run, work: Callable[[Run], int]) -> Outcome:
    """Do the hook's work; any failure in it becomes findings."""
    begun = time.monotonic()
    try:
        code, error, findings = work(run), None, run.findings
    except HookError as refusal:
        code, error, findings = refusal.exit_code, None, run.findings + list(refusal.findings)
    except KeyboardInterrupt:
        interrupted = Finding("error", "interrupted", "the hook", "interrupted by SIGINT", "run it again")
        code, error, findings = EXIT_REFUSED, None, run.findings + [interrupted]
    except Exception as defect:  # noqa: BLE001 - reported as a finding, and kept in the recording
        code, findings = EXIT_REFUSED, run.findings + [make_internal_finding(defect)]
        error = None if isinstance(defect, OSError) and not run.arguments.debug else defect
    return Outcome(code, findings, time.monotonic() - begun, error)


def make_internal_finding(error: Exception) -> Finding:
    """Return the finding for an unexpected exception: an error of the system, or a defect of ours."""
    if isinstance(error, OSError):
        hint = "check dmesg and that path; --debug shows the failing step"
        return Finding("error", "system", error.filename or "a system call", error.strerror or str(error), hint)
    where = ""
    trace = error.__traceback__
    while trace is not None:
        where = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    hint = "this is a defect of the hook: report it with the output of --debug"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("oci_hooks"):
        hint = "Python's standard library is incomplete: install it (Debian: python3; python3-minimal is not enough)"
    return Finding("error", "internal", where, f"{type(error).__name__}: {error}", hint)


def open_standard_descriptors() -> None:
    """Open descriptors 0 to 2 if they are closed, so that no file opened later gets their numbers."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # open() returns the lowest free number, which is this one.
            os.open("/dev/null", os.O_RDWR)


def parse_arguments(
    program: str, argv: list[str], add_options: Callable[[ArgumentParser], None], by_hand: bool = False
) -> Arguments:
    """Return the arguments. A runtime passes none or the kind of hook, and does not pay for argparse.

    by_hand: without the arguments for a container's state.
    """
    if not argv:
        return Arguments()
    if len(argv) == 1 and argv[0] in PHASES:
        return Arguments(phase=argv[0])
    from argparse import ArgumentParser

    from oci_hooks import __version__

    class Parser(ArgumentParser):
        """A parser that reports errors as findings."""

        def error(self, message: str) -> None:  # type: ignore[override]
            raise InputError("bad-arguments", "arguments", message, f"see {program} --help")

    parser = Parser(prog=program, allow_abbrev=False)
    if not by_hand:
        parser.add_argument("phase", nargs="?", default="", metavar="KIND", help=f"hook type: {', '.join(PHASES)}")
        parser.add_argument(
            "--bundle", default="", metavar="DIR", help="read DIR/config.json instead of a state on stdin"
        )
    parser.add_argument(
        "--settings", default="", metavar="FILE", help="settings file to use instead of the one in /etc"
    )
    parser.add_argument("--json", action="store_true", help="print findings as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="print each step, and the traceback of a defect")
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    add_options(parser)
    values = vars(parser.parse_args(argv))
    if values.get("phase", "") not in ("", *PHASES):
        raise InputError(
            "bad-arguments", "arguments", f"unknown hook type {values['phase']!r}", f"use {', '.join(PHASES)}"
        )
    return Arguments(**values)


def read_state(run: Run) -> State:
    """Return the state from stdin, or one made of --bundle and --pid. Raises InputError."""
    from oci_hooks import oci

    if not run.arguments.bundle:
        return oci.resolve_bundle(run.root, oci.read_state(run.root.do(read_input, run.deadline, run.begun)))
    bundle = os.path.abspath(run.arguments.bundle)
    return oci.State(os.path.basename(bundle) or "bundle", bundle, run.arguments.pid, "", {})


@tagged("read-state")
def read_input(deadline: Deadline, begun: bytes = b"") -> bytes:
    """Return the content of stdin. Raises InputError [no-state] if it is empty or not closed in time.

    begun: what was read from it already.
    """
    if os.isatty(0):
        raise InputError("no-state", "stdin", "is a terminal; an OCI state is expected", "to run by hand: --bundle DIR")
    try:
        data = read_pipe(0, deadline, STATE_LIMIT, begun)
    except OSError as error:
        raise InputError("no-state", "stdin", error.strerror or str(error), "pass the OCI state on stdin") from None
    if data is None:
        raise InputError(
            "no-state", "stdin", "was not closed before the deadline", "write the OCI state and close the pipe"
        )
    if len(data) > STATE_LIMIT:
        raise InputError("no-state", "stdin", f"is longer than {STATE_LIMIT} bytes", "pass the OCI state on stdin")
    return data


def print_json(program: str, code: int, findings: Iterable[Finding], more: dict[str, Any]) -> None:
    """Print findings as JSON. more: other members, by key. Schema: schemas/findings.json."""
    import json

    from oci_hooks.log import write_stdout

    reported = [finding.as_dict() for finding in findings]
    answer = {"version": 1, "program": program, "exit": code, "findings": reported, **more}
    write_stdout(json.dumps(answer, indent=2) + "\n")
