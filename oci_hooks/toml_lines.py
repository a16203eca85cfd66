# SPDX-License-Identifier: Apache-2.0
"""On which line of a TOML text a key gets its value. tomllib does not say, and a user wants to go there.

tomllib itself is the judge: a key stands on the first line whose reading makes it appear. So tables, dotted and quoted
keys, comments and strings of many lines need no second parser here.
"""

from __future__ import annotations

from oci_hooks.plain_toml import read_toml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# An array or a string over more lines than this is not what anybody looks for.
MAX_VALUE_LINES = 200


def find_line(text: str, keys: tuple[str, ...]) -> int:
    """Return the number of the line (from 1) on which a key is set; 0 where it is not, or can't be found.

    text: the whole TOML text, known to be right; keys: tables and key, e.g. ("hypervisor", "qemu", "enable_iommu").
    """
    lines = text.replace("\r\n", "\n").split("\n")
    for index, line in enumerate(lines):
        if keys[-1] in line.partition("#")[0] and sets_key(lines, index, keys):
            return index + 1
    return 0


def sets_key(lines: list[str], index: int, keys: tuple[str, ...]) -> bool:
    """Tell whether a line begins the value of a key: without it the key is not there, with it it is."""
    before = parse_lines(lines[:index])
    # Within a string or an array that began further up.
    if before is None or has_key(before, keys):
        return False
    for end in range(index + 1, min(index + 1 + MAX_VALUE_LINES, len(lines)) + 1):
        after = parse_lines(lines[:end])
        if after is not None:
            return has_key(after, keys)
    return False


def parse_lines(lines: list[str]) -> dict[str, Any] | None:
    """Return the value of some lines of TOML; None where they are not whole."""
    try:
        return read_toml("\n".join(lines))
    except ValueError:
        return None


def has_key(values: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """Tell whether a key is there, below its tables."""
    value: Any = values
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True
