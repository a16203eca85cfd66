# SPDX-License-Identifier: Apache-2.0
"""The container's /dev on real file systems and with real VFIO nodes: whose it is, and which node the proof opens."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hooks.guest.apply import cgroup, container_dev, proof
from tests.support.guest_calls import ask
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "uses"
POINT = Path("/run/btrfs")
MOUNTS_WITHOUT_DEV = [mount for mount in bundles.MOUNTS if not mount["destination"].startswith("/dev")]


def run(*command: str | Path) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


@pytest.fixture(name="btrfs")
def mount_btrfs() -> Iterator[Path]:
    """Give a btrfs of the guest, with a subvolume: the numbers that stat() returns for either are in no mountinfo."""
    (node,) = guest.disks_of(guest.find_nvme("disk"))
    run("mkfs.btrfs", "--quiet", "--force", node)
    POINT.mkdir(exist_ok=True)
    run("modprobe", "btrfs")
    run("mount", "-t", "btrfs", node, POINT)
    run("btrfs", "subvolume", "create", POINT / "volume")
    number = f"{os.major(POINT.stat().st_dev)}:{os.minor(POINT.stat().st_dev)}"
    assert f" {number} " not in Path("/proc/self/mountinfo").read_text()
    yield POINT
    run("umount", POINT)
    guest.settle()
    run("wipefs", "--all", "--quiet", node)


@pytest.mark.parametrize("top", ["", "volume"])
def test_container_dev_btrfs_directory_is_foreign(containers: Containers, btrfs: Path, top: str) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    borrowed = btrfs / top / "dev"
    borrowed.mkdir()
    (borrowed / "file").write_text("the guest's")
    mount = {"destination": "/dev", "type": "bind", "source": str(borrowed), "options": ["rbind", "rw"]}
    try:
        done = containers.probe(annotations=ask(nic), edit={"mounts": [*MOUNTS_WITHOUT_DEV, mount]})
        assert done.code != 0
        assert "[hostile-tree] /dev: is a directory of the guest" in done.stderr, done.stderr
        assert not (borrowed / "vfio").exists()
        assert guest.driver_of(nic) == "e1000e"
    finally:
        containers.destroy_all()
        shutil.rmtree(borrowed)


def test_container_dev_btrfs_rootfs_is_own(btrfs: Path) -> None:
    """Without a mount on /dev: its directory is found by the same path, when the container's mounts are gone."""
    root = btrfs / "volume/rootfs"
    (root / "dev").mkdir(parents=True)
    dev = container_dev.open_dev(0, str(root))
    assert not container_dev.is_foreign_mount(dev, 0, str(root))
    (btrfs / "dev").mkdir()
    run("mount", "--bind", btrfs / "dev", root / "dev")
    borrowed = container_dev.open_dev(0, str(root))
    # Found by the same path: it is what this machine itself has there.
    assert not container_dev.is_foreign_mount(borrowed, 0, str(root))
    assert container_dev.is_foreign_mount(borrowed, 0, str(btrfs / "volume"))
    for fd in (dev, borrowed):
        os.close(fd)
    run("umount", root / "dev")


@pytest.mark.usefixtures("native_drivers")
def test_verify_nodes_same_numbers_elsewhere_refused(tmp_path: Path) -> None:
    """A process in the container makes /dev/vfio a link, after the hook made its nodes there."""
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    group = guest.group_of(nic)
    node = cgroup.MadeNode(f"vfio/{group}", *guest.numbers_of_group(group), is_group=True)
    guests = os.open("/dev", os.O_PATH)
    assert proof.verify_node(guests, node) == (0, True)
    (tmp_path / "vfio").symlink_to("/dev/vfio")
    linked = os.open(tmp_path, os.O_PATH)
    assert (tmp_path / f"vfio/{group}").is_char_device()
    assert proof.verify_node(linked, node) == (errno.ENOTDIR, False)
    os.close(guests)
    os.close(linked)
