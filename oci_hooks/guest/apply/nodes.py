# SPDX-License-Identifier: Apache-2.0
"""Create and remove the nodes in the container's /dev; mount them where a user namespace requires that."""

from __future__ import annotations

import os

from oci_hooks.findings import StepError
from oci_hooks.frozen import Frozen
from oci_hooks.guest.apply import cgroup, container_dev
from oci_hooks.guest.apply.node_paths import NodePath, resolve_node
from oci_hooks.guest.plan import MAP_PATH
from oci_hooks.linux import pci
from oci_hooks.oci import IOMMUFD_NODE
from oci_hooks.system import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.apply.container_dev import ExistingEntry
    from oci_hooks.guest.plan import MapEntry, Node, Plan
    from oci_hooks.guest.undo_log import Entry, UndoLog
    from oci_hooks.oci import Device
    from oci_hooks.system import Root

# The beginning of a map, which distinguishes it from a file of the image.
MAP_HEAD = b'{\n  "version": 1,\n  "devices": [\n'


class Container(Frozen):
    """The container that gets the nodes. pid: its init; rootfs: real path of its root file system."""

    tag = "container"

    pid: int
    rootfs: str


# Creating ------------------------------------------------------------------------------------------------------------


def expose_nodes(root: Root, plan: Plan, container: Container, undo_log: UndoLog) -> tuple[cgroup.MadeNode, ...]:
    """Create the plan's nodes in the container and return them in the form for proof.py. Raises StepError."""
    node_paths = [(node, resolve_node(root, node)) for node in list_possible_nodes(root, plan.nodes)]
    create_nodes(root, node_paths, plan, container, undo_log)
    return tuple(
        cgroup.MadeNode(node_path.path, *node_path.numbers, is_group=node.kind == "group")
        for node, node_path in node_paths
    )


def list_possible_nodes(root: Root, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Return the nodes without groups' nodes, if devices' own are requested and the kernel has no VFIO groups.

    Without CONFIG_VFIO_GROUP (drivers/vfio/Makefile) there is neither the class nor /dev/vfio/vfio.
    """
    if not any(node.kind == "cdev" for node in nodes) or root.exists(pci.VFIO_CLASS):
        return nodes
    return tuple(node for node in nodes if node.kind in ("iommu", "cdev"))


@step("create-nodes")
def create_nodes(
    _root: Root, node_paths: list[tuple[Node, NodePath]], plan: Plan, container: Container, undo_log: UndoLog
) -> None:
    """Create the nodes in the container's /dev, or mount them there. Raises StepError."""
    try:
        dev = container_dev.open_dev(container.pid, container.rootfs)
        try:
            if not container_dev.is_guest_dev(dev) and container_dev.is_foreign_mount(
                dev, container.pid, container.rootfs
            ):
                problem = "is a directory of the guest that is mounted into the container, not private to it"
                hint = "mount a tmpfs on /dev: nodes in the guest's directory would outlive the container"
                raise StepError("hostile-tree", "/dev", problem, hint)
            if plan.user_namespace:
                mount_nodes(dev, node_paths, plan, container, undo_log)
            else:
                ensure_nodes(dev, node_paths, plan, container, undo_log)
        finally:
            os.close(dev)
    except OSError as error:
        raise container_dev.explain_tree_error(error, container.rootfs) from None


def ensure_nodes(
    dev: int, node_paths: list[tuple[Node, NodePath]], plan: Plan, container: Container, undo_log: UndoLog
) -> None:
    """Create every node that is missing or wrong. dev: descriptor of /dev. Raises StepError, OSError."""
    prepare_directory(dev, node_paths, plan, container, undo_log)
    for path in dict.fromkeys(node_path.directory for _, node_path in node_paths):
        directory = open_or_create(dev, path, container, undo_log)
        try:
            refuse_foreign_mount(dev, directory, path)
            for node, node_path in node_paths:
                if node_path.directory == path:
                    ensure_node(directory, node, node_path, container, undo_log)
        finally:
            os.close(directory)


def prepare_directory(
    dev: int, node_paths: list[tuple[Node, NodePath]], plan: Plan, container: Container, undo_log: UndoLog
) -> None:
    """Create /dev/vfio, without stale nodes and with the map. Raises StepError, OSError."""
    directory = open_or_create(dev, "vfio", container, undo_log)
    try:
        refuse_foreign_mount(dev, directory, "vfio")
        if not container_dev.is_guest_dev(directory):
            for entry in plan.stale:
                remove_stale(dev, entry, container, undo_log)
            if plan.map:
                write_map(directory, format_map(plan.map, node_paths), container, undo_log)
    finally:
        os.close(directory)


def refuse_foreign_mount(dev: int, directory: int, path: str) -> None:
    """Raise StepError if a directory below /dev is a mount from elsewhere, in which the nodes would be created."""
    # The guest's own /dev/vfio is an exception: it has the nodes already, so none is created there.
    if container_dev.crosses_mount(dev, directory) and not container_dev.is_guest_dev(directory):
        problem = "is a directory of the guest that is mounted into the container, not private to it"
        hint = "remove this mount from config.json: the hook creates the nodes"
        raise StepError("hostile-tree", f"/dev/{path}", problem, hint)


def open_or_create(dev: int, path: str, container: Container, undo_log: UndoLog) -> int:
    """Return a descriptor of a directory below /dev, created if it is missing. Raises OSError."""
    fd = os.dup(dev)
    done = ""
    for name in path.split("/") if path else ():
        done = f"{done}/{name}".lstrip("/")
        try:
            inner = open_or_create_one(fd, name, done, container, undo_log)
        finally:
            os.close(fd)
        fd = inner
    return fd


def open_or_create_one(parent: int, name: str, path: str, container: Container, undo_log: UndoLog) -> int:
    """Return a descriptor of a directory in a directory, created if it is missing. Raises StepError, OSError.

    path: below /dev.
    """
    try:
        return container_dev.open_below(parent, name)
    except FileNotFoundError:
        if container_dev.is_guest_dev(parent):
            raise make_missing_error(f"/dev/{path}") from None
        undo_log.add("directory", container.rootfs, path)
        container_dev.create_directory(parent, name)
        return container_dev.open_below(parent, name)


def ensure_node(directory: int, node: Node, node_path: NodePath, container: Container, undo_log: UndoLog) -> None:
    """Create one node unless it exists with the right numbers. Raises StepError."""
    path = f"/dev/{node_path.path}"
    found = container_dev.inspect_node(directory, node_path.name)
    if found and found.kind != "char":
        problem = f"the container has a {found.kind} at this path, where a device node belongs"
        raise StepError("node-in-the-way", path, problem, "remove it from the image")
    if found and (found.major, found.minor) == node_path.numbers:
        return
    if container_dev.is_guest_dev(directory):
        # The kernel manages the nodes there; one created by the hook would outlive the device, for all processes.
        raise make_missing_error(path)
    if found:
        log_stale(undo_log, container, node_path.path, found)
        container_dev.remove_node(directory, node_path.name, (found.major, found.minor))
    undo_log.add("node", container.rootfs, node_path.path, *node_path.numbers)
    try:
        container_dev.create_node(directory, node_path.name, node_path.numbers, node.mode, node.uid, node.gid)
    except OSError as error:
        raise StepError("node-failed", path, f"cannot create it: {error.strerror}", "give the hook CAP_MKNOD") from None


def make_missing_error(path: str) -> StepError:
    """Return the error for a node, or its directory, that is missing in the guest's own /dev."""
    problem = "does not exist in the guest's /dev, which the container uses"
    return StepError("node-missing", path, problem, "mount devtmpfs on /dev in the guest")


def remove_stale(dev: int, entry: Device, container: Container, undo_log: UndoLog) -> None:
    """Remove a node that the runtime created with the host's numbers, which are another device here, or none."""
    path, _, name = entry.path[len("/dev/") :].rpartition("/")
    try:
        directory = container_dev.open_path(dev, path)
    except FileNotFoundError:
        return
    try:
        found = container_dev.inspect_node(directory, name)
        if found and found.kind == "char" and (found.major, found.minor) == (entry.major, entry.minor):
            log_stale(undo_log, container, f"{path}/{name}", found)
            container_dev.remove_node(directory, name, (found.major, found.minor))
    finally:
        os.close(directory)


def log_stale(undo_log: UndoLog, container: Container, path: str, found: ExistingEntry) -> None:
    """Record a node that is about to be removed."""
    undo_log.add("stale", container.rootfs, path, found.major, found.minor, found.mode, found.uid, found.gid)


def mount_nodes(
    dev: int,
    node_paths: list[tuple[Node, NodePath]],
    plan: Plan,
    container: Container,
    undo_log: UndoLog,
) -> None:
    """Mount the nodes for a container with a user namespace, on a file system of the guest. Raises StepError, OSError.

    The container's own /dev belongs to its user namespace, where the kernel opens no device node. A tmpfs created here
    belongs to the guest, so its nodes open; mounted over /dev/vfio it also covers the host's stale nodes.
    """
    from oci_hooks.guest.apply import mount_ns

    if any(node_path.directory != "vfio" for _, node_path in node_paths):
        problem = "cannot be created for a container with a user namespace"
        hint = "remove cdev from the annotation: the container gets the group's node without it"
        raise StepError("cdev-user-namespace", IOMMUFD_NODE, problem, hint)
    directory = open_or_create(dev, "vfio", container, undo_log)
    try:
        if all(has_node(directory, node_path) for _, node_path in node_paths):
            return
        tree = mount_ns.make_tmpfs(container_dev.read_label(dev))
        try:
            for node, node_path in node_paths:
                container_dev.create_node(
                    tree, node_path.name, node_path.numbers, node.mode, max(node.uid, 0), max(node.gid, 0)
                )
            if plan.map:
                container_dev.write_file(tree, MAP_PATH.rpartition("/")[2], format_map(plan.map, node_paths))
            undo_log.add("mount", container.rootfs, "vfio")
            mount_ns.mount_tree(container.pid, tree, directory)
        finally:
            os.close(tree)
    finally:
        os.close(directory)


def has_node(directory: int, node_path: NodePath) -> bool:
    """Return whether a node is in a directory, with the right numbers."""
    found = container_dev.inspect_node(directory, node_path.name)
    return found is not None and found.kind == "char" and (found.major, found.minor) == node_path.numbers


# The map -------------------------------------------------------------------------------------------------------------


def write_map(directory: int, data: bytes, container: Container, undo_log: UndoLog) -> None:
    """Write the map of the container's devices. Raises StepError if another file has its name, OSError.

    PCIDEVICE_* variables hold the host's addresses, and a hook cannot change a container's environment.
    """
    name = MAP_PATH.rpartition("/")[2]
    found = container_dev.inspect_node(directory, name)
    if found:
        known = container_dev.read_head(directory, name, len(data) + 1)
        if known == data and undo_log.kept:
            # An earlier run wrote it, and recorded it in its undo log.
            return
        # A map of the hook's own is replaced: an earlier run wrote it, or a power failure left it in the image.
        if not known.startswith(MAP_HEAD):
            problem = f"the container has a {found.kind} at this path that the hook did not create"
            hint = "remove it from the image, or set map = false in guest.toml"
            raise StepError("node-in-the-way", MAP_PATH, problem, hint)
    undo_log.add("file", container.rootfs, f"vfio/{name}")
    container_dev.remove_file(directory, name)
    container_dev.write_file(directory, name, data)


def format_map(entries: tuple[MapEntry, ...], node_paths: list[tuple[Node, NodePath]]) -> bytes:
    """Return the map as JSON. Its words are the kernel's, or checked before: none needs escaping.

    node_paths: where the nodes are, whose paths the entries name: "" for one that the container does not get.
    """
    paths = {(node.kind, node.subject): f"/dev/{node_path.path}" for node, node_path in node_paths}
    lines = []
    for entry in entries:
        values = {**entry.as_dict(), "node": paths.get(("group", entry.group), "")}
        values["device_node"] = paths.get(("cdev", entry.address), "")
        if entry.group.startswith(pci.NOIOMMU_GROUP):
            # The kernel gives the group its name when the device is bound.
            values["group"] = values["node"].rpartition("/")[2]
        pairs = ", ".join(f'"{key}": "{value}"' for key, value in values.items())
        lines.append(f"    {{{pairs}}}")
    return MAP_HEAD + (",\n".join(lines) + "\n  ]\n}\n").encode()


# Undoing -------------------------------------------------------------------------------------------------------------


def undo(entry: Entry, pid: int) -> None:
    """Undo one change. pid: the container's init, 0 if it is gone with its mount namespace. Raises OSError."""
    rootfs, path = entry.words[:2]
    parent, _, name = path.rpartition("/")
    try:
        # Without the container's namespace, nodes still exist if they are in the /dev of the image itself.
        dev = container_dev.open_dev(pid, rootfs)
    except (FileNotFoundError, ProcessLookupError):
        # The container is gone, with all that was in it.
        return
    try:
        directory = container_dev.open_path(dev, parent)
        try:
            # If the guest's /dev was mounted there since, the hook's nodes are hidden below it.
            if not container_dev.is_guest_dev(directory):
                undo_in(directory, name, entry, pid)
        finally:
            os.close(directory)
    except FileNotFoundError:
        return
    finally:
        os.close(dev)


def undo_in(directory: int, name: str, entry: Entry, pid: int) -> None:
    """Undo one change in its directory. Raises OSError."""
    if entry.kind == "directory":
        container_dev.remove_directory(directory, name)
    elif entry.kind == "file":
        container_dev.remove_file(directory, name)
    elif entry.kind == "mount":
        if pid:
            from oci_hooks.guest.apply import mount_ns

            mount_ns.unmount(pid, directory, name)
    elif entry.kind == "node":
        container_dev.remove_node(directory, name, (entry.number(2), entry.number(3)))
    elif container_dev.inspect_node(directory, name) is None:
        numbers = (entry.number(2), entry.number(3))
        container_dev.create_node(directory, name, numbers, entry.number(4), entry.number(5), entry.number(6))
