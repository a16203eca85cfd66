# SPDX-License-Identifier: Apache-2.0
"""The checks of the host and of the groups that a container asks for: good, bad and borderline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.findings import Finding
from oci_hooks.host import checks, container_checks
from oci_hooks.host.hypervisor import Hypervisor, may_use_vfio
from oci_hooks.host.runtime import Runtime
from oci_hooks.host.targets import Target, find_targets
from oci_hooks.linux.holders import HolderFinder
from oci_hooks.linux.processes import Process
from oci_hooks.linux.vfio import list_cdevs
from oci_hooks.oci import Spec
from oci_hooks.system import Deadline
from tests.support.fake_host import HostTree, codes, make_spec, make_state

pytestmark = pytest.mark.unit

NIC = "0000:03:00.0"
NIC2 = "0000:03:00.1"
UUID = "6f7a0b1e-4a5b-4c6d-8e7f-0123456789ab"


def ask(kind: str = "plain", **changes: Any) -> Runtime:
    """Return somebody who asks."""
    runtime: Runtime = Runtime(kind, None, None, "c1", "", False, False).replace(**changes)
    return runtime


def find(tree: HostTree, *entries: tuple[str, int, int]) -> tuple[Target, ...]:
    """Return what entries mean on this host."""
    return find_targets(tree.root, make_spec(*entries).vfio_devices)


def check_all(
    tree: HostTree, target: Target, runtime: Runtime | None = None, pid: int = 0, seconds: float = 5.0
) -> list[Finding]:
    """Return the findings of all checks of one target."""
    from oci_hooks.host.suite import check_host, check_target

    who = runtime or ask()
    finder = HolderFinder(tree.root, Deadline(seconds), may_use_vfio)
    return check_host(tree.root, (target,)) + check_target(tree.root, target, who, make_state(pid), finder)


@pytest.fixture
def tree(tmp_path: Path) -> HostTree:
    """A host with a NIC on vfio-pci, alone in group 12."""
    made = HostTree(tmp_path)
    made.pci(NIC, "vfio-pci", "12")
    made.vfio("12", 0)
    return made


# Which group an entry means ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "kind", "expected"),
    [
        (("/dev/vfio/12", 237, 0), "plain", []),
        (("/dev/vfio/12", 237, 0), "kata-go", []),
        # Renamed in the container: the numbers decide, and a name that is no number promises nothing.
        (("/dev/vfio/nic", 237, 0), "kata-go", []),
        (("/dev/vfio/13", 237, 0), "kata-go", ["warning node-mismatch"]),
        # Directly on the host the program finds its device's group by name, and that node is another one's.
        (("/dev/vfio/13", 237, 0), "plain", ["error node-mismatch"]),
        # Numbers of nothing: Go goes by the path, runtime-rs and runc can't.
        (("/dev/vfio/12", 240, 9), "kata-go", ["warning node-mismatch"]),
        (("/dev/vfio/12", 240, 9), "kata-1", ["warning node-mismatch"]),
        (("/dev/vfio/12", 240, 9), "kata-rs", ["error node-mismatch"]),
        (("/dev/vfio/12", 240, 9), "plain", ["error node-mismatch"]),
        # Numbers of something else.
        (("/dev/vfio/12", 1, 3), "kata-go", ["error node-mismatch"]),
        (("/dev/vfio/12", 1, 3), "plain", ["error node-mismatch"]),
        (("/dev/vfio/77", 240, 9), "plain", ["error group-missing"]),
        (("/dev/vfio/77", 1, 3), "kata-go", ["error group-missing"]),
        (("/dev/vfio/nic", 240, 9), "kata-go", ["error group-missing"]),
    ],
)
def test_find_targets_by_device_numbers(
    tree: HostTree, entry: tuple[str, int, int], kind: str, expected: list[str]
) -> None:
    tree.link("/sys/dev/char/1:3", "/sys/devices/virtual/mem/null")
    (target,) = find(tree, entry)
    assert codes(check_all(tree, target, ask(kind))) == expected


def test_node_mismatch_names_both_groups(tree: HostTree) -> None:
    tree.link("/sys/dev/char/1:3", "/sys/devices/virtual/mem/null")
    (target,) = find(tree, ("/dev/vfio/12", 1, 3))
    (finding,) = check_all(tree, target)
    assert finding.subject == "/dev/vfio/12"
    assert (
        finding.problem
        == "config.json lists it with device number 1:3, which is null; on this host its number is 237:0"
    )


def test_node_mismatch_swapped_numbers(tree: HostTree) -> None:
    tree.pci("0000:04:00.0", "vfio-pci", "13")
    tree.vfio("13", 1)
    first, second = find(tree, ("/dev/vfio/12", 237, 1), ("/dev/vfio/13", 237, 0))
    assert first.group and first.group.name == "13"
    assert second.group and second.group.name == "12"
    assert codes(check_all(tree, first)) == ["error node-mismatch"]


# Viability -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "class_code", "expected"),
    [
        ("vfio-pci", "020000", []),
        ("", "020000", []),
        ("pci-stub", "020000", []),
        ("pcieport", "060400", []),
        ("", "060400", []),
        ("shpchp", "060400", []),
        ("", "060000", []),
        ("skx_uncore", "060000", ["error group-not-viable"]),
        ("ixgbe", "020000", ["error group-not-viable"]),
        ("nvme", "010802", ["error group-not-viable"]),
        ("uio_pci_generic", "020000", ["error group-not-viable"]),
    ],
)
def test_viability_second_member_unbound(tree: HostTree, driver: str, class_code: str, expected: list[str]) -> None:
    tree.pci(NIC2, driver, "12", class_code)
    (target,) = find(tree, ("/dev/vfio/12", 237, 0))
    assert codes(check_all(tree, target)) == expected


def test_viability_names_every_member_with_driver(tree: HostTree) -> None:
    tree.pci(NIC2, "ixgbe", "12")
    tree.pci("0000:03:00.2", "e1000e", "12")
    tree.pci("0000:02:00.0", "pcieport", "12", "060400")
    (finding,) = check_all(tree, find(tree, ("/dev/vfio/12", 237, 0))[0])
    assert finding.as_line() == (
        "error: [group-not-viable] group 12: 0000:03:00.1 is bound to ixgbe, 0000:03:00.2 is bound to e1000e "
        "(other members: 0000:02:00.0 pcieport, 0000:03:00.0 vfio-pci); bind them with: "
        "driverctl set-override 0000:03:00.1 vfio-pci && driverctl set-override 0000:03:00.2 vfio-pci"
    )


def test_viability_variant_driver_by_vfio_dev(tree: HostTree) -> None:
    tree.pci(NIC2, "nvgrace-gpu-vfio-pci", "12", vfio_dev="vfio1")
    assert check_all(tree, find(tree, ("/dev/vfio/12", 237, 0))[0]) == []


def test_viability_variant_driver_by_module(tree: HostTree) -> None:
    tree.pci(NIC2, "mlx5-vfio-pci", "12")
    tree.link("/sys/bus/pci/drivers/mlx5-vfio-pci/module", "/sys/module/mlx5_vfio_pci")
    (target,) = find(tree, ("/dev/vfio/12", 237, 0))
    assert codes(check_all(tree, target)) == ["error group-not-viable"]
    tree.write("/sys/module/vfio_pci_core/holders/mlx5_vfio_pci/refcnt")
    (target,) = find(tree, ("/dev/vfio/12", 237, 0))
    assert check_all(tree, target) == []


@pytest.mark.parametrize(
    ("driver", "hint"),
    [
        ("", "bind it with: driverctl set-override 0000:05:00.0 vfio-pci"),
        ("ixgbe", "bind it with: driverctl set-override 0000:05:00.0 vfio-pci"),
        ("pci-stub", "load the driver: modprobe vfio-pci"),
    ],
)
def test_group_not_bound_reported(tree: HostTree, driver: str, hint: str) -> None:
    """Before anything is bound there is no node, and the numbers in config.json do not matter."""
    tree.pci("0000:05:00.0", driver, "15")
    (finding,) = check_all(tree, find(tree, ("/dev/vfio/15", 240, 9))[0])
    assert finding.code == "group-not-viable"
    assert finding.hint == hint


def test_group_of_bridges_is_empty(tree: HostTree) -> None:
    tree.pci("0000:00:01.0", "pcieport", "1", "060400")
    tree.pci("0000:00:00.0", "", "1", "060000")
    (finding,) = check_all(tree, find(tree, ("/dev/vfio/1", 240, 9))[0])
    assert (finding.level, finding.code) == ("error", "group-empty")
    assert "0000:00:01.0 pcieport" in finding.problem


# Other kinds of groups -----------------------------------------------------------------------------------------------


def test_mediated_device_named(tree: HostTree) -> None:
    tree.mdev(UUID, "20", driver="vfio_mdev")
    tree.vfio("20", 4)
    (target,) = find(tree, ("/dev/vfio/20", 237, 4))
    (finding,) = check_all(tree, target)
    assert (finding.level, finding.code) == ("info", "mediated-device")
    assert UUID in finding.problem


@pytest.mark.parametrize(("parent", "bus"), [("/sys/devices/vfio_ap/matrix", "ap"), ("/sys/devices/css0/0.0.1", "ccw")])
def test_s390x_group_not_checked(tree: HostTree, parent: str, bus: str) -> None:
    tree.mdev(UUID, "20", parent, "vfio_x")
    tree.vfio("20", 4)
    (target,) = find(tree, ("/dev/vfio/20", 237, 4))
    assert target.group and target.group.is_channel
    assert target.group.buses == {bus}
    assert check_all(tree, target) == []


@pytest.mark.parametrize(("kind", "level"), [("kata-go", "error"), ("plain", "warning")])
def test_noiommu_group_reported(tmp_path: Path, kind: str, level: str) -> None:
    tree = HostTree(tmp_path)
    tree.pci(NIC, "vfio-pci", "0")
    tree.write("/sys/kernel/iommu_groups/0/name", "vfio-noiommu\n")
    tree.vfio("noiommu-0", 0)
    (target,) = find(tree, ("/dev/vfio/noiommu-0", 237, 0))
    assert codes(check_all(tree, target, ask(kind))) == [f"{level} noiommu-group"]


def test_cdev_group_is_checked(tree: HostTree) -> None:
    tree.pci("0000:06:00.0", "vfio-pci", "16", vfio_dev="vfio3")
    tree.write("/dev/iommu")
    (target,) = find(tree, ("/dev/vfio/devices/vfio3", 511, 3))
    assert target.cdev == "vfio3"
    assert check_all(tree, target) == []
    tree.pci("0000:06:00.1", "ixgbe", "16")
    (target,) = find(tree, ("/dev/vfio/devices/vfio3", 511, 3))
    assert codes(check_all(tree, target)) == ["error group-not-viable"]


def test_cdev_without_iommufd_reported(tree: HostTree) -> None:
    tree.pci("0000:06:00.0", "vfio-pci", "16", vfio_dev="vfio3")
    (target,) = find(tree, ("/dev/vfio/devices/vfio3", 511, 3))
    (finding,) = check_all(tree, target)
    assert (finding.code, finding.subject) == ("control-node-missing", "/dev/iommu")


def test_cdev_missing_reported(tree: HostTree) -> None:
    (target,) = find(tree, ("/dev/vfio/devices/vfio9", 511, 9))
    tree.write("/dev/iommu")
    assert codes(check_all(tree, target)) == ["error group-missing"]


@pytest.mark.parametrize("numbers", ["", ":", "x:y", "511:", "511:3:4"])
def test_cdev_with_wrong_numbers_ignored(tree: HostTree, numbers: str) -> None:
    tree.write("/sys/class/vfio-dev/vfio3/dev", numbers)
    assert list_cdevs(tree.root) == {}


# The host ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({}, "enable the IOMMU in the firmware setup and on the kernel's command line"),
        ({"/sys/firmware/acpi/tables/DMAR": ""}, "boot with intel_iommu=on"),
        ({"/sys/firmware/acpi/tables/IVRS": ""}, "(IVRS): boot a kernel built with CONFIG_AMD_IOMMU"),
        ({"/sys/firmware/acpi/tables/IORT": ""}, "give it a virtual IOMMU"),
        ({"/sys/firmware/acpi/tables/FACP": ""}, "enable VT-d"),
        ({"/sys/firmware/acpi/tables/DMAR": "", "/proc/cmdline": "ro intel_iommu=off"}, "remove intel_iommu=off"),
        ({"/sys/firmware/acpi/tables/DMAR": "", "/proc/cmdline": "intel_iommu=on"}, "built with CONFIG_INTEL_IOMMU"),
    ],
)
def test_iommu_off_reported(tmp_path: Path, files: dict[str, str], hint: str) -> None:
    tree = HostTree(tmp_path)
    tree.pci(NIC, "ixgbe")
    for path, content in files.items():
        tree.write(path, content)
    (target,) = find(tree, ("/dev/vfio/12", 240, 9))
    (finding,) = check_all(tree, target)
    assert (finding.level, finding.code) == ("error", "iommu-off")
    assert hint in finding.hint


def test_control_node_missing_on_host(tree: HostTree) -> None:
    (tree.top / "sys/class/misc/vfio/dev").unlink()
    (tree.top / "sys/class/misc/vfio").rmdir()
    (target,) = find(tree, ("/dev/vfio/12", 237, 0))
    assert codes(check_all(tree, target)) == ["error control-node-missing"]
    tree.write("/dev/vfio/vfio")
    assert check_all(tree, target) == []


# The kernel's word ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kind", "expected"),
    [
        ("viable", "plain", []),
        ("unknown", "plain", []),
        ("not-viable", "plain", ["error group-not-viable"]),
        ("denied", "kata-go", ["warning group-denied"]),
        ("busy", "plain", ["error group-busy"]),
    ],
)
def test_group_status_findings(
    tree: HostTree, monkeypatch: pytest.MonkeyPatch, word: str, kind: str, expected: list[str]
) -> None:
    monkeypatch.setattr(checks, "read_group_status", lambda _root, _node: word)
    (target,) = find(tree, ("/dev/vfio/12", 237, 0))
    assert codes(check_all(tree, target, ask(kind))) == expected


def test_group_status_not_opened_when_not_viable(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "read_group_status", lambda _root, _node: pytest.fail("opened"))
    tree.pci(NIC2, "ixgbe", "12")
    (target,) = find(tree, ("/dev/vfio/12", 237, 0))
    assert codes(check_all(tree, target)) == ["error group-not-viable"]


@pytest.mark.parametrize(("kind", "level"), [("kata-go", "error"), ("plain", "warning")])
def test_group_status_without_node(tree: HostTree, kind: str, level: str) -> None:
    (tree.top / "dev/vfio/12").unlink()
    (target,) = find(tree, ("/dev/vfio/12", 237, 0))
    (finding,) = check_all(tree, target, ask(kind))
    assert (finding.level, finding.code) == (level, "group-missing")
    assert finding.hint == "create the node: mknod -m 0600 /dev/vfio/12 c 237 0"


def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every group busy."""
    monkeypatch.setattr(checks, "read_group_status", lambda _root, _node: "busy")


def test_group_busy_names_holder(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    busy(monkeypatch)
    tree.process(50, "/usr/bin/dpdk-testpmd", opened=("/dev/null", "/dev/vfio/12"))
    tree.process(51, "/usr/bin/other", opened=("/dev/vfio/120", "/dev/vfio/vfio"))
    (finding,) = check_all(tree, find(tree, ("/dev/vfio/12", 237, 0))[0])
    assert finding.as_line() == (
        "error: [group-busy] group 12: is in use by dpdk-testpmd (pid 50); "
        "stop the process (kill 50), or use another group"
    )


def test_group_busy_by_member_cdev(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    busy(monkeypatch)
    tree.pci("0000:06:00.0", "vfio-pci", "16", vfio_dev="vfio3")
    tree.vfio("16", 6)
    tree.process(50, "/usr/bin/qemu-system-x86_64", opened=("/dev/vfio/devices/vfio3",))
    (finding,) = check_all(tree, find(tree, ("/dev/vfio/16", 237, 6))[0])
    assert "qemu-system-x86_64 (pid 50)" in finding.problem


@pytest.mark.parametrize(
    ("holder", "shim", "pid", "expected"),
    [
        # The state's process, one of its threads, its child.
        ({"pid": 50, "parent": 1}, 0, 50, []),
        ({"pid": 50, "parent": 1}, 0, 55, []),
        ({"pid": 51, "parent": 50}, 0, 50, []),
        # Kata 1.x: the state has a thread of the shim, and QEMU is the shim's child or named after the sandbox.
        ({"pid": 51, "parent": 40}, 40, 41, []),
        ({"pid": 51, "parent": 1, "name": "sandbox-pod7,debug-threads=on"}, 40, 41, []),
        ({"pid": 51, "parent": 1, "name": "sandbox-c1"}, 0, 0, []),
        # Somebody else's.
        ({"pid": 51, "parent": 1, "name": "sandbox-c12"}, 0, 0, ["error group-busy"]),
        ({"pid": 51, "parent": 1, "name": "sandbox-pod8"}, 40, 41, ["error group-busy"]),
        ({"pid": 51, "parent": 1}, 0, 50, ["error group-busy"]),
    ],
)
def test_group_busy_own_sandbox_allowed(
    tree: HostTree,
    monkeypatch: pytest.MonkeyPatch,
    holder: dict[str, Any],
    shim: int,
    pid: int,
    expected: list[str],
) -> None:
    busy(monkeypatch)
    tree.process(40, "/usr/bin/containerd-shim-kata-v2", "-id", "pod7")
    tree.thread(41, 40)
    if holder["pid"] != 50:
        tree.process(50, "/usr/bin/qemu-system-x86_64")
    tree.thread(55, 50)
    tree.process(
        holder["pid"],
        "/usr/bin/qemu-system-x86_64",
        "-name",
        holder.get("name", "x"),
        parent=holder["parent"],
        opened=("/dev/vfio/12",),
    )
    runtime = ask("kata-1", shim=Process(shim, "s", ()) if shim else None, sandbox="pod7")
    (target,) = find(tree, ("/dev/vfio/12", 237, 0))
    assert codes(check_all(tree, target, runtime, pid)) == expected


@pytest.mark.parametrize(
    ("pid", "shim", "parent", "told"),
    [
        # The state's process itself, its child, the shim's child.
        (51, 0, 1, False),
        (50, 0, 50, False),
        (0, 50, 50, False),
        (50, 0, 1, True),
    ],
)
def test_group_busy_own_hypervisor_searched_first(
    tree: HostTree, monkeypatch: pytest.MonkeyPatch, pid: int, shim: int, parent: int, told: bool
) -> None:
    """Without time to examine all processes. An incomplete search is reported as that."""
    busy(monkeypatch)
    for number in range(20, 30):
        tree.process(number, "/usr/bin/other")
    tree.process(50, "/usr/bin/other")
    tree.process(51, "/usr/bin/qemu-system-x86_64", parent=parent, opened=("/dev/vfio/12",))
    runtime = ask("kata-go", shim=Process(shim, "s", ()) if shim else None)
    findings = check_all(tree, find(tree, ("/dev/vfio/12", 237, 0))[0], runtime, pid, seconds=0.4)
    assert [finding.as_line() for finding in findings] == (
        [
            "error: [group-busy] group 12: is in use; the search for the process stopped after 1 of 12 processes; list"
            " its users as root on the host: fuser -v /dev/vfio/12; to search longer, raise deadline in host.toml"
        ]
        if told
        else []
    )


def test_group_busy_invisible_holder(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process was looked at: it is in another pid namespace, or the hook may not look into it."""
    busy(monkeypatch)
    tree.process(50, "/usr/bin/other")
    (finding,) = check_all(tree, find(tree, ("/dev/vfio/12", 237, 0))[0])
    assert finding.problem == "is in use by a process that is not visible to the hook (another PID namespace?)"


def test_group_busy_holder_gone(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    words = iter(["busy", "viable"])
    monkeypatch.setattr(checks, "read_group_status", lambda _root, _node: next(words))
    assert check_all(tree, find(tree, ("/dev/vfio/12", 237, 0))[0]) == []


def test_is_attached_by_open_group(tree: HostTree) -> None:
    tree.process(50, "/usr/bin/qemu-system-x86_64", opened=("/dev/vfio/12",))
    (target,) = find(tree, ("/dev/vfio/12", 237, 0))
    vmm = Hypervisor(Process(50, "qemu-system-x86_64", ()), "qemu", "off", "")
    finder = HolderFinder(tree.root, Deadline(5), may_use_vfio)
    assert checks.is_attached(tree.root, target, ask("kata-go", hypervisor=vmm), finder)
    assert not checks.is_attached(tree.root, target, ask("kata-go"), finder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a device that can be opened")
def test_group_status_other_node_ignored() -> None:
    from oci_hooks.linux.processes import read_group_status
    from oci_hooks.system import Root

    assert read_group_status(Root(), "/dev/null") == "unknown"
    assert read_group_status(Root(), "/dev/vfio/no-such-group") == "missing"


# Permission in the container ------------------------------------------------------------------------------------------

CONTROL = ("/dev/vfio/vfio", 10, 196)
GROUP = ("/dev/vfio/12", 237, 0)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (make_spec(GROUP), ["warning control-node-missing"]),
        (make_spec(GROUP, CONTROL), []),
        (make_spec(GROUP, mounts=[{"destination": "/dev", "type": "bind", "source": "/dev"}]), []),
        (make_spec(GROUP, mounts=[{"destination": "/dev/vfio", "options": ["rbind", "rw"]}]), []),
        (make_spec(GROUP, mounts=[{"destination": "/dev", "type": "tmpfs"}]), ["warning control-node-missing"]),
        (make_spec(GROUP, mounts=[{"destination": "/dev/vf", "type": "bind"}]), ["warning control-node-missing"]),
        (make_spec(GROUP, mounts=[7, {"destination": 3}]), ["warning control-node-missing"]),
    ],
)
def test_control_node_missing_in_container(tree: HostTree, spec: Spec, expected: list[str]) -> None:
    assert codes(container_checks.check_control_node(spec, find(tree, GROUP))) == expected


def test_control_node_not_needed_for_cdev(tree: HostTree) -> None:
    tree.pci("0000:06:00.0", "vfio-pci", "16", vfio_dev="vfio3")
    targets = find(tree, ("/dev/vfio/devices/vfio3", 511, 3))
    assert container_checks.check_control_node(make_spec(GROUP), targets) == ()


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        (None, False),
        ([], False),
        ([{"allow": True, "access": "rwm"}], True),
        ([{"allow": False, "access": "rwm"}], False),
        ([{"allow": False}, {"allow": True, "type": "c", "major": 237, "minor": 0, "access": "rw"}], True),
        ([{"allow": False}, {"allow": True, "type": "c", "major": 237, "minor": 0, "access": "r"}], False),
        ([{"allow": True, "type": "c", "major": 237, "access": "rwm"}], True),
        ([{"allow": True, "type": "c", "major": 237, "minor": -1}], True),
        ([{"allow": True, "type": "b", "major": 237, "minor": 0}], False),
        ([{"allow": True}, {"allow": False, "type": "c", "major": 237, "minor": 0, "access": "w"}], False),
        ([{"allow": True, "type": "c", "major": 237, "minor": 1}], False),
        ("rubbish", False),
    ],
)
def test_check_device_rules(tree: HostTree, rules: object, allowed: bool) -> None:
    spec = make_spec(GROUP, linux={"resources": {"devices": rules}})
    expected = [] if allowed else ["warning group-denied"]
    assert codes(container_checks.check_device_rules(spec, find(tree, GROUP))) == expected


LOCK = {"capabilities": {"effective": ["CAP_IPC_LOCK"]}}
MAPPED = [{"containerID": 0, "hostID": 1000, "size": 65536}]


@pytest.mark.parametrize(
    ("process", "linux", "inherited", "kind", "expected"),
    [
        (LOCK, {}, "65536", "plain", []),
        ({}, {}, "65536", "plain", ["warning memlock"]),
        ({}, {}, "unlimited", "plain", []),
        ({}, {}, "8388608", "plain", ["warning memlock"]),
        ({}, {}, "67108864", "plain", []),
        ({"rlimits": [{"type": "RLIMIT_MEMLOCK", "soft": 1 << 40, "hard": 1 << 40}]}, {}, "65536", "plain", []),
        ({"rlimits": [{"type": "RLIMIT_MEMLOCK", "soft": 1 << 20}]}, {}, "unlimited", "plain", ["warning memlock"]),
        ({"rlimits": [{"type": "RLIMIT_MEMLOCK", "soft": 1 << 20}]}, {}, "unlimited", "kata-go", ["warning memlock"]),
        ({"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1}]}, {}, "unlimited", "plain", []),
        # Inside the guest the agent's limit is inherited, which can't be seen.
        ({}, {}, "65536", "kata-go", []),
        # The kernel wants the capability in the initial user namespace.
        (LOCK, {"namespaces": [{"type": "user"}], "uidMappings": MAPPED}, "65536", "plain", ["warning memlock"]),
        (LOCK, {"namespaces": [{"type": "mount"}]}, "65536", "plain", []),
    ],
)
def test_check_memlock(
    tree: HostTree, process: dict[str, Any], linux: dict[str, Any], inherited: str, kind: str, expected: list[str]
) -> None:
    tree.write("/proc/self/limits", f"Limit  Soft Limit  Hard Limit  Units\nMax locked memory  {inherited}  x  bytes\n")
    spec = make_spec(GROUP, process=process, linux=linux)
    assert codes(container_checks.check_memlock(tree.root, spec, ask(kind))) == expected


# Modes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "level", "expected"),
    [
        ({}, "error", "error"),
        ({"mode": "enforce"}, "warning", "warning"),
        ({"mode": "warn"}, "error", "warning"),
        ({"mode": "warn"}, "info", "info"),
        ({"checks": (("x", "warn"),)}, "error", "warning"),
        ({"checks": (("x", "enforce"),)}, "warning", "error"),
        ({"checks": (("x", "enforce"),)}, "info", "info"),
        ({"checks": (("x", "ignore"),)}, "error", ""),
        ({"mode": "warn", "checks": (("x", "enforce"),)}, "error", "error"),
        ({"checks": (("y", "ignore"),)}, "error", "error"),
    ],
)
def test_override_level_modes(settings: dict[str, Any], level: str, expected: str) -> None:
    from oci_hooks.findings import EXIT_DONE, EXIT_REFUSED
    from oci_hooks.host.settings import HostSettings
    from oci_hooks.host.suite import apply_overrides, choose_exit_code

    reported = apply_overrides([Finding(level, "x", "s", "p")], HostSettings(**settings))
    assert [finding.level for finding in reported] == ([expected] if expected else [])
    assert choose_exit_code(reported) == (EXIT_REFUSED if expected == "error" else EXIT_DONE)


def test_apply_overrides_sorts_and_deduplicates() -> None:
    from oci_hooks.host.settings import HostSettings
    from oci_hooks.host.suite import apply_overrides

    findings = [Finding("info", "a", "", ""), Finding("error", "b", "", ""), Finding("error", "b", "", "")]
    assert [finding.code for finding in apply_overrides(findings, HostSettings())] == ["b", "a"]


def test_run_check_os_error_is_warning() -> None:
    from oci_hooks.host.suite import run_check

    def check_it() -> tuple[Finding, ...]:
        raise PermissionError(13, "Permission denied", "/sys/x")

    (finding,) = run_check("group viability", check_it)
    assert (finding.level, finding.code, finding.subject) == ("warning", "check-failed", "group viability")
    assert "/sys/x: Permission denied" in finding.problem
