# SPDX-License-Identifier: Apache-2.0
"""Find why a PCI function must not be taken: it is in use, or the virtual machine depends on it. Changes nothing.

The kernel's own records define a use, as far as possible: every device node below the function that a process has open
(openers.py), every address and route (netlink.py), each block device that is part of another (block_devices.py).

Sources: Documentation/ABI (sysfs-block, sysfs-class-net, sysfs-bus-pci), proc(5).
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.linux import netlink
from oci_hooks.linux.block_devices import BLOCK_CLASS, describe_holder, name_block, read_loops
from oci_hooks.linux.mounts import parse_mounts, unescape
from oci_hooks.linux.openers import SHARED, Openers, read_nodes
from oci_hooks.linux.pci import PCI_DEVICES
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.linux.pci import PciDevice
    from oci_hooks.system import Deadline, Root

NET_CLASS = "/sys/class/net"
NVME_SUBSYSTEMS = "/sys/class/nvme-subsystem"

# Drivers of virtio devices that a Kata guest, or any guest, depends on: its agent, its root file system, its memory.
VIRTIO_USES = {
    "virtio_console": "is a virtio console",
    "vmw_vsock_virtio_transport": "is the virtio vsock device, which the host uses to reach the guest",
    "9pnet_virtio": "is a virtio 9p share of the host's files",
    "virtiofs": "is a virtiofs share of the host's files",
    "virtio_balloon": "is the virtio memory balloon",
    "virtio_mem": "is virtio memory",
    "virtio_pmem": "is virtio persistent memory",
    "virtio_iommu": "is the virtio IOMMU",
}

# Directories of a device in sysfs that contain only attributes.
NO_SHARED_DEVICES = frozenset({"power", "msi_irqs", "queues", "statistics", "trace"})
IFF_UP = 1
# Types of interfaces (include/uapi/linux/if_arp.h) that udev and NetworkManager bring up by default: ARPHRD_ETHER,
# ARPHRD_INFINIBAND. An interface of any other type (CAN has no addresses at all) is up only because it is used.
UNCONFIGURED_TYPES = ("1", "32")
ARPHRD_CAN = "280"


class Usage(Frozen):
    """All that this machine uses, at one moment.

    blocks, interfaces: name -> path below /sys, links resolved; subsystems: NVMe subsystem -> targets of its
    controllers' links; mounts: "major:minor" or name of a block device -> a mount point; swaps: names of block devices;
    addressed: interface -> an address that is not automatic; routed: interfaces with a route, "" for all of them;
    nodes: "char 4:64" -> path below /sys of the device that has this node.
    """

    blocks: dict[str, str]
    interfaces: dict[str, str]
    subsystems: dict[str, tuple[str, ...]]
    mounts: dict[str, str]
    swaps: frozenset[str]
    addressed: dict[str, str]
    routed: frozenset[str]
    nodes: dict[str, str]


class UsageFinder:
    """The uses of one machine's devices. Scanned once, when first needed: most runs check one or two devices.

    deadline: of the run. A device that could not be checked in time counts as in use.
    """

    def __init__(self, root: Root, deadline: Deadline) -> None:
        self.root = root
        self.deadline = deadline
        self.usage: Usage | None = None
        self.openers: Openers | None = None

    def find(self, device: PciDevice) -> list[str]:
        """Return the reasons why a PCI function must not be touched; empty if it is free. Raises OSError."""
        if self.usage is None or self.openers is None:
            self.usage = scan_usage(self.root)
            self.openers = Openers(self.root, self.usage.nodes, self.deadline)
        return find_uses(self.root, device, self.usage, self.openers)


def scan_usage(root: Root) -> Usage:
    """Return what the machine uses: one pass over its block devices, interfaces, mounts and routes. Raises OSError."""
    blocks = list_class_links(root, BLOCK_CLASS)
    addressed, routed = read_network(root)
    return Usage(
        blocks,
        list_class_links(root, NET_CLASS),
        {name: read_controllers(root, name) for name in root.list_names(NVME_SUBSYSTEMS)},
        read_mounted(root, blocks),
        read_swaps(root, blocks),
        addressed,
        routed,
        read_nodes(root),
    )


def find_uses(root: Root, device: PciDevice, usage: Usage, openers: Openers) -> list[str]:
    """Return the reasons why a PCI function must not be touched, to follow its address; empty if it is free.

    The last two checks cost most, and are made only if nothing else is found.
    """
    if device.is_bridge:
        # Everything behind a bridge is below it in sysfs, and none of it belongs to the bridge.
        return ["is a PCI-to-PCI bridge"]
    reasons = [
        *find_machine_uses(root, device),
        *find_virtio_uses(root, device),
        *find_block_uses(root, device, usage),
        *find_network_uses(root, device, usage),
    ]
    return reasons or openers.find(device, list_roots(device, usage)) or find_exclusive_disks(root, device, usage)


def list_class_links(root: Root, directory: str) -> dict[str, str]:
    """Return the names in a class's directory and the targets of their links in /sys."""
    links = ((name, root.read_link(f"{directory}/{name}")) for name in root.list_names(directory))
    # A class's directory may also contain files (bonding_masters).
    return {name: "/sys/" + target.lstrip("./") for name, target in links if target}


# The machine itself ---------------------------------------------------------------------------------------------------


def find_machine_uses(root: Root, device: PciDevice) -> list[str]:
    """Return the function's roles for the whole machine: chipset, console screen, parent of virtual functions."""
    path = f"{PCI_DEVICES}/{device.address}"
    reasons = []
    if device.class_code.startswith("06"):
        reasons.append(f"is a chipset function (class {device.class_code[:4]})")
    if device.class_code.startswith("0806"):
        reasons.append("is an IOMMU")
    if device.class_code.startswith("03") and root.read_text_or(f"{path}/boot_vga", "") == "1":
        reasons.append("is the boot VGA device")
    functions = root.read_text_or(f"{path}/sriov_numvfs", "0")
    if functions != "0":
        reasons.append(f"has {functions} SR-IOV virtual function{'s' if functions != '1' else ''}")
    return reasons


def find_virtio_uses(root: Root, device: PciDevice) -> list[str]:
    """Return a virtio device's role for the guest. A network card or a disk follows the rules for these."""
    if device.vendor != "1af4":
        return []
    path = f"{PCI_DEVICES}/{device.address}"
    names = (name for name in root.list_names(path) if name.startswith("virtio"))
    drivers = (root.read_link_name(f"{path}/{name}/driver") for name in names)
    return [VIRTIO_USES[driver] for driver in drivers if driver in VIRTIO_USES]


# Disks ----------------------------------------------------------------------------------------------------------------


def read_controllers(root: Root, subsystem: str) -> tuple[str, ...]:
    """Return the targets of the links to an NVMe subsystem's controllers."""
    path = f"{NVME_SUBSYSTEMS}/{subsystem}"
    return tuple(root.read_link(f"{path}/{name}") for name in root.list_names(path) if name.startswith("nvme"))


def read_mounted(root: Root, blocks: dict[str, str]) -> dict[str, str]:
    """Return "major:minor" and names of mounted devices, for this process or for init, with one mount point of each.

    Both keys, because btrfs and others mount under an anonymous number. Raises OSError.
    """
    # An option of /proc's mount may hide init's: then a disk that only init has mounted is found by exclusive opening.
    texts = (root.read_text_or("/proc/1/mountinfo", ""), root.read_text("/proc/self/mountinfo"))
    mounted: dict[str, str] = {}
    # Usually both are in one namespace, with the same text.
    for text in dict.fromkeys(texts):
        for mount in parse_mounts(text):
            mounted.setdefault(mount.number, mount.point)
            if mount.source.startswith("/dev/"):
                mounted.setdefault(name_block(root, mount.source, blocks), mount.point)
    return mounted


def read_swaps(root: Root, blocks: dict[str, str]) -> frozenset[str]:
    """Return the names of the block devices that are swap space. The disk of a swap file is mounted."""
    # The kernel escapes blanks, tabs and line feeds in a path, and nothing else: no splitlines() or bare split() here.
    lines = root.read_text_or("/proc/swaps", "").split("\n")[1:]
    paths = (unescape(line.partition(" ")[0]) for line in lines)
    return frozenset(name_block(root, path, blocks) for path in paths if path.startswith("/dev/"))


def find_block_uses(root: Root, device: PciDevice, usage: Usage) -> list[str]:
    """Return the uses of a PCI function's disks: mounted, swap, or part of an active device."""
    names = list_blocks(device, usage)
    loops = read_loops(root, usage.blocks) if names else {}
    return [
        f"holds /dev/{name.replace('!', '/')}, {use}"
        for name in names
        for use in find_block_device_uses(root, name, usage, loops)
    ]


def find_exclusive_disks(root: Root, device: PciDevice, usage: Usage) -> list[str]:
    """Return the disks of a PCI function that cannot be opened exclusively.

    Only the kernel knows the further disks of a btrfs, ZFS or bcache, or a mount in another namespace.
    """
    nodes = [f"/dev/{name.replace('!', '/')}" for name in list_blocks(device, usage)]
    return [
        f"holds {node}, which the kernel or a program uses exclusively"
        for node in nodes
        if root.is_exclusively_open(node)
    ]


def list_blocks(device: PciDevice, usage: Usage) -> list[str]:
    """Return the names of the disks and partitions below a PCI function."""
    above = list_roots(device, usage)
    return [name for name, path in usage.blocks.items() if path.startswith(above)]


def list_roots(device: PciDevice, usage: Usage) -> tuple[str, ...]:
    """Return the directories of sysfs that contain everything of a PCI function, each with a slash at its end."""
    # With multipath, namespaces are below the subsystem, and only a link leads to the controller.
    shared = [
        f"/sys{SHARED}{subsystem}/"
        for subsystem, targets in usage.subsystems.items()
        if any(f"/{device.address}/" in target for target in targets)
    ]
    return (f"{device.path}/", *shared)


def find_block_device_uses(root: Root, name: str, usage: Usage, loops: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the uses of one block device, as "mounted on /" or "under LVM volume vg-root (dm-0), mounted on /"."""
    path = f"{BLOCK_CLASS}/{name}"
    number = root.read_text_or(f"{path}/dev", "none")
    point = usage.mounts.get(number) or usage.mounts.get(name)
    uses = [f"mounted on {point}"] if point else []
    if name in usage.swaps or number in usage.swaps:
        uses.append("used as swap")
    for holder in (*root.list_names(f"{path}/holders"), *loops.get(number, ())):
        # An active volume is in use even if nothing of it is mounted: it would lose its disk.
        what = describe_holder(root, holder)
        inside = f"{usage.blocks.get(holder, holder)}/"
        parts = (holder, *(part for part, location in usage.blocks.items() if location.startswith(inside)))
        above = [use for part in parts for use in find_block_device_uses(root, part, usage, loops)]
        uses += [f"under {what}, {use}" for use in above] or [f"part of {what}"]
    return uses


# Network --------------------------------------------------------------------------------------------------------------


def read_network(root: Root) -> tuple[dict[str, str], frozenset[str]]:
    """Return the addresses of interfaces by their names, and the interfaces with a route. Raises OSError.

    Both are empty if a recording of an earlier version has no answer.
    """
    try:
        lines = netlink.read_network(root)
    except FileNotFoundError:
        lines = []
    addresses = {name: words for kind, name, words in lines if kind == "address"}
    return addresses, frozenset(name for kind, name, _ in lines if kind == "route")


def parse_flags(word: str, otherwise: int) -> int:
    """Return flags that the kernel writes in hexadecimal. otherwise: for invalid text; it must not mean free."""
    try:
        return int(word, 16)
    except ValueError:
        return otherwise


def find_network_uses(root: Root, device: PciDevice, usage: Usage) -> list[str]:
    """Return the uses of a PCI function's network interfaces.

    An interface that is up with nothing but its automatic link-local address is free: udev and NetworkManager bring
    links up by default, which adds fe80::/64 and multicast.
    """
    below = f"{device.path}/"
    names = [name for name, path in usage.interfaces.items() if path.startswith(below)]
    reasons = [
        f"is network interface {name}, up {use}" for name in names for use in find_interface_uses(root, name, usage)
    ]
    return reasons or find_moved_interfaces(root, device, names)


def find_interface_uses(root: Root, name: str, usage: Usage) -> list[str]:
    """Return the use of one interface, at most one: the most likely for a user to look for."""
    path = f"{NET_CLASS}/{name}"
    if not parse_flags(root.read_text_or(f"{path}/flags", "0"), IFF_UP) & IFF_UP:
        return []
    if name in usage.addressed:
        return [f"with address {usage.addressed[name]}"]
    if name in usage.routed or "" in usage.routed:
        return ["with a route"]
    kind = root.read_text_or(f"{path}/type", UNCONFIGURED_TYPES[0])
    if kind not in UNCONFIGURED_TYPES:
        return ["as a CAN interface" if kind == ARPHRD_CAN else f"as an interface of type {kind}"]
    master = root.read_link_name(f"{path}/master")
    if master:
        return [f"as a member of {master}"]
    uppers = [entry[len("upper_") :] for entry in root.list_names(path) if entry.startswith("upper_")]
    return [f"and used by {', '.join(uppers)}"] if uppers else []


def find_moved_interfaces(root: Root, device: PciDevice, names: list[str]) -> list[str]:
    """Return a reason if an interface was moved to another network namespace: sysfs keeps its empty directory.

    names: the function's interfaces in this namespace.
    """
    try:
        empty = root.ask(list_empty_networks, f"{PCI_DEVICES}/{device.address}")
    except FileNotFoundError:
        # Unplugged, or a recording of an earlier version: use that version's question.
        empty = [] if names or not root.exists(f"{PCI_DEVICES}/{device.address}/net") else ["net"]
    return ["is a network interface in another network namespace"] if empty else []


@tagged("list-empty-networks")
def list_empty_networks(path: str) -> list[str]:
    """Return the directories `net` below a device in sysfs that contain no interface. Raises OSError.

    This includes devices below it: virtio devices, USB devices behind a host controller, auxiliary devices.
    """
    import os

    found = []
    waiting = [path]
    while waiting:
        location = waiting.pop()
        try:
            entries = list(os.scandir(location))
        except FileNotFoundError:
            # A device below that is gone has no interface any more; only the device itself is the caller's concern.
            if location == path:
                raise
            continue
        if location.endswith("/net"):
            found += [location] if not entries else []
        else:
            below = (entry for entry in entries if entry.is_dir(follow_symlinks=False))
            waiting += [entry.path for entry in below if entry.name not in NO_SHARED_DEVICES]
    return found
