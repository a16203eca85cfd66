# SPDX-License-Identifier: Apache-2.0
"""The nodes in the container's /dev: made, mounted where a user namespace wants that, and taken away again."""

from __future__ import annotations

import os

from oci_hooks.findings import StepError
from oci_hooks.frozen import Record
from oci_hooks.guest.apply import cgroup, container_dev
from oci_hooks.guest.plan import MAP_PATH
from oci_hooks.linux import pci
from oci_hooks.oci import IOMMUFD_NODE
from oci_hooks.system import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.apply.container_dev import FoundNode
    from oci_hooks.guest.plan import MapEntry, Node, Plan
    from oci_hooks.guest.undo_log import Entry, Journal
    from oci_hooks.oci import Device
    from oci_hooks.system import Root

# vfio registers its control device with this fixed minor (kernel: include/linux/miscdevice.h, VFIO_MINOR).
CONTROL_NUMBERS = (10, 196)
# How a map begins, which tells it from a file of the image.
MAP_HEAD = b'{\n  "version": 1,\n  "devices": [\n'


class Target(Record):
    """The container that nodes are made for. pid: its init; rootfs: real path of its root file system."""

    tag = "container"

    pid: int
    rootfs: str


class Place(Record):
    """Where a node belongs. directory: below /dev, "" for /dev itself; numbers: major and minor."""

    tag = "place"

    directory: str
    name: str
    numbers: tuple[int, int]

    @property
    def path(self) -> str:
        """The path below /dev."""
        return f"{self.directory}/{self.name}".lstrip("/")


# Where they belong ---------------------------------------------------------------------------------------------------


def find_place(root: Root, node: Node) -> Place:
    """Return where a node belongs, once its device is bound. Raises StepError where the kernel has no such device."""
    if node.kind == "control":
        return Place("vfio", "vfio", CONTROL_NUMBERS)
    if node.kind == "group":
        return find_group_place(root, node.subject)
    if node.kind == "iommu":
        return Place("", "iommu", read_numbers(root, "/sys/class/misc/iommu", IOMMUFD_NODE))
    names = root.list_names(f"{pci.PCI_DEVICES}/{node.subject}/vfio-dev")
    name = names[0] if names else "vfio?"
    return Place(
        "vfio/devices", name, read_numbers(root, f"/sys/class/vfio-dev/{name}", f"VFIO device node of {node.subject}")
    )


def find_group_place(root: Root, group: str) -> Place:
    """Return where a group's node belongs. Raises StepError where vfio has no such group.

    vfio's no-IOMMU mode gives a device a group, named vfio-noiommu, when it is bound, and calls the node noiommu-N.
    """
    name = group
    if group.startswith(pci.NOIOMMU_GROUP):
        address = group[len(pci.NOIOMMU_GROUP) :]
        name = root.link_name(f"{pci.PCI_DEVICES}/{address}/iommu_group") or group
    if root.read_text_or(f"{pci.IOMMU_GROUPS}/{name}/name", "") == pci.NOIOMMU_NAME:
        name = pci.NOIOMMU_PREFIX + name
    numbers = pci.read_group_number(root, name)
    if numbers is None and name.isdigit() and not root.exists(f"{pci.IOMMU_GROUPS}/{name}"):
        problem = "its devices were unplugged while they were being bound"
        raise StepError("device-gone", f"group {group}", problem, "start the container again")
    if numbers is None:
        problem = "VFIO created no device node for this group"
        hint = "see dmesg; check that the kernel was built with CONFIG_VFIO_GROUP"
        raise StepError("no-group-node", f"group {group}", problem, hint)
    return Place("vfio", name, numbers)


def read_numbers(root: Root, path: str, subject: str) -> tuple[int, int]:
    """Return major and minor of a device in sysfs. Raises StepError [no-cdev]."""
    numbers = pci.read_numbers(root, path)
    if numbers is None:
        problem = "the kernel does not provide this device node of iommufd"
        hint = (
            "use Linux 6.6 or later with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV, or remove cdev from the annotation"
        )
        raise StepError("no-cdev", subject, problem, hint)
    return numbers


# Making them ---------------------------------------------------------------------------------------------------------


def expose_nodes(root: Root, plan: Plan, target: Target, journal: Journal) -> tuple[cgroup.Node, ...]:
    """Make the plan's nodes in the container and return them as the proof wants them. Raises StepError."""
    places = [(node, find_place(root, node)) for node in plan.nodes]
    give_nodes(root, places, plan, target, journal)
    return tuple(cgroup.Node(place.path, *place.numbers, is_group=node.kind == "group") for node, place in places)


@step("create-nodes")
def give_nodes(_root: Root, places: list[tuple[Node, Place]], plan: Plan, target: Target, journal: Journal) -> None:
    """Make the nodes in the container's /dev, or mount them there. Raises StepError."""
    try:
        dev = container_dev.open_dev(target.pid, target.rootfs)
        try:
            if not container_dev.is_guests_own(dev) and container_dev.is_borrowed(dev, target.pid, target.rootfs):
                problem = "is a directory of the guest that is mounted into the container, not private to it"
                hint = "mount a tmpfs on /dev: nodes in the guest's directory would outlive the container"
                raise StepError("hostile-tree", "/dev", problem, hint)
            if plan.user_namespace:
                mount_nodes(dev, places, plan.map, target, journal)
            else:
                make_nodes(dev, places, plan, target, journal)
        finally:
            os.close(dev)
    except OSError as error:
        raise container_dev.explain_tree_error(error, target.rootfs) from None


def make_nodes(dev: int, places: list[tuple[Node, Place]], plan: Plan, target: Target, journal: Journal) -> None:
    """Make every node that is not there as it should be. dev: descriptor of /dev. Raises StepError, OSError."""
    for node, place in places:
        directory = open_or_make(dev, place.directory, target, journal)
        try:
            check_mount(dev, directory, place)
            if place.directory == "vfio" and node.kind == "control" and not container_dev.is_guests_own(directory):
                for entry in plan.stale:
                    remove_stale(dev, entry, target, journal)
                if plan.map:
                    write_map(directory, plan.map, target, journal)
            make_node(directory, node, place, target, journal)
        finally:
            os.close(directory)


def check_mount(dev: int, directory: int, place: Place) -> None:
    """Raise StepError where nodes would come to lie in a directory of somebody else that is mounted in /dev."""
    # The guest's own /dev/vfio is made no node in, and has those that are needed.
    if container_dev.is_mounted(dev, directory) and not container_dev.is_guests_own(directory):
        problem = "is a directory of the guest that is mounted into the container, not private to it"
        hint = "remove this mount from config.json: the hook creates the nodes"
        raise StepError("hostile-tree", f"/dev/{place.directory}", problem, hint)


def open_or_make(dev: int, path: str, target: Target, journal: Journal) -> int:
    """Return a descriptor of a directory below /dev, made if it is not there. Raises OSError."""
    fd = os.dup(dev)
    done = ""
    for name in path.split("/") if path else ():
        done = f"{done}/{name}".lstrip("/")
        try:
            inner = open_or_make_one(fd, name, done, target, journal)
        finally:
            os.close(fd)
        fd = inner
    return fd


def open_or_make_one(parent: int, name: str, path: str, target: Target, journal: Journal) -> int:
    """Return a descriptor of a directory in a directory, made if it is not there. Raises StepError, OSError.

    path: below /dev.
    """
    try:
        return container_dev.open_below(parent, name)
    except FileNotFoundError:
        if container_dev.is_guests_own(parent):
            raise missing_node(f"/dev/{path}") from None
        journal.note("directory", target.rootfs, path)
        container_dev.make_directory(parent, name)
        return container_dev.open_below(parent, name)


def make_node(directory: int, node: Node, place: Place, target: Target, journal: Journal) -> None:
    """Make one node unless it is there as it should be. Raises StepError."""
    path = f"/dev/{place.path}"
    found = container_dev.look_at_node(directory, place.name)
    if found and found.kind != "char":
        problem = f"the container has a {found.kind} at this path, where a device node belongs"
        raise StepError("node-in-the-way", path, problem, "remove it from the image")
    if found and (found.major, found.minor) == place.numbers:
        return
    if container_dev.is_guests_own(directory):
        # The kernel keeps the nodes there; one of the hook's making would outlive the device, for everybody.
        raise missing_node(path)
    if found:
        note_stale(journal, target, place.path, found)
        container_dev.remove_node(directory, place.name, (found.major, found.minor))
    journal.note("node", target.rootfs, place.path, *place.numbers)
    try:
        container_dev.make_node(directory, place.name, place.numbers, node.mode, node.uid, node.gid)
    except OSError as error:
        raise StepError("node-failed", path, f"cannot create it: {error.strerror}", "give the hook CAP_MKNOD") from None


def missing_node(path: str) -> StepError:
    """Return the error for a node, or its directory, that the guest's own /dev lacks."""
    problem = "does not exist in the guest's /dev, which the container uses"
    return StepError("node-missing", path, problem, "mount devtmpfs on /dev in the guest")


def remove_stale(dev: int, entry: Device, target: Target, journal: Journal) -> None:
    """Take away a node that the runtime made with the host's numbers, which mean something else here, or nothing."""
    path, _, name = entry.path[len("/dev/") :].rpartition("/")
    try:
        directory = container_dev.open_path(dev, path)
    except FileNotFoundError:
        return
    try:
        found = container_dev.look_at_node(directory, name)
        if found and found.kind == "char" and (found.major, found.minor) == (entry.major, entry.minor):
            note_stale(journal, target, f"{path}/{name}", found)
            container_dev.remove_node(directory, name, (found.major, found.minor))
    finally:
        os.close(directory)


def note_stale(journal: Journal, target: Target, path: str, found: FoundNode) -> None:
    """Write down a node that is about to be removed."""
    journal.note("stale", target.rootfs, path, found.major, found.minor, found.mode, found.uid, found.gid)


def mount_nodes(
    dev: int, places: list[tuple[Node, Place]], entries: tuple[MapEntry, ...], target: Target, journal: Journal
) -> None:
    """Give a container with a user namespace its nodes, on a file system of the guest. Raises StepError, OSError.

    The container's own /dev belongs to its user namespace, where the kernel opens no device node. A tmpfs made here
    belongs to the guest, so its nodes open; mounted over /dev/vfio it also covers the host's stale nodes.
    """
    from oci_hooks.guest.apply import mount_ns

    if any(place.directory != "vfio" for _, place in places):
        problem = "cannot be created for a container with a user namespace"
        hint = "remove cdev from the annotation: the container gets the group's node without it"
        raise StepError("cdev-user-namespace", IOMMUFD_NODE, problem, hint)
    directory = open_or_make(dev, "vfio", target, journal)
    try:
        if all(is_there(directory, place) for _, place in places):
            return
        tree = mount_ns.make_tmpfs()
        try:
            for node, place in places:
                container_dev.make_node(tree, place.name, place.numbers, node.mode, max(node.uid, 0), max(node.gid, 0))
            if entries:
                container_dev.write_file(tree, MAP_PATH.rpartition("/")[2], format_map(entries))
            journal.note("mount", target.rootfs, "vfio")
            mount_ns.attach(target.pid, tree, directory)
        finally:
            os.close(tree)
    finally:
        os.close(directory)


def is_there(directory: int, place: Place) -> bool:
    """Tell whether a node is in a directory, with the right numbers."""
    found = container_dev.look_at_node(directory, place.name)
    return found is not None and found.kind == "char" and (found.major, found.minor) == place.numbers


# The map -------------------------------------------------------------------------------------------------------------


def write_map(directory: int, entries: tuple[MapEntry, ...], target: Target, journal: Journal) -> None:
    """Write the map of the container's devices. Raises StepError where another file lies there, OSError.

    PCIDEVICE_* variables hold the host's addresses, and a hook can't change a container's environment.
    """
    name = MAP_PATH.rpartition("/")[2]
    data = format_map(entries)
    found = container_dev.look_at_node(directory, name)
    if found:
        known = container_dev.read_head(directory, name, len(data) + 1)
        if known == data and journal.kept:
            # An earlier run wrote it, and its journal says so.
            return
        # One of the hook's own gives way: it is an earlier run's, or was left in an image by a machine that lost power.
        if not known.startswith(MAP_HEAD):
            problem = f"the container has a {found.kind} at this path that the hook did not create"
            hint = "remove it from the image, or set map = false in guest.toml"
            raise StepError("node-in-the-way", MAP_PATH, problem, hint)
    journal.note("file", target.rootfs, f"vfio/{name}")
    container_dev.remove_file(directory, name)
    container_dev.write_file(directory, name, data)


def format_map(entries: tuple[MapEntry, ...]) -> bytes:
    """Return the map as JSON. Its words are the kernel's, or checked before: none needs escaping."""
    lines = []
    for entry in entries:
        pairs = ", ".join(f'"{key}": "{value}"' for key, value in entry.as_dict().items())
        lines.append(f"    {{{pairs}}}")
    return MAP_HEAD + (",\n".join(lines) + "\n  ]\n}\n").encode()


# Undoing -------------------------------------------------------------------------------------------------------------


def undo(entry: Entry, pid: int) -> None:
    """Put back one change. pid: the container's init, 0 when it is gone with its mount namespace. Raises OSError."""
    rootfs, path = entry.words[:2]
    parent, _, name = path.rpartition("/")
    try:
        # Without the container's namespace, nodes are still where its image itself holds /dev.
        dev = container_dev.open_dev(pid, rootfs)
    except (FileNotFoundError, ProcessLookupError):
        # The container is gone, and all that was in it.
        return
    try:
        directory = container_dev.open_path(dev, parent)
        try:
            # Mounted there since: what the hook made lies below.
            if not container_dev.is_guests_own(directory):
                undo_in(directory, name, entry, pid)
        finally:
            os.close(directory)
    except FileNotFoundError:
        return
    finally:
        os.close(dev)


def undo_in(directory: int, name: str, entry: Entry, pid: int) -> None:
    """Put back one change in the directory it was made in. Raises OSError."""
    if entry.kind == "directory":
        container_dev.remove_directory(directory, name)
    elif entry.kind == "file":
        container_dev.remove_file(directory, name)
    elif entry.kind == "mount":
        if pid:
            from oci_hooks.guest.apply import mount_ns

            mount_ns.detach(pid, directory, name)
    elif entry.kind == "node":
        container_dev.remove_node(directory, name, (entry.number(2), entry.number(3)))
    elif container_dev.look_at_node(directory, name) is None:
        numbers = (entry.number(2), entry.number(3))
        container_dev.make_node(directory, name, numbers, entry.number(4), entry.number(5), entry.number(6))
