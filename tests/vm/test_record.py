# SPDX-License-Identifier: Apache-2.0
"""Failures of many kinds, each with its recording, which has the same result when it is replayed without the
machine."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import guest_calls, kept_recordings
from tests.support.guest_calls import ask, one_runtime
from tests.support.kept_recordings import check_file, check_host, check_record
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"
KERNELS = ("6.1",)

RECORDS = Path("/var/lib/oci-vfio-hooks/records")
ABSENT = "0000:7f:00.0"
SHORT = "deadline = 3"


def find_bridge() -> str:
    """Return the address of a PCI-to-PCI bridge."""
    return guest.find_device("0604")


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Have something done again and again."""
    end = threading.Event()

    def repeat() -> None:
        while not end.wait(0.5):
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


# Refused -------------------------------------------------------------------------------------------------------------


@one_runtime
@pytest.mark.parametrize(
    ("code", "devices_asked"),
    [("bad-annotation", "nonsense"), ("never-taken", "class:0601"), ("bridge", find_bridge)],
)
def test_record_annotations(containers: Containers, code: str, devices_asked: Any) -> None:
    text = devices_asked if isinstance(devices_asked, str) else devices_asked()
    _, state = guest_calls.make_created(containers, annotations=ask(text))
    check_record(guest_calls.fork_hook(state), code)


@one_runtime
def test_record_device_never_arrives(containers: Containers) -> None:
    """Waited for in vain: the uevent that came meanwhile is in the record, and when."""
    nic = guest.find_device(devices.NIC_E1000E)
    _, state = guest_calls.make_created(containers, annotations=ask(ABSENT))
    with guest_calls.settings("deadline = 25"), meanwhile(lambda: (guest.PCI / nic / "uevent").write_text("add")):
        done = guest_calls.fork_hook(state)
    record = check_record(done, "no-such-device")
    waits = [event for event in record.events if event.get("do") == "wait-for-event"]
    assert waits[0]["answer"].startswith("add /devices/")
    assert waits[0]["answer"].endswith(nic)


@one_runtime
@pytest.mark.parametrize(("code", "count"), [("ambiguous", 1), ("no-candidate", 30)])
def test_record_ambiguous_count(containers: Containers, code: str, count: int) -> None:
    listed = bundles.vfio_devices(*(str(number) for number in range(70, 70 + count)))
    _, state = guest_calls.make_created(containers, devices=listed, environment={"TOKEN": "secret"})
    with guest_calls.settings(SHORT):
        record = check_record(guest_calls.fork_hook(state), code)
    assert b"secret" not in b"".join(record.documents.values())
    assert "secret" not in json.dumps(record.events)


@one_runtime
def test_record_auto_nothing_free(containers: Containers) -> None:
    _, state = guest_calls.make_created(containers, annotations=ask("auto"))
    with guest_calls.settings(SHORT, 'auto.classes = ["0b"]'):
        check_record(guest_calls.fork_hook(state), "nothing-to-take")


@one_runtime
def test_record_disk_in_use(containers: Containers) -> None:
    address = guest.find_nvme("disk")
    (disk,) = guest.disks_of(address)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    point = Path("/run/record-mnt")
    point.mkdir()
    subprocess.run(["mount", disk, point], check=True)
    try:
        _, state = guest_calls.make_created(containers, annotations=ask(address))
        check_record(guest_calls.fork_hook(state), "in-use")
    finally:
        subprocess.run(["umount", point], check=True)
        point.rmdir()


@one_runtime
def test_record_claimed_device(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    _, first = guest_calls.make_created(containers, annotations=ask(nic))
    before = kept_recordings.list_records()
    done = guest_calls.fork_hook(first)
    assert done.code == 0, done.stderr
    assert kept_recordings.list_records() == before
    _, second = guest_calls.make_created(containers, annotations=ask(nic))
    check_record(guest_calls.fork_hook(second), "claimed")
    guest_calls.release(first)


@one_runtime
def test_record_ended_process(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    _, state = guest_calls.make_created(containers, annotations=ask(nic))
    check_record(guest_calls.fork_hook({**state, "pid": 4194303}), "no-process")


@one_runtime
def test_record_lock_held(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    _, state = guest_calls.make_created(containers, annotations=ask(nic))
    Path("/run/oci-vfio-hooks").mkdir(mode=0o700, exist_ok=True)
    with open("/run/oci-vfio-hooks/lock", "w") as lock, guest_calls.settings(SHORT):
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_record(guest_calls.fork_hook(state), "lock-timeout")


# Input ---------------------------------------------------------------------------------------------------------------


@one_runtime
@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("bad-json", '{"process": {"env": ["TOKEN=secret", ]}, "annotations": {"io.katacontainers.x.vfio": "[]"}}'),
        ("bad-config", '{"linux": {"devices": [{"path": "/dev/vfio/1", "type": "c", "major": "x"}]}}'),
    ],
)
def test_record_bad_config(containers: Containers, code: str, text: str) -> None:
    container, state = guest_calls.make_created(containers)
    (container.bundle / "config.json").write_text(text)
    record = check_record(guest_calls.fork_hook(state), code)
    assert b"secret" not in record.documents["config.json"]


@one_runtime
def test_record_bad_settings(containers: Containers) -> None:
    _, state = guest_calls.make_created(containers, annotations=ask("auto"))
    with guest_calls.settings("dead_line = 3"):
        check_record(guest_calls.fork_hook(state), "bad-settings")


# Failed on the way, and put back -------------------------------------------------------------------------------------


@one_runtime
def test_record_no_cdev(containers: Containers) -> None:
    """It shows after the device was bound: all of the way back is in the record too."""
    nic = guest.find_device(devices.NIC_E1000E)
    _, state = guest_calls.make_created(containers, annotations=ask([nic, "cdev"]))
    record = check_record(guest_calls.fork_hook(state), "no-cdev")
    assert sum(event.get("do") == "write-sysfs" for event in record.events) == 2
    assert guest.driver_of(nic) == "e1000e"


@one_runtime
def test_record_node_in_the_way(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    mount = {"destination": "/dev/vfio/vfio", "type": "bind", "source": "/etc/hostname", "options": ["bind", "ro"]}
    _, state = guest_calls.make_created(containers, annotations=ask(nic), mounts=[mount])
    check_record(guest_calls.fork_hook(state), "node-in-the-way")


def test_record_symlink_in_image(containers: Containers) -> None:
    """By both runtimes from the container's start to its end: the words are in the runtime's error."""
    nic = guest.find_device(devices.NIC_E1000E)
    mounts = [mount for mount in bundles.MOUNTS if not mount["destination"].startswith("/dev")]
    container = containers.make("/bin/true", annotations=ask(nic), edit={"mounts": mounts})
    elsewhere = Path("/run/record-elsewhere")
    elsewhere.mkdir(exist_ok=True)
    (container.root / "dev").mkdir(exist_ok=True)
    (container.root / "dev/vfio").symlink_to(elsewhere)
    record = check_record(container.run(), "hostile-tree", f"hostile-tree-{containers.runtime}")
    assert containers.runtime in record.about["versions"]["runtime"]


@one_runtime
def test_record_group_held(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    _, state = guest_calls.make_created(containers, annotations=ask(nic))
    holder = os.open(f"/dev/vfio/{guest.group_of(nic)}", os.O_RDWR)
    try:
        check_record(guest_calls.fork_hook(state), "group-busy")
        listed = [bundles.vfio_devices()[0], bundles.vfio_device(guest.group_of(nic), *numbers_of(nic))]
        _, state = guest_calls.make_created(containers, devices=listed)
        check_record(check_host(json.dumps(state)), "group-busy")
    finally:
        os.close(holder)


def numbers_of(address: str) -> tuple[int, int]:
    """Return major and minor of the node of a bound device's group."""
    return guest.numbers_of_group(guest.group_of(address))


@one_runtime
def test_record_no_driver(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    _, state = guest_calls.make_created(containers, annotations=ask(nic))
    modules = f"/lib/modules/{os.uname().release}"
    subprocess.run(["modprobe", "-r", "vfio-pci", "vfio_iommu_type1"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", modules], check=True)
    try:
        check_record(guest_calls.fork_hook(state), "no-vfio-driver")
    finally:
        subprocess.run(["umount", modules], check=True)


@one_runtime
def test_record_rootfs_without_dev(containers: Containers) -> None:
    """The process is one that is still in this machine's root, as a container's init is when its hooks run."""
    nic = guest.find_device(devices.NIC_E1000E)
    _, state = guest_calls.make_created(containers, annotations=ask(nic))
    file = Path(state["bundle"]) / "config.json"
    config = json.loads(file.read_text())
    config["root"]["path"] = str(file.parent / "empty")
    Path(config["root"]["path"]).mkdir()
    file.write_text(json.dumps(config))
    with subprocess.Popen(["sleep", "600"]) as init:
        done = guest_calls.fork_hook({**state, "pid": init.pid})
        init.kill()
    check_record(done, "no-rootfs")


# The host's hook, on this machine as a host --------------------------------------------------------------------------


@one_runtime
def test_record_group_missing(containers: Containers) -> None:
    _, state = guest_calls.make_created(containers, devices=bundles.vfio_devices("4711"))
    check_record(check_host(json.dumps(state)), "group-missing")


@one_runtime
def test_record_group_not_viable(containers: Containers) -> None:
    first, _ = guest.find_devices(devices.NIC_E1000)
    guest.bind(first, "vfio-pci")
    listed = [bundles.vfio_devices()[0], bundles.vfio_device(guest.group_of(first), *numbers_of(first))]
    _, state = guest_calls.make_created(containers, devices=listed)
    check_record(check_host(json.dumps(state)), "group-not-viable")


# Not only failures ---------------------------------------------------------------------------------------------------


def test_record_success_on_request(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    before = set(RECORDS.iterdir()) if RECORDS.exists() else set()
    annotations = {**ask(nic), "io.katacontainers.x.vfio.record": "on", "io.katacontainers.x.vfio.log": "debug"}
    hooks = bundles.guest_hooks("createRuntime", "poststop")
    done = containers.probe(annotations=annotations, hooks=hooks)
    assert done.code == 0, done.stderr
    (path,) = set(RECORDS.iterdir()) - before
    record = check_file(path, "", f"success-{containers.runtime}")
    assert [event["note"] for event in record.events if "note" in event] == ["request", "plan"]
    assert "vfio-guest-bind" in guest.read_kernel_log()
    assert "debug:" in guest.read_kernel_log()


@one_runtime
def test_record_never(containers: Containers) -> None:
    before = set(RECORDS.iterdir()) if RECORDS.exists() else set()
    annotations = {**ask(ABSENT), "io.katacontainers.x.vfio.record": "on"}
    _, state = guest_calls.make_created(containers, annotations=annotations)
    with guest_calls.settings(SHORT, 'record = "never"'):
        done = guest_calls.fork_hook(state)
    assert "[no-such-device]" in done.stderr
    assert (set(RECORDS.iterdir()) if RECORDS.exists() else set()) == before


@one_runtime
def test_record_read_only_guest(containers: Containers) -> None:
    """A guest whose image is read-only: the recording is in /run, and nothing else is reported."""
    _, state = guest_calls.make_created(containers, annotations=ask("nonsense"))
    RECORDS.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", RECORDS.parent], check=True)
    try:
        done = guest_calls.fork_hook(state)
        check_record(done, "bad-annotation")
        assert kept_recordings.list_records()[-1].parent == kept_recordings.PLACES[1]
    finally:
        subprocess.run(["umount", RECORDS.parent], check=True)
