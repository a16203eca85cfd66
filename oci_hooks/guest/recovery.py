# SPDX-License-Identifier: Apache-2.0
"""Restore what killed hooks, ended containers and a failed run left behind, then remove the claim."""

from __future__ import annotations

from oci_hooks.findings import Finding
from oci_hooks.guest import ownership
from oci_hooks.guest.apply import drivers
from oci_hooks.guest.claims import Claim, ClaimDirectory, remove_claim
from oci_hooks.guest.session import Session
from oci_hooks.system import Deadline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.undo_log import UndoLog
    from oci_hooks.system import Root

# Putting back has to be possible when all of the deadline was used up on the way there.
# Kata's agent kills a hook after 10 s, and a deadline of 8 s, which counts from the process's start, comes before.
UNDO_SECONDS = 1.5


def repair_claims(session: Session, claims: list[Claim], lock: int) -> list[Claim]:
    """Undo the claims of killed hooks and ended containers, and return the claims that remain.

    A claim that could not be undone remains, too: no other container gets its devices.
    """
    held = []
    for claim in claims:
        if claim.problem and claim.path != session.claim_path:
            warning = ownership.warn_unreadable(claim)
            # Only once, even if this function runs again.
            session.run.findings.extend([warning] if warning not in session.run.findings else [])
        if not ownership.has_ended(session.root, claim, session.claim_path, session.owner.pid):
            held.append(claim)
            continue
        # Repairing another container's leftovers must not fail this one, nor use up its deadline.
        findings = undo_claim(session.root, claim, session.run.deadline.remaining() / 2, lock)
        for finding in findings or ():
            session.run.report(finding.replace(level="warning"))
        if findings is None or is_unfinished(findings):
            held.append(claim)
    return held


def undo_claim(root: Root, claim: Claim, seconds: float, lock: int) -> list[Finding] | None:
    """Undo a claim that no hook is at work on, and remove it. Call it with the machine-wide lock held.

    seconds: time limit. Returns None if another process has the undo log's lock, or the file is gone.
    """
    from oci_hooks.guest import permits

    directory = ClaimDirectory(root=root)
    undo_log = directory.reopen_undo_log(claim)
    if undo_log is None:
        return None
    try:
        # A child that hangs must keep the undo log's lock, but release the machine-wide one.
        pid = claim.pid if claim.is_alive(root) else 0
        findings = permits.revoke_claim(directory, claim)
        # A container that keeps its permission keeps its device, so that no other gets the device's number.
        if not is_unfinished(findings):
            findings += drivers.undo(root, claim.entries, pid, Deadline(seconds), (lock,))
        if not is_unfinished(findings):
            root.do(remove_claim, claim.path)
        return findings
    finally:
        undo_log.close()


def take_back(session: Session, undo_log: UndoLog) -> list[Finding]:
    """Undo this run of the hook, and remove the claim unless an earlier run succeeded."""
    from oci_hooks.guest import permits

    entries = session.directory.read_entries(undo_log)
    deadline = Deadline(max(session.run.deadline.remaining(), UNDO_SECONDS))
    findings = permits.undo_grants(session.directory, undo_log, entries, deadline)
    if not is_unfinished(findings):
        findings += drivers.undo(session.root, entries, session.state.pid, deadline)
    if is_unfinished(findings):
        return findings
    if not undo_log.kept:
        session.root.do(remove_claim, undo_log.path)
    else:
        # The container may be using what an earlier run gave it.
        session.root.do(undo_log.forget_run)
    return findings


def is_unfinished(findings: list[Finding]) -> bool:
    """Return whether something remains to be undone that can be undone later."""
    return any(finding.code in drivers.UNFINISHED for finding in findings)
