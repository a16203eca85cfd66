# SPDX-License-Identifier: Apache-2.0
"""Read VFIO groups: their members on every bus, and the drivers of these.

Device numbers decide which group an entry means, as they do in runc, crun and Kata (virtcontainers config.GetHostPath
looks up /sys/dev/char/M:m); the path is only the node's name in the container. Sources: the kernel's
Documentation/driver-api/vfio.rst, ABI/testing/sysfs-kernel-iommu_groups and sysfs-devices-vfio-dev.
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.linux.pci import (
    IOMMU_GROUPS,
    NOIOMMU_PREFIX,
    PCI_DRIVERS,
    VFIO_CLASS,
    is_noiommu_group,
    is_viable_member,
    read_group_number,
    read_numbers,
)
from oci_hooks.oci import GROUP_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Union

    from oci_hooks.linux.pci import DeviceReader, PciDevice
    from oci_hooks.system import Root

    # PCI functions by their addresses.
    Devices = Union[DeviceReader, dict[str, PciDevice]]

SYS_CHAR = "/sys/dev/char"
CDEV_CLASS = "/sys/class/vfio-dev"
# Modules that use vfio_pci_core are VFIO drivers, even if the kernel has no vfio-dev directory (before 6.1).
CORE_HOLDERS = "/sys/module/vfio_pci_core/holders"


class Member(Frozen):
    """One device of an IOMMU group.

    name: BDF of a PCI function, UUID of a mediated device, else its name in sysfs; bus: "pci", "mdev", "ap", "ccw" or
    the name of its subsystem; driver: "" without one; viability: "vfio", "unbound", "harmless" (no obstacle to
    viability), "blocking", or "unknown" if only the kernel knows; pci: the function, None on other buses.
    """

    name: str
    bus: str
    driver: str
    viability: str
    pci: PciDevice | None = None

    @property
    def is_passable(self) -> bool:
        """Return whether it can be passed to a container at all: bridges and host bridges cannot."""
        return self.pci is None or not (self.pci.is_bridge or self.pci.class_code[:4] == "0600")


class VfioGroup(Frozen):
    """An IOMMU group as VFIO sees it.

    name: as in /dev/vfio: "12", "noiommu-0"; iommu_group: number in /sys/kernel/iommu_groups, "" without one; number:
    major and minor of its node, None if VFIO has no such group now; members: in the order of their names; noiommu:
    without the protection of an IOMMU.
    """

    name: str
    iommu_group: str
    number: tuple[int, int] | None
    members: tuple[Member, ...]
    noiommu: bool = False

    @property
    def node(self) -> str:
        """Return the path of the group's device node on the host."""
        return GROUP_PREFIX + self.name

    @property
    def blocking(self) -> tuple[Member, ...]:
        """Return the members that keep the group from being viable."""
        return tuple(member for member in self.members if member.viability == "blocking")

    @property
    def passable(self) -> tuple[Member, ...]:
        """Return the members that can be passed to a container."""
        return tuple(member for member in self.members if member.is_passable)

    @property
    def buses(self) -> frozenset[str]:
        """Return the buses of the members."""
        return frozenset(member.bus for member in self.members)

    @property
    def is_channel(self) -> bool:
        """Return whether it has only s390x crypto (AP) or channel (CCW) devices, which need no IOMMU in a guest."""
        return bool(self.members) and self.buses <= {"ap", "ccw"}


def find_node_owner(root: Root, number: tuple[int, int]) -> tuple[str, str]:
    """Return what has a character device's number: ("vfio", "12") a group, ("vfio-dev", "vfio0") a device of VFIO's.

    ("", name) of anything else; ("", "") if nothing has the number. The kernel's own list, /sys/dev/char, answers with
    one link, however many groups there are.
    """
    above, _, name = root.read_link(f"{SYS_CHAR}/{number[0]}:{number[1]}").rpartition("/")
    kind = above.rpartition("/")[2]
    return kind if kind in ("vfio", "vfio-dev") else "", name


def list_cdevs(root: Root) -> dict[tuple[int, int], str]:
    """Return the VFIO devices that have a node of their own, by major and minor: {(511, 0): "vfio0"}."""
    names = root.list_names(CDEV_CLASS)
    numbers = (read_numbers(root, f"{CDEV_CLASS}/{name}") for name in names)
    return {number: name for number, name in zip(numbers, names) if number is not None}


def read_cdev_group(root: Root, devices: Devices, cdev: str) -> VfioGroup | None:
    """Return the group that a VFIO device is in, None without one."""
    name = root.read_link_name(f"{CDEV_CLASS}/{cdev}/device/iommu_group")
    return read_group(root, devices, name) if name else None


def read_group(root: Root, devices: Devices, name: str) -> VfioGroup:
    """Return a group by its name in /dev/vfio; one that does not exist has neither an IOMMU group nor a number."""
    number = read_group_number(root, name)
    # A group without an IOMMU is named noiommu-0 in /dev/vfio, after the number of an IOMMU group that VFIO created for
    # it.
    iommu_group = name[len(NOIOMMU_PREFIX) :] if name.startswith(NOIOMMU_PREFIX) else name
    if not iommu_group.isdigit() or not root.exists(f"{IOMMU_GROUPS}/{iommu_group}"):
        return VfioGroup(name, "", number, (), name.startswith(NOIOMMU_PREFIX))
    noiommu = name != iommu_group or is_noiommu_group(root, iommu_group)
    return VfioGroup(name, iommu_group, number, read_members(root, devices, iommu_group), noiommu)


def read_members(root: Root, devices: Devices, iommu_group: str) -> tuple[Member, ...]:
    """Return the devices in an IOMMU group, on any bus."""
    directory = f"{IOMMU_GROUPS}/{iommu_group}/devices"
    return tuple(read_member(root, devices, f"{directory}/{name}", name) for name in root.list_names(directory))


def read_member(root: Root, devices: Devices, path: str, name: str) -> Member:
    """Return one device of a group. path: in sysfs; name: its name there."""
    pci = devices.get(name)
    if pci is not None:
        return Member(name, "pci", pci.driver, classify_pci(root, pci), pci)
    driver = root.read_link_name(f"{path}/driver")
    bus = root.read_link_name(f"{path}/subsystem")
    location = root.real_path(path)
    if bus == "mdev":
        # Kata checks for the same names (pkg/device/drivers/utils.go, GetVFIODeviceType).
        bus = "ap" if "/vfio_ap" in location else "ccw" if "/css" in location else "mdev"
        return Member(name, bus, driver, "vfio" if driver else "unbound")
    if not driver:
        return Member(name, bus, driver, "unbound")
    return Member(name, bus, driver, "vfio" if driver.startswith("vfio") else "unknown")


def classify_pci(root: Root, device: PciDevice) -> str:
    """Return a PCI function's effect on its group's viability, as in Member.viability."""
    if device.owned_by_vfio or is_variant_driver(root, device.driver):
        return "vfio"
    if not device.driver:
        return "unbound"
    return "harmless" if is_viable_member(device) else "blocking"


def is_variant_driver(root: Root, driver: str) -> bool:
    """Return whether a PCI driver is one of VFIO's variants: its module depends on vfio_pci_core."""
    if not driver:
        return False
    module = root.read_link_name(f"{PCI_DRIVERS}/{driver}/module")
    return bool(module) and root.exists(f"{CORE_HOLDERS}/{module}")


def list_groups(root: Root, devices: Devices) -> tuple[VfioGroup, ...]:
    """Return every IOMMU group of the host, in the order of their numbers, no-IOMMU groups with their own names."""
    names = {name[len(NOIOMMU_PREFIX) :]: name for name in root.list_names(VFIO_CLASS) if name[:1] == "n"}
    numbers = sorted((name for name in root.list_names(IOMMU_GROUPS) if name.isdigit()), key=int)
    return tuple(read_group(root, devices, names.get(number, number)) for number in numbers)
