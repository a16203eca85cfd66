# SPDX-License-Identifier: Apache-2.0
"""`vfio-guest-bind --all` on made guests: the table, the JSON, and that it answers as a run would decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oci_hooks import oci, program
from oci_hooks.findings import Refusal
from oci_hooks.guest import hook as guest_hook
from oci_hooks.guest.claims import ClaimDirectory
from oci_hooks.guest.dry_run import print_plan
from oci_hooks.guest.request import read_request
from oci_hooks.guest.settings import GUEST_SETTINGS, GuestSettings
from oci_hooks.guest.survey_picture import look_around
from oci_hooks.program import Arguments, Run
from oci_hooks.system import Deadline
from tests.support.fake_guest import NIC, Machine
from tests.support.fake_survey import BUS, CONFIG, RELEASE, Bench, list_codes, list_states
from tests.unit.guest.test_claims import STAT, make_claim

pytestmark = pytest.mark.unit


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, monkeypatch, capfd)


# What it shows -------------------------------------------------------------------------------------------------------


def test_survey_table(bench: Bench) -> None:
    machine = bench.machine
    machine.add("0000:00:05.0", "1af4:1005", "00ff00", "virtio-pci", "5")
    machine.add("0000:00:06.0", "8086:10c9", "020000", "vfio-pci", "6")
    machine.add("0000:00:07.0", "8086:10c9", "020000", "igb", "7")
    machine.write(f"{BUS}/0000:00:07.0/sriov_numvfs", "2\n")
    machine.add("0000:00:08.0", "8086:1572", "020000")
    machine.place("/sys/kernel/iommu_groups/9/devices").mkdir(parents=True)
    bench.hold("web", "6")
    code, out, err = bench.run()
    groups, claims, guest = out.split("\n\n")
    assert groups.splitlines() == [
        "GROUP  STATE          DEVICE        ID         CLASS    DRIVER      NOT TAKEN BY AUTO BECAUSE",
        "0      in use         0000:00:00.0  8086:29c0  bridge   -           is never taken by auto (class:06 in "
        "auto.never of guest.toml); is a chipset function (class 0600)",
        "3      bridges only   0000:00:02.0  1b36:000c  bridge   pcieport    contains only bridges",
        "4      free           0000:01:00.0  8086:10d3  network  e1000e      -",
        "5      by name only   0000:00:05.0  1af4:1005  00ff00   virtio-pci  is never taken by auto (id:1af4 in "
        "auto.never of guest.toml)",
        "6      claimed        0000:00:06.0  8086:10c9  network  vfio-pci    belongs to container web",
        "7      in use         0000:00:07.0  8086:10c9  network  igb         has 2 SR-IOV virtual functions",
        "9      no PCI device  -             -          -        -           contains no PCI device",
        "-      no IOMMU       0000:00:08.0  8086:1572  network  -           has no IOMMU group: no virtual IOMMU "
        "covers it",
    ]
    assert claims.splitlines() == ["CLAIM OF  STATE  GROUPS  INIT", "web       held   6       7"]
    assert guest.splitlines() == [
        "GUEST                    STATE",
        "auto takes               group 4",
        "IOMMU groups             7",
        "vfio-pci                 loaded",
        "vfio_iommu_type1         loaded",
        "/dev/vfio/N              made by this kernel",
        "/dev/vfio/devices/vfioN  made by this kernel",
        f"kernel                   {RELEASE}",
        "kernel options           complete (/proc/config.gz)",
        "settings                 none: defaults",
    ]
    assert err.count("\n") == 1
    assert "warning: [viommu-off] 0000:00:08.0: has no IOMMU group" in err
    assert code == 0


def test_survey_json_matches_schema(bench: Bench) -> None:
    bench.machine.add("0000:00:06.0", "8086:10c9", "020000", "vfio-pci", "6")
    bench.machine.add_group_node("6", "511:3")
    bench.hold("web", "6")
    answer = bench.ask()
    assert (answer["exit"], answer["findings"]) == (0, [])
    group = next(group for group in answer["groups"] if group["group"] == "6")
    assert (group["number"], group["container"]) == ("511:3", "web")
    assert group["reasons"] == [{"member": None, "reason": "belongs to container web"}]
    (member,) = group["members"]
    assert (member["name"], member["driver"], member["standing"]) == ("0000:00:06.0", "vfio-pci", "vfio")
    assert answer["claims"] == [{"container": "web", "state": "held", "groups": ["6"], "pid": 7}]
    assert answer["guest"] == {
        "auto": ["4"],
        "iommu_groups": 4,
        "drivers": {"vfio-pci": "loaded", "vfio_iommu_type1": "loaded"},
        "group_nodes": True,
        "device_nodes": True,
        "kernel": RELEASE,
        "kernel_config": "/proc/config.gz",
        "missing_options": [],
        "settings": None,
    }


@pytest.mark.parametrize("claims", [False, True])
def test_survey_without_iommu_names_fix(bench: Bench, claims: bool) -> None:
    """An error also where a claim is left of a guest that had an IOMMU."""
    machine = bench.machine
    if claims:
        bench.hold("web", "4")
    for address in (NIC, "0000:00:00.0", "0000:00:02.0"):
        machine.place(f"/sys/bus/pci/devices/{address}/iommu_group").unlink()
    for group in ("0", "3", "4"):
        machine.place(f"/sys/kernel/iommu_groups/{group}/devices").rmdir()
        machine.place(f"/sys/kernel/iommu_groups/{group}").rmdir()
    code, out, err = bench.run()
    assert code == 1
    assert (
        "error: [viommu-off] 0000:01:00.0 (8086:10d3, e1000e): this guest has no IOMMU groups; set enable_iommu" in err
    )
    assert err.count("\n") == 1
    assert [line.split()[:4] for line in out.splitlines() if NIC in line] == [["-", "no", "IOMMU", NIC]]


def test_survey_all_claimed_no_error(bench: Bench) -> None:
    """A guest whose devices are where they belong has no problem."""
    bench.hold("web", "4")
    answer = bench.ask()
    assert (answer["exit"], list_codes(answer, "info"), list_codes(answer, "error")) == (0, ["nothing-to-take"], [])
    assert list_states(answer)["4"] == "claimed"


def test_survey_ended_container_taken_over(bench: Bench) -> None:
    """As a run does it: the claim of a container that has ended keeps nobody from its group."""
    bench.hold("web", "4")
    bench.machine.write("/proc/7/stat", STAT.format(pid=7, state="S", start=71))
    answer = bench.ask()
    assert answer["guest"]["auto"] == ["4"]
    assert [claim["state"] for claim in answer["claims"]] == ["ended"]
    assert list_codes(answer) == ["claim-stale"]
    assert answer["exit"] == 0


@pytest.mark.parametrize(
    ("text", "state", "reason"),
    [
        ('[auto]\nids = ["8086:1572"]\n', "by name only", "is not in auto.ids or auto.classes of guest.toml"),
        (
            '[auto]\nnever = ["id:8086"]\n',
            "by name only",
            "is never taken by auto (id:8086 in auto.never of guest.toml)",
        ),
        ('[auto]\nclasses = ["02"]\n', "free", ""),
    ],
)
def test_survey_by_settings(bench: Bench, text: str, state: str, reason: str) -> None:
    bench.machine.write(GUEST_SETTINGS, text)
    answer = bench.ask()
    group = next(group for group in answer["groups"] if group["group"] == "4")
    assert group["state"] == state
    assert [entry["reason"] for entry in group["reasons"]] == [reason] * bool(reason)
    assert answer["guest"]["settings"] == GUEST_SETTINGS


def test_survey_forced_device_by_name_only(bench: Bench) -> None:
    """What guest.toml forces is still nothing that auto takes; the use is printed."""
    bench.machine.write(f"{BUS}/0000:00:02.0/{NIC}/sriov_numvfs", "1\n")
    bench.machine.write(GUEST_SETTINGS, f'force = ["{NIC}"]\n')
    answer = bench.ask()
    assert list_states(answer)["4"] == "by name only"
    assert answer["guest"]["auto"] == []


def test_survey_noiommu_mode(bench: Bench) -> None:
    bench.machine.place(f"/sys/bus/pci/devices/{NIC}/iommu_group").unlink()
    bench.machine.write("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")
    bench.machine.write(GUEST_SETTINGS, "allow_noiommu = true\n")
    answer = bench.ask()
    assert answer["guest"]["auto"] == [f"noiommu:{NIC}"]
    assert list_states(answer)[f"noiommu:{NIC}"] == "free"


# The kernel ----------------------------------------------------------------------------------------------------------


def remove_drivers(bench: Bench) -> None:
    """Have neither of the two modules loaded, nor vfio."""
    bench.machine.place("/sys/bus/pci/drivers/vfio-pci/bind").unlink()
    bench.machine.place("/sys/bus/pci/drivers/vfio-pci").rmdir()
    bench.machine.place("/sys/module/vfio_iommu_type1/parameters/x").unlink()
    bench.machine.place("/sys/module/vfio_iommu_type1/parameters").rmdir()
    bench.machine.place("/sys/module/vfio_iommu_type1").rmdir()
    bench.machine.place("/sys/class/vfio").rmdir()


def test_survey_loadable_modules_not_loaded(bench: Bench) -> None:
    """That they can be loaded is enough; modprobe is not run."""
    remove_drivers(bench)
    ran = bench.machine.place("/ran")
    bench.machine.write("/sbin/modprobe", f"#!/bin/sh\ntouch {ran}\n")
    bench.machine.place("/sbin/modprobe").chmod(0o755)
    bench.machine.write(
        f"/lib/modules/{RELEASE}/modules.dep",
        "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\nkernel/vfio_iommu_type1.ko:\n",
    )
    answer = bench.ask()
    assert answer["guest"]["drivers"] == {"vfio-pci": "loadable", "vfio_iommu_type1": "loadable"}
    assert (answer["exit"], answer["findings"]) == (0, [])
    assert not ran.exists()


@pytest.mark.parametrize("modprobe", [True, False])
def test_survey_without_driver(bench: Bench, modprobe: bool) -> None:
    remove_drivers(bench)
    if modprobe:
        bench.machine.write("/sbin/modprobe")
    bench.configure("CONFIG_VFIO=m\n# CONFIG_VFIO_PCI is not set\nCONFIG_VIRTIO_IOMMU=y\nCONFIG_VFIO_IOMMU_TYPE1=m\n")
    answer = bench.ask()
    (error,) = (finding for finding in answer["findings"] if finding["level"] == "error")
    assert (error["code"], error["subject"]) == ("no-vfio-driver", "vfio-pci")
    reason = f"modprobe finds no such module for {RELEASE}" if modprobe else "modprobe is not installed"
    assert error["problem"].endswith(reason)
    assert error["hint"] == "build the kernel with CONFIG_VFIO_PCI"
    assert answer["guest"]["missing_options"] == ["CONFIG_VFIO_PCI"]
    assert answer["exit"] == 1


@pytest.mark.parametrize(
    ("text", "loaded", "groups", "nodes", "found"),
    [
        ("# CONFIG_VFIO_GROUP is not set\nCONFIG_VFIO_DEVICE_CDEV=y\n", True, False, True, ["no-group-node"]),
        ("# CONFIG_VFIO_GROUP is not set\nCONFIG_VFIO_IOMMU_TYPE1=y\n", True, False, False, ["no-group-node"]),
        ("CONFIG_VFIO_IOMMU_TYPE1=y\n", False, True, False, []),
        ("# CONFIG_VFIO_GROUP is not set\nCONFIG_VFIO_DEVICE_CDEV=y\n", False, False, True, ["no-group-node"]),
    ],
)
def test_survey_nodes_of_the_kernel(
    bench: Bench, text: str, loaded: bool, groups: bool, nodes: bool, found: list[str]
) -> None:
    """Without groups, with devices' own nodes only; before Linux 6.6 there was no option."""
    if loaded:
        bench.machine.place("/sys/class/vfio").rmdir()
    else:
        remove_drivers(bench)
        bench.machine.write("/sbin/modprobe")
        bench.machine.write(f"/lib/modules/{RELEASE}/modules.dep", "a/vfio_pci.ko:\na/vfio_iommu_type1.ko:\n")
    bench.configure(f"CONFIG_VFIO=y\nCONFIG_VFIO_PCI=y\nCONFIG_INTEL_IOMMU=y\n{text}")
    answer = bench.ask()
    assert (answer["guest"]["group_nodes"], answer["guest"]["device_nodes"]) == (groups, nodes)
    assert list_codes(answer) == found
    assert answer["exit"] == 0
    hints = [finding["hint"] for finding in answer["findings"]]
    assert all(("cdev" in hint) == nodes for hint in hints)


def test_survey_kernel_without_iommu_driver(bench: Bench) -> None:
    bench.configure(CONFIG.replace("CONFIG_INTEL_IOMMU=y", "# CONFIG_INTEL_IOMMU is not set"))
    answer = bench.ask()
    assert answer["guest"]["missing_options"] == ["CONFIG_INTEL_IOMMU or CONFIG_VIRTIO_IOMMU"]
    assert (list_codes(answer), answer["exit"]) == (["kernel-options"], 0)


# What it is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ("poststop",),
        ("--bundle", "/b"),
        ("--dry-run",),
        ("--pid", "7"),
        ("prestart", "--dry-run", "--bundle", "/b"),
        ("--format", "nfd"),
        ("12",),
    ],
    ids=" ".join,
)
def test_survey_refuses_arguments_of_a_container(bench: Bench, more: tuple[str, ...]) -> None:
    code, out, err = bench.run(*more)
    assert (code, out) == (2, "")
    assert "error: [bad-arguments]" in err
    assert err.count("\n") == 1


def test_survey_reads_no_state_and_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(program, "read_input", fail)
    monkeypatch.setattr(program, "record_run", fail)
    bench.hold("web", "4")
    before = list_tree(bench.machine.top)
    bench.ask()
    assert list_tree(bench.machine.top) == before


def list_tree(top: Path) -> dict[str, object]:
    """Return all that is below a directory, with content and time."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
        for path in top.rglob("*")
    }


def test_survey_is_not_in_the_kernel_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a run for a container is."""
    asked = []

    def note(hook: program.Hook, _argv: list[str], _begun: bytes) -> int:
        asked.append(hook.kmsg)
        return 0

    monkeypatch.setattr(guest_hook, "run_hook", note)
    guest_hook.main(["--all"])
    guest_hook.main(["prestart"])
    assert asked == [False, True]


# As a run decides ----------------------------------------------------------------------------------------------------

DEVICES = st.lists(
    st.tuples(
        st.sampled_from(["8086:10d3", "1af4:1041", "1b36:000c", "10de:2236"]),
        st.sampled_from(["020000", "010802", "060400", "030000", "088000"]),
        st.sampled_from(["", "e1000e", "vfio-pci"]),
        st.sampled_from(["", "1", "2", "3", "4"]),
        st.booleans(),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    devices=DEVICES,
    claimed=st.sets(st.sampled_from(["1", "2", "3"])),
    never=st.sampled_from([(), ("id:10de",), ("class:02", "root:01")]),
    only=st.sampled_from([(), ("8086",)]),
)
def test_survey_auto_is_what_a_run_takes(
    tmp_path_factory: pytest.TempPathFactory,
    devices: list[tuple[str, str, str, str, bool]],
    claimed: set[str],
    never: tuple[str, ...],
    only: tuple[str, ...],
) -> None:
    """The dry run of a container with the annotation `auto` plans exactly the groups that are called free."""
    machine = Machine(tmp_path_factory.mktemp("guest"))
    machine.write("/proc/self/mountinfo", "22 1 0:21 / / rw - 9p root rw\n")
    machine.write("/proc/7/stat", STAT.format(pid=7, state="S", start=70))
    for number, (ids, class_code, driver, group, busy) in enumerate(devices):
        address = machine.add(f"0000:00:{number:02x}.0", ids, class_code, driver, group)
        if busy:
            machine.write(f"{BUS}/{address}/sriov_numvfs", "1\n")
    machine.place("/run").mkdir()
    directory = ClaimDirectory(root=machine.root)
    directory.prepare()
    if claimed:
        make_claim(directory, "other", groups=tuple(claimed))
    chosen = GuestSettings(never=never, auto_ids=only)
    picture = look_around(make_run(machine, all=True), chosen)
    assert list(picture.auto) == plan_auto(machine, chosen)
    assert [line.group.name for line in picture.lines if line.state == "free"] == list(picture.auto)
    assert all((line.state == "free") == (not line.reasons) for line in picture.lines)
    assert {device for line in picture.lines for device in (member.name for member in line.group.members)} == {
        f"0000:00:{number:02x}.0" for number in range(len(devices))
    }


def make_run(machine: Machine, **arguments: Any) -> Run:
    """Return a run of the hook."""
    return Run("vfio-guest-bind", Arguments(**arguments), Deadline(5), machine.root)


def plan_auto(machine: Machine, chosen: GuestSettings) -> list[str]:
    """Return the groups that a container with the annotation `auto` gets by a dry run, [] where it is refused."""
    run = make_run(machine, dry_run=True, json=True)
    state = oci.State("c1", "/nowhere", 7, "created", {oci.DEVICES_ANNOTATION: "auto"})
    spec = oci.make_spec({}, "config.json")
    request = read_request(state, spec)
    assert request is not None
    try:
        print_plan(run, state, spec, request, chosen)
    except Refusal:
        return []
    nodes = [step["subject"].rpartition("/")[2] for step in run.plan if step["action"] == "create"]
    return [name for name in nodes if name != "vfio"]
