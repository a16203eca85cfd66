# SPDX-License-Identifier: Apache-2.0
"""Encode recorded values as plain JSON and decode them: answers, results of steps, errors.

A value of a JSON type is itself. Any other is an object with the key "!": its kind, which is a name of its own (`tag`),
not the class's. Decoding creates only the kinds that the reader passes in, because a recording may come from
an untrusted source.
"""

from __future__ import annotations

import os

from oci_hooks.findings import Finding, HookError, InputError, Refusal, StepError
from oci_hooks.frozen import Frozen
from oci_hooks.record.bounds import MAX_NUMBER
from oci_hooks.system import Descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Kinds = Mapping[str, Callable[..., object]]

KIND = "!"
# The names of the hooks' exceptions in recordings.
ERRORS = {"error": HookError, "bad-input": InputError, "refusal": Refusal, "failed-step": StepError}
UNDO_LOG = "undo-log"
# Of these a recording has only the redacted document, as of what was made from them.
DOCUMENTS = ("state", "spec", "credentials")
STAT_FIELDS = ("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size", "st_rdev")


class NotationError(Exception):
    """The value was not written by this module."""


class Opaque:
    """Placeholder for a value that is not kept."""


# Writing --------------------------------------------------------------------------------------------------------------


def encode(value: object) -> Any:
    """Return a value as JSON; a value that cannot be kept is only named."""
    if type(value) is int and abs(value) > MAX_NUMBER:
        return {KIND: "opaque", "type": "a whole number of more than 64 bits"}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [encode(item) for item in value]  # type: ignore[attr-defined]
    return encode_object(value)


def encode_object(value: Any) -> dict[str, Any]:
    """Return the object for a value that has no JSON type."""
    if isinstance(value, bytes):
        return {KIND: "bytes", "text": value.decode("utf-8", "surrogateescape")}
    if isinstance(value, Frozen):
        return {KIND: value.tag, **{key: encode(item) for key, item in value.as_dict().items()}}
    if isinstance(value, os.stat_result):
        return {KIND: "stat", **{name: getattr(value, name) for name in STAT_FIELDS}}
    if isinstance(value, Descriptor):
        return {KIND: "descriptor"}
    if getattr(value, "tag", "") == UNDO_LOG:
        return {KIND: UNDO_LOG, "path": value.path, "kept": value.kept}
    return {KIND: "opaque", "type": type(value).__name__}


def encode_arguments(values: tuple[object, ...]) -> list[Any]:
    """Return a step's arguments: numbers, names and records; neither the hook's internal objects nor documents."""
    kept = []
    for value in values:
        if type(value) in (int, str):
            kept.append(encode(value))
        elif isinstance(value, (list, tuple)) and value:
            kept.append(encode_arguments(tuple(value)))
        elif isinstance(value, Frozen) and value.tag not in DOCUMENTS:
            kept.append(encode(value))
    return kept


def encode_error(error: BaseException) -> dict[str, Any]:
    """Return an exception as JSON."""
    if isinstance(error, HookError):
        name = next((name for name, kind in ERRORS.items() if type(error) is kind), "refusal")
        return {KIND: name, "findings": [finding.as_dict() for finding in error.findings]}
    if isinstance(error, OSError):
        return {KIND: "OSError", "errno": error.errno, "text": error.strerror, "path": name_path(error.filename)}
    return {KIND: "Exception", "type": type(error).__name__, "text": str(error)}


def name_path(path: object) -> str | None:
    """Return the path in an OSError, None if it has none."""
    return os.fsdecode(path) if isinstance(path, (str, bytes)) else None


# Reading --------------------------------------------------------------------------------------------------------------


def decode(value: Any, kinds: Kinds) -> Any:
    """Return the value passed to encode(). kinds: the constructor for each kind of record. Raises NotationError."""
    if isinstance(value, list):
        return [decode(item, kinds) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    fields = {key: item for key, item in value.items() if key != KIND}
    try:
        if kind is None:
            return {key: decode(item, kinds) for key, item in fields.items()}
        if kind in PLAIN_KINDS:
            return PLAIN_KINDS[kind](value)
        return kinds[kind](**{key: freeze(decode(item, kinds)) for key, item in fields.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NotationError(f"{kind}: {error}") from None


def freeze(value: Any) -> Any:
    """Return a value with tuples instead of lists."""
    return tuple(freeze(item) for item in value) if isinstance(value, list) else value


def make_stat(value: dict[str, Any]) -> os.stat_result:
    """Return a stat with the fields that the hooks use."""
    first = [int(value[name]) for name in STAT_FIELDS[:7]]
    return os.stat_result((*first, 0, 0, 0), {"st_rdev": int(value["st_rdev"])})


def open_nothing() -> Descriptor:
    """Return a descriptor of /dev/null."""
    return Descriptor(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))


PLAIN_KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bytes": lambda value: value["text"].encode("utf-8", "surrogateescape"),
    "stat": make_stat,
    "descriptor": lambda _: open_nothing(),
    "opaque": lambda _: Opaque(),
}


def decode_error(value: Any) -> Exception:
    """Return the exception passed to encode_error(). Raises NotationError."""
    try:
        kind = value[KIND]
        if kind == "OSError":
            number, text = int(value["errno"] or 0), str(value["text"])
            return OSError(number, text) if value.get("path") is None else OSError(number, text, str(value["path"]))
        if kind in ERRORS:
            return ERRORS[kind].from_findings(tuple(make_finding(item) for item in value["findings"]))
        if kind == "Exception":
            return RuntimeError(f"{value['type']}: {value['text']}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise NotationError(f"an error: {error}") from None
    raise NotationError(f"{kind} is not a kind of error")


def make_finding(value: Any) -> Finding:
    """Return a finding in a recording. Raises NotationError."""
    fields = Finding.field_names()
    if not isinstance(value, dict) or set(value) != set(fields) or not all(isinstance(v, str) for v in value.values()):
        raise NotationError("is not a finding")
    return Finding(**value)
