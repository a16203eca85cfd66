# SPDX-License-Identifier: Apache-2.0
"""The machines tests can ask for by name (`MACHINE = "standard"` at the top of a test file)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from tests.vm import devices
from tests.vm.devices import Board


@dataclass(frozen=True)
class Iommu:
    """A virtual IOMMU. qemu: QEMU's arguments for it; kernel_arguments: what makes the kernel use it.

    machine: the option of QEMU's machine that brings it, where it is no device.
    """

    qemu: tuple[str, ...] = ()
    kernel_arguments: tuple[str, ...] = ()
    machine: str = ""


NO_IOMMU = Iommu()
INTEL_IOMMU = Iommu(("-device", "intel-iommu,intremap=on,caching-mode=on"), ("intel_iommu=on",))
# The device is there, and the kernel leaves it alone, as Debian's does unless it is told.
IDLE_INTEL_IOMMU = Iommu(INTEL_IOMMU.qemu, ("intel_iommu=off",))
AMD_IOMMU = Iommu(("-device", "amd-iommu,intremap=on"))
# What Cloud Hypervisor has too. It remaps no interrupts, and vfio refuses such an IOMMU unless it is told.
VIRTIO_IOMMU = Iommu(("-device", "virtio-iommu-pci"), ("vfio_iommu_type1.allow_unsafe_interrupts=1",))

# arm64's.
SMMU_IOMMU = Iommu(machine=",iommu=smmuv3")


@dataclass(frozen=True)
class Machine:
    """A virtual machine. plug: puts the devices in; system: the Debian of its own that it has (tests/vm/systems.py)."""

    name: str
    about: str
    plug: Callable[[Board], None]
    iommu: Iommu = INTEL_IOMMU
    cpus: int = 2
    memory: str = "2G"
    kernel_arguments: tuple[str, ...] = ()
    system: str = ""


def plug_standard(board: Board) -> None:
    """Plug in one of everything, two NICs, two empty ports."""
    devices.add_nic(board)
    devices.add_nic(board)
    devices.add_nics_behind_bridge(board)
    devices.add_edu(board)
    devices.add_nvme(board, serial="disk")
    devices.add_sriov_nvme(board, serial="sriov")
    devices.add_hotplug_port(board)
    devices.add_hotplug_port(board)


def plug_single(board: Board) -> None:
    """Plug in exactly one group that the guest hook takes by itself, and one that it never does."""
    devices.add_nic(board)
    devices.add_usb_behind_bridge(board)


def plug_uses(board: Board) -> None:
    """Plug in what can be in use in ways of its own: a NIC, a serial port, a CAN interface, room for a btrfs."""
    devices.add_nic(board)
    devices.add_serial(board)
    devices.add_can(board)
    devices.add_nvme(board, serial="disk", size=256 << 20)


def plug_many(board: Board) -> None:
    """Plug in sixteen NICs, each in a group of its own."""
    for _ in range(16):
        devices.add_nic_on_root_bus(board)


def plug_bench(board: Board) -> None:
    """Plug in sixteen NICs in as many groups, eight more in one, and an empty port."""
    plug_many(board)
    devices.add_nics_behind_bridge(board, 8)
    devices.add_hotplug_port(board)


def plug_chain(board: Board) -> None:
    """Plug in what is passed on to a virtual machine inside: two NICs, a card with two, one to plug in later."""
    devices.add_wired_nics(board)
    devices.add_two_function_nics(board)
    devices.add_nic(board)


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("standard", "one of everything", plug_standard),
        Machine("single", "one NIC: the plain case, and the demo's", plug_single),
        Machine("no-iommu", "as standard, without a virtual IOMMU", plug_standard, iommu=NO_IOMMU),
        Machine("amd-iommu", "as single, with AMD's IOMMU", plug_single, iommu=AMD_IOMMU),
        Machine("virtio-iommu", "as single, with the virtio IOMMU", plug_single, iommu=VIRTIO_IOMMU),
        Machine("idle-iommu", "as single, with Intel's IOMMU off in the kernel", plug_single, iommu=IDLE_INTEL_IOMMU),
        Machine("uses", "a serial port, a CAN interface, a disk: what a device can be used for", plug_uses),
        Machine("many", "sixteen NICs in sixteen groups", plug_many),
        Machine("bench", "what the benchmarks bind: sixteen groups, and eight NICs in one", plug_bench),
        Machine("chain", "NICs for a virtual machine inside: tests/chain", plug_chain, memory="4G"),
        Machine("systemd", "as single, a whole Debian booted by systemd, with AppArmor", plug_single, system="debian"),
        Machine(
            "selinux",
            "as systemd, with SELinux in place of AppArmor",
            plug_single,
            kernel_arguments=("security=selinux", "selinux=1"),
            system="debian",
        ),
        Machine("arm64", "as single, an arm64 machine with SMMUv3", plug_single, iommu=SMMU_IOMMU, system="arm64"),
        Machine("arm64-no-iommu", "as arm64, without it", plug_single, iommu=NO_IOMMU, system="arm64"),
        Machine("kata-chain", "as chain, with room for Kata's guests: tests/kata/chain", plug_chain, memory="7G"),
        Machine(
            "cgroup-v1",
            "as single, with the device controller of cgroup v1",
            plug_single,
            kernel_arguments=("SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1",),
        ),
    )
}
