# SPDX-License-Identifier: Apache-2.0
"""Find the line of a TOML text that sets a key. tomllib does not report it, but users need it.

tomllib itself decides: a key is on the first line with which it appears in the parsed text. So tables, dotted and
quoted keys, comments and multi-line strings need no second parser here.
"""

from __future__ import annotations

from oci_hooks.plain_toml import read_toml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Arrays and strings of more lines than this are not searched.
MAX_VALUE_LINES = 200


def find_line(text: str, keys: tuple[str, ...]) -> int:
    """Return the number of the line (from 1) on which a key is set; 0 if it is not set or cannot be found.

    text: the whole TOML text, known to be valid; keys: tables and key, e.g. ("hypervisor", "qemu", "enable_iommu").
    """
    lines = text.replace("\r\n", "\n").split("\n")
    for index, line in enumerate(lines):
        if keys[-1] in line.partition("#")[0] and sets_key(lines, index, keys):
            return index + 1
    return 0


def sets_key(lines: list[str], index: int, keys: tuple[str, ...]) -> bool:
    """Return whether a line starts the value of a key: without the line the key is absent, with it the key is set."""
    before = parse_lines(lines[:index])
    # Inside a string or an array that began earlier.
    if before is None or has_key(before, keys):
        return False
    for end in range(index + 1, min(index + 1 + MAX_VALUE_LINES, len(lines)) + 1):
        after = parse_lines(lines[:end])
        if after is not None:
            return has_key(after, keys)
    return False


def parse_lines(lines: list[str]) -> dict[str, Any] | None:
    """Return the value of some lines of TOML; None if they are incomplete."""
    try:
        return read_toml("\n".join(lines))
    except ValueError:
        return None


def has_key(values: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """Return whether a key exists, below its tables."""
    value: Any = values
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True
