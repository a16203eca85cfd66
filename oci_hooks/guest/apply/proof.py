# SPDX-License-Identifier: Apache-2.0
"""Verify, from a process in the container's cgroup, that its nodes open and its groups are viable."""

from __future__ import annotations

import errno
import os
import stat

from oci_hooks.guest.apply.cgroup import Cgroup, MadeNode, NodeCheck, permit_failed, write_kernel_file
from oci_hooks.guest.apply.child import end_child, start_child
from oci_hooks.system import read_pipe, step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from oci_hooks.credentials import Credentials
    from oci_hooks.system import Deadline, Root

# _IO(';', 103) of include/uapi/linux/vfio.h; struct vfio_group_status { __u32 argsz; __u32 flags; }
VFIO_GROUP_GET_STATUS = 0x3B67
VFIO_GROUP_FLAGS_VIABLE = 1

# Seconds that a killed child may take to end. Until then it is in the container's cgroup, which cannot be removed.
KILL_SECONDS = 0.5


@step("verify-nodes")
def verify_nodes(
    root: Root,
    cgroup: Cgroup,
    directory: int,
    nodes: Iterable[MadeNode],
    deadline: Deadline,
    flags: int = os.O_RDWR,
    credentials: Credentials | None = None,
) -> tuple[NodeCheck, ...]:
    """Open each node from inside the cgroup and return the results. Changes nothing.

    directory: descriptor of the container's directory that holds the nodes; flags: how they are opened; credentials: of
    the container's first process: with these each node that opened is opened once more. A forked child does it, because
    a process that enters a cgroup stays there. Raises StepError where the child can't enter, dies or is not done in
    time.
    """
    wanted = tuple(nodes)
    answer = read_child_answer(lambda: verify_in_child(root, cgroup, directory, wanted, flags, credentials), deadline)
    lines = [line.split(" ") for line in answer.splitlines()]
    if lines and lines[0][0] == "enter":
        reason = os.strerror(int(lines[0][1]))
        raise permit_failed(
            lines[0][2], f"cannot move the helper process that tests the device nodes into this cgroup: {reason}"
        )
    if len(lines) != len(wanted):
        raise permit_failed(
            f"process {cgroup.pid}", "the helper process that tests the device nodes in its cgroup died"
        )
    return tuple(NodeCheck(node, int(line[0]), line[1] == "1", int(line[2])) for node, line in zip(wanted, lines))


def verify_in_child(
    root: Root,
    cgroup: Cgroup,
    directory: int,
    nodes: tuple[MadeNode, ...],
    flags: int,
    credentials: Credentials | None,
) -> str:
    """Return the child's answer: a line `errno viable errno` a node, or one line `enter errno path`."""
    for path in (cgroup.devices, cgroup.unified):
        if path:
            try:
                write_kernel_file(root.host_path(f"{path}/cgroup.procs"), "0")
            except OSError as error:
                return f"enter {error.errno} {path}"
    # As the hook first: what it is denied, the cgroup denies; what only the user is denied, something else does.
    found = [verify_node(directory, node, flags) for node in nodes]
    denied = [0] * len(nodes)
    if credentials and not all(code for code, _ in found):
        from oci_hooks.guest.apply.container_user import become_user

        if become_user(credentials, cgroup.pid):
            denied = [0 if code else verify_node(directory, node, flags)[0] for node, (code, _) in zip(nodes, found)]
    return "\n".join(f"{code} {viable:d} {user}" for (code, viable), user in zip(found, denied))


def verify_node(directory: int, node: MadeNode, flags: int = os.O_RDWR) -> tuple[int, bool]:
    """Open one node and close it.

    Returns errno (0: it opened; ENODEV: the node is another device) and whether its group is viable.
    """
    import fcntl
    import struct

    from oci_hooks.guest.apply.container_dev import open_path

    above, _, name = node.name.rpartition("/")
    location = fd = -1
    try:
        # Component by component: a link instead of a directory could lead to another node with the same numbers.
        location = open_path(directory, above)
        # Checked before it is opened: opening a device can have side effects.
        if not is_device(os.stat(name, dir_fd=location, follow_symlinks=False), node):
            return errno.ENODEV, False
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=location)
        if not is_device(os.fstat(fd), node):
            return errno.ENODEV, False
        if not node.is_group:
            return 0, True
        status = fcntl.ioctl(fd, VFIO_GROUP_GET_STATUS, struct.pack("=II", 8, 0))
    except OSError as error:
        return error.errno or errno.EIO, False
    finally:
        for opened in (fd, location):
            if opened >= 0:
                os.close(opened)
    return 0, bool(struct.unpack("=II", status)[1] & VFIO_GROUP_FLAGS_VIABLE)


def is_device(status: os.stat_result, node: MadeNode) -> bool:
    """Return whether this is the character device that the node is expected to be."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(node.major, node.minor)


def find_access(
    root: Root, cgroup: Cgroup, directory: int, nodes: Iterable[MadeNode], deadline: Deadline
) -> dict[tuple[int, int], str]:
    """Return the access that the cgroup allows to each node, tested from inside: "r", "w", "rw" or "".

    Arguments and errors as of `verify_nodes`.
    """
    access: dict[tuple[int, int], str] = {}
    for letter, flags in (("r", os.O_RDONLY), ("w", os.O_WRONLY)):
        for check in verify_nodes(root, cgroup, directory, nodes, deadline, flags):
            numbers = (check.node.major, check.node.minor)
            access[numbers] = access.get(numbers, "") + ("" if check.is_denied else letter)
    return access


def read_child_answer(work: Callable[[], str], deadline: Deadline) -> str:
    """Return the answer of a forked child, which is killed at the deadline.

    Raises StepError if it does not answer.
    """
    child = start_child(lambda writer: os.write(writer, work().encode()))
    try:
        answer = read_pipe(child.pipe, deadline)
        if answer is None:
            problem = "the helper process that tests the device nodes in the container's cgroup did not finish in time"
            raise permit_failed(f"process {child.pid}", problem)
        return answer.decode()
    finally:
        end_child(child, KILL_SECONDS)
