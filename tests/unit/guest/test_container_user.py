# SPDX-License-Identifier: Apache-2.0
"""The proof with the container's own user and capabilities: real nodes, owners, processes. Needs root."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.credentials import Credentials
from oci_hooks.findings import StepError
from oci_hooks.guest import access
from oci_hooks.guest.apply import proof
from oci_hooks.guest.apply.cgroup import Cgroup, MadeNode, NodeCheck
from oci_hooks.system import Deadline, Root
from tests.support.proving import prove_nodes
from tests.unit.guest.test_mount_ns import FIRST_ID, enter_user_namespace

pytestmark = pytest.mark.unit

NULL = MadeNode("null", 1, 3)
GROUP = MadeNode("vfio/noiommu-0", 511, 0, is_group=True)
USER = Credentials(1000, 2000, (), (), False, (), False)
ROOT = USER.replace(uid=0, gid=0)
OVERRIDE = ("CAP_DAC_OVERRIDE",)


def prove(top: Path, user: Credentials | None, owner: tuple[int, int], mode: int = 0o600, pid: int = 42) -> NodeCheck:
    """Return what became of opening a node of this owner and mode. pid: a process of the container."""
    top.chmod(0o755)
    (top / "null").unlink(missing_ok=True)
    os.mknod(top / "null", stat.S_IFCHR | mode, os.makedev(1, 3))
    os.chown(top / "null", *owner)
    (top / "null").chmod(mode)
    directory = os.open(top, os.O_PATH)
    try:
        (check,) = prove_nodes(Root(), Cgroup(pid, "", ""), directory, [NULL], user)
    finally:
        os.close(directory)
    return check


@pytest.mark.parametrize(
    ("user", "owner", "mode", "error"),
    [
        (USER, (1000, 2000), 0o600, 0),
        (USER, (0, 0), 0o600, errno.EACCES),
        (USER, (0, 0), 0o666, 0),
        (USER, (0, 2000), 0o660, 0),
        (USER, (0, 5), 0o660, errno.EACCES),
        (USER.replace(groups=(4, 5)), (0, 5), 0o660, 0),
        (USER.replace(capabilities=OVERRIDE), (0, 0), 0o600, 0),
        (ROOT, (0, 0), 0o600, 0),
        (ROOT, (1000, 2000), 0o600, errno.EACCES),
        (ROOT.replace(capabilities=OVERRIDE), (1000, 2000), 0o600, 0),
        (ROOT.replace(capabilities=("CAP_SYS_RAWIO",)), (1000, 2000), 0o600, errno.EACCES),
        # Nobody knows it: the hook's own opening is all there is.
        (None, (1000, 2000), 0o600, 0),
    ],
)
def test_verify_nodes_as_container_user(
    tmp_path: Path, user: Credentials | None, owner: tuple[int, int], mode: int, error: int
) -> None:
    assert prove(tmp_path, user, owner, mode) == NodeCheck(NULL, 0, True, error)
    # What the child became is the child's alone.
    assert (os.getresuid(), os.getresgid()) == ((0, 0, 0), (0, 0, 0))


def test_verify_nodes_closed_directory_found(tmp_path: Path) -> None:
    """A directory of the image that the user may not search, with a node in it that the user owns."""
    (tmp_path / "vfio").mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    os.mknod(tmp_path / "vfio/null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.chown(tmp_path / "vfio/null", 1000, 2000)
    directory = os.open(tmp_path, os.O_PATH)
    node = MadeNode("vfio/null", 1, 3)
    (check,) = prove_nodes(Root(), Cgroup(42, "", ""), directory, [node], USER)
    os.close(directory)
    assert check == NodeCheck(node, 0, True, errno.EACCES)


def test_verify_nodes_denied_once_stays_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the cgroup's denial there is another request, for which the child has to be root still."""
    tmp_path.chmod(0o755)
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    allowed = tmp_path / "allowed"

    def open_node(_: int, node: MadeNode, *_more: int) -> tuple[int, bool]:
        if os.geteuid():
            return (errno.EACCES if node == NULL else 0), True
        return (0 if node == NULL or allowed.exists() else errno.EPERM), True

    monkeypatch.setattr(proof, "verify_node", open_node)
    place = Cgroup(42, "", "")
    prover = proof.Prover(Root(), place, lambda: os.open(tmp_path, os.O_PATH), USER)
    found = []
    for _ in range(2):
        checks = proof.verify_nodes(Root(), place, prover, [NULL, GROUP], Deadline(5))
        found.append([(check.error, check.user_error) for check in checks])
        allowed.touch()
    prover.close()
    assert found == [[(0, 0), (errno.EPERM, 0)], [(0, errno.EACCES), (0, 0)]]


def test_verify_nodes_hook_denied_first(tmp_path: Path) -> None:
    """What the hook can't open is not opened once more."""
    directory = os.open(tmp_path, os.O_PATH)
    (check,) = prove_nodes(Root(), Cgroup(42, "", ""), directory, [NULL], USER)
    os.close(directory)
    assert check == NodeCheck(NULL, errno.ENOENT, False, 0)


def test_verify_nodes_without_setuid_as_hook_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that may not become somebody else proves what it can, as it did before."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "setresuid", refuse)
    assert prove(tmp_path, USER, (0, 0)) == NodeCheck(NULL, 0, True, 0)


def test_verify_nodes_with_impossible_user_as_hook_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More groups than the kernel has room for; a Python without ctypes."""
    assert prove(tmp_path, USER.replace(groups=tuple(range(70000))), (0, 0)) == NodeCheck(NULL, 0, True, 0)
    monkeypatch.delitem(sys.modules, "oci_hooks.guest.apply.system_calls", raising=False)
    monkeypatch.setitem(sys.modules, "_ctypes", None)
    assert prove(tmp_path, USER, (0, 0)) == NodeCheck(NULL, 0, True, 0)


@pytest.fixture(name="inside")
def start_inside() -> Iterator[int]:
    """Return the pid of a process in a user namespace that begins at FIRST_ID."""
    if subprocess.run(["unshare", "--user", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no user namespaces here: the kernel makes none for a process in a chroot (unshare(2), EPERM)")
    init = subprocess.Popen(["/bin/sleep", "3600"], stdin=subprocess.DEVNULL, preexec_fn=enter_user_namespace)  # noqa: PLW1509
    yield init.pid
    init.kill()
    init.wait()


@pytest.mark.parametrize(
    ("user", "owner", "error"),
    [
        (USER, (FIRST_ID + 1000, FIRST_ID), 0),
        (USER, (1000, 2000), errno.EACCES),
        (ROOT, (FIRST_ID + 7, FIRST_ID + 7), errno.EACCES),
        # The namespace's own capability counts for owners in it, and for no others.
        (ROOT.replace(capabilities=OVERRIDE), (FIRST_ID + 7, FIRST_ID + 7), 0),
        (ROOT.replace(capabilities=OVERRIDE), (7, 7), errno.EACCES),
    ],
)
def test_verify_nodes_in_user_namespace(
    tmp_path: Path, inside: int, user: Credentials, owner: tuple[int, int], error: int
) -> None:
    check = prove(tmp_path, user.replace(user_namespace=True), owner, pid=inside)
    assert check == NodeCheck(NULL, 0, True, error)


# In words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (NULL, ("Operation not permitted", "check process.capabilities of config.json")),
        (GROUP, ("/dev/vfio/noiommu-0", "which needs CAP_SYS_RAWIO")),
    ],
)
def test_user_without_capability_refused(node: MadeNode, words: tuple[str, ...]) -> None:
    with pytest.raises(StepError) as caught:
        access.check_user(USER, NodeCheck(node, 0, True, errno.EPERM))
    line = caught.value.findings[0].as_line()
    assert line.startswith(f"error: [not-openable] /dev/{node.name}: cannot be opened by user 1000 of the container: ")
    assert all(word in line for word in words), line
    # A program file with privileges of its own may open it: it is a warning where the kernel lets it have them.
    (warning,) = access.check_user(USER.replace(gains=True), NodeCheck(node, 0, True, errno.EPERM))
    assert warning.as_line() == line.replace("error:", "warning:", 1)


def test_user_other_than_owner_warned() -> None:
    """The owner that config.json gives to a node may be the user of a process that is executed later."""
    for user in (USER, USER.replace(gains=True)):
        (warning,) = access.check_user(user, NodeCheck(NULL, 0, True, errno.EACCES))
        line = warning.as_line()
        assert line.startswith(
            f"warning: [not-openable] /dev/{NULL.name}: cannot be opened by user 1000 of the container"
        )
        assert "Permission denied; set uid 1000 and gid 2000 in its entry of linux.devices" in line
        assert "[node]" in line


def test_user_finds_other_errors_no_matter_of_permission() -> None:
    assert access.check_user(USER, NodeCheck(GROUP, 0, True, errno.EBUSY)) == ()
