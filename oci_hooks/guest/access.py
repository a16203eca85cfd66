# SPDX-License-Identifier: Apache-2.0
"""Give a container access to its nodes: see whether they open in it, allow what its cgroup denies, see again."""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import StepError
from oci_hooks.frozen import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.apply import cgroup
    from oci_hooks.guest.apply.nodes import Target
    from oci_hooks.guest.claims import ClaimDirectory
    from oci_hooks.guest.undo_log import Journal
    from oci_hooks.system import Deadline, Root


def load_what_follows() -> None:
    """Import what making and permitting nodes needs; ctypes, for bpf(2), is the dearest import of a whole run."""
    import ctypes  # noqa: F401

    from oci_hooks.guest import permits  # noqa: F401
    from oci_hooks.guest.apply import bpf, cgroup, container_dev, device_filter, nodes, proof  # noqa: F401


class Permission(Record):
    """How to permit. widens_parents: see `plan_grant`; expects_user: the container may have its groups open."""

    widens_parents: bool
    expects_user: bool


def grant_nodes(
    root: Root,
    made: tuple[cgroup.Node, ...],
    target: Target,
    how: Permission,
    claims: ClaimDirectory,
    journal: Journal,
    deadline: Deadline,
) -> None:
    """Prove that the nodes open inside the container's cgroup, permitting what it denies. Raises StepError."""
    from oci_hooks.guest import permits
    from oci_hooks.guest.apply import cgroup, container_dev, permission, proof

    reused = permits.take_numbers(claims, made, journal, deadline)
    place = cgroup.find_cgroup(root, target.pid)
    directory = root.do(container_dev.open_dev, target.pid, target.rootfs)
    try:
        proofs = proof.prove(root, place, directory, made, deadline)
        denied = [proof.node for proof in proofs if proof.is_denied]
        if denied:
            opened = None
            if permission.is_open_list(root, place):
                opened = proof.find_access(root, place.replace(unified=""), directory, denied, deadline)
            permits.give(claims, place, denied, how.widens_parents, opened, journal, deadline)
            proofs = proof.prove(root, place, directory, made, deadline)
    finally:
        os.close(directory)
    # A group opens once at a time, and the device cgroup is asked before.
    expects_user = how.expects_user and not reused
    checked = [proof for proof in proofs if proof.error != errno.EBUSY or not expects_user]
    check_proofs(root, place, tuple(checked))


def check_proofs(root: Root, place: cgroup.Cgroup, proofs: tuple[cgroup.NodeProof, ...]) -> None:
    """Raise StepError where a node did not open, or its group is not viable."""
    from oci_hooks.guest.apply import permission

    if any(proof.is_denied for proof in proofs):
        raise permission.explain_denial(root, place, proofs)
    for proof in proofs:
        path = f"/dev/{proof.node.name}"
        if proof.error == errno.EBUSY:
            raise StepError("group-busy", path, "another process has it open", f"find it with: fuser -v {path}")
        if proof.error:
            hint = "check that the file system of the container's /dev is not mounted with the option nodev"
            raise StepError("not-openable", path, f"cannot be opened: {os.strerror(proof.error)}", hint)
        if not proof.is_viable:
            problem = "the group is not viable: one of its devices is bound to a driver that is not for VFIO"
            hint = f"list its devices with: ls /sys/kernel/iommu_groups/{path.rpartition('/')[2]}/devices"
            raise StepError("group-not-viable", path, problem, hint)
