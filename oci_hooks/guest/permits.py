# SPDX-License-Identifier: Apache-2.0
"""Manage the device permissions of all claims: revoke only a container's own, and let no two share a device number.

Permissions are for device numbers, and for cgroups that containers may have in common:

* The kernel reuses the number of a device that is gone. A container that was allowed this number, and still has a node
with it, could open the next device. So numbers without a device are revoked before devices are bound
(`revoke_stale_numbers`), and the numbers that this container's devices get are revoked from all others right after that
(`claim_numbers`).
* A parent cgroup of version 1 that was widened stays so until no claim needs it.

The hook holds the machine-wide lock for all of this: it reads, changes and writes back the cgroups' rules, and no other
hook may do so meanwhile. An undo log records a permission before it is given, and a revocation after it was made.
"""

from __future__ import annotations

import os

from oci_hooks.findings import Finding, HookError, Refusal, StepError
from oci_hooks.guest.apply import container_dev, nodes, permission
from oci_hooks.guest.homes import list_processes
from oci_hooks.guest.undo_log import parse_instance, parse_undo_log
from oci_hooks.linux import pci
from oci_hooks.linux.instances import read_instance
from oci_hooks.oci import CDEV_PREFIX
from oci_hooks.system import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from oci_hooks.guest.apply.bpf_program import Numbers
    from oci_hooks.guest.apply.cgroup import Cgroup, MadeNode
    from oci_hooks.guest.apply.permission import Grant
    from oci_hooks.guest.claims import Claim, ClaimDirectory
    from oci_hooks.guest.homes import Home
    from oci_hooks.guest.undo_log import Entry, UndoLog
    from oci_hooks.system import Deadline, Root

DEVICES_BY_NUMBER = "/sys/dev/char"
CDEV_DIRECTORY = CDEV_PREFIX[len("/dev/") :]


def list_others(claims: Iterable[Claim], excluding: str) -> list[Claim]:
    """Return all claims but one. excluding: its path; a recording of an earlier version has it among those read."""
    return [claim for claim in claims if claim.path != excluding]


# Allowing ------------------------------------------------------------------------------------------------------------


@step("allow-nodes")
def allow_nodes(
    claims: ClaimDirectory,
    target_cgroup: Cgroup,
    denied: list[MadeNode],
    widen_parents: bool,
    opened: Mapping[Numbers, str] | None,
    undo_log: UndoLog,
    deadline: Deadline,
) -> None:
    """Allow nodes in a container's cgroup, recorded in its undo log first. Raises StepError, Refusal [lock-timeout].

    claims: of the machine; the rest as in `permission.plan_grant`.
    """
    lock = claims.lock(deadline)
    try:
        check_not_revoked(claims, undo_log, denied)
        others = list_others(claims.read_claims(undo_log.path), undo_log.path)
        check_alone(claims.root, target_cgroup, others)
        grants = read_grants(others)
        grant = permission.plan_grant(claims.root, target_cgroup, denied, widen_parents, grants, opened)
        permission.allow(claims.root, grant, lambda: undo_log.add("permit", *permission.format_grant(grant)))
    finally:
        os.close(lock)


def check_alone(root: Root, target_cgroup: Cgroup, others: Iterable[Claim]) -> None:
    """Raise StepError if a container shares its cgroup with another one, which would get the same permissions."""
    # With both hierarchies the kernel checks both, so it is enough that the container is alone in one of them.
    own = [path for path in (target_cgroup.devices, target_cgroup.unified) if path and path not in target_cgroup.shared]
    for claim in others:
        home = claim.home
        homes = ((home.unified, home.unified_inode), (home.devices, home.devices_inode))
        common = {path for path, inode in homes if path and inode in (0, pci.read_inode(root, path))}
        if own and common.issuperset(own):
            problem = f"container {claim.container} is in this cgroup too, and would get access to the same devices"
            raise StepError("permit-failed", own[0], problem, "give each container its own linux.cgroupsPath")


def check_not_revoked(claims: ClaimDirectory, undo_log: UndoLog, wanted: Iterable[MadeNode]) -> None:
    """Raise StepError if a number was revoked since it was recorded: its device is gone, and another may have it."""
    kept = permission.list_numbers(claims.read_all_entries(undo_log))
    for node in wanted:
        if node.major != permission.MISC_MAJOR and (node.major, node.minor) not in kept:
            raise explain_gone(f"/dev/{node.name}")


def explain_gone(subject: str) -> StepError:
    """Return the error for a device that was unplugged while its container was given it."""
    return StepError("device-gone", subject, "was unplugged while it was being bound", "start the container again")


# Device numbers -------------------------------------------------------------------------------------------------------


def revoke_stale_numbers(claims: ClaimDirectory, held: list[Claim], excluding: str) -> None:
    """Revoke the device numbers that no device has any more, before the kernel reuses them for another one.

    held: all claims; excluding: path of the claim whose container is about to get devices. Call it with the
    machine-wide lock held. A number that cannot be revoked is no error yet: `claim_numbers` refuses it to the next
    container.
    """
    root = claims.root
    for claim in list_others(held, excluding):
        numbers = permission.list_numbers(claim.entries)
        if not numbers or not root.exists(DEVICES_BY_NUMBER):
            continue
        dead = {(major, minor) for major, minor in numbers if not root.exists(f"{DEVICES_BY_NUMBER}/{major}:{minor}")}
        if dead:
            try:
                revoke_numbers(claims, claim, dead, held)
            except StepError:
                continue


@step("claim-numbers")
def claim_numbers(claims: ClaimDirectory, made: tuple[MadeNode, ...], undo_log: UndoLog, deadline: Deadline) -> bool:
    """Reserve device numbers for one container by revoking them from all others. Return whether any others had them.

    made: the container's nodes, whose devices are bound. The undo log records that it has these numbers. Raises
    StepError if a number cannot be revoked or may have been used, Refusal [lock-timeout].
    """
    taken = {(node.major, node.minor): node for node in made if node.major != permission.MISC_MAJOR}
    lock = claims.lock(deadline)
    try:
        others = list_others(claims.read_claims(undo_log.path), undo_log.path)
        # Record first, check afterwards: if its device goes after that, the number's next owner finds the record.
        missing = taken.keys() - permission.list_numbers(claims.read_all_entries(undo_log))
        if missing:
            undo_log.add("numbers", format_numbers(missing))
        if others:
            check_own_devices(claims.root, claims.read_entries(undo_log), taken.values())
        found: dict[Numbers, Claim] = {}
        for claim in others:
            numbers = permission.list_numbers(claim.entries).intersection(taken)
            if numbers:
                revoke_from(claims, claim, numbers, others)
                found.update(dict.fromkeys(numbers, claim))
    finally:
        os.close(lock)
    for pair, claim in found.items():
        # A group can be opened only once, so the check of the nodes finds another user. A device's own node can be
        # shared.
        if taken[pair].name.startswith(CDEV_DIRECTORY):
            problem = (
                f"has device number {format_numbers([pair])}, which was allowed to container {claim.container} too"
            )
            hint = "start the container again: the other container cannot open the device any more"
            raise StepError("numbers-reused", f"/dev/{taken[pair].name}", problem, hint)
    return bool(found)


def check_own_devices(root: Root, entries: Iterable[Entry], made: Iterable[MadeNode]) -> None:
    """Raise StepError if a container's devices are gone, so that their numbers may be another device's."""
    for entry in entries:
        if entry.kind == "device" and read_instance(root, entry.words[0]) != parse_instance(entry):
            raise explain_gone(entry.words[0])
    for node in made:
        name = node.name.rpartition("/")[2]
        target_cgroup = (
            f"/sys/class/vfio-dev/{name}" if node.name.startswith(CDEV_DIRECTORY) else f"{pci.VFIO_CLASS}/{name}"
        )
        if pci.read_numbers(root, target_cgroup) != (node.major, node.minor):
            raise explain_gone(f"/dev/{node.name}")


def revoke_from(claims: ClaimDirectory, claim: Claim, numbers: set[Numbers], all_claims: Iterable[Claim]) -> None:
    """Revoke numbers that another container needs. Raises StepError, worded for that container."""
    try:
        revoke_numbers(claims, claim, numbers, all_claims)
    except StepError as error:
        problem = f"cannot be revoked from container {claim.container}, which had it for a device that was unplugged: "
        hint = f"end container {claim.container}, then start this one again"
        subject = f"device number {format_numbers(numbers)}"
        raise StepError("permission-left", subject, problem + describe_reason(error), hint) from None


def revoke_numbers(claims: ClaimDirectory, claim: Claim, numbers: set[Numbers], all_claims: Iterable[Claim]) -> None:
    """Revoke numbers from one container: its permission, then its nodes if they can be reached. Raises StepError.

    all_claims: those that may share a cgroup directory with it.
    """
    root = claims.root
    others = read_grants(list_others(all_claims, claim.path))
    for grant in permission.list_grants(claim.entries):
        permission.disallow(root, drop_replaced(root, grant.without(set(grant.nodes) - numbers), claim.home), others)
    record_revoked(claims, claim, numbers)
    if claim.is_alive(root):
        try:
            remove_nodes(claim.entries, claim.pid, numbers)
        except OSError:
            # A node that cannot be opened is harmless, and the container may have moved it.
            return


def record_revoked(claims: ClaimDirectory, claim: Claim, numbers: set[Numbers]) -> None:
    """Record that numbers were revoked. If there is no space for that, the next hook revokes them once more."""
    try:
        claims.add_revoked(claim, format_numbers(numbers))
    except (OSError, StepError):
        # The hook at work on that claim relies on the record (`check_not_revoked`).
        if claim.at_work:
            raise


def remove_nodes(entries: Iterable[Entry], pid: int, numbers: set[Numbers]) -> None:
    """Remove a container's nodes with some device numbers. Raises OSError.

    entries: of its claim, for the nodes that were created for it; pid: its init, which is running.
    """
    for entry in entries:
        if entry.kind == "node" and (entry.number(2), entry.number(3)) in numbers:
            nodes.undo(entry, pid)
        elif entry.kind == "mount":
            remove_from_mount(entry, pid, numbers)


def remove_from_mount(entry: Entry, pid: int, numbers: set[Numbers]) -> None:
    """Remove nodes from the file system that was mounted for a container with a user namespace. Raises OSError."""
    dev = container_dev.open_dev(pid, entry.words[0])
    try:
        directory = container_dev.open_path(dev, entry.words[1])
        try:
            if not container_dev.is_guest_dev(directory):
                for name in os.listdir(directory):
                    for each in numbers:
                        container_dev.remove_node(directory, name, each)
        finally:
            os.close(directory)
    finally:
        os.close(dev)


def format_numbers(numbers: Iterable[Numbers]) -> str:
    """Return device numbers as text for undo logs and findings."""
    return ",".join(f"{major}:{minor}" for major, minor in sorted(numbers))


# Revoking ------------------------------------------------------------------------------------------------------------


def undo_grants(
    claims: ClaimDirectory, undo_log: UndoLog, entries: tuple[Entry, ...], deadline: Deadline
) -> list[Finding]:
    """Revoke the permissions that this run gave, and return findings on those that remain. entries: those of this run.

    The container keeps what an earlier run, which succeeded, allowed.
    """
    if not has_grant(entries):
        return []
    try:
        lock = claims.lock(deadline)
    except Refusal as refusal:
        problem = f"cannot revoke the container's device permissions: {describe_reason(refusal)}"
        hint = "the next run of the hook in this guest tries again"
        return [Finding("error", "permission-left", undo_log.path, problem, hint)]
    try:
        own = claims.read_claim(undo_log.path)
        others = read_grants(list_others(claims.read_claims(undo_log.path), undo_log.path))
        earlier = permission.list_grants(parse_undo_log(os.pread(undo_log.fd, undo_log.kept, 0)))
        return revoke(claims.root, entries, own.home if own else None, (*others, *earlier))
    finally:
        os.close(lock)


def revoke_claim(claims: ClaimDirectory, claim: Claim) -> list[Finding]:
    """Revoke all permissions of a claim's container, and return the findings of `revoke`."""
    if not has_grant(claim.entries):
        return []
    # Read the claims again: one that was undone a moment ago needs no permissions any more.
    others = list_others(claims.read_claims(), claim.path)
    return revoke(claims.root, claim.entries, claim.home, read_grants(others))


def has_grant(entries: Iterable[Entry]) -> bool:
    """Return whether entries record a permission."""
    return any(entry.kind == "permit" for entry in entries)


@step("revoke")
def revoke(root: Root, entries: Iterable[Entry], home: Home | None, others: tuple[Grant, ...]) -> list[Finding]:
    """Revoke all permissions in the entries, whether or not the container's init runs, and return what went wrong.

    home: the container's cgroups; others: other containers' grants. A finding with the code permission-left means that
    remaining processes keep the permission. Call it with the machine-wide lock held.
    """
    spoilt: list[Entry] = []
    findings: list[Finding] = []
    for grant in reversed(permission.list_grants(entries, spoilt)):
        try:
            permission.disallow(root, drop_replaced(root, grant, home), others)
        except StepError as error:
            findings += explain_unrevoked(root, grant, error)
    for entry in spoilt:
        hint = "end the container: its device permissions end with its cgroup"
        subject = f"undo log entry {' '.join((entry.kind, *entry.words))}"
        findings.append(Finding("error", "undo-failed", subject, "cannot be undone: the entry is damaged", hint))
    return findings


def drop_replaced(root: Root, grant: Grant, home: Home | None) -> Grant:
    """Return a grant without a version 1 directory that was replaced: its permissions ended with the old cgroup.

    This is not needed for version 2, where a mark identifies what the hook added to a device filter.
    """
    if home is None or not home.devices_inode:
        return grant
    gone = pci.read_inode(root, home.devices) not in (0, home.devices_inode)
    kept = [widening for widening in grant.devices if not (gone and widening.path == home.devices)]
    return grant.replace(devices=tuple(kept))


def explain_unrevoked(root: Root, grant: Grant, error: StepError) -> tuple[Finding, ...]:
    """Return the findings on a grant that cannot be revoked. Without a process in its cgroup, no one has it."""
    own = (grant.unified, *(widening.path for widening in grant.devices[-1:]))
    processes = sorted({pid for path in own if path for pid in list_processes(root, path)})
    subject = next(filter(None, own))
    if not processes:
        problem = f"device numbers {format_numbers(grant.nodes)} cannot be revoked; no process is left to use them: "
        hint = "remove this cgroup if the runtime does not: the permission ends with it"
        return (Finding("error", "undo-failed", subject, problem + describe_reason(error), hint),)
    # 0 stands for processes that were not examined.
    pids = " ".join(map(str, filter(None, processes))) or "PID (see cgroup.procs in it and below it)"
    problem = f"device numbers {format_numbers(grant.nodes)} cannot be revoked from its processes {pids}: "
    hint = f"end them with: kill -9 {pids}; the next run of the hook in this guest tries again"
    return (Finding("error", "permission-left", subject, problem + describe_reason(error), hint),)


def describe_reason(error: HookError) -> str:
    """Return why a permission cannot be revoked: subject and problem of an error."""
    return f"{error.findings[0].subject}: {error.findings[0].problem}"


def read_grants(claims: Iterable[Claim]) -> tuple[Grant, ...]:
    """Return the grants of some claims."""
    return tuple(grant for claim in claims for grant in permission.list_grants(claim.entries))
