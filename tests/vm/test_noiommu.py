# SPDX-License-Identifier: Apache-2.0
"""Devices without an IOMMU: opted in for, named to the program, opened by who may, refused in words to who may not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.credentials import read_credentials
from oci_hooks.oci import make_spec
from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers, Done

MACHINE = "no-iommu"
KERNELS = ("full",)
SWITCH = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
TAINTED = Path("/proc/sys/kernel/tainted")
# Documentation/admin-guide/tainted-kernels.rst: bit 6, TAINT_USER.
TAINT_USER = 1 << 6
RAW = "CAP_SYS_RAWIO"
HOOKS = bundles.guest_hooks("createRuntime", "poststop")
ROOTS = ("bounding", "effective", "permitted")
ALL = (*ROOTS, "inheritable", "ambient")
# include/uapi/linux/capability.h
NUMBERS = {"CAP_DAC_OVERRIDE": 1, RAW: 17, "CAP_SYS_ADMIN": 21}


@pytest.fixture(name="nic")
def switch_on(native_drivers: None) -> Iterator[str]:
    """Return the address of a NIC; kernel and guest.toml allow it to be used without an IOMMU."""
    SWITCH.write_text("Y")
    with guest_calls.settings("deadline = 60", "allow_noiommu = true"):
        yield guest.find_device(devices.NIC_E1000E)
    SWITCH.write_text("N")


def give(*sets: str, sealed: bool = True) -> dict[str, Any]:
    """Return what config.json has to have for CAP_SYS_RAWIO in these sets, beside what any container has."""
    kept = {name: [*bundles.CAPABILITIES, RAW] if name in sets else list(bundles.CAPABILITIES) for name in ROOTS}
    more = {name: [RAW] for name in sets if name not in ROOTS}
    return {"process": {"capabilities": {**kept, **more}, "noNewPrivileges": sealed}}


def read_probe(done: Done) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what devices.json names of the only device, and what the probe could do with it."""
    assert done.code == 0, done.stderr
    *listed, report = done.stdout.strip().splitlines()
    (named,) = json.loads("\n".join(listed))["devices"]
    (group,) = json.loads(report)["groups"]
    return named, group


SHOW = ("/bin/sh", "-c", "/bin/cat /dev/vfio/devices.json; exec " + " ".join(bundles.PROBE))


@pytest.mark.parametrize(("user", "sets"), [(0, ROOTS), (1000, ALL)])
def test_noiommu_device_used(containers: Containers, nic: str, user: int, sets: tuple[str, ...]) -> None:
    """The program finds its node by devices.json, and reads the device through it."""
    done = containers.run(*SHOW, annotations=ask(nic), hooks=HOOKS, user=user, edit=give(*sets))
    named, group = read_probe(done)
    assert named["address"] == nic
    assert named["node"] == f"/dev/vfio/{named['group']}" == f"/dev/vfio/{group['group']}"
    assert named["group"].startswith("noiommu-")
    assert named["device_node"] == ""
    assert group["devices"] == [{"address": nic, "get_device": "ok", "read_id": "ok", "id": devices.NIC_E1000E}]
    assert int(TAINTED.read_text()) & TAINT_USER
    assert f"warning: [noiommu-group] {nic}: is used without an IOMMU" in guest.read_kernel_log()
    assert guest.driver_of(nic) == "e1000e"
    assert guest_calls.list_claims() == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "root": ({}, "user 0 of the container does not have"),
    "user": ({"user": 1000, "edit": give(*ROOTS)}, "user 1000 of the container does not have"),
    "user-namespace": ({"user_namespace": 100000, "edit": give(*ALL)}, "no process in a user namespace has"),
    "cdev": ({"edit": give(*ROOTS)}, "has no device node of iommufd, because it has no IOMMU"),
}


@one_runtime
@pytest.mark.parametrize("case", REFUSED)
def test_noiommu_refused_before_binding(containers: Containers, nic: str, case: str) -> None:
    """A container whose program the kernel would answer EPERM is not started; the device was not touched."""
    options, words = REFUSED[case]
    before = len(guest.read_kernel_log().split("vfio-noiommu"))
    done = containers.probe(annotations=ask(f"{nic},cdev" if case == "cdev" else nic), hooks=HOOKS, **options)
    assert done.code != 0
    assert ("[no-cdev]" if case == "cdev" else "[capability-missing]") in done.stderr
    assert words in done.stderr
    assert len(guest.read_kernel_log().split("vfio-noiommu")) == before
    assert guest.driver_of(nic) == "e1000e"


@one_runtime
@pytest.mark.parametrize(("user", "sets"), [(0, ()), (1000, ROOTS)])
def test_noiommu_kernel_refuses_what_the_hook_refuses(
    containers: Containers, nic: str, user: int, sets: tuple[str, ...]
) -> None:
    """The words are true: without the check the container starts, and its program gets EPERM."""
    guest.bind(nic, "vfio-pci")
    (node,) = (name for name in guest.live_groups() if name.startswith("noiommu-"))
    major, minor = guest.numbers_of_group(node)
    listed = {"path": f"/dev/vfio/{node}", "type": "c", "major": major, "minor": minor, "uid": user, "gid": user}
    allowed = [{"allow": True, "type": "c", "major": major, "minor": minor, "access": "rw"}]
    for each, answer in ((sets, "EPERM"), (ALL, "ok")):
        done = containers.probe(devices=[listed], device_rules=allowed, hooks={}, user=user, edit=give(*each))
        (group,) = done.read_json()["groups"]
        assert group["open"] == answer


CREDENTIALS: dict[str, tuple[int, dict[str, Any] | None, bool]] = {
    "root": (0, {"bounding": [RAW], "effective": []}, False),
    "root sealed": (0, {"bounding": [RAW], "permitted": [], "effective": []}, True),
    "root permitted": (0, {"bounding": [RAW], "permitted": [RAW], "effective": []}, True),
    "root without": (0, None, False),
    "user": (1000, {"bounding": [RAW], "effective": [RAW], "permitted": [RAW]}, False),
    "user ambient": (1000, {name: [RAW] for name in ALL}, True),
    "user inheritable": (1000, {name: [RAW] for name in ALL if name != "ambient"}, False),
}


@pytest.mark.parametrize("case", CREDENTIALS)
def test_credentials_as_kernel_computes_them(containers: Containers, case: str) -> None:
    """Of what the hook decides about stands in /proc/self/status of the program itself."""
    user, sets, sealed = CREDENTIALS[case]
    container = containers.make("/bin/cat", "/proc/self/status", hooks={}, user=user)
    container.config["process"].update({"capabilities": sets, "noNewPrivileges": sealed})
    if sets is None:
        del container.config["process"]["capabilities"]
    container.write_config(container.config, {})
    done = container.run()
    assert done.code == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    found = read_credentials(make_spec(container.config, "config.json"))
    assert found is not None
    assert effective == sum(1 << NUMBERS[name] for name in found.capabilities)
