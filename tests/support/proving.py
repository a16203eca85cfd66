# SPDX-License-Identifier: Apache-2.0
"""Nodes opened from inside a cgroup, as the hook does it, with one request to a child of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable

from oci_hooks.credentials import Credentials
from oci_hooks.guest.apply import proof
from oci_hooks.guest.apply.cgroup import Cgroup, MadeNode, NodeCheck
from oci_hooks.system import Deadline, Root


def prove_nodes(
    root: Root, cgroup: Cgroup, directory: int, nodes: Iterable[MadeNode], credentials: Credentials | None = None
) -> tuple[NodeCheck, ...]:
    """Return what became of opening nodes below a directory. credentials: of the container, None if unknown."""
    deadline = Deadline(20)
    prover = proof.Prover(root, cgroup, lambda: os.dup(directory), credentials)
    try:
        return proof.verify_nodes(root, cgroup, prover, nodes, deadline)
    finally:
        prover.close()
