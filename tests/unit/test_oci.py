# SPDX-License-Identifier: Apache-2.0
"""State and config.json: what is read, what is refused, and that readers and schemas never disagree."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hooks import json_input, oci
from oci_hooks.findings import EXIT_BAD_INPUT, InputError
from oci_hooks.guest import id_mapping
from oci_hooks.schema import load_schema
from oci_hooks.system import Root
from tests.support.json_strategies import ANYTHING, CONFIGS, STATES

pytestmark = pytest.mark.unit

STATE_SCHEMA = jsonschema.Draft7Validator(load_schema("state"))
CONFIG_SCHEMA = jsonschema.Draft7Validator(load_schema("config"))
STATE: dict[str, Any] = {"id": "c1", "bundle": "/b"}


def read_or_refuse(document: object, kind: str) -> bool:
    """Return whether the hand-written reader accepts a document."""
    try:
        if kind == "state":
            oci.make_state(document)
        else:
            oci.make_spec(document, "config.json")
    except json_input.Mismatch:
        return False
    return True


def device(**changes: Any) -> dict[str, Any]:
    """Return a config.json with one device, changed; None takes a member away."""
    entry = {"path": "/dev/vfio/12", "type": "c", "major": 244, "minor": 0, **changes}
    return {"linux": {"devices": [{key: value for key, value in entry.items() if value is not None}]}}


# The same result ------------------------------------------------------------------------------------------------------


@settings(max_examples=600, deadline=None)
@given(STATES)
def test_reader_and_schema_agree_on_states(document: object) -> None:
    assert read_or_refuse(document, "state") == STATE_SCHEMA.is_valid(document)


@settings(max_examples=1500, deadline=None)
@given(CONFIGS)
def test_reader_and_schema_agree_on_configs(document: object) -> None:
    assert read_or_refuse(document, "config") == CONFIG_SCHEMA.is_valid(document)


@given(ANYTHING)
def test_reader_and_schema_agree_on_anything(document: object) -> None:
    assert read_or_refuse(document, "state") == STATE_SCHEMA.is_valid(document)
    assert read_or_refuse(document, "config") == CONFIG_SCHEMA.is_valid(document)


# (document, the path at which it is wrong, "" if it is valid). Both readers' results are checked for each.
STATES_BY_HAND: list[tuple[Any, str]] = [
    (STATE, ""),
    ({**STATE, "ociVersion": "", "status": "", "pid": 0, "annotations": None, "root": "/r", "new": [1]}, ""),
    ({**STATE, "pid": 7.0, "status": None, "annotations": {"a": "b"}}, ""),
    ([], "top level"),
    (None, "top level"),
    ({"bundle": "/b"}, "top level"),
    ({"id": "c"}, "top level"),
    ({**STATE, "id": ""}, "id"),
    ({**STATE, "id": 5}, "id"),
    ({**STATE, "id": "a\0b"}, "id"),
    ({**STATE, "id": "\ud800"}, "id"),
    ({**STATE, "id": "x" * oci.MAX_NAME_LENGTH}, ""),
    ({**STATE, "id": "x" * (oci.MAX_NAME_LENGTH + 1)}, "id"),
    ({**STATE, "bundle": "b"}, "bundle"),
    ({**STATE, "bundle": ""}, "bundle"),
    ({**STATE, "bundle": "/b\0"}, "bundle"),
    ({**STATE, "bundle": "/\udc7f"}, "bundle"),
    # A byte that is not UTF-8, as PEP 383 has it.
    ({**STATE, "root": "/\udc80"}, ""),
    ({**STATE, "root": "/r\0"}, "root"),
    ({**STATE, "pid": "7"}, "pid"),
    ({**STATE, "pid": -1}, "pid"),
    ({**STATE, "pid": 7.5}, "pid"),
    ({**STATE, "pid": True}, "pid"),
    ({**STATE, "annotations": {"a": 1}}, "annotations.a"),
    ({**STATE, "annotations": []}, "annotations"),
    ({**STATE, "status": 1}, "status"),
]
CONFIGS_BY_HAND: list[tuple[Any, str]] = [
    ({}, ""),
    ({"linux": None, "process": {"user": None, "env": None}, "root": None, "annotations": None}, ""),
    (device(uid=0, gid=2**32 - 1, fileMode=0o666), ""),
    (device(major=None, minor=None), ""),
    (device(type="b", path="/dev/sda"), ""),
    (device(type="x"), "linux.devices[0].type"),
    (device(type=None), "linux.devices[0]"),
    (device(path="dev/vfio/12"), "linux.devices[0].path"),
    (device(path="/dev/vfio/1\0"), "linux.devices[0].path"),
    (device(path="/dev/vfio/\ud800"), "linux.devices[0].path"),
    (device(path=["x"]), "linux.devices[0].path"),
    (device(major="244"), "linux.devices[0].major"),
    (device(fileMode=-1), "linux.devices[0].fileMode"),
    (device(uid=-1), "linux.devices[0].uid"),
    (device(gid=2**32), "linux.devices[0].gid"),
    ({"linux": {"devices": {"path": "/dev/vfio/12"}}}, "linux.devices"),
    ({"linux": {"devices": ["/dev/vfio/12"]}}, "linux.devices[0]"),
    ({"linux": {"devices": [None]}}, "linux.devices[0]"),
    ({"linux": {"namespaces": [{}]}}, "linux.namespaces[0]"),
    ({"linux": {"uidMappings": [{"containerID": 0, "hostID": 1}]}}, "linux.uidMappings[0]"),
    ({"linux": {"gidMappings": [{"containerID": 0, "hostID": 1, "size": None}]}}, "linux.gidMappings[0].size"),
    ({"linux": []}, "linux"),
    ({"process": {"user": {"uid": -1}}}, "process.user.uid"),
    ({"process": {"env": [1]}}, "process.env[0]"),
    ({"root": {}}, "root"),
    ({"root": {"path": ""}}, "root.path"),
    ({"root": {"path": "a\0b"}}, "root.path"),
    ({"annotations": {"a": None}}, "annotations.a"),
    ("{}", "top level"),
]


@pytest.mark.parametrize(("document", "where"), STATES_BY_HAND, ids=repr)
def test_read_state_cases(document: Any, where: str) -> None:
    assert STATE_SCHEMA.is_valid(document) == (not where)
    if where:
        with pytest.raises(json_input.Mismatch) as caught:
            oci.make_state(document)
        assert caught.value.path == where
    else:
        assert oci.make_state(document).bundle == "/b"


@pytest.mark.parametrize(("document", "where"), CONFIGS_BY_HAND, ids=repr)
def test_read_spec_cases(document: Any, where: str) -> None:
    assert CONFIG_SCHEMA.is_valid(document) == (not where)
    if where:
        with pytest.raises(json_input.Mismatch) as caught:
            oci.make_spec(document, "config.json")
        assert caught.value.path == where
    else:
        assert oci.make_spec(document, "config.json").raw is document


# What is read --------------------------------------------------------------------------------------------------------


def test_read_state_fields() -> None:
    document = {**STATE, "pid": 7, "status": "created", "annotations": {"a": "b"}, "root": "/r", "ociVersion": "1.0.2"}
    assert oci.make_state(document) == oci.State("c1", "/b", 7, "created", {"a": "b"}, "/r")


def test_read_spec_fields() -> None:
    document = {
        "annotations": {"a": "b"},
        "root": {"path": "rootfs"},
        "process": {"user": {"uid": 1, "gid": 2}, "env": ["A=1"]},
        "linux": {
            "devices": [{"path": "//dev/vfio/../vfio/12", "type": "u", "major": 244, "minor": 3, "fileMode": 0o640}],
            "namespaces": [{"type": "pid"}, {"type": "user", "path": "/x"}],
            "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        },
    }
    spec = oci.make_spec(document, "/b/config.json")
    assert spec.devices == (oci.Device("/dev/vfio/12", "u", 244, 3, 0o640, -1, -1),)
    assert (spec.uid, spec.gid, spec.environment, spec.root_path) == (1, 2, ("A=1",), "rootfs")
    assert spec.namespaces == ("pid", "user")
    assert spec.uid_mappings == (oci.IdMapping(0, 1000, 10),)
    assert spec.gid_mappings == ()


def test_resolve_id_mappings_from_kernel(tmp_path: Path) -> None:
    """A namespace that is joined has other ones than config.json: podman writes 0 0 1 there, others nothing."""
    state, joined = oci.make_state({**STATE, "pid": 7}), {"namespaces": [{"type": "user", "path": "/proc/3/ns/user"}]}
    spec = oci.make_spec({"linux": {**joined, "uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}}, "c")
    known = id_mapping.resolve_id_mappings(Root(str(tmp_path)), state, spec)
    assert known == spec
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/uid_map").write_text("         0     100000      65536\n     65536          5          1\n")
    (tmp_path / "proc/7/gid_map").write_text("0 x 3\nodd\n")
    known = id_mapping.resolve_id_mappings(Root(str(tmp_path)), state, spec)
    assert known.uid_mappings == (oci.IdMapping(0, 100000, 65536), oci.IdMapping(65536, 5, 1))
    assert known.gid_mappings == ()
    alone = oci.make_spec({}, "c")
    assert id_mapping.resolve_id_mappings(Root(str(tmp_path)), state, alone) == alone


@pytest.mark.parametrize(
    ("path", "kind", "asks"),
    [
        ("/dev/vfio/12", "c", "group"),
        ("/dev/vfio/12", "u", "group"),
        ("/dev/vfio/noiommu-0", "c", "group"),
        ("/dev//vfio/./12/", "c", "group"),
        ("/dev/vfio/devices/vfio0", "c", "cdev"),
        ("/dev/vfio/vfio", "c", ""),
        ("/dev/vfio/12", "b", ""),
        ("/dev/vfio/12", "p", ""),
        ("/dev/vfio", "c", ""),
        ("/dev/vfiox/12", "c", ""),
        ("/dev/vfio/../sda", "c", ""),
        ("/dev/null", "c", ""),
    ],
)
def test_device_is_vfio(path: str, kind: str, asks: str) -> None:
    spec = oci.make_spec(device(path=path, type=kind), "config.json")
    (found,) = spec.devices
    assert (found.is_group, found.is_cdev) == (asks == "group", asks == "cdev")
    assert spec.vfio_devices == (spec.devices if asks else ())


@pytest.mark.parametrize(
    ("inside", "outside"),
    [(0, 1000), (9, 1009), (10, -1), (20, 5), (21, -1), (2**32 - 1, -1)],
)
def test_map_id(inside: int, outside: int) -> None:
    assert id_mapping.map_id(inside, (oci.IdMapping(0, 1000, 10), oci.IdMapping(20, 5, 1))) == outside


@pytest.mark.parametrize("inside", [2**32 - 1, 2**32 - 6])
def test_map_id_minus_one_ignored(inside: int) -> None:
    # (uid_t)-1 means "leave it" to chown(2), and Python raises OverflowError for the number.
    mappings = () if inside == 2**32 - 1 else (oci.IdMapping(0, 10, 2**32 - 1),)
    assert id_mapping.map_id(inside, mappings) == -1


@pytest.mark.parametrize(("name", "value"), oci.SANDBOX_ANNOTATIONS.items())
def test_is_sandbox(name: str, value: str) -> None:
    spec = oci.make_spec({"annotations": {name: value}}, "config.json")
    assert oci.is_sandbox(oci.make_state(STATE), spec)
    assert not oci.is_sandbox(oci.make_state({**STATE, "annotations": {name: "container"}}), spec)


OWN = oci.DEVICES_ANNOTATION + "."
CONTAINERD_NAME, CRIO_NAME = oci.CONTAINER_NAME_ANNOTATIONS


@pytest.mark.parametrize(
    ("annotations", "decides"),
    [
        ({OWN + "web": "auto", CONTAINERD_NAME: "web"}, "web"),
        ({OWN + "web": "auto", CRIO_NAME: "web"}, "web"),
        ({OWN + "web": "auto", oci.DEVICES_ANNOTATION: "id:8086:10d3", CONTAINERD_NAME: "web"}, "web"),
        # An annotation that is there, and empty, is an error that the container's user must see.
        ({OWN + "web": "", oci.DEVICES_ANNOTATION: "auto", CONTAINERD_NAME: "web"}, "web"),
        # A pod's author can write the other engine's name: the one that names an annotation counts.
        ({OWN + "web": "auto", CONTAINERD_NAME: "other", CRIO_NAME: "web"}, "web"),
        ({OWN + "a.b": "auto", CONTAINERD_NAME: "a.b"}, "a.b"),
        ({OWN + "log": "auto", CONTAINERD_NAME: "log"}, "log"),
        ({OWN + "web": "auto", oci.DEVICES_ANNOTATION: "auto", CONTAINERD_NAME: "sidecar"}, "pod"),
        ({oci.DEVICES_ANNOTATION: "auto", CONTAINERD_NAME: "web"}, "pod"),
        ({oci.DEVICES_ANNOTATION: "auto", OWN: "auto", CONTAINERD_NAME: ""}, "pod"),
        ({oci.DEVICES_ANNOTATION: "auto"}, "pod"),
        ({OWN + "web": "auto", CONTAINERD_NAME: "sidecar"}, ""),
        ({OWN + "web": "auto", CONTAINERD_NAME: "we"}, ""),
        ({OWN + "web": "auto", CONTAINERD_NAME: "Web"}, ""),
        ({OWN + "web": "auto", "io.kubernetes.cri-o.ContainerName": "web"}, ""),
        ({OWN: "auto", CONTAINERD_NAME: ""}, ""),
        ({OWN + "None": "auto"}, ""),
        ({OWN + "web": "auto"}, ""),
        ({oci.LOG_ANNOTATION: "debug", oci.RECORD_ANNOTATION: "on", CONTAINERD_NAME: "log"}, ""),
    ],
    ids=repr,
)
def test_name_devices_annotation(annotations: dict[str, str], decides: str) -> None:
    name = oci.name_devices_annotation(annotations)
    assert name == (OWN + decides if decides not in ("", "pod") else oci.DEVICES_ANNOTATION)
    assert oci.is_annotated(annotations) == (name in annotations) == bool(decides)
    # The container's name may come with the state, and the annotation with config.json.
    for key, value in annotations.items():
        state = oci.make_state({**STATE, "annotations": {key: value}})
        rest = {other: text for other, text in annotations.items() if other != key}
        assert oci.asks_for_vfio(state, oci.make_spec({"annotations": rest}, "config.json")) == bool(decides)


NAMES = st.sampled_from(["", "a", "b", "c"])


@given(st.dictionaries(NAMES, NAMES), st.booleans(), NAMES)
def test_one_name_is_one_containers(named: dict[str, str], pods: bool, name: str) -> None:
    """Whatever annotations a pod has, those for other containers change nothing for this one."""
    copied = {OWN + key: value for key, value in named.items()} | ({oci.DEVICES_ANNOTATION: "x"} if pods else {})
    own = {CONTAINERD_NAME: name}
    mine = {key: value for key, value in copied.items() if key in (OWN + name, oci.DEVICES_ANNOTATION)}
    assert oci.name_devices_annotation({**copied, **own}) == oci.name_devices_annotation({**mine, **own})
    assert oci.is_annotated({**copied, **own}) == (pods or (bool(name) and name in named))


def test_merge_annotations_state_before_config() -> None:
    spec = oci.make_spec({"annotations": {"a": "config", "b": "config"}}, "config.json")
    state = oci.make_state({**STATE, "annotations": {"a": "state"}})
    assert [oci.merge_annotations(state, spec).get(name) for name in "abc"] == ["state", "config", None]


# Files ---------------------------------------------------------------------------------------------------------------


def write_config(top: Path, path: str, data: bytes) -> None:
    """Write a file into a made tree."""
    location = top / path.lstrip("/")
    location.parent.mkdir(parents=True)
    location.write_bytes(data)


@pytest.mark.parametrize(
    ("data", "code", "subject", "problem"),
    [
        (b"", "bad-json", "/b/config.json", "is empty"),
        (b"{/dev/vfio/1", "bad-json", "/b/config.json", "line 1 column 2"),
        (
            b'{"linux": {"devices": [{"path": "/dev/vfio/1", "type": "c", "major": "x"}]}}',
            "bad-config",
            "/b/config.json: linux.devices[0].major",
            'expected integer, found "x"',
        ),
        (
            b'{"linux": {"devices": [{"path": "/dev/vfio/1\\u0000", "type": "c"}]}}',
            "bad-config",
            "/b/config.json: linux.devices[0].path",
            "expected an absolute path, found",
        ),
    ],
)
def test_read_spec_bad_value_names_path(tmp_path: Path, data: bytes, code: str, subject: str, problem: str) -> None:
    write_config(tmp_path, "/b/config.json", data)
    with pytest.raises(InputError) as caught:
        oci.read_spec(Root(str(tmp_path)), oci.make_state(STATE))
    (finding,) = caught.value.findings
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert (finding.code, finding.subject) == (code, subject)
    assert problem in finding.problem
    assert finding.hint


def test_read_state_lists_every_mistake() -> None:
    with pytest.raises(InputError) as caught:
        oci.read_state(json.dumps({"id": 5, "pid": -1, "bundle": "x"}).encode())
    locations = {finding.subject: finding.problem for finding in caught.value.findings}
    assert locations == {
        "state on stdin: bundle": 'expected an absolute path, found "x"',
        "state on stdin: id": "expected string, found 5",
        "state on stdin: pid": "expected a number not below 0, found -1",
    }


def test_read_state_foreign_annotations_any_type() -> None:
    """Those of others may be anything."""
    annotations: dict[str, object] = {"a": "b", "n": None, "x": 5, "o": {}, "u": "?", oci.DEVICES_ANNOTATION: "auto"}
    data = json.dumps({**STATE, "annotations": annotations}).encode().replace(b"?", b"\xff")
    assert oci.read_state(data).annotations == {"a": "b", "u": "\udcff", oci.DEVICES_ANNOTATION: "auto"}


@pytest.mark.parametrize("name", [oci.DEVICES_ANNOTATION, oci.MAP_ANNOTATION, f"{oci.DEVICES_ANNOTATION}.c1"])
def test_read_state_own_annotation_must_be_string(name: str) -> None:
    with pytest.raises(InputError) as caught:
        oci.read_state(json.dumps({**STATE, "annotations": {name: None}}).encode())
    assert name in caught.value.findings[0].subject


ODD = b'{"process": {"env": [null]}, "annotations": {"x": "%s"}'


@pytest.mark.parametrize(
    ("annotations", "data", "refused"),
    [
        ({}, ODD + b"}", False),
        ({}, ODD + b"", False),
        ({oci.DEVICES_ANNOTATION: "auto"}, ODD + b"}", True),
        ({oci.DEVICES_ANNOTATION: "auto"}, ODD, True),
        ({oci.DEVICES_ANNOTATION: "auto", "io.kubernetes.cri.container-type": "sandbox"}, ODD, False),
        ({}, ODD + b', "y": "vfio"}', False),
        # No reader can name the place of the word in it.
        ({}, ODD + b', "y": "vfio"', True),
        ({}, ODD + b', "annotations": {"io.katacontainers.x.vfio": null}}', True),
        ({}, ODD + b', "linux": {"devices": [{"path": "/dev/vfio/1"}]}}', True),
        ({}, ODD + b', "linux": {"devices": [{"path": "/dev/\\u0076fio/1"}]}}', True),
        ({}, ODD + b', "linux": {"devices": [{"path": "/dev/vfio/vfio"}]}}', False),
    ],
)
def test_read_spec_unreadable_refused_if_it_could_ask(
    tmp_path: Path, annotations: dict[str, str], data: bytes, refused: bool
) -> None:
    write_config(tmp_path, "/b/config.json", data)
    state = oci.make_state({**STATE, "annotations": annotations})
    if refused:
        with pytest.raises(InputError):
            oci.read_spec(Root(str(tmp_path)), state)
    else:
        spec = oci.read_spec(Root(str(tmp_path)), state)
        assert (spec.annotations, spec.devices) == ({}, ())


def test_read_spec_out_of_memory_scans_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(json_input, "parse_json", lack)
    write_config(tmp_path, "/b/config.json", b'{"x": 1}')
    root = Root(str(tmp_path))
    assert not oci.asks_for_vfio(oci.make_state(STATE), oci.read_spec(root, oci.make_state(STATE)))
    (tmp_path / "b/config.json").write_text('{"annotations": {"io.katacontainers.x.vfio": "[]"}}')
    with pytest.raises(InputError, match="does not fit into memory"):
        oci.read_spec(root, oci.make_state(STATE))


def test_read_spec_without_jsonschema_reader_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(InputError) as caught:
        oci.read_state(b'{"id": 5}')
    (finding,) = caught.value.findings
    assert (finding.subject, finding.problem) == ("state on stdin: id", "expected string, found integer")
    assert finding.hint


def test_describe_value_deeply_nested() -> None:
    # The scanner reads a few levels more than json.dumps can write from further down the stack.
    depths = range(900, 1000, 3)
    for depth in depths:
        with pytest.raises(InputError):
            oci.read_state(b'{"bundle": "/b", "id": ' + b"[" * depth + b"]" * depth + b"}")


def test_read_spec_missing_config_names_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        oci.read_spec(Root(str(tmp_path)), oci.make_state(STATE))
    (finding,) = caught.value.findings
    assert finding.code == "bundle-unreadable"
    assert finding.subject == "/b/config.json"
    assert finding.hint


@pytest.mark.parametrize("identity", ["..", ".", "../x", "a/b"])
def test_find_config_kata_1_id_stays_in_directory(tmp_path: Path, identity: str) -> None:
    (tmp_path / "run/libcontainer").mkdir(parents=True)
    location = Path(os.path.normpath(tmp_path / "run/libcontainer" / identity / "config.json"))
    location.parent.mkdir(parents=True, exist_ok=True)
    location.write_text("{}")
    with pytest.raises(InputError):
        oci.read_spec(Root(str(tmp_path)), oci.make_state({**STATE, "id": identity}))


@pytest.mark.parametrize("identity", ["c1", "a b", "\u4e2d"])
def test_find_config_kata_1(tmp_path: Path, identity: str) -> None:
    write_config(tmp_path, f"/run/libcontainer/{identity}/config.json", b"{}")
    spec = oci.read_spec(Root(str(tmp_path)), oci.make_state({**STATE, "id": identity}))
    assert spec.path == f"/run/libcontainer/{identity}/config.json"


def test_find_config_long_id(tmp_path: Path) -> None:
    write_config(tmp_path, "/b/config.json", b"{}")
    assert oci.read_spec(Root(str(tmp_path)), oci.make_state({**STATE, "id": "x" * 5000})).path == "/b/config.json"


def test_read_spec_pipe_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b/config.json")
    with pytest.raises(InputError) as caught:
        oci.read_spec(Root(str(tmp_path)), oci.make_state(STATE))
    assert caught.value.findings[0].problem == "is empty"
