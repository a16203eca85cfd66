# SPDX-License-Identifier: Apache-2.0
"""The undo log: how to restore each thing, written before that thing is changed.

One file a container, one line an entry, words parted by tabs and percent-escaped: it can be read with cat, costs no
import, and a line torn by a kill is a step that was never begun. `done` ends the journal of a hook that succeeded.
"""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import StepError
from oci_hooks.frozen import Frozen
from oci_hooks.linux.instances import Instance
from oci_hooks.system import tagged

FORMAT = "oci-vfio-hooks 2"
# Bytes that a journal may have: written and read alike. It has a line a device and a node; this is a thousand devices.
UNDO_LOG_LIMIT = 1 << 20

# Kinds of entry with the words that follow.
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
# Kinds that say whose a journal is, and nothing that was changed.
HEADS = frozenset({"container", "bundle", "init", "cgroup", "group", "numbers", "revoked", "done"})
# What every journal begins with, in this order, before anybody but its hook sees it.
OWNER = ("container", "bundle", "init", "cgroup")
# Kinds of changes in the container's /dev, with what undoes one.
UNDOING = {
    "directory": ("remove", "from"),
    "node": ("remove", "from"),
    "stale": ("create", "in"),
    "file": ("remove", "from"),
    "mount": ("unmount", "from"),
}
# Words that are numbers, and the digits that one of the kernel's has at most.
NUMBERS = frozenset({"pid", "start", "inode", "unified_inode", "devices_inode", "major", "minor", "mode", "uid", "gid"})
DIGITS = 20


class Entry(Frozen):
    """One line of a journal. kind: a key of KINDS; words: as many as it says there."""

    tag = "entry"

    kind: str
    words: tuple[str, ...]

    def number(self, index: int) -> int:
        """Return a word that is a number."""
        return int(self.words[index])


class UndoLog:
    """A journal open for appending.

    fd: its descriptor, whose lock says that the hook is still at work; kept: how many bytes of it an earlier run of the
    hook has written, which succeeded and is not this run's to put back; torn: its last line has no end; size: bytes
    that it has.
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
        """Append one line. Raises OSError; StepError where nobody would read it."""
        line = b"\n" * self.torn + line
        if self.size + len(line) > UNDO_LOG_LIMIT:
            problem = f"the container's undo log would exceed {UNDO_LOG_LIMIT} bytes"
            hint = "request fewer devices in its annotations and linux.devices"
            raise StepError("claim-too-large", self.path, problem, hint)
        written = os.write(self.fd, line)
        self.size += written
        self.torn = written != len(line)
        if self.torn:
            # What the kernel does where there is room for a part of it.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)

    @tagged("forget-run")
    def forget_run(self) -> None:
        """Cut off what this run noted, which is undone; what an earlier run gave stays. Raises OSError."""
        os.ftruncate(self.fd, self.kept)

    def close(self) -> None:
        """Close the file, which lets go of its lock."""
        os.close(self.fd)


def describe_undo(entry: Entry) -> tuple[str, str, str]:
    """Return what undoes an entry in words: what is done, to what, and where or how."""
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
    """Return a journal's entries, without a line that is torn or spoilt and without kinds of a later version."""
    entries = []
    # What stands behind the last newline is torn, or empty.
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
    """Return whether those words of an entry are numbers that have to be."""
    numbers = [word for name, word in zip(KINDS[entry.kind], entry.words) if name in NUMBERS]
    return all(word.isascii() and word.isdigit() and len(word) <= DIGITS for word in numbers)


def quote(text: str) -> str:
    """Return the text without the characters that a journal or a file name gives a meaning to.

    ASCII only, so that a name is as long as its bytes, and the same whatever the locale.
    """
    if text.isascii() and text.isprintable() and not ("%" in text or "/" in text):
        return text
    return "".join(
        c if c.isascii() and c.isprintable() and c not in "%/" else "".join(f"%{b:02x}" for b in encode(c))
        for c in text
    )


def unquote(text: str) -> str:
    """Return what quote() was given. Raises ValueError on anything else."""
    first, *rest = text.split("%")
    data = encode(first) + b"".join(bytes([int(part[:2], 16)]) + encode(part[2:]) for part in rest)
    return data.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Return the bytes of a file name or of text from outside."""
    return text.encode("utf-8", "surrogateescape")


def parse_instance(entry: Entry) -> Instance:
    """Return which device an entry of a journal notes."""
    return Instance(entry.number(3), *entry.words[4:7])
