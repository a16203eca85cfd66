# SPDX-License-Identifier: Apache-2.0
"""Whether a config.json that can't be read could ask for VFIO: traces of it in the bytes, whatever else they are.

Runtimes run what the reader refuses: text behind the object, comments, objects nested by the thousand, members that are
null. Such a container is stopped only where it could be one that asks. Both answers here err on that side: lacks_vfio
says yes only where no reader of JSON can find VFIO, and read_traces finds at least what the reader would.
"""

from __future__ import annotations

import os

from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Asks = Callable[[dict[str, str], list[str]], bool]

# Every annotation and every path that asks has this word in it, as these bytes or with some of them escaped.
WORD = b"vfio"
ESCAPES = (b"\\u0076", b"\\u0066", b"\\u0069", b"\\u006f", b"\\u006F")
# Bytes of a piece's end that may belong to a word whose rest is in the next one.
OVERLAP = 5
PIECE = 1 << 20
# A file of which not even the bytes are looked at. A runtime keeps all of it in memory, several times.
MAX_FILE_BYTES = 1 << 30
# One that is followed, in memory, when the bytes alone are no answer.
MAX_TEXT_BYTES = 64 << 20


@tagged("find-request")
def read_request_traces(path: str, asks: Asks) -> bool | None:
    """Tell whether a config.json asks for VFIO; None where nobody can say, as of an empty one. asks: see find_request.

    A question of its own to the system: a recording has the answer, and not the text, of which it leaves out most.
    """
    from oci_hooks.system import read_file

    try:
        if file_lacks_vfio(path):
            return False if os.stat(path).st_size else None
        return find_request(read_file(path, MAX_TEXT_BYTES), asks)
    except (OSError, MemoryError):
        return None


def find_request(data: bytes, asks: Asks) -> bool | None:
    """Tell whether a text asks for VFIO; None where it has the word and can't be followed. Pure.

    asks: tells it of annotations and paths of devices.
    """
    if lacks_vfio(data):
        return False
    traces = read_traces(data)
    if traces is None:
        return None
    return asks(traces.annotations, traces.paths)


def lacks_vfio(data: bytes) -> bool:
    """Tell whether a text surely has no "vfio" in any string, whatever else it is. Pure; nothing is imported.

    JSON has one other way to write a letter: its escape of six characters (RFC 8259, section 7).
    """
    if WORD in data:
        return False
    return b"\\u00" not in data or not any(escape in data for escape in ESCAPES)


def file_lacks_vfio(path: str) -> bool:
    """Tell the same of a file, piece by piece: one that is too large to be read. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        total, end = 0, b""
        while total <= MAX_FILE_BYTES:
            piece = os.read(fd, PIECE)
            if not piece:
                return True
            if not lacks_vfio(end + piece):
                return False
            total += len(piece)
            end = (end + piece)[-OVERLAP:]
        return False
    finally:
        os.close(fd)


class Unreadable(Exception):
    """The text can't be followed."""


class RequestTraces:
    """What a text that is nearly JSON has where a container asks for VFIO. All of it: values of any kind count.

    annotations: by name, "" for a value that is no string; paths: every string below linux.devices.
    """

    def __init__(self) -> None:
        self.annotations: dict[str, str] = {}
        self.paths: list[str] = []

    def add_key(self, keys: list[str | None]) -> None:
        """Take note of a member. keys: the way to it, its own name last; None for a place in an array."""
        if len(keys) == 2 and keys[1] is not None and is_member(keys, "annotations"):
            self.annotations.setdefault(keys[1], "")

    def add_text(self, keys: list[str | None], text: str) -> None:
        """Take note of a string. keys: the way to it."""
        if is_member(keys, "annotations"):
            # One that stands where no annotation can is taken for a name: no reader says what it means.
            self.annotations[(len(keys) == 2 and keys[1]) or text] = text
        elif is_member(keys, "linux", "devices"):
            self.paths.append(text)


def is_member(keys: list[str | None], *names: str) -> bool:
    """Tell whether a way begins with these names, in any case: Go takes them so (encoding/json, Unmarshal)."""
    return len(keys) >= len(names) and all(key is not None and key.casefold() == name for key, name in zip(keys, names))


def read_traces(data: bytes) -> RequestTraces | None:
    """Return the traces in the first value of a text; None where that can't be followed to its end. Pure.

    It goes by brackets, colons and strings alone, without recursion; numbers and words may be anything. Comments are
    skipped, as yajl does, which crun reads with.
    """
    try:
        return scan_text(data.decode("utf-8", "surrogateescape"))
    except Unreadable:
        return None


def scan_text(text: str) -> RequestTraces:
    """Return the traces in the first value of a text. Raises Unreadable."""
    import re

    traces = RequestTraces()
    # The way to where we are: a member's name, None in an array; the name of an object before its first member is "".
    keys: list[str | None] = []
    last: str | None = None
    mark: Any = re.compile(r"""[][{}:,"'/]""").search
    found = mark(text, 0)
    while found:
        location, char = found.end(), found[0]
        if char == '"':
            last, location = read_string(text, location, len(keys) <= 4)
        elif char == "/":
            location = skip_comment(text, location)
        elif char in "{[":
            keys.append("" if char == "{" else None)
            last = None
        elif char == ":" and keys and keys[-1] is not None and last is not None:
            keys[-1], last = last, None
            traces.add_key(keys)
        elif char in ",}]" and keys:
            if last is not None:
                traces.add_text(keys, last)
            last = None
            if char != "," and (keys.pop() is None) != (char == "]"):
                raise Unreadable
            if not keys:
                return traces
        else:
            raise Unreadable
        found = mark(text, location)
    raise Unreadable


def read_string(text: str, start: int, wanted: bool) -> tuple[str, int]:
    """Return a string and the place behind it. Raises Unreadable.

    start: behind its quote; wanted: whether its escapes are decoded. Behind an odd number of backslashes is an escape.
    """
    end = text.find('"', start)
    while end >= 0:
        before = end
        while before > start and text[before - 1] == "\\":
            before -= 1
        if (end - before) % 2 == 0:
            break
        end = text.find('"', end + 1)
    if end < 0:
        raise Unreadable
    inside = text[start:end]
    if wanted and "\\" in inside:
        from json import JSONDecoder

        try:
            inside = JSONDecoder(strict=False).decode(f'"{inside}"')
        except ValueError:
            raise Unreadable from None
    return inside, end + 1


def skip_comment(text: str, start: int) -> int:
    """Return the place behind a comment. start: behind its first slash. Raises Unreadable."""
    if text.startswith("*", start):
        end = text.find("*/", start + 1)
        if end >= 0:
            return end + 2
    elif text.startswith("/", start):
        end = text.find("\n", start)
        if end >= 0:
            return end + 1
    raise Unreadable
