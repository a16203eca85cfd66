# SPDX-License-Identifier: Apache-2.0
"""A container that wants more than its devices: its tree changes under the hook's hands, and its paths are odd.

Whatever it does, nothing is made, removed or changed outside of its /dev. Needs root.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest

from oci_hooks import oci
from oci_hooks.findings import StepError
from oci_hooks.guest.apply import drivers
from oci_hooks.guest.request import TEXT_LIMIT
from oci_hooks.system import Deadline
from tests.support.fake_kernel import ActingMachine, Container
from tests.unit.guest.test_faults import leave_mounts, mount
from tests.unit.guest.test_nodes import Tree

pytestmark = pytest.mark.unit

TRIES = 3500
AT_FDCWD = -100
RENAME_EXCHANGE = 2
MS_BIND = 4096
NIC = "0000:01:00.0"
MIB = 1 << 20
Note = Callable[[str, object], None]


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Iterator[ActingMachine]:
    """Return a machine with a group of two functions."""
    machine = ActingMachine(tmp_path)
    yield machine
    machine.end()


@pytest.fixture(name="outside")
def make_outside(tmp_path: Path) -> Path:
    """Return a directory that is none of the container's, with all that the hook would make or take away in one."""
    outside = tmp_path / "outside"
    (outside / "vfio").mkdir(parents=True)
    for location in (outside, outside / "vfio"):
        os.mknod(location / "12", stat.S_IFCHR | 0o600, os.makedev(511, 7))
        os.mknod(location / "77", stat.S_IFCHR | 0o600, os.makedev(244, 3))
        (location / "devices.json").write_text("secret")
        (location / "file").write_text("secret")
    return outside


def take_stock(top: Path) -> dict[str, tuple[Any, ...]]:
    """Return all attributes of a directory's entries, times included, so that any access is visible."""
    found = {}
    for path in (top, *sorted(top.rglob("*"))):
        at = path.lstat()
        found[str(path)] = (at.st_mode, at.st_uid, at.st_gid, at.st_rdev, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
    return found


# Swapped while the hook works ----------------------------------------------------------------------------------------


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step (renameat2(2))."""
    ctypes.CDLL(None).renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


def swap_dev(tree: Tree, outside: Path) -> Callable[[], None]:
    """Have /dev be a directory and a link by turns."""
    (tree.rootfs / "other").symlink_to(outside)
    return lambda: exchange(tree.dev, tree.rootfs / "other")


def swap_vfio(tree: Tree, outside: Path) -> Callable[[], None]:
    """Have /dev/vfio be a directory and a link by turns."""
    (tree.dev / "vfio").mkdir()
    (tree.dev / "other").symlink_to(outside)
    return lambda: exchange(tree.dev / "vfio", tree.dev / "other")


def swap_node(tree: Tree, outside: Path) -> Callable[[], None]:
    """Replace the entry at the node's path by a link to a file outside, and back, by turns."""
    (tree.dev / "vfio").mkdir()
    (tree.dev / "vfio/other").symlink_to(outside / "file")
    (tree.dev / "vfio/12").symlink_to(outside / "12")

    def swap() -> None:
        exchange(tree.dev / "vfio/12", tree.dev / "vfio/other")
        os.rename(tree.dev / "vfio/12", tree.dev / "vfio/moved")
        os.rename(tree.dev / "vfio/moved", tree.dev / "vfio/12")

    return swap


@contextmanager
def swapping(swap: Callable[[], None]) -> Iterator[None]:
    """Have another process do this all the time."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                try:
                    swap()
                except OSError:
                    continue
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("make_swap", [swap_dev, swap_vfio, swap_node])
def test_container_dev_race_with_symlink(
    tmp_path: Path,
    outside: Path,
    make_swap: Callable[[Tree, Path], Callable[[], None]],
    record_property: Note,
) -> None:
    """3 times 3500 tries. Both ends of the race are met often, or there was no race."""
    tree = Tree(tmp_path / "tree")
    swap = make_swap(tree, outside)
    before = take_stock(outside)
    refused = 0
    with swapping(swap):
        for _ in range(TRIES):
            try:
                tree.expose()
            except StepError:
                refused += 1
            # A change that cannot be undone is reported; it must not be undone elsewhere.
            drivers.undo(tree.machine.root, tree.entries(), 0, Deadline(60))
            os.ftruncate(tree.journal.fd, 0)
    assert take_stock(outside) == before
    assert 0 < refused < TRIES or make_swap is swap_node
    record_property("tries", TRIES)


# Existing entries -----------------------------------------------------------------------------------------------------


def put_socket(path: Path) -> None:
    """Put a socket there."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def put_anothers(path: Path) -> None:
    """Put somebody else's file there that everybody may write."""
    path.write_text("")
    os.chown(path, 1234, 1234)
    path.chmod(0o666)


@pytest.mark.parametrize("put", [os.mkfifo, put_socket, put_anothers])
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("dev", "hostile-tree"),
        ("dev/vfio", "hostile-tree"),
        ("dev/vfio/12", "node-in-the-way"),
        ("dev/vfio/devices.json", "node-in-the-way"),
    ],
)
def test_container_dev_other_file_types_refused(
    tmp_path: Path, put: Callable[[Path], None], name: str, code: str
) -> None:
    """A pipe is not opened either: that would wait for its other end."""
    tree = Tree(tmp_path)
    location = tree.rootfs / name
    location.parent.mkdir(exist_ok=True)
    if location == tree.dev:
        location.rmdir()
    put(location)
    before = tree.list_all()
    with pytest.raises(StepError) as caught:
        tree.expose()
    assert caught.value.findings[0].code == code
    tree.undo()
    assert tree.list_all() == before


def test_ensure_node_keeps_existing_right_node(tmp_path: Path) -> None:
    """The numbers are what a node is. Who may open it in there, the container decides."""
    tree = Tree(tmp_path)
    (tree.dev / "vfio").mkdir()
    os.mknod(tree.dev / "vfio/12", stat.S_IFCHR | 0o666, os.makedev(511, 7))
    os.chown(tree.dev / "vfio/12", 1234, 1234)
    before = tree.list_all()
    tree.expose()
    assert tree.list_all()["dev/vfio/12"] == before["dev/vfio/12"]
    tree.undo()
    assert tree.list_all() == before


def test_container_dev_mounted_vfio_directory_refused(machine: ActingMachine, outside: Path) -> None:
    """config.json may mount any directory on /dev/vfio: the hook's nodes would outlive the container in it."""
    container = machine.make_container("c1", NIC)
    (container.dev / "vfio").mkdir()
    before, machine_before = take_stock(outside), machine.take_stock()

    def prepare() -> None:
        leave_mounts()
        mount(container.dev / "vfio", "", MS_BIND, source=outside)

    # The container's init sees these mounts too.
    code, output = machine.call({**container.state, "pid": machine.share_namespace(container, prepare)})
    assert (code, "[hostile-tree] /dev/vfio: is a directory of the guest" in output) == (1, True), output
    assert take_stock(outside) == before
    assert machine.take_stock() == machine_before


def test_container_dev_bind_mount_of_guest_refused(machine: ActingMachine, outside: Path) -> None:
    """Nodes in it could not be found again after the container's mounts have gone."""
    container = machine.make_container("c1", NIC)
    before, machine_before = take_stock(outside), machine.take_stock()

    def prepare() -> None:
        leave_mounts()
        mount(container.dev, "", MS_BIND, source=outside)

    code, output = machine.call({**container.state, "pid": machine.share_namespace(container, prepare)})
    assert (code, "[hostile-tree] /dev: is a directory of the guest" in output) == (1, True), output
    assert take_stock(outside) == before
    assert machine.take_stock() == machine_before


def test_container_dev_btrfs_bind_mount_refused(machine: ActingMachine, outside: Path) -> None:
    """The numbers that stat() returns for btrfs are in no mountinfo; only the ids of mounts lead to the file system."""
    container = machine.make_container("c1", NIC)
    before, machine_before = take_stock(outside), machine.take_stock()

    def prepare() -> None:
        leave_mounts()
        mount(container.dev, "", MS_BIND, source=outside)

    def be_btrfs() -> None:
        fstat = os.fstat

        def fstat_elsewhere(fd: int) -> os.stat_result:
            status = fstat(fd)
            if not os.readlink(f"/proc/self/fd/{fd}").endswith("/rootfs/dev"):
                return status
            return os.stat_result((*status[:2], os.makedev(0, 99_999), *status[3:10]), {"st_rdev": status.st_rdev})

        setattr(os, "fstat", fstat_elsewhere)  # noqa: B010

    state = {**container.state, "pid": machine.share_namespace(container, prepare)}
    code, output = machine.call(state, prepare=be_btrfs)
    assert (code, "[hostile-tree] /dev: is a directory of the guest" in output) == (1, True), output
    assert take_stock(outside) == before
    assert machine.take_stock() == machine_before


def test_container_dev_guest_devtmpfs(machine: ActingMachine) -> None:
    """Whoever shares it has the kernel's nodes there; one of group 1 is not among them on this machine."""
    container = machine.make_container("c1", NIC)
    before, guests = machine.take_stock(), sorted(os.listdir("/dev"))

    def prepare() -> None:
        leave_mounts()
        mount(container.dev, "", MS_BIND, source=Path("/dev"))

    code, output = machine.call({**container.state, "pid": machine.share_namespace(container, prepare)})
    assert (code, "[node-missing] /dev/vfio" in output) == (1, True), output
    assert sorted(os.listdir("/dev")) == guests
    assert machine.take_stock() == before


def test_container_dev_own_tmpfs(machine: ActingMachine) -> None:
    """As every runtime makes it: it ends with the container's mounts, and all that was made there."""
    container = machine.make_container("c1", NIC)
    before = machine.take_stock()

    def prepare() -> None:
        leave_mounts()
        mount(container.dev, "tmpfs")

    pid = machine.share_namespace(container, prepare)
    assert machine.call(container.state) == (0, "")
    made = os.listdir(f"/proc/{pid}/root{container.dev}/vfio")
    assert sorted(made) == ["1", "devices.json", "vfio"]
    container.end()
    assert machine.call(container.stopped, "poststop") == (0, "")
    assert machine.take_stock() == before


# Paths and texts -----------------------------------------------------------------------------------------------------


def place_up(container: Container) -> str:
    """Return a path that goes up and down."""
    return f"{container.bundle}/../../{container.bundle.parent.name}/{container.name}/./rootfs/../rootfs"


def place_link(container: Container) -> str:
    """Return a path that leads there by two links: it is the runtime's, who follows them too."""
    (container.bundle / "one").symlink_to("two")
    (container.bundle / "two").symlink_to(container.bundle / "rootfs")
    return str(container.bundle / "one")


def place_odd(container: Container) -> str:
    """Return a path with everything that a line, a table or a shell gives a meaning to."""
    odd = container.bundle / "a\nb\tc %2f\\040 ; $(x) \u00e9"
    (container.bundle / "rootfs").rename(odd)
    container.dev = odd / "dev"
    return str(odd)


def place_deep(container: Container) -> str:
    """Return a path that is as long as the kernel takes one."""
    top = str(container.bundle)
    deep = Path(top, *["x" * 200] * ((4000 - len(top)) // 201))
    deep.mkdir(parents=True)
    (container.bundle / "rootfs").rename(deep / "rootfs")
    container.dev = deep / "rootfs/dev"
    return str(deep / "rootfs")


@pytest.mark.parametrize("find_place", [place_up, place_link, place_odd, place_deep])
def test_rootfs_path_odd_characters(
    machine: ActingMachine, find_place: Callable[[Container], str], record_property: Note
) -> None:
    container = machine.make_container("c1", NIC)
    path = find_place(container)
    write_config(container, root={"path": path})
    before = machine.take_stock()
    assert machine.call(container.state) == (0, "")
    assert sorted(container.list_dev()) == ["vfio", "vfio/1", "vfio/devices.json", "vfio/vfio"]
    assert machine.call(container.stopped, "poststop") == (0, "")
    assert machine.take_stock() == before


@pytest.mark.parametrize("path", ["x" * 300, "/" + "x/" * 2047, "y/" * 9000, "/proc/self/fd/0", "/", "/dev"])
def test_rootfs_invalid_refused(machine: ActingMachine, path: str) -> None:
    container = machine.make_container("c1", NIC)
    write_config(container, root={"path": path})
    before, outside = machine.take_stock(), sorted(os.listdir("/dev"))
    code, output = machine.call(container.state)
    assert code == 1
    assert "Traceback" not in output
    assert "[internal]" not in output
    assert machine.take_stock() == before
    assert sorted(os.listdir("/dev")) == outside


def write_config(container: Container, **changes: Any) -> None:
    """Change members of a container's config.json."""
    path = container.bundle / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LONG_TEXTS = {
    "one word": "x" * MIB,
    "commas": "," * MIB,
    "the same device": ",".join([NIC] * (MIB // 13)),
    "devices that are not there": ",".join(f"{n >> 12:04x}:{n >> 4 & 255:02x}:00.{n & 7}" for n in range(MIB // 13)),
    "ids": ",".join(f"id:{n & 65535:04x}:10d3" for n in range(MIB // 13)),
    "paths": "path:" + "00/" * (MIB // 3) + "00",
    "spaces": " " * MIB + NIC,
}
LONG_MAPS = {
    "deep": "[" * MIB,
    "devices": json.dumps([{"devices": [{"guest-path": "02/00"}] * (MIB // 25)}]),
    "a long path": json.dumps([{"devices": [{"guest-path": "02/" * (MIB // 3)}]}]),
    "a long key": json.dumps([{"x" * MIB: 1, "devices": []}]),
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_annotation_oversized_refused(machine: ActingMachine, text: str) -> None:
    """It is refused before anything is made of it: a tenant must not buy more of the guest's time than the deadline."""
    check_annotation(machine, oci.DEVICES_ANNOTATION, text)


@pytest.mark.parametrize("text", LONG_MAPS.values(), ids=LONG_MAPS)
def test_annotation_map_oversized_refused(machine: ActingMachine, text: str) -> None:
    check_annotation(machine, oci.MAP_ANNOTATION, text)


def test_annotation_longest_accepted(machine: ActingMachine) -> None:
    container = machine.make_container("c1", ",".join([NIC] * (TEXT_LIMIT // len(f"{NIC},"))))
    before = machine.take_stock()
    assert machine.call(container.state) == (0, "")
    assert machine.call(container.stopped, "poststop") == (0, "")
    assert machine.take_stock() == before


def check_annotation(machine: ActingMachine, name: str, text: str) -> None:
    """Check what a container with this annotation comes to."""
    container = machine.make_container("c1", NIC)
    write_config(container, annotations={name: text})
    before = machine.take_stock()
    code, output = machine.call(container.state)
    (line,) = output.splitlines()
    assert (code, "[bad-annotation]" in line, len(line) < 4000) == (2, True, True), line[:4000]
    assert machine.take_stock() == before
