# SPDX-License-Identifier: Apache-2.0
"""Read a recording that may come from an untrusted source.

Nothing is unpacked to disk. A file is read only within bounds (bounds.py), its members only under their expected
names, as plain files; their content is checked against schemas/record.json before it is used.
"""

from __future__ import annotations

import json
import os
import stat
import zlib

from oci_hooks.frozen import Frozen
from oci_hooks.record import bounds
from oci_hooks.record.bounds import RecordError, check_bound, check_value
from oci_hooks.record.encoding import NotationError, make_finding
from oci_hooks.record.writer import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.findings import Finding

DOCUMENTS = ("state.json", "config.json")
# Members by name, and the maximum length of each.
MEMBERS = {
    "record.json": "SUMMARY_BYTES",
    "events.jsonl": "EVENT_BYTES",
    "state.json": "DOCUMENT_BYTES",
    "config.json": "DOCUMENT_BYTES",
}
# A tar (POSIX, ustar): blocks of 512 bytes, a header before each file.
BLOCK = 512
NAME, SIZE, CHECKSUM, TYPE, PREFIX = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157), slice(345, 500)
PLAIN_FILES = (b"0", b"\0")
# Decimal digits of a whole number of 64 bits.
MAX_DIGITS = 20


class Recording(Frozen):
    """A recorded run.

    about: record.json; events: in their order; documents: state.json and config.json, if they were read; findings:
    those that the run reported.
    """

    path: str
    about: dict[str, Any]
    events: tuple[dict[str, Any], ...]
    documents: dict[str, bytes]
    findings: tuple[Finding, ...]


def read_record(path: str | os.PathLike[str]) -> Recording:
    """Return the recording in a file. Raises RecordError (RecordTooLarge if it exceeds a bound), OSError."""
    path = os.fspath(path)
    try:
        return make_record(path, read_members(unpack(read_packed(path))))
    except RecordError as error:
        error.path = path
        raise


def make_record(path: str, members: dict[str, bytes]) -> Recording:
    """Return the recording made of these files. Raises RecordError."""
    about = parse(members, "record.json")
    check_version(about)
    check_bound(check_value(about, "record.json"), "SUMMARY_VALUES", "record.json")
    check_schema(about)
    documents = {name: data for name, data in members.items() if name in DOCUMENTS}
    for name, data in documents.items():
        check_bound(bounds.estimate_values(data), "VALUES", name)
    try:
        findings = tuple(make_finding(finding) for finding in about["findings"])
    except NotationError as error:
        raise RecordError(f"record.json: a finding {error}") from None
    return Recording(path, about, tuple(read_events(members.get("events.jsonl", b""))), documents, findings)


def read_packed(path: str) -> bytes:
    """Return the content of a regular file. Raises RecordError, OSError."""
    # Does not wait for a pipe, nor activate a device.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RecordError("is not a regular file, so it is not a recording")
        return file.read(bounds.MAX_PACKED_BYTES + 1)


def unpack(packed: bytes) -> bytes:
    """Return the content of a gzip file. Raises RecordError for other files, and for more than a recording can have."""
    check_bound(len(packed), "PACKED_BYTES")
    # 16 + 15: gzip, whose header and checksum zlib then checks.
    decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        data = decompressor.decompress(packed, bounds.MAX_BYTES + 1)
    except zlib.error as error:
        raise RecordError(f"is damaged, or not a recording: {error}") from None
    check_bound(len(data), "BYTES")
    if not decompressor.eof:
        raise RecordError("is damaged: it ends too early")
    return data


def read_members(data: bytes) -> dict[str, bytes]:
    """Return the files in a tar by their names. Raises RecordError for anything that a recording does not have.

    Hand-written: a recording is four plain files with short names, and all other features of tar (links, sparse files,
    extended headers with names and sizes) are refused before anything reads them.
    """
    members: dict[str, bytes] = {}
    location = 0
    while data[location : location + BLOCK].strip(b"\0"):
        check_bound(len(members) + 1, "MEMBERS")
        name, size = read_header(data[location : location + BLOCK])
        if name in members:
            raise RecordError(f"holds {name!r} twice")
        check_bound(size, MEMBERS[name], name)
        location += BLOCK
        members[name] = data[location : location + size]
        if len(members[name]) != size:
            raise RecordError(f"is damaged: {name} ends too early")
        location += -(-size // BLOCK) * BLOCK
    return members


def read_header(header: bytes) -> tuple[str, int]:
    """Return name and size in a file's header. Raises RecordError."""
    name = header[NAME].rstrip(b"\0").decode("utf-8", "surrogateescape")
    try:
        checksum, size = (int(header[field].strip(b" \0") or b"0", 8) for field in (CHECKSUM, SIZE))
    except ValueError:
        raise RecordError("is damaged, or not a recording: not a tar") from None
    if sum(header[: CHECKSUM.start]) + sum(b" " * 8) + sum(header[CHECKSUM.stop :]) != checksum or len(header) != BLOCK:
        raise RecordError("is damaged, or not a recording: not a tar")
    if name not in MEMBERS or header[PREFIX].strip(b"\0"):
        raise RecordError(f"holds {name!r}, which is not a member of a recording")
    if header[TYPE] not in PLAIN_FILES or size < 0:
        raise RecordError(f"holds {name!r}, which is not a regular file")
    return name, size


def read_events(data: bytes) -> list[dict[str, Any]]:
    """Return the events of a recording. Raises RecordError."""
    check_bound(data.count(b"\n"), "EVENTS", "events.jsonl")
    events: list[dict[str, Any]] = []
    values = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        where = f"events.jsonl, line {number}"
        check_bound(len(line), "LINE_BYTES", where)
        event = load(line, where)
        values += check_value(event, where)
        check_bound(values, "VALUES", where)
        if not is_event(event):
            check_schema(event, f"events[{number - 1}]")
            raise RecordError(f"events[{number - 1}]: is not an event")
        events.append(event)
    return events


def is_event(event: Any) -> bool:
    """Return whether a value is an event, as in schemas/record.json; jsonschema takes a hundred times as long."""
    if not isinstance(event, dict):
        return False
    kinds = ("ask" in event and "path" in event) + ("do" in event and "seconds" in event) + ("note" in event)
    return (
        kinds == 1
        and "at" in event
        and all(type(event[key]) in EVENT_TYPES.get(key, ANY) for key in event)
        and (0 <= event.get("errno", 0) <= bounds.MAX_ERRNO)
    )


ANY = (bool, dict, float, int, list, str, type(None))
EVENT_TYPES: dict[str, tuple[type, ...]] = {
    "at": (int, float),
    "ask": (str,),
    "path": (str,),
    "errno": (int,),
    "do": (str,),
    "with": (list,),
    "seconds": (int, float),
    "inside": (bool,),
    "error": (dict,),
    "note": (str,),
}


def parse(members: dict[str, bytes], name: str) -> Any:
    """Return the JSON value of a member. Raises RecordError."""
    if name not in members:
        raise RecordError(f"lacks {name}")
    return load(members[name], name)


def load(data: bytes, name: str) -> Any:
    """Return the value of a JSON text. Raises RecordError."""
    try:
        return json.loads(data, parse_int=read_int, parse_float=read_float, parse_constant=read_float)
    except RecursionError:
        raise bounds.RecordTooLarge("DEPTH", bounds.MAX_DEPTH, name) from None
    except ValueError as error:
        raise RecordError(f"{name} is damaged: {error}") from None


def read_int(text: str) -> int:
    """Return a whole number. Raises RecordTooLarge."""
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise bounds.RecordTooLarge("NUMBER", bounds.MAX_NUMBER, "a number")
    return int(text)


def read_float(text: str) -> float:
    """Return a number. Raises ValueError for a non-number, such as NaN, and for one outside a float's range."""
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def check_version(about: Any) -> None:
    """Raise RecordError if this program does not know the recording's version."""
    version = about.get("version") if isinstance(about, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RecordError("record.json has no version")
    if version < VERSION:
        raise RecordError(
            f"is of version {version}, which only development versions of oci-vfio-hooks wrote, but this program reads "
            f"version {VERSION}: record the run again"
        )
    if version > VERSION:
        written = str(about.get("hook", "a later version"))[:40]
        raise RecordError(
            f"is of version {version}, and this program reads version {VERSION}: "
            f"use vfio-hook-replay of oci-vfio-hooks {written} or later"
        )


def check_schema(value: Any, location: str = "about") -> None:
    """Raise RecordError unless record.json, or one event, fits schemas/record.json. location: "events[7]"."""
    try:
        import jsonschema
    except ImportError:
        raise RecordError("cannot be validated: install python3-jsonschema (apt install python3-jsonschema)") from None

    from oci_hooks.schema import describe_schema_error, format_path, load_schema

    parts = load_schema("record")["properties"]
    schema = parts["about"] if location == "about" else parts["events"]["items"]
    error = next(jsonschema.Draft7Validator(schema).iter_errors(value), None)
    if error is not None:
        steps = format_path(error.absolute_path) if error.absolute_path else ""
        raise RecordError(f"{location}{'.' if steps else ''}{steps}: {describe_schema_error(error)}")
