# SPDX-License-Identifier: Apache-2.0
"""Plans: what is bound, which nodes are made for whom, what is taken away, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oci_hooks.findings import Refusal
from oci_hooks.guest.plan import MapEntry, Plan, PlanOptions, Rebind, list_actions, make_plan
from oci_hooks.guest.selection import ChosenGroup
from oci_hooks.guest.settings import NodeOwner
from oci_hooks.linux.instances import Instance
from oci_hooks.linux.pci import PCI_DEVICES
from oci_hooks.oci import Spec, make_spec
from tests.support.fake_guest import NIC, Machine

pytestmark = pytest.mark.unit

OTHER = "0000:01:00.1"


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Machine:
    """Return a machine with a group of two cards and a bridge."""
    machine = Machine(tmp_path)
    machine.add(NIC, driver="e1000e", group="4")
    machine.add(OTHER, group="4")
    machine.add("0000:00:02.0", "1b36:000c", "060400", "pcieport", group="4")
    return machine


def spec(entries: list[dict[str, Any]] | None = None, user: tuple[int, int] = (0, 0), **linux: Any) -> Spec:
    """Return a config.json."""
    process = {"user": {"uid": user[0], "gid": user[1]}}
    return make_spec({"process": process, "linux": {"devices": entries or [], **linux}}, "config.json")


def entry(path: str, major: int, minor: int, **more: Any) -> dict[str, Any]:
    """Return one entry of linux.devices."""
    return {"path": path, "type": "c", "major": major, "minor": minor, **more}


def plan(machine: Machine, config: Spec, options: PlanOptions | None = None, **choice: Any) -> Plan:
    """Return the plan for group 4."""
    chosen = ChosenGroup(machine.look().groups["4"], **choice)
    return make_plan(machine.root, (chosen,), config, options or PlanOptions())


def test_make_plan_rebinds_every_endpoint(machine: Machine) -> None:
    machine.write(f"{PCI_DEVICES}/{OTHER}/driver_override", "igb\n")
    ids = Instance(0, "8086", "10d3", "020000")
    assert plan(machine, spec()).rebinds == (Rebind(NIC, "e1000e", "", ids), Rebind(OTHER, "", "igb", ids))


@pytest.mark.parametrize("driver", ["vfio-pci", "mlx5_vfio_pci"])
def test_make_plan_vfio_bound_device_kept(machine: Machine, driver: str) -> None:
    machine.add("0000:02:00.0", driver=driver, group="5")
    machine.place(f"{PCI_DEVICES}/0000:02:00.0/vfio-dev").mkdir()
    chosen = ChosenGroup(machine.look().groups["5"])
    made = make_plan(machine.root, (chosen,), spec(), PlanOptions())
    assert made.rebinds == ()
    assert [node.path for node in made.nodes] == ["/dev/vfio/vfio", "/dev/vfio/5"]


def test_make_plan_unplugged_device_refused(machine: Machine) -> None:
    inventory = machine.look()
    machine.place(f"{PCI_DEVICES}/{OTHER}").unlink()
    with pytest.raises(Refusal) as caught:
        make_plan(machine.root, (ChosenGroup(inventory.groups["4"]),), spec(), PlanOptions())
    assert (caught.value.findings[0].code, caught.value.findings[0].subject) == ("device-gone", OTHER)


MAPPINGS = {
    "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
    "gidMappings": [{"containerID": 0, "hostID": 200000, "size": 65536}],
}


@pytest.mark.parametrize(
    ("of_entry", "of_settings", "linux", "wanted"),
    [
        ({}, NodeOwner(), {}, (0o600, 1, 2)),
        ({"fileMode": 0o20666, "uid": 5, "gid": 6}, NodeOwner(0o640, 7, 8), {}, (0o666, 5, 6)),
        ({}, NodeOwner(0o640, 7, 8), {}, (0o640, 7, 8)),
        ({"uid": 5}, NodeOwner(gid=8), {}, (0o600, 5, 8)),
        ({"fileMode": 0, "uid": 0, "gid": 0}, NodeOwner(0o640, 7, 8), {}, (0, 0, 0)),
        ({}, NodeOwner(), MAPPINGS, (0o600, 100001, 200002)),
        ({"uid": 70000, "gid": 0}, NodeOwner(), MAPPINGS, (0o600, -1, 200000)),
    ],
)
def test_plan_node_owner_precedence(
    machine: Machine, of_entry: dict[str, int], of_settings: NodeOwner, linux: dict[str, Any], wanted: tuple[int, ...]
) -> None:
    config = spec([entry("/dev/vfio/12", 244, 3, **of_entry)], (1, 2), **linux)
    made = plan(machine, config, PlanOptions(of_settings), entry=config.devices[0])
    (group,) = [node for node in made.nodes if node.kind == "group"]
    assert (group.path, (group.mode, group.uid, group.gid)) == ("/dev/vfio/4", wanted)


def test_make_plan_stale_nodes(machine: Machine) -> None:
    entries = [
        entry("/dev/vfio/vfio", 10, 196, fileMode=0o666),
        entry("/dev/vfio/12", 244, 3),
        entry("/dev/vfio/4", 244, 9),
        entry("/dev/vfio/devices/vfio7", 240, 7),
        entry("/dev/fuse", 10, 229),
    ]
    made = plan(machine, spec(entries))
    assert [device.path for device in made.stale] == ["/dev/vfio/12", "/dev/vfio/devices/vfio7"]
    assert made.nodes[0].mode == 0o666


def test_make_plan_cdev_nodes_on_request(machine: Machine) -> None:
    made = plan(machine, spec(), PlanOptions(wants_cdev=True))
    assert [(node.kind, node.subject) for node in made.nodes] == [
        ("control", ""),
        ("group", "4"),
        ("iommu", ""),
        ("cdev", NIC),
        ("cdev", OTHER),
    ]


def test_make_plan_listed_cdev_kept(machine: Machine) -> None:
    """The entry with this guest's numbers is no stale node, and gives its node's owner."""
    config = spec([entry("/dev/vfio/devices/vfio1", 243, 1, uid=5), entry("/dev/vfio/devices/vfio7", 240, 7)])
    made = plan(machine, config, cdev_entries={NIC: config.devices[0]})
    assert [device.path for device in made.stale] == ["/dev/vfio/devices/vfio7"]
    assert [(node.kind, node.subject) for node in made.nodes][2:] == [("iommu", ""), ("cdev", NIC), ("cdev", OTHER)]
    assert [node.uid for node in made.nodes if node.subject == NIC] == [5]


def test_make_plan_map_entries(machine: Machine) -> None:
    made = plan(machine, spec(), host_addresses={NIC: "0000:3b:00.0"}, drivers_before={OTHER: "igb"})
    assert made.map == (
        MapEntry(NIC, "8086", "10d3", "4", "e1000e", "0000:3b:00.0"),
        MapEntry(OTHER, "8086", "10d3", "4", "igb", ""),
    )
    assert plan(machine, spec(), PlanOptions(writes_map=False)).map == ()


@pytest.mark.parametrize(("namespaces", "how"), [([], "create"), ([{"type": "pid"}, {"type": "user"}], "mount")])
def test_list_actions_match_applied_steps(machine: Machine, namespaces: list[Any], how: str) -> None:
    made = plan(machine, spec([entry("/dev/vfio/12", 244, 3)], namespaces=namespaces))
    assert made.user_namespace == (how == "mount")
    assert list_actions(made) == [
        ("load", "vfio-pci", "unless it is loaded"),
        ("override", NIC, "vfio-pci (was unset)"),
        ("unbind", NIC, "from e1000e"),
        ("probe", NIC, "vfio-pci"),
        ("override", OTHER, "vfio-pci (was unset)"),
        ("probe", OTHER, "vfio-pci"),
        ("remove", "/dev/vfio/12", "node with the host's device number 244:3"),
        (how, "/dev/vfio/vfio", "0600 0:0"),
        (how, "/dev/vfio/4", "0600 0:0"),
        ("write", "/dev/vfio/devices.json", "2 devices"),
        ("allow", "/dev/vfio/vfio", "rw, unless it is allowed already"),
        ("allow", "/dev/vfio/4", "rw, unless it is allowed already"),
    ]
