# SPDX-License-Identifier: Apache-2.0
"""Resolve where a group's or device's node belongs in a container's /dev, and its device number."""

from __future__ import annotations

from oci_hooks.findings import StepError
from oci_hooks.frozen import Frozen
from oci_hooks.linux import pci
from oci_hooks.oci import IOMMUFD_NODE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.plan import Node
    from oci_hooks.system import Root

# vfio registers its control device with this fixed minor (kernel: include/linux/miscdevice.h, VFIO_MINOR).
CONTROL_NUMBERS = (10, 196)


class NodePath(Frozen):
    """The place of a node in /dev. directory: below /dev, "" for /dev itself; numbers: major and minor."""

    tag = "place"

    directory: str
    name: str
    numbers: tuple[int, int]

    @property
    def path(self) -> str:
        """Return the path below /dev."""
        return f"{self.directory}/{self.name}".lstrip("/")


def resolve_node(root: Root, node: Node) -> NodePath:
    """Return the place of a node, once its device is bound. Raises StepError if the kernel has no such device."""
    if node.kind == "control":
        return NodePath("vfio", "vfio", CONTROL_NUMBERS)
    if node.kind == "group":
        return resolve_group_node(root, node.subject)
    if node.kind == "iommu":
        return NodePath("", "iommu", read_cdev_numbers(root, "/sys/class/misc/iommu", IOMMUFD_NODE))
    names = root.list_names(f"{pci.PCI_DEVICES}/{node.subject}/vfio-dev")
    name = names[0] if names else "vfio?"
    return NodePath(
        "vfio/devices",
        name,
        read_cdev_numbers(root, f"/sys/class/vfio-dev/{name}", f"VFIO device node of {node.subject}"),
    )


def resolve_group_node(root: Root, group: str) -> NodePath:
    """Return the place of a group's node. Raises StepError if VFIO has no such group.

    When VFIO's no-IOMMU mode binds a device, it gives it a group, named vfio-noiommu, and names the node noiommu-N.
    """
    name = group
    if group.startswith(pci.NOIOMMU_GROUP):
        address = group[len(pci.NOIOMMU_GROUP) :]
        name = root.read_link_name(f"{pci.PCI_DEVICES}/{address}/iommu_group") or group
    if pci.is_noiommu_group(root, name):
        name = pci.NOIOMMU_PREFIX + name
    numbers = pci.read_group_number(root, name)
    if numbers is None and name.isdigit() and not root.exists(f"{pci.IOMMU_GROUPS}/{name}"):
        problem = "its devices were unplugged while they were being bound"
        raise StepError("device-gone", f"group {group}", problem, "start the container again")
    if numbers is None:
        problem = "VFIO created no device node for this group"
        hint = "see dmesg; check that the kernel was built with CONFIG_VFIO_GROUP"
        raise StepError("no-group-node", f"group {group}", problem, hint)
    return NodePath("vfio", name, numbers)


def read_cdev_numbers(root: Root, path: str, subject: str) -> tuple[int, int]:
    """Return major and minor of a device in sysfs. Raises StepError [no-cdev]."""
    numbers = pci.read_numbers(root, path)
    if numbers is None:
        problem = "the kernel does not provide this device node of iommufd"
        hint = (
            "use Linux 6.6 or later with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV, or remove cdev from the annotation"
        )
        raise StepError("no-cdev", subject, problem, hint)
    return numbers
