# SPDX-License-Identifier: Apache-2.0
"""The host hook on a real host: its sysfs, its groups, processes that hold them, and real QEMUs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.linux.holders import is_unused
from oci_hooks.system import Root
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers, Done
from tests.vm.hypervisors import VIOMMU, run_qemu

MACHINE = "standard"
KATA = Path("/etc/kata-containers/configuration.toml")
CONFIGURATION = """\
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
machine_type = "q35"
# enable_iommu = true
enable_iommu = {0}
hot_plug_vfio = "root-port"
cold_plug_vfio = "no-port"
enable_annotations = ["enable_iommu"]

[runtime]
vfio_mode = "vfio"
"""


@pytest.fixture
def settings() -> None:
    """Give the hook more time than an emulated machine needs."""
    bundles.write_settings()


@pytest.fixture
def kata() -> Iterator[None]:
    """Have Kata configured without a virtual IOMMU."""
    KATA.parent.mkdir(parents=True, exist_ok=True)
    KATA.write_text(CONFIGURATION.format("false"))
    yield
    KATA.unlink()


@pytest.fixture
def nic(native_drivers: None, settings: None) -> str:
    """Return a NIC on vfio-pci, alone in its group."""
    address = guest.find_device(devices.NIC_E1000E)
    guest.bind(address, "vfio-pci")
    return address


def list_devices(*addresses: str) -> list[dict[str, Any]]:
    """Return linux.devices with the control node and the groups of these devices, with this host's numbers."""
    entries = [bundles.vfio_devices()[0]]
    for address in addresses:
        group = guest.group_of(address)
        major, minor = guest.numbers_of_group(group) if group in guest.live_groups() else (511, 7)
        entries.append(bundles.vfio_device(group, major, minor))
    return entries


def write_bundle(directory: Path, *addresses: str, **more: Any) -> Path:
    """Write a config.json that requests the groups of these devices, and allows them."""
    options = bundles.Options(devices=list_devices(*addresses), device_rules=[{"allow": True, "access": "rwm"}], **more)
    (directory / "config.json").write_text(json.dumps(bundles.make_config(["/bin/true"], "rootfs", options, "/x")))
    return directory


def check(directory: Path, *argv: str, **state: Any) -> Done:
    """Run the hook with a state as Kata's Go runtime writes it, changed by `state`."""
    document = {"ociVersion": "", "id": "c1", "status": "", "pid": 0, "bundle": str(directory), **state}
    if not document["status"]:
        document.setdefault("annotations", {"io.katacontainers.pkg.oci.bundle_path": str(directory)})
    command = [bundles.find_hook(bundles.HOST_HOOK), *argv]
    done = subprocess.run(
        command, input=json.dumps(document), capture_output=True, text=True, env={}, check=False, timeout=180
    )
    assert "Traceback" not in done.stderr
    assert "[internal]" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def plain(directory: Path, pid: int = 1) -> Done:
    """Run the hook as runc would."""
    return check(directory, status="creating", pid=pid)


# Results --------------------------------------------------------------------------------------------------------------


def test_host_check_good_group(nic: str, tmp_path: Path) -> None:
    done = plain(write_bundle(tmp_path, nic))
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


def test_host_check_closes_group(nic: str, tmp_path: Path) -> None:
    """It has opened the group for the kernel's word, and closed it again."""
    assert plain(write_bundle(tmp_path, nic)).code == 0
    fd = os.open(f"/dev/vfio/{guest.group_of(nic)}", os.O_RDWR)
    os.close(fd)


def test_host_check_half_bound_group(nic: str, tmp_path: Path) -> None:
    first, second = guest.find_devices(devices.NIC_E1000)
    guest.bind(first, "vfio-pci")
    done = plain(write_bundle(tmp_path, first))
    assert done.code == 1
    group = guest.group_of(first)
    assert f"error: [group-not-viable] group {group}: {second} is bound to e1000 (other members: " in done.stderr
    assert done.stderr.endswith(f"bind it with: driverctl set-override {second} vfio-pci\n")


def test_host_check_bind_hint_works(nic: str, tmp_path: Path) -> None:
    """The command in the hint is run, and then the check reports nothing."""
    first, second = guest.find_devices(devices.NIC_E1000)
    guest.bind(first, "vfio-pci")
    bundle = write_bundle(tmp_path, first)
    hint = plain(bundle).stderr.rpartition("bind it with: ")[2].strip()
    subprocess.run(hint.replace("driverctl ", "driverctl --nosave "), shell=True, check=True)  # noqa: S602
    assert guest.driver_of(second) == "vfio-pci"
    done = plain(bundle)
    assert (done.code, done.stderr) == (0, "")


def test_host_check_unbound_group(native_drivers: None, settings: None, tmp_path: Path) -> None:
    address = guest.find_device(devices.NIC_E1000E, 1)
    done = plain(write_bundle(tmp_path, address))
    assert done.code == 1
    assert f"[group-not-viable] group {guest.group_of(address)}: {address} is bound to e1000e" in done.stderr


def test_host_check_member_without_driver_fine(nic: str, tmp_path: Path) -> None:
    first, second = guest.find_devices(devices.NIC_E1000)
    guest.bind(first, "vfio-pci")
    (guest.PCI / second / "driver/unbind").write_text(second)
    done = plain(write_bundle(tmp_path, first))
    assert (done.code, done.stderr) == (0, "")


def test_host_check_missing_group(nic: str, tmp_path: Path) -> None:
    write_bundle(tmp_path, nic)
    config = json.loads((tmp_path / "config.json").read_text())
    config["linux"]["devices"].append(bundles.vfio_device("4999"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = plain(tmp_path)
    assert done.code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("vfio-host-check: error: [group-missing] group 4999: ")


def test_host_check_wrong_numbers(nic: str, tmp_path: Path) -> None:
    write_bundle(tmp_path, nic)
    config = json.loads((tmp_path / "config.json").read_text())
    config["linux"]["devices"][1].update(major=1, minor=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = plain(tmp_path)
    assert done.code == 1
    assert "error: [node-mismatch]" in done.stderr
    assert "which is null" in done.stderr


# Who holds it --------------------------------------------------------------------------------------------------------


def test_host_check_group_held(nic: str, tmp_path: Path) -> None:
    node = f"/dev/vfio/{guest.group_of(nic)}"
    with subprocess.Popen(["/bin/sh", "-c", f"exec 9<>{node}; echo; exec sleep 600"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        try:
            done = plain(write_bundle(tmp_path, nic))
        finally:
            holder.kill()
    assert done.code == 1
    assert f"error: [group-busy] group {guest.group_of(nic)}: is in use by sleep (pid {holder.pid}); " in done.stderr


def test_host_check_own_qemu_with_iommu(nic: str, kata: None, tmp_path: Path) -> None:
    """Cold plug. What runs is right; the file, which has no virtual IOMMU, was not in force, and refuses nothing."""
    bundle = write_bundle(tmp_path, nic)
    with run_qemu("c1", *VIOMMU, address=nic) as pid:
        done = check(bundle, pid=pid)
        assert done.code == 0
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            f"vfio-host-check: warning: [kata-config-other] {KATA}: qemu-system-x86_64 (pid {pid}) has"
        )
        # Kata 1.x: the state has a thread of the shim; QEMU is known by the sandbox's name.
        done = check(bundle, pid=0, annotations={"io.katacontainers.x.vfio.devices": "auto"})
    assert "group-busy" not in done.stderr


def test_host_check_own_qemu_without_iommu(nic: str, kata: None, tmp_path: Path) -> None:
    KATA.write_text(CONFIGURATION.format("true"))
    with run_qemu("c1", address=nic) as pid:
        done = check(write_bundle(tmp_path, nic), pid=pid)
    assert done.code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"vfio-host-check: error: [viommu-off] virtual IOMMU: qemu-system-x86_64 (pid {pid}) runs without a virtual "
        f"IOMMU (no -device intel-iommu or virtio-iommu), although enable_iommu = true in {KATA} line 5"
    )
    assert "another configuration was in force when it started: the runtime's option ConfigPath" in line


def test_host_check_other_qemu_holds_group(nic: str, kata: None, tmp_path: Path) -> None:
    KATA.write_text(CONFIGURATION.format("true"))
    with run_qemu("other", address=nic) as other, run_qemu("c1", *VIOMMU) as own:
        done = check(write_bundle(tmp_path, nic), pid=own)
    assert done.code == 1
    (line,) = done.stderr.splitlines()
    assert f"error: [group-busy] group {guest.group_of(nic)}: is in use by qemu-system-x86_64 (pid {other})" in line


# Kata's configuration ------------------------------------------------------------------------------------------------


def test_host_check_configuration_before_vm(nic: str, kata: None, tmp_path: Path) -> None:
    done = check(write_bundle(tmp_path, nic))
    assert done.code == 1
    output = f"enable_iommu = false in {KATA} line 5, not overridden by config.d/ or annotations; "
    assert f"error: [viommu-off] virtual IOMMU: {output}" in done.stderr


def test_host_check_viommu_hint_works(nic: str, kata: None, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, nic)
    command = check(bundle).stderr.rpartition("true there, or: ")[2].partition("; then start")[0]
    subprocess.run(command, shell=True, check=True)  # noqa: S602
    drop_in = KATA.parent / "config.d/90-viommu.toml"
    try:
        assert drop_in.read_text() == "[hypervisor.qemu]\nenable_iommu = true\n"
        done = check(bundle)
        assert (done.code, done.stderr) == (0, "")
    finally:
        drop_in.unlink()
        drop_in.parent.rmdir()


def test_host_check_warn_mode(nic: str, kata: None, tmp_path: Path) -> None:
    bundles.write_settings(host='mode = "warn"\n')
    done = check(write_bundle(tmp_path, nic))
    assert done.code == 0
    assert "warning: [viommu-off]" in done.stderr


# By hand -------------------------------------------------------------------------------------------------------------


def test_host_check_survey_matches_sysfs(nic: str) -> None:
    """Every group and every member, with the driver that sysfs shows."""
    done = subprocess.run(
        [bundles.find_hook(bundles.HOST_HOOK), "--all", "--json"], capture_output=True, text=True, check=False, env={}
    )
    groups = {group["group"]: group for group in json.loads(done.stdout)["groups"]}
    assert sorted(groups) == sorted(path.name for path in guest.GROUPS.iterdir())
    for name, group in groups.items():
        found = {member["name"]: member["driver"] or "" for member in group["members"]}
        assert found == {address: guest.driver_of(address) for address in guest.members_of(name)}
    assert groups[guest.group_of(nic)]["state"] == "ready"
    assert done.returncode == 0


def test_host_check_survey_names_holder(nic: str) -> None:
    with run_qemu("c1", address=nic) as pid:
        done = subprocess.run(
            [bundles.find_hook(bundles.HOST_HOOK), "--all"], capture_output=True, text=True, check=False, env={}
        )
    (line,) = [line for line in done.stdout.splitlines() if nic in line]
    assert line.split()[1:3] == ["in", "use"]
    assert line.endswith(f"qemu-system-x86_64 (pid {pid})")


def test_host_check_survey_knows_unused_vfio(nic: str) -> None:
    """The kernel counts the users of its module: only with one are processes searched."""
    is_module = Path("/sys/module/vfio/refcnt").exists()
    assert is_unused(Root()) == is_module
    for node in (f"/dev/vfio/{guest.group_of(nic)}", "/dev/vfio/vfio"):
        fd = os.open(node, os.O_RDWR)
        try:
            assert not is_unused(Root())
        finally:
            os.close(fd)
        assert is_unused(Root()) == is_module


# Under the runtimes --------------------------------------------------------------------------------------------------


def host_hooks() -> dict[str, list[dict[str, Any]]]:
    """Return `hooks` with the host hook."""
    return {"createRuntime": [bundles.make_hook(bundles.find_hook(bundles.HOST_HOOK))]}


def test_host_check_good_container_starts(containers: Containers, nic: str) -> None:
    rules = [{"allow": True, "type": "c", "access": "rwm"}]
    done = containers.probe(devices=list_devices(nic), device_rules=rules, hooks=host_hooks())
    assert done.code == 0, done.stderr
    assert "vfio-host-check" not in done.stderr
    (group,) = done.read_json()["groups"]
    assert group["viable"]


def test_host_check_bad_container_not_started(containers: Containers, nic: str) -> None:
    first = guest.find_device(devices.NIC_E1000)
    guest.bind(first, "vfio-pci")
    done = containers.run("/bin/echo", "started", devices=list_devices(first), hooks=host_hooks())
    assert done.code != 0
    assert "started" not in done.stdout
    assert "[group-not-viable]" in done.stderr


def test_host_check_without_vfio_starts(containers: Containers, kata: None) -> None:
    KATA.write_text("no toml")
    done = containers.run("/bin/echo", "started", hooks=host_hooks())
    assert (done.code, done.stdout, done.stderr) == (0, "started\n", "")
