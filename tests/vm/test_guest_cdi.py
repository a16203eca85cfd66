# SPDX-License-Identifier: Apache-2.0
"""docs/howto/cdi.md on a machine with an IOMMU of its own: podman passes a group by the name in our CDI file."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import bundles, devices, guest
from tests.vm.bundles import Done

MACHINE = "standard"
FILE = Path("/run/cdi/oci-vfio-hooks.yaml")


@pytest.fixture
def rootfs() -> Iterator[Path]:
    """Return a root file system that a container may write to."""
    root = bundles.mount_rootfs(Path("/run/podman-cdi-rootfs"))
    yield root
    subprocess.run(["umount", "--lazy", str(root)], check=True)


def run_check(*arguments: str) -> Done:
    """Run the host check with these arguments."""
    command = [bundles.find_hook(bundles.HOST_HOOK), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def run_podman(rootfs: Path, device: str, *command: str, runtime: str = "crun") -> Done:
    """Run a container that asks for a CDI device, with everything of podman's own on /run."""
    own = ("--root", "/run/podman/root", "--runroot", "/run/podman/run", "--storage-driver", "vfs")
    managers = (
        "--runtime",
        runtime,
        "--cgroup-manager",
        "cgroupfs",
        "--events-backend",
        "none",
        "--hooks-dir",
        "/run/none",
    )
    run = ("run", "--rm", "--network", "none", "--ulimit", "memlock=-1:-1", "--device", device)
    line = ["podman", *own, *managers, *run, "--rootfs", str(rootfs), *command]
    Path("/run/none").mkdir(exist_ok=True)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.usefixtures("native_drivers")
def test_podman_takes_a_group_by_its_cdi_name(rootfs: Path) -> None:
    """A group opens by number and by address; one in use is refused in our words, one that is not there in podman's."""
    nic = guest.find_device(devices.NIC_E1000E)
    group = guest.group_of(nic)
    name = f"oci-vfio-hooks/group={group}"
    assert name not in run_check("--cdi", "list").stdout.split()
    done = run_check("--cdi", "generate", f"--output={FILE}", f"--select={group}")
    assert done.code == 1 and "[group-not-viable]" in done.stderr and "[cdi-empty]" in done.stderr
    assert not FILE.exists()

    guest.bind(nic, "vfio-pci")
    done = run_check("--cdi", "generate", f"--output={FILE}")
    assert done.code == 0 and "[cdi-written]" in done.stderr, done.stderr
    assert name in run_check("--cdi", "list").stdout.split()
    before = FILE.stat().st_mtime_ns
    assert run_check("--cdi", f"--output={FILE}").stderr == ""
    assert FILE.stat().st_mtime_ns == before

    for device in (name, f"oci-vfio-hooks/group={nic}"):
        done = run_podman(rootfs, device, *bundles.PROBE)
        assert done.code == 0, done.stderr
        (found,) = done.read_json()["groups"]
        assert found["devices"] == [{"address": nic, "get_device": "ok", "read_id": "ok", "id": devices.NIC_E1000E}]
    done = run_podman(rootfs, name, "/usr/bin/python3", "-Ic", "import os; print(os.environ)")
    assert f"'PCIDEVICE_OCI_VFIO_HOOKS_GROUP_{group}': '{nic}'" in done.stdout, done.stderr

    with Path(f"/dev/vfio/{group}").open("rb+", buffering=0):
        done = run_podman(rootfs, name, "/bin/true")
        again = run_podman(rootfs, name, "/bin/true", runtime="runc")
    # crun names the hook only; its words are in the system's log.
    assert done.code != 0 and "vfio-host-check` (exit code: 1)" in done.stderr, done.stderr
    assert again.code != 0 and "[group-busy]" in again.stderr, again.stderr
    done = run_podman(rootfs, "oci-vfio-hooks/group=9999", "/bin/true")
    assert done.code != 0 and "oci-vfio-hooks/group=9999" in done.stderr

    # With annotations the file is CDI 0.6.0, of which this podman knows nothing.
    assert run_check("--cdi", f"--output={FILE}", "--annotate").code == 0
    assert run_podman(rootfs, name, "/bin/true").code != 0
