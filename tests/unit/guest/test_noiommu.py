# SPDX-License-Identifier: Apache-2.0
"""What is asked of a container that gets a device without an IOMMU, and in what words it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oci_hooks.findings import Refusal
from oci_hooks.guest.apply.node_paths import NodePath
from oci_hooks.guest.apply.nodes import format_map
from oci_hooks.guest.noiommu import check_noiommu
from oci_hooks.guest.plan import MapEntry, Node
from oci_hooks.oci import Spec, make_spec

pytestmark = pytest.mark.unit

GROUPS = ("noiommu:0000:01:00.0", "noiommu:0000:02:00.0")
ADDRESSES = "0000:01:00.0, 0000:02:00.0"
RAW = ["CAP_SYS_RAWIO"]
ALL = dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), RAW)


def spec(
    uid: int = 0, sets: dict[str, Any] | None = None, sealed: bool = True, namespaces: tuple[str, ...] = ()
) -> Spec:
    """Return a container's config.json."""
    process = {"user": {"uid": uid}, "capabilities": sets or {}, "noNewPrivileges": sealed}
    kinds = [{"type": kind} for kind in namespaces]
    return make_spec({"process": process, "linux": {"namespaces": kinds}}, "config.json")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, ("user 0 of the container does not have", "effective and permitted", "--cap-add SYS_RAWIO")),
        ({"uid": 1000}, ("user 1000 of the container does not have", "inheritable, ambient of process.capabilities")),
        # Without new privileges no program file gives it what is in the bounding set.
        ({"uid": 1000, "sets": {"bounding": RAW}}, ("user 1000 of the container does not have",)),
        ({"uid": 1000, "sealed": False}, ("user 1000 of the container does not have",)),
        ({"sets": ALL, "namespaces": ("user",)}, ("no process in a user namespace has", "without a user namespace")),
    ],
)
def test_noiommu_without_rawio_refused(asked: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(Refusal) as caught:
        check_noiommu(GROUPS, spec(**asked), False)
    line = caught.value.findings[0].as_line()
    assert line.startswith(f"error: [capability-missing] {ADDRESSES}: has no IOMMU")
    assert "CAP_SYS_RAWIO" in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("asked", "codes"),
    [
        ({"sets": ALL}, ["noiommu-group"]),
        ({"uid": 1000, "sets": ALL}, ["noiommu-group"]),
        ({"uid": 1000, "sets": {"bounding": RAW}, "sealed": False}, ["capability-missing", "noiommu-group"]),
    ],
)
def test_noiommu_warnings(asked: dict[str, Any], codes: list[str]) -> None:
    found = check_noiommu(GROUPS, spec(**asked), False)
    assert [(finding.level, finding.code, finding.subject) for finding in found] == [
        ("warning", code, ADDRESSES) for code in codes
    ]
    assert "taints the kernel" in found[-1].problem


def test_noiommu_without_process_not_refused() -> None:
    assert [finding.code for finding in check_noiommu(GROUPS, make_spec({}, ""), False)] == ["noiommu-group"]


def test_groups_with_iommu_ask_for_nothing() -> None:
    assert check_noiommu(("12", "13"), spec(), True) == []


def test_noiommu_cdev_refused_with_fitting_hint() -> None:
    """No option of the kernel brings such a device a node of its own."""
    with pytest.raises(Refusal) as caught:
        check_noiommu(GROUPS, spec(sets=ALL), True)
    line = caught.value.findings[0].as_line()
    assert line.startswith(
        f"error: [no-cdev] {ADDRESSES}: has no device node of iommufd, because it has no IOMMU; remove"
    )
    assert "CONFIG_" not in line


def test_map_names_nodes_of_bound_devices() -> None:
    """A program finds its nodes by the map: the kernel gives them their names when their devices are bound."""
    paths = [
        (Node("control", "", 0o600, 0, 0), NodePath("vfio", "vfio", (10, 196))),
        (Node("group", GROUPS[0], 0o600, 0, 0), NodePath("vfio", "noiommu-5", (511, 5))),
        (Node("group", "12", 0o600, 0, 0), NodePath("vfio", "12", (511, 6))),
        (Node("cdev", "0000:03:00.0", 0o600, 0, 0), NodePath("vfio/devices", "vfio3", (510, 3))),
    ]
    entries = tuple(
        MapEntry(address, "8086", "10d3", group, "", "")
        for address, group in (("0000:01:00.0", GROUPS[0]), ("0000:03:00.0", "12"), ("0000:04:00.0", "13"))
    )
    found = json.loads(format_map(entries, paths))["devices"]
    assert [(each["group"], each["node"], each["device_node"]) for each in found] == [
        ("noiommu-5", "/dev/vfio/noiommu-5", ""),
        ("12", "/dev/vfio/12", "/dev/vfio/devices/vfio3"),
        ("13", "", ""),
    ]
