# SPDX-License-Identifier: Apache-2.0
"""Permissions: finding the cgroup, verifying from inside it, the writes, and the messages of failures."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from oci_hooks.findings import StepError
from oci_hooks.guest.apply import cgroup, proof
from oci_hooks.guest.apply.cgroup import Cgroup, MadeNode
from oci_hooks.guest.apply.child import has_ended
from oci_hooks.system import Deadline, Root
from tests.support.fault_injection import list_children
from tests.support.proving import prove_nodes

pytestmark = pytest.mark.unit

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V2_HYBRID = "31 23 0:27 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw"
V1 = "32 23 0:28 / /sys/fs/cgroup/devices rw,nosuid shared:6 - cgroup cgroup rw,devices"
V1_JOINED = "32 23 0:28 / /sys/fs/cgroup/devices,pids rw - cgroup cgroup rw,pids,devices"
V1_OTHER = "33 23 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"
V2_BOUND = "34 23 0:26 /kubepods /mnt/pods rw - cgroup2 cgroup2 rw"
V2_SPACE = r"35 23 0:26 / /sys/fs/c\040group rw - cgroup2 cgroup2 rw"


def make_proc(tmp_path: Path, mounts: list[str], own: str, container: str, pid: int = 42) -> Root:
    """Return a root with the files of /proc on cgroups."""
    for process, text in (("self", own), (str(pid), container)):
        directory = tmp_path / "proc" / process
        directory.mkdir(parents=True)
        (directory / "cgroup").write_text(text.replace(" ", "\n") + "\n")
    (tmp_path / "proc/self/mountinfo").write_text("\n".join(mounts) + "\n")
    return Root(str(tmp_path))


# Finding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mounts", "own", "container", "unified", "devices", "shared"),
    [
        ([V2], "0::/", "0::/c1", "/sys/fs/cgroup/c1", "", ()),
        ([V2], "0::/a", "0::/pod/c1:2", "/sys/fs/cgroup/pod/c1:2", "", ()),
        # No cgroup of its own: the root's, or the hook's.
        ([V2], "0::/a", "0::/", "/sys/fs/cgroup", "", ("/sys/fs/cgroup",)),
        ([V2], "0::/a", "0::/a", "/sys/fs/cgroup/a", "", ("/sys/fs/cgroup/a",)),
        # A hierarchy of version 1, alone, with others, and together with one of version 2.
        ([V1_OTHER, V1], "4:devices:/", "4:devices:/c1", "", "/sys/fs/cgroup/devices/c1", ()),
        ([V1_JOINED], "4:pids,devices:/", "4:pids,devices:/c1", "", "/sys/fs/cgroup/devices,pids/c1", ()),
        (
            [V1, V2_HYBRID],
            "4:devices:/ 0::/d",
            "4:devices:/c1 0::/c1",
            "/sys/fs/cgroup/unified/c1",
            "/sys/fs/cgroup/devices/c1",
            (),
        ),
        (
            [V1, V2_HYBRID],
            "4:devices:/ 0::/d",
            "4:devices:/c1 0::/d",
            "/sys/fs/cgroup/unified/d",
            "/sys/fs/cgroup/devices/c1",
            ("/sys/fs/cgroup/unified/d",),
        ),
        # Controllers other than devices decide nothing here.
        ([V1_OTHER], "4:cpu,cpuacct:/ 1:name=systemd:/", "4:cpu,cpuacct:/c1 1:name=systemd:/c1", "", "", ()),
        # Nothing at all, and a line of version 2 that every kernel prints.
        ([], "0::/", "0::/", "", "", ()),
        ([], "", "", "", "", ()),
        # Only a part of the hierarchy is mounted, and mounts with odd names.
        ([V2_BOUND], "0::/", "0::/kubepods/c1", "/mnt/pods/c1", "", ()),
        ([V2_BOUND, V2], "0::/", "0::/other/c1", "/sys/fs/cgroup/other/c1", "", ()),
        ([V2_BOUND, V2], "0::/", "0::/kubepods2/c1", "/sys/fs/cgroup/kubepods2/c1", "", ()),
        ([V2_SPACE], "0::/", "0::/c1", "/sys/fs/c group/c1", "", ()),
    ],
)
def test_find_cgroup_reads_hierarchies(
    tmp_path: Path, mounts: list[str], own: str, container: str, unified: str, devices: str, shared: tuple[str, ...]
) -> None:
    found = cgroup.find_cgroup(make_proc(tmp_path, mounts, own, container), 42)
    assert (found.unified, found.devices, found.shared) == (unified, devices, shared)


@pytest.mark.parametrize(
    ("mounts", "container", "words"),
    [
        ([V2_BOUND], "0::/other/c1", "/other/c1 is not visible under any"),
        ([V2_BOUND], "0::/kubepods2/c1", "/kubepods2/c1 is not visible under any"),
        ([V2], "0::/../c1", "/../c1 is not visible under any"),
        ([V2], "0::/..", "/.. is not visible under any"),
        ([], "0::/c1", "/c1 is not visible under any"),
        ([], "4:devices:/c1", "/c1 is not visible under any"),
    ],
)
def test_find_cgroup_not_mounted_refused(tmp_path: Path, mounts: list[str], container: str, words: str) -> None:
    with pytest.raises(StepError, match=words):
        cgroup.find_cgroup(make_proc(tmp_path, mounts, "0::/", container), 42)


def test_find_cgroup_ended_process_refused(tmp_path: Path) -> None:
    root = make_proc(tmp_path, [V2], "0::/", "0::/c1")
    with pytest.raises(StepError, match=r"\[permit-failed\] process 43"):
        cgroup.find_cgroup(root, 43)


# Proving --------------------------------------------------------------------------------------------------------------

NOWHERE = Cgroup(42, "", "")


@pytest.fixture
def dev() -> Iterator[int]:
    """Give a descriptor of this machine's /dev."""
    fd = os.open("/dev", os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_verify_nodes_opens_each(dev: int, tmp_path: Path) -> None:
    nodes = (
        MadeNode("null", 1, 3),
        MadeNode("null", 1, 5),
        MadeNode("there-is-none", 1, 3),
        MadeNode("fd", 1, 3),
        MadeNode("null", 1, 3, is_group=True),
    )
    checks = prove_nodes(Root(str(tmp_path)), NOWHERE, dev, nodes)
    assert [check.node for check in checks] == list(nodes)
    # Another device than it should be, none, a directory, and one that is no VFIO group.
    assert [check.error for check in checks] == [0, errno.ENODEV, errno.ENOENT, errno.ENODEV, errno.ENOTTY]
    assert [check.is_viable for check in checks] == [True, False, False, False, False]


def test_verify_nodes_refuses_symlink(tmp_path: Path) -> None:
    (tmp_path / "12").symlink_to("/dev/null")
    directory = os.open(tmp_path, os.O_PATH)
    (found,) = prove_nodes(Root(), NOWHERE, directory, [MadeNode("12", 1, 3)])
    assert found.error == errno.ENODEV


@pytest.mark.parametrize(("swapped", "error"), [("zero", errno.ENODEV), ("link", errno.ELOOP), ("pipe", errno.ENODEV)])
def test_verify_nodes_detects_swapped_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: str, error: int
) -> None:
    """Between the look and the opening somebody in the container puts something else there."""
    os.mknod(tmp_path / "null", 0o20600, os.makedev(1, 3))
    os.mknod(tmp_path / "zero", 0o20600, os.makedev(1, 5))
    (tmp_path / "link").symlink_to(tmp_path / "null")
    os.mkfifo(tmp_path / "pipe")
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda _name, **more: stat("null", **more))
    directory = os.open(tmp_path, os.O_PATH)
    assert proof.verify_node(directory, MadeNode(swapped, 1, 3)) == (error, False)
    assert proof.verify_node(directory, MadeNode("null", 1, 3)) == (0, True)
    os.close(directory)


@pytest.mark.parametrize("target", ["vfio.d", "/dev"])
def test_verify_nodes_refuses_symlink_in_path(dev: int, tmp_path: Path, target: str) -> None:
    """A directory of its path that became a link since: the same numbers are no proof that it is the hook's node."""
    (tmp_path / "vfio.d").mkdir()
    (tmp_path / "vfio.d/null").symlink_to("/dev/null")
    (tmp_path / "vfio").symlink_to(target)
    directory = os.open(tmp_path, os.O_PATH)
    fds = len(os.listdir("/proc/self/fd"))
    assert proof.verify_node(directory, MadeNode("vfio/null", 1, 3)) == (errno.ENOTDIR, False)
    assert proof.verify_node(directory, MadeNode("vfio.d/null", 1, 3)) == (errno.ENODEV, False)
    assert len(os.listdir("/proc/self/fd")) == fds
    os.close(directory)
    assert proof.verify_node(dev, MadeNode("null", 1, 3)) == (0, True)


@pytest.mark.parametrize(("flags", "viable"), [(1, True), (3, True), (0, False), (2, False)])
def test_verify_nodes_asks_group_status(dev: int, monkeypatch: pytest.MonkeyPatch, flags: int, viable: bool) -> None:
    def ioctl(_fd: int, request: int, argument: bytes) -> bytes:
        assert (request, argument) == (0x3B67, struct.pack("=II", 8, 0))
        return struct.pack("=II", 8, flags)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert proof.verify_node(dev, MadeNode("null", 1, 3, is_group=True)) == (0, viable)


def test_verify_child_enters_every_hierarchy(dev: int, tmp_path: Path) -> None:
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text("")
    location = Cgroup(42, "/v2", "/v1")
    prove_nodes(Root(str(tmp_path)), location, dev, [MadeNode("null", 1, 3)])
    assert [(tmp_path / name / "cgroup.procs").read_text() for name in ("v1", "v2")] == ["0", "0"]


def test_verify_child_cannot_enter_cgroup_fails(dev: int, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"\[permit-failed\] /v2: cannot move the helper process.*No such file"):
        prove_nodes(Root(str(tmp_path)), Cgroup(42, "/v2", ""), dev, [MadeNode("null", 1, 3)])


def play(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have the child do something else in place of opening nodes."""
    monkeypatch.setattr(proof, "verify_node", lambda *_: act())


def test_verify_child_hanging_killed_at_deadline(dev: int, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, signal.pause)
    before = list_children()
    prover = proof.Prover(Root(), NOWHERE, lambda: os.dup(dev))
    with pytest.raises(StepError, match="did not finish in time"):
        proof.verify_nodes(Root(), NOWHERE, prover, [MadeNode("null", 1, 3)], Deadline(0.2))
    prover.close()
    assert list_children() == before


@pytest.mark.parametrize("what", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(0), OSError(5, "x")])
def test_verify_child_skips_parent_cleanup(
    dev: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: BaseException
) -> None:
    """Whatever happens in the child, what the caller does on the way out happens once, in the caller."""

    def explode() -> None:
        raise what

    play(monkeypatch, explode)
    trace, before = tmp_path / "trace", list_children()
    try:
        with pytest.raises(StepError, match="its cgroup died"):
            prove_nodes(Root(), NOWHERE, dev, [MadeNode("null", 1, 3)])
    finally:
        with trace.open("a") as file:
            file.write(f"{os.getpid()}\n")
    assert list_children() == before
    assert trace.read_text() == f"{os.getpid()}\n"


def test_verify_child_dies_fails(dev: int, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, lambda: os.kill(os.getpid(), 9))
    before = list_children()
    with pytest.raises(StepError, match="its cgroup died"):
        prove_nodes(Root(), NOWHERE, dev, [MadeNode("null", 1, 3)])
    assert list_children() == before


def test_verify_child_dead_before_the_request_fails(dev: int) -> None:
    prover = proof.Prover(Root(), NOWHERE, lambda: os.dup(dev))
    prover.start(Deadline(5))
    assert prover.child
    os.kill(prover.child.pid, 9)
    os.waitid(os.P_PID, prover.child.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(StepError, match="its cgroup died"):
        proof.verify_nodes(Root(), NOWHERE, prover, [MadeNode("null", 1, 3)], Deadline(5))
    prover.close()


def test_verify_child_closes_runtime_descriptors(dev: int) -> None:
    """Descriptors 0 to 2 may be pipes that the runtime reads to their end."""
    prover = proof.Prover(Root(), NOWHERE, lambda: os.dup(dev))
    proof.verify_nodes(Root(), NOWHERE, prover, [MadeNode("null", 1, 3)], Deadline(5))
    assert prover.child
    opened = [os.readlink(f"/proc/{prover.child.pid}/fd/{fd}") for fd in (0, 1, 2)]
    prover.close()
    assert opened == ["/dev/null"] * 3


def test_prover_answers_again_in_one_child(tmp_path: Path) -> None:
    """What is allowed between two requests opens in the same child, which entered the cgroup once."""
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2/cgroup.procs").write_text("")
    dev = tmp_path / "dev"
    dev.mkdir()
    place = Cgroup(42, "/v2", "")
    prover = proof.Prover(Root(str(tmp_path)), place, lambda: os.open(dev, os.O_PATH))
    prover.start(Deadline(5))
    child, node = prover.child, MadeNode("null", 1, 3)
    (missing,) = proof.verify_nodes(prover.root, place, prover, [node], Deadline(5))
    os.mknod(dev / "null", 0o20600, os.makedev(1, 3))
    (found,) = proof.verify_nodes(prover.root, place, prover, [node], Deadline(5))
    assert (missing.error, found.error, prover.child) == (errno.ENOENT, 0, child)
    assert (tmp_path / "v2/cgroup.procs").read_text() == "0"
    prover.close()


def test_prover_without_dev_no_node_opens(tmp_path: Path) -> None:
    prover = proof.Prover(Root(), NOWHERE, lambda: os.open(tmp_path / "dev", os.O_PATH))
    (check,) = proof.verify_nodes(Root(), NOWHERE, prover, [MadeNode("null", 1, 3)], Deadline(5))
    prover.close()
    assert (check.error, check.is_viable) == (errno.ENOENT, False)


def test_prover_ends_with_the_hook(dev: int) -> None:
    """kill -9 of the hook: nobody is left in the container's cgroup, which could not be removed."""
    reader, writer = os.pipe()
    hook = os.fork()
    if hook == 0:
        try:
            prover = proof.Prover(Root(), NOWHERE, lambda: os.dup(dev))
            prover.start(Deadline(60))
            os.write(writer, str(prover.child and prover.child.pid).encode())
            signal.pause()
        finally:
            os._exit(1)
    child = os.pidfd_open(int(os.read(reader, 20)))
    os.kill(hook, 9)
    os.waitpid(hook, 0)
    poller = select.poll()
    poller.register(child, select.POLLIN)
    assert poller.poll(5000)
    for fd in (reader, writer, child):
        os.close(fd)


def test_prover_ends_at_the_deadline(dev: int) -> None:
    """In case that a process that hangs has the other end of its pipe."""
    prover = proof.Prover(Root(), NOWHERE, lambda: os.dup(dev))
    prover.start(Deadline(0.1))
    assert prover.child
    assert has_ended(prover.child, 5)
    prover.close()


def test_verify_nodes_leaves_no_descriptor(dev: int) -> None:
    before = os.listdir("/proc/self/fd")
    prove_nodes(Root(), NOWHERE, dev, [MadeNode("null", 1, 3)])
    assert os.listdir("/proc/self/fd") == before
