# SPDX-License-Identifier: Apache-2.0
"""The search for the processes that have a group open: its order, its end, and what it says when it was cut short."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks.host import checks
from oci_hooks.host.hypervisor import may_use_vfio
from oci_hooks.linux import holders
from oci_hooks.linux.holders import DESCRIPTORS_PER_CHECK, KVM_MACHINES, SCAN_SPARE, HolderFinder, list_vfio_files
from oci_hooks.linux.processes import find_descriptors
from oci_hooks.linux.vfio import VfioGroup
from oci_hooks.system import Deadline, Root
from tests.support.fake_host import HostTree

pytestmark = pytest.mark.unit

QEMU, DPDK, OTHER = "/usr/bin/qemu-system-x86_64", "/usr/bin/dpdk-testpmd", "/usr/bin/other"
NODE = "/dev/vfio/12"
# More processes than the deadline of a test allows to examine.
ENDLESS = 1_000_000


class Countdown(Deadline):
    """A deadline that is near after the clock was looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__(8)
        self.looks = looks

    def remaining(self) -> float:
        self.looks -= 1
        return SCAN_SPARE if self.looks >= 0 else SCAN_SPARE / 2


class CountingRoot(Root):
    """A root that keeps what it was asked."""

    def __init__(self, top: Path) -> None:
        super().__init__(str(top))
        self.asked: list[str] = []

    def ask(self, question: Any, path: str, *more: object) -> Any:
        self.asked.append(f"{getattr(question, 'tag', question.__name__)} {path}")
        return super().ask(question, path, *more)


@pytest.fixture(name="tree")
def make_tree(tmp_path: Path) -> HostTree:
    """Return a host with a group, without processes."""
    tree = HostTree(tmp_path)
    tree.vfio("12", 0)
    return tree


@pytest.fixture(name="order")
def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of the processes whose descriptors were read, in this order."""
    seen: list[int] = []

    def list_files(location: str, *more: Any) -> list[str]:
        seen.append(int(location.rpartition("/")[2]))
        return list_vfio_files(location, *more)

    list_files.tag = list_vfio_files.tag  # type: ignore[attr-defined]
    monkeypatch.setattr(holders, "list_vfio_files", list_files)
    return seen


def make_finder(tree: HostTree, looks: int = ENDLESS) -> HolderFinder:
    """Return a search on this host. looks: how often the clock may be looked at before the time is over."""
    return HolderFinder(tree.root, Countdown(looks), may_use_vfio)


def name_pids(found: holders.Holders) -> list[int]:
    """Return the processes of a result."""
    return [process.pid for process in found.processes]


# Order ----------------------------------------------------------------------------------------------------------------


def test_find_order_likely_first(tree: HostTree, order: list[int]) -> None:
    """The sandbox's own, those with a virtual machine, hypervisors and DPDK's programs, then the newest."""
    for pid in (1, 2, 35, 300, 400):
        tree.process(pid, OTHER, opened=("/dev/null",))
    tree.process(20, QEMU, opened=("/dev/null",))
    tree.process(30, DPDK, opened=("/dev/null",))
    tree.process(40, OTHER, opened=("/dev/null",))
    tree.write(f"{KVM_MACHINES}/40-11/pages_4k")
    tree.write(f"{KVM_MACHINES}/exits")
    found = make_finder(tree).find((NODE,), (400, 300))
    assert order == [400, 300, 40, 30, 20, 35, 2, 1]
    assert (found.looked, found.total, found.hidden) == (8, 8, 0)


def test_find_own_hypervisor_ends_search(tree: HostTree, order: list[int]) -> None:
    """With no time at all: the state's own hypervisor is examined all the same."""
    for pid in (60, 70, 80):
        tree.process(pid, QEMU, opened=(NODE,))
    assert name_pids(make_finder(tree, 0).find((NODE,), (70,))) == [70]
    assert order == [70]


def test_find_likely_process_ends_search(tree: HostTree, order: list[int]) -> None:
    for pid in range(100, 120):
        tree.process(pid, OTHER, opened=("/dev/null",))
    tree.process(50, QEMU, opened=("/dev/null", NODE))
    tree.process(40, QEMU, opened=("/dev/null",))
    found = make_finder(tree).find((NODE,))
    assert (name_pids(found), order) == ([50], [50])


def test_find_holder_with_relatives(tree: HostTree) -> None:
    """A parent and children may share the descriptor."""
    tree.process(50, OTHER, opened=(NODE,))
    tree.process(51, OTHER, parent=50, opened=(NODE,))
    tree.process(52, OTHER, parent=51, opened=(NODE,))
    tree.process(53, OTHER, parent=51, opened=("/dev/vfio/13",))
    assert name_pids(make_finder(tree).find((NODE,))) == [51, 52]
    (tree.top / "proc/52/exe").unlink()
    (tree.top / "proc/52/exe").symlink_to("/")
    tree.process(54, QEMU, parent=51, opened=(NODE,))
    assert name_pids(make_finder(tree).find((NODE,))) == [51, 54]


def test_find_again_examines_nothing_twice(tree: HostTree, order: list[int]) -> None:
    """One process that holds all groups of a container is read once, and so is a host on which nobody holds any."""
    tree.process(40, OTHER, opened=("/dev/null",))
    tree.process(50, QEMU, opened=(NODE, "/dev/vfio/13"))
    finder = make_finder(tree)
    assert [name_pids(finder.find((f"/dev/vfio/{number}",), (50,))) for number in (12, 13)] == [[50], [50]]
    assert order == [50]
    order.clear()
    finder = make_finder(tree)
    assert [name_pids(finder.find((f"/dev/vfio/{number}",))) for number in (12, 13, 14, 15)] == [[50], [50], [], []]
    assert order == [50, 50, 40]


def test_find_machine_by_thread(tree: HostTree) -> None:
    """KVM names the thread that made the virtual machine; its process is what a user can end."""
    tree.process(50, "/usr/bin/cloud-hypervisor", opened=(NODE,))
    tree.thread(57, 50)
    (tree.top / "proc/57/fd").mkdir()
    (tree.top / "proc/57/fd/3").symlink_to(NODE)
    tree.write(f"{KVM_MACHINES}/57-11/pages_4k")
    assert name_pids(make_finder(tree).find((NODE,))) == [50]


PROCESSES = st.dictionaries(
    st.integers(2, 40),
    st.tuples(st.sampled_from([QEMU, DPDK, OTHER]), st.sets(st.sampled_from([12, 13, 14]), max_size=2), st.booleans()),
    max_size=8,
)


@given(PROCESSES, st.sets(st.integers(2, 40), max_size=3), st.sampled_from([12, 13, 14]))
def test_find_finds_what_is_there(
    tmp_path_factory: pytest.TempPathFactory, made: dict[int, Any], first: set[int], wanted: int
) -> None:
    """In whichever order: somebody is found if anybody has it open, nobody else is, and a survey finds all."""
    tree = HostTree(tmp_path_factory.mktemp("host"))
    tree.vfio("12", 0)
    for pid, (program, groups, has_machine) in made.items():
        tree.process(pid, program, opened=("/dev/null", *(f"/dev/vfio/{group}" for group in groups)))
        if has_machine:
            tree.write(f"{KVM_MACHINES}/{pid}-3/exits")
    real = {pid for pid, (_, groups, _) in made.items() if wanted in groups}
    finder = make_finder(tree)
    found = set(name_pids(finder.find((f"/dev/vfio/{wanted}",), tuple(first))))
    assert found <= real
    assert bool(found) == bool(real)
    listed = make_finder(tree).find_all()
    assert {pid.pid for pid in listed.get(f"/dev/vfio/{wanted}", ())} == real


@pytest.mark.parametrize(
    ("refcnt", "unused"),
    [("3\n", True), ("5\n", False), ("4\n", False), ("-1\n", False), ("", False), (None, False)],
)
def test_find_all_searches_only_where_vfio_is_used(tree: HostTree, refcnt: str | None, unused: bool) -> None:
    """The numbers are those of Linux 6.1: three modules depend on vfio, and an open group counts two more."""
    tree.process(50, QEMU, opened=(NODE,))
    for name in ("vfio_pci", "vfio_pci_core", "vfio_iommu_type1"):
        tree.write(f"{holders.VFIO_MODULE}/holders/{name}/initstate")
    if refcnt is not None:
        tree.write(f"{holders.VFIO_MODULE}/refcnt", refcnt)
    finder = make_finder(tree)
    assert bool(finder.find_all()) != unused
    assert (finder.counts.looked, finder.counts.total) == ((0, 0) if unused else (1, 1))


def test_find_all_searches_nothing_without_a_group(tree: HostTree, order: list[int]) -> None:
    tree.process(50, QEMU, opened=("/dev/vfio/vfio",))
    (tree.top / "sys/class/vfio/12/dev").unlink()
    (tree.top / "sys/class/vfio/12").rmdir()
    assert make_finder(tree).find_all() == {}
    assert order == []
    tree.pci("0000:06:00.0", "vfio-pci", "16", vfio_dev="vfio3")
    make_finder(tree).find_all()
    assert order == [50]


# Its end --------------------------------------------------------------------------------------------------------------


def report(found: holders.Holders) -> str:
    """Return the finding on a busy group whose holder was not found."""
    return checks.report_unknown_holder(VfioGroup("12", "12", (237, 0), ()), found).as_line()


@pytest.mark.parametrize("program", [OTHER, QEMU])
def test_find_cut_short_reported_as_that(tree: HostTree, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Also where some processes may not be examined: it is the time that was missing."""
    for pid in range(60, 70):
        tree.process(pid, program, opened=("/dev/null",))
    refuse_links(monkeypatch, "/proc/69/fd")
    finder = make_finder(tree, 14 if program == OTHER else 4)
    found = finder.find((NODE,))
    assert (found.processes, found.looked, found.total, found.hidden) == ((), 4, 10, 1)
    assert report(found) == (
        "error: [group-busy] group 12: is in use; the search for the process stopped after 4 of 10 processes; list its "
        "users as root on the host: fuser -v /dev/vfio/12; to search longer, raise deadline in host.toml"
    )
    # The next search of the same run is not taken for a complete one.
    assert not finder.is_complete


def test_find_complete_not_reported_as_cut_short(tree: HostTree) -> None:
    tree.process(60, OTHER, opened=("/dev/null",))
    found = make_finder(tree).find((NODE,))
    assert (found.looked, found.total) == (1, 1)
    assert "another PID namespace?" in report(found)


def refuse_links(monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    """Refuse to read a process's links, as without CAP_SYS_PTRACE; its directory can be listed."""
    real = os.readlink

    def readlink(path: str, *, dir_fd: int | None = None) -> str:
        whole = path if dir_fd is None else f"{real(f'/proc/self/fd/{dir_fd}')}/{path}"
        if below in whole:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "readlink", readlink)


def test_find_hidden_processes_reported(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in (60, 61, 62):
        tree.process(pid, OTHER, opened=(NODE,))
    refuse_links(monkeypatch, "/proc/6")
    found = make_finder(tree).find((NODE,))
    assert (found.processes, found.looked, found.total, found.hidden) == ((), 3, 3, 3)
    assert "lacks the privilege to check 3 of 3 processes (CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH)" in report(found)


def test_find_cut_short_within_process(tree: HostTree) -> None:
    """One process may have a million descriptors."""
    tree.process(60, QEMU, opened=("/dev/null",) * 3 * DESCRIPTORS_PER_CHECK)
    found = make_finder(tree, 2).find((NODE,))
    assert (found.looked, found.total) == (0, 1)
    assert make_finder(tree, 4).find((NODE,)).looked == 1


def test_find_all_cut_short(tree: HostTree) -> None:
    for pid in range(60, 70):
        tree.process(pid, QEMU, opened=(f"/dev/vfio/{pid}",))
    finder = make_finder(tree, 3)
    assert list(finder.find_all()) == ["/dev/vfio/67", "/dev/vfio/68", "/dev/vfio/69"]
    assert (finder.counts.looked, finder.counts.total) == (3, 10)


# Real processes -------------------------------------------------------------------------------------------------------


def test_list_vfio_files_closed_meanwhile(tmp_path: Path) -> None:
    """A descriptor that is gone, or a process that is, does not end the search."""
    process = tmp_path / "proc/50"
    (process / "fd").mkdir(parents=True)
    (process / "fd/3").symlink_to(NODE)
    (process / "fd/4").write_text("no link")
    assert list_vfio_files(str(process)) == [NODE]
    finder = HolderFinder(Root(str(tmp_path)), Countdown(ENDLESS), may_use_vfio)
    assert finder.list_files(51) == frozenset()


@pytest.mark.skipif(os.geteuid() != 0, reason="looks into other processes")
def test_list_vfio_files_ended_main_thread() -> None:
    """Its own directory in /proc shows no files any more; those of its other threads do."""
    script = (
        "import sys, threading, time; sys.path.append(''); import ctypes\n"
        "def other():\n  time.sleep(0.3); print('ready', flush=True); time.sleep(600)\n"
        "threading.Thread(target=other).start(); ctypes.CDLL(None).syscall(60, 0)\n"
    )
    command = [sys.executable, "-IS", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            directory, names = find_descriptors(f"/proc/{process.pid}")
            assert not os.listdir(f"/proc/{process.pid}/fd")
            assert "/task/" in directory
            assert {"0", "1"} <= set(names)
        finally:
            process.kill()
