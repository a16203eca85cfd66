# SPDX-License-Identifier: Apache-2.0
"""Parse a running hypervisor's command line, the authoritative source for a sandbox's virtual IOMMU.

Sources: qemu(1), cloud-hypervisor --help, and Kata's code that writes them (govmm/qemu/qemu.go, virtcontainers/clh.go,
runtime-rs cmdline_generator.rs).
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.linux.processes import Process, read_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root

QEMU_NAMES = ("qemu-system-", "qemu-kvm", "qemu-lite", "qemu-vanilla", "qemu")
CLH_NAMES = ("cloud-hypervisor", "clh")
OTHER_NAMES = ("firecracker", "stratovirt", "openvmm")
# Programs that drive devices themselves: DPDK and SPDK, and what is built on these.
DRIVER_NAMES = ("dpdk-", "spdk", "nvmf_tgt", "vhost", "ovs-vswitchd", "vpp")
# QEMU's virtual IOMMUs by device; on arm a machine option creates one.
QEMU_IOMMUS = ("intel-iommu", "virtio-iommu", "virtio-iommu-pci", "virtio-iommu-device", "amd-iommu", "arm-smmuv3")

# The evidence of a virtual IOMMU that the guest's kernel may not use begins with this.
KERNEL_EVIDENCE = "kernel parameter"


class Hypervisor(Frozen):
    """A running virtual machine monitor.

    kind: "qemu", "clh", or the executable's name; viommu: "on", "off", or "" if its command line does not show it;
    evidence: the words of the command line that show it.
    """

    process: Process
    kind: str
    viommu: str
    evidence: str


def find_hypervisor(root: Root, pid: int) -> Hypervisor | None:
    """Return the hypervisor with this id (of the process or of one of its threads), None if it is not one."""
    if pid <= 0:
        return None
    process = read_process(root, pid)
    kind = name_hypervisor_kind(process.name)
    if kind == "qemu":
        return read_qemu(process)
    if kind == "clh":
        return read_clh(process)
    return Hypervisor(process, kind, "", "") if kind else None


def name_hypervisor_kind(name: str) -> str:
    """Return the kind of hypervisor of an executable; "" for anything else."""
    if name.startswith(QEMU_NAMES) and not name.startswith(("qemu-img", "qemu-nbd", "qemu-io", "qemu-ga", "qemu-pr")):
        return "qemu"
    if name.startswith(CLH_NAMES):
        return "clh"
    return next((other for other in OTHER_NAMES if name.startswith(other)), "")


def may_use_vfio(name: str) -> bool:
    """Return whether a program of this name probably has a VFIO group open: those are examined first."""
    return bool(name_hypervisor_kind(name)) or name.startswith(DRIVER_NAMES)


def read_qemu(process: Process) -> Hypervisor:
    """Return the hypervisor that QEMU's command line describes."""
    options = list(pair_options(process.arguments))
    devices = [name_device(value) for option, value in options if option == "device"]
    machines = [value for option, value in options if option in ("machine", "M")]
    kernel = next((value for option, value in options if option == "append"), "")
    switched_off = find_kernel_refusal(kernel)
    iommu = next((device for device in devices if device in QEMU_IOMMUS), "")
    if not iommu and any(",iommu=smmuv3" in value for value in machines):
        iommu = "iommu=smmuv3"
    if iommu and switched_off:
        return Hypervisor(process, "qemu", "off", f"{KERNEL_EVIDENCE} {switched_off}")
    if iommu:
        return Hypervisor(process, "qemu", "on", f"-device {iommu}")
    # A -readconfig file may define devices; Kata writes none.
    if any(option == "readconfig" for option, _ in options):
        return Hypervisor(process, "qemu", "", "")
    return Hypervisor(process, "qemu", "off", "no -device intel-iommu or virtio-iommu")


def find_kernel_refusal(kernel: str) -> str:
    """Return the guest kernel parameter that disables its IOMMU, "" without one; the last one counts."""
    refusal = ""
    for word in kernel.split():
        if word in ("iommu=off", "intel_iommu=off"):
            refusal = word
        elif word == "intel_iommu=on" and refusal == "intel_iommu=off":
            refusal = ""
    return refusal


def read_clh(process: Process) -> Hypervisor:
    """Return the hypervisor of Cloud Hypervisor's command line. Kata passes only a socket and configures it there."""
    options = list(pair_options(process.arguments))
    segments = any(option == "platform" and "iommu_segments=" in value for option, value in options)
    attached = any(word == "iommu=on" for _, value in options for word in value.split(","))
    if segments or attached:
        evidence = "--platform iommu_segments" if segments else "iommu=on"
        return Hypervisor(process, "clh", "on", evidence)
    if any(option in ("kernel", "firmware", "disk") for option, _ in options):
        return Hypervisor(process, "clh", "off", "no --platform iommu_segments and no iommu=on")
    return Hypervisor(process, "clh", "", "")


def pair_options(arguments: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return options and their values: -device X, --device X and --device=X are equal; several values one by one."""
    pairs: list[tuple[str, str]] = []
    name = ""
    for word in arguments[1:]:
        if word.startswith("-") and len(word) > 1:
            name, equals, value = word.lstrip("-").partition("=")
            pairs.append((name, value if equals else ""))
        elif pairs and pairs[-1] == (name, ""):
            pairs[-1] = (name, word)
        else:
            pairs.append((name, word))
    return pairs


def name_device(value: str) -> str:
    """Return the driver that a -device option names, in key=value or JSON form."""
    if value.startswith("{"):
        from oci_hooks.findings import InputError
        from oci_hooks.json_input import parse_json

        try:
            document = parse_json(value.encode("utf-8", "replace"), "-device")
        except InputError:
            return ""
        return str(document.get("driver", "")) if isinstance(document, dict) else ""
    return next((word for key, word in split_properties(value) if key in ("", "driver")), "")


def split_properties(value: str) -> list[tuple[str, str]]:
    """Return the properties of a QEMU option: `q35,accel=kvm` gives ("", "q35"), ("accel", "kvm")."""
    pairs = []
    for word in value.split(","):
        key, equals, text = word.partition("=")
        pairs.append((key, text) if equals else ("", word))
    return pairs
