# SPDX-License-Identifier: Apache-2.0
"""What the runtime says: the OCI state on stdin, the bundle, and its config.json.

What can't be read is a reason to refuse only where it could concern VFIO: a runtime runs containers with a config.json
that breaks its specification, and those that ask for nothing are not ours to stop.

Readers by hand, because every container pays for them. They know only the fields that the hooks use. When one refuses,
jsonschema is loaded to list everything that is wrong; schemas/state.json and schemas/config.json say the same as the
readers, and a property test holds them to it.
"""

from __future__ import annotations

from errno import EFBIG

from oci_hooks.findings import Finding, InputError
from oci_hooks.frozen import Record
from oci_hooks.json_input import parse_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.system import Root

DEVICES_ANNOTATION = "io.katacontainers.x.vfio.devices"
MAP_ANNOTATION = "io.katacontainers.x.vfio"
LOG_ANNOTATION = "io.katacontainers.x.vfio.log"
RECORD_ANNOTATION = "io.katacontainers.x.vfio.record"

# A pod's pause container gets the pod's annotations too, and must not get its devices.
SANDBOX_MARKS = {
    "io.katacontainers.pkg.oci.container_type": "pod_sandbox",
    "io.kubernetes.cri.container-type": "sandbox",
    "io.kubernetes.cri-o.ContainerType": "sandbox",
}

CONTROL_NODE = "/dev/vfio/vfio"
GROUP_PREFIX = "/dev/vfio/"
CDEV_PREFIX = "/dev/vfio/devices/"

HINTS = {
    "state": "the runtime writes it; by hand: the OCI runtime-spec's runtime.md says what it holds",
    "config": "mend what wrote it: the OCI runtime-spec's config.md and config-linux.md say what it holds",
}

# What Go's encoder writes for a byte that is not UTF-8.
LOST_BYTE = "\ufffd"
# Characters of a container's id, which goes into its journal; runc takes 1024.
LONGEST_NAME = 8192
HIGHEST_ID = 0xFFFFFFFF
# chown(2) takes this one for "leave it as it is".
NO_ID = 0xFFFFFFFF


class State(Record):
    """OCI state (runtime-spec, runtime.md).

    pid: 0 where the runtime gives none (runc's poststop); status: "" from Kata's Go runtime; root: crun's extra key.
    """

    tag = "state"

    id: str
    bundle: str
    pid: int
    status: str
    annotations: dict[str, str]
    root: str = ""


class Device(Record):
    """One entry of linux.devices (runtime-spec, config-linux.md). mode, uid, gid: -1 where not given."""

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
        """Whether the path is that of a VFIO group's node, e.g. /dev/vfio/12 or /dev/vfio/noiommu-0."""
        rest = self.path[len(GROUP_PREFIX) :]
        return self.is_vfio and "/" not in rest and self.path != CONTROL_NODE

    @property
    def is_cdev(self) -> bool:
        """Whether the path is that of a VFIO device's own node (iommufd), e.g. /dev/vfio/devices/vfio0."""
        return self.is_vfio and self.path.startswith(CDEV_PREFIX)

    @property
    def is_vfio(self) -> bool:
        """Whether the entry is a VFIO character device of any kind."""
        return self.path.startswith(GROUP_PREFIX) and self.type in ("c", "u")


class IdMapping(Record):
    """One entry of linux.uidMappings or gidMappings."""

    container_id: int
    host_id: int
    size: int


class Spec(Record):
    """The part of config.json that the hooks read. path: where it was read from; raw: all of it."""

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
        """The entries that stand for a VFIO group or device, each once; the control node alone asks for nothing."""
        return tuple(dict.fromkeys(device for device in self.devices if device.is_group or device.is_cdev))


class Mismatch(Exception):
    """A hand-written reader met something else than it expected."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem


# Reading -------------------------------------------------------------------------------------------------------------


def read_state(data: bytes) -> State:
    """Return the state that the runtime wrote on stdin. Raises InputError [bad-json] or [bad-state]."""
    document = parse_json(data, "state on stdin")
    try:
        return make_state(document)
    except Mismatch as mismatch:
        try:
            return make_state(drop_annotations(document))
        except Mismatch:
            raise explain(document, mismatch, "state", "state on stdin", "bad-state") from None


def drop_annotations(document: Any) -> Any:
    """Return a state without the annotations that are neither texts nor ours: a runtime copies what it was given."""
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, dict):
        return document
    kept = {k: v for k, v in annotations.items() if isinstance(v, str) or k.startswith(MAP_ANNOTATION)}
    return {**document, "annotations": kept}


def mend_bundle(root: Root, state: State) -> State:
    """Return the state with the bundle that it should name; runtime_command.py says which runtimes get it wrong."""
    if state.bundle != "/" and LOST_BYTE not in state.bundle:
        return state
    from oci_hooks.runtime_command import find_bundle

    return state.replace(bundle=find_bundle(root, state.bundle))


def read_spec(root: Root, state: State) -> Spec:
    """Return the container's config.json; nothing asked for where it can't be read and surely asks for nothing.

    Raises InputError [bundle-unreadable], [bad-json] or [bad-config].
    """
    path = find_config(root, state)
    data = b""
    document = None
    try:
        data = root.read_bytes(path)
        document = parse_json(data, path)
        return make_spec(document, path)
    except OSError as error:
        problem: InputError | Mismatch = make_unreadable(path, error.strerror or str(error))
        if error.errno != EFBIG:
            raise problem from None
    except MemoryError:
        problem = make_unreadable(path, "does not fit into memory")
    except (InputError, Mismatch) as error:
        problem = error
    from oci_hooks.traces import find_request, look_for_request

    asks = find_request(data) if isinstance(problem, Mismatch) else root.ask(look_for_request, path)
    nothing = make_spec({}, path)
    if is_sandbox(state, nothing) or (asks is False and not is_asked(state, nothing)):
        return nothing
    if isinstance(problem, Mismatch):
        raise explain(document, problem, "config", path, "bad-config") from None
    raise problem from None


def make_unreadable(path: str, problem: str) -> InputError:
    """Return the error for a config.json that is not there or can't be read."""
    return InputError("bundle-unreadable", path, problem, "the state's bundle must hold a config.json")


def find_config(root: Root, state: State) -> str:
    """Return where the container's config.json is.

    Kata 1.x keeps it in /run/libcontainer/<id> instead of the bundle (dgibson/kata-vfio-tools).
    """
    places = [f"{state.bundle.rstrip('/')}/config.json"]
    if "/" not in state.id and state.id not in (".", ".."):
        places.append(f"/run/libcontainer/{state.id}/config.json")
    found = next((place for place in places if root.exists(place)), "")
    if found:
        return found
    from oci_hooks.runtime_command import find_other_config

    return find_other_config(root) or places[0]


def find_mappings(root: Root, state: State, spec: Spec) -> Spec:
    """Return the spec with the id mappings of the user namespace that the container's init is in (user_namespaces(7)).

    config.json holds none, or a made-up one, where the namespace is joined by its path, as a pod's containers do.
    """
    if "user" not in spec.namespaces:
        return spec
    uids, gids = (read_mappings(root, f"/proc/{state.pid}/{kind}_map") for kind in ("uid", "gid"))
    return spec.replace(uid_mappings=uids or spec.uid_mappings, gid_mappings=gids or spec.gid_mappings)


def read_mappings(root: Root, path: str) -> tuple[IdMapping, ...]:
    """Return the mappings in a process's uid_map or gid_map; none where it can't be read."""
    rows = (line.split() for line in root.read_text_or(path, "").split("\n"))
    return tuple(IdMapping(*map(int, row)) for row in rows if len(row) == 3 and "".join(row).isdecimal())


def find_annotation(state: State, spec: Spec, name: str) -> str | None:
    """Return an annotation's value, from the state or else from config.json; None without one."""
    value = state.annotations.get(name)
    return value if value is not None else spec.annotations.get(name)


def is_asked(state: State, spec: Spec) -> bool:
    """Tell whether anything at all asks for VFIO: an annotation, or an entry of linux.devices."""
    names = (DEVICES_ANNOTATION, MAP_ANNOTATION)
    return bool(spec.vfio_devices) or any(find_annotation(state, spec, name) is not None for name in names)


def is_sandbox(state: State, spec: Spec) -> bool:
    """Tell whether this is a pod's pause container."""
    return any(find_annotation(state, spec, name) == value for name, value in SANDBOX_MARKS.items())


def is_on(value: str | None) -> bool:
    """Tell whether an annotation says yes."""
    return value is not None and value.strip().lower() in ("1", "true", "yes", "on", "debug")


def map_id(container_id: int, mappings: tuple[IdMapping, ...]) -> int:
    """Return the id outside the user namespace for one inside; -1 where there is none. No mappings: the same id."""
    if not mappings:
        return container_id if container_id < NO_ID else -1
    for mapping in mappings:
        if 0 <= container_id - mapping.container_id < mapping.size:
            outside = mapping.host_id + container_id - mapping.container_id
            return outside if outside < NO_ID else -1
    return -1


# From a JSON document to a record ------------------------------------------------------------------------------------


def make_state(document: object) -> State:
    """Return the state that a JSON document holds. Raises Mismatch."""
    if not isinstance(document, dict):
        raise Mismatch("(the whole)", f"expected object, found {name_kind(document)}")
    take(document, "ociVersion", "string", "", "")
    identity = take(document, "id", "string", "")
    bundle = take(document, "bundle", "string", "")
    pid = take_number(document, "pid", "", 0, low=0)
    root = take(document, "root", "string", "", "")
    if not identity or len(identity) > LONGEST_NAME or not is_name(identity):
        raise Mismatch("id", f"expected a name of {LONGEST_NAME} characters at most, found {identity!r}")
    if not bundle.startswith("/") or not is_name(bundle):
        raise Mismatch("bundle", f"expected an absolute path, found {bundle!r}")
    if not is_name(root):
        raise Mismatch("root", f"expected a path, found {root!r}")
    status = take(document, "status", "string", "", "")
    return State(identity, bundle, pid, status, take_strings(document, "annotations", ""), root)


def make_spec(document: object, path: str) -> Spec:
    """Return what the hooks use of a config.json document. Raises Mismatch."""
    if not isinstance(document, dict):
        raise Mismatch("(the whole)", f"expected object, found {name_kind(document)}")
    root = take(document, "root", "object", "", None)
    root_path = take(root, "path", "string", "root.") if root is not None else ""
    if root is not None and not (root_path and is_name(root_path)):
        raise Mismatch("root.path", f"expected a path, found {root_path!r}")
    process = take(document, "process", "object", "", {})
    user = take(process, "user", "object", "process.", {})
    linux = take(document, "linux", "object", "", {})
    devices = take(linux, "devices", "array", "linux.", [])
    namespaces = take(linux, "namespaces", "array", "linux.", [])
    environment = take(process, "env", "array", "process.", [])
    for index, text in enumerate(environment):
        check_kind(text, "string", f"process.env[{index}]")
    return Spec(
        path,
        take_strings(document, "annotations", ""),
        root_path,
        tuple(make_device(entry, f"linux.devices[{index}]") for index, entry in enumerate(devices)),
        take_number(user, "uid", "process.user.", 0, low=0, high=HIGHEST_ID),
        take_number(user, "gid", "process.user.", 0, low=0, high=HIGHEST_ID),
        tuple(environment),
        tuple(make_namespace(entry, f"linux.namespaces[{index}]") for index, entry in enumerate(namespaces)),
        make_mappings(linux, "uidMappings"),
        make_mappings(linux, "gidMappings"),
        document,
    )


def make_device(entry: object, where: str) -> Device:
    """Return one entry of linux.devices. Raises Mismatch."""
    values = check_kind(entry, "object", where)
    path = take(values, "path", "string", f"{where}.")
    kind = take(values, "type", "string", f"{where}.")
    if not path.startswith("/") or not is_name(path):
        raise Mismatch(f"{where}.path", f"expected an absolute path, found {path!r}")
    if kind not in ("c", "b", "u", "p"):
        raise Mismatch(f"{where}.type", f"expected one of c, b, u, p, found {kind!r}")
    return Device(
        normalize(path),
        kind,
        take_number(values, "major", f"{where}.", -1),
        take_number(values, "minor", f"{where}.", -1),
        take_number(values, "fileMode", f"{where}.", -1, low=0),
        take_number(values, "uid", f"{where}.", -1, low=0, high=HIGHEST_ID),
        take_number(values, "gid", f"{where}.", -1, low=0, high=HIGHEST_ID),
    )


def normalize(path: str) -> str:
    """Return a device's path as it is below the container's root, absolute and in its shortest form."""
    import os.path

    # Two leading slashes are kept by normpath and mean nothing here.
    return "/" + os.path.normpath(f"/{path}").lstrip("/")


def make_namespace(entry: object, where: str) -> str:
    """Return the type of one entry of linux.namespaces. Raises Mismatch."""
    kind: str = take(check_kind(entry, "object", where), "type", "string", f"{where}.")
    return kind


def make_mappings(linux: dict[str, Any], key: str) -> tuple[IdMapping, ...]:
    """Return linux.uidMappings or gidMappings. Raises Mismatch."""
    mappings = []
    for index, entry in enumerate(take(linux, key, "array", "linux.", [])):
        where = f"linux.{key}[{index}]"
        values = check_kind(entry, "object", where)
        container_id, host_id, size = (
            take_number(values, name, f"{where}.", None, low=0, high=HIGHEST_ID)
            for name in ("containerID", "hostID", "size")
        )
        mappings.append(IdMapping(container_id, host_id, size))
    return tuple(mappings)


def take(owner: dict[str, Any], key: str, kind: str, where: str, *default: Any) -> Any:
    """Return a member of a JSON object; null counts as absent.

    kind: "string", "object", "array"; where: the owner's path with its dot; default: for an absent member, which is a
    Mismatch without one.
    """
    value = owner.get(key)
    if value is not None:
        return check_kind(value, kind, where + key)
    if default:
        return default[0]
    if key in owner:
        raise Mismatch(where + key, f"expected {kind}, found null")
    raise Mismatch(where.rstrip(".") or "(the whole)", f"lacks {key}")


def take_number(
    owner: dict[str, Any], key: str, where: str, default: int | None, *, low: int | None = None, high: int | None = None
) -> int:
    """Return a member that is a whole number within bounds; null counts as absent. Raises Mismatch."""
    if owner.get(key) is None and default is not None:
        return default
    value: int = take(owner, key, "integer", where)
    if (low is not None and value < low) or (high is not None and value > high):
        raise Mismatch(where + key, f"expected a number {describe_bounds(low, high)}, found {value}")
    return value


def describe_bounds(low: int | None, high: int | None) -> str:
    """Return bounds in words."""
    return f"from {low} to {high}" if high is not None else f"not below {low}"


def take_strings(owner: dict[str, Any], key: str, where: str) -> dict[str, str]:
    """Return a member that maps names to strings; empty where absent. Raises Mismatch."""
    values: dict[str, str] = take(owner, key, "object", where, {})
    for name, value in values.items():
        check_kind(value, "string", f"{where}{key}.{name}")
    return values


def check_kind(value: Any, kind: str, where: str) -> Any:
    """Return the value if it is of this JSON kind. Raises Mismatch."""
    found = name_kind(value)
    # JSON has one kind of number: 5.0 is a whole one.
    if kind == "integer" and found == "number" and value == value // 1:
        return int(value)
    if found != kind:
        raise Mismatch(where, f"expected {kind}, found {found}")
    return value


def is_name(text: str) -> bool:
    """Tell whether a file can have this name: JSON can write NUL and lone surrogates, a path can't hold them.

    It can hold bytes that are not UTF-8, for which the surrogates of PEP 383 stand.
    """
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def name_kind(value: object) -> str:
    """Return the JSON name of a value's kind."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "number"
    names = {str: "string", int: "integer", dict: "object", list: "array", type(None): "null"}
    return names[type(value)]


def explain(document: object, mismatch: Mismatch, schema_name: str, subject: str, code: str) -> InputError:
    """Return the error for a document that a reader refused: jsonschema's whole list, or the reader's own word."""
    hint = HINTS[schema_name]
    first = Finding("error", code, f"{subject}: {mismatch.path}", mismatch.problem, hint)
    try:
        from oci_hooks.schema import find_mistakes

        findings = find_mistakes(document, schema_name, subject, code, hint)
    except (ImportError, RecursionError):
        # What is nested as deep as the stack allowed to read can't be written out.
        findings = ()
    return InputError.from_findings(findings or (first,))
