# SPDX-License-Identifier: Apache-2.0
"""Format a recording as text: the steps of the run, its decisions, its reads."""

from __future__ import annotations

import os

from oci_hooks.findings import make_one_line
from oci_hooks.record.bounds import MAX_ERRNO
from oci_hooks.record.encoding import KIND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from oci_hooks.record.reader import Recording
    from oci_hooks.system import Note


def list_steps(notes: Iterable[Note]) -> Iterator[str]:
    """Yield a line for each step and decision of a run that is still in memory, for --debug."""
    from oci_hooks.record.writer import list_events

    for event in list_events(list(notes), {}, True):
        if "ask" not in event:
            yield from format_event(event)


def format_run(record: Recording, reads: bool) -> str:
    """Return a run as a timeline. reads: print each question with its answer, not only their number."""
    lines = [*format_head(record), ""]
    asked: list[dict[str, Any]] = []
    for event in record.events:
        if "ask" in event and not reads:
            asked.append(event)
            continue
        lines += [*count_reads(asked), *format_event(event)]
        asked = []
    lines += [*count_reads(asked), "", *format_findings(record)]
    if record.about["traceback"]:
        # A line of the recording's text is not the tool's own.
        lines += ["", *(f"| {line}" for line in record.about["traceback"].splitlines())]
    return "".join(f"{make_one_line(line)}\n" for line in lines)


def format_head(record: Recording) -> list[str]:
    """Return the run's program, time, machine and versions."""
    about = record.about
    versions = ", ".join(f"{name} {value}" for name, value in sorted(about["versions"].items()) if value)
    given = ", ".join(f"{name} {value}" for name, value in sorted(about["arguments"].items()) if value)
    return [
        f"{about['program']} {about['hook']}, container {about['container'] or '(not known)'}",
        f"{about['time']}, exit {about['exit']} after {about['seconds']:.2f} s",
        f"versions: {versions}",
        f"arguments: {given or 'none'}",
    ]


def format_findings(record: Recording) -> list[str]:
    """Return the run's findings."""
    return [finding.as_line() for finding in record.findings] or ["succeeded without findings"]


def count_reads(asked: list[dict[str, Any]]) -> list[str]:
    """Return a line with the number of reads."""
    if not asked:
        return []
    missing = sum("errno" in event for event in asked)
    absent = f", {missing} of them absent or unreadable" if missing else ""
    paths = f"{len(asked)} path{'s' if len(asked) > 1 else ''}"
    return [f"{asked[0]['at']:8.3f} read  {paths}{absent}"]


def format_event(event: dict[str, Any]) -> list[str]:
    """Return an event's lines: time, name, object, result."""
    at = f"{event['at']:8.3f}"
    if "ask" in event:
        return [f"{at} read  {event['path']} ({event['ask']}): {format_answer(event)}"]
    if "note" in event:
        return [f"{at} {event['note']}", *(f"{'':14} {line}" for line in format_decision(event))]
    words = [f"{at} {'  ' if event.get('inside') else ''}did   {event['do'].replace('-', ' ')}"]
    subject = format_value(event.get("with", []))
    words += [f": {subject}"] if subject else []
    return [f"{''.join(words)} ({event['seconds']:.3f} s): {format_answer(event)}"]


def format_answer(event: dict[str, Any]) -> str:
    """Return the result of a question or a step."""
    if "errno" in event:
        return name_errno(event["errno"])
    if "error" in event:
        error = event["error"]
        if error.get("findings"):
            return "; ".join(f"[{finding['code']}] {finding['problem']}" for finding in error["findings"])
        return str(error.get("text"))
    return format_value(event.get("answer")) or "done"


def format_decision(event: dict[str, Any]) -> list[str]:
    """Return a request or a plan, one line per entry."""
    value = event.get("answer")
    if not isinstance(value, dict):
        return [format_value(value)]
    return [f"{key}: {format_value(item)}" for key, item in value.items() if key != KIND and item not in ("", [], {})]


def format_value(value: Any) -> str:
    """Return a short form of a value in a recording."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(format_value, value)))
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    kind = value.get(KIND)
    short: dict[object, Callable[[], str]] = {
        "bytes": lambda: shorten(str(value.get("text")).strip()),
        "descriptor": str,
        "opaque": str,
        "undo-log": str,
        "member": lambda: str(value.get("name")),
        "stat": lambda: f"mode {value.get('st_mode', 0):o}, owner {value.get('st_uid')}:{value.get('st_gid')}",
    }
    if kind in short:
        return short[kind]()
    if kind in FORMATS:
        return FORMATS[kind](value)
    pairs = ((key, format_value(item)) for key, item in value.items() if key != KIND)
    words = " ".join(f"{key}={text}" for key, text in pairs if text)
    return f"{kind.rpartition('.')[2]}({words})" if isinstance(kind, str) else words


def name_errno(number: object) -> str:
    """Return the text of an errno; the value itself if it is none."""
    return os.strerror(number) if type(number) is int and 0 <= number <= MAX_ERRNO else f"errno {number}"


def format_job(job: dict[str, Any]) -> str:
    """Return the writes for one device."""
    writes = [f"{write['path'].rpartition('/')[2]}={write['data'].strip()}" for write in job["writes"]]
    return f"{job['address']} {' '.join(writes)}"


def format_result(result: dict[str, Any]) -> str:
    """Return how a device's writes ended."""
    return f"{result['address']} {name_errno(result['code']) if result['code'] else 'ok'}"


def format_check(check: dict[str, Any]) -> str:
    """Return the result of opening a node inside the container."""
    error = check["error"]
    return f"{check['node']['name']} {name_errno(error) if error else 'opens' if check['is_viable'] else 'not viable'}"


def format_claim(claim: dict[str, Any]) -> str:
    """Return a claim's owner and groups."""
    return f"{claim['container']} has {', '.join(claim['groups'])}"


# Formats for the hooks' records that have more fields than are useful to print.
FORMATS: dict[object, Callable[[dict[str, Any]], str]] = {
    "cgroup": lambda value: str(value["unified"] or value["devices"]),
    "grant": lambda value: ", ".join(f"{major}:{minor}" for major, minor in value["nodes"]),
    "made-node": lambda value: str(value["name"]),
    "node-proof": format_check,
    "claim": format_claim,
    "entry": lambda value: " ".join([value["kind"], *value["words"]]),
    "place": lambda value: f"{value['directory']}/{value['name']}".lstrip("/"),
    "container": lambda value: str(value["rootfs"]),
    "map-entry": lambda value: f"{value['address']} in group {value['group']}",
    "node": lambda value: f"{value['kind']} {value['subject']}".strip(),
    "plan": lambda _: "",
    "rebind": lambda value: f"{value['address']} from {value['driver'] or 'no driver'}",
    "selector": lambda value: f"{value['kind']} {value['value']}",
    "job": format_job,
    "job-result": format_result,
}


def shorten(text: str) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= 200 else text[:197] + "..."


# Summaries ------------------------------------------------------------------------------------------------------------


def format_explanation(record: Recording) -> str:
    """Return the shortest summary of a run, for a ticket."""
    about = record.about
    outcome = {0: "succeeded", 1: "refused or failed", 2: "could not use its input"}
    lines = [f"{about['program']} {outcome[about['exit']]}: container {about['container'] or '(not known)'}"]
    for finding in record.findings:
        lines += ["", f"{finding.level}: [{finding.code}]", f"  object:  {finding.subject}"]
        lines += [f"  problem: {finding.problem}"]
        lines += [f"  do this: {finding.hint}"] if finding.hint else []
    lines += ["", f"asked for: {format_request(record)}", f"when: {about['time']}, after {about['seconds']:.2f} s"]
    versions = about["versions"]
    named = (about["hook"], versions.get("kernel", ""), versions.get("runtime", ""))
    lines += [f"versions: oci-vfio-hooks {named[0]}, {named[1].partition(' #')[0]}, {named[2] or 'runtime not known'}"]
    lines += [f"record: {record.path}"]
    return "".join(f"{make_one_line(line)}\n" for line in lines)


def format_request(record: Recording) -> str:
    """Return the container's request, in its own words."""
    for event in record.events:
        if event.get("note") == "request" and isinstance(event.get("answer"), dict):
            request = event["answer"]
            selectors = [f"{item.get('kind')} {item.get('value')}" for item in request.get("selectors", [])]
            entries = [str(item.get("path")) for item in request.get("entries", [])]
            return f"{', '.join(selectors) or ', '.join(entries)} (by {request.get('source')})"
    return "unknown, the run ended before reading it"


def format_row(record: Recording) -> tuple[str, ...]:
    """Return a recording's columns in the list: file, time, program, container, result."""
    about = record.about
    reported = (finding.code for finding in record.findings if finding.level != "info")
    output = ", ".join(dict.fromkeys(reported)) or "succeeded"
    name, when = make_one_line(os.path.basename(record.path)), make_one_line(about["time"], 30)
    return (name, when, about["program"], make_one_line(about["container"], 40) or "-", make_one_line(output, 60))


def list_facts(record: Recording) -> Iterator[str]:
    """Yield the facts by which two runs are compared: versions, first answer to each question, decisions, findings."""
    about = record.about
    yield f"program {about['program']} {about['hook']}"
    yield from (f"version {name} {value}" for name, value in sorted(about["versions"].items()))
    asked: dict[str, str] = {}
    for event in record.events:
        if "ask" in event:
            asked.setdefault(f"{event['path']} ({event['ask']})", format_answer(event))
    yield from (make_one_line(f"read {key}: {asked[key]}") for key in sorted(asked))
    for event in record.events:
        if "note" in event:
            yield from (make_one_line(f"{event['note']} {line}") for line in format_decision(event))
        elif "do" in event and not event.get("inside"):
            yield make_one_line(f"did {event['do']} {format_value(event.get('with', []))}: {format_answer(event)}")
    yield from format_findings(record)
    yield f"exit {about['exit']}"
