# SPDX-License-Identifier: Apache-2.0
"""The messages of ttrpc and NRI that the plugin reads and writes, with the fields that it uses.

Sources: containerd/ttrpc request.proto and google.rpc.Status; containerd/nri pkg/api/api.proto, whose numbers are the
same from 0.3 (containerd 1.7.0) on.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.nri.wire import Schema

# ttrpc
STATUS: Schema = {"code": (1, "int"), "message": (2, "text")}
REQUEST: Schema = {"service": (1, "text"), "method": (2, "text"), "payload": (3, "bytes"), "timeout_nano": (4, "int")}
RESPONSE: Schema = {"status": (1, STATUS), "payload": (2, "bytes")}

# NRI
RUNTIME_SERVICE = "nri.pkg.api.v1alpha1.Runtime"
PLUGIN_SERVICE = "nri.pkg.api.v1alpha1.Plugin"
CREATE_CONTAINER = 4  # enum Event; a mask has bit 3 for it

REGISTER: Schema = {"plugin_name": (1, "text"), "plugin_idx": (2, "text")}
CONFIGURE: Schema = {"runtime_name": (2, "text"), "runtime_version": (3, "text"), "request_timeout": (5, "int")}
CONFIGURED: Schema = {"events": (2, "int")}
SYNCHRONIZE: Schema = {"more": (3, "bool")}
SYNCHRONIZED: Schema = {"more": (2, "bool")}

NUMBER: Schema = {"value": (1, "int")}
POD: Schema = {"id": (1, "text"), "runtime_handler": (7, "text"), "pid": (9, "int")}
MOUNT: Schema = {"destination": (1, "text"), "type": (2, "text"), "source": (3, "text"), "options": (4, ["text"])}
HOOK: Schema = {"path": (1, "text"), "args": (2, ["text"])}
HOOKS: Schema = {
    "prestart": (1, [HOOK]),
    "createRuntime": (2, [HOOK]),
    "createContainer": (3, [HOOK]),
    "startContainer": (4, [HOOK]),
    "poststart": (5, [HOOK]),
    "poststop": (6, [HOOK]),
}
DEVICE: Schema = {
    "path": (1, "text"),
    "type": (2, "text"),
    "major": (3, "int"),
    "minor": (4, "int"),
    "fileMode": (5, NUMBER),
    "uid": (6, NUMBER),
    "gid": (7, NUMBER),
}
RULE: Schema = {
    "allow": (1, "bool"),
    "type": (2, "text"),
    "major": (3, NUMBER),
    "minor": (4, NUMBER),
    "access": (5, "text"),
}
NAMESPACE: Schema = {"type": (1, "text")}
RESOURCES: Schema = {"devices": (7, [RULE])}
LINUX: Schema = {"namespaces": (1, [NAMESPACE]), "devices": (2, [DEVICE]), "resources": (3, RESOURCES)}
CONTAINER: Schema = {
    "id": (1, "text"),
    "name": (3, "text"),
    "annotations": (6, "map"),
    "env": (8, ["text"]),
    "mounts": (9, [MOUNT]),
    "hooks": (10, HOOKS),
    "linux": (11, LINUX),
}
CREATE: Schema = {"pod": (1, POD), "container": (2, CONTAINER)}
ADJUSTMENT: Schema = {"annotations": (2, "map")}
CREATED: Schema = {"adjust": (1, ADJUSTMENT)}
