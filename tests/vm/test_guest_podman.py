# SPDX-License-Identifier: Apache-2.0
"""Podman with a hooks.d file, as an administrator would set it up."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import guest_calls
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Done

MACHINE = "standard"


@pytest.fixture
def rootfs() -> Iterator[Path]:
    """Return a root file system that a container may write to."""
    root = bundles.mount_rootfs(Path(tempfile.mkdtemp(prefix="podman-rootfs-", dir="/run")))
    yield root
    subprocess.run(["umount", "--lazy", str(root)], check=True)


def run_podman(hooks: Path, *arguments: str) -> Done:
    """Run podman with everything of its own on /run, which is gone with the machine."""
    own = ("--root", "/run/podman/root", "--runroot", "/run/podman/run", "--storage-driver", "vfs")
    managers = ("--cgroup-manager", "cgroupfs", "--events-backend", "none", "--hooks-dir", str(hooks))
    done = subprocess.run(["podman", *own, *managers, *arguments], capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.usefixtures("native_drivers")
def test_guest_podman_run(rootfs: Path, tmp_path: Path) -> None:
    """The annotation brings the hook in, and with it the group; its driver is back when the container is gone."""
    hook = {
        "version": "1.0.0",
        "hook": {"path": bundles.find_hook(bundles.GUEST_HOOK)},
        "when": {"annotations": {"^io[.]katacontainers[.]x[.]vfio": "."}},
        "stages": ["createRuntime", "poststop"],
    }
    (tmp_path / "vfio.json").write_text(json.dumps(hook))
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    run = ("run", "--rm", "--network", "none", "--ulimit", "memlock=-1:-1")
    asks = ("--annotation", f"{guest_calls.DEVICES}={nic}")
    done = run_podman(tmp_path, *run, *asks, "--rootfs", str(rootfs), *bundles.PROBE)
    assert done.code == 0, done.stderr
    (group,) = done.read_json()["groups"]
    assert group["devices"] == [{"address": nic, "get_device": "ok", "read_id": "ok", "id": devices.NIC_E1000E}]
    assert guest_calls.look_at_drivers() == before
    assert guest_calls.list_claims() == []


def test_guest_podman_starts_no_hook_without_annotation(rootfs: Path, tmp_path: Path) -> None:
    """The condition of the file that the packages install; what it starts here leaves a mark and does nothing else."""
    shipped = json.loads((bundles.REPOSITORY / "examples/hooks.d/vfio-guest-bind.json").read_text())
    started = tmp_path / "started"
    marker = tmp_path / "mark"
    marker.write_text(f"#!/bin/sh\ncat >/dev/null\necho >>{started}\n")
    marker.chmod(0o755)
    shipped["hook"]["path"] = str(marker)
    hooks = tmp_path / "hooks.d"
    hooks.mkdir()
    (hooks / "vfio.json").write_text(json.dumps(shipped))
    # The third one is asked for, in createRuntime and poststop.
    for annotation in ("io.katacontainers.x.vfiox=1", "x=vfio", f"{guest_calls.DEVICES}.web=auto"):
        assert not started.exists()
        words = ("--network", "none", "--annotation", annotation, "--rootfs", str(rootfs), "/bin/true")
        done = run_podman(hooks, "run", "--rm", *words)
        assert done.code == 0, done.stderr
    assert len(started.read_text().splitlines()) == 2
