# SPDX-License-Identifier: Apache-2.0
"""List the record types that a replay creates from a recording: the results of the hooks' steps, and nothing else."""

from __future__ import annotations

from oci_hooks.findings import Finding
from oci_hooks.guest.apply.cgroup import MadeNode, NodeCheck
from oci_hooks.guest.apply.sysfs_writer import Result
from oci_hooks.guest.claims import Claim
from oci_hooks.guest.homes import Home
from oci_hooks.guest.undo_log import Entry, UndoLog
from oci_hooks.host.kata.model import Problem
from oci_hooks.linux.processes import Process
from oci_hooks.record.encoding import UNDO_LOG, open_nothing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.record.encoding import Kinds


def make_undo_log(path: str, kept: int) -> UndoLog:
    """Return an undo log that writes its entries nowhere."""
    return UndoLog(open_nothing(), str(path), int(kept))


RECORDS = (Claim, Entry, Finding, Home, MadeNode, NodeCheck, Problem, Process, Result)
KINDS: Kinds = {**{record.tag: record for record in RECORDS}, UNDO_LOG: make_undo_log}
