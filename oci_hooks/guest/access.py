# SPDX-License-Identifier: Apache-2.0
"""Give a container access to its nodes: verify that they open in it, allow what its cgroup denies, verify again."""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import StepError
from oci_hooks.frozen import Frozen
from oci_hooks.oci import CDEV_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.credentials import Credentials
    from oci_hooks.findings import Finding
    from oci_hooks.guest.apply import cgroup
    from oci_hooks.guest.apply.proof import Prover
    from oci_hooks.guest.claims import ClaimDirectory
    from oci_hooks.guest.undo_log import UndoLog
    from oci_hooks.system import Deadline, Root


def preload_later_steps() -> None:
    """Import what creating and allowing nodes needs."""
    from oci_hooks.guest import permits  # noqa: F401
    from oci_hooks.guest.apply import bpf, device_filter, nodes, system_calls  # noqa: F401


def make_prover(root: Root, pid: int, rootfs: str, credentials: Credentials | None) -> Prover:
    """Return what proves that nodes open in a container. Raises StepError if its cgroup cannot be found.

    pid: its init; rootfs: real path of its root file system; credentials: with which they have to open, None if
    config.json gives none.
    """
    from oci_hooks.guest.apply import cgroup, proof

    def open_dev() -> int:
        from oci_hooks.guest.apply import container_dev

        return container_dev.open_dev(pid, rootfs)

    return proof.Prover(root, cgroup.find_cgroup(root, pid), open_dev, credentials)


def start_early(prover: Prover, deadline: Deadline) -> None:
    """Start the prover while the kernel binds, then import what the steps after that need."""
    # What the child needs, too.
    from oci_hooks.guest.apply import container_dev  # noqa: F401

    if prover.credentials and not prover.credentials.opens_all:
        from oci_hooks.guest.apply import container_user, system_calls  # noqa: F401
    try:  # noqa: SIM105 - contextlib costs an import
        prover.start(deadline)
    except OSError:
        # There may be a process for it when it is needed.
        pass
    preload_later_steps()


class GrantOptions(Frozen):
    """How to allow nodes.

    widens_parents: see `plan_grant`; expects_user: the container may have its groups open.
    """

    widens_parents: bool
    expects_user: bool


def grant_nodes(
    root: Root,
    made: tuple[cgroup.MadeNode, ...],
    prover: Prover,
    options: GrantOptions,
    claims: ClaimDirectory,
    undo_log: UndoLog,
    deadline: Deadline,
) -> list[Finding]:
    """Prove that the nodes open inside the container's cgroup, permitting what it denies. Raises StepError.

    Returns warnings on nodes that the container's first process cannot open, but another of its processes may.
    """
    from oci_hooks.guest import permits
    from oci_hooks.guest.apply import permission, proof

    reused = permits.claim_numbers(claims, made, undo_log, deadline)
    target_cgroup, user = prover.cgroup, prover.credentials
    checks = proof.verify_nodes(root, target_cgroup, prover, made, deadline)
    denied = [check.node for check in checks if check.is_denied]
    if denied:
        opened = None
        if permission.is_open_list(root, target_cgroup):
            opened = proof.find_access(root, prover, denied, deadline)
        permits.allow_nodes(claims, target_cgroup, denied, options.widens_parents, opened, undo_log, deadline)
        checks = proof.verify_nodes(root, target_cgroup, prover, made, deadline)
    # A group opens only once at a time, and the device cgroup is checked before that.
    expects_user = options.expects_user and not reused
    checked = [check for check in checks if check.error != errno.EBUSY or not expects_user]
    check_proofs(root, target_cgroup, tuple(checked))
    return [finding for check in checked if user and check.user_error for finding in check_user(user, check)]


def check_user(user: Credentials, check: cgroup.NodeCheck) -> tuple[Finding, ...]:
    """Return a warning for a node that the container's first process cannot open and another of its processes may.

    An owner that config.json gives to the node can be meant for one that changes its user, or is executed later; and a
    program file can have privileges of its own. Raises StepError [not-openable] if a capability is missing for good.
    """
    # What is no matter of permission, another process that has the group open for example, was different before.
    if check.user_error not in (errno.EACCES, errno.EPERM):
        return ()
    path = f"/dev/{check.node.name}"
    problem = f"cannot be opened by user {user.uid} of the container: {os.strerror(check.user_error)}"
    hint = (
        f"set uid {user.uid} and gid {user.gid} in its entry of linux.devices, where there is one, else in [node] of "
        "guest.toml"
    )
    if check.user_error == errno.EPERM:
        hint = f"check process.capabilities of config.json{', which needs CAP_SYS_RAWIO' * check.node.is_noiommu}"
    error = StepError("not-openable", path, problem, hint)
    if check.user_error == errno.EPERM and not user.gains:
        raise error
    (finding,) = error.findings
    return (finding.replace(level="warning"),)


def check_proofs(root: Root, target_cgroup: cgroup.Cgroup, checks: tuple[cgroup.NodeCheck, ...]) -> None:
    """Raise StepError if a node did not open, or its group is not viable."""
    from oci_hooks.guest.apply import permission

    if any(check.is_denied for check in checks):
        raise permission.explain_denial(root, target_cgroup, checks)
    for check in checks:
        path = f"/dev/{check.node.name}"
        if check.error == errno.EBUSY:
            # A device that is used by its own node keeps its group from being opened (kernel: drivers/vfio/group.c).
            nodes = f"{path} {CDEV_PREFIX}*" if root.exists(CDEV_PREFIX) else path
            raise StepError("group-busy", path, "another process has it open", f"find it with: fuser -v {nodes}")
        if check.error:
            hint = "check that the file system of the container's /dev is not mounted with the option nodev"
            raise StepError("not-openable", path, f"cannot be opened: {os.strerror(check.error)}", hint)
        if not check.is_viable:
            problem = "the group is not viable: one of its devices is bound to a driver that is not for VFIO"
            hint = f"list its devices with: ls /sys/kernel/iommu_groups/{path.rpartition('/')[2]}/devices"
            raise StepError("group-not-viable", path, problem, hint)
