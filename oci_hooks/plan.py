# SPDX-License-Identifier: Apache-2.0
"""From groups to what has to be done, as data: printed by --dry-run, compared by replay, carried out by apply. Pure."""

from __future__ import annotations

from oci_hooks.oci import CONTROL_NODE, GROUP_PREFIX, map_id
from oci_hooks.records import Record
from oci_hooks.sysfs import read_override

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.files import Root
    from oci_hooks.oci import Device, Spec, State
    from oci_hooks.selection import Choice

DRIVER = "vfio-pci"
DEFAULT_MODE = 0o600
# vfio registers its control device with this fixed minor (kernel: include/linux/miscdevice.h, VFIO_MINOR).
CONTROL_NUMBERS = (10, 196)


class Rebind(Record):
    """A PCI function to bind to another driver. driver: the one before, "" without; override: the one before."""

    address: str
    driver: str
    override: str


class Node(Record):
    """A device node to make in the container's /dev/vfio. group: the VFIO group it is for, "" for the control node;
    mode: permission bits; uid, gid: outside the container's user namespace."""

    name: str
    group: str
    mode: int
    uid: int
    gid: int


class Plan(Record):
    """What has to be done for one container.

    groups: names, in order; rebinds, nodes: in order; stale: nodes with the host's numbers that the runtime made from
    linux.devices; user_namespace: the container has one, so that nodes must be bind mounts.
    """

    groups: tuple[str, ...]
    rebinds: tuple[Rebind, ...]
    nodes: tuple[Node, ...]
    stale: tuple[Device, ...]
    user_namespace: bool


class NodeOwner(Record):
    """Owner and mode that guest.toml sets for nodes; -1 where it does not."""

    mode: int = -1
    uid: int = -1
    gid: int = -1


def make_plan(root: Root, choices: tuple[Choice, ...], state: State, spec: Spec, owner: NodeOwner) -> Plan:
    """Return the plan for the groups that a container gets. Raises OSError where a device goes away meanwhile."""
    devices = [device for choice in choices for device in choice.group.endpoints]
    rebinds = [
        Rebind(device.address, device.driver, read_override(root, device.address))
        for device in devices
        if not device.owned_by_vfio
    ]
    control = next((entry for entry in spec.devices if entry.path == CONTROL_NODE), None)
    nodes = [make_node("vfio", "", control, spec, owner)]
    nodes += [make_node(choice.group.name, choice.group.name, choice.entry, spec, owner) for choice in choices]
    names = {GROUP_PREFIX + choice.group.name for choice in choices}
    stale = tuple(entry for entry in spec.vfio_devices if entry.is_group and entry.path not in names)
    groups = tuple(choice.group.name for choice in choices)
    return Plan(groups, tuple(rebinds), tuple(nodes), stale, "user" in spec.namespaces)


def make_node(name: str, group: str, entry: Device | None, spec: Spec, owner: NodeOwner) -> Node:
    """Return a node with owner and mode of its linux.devices entry, else guest.toml's, else the container's user."""
    mode = pick(entry.mode if entry else -1, owner.mode, DEFAULT_MODE) & 0o777
    uid = pick(entry.uid if entry else -1, owner.uid, spec.uid)
    gid = pick(entry.gid if entry else -1, owner.gid, spec.gid)
    return Node(name, group, mode, map_id(uid, spec.uid_mappings), map_id(gid, spec.gid_mappings))


def pick(*values: int) -> int:
    """Return the first value that is given, which -1 is not."""
    return next(value for value in values if value != -1)


def list_actions(plan: Plan) -> list[tuple[str, str, str]]:
    """Return the plan as (what, on what, how), in the order in which it is carried out."""
    actions = [("load", DRIVER, "unless it is there")]
    for rebind in plan.rebinds:
        actions.append(("override", rebind.address, f"{DRIVER} (was {rebind.override or 'unset'})"))
        if rebind.driver:
            actions.append(("unbind", rebind.address, f"from {rebind.driver}"))
        actions.append(("probe", rebind.address, DRIVER))
    for entry in plan.stale:
        actions.append(("remove", entry.path, f"the host's, {entry.major}:{entry.minor}"))
    how = "bind mount" if plan.user_namespace else "make"
    for node in plan.nodes:
        actions.append((how, GROUP_PREFIX + node.name, f"{node.mode:04o} {node.uid}:{node.gid}"))
    actions += [("permit", GROUP_PREFIX + node.name, "rw") for node in plan.nodes]
    return actions
