# SPDX-License-Identifier: Apache-2.0
"""The requests to Kata's agent that the tests make, with the fields that they fill in, and a config.json as one.

Sources: kata-containers src/libs/protocols/protos/agent.proto and oci.proto (4.1.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oci_hooks.nri.wire import Schema

CREATE_SANDBOX: Schema = {"hostname": (1, "text"), "sandbox_id": (5, "text"), "guest_hook_path": (6, "text")}
NAMED: Schema = {"container_id": (1, "text")}
REMOVE: Schema = {"container_id": (1, "text"), "timeout": (2, "int")}
PROCESS_NAMED: Schema = {"container_id": (1, "text"), "exec_id": (2, "text")}
SIGNAL: Schema = {**PROCESS_NAMED, "signal": (3, "int")}
READ: Schema = {**PROCESS_NAMED, "len": (3, "int")}
READ_ANSWER: Schema = {"data": (1, "bytes")}
WAIT_ANSWER: Schema = {"status": (1, "int")}

USER: Schema = {"uid": (1, "int"), "gid": (2, "int")}
CAPABILITIES: Schema = {"bounding": (1, ["text"]), "effective": (2, ["text"]), "permitted": (4, ["text"])}
LIMIT: Schema = {"type": (1, "text"), "hard": (2, "int"), "soft": (3, "int")}
PROCESS: Schema = {
    "user": (3, USER),
    "args": (4, ["text"]),
    "env": (5, ["text"]),
    "cwd": (6, "text"),
    "capabilities": (7, CAPABILITIES),
    "rlimits": (8, [LIMIT]),
    "noNewPrivileges": (9, "bool"),
}
ROOT: Schema = {"path": (1, "text"), "readonly": (2, "bool")}
MOUNT: Schema = {"destination": (1, "text"), "source": (2, "text"), "type": (3, "text"), "options": (4, ["text"])}
# The hooks themselves are never sent: Kata's Go runtime sends none, runtime-rs an object with none in it.
HOOKS: Schema = {}
NAMESPACE: Schema = {"type": (1, "text"), "path": (2, "text")}
DEVICE: Schema = {"path": (1, "text"), "type": (2, "text"), "major": (3, "int"), "minor": (4, "int")}
RULE: Schema = {
    "allow": (1, "bool"),
    "type": (2, "text"),
    "major": (3, "int"),
    "minor": (4, "int"),
    "access": (5, "text"),
}
LINUX: Schema = {
    "resources": (4, {"devices": (1, [RULE])}),
    "cgroupsPath": (5, "text"),
    "namespaces": (6, [NAMESPACE]),
    "devices": (7, [DEVICE]),
}
SPEC: Schema = {
    "ociVersion": (1, "text"),
    "process": (2, PROCESS),
    "root": (3, ROOT),
    "hostname": (4, "text"),
    "mounts": (5, [MOUNT]),
    "hooks": (6, HOOKS),
    "annotations": (7, "map"),
    "linux": (8, LINUX),
}
CREATE: Schema = {"container_id": (1, "text"), "exec_id": (2, "text"), "OCI": (6, SPEC)}


def keep_known(value: Any, kind: Any) -> Any:
    """Return a part of a config.json without the keys that the schema lacks."""
    if isinstance(kind, list):
        return [keep_known(item, kind[0]) for item in value]
    if isinstance(kind, dict):
        return {key: keep_known(value[key], kind[key][1]) for key in kind if key in value}
    return value
