# SPDX-License-Identifier: Apache-2.0
"""Match the entries of a container's linux.devices to VFIO groups and devices of this host."""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.linux.pci import DeviceReader, read_numbers
from oci_hooks.linux.vfio import CDEV_CLASS, find_node_owner, read_cdev_group, read_group
from oci_hooks.oci import CDEV_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.linux.vfio import Devices, VfioGroup
    from oci_hooks.oci import Device
    from oci_hooks.system import Root


class Target(Frozen):
    """An entry of linux.devices with its group or device on this host.

    entry: the entry; group: the matching group, None if there is none; cdev: name of the VFIO device's own node
    ("vfio0"), "" for a group's node; found_by: "numbers", "name" (the numbers belong to no VFIO device), or "".
    taken_by: the sysfs name of another device that has the entry's numbers, "" without one.
    """

    entry: Device
    group: VfioGroup | None
    cdev: str = ""
    found_by: str = ""
    taken_by: str = ""

    @property
    def name(self) -> str:
        """Last component of the entry's path."""
        return self.entry.path.rpartition("/")[2]

    @property
    def subject(self) -> str:
        """The entry's name in findings."""
        return f"group {self.group.name}" if self.group else self.entry.path


def find_targets(root: Root, entries: tuple[Device, ...]) -> tuple[Target, ...]:
    """Return each entry of linux.devices with its group or device on this host."""
    devices = DeviceReader(root)
    return tuple(find_target(root, devices, entry) for entry in entries)


def find_target(root: Root, devices: Devices, entry: Device) -> Target:
    """Return one entry's target."""
    name = entry.path.rpartition("/")[2]
    kind, owner = find_node_owner(root, (entry.major, entry.minor))
    if kind == "vfio":
        return Target(entry, read_group(root, devices, owner), "", "numbers")
    if kind == "vfio-dev":
        return Target(entry, read_cdev_group(root, devices, owner), owner, "numbers")
    if entry.path.startswith(CDEV_PREFIX):
        found = read_numbers(root, f"{CDEV_CLASS}/{name}") is not None
        group = read_cdev_group(root, devices, name) if found else None
        return Target(entry, group, name, "name" if found else "", owner)
    group = read_group(root, devices, name)
    if group.number is None and not group.iommu_group:
        return Target(entry, None, "", "", owner)
    return Target(entry, group, "", "name", owner)
