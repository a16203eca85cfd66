# SPDX-License-Identifier: Apache-2.0
"""What of a run is not written down: records are sent to strangers.

Left out of state and config.json are the values of environment variables, of arguments, and of annotations that don't
decide anything here; their names stay. Values that are only PCI addresses stay, because the hook goes by them. Of other
processes nothing stays but what was looked for: who holds a VFIO node, and a hypervisor's command line.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LEFT_OUT = "(left out)"
# Annotations that decide what the hooks do: their own, and those by which they tell the runtime, the sandbox and Kata's
# configuration.
OWN_PREFIX = "io.katacontainers.x.vfio"
DECIDING_PREFIXES = (
    OWN_PREFIX,
    "io.katacontainers.pkg.oci.container_type",
    "io.katacontainers.config.hypervisor.",
    "io.katacontainers.config.runtime.",
    "io.katacontainers.config_path",
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.cri-o.RuntimeHandler",
    "io.podman.annotations.sandbox-id",
    "io.containerd.cri.runtime-handler",
    "run.oci.",
)
SECRET_WORDS = ("initdata", "init_data", "policy")
ADDRESSES = re.compile(r"([0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7](,|$))+")
# What the host hook takes from the environment of Kata's shim (kata_lookup.py).
KEPT_VARIABLES = ("KATA_CONF_FILE=",)
# Command lines that decide something; of others the name is enough.
TOLD_PROGRAMS = ("qemu", "cloud-hypervisor", "clh", "firecracker", "stratovirt", "containerd-shim-kata", "crun")
VFIO_NODES = ("/dev/vfio/", "/dev/iommu")


# Documents ------------------------------------------------------------------------------------------------------------


def hide_document(data: bytes) -> bytes:
    """Return a state or a config.json without what is nobody's business."""
    import json

    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return hide_text(data)
    if not isinstance(document, dict):
        return data if not isinstance(document, str) else b'"(left out)"'
    hide_annotations(document)
    process = document.get("process")
    if isinstance(process, dict):
        hide_list(process, "env", hide_variable)
        hide_list(process, "args", hide_argument)
        if isinstance(process.get("commandLine"), str):
            process["commandLine"] = LEFT_OUT
    hooks = document.get("hooks")
    for group in hooks.values() if isinstance(hooks, dict) else ():
        for hook in group if isinstance(group, list) else ():
            if isinstance(hook, dict):
                hide_list(hook, "env", hide_variable)
    return json.dumps(document, indent=1).encode()


def hide_annotations(document: dict[str, Any]) -> None:
    """Leave out the values of annotations that don't decide anything."""
    annotations = document.get("annotations")
    if isinstance(annotations, dict):
        for name, value in annotations.items():
            if isinstance(value, str) and not is_deciding(name):
                annotations[name] = LEFT_OUT


def is_deciding(name: str) -> bool:
    """Tell whether an annotation's value is kept."""
    return name.startswith(DECIDING_PREFIXES) and not any(word in name.lower() for word in SECRET_WORDS)


def hide_list(owner: dict[str, Any], key: str, hide: Callable[[int, str], str]) -> None:
    """Hide the texts of a list; whatever else is in it stays, because it may be what is wrong with it."""
    values = owner.get(key)
    if isinstance(values, list):
        owner[key] = [hide(index, value) if isinstance(value, str) else value for index, value in enumerate(values)]


def hide_variable(_index: int, text: str) -> str:
    """Return an environment variable without its value, unless that is a list of PCI addresses."""
    name, equals, value = text.partition("=")
    return text if ADDRESSES.fullmatch(value) else f"{name}{equals}{LEFT_OUT if equals and value else ''}"


def hide_argument(index: int, text: str) -> str:
    """Return the program's name, and of its arguments that there were some."""
    return text if index == 0 else LEFT_OUT


def hide_text(data: bytes) -> bytes:
    """Return a text that is not JSON with every string in it made illegible, each error of it still in its place."""

    def hide_string(match: re.Match[bytes]) -> bytes:
        return re.sub(rb"\\.|[!#-\[\]-~]", lambda found: found[0] if found[0][:1] == b"\\" else b"x", match[0])

    return re.sub(rb'"(?:[^"\\]|\\.)*(?:"|$)', hide_string, data, flags=re.DOTALL)


# Other processes ------------------------------------------------------------------------------------------------------


def hide_processes(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the reads of a run without what other processes have open, are called with, and have in their environment.

    A replay finds the same: what is left out is what the hook looked at and passed over.
    """
    kept = [event for event in events if is_told(event)]
    links = {event["path"] for event in kept if is_open_file(split(event))}
    pids = {parts[2] for parts in map(split, kept) if is_process(parts) and (parts[3] != "fd" or len(parts) > 4)}
    shown = (hide_process(event, pids, links) for event in kept)
    return [event for event in shown if event is not None]


def split(event: dict[str, Any]) -> list[str]:
    """Return the parts of an event's path: ["", "proc", "12", "fd", "3"]."""
    return str(event.get("path", "")).split("/")


def is_process(parts: list[str]) -> bool:
    """Tell whether a path is below a process's directory."""
    return len(parts) > 3 and parts[1] == "proc" and parts[2].isdigit()


def is_open_file(parts: list[str]) -> bool:
    """Tell whether a path is that of an open file of a process."""
    return is_process(parts) and len(parts) > 4 and parts[3] == "fd"


def is_told(event: dict[str, Any]) -> bool:
    """Tell whether an event is no process's open file, or one that is a VFIO node."""
    return not is_open_file(split(event)) or str(event.get("answer", "")).startswith(VFIO_NODES)


def hide_process(event: dict[str, Any], pids: set[str], links: set[str]) -> dict[str, Any] | None:
    """Return an event as it may be told, None where it may not.

    pids: processes of which something is told; links: open files that are told.
    """
    parts, answer = split(event), event.get("answer")
    if parts == ["", "proc"] and isinstance(answer, list):
        return {**event, "answer": [name for name in answer if not name.isdigit() or name in pids]}
    if not is_process(parts):
        return event
    if parts[3:] == ["fd"]:
        names = [name for name in answer if f"{event['path']}/{name}" in links] if isinstance(answer, list) else None
        return None if parts[2] not in pids else event if names is None else {**event, "answer": names}
    if parts[3] in HIDERS and isinstance(answer, dict):
        words = HIDERS[parts[3]](answer["text"].split("\0"))
        return {**event, "answer": {**answer, "text": "\0".join(words)}}
    return event


def hide_environment(words: list[str]) -> list[str]:
    """Return the environment of another process without what was not looked for."""
    return [word for word in words if word.startswith(KEPT_VARIABLES)]


def hide_command(words: list[str]) -> list[str]:
    """Return the command line of another process: all of it where it decides something, else the program."""
    return words if words[0].rpartition("/")[2].startswith(TOLD_PROGRAMS) else words[:1]


HIDERS = {"environ": hide_environment, "cmdline": hide_command}
