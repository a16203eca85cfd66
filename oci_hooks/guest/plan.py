# SPDX-License-Identifier: Apache-2.0
"""Plan the steps from the chosen groups, as data: for --dry-run, replay and apply. Pure."""

from __future__ import annotations

from oci_hooks.findings import Refusal
from oci_hooks.frozen import Frozen
from oci_hooks.guest.id_mapping import map_id
from oci_hooks.guest.settings import NodeOwner
from oci_hooks.linux.instances import Instance, make_instance
from oci_hooks.linux.pci import NOIOMMU_GROUP, read_override
from oci_hooks.oci import CDEV_PREFIX, CONTROL_NODE, GROUP_PREFIX, IOMMUFD_NODE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from oci_hooks.guest.selection import ChosenGroup
    from oci_hooks.linux.pci import PciDevice
    from oci_hooks.oci import Device, Spec
    from oci_hooks.system import Root

DRIVER = "vfio-pci"
DEFAULT_MODE = 0o600
MAP_PATH = "/dev/vfio/devices.json"


class Rebind(Frozen):
    """A PCI function to bind to another driver.

    driver: the present one, "" without; override: the present one; instance: the device now at its address.
    """

    tag = "rebind"

    address: str
    driver: str
    override: str
    instance: Instance = Instance()


class Node(Frozen):
    """A device node to create in the container's /dev.

    kind: "control", "group", "iommu" or "cdev"; subject: the VFIO group of a group's node, the BDF of a cdev's, else
    ""; mode: permission bits; uid, gid: outside the container's user namespace.
    """

    tag = "node"

    kind: str
    subject: str
    mode: int
    uid: int
    gid: int

    @property
    def path(self) -> str:
        """Return its path in the container, as far as it is known before the device is bound."""
        if self.kind == "group" and self.subject.startswith(NOIOMMU_GROUP):
            return f"{GROUP_PREFIX}noiommu-? of {self.subject[len(NOIOMMU_GROUP) :]}"
        names = {"control": CONTROL_NODE, "iommu": IOMMUFD_NODE, "group": GROUP_PREFIX + self.subject}
        return names.get(self.kind, f"{CDEV_PREFIX}vfio? of {self.subject}")


class MapEntry(Frozen):
    """A device's entry in /dev/vfio/devices.json: its original driver, its BDF on the host ("" if unknown)."""

    tag = "map-entry"

    address: str
    vendor: str
    device: str
    group: str
    driver_before: str
    host_address: str


class Plan(Frozen):
    """The plan for one container.

    groups: names, in order; rebinds, nodes: in order; stale: nodes with the host's numbers that the runtime created
    from linux.devices; user_namespace: the container has one, so nodes must be mounted, not created; map: for
    /dev/vfio/devices.json, empty if that is disabled.
    """

    tag = "plan"

    groups: tuple[str, ...]
    rebinds: tuple[Rebind, ...]
    nodes: tuple[Node, ...]
    stale: tuple[Device, ...]
    user_namespace: bool
    map: tuple[MapEntry, ...]


class PlanOptions(Frozen):
    """Options for nodes, from settings and annotation."""

    owner: NodeOwner = NodeOwner()
    wants_cdev: bool = False
    writes_map: bool = True


def make_plan(root: Root, choices: tuple[ChosenGroup, ...], spec: Spec, options: PlanOptions) -> Plan:
    """Return the plan for the groups that a container gets. Raises Refusal if a device goes away meanwhile."""
    devices = [device for chosen in choices for device in chosen.group.endpoints]
    rebinds = [make_rebind(root, device) for device in devices if not device.owned_by_vfio]
    entries = {entry.path: entry for entry in spec.devices}
    nodes = [plan_node("control", "", entries.get(CONTROL_NODE), spec, options)]
    nodes += [plan_node("group", chosen.group.name, chosen.entry, spec, options) for chosen in choices]
    cdev_entries = {address: entry for chosen in choices for address, entry in chosen.cdev_entries.items()}
    if options.wants_cdev or cdev_entries:
        nodes.append(plan_node("iommu", "", entries.get(IOMMUFD_NODE), spec, options))
        nodes += [
            plan_node("cdev", device.address, cdev_entries.get(device.address), spec, options) for device in devices
        ]
    paths = {node.path for node in nodes}
    right = set(cdev_entries.values())
    stale = tuple(entry for entry in spec.vfio_devices if entry.path not in paths and entry not in right)
    groups = tuple(chosen.group.name for chosen in choices)
    known = tuple(make_map_entries(choices)) if options.writes_map else ()
    return Plan(groups, tuple(rebinds), tuple(nodes), stale, "user" in spec.namespaces, known)


def make_rebind(root: Root, device: PciDevice) -> Rebind:
    """Return a function's binding step, with its present driver and override. Raises Refusal [device-gone]."""
    try:
        override = read_override(root, device.address)
    except OSError as error:
        problem = f"was unplugged while the hook read its state ({error.strerror})"
        raise Refusal("device-gone", device.address, problem, "start the container again") from None
    return Rebind(device.address, device.driver, override, make_instance(device))


def make_map_entries(choices: tuple[ChosenGroup, ...]) -> Iterator[MapEntry]:
    """Yield each device's entry in the map."""
    for chosen in choices:
        for device in chosen.group.endpoints:
            driver = chosen.drivers_before.get(device.address, device.driver)
            host = chosen.host_addresses.get(device.address, "")
            yield MapEntry(device.address, device.vendor, device.device, chosen.group.name, driver, host)


def plan_node(kind: str, subject: str, entry: Device | None, spec: Spec, options: PlanOptions) -> Node:
    """Return a node with owner and mode of its linux.devices entry, else guest.toml's, else the container's user."""
    owner = options.owner
    mode = first_given(entry.mode if entry else -1, owner.mode, DEFAULT_MODE) & 0o777
    uid = first_given(entry.uid if entry else -1, owner.uid, spec.uid)
    gid = first_given(entry.gid if entry else -1, owner.gid, spec.gid)
    return Node(kind, subject, mode, map_id(uid, spec.uid_mappings), map_id(gid, spec.gid_mappings))


def first_given(*values: int) -> int:
    """Return the first value other than -1, which means "not given"."""
    return next(value for value in values if value != -1)


def list_actions(plan: Plan) -> list[tuple[str, str, str]]:
    """Return the plan as (action, object, details), in the order in which it is carried out."""
    actions = [("load", DRIVER, "unless it is loaded")]
    for rebind in plan.rebinds:
        actions.append(("override", rebind.address, f"{DRIVER} (was {rebind.override or 'unset'})"))
        if rebind.driver:
            actions.append(("unbind", rebind.address, f"from {rebind.driver}"))
        actions.append(("probe", rebind.address, DRIVER))
    for entry in plan.stale:
        actions.append(("remove", entry.path, f"node with the host's device number {entry.major}:{entry.minor}"))
    how = "mount" if plan.user_namespace else "create"
    for node in plan.nodes:
        actions.append((how, node.path, f"{node.mode:04o} {node.uid}:{node.gid}"))
    if plan.map:
        actions.append(("write", MAP_PATH, f"{len(plan.map)} device{'s' if len(plan.map) != 1 else ''}"))
    actions += [("allow", node.path, "rw, unless it is allowed already") for node in plan.nodes]
    return actions
