# SPDX-License-Identifier: Apache-2.0
"""Run a recorded hook again: on the recorded machine, where nothing is touched, or on this one.

The hook's own code runs, all of it up to the door (system.py). Behind the door stands the record: a question has the
answer that it had then, a step the result. Compared are findings and plan; what this version of the code asks or does
that the record has no answer to is told beside them.
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

# What Python tells an audit hook of before it changes something (docs.python.org, Audit events table).
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


# What Python opens to load a module, and this package's schemas.
CODE = (".py", ".pyc", ".so", ".pth", ".cfg", ".json", "/METADATA", ".zip", ".egg-link")


class Rerun(Frozen):
    """What running a record again came to.

    outcome: of the run; decisions: what it decided, as JSON; unexpected: what the record has no answer to.
    """

    outcome: Outcome
    decisions: list[Any]
    unexpected: list[str]


class ReplayRoot(Root):
    """The machine of a record. Answers what was asked there, in the state that it was in after the steps so far."""

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
        """Return what the question was answered with. Raises OSError; ENOENT where nobody asked it."""
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
        """Tell whether the record shows that there is nothing at a path, by a listing of what is."""
        directory, _, name = path.rpartition("/")
        listing = self.listings.get(directory)
        answer = listing.get("answer") if listing else None
        return isinstance(answer, list) and name not in answer

    def pick(self, known: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        """Return the answer for now: the last before the next step; several of them are given one after the other."""
        limit = self.steps[self.next_step][0] if self.next_step < len(self.steps) else sys.maxsize
        since = self.steps[self.next_step - 1][0] if self.next_step else -1
        past = [entry for entry in known if entry[0] < since]
        present = [entry for entry in known if since < entry[0] < limit]
        if len(present) > 1:
            known.remove(present[0])
        return (present or past[-1:] or known)[0][1]

    def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Return what the step came to then, None for one that was not done. Raises what it raised then."""
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
        """Keep what was decided, to compare it."""
        self.decisions.append([what, encoding.encode(value)])

    def decode(self, value: Any) -> Any:
        """Return an answer of the record. Raises NotationError."""
        if isinstance(value, dict) and value.get(encoding.KIND) == "member":
            return self.documents.get(str(value.get("name")), b"")
        try:
            return encoding.decode(value, KINDS)
        except encoding.NotationError as error:
            # The hook takes any exception for its own.
            self.damage = error
            raise

    def decode_error(self, value: Any) -> Exception:
        """Return an error of the record. Raises NotationError."""
        try:
            return encoding.decode_error(value)
        except encoding.NotationError as error:
            self.damage = error
            raise


class LiveRoot(RecordingRoot):
    """This machine, with the state of a record."""

    def __init__(self, state: bytes) -> None:
        super().__init__()
        self.state = state

    def ask(self, question: Callable[..., T], path: str, *more: object) -> T:
        """Return what a reading function says of a path. Raises OSError; also for a file that is none.

        The record names files (of settings, of Kata's configuration), and may be a stranger's: to open a device may do
        something (/dev/watchdog).
        """
        if name_tag(question) == "read" and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", path)
        return super().ask(question, path, *more)

    def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Return what a step comes to; the state is the record's."""
        if name_tag(function) == "read-state":
            return self.state  # type: ignore[return-value]
        return super().do(function, *arguments)


# Running --------------------------------------------------------------------------------------------------------------


def rerun(record: Recording) -> Rerun:
    """Run the record's hook on the recorded machine. Nothing on this one is changed. Raises NotationError."""
    root = ReplayRoot(record)
    # The plan of a dry run is in its decisions; printed, it would stand among the differences.
    run = make_run(record, root, make_arguments(record).replace(json=True))
    with sealed():
        outcome = run_work(run, find_work(record.about["program"]))
    if root.damage:
        raise root.damage
    return Rerun(outcome, root.decisions, root.unexpected)


def run_live(record: Recording, bundle: str, pid: int | None, apply: bool) -> tuple[Run, Outcome]:
    """Run the record's hook on this machine, with its state and config.json; a dry run unless `apply`.

    bundle: a directory that holds the config.json; pid: instead of the state's.
    """
    import json

    state = json.loads(record.documents.get("state.json", b"{}"))
    state = {"id": record.about["container"] or "replay", **state, "bundle": bundle}
    if pid is not None:
        state["pid"] = pid
    arguments = make_arguments(record).replace(dry_run=not apply, bundle="")
    if record.about["arguments"].get("bundle"):
        # Run by hand then: there was no state.
        state.setdefault("pid", arguments.pid if pid is None else pid)
        state["status"] = "creating"
    run = make_run(record, LiveRoot(json.dumps(state).encode()), arguments)
    return run, run_work(run, find_work(record.about["program"]))


def make_arguments(record: Recording) -> Arguments:
    """Return the command line of a record."""
    values = {name: value for name, value in record.about["arguments"].items() if name in Arguments.field_names()}
    return Arguments(**{**values, "groups": tuple(values.get("groups", ()))})


def make_run(record: Recording, root: Root, arguments: Arguments) -> Run:
    """Return the run of a hook that is run again."""
    return Run(record.about["program"], arguments, Deadline(USUAL_SECONDS), root)


def find_work(program: str) -> Callable[[Run], int]:
    """Return what a hook does."""
    if program == "vfio-host-check":
        from oci_hooks.host.hook import work as check

        return check
    from oci_hooks.guest.hook import work as bind

    return bind


# Comparing ------------------------------------------------------------------------------------------------------------


def find_differences(record: Recording) -> list[str]:
    """Return how findings and plan of a record that is run again differ, as a unified diff; empty: not at all."""
    return compare(record, rerun(record))


def compare(record: Recording, again: Rerun) -> list[str]:
    """Return a unified diff of a record and what running it again came to."""
    import difflib

    before, now = list(format_record(record)), list(format_rerun(again))
    lines = difflib.unified_diff(before, now, "recorded", "replayed", lineterm="", n=2)
    return [make_one_line(line, 10_000) for line in lines]


def format_record(record: Recording) -> Iterator[str]:
    """Yield the lines by which a record is compared: decisions, findings, exit code."""
    yield from format_decisions([[event["note"], event.get("answer")] for event in record.events if "note" in event])
    yield from (hide_finding(finding).as_line() for finding in record.findings)
    yield f"exit {record.about['exit']}"


def format_rerun(again: Rerun) -> Iterator[str]:
    """Yield the same lines for what a run came to now."""
    yield from format_decisions(again.decisions)
    yield from (hide_finding(finding).as_line() for finding in again.outcome.findings)
    yield f"exit {again.outcome.code}"


def format_decisions(decisions: list[Any]) -> Iterator[str]:
    """Yield decisions, a line a value."""
    import json

    for what, value in decisions:
        pairs = value.items() if isinstance(value, dict) else [("is", value)]
        for key, item in pairs:
            items = item if isinstance(item, list) and item else [item]
            yield from (f"{what}: {key}: {json.dumps(each, sort_keys=True)}" for each in items)


# Nothing is changed ---------------------------------------------------------------------------------------------------


class sealed:  # noqa: N801 - reads as a statement
    """While this holds, the process may compute and load its own code; all else that touches the system, to open a
    file for reading included, raises PermissionError.

    The record stands behind the door, and this behind the record: a step that a later version forgets to send through
    the door is refused, not done, also when root replays what a stranger sent.
    """

    def __init__(self) -> None:
        self.holds = False
        # Where Python loads modules from, also this package's schemas.
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        locations = (*sys.path, sys.prefix, sys.base_prefix, package)
        self.places = tuple({f"{os.path.abspath(location)}/" for location in locations})

    def __enter__(self) -> None:
        # An audit hook can't be taken away again, only told to look elsewhere.
        sys.addaudithook(self.watch)
        self.holds = True

    def __exit__(self, *_: object) -> None:
        self.holds = False

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Raise PermissionError for what changes the system."""
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
        """Tell whether a file that is opened is a part of Python or of this package."""
        if not isinstance(path, (str, bytes)):
            # A descriptor, which is open.
            return isinstance(path, int)
        name = os.path.abspath(os.fsdecode(path))
        return name.endswith(CODE) and name.startswith(self.places)
