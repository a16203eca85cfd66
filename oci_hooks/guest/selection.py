# SPDX-License-Identifier: Apache-2.0
"""Choose the IOMMU groups that a container gets, from its request and the inventory of the machine, or refuse. Pure.

The rules (docs/reference/annotations.md): what the annotation names outright; else linux.devices by their numbers, and
the rest by counting. A group is taken whole or not at all.
"""

from __future__ import annotations

from oci_hooks.findings import Refusal
from oci_hooks.frozen import Frozen
from oci_hooks.guest.request import matches, split_path
from oci_hooks.linux.pci import NOIOMMU_GROUP, NOIOMMU_PREFIX
from oci_hooks.oci import DEVICES_ANNOTATION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from oci_hooks.guest.candidates import Candidates
    from oci_hooks.guest.request import Request, Selector
    from oci_hooks.linux.pci import IommuGroup, PciDevice
    from oci_hooks.oci import Device

NO_GROUP = "has no IOMMU group: no virtual IOMMU covers it"
LIST_HINT = "list the devices of this guest with: lspci -Dnnk"
POD_HINT = f"each container of a pod asks by the pod's annotation; for one container use {DEVICES_ANNOTATION}.NAME"


class NotAvailableYet(Refusal):
    """No device matches, or too few: a hot-plugged device may still arrive."""

    def after(self, seconds: float) -> Refusal:
        """Return the refusal for when nothing arrived. seconds: the time waited."""
        finding = self.findings[0]
        return Refusal(finding.code, finding.subject, f"{finding.problem}; waited {seconds:.1f} s for it", finding.hint)


class ChosenGroup(Frozen):
    """A group for the container.

    entry: the matching linux.devices entry, if known; host_addresses: guest BDF -> BDF on the host; drivers_before:
    guest BDF -> driver before an earlier run of the hook bound it; cdev_entries: guest BDF -> the linux.devices entry
    that has the numbers of the device's own node.
    """

    group: IommuGroup
    entry: Device | None = None
    host_addresses: dict[str, str] = {}  # noqa: RUF012 - never changed
    drivers_before: dict[str, str] = {}  # noqa: RUF012 - never changed
    cdev_entries: dict[str, Device] = {}  # noqa: RUF012 - never changed


def choose_groups(request: Request, candidates: Candidates) -> tuple[ChosenGroup, ...]:
    """Return the groups that the container gets, in the order of their names.

    Raises NotAvailableYet if something is missing that may still arrive, Refusal if it is there but unavailable.
    """
    choices = choose_named(request, candidates) if request.selectors else choose_listed(request, candidates)
    for chosen in choices.values():
        check_group_available(chosen.group, candidates)
    return tuple(choices[name] for name in sorted(choices, key=make_sort_key))


def make_sort_key(name: str) -> tuple[int, str]:
    """Return a key that sorts group names as numbers."""
    return (int(name) if name.isdigit() else 1 << 62, name)


# By the annotation ---------------------------------------------------------------------------------------------------


def choose_named(request: Request, candidates: Candidates) -> dict[str, ChosenGroup]:
    """Return the groups of the devices that the annotation names, by the group's name."""
    choices: dict[str, ChosenGroup] = {}
    entries = iter(request.entries)
    for selector in request.selectors:
        if selector.kind == "auto":
            groups = find_candidates(candidates)
            if not groups:
                check_iommu(candidates)
                problem = f"auto matches no free device{format_rejected(candidates)}{explain_no_iommu(candidates)}"
                hint = POD_HINT if candidates.is_pods and candidates.claims else LIST_HINT
                raise NotAvailableYet("nothing-to-take", request.source, problem, choose_hint(candidates, hint))
            devices = [group.endpoints[0] for group in groups]
        else:
            devices = find_selected(selector, request, candidates)
        for device in devices:
            if not device.group:
                raise Refusal("viommu-off", device.address, NO_GROUP, candidates.viommu_hint)
            known = choices.get(device.group)
            entry = known.entry if known else next(entries, None)
            hosts = dict(known.host_addresses) if known else {}
            if selector.host_address:
                hosts[device.address] = selector.host_address
            choices[device.group] = ChosenGroup(candidates.inventory.groups[device.group], entry, hosts)
    return choices


def find_selected(selector: Selector, request: Request, candidates: Candidates) -> list[PciDevice]:
    """Return the devices that one selector of the annotation matches. Raises NotAvailableYet or Refusal."""
    found = [device for device in candidates.inventory.devices.values() if matches(selector, device)]
    if not found:
        raise NotAvailableYet(
            "no-such-device",
            request.source,
            f"{selector} matches no PCI device in this guest{format_candidates(candidates)}",
            LIST_HINT,
        )
    if selector.kind in ("address", "path"):
        for bridge in (device for device in found if device.is_bridge):
            problem = "is a bridge, which the hook never binds"
            raise Refusal("bridge", describe_device(bridge), problem, "name the device behind it")
        if len(found) > 1:
            # A path without a root complex should name one device; only the user knows which one.
            problem = f"{selector} matches several devices: {', '.join(describe_device(device) for device in found)}"
            root = ":".join([split_path(found[0].path)[0], selector.value])
            raise Refusal("ambiguous", request.source, problem, f"add the PCI root complex: path:{root}")
        return found
    # A selector by kind skips bridges and the devices of other containers.
    endpoints = [d for d in found if not d.is_bridge]
    if selector.kind == "class":
        endpoints = [d for d in endpoints if not find_never_rule(d, candidates)]
    if not endpoints:
        devices = ", ".join(describe_device(device) for device in found)
        problem = f"{selector} matches only bridges and devices reserved for the guest itself: {devices}"
        raise Refusal("never-taken", request.source, problem, "to bind one of them anyway, name it by its address")
    free = [d for d in endpoints if d.group not in candidates.claims]
    if not free:
        owner = candidates.claims[endpoints[0].group]
        hint = POD_HINT if candidates.is_pods else "select another device for each container"
        raise Refusal("claimed", describe_device(endpoints[0]), f"belongs to container {owner}", hint)
    return free


# By linux.devices ----------------------------------------------------------------------------------------------------


def choose_listed(request: Request, candidates: Candidates) -> dict[str, ChosenGroup]:
    """Return the groups that linux.devices requests, by the group's name."""
    choices: dict[str, ChosenGroup] = {}
    rest: list[Device] = []
    for entry in request.entries:
        device = find_cdev(entry, candidates)
        name = device.group if device else candidates.live.get((entry.major, entry.minor), "")
        # Numbers of another container's group match by accident (they are the host's), unless the path names the group
        # too.
        if name in candidates.inventory.groups and (name not in candidates.claims or names_group(entry, name)):
            chosen = choices.setdefault(name, ChosenGroup(candidates.inventory.groups[name], entry))
            if device:
                choices[name] = chosen.replace(cdev_entries={**chosen.cdev_entries, device.address: entry})
        else:
            rest.append(entry)
    if rest:
        choices.update(choose_by_count(request, rest, set(choices), candidates))
    return choices


def find_cdev(entry: Device, candidates: Candidates) -> PciDevice | None:
    """Return the device whose own node has an entry's path and numbers; None if the numbers are the host's."""
    address = candidates.cdevs.get((entry.major, entry.minor), "") if entry.is_cdev else ""
    return candidates.inventory.devices.get(address)


def names_group(entry: Device, name: str) -> bool:
    """Return whether an entry's path names a group's node; no-IOMMU groups and their nodes are numbered differently."""
    node = entry.path.rpartition("/")[2]
    return node == name or (node.startswith(NOIOMMU_PREFIX) and name.startswith(NOIOMMU_GROUP))


def choose_by_count(
    request: Request, entries: list[Device], taken: set[str], candidates: Candidates
) -> dict[str, ChosenGroup]:
    """Return the candidate groups if there are as many as entries with the host's numbers. Raises Refusal otherwise."""
    free_groups = [group for group in find_candidates(candidates) if group.name not in taken]
    hinted = [g for g in free_groups if any(device.address in request.hints for device in g.members)]
    known = {device.address for group in hinted for device in group.members}
    # An address that matches no candidate shows that the variables still hold the host's addresses.
    if len(free_groups) > len(entries) == len(hinted) and known.issuperset(request.hints):
        free_groups = hinted
    if len(free_groups) == len(entries):
        return {group.name: ChosenGroup(group, entry) for group, entry in zip(free_groups, entries)}
    paths = ", ".join(entry.path for entry in entries)
    if len(free_groups) > len(entries):
        problem = f"{paths} could be any of {'; '.join(describe_group(group) for group in free_groups)}"
        example = ",".join(group.endpoints[0].address for group in free_groups[: len(entries)])
        raise Refusal(
            "ambiguous", request.source, problem, f'select by annotation: "{DEVICES_ANNOTATION}": "{example}"'
        )
    check_iommu(candidates)
    found = "; ".join(describe_group(group) for group in free_groups) or "none"
    asked = f"{paths}: {format_count(len(entries), 'group')} requested"
    raise NotAvailableYet(
        "no-candidate",
        request.source,
        f"{asked}, free in this guest: {found}{format_rejected(candidates)}{explain_no_iommu(candidates)}",
        choose_hint(
            candidates,
            f'if the devices are in this guest, select by annotation: "{DEVICES_ANNOTATION}": "0000:02:00.0"',
        ),
    )


def check_iommu(candidates: Candidates) -> None:
    """Raise Refusal [viommu-off] if there are possible endpoints, but no IOMMU group at all."""
    bare = [d for d in candidates.inventory.devices.values() if not d.is_bridge and not find_never_rule(d, candidates)]
    if bare and not candidates.inventory.groups:
        subject = ", ".join(describe_device(device) for device in bare)
        raise Refusal("viommu-off", subject, "this guest has no IOMMU groups", candidates.viommu_hint)


def find_candidates(candidates: Candidates) -> list[IommuGroup]:
    """Return the unclaimed groups that may be used without being named, in the order of their numbers."""
    groups = [g for g in candidates.inventory.groups.values() if not any(True for _ in list_obstacles(g, candidates))]
    return sorted(groups, key=lambda group: make_sort_key(group.name))


def list_obstacles(group: IommuGroup, candidates: Candidates) -> Iterator[tuple[str, str]]:
    """Yield why a group is not taken without being named: (BDF, "" for the whole group; words that follow it).

    Uses cost most and come last of each device: whether there is any reason is known by the first.
    """
    owner = candidates.claims.get(group.name)
    if owner is not None:
        yield "", f"belongs to container {owner}"
    if not group.endpoints:
        yield "", "contains only bridges"
    for device in group.endpoints:
        yield from ((device.address, reason) for reason in list_device_obstacles(device, candidates))


def list_device_obstacles(device: PciDevice, candidates: Candidates) -> Iterator[str]:
    """Yield why a device is not taken without being named: never-list, settings, uses."""
    rule = find_never_rule(device, candidates)
    if rule:
        yield f"is never taken by auto ({rule} in auto.never of guest.toml)"
    if not is_auto_allowed(device, candidates):
        yield "is not in auto.ids or auto.classes of guest.toml"
    yield from candidates.uses(device)


def is_auto_allowed(device: PciDevice, candidates: Candidates) -> bool:
    """Return whether guest.toml allows `auto` and counting to use this kind of device."""
    is_confined = bool(candidates.auto_ids or candidates.auto_classes)
    is_named = device.id.startswith(candidates.auto_ids) or device.class_code.startswith(candidates.auto_classes)
    return is_named or not is_confined


def find_never_rule(device: PciDevice, candidates: Candidates) -> str:
    """Return the rule that has a device on the never-list, "" without one.

    A rule is `id:vvvv[:dddd]`, `class:cc[cccc]`, or `root:cccc` for a class on a root bus.
    """
    for rule in candidates.never:
        kind, _, prefix = rule.partition(":")
        if kind == "id" and device.id.startswith(prefix):
            return rule
        applies = kind == "class" or (kind == "root" and device.on_root_bus)
        if applies and device.class_code.startswith(prefix):
            return rule
    return ""


# Guards --------------------------------------------------------------------------------------------------------------


def check_group_available(group: IommuGroup, candidates: Candidates) -> None:
    """Raise Refusal if a group belongs to another container, or one of its devices must not be touched."""
    if group.name in candidates.claims:
        problem = f"belongs to container {candidates.claims[group.name]}"
        hint = POD_HINT if candidates.is_pods else "it becomes free when that container ends"
        raise Refusal("claimed", f"group {group.name}", problem, hint)
    if not group.endpoints:
        bridges = ", ".join(describe_device(device) for device in group.members)
        raise Refusal("bridge", f"group {group.name}", f"contains only bridges: {bridges}", "name a device behind them")
    for device in group.endpoints:
        uses = [] if device.address in candidates.forced else candidates.uses(device)
        if uses:
            rest = "" if len(group.endpoints) == 1 else f" (group {group.name} can only be bound as a whole)"
            raise Refusal("in-use", describe_device(device), "; ".join(uses) + rest, "stop using it first")


# Texts ---------------------------------------------------------------------------------------------------------------


def describe_device(device: PciDevice) -> str:
    """Return a short description of a device: address, ids, driver."""
    return f"{device.address} ({device.id}, {device.driver or 'no driver'})"


def describe_group(group: IommuGroup) -> str:
    """Return a short description of a group."""
    return f"group {group.name}: {' + '.join(describe_device(device) for device in group.endpoints)}"


def format_candidates(candidates: Candidates) -> str:
    """Return the list of candidates, to be appended to a message."""
    free = "; ".join(describe_group(group) for group in find_candidates(candidates))
    return f"; free devices: {free}" if free else "; no device is free"


def format_rejected(candidates: Candidates) -> str:
    """Return the reasons against endpoints that are not on the never-list, to be appended to a message."""
    reasons = []
    for group in sorted(candidates.inventory.groups.values(), key=lambda group: make_sort_key(group.name)):
        claim = [f"belongs to container {candidates.claims[group.name]}"] if group.name in candidates.claims else []
        for device in group.endpoints:
            if not find_never_rule(device, candidates):
                reasons += [f"{describe_device(device)} {reason}" for reason in (claim or candidates.uses(device))]
    return f" ({'; '.join(reasons)})" if reasons else ""


def explain_no_iommu(candidates: Candidates) -> str:
    """Return that there is no IOMMU group, to be appended to a message: a device that arrives now will have none."""
    return "" if candidates.inventory.groups else "; this guest has no IOMMU groups"


def choose_hint(candidates: Candidates, hint: str) -> str:
    """Return the hint, or the remedy for missing IOMMU groups."""
    return hint if candidates.inventory.groups else candidates.viommu_hint


def format_count(number: int, noun: str) -> str:
    """Return "1 group", "2 groups"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
