# SPDX-License-Identifier: Apache-2.0
"""Permission to open device nodes from inside a container's cgroup: find the cgroup, prove, permit, take it back.

Both hierarchies may be there at once, and the kernel asks both (kernel: devcgroup_check_permission). Version 2 asks BPF
programs (bpf.py), version 1 has a list for each cgroup (Documentation/admin-guide/cgroup-v1/devices.rst). What is
widened is the container's own cgroup, with version 2 also the systemd scope that holds nothing but it. No other
ancestor of version 2 ever is; one of version 1 only when asked for, because there a child can't get what its parent
lacks.

The caller's order: `find_cgroup`, `prove`; when something is not permitted `plan_grant`, `permit`, `prove` again; when
it still is not, `forbid` and raise what `explain_denial` returns.
"""

from __future__ import annotations

import errno
import os
import stat

from oci_hooks.children import end_child, start_child
from oci_hooks.errors import StepError
from oci_hooks.files import read_pipe, step
from oci_hooks.mounts import read_mounts
from oci_hooks.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from oci_hooks.bpf import Numbers
    from oci_hooks.command import Deadline
    from oci_hooks.files import Root

# _IO(';', 103) of include/uapi/linux/vfio.h; struct vfio_group_status { __u32 argsz; __u32 flags; }
VFIO_GROUP_GET_STATUS = 0x3B67
VFIO_GROUP_FLAGS_VIABLE = 1

# Read and write is what a program that drives a device needs; mknod is never given.
ACCESS = "rw"
# How long a killed child may take to end. Until then it is in the container's cgroup, which can't be removed.
KILL_SECONDS = 0.5
# One entry of linux.resources.devices (runtime-spec, config-linux.md).
RULE = '{{"allow": true, "type": "c", "major": {}, "minor": {}, "access": "rw"}}'


class Node(Record):
    """A character device node in a container.

    name: relative to the directory that is given with it ("12", "vfio"); major, minor: what it must be; is_group:
    whether VFIO_GROUP_GET_STATUS can be asked.
    """

    name: str
    major: int
    minor: int
    is_group: bool = False


class Cgroup(Record):
    """Where a process's permission for devices is decided.

    pid: of that process; unified: directory of the version 2 hierarchy; devices: directory of the version 1 devices
    hierarchy; each "" where this machine has none; unified_mount, devices_mount: where these hierarchies begin;
    shared: those of the directories that are not the container's own, because this hook or the whole machine is in
    the same cgroup.
    """

    pid: int
    unified: str
    devices: str
    unified_mount: str = ""
    devices_mount: str = ""
    shared: tuple[str, ...] = ()


class NodeProof(Record):
    """What opening a node from inside the cgroup came to.

    error: errno, 0 when it opened; is_viable: what VFIO_GROUP_GET_STATUS said, True for nodes that are no groups.
    """

    node: Node
    error: int
    is_viable: bool = True

    @property
    def is_denied(self) -> bool:
        """Whether the device cgroup does not permit it; a nodev mount or a security module would say EACCES."""
        return self.error == errno.EPERM


class Grant(Record):
    """What to permit and where: known before anything is done, so that it can stand in a journal.

    nodes: major and minor of each; unified: version 2 directory or ""; devices: version 1 directories, from the top
    down: ancestors to widen and at last the container's own.
    """

    nodes: tuple[Numbers, ...]
    unified: str
    devices: tuple[str, ...]


# Finding --------------------------------------------------------------------------------------------------------------


def find_cgroup(root: Root, pid: int) -> Cgroup:
    """Return the cgroup of a process, as a record of directories. Raises StepError where it can't be told.

    Sources: /proc/self/mountinfo (proc(5)), /proc/<pid>/cgroup (cgroups(7)).
    """
    try:
        mounts = find_hierarchies(root)
        paths = read_paths(root, str(pid))
        own_paths = read_paths(root, "self")
    except OSError as error:
        raise fail(f"process {pid}", f"its cgroup can't be read: {error.strerror}") from None
    unified, unified_mount = place_path(mounts, "cgroup2", paths, pid)
    devices, devices_mount = place_path(mounts, "devices", paths, pid)
    places = (("cgroup2", unified), ("devices", devices))
    shared = tuple(place for kind, place in places if place and paths[kind] in ("/", own_paths.get(kind)))
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
    """Return a process's path in the "cgroup2" and the "devices" hierarchy, as far as there are these."""
    paths = {}
    for line in root.read_text(f"/proc/{process}/cgroup").split("\n"):
        hierarchy, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if hierarchy == "0" and not controllers:
            paths["cgroup2"] = path
        elif "devices" in controllers.split(","):
            paths["devices"] = path
    return paths


def place_path(mounts: dict[str, list[tuple[str, str]]], kind: str, paths: dict[str, str], pid: int) -> tuple[str, str]:
    """Return the directory of a process's cgroup of one kind and the mount point above it; both "" without such a kind.

    Raises StepError where the process has such a cgroup, but it is not below any mount.
    """
    path = paths.get(kind, "")
    if not path or (path == "/" and not mounts[kind]):
        # Every process has a line for version 2. Where nobody mounted it, nobody attached a program to it.
        return "", ""
    for top, point in mounts[kind]:
        inside = path[len(top.rstrip("/")) :] + "/"
        # A path that begins with /.. lies outside of this hook's cgroup namespace.
        if (path + "/").startswith(top.rstrip("/") + "/") and "/../" not in inside:
            return (point + inside).rstrip("/"), point
    raise fail(f"process {pid}", f"its {kind} cgroup {path} is below no mount of that hierarchy")


# Proving --------------------------------------------------------------------------------------------------------------


@step
def prove(
    root: Root, cgroup: Cgroup, directory: int, nodes: Iterable[Node], deadline: Deadline
) -> tuple[NodeProof, ...]:
    """Open each node from inside the cgroup and return what each came to. Changes nothing.

    directory: descriptor of the container's directory that holds the nodes. A forked child does it, because a process
    that enters a cgroup stays there. Raises StepError where the child can't enter, dies or is not done in time.
    """
    wanted = tuple(nodes)
    answer = ask_child(lambda: answer_for(root, cgroup, directory, wanted), deadline)
    lines = [line.split(" ") for line in answer.splitlines()]
    if lines and lines[0][0] == "enter":
        reason = os.strerror(int(lines[0][1]))
        raise fail(lines[0][2], f"can't be entered, to open the nodes as the container would: {reason}")
    if len(lines) != len(wanted):
        raise fail(f"process {cgroup.pid}", "the child that opens the nodes in its cgroup died without an answer")
    return tuple(NodeProof(node, int(line[0]), line[1] == "1") for node, line in zip(wanted, lines))


def answer_for(root: Root, cgroup: Cgroup, directory: int, nodes: tuple[Node, ...]) -> str:
    """Return the child's answer: a line `errno viable` a node, or one line `enter errno path`."""
    for path in (cgroup.devices, cgroup.unified):
        if path:
            try:
                write_file(root.host_path(f"{path}/cgroup.procs"), "0")
            except OSError as error:
                return f"enter {error.errno} {path}"
    return "\n".join(f"{code} {viable:d}" for code, viable in (try_node(directory, node) for node in nodes))


def try_node(directory: int, node: Node) -> tuple[int, bool]:
    """Open one node and close it.

    Returns errno (0: it opened; ENODEV: the node is another device) and whether it is viable.
    """
    import fcntl
    import struct

    from oci_hooks.container import open_path

    above, _, name = node.name.rpartition("/")
    place = fd = -1
    try:
        # Component by component: a link in place of a directory leads to another node of the same numbers.
        place = open_path(directory, above)
        # Looked at before it is opened: opening a device may do something.
        if not is_device(os.stat(name, dir_fd=place, follow_symlinks=False), node):
            return errno.ENODEV, False
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=place)
        if not is_device(os.fstat(fd), node):
            return errno.ENODEV, False
        if not node.is_group:
            return 0, True
        status = fcntl.ioctl(fd, VFIO_GROUP_GET_STATUS, struct.pack("=II", 8, 0))
    except OSError as error:
        return error.errno or errno.EIO, False
    finally:
        for opened in (fd, place):
            if opened >= 0:
                os.close(opened)
    return 0, bool(struct.unpack("=II", status)[1] & VFIO_GROUP_FLAGS_VIABLE)


def is_device(status: os.stat_result, node: Node) -> bool:
    """Tell whether this is the character device that the node is meant to be."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(node.major, node.minor)


def ask_child(work: Callable[[], str], deadline: Deadline) -> str:
    """Return what a forked child computes; it ends with its answer, and is killed when there is no time left.

    Raises StepError where it does not answer.
    """
    child = start_child(lambda writer: os.write(writer, work().encode()))
    try:
        answer = read_pipe(child.pipe, deadline)
        if answer is None:
            raise fail(f"process {child.pid}", "opening the nodes inside the container's cgroup was not done in time")
        return answer.decode()
    finally:
        end_child(child, KILL_SECONDS)


# Permitting -----------------------------------------------------------------------------------------------------------


def plan_grant(root: Root, cgroup: Cgroup, nodes: Iterable[Node], widen_parents: bool = False) -> Grant:
    """Return what has to be permitted where. Changes nothing. Raises StepError where it must not be done.

    nodes: those that are not permitted now; widen_parents: on version 1, permit them to each ancestor that lacks them
    too (a pod's cgroup inside its own virtual machine; on a shared machine that is not the hook's to decide).
    """
    wanted = tuple(nodes)
    own = [place for place in (cgroup.unified, cgroup.devices) if place and place not in cgroup.shared]
    if cgroup.shared and not own:
        problem = "is not the container's own cgroup, so a permission there would be for others too"
        raise fail(cgroup.shared[0], problem, wanted)
    directories: list[str] = []
    if cgroup.devices in own:
        if widen_parents:
            ancestors = list_ancestors(cgroup.devices, cgroup.devices_mount)
            directories += [path for path in ancestors if lacks(root, path, wanted)]
        directories.append(cgroup.devices)
    numbers = tuple((node.major, node.minor) for node in wanted)
    return Grant(numbers, cgroup.unified if cgroup.unified in own else "", tuple(directories))


@step
def permit(root: Root, grant: Grant) -> None:
    """Permit reading and writing of exactly these nodes. Doing it twice is doing it once. Raises StepError."""
    for path in grant.devices:
        for major, minor in grant.nodes:
            allow_node(root, path, major, minor)
    for path in list_own(root, grant.unified):
        change_programs(root, path, grant.nodes, add_nodes)


@step
def forbid(root: Root, grant: Grant) -> None:
    """Take a permission back, whole or half given, by this process or another. Raises StepError.

    A cgroup that is gone is as good as done.
    """
    for path in reversed(grant.devices):
        for major, minor in grant.nodes:
            deny_node(root, path, major, minor)
    # Whoever else came into the scope meanwhile: what was added is taken away.
    for path in (grant.unified, *list_scope(grant.unified)):
        if path and root.exists(path):
            change_programs(root, path, grant.nodes, remove_nodes)


def list_own(root: Root, unified: str) -> list[str]:
    """Return the directories of version 2 that are one container's alone: its cgroup, and up to its systemd scope.

    crun puts a container below its scope (run.oci.systemd.subgroup, run.oci.delegate-cgroup in crun(1)), and systemd
    attaches the program of DeviceAllow to the scope. A scope with another process or another child in it is not one
    container's.
    """
    if not unified:
        return []
    above = list_scope(unified)
    below = (unified, *above)
    alone = all(is_alone(root, path, child) for path, child in zip(above, below))
    return [unified, *(above if alone else ())]


def list_scope(unified: str) -> tuple[str, ...]:
    """Return the directories from above a cgroup of version 2 up to its systemd scope; none where it is in no scope."""
    parent = unified.rpartition("/")[0]
    grandparent = parent.rpartition("/")[0]
    if unified.endswith(".scope"):
        return ()
    if parent.endswith(".scope"):
        return (parent,)
    return (parent, grandparent) if grandparent.endswith(".scope") else ()


def is_alone(root: Root, path: str, child: str) -> bool:
    """Tell whether a cgroup has no process of its own and no other child than this."""
    children = [name for name in root.list_names(path) if root.exists(f"{path}/{name}/cgroup.procs")]
    return root.read_text_or(f"{path}/cgroup.procs", "unknown") == "" and children == [child.rpartition("/")[2]]


def allow_node(root: Root, path: str, major: int, minor: int) -> None:
    """Permit one node to a cgroup of version 1. Raises StepError, which names the parent if that lacks it."""
    try:
        write_file(root.host_path(f"{path}/devices.allow"), f"c {major}:{minor} {ACCESS}")
    except OSError as error:
        problem = f"c {major}:{minor} {ACCESS} is not accepted: {error.strerror}"
        parent = path.rpartition("/")[0]
        # Kernel: devcgroup_update_access, parent_has_perm.
        if error.errno == errno.EPERM and root.exists(f"{parent}/devices.list"):
            problem = f"c {major}:{minor} {ACCESS} is not accepted, because the parent cgroup {parent} lacks it"
        raise fail(path, problem, [(major, minor)]) from None


def deny_node(root: Root, path: str, major: int, minor: int) -> None:
    """Take one node from a cgroup of version 1, if that is still there. Raises StepError."""
    try:
        write_file(root.host_path(f"{path}/devices.deny"), f"c {major}:{minor} {ACCESS}")
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ENODEV:
            # The directory went away between opening and writing.
            return
        raise fail(path, f"c {major}:{minor} {ACCESS} can't be taken back: {error.strerror}") from None


def list_ancestors(path: str, mount: str) -> list[str]:
    """Return the directories above a cgroup's, from below the hierarchy's mount point down."""
    parts = path[len(mount) :].strip("/").split("/")[:-1]
    return [f"{mount.rstrip('/')}/{'/'.join(parts[: count + 1])}" for count in range(len(parts))]


def lacks(root: Root, path: str, nodes: Iterable[Node]) -> bool:
    """Tell whether a version 1 cgroup does not have one of the nodes, by its devices.list."""
    rules = [parse_rule(line) for line in root.read_text_or(f"{path}/devices.list", "").splitlines()]
    return not all(any(covers(rule, node) for rule in rules) for node in nodes)


def parse_rule(line: str) -> tuple[str, str, str, str]:
    """Return kind, major, minor and access of a line of devices.list, e.g. "c 10:196 rw"."""
    kind, numbers, access = (line.split() + ["", "", ""])[:3]
    major, _, minor = numbers.partition(":")
    return kind, major, minor, access


def covers(rule: tuple[str, str, str, str], node: Node) -> bool:
    """Tell whether a rule permits reading and writing of a node."""
    kind, major, minor, access = rule
    return (
        kind in ("a", "c")
        and major in ("*", str(node.major))
        and minor in ("*", str(node.minor))
        and set(ACCESS) <= set(access)
    )


def change_programs(
    root: Root, path: str, nodes: tuple[Numbers, ...], change: Callable[[bytes, tuple[Numbers, ...]], bytes]
) -> None:
    """Replace each device program of one cgroup of version 2 by a changed one. Raises StepError.

    change: from a program's instructions and the nodes to the new instructions. A cgroup without a program of its own
    restricts nothing, and is left alone.
    """
    from oci_hooks import bpf

    fd = -1
    try:
        fd = os.open(root.host_path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        flags, programs = bpf.query_programs(fd)
        for program in programs:
            change_program(fd, flags, program, lambda code: change(code, nodes))
    except OSError as error:
        problem = f"its device programs can't be read or replaced: {error.strerror}"
        raise fail(path, problem, nodes) from None
    except bpf.ProgramError as error:
        raise fail(path, f"its device program can't be changed: {error}", nodes) from None
    finally:
        if fd >= 0:
            os.close(fd)


def change_program(cgroup: int, flags: int, program: int, change: Callable[[bytes], bytes]) -> None:
    """Replace one device program by a changed one, or leave it where that is the same. Raises OSError, ProgramError.

    cgroup: descriptor; flags: how its programs are attached; program: id.
    """
    from oci_hooks import bpf

    old = bpf.open_program(program)
    try:
        code = bpf.dump_program(old)
        changed = change(code)
        if changed == code:
            return
        new = bpf.load_program(changed)
        try:
            bpf.replace_program(cgroup, new, old, flags)
        finally:
            os.close(new)
    finally:
        os.close(old)


def add_nodes(code: bytes, nodes: tuple[Numbers, ...]) -> bytes:
    """Return a program that permits these nodes besides all that it permits now."""
    from oci_hooks import bpf

    return bpf.make_prefix([*bpf.read_prefix(code), *nodes]) + bpf.strip_prefix(code)


def remove_nodes(code: bytes, nodes: tuple[Numbers, ...]) -> bytes:
    """Return a program without what was once added for these nodes."""
    from oci_hooks import bpf

    return bpf.make_prefix(set(bpf.read_prefix(code)) - set(nodes)) + bpf.strip_prefix(code)


# Explaining -----------------------------------------------------------------------------------------------------------


def explain_denial(root: Root, cgroup: Cgroup, proofs: Iterable[NodeProof]) -> StepError:
    """Return the error for nodes that don't open from inside the cgroup although everything was done for it."""
    bad = [proof for proof in proofs if proof.error or not proof.is_viable]
    told = ", ".join(f"{proof.node.name}: {describe_proof(proof)}" for proof in bad)
    denied = [proof.node for proof in bad if proof.is_denied]
    above = find_programs_above(root, cgroup) if denied and cgroup.unified else []
    own = list_own(root, cgroup.unified)
    above = [path for path in above if path not in own]
    if above:
        told += f" (the cgroup {above[0]} above has a device program, which is not the hook's to change)"
    return fail(cgroup.unified or cgroup.devices or f"process {cgroup.pid}", f"from inside it, {told}", denied)


def describe_proof(proof: NodeProof) -> str:
    """Return in words what a proof came to."""
    if not proof.error:
        return "opens" if proof.is_viable else "opens, and the group is not viable"
    words = {
        errno.EPERM: "not permitted by the device cgroup",
        errno.EACCES: "not permitted by its mode, a nodev mount or a security module",
        errno.EBUSY: "another process holds it",
        errno.ENOENT: "there is no such node",
        errno.ENODEV: "the node is another device, or its device is gone",
        errno.ENXIO: "no such device is behind it",
    }
    return words.get(proof.error, os.strerror(proof.error))


@step
def find_programs_above(root: Root, cgroup: Cgroup) -> list[str]:
    """Return the ancestors of a version 2 cgroup that have device programs of their own, the nearest first."""
    from oci_hooks import bpf

    found = []
    for path in reversed(list_ancestors(cgroup.unified, cgroup.unified_mount)):
        try:
            fd = os.open(root.host_path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if bpf.query_programs(fd)[1]:
                found.append(path)
        except OSError:
            continue
        finally:
            os.close(fd)
    return found


def fail(subject: str, problem: str, nodes: Iterable[Node | Numbers] = ()) -> StepError:
    """Return the StepError [permit-failed]. nodes: those that an entry of config.json would permit, for the hint."""
    numbers = [(node.major, node.minor) if isinstance(node, Node) else node for node in nodes]
    rules = ", ".join(RULE.format(major, minor) for major, minor in numbers)
    return StepError("permit-failed", subject, problem, f"add to linux.resources.devices: {rules}" if rules else "")


def write_file(path: str, text: str) -> None:
    """Write to a file of the kernel in one system call. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
