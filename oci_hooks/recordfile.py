# SPDX-License-Identifier: Apache-2.0
"""Read a record that may come from anybody.

Nothing is unpacked to disk. A file is read only within bounds, its members only by the names that records have, as
plain files; what is in them is checked against schemas/record.json before anything looks at it.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib

from oci_hooks.notation import NotationError, make_finding
from oci_hooks.record import VERSION
from oci_hooks.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.errors import Finding

MOST_PACKED = 8 << 20
MOST_UNPACKED = 64 << 20
MEMBERS = ("record.json", "events.jsonl", "state.json", "config.json")


class RecordError(Exception):
    """This is no record that can be read; says why."""


class RunRecord(Record):
    """A run as it was recorded.

    about: record.json; events: in their order; documents: state.json and config.json, where they were read; findings:
    what the run said.
    """

    path: str
    about: dict[str, Any]
    events: tuple[dict[str, Any], ...]
    documents: dict[str, bytes]
    findings: tuple[Finding, ...]


def read_record(path: str | os.PathLike[str]) -> RunRecord:
    """Return the record in a file. Raises RecordError, OSError."""
    path = os.fspath(path)
    with open(path, "rb") as file:
        packed = file.read(MOST_PACKED + 1)
    members = read_members(unpack(packed))
    about = parse(members, "record.json")
    check_version(about)
    lines = members.get("events.jsonl", b"").splitlines()
    events = [load(line, f"events.jsonl, line {number}") for number, line in enumerate(lines, 1)]
    check_schema({"about": about, "events": events})
    documents = {name: data for name, data in members.items() if name in ("state.json", "config.json")}
    try:
        findings = tuple(make_finding(finding) for finding in about["findings"])
    except NotationError as error:
        raise RecordError(f"record.json: a finding {error}") from None
    return RunRecord(path, about, tuple(events), documents, findings)


def unpack(packed: bytes) -> bytes:
    """Return what a gzip file holds. Raises RecordError for anything else, and for more than a record ever holds."""
    if len(packed) > MOST_PACKED:
        raise RecordError(f"is larger than {MOST_PACKED} bytes, which no record is")
    # 16 + 15: gzip, whose header and checksum zlib then reads.
    decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        data = decompressor.decompress(packed, MOST_UNPACKED)
    except zlib.error as error:
        raise RecordError(f"is damaged, or no record: {error}") from None
    if decompressor.unconsumed_tail:
        raise RecordError(f"unpacks to more than {MOST_UNPACKED} bytes, which no record does")
    if not decompressor.eof:
        raise RecordError("is damaged: it ends too early")
    return data


def read_members(data: bytes) -> dict[str, bytes]:
    """Return the files in a tar by their names. Raises RecordError for what a record does not have."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.name not in MEMBERS or member.name in members:
                    raise RecordError(f"holds {member.name!r}, which no record does")
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    raise RecordError(f"holds {member.name!r} as something else than a plain file")
                file = tar.extractfile(member)
                content = file.read() if file else b""
                if len(content) != member.size:
                    raise RecordError(f"is damaged: {member.name} ends too early")
                members[member.name] = content
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise RecordError(f"is damaged, or no record: {error}") from None
    return members


def parse(members: dict[str, bytes], name: str) -> Any:
    """Return the JSON value of a member. Raises RecordError."""
    if name not in members:
        raise RecordError(f"lacks {name}")
    return load(members[name], name)


def load(data: bytes, name: str) -> Any:
    """Return the value of a JSON text. Raises RecordError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{name} is damaged: {error}") from None


def check_version(about: Any) -> None:
    """Raise RecordError where the record is of a version that this program does not know."""
    version = about.get("version") if isinstance(about, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RecordError("record.json has no version")
    if version > VERSION:
        written = str(about.get("hook", "a later version"))[:40]
        raise RecordError(
            f"is of version {version}, and this program knows records up to version {VERSION}: "
            f"use the vfio-hook-replay of oci-vfio-hooks {written} or later"
        )


def check_schema(document: dict[str, Any]) -> None:
    """Raise RecordError unless a record's JSON is as schemas/record.json says."""
    try:
        import jsonschema
    except ImportError:
        raise RecordError("can't be checked, and is not trusted without: apt install python3-jsonschema") from None

    from oci_hooks.schema import describe, format_path, load_schema

    error = next(jsonschema.Draft7Validator(load_schema("record")).iter_errors(document), None)
    if error is not None:
        raise RecordError(f"{format_path(error.absolute_path)}: {describe(error)}")
