# SPDX-License-Identifier: Apache-2.0
"""Selection of groups on a real machine's sysfs: by --dry-run, which prints the plan and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import DEVICES
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Options

MACHINE = "standard"
MAP = "io.katacontainers.x.vfio"

Bundle = Callable[..., Path]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Return what writes a config.json with these options and returns its directory."""

    def write(**options: Any) -> Path:
        config = bundles.make_config(["/bin/true"], str(tmp_path), Options(**options), "/none")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def plan_groups(directory: Path) -> list[str]:
    """Return the groups of which the plan makes nodes."""
    done = guest_calls.fork_hook(None, "--bundle", str(directory), "--dry-run", "--json")
    assert done.code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["exit"], answer["findings"]) == (0, [])
    made = [step["subject"] for step in answer["plan"] if step["action"] == "create"]
    assert made[0] == "/dev/vfio/vfio"
    return [path.rpartition("/")[2] for path in made[1:]]


def refuse(directory: Path) -> str:
    """Return the one line with which the hook refuses."""
    done = guest_calls.fork_hook(None, "--bundle", str(directory), "--dry-run")
    assert done.code != 0
    (line,) = guest_calls.list_findings(done)
    return line


def path_of(address: str) -> str:
    """Return a device's guest PCI path, as Kata writes it: the slots from the root bus down."""
    below = str((guest.PCI / address).resolve()).partition("/pci0000:00/")[2]
    return "/".join(step.split(":")[2].partition(".")[0] for step in below.split("/"))


def list_free() -> dict[str, str]:
    """Return a device of each group that may be taken without being named, by group."""
    found = [guest.find_devices(kind)[0] for kind in (devices.NIC_E1000, devices.EDU)]
    return {guest.group_of(address): address for address in (*guest.find_devices(devices.NIC_E1000E), *found)}


def test_guest_select_each_selector_kind(bundle: Bundle) -> None:
    """Address, id, class, guest path, auto; the whole group each time, and each group once."""
    nics, pair = guest.find_devices(devices.NIC_E1000E), guest.find_devices(devices.NIC_E1000)
    edu = guest.find_device(devices.EDU)
    cases = {
        nics[1]: [nics[1]],
        nics[1][len("0000:") :]: [nics[1]],
        f"id:{devices.NIC_E1000E}": nics,
        "class:0200": [*nics, pair[0]],
        f"path:{path_of(nics[0])}": [nics[0]],
        f"path:{path_of(pair[1])}": [pair[0]],
        f"{pair[0]}, {pair[1]}": [pair[0]],
        f"id:{devices.EDU},{nics[0]}": [edu, nics[0]],
        "auto": list(list_free().values()),
    }
    for text, expected in cases.items():
        groups = plan_groups(bundle(annotations={DEVICES: text}))
        assert groups == sorted((guest.group_of(address) for address in expected), key=int), text


def test_guest_select_predecessor_map(bundle: Bundle) -> None:
    """The JSON map that dgibson/kata-vfio-tools put into an annotation."""
    nic = guest.find_device(devices.NIC_E1000E, 1)
    known = [
        {"host-group": "41", "devices": [{"host-address": "0000:5e:00.1", "guest-path": {"Path": [path_of(nic)]}}]}
    ]
    assert plan_groups(bundle(annotations={MAP: json.dumps(known)})) == [guest.group_of(nic)]


def test_guest_select_counting(bundle: Bundle) -> None:
    """Entries with the host's numbers mean the free groups if there are as many; else the candidates are listed.

    The host's /dev/vfio/N is not the guest's group N, and a PCIDEVICE_* variable with a guest address decides.
    """
    free = list_free()
    nic = guest.find_device(devices.NIC_E1000E, 1)
    entries = bundles.vfio_devices("77", "78", "79", "80")
    assert plan_groups(bundle(devices=entries)) == sorted(free, key=int)

    line = refuse(bundle(devices=bundles.vfio_devices(guest.group_of(nic))))
    assert "[ambiguous] linux.devices" in line
    assert all(f"group {group}: {address}" in line for group, address in free.items())
    assert f'select by annotation: "{DEVICES}": "' in line

    hinted = bundle(devices=bundles.vfio_devices("77"), environment={"PCIDEVICE_INTEL_COM_NIC": nic})
    assert plan_groups(hinted) == [guest.group_of(nic)]
    host = bundle(devices=bundles.vfio_devices("77"), environment={"PCIDEVICE_INTEL_COM_NIC": "0000:5e:00.1"})
    assert "[ambiguous]" in refuse(host)


@pytest.mark.usefixtures("native_drivers")
def test_guest_select_live_numbers(bundle: Bundle) -> None:
    """An entry with the numbers of a VFIO group of this guest is that group, under whatever name, and however often."""
    nic = guest.find_device(devices.NIC_E1000E, 1)
    guest.bind(nic, "vfio-pci")
    numbers = guest.numbers_of_group(guest.group_of(nic))
    entries = [bundles.vfio_device(name, *numbers) for name in ("77", "78")]
    assert plan_groups(bundle(devices=entries)) == [guest.group_of(nic)]


def test_guest_select_refusals(bundle: Bundle) -> None:
    """Devices that are never bound, missing ones, and unreadable selectors."""
    (bridge,) = (
        member
        for member in guest.members_of(guest.group_of(guest.find_device(devices.NIC_E1000)))
        if guest.class_of(member) == "0604"
    )
    cases = {
        bridge: f"error: [bridge] {bridge}",
        "id:dead:beef": "error: [no-such-device]",
        "class:0108": "[never-taken]",
        "0000:00:00.0": "[in-use] 0000:00:00.0",
        "eth0": "[bad-annotation]",
    }
    for text, expected in cases.items():
        assert expected in refuse(bundle(annotations={DEVICES: text})), text


def test_guest_select_dry_run(bundle: Bundle) -> None:
    """For a person, in the order in which it would be done."""
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    directory = bundle(annotations={DEVICES: nic}, devices=bundles.vfio_devices("2"))
    done = guest_calls.call_hook(None, "--bundle", str(directory), "--dry-run")
    assert done.code == 0
    assert done.stdout.splitlines() == [
        "load vfio-pci: unless it is loaded",
        f"override {nic}: vfio-pci (was unset)",
        f"unbind {nic}: from e1000e",
        f"probe {nic}: vfio-pci",
        "remove /dev/vfio/2: node with the host's device number 511:200",
        "create /dev/vfio/vfio: 0600 0:0",
        f"create /dev/vfio/{guest.group_of(nic)}: 0600 0:0",
        "write /dev/vfio/devices.json: 1 device",
        "allow /dev/vfio/vfio: rw, unless it is allowed already",
        f"allow /dev/vfio/{guest.group_of(nic)}: rw, unless it is allowed already",
    ]
    assert guest_calls.look_at_drivers() == before
    assert guest_calls.list_claims() == []
