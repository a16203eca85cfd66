# SPDX-License-Identifier: Apache-2.0
"""The only door between the hooks and the system.

Every reading function takes a `Root`: "/" on the live system, a made tree in a test, a record when a run is replayed.
What is read by path goes through `Root.ask`; what changes the system, or reads it in other ways, is a function marked
`@step` and goes through `Root.do`. These two are all that a record notes and a replay answers. Plain system calls: most
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

# A sysfs attribute is a page at most; config.json of a tenant may be anything.
DEFAULT_LIMIT = 16 << 20
# The deadline of a hook. Kata's agent kills a guest hook after 10 s, and nothing of what it knew is left then.
USUAL_SECONDS = 8.0


def tagged(tag: str) -> Callable[[F], F]:
    """Give a question or step the name that recordings have for it, whatever its function is called."""

    def give(function: F) -> F:
        function.tag = tag  # type: ignore[attr-defined]
        return function

    return give


def name_tag(function: Callable[..., object]) -> str:
    """Return the name that recordings have for a function: its tag, or that of the standard library's."""
    tag: str = getattr(function, "tag", "") or function.__name__
    return tag


class Deadline:
    """A moment by which the hook must have ended. seconds: from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = time.monotonic()

    def remaining(self) -> float:
        """Return the seconds left, never below zero."""
        return max(0.0, self.start + self.seconds - time.monotonic())

    @tagged("elapsed")
    def elapsed(self) -> float:
        """Return the seconds that are over, never more than there are."""
        return self.seconds - self.remaining()

    def extend(self, seconds: float) -> None:
        """Set how many seconds there are in all, from the same start: settings are read after the clock has begun."""
        self.seconds = seconds


class Descriptor(int):
    """An open file's number. A record only says that there was one, and a replay gives one of /dev/null."""


class Root:
    """A directory tree read as if it were the system's root. Paths are absolute, as on the live system.

    top: the directory that stands for "/".
    """

    def __init__(self, top: str = "/") -> None:
        self.top = top.rstrip("/")

    def host_path(self, path: str) -> str:
        """Return where the path really lies on this machine."""
        return self.top + path if path != "/" else self.top or "/"

    # The door ----------------------------------------------------------------------------------------------------

    def ask(self, question: Callable[..., T], path: str, *more: object) -> T:
        """Return what a reading function says of a path. Raises OSError."""
        return question(self.host_path(path), *more)

    def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Return what a step comes to: a function that changes the system, or reads it past `ask`."""
        return function(*arguments)

    def note(self, what: str, value: object) -> None:
        """Take note of something that was decided, for the record of the run."""

    # Reading -----------------------------------------------------------------------------------------------------

    def read_bytes(self, path: str, limit: int = DEFAULT_LIMIT) -> bytes:
        """Return the file's content. Raises OSError; EFBIG when there is more than `limit` bytes."""
        return self.ask(read_file, path, limit)

    def read_text(self, path: str) -> str:
        """Return the file's content without the white space around it. Raises OSError."""
        return self.read_bytes(path).decode("utf-8", "surrogateescape").strip()

    def read_text_or(self, path: str, default: str) -> str:
        """Return the file's content, or the default where the file can't be read."""
        try:
            return self.read_text(path)
        except OSError:
            return default

    def list_names(self, path: str) -> list[str]:
        """Return the names in a directory, sorted; empty where there is no such directory. Raises other OSErrors."""
        try:
            return sorted(self.ask(os.listdir, path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read_link(self, path: str) -> str:
        """Return the target of a symbolic link, or "" where there is none."""
        try:
            target: str = self.ask(os.readlink, path)
        except OSError:
            return ""
        return target

    def read_link_name(self, path: str) -> str:
        """Return the last component of a link's target ("" without a link): sysfs says driver and group so."""
        return self.read_link(path).rpartition("/")[2]

    def stat(self, path: str) -> os.stat_result:
        """Return the stat of a path, links followed. Raises OSError."""
        return self.ask(os.stat, path)

    def exists(self, path: str) -> bool:
        """Tell whether there is anything at this path, links followed."""
        try:
            self.stat(path)
        except OSError:
            return False
        return True

    def real_path(self, path: str) -> str:
        """Return the path with every link resolved, still as seen from this root."""
        real: str = self.ask(os.path.realpath, path)
        return real[len(self.top) :] if self.top and real.startswith(self.top + "/") else real

    def is_exclusively_open(self, path: str) -> bool:
        """Tell whether a block device's node can't be opened because it is in exclusive use. Nothing else is asked.

        Source: open(2), O_EXCL without O_CREAT: EBUSY when the device is mounted or otherwise used by the system.
        """
        try:
            self.ask(open_exclusively, path)
        except OSError as error:
            return error.errno == EBUSY
        return False


# What a root asks -----------------------------------------------------------------------------------------------------


@tagged("read")
def read_file(path: str, limit: int) -> bytes:
    """Return a file's content. Raises OSError; EFBIG when there is more than `limit` bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return b"".join(read_chunks(fd, limit, path))
    finally:
        os.close(fd)


def read_chunks(fd: int, limit: int, name: str) -> Iterator[bytes]:
    """Yield what a descriptor holds, to its end. Raises OSError; EFBIG past `limit` bytes."""
    total = 0
    while True:
        chunk = os.read(fd, 65536)
        if not chunk:
            return
        total += len(chunk)
        if total > limit:
            raise OSError(EFBIG, f"more than {limit} bytes", name)
        yield chunk


def read_pipe(fd: int, deadline: Deadline, limit: int = DEFAULT_LIMIT) -> bytes | None:
    """Return what comes through a pipe until its other end is closed, None where that is not before the deadline.

    limit: bytes after which no more is read, so that more than these come back. Raises OSError.
    """
    import select

    poller = select.poll()
    poller.register(fd, select.POLLIN)
    chunks = []
    total = 0
    while poller.poll(deadline.remaining() * 1000):
        chunks.append(os.read(fd, 65536))
        total += len(chunks[-1])
        if not chunks[-1] or total > limit:
            return b"".join(chunks)
    return None


@tagged("open-exclusively")
def open_exclusively(path: str) -> None:
    """Open a block device's node for nobody else, and close it. Raises OSError."""
    os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))


# What a root does -----------------------------------------------------------------------------------------------------


def step(tag: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Have a function go through `Root.do`. Its first argument is the root, or has it as its attribute `root`.

    tag: the name that recordings have for the step.
    """

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        def through_root(first: Any, *more: Any) -> T:
            root: Root = first if isinstance(first, Root) else first.root
            return root.do(function, first, *more)

        function.tag = tag  # type: ignore[attr-defined]
        through_root.__name__, through_root.__doc__ = function.__name__, function.__doc__
        return through_root  # type: ignore[return-value]

    return wrap


# Noting ---------------------------------------------------------------------------------------------------------------


class Note:
    """One thing that a run asked, did or decided.

    kind: "ask", "do" or "note"; name: of the function, or of what was decided; arguments: path first for "ask";
    begun: seconds since the run began; seconds: how long it took; answer: what came of it, an exception included;
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
    """The live system, and a note of all that passed the door: what a record is made of.

    It stands here because every run has one: noting costs a microsecond, a module of its own would cost an open.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Note] = []
        self.started = time.monotonic()
        self.depth = 0

    def ask(self, question: Callable[..., T], path: str, *more: object) -> T:
        """Return what a reading function says of a path, and note it. Raises OSError."""
        return self.call_noted(self.add("ask", name_tag(question), (path,)), question, path, *more)

    def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Return what a step comes to, and note it."""
        entry = self.add("do", name_tag(function), arguments)
        self.depth += 1
        try:
            return self.call_noted(entry, function, *arguments)
        finally:
            self.depth -= 1

    def note(self, what: str, value: object) -> None:
        """Take note of something that was decided."""
        self.add("note", what, ()).answer = value

    def add(self, kind: str, name: str, arguments: tuple[object, ...]) -> Note:
        """Return a new note, at the end of all."""
        entry = Note(kind, name, arguments, time.monotonic() - self.started, self.depth > 0)
        self.notes.append(entry)
        return entry

    def call_noted(self, entry: Note, function: Callable[..., T], *arguments: object) -> T:
        """Return what a function returns, noting that, or what it raises."""
        try:
            answer = function(*arguments)
        except Exception as error:
            entry.answer = error
            raise
        finally:
            entry.seconds = time.monotonic() - self.started - entry.begun
        entry.answer = answer
        return answer
