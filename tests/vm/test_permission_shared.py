# SPDX-License-Identifier: Apache-2.0
"""Permissions of several containers on a real kernel: processes that outlive their init, reused numbers, a pod.

What a process of a container can open is asked of a process in its cgroup, which has the directory of its nodes open.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import devices, guest
from tests.vm.bundles import Container, Containers
from tests.vm.test_guest_hotplug import IDS, before_step, plug, unplug
from tests.vm.test_permission import RETURN_1, attach, call_bpf, deny_all, load

MACHINE = "standard"

UNIFIED = Path("/sys/fs/cgroup")
LEGACY = Path("/run/cgroup-devices")
CONTROL = (10, 196)
# What stays when its container's init ends. It answers each number of a node with the errno of opening it.
STAYING = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
print("up", flush=True)
for line in sys.stdin:
    try:
        os.close(os.open(line.strip(), os.O_RDWR, dir_fd=fd))
        print(0, flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


class Staying:
    """A process in a container's cgroups, as one in a shared pid namespace is, with a directory of nodes of its own."""

    def __init__(self, container: Container, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        # Where nodes can be opened, whatever /run is mounted with.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "dev", "nodes", directory], check=True)
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", STAYING, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin and self.process.stdout
        assert self.process.stdout.readline() == "up\n"
        for line in Path(f"/proc/{container.read_pid()}/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                self.enter(UNIFIED, path)
            elif controllers == "devices":
                self.enter(LEGACY, path)

    def enter(self, top: Path, path: str) -> None:
        """Put it into a cgroup."""
        (top / path.lstrip("/") / "cgroup.procs").write_text(str(self.process.pid))

    def open(self, numbers: tuple[int, int]) -> int:
        """Return errno of opening a device there, 0 where it opens."""
        name = f"{numbers[0]}-{numbers[1]}"
        if not (self.directory / name).exists():
            os.mknod(self.directory / name, 0o20666, os.makedev(*numbers))
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()

    def remove(self) -> None:
        """Leave nothing."""
        self.end()
        subprocess.run(["umount", self.directory], check=True)
        self.directory.rmdir()


class Party:
    """Makes such processes and takes them away."""

    def __init__(self) -> None:
        self.members: list[Staying] = []

    def add(self, container: Container) -> Staying:
        """Return a process in a container's cgroups."""
        self.members.append(Staying(container, Path(f"/run/staying-{len(self.members)}")))
        return self.members[-1]


@pytest.fixture
def party(containers: Containers) -> Iterator[Party]:
    """Give processes in containers' cgroups; they end before the containers do."""
    made = Party()
    yield made
    for member in made.members:
        member.remove()


@pytest.fixture
def plugged() -> Iterator[None]:
    """Take out what the test had plugged in."""
    yield
    if guest.find_devices(IDS):
        unplug()


def end_init(container: Container) -> None:
    """Kill a container's init, without informing the hook."""
    os.kill(container.read_pid(), signal.SIGKILL)
    container.wait()


def succeed(state: dict[str, Any], nic: str) -> tuple[int, int]:
    """Have the hook give a device to a container, and return the group's numbers."""
    done = guest_calls.fork_hook({**state, "annotations": ask(nic)})
    assert (done.code, done.stderr) == (0, "")
    return guest.numbers_of_group(guest.group_of(nic))


def release(state: dict[str, Any]) -> tuple[int, str]:
    """Have the hook release a container's devices."""
    done = guest_calls.fork_hook({**{key: value for key, value in state.items() if key != "pid"}, "status": "stopped"})
    return done.code, done.stderr


# A process outlives its container's init ------------------------------------------------------------------------------


@one_runtime
def test_shared_remaining_process_loses_permission(containers: Containers, party: Party) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    first, state = guest_calls.make_created(containers)
    second, second_state = guest_calls.make_created(containers)
    staying, other = party.add(first), party.add(second)
    numbers = succeed(state, nic)
    assert [staying.open(numbers), staying.open(CONTROL)] == [0, 0]
    end_init(first)
    # It has the device, as long as nobody ends the container.
    refused = guest_calls.fork_hook({**second_state, "annotations": ask(nic)})
    assert f"[claimed] group {guest.group_of(nic)}: belongs to container {first.name}" in refused.stderr
    assert [staying.open(numbers), staying.open(CONTROL)] == [0, 0]

    assert release(state) == (0, "")
    assert succeed(second_state, nic) == numbers
    assert [staying.open(numbers), staying.open(CONTROL)] == [errno.EPERM, errno.EPERM]
    assert [other.open(numbers), other.open(CONTROL)] == [0, 0]


@one_runtime
def test_shared_unrevocable_device_kept(containers: Containers, party: Party) -> None:
    """A device program that came later can't be read: with the process that is left the claim stays, and its device."""
    nic = guest.find_device(devices.NIC_E1000E)
    first, state = guest_calls.make_created(containers)
    _, second_state = guest_calls.make_created(containers)
    staying = party.add(first)
    numbers = succeed(state, nic)
    # BPF_MAP_CREATE: an array of one entry; then a 64-bit load of its address by descriptor.
    array = call_bpf(0, struct.pack("<IIII56x", 2, 4, 4, 1))
    attach(load((0x18, 0x12, 0, array), (0, 0, 0, 0), *RETURN_1), UNIFIED / first.name)
    os.close(array)
    end_init(first)
    code, output = release(state)
    assert code == 1
    assert "[permission-left]" in output
    assert f"cannot be revoked from its processes {staying.process.pid}: " in output
    assert f"end them with: kill -9 {staying.process.pid}" in output
    assert guest.driver_of(nic) == "vfio-pci"
    refused = guest_calls.fork_hook({**second_state, "annotations": ask(nic)})
    assert refused.code == 1
    assert "[claimed]" in refused.stderr
    assert staying.open(numbers) == 0
    # As the message advises.
    staying.end()
    done = guest_calls.fork_hook({**second_state, "annotations": ask(nic)})
    assert done.code == 0
    assert guest_calls.list_claims() == [second_state["id"]]


# Numbers that the kernel gives out anew -------------------------------------------------------------------------------


@one_runtime
@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("when", ["before", "while"])
def test_shared_reused_number_single_owner(containers: Containers, party: Party, when: str) -> None:
    """Unplugged before the next hook, or after that has looked at the claims: then the number is revoked once bound."""
    plug()
    guest.settle()
    (first_nic,) = guest.find_devices(IDS)
    nic = guest.find_device(devices.NIC_E1000E)
    first, state = guest_calls.make_created(containers)
    second, second_state = guest_calls.make_created(containers)
    staying, other = party.add(first), party.add(second)
    numbers = succeed(state, first_nic)
    name = guest.group_of(first_nic)
    assert staying.open(numbers) == 0
    if when == "before":
        unplug()
        again = succeed(second_state, nic)
    else:
        act = before_step("oci_hooks.guest.apply.drivers", "bind_devices", unplug)
        done = guest_calls.fork_hook({**second_state, "annotations": ask(nic)}, prepare=act)
        assert (done.code, done.stderr) == (0, "")
        again = guest.numbers_of_group(guest.group_of(nic))
    # The kernel gives out the lowest number that is free.
    assert again == numbers
    assert [staying.open(numbers), other.open(numbers)] == [errno.EPERM, 0]
    assert name not in guest_calls.list_dev(first)
    # What both need is both's.
    assert [staying.open(CONTROL), other.open(CONTROL)] == [0, 0]

    # The first one's end takes nothing from the second.
    end_init(first)
    staying.end()
    assert release(state) == (0, "")
    assert [other.open(numbers), other.open(CONTROL)] == [0, 0]
    assert guest_calls.list_claims() == [second.name]


@one_runtime
@pytest.mark.usefixtures("plugged")
def test_shared_unrevocable_number_refused(containers: Containers, party: Party) -> None:
    plug()
    guest.settle()
    (first_nic,) = guest.find_devices(IDS)
    nic = guest.find_device(devices.NIC_E1000E)
    first, state = guest_calls.make_created(containers)
    _, second_state = guest_calls.make_created(containers)
    staying = party.add(first)
    numbers = succeed(state, first_nic)
    array = call_bpf(0, struct.pack("<IIII56x", 2, 4, 4, 1))
    attach(load((0x18, 0x12, 0, array), (0, 0, 0, 0), *RETURN_1), UNIFIED / first.name)
    os.close(array)
    unplug()
    done = guest_calls.fork_hook({**second_state, "annotations": ask(nic)})
    assert done.code == 1
    assert (
        f"[permission-left] device number {numbers[0]}:{numbers[1]}: cannot be revoked from container {first.name}"
        in (done.stderr)
    )
    assert f"end container {first.name}, then start this one again" in done.stderr
    assert guest.driver_of(nic) == "e1000e"
    assert staying.open(numbers) == errno.ENXIO
    end_init(first)
    staying.end()
    done = guest_calls.fork_hook({**second_state, "annotations": ask(nic)})
    assert done.code == 0
    (reported,) = guest_calls.list_findings(done)
    assert (
        f"warning: [undo-failed] {UNIFIED / first.name}: device numbers 10:196,{numbers[0]}:{numbers[1]} " in reported
    )
    assert guest.numbers_of_group(guest.group_of(nic)) == numbers


# Version 1 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pod(containers: Containers, party: Party) -> Iterator[Path]:
    """Give a pod's cgroup of version 1, which denies all but /dev/null, next to the hierarchy of version 2."""
    LEGACY.mkdir()
    subprocess.run(["mount", "-t", "cgroup", "-o", "devices", "devices", LEGACY], check=True)
    path = LEGACY / "pod"
    path.mkdir()
    deny_all(path)
    yield path
    for member in party.members:
        member.end()
    containers.destroy_all()
    for directory in (*path.glob("*/"), path):
        directory.rmdir()
    subprocess.run(["umount", LEGACY], check=True)
    LEGACY.rmdir()


def put_into(pod: Path, container: Container, *rules: str) -> Path:
    """Put a container into a cgroup of its own in the pod."""
    path = pod / container.name
    path.mkdir()
    deny_all(path)
    for rule in rules:
        (path / "devices.allow").write_text(rule)
    (path / "cgroup.procs").write_text(str(container.read_pid()))
    return path


def list_rules(*paths: Path) -> list[set[str]]:
    """Return what cgroups of version 1 list."""
    return [set((path / "devices.list").read_text().splitlines()) for path in paths]


@one_runtime
def test_shared_v1_device_list_restored(containers: Containers, party: Party, pod: Path) -> None:
    """Its own entries are neither lost nor counted as allowed by the hook: an entry of its own, a wildcard, nothing."""
    nic = guest.find_device(devices.NIC_E1000E)
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    for rule in ("c 10:* r", "c 10:196 r", "c 511:* rwm", "c 1:7 r"):
        (pod / "devices.allow").write_text(rule)
    container, state = guest_calls.make_created(containers)
    own = put_into(pod, container, "c 10:* r", "c 10:196 r", "c 1:7 r")
    staying = party.add(container)
    before = list_rules(pod, own)
    with guest_calls.settings("deadline = 60", "widen_parent_cgroups = true"):
        numbers = succeed(state, nic)
        assert [staying.open(numbers), staying.open(CONTROL)] == [0, 0]
        assert "c 10:196 rw" in list_rules(own)[0]
        end_init(container)
        assert release(state) == (0, "")
    assert list_rules(pod, own) == before


@one_runtime
def test_shared_v1_pod_rules_kept_while_needed(containers: Containers, party: Party, pod: Path) -> None:
    """The control node is allowed to the pod for both of its containers, and is revoked with the last of them."""
    nics = guest.find_devices(devices.NIC_E1000E)
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    made = [guest_calls.make_created(containers) for _ in range(3)]
    for container, _ in made:
        put_into(pod, container)
    first, second, third = (party.add(container) for container, _ in made)
    before = list_rules(pod)
    with guest_calls.settings("deadline = 60", "widen_parent_cgroups = true"):
        numbers = [succeed(state, nic) for (_, state), nic in zip(made, nics)]
        assert [first.open(numbers[0]), first.open(CONTROL)] == [0, 0]
        assert [second.open(numbers[1]), second.open(CONTROL)] == [0, 0]

        # One that fails late takes nothing from them: its group is found to be busy, after it was allowed.
        edu = guest.find_device(devices.EDU)
        guest.bind(edu, "vfio-pci")
        holder = os.open(f"/dev/vfio/{guest.group_of(edu)}", os.O_RDWR)
        failed = guest_calls.fork_hook({**made[2][1], "annotations": ask(edu)})
        os.close(holder)
        assert "[group-busy]" in failed.stderr
        assert third.open(CONTROL) == errno.EPERM
        assert [first.open(CONTROL), second.open(CONTROL)] == [0, 0]

        end_init(made[0][0])
        first.end()
        assert release(made[0][1]) == (0, "")
        assert [second.open(numbers[1]), second.open(CONTROL)] == [0, 0]
        end_init(made[1][0])
        assert release(made[1][1]) == (0, "")
        assert second.open(CONTROL) == errno.EPERM
    assert list_rules(pod) == before


@one_runtime
def test_shared_v1_hidden_exception_restored(containers: Containers, party: Party) -> None:
    """A cgroup that allows by default lists only that; opening the nodes shows what it denies."""
    nic = guest.find_device(devices.NIC_E1000E)
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    LEGACY.mkdir()
    subprocess.run(["mount", "-t", "cgroup", "-o", "devices", "devices", LEGACY], check=True)
    try:
        container, state = guest_calls.make_created(containers)
        own = LEGACY / "open"
        own.mkdir()
        (own / "devices.deny").write_text("c 10:196 w")
        (own / "cgroup.procs").write_text(str(container.read_pid()))
        staying = party.add(container)
        # The runtime's own program of version 2 would deny it too.
        staying.enter(UNIFIED, "/")
        assert staying.open(CONTROL) == errno.EPERM
        succeed(state, nic)
        assert staying.open(CONTROL) == 0
        end_init(container)
        assert release(state) == (0, "")
        assert staying.open(CONTROL) == errno.EPERM
        subprocess.run([sys.executable, "-ISc", READ_ONLY, str(own), str(staying.directory / "10-196")], check=True)
        staying.end()
        containers.destroy_all()
        own.rmdir()
    finally:
        subprocess.run(["umount", LEGACY], check=True)
        LEGACY.rmdir()


# Enter a cgroup and open a node for reading.
READ_ONLY = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
os.close(os.open(sys.argv[2], os.O_RDONLY))
"""
