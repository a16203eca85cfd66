# SPDX-License-Identifier: Apache-2.0
"""Read the settings of the machine: /etc/oci-vfio-hooks/host.toml and guest.toml.

Read only if the file exists and only after VFIO was requested. An existing file must be valid: a silently ignored
misspelt key would be a setting without effect. Only the interpreter's own library is used to read and check it;
schemas/*-settings.json define the same rules for other programs, and a test compares both.
"""

from __future__ import annotations

import os
import stat

from oci_hooks.findings import Finding, InputError
from oci_hooks.frozen import Frozen
from oci_hooks.plain_toml import read_toml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from oci_hooks.system import Root

    T = TypeVar("T")

# A file with every key and a comment for each has a few thousand bytes.
MAX_BYTES = 64 << 10
# Maximum of reported errors in one file: about a screen.
MAX_FINDINGS = 10
# The uid of a file whose owner is not mapped in a user namespace (proc_sys_kernel(5), overflowuid).
OVERFLOW_UID = 65534
ALL_USERS = ["0", "0", "4294967295"]


def read_settings(root: Root, path: str, make: Callable[[Table], T], *, required: bool = False) -> T:
    """Return the settings in a TOML file; those of an empty file if it does not exist.

    path: absolute, below the root; make: reads each value from the table by its type; required: a missing file is an
    error, for one named on the command line.
    Raises InputError [bad-settings] with every error, or [settings-unreadable].
    """
    text = read_text(root, path, required)
    table = Table(parse_toml(text, path))
    settings = make(table)
    mistakes = table.list_mistakes()
    if mistakes:
        findings = (make_finding(path, text, mistake) for mistake in mistakes[:MAX_FINDINGS])
        raise InputError.from_findings(tuple(findings))
    return settings


# The file ------------------------------------------------------------------------------------------------------------


def read_text(root: Root, path: str, required: bool) -> str:
    """Return the text of a settings file; "" if it does not exist. Raises InputError."""
    try:
        check_file(root, path)
        data = root.read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        if not required:
            return ""
        raise InputError(
            "settings-unreadable", path, "No such file or directory", "create it, or run without --settings"
        ) from None
    except OSError as error:
        hint = f"make it readable for root: ls -lL {path}; or remove it"
        raise InputError("settings-unreadable", path, error.strerror or str(error), hint) from None
    if data.startswith(b"\xef\xbb\xbf"):
        raise InputError(
            "bad-settings", path, "begins with a byte order mark", "save it as UTF-8 without a byte order mark"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("bad-settings", path, f"byte {error.start} is not UTF-8", "save the file as UTF-8") from None


def check_file(root: Root, path: str) -> None:
    """Raise InputError unless a path is a file that only root, or the user that runs the hook, can write.

    A hook that runs as root takes devices in use if `force` names them: no other user may be able to set that.
    Root reads any file, whatever its mode, so a file that others cannot read is fine. Raises OSError.
    """
    found = root.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a FIFO, a socket or a device"
        raise InputError(
            "settings-unreadable", path, f"is {kind}, not a file", "replace it by a regular file, or remove it"
        )
    if found.st_size > MAX_BYTES:
        problem = f"has {found.st_size} bytes, above the limit of {MAX_BYTES} for a settings file"
        raise InputError("settings-unreadable", path, problem, "check that it is the right file, or shorten it")
    if found.st_uid and found.st_uid != root.do(os.geteuid) and not is_unmapped(root, found.st_uid):
        problem = f"belongs to user {found.st_uid}, who could change what the hook does as root"
        raise InputError("bad-settings", path, problem, f"chown root:root {path}")
    # root's group counts as root.
    if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid):
        problem = (
            f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o}), who could change what the "
            "hook does as root"
        )
        raise InputError("bad-settings", path, problem, f"chmod go-w {path}")


def is_unmapped(root: Root, uid: int) -> bool:
    """Return whether an owner is unmapped in this user namespace: a rootless hook has its user's rights."""
    return uid == OVERFLOW_UID and root.read_text_or("/proc/self/uid_map", "").split() not in ([], ALL_USERS)


# TOML ----------------------------------------------------------------------------------------------------------------


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Return the value of a TOML text. name: its name in errors. Raises InputError [bad-settings] with the line."""
    try:
        return read_toml(text)
    except (ValueError, RecursionError) as error:
        raise InputError("bad-settings", name, f"is not TOML: {error}", "correct the line or remove the file") from None
    except ImportError:
        problem = "needs a full TOML parser, which is not installed"
        hint = (
            "apt install python3-tomli (pip: tomli), use Python 3.11, or write each value on one line without escapes"
        )
        raise InputError("settings-unreadable", name, problem, hint) from None


# Values --------------------------------------------------------------------------------------------------------------


class Mistake(Frozen):
    """A wrong value. keys: tables and key, as in ("auto", "ids"); item: its index in a list, -1: none."""

    keys: tuple[str, ...]
    item: int
    problem: str


class Table:
    """A table of a settings file. Its values are read key by key; a wrong one is noted and replaced by its default.

    keys: of the enclosing tables and its own, () for the file itself; rule: text on the allowed keys, "" to list them.
    """

    def __init__(self, values: dict[str, Any], keys: tuple[str, ...] = (), rule: str = "") -> None:
        self.values = values
        self.keys = keys
        self.rule = rule
        self.mistakes: list[Mistake] = []
        self.known: list[str] = []
        self.tables: list[Table] = []

    def find(self, key: str) -> Any:
        """Return the value of a key and mark the key as known; None if it is absent: TOML has no null."""
        self.known.append(key)
        return self.values.get(key)

    def refuse(self, key: str, expected: str, value: object, item: int = -1) -> None:
        """Note that a value is not as expected."""
        from oci_hooks.schema import describe_value

        problem = f"expected {expected}, found {describe_value(value)}"
        self.mistakes.append(Mistake((*self.keys, key), item, problem))

    def number(self, key: str, default: float, is_right: Callable[[float], bool], expected: str) -> float:
        """Return a number, whole or not."""
        value = self.find(key)
        if type(value) in (int, float) and is_right(value):
            return float(value)
        return self.default(key, default, expected, value)

    def whole(self, key: str, default: int, maximum: int, expected: str) -> int:
        """Return a whole number from 0 to `maximum`; 384.0 is one, as it is to JSON schemas."""
        value = self.find(key)
        if (type(value) is int or (type(value) is float and value.is_integer())) and 0 <= value <= maximum:
            return int(value)
        return self.default(key, default, expected, value)

    def switch(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.find(key)
        return value if type(value) is bool else self.default(key, default, "true or false", value)

    def word(self, key: str, default: str, *words: str) -> str:
        """Return one of these words; the first is the default."""
        value = self.find(key)
        expected = f"one of {', '.join(words)}"
        return value if type(value) is str and value in words else self.default(key, default, expected, value)

    def text(self, key: str, default: str, is_right: Callable[[str], bool], expected: str) -> str:
        """Return a string."""
        value = self.find(key)
        return value if type(value) is str and is_right(value) else self.default(key, default, expected, value)

    def texts(
        self, key: str, default: tuple[str, ...], is_right: Callable[[str], bool], expected: str
    ) -> tuple[str, ...]:
        """Return a list of strings."""
        value = self.find(key)
        if type(value) is not list:
            return self.default(key, default, f"a list, each item {expected}", value)
        for number, item in enumerate(value):
            if type(item) is not str or not is_right(item):
                self.refuse(key, expected, item, number)
        return tuple(value)

    def default(self, key: str, default: T, expected: str, value: object) -> T:
        """Return the default of a key, and note a mistake unless it is absent."""
        if value is not None:
            self.refuse(key, expected, value)
        return default

    def table(self, key: str, rule: str = "") -> Table:
        """Return a table in this one, an empty one if absent. rule: see the class."""
        value = self.find(key)
        if value is not None and type(value) is not dict:
            self.refuse(key, f"a table, [{key}]", value)
        table = Table(value if type(value) is dict else {}, (*self.keys, key), rule)
        self.tables.append(table)
        return table

    def list_mistakes(self) -> list[Mistake]:
        """Return the errors in this table and those in it: unknown keys, and wrong values."""
        rule = self.rule or f"known keys: {', '.join(sorted(self.known))}"
        unknown = [
            Mistake((*self.keys, key), -1, f"unknown key; {rule}") for key in self.values if key not in self.known
        ]
        return unknown + self.mistakes + [mistake for table in self.tables for mistake in table.list_mistakes()]


def make_finding(path: str, text: str, mistake: Mistake) -> Finding:
    """Return the finding for an error in a file with this text."""
    from oci_hooks.toml_lines import find_line

    try:
        line = find_line(text, mistake.keys)
    except ImportError:
        line = 0
    where = f"{path} line {line}" if line else path
    item = f"[{mistake.item}]" if mistake.item >= 0 else ""
    key = f"{'.'.join(map(format_key, mistake.keys))}{item}"
    return Finding("error", "bad-settings", f"{where}: {key}", mistake.problem, "correct or remove it")


def format_key(key: str) -> str:
    """Return a key as TOML writes it."""
    import json

    return key if key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key) else json.dumps(key)
