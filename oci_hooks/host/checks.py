# SPDX-License-Identifier: Apache-2.0
"""Checks of the host: its IOMMU, the requested groups, and whether the group's nodes can be used.

Each check is one function that returns findings and changes nothing. Errors are reserved for configurations that cannot
work; anything that another hook, kernel or runtime can still correct is a warning.
"""

from __future__ import annotations

import os

from oci_hooks.findings import Finding
from oci_hooks.host.runtime import belongs_to_sandbox, list_sandbox_processes
from oci_hooks.linux.firmware import find_unused_iommu
from oci_hooks.linux.pci import IOMMU_GROUPS, PCI_DEVICES, VFIO_CLASS
from oci_hooks.linux.processes import read_group_status
from oci_hooks.linux.vfio import CDEV_CLASS
from oci_hooks.oci import CDEV_PREFIX, CONTROL_NODE, GROUP_PREFIX, IOMMUFD_NODE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.runtime import Runtime
    from oci_hooks.host.targets import Target
    from oci_hooks.linux.holders import HolderFinder, Holders
    from oci_hooks.linux.vfio import Member, VfioGroup
    from oci_hooks.oci import State
    from oci_hooks.system import Root


# The host ------------------------------------------------------------------------------------------------------------


def check_iommu(root: Root) -> tuple[Finding, ...]:
    """iommu-off: the kernel created no IOMMU group, so no device can be passed through."""
    if root.list_names(IOMMU_GROUPS):
        return ()
    iommu = find_unused_iommu(root)
    if iommu and iommu.off:
        hint = f"remove {' '.join(iommu.off)} from the kernel's command line and reboot"
    elif iommu and iommu.parameter:
        hint = (
            f"the firmware reports an IOMMU ({iommu.table}): boot with {iommu.parameter}, e.g. grubby "
            f"--update-kernel=ALL --args={iommu.parameter}"
        )
    elif iommu:
        hint = (
            f"the firmware reports an IOMMU ({iommu.table}): boot a kernel built with {iommu.option}, and see what "
            "dmesg | grep -i iommu reports"
        )
    elif root.list_names(PCI_DEVICES) and "acpi" in root.list_names("/sys/firmware"):
        hint = (
            "enable VT-d, AMD-Vi or SMMU in the firmware setup; if this is a virtual machine, give it a virtual IOMMU"
        )
    else:
        hint = "enable the IOMMU in the firmware setup and on the kernel's command line"
    return (
        Finding(
            "error",
            "iommu-off",
            "host",
            "the kernel uses no IOMMU (there are no IOMMU groups in /sys/kernel/iommu_groups)",
            hint,
        ),
    )


def check_host_control_node(root: Root, targets: tuple[Target, ...]) -> tuple[Finding, ...]:
    """control-node-missing, on the host: without this node no hypervisor or program can set up the group."""
    findings = []
    legacy = any(target.group and target.group.number and not target.cdev for target in targets)
    if legacy and not (root.exists(CONTROL_NODE) or root.exists("/sys/class/misc/vfio")):
        findings.append(
            Finding(
                "error", "control-node-missing", CONTROL_NODE, "missing on the host", "load the module: modprobe vfio"
            )
        )
    if any(target.cdev for target in targets) and not (
        root.exists(IOMMUFD_NODE) or root.exists("/sys/class/misc/iommu")
    ):
        problem = f"missing on the host; {CDEV_PREFIX}* cannot be used without it"
        findings.append(
            Finding("error", "control-node-missing", IOMMUFD_NODE, problem, "load the module: modprobe iommufd")
        )
    return tuple(findings)


# One entry of linux.devices ------------------------------------------------------------------------------------------


def check_device_numbers(target: Target, runtime: Runtime) -> tuple[Finding, ...]:
    """node-mismatch: the entry's device numbers are not those of the group that its path names.

    The numbers decide. If they belong to no device, Kata's Go runtime uses the path (config.GetHostPath).
    """
    entry, group = target.entry, target.group
    if group is None or (group.number is None and not target.cdev):
        return ()
    numbers = f"{entry.major}:{entry.minor}"
    if target.found_by == "numbers":
        meant = target.cdev or group.name
        if target.name == meant or not target.name.isdigit():
            return ()
        problem = (
            f"config.json lists it with the device number of {'device' if target.cdev else 'group'} {meant} ({numbers})"
        )
        hint = (
            f"as configured, that one is passed; to pass group {target.name}, use the device number shown by "
            f"ls -l {GROUP_PREFIX}{target.name}"
        )
        # In a guest the node gets the guest's name. Without a guest the program opens a node of another device.
        level = "warning" if runtime.is_kata else "error"
        return (Finding(level, "node-mismatch", entry.path, problem, hint),)
    right = f"{group.number[0]}:{group.number[1]}" if group.number and not target.cdev else "another one"
    node = group.node if not target.cdev else CDEV_PREFIX + target.cdev
    hint = f"set major and minor in linux.devices to those shown by ls -l {node}"
    if target.taken_by:
        problem = (
            f"config.json lists it with device number {numbers}, which is {target.taken_by}; on this host its "
            f"number is {right}"
        )
        return (Finding("error", "node-mismatch", entry.path, problem, hint),)
    level = "warning" if runtime.kind in ("kata-go", "kata-1", "kata") else "error"
    problem = (
        f"config.json lists it with device number {numbers}, which no device of this host has; here its number "
        f"is {right}"
    )
    return (Finding(level, "node-mismatch", entry.path, problem, hint),)


def check_group_exists(root: Root, target: Target) -> tuple[Finding, ...]:
    """group-missing: the entry matches no group on this host."""
    entry = target.entry
    if target.found_by or not root.list_names(IOMMU_GROUPS):
        # Without any IOMMU group, iommu-off reports the cause.
        return ()
    kind = "device" if entry.is_cdev else "group"
    where = CDEV_CLASS if entry.is_cdev else VFIO_CLASS
    numbers = f", and no VFIO device has the device number {entry.major}:{entry.minor}" if entry.major >= 0 else ""
    problem = f"the host has no such VFIO {kind} (no entry in {where} or {IOMMU_GROUPS}){numbers}"
    hint = "list the groups of this host: vfio-host-check --all"
    return (Finding("error", "group-missing", f"{kind} {target.name}", problem, hint),)


def check_noiommu(target: Target, runtime: Runtime) -> tuple[Finding, ...]:
    """noiommu-group: no hypervisor accepts one; a program in a plain container can, with CAP_SYS_RAWIO."""
    if target.group is None or not target.group.noiommu:
        return ()
    if runtime.is_kata:
        problem = "is a no-IOMMU group, which no hypervisor can pass to a virtual machine"
        hint = "enable the host's IOMMU and write N to /sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
        return (Finding("error", "noiommu-group", target.subject, problem, hint),)
    problem = "is a no-IOMMU group: its device can write to all of the host's memory"
    hint = "enable the host's IOMMU; without it, the container's program needs CAP_SYS_RAWIO"
    return (Finding("warning", "noiommu-group", target.subject, problem, hint),)


def check_mediated(target: Target) -> tuple[Finding, ...]:
    """mediated-device: reports members that are not PCI functions."""
    if target.group is None:
        return ()
    mediated = [member.name for member in target.group.members if member.bus == "mdev"]
    if not mediated:
        return ()
    problem = f"contains mediated device {', '.join(mediated)}, which has no PCI driver that could be checked"
    return (Finding("info", "mediated-device", target.subject, problem),)


def check_empty(target: Target) -> tuple[Finding, ...]:
    """group-empty: the group has only bridges, or no devices."""
    group = target.group
    if group is None or not group.iommu_group or group.passable:
        return ()
    held = ", ".join(name_member(member) for member in group.members)
    problem = f"contains no device that can be passed{f', only {held}' if held else ''}"
    hint = "use the IOMMU group of the device itself; list all groups: vfio-host-check --all"
    return (Finding("error", "group-empty", target.subject, problem, hint),)


def check_viability(target: Target) -> tuple[Finding, ...]:
    """group-not-viable, from sysfs: a member has a driver other than a VFIO driver, or VFIO created no group."""
    group = target.group
    # A no-IOMMU group shares nothing, so viability does not apply.
    if group is None or group.noiommu or not group.passable:
        return ()
    if group.blocking:
        others = [member for member in group.members if member.viability != "blocking"]
        problem = ", ".join(f"{member.name} is bound to {member.driver}" for member in group.blocking)
        if others:
            problem += f" (other members: {', '.join(name_member(member) for member in others)})"
        return (Finding("error", "group-not-viable", target.subject, problem, make_bind_hint(group.blocking)),)
    if group.number is None and not target.cdev:
        unbound = [member for member in group.passable if member.pci and member.viability == "unbound"]
        problem = (
            "no device of the group is bound to vfio-pci "
            f"({', '.join(name_member(member) for member in group.members)})"
        )
        hint = make_bind_hint(tuple(unbound)) if unbound else "load the driver: modprobe vfio-pci"
        if any(member.viability == "vfio" for member in group.members):
            problem = "a device of the group is bound to a VFIO driver, but VFIO created no group for it"
            hint = f"the kernel may be built without group nodes (CONFIG_VFIO_GROUP); list {CDEV_PREFIX}* instead"
        return (Finding("error", "group-not-viable", target.subject, problem, hint),)
    return ()


def check_group_status(
    root: Root, target: Target, runtime: Runtime, state: State, finder: HolderFinder
) -> tuple[Finding, ...]:
    """group-busy, group-denied, group-not-viable: the kernel's result when the group is opened.

    Only for a group that looks viable. The group is held open for the duration of one ioctl.
    """
    group = target.group
    if group is None or group.number is None or group.noiommu or target.cdev or group.blocking:
        return ()
    word = read_group_status(root, group.node)
    if word == "busy":
        return check_holders(root, group, runtime, state, finder)
    if word == "not-viable":
        members = ", ".join(name_member(member) for member in group.members)
        problem = f"the kernel reports that the group is not viable ({members})"
        unknown = tuple(member for member in group.members if member.viability == "unknown")
        links = f"{IOMMU_GROUPS}/{group.iommu_group}/devices/*/driver"
        hint = make_bind_hint(unknown) if unknown else f"check the drivers of its devices: ls -l {links}; dmesg"
        return (Finding("error", "group-not-viable", target.subject, problem, hint),)
    if word == "denied":
        problem = f"the hook cannot open {group.node} ({describe_node(root, group.node)})"
        hint = "allow it in the runtime's device cgroup, or run the runtime as root"
        return (Finding("warning", "group-denied", target.subject, problem, hint),)
    if word == "missing" and not root.exists(group.node):
        problem = (
            f"{group.node} is missing, although the kernel has this group with device number "
            f"{group.number[0]}:{group.number[1]}"
        )
        hint = f"create the node: mknod -m 0600 {group.node} c {group.number[0]} {group.number[1]}"
        # Plain runtimes create the container's node from the numbers and never look at the host's node.
        level = "error" if runtime.is_kata else "warning"
        return (Finding(level, "group-missing", target.subject, problem, hint),)
    return ()


def check_holders(
    root: Root, group: VfioGroup, runtime: Runtime, state: State, finder: HolderFinder
) -> tuple[Finding, ...]:
    """group-busy: a process outside the container's own sandbox has the group open."""
    nodes = list_group_nodes(root, group)
    found = finder.find(nodes, list_sandbox_processes(root, runtime, state))
    holders = found.processes
    if any(belongs_to_sandbox(root, runtime, state, holder) for holder in holders):
        return ()
    subject = f"group {group.name}"
    if not holders:
        # The holder may have closed it meanwhile, or be invisible to the hook: if in doubt, allow the container.
        if read_group_status(root, group.node) != "busy":
            return ()
        return (report_unknown_holder(group, found),)
    problem = f"is in use by {', '.join(str(holder) for holder in holders)}"
    pids = " ".join(str(holder.pid) for holder in holders)
    return (Finding("error", "group-busy", subject, problem, f"stop the process (kill {pids}), or use another group"),)


def report_unknown_holder(group: VfioGroup, found: Holders) -> Finding:
    """group-busy: the group is in use, and the process that has it open was not found, for one of three reasons."""
    problem = "is in use by a process that is not visible to the hook (another PID namespace?)"
    hint = f"list its users as root on the host: fuser -v {group.node}"
    if found.looked < found.total:
        problem = f"is in use; the search for the process stopped after {found.looked} of {found.total} processes"
        hint += "; to search longer, raise deadline in host.toml"
    elif found.hidden:
        problem = (
            f"is in use; the hook lacks the privilege to check {found.hidden} of {found.total} processes"
            " (CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH)"
        )
    return Finding("error", "group-busy", f"group {group.name}", problem, hint)


def list_group_nodes(root: Root, group: VfioGroup) -> tuple[str, ...]:
    """Return the nodes by which a process can have a group open: the group's, then those of its devices."""
    return (group.node, *(node for member in group.members for node in list_device_nodes(root, group, member)))


def list_device_nodes(root: Root, group: VfioGroup, member: Member) -> list[str]:
    """Return a member's own VFIO nodes by its names in sysfs: ["/dev/vfio/devices/vfio0"].

    Source: the kernel's Documentation/ABI/testing/sysfs-devices-vfio-dev, Documentation/driver-api/vfio.rst (6.6).
    """
    directory = f"{IOMMU_GROUPS}/{group.iommu_group}/devices/{member.name}/vfio-dev"
    return [CDEV_PREFIX + name for name in root.list_names(directory)]


def is_attached(root: Root, target: Target, runtime: Runtime, finder: HolderFinder) -> bool:
    """Return whether the container's own sandbox already has the group open: cold plug, or a hook after hot plug."""
    group = target.group
    if group is None or runtime.hypervisor is None:
        return False
    return not finder.list_files(runtime.hypervisor.process.pid).isdisjoint(list_group_nodes(root, group))


# Words ---------------------------------------------------------------------------------------------------------------


def name_member(member: Member) -> str:
    """Return a member with its driver: `0000:03:00.0 vfio-pci`."""
    return f"{member.name} {member.driver or 'no driver'}"


def make_bind_hint(members: tuple[Member, ...]) -> str:
    """Return the commands that bind members to vfio-pci."""
    commands = [f"driverctl set-override {member.name} vfio-pci" for member in members if member.pci]
    if not commands:
        return f"unbind it: echo {members[0].name} > /sys/bus/{members[0].bus}/drivers/{members[0].driver}/unbind"
    return f"bind {'it' if len(commands) == 1 else 'them'} with: {' && '.join(commands)}"


def describe_node(root: Root, node: str) -> str:
    """Return owner and mode of a node as text."""
    try:
        stat = root.stat(node)
    except OSError as error:
        return error.strerror or str(error)
    user = root.do(os.geteuid)
    return f"owner {stat.st_uid}:{stat.st_gid}, mode {stat.st_mode & 0o7777:04o}; the hook runs as {user}"
