# SPDX-License-Identifier: Apache-2.0
"""The host hook: before a container gets its VFIO devices, say what is wrong with the host, the group or Kata.

It changes nothing. Whatever a container without VFIO devices does not need is imported inside the functions.
"""

from __future__ import annotations

from oci_hooks.host.settings import take_settings
from oci_hooks.host.suite import admit_weakness, check_host, check_plain, check_sandbox, check_target
from oci_hooks.oci import is_sandbox, mend_bundle, read_spec, read_state
from oci_hooks.program import EXIT_DONE, read_input, run_hook

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser

    from oci_hooks.oci import Spec, State
    from oci_hooks.program import Call
    from oci_hooks.system import Root

PROGRAM = "vfio-host-check"
DEADLINE = 8.0


def main(argv: list[str]) -> int:
    """Run the hook, or the check by hand, and return the exit code. argv: arguments without the program's name."""
    return run_hook(PROGRAM, argv, DEADLINE, work, add_options, kmsg=False)


def add_options(parser: ArgumentParser) -> None:
    """Give the parser this hook's own options."""
    # All options in brackets would take five lines of a screen.
    parser.usage = f"{PROGRAM} [OPTIONS] [KIND]"
    parser.description = "Say what is wrong with a container's VFIO groups on this host; change nothing."
    parser.add_argument("--pid", type=int, default=0, metavar="PID", help="with --bundle: the sandbox's hypervisor")
    parser.add_argument("--all", action="store_true", help="no container: list every IOMMU group of this host")
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        dest="groups",
        metavar="N",
        help="no container: check group N; repeatable",
    )
    parser.add_argument(
        "--kata-config",
        nargs="?",
        const="",
        default=None,
        metavar="FILE",
        help="no container: print what Kata makes of FILE",
    )
    parser.add_argument("--runtime", default="", choices=["go", "rust"], help="with --kata-config: one runtime only")
    parser.add_argument(
        "--annotation",
        action="append",
        default=[],
        dest="annotations",
        metavar="K=V",
        help="with --kata-config: of the sandbox; repeatable",
    )
    parser.add_argument(
        "--format", default="", metavar="FORM", choices=["table", "nfd", "npd"], help="with --all: table, nfd or npd"
    )


def work(call: Call) -> int:
    """Do what the arguments ask for and return the exit code."""
    root = call.root
    if call.arguments.kata_config is not None:
        from oci_hooks.host.kata.ask import ask

        return ask(call, root)
    if call.arguments.all or call.arguments.groups:
        from oci_hooks.host.survey import survey

        return survey(call, root)
    state = take_state(call)
    call.container.append(state.id)
    if call.arguments.phase == "poststop" or state.status == "stopped":
        return EXIT_DONE
    spec = read_spec(root, state)
    if not spec.vfio_devices or is_sandbox(state, spec):
        return EXIT_DONE
    call.heed(state, spec)
    return check_container(call, root, state, spec)


def take_state(call: Call) -> State:
    """Return the state: from stdin, or made up for a bundle named by hand. Raises InputError."""
    if not call.arguments.bundle:
        return mend_bundle(call.root, read_state(call.root.do(read_input, call.deadline)))
    import os

    from oci_hooks.oci import State

    bundle = os.path.abspath(call.arguments.bundle)
    return State(os.path.basename(bundle) or "bundle", bundle, call.arguments.pid, "", {})


def check_container(call: Call, root: Root, state: State, spec: Spec) -> int:
    """Check everything that a container with VFIO devices needs, and return the exit code."""
    from oci_hooks.host.runtime import find_asker
    from oci_hooks.host.suite import choose_exit, excuse_privileged, settle
    from oci_hooks.host.targets import find_targets
    from oci_hooks.linux.pci import look

    settings = take_settings(call, root)
    asker = find_asker(root, state, spec, settings.kata_mode, bool(call.arguments.bundle))
    picture = look(root)
    targets = find_targets(root, picture, spec.vfio_devices)
    findings = check_host(root, picture, targets)
    for target in targets:
        findings += check_target(root, target, asker, state, call.deadline)
    if asker.is_kata:
        findings += check_sandbox(root, state, spec, asker, targets, settings, call.deadline)
    else:
        findings = excuse_privileged(findings + check_plain(root, spec, asker, targets), spec)
    told = settle(findings, settings)
    code = choose_exit(told)
    for finding in (*told, *admit_weakness(asker, code)):
        call.tell(finding)
    return code
