# SPDX-License-Identifier: Apache-2.0
"""Read the runtime's input: the OCI state on stdin, the bundle, and its config.json.

Unreadable input is refused only if it could concern VFIO: runtimes run containers with a config.json that violates the
specification, and containers that do not request VFIO must not be stopped.

The readers are hand-written, because every container pays for their start-up. They know only the fields that the hooks
use. If one refuses, jsonschema is loaded to list every error; schemas/state.json and schemas/config.json define the
same rules as the readers, and a property test compares them.
"""

from __future__ import annotations

from errno import EFBIG

from oci_hooks import json_input
from oci_hooks.findings import InputError
from oci_hooks.frozen import Frozen
from oci_hooks.json_input import Mismatch, check_json_type, get_int, get_member, get_strings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.system import Root


# Nodes that are never passed one by one: if they are listed, the container has every node of the host.
HOST_ONLY_NODES = ("/dev/mem", "/dev/port", "/dev/kmsg")
# All annotations that the hooks read; their own first.
DEVICES_ANNOTATION = "io.katacontainers.x.vfio.devices"
MAP_ANNOTATION = "io.katacontainers.x.vfio"
LOG_ANNOTATION = "io.katacontainers.x.vfio.log"
RECORD_ANNOTATION = "io.katacontainers.x.vfio.record"
# A container's name in its pod: containerd's (internal/cri/annotations), and CRI-O's, where it is the kubelet's label.
CONTAINER_NAME_ANNOTATIONS = ("io.kubernetes.cri.container-name", "io.kubernetes.container.name")
# A pod's pause container gets the pod's annotations too, and must not get its devices.
SANDBOX_ANNOTATIONS = {
    "io.katacontainers.pkg.oci.container_type": "pod_sandbox",
    "io.kubernetes.cri.container-type": "sandbox",
    "io.kubernetes.cri-o.ContainerType": "sandbox",
}
CONTROL_NODE = "/dev/vfio/vfio"
GROUP_PREFIX = "/dev/vfio/"
CDEV_PREFIX = "/dev/vfio/devices/"
IOMMUFD_NODE = "/dev/iommu"
STATE_HINT = "see runtime.md of the OCI runtime-spec for the format of the state"
BUNDLE_HINT = "check that the state's bundle directory contains a config.json"
CONFIG_HINT = "fix the tool that generated this file (format: config.md and config-linux.md of the OCI runtime-spec)"
REPLACEMENT_CHARACTER = "\ufffd"  # Go's encoder writes this for a byte that is not UTF-8
# Characters of a container's id, which is part of file names; runc accepts 1024.
MAX_NAME_LENGTH = 8192
MAX_ID = 0xFFFFFFFF


class State(Frozen):
    """OCI state (runtime-spec, runtime.md).

    pid: 0 if the runtime gives none (runc's poststop); status: "" from Kata's Go runtime; root: crun's extra key.
    """

    tag = "state"

    id: str
    bundle: str
    pid: int
    status: str
    annotations: dict[str, str]
    root: str = ""


class Device(Frozen):
    """One entry of linux.devices (runtime-spec, config-linux.md). mode, uid, gid: -1 if absent."""

    tag = "device"

    path: str
    type: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int

    @property
    def is_group(self) -> bool:
        """Return whether the path names a VFIO group's node, e.g. /dev/vfio/12 or /dev/vfio/noiommu-0."""
        rest = self.path[len(GROUP_PREFIX) :]
        return self.is_vfio and "/" not in rest and self.path != CONTROL_NODE

    @property
    def is_cdev(self) -> bool:
        """Return whether the path names a VFIO device's own node (iommufd), e.g. /dev/vfio/devices/vfio0."""
        return self.is_vfio and self.path.startswith(CDEV_PREFIX)

    @property
    def is_vfio(self) -> bool:
        """Return whether the entry is a VFIO character device of any kind."""
        return self.path.startswith(GROUP_PREFIX) and self.type in ("c", "u")


class IdMapping(Frozen):
    """One entry of linux.uidMappings or gidMappings."""

    container_id: int
    host_id: int
    size: int


class Spec(Frozen):
    """The part of config.json that the hooks read. path: of the file; raw: the whole document."""

    tag = "spec"

    path: str
    annotations: dict[str, str]
    root_path: str
    devices: tuple[Device, ...]
    uid: int
    gid: int
    environment: tuple[str, ...]
    namespaces: tuple[str, ...]
    uid_mappings: tuple[IdMapping, ...]
    gid_mappings: tuple[IdMapping, ...]
    raw: dict[str, Any]

    @property
    def vfio_devices(self) -> tuple[Device, ...]:
        """The entries for a VFIO group or device, without duplicates; the control node alone is not a request."""
        return tuple(dict.fromkeys(device for device in self.devices if device.is_group or device.is_cdev))


def read_state(data: bytes) -> State:
    """Return the state that the runtime wrote on stdin. Raises InputError [bad-json] or [bad-state]."""
    document = json_input.parse_json(data, "state on stdin")
    try:
        return make_state(document)
    except Mismatch as mismatch:
        try:
            return make_state(drop_foreign_annotations(document))
        except Mismatch:
            raise json_input.make_schema_error(
                document, mismatch, "state", "state on stdin", "bad-state", STATE_HINT
            ) from None


def drop_foreign_annotations(document: Any) -> Any:
    """Return a state without annotations that are neither strings nor ours: a runtime copies its input."""
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, dict):
        return document
    kept = {k: v for k, v in annotations.items() if isinstance(v, str) or k.startswith(MAP_ANNOTATION)}
    return {**document, "annotations": kept}


def resolve_bundle(root: Root, state: State) -> State:
    """Return the state with the correct bundle; runtime_command.py lists the runtimes that report a wrong one."""
    if state.bundle != "/" and REPLACEMENT_CHARACTER not in state.bundle:
        return state
    from oci_hooks.runtime_command import find_bundle

    return state.replace(bundle=find_bundle(root, state.bundle))


def read_spec(root: Root, state: State) -> Spec:
    """Return the container's config.json; an empty one if it is unreadable and surely does not request VFIO.

    Raises InputError [bundle-unreadable], [bad-json] or [bad-config].
    """
    path = find_config(root, state)
    data = b""
    document = None
    try:
        data = root.read_bytes(path)
        document = json_input.parse_json(data, path)
        return make_spec(document, path)
    except OSError as error:
        problem: InputError | Mismatch = InputError(
            "bundle-unreadable", path, error.strerror or str(error), BUNDLE_HINT
        )
        if error.errno != EFBIG:
            raise problem from None
    except MemoryError:
        problem = InputError("bundle-unreadable", path, "does not fit into memory", BUNDLE_HINT)
    except (InputError, Mismatch) as error:
        problem = error
    from oci_hooks.traces import find_request, read_request_traces

    broken = isinstance(problem, Mismatch)
    asks = find_request(data, is_traced) if broken else root.ask(read_request_traces, path, is_traced)
    nothing = make_spec({}, path)
    if is_sandbox(state, nothing) or (asks is False and not asks_for_vfio(state, nothing)):
        return nothing
    if isinstance(problem, Mismatch):
        raise json_input.make_schema_error(document, problem, "config", path, "bad-config", CONFIG_HINT) from None
    raise problem from None


def find_config(root: Root, state: State) -> str:
    """Return the path of the container's config.json.

    Kata 1.x keeps it in /run/libcontainer/<id> instead of the bundle (dgibson/kata-vfio-tools).
    """
    locations = [f"{state.bundle.rstrip('/')}/config.json"]
    if "/" not in state.id and state.id not in (".", ".."):
        locations.append(f"/run/libcontainer/{state.id}/config.json")
    found = next((location for location in locations if root.exists(location)), "")
    if found:
        return found
    from oci_hooks.runtime_command import find_config_option

    return find_config_option(root) or locations[0]


def merge_annotations(state: State, spec: Spec) -> dict[str, str]:
    """Return the container's annotations by name: the state's, and those of config.json that the state lacks."""
    return {**spec.annotations, **state.annotations}


def name_devices_annotation(annotations: dict[str, str]) -> str:
    """Return the name of the annotation that lists this container's devices: its own if it has one, else the pod's.

    Kubernetes copies a pod's annotations to each of its containers, so the name of the container is in its own.
    """
    for name in CONTAINER_NAME_ANNOTATIONS:
        own = f"{DEVICES_ANNOTATION}.{annotations.get(name, '')}"
        if own in annotations and annotations.get(name):
            return own
    return DEVICES_ANNOTATION


def is_annotated(annotations: dict[str, str]) -> bool:
    """Return whether an annotation requests devices for the container with these annotations."""
    return name_devices_annotation(annotations) in annotations or MAP_ANNOTATION in annotations


def asks_for_vfio(state: State, spec: Spec) -> bool:
    """Return whether anything requests VFIO: an annotation, or an entry of linux.devices."""
    return bool(spec.vfio_devices) or is_annotated(merge_annotations(state, spec))


def is_traced(annotations: dict[str, str], paths: list[str]) -> bool:
    """Return whether a container with these annotations, and devices of these paths, requests VFIO."""
    state = State("", "", 0, "", annotations)
    devices = tuple(Device(normalize_device_path(path), "c", -1, -1, -1, -1, -1) for path in paths)
    spec = make_spec({}, "").replace(devices=devices)
    return asks_for_vfio(state, spec) and not is_sandbox(state, spec)


def is_sandbox(state: State, spec: Spec) -> bool:
    """Return whether this is a pod's pause container."""
    annotations = merge_annotations(state, spec)
    return any(annotations.get(name) == value for name, value in SANDBOX_ANNOTATIONS.items())


def make_state(document: object) -> State:
    """Return the state in a JSON document. Raises Mismatch."""
    if not isinstance(document, dict):
        raise Mismatch("top level", f"expected object, found {json_input.name_json_type(document)}")
    get_member(document, "ociVersion", "string", "", "")
    identity = get_member(document, "id", "string", "")
    bundle = get_member(document, "bundle", "string", "")
    pid = get_int(document, "pid", "", 0, low=0)
    root = get_member(document, "root", "string", "", "")
    if not identity or len(identity) > MAX_NAME_LENGTH or not json_input.is_valid_path(identity):
        raise Mismatch("id", f"expected a name of {MAX_NAME_LENGTH} characters at most, found {identity!r}")
    if not bundle.startswith("/") or not json_input.is_valid_path(bundle):
        raise Mismatch("bundle", f"expected an absolute path, found {bundle!r}")
    if not json_input.is_valid_path(root):
        raise Mismatch("root", f"expected a path, found {root!r}")
    status = get_member(document, "status", "string", "", "")
    return State(identity, bundle, pid, status, get_strings(document, "annotations", ""), root)


def make_spec(document: object, path: str) -> Spec:
    """Return the part of a config.json document that the hooks use. Raises Mismatch."""
    if not isinstance(document, dict):
        raise Mismatch("top level", f"expected object, found {json_input.name_json_type(document)}")
    root = get_member(document, "root", "object", "", None)
    root_path = get_member(root, "path", "string", "root.") if root is not None else ""
    if root is not None and not (root_path and json_input.is_valid_path(root_path)):
        raise Mismatch("root.path", f"expected a path, found {root_path!r}")
    process = get_member(document, "process", "object", "", {})
    user = get_member(process, "user", "object", "process.", {})
    linux = get_member(document, "linux", "object", "", {})
    devices = get_member(linux, "devices", "array", "linux.", [])
    namespaces = get_member(linux, "namespaces", "array", "linux.", [])
    environment = get_member(process, "env", "array", "process.", [])
    for index, text in enumerate(environment):
        check_json_type(text, "string", f"process.env[{index}]")
    return Spec(
        path,
        get_strings(document, "annotations", ""),
        root_path,
        tuple(make_device(entry, f"linux.devices[{index}]") for index, entry in enumerate(devices)),
        get_int(user, "uid", "process.user.", 0, low=0, high=MAX_ID),
        get_int(user, "gid", "process.user.", 0, low=0, high=MAX_ID),
        tuple(environment),
        tuple(make_namespace(entry, f"linux.namespaces[{index}]") for index, entry in enumerate(namespaces)),
        make_mappings(linux, "uidMappings"),
        make_mappings(linux, "gidMappings"),
        document,
    )


def make_device(entry: object, where: str) -> Device:
    """Return one entry of linux.devices. Raises Mismatch."""
    values = check_json_type(entry, "object", where)
    path = get_member(values, "path", "string", f"{where}.")
    kind = get_member(values, "type", "string", f"{where}.")
    if not path.startswith("/") or not json_input.is_valid_path(path):
        raise Mismatch(f"{where}.path", f"expected an absolute path, found {path!r}")
    if kind not in ("c", "b", "u", "p"):
        raise Mismatch(f"{where}.type", f"expected one of c, b, u, p, found {kind!r}")
    return Device(
        normalize_device_path(path),
        kind,
        get_int(values, "major", f"{where}.", -1),
        get_int(values, "minor", f"{where}.", -1),
        get_int(values, "fileMode", f"{where}.", -1, low=0),
        get_int(values, "uid", f"{where}.", -1, low=0, high=MAX_ID),
        get_int(values, "gid", f"{where}.", -1, low=0, high=MAX_ID),
    )


def normalize_device_path(path: str) -> str:
    """Return a device's path as it is below the container's root, absolute and in its shortest form."""
    import os.path

    # normpath keeps two leading slashes, which have no meaning here.
    return "/" + os.path.normpath(f"/{path}").lstrip("/")


def make_namespace(entry: object, where: str) -> str:
    """Return the type of one entry of linux.namespaces. Raises Mismatch."""
    kind: str = get_member(check_json_type(entry, "object", where), "type", "string", f"{where}.")
    return kind


def make_mappings(linux: dict[str, Any], key: str) -> tuple[IdMapping, ...]:
    """Return linux.uidMappings or gidMappings. Raises Mismatch."""
    mappings = []
    for index, entry in enumerate(get_member(linux, key, "array", "linux.", [])):
        where = f"linux.{key}[{index}]"
        values = check_json_type(entry, "object", where)
        container_id, host_id, size = (
            get_int(values, name, f"{where}.", None, low=0, high=MAX_ID) for name in ("containerID", "hostID", "size")
        )
        mappings.append(IdMapping(container_id, host_id, size))
    return tuple(mappings)
