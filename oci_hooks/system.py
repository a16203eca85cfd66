# SPDX-License-Identifier: Apache-2.0
"""Access the system: all of the hooks' reads and changes go through a `Root`.

A `Root` is "/" on the live system, a temporary tree in a test, a recording when a run is replayed. Reads by
path go through `Root.ask`; a function that changes the system, or reads it in other ways, is marked `@step` and goes
through `Root.do`. A recording contains exactly these two, and a replay answers them. Plain system calls: most
files here are sysfs attributes of a few bytes.
"""

from __future__ import annotations

import os
import time
from errno import EBUSY, EFBIG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    from typing_extensions import ParamSpec

    T = TypeVar("T")
    P = ParamSpec("P")
    F = TypeVar("F", bound=Callable[..., Any])

VERSION_FILES = ("/opt/kata/VERSION",)

DOCKER_CONFIG = "/etc/docker/daemon.json"

# A sysfs attribute is a page at most; a tenant's config.json may have any size.
DEFAULT_LIMIT = 16 << 20
# The deadline of a hook, in seconds. Kata's agent kills a guest hook after 10 s, and its knowledge is lost then.
USUAL_SECONDS = 8.0
# Seconds of a process's age that count, or those of its deadline if that is longer. An older process was another
# program before (`exec` in a shell that is open for hours), or the machine slept: CLOCK_BOOTTIME goes on then.
MAX_AGE = 10.0
OWN_STAT = "/proc/self/stat"


def tagged(tag: str) -> Callable[[F], F]:
    """Set the name of a question or step in recordings, independent of its function's name."""

    def give(function: F) -> F:
        function.tag = tag  # type: ignore[attr-defined]
        return function

    return give


def name_tag(function: Callable[..., object]) -> str:
    """Return a function's name in recordings: its tag, or the name of a standard library function."""
    tag: str = getattr(function, "tag", "") or function.__name__
    return tag


class Deadline:
    """The time by which the hook must end.

    seconds: from now, and from `extend` on from the start of the process; stat: path of that process's stat, "" where
    the process does more than one run of a hook. Its age is read when settings are: a container without VFIO devices
    does not pay for it.
    """

    def __init__(self, seconds: float, stat: str = "") -> None:
        self.seconds = seconds
        self.stat = stat
        self.start = time.monotonic()

    def remaining(self) -> float:
        """Return the seconds left, never below zero."""
        return max(0.0, self.start + self.seconds - time.monotonic())

    @tagged("elapsed")
    def elapsed(self) -> float:
        """Return the seconds elapsed, at most the total."""
        return self.seconds - self.remaining()

    def extend(self, seconds: float) -> None:
        """Set the total seconds: settings are read after the clock has started.

        They count from the start of the process, as they do for a runtime that kills a hook: on a slow machine the
        interpreter's start and the imports take seconds.
        """
        self.seconds = seconds
        age = read_age(self.stat, max(MAX_AGE, seconds)) if self.stat else None
        if age is not None:
            self.start = time.monotonic() - age


def read_age(path: str, highest: float = MAX_AGE) -> float | None:
    """Return for how many seconds this process has existed, None where that is unknown or more than the highest.

    path: of its stat. Source: proc_pid_stat(5), starttime: the 22nd field, in clock ticks since boot; do_task_stat in
    the kernel's fs/proc/array.c takes it from the clock that is CLOCK_BOOTTIME here, time namespaces included.
    """
    try:
        # The name in parentheses, the second field, may hold anything.
        ticks = int(read_file(path, 4096).rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, ArithmeticError):
        return None
    return age if 0 <= age <= highest else None


class Descriptor(int):
    """An open file's number. A recording only keeps that it existed, and a replay opens /dev/null instead."""


class Root:
    """A directory tree read as if it were the system's root. Paths are absolute, as on the live system.

    top: the directory used as "/".
    """

    def __init__(self, top: str = "/") -> None:
        self.top = top.rstrip("/")

    def host_path(self, path: str) -> str:
        """Return the real location of a path on this machine."""
        return self.top + path if path != "/" else self.top or "/"

    # Access ------------------------------------------------------------------------------------------------------

    def ask(self, question: Callable[..., T], path: str, *more: object) -> T:
        """Return a reading function's result for a path. Raises OSError."""
        return question(self.host_path(path), *more)

    def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Return the result of a step: a function that changes the system, or reads it other than by `ask`."""
        return function(*arguments)

    def note(self, what: str, value: object) -> None:
        """Note a decision, for the recording of the run."""

    # Reading -----------------------------------------------------------------------------------------------------

    def read_bytes(self, path: str, limit: int = DEFAULT_LIMIT) -> bytes:
        """Return the file's content. Raises OSError; EFBIG if there are more than `limit` bytes."""
        return self.ask(read_file, path, limit)

    def read_text(self, path: str) -> str:
        """Return the file's content without surrounding white space. Raises OSError."""
        return self.read_bytes(path).decode("utf-8", "surrogateescape").strip()

    def read_text_or(self, path: str, default: str) -> str:
        """Return the file's content, or the default if the file cannot be read."""
        try:
            return self.read_text(path)
        except OSError:
            return default

    def list_names(self, path: str) -> list[str]:
        """Return the names in a directory, sorted; empty if it does not exist. Raises other OSErrors."""
        try:
            return sorted(self.ask(os.listdir, path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read_link(self, path: str) -> str:
        """Return the target of a symbolic link, or "" if there is none."""
        try:
            target: str = self.ask(os.readlink, path)
        except OSError:
            return ""
        return target

    def read_link_name(self, path: str) -> str:
        """Return the last component of a link's target ("" without a link): sysfs names driver and group this way."""
        return self.read_link(path).rpartition("/")[2]

    def stat(self, path: str) -> os.stat_result:
        """Return the stat of a path, links followed. Raises OSError."""
        return self.ask(os.stat, path)

    def exists(self, path: str) -> bool:
        """Return whether this path exists, links followed."""
        try:
            self.stat(path)
        except OSError:
            return False
        return True

    def real_path(self, path: str) -> str:
        """Return the path with every link resolved, still relative to this root."""
        real: str = self.ask(os.path.realpath, path)
        return real[len(self.top) :] if self.top and real.startswith(self.top + "/") else real

    def is_exclusively_open(self, path: str) -> bool:
        """Return whether a block device's node cannot be opened because it is in exclusive use.

        Source: open(2), O_EXCL without O_CREAT: EBUSY when the device is mounted or otherwise used by the system.
        """
        try:
            self.ask(open_exclusively, path)
        except OSError as error:
            return error.errno == EBUSY
        return False


# Questions ------------------------------------------------------------------------------------------------------------


@tagged("read")
def read_file(path: str, limit: int) -> bytes:
    """Return a file's content. Raises OSError; EFBIG if there are more than `limit` bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return b"".join(read_chunks(fd, limit, path))
    finally:
        os.close(fd)


def read_chunks(fd: int, limit: int, name: str) -> Iterator[bytes]:
    """Yield a descriptor's content, to its end. Raises OSError; EFBIG past `limit` bytes."""
    total = 0
    while True:
        chunk = os.read(fd, 65536)
        if not chunk:
            return
        total += len(chunk)
        if total > limit:
            raise OSError(EFBIG, f"more than {limit} bytes", name)
        yield chunk


def read_pipe(fd: int, deadline: Deadline, limit: int = DEFAULT_LIMIT, begun: bytes = b"") -> bytes | None:
    """Return the data from a pipe until its other end is closed, None if it is not closed before the deadline.

    limit: bytes after which reading stops, so that the result is longer than this; begun: what was read from it
    already. Raises OSError.
    """
    import select

    poller = select.poll()
    poller.register(fd, select.POLLIN)
    chunks = [begun]
    total = len(begun)
    while poller.poll(deadline.remaining() * 1000):
        chunks.append(os.read(fd, 65536))
        total += len(chunks[-1])
        if not chunks[-1] or total > limit:
            return b"".join(chunks)
    return None


@tagged("open-exclusively")
def open_exclusively(path: str) -> None:
    """Open a block device's node exclusively, and close it. Raises OSError."""
    os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))


# Steps ----------------------------------------------------------------------------------------------------------------


def step(tag: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function go through `Root.do`. Its first argument is the root, or has it as its attribute `root`.

    tag: the step's name in recordings.
    """

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        def through_root(first: Any, *more: Any) -> T:
            root: Root = first if isinstance(first, Root) else first.root
            return root.do(function, first, *more)

        function.tag = tag  # type: ignore[attr-defined]
        through_root.__name__, through_root.__doc__ = function.__name__, function.__doc__
        return through_root  # type: ignore[return-value]

    return wrap


# Notes ----------------------------------------------------------------------------------------------------------------


class Note:
    """One question, step or decision of a run.

    kind: "ask", "do" or "note"; name: of the function or decision; arguments: path first for "ask";
    begun: seconds since the run began; seconds: a step's duration; answer: the result, an exception included;
    inside: whether it is a part of the step before it.
    """

    __slots__ = ("answer", "arguments", "begun", "inside", "kind", "name", "seconds")

    def __init__(self, kind: str, name: str, arguments: tuple[object, ...], begun: float, inside: bool) -> None:
        self.kind = kind
        self.name = name
        self.arguments = arguments
        self.begun = begun
        self.seconds = 0.0
        self.answer: object = None
        self.inside = inside


class RecordingRoot(Root):
    """The live system, with notes of all questions, steps and decisions: the source of a recording.

    Defined here because every run has one: noting costs a microsecond, a separate module would cost an open.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Note] = []
        self.started = time.monotonic()
        self.depth = 0

    def ask(self, question: Callable[..., T], path: str, *more: object) -> T:
        """Return a reading function's result for a path, and note it. Raises OSError."""
        # Not its duration: a run asks hundreds of times, and a virtual machine's clock may take a system call.
        return self.call_noted(self.add("ask", name_tag(question), (path,)), question, path, *more)

    def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Return the result of a step, and note it."""
        entry = self.add("do", name_tag(function), arguments)
        self.depth += 1
        try:
            return self.call_noted(entry, function, *arguments)
        finally:
            self.depth -= 1
            entry.seconds = time.monotonic() - self.started - entry.begun

    def note(self, what: str, value: object) -> None:
        """Note a decision."""
        self.add("note", what, ()).answer = value

    def add(self, kind: str, name: str, arguments: tuple[object, ...]) -> Note:
        """Return a new note, appended to the others."""
        entry = Note(kind, name, arguments, time.monotonic() - self.started, self.depth > 0)
        self.notes.append(entry)
        return entry

    def call_noted(self, entry: Note, function: Callable[..., T], *arguments: object) -> T:
        """Return a function's result, noting it or the exception raised."""
        try:
            answer = function(*arguments)
        except Exception as error:
            entry.answer = error
            raise
        entry.answer = answer
        return answer
