# SPDX-License-Identifier: Apache-2.0
"""Decide whether an unreadable config.json could request VFIO: by traces of a request in the bytes, whatever they are.

Runtimes run containers whose config.json the reader refuses: text after the object, comments, objects nested by the
thousand, members that are null. Such a container is stopped only if it could request VFIO. Both answers here err on
that side: lacks_vfio is true only if no JSON reader can find VFIO, and read_traces finds all that the reader would.
"""

from __future__ import annotations

import os

from oci_hooks.idle import WORD, lacks_vfio
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Asks = Callable[[dict[str, str], list[str]], bool]

# Bytes at a piece's end that may belong to a word continued in the next piece.
OVERLAP = 5
PIECE = 1 << 20
# Size above which not even the bytes are searched. A runtime keeps the whole file in memory, several times.
MAX_FILE_BYTES = 1 << 30
# Size up to which a file is parsed in memory, if the bytes alone give no answer.
MAX_TEXT_BYTES = 64 << 20


@tagged("find-request")
def read_request_traces(path: str, asks: Asks) -> bool | None:
    """Return whether a config.json requests VFIO; None if undecidable, as for an empty one. asks: see find_request.

    A separate question to the system: a recording has the answer, and not the text, most of which is redacted.
    """
    from oci_hooks.system import read_file

    try:
        if file_lacks_vfio(path):
            return False if os.stat(path).st_size else None
        return find_request(read_file(path, MAX_TEXT_BYTES), asks)
    except (OSError, MemoryError):
        return None


def find_request(data: bytes, asks: Asks) -> bool | None:
    """Return whether a text requests VFIO; None if it contains the word and cannot be parsed. Pure.

    asks: returns whether annotations and paths of devices request VFIO.
    """
    if lacks_vfio(data):
        return False
    traces = read_traces(data)
    if traces is None:
        return None
    return asks(traces.annotations, traces.paths)


def file_lacks_vfio(path: str) -> bool:
    """Return the same for a file too large to be read at once, piece by piece. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        total, end = 0, b""
        while total <= MAX_FILE_BYTES:
            piece = os.read(fd, PIECE)
            known = end + piece
            # What follows a word at the end decides what it is, and is in the next piece.
            if not lacks_vfio(known.removesuffix(WORD.encode()) if piece else known):
                return False
            if not piece:
                return True
            total += len(piece)
            end = known[-OVERLAP:]
        return False
    finally:
        os.close(fd)


class Unreadable(Exception):
    """The text cannot be parsed."""


class RequestTraces:
    """The request-related values of a text that is nearly JSON; values of any type count.

    annotations: by name, "" for a value that is not a string; paths: every string below linux.devices.
    """

    def __init__(self) -> None:
        self.annotations: dict[str, str] = {}
        self.paths: list[str] = []

    def add_key(self, keys: list[str | None]) -> None:
        """Note a member. keys: its path, its own name last; None for an array element."""
        if len(keys) == 2 and keys[1] is not None and is_member(keys, "annotations"):
            self.annotations.setdefault(keys[1], "")

    def add_text(self, keys: list[str | None], text: str) -> None:
        """Note a string. keys: its path."""
        if is_member(keys, "annotations"):
            # A string where no annotation can be counts as a name: no reader defines its meaning.
            self.annotations[(len(keys) == 2 and keys[1]) or text] = text
        elif is_member(keys, "linux", "devices"):
            self.paths.append(text)


def is_member(keys: list[str | None], *names: str) -> bool:
    """Return whether a path starts with these names, in any case: Go accepts them so (encoding/json, Unmarshal)."""
    return len(keys) >= len(names) and all(key is not None and key.casefold() == name for key, name in zip(keys, names))


def read_traces(data: bytes) -> RequestTraces | None:
    """Return the traces in the first value of a text; None if it cannot be parsed to its end. Pure.

    It uses only brackets, colons and strings, without recursion; numbers and words may be anything. Comments are
    skipped, as in yajl, crun's reader.
    """
    try:
        return scan_text(data.decode("utf-8", "surrogateescape"))
    except Unreadable:
        return None


def scan_text(text: str) -> RequestTraces:
    """Return the traces in the first value of a text. Raises Unreadable."""
    import re

    traces = RequestTraces()
    # The current path: a member's name, None in an array; the name of an object before its first member is "".
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
    """Return a string and the position after it. Raises Unreadable.

    start: after its quote; wanted: whether its escapes are decoded. An odd number of backslashes begins an escape.
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
    """Return the position after a comment. start: after its first slash. Raises Unreadable."""
    if text.startswith("*", start):
        end = text.find("*/", start + 1)
        if end >= 0:
            return end + 2
    elif text.startswith("/", start):
        end = text.find("\n", start)
        if end >= 0:
            return end + 1
    raise Unreadable
