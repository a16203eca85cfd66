# SPDX-License-Identifier: Apache-2.0
"""Nodes in a container's /dev: hostile trees, owner and mode, and undoing from the undo log alone. Needs root."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.findings import StepError
from oci_hooks.guest import binding
from oci_hooks.guest.apply import container_dev, nodes
from oci_hooks.guest.apply.nodes import Container
from oci_hooks.guest.plan import MapEntry, Node, Plan
from oci_hooks.guest.undo_log import Entry, UndoLog, parse_undo_log
from oci_hooks.oci import Device, State, make_spec
from tests.support.fake_guest import NIC, Machine

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]
MAP = MapEntry(NIC, "8086", "10d3", "12", "e1000e", "0000:3b:00.0")


class Tree:
    """A container's root file system in a machine with VFIO group 12 (numbers 511:7)."""

    def __init__(self, top: Path) -> None:
        self.machine = Machine(top / "machine")
        self.machine.add_group_node("12", "511:7")
        self.rootfs = (top / "rootfs").resolve()
        self.dev = self.rootfs / "dev"
        self.dev.mkdir(parents=True)
        self.undo_log_path = top / "journal"
        self.journal = UndoLog(
            os.open(self.undo_log_path, os.O_RDWR | os.O_CREAT | os.O_APPEND), str(self.undo_log_path)
        )
        self.target = Container(0, str(self.rootfs))

    def expose(self, **changes: Any) -> None:
        """Make the nodes of a plan."""
        values: dict[str, Any] = {
            "groups": ("12",),
            "rebinds": (),
            "nodes": (Node("control", "", 0o600, 0, 0), Node("group", "12", 0o640, 1000, 2000)),
            "stale": (),
            "user_namespace": False,
            "map": (MAP,),
            **changes,
        }
        nodes.expose_nodes(self.machine.root, Plan(**values), self.target, self.journal)

    def entries(self) -> list[Entry]:
        """Return the undo log."""
        return parse_undo_log(self.undo_log_path.read_bytes())

    def undo(self) -> None:
        """Undo the entries of the undo log, last first."""
        for entry in reversed(self.entries()):
            nodes.undo(entry, 0)

    def list_all(self) -> dict[str, tuple[int, int, int, int]]:
        """Return everything in the root file system: mode, owner, device numbers. Times do not count."""
        found = {}
        for path in sorted(self.rootfs.rglob("*")):
            at = path.lstat()
            found[str(path.relative_to(self.rootfs))] = (at.st_mode, at.st_uid, at.st_gid, at.st_rdev)
        return found

    def read_map(self) -> bytes:
        """Return the content of the map's path, nothing if that is no file."""
        location = self.dev / "vfio/devices.json"
        return location.read_bytes() if location.is_file() else b""


@pytest.fixture(name="tree")
def make_tree(tmp_path: Path) -> Tree:
    """Return a container's tree."""
    return Tree(tmp_path)


@pytest.fixture(name="umask", params=[0o000, 0o022, 0o777])
def set_umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with an odd umask."""
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def put_node(path: Path, major: int, minor: int, mode: int = 0o666) -> None:
    """Make a device node."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR | mode, os.makedev(major, minor))
    path.chmod(mode)
    os.chown(path, 11, 22)


# Making --------------------------------------------------------------------------------------------------------------


def test_ensure_node_numbers_mode_owner_any_umask(tree: Tree, umask: int) -> None:
    old = os.umask(umask)
    assert old == umask
    tree.expose()
    assert tree.list_all() == {
        "dev": (stat.S_IFDIR | 0o755, 0, 0, 0),
        "dev/vfio": (stat.S_IFDIR | 0o755, 0, 0, 0),
        "dev/vfio/12": (stat.S_IFCHR | 0o640, 1000, 2000, os.makedev(511, 7)),
        "dev/vfio/devices.json": (stat.S_IFREG | 0o644, 0, 0, 0),
        "dev/vfio/vfio": (stat.S_IFCHR | 0o600, 0, 0, os.makedev(10, 196)),
    }
    assert os.umask(old) == umask


def test_ensure_node_unmapped_owner_is_root(tree: Tree) -> None:
    tree.expose(nodes=(Node("group", "12", 0o600, -1, -1),), map=())
    assert tree.list_all()["dev/vfio/12"] == (stat.S_IFCHR | 0o600, 0, 0, os.makedev(511, 7))


def test_expose_nodes_is_idempotent(tree: Tree) -> None:
    tree.expose(map=())
    once, noted = tree.list_all(), tree.entries()
    tree.expose(map=())
    assert (tree.list_all(), tree.entries()) == (once, noted)


def test_map_json_content(tree: Tree) -> None:
    tree.expose()
    assert json.loads(tree.read_map()) == {
        "version": 1,
        "devices": [{**MAP.as_dict(), "node": "/dev/vfio/12", "device_node": ""}],
    }


def test_map_of_earlier_run_kept(tree: Tree) -> None:
    tree.expose()
    once, noted = (tree.dev / "vfio/devices.json").stat().st_ctime_ns, tree.entries()
    tree.journal.kept = os.fstat(tree.journal.fd).st_size
    tree.expose()
    assert ((tree.dev / "vfio/devices.json").stat().st_ctime_ns, tree.entries()) == (once, noted)
    # The devices are others now.
    tree.expose(map=(MAP, MAP))
    assert len(json.loads(tree.read_map())["devices"]) == 2
    tree.undo()
    assert list(tree.list_all()) == ["dev"]


@pytest.mark.parametrize("entries", [(MAP,), (MAP, MAP)])
def test_map_left_in_image_replaced(tree: Tree, entries: tuple[MapEntry, ...]) -> None:
    (tree.dev / "vfio").mkdir()
    (tree.dev / "vfio/devices.json").write_bytes(nodes.format_map(entries, []))
    tree.expose()
    assert len(json.loads(tree.read_map())["devices"]) == 1
    tree.undo()
    assert list(tree.list_all()) == ["dev", "dev/vfio"]


def test_map_disabled_ignores_other_file(tree: Tree) -> None:
    file_map(tree, tree.rootfs)
    before = tree.read_map()
    tree.expose(map=())
    tree.undo()
    assert tree.read_map() == before != b""


def test_stale_node_removed_and_restored(tree: Tree) -> None:
    put_node(tree.dev / "vfio/12", 244, 3)
    put_node(tree.dev / "vfio/99", 244, 9, 0o604)
    put_node(tree.dev / "vfio/98", 244, 8)
    before = tree.list_all()
    stale = tuple(Device(f"/dev/vfio/{name}", "c", 244, minor, -1, -1, -1) for name, minor in (("99", 9), ("98", 1)))
    tree.expose(stale=stale)
    found = tree.list_all()
    assert found["dev/vfio/12"][3] == os.makedev(511, 7)
    assert "dev/vfio/99" not in found
    # It has other numbers than in config.json: the runtime did not create it, so the hook does not remove it.
    assert found["dev/vfio/98"] == before["dev/vfio/98"]
    for _ in range(2):
        tree.undo()
        assert tree.list_all() == before


def test_resolve_node_missing_group_fails_first(tree: Tree) -> None:
    before = tree.list_all()
    tree.machine.place("/sys/kernel/iommu_groups/13").mkdir()
    missing = (("group", "13", "no-group-node"), ("group", "14", "device-gone"), ("iommu", "", "no-cdev"))
    for kind, subject, code in missing:
        node = Node(kind, subject, 0o600, 0, 0)
        with pytest.raises(StepError) as caught:
            tree.expose(nodes=(Node("control", "", 0o600, 0, 0), node))
        assert caught.value.findings[0].code == code
        assert caught.value.findings[0].hint
    assert (tree.list_all(), tree.entries()) == (before, [])


def test_resolve_node_noiommu_and_cdev(tree: Tree) -> None:
    machine = tree.machine
    machine.add(NIC, group="5")
    machine.write("/sys/kernel/iommu_groups/5/name", "vfio-noiommu\n")
    machine.write("/sys/class/vfio/noiommu-5/dev", "511:5\n")
    machine.place(f"/sys/bus/pci/devices/{NIC}/vfio-dev/vfio3").mkdir(parents=True)
    machine.write("/sys/class/vfio-dev/vfio3/dev", "510:3\n")
    machine.write("/sys/class/misc/iommu/dev", "10:125\n")
    wanted = [("group", f"noiommu:{NIC}"), ("iommu", ""), ("cdev", NIC)]
    tree.expose(nodes=tuple(Node(kind, subject, 0o600, 0, 0) for kind, subject in wanted), map=())
    numbers = {path: at[3] for path, at in tree.list_all().items() if stat.S_ISCHR(at[0])}
    assert numbers == {
        "dev/vfio/noiommu-5": os.makedev(511, 5),
        "dev/iommu": os.makedev(10, 125),
        "dev/vfio/devices/vfio3": os.makedev(510, 3),
    }
    tree.undo()
    assert list(tree.list_all()) == ["dev"]


def test_cdev_nodes_without_groups(tree: Tree) -> None:
    """A kernel without VFIO_GROUP has no other nodes; map and stale nodes are seen to all the same."""
    machine = tree.machine
    machine.add(NIC, group="5")
    machine.place(f"/sys/bus/pci/devices/{NIC}/vfio-dev/vfio3").mkdir(parents=True)
    machine.write("/sys/class/vfio-dev/vfio3/dev", "510:3\n")
    machine.write("/sys/class/misc/iommu/dev", "10:125\n")
    shutil.rmtree(machine.place("/sys/class/vfio"))
    put_node(tree.dev / "vfio/99", 244, 9)
    wanted = [("control", ""), ("group", "5"), ("iommu", ""), ("cdev", NIC)]
    stale = (Device("/dev/vfio/99", "c", 244, 9, -1, -1, -1),)
    tree.expose(nodes=tuple(Node(kind, subject, 0o600, 0, 0) for kind, subject in wanted), stale=stale)
    found = [path for path, at in tree.list_all().items() if not stat.S_ISDIR(at[0])]
    assert sorted(found) == ["dev/iommu", "dev/vfio/devices.json", "dev/vfio/devices/vfio3"]
    assert b'"node": "", "device_node": "/dev/vfio/devices/vfio3"' in tree.read_map()
    with pytest.raises(StepError) as caught:
        tree.expose(nodes=(Node("group", "5", 0o600, 0, 0),))
    assert caught.value.findings[0].code == "no-group-node"


# Hostile trees -------------------------------------------------------------------------------------------------------


def link_dev(tree: Tree, outside: Path) -> None:
    """Have /dev lead out of the tree."""
    tree.dev.rmdir()
    tree.dev.symlink_to(outside)


def file_dev(tree: Tree, _: Path) -> None:
    """Have /dev be a file."""
    tree.dev.rmdir()
    tree.dev.write_text("")


def no_dev(tree: Tree, _: Path) -> None:
    """Have no /dev."""
    tree.dev.rmdir()


def link_vfio(tree: Tree, outside: Path) -> None:
    """Have /dev/vfio lead out of the tree."""
    (tree.dev / "vfio").symlink_to(outside)


def link_vfio_up(tree: Tree, outside: Path) -> None:
    """Have /dev/vfio lead out of the tree by a relative link."""
    (tree.dev / "vfio").symlink_to(f"../../{outside.name}")


def dangle_vfio(tree: Tree, outside: Path) -> None:
    """Have /dev/vfio be a link to what does not exist yet."""
    (tree.dev / "vfio").symlink_to(outside / "new")


def file_vfio(tree: Tree, _: Path) -> None:
    """Have /dev/vfio be a file."""
    (tree.dev / "vfio").write_text("")


def link_node(tree: Tree, outside: Path) -> None:
    """Have the node be a link to a file outside."""
    (tree.dev / "vfio").mkdir()
    (tree.dev / "vfio/12").symlink_to(outside / "file")


def dangle_node(tree: Tree, outside: Path) -> None:
    """Have the node be a link to a file outside that does not exist yet."""
    (tree.dev / "vfio").mkdir()
    (tree.dev / "vfio/12").symlink_to(outside / "new")


def file_node(tree: Tree, _: Path) -> None:
    """Have the node be a file."""
    (tree.dev / "vfio").mkdir()
    (tree.dev / "vfio/12").write_text("")


def directory_node(tree: Tree, _: Path) -> None:
    """Have the node be a directory."""
    (tree.dev / "vfio/12").mkdir(parents=True)


def block_node(tree: Tree, _: Path) -> None:
    """Have the node be a block device."""
    (tree.dev / "vfio").mkdir()
    os.mknod(tree.dev / "vfio/12", stat.S_IFBLK | 0o600, os.makedev(7, 0))


def link_map(tree: Tree, outside: Path) -> None:
    """Have the map be a link to a file outside."""
    (tree.dev / "vfio").mkdir()
    (tree.dev / "vfio/devices.json").symlink_to(outside / "file")


def link_own_map(tree: Tree, _: Path) -> None:
    """Have the map be a link to one of the hook's own."""
    (tree.dev / "vfio").mkdir()
    (tree.rootfs / "map").write_bytes(nodes.format_map((MAP,), []))
    (tree.dev / "vfio/devices.json").symlink_to(tree.rootfs / "map")


def file_map(tree: Tree, _: Path) -> None:
    """Have another file where the map belongs."""
    (tree.dev / "vfio").mkdir()
    (tree.dev / "vfio/devices.json").write_text('{"version": 1, "devices": []}')


def directory_map(tree: Tree, _: Path) -> None:
    """Have a directory where the map belongs."""
    (tree.dev / "vfio/devices.json").mkdir(parents=True)


def node_map(tree: Tree, _: Path) -> None:
    """Have a device where the map belongs, which must not be opened: no driver has these numbers."""
    put_node(tree.dev / "vfio/devices.json", 240, 77)


HOSTILE = [
    (link_dev, "hostile-tree"),
    (file_dev, "hostile-tree"),
    (no_dev, "no-rootfs"),
    (link_vfio, "hostile-tree"),
    (link_vfio_up, "hostile-tree"),
    (dangle_vfio, "hostile-tree"),
    (file_vfio, "hostile-tree"),
    (link_node, "node-in-the-way"),
    (dangle_node, "node-in-the-way"),
    (file_node, "node-in-the-way"),
    (directory_node, "node-in-the-way"),
    (block_node, "node-in-the-way"),
    (link_map, "node-in-the-way"),
    (link_own_map, "node-in-the-way"),
    (file_map, "node-in-the-way"),
    (directory_map, "node-in-the-way"),
    (node_map, "node-in-the-way"),
]


@pytest.mark.parametrize(("spoil", "code"), HOSTILE, ids=lambda value: getattr(value, "__name__", value))
def test_expose_nodes_hostile_tree_refused(
    tree: Tree, tmp_path: Path, spoil: Callable[[Tree, Path], None], code: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    spoil(tree, outside)
    before, text, fds = tree.list_all(), tree.read_map(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(StepError) as caught:
        tree.expose()
    (finding,) = caught.value.findings
    assert finding.code == code
    assert finding.hint
    tree.undo()
    assert (tree.list_all(), tree.read_map()) == (before, text)
    assert (sorted(os.listdir(outside)), (outside / "file").read_text()) == (["file"], "secret")
    assert len(os.listdir("/proc/self/fd")) == fds


def test_open_rootfs_symlink_not_followed(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tree.rootfs)
    tree.target = Container(0, str(tmp_path / "link"))
    with pytest.raises(StepError) as caught:
        tree.expose()
    assert caught.value.findings[0].code == "hostile-tree"


def test_expose_nodes_read_only_tree_refused(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(StepError) as caught:
        tree.expose()
    (finding,) = caught.value.findings
    assert finding.code == "container-dev"
    assert "Read-only" in finding.problem
    assert finding.hint


def test_expose_nodes_guest_dev_unchanged(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_dev, "is_guest_dev", lambda _: True)
    with pytest.raises(StepError) as caught:
        tree.expose()
    assert caught.value.findings[0].code == "node-missing"
    assert not (tree.dev / "vfio/vfio").exists()
    assert not (tree.dev / "vfio/devices.json").exists()


def test_expose_nodes_guest_dev_missing_node_refused(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be there for everybody, and outlive the device."""
    (tree.dev / "vfio").mkdir()
    put_node(tree.dev / "vfio/vfio", 10, 196)
    before = tree.list_all()
    monkeypatch.setattr(container_dev, "is_guest_dev", lambda _: True)
    with pytest.raises(StepError) as caught:
        tree.expose()
    assert (caught.value.findings[0].code, caught.value.findings[0].subject) == ("node-missing", "/dev/vfio/12")
    assert tree.list_all() == before
    # Nor is one taken away that has other numbers.
    put_node(tree.dev / "vfio/12", 244, 3)
    before = tree.list_all()
    with pytest.raises(StepError):
        tree.expose()
    assert tree.list_all() == before


def test_is_guest_dev_by_file_system(tree: Tree) -> None:
    for path, own in (("/dev", True), (str(tree.dev), os.stat("/dev").st_dev == tree.dev.stat().st_dev)):
        fd = os.open(path, os.O_RDONLY)
        assert container_dev.is_guest_dev(fd) == own
        os.close(fd)


@pytest.fixture(name="small_files")
def limit_files() -> Iterator[None]:
    """Have the kernel write no file of more than 64 KiB: it writes so much, and then no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_map_without_space_fails(tree: Tree) -> None:
    before = tree.list_all()
    with pytest.raises(StepError) as caught:
        tree.expose(map=(MAP,) * 600)
    (finding,) = caught.value.findings
    assert finding.code == "container-dev"
    assert "File too large" in finding.problem
    assert (tree.dev / "vfio/devices.json").stat().st_size == 65536
    tree.undo()
    assert tree.list_all() == before


def test_map_short_writes_completed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:1000]))
    tree.expose(map=(MAP,) * 600)
    assert len(json.loads(tree.read_map())["devices"]) == 600


# Undoing -------------------------------------------------------------------------------------------------------------


def test_undo_nodes_is_idempotent(tree: Tree) -> None:
    before = tree.list_all()
    tree.expose()
    assert tree.list_all() != before
    for _ in range(2):
        tree.undo()
        assert tree.list_all() == before


def test_undo_nodes_from_any_kill_point(tree: Tree, tmp_path: Path) -> None:
    put_node(tree.dev / "vfio/12", 244, 3)
    before = tree.list_all()

    class Killed(BaseException):
        """Simulates a kill: nothing more is done."""

    real = UndoLog.add
    for steps in range(1, 6):

        def note(self: UndoLog, kind: str, *words: object, left: list[int] = [steps]) -> None:  # noqa: B006
            real(self, kind, *words)
            left[0] -= 1
            if not left[0]:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UndoLog, "add", note)
            try:
                tree.expose()
                ended = True
            except Killed:
                ended = False
        assert ended == (steps > 4)
        tree.undo()
        assert tree.list_all() == before
        os.ftruncate(tree.journal.fd, 0)


def test_undo_nodes_from_undo_log_alone(tree: Tree) -> None:
    put_node(tree.dev / "vfio/12", 244, 3, 0o604)
    before = tree.list_all()
    tree.expose()
    program = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from oci_hooks.guest.apply import nodes
from oci_hooks.guest.undo_log import parse_undo_log
for entry in reversed(parse_undo_log(open({str(tree.undo_log_path)!r}, "rb").read())):
    nodes.undo(entry, 0)
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True, timeout=60, umask=0o777)
    assert tree.list_all() == before


def test_undo_nodes_removes_only_own(tree: Tree) -> None:
    tree.expose()
    # The container has replaced what the hook made.
    (tree.dev / "vfio/12").unlink()
    put_node(tree.dev / "vfio/12", 1, 3)
    (tree.dev / "vfio/devices.json").unlink()
    (tree.dev / "vfio/devices.json").symlink_to("/etc/passwd")
    (tree.dev / "vfio/own").write_text("")
    tree.undo()
    assert sorted(path.name for path in (tree.dev / "vfio").iterdir()) == ["12", "devices.json", "own"]


def test_undo_nodes_guest_dev_unchanged(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was mounted there since: nothing in it is of the hook's making."""
    tree.expose()
    before = tree.list_all()
    monkeypatch.setattr(container_dev, "is_guest_dev", lambda _: True)
    tree.undo()
    assert tree.list_all() == before


def test_undo_nodes_symlink_not_followed(tree: Tree, tmp_path: Path) -> None:
    tree.expose()
    outside = tmp_path / "outside"
    (tree.dev / "vfio").rename(outside)
    (tree.dev / "vfio").symlink_to(outside)
    for entry in reversed(tree.entries()):
        if entry.kind in ("node", "file"):
            with pytest.raises(NotADirectoryError):
                nodes.undo(entry, 0)
    assert sorted(os.listdir(outside)) == ["12", "devices.json", "vfio"]


def test_undo_nodes_removed_tree_is_done(tree: Tree) -> None:
    tree.expose()
    tree.rootfs.rename(tree.rootfs.parent / "moved")
    tree.undo()


# The container -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "state_root", "found"),
    [("rootfs", "", "b/rootfs"), ("{top}/r", "", "r"), ("", "{top}/r", "r"), ("", "", "b/rootfs"), ("link", "", "r")],
)
def test_find_rootfs(tmp_path: Path, root: str, state_root: str, found: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/link").symlink_to(tmp_path / "r")
    state = State("c1", f"{tmp_path}/b", 7, "", {}, state_root.format(top=tmp_path))
    spec = make_spec({"root": {"path": root.format(top=tmp_path)}} if root else {}, "config.json")
    assert binding.find_rootfs(state, spec) == f"{os.path.realpath(tmp_path)}/{found}"


def test_open_rootfs_through_proc(tree: Tree) -> None:
    # This process's root is this machine's: the path leads on from there, as before pivot_root.
    fd = container_dev.open_dev(os.getpid(), str(tree.rootfs))
    assert os.path.samestat(os.fstat(fd), tree.dev.stat())
    os.close(fd)


def test_open_rootfs_after_pivot_root(tree: Tree) -> None:
    child = os.fork()
    if child == 0:
        os.chroot(tree.rootfs)
        os.kill(os.getpid(), 19)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    try:
        fd = container_dev.open_dev(child, "/no/such/path")
        assert os.path.samestat(os.fstat(fd), tree.dev.stat())
        os.close(fd)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
