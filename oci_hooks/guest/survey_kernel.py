# SPDX-License-Identifier: Apache-2.0
"""Read what this guest's kernel has for VFIO, for the survey, and report what it lacks. Loads no module."""

from __future__ import annotations

from oci_hooks.findings import Finding
from oci_hooks.frozen import Frozen
from oci_hooks.guest.apply.modprobe import (
    NO_MODPROBE,
    OPTIONS,
    explain_missing,
    find_modprobe,
    list_missing_modules,
)
from oci_hooks.linux.kernel import KernelConfig, find_module, read_config, read_release
from oci_hooks.linux.pci import IOMMU_GROUPS, VFIO_CLASS
from oci_hooks.linux.vfio import list_cdevs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root

DRIVERS = ("vfio-pci", "vfio_iommu_type1")
CDEV_OPTION, GROUP_OPTION = "CONFIG_VFIO_DEVICE_CDEV", "CONFIG_VFIO_GROUP"


class GuestFacts(Frozen):
    """What the kernel has.

    release: as of uname -r; config: its options; drivers: name -> "loaded" (or built in), "loadable", "missing";
    modprobe: its path, "" without it; group_nodes, device_nodes: whether the kernel makes /dev/vfio/N and
    /dev/vfio/devices/vfioN, None where that is not known before vfio is loaded; groups: number of IOMMU groups.
    """

    release: str
    config: KernelConfig
    drivers: dict[str, str]
    modprobe: str
    group_nodes: bool | None
    device_nodes: bool | None
    groups: int


def read_facts(root: Root) -> GuestFacts:
    """Return what the kernel has. What cannot be read is as if it were not there."""
    release = read_release(root)
    config = read_config(root, release)
    modprobe = find_modprobe(root)
    missing = list_missing_modules(root)
    drivers = dict.fromkeys(DRIVERS, "loaded")
    for name in missing:
        drivers[name] = "loadable" if modprobe and find_module(root, release, name) else "missing"
    try:
        groups = len(root.list_names(IOMMU_GROUPS))
        has_cdevs = bool(list_cdevs(root))
    except OSError:
        groups, has_cdevs = 0, False
    group_nodes = has_group_nodes(root, config, "vfio-pci" not in missing)
    device_nodes = True if has_cdevs else config.has(CDEV_OPTION) if config.path else None
    return GuestFacts(release, config, drivers, modprobe, group_nodes, device_nodes, groups)


def has_group_nodes(root: Root, config: KernelConfig, loaded: bool) -> bool | None:
    """Return whether the kernel makes nodes of groups; None where that is not known. loaded: vfio is there.

    vfio makes the class when it is loaded (drivers/vfio/group.c); before Linux 6.6 there is no option without it.
    """
    if root.exists(VFIO_CLASS):
        return True
    if loaded:
        return False
    if config.path:
        return config.has("CONFIG_VFIO") and config.options.get(GROUP_OPTION, "y") == "y"
    return None


def check_facts(facts: GuestFacts) -> list[Finding]:
    """Return what the kernel lacks to give a container a device."""
    findings = []
    missing = ", ".join(facts.config.missing)
    for name, state in facts.drivers.items():
        # Where only devices have nodes, iommufd does what type 1 does for groups.
        if state != "missing" or (name != "vfio-pci" and facts.group_nodes is False):
            continue
        reason = (
            f"modprobe finds no such module for {facts.release or 'this kernel'}" if facts.modprobe else NO_MODPROBE
        )
        error = explain_missing(name, reason, missing or OPTIONS)
        # The hook itself can do without the second one, most programs that open the group cannot.
        level = "error" if name == "vfio-pci" else "warning"
        findings += [finding.replace(level=level) for finding in error.findings]
    if missing and not findings:
        problem = f"was built without {missing} ({facts.config.path})"
        hint = "build the guest's kernel with it"
        findings.append(Finding("warning", "kernel-options", f"kernel {facts.release}", problem, hint))
    if facts.group_nodes is False and facts.drivers["vfio-pci"] != "missing":
        problem = f"makes no device nodes of VFIO groups ({GROUP_OPTION} is not set)"
        hint = 'add cdev to the annotation, e.g. "auto,cdev": devices then get nodes of their own'
        if facts.device_nodes is False:
            hint = f"build the guest's kernel with {GROUP_OPTION}, or with {CDEV_OPTION}"
        findings.append(Finding("warning", "no-group-node", f"kernel {facts.release}", problem, hint))
    return findings
