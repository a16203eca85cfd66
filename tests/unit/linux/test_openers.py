# SPDX-License-Identifier: Apache-2.0
"""Processes that have a function's device nodes open: real processes with real files, and made ones."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.linux import open_files, openers
from oci_hooks.linux.open_files import DESCRIPTORS, MAPPINGS, RESOURCES, list_openers
from tests.unit.linux.test_usage import NIC, NVME, Tree

pytestmark = pytest.mark.unit

is_root = pytest.mark.skipif(os.geteuid() != 0, reason="looks into other processes and makes device nodes")
NULL, ZERO, FULL = "char 1:3", "char 1:5", "char 1:7"


@pytest.fixture(name="tree")
def make_tree(tmp_path: Path) -> Tree:
    """Return a system with nothing in it."""
    return Tree(tmp_path)


# Real processes -------------------------------------------------------------------------------------------------------


@contextmanager
def running(script: str, *arguments: str | Path) -> Iterator[int]:
    """Run Python until it prints "ready", and give its pid. script: runs with os, sys, mmap, time imported."""
    start = "import os, sys, mmap, time, threading\n"
    end = "\nprint('ready', flush=True)\n"
    command = [sys.executable, "-IS", "-c", start + script.replace("READY", end), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process.pid
        finally:
            process.kill()


def find(pid: int, depth: int, *wanted: str) -> list[tuple[str, str]]:
    """Return what the process has of these, as (node, how)."""
    answer = list_openers("/proc", frozenset(wanted), depth, 60)
    assert answer["looked"] == answer["total"] > 1
    return [(key, how) for key, holder, how in answer["open"] if holder == pid]


SLEEP = "\nREADY\ntime.sleep(600)"


@is_root
@pytest.mark.parametrize("depth", [DESCRIPTORS, RESOURCES, MAPPINGS])
def test_list_openers_node_by_number(tmp_path: Path, depth: int) -> None:
    """A container's nodes have any name, and may have been removed since."""
    node = tmp_path / "n"
    os.mknod(node, 0o20600, os.makedev(1, 7))
    with running("fd = os.open(sys.argv[1], os.O_RDWR); os.unlink(sys.argv[1])" + SLEEP, node) as pid:
        assert find(pid, depth, FULL, ZERO) == [(FULL, "open")]
        assert find(pid, depth, ZERO) == []


@is_root
def test_list_openers_mapping_without_descriptor() -> None:
    script = f"m = mmap.mmap(fd := os.open('/dev/zero', os.O_RDWR), 4096, {mmap.MAP_PRIVATE}); os.close(fd)"
    # The module keeps a copy of the descriptor.
    script += "\nfor n in range(3, 9):\n  try: os.close(n)\n  except OSError: pass"
    with running(script + SLEEP) as pid:
        assert find(pid, MAPPINGS, ZERO) == [(ZERO, "mapped")]
        assert find(pid, RESOURCES, ZERO) == []


@is_root
def test_list_openers_ended_main_thread() -> None:
    """Its own directory in /proc shows no files any more; the other threads use them."""
    script = (
        "import ctypes; fd = os.open('/dev/full', os.O_RDWR)\n"
        f"m = mmap.mmap(z := os.open('/dev/zero', os.O_RDWR), 4096, {mmap.MAP_PRIVATE})\n"
        "def other():\n  time.sleep(0.3); print('ready', flush=True); time.sleep(600)\n"
        "threading.Thread(target=other).start(); ctypes.CDLL(None).syscall(60, 0)\n"
    )
    script = script.replace("import ctypes", "sys.path.append('')\nimport ctypes")
    with running(script) as pid:
        assert not os.listdir(f"/proc/{pid}/fd")
        assert (FULL, "open") in find(pid, MAPPINGS, FULL)
        assert (ZERO, "mapped") in find(pid, MAPPINGS, ZERO)


@is_root
def test_list_openers_kernel_threads_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a guest's processes: a listing is the dearest question, and theirs is empty."""
    # A container in which the tests run may see none.
    kernel = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit() and is_kernel_thread(entry)]
    listed: list[str] = []
    real = os.listdir

    def list_names(path: str) -> list[str]:
        listed.append(path)
        return real(path)

    with monkeypatch.context() as context:
        context.setattr(os, "listdir", list_names)
        list_openers("/proc", frozenset(), DESCRIPTORS, 60)
    assert f"/proc/{os.getppid()}/fd" in listed
    assert [path for path in listed if f"{path}/".split("/")[2] in kernel] == []


def is_kernel_thread(process: Path) -> bool:
    """Return whether a process is the kernel's: PF_KTHREAD of include/linux/sched.h."""
    try:
        return bool(int((process / "stat").read_text().rpartition(")")[2].split()[6]) & 0x200000)
    except (FileNotFoundError, ProcessLookupError):
        return False


@is_root
def test_list_openers_excludes_hook() -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    try:
        assert find(os.getpid(), DESCRIPTORS, FULL) == []
    finally:
        os.close(fd)


@is_root
@pytest.mark.parametrize(("links_too", "hidden"), [(True, 1), (False, 0)])
def test_list_openers_counts_process_that_may_not_be_read(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, links_too: bool, hidden: int
) -> None:
    """Its directory can be listed, and no link followed. Of a user's FUSE only the file refuses: it is no node."""
    add_process(tree, 50, "/usr/bin/other", "/somewhere")
    real: dict[str, Any] = {"stat": os.stat, "readlink": os.readlink}

    def refuse(name: str, path: str) -> Any:
        if "/50/fd/" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return real[name](path)

    monkeypatch.setattr(os, "stat", lambda path, **_: refuse("stat", path))
    if links_too:
        monkeypatch.setattr(os, "readlink", lambda path, **_: refuse("readlink", path))
    answer = list_openers(f"{tree.top}/proc", frozenset(), DESCRIPTORS, 60)
    assert answer == {"open": [], "looked": 1, "total": 1, "hidden": hidden}


def test_list_openers_out_of_time_reported() -> None:
    answer = list_openers("/proc", frozenset({NULL}), DESCRIPTORS, 0)
    assert answer["looked"] == 0
    assert answer["total"] > 1


def test_list_openers_deadline_within_process(monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    """One process may have a million descriptors."""
    add_process(tree, 51, "/usr/bin/sh", *["/dev/null"] * 3 * open_files.DESCRIPTORS_PER_SCAN)
    moments = iter([0.0, 1.0, 1.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(moments, 10.0))
    answer = list_openers(f"{tree.top}/proc", frozenset({NULL}), DESCRIPTORS, 5)
    assert answer == {"open": [], "looked": 0, "total": 1, "hidden": 0}


# Made processes -------------------------------------------------------------------------------------------------------


def add_node(tree: Tree, path: str, number: str, kind: str = "char") -> None:
    """Give a device at this path in sysfs a node."""
    tree.write(f"{path}/dev", number)
    tree.link(f"/sys/dev/{kind}/{number}", path)
    (tree.top / "sys/dev/char").mkdir(parents=True, exist_ok=True)
    (tree.top / "sys/dev/block").mkdir(parents=True, exist_ok=True)


def add_process(
    tree: Tree, pid: int, executable: str, *opened: str, maps: str = "", parent: int = 1, numbers: str = ""
) -> None:
    """Add a process. opened: what its descriptors point to; numbers: a device that one more of them is of."""
    location = tree.top / f"proc/{pid}"
    (location / "fd").mkdir(parents=True)
    (location / f"task/{pid}/fd").mkdir(parents=True)
    (location / "exe").symlink_to(executable)
    (location / "maps").write_text(maps)
    (location / "status").write_text(f"Name:\tx\nTgid:\t{pid}\nPPid:\t{parent}\n")
    for descriptor, target in enumerate(opened, 3):
        (location / f"fd/{descriptor}").symlink_to(target)
    if numbers:
        kind, _, number = numbers.partition(" ")
        major, minor = (int(word) for word in number.split(":"))
        node = tree.top / f"node-{pid}"
        os.mknod(node, 0o20600 if kind == "char" else 0o60600, os.makedev(major, minor))
        (location / "fd/99").symlink_to(node)


# Class of the function, what is below it, the node's number, what it is called.
NODES = [
    ("70002", "serial", "tty/ttyS4", "char 4:68", "/dev/ttyS4"),
    ("20000", "e1000e", "ptp/ptp0", "char 248:0", "/dev/ptp0"),
    ("ff00", "uio_pci_generic", "uio/uio0", "char 244:0", "/dev/uio0"),
    ("30200", "i915", "drm/renderD128", "char 226:128", "/dev/dri/renderD128"),
    ("10802", "nvme", "nvme/nvme0", "char 239:0", "/dev/nvme0"),
    ("10802", "nvme", "nvme/nvme0/ng0n1", "char 240:0", "/dev/ng0n1"),
    ("10802", "nvme", "nvme/nvme0/nvme0n1", "block 259:1", "/dev/nvme0n1"),
    ("20700", "mlx5_core", "infiniband_verbs/uverbs0", "char 231:192", "/dev/infiniband/uverbs0"),
    ("c0330", "xhci_hcd", "usb1/1-1/1-1:1.0/input/input3/event3", "char 13:67", "/dev/input/event3"),
    # A class that nobody foresaw.
    ("ff00", "newdriver", "frobs/frob0", "char 300:1000", "/dev/frob0"),
]


@is_root
@pytest.mark.parametrize(
    ("class_code", "driver", "below", "number", "node"), NODES, ids=[node.replace("/", "-") for *_, node in NODES]
)
def test_openers_node_below_function(
    tree: Tree, class_code: str, driver: str, below: str, number: str, node: str
) -> None:
    path = f"{tree.add_device(NIC, class_code, driver)}/{below}"
    add_node(tree, path, number.split()[1], number.split(maxsplit=1)[0])
    if node != f"/dev/{os.path.basename(below)}":
        tree.write(f"{path}/uevent", f"MAJOR=1\nDEVNAME={node[len('/dev/') :]}")
    add_process(tree, 50, "/usr/bin/other", "/dev/null", "socket:[12]", numbers="char 4:70")
    assert tree.find(NIC) == []
    add_process(tree, 51, "/sbin/agetty", numbers=number)
    assert tree.find(NIC) == [f"holds {node}, which agetty (pid 51) has open"]
    add_process(tree, 52, "/bin/cat", numbers=number)
    assert tree.find(NIC) == [f"holds {node}, which agetty (pid 51), cat (pid 52) have open"]
    # Another function's is its own.
    tree.add_device("0000:03:00.0", class_code, driver)
    assert tree.find("0000:03:00.0") == []


@is_root
def test_openers_nvme_multipath(tree: Tree) -> None:
    shared = "/sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    path = tree.add_device(NVME, "10802", "nvme")
    tree.link(f"{shared}/nvme0", f"{path}/nvme/nvme0")
    tree.link("/sys/class/nvme-subsystem/nvme-subsys0", shared)
    add_node(tree, f"{shared}/ng0n1", "240:0")
    add_process(tree, 51, "/usr/bin/fio", numbers="char 240:0")
    assert tree.find(NVME) == ["holds /dev/ng0n1, which fio (pid 51) has open"]


@is_root
def test_openers_ignores_vfio_nodes(tree: Tree) -> None:
    """The container that has it runs the hook once more."""
    path = tree.add_device(NIC, "20000", "vfio-pci")
    add_node(tree, f"{path}/vfio-dev/vfio0", "511:0")
    add_process(tree, 51, "/usr/bin/testpmd", numbers="char 511:0")
    assert tree.find(NIC) == []


@is_root
@pytest.mark.parametrize(
    ("executable", "parent", "free"),
    [
        ("/usr/lib/systemd/systemd-udevd", 1, True),
        ("/usr/bin/udevadm", 40, True),
        ("/usr/lib/udev/scsi_id", 40, True),
        ("/usr/bin/dd", 41, False),
        ("/usr/bin/dd", 1, False),
    ],
)
def test_openers_ignores_udev(tree: Tree, executable: str, parent: int, free: bool) -> None:
    add_node(tree, f"{tree.add_device(NVME, '10802', 'nvme')}/nvme/nvme0/nvme0n1", "259:1", "block")
    add_process(tree, 40, "/usr/lib/systemd/systemd-udevd")
    add_process(tree, 41, "/bin/sh")
    add_process(tree, 51, executable, parent=parent, numbers="block 259:1")
    assert (tree.find(NVME) == []) == free


# Maps as the kernel writes them; the path's inode is asked of the made process's root.
MAPS = (
    "00400000-00452000 r-xp 00000000 08:02 173521  /usr/bin/x\n"
    "7ffd8000-7ffda000 rw-p 00000000 00:00 0  [stack]\n"
    "7f0000000000-7f0000004000 rw-s 00000000 00:05 {inode}  {path}\n"
)


@is_root
@pytest.mark.parametrize("deleted", ["", " (deleted)"])
def test_openers_mapped_node(tree: Tree, deleted: str) -> None:
    add_node(tree, f"{tree.add_device(NIC, 'ff00', 'uio_pci_generic')}/uio/uio0", "244:0")
    add_process(tree, 51, "/usr/bin/testpmd", maps=MAPS.format(inode=9, path=f"/dev/uio0{deleted}"))
    files = tree.top / "proc/51/map_files"
    files.mkdir()
    os.mknod(files / "7f0000000000-7f0000004000", 0o20600, os.makedev(244, 0))
    (files / "400000-452000").write_text("")
    assert tree.find(NIC) == ["holds /dev/uio0, which testpmd (pid 51) has mapped"]


@is_root
def test_openers_mapped_node_without_map_files(tree: Tree) -> None:
    add_node(tree, f"{tree.add_device(NIC, 'ff00', 'uio_pci_generic')}/uio/uio0", "244:0")
    add_process(tree, 51, "/usr/bin/testpmd", maps=MAPS.format(inode=9, path="/dev/uio0"))
    (tree.top / "proc/51/root/dev").mkdir(parents=True)
    os.mknod(tree.top / "proc/51/root/dev/uio0", 0o20600, os.makedev(244, 0))
    assert tree.find(NIC) == ["holds /dev/uio0, which testpmd (pid 51) has mapped"]


@pytest.mark.parametrize("driver", ["", "uio_pci_generic", "igb_uio", "pci-stub"])
@pytest.mark.parametrize("name", ["resource0", "resource2_wc"])
def test_openers_mapped_sysfs_resource(tree: Tree, driver: str, name: str) -> None:
    path = tree.add_device(NIC, "20000", driver)
    tree.add_device("0000:03:00.0", "20000", driver)
    tree.write(f"{path}/{name}")
    inode = (tree.top / f"{path}/{name}".lstrip("/")).stat().st_ino
    add_process(tree, 51, "/usr/bin/ixy", maps=MAPS.format(inode=inode, path=f"{path}/{name}"))
    assert tree.find(NIC) == [f"holds the PCI resource {name}, which ixy (pid 51) has mapped"]
    assert tree.find("0000:03:00.0") == []


@pytest.mark.parametrize("file_system", ["none", "tmpfs", "sysfs"])
def test_openers_fake_resource_file_ignored(tree: Tree, file_system: str) -> None:
    """Any process can make one, and would have the device in use for everybody else."""
    path = tree.add_device(NIC, "20000")
    tree.write(f"{path}/resource0")
    own = tree.top / f"{path}/resource0".lstrip("/")
    fake = f"/home/devices/{NIC}/resource0"
    tree.write(fake)
    add_process(tree, 51, "/usr/bin/sh", f"{tree.top}{fake}", maps=MAPS.format(inode=9, path=fake))
    assert tree.find(NIC) == []
    # One that was brought to have the same inode number is on another file system.
    add_process(tree, 52, "/usr/bin/sh", str(own))
    number = own.stat().st_dev
    if file_system != "none":
        line = f"25 1 {os.major(number)}:{os.minor(number)} / /tmp rw - {file_system} none rw\n"
        tree.write("/proc/52/mountinfo", line)
    expected = [] if file_system == "tmpfs" else ["holds the PCI resource resource0, which sh (pid 52) has open"]
    assert tree.find(NIC) == expected


def test_openers_open_io_port_resource(tree: Tree) -> None:
    """A resource of I/O ports is read and written, never mapped. The list of all resources is anybody's to read."""
    path = tree.add_device(NIC, "20000")
    for name in ("resource", "resource1"):
        tree.write(f"{path}/{name}")
    add_process(tree, 50, "/usr/bin/lspci", f"{tree.top}{path}/resource")
    assert tree.find(NIC) == []
    add_process(tree, 51, "/usr/bin/ports", f"{tree.top}{path}/resource1")
    assert tree.find(NIC) == ["holds the PCI resource resource1, which ports (pid 51) has open"]


@pytest.mark.parametrize(
    ("files", "use"),
    [
        (
            {"/proc/consoles": "tty0                 -WU (EC p  )    4:1\nttyS4                -W- (EC   a)    4:68"},
            True,
        ),
        (
            {"/proc/consoles": "tty0                 -WU (EC p  )    4:1\nttyS0                -W- (E    a)    4:64"},
            False,
        ),
        ({"/sys/class/tty/console/active": "tty0 ttyS4"}, True),
        ({"/sys/class/tty/console/active": "tty0 ttyS40"}, False),
        ({}, False),
    ],
)
def test_openers_console(tree: Tree, files: dict[str, str], use: bool) -> None:
    """Processes have it open as /dev/console."""
    add_node(tree, f"{tree.add_device(NIC, '70002', 'serial')}/0000:02:00.0:0/0000:02:00.0:0.0/tty/ttyS4", "4:68")
    for path, text in files.items():
        tree.write(path, text)
    assert tree.find(NIC) == (["holds /dev/ttyS4, which is a kernel console"] if use else [])


# What can't be seen ---------------------------------------------------------------------------------------------------


def answer_with(monkeypatch: pytest.MonkeyPatch, **answer: Any) -> None:
    """Have processes looked at with this result."""
    whole = {"open": [], "looked": 40, "total": 40, "hidden": 0, **answer}

    def list_openers(*_: object) -> dict[str, Any]:
        return whole

    monkeypatch.setattr(openers, "list_openers", list_openers)


@pytest.mark.parametrize(
    ("driver", "answer", "use"),
    [
        ("e1000e", {}, ""),
        (
            "e1000e",
            {"looked": 12},
            "holds /dev/ptp0, which may be open: there was only time to check 12 of 40 processes",
        ),
        ("", {"looked": 0}, "holds PCI resources, which may be open: there was only time to check 0 of 40 processes"),
        (
            "e1000e",
            {"hidden": 3},
            "holds /dev/ptp0, which may be open: the hook lacks the privilege to check 3 of 40 processes"
            " (CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH)",
        ),
    ],
)
def test_openers_incomplete_scan_not_free(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, driver: str, answer: dict[str, int], use: str
) -> None:
    path = tree.add_device(NIC, "20000", driver)
    if driver:
        add_node(tree, f"{path}/ptp/ptp0", "248:0")
    answer_with(monkeypatch, **answer)
    assert tree.find(NIC) == ([use] if use else [])


def test_openers_scanned_once_if_needed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    from oci_hooks.linux import pci
    from oci_hooks.linux.usage import UsageFinder
    from oci_hooks.system import Deadline

    asked: list[int] = []

    def list_openers(_proc: str, _wanted: frozenset[str], depth: int, _seconds: float) -> dict[str, Any]:
        asked.append(depth)
        return {"open": [], "looked": 1, "total": 1, "hidden": 0}

    monkeypatch.setattr(openers, "list_openers", list_openers)
    addresses = [f"0000:0{number}:00.0" for number in range(1, 7)]
    locations = [tree.add_device(address, "20000", "e1000e") for address in addresses]
    uses = UsageFinder(tree.root, Deadline(60))

    def look(*addresses: str) -> None:
        for address in addresses:
            device = pci.read_device(tree.root, address)
            assert device is not None
            uses.find(device)

    look(addresses[0])
    assert asked == []
    for number, (location, below) in enumerate(
        zip(locations, ("net", "ptp/ptp0", "ptp/ptp1", "uio/uio0", "drm/card0"))
    ):
        if number:
            add_node(tree, f"{location}/{below}", f"248:{number}")
    uses = UsageFinder(tree.root, Deadline(60))
    look(*addresses[:3])
    assert asked == [DESCRIPTORS]
    look(*addresses[3:], *addresses[1:3])
    assert asked == [DESCRIPTORS, MAPPINGS]
