# SPDX-License-Identifier: Apache-2.0
"""A container's request: the annotation's selectors, the predecessor's map, linux.devices and hints."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks import oci
from oci_hooks.findings import EXIT_BAD_INPUT, InputError
from oci_hooks.guest.request import Request, Selector, is_pods_request, parse_map, parse_selector, read_request
from oci_hooks.linux.pci import normalize_address

pytestmark = pytest.mark.unit


def ask(document: dict[str, Any], **annotations: str) -> Request | None:
    """Return what a container with this config.json and these annotations in its state asks for."""
    names = {"devices": oci.DEVICES_ANNOTATION, "map": oci.MAP_ANNOTATION}
    state = oci.State("c1", "/b", 7, "", {names.get(key, key): value for key, value in annotations.items()})
    return read_request(state, oci.make_spec(document, "config.json"))


def group_entry(number: int = 12) -> dict[str, Any]:
    """Return one VFIO group in linux.devices."""
    return {"path": f"/dev/vfio/{number}", "type": "c", "major": 244, "minor": number}


SELECTORS = [
    ("0000:02:00.0", "address", "0000:02:00.0"),
    ("02:00.0", "address", "0000:02:00.0"),
    ("ABCD:EF:1F.7", "address", "abcd:ef:1f.7"),
    ("10000:e1:00.0", "address", "10000:e1:00.0"),
    # nvidia-smi writes eight digits; sysfs has four, or as many as it takes.
    ("00000000:3B:00.0", "address", "0000:3b:00.0"),
    ("00010000:e1:00.0", "address", "10000:e1:00.0"),
    ("id:8086:10D3", "id", "8086:10d3"),
    ("id: 8086:10d3", "id", "8086:10d3"),
    ("class:02", "class", "02"),
    ("class:0200", "class", "0200"),
    ("class:02000A", "class", "02000a"),
    ("path:02/00", "path", "02.0/00.0"),
    ("path:2", "path", "02.0"),
    ("path:02/1f/00.7", "path", "02.0/1f.0/00.7"),
    ("path:0001:02/00", "path", "0001:02.0/00.0"),
    ("path:0001:80:02.0/00.0", "path", "0001:80:02.0/00.0"),
    ("path:02/03/04/05/06/07", "path", "02.0/03.0/04.0/05.0/06.0/07.0"),
    ("auto", "auto", "auto"),
]
NO_SELECTORS = (
    ["", "x", "auto:", "AUTO!", "all", "0000:02:00", "0000:02:00.8", "0000:02:20.0", "0000:2:00.0", "00:02:00.0"]
    + ["0000:02:00.00", "0000:02:00.", "g000:02:00.0", "123456789:02:00.0", "0000:02:00.0 x", "0000:\u0662\u0662:00.0"]
    + ["id:8086", "id:8086:10d", "id:8086:10d3:1", "id:80860:10d3", "id:", "class:", "class:2", "class:020", "class:0z"]
    + ["class:02000000", "path:", "path:/", "path:02/", "path:/02", "path:20", "path:02/00.8", "path:002", "path:xx"]
    + ["path:01:02/00", "path:0000:0:02/00", "path:0000:00:01:02/00", "path:00000:02", "path:02//00", "vendor:8086"]
    + ["path:../..", "0000:02:00.0\n0000:03:00.0", "\0", "\ud800"]
)


@pytest.mark.parametrize(("word", "kind", "value"), SELECTORS, ids=repr)
def test_parse_selector(word: str, kind: str, value: str) -> None:
    assert parse_selector(word, "annotation") == Selector(kind, value)


@pytest.mark.parametrize("word", NO_SELECTORS, ids=repr)
def test_parse_selector_invalid_refused(word: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_selector(word, "annotation x")
    (finding,) = caught.value.findings
    assert (caught.value.exit_code, finding.code, finding.subject) == (EXIT_BAD_INPUT, "bad-annotation", "annotation x")
    assert repr(word)[:20] in finding.problem
    assert "0000:02:00.0" in finding.hint


@pytest.mark.parametrize(("word", "kind", "value"), SELECTORS, ids=repr)
def test_parse_selector_round_trip(word: str, kind: str, value: str) -> None:
    selector = parse_selector(word, "annotation")
    assert parse_selector(str(selector), "annotation") == selector


@given(st.text(st.sampled_from("0123456789abcdefABCDEFG:./xipathcls, \n\0\u0661"), max_size=20))
def test_parse_selector_any_word(word: str) -> None:
    try:
        selector = parse_selector(word, "annotation")
    except InputError:
        return
    assert parse_selector(str(selector), "annotation") == selector


def test_read_request_annotation_list() -> None:
    request = ask({"linux": {"devices": [group_entry()]}}, devices=" 02:00.0 ,id:8086:10d3, cdev,auto")
    assert request is not None
    assert [str(selector) for selector in request.selectors] == ["0000:02:00.0", "id:8086:10d3", "auto"]
    assert request.wants_cdev
    assert oci.DEVICES_ANNOTATION in request.source
    # They still determine owner and mode of the nodes.
    assert [entry.path for entry in request.entries] == ["/dev/vfio/12"]


def test_read_request_deduplicates() -> None:
    """Each `auto` is a look at every device in use: a tenant could ask for thirteen thousand of them."""
    request = ask({"linux": {"devices": [group_entry()] * 3}}, devices="auto,02:00.0,auto,0000:02:00.0,auto")
    assert request is not None
    assert [str(selector) for selector in request.selectors] == ["auto", "0000:02:00.0"]
    assert [entry.path for entry in request.entries] == ["/dev/vfio/12"]
    listed = ask({"linux": {"devices": [group_entry()] * 3}})
    assert listed is not None
    assert [entry.path for entry in listed.entries] == ["/dev/vfio/12"]


@pytest.mark.parametrize("text", ["", " ", ",", "cdev", "auto,", "auto,,auto", "auto cdev"])
def test_read_request_empty_annotation_refused(text: str) -> None:
    with pytest.raises(InputError):
        ask({}, devices=text)


def test_read_request_none() -> None:
    assert ask({}) is None
    assert (
        ask({"linux": {"devices": [{"path": "/dev/vfio/vfio", "type": "c"}, {"path": "/dev/sda", "type": "b"}]}})
        is None
    )
    assert ask({"process": {"env": ["PCIDEVICE_A=0000:02:00.0"]}}) is None


def test_read_request_own_annotation_before_pods() -> None:
    own, name = f"{oci.DEVICES_ANNOTATION}.web", oci.CONTAINER_NAME_ANNOTATIONS[0]
    named = {own: "id:8086:10d3", name: "web"}
    for more in ({}, {"devices": "auto"}, {"devices": "auto", "map": "no map"}):
        if more.get("map"):
            more["map"] = json.dumps([{"devices": [DEVICE]}])
        request = ask({"linux": {"devices": [group_entry()]}}, **named, **more)
        assert request is not None
        assert (request.source, request.selectors) == (f"annotation {own}", (Selector("id", "8086:10d3"),))
    other = ask({}, devices="auto", **{own: "id:8086:10d3", name: "sidecar"})
    assert other is not None
    assert other.source == f"annotation {oci.DEVICES_ANNOTATION}"
    listed = ask({"linux": {"devices": [group_entry()]}}, **{own: "auto", name: "sidecar"})
    assert listed is not None
    assert listed.source == "linux.devices"
    for text, problem in (("", "invalid device selector ''"), ("auto," * 20000, "is longer than")):
        with pytest.raises(InputError, match=f"annotation {own}: {problem}"):
            ask({}, devices="auto", **{own: text, name: "web"})


@pytest.mark.parametrize(
    ("annotations", "pods"),
    [
        ({oci.DEVICES_ANNOTATION: "auto", oci.CONTAINER_NAME_ANNOTATIONS[1]: "web"}, True),
        ({oci.DEVICES_ANNOTATION: "auto", oci.CONTAINER_NAME_ANNOTATIONS[1]: ""}, False),
        ({oci.DEVICES_ANNOTATION: "auto"}, False),
        ({f"{oci.DEVICES_ANNOTATION}.web": "auto", oci.CONTAINER_NAME_ANNOTATIONS[0]: "web"}, False),
        ({oci.CONTAINER_NAME_ANNOTATIONS[0]: "web"}, False),
    ],
    ids=repr,
)
def test_is_pods_request(annotations: dict[str, str], pods: bool) -> None:
    state = oci.State("c1", "/b", 7, "", {})
    assert is_pods_request(state, oci.make_spec({"annotations": annotations}, "config.json")) == pods


@pytest.mark.parametrize(("name", "value"), oci.SANDBOX_ANNOTATIONS.items())
def test_read_request_sandbox_none(name: str, value: str) -> None:
    assert ask({"linux": {"devices": [group_entry()]}}, devices="auto", **{name: value}) is None


# The predecessor's map -----------------------------------------------------------------------------------------------

DEVICE = {"host-address": "0000:3b:00.0", "guest-path": {"Path": ["02.0", "00.0"]}}
WANTED = Selector("path", "02.0/00.0", "0000:3b:00.0")


@pytest.mark.parametrize(
    "path",
    [{"Path": ["02.0", "00.0"]}, {"path": ["02", "0"]}, {"PATH": "02/00"}, ["02.0", "00.0"], "02/00", "02.0/00.0"],
    ids=repr,
)
def test_parse_map_path_forms(path: object) -> None:
    text = json.dumps([{"host-group": 12, "devices": [{**DEVICE, "guest-path": path}]}])
    assert parse_map(text) == (WANTED,)


def test_read_request_map() -> None:
    other = {"guest-path": "03/00"}
    text = json.dumps([{"host-group": "12", "devices": [DEVICE]}, {"devices": [other], "new": 1}])
    request = ask({"linux": {"devices": [group_entry()]}}, map=text)
    assert request is not None
    assert request.selectors == (WANTED, Selector("path", "03.0/00.0"))
    assert oci.MAP_ANNOTATION in request.source


def test_read_request_map_adds_host_addresses() -> None:
    request = ask({}, devices="path:02/00,path:03/00,auto", map=json.dumps([{"devices": [DEVICE]}]))
    assert request is not None
    assert request.selectors == (WANTED, Selector("path", "03.0/00.0"), Selector("auto", "auto"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "is empty"),
        ("{", "line 1"),
        ("{}", "top level: expected array, found object"),
        ("[1]", "[0]: expected object, found integer"),
        ("[{}]", "[0].devices: expected array, found null"),
        ('[{"devices": [[]]}]', "[0].devices[0]: expected object, found array"),
        ('[{"devices": [{}]}]', "[0].devices[0].guest-path: expected a path"),
        ('[{"devices": [{"guest-path": "zz"}]}]', "[0].devices[0].guest-path: expected a path"),
        ('[{"devices": [{"guest-path": {"Path": [2, {}]}}]}]', "[0].devices[0].guest-path: expected a path"),
        ('[{"devices": [{"guest-path": "02", "host-address": 5}]}]', "host-address: expected string, found integer"),
        ("[]", "names no device"),
        ('[{"devices": []}]', "names no device"),
        ("[" * 5000, "nested too deeply"),
        ("\ud800", "is not JSON"),
    ],
    ids=repr,
)
def test_parse_map_invalid_names_path(text: str, where: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_map(text)
    (finding,) = caught.value.findings
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert oci.MAP_ANNOTATION in finding.subject
    assert where in f"{finding.subject}: {finding.problem}"
    assert finding.hint


# Hints ---------------------------------------------------------------------------------------------------------------


def test_read_hints_from_device_plugin() -> None:
    environment = [
        "PCIDEVICE_INTEL_COM_NIC=0000:02:00.0,3B:00.1",
        "PCIDEVICE_OTHER=0000:02:00.0",
        'PCIDEVICE_OTHER_INFO={"0000:04:00.0": {}}',
        "XPCIDEVICE_A=0000:05:00.0",
        "PCIDEVICE_BAD=x,,0000:06:00.9",
        "PCIDEVICE_",
    ]
    request = ask({"linux": {"devices": [group_entry()]}, "process": {"env": environment}})
    assert request is not None
    assert request.hints == ("0000:02:00.0", "0000:3b:00.1")
    assert (request.source, request.selectors) == ("linux.devices", ())


@given(st.text(max_size=24))
def test_normalize_address_unchanged(text: str) -> None:
    address = normalize_address(text)
    assert normalize_address(address) == address
