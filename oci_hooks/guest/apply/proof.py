# SPDX-License-Identifier: Apache-2.0
"""Verify, from a process in the container's cgroup, that its nodes open and its groups are viable.

A child does it, because a process that enters a cgroup stays there. It is one for all of a run, started while the
kernel binds devices: to fork it and to enter the cgroup, for which the kernel waits for all processors
(kernel/cgroup/cgroup.c, cgroup_attach_lock), takes longer than all that it opens.
"""

from __future__ import annotations

import errno
import os
import stat

from oci_hooks.guest.apply.cgroup import Cgroup, MadeNode, NodeCheck, permit_failed, write_kernel_file
from oci_hooks.guest.apply.child import Child, end_child, start_child
from oci_hooks.system import step

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
# The last line of a request and of an answer, with the end of the one before.
END = b"\n.\n"


class Prover:
    """A child process in a container's cgroup that opens nodes when it is asked to. Changes nothing.

    cgroup: the container's; open_dev: returns a descriptor of its directory that has the nodes, raises OSError;
    credentials: of its first process, None if they are unknown.
    """

    def __init__(
        self, root: Root, cgroup: Cgroup, open_dev: Callable[[], int], credentials: Credentials | None = None
    ) -> None:
        self.root = root
        self.cgroup = cgroup
        self.open_dev = open_dev
        self.credentials = credentials
        self.child: Child | None = None
        self.requests = -1

    def start(self, deadline: Deadline) -> None:
        """Start the child, unless it was started. Raises OSError where there can be none."""
        if self.child:
            return
        reader, self.requests = os.pipe()
        try:
            self.child = start_child(lambda writer: self.serve(reader, writer, deadline), (self.requests,))
        except OSError:
            os.close(self.requests)
            raise
        finally:
            os.close(reader)

    def ask(self, request: str, deadline: Deadline) -> str:
        """Return the child's answer, incomplete if the child dies. Raises StepError at the deadline, OSError."""
        self.start(deadline)
        if self.child is None:
            raise AssertionError("start() raises OSError without a child")
        try:  # noqa: SIM105 - contextlib costs an import
            os.write(self.requests, request.encode() + END)
        except BrokenPipeError:
            # The child is dead, so that there is no answer.
            pass
        answer = read_message(self.child.pipe, deadline)
        if answer is None:
            problem = "the helper process that tests the device nodes in the container's cgroup did not finish in time"
            raise permit_failed(f"process {self.child.pid}", problem)
        return answer.decode()

    def close(self) -> None:
        """End the child, if there is one. Idempotent."""
        if self.child:
            child, self.child = self.child, None
            os.close(self.requests)
            end_child(child, KILL_SECONDS)

    # In the child ----------------------------------------------------------------------------------------------------

    def serve(self, requests: int, writer: int, deadline: Deadline) -> None:
        """Enter the cgroup and answer requests until there are no more: the hook ends the child, or was killed.

        An answer has a line `errno viable user_errno` for each node, or is one line `enter errno path`.
        """
        refusal = self.enter_cgroup()
        # A process with a limit on its time, in case that another one keeps the pipe's other end.
        while True:
            request = read_message(requests, deadline)
            if not request or not request.endswith(END):
                return
            first, *lines = request.decode().split("\n")[:-2]
            answer = refusal or self.open_nodes(int(first), tuple(map(parse_node, lines)))
            os.write(writer, answer.encode() + END)

    def enter_cgroup(self) -> str:
        """Enter the container's cgroup in each hierarchy. Return "", or why that failed."""
        for path in (self.cgroup.devices, self.cgroup.unified):
            if path:
                try:
                    write_kernel_file(self.root.host_path(f"{path}/cgroup.procs"), "0")
                except OSError as error:
                    return f"enter {error.errno} {path}"
        return ""

    def open_nodes(self, flags: int, nodes: tuple[MadeNode, ...]) -> str:
        """Open each node and return the answer.

        Once the cgroup denies none, they are opened as the container's user, too. The child stays that user.
        """
        try:
            directory = self.open_dev()
        except OSError as error:
            return "\n".join(f"{error.errno} 0 0" for _ in nodes)
        # As the hook first: what it is denied, the cgroup denies; what only the user is denied, something else does.
        found = [verify_node(directory, node, flags) for node in nodes]
        codes = [code for code, _ in found]
        denied = [0] * len(nodes)
        if self.credentials and flags == os.O_RDWR and errno.EPERM not in codes and not all(codes):
            denied = self.open_as_user(self.credentials, directory, nodes, codes)
        os.close(directory)
        return "\n".join(f"{code} {viable:d} {user}" for (code, viable), user in zip(found, denied))

    def open_as_user(
        self, credentials: Credentials, directory: int, nodes: tuple[MadeNode, ...], codes: list[int]
    ) -> list[int]:
        """Open the nodes that opened for the hook with the container's credentials. Return their errno, 0 for opened.

        codes: errno of each node for the hook.
        """
        if credentials.opens_all and not any(node.is_noiommu for node in nodes):
            return [0] * len(nodes)
        from oci_hooks.guest.apply.container_user import become_user

        if not become_user(credentials, self.cgroup.pid):
            return [0] * len(nodes)
        return [0 if code else verify_node(directory, node)[0] for node, code in zip(nodes, codes)]


def read_message(pipe: int, deadline: Deadline) -> bytes | None:
    """Return what comes through a pipe up to END, or up to its end; None if neither comes before the deadline."""
    import select

    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    message = b""
    while poller.poll(deadline.remaining() * 1000):
        more = os.read(pipe, 65536)
        message += more
        if not more or message.endswith(END):
            return message
    return None


def parse_node(line: str) -> MadeNode:
    """Return the node in a line of a request."""
    major, minor, is_group, name = line.split(" ", 3)
    return MadeNode(name, int(major), int(minor), is_group == "1")


@step("verify-nodes")
def verify_nodes(
    _root: Root,
    cgroup: Cgroup,
    prover: Prover,
    nodes: Iterable[MadeNode],
    deadline: Deadline,
    flags: int = os.O_RDWR,
) -> tuple[NodeCheck, ...]:
    """Open each node from inside the cgroup and return the results. Changes nothing.

    prover: of the container, whose cgroup this is; flags: how the nodes are opened. The last request is the one in
    which the cgroup denies no node: with the container's credentials each is opened once more, in the same child.
    Raises StepError where the child can't enter, dies or is not done in time; OSError where there can be none.
    """
    wanted = tuple(nodes)
    lines = [f"{node.major} {node.minor} {node.is_group:d} {node.name}" for node in wanted]
    answer = prover.ask("\n".join([str(flags), *lines]), deadline)
    results = [line.split(" ", 2) for line in answer.split("\n")[:-2]]
    if results and results[0][0] == "enter":
        reason = os.strerror(int(results[0][1]))
        raise permit_failed(
            results[0][2], f"cannot move the helper process that tests the device nodes into this cgroup: {reason}"
        )
    if len(results) != len(wanted):
        raise permit_failed(
            f"process {cgroup.pid}", "the helper process that tests the device nodes in its cgroup died"
        )
    return tuple(
        NodeCheck(node, int(code), viable == "1", int(user)) for node, (code, viable, user) in zip(wanted, results)
    )


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
    root: Root, prover: Prover, nodes: Iterable[MadeNode], deadline: Deadline
) -> dict[tuple[int, int], str]:
    """Return the access that the cgroup's version 1 list allows to each node: "r", "w", "rw" or "".

    prover: of the container; another one is made for that hierarchy alone. Errors as of `verify_nodes`.
    """
    cgroup = prover.cgroup.replace(unified="")
    alone = Prover(root, cgroup, prover.open_dev)
    access: dict[tuple[int, int], str] = {}
    try:
        for letter, flags in (("r", os.O_RDONLY), ("w", os.O_WRONLY)):
            for check in verify_nodes(root, cgroup, alone, nodes, deadline, flags):
                numbers = (check.node.major, check.node.minor)
                access[numbers] = access.get(numbers, "") + ("" if check.is_denied else letter)
    finally:
        alone.close()
    return access
