# SPDX-License-Identifier: Apache-2.0
"""The guest hook: from an OCI state to VFIO groups that are open to one container, and back.

The way of the data: state, spec, request, picture, plan, apply, proof. Reading and planning
change nothing; session.py has the plan carried out, and what is over put back.
"""

from __future__ import annotations

from oci_hooks.findings import EXIT_DONE, EXIT_REFUSED, InputError
from oci_hooks.program import Call, run_hook

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser

    from oci_hooks.guest.request import Request
    from oci_hooks.oci import Spec, State
    from oci_hooks.system import Root

PROGRAM = "vfio-guest-bind"
# Kata's agent kills a guest hook after 10 s, and nothing of what it knew is left then.
SECONDS = 8.0


def main(argv: list[str]) -> int:
    """Run the guest hook and return its exit code. argv: the arguments without the program's name."""
    return run_hook(PROGRAM, argv, SECONDS, work, add_options, kmsg=True)


def add_options(parser: ArgumentParser) -> None:
    """Give the parser the options that only this hook has."""
    parser.description = "Bind a container's PCI devices to vfio-pci and make their VFIO groups open in it."
    parser.add_argument("--dry-run", action="store_true", help="print the plan, change nothing")
    parser.add_argument("--pid", type=int, default=0, metavar="PID", help="with --bundle: the container's init process")


def work(call: Call) -> int:
    """Do what the state asks for: bind, release, or nothing. Returns the exit code."""
    from oci_hooks.oci import is_asked, read_spec

    root = call.root
    state = read_call_state(call)
    call.container.append(state.id)
    if call.arguments.phase == "poststop" or state.status == "stopped":
        return release_groups(call, root, state)
    spec = read_spec(root, state)
    if not is_asked(state, spec):
        return EXIT_DONE
    from oci_hooks.guest.request import read_request

    try:
        request = read_request(state, spec)
        if request is not None:
            call.heed(state, spec)
            root.note("request", request)
            bind_groups(call, root, state, spec, request)
    except Exception:
        end_if_wanted(call, root, state)
        raise
    return EXIT_DONE


def read_call_state(call: Call) -> State:
    """Return the state from stdin, or one made of --bundle and --pid. Raises InputError."""
    from oci_hooks import oci
    from oci_hooks.program import read_input

    arguments = call.arguments
    if not arguments.bundle:
        return oci.mend_bundle(call.root, oci.read_state(call.root.do(read_input, call.deadline)))
    import os

    bundle = os.path.abspath(arguments.bundle)
    if not arguments.pid and not arguments.dry_run and arguments.phase != "poststop":
        raise InputError("bad-arguments", "--bundle", "needs the container's init process", "add --pid PID")
    return oci.State(os.path.basename(bundle) or "bundle", bundle, arguments.pid, "", {})


def bind_groups(call: Call, root: Root, state: State, spec: Spec, request: Request) -> None:
    """Give the container what it asks for. Raises HookError with everything put back."""
    from oci_hooks.guest.session import bind, print_plan
    from oci_hooks.guest.settings import read_guest_settings

    settings = read_guest_settings(root, call.arguments.settings)
    call.deadline.extend(settings.deadline)
    call.wishes["record"] = settings.record
    if call.arguments.dry_run:
        print_plan(call, root, state, spec, request, settings)
        return
    bind(call, root, state, spec, request, settings)


def end_if_wanted(call: Call, root: Root, state: State) -> None:
    """End the container where guest.toml has `on_failure = "kill"`: it asked for VFIO and does not get it.

    Kata's agent ignores a hook's exit code, and would start it without its devices.
    """
    from oci_hooks.guest.session import end_container
    from oci_hooks.guest.settings import read_guest_settings

    try:
        settings = read_guest_settings(root, call.arguments.settings)
    except InputError:
        # What it says can't be read, which is told already or not what failed.
        return
    if settings.on_failure == "kill" and not call.arguments.dry_run:
        end_container(root, state)


def release_groups(call: Call, root: Root, state: State) -> int:
    """Put back what this container's claim notes, if it has one. Returns the exit code."""
    import os

    from oci_hooks.guest.claims import ClaimDirectory

    # Most containers have none, and do not pay for what puts it back.
    if not root.do(os.path.exists, ClaimDirectory(root=root).journal_path(state.id)):
        return EXIT_DONE
    from oci_hooks.guest.session import print_release, release

    if call.arguments.dry_run:
        print_release(call, root, state)
        return EXIT_DONE
    findings = release(root, state, call.deadline, call.arguments.settings)
    call.findings.extend(findings)
    return EXIT_REFUSED if any(finding.level == "error" for finding in findings) else EXIT_DONE
