# SPDX-License-Identifier: Apache-2.0
"""Permission to open device nodes from inside a container's cgroup: plan it, give it, take it back, explain its lack.

What is widened is the container's own cgroup, with version 2 also the systemd scope that holds nothing but it. No other
ancestor of version 2 ever is; one of version 1 only when asked for, because there a child can't get what its parent
lacks.

The caller's order: `cgroup.find_cgroup`, `proof.prove`; when something is not permitted `plan_grant`, `permit`, `prove`
again; when it still is not, `forbid` and raise what `explain_denial` returns.
"""

from __future__ import annotations

import errno
import os

from oci_hooks.cgroup import Cgroup, Node, NodeProof, fail, list_ancestors, list_own, list_scope
from oci_hooks.device_filter import add_nodes, change_programs, find_programs_above, remove_nodes
from oci_hooks.device_list import allow_node, deny_node, lacks
from oci_hooks.files import step
from oci_hooks.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oci_hooks.bpf import Numbers
    from oci_hooks.errors import StepError
    from oci_hooks.files import Root
    from oci_hooks.journal import Entry


class Grant(Record):
    """What to permit and where: known before anything is done, so that it can stand in a journal.

    nodes: major and minor of each; unified: version 2 directory or ""; devices: version 1 directories, from the top
    down: ancestors to widen and at last the container's own.
    """

    nodes: tuple[Numbers, ...]
    unified: str
    devices: tuple[str, ...]


def format_grant(grant: Grant) -> tuple[str, str, str]:
    """Return a grant as the words of a journal entry."""
    nodes = ",".join(f"{major}:{minor}" for major, minor in grant.nodes)
    return nodes, grant.unified, "\n".join(grant.devices)


def parse_grant(entry: Entry) -> Grant:
    """Return the grant that a journal entry notes."""
    pairs = (pair.split(":") for pair in entry.words[0].split(","))
    nodes = tuple((int(major), int(minor)) for major, minor in pairs)
    return Grant(nodes, entry.words[1], tuple(path for path in entry.words[2].split("\n") if path))


# Permitting -----------------------------------------------------------------------------------------------------------


def plan_grant(root: Root, cgroup: Cgroup, nodes: Iterable[Node], widen_parents: bool = False) -> Grant:
    """Return what has to be permitted where. Changes nothing. Raises StepError where it must not be done.

    nodes: those that are not permitted now; widen_parents: on version 1, permit them to each ancestor that lacks them
    too (a pod's cgroup inside its own virtual machine; on a shared machine that is not the hook's to decide).
    """
    wanted = tuple(nodes)
    own = [place for place in (cgroup.unified, cgroup.devices) if place and place not in cgroup.shared]
    if cgroup.shared and not own:
        problem = "is not the container's own cgroup, so a permission there would be for others too"
        raise fail(cgroup.shared[0], problem, wanted)
    directories: list[str] = []
    if cgroup.devices in own:
        if widen_parents:
            ancestors = list_ancestors(cgroup.devices, cgroup.devices_mount)
            directories += [path for path in ancestors if lacks(root, path, wanted)]
        directories.append(cgroup.devices)
    numbers = tuple((node.major, node.minor) for node in wanted)
    return Grant(numbers, cgroup.unified if cgroup.unified in own else "", tuple(directories))


@step
def permit(root: Root, grant: Grant) -> None:
    """Permit reading and writing of exactly these nodes. Doing it twice is doing it once. Raises StepError."""
    for path in grant.devices:
        for major, minor in grant.nodes:
            allow_node(root, path, major, minor)
    for path in list_own(root, grant.unified):
        change_programs(root, path, grant.nodes, add_nodes)


@step
def forbid(root: Root, grant: Grant) -> None:
    """Take a permission back, whole or half given, by this process or another. Raises StepError.

    A cgroup that is gone is as good as done.
    """
    for path in reversed(grant.devices):
        for major, minor in grant.nodes:
            deny_node(root, path, major, minor)
    # Whoever else came into the scope meanwhile: what was added is taken away.
    for path in (grant.unified, *list_scope(grant.unified)):
        if path and root.exists(path):
            change_programs(root, path, grant.nodes, remove_nodes)


# Explaining -----------------------------------------------------------------------------------------------------------


def explain_denial(root: Root, cgroup: Cgroup, proofs: Iterable[NodeProof]) -> StepError:
    """Return the error for nodes that don't open from inside the cgroup although everything was done for it."""
    bad = [proof for proof in proofs if proof.error or not proof.is_viable]
    told = ", ".join(f"{proof.node.name}: {describe_proof(proof)}" for proof in bad)
    denied = [proof.node for proof in bad if proof.is_denied]
    above = find_programs_above(root, cgroup) if denied and cgroup.unified else []
    own = list_own(root, cgroup.unified)
    above = [path for path in above if path not in own]
    if above:
        told += f" (the cgroup {above[0]} above has a device program, which is not the hook's to change)"
    return fail(cgroup.unified or cgroup.devices or f"process {cgroup.pid}", f"from inside it, {told}", denied)


def describe_proof(proof: NodeProof) -> str:
    """Return in words what a proof came to."""
    if not proof.error:
        return "opens" if proof.is_viable else "opens, and the group is not viable"
    words = {
        errno.EPERM: "not permitted by the device cgroup",
        errno.EACCES: "not permitted by its mode, a nodev mount or a security module",
        errno.EBUSY: "another process holds it",
        errno.ENOENT: "there is no such node",
        errno.ENODEV: "the node is another device, or its device is gone",
        errno.ENXIO: "no such device is behind it",
    }
    return words.get(proof.error, os.strerror(proof.error))
