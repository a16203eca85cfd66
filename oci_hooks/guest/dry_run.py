# SPDX-License-Identifier: Apache-2.0
"""Print the result of a dry run: the hook's plan, or what a release would undo."""

from __future__ import annotations

from oci_hooks.findings import make_one_line
from oci_hooks.guest import ownership, plan
from oci_hooks.guest.claims import ClaimDirectory, Owner
from oci_hooks.guest.decision import make_plan_options, select_groups
from oci_hooks.guest.id_mapping import resolve_id_mappings
from oci_hooks.guest.session import Session
from oci_hooks.guest.undo_log import HEADS, describe_undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.request import Request
    from oci_hooks.guest.settings import GuestSettings
    from oci_hooks.oci import Spec, State
    from oci_hooks.program import Run


def print_plan(run: Run, state: State, spec: Spec, request: Request, settings: GuestSettings) -> None:
    """Print what the hook would do, and change nothing. Raises HookError as the real run would, without waiting."""
    root = run.root
    directory = ClaimDirectory(root=root)
    owner = Owner(state.id, state.pid, 0, state.bundle)
    session = Session(run, state, resolve_id_mappings(root, state, spec), request, settings, directory, owner)
    claims = [claim for claim in directory.read_claims() if not claim.is_stale(root)]
    for claim in claims:
        if claim.path == session.claim_path:
            ownership.check_readable(claim)
    wanted = plan.make_plan(root, select_groups(session, claims), session.spec, make_plan_options(session))
    root.note("plan", wanted)
    print_actions(run, plan.list_actions(wanted))


def print_release(run: Run, state: State) -> None:
    """Print what a release would undo, and change nothing."""
    directory = ClaimDirectory(root=run.root)
    claim = directory.read_claim(directory.undo_log_path(state.id))
    if claim:
        ownership.check_readable(claim)
    entries = [entry for entry in reversed(claim.entries) if entry.kind not in HEADS] if claim else []
    print_actions(run, [describe_undo(entry) for entry in entries])


def print_actions(run: Run, actions: list[tuple[str, str, str]]) -> None:
    """Print a plan, or keep it for --json. actions: (action, object, details), in order."""
    from oci_hooks.log import write_stdout

    if run.arguments.json:
        run.plan.extend({"action": what, "subject": subject, "detail": how} for what, subject, how in actions)
        return
    # Some of the words come from a tenant and are printed on a terminal.
    write_stdout("".join(f"{make_one_line(f'{what} {subject}: {how}')}\n" for what, subject, how in actions))
