# SPDX-License-Identifier: Apache-2.0
"""Releases as they really are called: on a read-only root file system, and with the state that Kata's agent gives."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_kernel import ActingMachine, Container, Run
from tests.unit.guest.test_faults import MS_RDONLY, MS_REMOUNT, leave_mounts, mount

pytestmark = pytest.mark.unit

DEVICE = "0000:01:00.0"
MS_BIND = 4096


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Iterator[ActingMachine]:
    """Return a machine with a group."""
    machine = ActingMachine(tmp_path)
    yield machine
    machine.end()


@pytest.fixture(name="container")
def make_container(machine: ActingMachine) -> Container:
    """Return a container that has the group."""
    container = machine.make_container("c1", DEVICE)
    assert machine.call(container.state) == (0, "")
    return container


def release_read_only(machine: ActingMachine, container: Container) -> tuple[int, str]:
    """Run the release of a container whose root file system is read-only."""
    root = container.dev.parent

    def prepare() -> None:
        leave_mounts()
        mount(root, "", MS_BIND, source=root)
        mount(root, "", MS_REMOUNT | MS_BIND | MS_RDONLY)

    return machine.call(container.stopped, "poststop", prepare=prepare)


def test_release_read_only_nothing_left(machine: ActingMachine, container: Container) -> None:
    """The container's /dev was a file system of its own, which is gone: rmdir(2) answers EROFS all the same."""
    shutil.rmtree(container.dev / "vfio")
    assert release_read_only(machine, container) == (0, "")
    assert machine.list_claims() == []


@pytest.mark.parametrize("left", ["vfio", "vfio/1"])
def test_release_read_only_something_left(machine: ActingMachine, container: Container, left: str) -> None:
    """Where /dev is a part of the root file system that was made read-only since."""
    for name in ("vfio", "1", "devices.json"):
        if f"vfio/{name}" != left:
            (container.dev / "vfio" / name).unlink()
    code, output = release_read_only(machine, container)
    assert code == 1
    assert f"[undo-failed] /dev/{left}: cannot remove it from the container" in output
    assert output.count("Read-only file system") == 1 + ("/" in left)
    # Nothing that is left can be used: the devices go back.
    assert machine.list_claims() == []


# The state that Kata's agent gives at poststop ------------------------------------------------------------------------


def call(machine: ActingMachine, container: Container, **changes: Any) -> tuple[int, str]:
    """Run the hook without an argument, with the machine as it is."""
    return Run(machine, {**container.state, **changes}, (), lambda: None).finish()


def test_release_status_running_init_gone(machine: ActingMachine, container: Container) -> None:
    before = machine.list_claims()
    container.end()
    # A runtime may have taken the bundle's files away.
    (container.bundle / "config.json").unlink()
    assert before == ["c1"]
    assert call(machine, container, status="running") == (0, "")
    assert machine.list_claims() == []
    assert machine.take_stock()["drivers"][DEVICE][0] == "e1000e"
    assert machine.take_stock()["nodes"] == {"c1": {}}


def test_release_status_running_pid_of_another_process(machine: ActingMachine, container: Container) -> None:
    """Binding to that one would give it the container's device."""
    location = machine.place(f"/proc/{container.init.pid}/stat")
    fields = location.read_text().rpartition(")")[2].split()
    location.unlink()
    fields[19] = str(int(fields[19]) + 7)
    location.write_text(f"{container.init.pid} (other) {' '.join(fields)}\n")
    assert call(machine, container, status="running") == (0, "")
    assert machine.list_claims() == []
    assert container.init.poll() is None


def test_status_running_init_alive_keeps_devices(machine: ActingMachine, container: Container) -> None:
    before = machine.take_stock()
    assert call(machine, container, status="running") == (0, "")
    assert machine.take_stock() == before
    assert machine.list_claims() == ["c1"]


@pytest.mark.parametrize(("status", "claimed"), [("running", False), ("created", True), ("", True)])
def test_init_gone_nothing_to_bind_to(machine: ActingMachine, container: Container, status: str, claimed: bool) -> None:
    """Without a claim there is nothing to release; another status is not that of a poststop."""
    if not claimed:
        assert machine.call(container.stopped, "poststop") == (0, "")
    container.end()
    code, output = call(machine, container, status=status)
    assert code == 1
    assert "[no-process]" in output
    assert machine.list_claims() == ["c1"] * claimed


def test_bind_deadline_above_agents_warned_once(machine: ActingMachine) -> None:
    """Only for a container that asks for a device, in a Kata guest."""
    machine.write("/etc/oci-vfio-hooks/guest.toml", "deadline = 30\n")
    for name, devices, count in (("c1", DEVICE, 1), ("c2", "", 0)):
        container = machine.make_container(name, devices, **({} if devices else {"annotations": {}}))
        bundle = f"/run/kata-containers/{name}"
        machine.place("/run/kata-containers").mkdir(exist_ok=True)
        machine.place(bundle).symlink_to(container.bundle)
        code, output = machine.call({**container.state, "bundle": bundle}, "prestart")
        assert (code, output.count("[deadline-too-long]"), len(output.splitlines())) == (0, count, count), output
