# SPDX-License-Identifier: Apache-2.0
"""The undo log: how to restore each thing, written before that thing is changed.

One file per container, one line per entry, words separated by tabs and percent-escaped: it is readable with cat, costs
no import, and a line torn by a kill is a step that was never begun. `done` ends the log of a hook that succeeded.
"""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import StepError
from oci_hooks.frozen import Frozen
from oci_hooks.linux.instances import Instance
from oci_hooks.system import tagged

FORMAT = "oci-vfio-hooks 2"
# Maximum size in bytes, for writing and reading. A device and a node take one line each; this is a thousand devices.
UNDO_LOG_LIMIT = 1 << 20

# Kinds of entry with the names of their words.
KINDS = {
    "container": ("id",),
    "bundle": ("path",),
    "init": ("pid", "start"),
    "cgroup": ("unified", "unified_inode", "devices", "devices_inode"),
    "group": ("name",),
    "device": ("address", "driver", "override", "inode", "vendor", "device", "class"),
    "directory": ("rootfs", "name"),
    "node": ("rootfs", "name", "major", "minor"),
    "file": ("rootfs", "name"),
    "mount": ("rootfs", "name"),
    "stale": ("rootfs", "name", "major", "minor", "mode", "uid", "gid"),
    "numbers": ("nodes",),
    "permit": ("nodes", "unified", "devices"),
    "revoked": ("nodes",),
    "done": (),
}
# Kinds that identify the log's owner and devices, and record no change.
HEADS = frozenset({"container", "bundle", "init", "cgroup", "group", "numbers", "revoked", "done"})
# The first entries of every log, in this order, written before other hooks can see it.
OWNER = ("container", "bundle", "init", "cgroup")
# Kinds of changes in the container's /dev, with the action that undoes one.
UNDOING = {
    "directory": ("remove", "from"),
    "node": ("remove", "from"),
    "stale": ("create", "in"),
    "file": ("remove", "from"),
    "mount": ("unmount", "from"),
}
# Words that are numbers, and the maximum number of digits of a number from the kernel.
NUMBERS = frozenset({"pid", "start", "inode", "unified_inode", "devices_inode", "major", "minor", "mode", "uid", "gid"})
DIGITS = 20


class Entry(Frozen):
    """One line of an undo log. kind: a key of KINDS; words: as many as KINDS lists for it."""

    tag = "entry"

    kind: str
    words: tuple[str, ...]

    def number(self, index: int) -> int:
        """Return a word as a number."""
        return int(self.words[index])


class UndoLog:
    """An undo log open for appending.

    fd: its descriptor, whose lock shows that the hook is at work; kept: bytes written by an earlier run of the hook,
    which succeeded and must not be undone by this one; torn: its last line is incomplete; size: in bytes.
    """

    tag = "undo-log"

    def __init__(self, fd: int, path: str, kept: int = 0, torn: bool = False, size: int = 0) -> None:
        self.fd = fd
        self.path = path
        self.kept = kept
        self.torn = torn
        self.size = size

    def add(self, kind: str, *words: object) -> None:
        """Append one entry, in a single write. Raises OSError, StepError: no step may follow an incomplete entry."""
        self.write(format_entry(kind, *words))

    def write(self, line: bytes) -> None:
        """Append one line. Raises OSError; StepError if the log would become too long to be read."""
        line = b"\n" * self.torn + line
        if self.size + len(line) > UNDO_LOG_LIMIT:
            problem = f"the container's undo log would exceed {UNDO_LOG_LIMIT} bytes"
            hint = "request fewer devices in its annotations and linux.devices"
            raise StepError("claim-too-large", self.path, problem, hint)
        written = os.write(self.fd, line)
        self.size += written
        self.torn = written != len(line)
        if self.torn:
            # The kernel writes a part if there is space for no more.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)

    @tagged("forget-run")
    def forget_run(self) -> None:
        """Cut off the entries of this run, which is undone; those of an earlier run stay. Raises OSError."""
        os.ftruncate(self.fd, self.kept)

    def close(self) -> None:
        """Close the file, which releases its lock."""
        os.close(self.fd)


def describe_undo(entry: Entry) -> tuple[str, str, str]:
    """Return the action that undoes an entry, as text: action, object, place or details."""
    if entry.kind == "device":
        address, driver, override = entry.words[:3]
        return "restore", address, f"driver {driver or 'none'}, driver_override {override or 'unset'}"
    if entry.kind == "permit":
        return "revoke", f"device numbers {entry.words[0]}", "in the container's cgroup"
    action, where = UNDOING[entry.kind]
    return action, f"/dev/{entry.words[1]}", f"{where} the container at {entry.words[0]}"


def format_entry(kind: str, *words: object) -> bytes:
    """Return an entry's line."""
    if len(words) != len(KINDS[kind]):
        raise ValueError(f"{kind} takes {', '.join(KINDS[kind]) or 'nothing'}")
    return ("\t".join([kind, *(quote(str(word)) for word in words)]) + "\n").encode("utf-8", "surrogateescape")


def parse_undo_log(data: bytes) -> list[Entry]:
    """Return an undo log's entries, except torn or damaged lines and kinds of a later version."""
    entries = []
    # The text after the last newline is torn, or empty.
    for line in data.decode("utf-8", "surrogateescape").split("\n")[:-1]:
        kind, *words = line.split("\t")
        if kind in KINDS and len(words) == len(KINDS[kind]):
            try:
                entry = Entry(kind, tuple(unquote(word) for word in words))
            except ValueError:
                continue
            if has_numbers(entry):
                entries.append(entry)
    return entries


def has_numbers(entry: Entry) -> bool:
    """Return whether the words of an entry that must be numbers are numbers."""
    numbers = [word for name, word in zip(KINDS[entry.kind], entry.words) if name in NUMBERS]
    return all(word.isascii() and word.isdigit() and len(word) <= DIGITS for word in numbers)


def quote(text: str) -> str:
    """Return the text with the characters escaped that have a meaning in an undo log or a file name.

    The result is ASCII, so that a name has as many bytes as characters, independent of the locale.
    """
    if text.isascii() and text.isprintable() and not ("%" in text or "/" in text):
        return text
    return "".join(
        c if c.isascii() and c.isprintable() and c not in "%/" else "".join(f"%{b:02x}" for b in encode(c))
        for c in text
    )


def unquote(text: str) -> str:
    """Return the text passed to quote(). Raises ValueError on anything else."""
    first, *rest = text.split("%")
    data = encode(first) + b"".join(bytes([int(part[:2], 16)]) + encode(part[2:]) for part in rest)
    return data.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Return the bytes of a file name or of text from another program."""
    return text.encode("utf-8", "surrogateescape")


def parse_instance(entry: Entry) -> Instance:
    """Return the device that an entry records."""
    return Instance(entry.number(3), *entry.words[4:7])
