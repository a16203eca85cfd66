# SPDX-License-Identifier: Apache-2.0
"""Redact a machine's files and processes in a recording: keep the fields that the hooks read, in each file's format.

A path that is not listed here is left out, and a test compares the list with the hooks' questions. A replay has the
same result: the redacted parts are those that a hook read and ignored. Some are kept because a finding names them: the
mount point of a disk in use, the address of an interface that is up, the program that has a group open.
"""

from __future__ import annotations

import json
import re

from oci_hooks.annotations import SANDBOX_ID_ANNOTATIONS
from oci_hooks.oci import GROUP_PREFIX, IOMMUFD_NODE
from oci_hooks.record.hideforms import (
    DEVICE_PROPERTIES,
    NOWHERE,
    PROPERTY,
    hide_json_device,
    hide_route,
    hide_route6,
    hide_stat,
    hide_swap,
    keep_lines,
    keep_numbers,
    keep_settings,
)
from oci_hooks.record.hidetext import KEPT_KEYS, LEFT_OUT, hide_json_values, hide_kernel, hide_toml, hide_values
from oci_hooks.record.hidewords import hide_reading
from oci_hooks.record.privacy import hide_document
from oci_hooks.schema import load_schema
from oci_hooks.system import DOCKER_CONFIG, VERSION_FILES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from oci_hooks.record.summary import Summary

# The hooks' questions to the system other than a file's content: names in directories, targets of links, numbers of
# files, devices and processes, a word. A new question needs an entry here on the kept part of its answer.
QUESTIONS = (
    "loop-backing",
    "group-status",
    "list-empty-networks",
    "list-holders",
    "list-nodes",
    "list-openers",
    "list-vfio-files",
    "listdir",
    "find-request",
    "open-exclusively",
    "readlink",
    "realpath",
    "stat",
)
# Addresses of interfaces are kept if a finding names them.
ADDRESS_QUESTIONS = ("ipv4", "network")
ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - placeholder for a redacted address
# Variables of Kata's shim that the host hook reads (host/kata/lookup.py).
KEPT_VARIABLES = ("KATA_CONF_FILE=",)
# The hooks' own settings, and the schemas that define their keys.
SETTINGS = {
    "/etc/oci-vfio-hooks/guest.toml": "guest-settings",
    "/etc/oci-vfio-hooks/host.toml": "host-settings",
}
# Programs whose command lines affect a decision; of others only the name is kept, if a finding has it.
KEPT_PROGRAMS = ("qemu", "cloud-hypervisor", "clh", "firecracker", "stratovirt", "containerd-shim-kata", "crun", "runc")
VFIO_NODES = (GROUP_PREFIX, IOMMUFD_NODE)
# Options of QEMU, Cloud Hypervisor and crun, and those properties of their values that affect a decision.
OPTIONS: dict[str, tuple[str, ...]] = {
    "device": DEVICE_PROPERTIES,
    "machine": ("", "type", "accel", "iommu", "kernel_irqchip"),
    "M": ("", "type", "accel", "iommu", "kernel_irqchip"),
    "accel": ("",),
    "platform": ("iommu_segments",),
    "append": (),
    "readconfig": (),
    "kernel": (),
    "firmware": (),
    "disk": (),
    "name": (),
    "bundle": (),
    "b": (),
    "config": (),
    "f": (),
}
PATH_OPTIONS = ("bundle", "b", "config", "f")
# Placeholder for redacted properties: it has a name, as the first word without one is the driver.
OTHER_PROPERTIES = f"{LEFT_OUT}={LEFT_OUT}"
STATUS_LINE = re.compile(r"[A-Za-z_]+:[\s\d]*", re.ASCII)
KIND_OF_FILE_SYSTEM = re.compile(r"[a-z0-9_]{1,20}", re.ASCII)
# Options of a mount that the hooks read (guest/apply/cgroup.py), or that reveal nothing.
MOUNT_OPTIONS = ("rw", "ro", "devices")


class Redactor:
    """Redaction of one run.

    reported: the text of its findings; names: ids of container and sandbox, which identify a hypervisor; settings:
    returns the kept part of the hooks' own settings.
    """

    def __init__(self, reported: str, names: tuple[str, ...], settings: dict[str, dict[str, Any]]) -> None:
        self.told = reported
        self.names = tuple(name for name in names if name)
        self.settings = settings

    # Events ----------------------------------------------------------------------------------------------------------

    def hide_events(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the reads of a run, redacted to the parts that the hooks use."""
        kept = [event for event in events if self.is_kept(event)]
        links = {event["path"] for event in kept if is_open_file(split(event))}
        pids = {parts[2] for parts in map(split, kept) if is_process(parts) and (parts[3] != "fd" or len(parts) > 4)}
        shown = (self.hide_event(event, pids, links) for event in kept)
        return [event for event in shown if event is not None]

    def is_kept(self, event: dict[str, Any]) -> bool:
        """Return whether an event is kept: of processes' open files only VFIO nodes and those named in a finding."""
        if not is_open_file(split(event)):
            return True
        target = str(event.get("answer", ""))
        return target.startswith(VFIO_NODES) or (target.startswith("/dev/") and target in self.told)

    def hide_event(self, event: dict[str, Any], pids: set[str], links: set[str]) -> dict[str, Any] | None:
        """Return the redacted event, None if it is left out.

        pids: processes with kept events; links: open files that are kept.
        """
        parts, answer = split(event), event.get("answer")
        if event.get("do") == "read-kata" and "answer" in event:
            return {**event, "answer": hide_reading(answer)}
        if "answer" not in event or "ask" not in event:
            return event if parts[3:] != ["fd"] or not is_process(parts) or parts[2] in pids else None
        if parts == ["", "proc"] and isinstance(answer, list):
            return {**event, "answer": [name for name in answer if not name.isdigit() or name in pids]}
        if parts[3:] == ["fd"] and is_process(parts):
            names = [name for name in answer if f"{event['path']}/{name}" in links] if isinstance(answer, list) else []
            return {**event, "answer": names} if parts[2] in pids else None
        return {**event, "answer": self.hide_answer(event["ask"], event["path"], answer)}

    def hide_answer(self, question: str, path: str, answer: Any) -> Any:
        """Return the kept part of the answer to a question."""
        if question == "read" and isinstance(answer, dict):
            # A separate member, or a file too long to be kept, has no text.
            return {**answer, "text": self.hide_file(path, answer["text"])} if "text" in answer else answer
        if question in ADDRESS_QUESTIONS:
            return self.hide_addresses(answer)
        return answer if question in QUESTIONS else LEFT_OUT

    def hide_addresses(self, answer: Any) -> Any:
        """Return an address, or [kind, interface, address] of many interfaces; only addresses in findings are kept."""
        if isinstance(answer, str):
            return answer if not answer or answer in self.told else ANY_ADDRESS
        rows = answer if isinstance(answer, list) else []
        return [[*row[:2], *map(self.hide_addresses, row[2:])] for row in rows if isinstance(row, list)]

    # Files -----------------------------------------------------------------------------------------------------------

    def hide_file(self, path: str, text: str) -> str:
        """Return the kept part of a file's text."""
        if path.startswith("/sys/"):
            return text
        if path.startswith("/proc/"):
            parts = path.split("/")
            of_process = len(parts) > 3 and (parts[2] == "self" or parts[2].isdigit())
            name = re.sub("^task/[0-9]+/", "task/N/", "/".join(parts[3:] if of_process else parts[1:]))
            keep = self.proc_files().get(name)
            return keep(text) if keep else text and LEFT_OUT
        if path in VERSION_FILES:
            return text if re.fullmatch(r"\s*[\w.+-]{1,40}\s*", text, re.ASCII) else LEFT_OUT
        return self.hide_configuration(path, text)

    def hide_configuration(self, path: str, text: str) -> str:
        """Return the kept part of a configuration: of an engine, of Kata, of the hooks, of a container."""
        data = text.encode("utf-8", "surrogateescape")
        if path == DOCKER_CONFIG:
            return hide_json_values(data).decode("utf-8", "surrogateescape")
        if text.lstrip().startswith("{"):
            # An option of crun can name another file than the bundle's config.json.
            return hide_document(data, "config.json").decode("utf-8", "surrogateescape")
        schema = self.settings.get(path)
        if schema is not None:
            return hide_toml(text, lambda values: keep_settings(values, schema))
        return hide_toml(text, lambda values: [(keys, keys, value) for keys, value in hide_values(values, KEPT_KEYS)])

    def proc_files(self) -> dict[str, Callable[[str], str]]:
        """Return the redaction of each file of proc(5): below a process's directory, or of the machine."""
        return {
            "cgroup": str,
            "cmdline": lambda text: "\0".join(self.hide_command(text.split("\0"))),
            "comm": lambda text: text if text.strip() and text.strip() in self.told else LEFT_OUT,
            "environ": lambda text: "\0".join(word for word in text.split("\0") if word.startswith(KEPT_VARIABLES)),
            "gid_map": keep_numbers,
            "limits": lambda text: keep_lines(text, lambda line: line.startswith("Max locked memory")),
            "mountinfo": lambda text: "\n".join(map(self.hide_mount, text.split("\n"))),
            "stat": hide_stat,
            "status": lambda text: keep_lines(text, lambda line: bool(STATUS_LINE.fullmatch(line))),
            "task/N/children": keep_numbers,
            "uid_map": keep_numbers,
            "proc/cmdline": hide_kernel,
            "proc/consoles": str,
            "proc/net/if_inet6": lambda text: "\n".join(map(self.hide_address, text.split("\n"))),
            "proc/net/ipv6_route": lambda text: "\n".join(map(hide_route6, text.split("\n"))),
            "proc/net/route": lambda text: "\n".join(map(hide_route, text.split("\n"))),
            "proc/swaps": lambda text: "\n".join(map(hide_swap, text.split("\n"))),
        }

    def hide_mount(self, line: str) -> str:
        """Return a redacted line of mountinfo: all of cgroups, the device numbers, and the mount point in a finding."""
        location, dash, rest = line.partition(" - ")
        fields, types = location.split(" "), rest.split(" ")
        if not dash or len(fields) < 5 or len(types) < 3:
            return line and LEFT_OUT
        kind = types[0] if KIND_OF_FILE_SYSTEM.fullmatch(types[0]) else "other"
        of_cgroups, of_device = kind in ("cgroup", "cgroup2"), types[1].startswith("/dev/")
        top = fields[3] if of_cgroups else "/"
        point = fields[4] if of_cgroups or self.is_reported_place(fields[4]) else NOWHERE
        options = [word for word in types[2].split(",") if word in MOUNT_OPTIONS]
        source = types[1] if of_device else NOWHERE
        first = [field if re.fullmatch(r"[\d:]+", field, re.ASCII) else "0" for field in fields[:3]]
        return " ".join([*first, top, point, "rw", "-", kind, source, ",".join(options) or "rw"])

    def is_reported_place(self, field: str) -> bool:
        """Return whether a finding names a mount point, as written in mountinfo."""
        from oci_hooks.linux.mounts import unescape

        return f"mounted on {unescape(field)}" in self.told

    def hide_address(self, line: str) -> str:
        """Return a line of if_inet6 with the address only if a finding names it."""
        fields = line.split()
        if len(fields) != 6:
            return line and LEFT_OUT
        digits = fields[0]
        reported = ":".join(digits[start : start + 4] for start in range(0, 32, 4)) in self.told
        return " ".join([digits if reported else "0" * 32, *fields[1:]])

    # Processes -------------------------------------------------------------------------------------------------------

    def hide_command(self, words: list[str]) -> list[str]:
        """Return a process's redacted command line: a hypervisor's or runtime's deciding options, else the program."""
        program = words[0].rpartition("/")[2]
        if not program.startswith(KEPT_PROGRAMS):
            return [program if program and program in self.told else LEFT_OUT]
        kept = [next(name for name in KEPT_PROGRAMS if program.startswith(name)) if " " in program else program]
        option = ""
        for word in words[1:]:
            if word.startswith("-") and len(word) > 1:
                name, equals, value = word.lstrip("-").partition("=")
                option = name if name in OPTIONS else ""
                dashes = word[: len(word) - len(word.lstrip("-"))]
                kept.append(f"{dashes}{option or LEFT_OUT}{equals}{self.hide_value(option, value) if equals else ''}")
            else:
                kept.append(self.hide_value(option, word))
        return kept

    def hide_value(self, option: str, value: str) -> str:
        """Return a hypervisor option's redacted value: the deciding properties, the id of the sandbox."""
        if not value or value == "moby" or (option in PATH_OPTIONS and value.startswith("/")):
            return value
        if option == "append":
            return hide_kernel(value)
        if option == "device" and value.startswith("{"):
            return hide_json_device(value)
        parts = value.split(",")
        kept = []
        for index, part in enumerate(parts):
            key, equals, rest = part.partition("=")
            key, rest = (key, rest) if equals else ("", part)
            wanted = key in OPTIONS.get(option, ()) and (equals or not index) and PROPERTY.fullmatch(rest)
            known = part == "iommu=on" or any(part == f"sandbox-{name}" for name in self.names)
            if wanted or known:
                kept.append(part)
        kept += [f"{LEFT_OUT}/{name}/{LEFT_OUT}" for name in self.names if f"/{name}/" in value]
        if len(kept) < len(parts):
            kept.append(OTHER_PROPERTIES if kept or option in ("device", "machine", "M") else LEFT_OUT)
        return ",".join(kept)


def make_redactor(run: Summary, members: dict[str, bytes]) -> Redactor:
    """Return the redactor for a run and its documents."""
    names = [run.container]
    for data in members.values():
        try:
            annotations = json.loads(data)["annotations"]
            names += [str(annotations[name]) for name in SANDBOX_ID_ANNOTATIONS if name in annotations]
        except (KeyError, RecursionError, TypeError, ValueError):
            continue
    settings = {path: load_schema(name) for path, name in SETTINGS.items()}
    if run.arguments["settings"]:
        settings[run.arguments["settings"]] = load_schema(f"{run.program.split('-')[1]}-settings")
    reported = "\n".join(f"{finding.subject}: {finding.problem}; {finding.hint}" for finding in run.findings)
    return Redactor(reported, tuple(names), settings)


# Paths ----------------------------------------------------------------------------------------------------------------


def split(event: dict[str, Any]) -> list[str]:
    """Return the components of an event's path: ["", "proc", "12", "fd", "3"]."""
    return str(event.get("path", "")).split("/")


def is_process(parts: list[str]) -> bool:
    """Return whether a path is below a process's directory."""
    return len(parts) > 3 and parts[1] == "proc" and parts[2].isdigit()


def is_open_file(parts: list[str]) -> bool:
    """Return whether a path is that of an open file of a process."""
    return is_process(parts) and len(parts) > 4 and parts[3] == "fd"
