# SPDX-License-Identifier: Apache-2.0
"""Nodes in a container's /dev: hostile trees, owner and mode, and undoing from the journal alone. Needs root."""

from __future__ import annotations

import json
import os
import resource
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
from oci_hooks.guest.apply.nodes import Target
from oci_hooks.guest.plan import MapEntry, Node, Plan
from oci_hooks.guest.undo_log import Entry, Journal, parse_journal
from oci_hooks.oci import Device, State, make_spec
from tests.unit.machine import NIC, Machine

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
MAP = MapEntry(NIC, "8086", "10d3", "12", "e1000e", "0000:3b:00.0")


class Tree:
    """A container's root file system in a machine with VFIO group 12 (numbers 511:7)."""

    def __init__(self, top: Path) -> None:
        self.machine = Machine(top / "machine")
        self.machine.add_group_node("12", "511:7")
        self.rootfs = (top / "rootfs").resolve()
        self.dev = self.rootfs / "dev"
        self.dev.mkdir(parents=True)
        self.journal_path = top / "journal"
        self.journal = Journal(os.open(self.journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND), str(self.journal_path))
        self.target = Target(0, str(self.rootfs))

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
        """Return the journal."""
        return parse_journal(self.journal_path.read_bytes())

    def undo(self) -> None:
        """Put back what the journal notes, last first."""
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
        """Return what lies at the map's place, nothing if that is no file."""
        place = self.dev / "vfio/devices.json"
        return place.read_bytes() if place.is_file() else b""


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


def test_nodes_have_numbers_mode_and_owner_whatever_the_umask(tree: Tree, umask: int) -> None:
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


def test_an_owner_that_is_not_mapped_is_roots(tree: Tree) -> None:
    tree.expose(nodes=(Node("group", "12", 0o600, -1, -1),), map=())
    assert tree.list_all()["dev/vfio/12"] == (stat.S_IFCHR | 0o600, 0, 0, os.makedev(511, 7))


def test_twice_is_the_same_and_notes_nothing_more_of_the_nodes(tree: Tree) -> None:
    tree.expose(map=())
    once, noted = tree.list_all(), tree.entries()
    tree.expose(map=())
    assert (tree.list_all(), tree.entries()) == (once, noted)


def test_the_map_is_json_that_says_which_device_is_which(tree: Tree) -> None:
    tree.expose()
    told = json.loads(tree.read_map())
    assert told == {"version": 1, "devices": [MAP.as_dict()]}


def test_a_map_of_an_earlier_run_stays(tree: Tree) -> None:
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
def test_a_map_that_was_left_in_an_image_gives_way_and_is_gone_after(tree: Tree, entries: tuple[MapEntry, ...]) -> None:
    (tree.dev / "vfio").mkdir()
    (tree.dev / "vfio/devices.json").write_bytes(nodes.format_map(entries))
    tree.expose()
    assert len(json.loads(tree.read_map())["devices"]) == 1
    tree.undo()
    assert list(tree.list_all()) == ["dev", "dev/vfio"]


def test_another_file_in_the_maps_place_is_as_good_as_none_without_a_map(tree: Tree) -> None:
    file_map(tree, tree.rootfs)
    before = tree.read_map()
    tree.expose(map=())
    tree.undo()
    assert tree.read_map() == before != b""


def test_a_node_with_the_hosts_numbers_gives_way_and_comes_back(tree: Tree) -> None:
    put_node(tree.dev / "vfio/12", 244, 3)
    put_node(tree.dev / "vfio/99", 244, 9, 0o604)
    put_node(tree.dev / "vfio/98", 244, 8)
    before = tree.list_all()
    stale = tuple(Device(f"/dev/vfio/{name}", "c", 244, minor, -1, -1, -1) for name, minor in (("99", 9), ("98", 1)))
    tree.expose(stale=stale)
    found = tree.list_all()
    assert found["dev/vfio/12"][3] == os.makedev(511, 7)
    assert "dev/vfio/99" not in found
    # It has other numbers than config.json says: not the runtime's doing, not ours to remove.
    assert found["dev/vfio/98"] == before["dev/vfio/98"]
    for _ in range(2):
        tree.undo()
        assert tree.list_all() == before


def test_no_group_node_in_the_kernel_is_told_before_anything_is_made(tree: Tree) -> None:
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


def test_noiommu_and_cdev_nodes_are_found(tree: Tree) -> None:
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
    (tree.rootfs / "map").write_bytes(nodes.format_map((MAP,)))
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
def test_a_hostile_tree_is_refused_and_nothing_outside_is_touched(
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


def test_a_link_on_the_way_to_the_root_file_system_is_not_followed(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tree.rootfs)
    tree.target = Target(0, str(tmp_path / "link"))
    with pytest.raises(StepError) as caught:
        tree.expose()
    assert caught.value.findings[0].code == "hostile-tree"


def test_a_read_only_tree_is_told_with_what_to_do(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(StepError) as caught:
        tree.expose()
    (finding,) = caught.value.findings
    assert finding.code == "container-dev"
    assert "Read-only" in finding.problem
    assert finding.hint


def test_the_guests_own_dev_gets_no_nodes(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_dev, "is_guests_own", lambda _: True)
    with pytest.raises(StepError) as caught:
        tree.expose()
    assert caught.value.findings[0].code == "node-missing"
    assert not (tree.dev / "vfio/vfio").exists()
    assert not (tree.dev / "vfio/devices.json").exists()


def test_a_node_that_the_guests_own_dev_lacks_is_not_made(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be there for everybody, and outlive the device."""
    (tree.dev / "vfio").mkdir()
    put_node(tree.dev / "vfio/vfio", 10, 196)
    before = tree.list_all()
    monkeypatch.setattr(container_dev, "is_guests_own", lambda _: True)
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


def test_whose_dev_it_is_goes_by_its_file_system(tree: Tree) -> None:
    for path, own in (("/dev", True), (str(tree.dev), os.stat("/dev").st_dev == tree.dev.stat().st_dev)):
        fd = os.open(path, os.O_RDONLY)
        assert container_dev.is_guests_own(fd) == own
        os.close(fd)


@pytest.fixture(name="small_files")
def limit_files() -> Iterator[None]:
    """Have the kernel write no file of more than 64 KiB: it writes so much, and then no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_map_that_has_no_room_is_no_success(tree: Tree) -> None:
    before = tree.list_all()
    with pytest.raises(StepError) as caught:
        tree.expose(map=(MAP,) * 600)
    (finding,) = caught.value.findings
    assert finding.code == "container-dev"
    assert "File too large" in finding.problem
    assert (tree.dev / "vfio/devices.json").stat().st_size == 65536
    tree.undo()
    assert tree.list_all() == before


def test_a_map_that_takes_several_writes_is_whole(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:1000]))
    tree.expose(map=(MAP,) * 600)
    assert len(json.loads(tree.read_map())["devices"]) == 600


# Undoing -------------------------------------------------------------------------------------------------------------


def test_undo_leaves_the_tree_as_it_was_and_may_be_done_twice(tree: Tree) -> None:
    before = tree.list_all()
    tree.expose()
    assert tree.list_all() != before
    for _ in range(2):
        tree.undo()
        assert tree.list_all() == before


def test_undo_is_the_same_from_any_point_at_which_the_hook_was_killed(tree: Tree, tmp_path: Path) -> None:
    put_node(tree.dev / "vfio/12", 244, 3)
    before = tree.list_all()

    class Killed(BaseException):
        """Stands for a kill: nothing more is done."""

    real = Journal.note
    for steps in range(1, 6):

        def note(self: Journal, kind: str, *words: object, left: list[int] = [steps]) -> None:  # noqa: B006
            real(self, kind, *words)
            left[0] -= 1
            if not left[0]:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "note", note)
            try:
                tree.expose()
                ended = True
            except Killed:
                ended = False
        assert ended == (steps > 4)
        tree.undo()
        assert tree.list_all() == before
        os.ftruncate(tree.journal.fd, 0)


def test_another_process_undoes_from_the_journal_alone(tree: Tree) -> None:
    put_node(tree.dev / "vfio/12", 244, 3, 0o604)
    before = tree.list_all()
    tree.expose()
    program = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from oci_hooks.guest.apply import nodes
from oci_hooks.guest.undo_log import parse_journal
for entry in reversed(parse_journal(open({str(tree.journal_path)!r}, "rb").read())):
    nodes.undo(entry, 0)
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True, timeout=60, umask=0o777)
    assert tree.list_all() == before


def test_undo_removes_only_what_it_made(tree: Tree) -> None:
    tree.expose()
    # The container has replaced what the hook made.
    (tree.dev / "vfio/12").unlink()
    put_node(tree.dev / "vfio/12", 1, 3)
    (tree.dev / "vfio/devices.json").unlink()
    (tree.dev / "vfio/devices.json").symlink_to("/etc/passwd")
    (tree.dev / "vfio/own").write_text("")
    tree.undo()
    assert sorted(path.name for path in (tree.dev / "vfio").iterdir()) == ["12", "devices.json", "own"]


def test_undo_leaves_the_guests_own_dev_alone(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was mounted there since: nothing in it is of the hook's making."""
    tree.expose()
    before = tree.list_all()
    monkeypatch.setattr(container_dev, "is_guests_own", lambda _: True)
    tree.undo()
    assert tree.list_all() == before


def test_undo_does_not_follow_a_link_that_came_meanwhile(tree: Tree, tmp_path: Path) -> None:
    tree.expose()
    outside = tmp_path / "outside"
    (tree.dev / "vfio").rename(outside)
    (tree.dev / "vfio").symlink_to(outside)
    for entry in reversed(tree.entries()):
        if entry.kind in ("node", "file"):
            with pytest.raises(NotADirectoryError):
                nodes.undo(entry, 0)
    assert sorted(os.listdir(outside)) == ["12", "devices.json", "vfio"]


def test_undo_in_a_tree_that_is_gone_is_done(tree: Tree) -> None:
    tree.expose()
    tree.rootfs.rename(tree.rootfs.parent / "moved")
    tree.undo()


# The container -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "state_root", "found"),
    [("rootfs", "", "b/rootfs"), ("{top}/r", "", "r"), ("", "{top}/r", "r"), ("", "", "b/rootfs"), ("link", "", "r")],
)
def test_the_root_file_system_is_found(tmp_path: Path, root: str, state_root: str, found: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/link").symlink_to(tmp_path / "r")
    state = State("c1", f"{tmp_path}/b", 7, "", {}, state_root.format(top=tmp_path))
    spec = make_spec({"root": {"path": root.format(top=tmp_path)}} if root else {}, "config.json")
    assert binding.find_rootfs(state, spec) == f"{os.path.realpath(tmp_path)}/{found}"


def test_the_tree_of_a_process_is_reached_through_proc(tree: Tree) -> None:
    # This process's root is this machine's: the path leads on from there, as before pivot_root.
    fd = container_dev.open_dev(os.getpid(), str(tree.rootfs))
    assert os.path.samestat(os.fstat(fd), tree.dev.stat())
    os.close(fd)


def test_after_pivot_root_the_processs_root_is_the_tree(tree: Tree) -> None:
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
