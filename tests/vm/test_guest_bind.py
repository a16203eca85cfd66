# SPDX-License-Identifier: Apache-2.0
"""The main job, under both runtimes: a container's group opens with the guest hook and only with it.

No config.json here has a rule that would allow a VFIO node; that is the hook's to do.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"
KERNELS = ("6.1", "6.12")


def make_report(group: str, *members: str) -> dict[str, Any]:
    """Return the probe's result for a group in which everything works."""
    found = [{"address": member, "get_device": "ok", "id": guest.id_of(member), "read_id": "ok"} for member in members]
    steps = dict.fromkeys(("open", "get_status", "open_control", "set_container", "set_iommu"), "ok")
    return {"group": group, **steps, "viable": True, "devices": found}


def node(path: str, numbers: tuple[int, int], **more: Any) -> dict[str, Any]:
    """Return an entry of linux.devices."""
    return {"path": path, "type": "c", "major": numbers[0], "minor": numbers[1], **more}


def test_guest_bind_opens_group(containers: Containers) -> None:
    """The node alone, even with the right numbers, gives EPERM; after the hook the device is read through VFIO.

    Only the group asked for opens: the neighbour's node and /dev/mem, listed in config.json too, stay closed.
    """
    nic, neighbour = guest.find_devices(devices.NIC_E1000E)
    for address in (nic, neighbour):
        guest.bind(address, "vfio-pci")
    group, other = guest.group_of(nic), guest.group_of(neighbour)
    listed = [
        *bundles.vfio_devices()[:1],
        node(f"/dev/vfio/{group}", guest.numbers_of_group(group)),
        node("/dev/neighbour", guest.numbers_of_group(other)),
        node("/dev/memory", (1, 1)),
    ]
    report = containers.probe("/dev/neighbour", hooks={}, devices=listed).read_json()
    assert (report["control"], report["groups"]) == ("EPERM", [{"group": group, "open": "EPERM"}])

    report = containers.probe("/dev/neighbour", "/dev/memory", devices=listed).read_json()
    assert report["control"] == "ok"
    assert report["groups"] == [make_report(group, nic)]
    assert report["paths"] == {"/dev/neighbour": "EPERM", "/dev/memory": "EPERM"}


def test_guest_bind_by_counting(containers: Containers) -> None:
    """As many groups with the host's numbers as there are free ones here: these are they, whatever the numbers.

    One of them has two endpoints and a bridge and is taken whole. The host's nodes are gone, the guest's are there
    with owner and mode of the entries they stand for, and the drivers come back with poststop.
    """
    nics, pair = guest.find_devices(devices.NIC_E1000E), guest.find_devices(devices.NIC_E1000)
    edu = guest.find_device(devices.EDU)
    before = guest_calls.look_at_drivers()
    free = sorted({guest.group_of(address) for address in (*nics, *pair, edu)}, key=int)
    # The host's group 2 is not the guest's.
    names = ["2", "77", "78", "79"]
    assert free[0] != "2" and len(free) == len(names)
    # Group 77 belongs to a user of the container.
    listed = [
        {**entry, "uid": 1000, "gid": 1001, "fileMode": 0o640} if entry["path"] == "/dev/vfio/77" else entry
        for entry in bundles.vfio_devices(*names)
    ]
    script = "stat -c '%n %a %u %g' /dev/vfio/[0-9]* >&2; cat /dev/vfio/devices.json >&2; exec " + " ".join(
        bundles.PROBE
    )
    done = containers.run(
        "/bin/sh", "-c", script, devices=listed, hooks=bundles.guest_hooks("createRuntime", "poststop")
    )
    assert done.code == 0, done.stderr
    report = done.read_json()
    assert report["nodes"] == sorted([*free, "vfio", "devices.json"])
    taken = {entry["group"]: entry for entry in report["groups"]}
    for address in (*nics, edu):
        assert taken[guest.group_of(address)] == make_report(guest.group_of(address), address)
    bridge, *endpoints = taken[guest.group_of(pair[0])]["devices"]
    assert "id" not in bridge
    assert [entry["id"] for entry in endpoints] == [devices.NIC_E1000, devices.NIC_E1000]
    owners = dict(line.split(" ", 1) for line in done.stderr.splitlines() if line.startswith("/dev/vfio/"))
    assert owners == {f"/dev/vfio/{name}": "640 1000 1001" if name == free[1] else "600 0 0" for name in free}
    reported = json.loads(done.stderr[done.stderr.index("{") : done.stderr.rindex("}") + 1])
    assert reported == {
        "version": 1,
        "devices": [
            {
                "address": address,
                "vendor": guest.id_of(address)[:4],
                "device": guest.id_of(address)[5:],
                "group": name,
                "driver_before": before[address][0],
                "host_address": "",
                "node": f"/dev/vfio/{name}",
                "device_node": "",
            }
            for name in free
            for address in (*nics, *pair, edu)
            if guest.group_of(address) == name
        ],
    }
    assert guest_calls.look_at_drivers() == before
    assert guest_calls.list_claims() == []


def test_guest_bind_user_namespace(containers: Containers) -> None:
    """A container with a user namespace, whose /dev can hold no working node, is given a mount of them.

    The runtime binds what linux.devices lists from the guest's own /dev, so only the control node can stand there. With
    it crun gives the hook a wrong bundle; without it there is no /dev/vfio to mount on, in a tmpfs of the namespace.
    """
    subprocess.run(["modprobe", "vfio"], check=True)
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    done = containers.probe(
        devices=bundles.vfio_devices() if containers.runtime == "crun" else (),
        annotations=ask(nic),
        user_namespace=100000,
        hooks=bundles.guest_hooks("createRuntime", "poststop"),
    )
    assert done.code == 0, done.stderr
    report = done.read_json()
    assert report["groups"] == [make_report(guest.group_of(nic), nic)]
    assert report["nodes"] == sorted(["devices.json", "vfio", guest.group_of(nic)])
    assert guest_calls.look_at_drivers() == before


def test_guest_bind_mounted_disk_refused(containers: Containers) -> None:
    """A disk in use stays what it is, and the refusal names where it is mounted."""
    address = guest.find_nvme("disk")
    (disk,) = guest.disks_of(address)
    subprocess.run(["mkfs.ext4", "-q", str(disk)], check=True)
    location = Path("/run/mounted")
    location.mkdir(exist_ok=True)
    subprocess.run(["mount", str(disk), str(location)], check=True)
    try:
        before = guest_calls.look_at_drivers()
        done = containers.probe(annotations=ask(address))
        assert done.code != 0
        assert f"[in-use] {address}" in done.stderr
        assert f"{disk}, mounted on {location}" in done.stderr
        assert guest_calls.look_at_drivers() == before
        assert (location / "lost+found").exists()
    finally:
        subprocess.run(["umount", str(location)], check=True)
    assert guest_calls.list_claims() == []


@pytest.fixture
def hardened_bpf() -> Any:
    """Have the kernel hide the instructions of BPF programs, so that none can be rewritten."""
    switch = Path("/proc/sys/net/core/bpf_jit_harden")
    old = switch.read_text()
    switch.write_text("2")
    yield
    switch.write_text(old)


@pytest.mark.usefixtures("hardened_bpf")
def test_guest_bind_failure_rolls_back(containers: Containers) -> None:
    """Bound and exposed, but the cgroup's program cannot be changed: all is undone, and the message has the remedy."""
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    container = containers.make("/bin/true", annotations=ask(nic), devices=bundles.vfio_devices("77"))
    done = container.create()
    assert done.code != 0
    # runc puts quotes into quotes.
    words = done.stderr.replace("\\", "")
    assert words.count("[permit-failed]") == 1
    assert 'add to linux.resources.devices: {"allow": true, "type": "c", "major": 10, "minor": 196' in words
    assert guest_calls.look_at_drivers() == before
    assert guest.live_groups() == []
    assert guest_calls.list_claims() == []


@pytest.mark.usefixtures("hardened_bpf")
def test_guest_bind_allowed_by_config_keeps_program(containers: Containers) -> None:
    """An access that config.json allows is not allowed once more: here the program cannot even be read."""
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    group = guest.group_of(nic)
    numbers = (guest.numbers_of_group(group), (10, 196))
    rules = [{"allow": True, "type": "c", "major": x, "minor": y, "access": "rw"} for x, y in numbers]
    report = containers.probe(annotations=ask(nic), device_rules=rules).read_json()
    assert report["groups"] == [make_report(group, nic)]
    # It was the administrator's before, so poststop would leave it; here nothing was rebound at all.
    assert guest.driver_of(nic) == "vfio-pci"
