# SPDX-License-Identifier: Apache-2.0
"""Checks of the container's own configuration for its VFIO devices: nodes, device rules, locked memory."""

from __future__ import annotations

from oci_hooks.findings import Finding
from oci_hooks.oci import CONTROL_NODE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.runtime import Runtime
    from oci_hooks.host.targets import Target
    from oci_hooks.oci import Spec
    from oci_hooks.system import Root

# Below this limit a program cannot map even one buffer of DPDK's usual size.
SMALL_MEMLOCK = 64 << 20


def check_control_node(spec: Spec, targets: tuple[Target, ...]) -> tuple[Finding, ...]:
    """control-node-missing, in the container: a group can be opened but not used without /dev/vfio/vfio.

    A warning, because the guest hook creates the node, and a program may receive an open descriptor.
    """
    if not any(target.group and not target.cdev and not target.group.is_channel for target in targets):
        return ()
    if any(device.path == CONTROL_NODE for device in spec.devices) or has_bind_mount(spec, CONTROL_NODE):
        return ()
    entry = '{"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196}'
    hint = f"add it to linux.devices: {entry}; podman, docker: --device {CONTROL_NODE}"
    problem = "linux.devices lists a VFIO group but not the control node"
    return (Finding("warning", "control-node-missing", CONTROL_NODE, problem, hint),)


def has_bind_mount(spec: Spec, path: str) -> bool:
    """Return whether config.json mounts the host's /dev, or a part of it that contains this path."""
    for mount in list_objects(spec.raw.get("mounts")):
        options = mount.get("options")
        bound = mount.get("type") == "bind" or (
            isinstance(options, list) and {"bind", "rbind"} & set(map(str, options))
        )
        location = mount.get("destination")
        if (
            bound
            and isinstance(location, str)
            and location != "/"
            and (path + "/").startswith(location.rstrip("/") + "/")
        ):
            return True
    return False


def check_device_rules(spec: Spec, targets: tuple[Target, ...]) -> tuple[Finding, ...]:
    """group-denied, in a plain container: no rule in linux.resources.devices lets it open the node.

    A warning, because a later hook may add the permission.
    """
    resources = (spec.raw.get("linux") or {}).get("resources")
    rules = list_objects(resources.get("devices")) if isinstance(resources, dict) else []
    findings = []
    for target in targets:
        major, minor = target.entry.major, target.entry.minor
        if target.group is None or major < 0 or is_allowed(rules, major, minor):
            continue
        hint = f'add {{"allow": true, "type": "c", "major": {major}, "minor": {minor}, "access": "rw"}}'
        problem = "no rule in linux.resources.devices allows the container to open it"
        hint += ", or have vfio-guest-bind add it"
        findings.append(Finding("warning", "group-denied", target.subject, problem, hint))
    return tuple(findings)


def is_allowed(rules: list[dict[str, Any]], major: int, minor: int) -> bool:
    """Return whether device rules allow reading and writing a character device; the last matching rule decides."""
    allowed = {"r": False, "w": False}
    for rule in rules:
        fits = rule.get("type", "a") in ("a", "c", None, "")
        fits = fits and rule.get("major") in (None, -1, major) and rule.get("minor") in (None, -1, minor)
        if fits:
            for letter in str(rule.get("access") or "rwm"):
                if letter in allowed:
                    allowed[letter] = rule.get("allow") is True
    return all(allowed.values())


def check_memlock(root: Root, spec: Spec, runtime: Runtime) -> tuple[Finding, ...]:
    """memlock: neither CAP_IPC_LOCK nor a large RLIMIT_MEMLOCK, so mapping memory for the device will fail."""
    process = spec.raw.get("process")
    process = process if isinstance(process, dict) else {}
    capabilities = process.get("capabilities")
    effective = capabilities.get("effective") if isinstance(capabilities, dict) else None
    # The kernel checks the capability in the initial user namespace.
    own_namespace = "user" in spec.namespaces and bool(spec.uid_mappings)
    if isinstance(effective, list) and "CAP_IPC_LOCK" in effective and not own_namespace:
        return ()
    limits = [entry for entry in list_objects(process.get("rlimits")) if entry.get("type") == "RLIMIT_MEMLOCK"]
    soft = limits[-1].get("soft") if limits else None
    if soft is None:
        # Without an entry the runtime's own limit is inherited; in a Kata guest that is the agent's, unknown here.
        if runtime.is_kata:
            return ()
        soft = read_own_memlock(root)
    if not isinstance(soft, int) or soft >= SMALL_MEMLOCK:
        return ()
    problem = f"the container can lock only {soft >> 10} KiB of memory and has no CAP_IPC_LOCK"
    hint = (
        "raise the limit: docker, podman: --ulimit memlock=-1, or --cap-add IPC_LOCK; Kubernetes: "
        "capabilities.add IPC_LOCK"
    )
    return (Finding("warning", "memlock", "process.rlimits", problem, hint),)


def read_own_memlock(root: Root) -> int:
    """Return the limit of locked memory that this process inherited from the runtime, in bytes."""
    for line in root.read_text_or("/proc/self/limits", "").splitlines():
        if line.startswith("Max locked memory"):
            word = line[len("Max locked memory") :].split()[0]
            return int(word) if word.isdigit() else 1 << 62
    return 1 << 62


def list_objects(value: object) -> list[dict[str, Any]]:
    """Return the objects in a JSON array; no schema checks the remaining parts of config.json."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
