# SPDX-License-Identifier: Apache-2.0
"""Write the recording of a run, after all reports, if the run failed or a recording was requested.

A compressed tar with four members at most: record.json (result, versions), events.jsonl (every question with its answer
or errno, every step, every decision, in order), state.json and config.json (as redacted by privacy.py).
Any failure here gives one warning and nothing more.
"""

from __future__ import annotations

import os
import time

from oci_hooks import __version__
from oci_hooks.findings import Finding
from oci_hooks.record import bounds, encoding, hidehost, privacy
from oci_hooks.record.hidetext import LEFT_OUT
from oci_hooks.record.hidewords import READS
from oci_hooks.record.summary import Summary

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from oci_hooks.system import Note

VERSION = 2
DIRECTORY = "/var/lib/oci-vfio-hooks/records"
# For a guest whose image is mounted read-only.
SPARE_DIRECTORY = "/run/oci-vfio-hooks/records"
SUFFIX = ".tar.gz"
KEPT_RECORDINGS = 20
# Of a hook's environment, which is never trusted: variables of interest if the interpreter is set up wrongly.
VARIABLES = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONHOME", "PYTHONPATH")
# Programs that are asked for their version: they start hooks, and print it without side effects.
RUNTIMES = ("runc", "crun", "youki", "kata-agent", "kata-runtime", "containerd-shim-kata-v2")


def save_recording(run: Summary, notes: list[Note]) -> list[Finding]:
    """Write the recording of a run, and return findings about it: its path, or why it was not written."""
    try:
        data = pack(make_members(run, notes))
        path = save(data, make_name(run))
    except Exception as error:  # noqa: BLE001 - a failed recording does not change the result
        if os.geteuid():
            # Run without root privileges: nothing to fix.
            return []
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        hint = 'fix the problem, or disable recording with record = "never"'
        return [Finding("warning", "not-recorded", DIRECTORY, f"cannot write a recording of this run: {reason}", hint)]
    return [
        Finding(
            "info", "recorded", path, "a recording of this run was written", "read it with: vfio-hook-replay explain"
        )
    ]


# Content --------------------------------------------------------------------------------------------------------------


def make_members(run: Summary, notes: list[Note]) -> dict[str, bytes]:
    """Return the files of the recording by their names."""
    import json

    # Lone surrogates represent bytes that are not UTF-8; JSON's escapes keep them.
    members: dict[str, bytes] = {}
    events = list_events(notes, members, run.full)
    findings = run.findings
    if not run.full:
        events = hidehost.make_redactor(run, members).hide_events(events)
        findings = [privacy.hide_finding(finding) for finding in findings]
    about = {
        "version": VERSION,
        "program": run.program,
        "hook": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(run.seconds, 3),
        "exit": run.code,
        "container": run.container,
        "arguments": describe_arguments(run.arguments),
        "environment": sorted(os.environ) if run.full else name_variables(),
        "versions": find_versions(),
        "findings": [finding.as_dict() for finding in findings],
        "traceback": format_traceback(run.error, run.full),
        "full": run.full,
    }
    return {
        "record.json": json.dumps(about, indent=1).encode(),
        "events.jsonl": write_events(events),
        **members,
    }


def write_events(events: Iterable[dict[str, Any]]) -> bytes:
    """Return events as lines of JSON, as many as a reader accepts (bounds.py)."""
    import json

    lines: list[bytes] = []
    size = values = 0
    for event in events:
        line = f"{json.dumps(event)}\n".encode()
        size += len(line)
        values += bounds.check_value(event, "an event")
        if len(lines) == bounds.MAX_EVENTS or size > bounds.MAX_EVENT_BYTES or values > bounds.MAX_VALUES:
            break
        lines.append(line)
    return b"".join(lines)


def list_events(notes: list[Note], members: dict[str, bytes], full: bool) -> list[dict[str, Any]]:
    """Return all notes of a run, as JSON; an answer that is unchanged is not repeated.

    members: gets state.json and config.json; full: nothing in these is redacted.
    """
    events = []
    before: dict[tuple[str, object], object] = {}
    outer = ""
    for note in notes:
        outer = note.name if note.kind == "do" and not note.inside else outer
        if note.inside and outer == "read-kata" and not full and note.name not in READS:
            # Files named in Kata's configuration: the step has the answer.
            continue
        event: dict[str, Any] = {"at": round(note.begun, 4), note.kind: note.name}
        if note.kind == "ask":
            event["path"] = note.arguments[0]
        elif note.kind == "do":
            event.update({"with": encoding.encode_arguments(note.arguments), "seconds": round(note.seconds, 4)})
            event.update({"inside": True} if note.inside else {})
        event.update(encode_answer(note, members, full))
        if note.kind == "ask":
            key, output = (note.name, note.arguments[0]), (event.get("answer"), event.get("errno"))
            if before.get(key) == output:
                continue
            before[key] = output
        events.append(event)
    return events


def encode_answer(note: Note, members: dict[str, bytes], full: bool) -> dict[str, Any]:
    """Return the result of a question or a step: `answer`, `errno` or `error`."""
    answer = note.answer
    if isinstance(answer, OSError) and note.kind == "ask":
        return {"errno": answer.errno or 0}
    if isinstance(answer, Exception):
        return {"error": encoding.encode_error(answer)}
    document = name_document(note)
    if document and isinstance(answer, bytes):
        data = answer if full else privacy.hide_document(answer, document)
        fits = len(data) <= bounds.MAX_DOCUMENT_BYTES and bounds.estimate_values(data) <= bounds.MAX_VALUES
        if fits and members.setdefault(document, data) == data:
            return {"answer": {encoding.KIND: "member", "name": document}}
    if isinstance(answer, bytes) and len(answer) > bounds.MAX_ANSWER_BYTES:
        return {"answer": {encoding.KIND: "opaque", "type": f"{len(answer)} bytes"}}
    return {"answer": encoding.encode(answer)}


def name_document(note: Note) -> str:
    """Return the member that has a note's answer; "" for all but state and config.json."""
    if note.kind == "do":
        return "state.json" if note.name == "read-state" else ""
    is_config = note.kind == "ask" and str(note.arguments[0]).endswith("/config.json")
    return "config.json" if is_config and note.name == "read" else ""


def describe_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the command line's values, its paths absolute."""
    values = dict(arguments)
    for name in ("bundle", "settings"):
        values[name] = os.path.abspath(values[name]) if values[name] else ""
    return {**values, "groups": list(values["groups"])}


def format_traceback(error: BaseException | None, full: bool) -> str:
    """Return the traceback of a defect, its cause first; "" without one. full: with the quotations in its text."""
    if error is None:
        return ""
    import traceback

    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    frames = "".join(traceback.format_tb(error.__traceback__))
    words = f"{type(error).__name__}: {error if full else privacy.hide_quoted(str(error))}"
    return f"{format_traceback(cause, full)}Traceback (most recent call last):\n{frames}{words}\n"


def name_variables() -> list[str]:
    """Return the names of the hook's relevant environment variables, and a placeholder for others."""
    kept = sorted(name for name in os.environ if name in VARIABLES)
    return kept + [LEFT_OUT] * (len(kept) < len(os.environ))


# Versions -------------------------------------------------------------------------------------------------------------


def find_versions() -> dict[str, str]:
    """Return the versions of the software that took part in the run."""
    import sys

    system = os.uname()
    versions = {
        "kernel": f"{system.sysname} {system.release} {system.version}",
        "machine": system.machine,
        "python": sys.version.split()[0],
        "runtime": find_runtime(),
    }
    for name in ("jsonschema", "pyudev", "tenacity"):
        if name in sys.modules:
            from importlib import metadata

            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "unknown"
    return versions


def find_runtime() -> str:
    """Return the name of the program that started the hook, with its version if it is a known runtime."""
    parent = f"/proc/{os.getppid()}"
    try:
        with open(f"{parent}/cmdline", "rb") as file:
            name = os.fsdecode(file.read().split(b"\0")[0]).rpartition("/")[2]
        executable = os.readlink(f"{parent}/exe")
    except OSError:
        return ""
    # runc runs as a copy of itself in memory, which is still /proc/PID/exe.
    if name not in RUNTIMES or not (executable.rpartition("/")[2] == name or executable.startswith("/memfd:")):
        # A process can set its own name to anything; a crun that runs as a copy of itself has no other name.
        return name if name in RUNTIMES else executable.rpartition("/")[2]
    import subprocess

    try:
        done = subprocess.run(  # noqa: S603 - the program that runs us
            [f"{parent}/exe", "--version"],
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=1,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return name
    return done.stdout.decode("utf-8", "replace").partition("\n")[0].strip()[:200] or name


# Writing --------------------------------------------------------------------------------------------------------------


def make_name(run: Summary) -> str:
    """Return the recording's file name, which sorts by time and contains program and container."""
    now = time.time()
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in run.container or "unknown")[:40]
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
    return f"{stamp}.{int(now % 1 * 1e6):06d}-{run.program}-{plain}{SUFFIX}"


def pack(members: dict[str, bytes]) -> bytes:
    """Return a compressed tar of files."""
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o600
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def save(data: bytes, name: str) -> str:
    """Write a recording into the first usable directory, and return its path. Raises OSError."""
    try:
        return save_in(DIRECTORY, data, name)
    except OSError as first:
        try:
            return save_in(SPARE_DIRECTORY, data, name)
        except OSError:
            raise first from None


def save_in(directory: str, data: bytes, name: str) -> str:
    """Write a recording into a directory, and remove all but the newest. Raises OSError."""
    prepare(directory)
    draft, path = f"{directory}/.{os.getpid()}", f"{directory}/{name}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            if os.write(fd, data) != len(data):
                raise OSError(28, os.strerror(28), draft)
        finally:
            os.close(fd)
        os.rename(draft, path)
    except OSError:
        os.unlink(draft)
        raise
    records = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))
    for old in records[:-KEPT_RECORDINGS]:
        # Another hook may do the same at the same time.
        try:
            os.unlink(f"{directory}/{old}")
        except FileNotFoundError:
            continue
    return path


def prepare(directory: str) -> None:
    """Create the directory, accessible only to its owner. Raises OSError if it belongs to another user."""
    os.makedirs(os.path.dirname(directory), 0o755, exist_ok=True)
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                raise PermissionError(1, "is another user's", directory) from None
            os.fchmod(fd, 0o700)
        finally:
            os.close(fd)
