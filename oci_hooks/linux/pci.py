# SPDX-License-Identifier: Apache-2.0
"""Read PCI devices and IOMMU groups from sysfs.

Sources: Documentation/ABI/testing/sysfs-bus-pci, sysfs-kernel-iommu_groups, sysfs-devices-vfio-dev of the kernel.
A BDF is written `dddd:bb:ss.f`, in lower case hexadecimal, as sysfs names it.
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root

HEX = frozenset("0123456789abcdef")

PCI_DEVICES = "/sys/bus/pci/devices"
PCI_DRIVERS = "/sys/bus/pci/drivers"
IOMMU_GROUPS = "/sys/kernel/iommu_groups"
VFIO_CLASS = "/sys/class/vfio"

# Prefix of the BDF of a device without an IOMMU, to which VFIO gives a group of its own only when it is bound.
NOIOMMU_GROUP = "noiommu:"
# Prefix of that group's number in the name of its node; its device is the only member.
NOIOMMU_PREFIX = "noiommu-"
# The kernel's name of such a group.
NOIOMMU_NAME = "vfio-noiommu"
NOIOMMU_SWITCH = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"

# Header type 1 and 2 (PCI Local Bus Specification, 6.1): PCI-to-PCI, CardBus and semi-transparent bridges.
BRIDGE_CLASSES = ("0604", "0607", "0609")
# Drivers that leave a group viable although they are not VFIO drivers (kernel: driver_managed_dma).
HARMLESS_DRIVERS = ("pci-stub", "pcieport")
# Whether a driver is one of VFIO's, for the two that need no look-up: "" is no driver.
KNOWN_DRIVERS = {"": False, "vfio-pci": True}
# Two 32-bit numbers and a colon.
DEV_LENGTH = 22


class PciDevice(Frozen):
    """One PCI function.

    address: BDF; vendor, device: four hexadecimal digits; class_code: six hexadecimal digits (class, subclass,
    interface); driver: "" without one; group: IOMMU group, "" without an IOMMU; path: below /sys, links resolved;
    owned_by_vfio: bound to vfio-pci or a variant of it; inode: of its directory in sysfs, which differs for the next
    device at this address; 0 if it was not read.
    """

    address: str
    vendor: str
    device: str
    class_code: str
    driver: str
    group: str
    path: str
    owned_by_vfio: bool
    inode: int = 0

    @property
    def is_bridge(self) -> bool:
        """Return whether it forwards to another bus: bridges are never bound to VFIO, and leave their group viable."""
        return self.class_code[:4] in BRIDGE_CLASSES

    @property
    def on_root_bus(self) -> bool:
        """Return whether it is on a root bus, as a machine's chipset is."""
        return self.path.rpartition("/")[0].rpartition("/")[2].startswith("pci")

    @property
    def id(self) -> str:
        """Return vendor and device as lspci writes them: 8086:10d3."""
        return f"{self.vendor}:{self.device}"


class IommuGroup(Frozen):
    """An IOMMU group and the PCI functions in it, in the order of their addresses."""

    name: str
    members: tuple[PciDevice, ...]

    @property
    def endpoints(self) -> tuple[PciDevice, ...]:
        """Return the members that are not bridges."""
        return tuple(member for member in self.members if not member.is_bridge)


class Inventory(Frozen):
    """All PCI functions, and the IOMMU groups that contain one, at one moment."""

    devices: dict[str, PciDevice]
    groups: dict[str, IommuGroup]


class DeviceReader:
    """PCI functions, each read when it is first asked for: a host may have thousands, and a check needs one or two."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.devices: dict[str, PciDevice | None] = {}
        self.drivers = dict(KNOWN_DRIVERS)

    def get(self, address: str) -> PciDevice | None:
        """Return the function at an address, None if there is none."""
        if address not in self.devices:
            self.devices[address] = read_device(self.root, address, self.drivers)
        return self.devices[address]


def scan(
    root: Root, noiommu: bool = False, instances: bool = False, settled: frozenset[str] | None = None
) -> Inventory:
    """Return the inventory of a machine, from one pass over its PCI devices. Raises OSError if sysfs cannot be read.

    noiommu: give each endpoint without a group a group of its own, `noiommu:BDF`, as VFIO's no-IOMMU mode does;
    instances: read the inode numbers too; settled: addresses of devices that have been there for a while, None for all.
    """
    devices = {}
    drivers = dict(KNOWN_DRIVERS)
    for address in root.list_names(PCI_DEVICES):
        device = read_device(root, address, drivers, instances, settled is not None and address not in settled)
        # A device may be unplugged between the listing and the reading.
        if device is not None:
            if noiommu and not device.group and not device.is_bridge:
                device = device.replace(group=NOIOMMU_GROUP + address)
            devices[address] = device
    return make_inventory(devices)


def make_inventory(devices: dict[str, PciDevice]) -> Inventory:
    """Return the inventory of these PCI functions."""
    members: dict[str, list[PciDevice]] = {}
    for device in devices.values():
        if device.group:
            members.setdefault(device.group, []).append(device)
    return Inventory(devices, {name: IommuGroup(name, tuple(group)) for name, group in members.items()})


def read_device(
    root: Root, address: str, drivers: dict[str, bool] | None = None, instance: bool = False, is_new: bool = False
) -> PciDevice | None:
    """Return one PCI function, or None if there is none at this address (any more).

    drivers: whether each is VFIO's; extended here, so that each driver is looked up only once; instance: read the inode
    number too; is_new: it was just plugged in.
    """
    drivers = dict(KNOWN_DRIVERS) if drivers is None else drivers
    path = f"{PCI_DEVICES}/{address}"
    # Read first: if the inode is the same at the end, all values read in between are this device's.
    inode = read_inode(root, path) if instance else 0
    try:
        # One read gives driver, class and ids; single attributes take four.
        uevent = read_attributes(root, path) if is_new else parse_uevent(root.read_text(f"{path}/uevent"))
        target = root.read_link(path)
    except OSError:
        return None
    driver = uevent.get("DRIVER", "")
    if driver not in drivers:
        drivers[driver] = root.exists(f"{path}/vfio-dev")
    return PciDevice(
        address,
        *parse_ids(uevent),
        driver,
        root.read_link_name(f"{path}/iommu_group"),
        "/sys/" + target.lstrip("./") if target else path,
        drivers[driver],
        inode,
    )


def read_attributes(root: Root, path: str) -> dict[str, str]:
    """Return the pairs of a function's uevent file that are read here, from single attributes. Raises OSError.

    While a driver probes a new device, for a tenth of a second or more, some kernels let no one read its uevent file
    (Linux 6.1: uevent_show takes the device's lock). These attributes are always readable.
    """
    vendor, device, class_code = (
        root.read_text(f"{path}/{name}").replace("0x", "", 1) for name in ("vendor", "device", "class")
    )
    driver = root.read_link_name(f"{path}/driver")
    return {"PCI_ID": f"{vendor}:{device}", "PCI_CLASS": class_code, **({"DRIVER": driver} if driver else {})}


def read_inode(root: Root, path: str) -> int:
    """Return the inode number of a file or directory of the kernel, links followed; 0 if it does not exist."""
    try:
        return root.stat(path).st_ino
    except OSError:
        return 0


def parse_uevent(text: str) -> dict[str, str]:
    """Return the pairs of a sysfs uevent file."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def parse_ids(uevent: dict[str, str]) -> tuple[str, str, str]:
    """Return vendor, device and class of a function, as in PciDevice, from its uevent file."""
    vendor, _, device = uevent.get("PCI_ID", "").lower().partition(":")
    return vendor, device, uevent.get("PCI_CLASS", "").lower().zfill(6)


def read_driver(root: Root, address: str) -> str:
    """Return the name of the driver that a PCI function is bound to now, "" without one."""
    return root.read_link_name(f"{PCI_DEVICES}/{address}/driver")


def read_override(root: Root, address: str) -> str:
    """Return a function's driver_override, "" if unset (the kernel writes "(null)"). Raises OSError."""
    text = root.read_text(f"{PCI_DEVICES}/{address}/driver_override")
    return "" if text == "(null)" else text


def is_noiommu_group(root: Root, name: str) -> bool:
    """Return whether VFIO's no-IOMMU mode made an IOMMU group for a device that is bound. name: its number."""
    return root.read_text_or(f"{IOMMU_GROUPS}/{name}/name", "") == NOIOMMU_NAME


def read_group_number(root: Root, group: str) -> tuple[int, int] | None:
    """Return major and minor of a VFIO group's present node, None if VFIO has no such group.

    Read from sysfs, because a guest without devtmpfs has no node.
    """
    return read_numbers(root, f"{VFIO_CLASS}/{group}")


def read_numbers(root: Root, path: str) -> tuple[int, int] | None:
    """Return major and minor of a device in sysfs, from its file `dev` ("511:7"); None if it does not exist."""
    text = root.read_text_or(f"{path}/dev", "")
    major, _, minor = text.partition(":")
    if not (text.isascii() and major.isdigit() and minor.isdigit() and len(text) < DEV_LENGTH):
        return None
    return int(major), int(minor)


def list_live_groups(root: Root) -> dict[tuple[int, int], str]:
    """Return the VFIO groups that have a node now, by major and minor."""
    numbers = ((read_group_number(root, name), name) for name in root.list_names(VFIO_CLASS))
    return {number: name for number, name in numbers if number is not None}


def resolve_noiommu_groups(
    inventory: Inventory, live: dict[tuple[int, int], str], noiommu: bool
) -> tuple[Inventory, dict[tuple[int, int], str]]:
    """Return inventory and live groups with each device that is bound without an IOMMU in its earlier group.

    VFIO's no-IOMMU mode gives it group N and node noiommu-N while it is bound. noiommu: as for scan; without it the
    device has no group, even if another program bound it.
    """
    nodes = {name: number for number, name in live.items() if name.startswith(NOIOMMU_PREFIX)}
    if not nodes:
        return inventory, live
    devices, named = dict(inventory.devices), dict(live)
    for address, device in inventory.devices.items():
        node = NOIOMMU_PREFIX + device.group
        if node in nodes:
            named[nodes[node]] = NOIOMMU_GROUP + address
            devices[address] = device.replace(group=NOIOMMU_GROUP + address if noiommu else "")
    return make_inventory(devices), named


def is_viable_member(device: PciDevice) -> bool:
    """Return whether a member leaves its group viable: no driver, a VFIO driver, a harmless one, or a bridge."""
    return not device.driver or device.owned_by_vfio or device.driver in HARMLESS_DRIVERS or device.is_bridge


def normalize_address(text: str) -> str:
    """Return a BDF as sysfs writes it, with domain 0000 by default; "" if the text is not a BDF."""
    text = text.strip().lower()
    bus_and_slot, dot, function = text.partition(".")
    parts = bus_and_slot.split(":")
    if len(parts) == 2:
        parts.insert(0, "0000")
    # A domain has four digits, or more behind Intel's VMD.
    if not dot or len(parts) != 3 or not is_hex_list(parts[1:], (2, 2)) or not 4 <= len(parts[0]) <= 8:
        return ""
    if not HEX.issuperset(parts[0]) or int(parts[2], 16) > 31 or function not in set("01234567"):
        return ""
    # nvidia-smi writes eight digits for any domain, sysfs no more than needed.
    return f"{int(parts[0], 16):04x}:{parts[1]}:{parts[2]}.{function}"


def is_hex_list(words: list[str], lengths: tuple[int, ...]) -> bool:
    """Return whether the words are hexadecimal numbers of exactly these lengths."""
    return len(words) == len(lengths) and all(
        len(word) == length and HEX.issuperset(word) for word, length in zip(words, lengths)
    )


def is_id(text: str) -> bool:
    """Return whether a text is VENDOR or VENDOR:DEVICE, as sysfs writes them: `8086`, `8086:10d3`."""
    words = text.split(":")
    return len(words) <= 2 and is_hex_list(words, (4, 4)[: len(words)])


def is_class(text: str) -> bool:
    """Return whether a text is a class code of one, two or three bytes: `02`, `0200`, `020000`."""
    return len(text) in (2, 4, 6) and HEX.issuperset(text)
