# SPDX-License-Identifier: Apache-2.0
"""The guest hook: open the VFIO groups that an OCI state requests to one container, and release them.

The data flow: state, spec, request, inventory, plan, apply, verify. Reading and planning change nothing; binding.py
carries the plan out and undoes it.
"""

from __future__ import annotations

from oci_hooks.findings import EXIT_DONE, EXIT_REFUSED, InputError
from oci_hooks.program import Hook, Run, read_state, run_hook
from oci_hooks.system import USUAL_SECONDS, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser

    from oci_hooks.guest.apply.guard import Guard
    from oci_hooks.guest.request import Request
    from oci_hooks.oci import Spec, State

PROGRAM = "vfio-guest-bind"
SECONDS = USUAL_SECONDS


def main(argv: list[str], begun: bytes = b"") -> int:
    """Run the guest hook and return its exit code.

    argv: the arguments without the program's name; begun: what was read from stdin already.
    """
    # What a person asks for by hand does not belong into the kernel's log.
    kmsg = "--all" not in argv
    return run_hook(Hook(PROGRAM, SECONDS, work, add_options, read_record_mode, kmsg), argv, begun)


def add_options(parser: ArgumentParser) -> None:
    """Add this hook's own options to the parser."""
    parser.description = "Bind a container's PCI devices to vfio-pci and create their device nodes in it."
    parser.add_argument("--dry-run", action="store_true", help="print the plan, change nothing")
    parser.add_argument("--all", action="store_true", help="no container: list what this guest has, change nothing")
    parser.add_argument("--pid", type=int, default=0, metavar="PID", help="with --bundle: the container's init process")


def read_record_mode(path: str) -> str:
    """Return the setting `record` of a settings file. Raises InputError."""
    from oci_hooks.guest.settings import read_guest_settings

    return read_guest_settings(Root(), path).record


def work(run: Run) -> int:
    """Do what the state requires: bind, release, or nothing. Returns the exit code."""
    arguments = run.arguments
    if arguments.all:
        from oci_hooks.guest.survey import survey

        return survey(run)
    from oci_hooks.oci import asks_for_vfio, is_sandbox, read_spec

    if arguments.bundle and not arguments.pid and not arguments.dry_run and arguments.phase != "poststop":
        raise InputError("bad-arguments", "--bundle", "needs the process id of the container's init", "add --pid PID")
    state = read_state(run)
    run.container = state.id
    if arguments.phase == "poststop" or state.status == "stopped" or has_ended(run.root, state):
        return release_groups(run, state)
    spec = read_spec(run.root, state)
    if not asks_for_vfio(state, spec) or is_sandbox(state, spec):
        return EXIT_DONE
    from oci_hooks.guest.request import read_request

    try:
        request = read_request(state, spec)
        if request is not None:
            run.apply_annotations(state, spec)
            run.root.note("request", request)
            bind_groups(run, state, spec, request)
    except BaseException:
        # KeyboardInterrupt too.
        kill_if_configured(run, state)
        raise
    return EXIT_DONE


def has_ended(root: Root, state: State) -> bool:
    """Return whether a container with a claim has ended although its status is `running`.

    That is the state at poststop in Kata's agent, which passes the kind of hook only to hooks of guest_hook_path. By
    then the pid of its init may be another process's.
    """
    if state.status != "running":
        return False
    from oci_hooks.guest.claims import ClaimDirectory
    from oci_hooks.linux.processes import read_start_time

    directory = ClaimDirectory(root=root)
    claim = directory.read_claim(directory.undo_log_path(state.id))
    if claim is None:
        return False
    start = read_start_time(root, state.pid) if state.pid > 0 else 0
    return not start or (claim.pid == state.pid and claim.start != start)


def bind_groups(run: Run, state: State, spec: Spec, request: Request) -> None:
    """Give the container the groups that it requests. Raises HookError after everything was undone."""
    from oci_hooks.guest.settings import check_deadline, read_guest_settings

    settings = read_guest_settings(run.root, run.arguments.settings)
    run.deadline.extend(settings.deadline)
    run.record = settings.record
    run.findings.extend(check_deadline(settings, run.arguments.settings, state.bundle))
    if run.arguments.dry_run:
        from oci_hooks.guest.dry_run import print_plan

        print_plan(run, state, spec, request, settings)
        return
    from oci_hooks.guest.binding import bind

    guard = start_guard(run, state) if settings.on_failure == "kill" else None
    bind(run, state, spec, request, settings)
    if guard:
        guard.end()


def start_guard(run: Run, state: State) -> Guard:
    """Return the guard of a container that must not run without its devices: a process that outlives the hook."""
    from oci_hooks.guest.apply.guard import Guard, warn_unguarded
    from oci_hooks.guest.signals import reset_signals

    # A runtime may have its children ignored: then the guard would be no child to wait for.
    reset_signals()
    guard = Guard(run.root, run.program, state)
    run.when_reported = guard.end
    try:
        guard.start()
    except OSError as error:
        run.report(warn_unguarded(error))
    return guard


def kill_if_configured(run: Run, state: State) -> None:
    """Kill the container if guest.toml has `on_failure = "kill"`: it requested VFIO and does not get it.

    Kata's agent ignores a hook's exit code, and would start it without its devices.
    """
    from oci_hooks.guest.apply.kill import kill_container
    from oci_hooks.guest.settings import read_guest_settings

    try:
        settings = read_guest_settings(run.root, run.arguments.settings)
    except InputError:
        # Without readable settings the default applies; this error is already reported, or not the one that matters.
        return
    if settings.on_failure == "kill" and not run.arguments.dry_run:
        kill_container(run.root, state)


def release_groups(run: Run, state: State) -> int:
    """Undo this container's claim, if it has one. Returns the exit code."""
    import os

    from oci_hooks.guest.claims import ClaimDirectory

    # Most containers have none, and need no import of the modules that undo it.
    if not run.root.do(os.path.exists, ClaimDirectory(root=run.root).undo_log_path(state.id)):
        return EXIT_DONE
    if run.arguments.dry_run:
        from oci_hooks.guest.dry_run import print_release

        print_release(run, state)
        return EXIT_DONE
    from oci_hooks.guest.binding import release

    findings = release(run.root, state, run.deadline, run.arguments.settings)
    run.findings.extend(findings)
    return EXIT_REFUSED if any(finding.level == "error" for finding in findings) else EXIT_DONE
