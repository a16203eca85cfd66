# SPDX-License-Identifier: Apache-2.0
"""Find the cgroups that decide whether a process may open device nodes.

Both hierarchies may exist at once, and the kernel then checks both (kernel: devcgroup_check_permission). Version 2 runs
BPF programs (device_filter.py), version 1 has a list for each cgroup (device_list.py). proof.py opens nodes from inside
a cgroup, permission.py allows them.
"""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import StepError
from oci_hooks.frozen import Frozen
from oci_hooks.linux.mounts import read_mounts
from oci_hooks.linux.pci import NOIOMMU_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oci_hooks.guest.apply.bpf_program import Numbers
    from oci_hooks.system import Root

# A program that drives a device needs to read and write; mknod is never allowed.
ACCESS = "rw"
# One entry of linux.resources.devices (runtime-spec, config-linux.md).
RULE = '{{"allow": true, "type": "c", "major": {}, "minor": {}, "access": "rw"}}'


class MadeNode(Frozen):
    """A character device node in a container.

    name: relative to the directory that is given with it ("12", "vfio"); major, minor: its expected numbers; is_group:
    whether it supports VFIO_GROUP_GET_STATUS.
    """

    tag = "made-node"

    name: str
    major: int
    minor: int
    is_group: bool = False

    @property
    def is_noiommu(self) -> bool:
        """Whether it is the node of a group without an IOMMU, which the kernel opens for CAP_SYS_RAWIO only."""
        return self.is_group and self.name.rpartition("/")[2].startswith(NOIOMMU_PREFIX)


class Cgroup(Frozen):
    """The cgroups that decide on a process's access to devices.

    pid: of that process; unified: directory of the version 2 hierarchy; devices: directory of the version 1 devices
    hierarchy; each "" if this machine has none; unified_mount, devices_mount: mount points of these hierarchies;
    shared: those of the directories that are not the container's own, because this hook or the whole machine is in the
    same cgroup.
    """

    tag = "cgroup"

    pid: int
    unified: str
    devices: str
    unified_mount: str = ""
    devices_mount: str = ""
    shared: tuple[str, ...] = ()


class NodeCheck(Frozen):
    """The result of opening a node from inside the cgroup.

    error: errno, 0 when it opened; is_viable: what VFIO_GROUP_GET_STATUS said, True for nodes that are no groups;
    user_error: errno where it opened for the hook but not with the container's own user and capabilities, else 0.
    """

    tag = "node-proof"

    node: MadeNode
    error: int
    is_viable: bool = True
    user_error: int = 0

    @property
    def is_denied(self) -> bool:
        """Return whether the device cgroup denies it; for a nodev mount or a security module the error is EACCES."""
        return self.error == errno.EPERM


# Finding --------------------------------------------------------------------------------------------------------------


def find_cgroup(root: Root, pid: int) -> Cgroup:
    """Return the cgroups of a process, as a record of directories. Raises StepError if they cannot be determined.

    Sources: /proc/self/mountinfo (proc(5)), /proc/<pid>/cgroup (cgroups(7)).
    """
    try:
        mounts = find_hierarchies(root)
        paths = read_paths(root, str(pid))
        own_paths = read_paths(root, "self")
    except OSError as error:
        raise permit_failed(f"process {pid}", f"cannot read which cgroup it is in: {error.strerror}") from None
    unified, unified_mount = place_path(mounts, "cgroup2", paths, pid)
    devices, devices_mount = place_path(mounts, "devices", paths, pid)
    locations = (("cgroup2", unified), ("devices", devices))
    shared = tuple(location for kind, location in locations if location and paths[kind] in ("/", own_paths.get(kind)))
    return Cgroup(pid, unified, devices, unified_mount, devices_mount, shared)


def find_hierarchies(root: Root) -> dict[str, list[tuple[str, str]]]:
    """Return (root inside the hierarchy, mount point) of the mounts of "cgroup2" and of version 1 "devices".

    Raises OSError.
    """
    found: dict[str, list[tuple[str, str]]] = {"cgroup2": [], "devices": []}
    for mount in read_mounts(root, " - cgroup"):
        if mount.kind == "cgroup2":
            found["cgroup2"].append((mount.top, mount.point))
        elif mount.kind == "cgroup" and "devices" in mount.options:
            found["devices"].append((mount.top, mount.point))
    return found


def read_paths(root: Root, process: str) -> dict[str, str]:
    """Return a process's path in the "cgroup2" and the "devices" hierarchy, as far as they exist."""
    paths = {}
    for line in root.read_text(f"/proc/{process}/cgroup").split("\n"):
        hierarchy, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if hierarchy == "0" and not controllers:
            paths["cgroup2"] = path
        elif "devices" in controllers.split(","):
            paths["devices"] = path
    return paths


def place_path(mounts: dict[str, list[tuple[str, str]]], kind: str, paths: dict[str, str], pid: int) -> tuple[str, str]:
    """Return the directory and mount point of a process's cgroup of one kind; both "" if the kind does not exist.

    Raises StepError if the process has such a cgroup, but it is not below any mount.
    """
    path = paths.get(kind, "")
    if not path or (path == "/" and not mounts[kind]):
        # Every process has a line for version 2. If that is not mounted, nothing can have attached a program to it.
        return "", ""
    for top, point in mounts[kind]:
        inside = path[len(top.rstrip("/")) :] + "/"
        # A path that begins with /.. is outside of this hook's cgroup namespace.
        if (path + "/").startswith(top.rstrip("/") + "/") and "/../" not in inside:
            return (point + inside).rstrip("/"), point
    problem = f"its cgroup {path} is not visible under any mounted cgroup hierarchy ({kind})"
    raise StepError("permit-failed", f"process {pid}", problem, "run the hook in the guest's own cgroup namespace")


# Neighbours -----------------------------------------------------------------------------------------------------------


def list_container_cgroups(root: Root, unified: str) -> list[str]:
    """Return the version 2 directories that belong to one container alone: its cgroup, and up to its systemd scope.

    crun puts a container below its scope (run.oci.systemd.subgroup, run.oci.delegate-cgroup in crun(1)), and systemd
    attaches the program of DeviceAllow to the scope. A scope with another process or another child is not one
    container's.
    """
    if not unified:
        return []
    above = list_scope_ancestors(unified)
    below = (unified, *above)
    alone = all(has_only_child(root, path, child) for path, child in zip(above, below))
    return [unified, *(above if alone else ())]


def list_scope_ancestors(unified: str) -> tuple[str, ...]:
    """Return the directories from above a version 2 cgroup up to its systemd scope; none if it is in no scope."""
    parent = unified.rpartition("/")[0]
    grandparent = parent.rpartition("/")[0]
    if unified.endswith(".scope"):
        return ()
    if parent.endswith(".scope"):
        return (parent,)
    return (parent, grandparent) if grandparent.endswith(".scope") else ()


def has_only_child(root: Root, path: str, child: str) -> bool:
    """Return whether a cgroup has no process of its own and no child other than this."""
    children = [name for name in root.list_names(path) if root.exists(f"{path}/{name}/cgroup.procs")]
    return root.read_text_or(f"{path}/cgroup.procs", "unknown") == "" and children == [child.rpartition("/")[2]]


def list_cgroup_ancestors(path: str, mount: str) -> list[str]:
    """Return the directories above a cgroup's, from the top of the hierarchy down, without its mount point."""
    parts = path[len(mount) :].strip("/").split("/")[:-1]
    return [f"{mount.rstrip('/')}/{'/'.join(parts[: count + 1])}" for count in range(len(parts))]


# Shared helpers -------------------------------------------------------------------------------------------------------


def permit_failed(subject: str, problem: str, nodes: Iterable[MadeNode | Numbers] = ()) -> StepError:
    """Return the StepError [permit-failed]. nodes: those that an entry of config.json would allow, for the hint."""
    numbers = [(node.major, node.minor) if isinstance(node, MadeNode) else node for node in nodes]
    rules = ", ".join(RULE.format(major, minor) for major, minor in numbers)
    return StepError("permit-failed", subject, problem, f"add to linux.resources.devices: {rules}" if rules else "")


def write_kernel_file(path: str, text: str) -> None:
    """Write to a file of the kernel in one system call. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
