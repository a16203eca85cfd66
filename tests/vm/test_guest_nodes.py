# SPDX-License-Identifier: Apache-2.0
"""The nodes in containers whose /dev is not the usual tmpfs, by settings, and by hand on a running container."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"
MOUNTS_WITHOUT_DEV = [mount for mount in bundles.MOUNTS if not mount["destination"].startswith("/dev")]
GUESTS_DEV = {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind", "rw"]}
BOTH = bundles.guest_hooks("createRuntime", "poststop")


def is_open(report: dict[str, Any], address: str) -> bool:
    """Return whether a probe read the device in its group."""
    found = [device for group in report["groups"] for device in group.get("devices", ())]
    return [(device["address"], device["id"]) for device in found] == [(address, guest.id_of(address))]


@one_runtime
def test_guest_nodes_settings_and_readonly_root(containers: Containers) -> None:
    """guest.toml gives owner and mode and switches the map off; a read-only root has a /dev all the same."""
    nic = guest.find_device(devices.NIC_E1000E)
    script = "stat -c '%a %u %g' /dev/vfio/vfio /dev/vfio/[0-9]* >&2; exec " + " ".join(bundles.PROBE)
    with guest_calls.settings("deadline = 60", "map = false", "[node]", "mode = 416", "uid = 7", "gid = 8"):
        done = containers.run("/bin/sh", "-c", script, annotations=ask(nic), readonly_root=True)
    assert done.code == 0, done.stderr
    report = done.read_json()
    assert is_open(report, nic)
    assert report["nodes"] == sorted([guest.group_of(nic), "vfio"])
    assert done.stderr.splitlines()[:2] == ["640 7 8", "640 7 8"]


@one_runtime
def test_guest_nodes_owned_by_container_user(containers: Containers) -> None:
    """Without any word about it, the nodes are for the container's own user, who then opens them."""
    nic = guest.find_device(devices.NIC_E1000E)
    report = containers.probe(annotations=ask(nic), user=1234).read_json()
    assert is_open(report, nic)


@one_runtime
def test_guest_nodes_guest_dev(containers: Containers) -> None:
    """A container that has the guest's own /dev: the kernel's nodes are there, none is made, none is taken away."""
    nic = guest.find_device(devices.NIC_E1000E)
    mounts = [*MOUNTS_WITHOUT_DEV, GUESTS_DEV]
    done = containers.probe(annotations=ask(nic), edit={"mounts": mounts}, hooks=BOTH)
    assert done.code == 0, done.stderr
    report = done.read_json()
    assert is_open(report, nic)
    # The kernel also makes the nodes of devices, if it has them.
    nodes = [name for name in report["nodes"] if name != "devices"]
    assert nodes == sorted([guest.group_of(nic), "vfio"])
    assert guest.driver_of(nic) == "e1000e"
    assert [path.name for path in Path("/dev/vfio").iterdir()] == ["vfio"]


@one_runtime
def test_guest_nodes_without_dev_mount(containers: Containers) -> None:
    """Without a mount on /dev the nodes are in the image's tree; nothing of them is left there at the end."""
    nic = guest.find_device(devices.NIC_E1000E)
    container = containers.make(*bundles.PROBE, annotations=ask(nic), edit={"mounts": MOUNTS_WITHOUT_DEV}, hooks=BOTH)
    done = container.run()
    assert done.code == 0, done.stderr
    assert is_open(done.read_json(), nic)
    assert not (container.root / "dev/vfio").exists()


@one_runtime
def test_guest_nodes_symlink_in_image_refused(containers: Containers) -> None:
    """An image whose /dev/vfio leads elsewhere gets no node anywhere, and the device its driver back."""
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    container = containers.make("/bin/true", annotations=ask(nic), edit={"mounts": MOUNTS_WITHOUT_DEV})
    elsewhere = Path("/run/elsewhere")
    elsewhere.mkdir(exist_ok=True)
    (container.root / "dev/vfio").symlink_to(elsewhere)
    done = container.run()
    assert done.code != 0
    assert "[hostile-tree]" in done.stderr
    assert list(elsewhere.iterdir()) == []
    assert guest_calls.look_at_drivers() == before


def test_guest_nodes_by_hand_on_running_container(containers: Containers) -> None:
    """`--bundle DIR --pid PID`, long after pivot_root; the map holds the host's address where an annotation knew it.

    A second time changes nothing: no rebind, no new node, no other program.
    """
    nic = guest.find_device(devices.NIC_E1000E)
    guest_path = str((guest.PCI / nic).resolve()).partition("/pci0000:00/")[2]
    slots = [step.split(":")[2] for step in guest_path.split("/")]
    known = [{"host-group": "41", "devices": [{"host-address": "0000:5e:00.1", "guest-path": {"Path": slots}}]}]
    container = containers.make(
        "/bin/sleep", "600", hooks={}, annotations={"io.katacontainers.x.vfio": json.dumps(known)}
    )
    assert container.create().code == 0
    assert container.start().code == 0
    by_hand = ("--bundle", str(container.bundle), "--pid", str(container.read_pid()))
    done = guest_calls.call_hook(None, *by_hand)
    assert (done.code, done.stderr) == (0, "")
    report = container.execute(*bundles.PROBE).read_json()
    assert is_open(report, nic)
    reported = json.loads(container.execute("/bin/cat", "/dev/vfio/devices.json").stdout)
    assert [(entry["address"], entry["host_address"]) for entry in reported["devices"]] == [(nic, "0000:5e:00.1")]

    before = take_stock(container.name, container.read_pid(), nic)
    done = guest_calls.call_hook(None, *by_hand)
    assert (done.code, done.stderr) == (0, "")
    assert take_stock(container.name, container.read_pid(), nic) == before

    # What a living container has is not taken from it.
    done = guest_calls.call_hook(None, *by_hand, "poststop")
    assert (done.code, "[container-alive]" in done.stderr) == (1, True), done.stderr
    assert take_stock(container.name, container.read_pid(), nic) == before
    os.kill(container.read_pid(), signal.SIGKILL)
    container.wait()
    done = guest_calls.call_hook(None, *by_hand, "poststop")
    assert (done.code, done.stderr) == (0, "")
    assert guest.driver_of(nic) == "e1000e"
    assert guest.override_of(nic) == ""
    assert guest_calls.list_claims() == []


def take_stock(name: str, pid: int, address: str) -> tuple[object, ...]:
    """Return the state that a second run must keep: the binding, the nodes, the cgroup's program, the undo log."""
    link = (guest.PCI / address / "driver").lstat()
    made = Path(f"/proc/{pid}/root/dev/vfio")
    nodes = sorted((path.name, path.stat().st_ino) for path in made.iterdir())
    undo_log = (guest_calls.CLAIMS / name).read_text()
    changes = [line for line in undo_log.splitlines() if line != "done"]
    return link.st_ino, nodes, guest_calls.list_programs(f"/sys/fs/cgroup/{name}"), changes
