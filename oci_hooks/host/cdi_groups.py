# SPDX-License-Identifier: Apache-2.0
"""Find the groups of this host that a CDI file can offer, apply --select, and report why a group cannot be passed."""

from __future__ import annotations

from oci_hooks.findings import Finding, InputError
from oci_hooks.frozen import Frozen
from oci_hooks.host import checks
from oci_hooks.host.survey import make_entry, make_line, make_no_runtime
from oci_hooks.host.targets import Target
from oci_hooks.linux.pci import DeviceReader, is_class, is_id, normalize_address, read_numbers
from oci_hooks.linux.vfio import CDEV_CLASS, list_groups
from oci_hooks.oci import CDEV_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.survey import GroupLine
    from oci_hooks.linux.holders import HolderFinder
    from oci_hooks.linux.vfio import Member, VfioGroup
    from oci_hooks.system import Root

SYNTAX = "give a group's number, an address (0000:3b:00.0), id:8086:10d3 or class:0200; several with commas"


class Choice(Frozen):
    """One item of --select. kind: "group", "address", "id" or "class"; value: the value that a device must match."""

    kind: str
    value: str

    def fits(self, group: VfioGroup) -> bool:
        """Return whether this item selects a group, or a device in it that can be passed."""
        if self.kind == "group":
            return group.name == self.value
        return any(self.fits_member(member) for member in group.passable)

    def fits_member(self, member: Member) -> bool:
        """Return whether this item selects a device."""
        if self.kind == "address":
            return member.name.lower() == self.value
        if member.pci is None:
            return False
        if self.kind == "id":
            return f"{member.pci.id}:".startswith(f"{self.value}:")
        return member.pci.class_code.startswith(self.value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}" if self.kind in ("id", "class") else self.value


class Offer(Frozen):
    """A group of this host in the form in which a CDI file offers it.

    line: the group, its state and the processes that use it, as in the survey; nodes: path of the device node that each
    passable member needs, by the member's name; obstacles: why the group cannot be passed, empty if it can.
    """

    line: GroupLine
    nodes: dict[str, str]
    obstacles: tuple[Finding, ...]

    @property
    def group(self) -> VfioGroup:
        """The group itself."""
        return self.line.group

    @property
    def is_prepared(self) -> bool:
        """Return whether a member is bound to a VFIO driver."""
        return any(member.viability == "vfio" for member in self.group.members)


# Selection ------------------------------------------------------------------------------------------------------------


def parse_choices(texts: tuple[str, ...]) -> tuple[Choice, ...]:
    """Return the items in the values of --select. Raises InputError [bad-arguments]."""
    return tuple(parse_choice(word.strip()) for text in texts for word in text.split(","))


def parse_choice(text: str) -> Choice:
    """Return the item that one word of --select names. Raises InputError [bad-arguments]."""
    kind, _, value = text.lower().partition(":")
    if text.isascii() and text.isdigit():
        return Choice("group", text)
    if kind == "id" and is_id(value):
        return Choice("id", value)
    if kind == "class" and is_class(value):
        return Choice("class", value)
    # An address may be written as lspci, nvidia-smi or a person writes it; a mediated device has a UUID.
    if text and kind not in ("id", "class") and set(text) & set(":.-") and not set(text) & set("/= \t"):
        return Choice("address", normalize_address(text) or text.lower())
    raise InputError("bad-arguments", f"--select {text}", "is neither a group nor a device", SYNTAX)


def find_unmatched(choices: tuple[Choice, ...], offers: tuple[Offer, ...]) -> tuple[Finding, ...]:
    """Return a finding for each item of --select that matches no group of this host."""
    hint = "list what there is: vfio-host-check --cdi list"
    return tuple(
        Finding("error", "group-missing", f"--select {choice}", "no group of this host matches", hint)
        for choice in choices
        if not any(choice.fits(offer.group) for offer in offers)
    )


# Offers ---------------------------------------------------------------------------------------------------------------


def list_offers(root: Root, cdev: bool, finder: HolderFinder) -> tuple[Offer, ...]:
    """Return every IOMMU group as an offer, in the order of their numbers. Opens no group.

    cdev: use the devices' own nodes instead of the group's node.
    """
    holders = finder.find_all()
    lines = (make_line(root, group, holders) for group in list_groups(root, DeviceReader(root)))
    return tuple(make_offer(root, line, cdev) for line in lines)


def make_offer(root: Root, line: GroupLine, cdev: bool) -> Offer:
    """Return one group as an offer."""
    group = line.group
    nodes = find_cdevs(root, group) if cdev else {member.name: group.node for member in group.passable}
    return Offer(line, nodes, find_obstacles(root, group, nodes, cdev))


def find_cdevs(root: Root, group: VfioGroup) -> dict[str, str]:
    """Return the members' own device nodes, where they exist: {"0000:3b:00.0": "/dev/vfio/devices/vfio0"}.

    Linux 6.1 to 6.5, and any kernel without VFIO_DEVICE_CDEV, have the name in sysfs, but no device number for a node.
    """
    nodes: dict[str, str] = {}
    for member in group.passable:
        for node in checks.list_device_nodes(root, group, member):
            if read_numbers(root, f"{CDEV_CLASS}/{node[len(CDEV_PREFIX) :]}"):
                nodes.setdefault(member.name, node)
    return nodes


def find_obstacles(root: Root, group: VfioGroup, nodes: dict[str, str], cdev: bool) -> tuple[Finding, ...]:
    """Return one error for each reason why a group cannot be passed; empty if it can."""
    some_cdev = next(iter(nodes.values())).rpartition("/")[2] if cdev and nodes else ""
    target = Target(make_entry(group), group, some_cdev, "numbers")
    noiommu = checks.check_noiommu(target, make_no_runtime())
    found = noiommu or checks.check_empty(target) or checks.check_viability(target)
    if not found and cdev and not nodes:
        found = report_no_cdev(group)
    if not found:
        found = find_missing_nodes(root, group, nodes)
    return tuple(finding.replace(level="error") for finding in found)


def report_no_cdev(group: VfioGroup) -> tuple[Finding, ...]:
    """cdev-missing: the kernel creates no nodes for single devices."""
    problem = f"its devices have no nodes in {CDEV_PREFIX[:-1]}"
    hint = "leave out --cdev, or boot Linux 6.6 or later with CONFIG_VFIO_DEVICE_CDEV"
    return (Finding("error", "cdev-missing", f"group {group.name}", problem, hint),)


def find_missing_nodes(root: Root, group: VfioGroup, nodes: dict[str, str]) -> tuple[Finding, ...]:
    """group-missing: the kernel has the group, but /dev has no node, which engines look up there."""
    missing = [node for node in dict.fromkeys(nodes.values()) if not root.exists(node)]
    hint = "create it: udevadm trigger --action=add --subsystem-match=vfio"
    return tuple(
        Finding("error", "group-missing", f"group {group.name}", f"{node} is not on the host", hint) for node in missing
    )


def report_offers(offers: tuple[Offer, ...], choices: tuple[Choice, ...]) -> list[Finding]:
    """Return the findings on groups.

    choices: the items of --select. A group selected by its number or by a device's address is an error if it cannot be
    passed. Other groups that cannot be passed are skipped: with a warning if a member is bound to a VFIO driver or the
    group is a no-IOMMU group, else silently.
    """
    named = tuple(choice for choice in choices if choice.kind in ("group", "address"))
    findings: list[Finding] = []
    for offer in offers:
        if any(choice.fits(offer.group) for choice in named):
            findings += offer.obstacles
        elif offer.is_prepared or offer.group.noiommu:
            findings += [finding.replace(level="warning") for finding in offer.obstacles]
        if offer.line.holders and not offer.obstacles:
            held_by = ", ".join(str(holder) for holder in offer.line.holders)
            problem = f"is in use by {held_by}"
            hint = "it is in the CDI file; a container that requests it now fails, unless that process ends first"
            findings.append(Finding("warning", "group-busy", f"group {offer.group.name}", problem, hint))
    return findings
