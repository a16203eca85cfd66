# SPDX-License-Identifier: Apache-2.0
"""Redact lines and files whose format the kernel or this package defines: /proc, a device, settings."""

from __future__ import annotations

import json
import re

from oci_hooks.record.hidetext import LEFT_OUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from oci_hooks.record.hidetext import Keys

NUMBERS = re.compile(r"[\s\d]*", re.ASCII)
# Placeholder for a redacted path: white space would end the field.
NOWHERE = "/(left-out)"
# Value of a property of a device or machine: a driver, an address.
PROPERTY = re.compile(r"[\w.:/+-]{1,200}", re.ASCII)
DEVICE_PROPERTIES = ("", "driver", "host", "sysfsdev")


# Forms ----------------------------------------------------------------------------------------------------------------


def keep_numbers(text: str) -> str:
    """Return a text of numbers."""
    return text if NUMBERS.fullmatch(text) else LEFT_OUT


def keep_lines(text: str, is_kept: Callable[[str], bool]) -> str:
    """Return the lines of a text that are kept."""
    return "".join(f"{line}\n" for line in text.split("\n") if is_kept(line))


def hide_stat(text: str) -> str:
    """Return /proc/PID/stat without the name that the process set for itself."""
    head, _, rest = text.rpartition(")")
    return f"{keep_numbers(head.partition('(')[0]).strip()} ({LEFT_OUT}) {rest.strip()}"


def hide_swap(line: str) -> str:
    """Return a line of /proc/swaps with devices only; the disk of a swap file is mounted."""
    return line if line.startswith(("/dev/", "Filename")) else line and f"{NOWHERE} file 0 0 0"


def hide_route(line: str) -> str:
    """Return a line of /proc/net/route with the interface only."""
    return f"{line.split(maxsplit=1)[0]} 0" if line.strip() else ""


def hide_route6(line: str) -> str:
    """Return a line of /proc/net/ipv6_route with the kind of destination, flags and interface."""
    fields = line.split()
    if len(fields) != 10:
        return line and LEFT_OUT
    return " ".join([fields[0][:4].ljust(32, "0"), "00", "0" * 32, "00", "0" * 32, "0", "0", "0", *fields[8:]])


def hide_json_device(value: str) -> str:
    """Return a -device option in JSON with its driver and its host address."""
    try:
        document = json.loads(value)
    except (ValueError, RecursionError):
        document = None
    kept = {
        key: str(document[key])
        for key in DEVICE_PROPERTIES
        if isinstance(document, dict) and PROPERTY.fullmatch(str(document.get(key, "")))
    }
    return json.dumps(kept)


# Settings -------------------------------------------------------------------------------------------------------------


def keep_settings(values: dict[str, Any], schema: dict[str, Any]) -> list[tuple[Keys, Keys, Any]]:
    """Return the kept part of the hooks' own settings, as their schema defines: keys, redacted keys, value.

    Of an unknown key only its existence is kept, of a value that the schema does not allow only its type.
    """
    kept: list[tuple[Keys, Keys, Any]] = []
    for index, (key, value) in enumerate(values.items(), 1):
        rule = schema.get("properties", {}).get(key)
        if rule is None and isinstance(schema.get("additionalProperties"), dict):
            rule = schema["additionalProperties"]
        name = key if rule is not None and re.fullmatch("[a-z0-9_-]{1,60}", key) else f"{LEFT_OUT} {index}"
        if isinstance(value, dict) and rule is not None and rule.get("type") == "object":
            inner = keep_settings(value, rule)
            kept += [((key, *keys), (name, *names), item) for keys, names, item in inner]
            kept += [] if inner else [((key,), (name,), {})]
        else:
            kept.append(((key,), (name,), keep_set_value(value, rule or {})))
    return kept


def keep_set_value(value: Any, rule: dict[str, Any]) -> Any:
    """Return a setting's redacted value."""
    if isinstance(value, str):
        pattern = rule.get("pattern", ".*" if rule.get("type") == "string" else "(?!)")
        allowed = value in rule["enum"] if "enum" in rule else bool(re.search(pattern, value))
        return value if allowed else LEFT_OUT
    if isinstance(value, list):
        return [keep_set_value(item, rule.get("items", {})) for item in value]
    return value if isinstance(value, (bool, int, float)) else {}
