# SPDX-License-Identifier: Apache-2.0
"""The kernel's drivers: there, loaded by modprobe, or what the kernel lacks. modprobe is a script of the test's."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from oci_hooks.findings import StepError
from oci_hooks.guest.apply.modprobe import load_drivers
from oci_hooks.system import Deadline
from tests.support.fake_guest import Machine

pytestmark = pytest.mark.unit

VFIO_PCI, TYPE1 = "/sys/bus/pci/drivers/vfio-pci", "/sys/module/vfio_iommu_type1"


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Machine:
    """Return a machine without vfio."""
    return Machine(tmp_path)


def put_modprobe(machine: Machine, script: str, path: str = "/usr/sbin/modprobe") -> None:
    """Give the machine a modprobe that notes how it was called."""
    machine.write(path, f'#!/bin/sh\ncd {machine.top}\necho "$@" >> calls\nenv >> environment\n{script}\n')
    machine.place(path).chmod(0o755)


def refuse(machine: Machine, seconds: float = 10) -> str:
    """Return the line of the refusal to go on without drivers."""
    with pytest.raises(StepError) as caught:
        load_drivers(machine.root, Deadline(seconds))
    (finding,) = caught.value.findings
    assert (finding.code, finding.subject) == ("no-vfio-driver", "vfio-pci")
    assert finding.hint
    return finding.as_line()


def test_modprobe_not_run_with_drivers_present(machine: Machine) -> None:
    machine.place(VFIO_PCI).mkdir()
    machine.place(TYPE1).mkdir(parents=True)
    put_modprobe(machine, "exit 1")
    load_drivers(machine.root, Deadline(10))
    assert not (machine.top / "calls").exists()


@pytest.mark.parametrize("path", ["/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe", "/usr/bin/modprobe"])
def test_modprobe_empty_environment(machine: Machine, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD_OF_A_TENANT", "1")
    put_modprobe(machine, f"mkdir -p .{VFIO_PCI} .{TYPE1}", path)
    load_drivers(machine.root, Deadline(10))
    assert machine.read("/calls") == "-a vfio-pci vfio_iommu_type1\n"
    assert "TENANT" not in machine.read("/environment")


def test_modprobe_only_missing_modules(machine: Machine) -> None:
    machine.place(TYPE1).mkdir(parents=True)
    put_modprobe(machine, f"mkdir .{VFIO_PCI}")
    load_drivers(machine.root, Deadline(10))
    assert machine.read("/calls") == "-a vfio-pci\n"


def test_modprobe_missing_names_kernel_options(machine: Machine) -> None:
    line = refuse(machine)
    assert "modprobe is not installed" in line
    assert "CONFIG_VFIO_PCI" in line


def test_modprobe_output_on_one_line(machine: Machine) -> None:
    put_modprobe(machine, "echo 'modprobe: FATAL: Module vfio-pci not found.\n2nd line' >&2; exit 1")
    line = refuse(machine)
    assert "FATAL: Module vfio-pci not found.\\n2nd line" in line


def test_modprobe_not_executable_fails(machine: Machine) -> None:
    machine.write("/sbin/modprobe", "no program\0")
    before = len(os.listdir("/proc/self/fd"))
    assert "Permission denied" in refuse(machine)
    machine.place("/sbin/modprobe").chmod(0o755)
    assert "Exec format error" in refuse(machine)
    assert len(os.listdir("/proc/self/fd")) == before


def test_modprobe_hanging_ends_at_deadline(machine: Machine) -> None:
    put_modprobe(machine, "exec sleep 60")
    begun = time.monotonic()
    assert "did not finish before the deadline" in refuse(machine, 0.3)
    assert time.monotonic() - begun < 10


def test_modprobe_leaves_no_descriptor(machine: Machine) -> None:
    put_modprobe(machine, "echo x")
    before = len(os.listdir("/proc/self/fd"))
    refuse(machine)
    assert len(os.listdir("/proc/self/fd")) == before
