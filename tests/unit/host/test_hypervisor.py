# SPDX-License-Identifier: Apache-2.0
"""The virtual IOMMU in a hypervisor's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from oci_hooks.host.hypervisor import find_hypervisor
from tests.support.fake_host import HostTree

pytestmark = pytest.mark.unit

QEMU = "/opt/kata/bin/qemu-system-x86_64"
CLH = "/opt/kata/bin/cloud-hypervisor"
# As Kata 3.x starts it, shortened.
KATA = (
    "-name",
    "sandbox-c1,debug-threads=on",
    "-machine",
    "q35,accel=kvm,nvdimm=on,kernel_irqchip=split",
    "-nodefaults",
)


@pytest.mark.parametrize(
    ("arguments", "viommu"),
    [
        (KATA, "off"),
        ((*KATA, "-device", "intel-iommu,intremap=on,device-iotlb=on,caching-mode=on"), "on"),
        ((*KATA, "--device", "virtio-iommu-pci"), "on"),
        ((*KATA, "-device", "driver=intel-iommu,caching-mode=on"), "on"),
        ((*KATA, "-device", '{"driver":"intel-iommu","id":"iommu0"}'), "on"),
        ((*KATA, "-device", '{"driver":"e1000e","bus":"intel-iommu"}'), "off"),
        ((*KATA, "-device", "{broken"), "off"),
        ((*KATA, "-device", "virtio-net-pci,iommu_platform=on,id=intel-iommu"), "off"),
        ((*KATA, "-name", "intel-iommu"), "off"),
        (("-M", "virt,iommu=smmuv3"), "on"),
        (("-machine", "virt,gic-version=3"), "off"),
        ((*KATA, "-device", "intel-iommu", "-append", "console=ttyS0 iommu=off"), "off"),
        ((*KATA, "-device", "intel-iommu", "-append", "intel_iommu=off x intel_iommu=on"), "on"),
        ((*KATA, "-device", "intel-iommu", "-append", "intel_iommu=on iommu=pt"), "on"),
        ((*KATA, "-readconfig", "/x.cfg"), ""),
        ((), "off"),
    ],
)
def test_find_hypervisor_qemu(tmp_path: Path, arguments: tuple[str, ...], viommu: str) -> None:
    tree = HostTree(tmp_path)
    tree.process(812, QEMU, *arguments)
    found = find_hypervisor(tree.root, 812)
    assert found is not None
    assert found.kind == "qemu"
    assert found.viommu == viommu
    assert str(found.process) == "qemu-system-x86_64 (pid 812)"


@pytest.mark.parametrize(
    ("arguments", "viommu"),
    [
        (("--api-socket", "/run/vc/vm/c1/clh-api.sock"), ""),
        (("--kernel", "/k", "--platform", "num_pci_segments=2,iommu_segments=[1]"), "on"),
        (("--kernel", "/k", "--net", "tap=t0,iommu=on"), "on"),
        (("--kernel=/k", "--device", "path=/sys/bus/pci/devices/0000:01:00.0,iommu=off"), "off"),
    ],
)
def test_find_hypervisor_cloud_hypervisor(tmp_path: Path, arguments: tuple[str, ...], viommu: str) -> None:
    tree = HostTree(tmp_path)
    tree.process(812, CLH, *arguments)
    found = find_hypervisor(tree.root, 812)
    assert found is not None
    assert (found.kind, found.viommu) == ("clh", viommu)


@pytest.mark.parametrize(
    ("executable", "kind"),
    [
        ("/usr/libexec/qemu-kvm", "qemu"),
        ("/usr/bin/qemu-system-s390x", "qemu"),
        ("/opt/kata/bin/qemu-system-x86_64-snp-experimental", "qemu"),
        ("/opt/kata/bin/firecracker", "firecracker"),
        ("/usr/bin/stratovirt", "stratovirt"),
        ("/usr/bin/qemu-img", ""),
        ("/usr/bin/qemu-ga", ""),
        ("/bin/sleep", ""),
    ],
)
def test_find_hypervisor_kinds(tmp_path: Path, executable: str, kind: str) -> None:
    tree = HostTree(tmp_path)
    tree.process(812, executable)
    found = find_hypervisor(tree.root, 812)
    assert (found.kind if found else "") == kind


@pytest.mark.parametrize("pid", [0, -1, 999])
def test_find_hypervisor_without_process(tmp_path: Path, pid: int) -> None:
    assert find_hypervisor(HostTree(tmp_path).root, pid) is None
