# SPDX-License-Identifier: Apache-2.0
"""Find the processes that have VFIO nodes open, the likely ones first. Changes nothing.

The kernel has no list of a node's users: each link in /proc/PID/fd has to be read, hundreds of thousands on a busy
host. So a search for one group ends where it is found, and one of all groups takes one pass. Sources: proc(5);
virt/kvm/kvm_main.c, kvm_create_vm_debugfs: the directory PID-FD in debugfs for each virtual machine.
"""

from __future__ import annotations

import os

from oci_hooks.frozen import Frozen
from oci_hooks.linux.pci import VFIO_CLASS
from oci_hooks.linux.processes import Process, find_descriptors, list_family, read_process, read_status
from oci_hooks.linux.vfio import CDEV_CLASS
from oci_hooks.oci import GROUP_PREFIX
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from oci_hooks.system import Deadline, Root

# Seconds before the deadline at which a search ends: time to report the result.
SCAN_SPARE = 0.5
VFIO_MODULE = "/sys/module/vfio"
KVM_MACHINES = "/sys/kernel/debug/kvm"
# Number of descriptors of one process after which the clock is checked again.
DESCRIPTORS_PER_CHECK = 256


class Holders(Frozen):
    """The result of a search. processes: those that have one of the nodes open, in the order of their ids.

    looked, total: number of processes examined in time, and of all; hidden: of those that may not be examined.
    """

    processes: tuple[Process, ...]
    looked: int
    total: int
    hidden: int


class HolderFinder:
    """The processes that have VFIO nodes open. What one search has seen counts for the next one of the same run.

    likely: returns whether a program of this name probably has a group open; deadline: of the run, before which each
    search ends.
    """

    def __init__(self, root: Root, deadline: Deadline, likely: Callable[[str], bool]) -> None:
        self.root = root
        self.deadline = deadline
        self.likely = likely
        self.files: dict[int, frozenset[str]] = {}
        self.answer: dict[str, Any] = {"open": [], "looked": 0, "total": 0, "hidden": 0}
        self.is_complete = False

    def list_files(self, pid: int) -> frozenset[str]:
        """Return the VFIO nodes that a process has open; none if it is gone or not readable."""
        if pid not in self.files:
            try:
                self.files[pid] = frozenset(self.root.ask(list_vfio_files, f"/proc/{pid}"))
            except OSError:
                self.files[pid] = frozenset()
        return self.files[pid]

    def find(self, nodes: Iterable[str], first: tuple[int, ...] = ()) -> Holders:
        """Return the processes that have one of these nodes open. Raises OSError.

        nodes: paths on the host; first: processes to examine before all others, regardless of the time: on a busy host
        the search may not reach them. A group has one user, who may share it with relatives: other processes are not
        examined once it is found.
        """
        wanted = frozenset(nodes)
        holders = [pid for pid in first if wanted & self.list_files(pid)]
        if holders:
            return self.make_holders(holders)
        if not self.is_complete and not self.find_known(wanted):
            self.scan(wanted, first)
        found = self.find_known(wanted)
        relatives = {relative for pid in found for relative in self.list_relatives(pid)}
        return self.make_holders({*found, *(pid for pid in relatives if wanted & self.list_files(pid))})

    def find_all(self) -> dict[str, tuple[Process, ...]]:
        """Return the processes that have any VFIO node open, by its path. Raises OSError."""
        if is_unused(self.root):
            self.is_complete = True
            return {}
        self.scan(frozenset(), ())
        paths = sorted({path for files in self.files.values() for path in files})
        return {path: self.make_holders(self.find_known(frozenset((path,)))).processes for path in paths}

    @property
    def counts(self) -> Holders:
        """How far the last scan came."""
        return self.make_holders(())

    def find_known(self, wanted: frozenset[str]) -> list[int]:
        """Return those processes examined so far that have one of these nodes open."""
        return [pid for pid, files in self.files.items() if wanted & files]

    def scan(self, wanted: frozenset[str], first: tuple[int, ...]) -> None:
        """Examine processes until one has a wanted node open; all of them if none is wanted in particular."""
        known, machines = frozenset(first), list_virtual_machines(self.root)
        self.answer = self.root.ask(list_holders, "/proc", wanted, known, machines, self.likely, self.deadline)
        files: dict[int, set[str]] = {}
        for pid, path in self.answer["open"]:
            files.setdefault(read_status(self.root, pid, "Tgid") or pid, set()).add(path)
        self.files.update((pid, frozenset(paths)) for pid, paths in files.items())
        self.is_complete = self.answer["looked"] == self.answer["total"]

    def list_relatives(self, pid: int) -> tuple[int, ...]:
        """Return a process's children and its parent."""
        parent = read_status(self.root, pid, "PPid")
        return (*list_family(self.root, pid)[1:], *((parent,) if parent > 1 else ()))

    def make_holders(self, pids: Iterable[int]) -> Holders:
        """Return the result for these processes, with the numbers of the last scan."""
        numbers = (self.answer[name] for name in ("looked", "total", "hidden"))
        return Holders(tuple(read_process(self.root, pid) for pid in sorted(pids)), *numbers)


def is_unused(root: Root) -> bool:
    """Return whether nobody has a group open: there is none, or the module's only users are those that depend on it.

    Each open group, device and container keeps the module in memory (kernel: file_operations.owner, try_module_get).
    False if it is unknown, because VFIO is built into the kernel.
    """
    if not root.list_names(VFIO_CLASS) and not root.list_names(CDEV_CLASS):
        return True
    users = root.read_text_or(f"{VFIO_MODULE}/refcnt", "")
    return users.isdigit() and int(users) == len(root.list_names(f"{VFIO_MODULE}/holders"))


def list_virtual_machines(root: Root) -> tuple[int, ...]:
    """Return the processes, or threads of them, that made a virtual machine with KVM; none without debugfs."""
    try:
        names = root.list_names(KVM_MACHINES)
    except OSError:
        return ()
    return tuple(int(pid) for pid, dash, _ in (name.partition("-") for name in names) if dash and pid.isdigit())


@tagged("list-holders")
def list_holders(
    proc: str,
    wanted: frozenset[str],
    known: frozenset[int],
    machines: tuple[int, ...],
    likely: Callable[[str], bool],
    deadline: Deadline,
) -> dict[str, Any]:
    """Return the processes that have VFIO nodes open, up to the first that has a wanted one.

    open: [pid, path of a node], without this process; looked, total: number of processes examined in time, and of all;
    hidden: number of those that may not be examined. proc: of /proc; wanted: paths of nodes, empty: examine all
    processes; known: processes that were examined before; machines: processes to examine first. Raises OSError.
    """
    pids = {int(name) for name in os.listdir(proc) if name.isdigit()} - {os.getpid()}
    found: list[list[Any]] = []
    looked, hidden = len(pids & known), 0
    try:
        for pid in order_processes(proc, pids - known, machines, likely, deadline):
            check_time(deadline)
            try:
                paths = list_vfio_files(f"{proc}/{pid}", deadline)
            except PermissionError:
                paths, hidden = [], hidden + 1
            except (FileNotFoundError, ProcessLookupError):
                # It has ended.
                paths = []
            looked += pid in pids
            found += [[pid, path] for path in paths]
            if not wanted.isdisjoint(paths):
                break
    except TimeoutError:
        pass
    return {"open": found, "looked": looked, "total": len(pids), "hidden": hidden}


def order_processes(
    proc: str, pids: set[int], machines: tuple[int, ...], likely: Callable[[str], bool], deadline: Deadline
) -> Iterator[int]:
    """Yield all processes, the likely ones first: those of virtual machines, those of likely programs, the newest.

    A host's own services, which have no VFIO node open, were started first. Raises TimeoutError.
    """
    yield from machines
    later = []
    for pid in sorted(pids.difference(machines), reverse=True):
        if is_likely(f"{proc}/{pid}/exe", likely):
            yield pid
        else:
            later.append(pid)
            check_time(deadline)
    yield from later


def is_likely(path: str, likely: Callable[[str], bool]) -> bool:
    """Return whether a process's program is a likely one. path: of the link to it; kernel threads have none."""
    try:
        return likely(os.readlink(path).rpartition("/")[2])
    except OSError:
        return False


def check_time(deadline: Deadline) -> None:
    """Raise TimeoutError if only the time to report the result is left."""
    if deadline.remaining() < SCAN_SPARE:
        raise TimeoutError


@tagged("list-vfio-files")
def list_vfio_files(location: str, deadline: Deadline | None = None) -> list[str]:
    """Return the VFIO nodes that a process has open. Raises OSError, TimeoutError.

    location: its directory in /proc; deadline: None to examine all descriptors, however many there are.
    """
    directory, names = find_descriptors(location)
    found = []
    # Below an open directory: each whole path would be resolved anew, a fifth of the time.
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, name in enumerate(names, 1):
            # One process may have a million of them.
            if deadline and not number % DESCRIPTORS_PER_CHECK:
                check_time(deadline)
            try:
                path = os.readlink(name, dir_fd=fd)
            except PermissionError:
                # The directory of another process of this user can be listed without CAP_SYS_PTRACE.
                raise
            except OSError:
                # Closed meanwhile.
                continue
            if path.startswith(GROUP_PREFIX):
                found.append(path)
    finally:
        os.close(fd)
    return found
