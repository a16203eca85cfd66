# SPDX-License-Identifier: Apache-2.0
"""Mounts in a container's namespaces, with a real kernel's mounts and user namespaces. Needs root."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hooks.findings import StepError
from oci_hooks.guest.apply import container_dev, mount_ns, nodes, system_calls
from tests.unit.guest.test_faults import leave_mounts, mount
from tests.unit.guest.test_nodes import Tree

pytestmark = pytest.mark.unit

CLONE_NEWUSER = 0x10000000
FIRST_ID = 100000
# A device that opens wherever its node may be opened: /dev/null.
NULL = (1, 3)


class Container:
    """A container being created: an init with namespaces of its own, with a tmpfs on /dev of its tree."""

    def __init__(self, top: Path) -> None:
        self.tree = Tree(top)
        self.init = subprocess.Popen(["/bin/sleep", "3600"], stdin=subprocess.DEVNULL, preexec_fn=self.enter)  # noqa: PLW1509
        self.pid = self.init.pid
        self.tree.target = nodes.Container(self.pid, str(self.tree.rootfs))
        # As the init sees it.
        self.dev = Path(f"/proc/{self.pid}/root{self.tree.dev}")

    def enter(self) -> None:
        """Have this process be the container's init."""
        os.chdir(self.tree.rootfs)
        leave_mounts()
        enter_user_namespace()
        leave_mounts()
        mount(Path("dev"), "tmpfs", options="mode=755")

    def open(self, path: str = "") -> int:
        """Return a descriptor of a directory below its /dev, made if need be."""
        dev = container_dev.open_dev(self.pid, str(self.tree.rootfs))
        try:
            return nodes.open_or_create(dev, path, self.tree.target, self.tree.journal)
        finally:
            os.close(dev)

    def execute(self, *command: str) -> None:
        """Run a command in the container, in its root file system."""
        enter = ["nsenter", f"--target={self.pid}", "--user", "--mount", "--setuid=0", "--setgid=0", "--wd"]
        subprocess.run([*enter, *command], check=True, timeout=60)

    def list_mounts(self) -> list[str]:
        """Return what is mounted in its tree, from below."""
        lines = Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()
        return [path for path in (line.split()[4] for line in lines) if path.startswith(str(self.tree.rootfs))]


def enter_user_namespace() -> None:
    """Enter a user namespace whose root is FIRST_ID; a child that stays outside writes its maps."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        for kind in ("uid", "gid") if os.read(reader, 1) else ():
            Path(f"/proc/{os.getppid()}/{kind}_map").write_text(f"0 {FIRST_ID} 65536")
        os._exit(0)
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER):
        raise OSError("unshare")
    os.write(writer, b"x")
    os.waitpid(child, 0)
    os.setgid(0)
    os.setuid(0)


@pytest.fixture(name="made")
def make_container(tmp_path: Path) -> Iterator[Container]:
    """Return a container; no descriptor and no process is left of what was done to it."""
    if subprocess.run(["unshare", "--user", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no user namespaces here: the kernel makes none for a process in a chroot (unshare(2), EPERM)")
    made = Container(tmp_path)
    before = count_own()
    try:
        yield made
        assert count_own() == before
    finally:
        made.init.kill()
        made.init.wait()


def count_own() -> tuple[int, str, str]:
    """Return what this process has: descriptors, children, mount namespace."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return len(os.listdir("/proc/self/fd")), children, os.readlink("/proc/self/ns/mnt")


def attach_null(made: Container) -> None:
    """Mount a file system with a node in it over the container's /dev/vfio."""
    directory, tree = made.open("vfio"), mount_ns.make_tmpfs()
    container_dev.create_node(tree, "null", NULL, 0o666, 0, 0)
    mount_ns.mount_tree(made.pid, tree, directory)
    os.close(tree)
    os.close(directory)


def detach(made: Container, name: str) -> None:
    """Take away what is mounted on a name in the container's /dev."""
    dev = made.open()
    try:
        mount_ns.unmount(made.pid, dev, name)
    finally:
        os.close(dev)


# The file system -----------------------------------------------------------------------------------------------------


def test_make_tmpfs_small_root_owned_noexec() -> None:
    old = os.umask(0o777)
    tree = mount_ns.make_tmpfs()
    assert os.umask(old) == 0o777
    try:
        at, room = os.fstat(tree), os.fstatvfs(tree)
        assert (at.st_mode, at.st_uid, at.st_gid) == (stat.S_IFDIR | 0o755, 0, 0)
        assert room.f_blocks * room.f_frsize == 64 << 10
        assert room.f_flag & (os.ST_NOSUID | os.ST_NOEXEC | os.ST_NODEV) == os.ST_NOSUID | os.ST_NOEXEC
        assert not os.get_inheritable(tree)
        container_dev.create_node(tree, "null", NULL, 0o666, 0, 0)
        os.close(os.open("null", os.O_RDWR, dir_fd=tree))
    finally:
        os.close(tree)


def test_make_tmpfs_with_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """The label goes to the kernel as the option context, before the file system exists; without one, no option."""
    options: list[object] = []
    real = system_calls.call_libc

    def call(name: str, *arguments: int | bytes | None) -> int:
        if arguments[0] == mount_ns.SYS_FSCONFIG:
            options.append(arguments[3:5])
            # Refused where SELinux is off, as here.
            if arguments[3] == b"context":
                return 0
        return real(name, *arguments)

    monkeypatch.setattr(mount_ns, "call_libc", call)
    for label in ("", "system_u:object_r:tmp_t:s0:c1,c2"):
        os.close(mount_ns.make_tmpfs(label))
    plain = options[: len(options) // 2]
    assert options == [*plain, *plain[:-1], (b"context", b"system_u:object_r:tmp_t:s0:c1,c2"), plain[-1]]


@pytest.mark.parametrize("on", [True, False])
def test_read_label_only_with_selinux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """A label that an image's file system has kept means nothing where SELinux is off."""
    os.setxattr(tmp_path, "security.selinux", b"system_u:object_r:tmp_t:s0\0")
    monkeypatch.setattr(container_dev, "SELINUX", str(tmp_path if on else tmp_path / "none"))
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert container_dev.read_label(fd) == ("system_u:object_r:tmp_t:s0" if on else "")
    finally:
        os.close(fd)


def test_make_tmpfs_without_privilege_fails() -> None:
    before = count_own()
    os.seteuid(65534)
    try:
        with pytest.raises(StepError) as caught:
            mount_ns.make_tmpfs()
    finally:
        os.seteuid(0)
    (finding,) = caught.value.findings
    assert finding.code == "mount-failed"
    assert "Operation not permitted" in finding.problem
    assert "CAP_SYS_ADMIN" in finding.hint
    assert count_own() == before


# In the container ----------------------------------------------------------------------------------------------------


def test_mount_tree_node_opens_in_user_namespace(made: Container) -> None:
    dev = made.open()
    with pytest.raises(OSError, match="Value too large"):
        container_dev.create_node(dev, "null", NULL, 0o666, FIRST_ID, FIRST_ID)
    os.close(dev)
    attach_null(made)
    os.close(os.open(made.dev / "vfio/null", os.O_RDWR))


def test_mount_tree_private_and_unmountable_in_use(made: Container) -> None:
    mounts = made.list_mounts()
    attach_null(made)
    assert made.list_mounts() == [*mounts, str(made.tree.dev / "vfio")]
    assert str(made.tree.rootfs) not in Path("/proc/self/mountinfo").read_text()
    user = os.open(made.dev / "vfio/null", os.O_RDWR)
    # The second time nothing is there any more.
    for _ in range(2):
        detach(made, "vfio")
        assert made.list_mounts() == mounts
        assert os.listdir(made.dev / "vfio") == []
    os.close(user)


def test_unmount_only_top_mount(made: Container) -> None:
    attach_null(made)
    attach_null(made)
    detach(made, "vfio")
    assert made.list_mounts().count(str(made.tree.dev / "vfio")) == 1


def test_unmount_symlink_not_followed(made: Container) -> None:
    attach_null(made)
    mounts = made.list_mounts()
    made.execute("ln", "-s", "vfio", "dev/link")
    detach(made, "link")
    assert made.list_mounts() == mounts
    with pytest.raises(FileNotFoundError):
        detach(made, "nothing")


def test_mount_tree_failure_reported(made: Container) -> None:
    directory = made.open("vfio")
    mounts = made.list_mounts()
    with pytest.raises(StepError) as caught:
        # A directory is no tree that somebody detached.
        mount_ns.mount_tree(made.pid, directory, directory)
    os.close(directory)
    (finding,) = caught.value.findings
    assert (finding.code, bool(finding.hint)) == ("mount-failed", True)
    assert "Invalid argument" in finding.problem
    assert made.list_mounts() == mounts


def test_run_in_mount_namespace_results(made: Container, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    namespace = os.readlink(f"/proc/{made.pid}/ns/mnt")
    assert mount_ns.run_in_mount_namespace(made.pid, lambda: None) == 0
    assert mount_ns.run_in_mount_namespace(made.pid, lambda: fail(OSError(errno.ENOSPC, "x"))) == errno.ENOSPC
    # No number of its own, no error of the system, no end of its own making: never taken for success.
    assert mount_ns.run_in_mount_namespace(made.pid, lambda: fail(OSError("x"))) == errno.EIO
    assert mount_ns.run_in_mount_namespace(made.pid, lambda: fail(ZeroDivisionError())) == errno.EIO
    assert mount_ns.run_in_mount_namespace(made.pid, lambda: os.kill(os.getpid(), signal.SIGKILL)) == errno.EIO

    def check_namespace() -> None:
        assert os.readlink("/proc/self/ns/mnt") == namespace

    assert mount_ns.run_in_mount_namespace(made.pid, check_namespace) == 0
    assert capfd.readouterr() == ("", "")


def test_run_in_mount_namespace_deadline(made: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount may wait for ever; the child that does is ended."""
    monkeypatch.setattr(mount_ns, "MOUNT_SECONDS", 0.2)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before, begun = children.read_text(), time.monotonic()
    assert mount_ns.run_in_mount_namespace(made.pid, lambda: time.sleep(60)) == errno.ETIMEDOUT
    assert time.monotonic() - begun < 30
    assert children.read_text() == before


def test_run_in_mount_namespace_early_signal_stays_in_child(made: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come as soon as there is a child, which must not put back what its parent did."""
    parent, fork = os.getpid(), os.fork

    def interrupted() -> int:
        child = fork()
        if child == 0:
            raise KeyboardInterrupt
        return child

    monkeypatch.setattr(os, "fork", interrupted)
    try:
        assert mount_ns.run_in_mount_namespace(made.pid, lambda: None) == errno.EIO
    finally:
        if os.getpid() != parent:
            os._exit(99)


def test_run_in_mount_namespace_without_process_fails(made: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(errno.EAGAIN, "x")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(OSError, match="x"):
        mount_ns.run_in_mount_namespace(made.pid, lambda: None)


def test_mount_tree_ended_container(made: Container) -> None:
    directory = made.open()
    made.init.kill()
    # Gone but for its name, which its runtime has not asked for yet.
    os.waitid(os.P_PID, made.pid, os.WEXITED | os.WNOWAIT)
    tree = mount_ns.make_tmpfs()
    with pytest.raises(FileNotFoundError):
        mount_ns.mount_tree(made.pid, tree, directory)
    with pytest.raises(FileNotFoundError):
        mount_ns.unmount(made.pid, directory, "vfio")
    os.close(tree)
    os.close(directory)


# Nodes ---------------------------------------------------------------------------------------------------------------


def test_mount_nodes_once_over_stale_and_undone(made: Container) -> None:
    made.execute("mkdir", "dev/vfio")
    made.execute("touch", "dev/vfio/12")
    mounts = made.list_mounts()
    for _ in range(2):
        made.tree.expose(user_namespace=True)
        found = {path.name: path.lstat() for path in (made.dev / "vfio").iterdir()}
        assert {name: (oct(at.st_mode), at.st_uid, at.st_gid, at.st_rdev) for name, at in found.items()} == {
            "vfio": (oct(stat.S_IFCHR | 0o600), 0, 0, os.makedev(10, 196)),
            "12": (oct(stat.S_IFCHR | 0o640), 1000, 2000, os.makedev(511, 7)),
            "devices.json": (oct(stat.S_IFREG | 0o644), 0, 0, 0),
        }
        assert [entry.kind for entry in made.tree.entries()] == ["mount"]
    for _ in range(2):
        undo(made)
        assert made.list_mounts() == mounts
        assert [(path.name, path.is_file()) for path in (made.dev / "vfio").iterdir()] == [("12", True)]


def test_mount_nodes_own_directory_removed(made: Container) -> None:
    made.tree.expose(user_namespace=True)
    detach(made, "vfio")
    at = (made.dev / "vfio").stat()
    assert (oct(at.st_mode), at.st_uid, at.st_gid) == (oct(stat.S_IFDIR | 0o755), FIRST_ID, FIRST_ID)
    assert [entry.kind for entry in made.tree.entries()] == ["directory", "mount"]
    undo(made)
    assert list(made.dev.iterdir()) == []


def test_undo_mount_not_made(made: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two: the entry below is not the hook's."""
    monkeypatch.setattr(mount_ns, "mount_tree", lambda *_: None)
    made.tree.expose(user_namespace=True)
    made.execute("touch", "dev/vfio/own")
    undo(made)
    assert os.listdir(made.dev / "vfio") == ["own"]


def undo(made: Container) -> None:
    """Undo the entries of the undo log, last first."""
    for entry in reversed(made.tree.entries()):
        nodes.undo(entry, made.pid)
