# SPDX-License-Identifier: Apache-2.0
"""Limit the size of recordings, for the hook that writes one and the tool that reads one from an untrusted source.

A hook observes these bounds when it writes, so that its recordings can always be read. The recordings of real runs have
150 events, 60 kB unpacked and a depth of 7; the bounds are far above that, and low enough that the worst recording
within them takes seconds and some hundred MiB, not minutes and GiB.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

# record.json, events.jsonl, state.json and config.json: a recording has no other members, and none of them twice.
MAX_MEMBERS = 4
# Two documents of four MiB that gzip cannot compress.
MAX_PACKED_BYTES = 8 << 20
# The members at their largest: 1 + 16 + 4 + 4 MiB, and the tar's headers.
MAX_BYTES = 26 << 20
# record.json: findings of two thousand characters, arguments, versions, a traceback.
MAX_SUMMARY_BYTES = 1 << 20
# A state on stdin is refused above four MiB (program.py); a longer config.json is named in a recording, not kept.
MAX_DOCUMENT_BYTES = 4 << 20
# Twenty thousand events of 800 bytes; those of a real run have 200 on average.
MAX_EVENT_BYTES = 16 << 20
# Content of one file: a sysfs attribute is a page, and the hooks parse nothing longer than this.
MAX_ANSWER_BYTES = 1 << 18
# JSON uses at most six bytes for a character of an answer; and space for the rest of the event.
MAX_LINE_BYTES = 7 * MAX_ANSWER_BYTES
# A machine with a thousand PCI functions causes ten thousand.
MAX_EVENTS = 20_000
# JSON values in all events, in a document: 25 for each event. A value takes 100 bytes of memory.
MAX_VALUES = 500_000
# JSON values in record.json: jsonschema checks each, which takes 50 microseconds.
MAX_SUMMARY_VALUES = 20_000
# Nesting of objects and arrays: a plan with its nodes has 7.
MAX_DEPTH = 32
# The kernel's integers have 64 bits; C code accepts no wider ones.
MAX_NUMBER = (1 << 64) - 1
# errno(3): the kernel's numbers end at MAX_ERRNO.
MAX_ERRNO = 4095
# Reading and replaying the largest recording takes five on a slow machine.
MAX_SECONDS = 20
# In addition to the process's own memory: ten times the unpacked size of the largest recording.
MAX_MEMORY_BYTES = 512 << 20


class RecordError(Exception):
    """The file is not a readable recording, with the reason. path: of the file, "" if unknown."""

    path = ""


class RecordTooLarge(RecordError):
    """A recording exceeds a bound. name: the bound's, as the constants of this module; maximum: its value."""

    def __init__(self, name: str, maximum: int, where: str = "") -> None:
        words = name.lower().replace("_", " ")
        super().__init__(f"{where or 'the recording'} exceeds the limit of {maximum} {words} ({name})")
        self.name = name


class OutOfTime(BaseException):
    """The time for a recording is over. Not an Exception: a replayed hook handles every Exception as its own."""


def check_bound(found: int, name: str, where: str = "") -> None:
    """Raise RecordTooLarge if a number exceeds a bound. name: the constant of this module, without MAX_."""
    maximum: int = globals()[f"MAX_{name}"]
    if found > maximum:
        raise RecordTooLarge(name, maximum, where)


def check_value(value: object, where: str) -> int:
    """Return the number of JSON values in one, itself included. Raises RecordTooLarge: DEPTH, NUMBER.

    Not recursive: a text of a few kB can be nested as deep as Python's stack.
    """
    count = 0
    level = [value]
    depth = 0
    while level:
        check_bound(depth, "DEPTH", where)
        inner: list[object] = []
        for item in level:
            if type(item) is dict:
                inner.extend(item.values())
            elif type(item) is list:
                inner.extend(item)
            elif type(item) is int:
                check_bound(abs(item), "NUMBER", where)
        count += len(level)
        level = inner
        depth += 1
    return count


def estimate_values(data: bytes) -> int:
    """Return the possible number of values in a JSON text: each comes with a comma, a colon or a bracket."""
    return 1 + sum(map(data.count, (b",", b":", b"[", b"{")))


class bounded:  # noqa: N801 - reads as a statement
    """Context in which the process may use MAX_SECONDS and MAX_MEMORY_BYTES more. Raises RecordTooLarge at its end.

    For costs that cannot be counted beforehand: the time that a hook takes with untrusted answers. Only in the main
    thread, which receives the signals.
    """

    def __init__(self) -> None:
        self.armed = False

    def __enter__(self) -> None:
        import resource
        import signal
        import threading

        if threading.current_thread() is not threading.main_thread():
            return
        self.armed = True
        self.limits = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm", "rb") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        maximum = now + MAX_MEMORY_BYTES
        if self.limits[0] == resource.RLIM_INFINITY or maximum < self.limits[0]:
            resource.setrlimit(resource.RLIMIT_AS, (maximum, self.limits[1]))
        self.handler = signal.signal(signal.SIGALRM, self.end)
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)

    def end(self, _number: int, _frame: FrameType | None) -> None:
        """Handle SIGALRM."""
        raise OutOfTime

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        import resource
        import signal

        if self.armed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.handler)
            resource.setrlimit(resource.RLIMIT_AS, self.limits)
        if kind is OutOfTime:
            raise RecordTooLarge("SECONDS", MAX_SECONDS) from None
        if kind is not None and issubclass(kind, MemoryError):
            raise RecordTooLarge("MEMORY_BYTES", MAX_MEMORY_BYTES) from None
