# SPDX-License-Identifier: Apache-2.0
"""Allow device nodes in a container's cgroup: plan, allow, disallow, and explain a denial.

Only the container's own cgroup is changed, and in version 2 also the systemd scope that holds nothing else. No other
ancestor in version 2 is ever changed; in version 1 only on request, because there a child cannot get an access that its
parent lacks.

The caller's order: `cgroup.find_cgroup`, `proof.verify_nodes`; if the cgroup denies a node `plan_grant`, `allow`,
`verify_nodes` again; if it is still denied `disallow`, and raise the error from `explain_denial`. guest/permits.py does
this for all claims together.
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

# Misc devices: /dev/vfio/vfio and /dev/iommu, which all containers share (include/uapi/linux/major.h).
MISC_MAJOR = 10


class Widening(Frozen):
    """An addition to a device list of version 1.

    path: the cgroup's directory; given: for each node of the grant the letters of "rw" that its entry there lacked:
    these are allowed, and denied again later.
    """

    path: str
    given: tuple[str, ...]


class Grant(Frozen):
    """The nodes to allow, and the cgroups in which; known before any change, so that the undo log can record it.

    nodes: major and minor of each; unified: version 2 directory or ""; devices: of version 1, from the top down:
    ancestors to widen and at last the container's own.
    """

    tag = "grant"

    nodes: tuple[Numbers, ...]
    unified: str
    devices: tuple[Widening, ...]

    def find_given(self, path: str, numbers: Numbers) -> str:
        """Return the letters that a grant adds for a node in a directory of version 1; "" for nothing."""
        locations = [widening.given for widening in self.devices if widening.path == path]
        return dict(zip(self.nodes, locations[0])).get(numbers, "") if locations else ""

    def without(self, gone: Collection[Numbers]) -> Grant:
        """Return the grant without some nodes."""
        kept = [index for index, numbers in enumerate(self.nodes) if numbers not in gone]
        devices = [Widening(each.path, tuple(each.given[index] for index in kept)) for each in self.devices]
        return Grant(tuple(self.nodes[index] for index in kept), self.unified, tuple(devices))


def format_grant(grant: Grant) -> tuple[str, str, str]:
    """Return a grant as the words of an undo log's entry."""
    nodes = ",".join(f"{major}:{minor}" for major, minor in grant.nodes)
    return nodes, grant.unified, "\n".join(f"{','.join(each.given)} {each.path}" for each in grant.devices)


def parse_grant(entry: Entry) -> Grant:
    """Return the grant in an undo log's entry. Raises ValueError if it has none."""
    nodes = parse_numbers(entry.words[0])
    devices = []
    for line in entry.words[2].split("\n") if entry.words[2] else ():
        given, _, path = line.partition(" ")
        letters = tuple(given.split(","))
        if len(letters) != len(nodes) or not path or any(set(each) - set(ACCESS) for each in letters):
            raise ValueError(f"{line} is not a list of accesses to a cgroup")
        devices.append(Widening(path, letters))
    return Grant(nodes, entry.words[1], tuple(devices))


def parse_numbers(text: str) -> tuple[Numbers, ...]:
    """Return the device numbers in an undo log's entry. Raises ValueError."""
    pairs = (pair.split(":") for pair in text.split(","))
    return tuple((int(major), int(minor)) for major, minor in pairs)


# Records in claims ----------------------------------------------------------------------------------------------------


def list_grants(entries: Iterable[Entry], spoilt: list[Entry] | None = None) -> tuple[Grant, ...]:
    """Return a claim's grants, without what was revoked since. spoilt: receives the entries that cannot be read."""
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
    """Return the device numbers that a claim has for itself, allowed or not, without what was revoked since."""
    found: set[Numbers] = set()
    for entry in entries:
        if entry.kind in ("numbers", "permit", "revoked"):
            try:
                numbers = parse_numbers(entry.words[0])
            except ValueError:
                continue
            found = found.difference(numbers) if entry.kind == "revoked" else found.union(numbers)
    return {numbers for numbers in found if numbers[0] != MISC_MAJOR}


# Allowing -------------------------------------------------------------------------------------------------------------


def plan_grant(
    root: Root,
    cgroup: Cgroup,
    nodes: Iterable[MadeNode],
    widen_parents: bool = False,
    others: tuple[Grant, ...] = (),
    opened: Mapping[Numbers, str] | None = None,
) -> Grant:
    """Return the grant that is needed. Changes nothing. Raises StepError if it must not be made.

    nodes: those that are denied now; widen_parents: in version 1, also allow them in each ancestor that lacks them (a
    pod's cgroup inside its own virtual machine; on a shared machine that is not the hook's decision); others: other
    containers' grants; opened: the letters of "rw" that the container's own cgroup of version 1 allows, if it allows by
    default, so that its list does not show it (`is_open_list`).
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
    """Return the additions that nodes need in a directory of version 1. others, opened: as of `plan_grant`."""
    rules = read_rules(root, path)
    given = []
    for node in nodes:
        numbers = (node.major, node.minor)
        # Letters that other containers' grants added are not original: the last of these containers removes them.
        shared = [grant.find_given(path, numbers) for grant in others]
        missing = find_missing(rules, node)
        if opened is not None and permits_by_default(rules):
            missing = remove_letters(ACCESS, opened.get(numbers, ""))
        given.append(max(shared, default="") or missing)
    return Widening(path, tuple(given))


def is_open_list(root: Root, cgroup: Cgroup) -> bool:
    """Return whether the container's own cgroup is one of version 1 that allows by default."""
    has_own = cgroup.devices not in ("", *cgroup.shared)
    return has_own and permits_by_default(read_rules(root, cgroup.devices))


@step("allow")
def allow(root: Root, grant: Grant, note: Callable[[], object] = lambda: None) -> None:
    """Allow reading and writing of exactly these nodes. Idempotent. Raises StepError.

    note: called when all is prepared, before the first change: a failure before that has changed nothing.
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
    """Revoke a grant, complete or incomplete, made by this process or another. Raises StepError, after trying all.

    others: other containers' grants, which are kept in directories that they share. A cgroup that is gone needs no
    change.
    """
    errors = []
    for widening in reversed(grant.devices):
        for numbers, access in zip(grant.nodes, widening.given):
            if access and not any(other.find_given(widening.path, numbers) for other in others):
                try:
                    deny_node(root, widening.path, numbers, access)
                except StepError as error:
                    errors.append(error)
    # Even if another process has entered the scope meanwhile: the nodes that were added are removed.
    for path in list_filtered(grant):
        kept = {numbers for other in others if path in list_filtered(other) for numbers in other.nodes}
        try:
            remove_from_filter(root, path, tuple(numbers for numbers in grant.nodes if numbers not in kept))
        except StepError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def list_filtered(grant: Grant) -> tuple[str, ...]:
    """Return the version 2 directories whose device filters a grant may have changed."""
    return (grant.unified, *list_scope_ancestors(grant.unified)) if grant.unified else ()


def remove_from_filter(root: Root, path: str, nodes: tuple[Numbers, ...]) -> None:
    """Remove nodes from the device filter of one cgroup, if that still exists. Raises StepError."""
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
    """Return the error for nodes that do not open from inside the cgroup although all steps were done."""
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
    """Return a description of a check's result."""
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
