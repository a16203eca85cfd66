# SPDX-License-Identifier: Apache-2.0
"""Redact recordings, because they are sent to other people.

The kept parts are those that the hooks use, by the lists in this module (state, config.json, findings), in hidetext.py
(configuration files) and in hidehost.py (processes, /proc); of any other value only its type. A list of secrets would
never be complete. The manual has the same table: vfio-hook-replay(1), WHAT IS KEPT.
"""

from __future__ import annotations

import json
import os.path
import re

from oci_hooks.annotations import (
    CONFIG_PATH_ANNOTATION,
    CRI_PREFIXES,
    HANDLER_ANNOTATIONS,
    HYPERVISOR_PREFIX,
    KATA_PREFIX,
    RUNTIME_PREFIX,
    SANDBOX_ID_ANNOTATIONS,
)
from oci_hooks.json_input import is_valid_path
from oci_hooks.linux.pci import normalize_address
from oci_hooks.oci import CONTAINER_NAME_ANNOTATIONS, CONTROL_NODE, HOST_ONLY_NODES, MAP_ANNOTATION, SANDBOX_ANNOTATIONS
from oci_hooks.record import hidewords
from oci_hooks.record.hidetext import HYPERVISOR_KEYS, LEFT_OUT, hide_kernel, hide_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from oci_hooks.findings import Finding

    Rule = Callable[[Any], Any]

# Annotations by which the hooks identify sandbox, container and runtime (oci.py, host/runtime.py); values are kept.
DECIDING = (
    CONFIG_PATH_ANNOTATION,
    RUNTIME_PREFIX + "vfio_mode",
    *(HYPERVISOR_PREFIX + key for key in HYPERVISOR_KEYS),
    *SANDBOX_ANNOTATIONS,
    *SANDBOX_ID_ANNOTATIONS,
    *CONTAINER_NAME_ANNOTATIONS,
    "io.kubernetes.cri-o.ContainerName",
    *HANDLER_ANNOTATIONS,
)
# Only the presence of a name with one of these prefixes affects a decision.
TELLING_PREFIXES = (*CRI_PREFIXES, KATA_PREFIX)
# Names of OCI's specification whose values affect no decision here; other names are left out with their values.
KNOWN_NAMES = (
    "annotations",
    "apparmorProfile",
    "args",
    "blockIO",
    "cgroupsPath",
    "commandLine",
    "cpu",
    "cwd",
    "domainname",
    "hooks",
    "hostname",
    "intelRdt",
    "linux",
    "maskedPaths",
    "memory",
    "mountLabel",
    "mounts",
    "network",
    "noNewPrivileges",
    "ociVersion",
    "oomScoreAdj",
    "personality",
    "pids",
    "process",
    "readonlyPaths",
    "resources",
    "root",
    "rootfsPropagation",
    "seccomp",
    "selinuxLabel",
    "source",
    "sysctl",
    "terminal",
)
VFIO = "/dev/vfio/"
PLUGIN_PREFIX = "PCIDEVICE_"
# The codes of findings that quote the document they are about.
QUOTING = ("bad-config", "bad-state", "bad-settings")
JSON_KINDS = ("string", "object", "array", "integer", "number", "boolean", "null")


# Redaction rules for a value ------------------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """Return a placeholder for a value: of the same JSON type, and empty if the value is."""
    if isinstance(value, str):
        return value and LEFT_OUT
    if isinstance(value, list):
        return [LEFT_OUT] if value else []
    if isinstance(value, dict):
        return {LEFT_OUT: LEFT_OUT} if value else {}
    if isinstance(value, float):
        return 0.5
    return value if value is None or isinstance(value, bool) else 0


def number(value: Any) -> Any:
    """Return a number, a boolean or null; a placeholder for anything else."""
    return shape(value) if isinstance(value, (str, list, dict)) else value


def text(keep: Callable[[str], str]) -> Rule:
    """Return the rule for a string; any other value becomes a placeholder."""
    return lambda value: keep(value) if isinstance(value, str) else number(value)


def one_of(*words: str) -> Rule:
    """Return the rule for a string that is kept if it is one of these words."""
    return text(lambda value: value if value in words else shape(value))


def like(pattern: str) -> Rule:
    """Return the rule for a string that is kept if it matches this pattern."""
    return text(lambda value: value if re.fullmatch(pattern, value, re.ASCII) else shape(value))


def items(rule: Rule) -> Rule:
    """Return the rule for an array that applies this rule to each item."""
    return lambda value: [rule(item) for item in value] if isinstance(value, list) else shape(value)


def members(**rules: Rule) -> Rule:
    """Return the rule for an object with rules for its members; the names of others are left out too."""

    def keep(value: Any) -> Any:
        if not isinstance(value, dict):
            return shape(value)
        kept = {}
        for index, (name, item) in enumerate(value.items(), 1):
            known = name in rules or name in KNOWN_NAMES
            kept[name if known else f"{LEFT_OUT} {index}"] = rules.get(name, shape)(item)
        return kept

    return keep


whole = text(lambda value: value)


# Rules for the documents ----------------------------------------------------------------------------------------------


def keep_annotations(value: Any) -> Any:
    """Return annotations: the hooks' own and the deciding ones; of others not even the name."""
    if not isinstance(value, dict):
        return shape(value)
    kept = {}
    for index, (name, item) in enumerate(value.items(), 1):
        if name in DECIDING or name == MAP_ANNOTATION or name.startswith(MAP_ANNOTATION + "."):
            kept[name] = text(hide_kernel if name.endswith(".kernel_params") else str)(item)
        elif name.startswith(HYPERVISOR_PREFIX):
            # enable_annotations allows it or not, whatever its value.
            kept[name] = shape(item)
        else:
            prefix = next((prefix for prefix in TELLING_PREFIXES if name.startswith(prefix)), "")
            kept[f"{prefix}{LEFT_OUT} {index}"] = shape(item)
    return kept


def keep_variable(word: str) -> str:
    """Return a redacted environment variable: the device plugin's addresses, of others only that one existed."""
    name, equals, value = word.partition("=")
    if not name.startswith(PLUGIN_PREFIX) or name.endswith("_INFO"):
        return f"{shape(name)}{equals}{shape(value)}"
    name = name if re.fullmatch("[A-Z0-9_]{1,120}", name) else PLUGIN_PREFIX + LEFT_OUT
    return name + equals + ",".join(part if normalize_address(part) else shape(part) for part in value.split(","))


def keep_device_path(path: str) -> str:
    """Return a path in linux.devices if it is a VFIO node, or one that only a privileged container has.

    Of any other path only whether it is absolute, and a name, are kept.
    """
    plain = "/" + os.path.normpath(path).lstrip("/") if path else ""
    if is_valid_path(path) and (plain + "/" == VFIO or plain.startswith(VFIO) or plain in HOST_ONLY_NODES):
        return path
    return f"{path[:1] if path[:1] == '/' else ''}{shape(path)}{'' if is_valid_path(path) else chr(0)}"


def keep_destination(path: str) -> str:
    """Return a mount's destination if it contains the control node: /dev, /dev/vfio."""
    return path if (CONTROL_NODE + "/").startswith(path.rstrip("/") + "/") else shape(path)


VERSION = like(r"(\d{1,3}\.){1,3}\d{1,3}([+-][a-z0-9.]{1,8})?|")
NAMESPACES = ("cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts")
RAW = items(one_of("CAP_SYS_RAWIO"))
MAPPINGS = items(members(containerID=number, hostID=number, size=number))
STATE = members(
    ociVersion=VERSION,
    id=whole,
    status=one_of("creating", "created", "running", "stopped"),
    pid=number,
    bundle=whole,
    annotations=keep_annotations,
)
CONFIG = members(
    ociVersion=VERSION,
    annotations=keep_annotations,
    root=members(path=whole, readonly=number),
    process=members(
        user=members(uid=number, gid=number),
        env=items(text(keep_variable)),
        capabilities=members(
            effective=items(one_of("CAP_IPC_LOCK")), bounding=RAW, inheritable=RAW, permitted=RAW, ambient=RAW
        ),
        rlimits=items(members(type=one_of("RLIMIT_MEMLOCK"), soft=number, hard=number)),
    ),
    mounts=items(
        members(destination=text(keep_destination), type=one_of("bind"), options=items(one_of("bind", "rbind")))
    ),
    linux=members(
        devices=items(
            members(
                path=text(keep_device_path),
                type=one_of("c", "b", "u", "p"),
                major=number,
                minor=number,
                fileMode=number,
                uid=number,
                gid=number,
            )
        ),
        namespaces=items(members(type=one_of(*NAMESPACES))),
        uidMappings=MAPPINGS,
        gidMappings=MAPPINGS,
        resources=members(
            devices=items(
                members(allow=number, type=one_of("a", "b", "c"), major=number, minor=number, access=like("[rwm]{0,3}"))
            )
        ),
    ),
)


def hide_document(data: bytes, name: str) -> bytes:
    """Return a document with the parts that the hooks use. name: "state.json" or "config.json"."""
    try:
        # As in the hooks' reader: UTF-16 is invalid JSON, and bytes that are not UTF-8 are accepted.
        document = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return hide_text(data)
    return json.dumps((STATE if name == "state.json" else CONFIG)(document), indent=1).encode()


# Findings and messages ------------------------------------------------------------------------------------------------


def hide_finding(finding: Finding) -> Finding:
    """Return a finding without its quotations of a document, and without the values in a defect's message.

    A replay is compared after this redaction too: it quotes the redacted document.
    """
    if finding.code == "internal":
        return finding.replace(problem=hide_quoted(finding.problem))
    if finding.code in hidewords.CODES:
        return hidewords.hide_kata(finding)
    if finding.code not in QUOTING:
        return finding
    # The name of an annotation is left out too.
    subject = re.sub(rf"(: annotations\.)(?!{re.escape(MAP_ANNOTATION)}).*", rf"\g<1>{LEFT_OUT}", finding.subject)
    if finding.problem.startswith("unknown key"):
        subject = f"{subject.rpartition(': ')[0]}: {LEFT_OUT}"
    finding = finding.replace(subject=subject)
    head, found, rest = finding.problem.rpartition("found ")
    if found and rest not in JSON_KINDS:
        return finding.replace(problem=f"{head}{found}{LEFT_OUT}")
    return finding.replace(problem=re.sub(r"^(unknown key )[^;]*", rf"\g<1>{LEFT_OUT}", finding.problem))


def hide_quoted(words: str) -> str:
    """Return the text of an exception without quoted parts, and without the rest after an unpaired quote."""
    return re.sub(r"""'[^']*('|\Z)|"[^"]*("|\Z)""", f"'{LEFT_OUT}'", words)
