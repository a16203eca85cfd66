# SPDX-License-Identifier: Apache-2.0
"""Look at this guest for the survey: what `auto` would take, what it leaves out and why, and what is missing.

The answers are those of the functions that decide in a run: make_candidates, choose_groups, list_obstacles and
check_group_available. What this user may not read becomes a finding.
"""

from __future__ import annotations

import os

from oci_hooks.findings import Finding, Refusal
from oci_hooks.frozen import Frozen
from oci_hooks.guest import ownership, selection
from oci_hooks.guest.candidates import VIOMMU_HINT, Candidates
from oci_hooks.guest.claims import ClaimDirectory, make_claim
from oci_hooks.guest.decision import make_candidates
from oci_hooks.guest.request import Request, Selector
from oci_hooks.guest.settings import GUEST_SETTINGS
from oci_hooks.guest.survey_kernel import check_facts, read_facts
from oci_hooks.linux import pci
from oci_hooks.linux.usage import UsageFinder
from oci_hooks.linux.vfio import Member, VfioGroup, classify_pci, read_member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from oci_hooks.guest.claims import Claim
    from oci_hooks.guest.settings import GuestSettings
    from oci_hooks.guest.survey_kernel import GuestFacts
    from oci_hooks.linux.pci import IommuGroup, PciDevice
    from oci_hooks.program import Run
    from oci_hooks.system import Deadline, Root

    T = TypeVar("T")

ROOT_HINT = "run it as root, with the guest's /sys, /proc and /run"
# Whose a device may be where this user cannot read the claims.
UNKNOWN = "(claims are not readable)"
# How a guard refuses a group that a container names, in the survey's words.
GUARDS = {"claimed": "claimed", "bridge": "bridges only", "in-use": "in use"}


class GroupLine(Frozen):
    """A group in the listing, or a device without one.

    state: "free" (auto takes it), "by name only", "claimed", "in use", "bridges only", "no IOMMU", "no PCI device";
    container: whose it is, "" for nobody's; reasons: why `auto` does not take it, as of selection.list_obstacles.
    """

    group: VfioGroup
    state: str
    container: str
    reasons: tuple[tuple[str, str], ...]


class ClaimLine(Frozen):
    """A claim in the listing. state: "held", "hook at work", "ended" (the next hook undoes it), "unreadable"."""

    claim: Claim
    state: str


class Picture(Frozen):
    """What the survey found. settings: path of the file in force, "" without one; auto: groups that `auto` takes."""

    lines: tuple[GroupLine, ...]
    claims: tuple[ClaimLine, ...]
    facts: GuestFacts
    settings: str
    auto: tuple[str, ...]


class CheckedUses:
    """The uses of devices, each looked for once. What cannot be checked is in use, as it is in a run, which fails.

    deadline: of the run; half of what is left is spent on looking for open device nodes.
    """

    def __init__(self, root: Root, deadline: Deadline) -> None:
        self.finder = UsageFinder(root, deadline)
        self.answers: dict[str, list[str]] = {}

    def find(self, device: PciDevice) -> list[str]:
        """Return why a device must not be touched, in words; empty where it is free."""
        if device.address not in self.answers:
            try:
                self.answers[device.address] = self.finder.find(device)
            except OSError as error:
                self.answers[device.address] = [describe_failure(error)]
        return self.answers[device.address]


def look_around(run: Run, settings: GuestSettings) -> Picture:
    """Return what there is in this guest, and report what is wrong with it."""
    root, findings = run.root, run.findings
    if os.geteuid() != 0:
        problem = "is not run by root: claims, and the device nodes that other users have open, are not all readable"
        findings.append(Finding("warning", "check-failed", "this survey", problem, ROOT_HINT))
    nobody: tuple[ClaimLine, ...] = ()
    directory = ClaimDirectory(root=root)
    claims = try_reading(findings, "claims", None, read_claims, directory)
    findings += check_claims(claims or nobody)
    held = [line.claim for line in claims or nobody if line.state != "ended"]
    if claims is None:
        # As an unreadable claim: what is bound to vfio-pci may belong to a container.
        held = [make_claim(directory.path, [], False).replace(container=UNKNOWN, problem="cannot be read")]
    uses = CheckedUses(root, run.deadline).find
    nothing = Candidates(pci.Inventory({}, {}), {}, {}, uses)
    candidates = try_reading(findings, "PCI devices", nothing, make_candidates, root, settings, held, "", uses)
    auto, refusal = choose_auto(candidates)
    findings += refusal
    findings += find_bare(candidates)
    lines = list_lines(root, candidates, auto, list_members(root, findings))
    facts = read_facts(root)
    findings += check_facts(facts)
    path = run.arguments.settings or (GUEST_SETTINGS if root.exists(GUEST_SETTINGS) else "")
    return Picture(lines, claims or nobody, facts, path, auto)


def try_reading(findings: list[Finding], subject: str, default: T, read: Callable[..., T], *values: object) -> T:
    """Return what a function reads; the default, and a finding added, where the system does not allow that."""
    try:
        return read(*values)
    except OSError as error:
        findings.append(Finding("warning", "check-failed", subject, describe_failure(error), ROOT_HINT))
        return default


def describe_failure(error: OSError) -> str:
    """Return that something cannot be read, in words that follow its name."""
    return f"cannot be checked: {error.filename or 'a system call'}: {error.strerror or error}"


# Claims --------------------------------------------------------------------------------------------------------------


def read_claims(directory: ClaimDirectory) -> tuple[ClaimLine, ...]:
    """Return every claim and whether it holds. Raises OSError."""
    return tuple(ClaimLine(claim, describe_claim(directory.root, claim)) for claim in directory.read_claims())


def describe_claim(root: Root, claim: Claim) -> str:
    """Return a claim's state in one or two words."""
    if claim.problem:
        return "unreadable"
    if claim.at_work:
        return "hook at work"
    return "ended" if claim.is_stale(root) else "held"


def check_claims(lines: tuple[ClaimLine, ...]) -> list[Finding]:
    """Return what is wrong with claims: those that cannot be read, and those that are over."""
    findings = []
    for line in lines:
        if line.state == "unreadable":
            findings.append(ownership.warn_unreadable(line.claim))
        elif line.state == "ended":
            groups = f"group {', '.join(line.claim.groups)}" if line.claim.groups else "no group"
            problem = f"has ended, or its hook was killed, and has left a claim on {groups}"
            hint = "the next run of the hook that binds devices in this guest restores them first"
            findings.append(Finding("info", "claim-stale", f"container {line.claim.container}", problem, hint))
    return findings


# What auto takes -----------------------------------------------------------------------------------------------------


def choose_auto(candidates: Candidates) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
    """Return the groups that a container with the annotation `auto` would get now, or why it would get none.

    That no group is free is no error where other containers have groups: this guest has done its work.
    """
    try:
        choices = selection.choose_groups(Request("this guest", (Selector("auto", "auto"),)), candidates)
    except Refusal as refusal:
        is_used_up = bool(candidates.claims) and isinstance(refusal, selection.NotAvailableYet)
        level = "info" if is_used_up else "error"
        return (), tuple(finding.replace(level=level) for finding in refusal.findings)
    return tuple(chosen.group.name for chosen in choices), ()


def find_bare(candidates: Candidates) -> list[Finding]:
    """Return a warning for each device that a container could ask for and that alone has no IOMMU group."""
    if not candidates.inventory.groups:
        return []
    return [
        Finding("warning", "viommu-off", device.address, selection.NO_GROUP, VIOMMU_HINT)
        for device in candidates.inventory.devices.values()
        if not (device.group or device.is_bridge or selection.find_never_rule(device, candidates))
    ]


# Groups --------------------------------------------------------------------------------------------------------------


def list_members(root: Root, findings: list[Finding]) -> dict[str, list[str]]:
    """Return the names of all devices in each IOMMU group, on whatever bus. What is unreadable becomes a finding."""
    groups: list[str] = []
    groups = try_reading(findings, "IOMMU groups", groups, root.list_names, pci.IOMMU_GROUPS)
    nobody: list[str] = []
    return {
        name: try_reading(findings, f"group {name}", nobody, root.list_names, f"{pci.IOMMU_GROUPS}/{name}/devices")
        for name in groups
    }


def list_lines(
    root: Root, candidates: Candidates, auto: tuple[str, ...], members: dict[str, list[str]]
) -> tuple[GroupLine, ...]:
    """Return the groups in the order of their numbers, then the devices without one.

    auto: the groups that it takes; members: names of the devices in each IOMMU group.
    """
    inventory = candidates.inventory
    lines = [
        make_line(root, group, candidates, auto, members.get(name, [])) for name, group in inventory.groups.items()
    ]
    for name, names in members.items():
        # vfio's no-IOMMU mode makes a group for a device that is bound; the device is in the picture already.
        if name not in inventory.groups and not pci.is_noiommu_group(root, name):
            lines.append(make_foreign_line(root, name, candidates, names))
    lines.sort(key=lambda line: selection.make_sort_key(line.group.name))
    bare = (device for device in inventory.devices.values() if not device.group)
    return (*lines, *(make_bare_line(root, device, candidates) for device in bare))


def make_line(
    root: Root, group: IommuGroup, candidates: Candidates, auto: tuple[str, ...], names: list[str]
) -> GroupLine:
    """Return the line of a group with PCI functions. names: of all devices in it."""
    numbers = {name: number for number, name in candidates.live.items()}
    noiommu = group.name.startswith(pci.NOIOMMU_GROUP)
    known = {device.address for device in group.members}
    members = [make_member(root, device) for device in group.members]
    members += read_others(root, candidates, group.name, [name for name in names if name not in known])
    entry = VfioGroup(group.name, "" if noiommu else group.name, numbers.get(group.name), tuple(members), noiommu)
    reasons = tuple(selection.list_obstacles(group, candidates))
    state = "free" if group.name in auto else describe_refusal(group, candidates)
    return GroupLine(entry, state, candidates.claims.get(group.name, ""), reasons)


def read_others(root: Root, candidates: Candidates, group: str, names: list[str]) -> list[Member]:
    """Return the devices of a group that are no PCI functions, or have gone meanwhile."""
    directory = f"{pci.IOMMU_GROUPS}/{group}/devices"
    return [read_member(root, candidates.inventory.devices, f"{directory}/{name}", name) for name in names]


def describe_refusal(group: IommuGroup, candidates: Candidates) -> str:
    """Return the state of a group that `auto` does not take, by what the guards answer to a container that names it."""
    try:
        selection.check_group_available(group, candidates)
    except Refusal as refusal:
        code = refusal.findings[0].code
        return GUARDS.get(code, code)
    return "by name only"


def make_member(root: Root, device: PciDevice) -> Member:
    """Return a PCI function as a member of its group."""
    return Member(device.address, "pci", device.driver, classify_pci(root, device), device)


def make_foreign_line(root: Root, name: str, candidates: Candidates, names: list[str]) -> GroupLine:
    """Return the line of a group without a PCI function. names: of the devices in it."""
    members = tuple(read_others(root, candidates, name, names))
    group = VfioGroup(name, name, pci.read_group_number(root, name), members)
    return GroupLine(group, "no PCI device", candidates.claims.get(name, ""), (("", "contains no PCI device"),))


def make_bare_line(root: Root, device: PciDevice, candidates: Candidates) -> GroupLine:
    """Return the line of a PCI function that has no group."""
    reasons = [selection.NO_GROUP]
    if not device.is_bridge:
        reasons += selection.list_device_obstacles(device, candidates)
    group = VfioGroup("", "", None, (make_member(root, device),))
    return GroupLine(group, "no IOMMU", "", tuple((device.address, reason) for reason in reasons))
