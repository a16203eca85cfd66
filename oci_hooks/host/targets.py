# SPDX-License-Identifier: Apache-2.0
"""Match the entries of a container's linux.devices to VFIO groups and devices of this host."""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.linux.pci import (
    Inventory,
    list_live_groups,
)
from oci_hooks.linux.vfio import list_cdevs, read_cdev_group, read_group
from oci_hooks.oci import CDEV_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.linux.vfio import VfioGroup
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


def find_targets(root: Root, inventory: Inventory, entries: tuple[Device, ...]) -> tuple[Target, ...]:
    """Return each entry of linux.devices with its group or device on this host."""
    groups = list_live_groups(root)
    cdevs = list_cdevs(root)
    return tuple(find_target(root, inventory, entry, groups, cdevs) for entry in entries)


def find_target(
    root: Root,
    inventory: Inventory,
    entry: Device,
    groups: dict[tuple[int, int], str],
    cdevs: dict[tuple[int, int], str],
) -> Target:
    """Return one entry's target. groups, cdevs: the current VFIO nodes, by major and minor."""
    number = (entry.major, entry.minor)
    name = entry.path.rpartition("/")[2]
    if number in groups:
        return Target(entry, read_group(root, inventory, groups[number]), "", "numbers")
    if number in cdevs:
        return Target(entry, read_cdev_group(root, inventory, cdevs[number]), cdevs[number], "numbers")
    taken_by = root.read_link_name(f"/sys/dev/char/{entry.major}:{entry.minor}")
    if entry.path.startswith(CDEV_PREFIX):
        found = name in cdevs.values()
        group = read_cdev_group(root, inventory, name) if found else None
        return Target(entry, group, name, "name" if found else "", taken_by)
    group = read_group(root, inventory, name)
    if group.number is None and not group.iommu_group:
        return Target(entry, None, "", "", taken_by)
    return Target(entry, group, "", "name", taken_by)
