# SPDX-License-Identifier: Apache-2.0
"""Whose a device is, on a real kernel: another one at its address, two containers of one id, what is left of one."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"
# A NIC that no machine here has from the start.
IDS = "15ad:07b0"
MOUNT = Path("/run/owners-mnt")


def unplug(name: str) -> None:
    """Have QEMU take a device out and wait until it is gone."""
    guest.qmp("device_del", id=name)
    guest.wait_for_qmp_event("DEVICE_DELETED", device=name)
    guest.settle()


def plug_nic() -> str:
    """Plug the NIC in and return its address."""
    guest.qmp("device_add", driver="vmxnet3", id="nic", bus=guest.hotplug_ports()[0])
    guest.settle()
    return guest.find_device(IDS)


def mount_disk(address: str) -> Path:
    """Make a file system on the NVMe disk at an address, mount it, and return a file in it."""
    (disk,) = guest.disks_of(address)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    MOUNT.mkdir(exist_ok=True)
    subprocess.run(["mount", disk, MOUNT], check=True)
    file = MOUNT / "file"
    file.write_text("kept")
    return file


@pytest.fixture
def empty_port() -> Iterator[None]:
    """Leave the port empty, and nothing mounted."""
    yield
    subprocess.run(["umount", MOUNT], check=False)
    for name in ("nic", "hot"):
        try:
            unplug(name)
        except AssertionError:
            # Not there: the test has taken it out, or never came so far.
            continue


@one_runtime
@pytest.mark.usefixtures("empty_port")
def test_guest_owners_another_device_at_address(containers: Containers) -> None:
    """The NIC of a container is unplugged; a disk comes to its slot and is mounted; then the claim is cleaned up."""
    other_nic = guest.find_device(devices.NIC_E1000E)
    address = plug_nic()
    inode = (guest.PCI / address).stat().st_ino
    first, first_state = guest_calls.make_created(containers, annotations=ask(address))
    _, second_state = guest_calls.make_created(containers, annotations=ask(other_nic))
    assert guest_calls.call_hook(first_state).code == 0
    unplug("nic")
    os.kill(first.read_pid(), signal.SIGKILL)
    first.wait()
    disk = "if=none,id=hot,format=raw,file.driver=null-co,file.size=64M,file.read-zeroes=on,snapshot=on"
    answer = guest.qmp("human-monitor-command", command_line=f"drive_add 0 {disk}")
    assert "OK" in answer, answer
    guest.qmp("device_add", driver="nvme", id="hot", serial="hot", drive="hot", bus=guest.hotplug_ports()[0])
    guest.settle()
    assert guest.find_nvme("hot") == address
    assert (guest.PCI / address).stat().st_ino != inode
    file = mount_disk(address)

    done = guest_calls.call_hook(second_state)
    assert done.code == 0, done.stderr
    (reported,) = guest_calls.list_findings(done)
    assert f"warning: [device-replaced] {address}: was unplugged after it was bound" in reported
    assert (guest.driver_of(address), guest.override_of(address)) == ("nvme", "")
    subprocess.run(["sync", "-f", MOUNT], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert file.read_text() == "kept"
    assert guest_calls.list_claims() == [second_state["id"]]


@one_runtime
@pytest.mark.usefixtures("empty_port")
def test_guest_owners_replugged_device(containers: Containers) -> None:
    """Vendor, device and class are the same then; only the inode number of its directory differs."""
    address = plug_nic()
    inode = (guest.PCI / address).stat().st_ino
    container, state = guest_calls.make_created(containers, annotations=ask(address))
    assert guest_calls.call_hook(state).code == 0
    unplug("nic")
    assert plug_nic() == address
    assert (guest.PCI / address).stat().st_ino != inode
    os.kill(container.read_pid(), signal.SIGKILL)
    container.wait()
    guest.bind(address, "vfio-pci")
    done = guest_calls.call_hook({**state, "status": "stopped"}, "poststop")
    assert (done.code, "[device-replaced]" in done.stderr) == (0, True), done.stderr
    # Bound and overridden by an administrator, in between, for something else.
    assert (guest.driver_of(address), guest.override_of(address)) == ("vfio-pci", "vfio-pci")
    assert guest_calls.list_claims() == []
    guest.bind_native(address)


@one_runtime
@pytest.mark.parametrize("asks", [False, True])
def test_guest_owners_same_id_second_container(containers: Containers, asks: bool) -> None:
    """Below another state directory an id is free; its poststop comes while the first one lives."""
    nic = guest.find_device(devices.NIC_E1000E)
    first, state = guest_calls.make_created(containers, annotations=ask(nic))
    assert guest_calls.call_hook(state).code == 0
    claim = (guest_calls.CLAIMS / first.name).read_bytes()
    nodes = guest_calls.list_dev(first)
    hooks = bundles.guest_hooks("createRuntime", "poststop")
    second = containers.make("/bin/true", hooks=hooks, annotations=ask(nic) if asks else {})
    command = [containers.runtime, "--root", "/run/other-root", "run", "--bundle", str(second.bundle), first.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode != 0) == asks, done
    log = guest.read_kernel_log()
    assert "[claimed]" in log + done.stderr if asks else "[container-alive]" in log + done.stderr
    assert guest.driver_of(nic) == "vfio-pci"
    assert guest_calls.list_dev(first) == nodes
    assert (guest_calls.CLAIMS / first.name).read_bytes() == claim
    # When it has ended, they go back, whoever's poststop that is.
    os.kill(first.read_pid(), signal.SIGKILL)
    first.wait()
    assert guest_calls.call_hook({**state, "status": "stopped", "bundle": str(second.bundle)}, "poststop").code == 0
    assert (guest.driver_of(nic), guest_calls.list_claims()) == ("e1000e", [])


@one_runtime
def test_guest_owners_remaining_process_keeps_claim(containers: Containers) -> None:
    """In a shared pid namespace the kernel does not end the others with the init."""
    nic = guest.find_device(devices.NIC_E1000E)
    namespaces = [{"type": name} for name in bundles.NAMESPACES if name != "pid"]
    first = containers.make(
        "/bin/sh",
        "-c",
        "sleep 900 & exit 0",
        hooks={},
        annotations=ask(nic),
        edit={"linux": {"namespaces": namespaces}},
    )
    assert first.create().code == 0
    state = first.read_state()
    _, other = guest_calls.make_created(containers, annotations=ask(nic))
    assert guest_calls.call_hook(state).code == 0
    assert first.start().code == 0
    first.wait()
    procs = Path(f"/sys/fs/cgroup/{first.name}/cgroup.procs")
    (left,) = procs.read_text().split()

    done = guest_calls.call_hook(other)
    assert (done.code, f"belongs to container {first.name}" in done.stderr) == (1, True), done.stderr
    # Nor does a container of the same id elsewhere take it.
    done = guest_calls.call_hook({**state, "status": "stopped", "bundle": "/elsewhere"}, "poststop")
    assert (done.code, "[container-alive]" in done.stderr) == (1, True), done.stderr
    assert guest.driver_of(nic) == "vfio-pci"
    ending = os.pidfd_open(int(left))
    os.kill(int(left), signal.SIGKILL)
    assert select.select([ending], [], [], 60)[0]
    os.close(ending)
    done = guest_calls.call_hook(other)
    assert (done.code, done.stderr) == (0, "")
    assert guest_calls.list_claims() == [other["id"]]
