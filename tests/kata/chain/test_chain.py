# SPDX-License-Identifier: Apache-2.0
"""The genuine stack: containerd, Kata's Go shim, QEMU, Kata's agent in the guest, our hooks on both sides.

The host is the machine that the tests run in; one boot of it serves all. Each container by ctr has a virtual machine of
its own.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.chain.host import Nics
from tests.kata.chain.pod import Pod
from tests.kata.chain.stack import DEVICES, PROBE, Stack, make_config
from tests.vm import bundles, guest

MACHINE = "kata-chain"
KERNELS = ("6.1",)
# The runner makes containerd's root with Kata in it.
KATA_CHAIN = True

AUTO = {DEVICES: "auto"}
DROP_IN = "/etc/kata-containers/config.d/20-iommu.toml"
ENABLE_IOMMU = "io.katacontainers.config.hypervisor.enable_iommu"
# Prints the driver of the guest's NIC each time it is another one, and what a container without a device has of VFIO.
WATCH = """
[ -e /dev/vfio ] || echo no nodes
while :; do
    driver=
    for device in /sys/bus/pci/devices/*; do
        read -r vendor <$device/vendor; read -r name <$device/device
        [ $vendor$name = 0x80860x10d3 ] && driver=$(/bin/busybox readlink $device/driver)
        [ $vendor$name = 0x80860x10d3 ] && driver=${driver:-/none}
    done
    [ "$driver" ] || driver=${seen:+/gone}
    [ "${driver##*/}" = "$seen" ] || { seen=${driver##*/}; echo driver $seen; }
    sleep 0.1
done
"""


@pytest.fixture(autouse=True)
def usual_configuration(kata: Stack) -> None:
    """Start each case with the usual configuration."""
    kata.configure()


def read_groups(done: bundles.Done) -> list[dict[str, Any]]:
    """Return what the probe in the container reported of the groups it found."""
    assert done.code == 0, done.stderr
    groups: list[dict[str, Any]] = done.read_json()["groups"]
    return groups


def check_opened(kata: Stack, groups: list[dict[str, Any]], *addresses: str) -> None:
    """Raise AssertionError unless the groups are the guest's with these NICs of the host, read through VFIO."""
    assert len(groups) == len(addresses)
    numbers = sorted(str(group["group"]) for group in groups)
    theirs = sorted(guest.group_of(address) for address in addresses)
    assert numbers != theirs, "the same numbers would prove nothing"
    for group in groups:
        assert group["viable"] is True
        (device,) = group["devices"]
        assert device["read_id"] == "ok"
    kata.seen = f"host's group {', '.join(theirs)}, guest's {', '.join(numbers)}: opened, read through VFIO"


def test_one_nic(kata: Stack, nics: Nics) -> None:
    """(a) Mode guest-kernel: the annotation has the hook in the guest bind, and the container opens its group."""
    done = kata.run("one", make_config(PROBE, nics.wired[:1], AUTO))
    check_opened(kata, read_groups(done), nics.wired[0])
    assert kata.wait_until_gone() == []
    assert guest.driver_of(nics.wired[0]) == "vfio-pci"


def test_without_guest_hook(kata: Stack, nics: Nics) -> None:
    """(b) The contrast: the same guest, and Kata is not told where its hooks are."""
    kata.configure(guest_hook_path="")
    done = kata.run("without", make_config(PROBE, nics.wired[:1], AUTO))
    assert read_groups(done) == []
    kata.seen = "no node"
    assert kata.wait_until_gone() == []


def test_viommu_off_refused(kata: Stack, nics: Nics) -> None:
    """(e) The words that reach the user name the line of Kata's configuration."""
    text = kata.configure(enable_iommu="false")
    (line,) = [number for number, each in enumerate(text.splitlines(), 1) if each.startswith("enable_iommu =")]
    check_refused(kata, make_config(PROBE, nics.wired[:1], AUTO), "viommu-off", f"configuration.toml line {line}")


def test_viommu_off_by_drop_in_refused(kata: Stack, nics: Nics) -> None:
    kata.engine.write(DROP_IN, "[hypervisor.qemu]\nenable_iommu = false\n")
    try:
        check_refused(kata, make_config(PROBE, nics.wired[:1], AUTO), "viommu-off", DROP_IN)
    finally:
        kata.engine.do(f"rm {DROP_IN}")


def test_viommu_off_by_annotation_refused(kata: Stack, nics: Nics) -> None:
    annotations = {**AUTO, ENABLE_IOMMU: "false"}
    check_refused(kata, make_config(PROBE, nics.wired[:1], annotations), "viommu-off", ENABLE_IOMMU)


def test_group_not_viable_refused(kata: Stack, nics: Nics) -> None:
    """(e) One function of a card still has its driver."""
    guest.bind_native(nics.pair[1])
    try:
        words = f"{nics.pair[1]} is bound to e1000e"
        check_refused(kata, make_config(PROBE, nics.pair, AUTO), "group-not-viable", words)
    finally:
        guest.bind(nics.pair[1], "vfio-pci")


def test_group_busy_refused(kata: Stack, nics: Nics) -> None:
    """(e) Another process has the group open."""
    group = guest.group_of(nics.spare)
    with open(f"/dev/vfio/{group}", "rb+", buffering=0):
        check_refused(kata, make_config(PROBE, [nics.spare], AUTO), "group-busy", f"group {group}")


def check_refused(kata: Stack, config: dict[str, Any], code: str, words: str) -> None:
    """Raise AssertionError unless ctr prints the host check's line, and nothing of the container is left."""
    done = kata.run("refused", config)
    assert done.code != 0
    assert f"vfio-host-check: error: [{code}]" in done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    kata.seen = done.stderr.strip()
    assert kata.wait_until_gone() == []


def test_two_nics(kata: Stack, nics: Nics) -> None:
    """(c) Two groups of the host are two of the guest, and `auto` takes both."""
    done = kata.run("two", make_config(PROBE, nics.wired, AUTO))
    check_opened(kata, read_groups(done), *nics.wired)
    assert kata.wait_until_gone() == []


def test_mode_vfio(kata: Stack, nics: Nics) -> None:
    """(d) Kata's own mode beside our check; vfio-pci must be named in kernel_modules, or nobody loads it."""
    kata.configure(vfio_mode="vfio", kernel_modules='"vfio-pci"')
    done = kata.run("native", make_config(PROBE, nics.wired[:1]))
    check_opened(kata, read_groups(done), nics.wired[0])
    assert kata.wait_until_gone() == []


def test_no_port_refused(kata: Stack, nics: Nics) -> None:
    """(e) Kata would plug the device in where there is no room for it."""
    kata.configure(hot_plug_vfio="no-port")
    check_refused(kata, make_config(PROBE, nics.wired[:1], AUTO), "no-port", "hot_plug_vfio")


def test_pod_of_two_containers(kata: Stack, nics: Nics) -> None:
    """(f), (g) One container of a pod has the device; the other sees it given back when that one is removed."""
    group = guest.group_of(nics.wired[0])
    pod = Pod(kata, {f"{DEVICES}.packets": "auto"})
    pod.start("other", ("/bin/sh", "-c", WATCH))
    packets = pod.start("packets", groups=[group])
    log = pod.read_log("packets", "ran")
    assert "opened /dev/vfio/" in log
    assert f"opened /dev/vfio/{group}\n" not in log, "the same number would prove nothing"
    pod.do(f"crictl rm --force {packets}")
    seen = pod.read_log("other", "gone")
    assert re.findall(r"driver (\S*)", seen) == ["e1000e", "vfio-pci", "e1000e", "gone"]
    assert "no nodes" in seen
    kata.seen = "the pod's other container saw the NIC's driver: e1000e, vfio-pci, e1000e"
    pod.remove()
    assert kata.wait_until_gone() == []
