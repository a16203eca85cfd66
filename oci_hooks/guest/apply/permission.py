# SPDX-License-Identifier: Apache-2.0
"""Allow device nodes in a container's cgroup: plan, allow, disallow, and explain a denial.

What is widened is the container's own cgroup, with version 2 also the systemd scope that holds nothing but it. No other
ancestor of version 2 ever is; one of version 1 only when asked for, because there a child can't get what its parent
lacks.

The caller's order: `cgroup.find_cgroup`, `proof.verify_nodes`; if the cgroup denies a node `plan_grant`, `allow`,
`verify_nodes` again; if it is still denied `disallow`, and raise what `explain_denial` returns. guest/permits.py does
it for all claims together.
"""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import StepError
from oci_hooks.frozen import Frozen
from oci_hooks.guest.apply.cgroup import (
    ACCESS,
    Cgroup,
    MadeNode,
    NodeCheck,
    list_cgroup_ancestors,
    list_container_cgroups,
    list_scope_ancestors,
    permit_failed,
)
from oci_hooks.guest.apply.device_filter import Replacements, add_nodes, find_programs_above, remove_nodes
from oci_hooks.guest.apply.device_list import (
    allow_node,
    deny_node,
    find_missing,
    permits_by_default,
    read_rules,
    remove_letters,
)
from oci_hooks.system import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from oci_hooks.guest.apply.bpf_program import Numbers
    from oci_hooks.guest.undo_log import Entry
    from oci_hooks.system import Root

# Misc devices: /dev/vfio/vfio and /dev/iommu, which are every container's (include/uapi/linux/major.h).
MISC_MAJOR = 10


class Widening(Frozen):
    """What a grant adds to a device list of version 1. path: the cgroup's directory; given: for each node of the grant
    what its entry there lacked, of "rw": this is given, and taken back."""

    path: str
    given: tuple[str, ...]


class Grant(Frozen):
    """What to permit and where: known before anything is done, so that it can stand in a journal.

    nodes: major and minor of each; unified: version 2 directory or ""; devices: of version 1, from the top down:
    ancestors to widen and at last the container's own.
    """

    tag = "grant"

    nodes: tuple[Numbers, ...]
    unified: str
    devices: tuple[Widening, ...]

    def find_given(self, path: str, numbers: Numbers) -> str:
        """Return what a node is given in a directory of version 1; "" for nothing."""
        locations = [widening.given for widening in self.devices if widening.path == path]
        return dict(zip(self.nodes, locations[0])).get(numbers, "") if locations else ""

    def without(self, gone: Collection[Numbers]) -> Grant:
        """Return the grant but for some nodes."""
        kept = [index for index, numbers in enumerate(self.nodes) if numbers not in gone]
        devices = [Widening(each.path, tuple(each.given[index] for index in kept)) for each in self.devices]
        return Grant(tuple(self.nodes[index] for index in kept), self.unified, tuple(devices))


def format_grant(grant: Grant) -> tuple[str, str, str]:
    """Return a grant as the words of a journal entry."""
    nodes = ",".join(f"{major}:{minor}" for major, minor in grant.nodes)
    return nodes, grant.unified, "\n".join(f"{','.join(each.given)} {each.path}" for each in grant.devices)


def parse_grant(entry: Entry) -> Grant:
    """Return the grant that a journal entry notes. Raises ValueError where it notes none."""
    nodes = parse_numbers(entry.words[0])
    devices = []
    for line in entry.words[2].split("\n") if entry.words[2] else ():
        given, _, path = line.partition(" ")
        letters = tuple(given.split(","))
        if len(letters) != len(nodes) or not path or any(set(each) - set(ACCESS) for each in letters):
            raise ValueError(f"{line} is no list of what a cgroup allows")
        devices.append(Widening(path, letters))
    return Grant(nodes, entry.words[1], tuple(devices))


def parse_numbers(text: str) -> tuple[Numbers, ...]:
    """Return the device numbers that a journal entry lists. Raises ValueError."""
    pairs = (pair.split(":") for pair in text.split(","))
    return tuple((int(major), int(minor)) for major, minor in pairs)


# What claims note ----------------------------------------------------------------------------------------------------


def list_grants(entries: Iterable[Entry], spoilt: list[Entry] | None = None) -> tuple[Grant, ...]:
    """Return what a claim permits, without what was revoked since. spoilt: gets the entries that can't be read."""
    grants: list[Grant] = []
    for entry in entries:
        try:
            if entry.kind == "permit":
                grants.append(parse_grant(entry))
            elif entry.kind == "revoked":
                gone = parse_numbers(entry.words[0])
                grants = [grant.without(gone) for grant in grants]
        except ValueError:
            if spoilt is not None:
                spoilt.append(entry)
    return tuple(grant for grant in grants if grant.nodes)


def list_numbers(entries: Iterable[Entry]) -> set[Numbers]:
    """Return the device numbers that a claim has for itself, permitted or not, without what was revoked since."""
    found: set[Numbers] = set()
    for entry in entries:
        if entry.kind in ("numbers", "permit", "revoked"):
            try:
                numbers = parse_numbers(entry.words[0])
            except ValueError:
                continue
            found = found.difference(numbers) if entry.kind == "revoked" else found.union(numbers)
    return {numbers for numbers in found if numbers[0] != MISC_MAJOR}


# Permitting -----------------------------------------------------------------------------------------------------------


def plan_grant(
    root: Root,
    cgroup: Cgroup,
    nodes: Iterable[MadeNode],
    widen_parents: bool = False,
    others: tuple[Grant, ...] = (),
    opened: Mapping[Numbers, str] | None = None,
) -> Grant:
    """Return what has to be permitted where. Changes nothing. Raises StepError where it must not be done.

    nodes: those that are not permitted now; widen_parents: on version 1, permit them to each ancestor that lacks them
    too (a pod's cgroup inside its own virtual machine; on a shared machine that is not the hook's to decide); others:
    what other containers were given; opened: what of "rw" the container's own cgroup of version 1 permits, where it
    permits by default, so that its list does not show it (`is_open_list`).
    """
    wanted = tuple(nodes)
    own = [location for location in (cgroup.unified, cgroup.devices) if location and location not in cgroup.shared]
    if cgroup.shared and not own:
        problem = "the container shares this cgroup with other processes; refusing to allow devices there"
        raise permit_failed(cgroup.shared[0], problem, wanted)
    devices: list[Widening] = []
    if cgroup.devices in own:
        if widen_parents:
            ancestors = list_cgroup_ancestors(cgroup.devices, cgroup.devices_mount)
            planned = (plan_widening(root, path, wanted, others, None) for path in ancestors)
            devices += [widening for widening in planned if any(widening.given)]
        devices.append(plan_widening(root, cgroup.devices, wanted, others, opened))
    numbers = tuple((node.major, node.minor) for node in wanted)
    return Grant(numbers, cgroup.unified if cgroup.unified in own else "", tuple(devices))


def plan_widening(
    root: Root, path: str, nodes: tuple[MadeNode, ...], others: tuple[Grant, ...], opened: Mapping[Numbers, str] | None
) -> Widening:
    """Return what nodes have to be given in a directory of version 1. others, opened: as of `plan_grant`."""
    rules = read_rules(root, path)
    given = []
    for node in nodes:
        numbers = (node.major, node.minor)
        # What another container was given is not what was there: the last of them takes it back.
        shared = [grant.find_given(path, numbers) for grant in others]
        missing = find_missing(rules, node)
        if opened is not None and permits_by_default(rules):
            missing = remove_letters(ACCESS, opened.get(numbers, ""))
        given.append(max(shared, default="") or missing)
    return Widening(path, tuple(given))


def is_open_list(root: Root, cgroup: Cgroup) -> bool:
    """Check whether the container's own cgroup is one of version 1 that permits by default."""
    has_own = cgroup.devices not in ("", *cgroup.shared)
    return has_own and permits_by_default(read_rules(root, cgroup.devices))


@step("allow")
def allow(root: Root, grant: Grant, note: Callable[[], object] = lambda: None) -> None:
    """Permit reading and writing of exactly these nodes. Doing it twice is doing it once. Raises StepError.

    note: called when all is ready, before the first change: what fails before that has changed nothing.
    """
    with Replacements(root, add_nodes) as swaps:
        for path in list_container_cgroups(root, grant.unified):
            swaps.prepare(path, grant.nodes)
        note()
        for widening in grant.devices:
            for numbers, access in zip(grant.nodes, widening.given):
                if access:
                    allow_node(root, widening.path, numbers, access)
        swaps.replace_all()


@step("disallow")
def disallow(root: Root, grant: Grant, others: tuple[Grant, ...] = ()) -> None:
    """Take a permission back, whole or half given, by this process or another. Raises StepError, after trying all.

    others: what other containers were given, and so keep, where a directory is theirs too. A cgroup that is gone is as
    good as done.
    """
    errors = []
    for widening in reversed(grant.devices):
        for numbers, access in zip(grant.nodes, widening.given):
            if access and not any(other.find_given(widening.path, numbers) for other in others):
                try:
                    deny_node(root, widening.path, numbers, access)
                except StepError as error:
                    errors.append(error)
    # Whoever else came into the scope meanwhile: what was added is taken away.
    for path in list_filtered(grant):
        kept = {numbers for other in others if path in list_filtered(other) for numbers in other.nodes}
        try:
            remove_from_filter(root, path, tuple(numbers for numbers in grant.nodes if numbers not in kept))
        except StepError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def list_filtered(grant: Grant) -> tuple[str, ...]:
    """Return the directories of version 2 that a grant may have changed the device filters of."""
    return (grant.unified, *list_scope_ancestors(grant.unified)) if grant.unified else ()


def remove_from_filter(root: Root, path: str, nodes: tuple[Numbers, ...]) -> None:
    """Take nodes out of the device filter of one cgroup, if that is still there. Raises StepError."""
    if not nodes or not root.exists(path):
        return
    with Replacements(root, remove_nodes) as swaps:
        try:
            swaps.prepare(path, nodes)
            swaps.replace_all()
        except StepError:
            if root.exists(path):
                raise


# Explaining -----------------------------------------------------------------------------------------------------------


def explain_denial(root: Root, cgroup: Cgroup, checks: Iterable[NodeCheck]) -> StepError:
    """Return the error for nodes that don't open from inside the cgroup although everything was done for it."""
    bad = [check for check in checks if check.error or not check.is_viable]
    problem = "; ".join(describe_check(check) for check in bad)
    denied = [check.node for check in bad if check.is_denied]
    above = find_programs_above(root, cgroup) if denied and cgroup.unified else []
    own = list_container_cgroups(root, cgroup.unified)
    above = [path for path in above if path not in own]
    if above:
        problem += f" (the parent cgroup {above[0]} has a device filter of its own, which the hook does not change)"
    return permit_failed(cgroup.unified or cgroup.devices or f"process {cgroup.pid}", problem, denied)


def describe_check(check: NodeCheck) -> str:
    """Return in words what a proof came to."""
    path = f"/dev/{check.node.name}"
    if not check.error:
        return f"can open {path}" if check.is_viable else f"can open {path}, but its group is not viable"
    words = {
        errno.EPERM: "denied by the cgroup's device rules"
        + (" or for want of CAP_SYS_RAWIO" if check.node.is_noiommu else ""),
        errno.EACCES: "denied by its mode, a nodev mount or a security module",
        errno.EBUSY: "another process has it open",
        errno.ENOENT: "it does not exist",
        errno.ENODEV: "it is the node of another device, or its device is gone",
        errno.ENXIO: "its device does not exist",
    }
    return f"cannot open {path} from this cgroup: {words.get(check.error, os.strerror(check.error))}"
