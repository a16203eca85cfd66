# SPDX-License-Identifier: Apache-2.0
"""Bind and release devices for a container: the steps that need the claims, in order.

The hook holds the machine-wide lock while it assigns groups and undoes stale claims, but not while it binds devices.
From then on the container's own undo log is locked until the hook ends, however it ends.
"""

from __future__ import annotations

import os

from oci_hooks.credentials import read_credentials
from oci_hooks.findings import Finding, HookError, InputError, Refusal
from oci_hooks.guest import access, ownership, plan
from oci_hooks.guest.apply import drivers
from oci_hooks.guest.apply.modprobe import load_drivers
from oci_hooks.guest.claims import ClaimDirectory, Owner
from oci_hooks.guest.decision import wait_for_claim, wait_for_hook
from oci_hooks.guest.id_mapping import resolve_id_mappings
from oci_hooks.guest.recovery import UNDO_SECONDS, take_back, undo_claim
from oci_hooks.guest.session import Session
from oci_hooks.guest.signals import interruptible, reset_signals
from oci_hooks.linux.processes import read_start_time
from oci_hooks.system import Deadline, tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.request import Request
    from oci_hooks.guest.settings import GuestSettings
    from oci_hooks.guest.undo_log import UndoLog
    from oci_hooks.oci import Spec, State
    from oci_hooks.program import Run
    from oci_hooks.system import Root
PHASE_HINT = "declare the hook under createRuntime (or prestart), which run while the container is created"


def bind(run: Run, state: State, spec: Spec, request: Request, settings: GuestSettings) -> None:
    """Give a container the groups that it requests. Raises HookError after everything was undone."""
    reset_signals()
    root = run.root
    # Pid 1 is init's own number of itself: runc and Kata's agent give it to createContainer, which runs in the
    # container's namespaces. /proc/1 is another process there, the machine's init.
    start = read_start_time(root, state.pid) if state.pid > 1 else 0
    if not start:
        problem = "the container's init is not running"
        if state.pid == 1:
            problem = "is the container's init inside its PID namespace, in which runtimes run createContainer hooks"
        raise Refusal("no-process", f"process {state.pid}", problem, PHASE_HINT)
    owner = Owner(state.id, state.pid, start, state.bundle)
    directory = ClaimDirectory(root=root)
    directory.prepare()
    session = Session(run, state, resolve_id_mappings(root, state, spec), request, settings, directory, owner)
    undo_log, wanted = wait_for_claim(session)
    try:
        with interruptible():
            apply_plan(session, wanted, undo_log)
    except BaseException as error:
        findings = take_back(session, undo_log)
        if isinstance(error, HookError):
            # An undo step often fails for the same reason as the step itself: report that once.
            error.findings += tuple(finding for finding in findings if finding not in error.findings)
            causes = explain_namespaces(root, state, spec)
            error.findings = tuple(cause for cause in causes if cause not in error.findings) + error.findings
        else:
            session.run.findings.extend(findings)
        raise
    finally:
        undo_log.close()


def explain_namespaces(root: Root, state: State, spec: Spec) -> tuple[Finding, ...]:
    """Return why nothing could be done where the hook runs in the container's namespaces, with the machine's pids.

    So createContainer runs in a container that has the machine's PID namespace. The mount namespace shows it, where
    config.json wants a new one for the container: under createRuntime and prestart the hook is never in that.
    """
    namespaces = (spec.raw.get("linux") or {}).get("namespaces") or ()
    if not any(entry["type"] == "mount" and not entry.get("path") for entry in namespaces):
        return ()
    own = root.read_link("/proc/self/ns/mnt")
    if not own or own != root.read_link(f"/proc/{state.pid}/ns/mnt"):
        return ()
    problem = "has the mount namespace of this hook, in which runtimes run createContainer hooks"
    return (Finding("error", "no-process", f"process {state.pid}", problem, PHASE_HINT),)


def apply_plan(session: Session, wanted: plan.Plan, undo_log: UndoLog) -> None:
    """Carry out the plan; each step is recorded in the undo log before it is done. Raises HookError."""
    root, deadline = session.root, session.run.deadline
    rootfs = root.do(find_rootfs, session.state, session.spec)
    load_drivers(root, deadline)
    prover = access.make_prover(root, session.state.pid, rootfs, read_credentials(session.spec))
    try:
        drivers.bind_devices(root, wanted.rebinds, undo_log, deadline, lambda: access.start_early(prover, deadline))
        from oci_hooks.guest.apply import nodes

        target = nodes.Container(session.state.pid, rootfs)
        made = nodes.expose_nodes(root, wanted, target, undo_log)
        permission = access.GrantOptions(session.settings.widen_parent_cgroups, undo_log.kept > 0)
        warnings = access.grant_nodes(root, made, prover, permission, session.directory, undo_log, deadline)
    finally:
        prover.close()
    session.run.findings.extend(warnings)
    undo_log.add("done")


@tagged("find-rootfs")
def find_rootfs(state: State, spec: Spec) -> str:
    """Return the real path of the container's root file system, as the runtime sees it.

    The runtime chose the path, so its links are resolved here, once; later descents below it follow no link.
    """
    path = spec.root_path or state.root or "rootfs"
    return os.path.realpath(os.path.join(state.bundle, path))


def release(root: Root, state: State, deadline: Deadline, settings: str = "") -> list[Finding]:
    """Undo a container's claim, if it has one, and return what went wrong.

    settings: path of the file, if named on the command line.
    """
    directory = ClaimDirectory(root=root)
    path = directory.undo_log_path(state.id)
    reset_signals()
    extend_deadline(root, deadline, settings)
    directory.prepare()
    while True:
        lock = directory.lock(deadline)
        try:
            claim = directory.read_claim(path)
            if claim is None:
                return []
            ownership.check_release(root, state, claim)
            if not claim.at_work:
                findings = undo_claim(root, claim, max(deadline.remaining(), UNDO_SECONDS), lock)
                if findings is not None:
                    return findings
        finally:
            os.close(lock)
        root.do(wait_for_hook, claim, deadline)


def extend_deadline(root: Root, deadline: Deadline, settings: str) -> None:
    """Extend a release's deadline to the one in the settings."""
    from oci_hooks.guest.settings import read_guest_settings

    try:
        deadline.extend(read_guest_settings(root, settings).deadline)
    except InputError:
        # The runtime's call that creates the container reports this error; the undo needs no settings.
        deadline.extend(deadline.seconds)
