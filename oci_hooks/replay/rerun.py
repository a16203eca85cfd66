# SPDX-License-Identifier: Apache-2.0
"""Run a recorded hook again: on the recorded machine, without touching anything, or on this one.

The hook's own code runs, up to its Root (system.py), which answers from the recording: a question gets its recorded
answer, a step its recorded result. Findings and plan are compared; questions and steps of this version of the code that
the recording has no answer to are reported too.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from oci_hooks.findings import make_one_line
from oci_hooks.frozen import Frozen
from oci_hooks.program import Arguments, Run, run_work
from oci_hooks.record import encoding
from oci_hooks.record.privacy import hide_finding
from oci_hooks.replay.kinds import KINDS
from oci_hooks.system import USUAL_SECONDS, Deadline, RecordingRoot, Root, name_tag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    from oci_hooks.program import Outcome
    from oci_hooks.record.reader import Recording

    T = TypeVar("T")

# Python's audit events before a change (docs.python.org, Audit events table).
CHANGES = (
    "fcntl.flock",
    "fcntl.ioctl",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.system",
    "os.truncate",
    "signal.pthread_kill",
    "socket.connect",
    "subprocess.Popen",
)


# Audit events of Python when it opens a module, or one of this package's schemas.
CODE = (".py", ".pyc", ".so", ".pth", ".cfg", ".json", "/METADATA", ".zip", ".egg-link")


class Rerun(Frozen):
    """The result of running a recording again.

    outcome: of the run; decisions: as JSON; unexpected: questions and steps without an answer in the recording.
    """

    outcome: Outcome
    decisions: list[Any]
    unexpected: list[str]


class ReplayRoot(Root):
    """The recorded machine. Gives the recorded answers, in the state after the steps so far."""

    def __init__(self, record: Recording) -> None:
        super().__init__()
        self.documents = record.documents
        self.steps = [
            (number, event) for number, event in enumerate(record.events) if "do" in event and not event.get("inside")
        ]
        self.answers: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
        for number, event in enumerate(record.events):
            if "ask" in event:
                self.answers.setdefault((event["ask"], event["path"]), []).append((number, event))
        self.listings = {path: event for (ask, path), ((_, event), *_) in self.answers.items() if ask == "listdir"}
        self.next_step = 0
        self.decisions: list[Any] = []
        self.unexpected: list[str] = []
        self.damage: encoding.NotationError | None = None

    def ask(self, question: Callable[..., T], path: str, *more: object) -> T:
        """Return the recorded answer to a question. Raises OSError; ENOENT if it was never asked."""
        known = self.answers.get((name_tag(question), path))
        if known is None:
            if not self.is_known_absent(path):
                self.unexpected.append(f"asked {name_tag(question)} of {path}: not in the recording, assumed absent")
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        event = self.pick(known)
        if "errno" in event:
            raise OSError(event["errno"], os.strerror(event["errno"]), path)
        answer: T = self.decode(event.get("answer"))
        return answer

    def is_known_absent(self, path: str) -> bool:
        """Return whether a recorded directory listing shows that a path does not exist."""
        directory, _, name = path.rpartition("/")
        listing = self.listings.get(directory)
        answer = listing.get("answer") if listing else None
        return isinstance(answer, list) and name not in answer

    def pick(self, known: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        """Return the answer for now: the last before the next step; several of them in sequence."""
        limit = self.steps[self.next_step][0] if self.next_step < len(self.steps) else sys.maxsize
        since = self.steps[self.next_step - 1][0] if self.next_step else -1
        past = [entry for entry in known if entry[0] < since]
        present = [entry for entry in known if since < entry[0] < limit]
        if len(present) > 1:
            known.remove(present[0])
        return (present or past[-1:] or known)[0][1]

    def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Return the step's recorded result, None for one that was not done. Raises its recorded exception."""
        for number in range(self.next_step, len(self.steps)):
            event = self.steps[number][1]
            if event["do"] == name_tag(function):
                self.next_step = number + 1
                if "error" in event:
                    raise self.decode_error(event["error"])
                answer: T = self.decode(event.get("answer"))
                return answer
        self.unexpected.append(f"did {name_tag(function)}: not in the recording, assumed done")
        return None  # type: ignore[return-value]

    def note(self, what: str, value: object) -> None:
        """Keep a decision for the comparison."""
        self.decisions.append([what, encoding.encode(value)])

    def decode(self, value: Any) -> Any:
        """Return an answer of the recording. Raises NotationError."""
        if isinstance(value, dict) and value.get(encoding.KIND) == "member":
            return self.documents.get(str(value.get("name")), b"")
        try:
            return encoding.decode(value, KINDS)
        except encoding.NotationError as error:
            # The hook would handle any other exception as its own.
            self.damage = error
            raise

    def decode_error(self, value: Any) -> Exception:
        """Return an error of the recording. Raises NotationError."""
        try:
            return encoding.decode_error(value)
        except encoding.NotationError as error:
            self.damage = error
            raise


class LiveRoot(RecordingRoot):
    """This machine, with the state of a recording."""

    def __init__(self, state: bytes) -> None:
        super().__init__()
        self.state = state

    def ask(self, question: Callable[..., T], path: str, *more: object) -> T:
        """Return a reading function's result for a path. Raises OSError; also if it is not a regular file.

        The recording names files (of settings, of Kata's configuration), and may be untrusted: opening a device can
        have side effects (/dev/watchdog).
        """
        if name_tag(question) == "read" and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", path)
        return super().ask(question, path, *more)

    def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Return the result of a step; the state is the recording's."""
        if name_tag(function) == "read-state":
            return self.state  # type: ignore[return-value]
        return super().do(function, *arguments)


# Running --------------------------------------------------------------------------------------------------------------


def rerun(record: Recording) -> Rerun:
    """Run the recording's hook on the recorded machine. Changes nothing on this one. Raises NotationError."""
    root = ReplayRoot(record)
    # The plan of a dry run is in its decisions; printing it would mix it with the differences.
    run = make_run(record, root, make_arguments(record).replace(json=True))
    with sealed():
        outcome = run_work(run, find_work(record.about["program"]))
    if root.damage:
        raise root.damage
    return Rerun(outcome, root.decisions, root.unexpected)


def run_live(record: Recording, bundle: str, pid: int | None, apply: bool) -> tuple[Run, Outcome]:
    """Run the recording's hook on this machine, with its state and config.json; a dry run unless `apply`.

    bundle: a directory with the config.json; pid: replaces the state's.
    """
    import json

    state = json.loads(record.documents.get("state.json", b"{}"))
    state = {"id": record.about["container"] or "replay", **state, "bundle": bundle}
    if pid is not None:
        state["pid"] = pid
    arguments = make_arguments(record).replace(dry_run=not apply, bundle="")
    if record.about["arguments"].get("bundle"):
        # The recorded run was started by hand: it had no state.
        state.setdefault("pid", arguments.pid if pid is None else pid)
        state["status"] = "creating"
    run = make_run(record, LiveRoot(json.dumps(state).encode()), arguments)
    return run, run_work(run, find_work(record.about["program"]))


def make_arguments(record: Recording) -> Arguments:
    """Return the command line in a recording."""
    values = {name: value for name, value in record.about["arguments"].items() if name in Arguments.field_names()}
    return Arguments(**{**values, "groups": tuple(values.get("groups", ()))})


def make_run(record: Recording, root: Root, arguments: Arguments) -> Run:
    """Return the run of a hook for a replay."""
    return Run(record.about["program"], arguments, Deadline(USUAL_SECONDS), root)


def find_work(program: str) -> Callable[[Run], int]:
    """Return a hook's work function."""
    if program == "vfio-host-check":
        from oci_hooks.host.hook import work as check

        return check
    from oci_hooks.guest.hook import work as bind

    return bind


# Comparing ------------------------------------------------------------------------------------------------------------


def find_differences(record: Recording) -> list[str]:
    """Return the differences in findings and plan after a replay, as a unified diff; empty if there are none."""
    return compare(record, rerun(record))


def compare(record: Recording, again: Rerun) -> list[str]:
    """Return a unified diff of a recording and the result of its replay."""
    import difflib

    before, now = list(format_record(record)), list(format_rerun(again))
    lines = difflib.unified_diff(before, now, "recorded", "replayed", lineterm="", n=2)
    return [make_one_line(line, 10_000) for line in lines]


def format_record(record: Recording) -> Iterator[str]:
    """Yield the lines by which a recording is compared: decisions, findings, exit code."""
    yield from format_decisions([[event["note"], event.get("answer")] for event in record.events if "note" in event])
    yield from (hide_finding(finding).as_line() for finding in record.findings)
    yield f"exit {record.about['exit']}"


def format_rerun(again: Rerun) -> Iterator[str]:
    """Yield the same lines for the result of a replay."""
    yield from format_decisions(again.decisions)
    yield from (hide_finding(finding).as_line() for finding in again.outcome.findings)
    yield f"exit {again.outcome.code}"


def format_decisions(decisions: list[Any]) -> Iterator[str]:
    """Yield decisions, one line per value."""
    import json

    for what, value in decisions:
        pairs = value.items() if isinstance(value, dict) else [("is", value)]
        for key, item in pairs:
            items = item if isinstance(item, list) and item else [item]
            yield from (f"{what}: {key}: {json.dumps(each, sort_keys=True)}" for each in items)


# Protection from changes ----------------------------------------------------------------------------------------------


class sealed:  # noqa: N801 - reads as a statement
    """Context in which the process may only compute and load its own code; any other access to the system, opening a
    file for reading included, raises PermissionError.

    The hook's Root answers from the recording, and this context is the second barrier: a step that a later version does
    not send through the Root is refused, not done, also if root replays an untrusted recording.
    """

    def __init__(self) -> None:
        self.holds = False
        # Directories from which Python loads modules, and this package's schemas.
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        locations = (*sys.path, sys.prefix, sys.base_prefix, package)
        self.places = tuple({f"{os.path.abspath(location)}/" for location in locations})

    def __enter__(self) -> None:
        # An audit hook cannot be removed, only disabled by a flag.
        sys.addaudithook(self.watch)
        self.holds = True

    def __exit__(self, *_: object) -> None:
        self.holds = False

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Raise PermissionError for an audit event of a change."""
        if not self.holds:
            return
        changes = event in CHANGES
        if event == "open":
            path, _, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            changes = path != "/dev/null" and (bool(flags & writes) or not self.is_code(path))
        if changes:
            raise PermissionError(errno.EPERM, f"a replay changes nothing: {event}", str(arguments[:1]))

    def is_code(self, path: object) -> bool:
        """Return whether an opened file is a part of Python or of this package."""
        if not isinstance(path, (str, bytes)):
            # A file descriptor, already open.
            return isinstance(path, int)
        name = os.path.abspath(os.fsdecode(path))
        return name.endswith(CODE) and name.startswith(self.places)
