# SPDX-License-Identifier: Apache-2.0
"""Survey the host before any container exists: every IOMMU group, its users, and Kata's configuration.

Exit codes are those of the hook or of a Node Problem Detector plugin: 0 OK, 1 problem, 2 unknown.
"""

from __future__ import annotations

import os

from oci_hooks.findings import Finding, InputError
from oci_hooks.frozen import Frozen
from oci_hooks.host import checks
from oci_hooks.host.hypervisor import may_use_vfio
from oci_hooks.host.targets import Target
from oci_hooks.linux.holders import HolderFinder
from oci_hooks.linux.listing import describe_group, format_columns, format_member
from oci_hooks.linux.pci import NOIOMMU_PREFIX, DeviceReader
from oci_hooks.linux.vfio import list_groups, read_group
from oci_hooks.log import write_stdout
from oci_hooks.oci import GROUP_PREFIX, Device, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.kata.sandbox import Sandbox
    from oci_hooks.host.settings import HostSettings
    from oci_hooks.linux.processes import Process
    from oci_hooks.linux.vfio import VfioGroup
    from oci_hooks.program import Run
    from oci_hooks.system import Root

# Node Problem Detector cuts a message after this many characters by default.
NPD_LENGTH = 80
# Codes of the status of a group that could not be opened.
UNOPENED = ("group-busy", "group-denied", "group-missing")


class GroupLine(Frozen):
    """A group in the listing. state: one of the words of describe_state; holders: processes that have it open."""

    group: VfioGroup
    state: str
    holders: tuple[Process, ...]


def survey(run: Run) -> int:
    """Report on all groups, or on those in the arguments, and return the exit code. Raises InputError."""
    from oci_hooks.host.settings import load_settings
    from oci_hooks.host.suite import choose_exit_code, report_findings

    settings, root = load_settings(run), run.root
    devices, finder = DeviceReader(root), HolderFinder(root, run.deadline, may_use_vfio)
    if run.arguments.groups:
        groups = tuple(read_group(root, devices, parse_group(text)) for text in run.arguments.groups)
        checked = [check_named(root, group, finder) for group in groups]
        findings = [finding for found in checked for finding in found]
        lines = tuple(make_named_line(root, group, finder, found) for group, found in zip(groups, checked))
    else:
        groups = list_groups(root, devices)
        findings = [*checks.check_iommu(root), *find_half_bound(groups)]
        holders = finder.find_all()
        findings += report_unfinished(finder)
        lines = tuple(make_line(root, group, holders) for group in groups)
    sandboxes = () if settings.kata_mode == "never" else inspect_configs(root, settings)
    findings += [finding for sandbox in sandboxes for finding in check_config_conflicts(sandbox)]
    reported = report_findings(run, findings, settings)
    run.details["groups"] = [describe_line(line) for line in lines]
    run.details["kata"] = [describe_config(sandbox) for sandbox in sandboxes]
    if run.arguments.metrics is not None:
        put_metrics(run, lines, reported)
    elif not run.arguments.json:
        write_stdout(format_answer(run.arguments.format, lines, sandboxes, reported))
    return choose_exit_code(reported)


def put_metrics(run: Run, lines: tuple[GroupLine, ...], reported: tuple[Finding, ...]) -> None:
    """Print the survey as metrics, or write them to the file that --metrics names. Raises Refusal [output]."""
    from oci_hooks.host.files import put_file
    from oci_hooks.host.metrics import format_metrics, is_own

    text = format_metrics(has_iommu(lines), tuple(line.state for line in lines), reported)
    if run.arguments.metrics:
        put_file(run.root, os.path.abspath(run.arguments.metrics), text, is_own, renew=True)
    elif not run.arguments.json:
        write_stdout(text)


# Groups --------------------------------------------------------------------------------------------------------------


def parse_group(text: str) -> str:
    """Return the group's name for "12" or "/dev/vfio/12". Raises InputError."""
    name = text[len(GROUP_PREFIX) :] if text.startswith(GROUP_PREFIX) else text
    if not (name.isdigit() or (name.startswith(NOIOMMU_PREFIX) and name[len(NOIOMMU_PREFIX) :].isdigit())):
        hint = "use a group number, e.g. --group 12; list all groups: --all"
        raise InputError("bad-arguments", f"--group {text}", "is not a group name", hint)
    return name


def check_named(root: Root, group: VfioGroup, finder: HolderFinder) -> list[Finding]:
    """Return the findings that a container requesting this group would get."""
    from oci_hooks.host.suite import check_host, check_target

    entry = make_entry(group)
    is_there = bool(group.iommu_group or group.number)
    found_by = "numbers" if group.number else "name" if is_there else ""
    target = Target(entry, group if is_there else None, "", found_by)
    findings = check_host(root, (target,))
    return findings + check_target(root, target, make_no_runtime(), State("", "/", 0, "", {}), finder)


def make_no_runtime() -> Any:
    """Return the Runtime of a check that no runtime started."""
    from oci_hooks.host.runtime import Runtime

    return Runtime("plain", None, None, "", "", False, True)


def find_half_bound(groups: tuple[VfioGroup, ...]) -> list[Finding]:
    """Return a finding for each group that has a member with a VFIO driver but cannot be opened."""
    return [
        finding
        for group in groups
        if group.blocking and any(member.viability == "vfio" for member in group.members)
        for finding in checks.check_viability(Target(make_entry(group), group, "", "numbers"))
    ]


def make_entry(group: VfioGroup) -> Device:
    """Return an entry of linux.devices that requests a group."""
    major, minor = group.number or (-1, -1)
    return Device(group.node, "c", major, minor, -1, -1, -1)


def report_unfinished(finder: HolderFinder) -> tuple[Finding, ...]:
    """holders-unknown: not all processes were examined, so that a group may be in use although no user is listed."""
    counts = finder.counts
    if counts.looked < counts.total:
        problem = f"the search for the users of groups stopped after {counts.looked} of {counts.total} processes"
        hint = "raise deadline in host.toml"
    elif counts.hidden:
        problem = (
            f"the hook lacks the privilege to check {counts.hidden} of {counts.total} processes (CAP_SYS_PTRACE,"
            " CAP_DAC_READ_SEARCH) for open groups"
        )
        hint = "run it as root"
    else:
        return ()
    return (Finding("warning", "holders-unknown", "host", f"{problem}: the list of users is not complete", hint),)


def make_named_line(root: Root, group: VfioGroup, finder: HolderFinder, found: list[Finding]) -> GroupLine:
    """Return the line of a group that was checked. found: the findings on it.

    A group that was opened for its status is in use by nobody: then no process has to be examined.
    """
    was_opened = bool(group.number) and not group.noiommu and not group.blocking
    if was_opened and not any(finding.code in UNOPENED for finding in found):
        return make_line(root, group, {})
    nodes = checks.list_group_nodes(root, group)
    return make_line(root, group, {group.node: finder.find(nodes).processes})


def make_line(root: Root, group: VfioGroup, holders: dict[str, tuple[Process, ...]]) -> GroupLine:
    """Return a group's line of the listing."""
    held_by = tuple(
        dict.fromkeys(process for node in checks.list_group_nodes(root, group) for process in holders.get(node, ()))
    )
    return GroupLine(group, describe_state(group, held_by), held_by)


def describe_state(group: VfioGroup, holders: tuple[Process, ...]) -> str:
    """Return a group's state in one or two words."""
    prepared = any(member.viability == "vfio" for member in group.members)
    facts = (
        (not group.iommu_group and not group.number, "missing"),
        (bool(holders), "in use"),
        (not group.passable, "bridges only"),
        (group.noiommu, "no IOMMU"),
        (prepared and bool(group.blocking), "not viable"),
        (prepared, "ready"),
        (bool(group.blocking), "host's"),
    )
    return next((word for is_so, word in facts if is_so), "not bound")


# Kata ----------------------------------------------------------------------------------------------------------------


def inspect_configs(root: Root, settings: HostSettings) -> tuple[Sandbox, ...]:
    """Return Kata's configurations on this host: those set in container engines' files, and the default one."""
    from oci_hooks.host.kata.config import find_default_files, load_config, make_config_file
    from oci_hooks.host.kata.handlers import list_kata_handlers
    from oci_hooks.host.kata.lookup import ConfigLookup
    from oci_hooks.host.kata.sandbox import inspect_sandbox

    named = settings.kata_config
    candidates = [make_config_file(root, named, "named in host.toml")] if named else []
    for handler in list_kata_handlers(root):
        candidates.append(make_config_file(root, handler.config_path, f"runtime {handler.name} of {handler.engine}"))
    for flavour in ("go", "rs"):
        candidates += find_default_files(root, flavour, "")[:1]
    locations = {location.real: location for location in reversed(candidates) if location}
    configs = [load_config(root, location, "", {}) for location in reversed(list(locations.values()))]
    return tuple(inspect_sandbox(root, make_no_runtime(), ConfigLookup(config, True), {}, False) for config in configs)


def check_config_conflicts(sandbox: Sandbox) -> list[Finding]:
    """Return the contradictions in a configuration that can be found without a container."""
    from oci_hooks.host.kata import checks as kata_checks

    return [
        *kata_checks.check_config(sandbox),
        *(kata_checks.check_viommu(sandbox, False) if sandbox.wanted else ()),
        *kata_checks.check_viommu_support(sandbox, False),
        *(finding for finding in kata_checks.check_port(sandbox) if finding.code == "port-conflict"),
    ]


# Formats -------------------------------------------------------------------------------------------------------------


def format_answer(
    name: str, lines: tuple[GroupLine, ...], sandboxes: tuple[Sandbox, ...], reported: tuple[Finding, ...]
) -> str:
    """Return the listing in a format: "nfd", "npd", else a table."""
    if name == "nfd":
        return format_labels(lines, sandboxes)
    if name == "npd":
        return format_problem(lines, reported)
    return format_table(lines, sandboxes)


def format_table(lines: tuple[GroupLine, ...], sandboxes: tuple[Sandbox, ...]) -> str:
    """Return groups, and Kata's configurations, as a table."""
    rows: list[tuple[str, ...]] = [("GROUP", "STATE", "DEVICE", "ID", "CLASS", "DRIVER", "IN USE BY")]
    for line in lines:
        held_by = ", ".join(str(process) for process in line.holders) or "-"
        first = (line.group.name, line.state)
        for member in line.group.members:
            rows.append((*first, *format_member(member), held_by))
            first, held_by = ("", ""), ""
        if not line.group.members:
            rows.append((*first, "-", "-", "-", "-", held_by))
    text = format_columns(rows)
    if sandboxes:
        text += "\n" + format_columns(
            [("KATA", "HYPERVISOR", "VFIO_MODE", "ENABLE_IOMMU", "PORT"), *map(format_config_row, sandboxes)]
        )
    return text


def format_config_row(sandbox: Sandbox) -> tuple[str, ...]:
    """Return the columns of one of Kata's configurations."""
    values = describe_config(sandbox)
    return (
        values["path"],
        values["hypervisor"],
        values["vfio_mode"],
        str(values["enable_iommu"]).lower(),
        values["port"],
    )


def format_labels(lines: tuple[GroupLine, ...], sandboxes: tuple[Sandbox, ...]) -> str:
    """Return labels for Node Feature Discovery's local source, a line each (features.d)."""
    ready = [line.group for line in lines if line.state == "ready"]
    labels = {
        "vfio.iommu": str(has_iommu(lines)).lower(),
        "vfio.groups-ready": str(len(ready)),
        "vfio.groups-in-use": str(sum(line.state == "in use" for line in lines)),
        "vfio.groups-not-viable": str(sum(line.state == "not viable" for line in lines)),
    }
    for group in ready:
        for member in group.passable:
            if member.pci:
                name = f"vfio.device-{member.pci.vendor}-{member.pci.device}"
                labels[name] = str(int(labels.get(name, "0")) + 1)
    if sandboxes:
        labels["vfio.kata-viommu"] = str(any(describe_config(sandbox)["enable_iommu"] for sandbox in sandboxes)).lower()
    return "".join(f"{name}={value}\n" for name, value in labels.items())


def format_problem(lines: tuple[GroupLine, ...], reported: tuple[Finding, ...]) -> str:
    """Return one line for Node Problem Detector: the first error, or the number of ready groups."""
    errors = [finding for finding in reported if finding.level == "error"]
    if not errors:
        return f"{sum(line.state == 'ready' for line in lines)} VFIO groups ready\n"
    more = f" (+{len(errors) - 1})" if len(errors) > 1 else ""
    text = f"{errors[0].code}: {errors[0].subject}: {errors[0].problem}"
    return text[: NPD_LENGTH - len(more)] + more + "\n"


def has_iommu(lines: tuple[GroupLine, ...]) -> bool:
    """Return whether any group is behind an IOMMU."""
    return any(line.group.iommu_group and not line.group.noiommu for line in lines)


def describe_line(line: GroupLine) -> dict[str, Any]:
    """Return a group as an object for --json."""
    holders = [{"pid": process.pid, "name": process.name} for process in line.holders]
    return {**describe_group(line.group, line.state), "holders": holders}


def describe_config(sandbox: Sandbox) -> dict[str, Any]:
    """Return one of Kata's configurations as an object for --json."""
    config = sandbox.config
    if config is None:
        return {}
    hot, cold, root = (config.hypervisor_setting(key) for key in ("hot_plug_vfio", "cold_plug_vfio", "pcie_root_port"))
    ports = [f"hot {hot.value}" if hot.value else "", f"cold {cold.value}" if cold.value else ""]
    return {
        "path": config.place.real,
        "reason": config.place.reason,
        "runtime": config.flavour,
        "hypervisor": config.hypervisor,
        "vfio_mode": str(config.runtime_setting("vfio_mode", "guest-kernel").value),
        "enable_iommu": config.hypervisor_setting("enable_iommu", False).value is True,
        "port": ", ".join(port for port in ports if port) or (f"{root.value} root ports" if root.value else "-"),
    }
