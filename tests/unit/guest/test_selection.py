# SPDX-License-Identifier: Apache-2.0
"""Selection of a container's groups, and the messages of refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oci_hooks.findings import Refusal
from oci_hooks.guest.candidates import Candidates
from oci_hooks.guest.request import Request, parse_selector
from oci_hooks.guest.selection import ChosenGroup, NotAvailableYet, choose_groups
from oci_hooks.guest.settings import NEVER
from oci_hooks.linux.pci import PciDevice
from oci_hooks.oci import Device
from tests.support.fake_guest import Machine

pytestmark = pytest.mark.unit

BUS = "/sys/devices/pci0000:00"
PORT = "0000:00:02.0"
NIC, NIC2, VIRTIO, DISK = "0000:01:00.0", "0000:02:00.0", "0000:00:04.0", "0000:00:05.0"


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Machine:
    """Return a guest: a virtio device, two network cards behind root ports, a disk; each in a group of its own."""
    machine = Machine(tmp_path)
    machine.add("0000:00:00.0", "8086:29c0", "060000", group="0")
    machine.add("0000:00:1f.2", "8086:2922", "010601", "ahci", "8")
    machine.add(VIRTIO, "1af4:1041", "020000", "virtio-pci", "1")
    machine.add(DISK, "8086:5845", "010802", "nvme", "2")
    machine.add(PORT, "1b36:000c", "060400", "pcieport", "3")
    machine.add(NIC, "8086:10d3", "020000", "e1000e", "4", above=f"{BUS}/{PORT}")
    machine.add("0000:00:03.0", "1b36:000c", "060400", "pcieport", "5")
    machine.add(NIC2, "8086:10d3", "020000", "", "10", above=f"{BUS}/0000:00:03.0")
    return machine


def make_pool(machine: Machine, **changes: Any) -> Candidates:
    """Return a pool with the usual never-list, changed."""
    used = changes.pop("used", {})
    values = {"claims": {}, "live": {}, "uses": lambda device: used.get(device.address, []), "never": NEVER, **changes}
    return Candidates(machine.look(), **values)


def ask(*words: str, entries: tuple[Device, ...] = (), hints: tuple[str, ...] = ()) -> Request:
    """Return a request."""
    selectors = tuple(parse_selector(word, "annotation") for word in words)
    return Request("annotation" if words else "linux.devices", selectors, entries, hints)


def entry(name: str = "12", major: int = 244, minor: int = 99) -> Device:
    """Return one entry of linux.devices, with the host's numbers."""
    return Device(f"/dev/vfio/{name}", "c", major, minor, -1, -1, -1)


def names(choices: tuple[ChosenGroup, ...]) -> list[str]:
    """Return the names of the groups."""
    return [chosen.group.name for chosen in choices]


def refuse(request: Request, candidates: Candidates, code: str, *words: str, waits: bool = False) -> None:
    """Check that a request is refused in these words, for good or until something arrives."""
    with pytest.raises(Refusal) as caught:
        choose_groups(request, candidates)
    (finding,) = caught.value.findings
    assert finding.code == code, finding
    assert isinstance(caught.value, NotAvailableYet) == waits
    assert finding.hint
    for word in words:
        assert word in finding.as_line()


# By the annotation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        ([NIC], ["4"]),
        (["01:00.0"], ["4"]),
        (["02:00.0", "01:00.0"], ["4", "10"]),
        (["id:8086:10d3"], ["4", "10"]),
        (["class:02"], ["4", "10"]),
        (["class:0200"], ["4", "10"]),
        (["class:010802"], ["2"]),
        (["class:01"], ["2"]),
        (["path:02/00"], ["4"]),
        (["path:05"], ["2"]),
        (["path:0000:02/00"], ["4"]),
        (["path:0000:00:03/00"], ["10"]),
        (["auto"], ["2", "4", "10"]),
        (["auto", NIC], ["2", "4", "10"]),
        # Named outright, what auto leaves out may be taken.
        ([VIRTIO], ["1"]),
        (["id:1af4:1041"], ["1"]),
    ],
    ids=repr,
)
def test_choose_named_by_selector(machine: Machine, words: list[str], groups: list[str]) -> None:
    assert names(choose_groups(ask(*words), make_pool(machine))) == groups


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("0000:0a:00.0", "no-such-device", "0000:0a:00.0 matches no PCI device in this guest"),
        ("0001:01:00.0", "no-such-device", "group 4: 0000:01:00.0 (8086:10d3, e1000e)"),
        ("id:10de:1eb8", "no-such-device", "id:10de:1eb8"),
        ("class:03", "no-such-device", "class:03"),
        ("path:02", "bridge", PORT),
        ("path:02/01", "no-such-device", "path:02.0/01.0"),
        ("path:0001:02/00", "no-such-device", "path:0001:02.0/00.0"),
        ("path:0000:80:02/00", "no-such-device", "path:0000:80:02.0/00.0"),
        (PORT, "bridge", "is a bridge"),
        ("id:1b36:000c", "never-taken", PORT),
        ("class:0604", "never-taken", PORT),
        ("class:0106", "never-taken", "0000:00:1f.2"),
    ],
)
def test_choose_named_refused(machine: Machine, word: str, code: str, said: str) -> None:
    refuse(ask(word), make_pool(machine), code, said, waits=code == "no-such-device")


@pytest.mark.parametrize(
    ("root", "word"),
    [
        ("/sys/devices/pci0000:00", "path:02/03/04/05"),
        ("/sys/devices/pci0000:00", "path:0000:00:02/03/04/05"),
        ("/sys/devices/pci0001:80", "path:0001:02/03/04/05"),
        ("/sys/devices/pci0001:80", "path:0001:80:02/03/04/05"),
        ("/sys/devices/pci0001:80", "path:02/03/04/05"),
        ("/sys/devices/platform/4010000000.pcie/pci0002:00", "path:0002:00:02/03/04/05"),
        ("/sys/devices/platform/pcie/pci0002:00", "path:02/03/04/05"),
        ("/sys/devices/pci0000:00/0000:00:0e.0/pci10000:e0", "path:02/03/04/05"),
    ],
)
def test_matches_path_through_bridges(tmp_path: Path, root: str, word: str) -> None:
    machine = Machine(tmp_path)
    domain = root.rpartition("/pci")[2].partition(":")[0]
    above = root
    for bus, slot in (("00", "02"), ("01", "03"), ("02", "04")):
        bridge = machine.add(f"{domain}:{bus}:{slot}.0", "1b36:0001", "060400", "", "1", above=above)
        above += f"/{bridge}"
    device = machine.add(f"{domain}:03:05.0", group="1", above=above)
    (chosen,) = choose_groups(ask(word), make_pool(machine))
    assert [member.address for member in chosen.group.endpoints] == [device]
    refuse(ask("path:03/04/05"), make_pool(machine), "no-such-device", waits=True)


def test_matches_path_ambiguous_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    for domain, group in (("0000", "1"), ("0001", "2")):
        machine.add(f"{domain}:00:02.0", group=group)
    refuse(ask("path:02"), make_pool(machine), "ambiguous", "0000:00:02.0", "0001:00:02.0", "path:0000:00:02.0")
    assert names(choose_groups(ask("path:0001:02"), make_pool(machine))) == ["2"]


def test_choose_named_same_group_once(machine: Machine) -> None:
    machine.add("0000:01:00.1", "8086:10d3", "020000", "e1000e", "4", above=f"{BUS}/{PORT}")
    entries = (entry("12"), entry("13"))
    (chosen,) = choose_groups(ask(NIC, "0000:01:00.1", entries=entries), make_pool(machine))
    assert (chosen.group.name, chosen.entry) == ("4", entries[0])


def test_choose_groups_sorted_numerically(machine: Machine) -> None:
    entries = (entry("12"), entry("13"))
    first, second = choose_groups(ask(NIC2, NIC, entries=entries), make_pool(machine))
    assert (first.group.name, first.entry, second.group.name, second.entry) == ("4", entries[1], "10", entries[0])


def test_choose_named_without_group_viommu_off(machine: Machine) -> None:
    device = machine.add("0000:00:09.0")
    refuse(ask(device), make_pool(machine), "viommu-off", device, "enable_iommu = true")


# Claims, guards ------------------------------------------------------------------------------------------------------


def test_choose_groups_claimed_refused(machine: Machine) -> None:
    candidates = make_pool(machine, claims={"4": "other"})
    refuse(ask(NIC), candidates, "claimed", "group 4", "container other")
    refuse(ask("path:02/00"), candidates, "claimed", "container other")
    assert names(choose_groups(ask("id:8086:10d3"), candidates)) == ["10"]
    assert names(choose_groups(ask("auto"), candidates)) == ["2", "10"]
    everything = make_pool(machine, claims={"4": "other", "10": "third"})
    refuse(ask("class:02"), everything, "claimed", "container other")


def test_choose_groups_claimed_in_pod_names_annotation(machine: Machine) -> None:
    """What a container without devices reports where the pod's annotation was meant for another one."""
    claims = {"2": "web", "4": "web", "10": "web"}
    for word, code in ((NIC, "claimed"), ("class:02", "claimed"), ("auto", "nothing-to-take")):
        with pytest.raises((Refusal, NotAvailableYet)) as alone:
            choose_groups(ask(word), make_pool(machine, claims=claims))
        with pytest.raises((Refusal, NotAvailableYet)) as in_pod:
            choose_groups(ask(word), make_pool(machine, claims=claims, is_pods=True))
        hints = [caught.value.findings[0].hint for caught in (alone, in_pod)]
        assert ["io.katacontainers.x.vfio.devices.NAME" in hint for hint in hints] == [False, True]
        assert in_pod.value.findings[0].code == code


def test_choose_groups_in_use_refused(machine: Machine) -> None:
    candidates = make_pool(machine, used={NIC: ["is network interface eth0, up with address 10.0.0.1"]})
    refuse(ask(NIC), candidates, "in-use", NIC, "eth0, up with address 10.0.0.1")
    assert names(choose_groups(ask("auto"), candidates)) == ["2", "10"]
    busy = make_pool(machine, used={NIC: ["a"], NIC2: ["b"], DISK: ["mounted on /"]})
    refuse(ask("auto"), busy, "nothing-to-take", "mounted on /", waits=True)


def test_choose_groups_whole_group_only(machine: Machine) -> None:
    other = machine.add("0000:01:00.1", "8086:10d3", "020000", "e1000e", "4", above=f"{BUS}/{PORT}")
    candidates = make_pool(machine, used={other: ["is busy"]})
    refuse(ask(NIC), candidates, "in-use", other, "group 4 can only be bound as a whole")
    assert names(choose_groups(ask("auto"), candidates)) == ["2", "10"]


def test_choose_groups_force_by_settings(machine: Machine) -> None:
    used = {NIC: ["is busy"], NIC2: ["is busy"]}
    candidates = make_pool(machine, used=used, forced=(NIC,))
    assert names(choose_groups(ask(NIC), candidates)) == ["4"]
    refuse(ask(NIC2), candidates, "in-use")
    # What is forced is still not taken without being named.
    assert names(choose_groups(ask("auto"), candidates)) == ["2"]


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"auto_ids": ("8086:5845",)}, ["2"]),
        ({"auto_ids": ("8086",)}, ["2", "4", "10"]),
        ({"auto_classes": ("0200",)}, ["4", "10"]),
        ({"auto_classes": ("0108",), "auto_ids": ("8086:10d3",)}, ["2", "4", "10"]),
        ({"never": ()}, ["0", "1", "2", "4", "8", "10"]),
        ({"never": ("id:8086",)}, ["1"]),
        ({"never": ("class:02", "class:06")}, ["2", "8"]),
        ({"never": (*NEVER, "root:0108")}, ["4", "10"]),
        # Off the root bus, `root:` has no effect.
        ({"never": (*NEVER, "root:02")}, ["2", "4", "10"]),
    ],
    ids=repr,
)
def test_choose_auto_limited_by_settings(machine: Machine, changes: dict[str, Any], groups: list[str]) -> None:
    assert names(choose_groups(ask("auto"), make_pool(machine, **changes))) == groups


# By linux.devices ----------------------------------------------------------------------------------------------------


def test_choose_listed_by_live_numbers(machine: Machine) -> None:
    candidates = make_pool(machine, live={(244, 0): "4"})
    (chosen,) = choose_groups(ask(entries=(entry("12", 244, 0),)), candidates)
    assert (chosen.group.name, chosen.entry) == ("4", entry("12", 244, 0))


def test_choose_listed_by_live_cdev_numbers(machine: Machine) -> None:
    """A device's own node with this guest's numbers is that device, however many others are free."""
    candidates = make_pool(machine, live={(244, 0): "10"}, cdevs={(243, 1): NIC})
    node = entry("devices/vfio1", 243, 1)
    (chosen,) = choose_groups(ask(entries=(node,)), candidates)
    assert (chosen.group.name, chosen.cdev_entries) == ("4", {NIC: node})
    # A group's path with the numbers of a device's node, or the other way round, is the host's.
    refuse(ask(entries=(entry("12", 243, 1),)), candidates, "ambiguous")
    taken = make_pool(machine, cdevs={(243, 1): NIC}, claims={"4": "other"}, used={DISK: ["busy"]})
    assert names(choose_groups(ask(entries=(node,)), taken)) == ["10"]


def test_choose_listed_host_group_name_ignored(machine: Machine) -> None:
    # /dev/vfio/4 with the host's numbers, while guest group 4 is another device: only one candidate is left to mean.
    candidates = make_pool(machine, live={(244, 0): "4"}, used={DISK: ["busy"], NIC: ["busy"]})
    assert names(choose_groups(ask(entries=(entry("4", 244, 7),)), candidates)) == ["10"]


def test_choose_listed_ignores_claimed_numbers(machine: Machine) -> None:
    candidates = make_pool(machine, live={(244, 0): "4"}, claims={"4": "other"}, used={DISK: ["busy"]})
    assert names(choose_groups(ask(entries=(entry("12", 244, 0),)), candidates)) == ["10"]
    # With the path of that group too, it is meant, and refused.
    refuse(ask(entries=(entry("4", 244, 0),)), candidates, "claimed", "container other")


def test_choose_listed_assigns_when_counts_match(machine: Machine) -> None:
    entries = (entry("20"), entry("21"), entry("22"))
    assert names(choose_groups(ask(entries=entries), make_pool(machine))) == ["2", "4", "10"]
    live = make_pool(machine, live={(244, 0): "4"}, used={DISK: ["busy"]})
    assert names(choose_groups(ask(entries=(entry("4", 244, 0), entry("21"))), live)) == ["4", "10"]


def test_choose_listed_ambiguous_lists_candidates(machine: Machine) -> None:
    refuse(
        ask(entries=(entry("20"), entry("21"))),
        make_pool(machine),
        "ambiguous",
        "/dev/vfio/20, /dev/vfio/21 could be any of group 2",
        "group 4: 0000:01:00.0",
        f'"io.katacontainers.x.vfio.devices": "{DISK},{NIC}"',
    )


def test_choose_listed_too_few_not_yet(machine: Machine) -> None:
    candidates = make_pool(machine, used={DISK: ["is mounted"]}, claims={"10": "other"})
    refuse(
        ask(entries=(entry("20"), entry("21"))),
        candidates,
        "no-candidate",
        "2 groups requested, free in this guest: group 4",
        "is mounted",
        "container other",
        waits=True,
    )


def test_choose_listed_by_hints(machine: Machine) -> None:
    assert names(choose_groups(ask(entries=(entry(),), hints=(NIC2,)), make_pool(machine))) == ["10"]


@pytest.mark.parametrize("hints", [(NIC, NIC2), (NIC, "0000:3b:00.0"), ("0000:3b:00.0",), (VIRTIO,)], ids=repr)
def test_choose_listed_unfit_hints_ignored(machine: Machine, hints: tuple[str, ...]) -> None:
    refuse(ask(entries=(entry(),), hints=hints), make_pool(machine), "ambiguous")


def test_choose_groups_without_iommu_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.add(VIRTIO, "1af4:1041", "020000", "virtio-pci")
    # A device may still arrive, but nothing could be done with it.
    for request, code in ((ask(entries=(entry(),)), "no-candidate"), (ask("auto"), "nothing-to-take")):
        refuse(request, make_pool(machine), code, "this guest has no IOMMU groups", "enable_iommu = true", waits=True)
    machine.add(NIC)
    refuse(ask(entries=(entry(),)), make_pool(machine), "viommu-off", NIC, "enable_iommu = true")
    refuse(ask("auto"), make_pool(machine), "viommu-off", NIC, "enable_iommu = true")


def test_not_yet_after_names_seconds() -> None:
    refusal = NotAvailableYet("no-such-device", "annotation", "x matches nothing", "look").after(7.04)
    assert not isinstance(refusal, NotAvailableYet)
    assert refusal.findings[0].problem == "x matches nothing; waited 7.0 s for it"
    assert refusal.findings[0].hint == "look"


def test_choose_groups_asks_uses_of_endpoints_only(machine: Machine) -> None:
    asked: list[PciDevice] = []

    def uses(device: PciDevice) -> list[str]:
        asked.append(device)
        return []

    choose_groups(ask("auto"), make_pool(machine, uses=uses))
    assert asked
    assert not any(device.is_bridge for device in asked)
