# SPDX-License-Identifier: Apache-2.0
"""The host hook on a host whose IOMMU is off."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.vm import bundles, guest

MACHINE = "no-iommu"


@pytest.fixture(autouse=True)
def settings() -> None:
    """Give the hook more time than an emulated machine needs."""
    bundles.write_settings()


def run(*argv: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the hook."""
    command = [bundles.find_hook(bundles.HOST_HOOK), *argv]
    return subprocess.run(command, input=text, capture_output=True, text=True, env={}, check=False)


def test_host_check_no_iommu_group_refused(tmp_path: Path) -> None:
    assert not guest.GROUPS.is_dir() or not list(guest.GROUPS.iterdir())
    options = bundles.Options(devices=bundles.vfio_devices("12"), device_rules=[{"allow": True, "access": "rwm"}])
    (tmp_path / "config.json").write_text(json.dumps(bundles.make_config(["/bin/true"], "rootfs", options, "/x")))
    done = run(text=json.dumps({"id": "c1", "bundle": str(tmp_path), "status": "creating", "pid": 1}))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("vfio-host-check: error: [iommu-off] host: the kernel uses no IOMMU")


def test_host_check_no_iommu_without_vfio_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(bundles.make_config(["/bin/true"], "rootfs", bundles.Options(), "/x"))
    )
    done = run(text=json.dumps({"id": "c1", "bundle": str(tmp_path), "status": "creating", "pid": 1}))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_host_check_no_iommu_npd() -> None:
    done = run("--all", "--format", "npd")
    assert done.returncode == 1
    assert done.stdout.startswith("iommu-off: host: ")
    labels = run("--all", "--format", "nfd")
    assert "vfio.iommu=false\n" in labels.stdout
