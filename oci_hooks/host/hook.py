# SPDX-License-Identifier: Apache-2.0
"""Run the host hook: check the host, the groups and Kata before a container gets its VFIO devices.

It changes nothing. Modules that a container without VFIO devices does not need are imported inside functions.
"""

from __future__ import annotations

from oci_hooks.findings import EXIT_DONE
from oci_hooks.oci import is_sandbox, read_spec
from oci_hooks.program import Hook, read_state, run_hook
from oci_hooks.system import USUAL_SECONDS, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser

    from oci_hooks.oci import Spec, State
    from oci_hooks.program import Run

PROGRAM = "vfio-host-check"


def main(argv: list[str]) -> int:
    """Run the hook, or the check by hand, and return the exit code. argv: arguments without the program's name."""
    if any(word == "--cdi" or word.startswith("--cdi=") for word in argv):
        from oci_hooks.host.cdi import add_cdi_options, work_cdi

        options = Hook(PROGRAM, USUAL_SECONDS, work_cdi, add_cdi_options, read_record_mode, kmsg=False, by_hand=True)
        return run_hook(options, argv)
    return run_hook(Hook(PROGRAM, USUAL_SECONDS, work, add_options, read_record_mode, kmsg=False), argv)


def add_options(parser: ArgumentParser) -> None:
    """Add this hook's own options to the parser."""
    # Listing all options in the usage line would take five lines of a screen.
    parser.usage = f"{PROGRAM} [OPTIONS] [KIND]"
    parser.description = "Check a container's VFIO groups and Kata's configuration."
    parser.add_argument(
        "--pid", type=int, default=0, metavar="PID", help="with --bundle: process id of the sandbox's hypervisor"
    )
    parser.add_argument("--all", action="store_true", help="no container: list all IOMMU groups of this host")
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
        help="no container: print the values Kata takes from FILE",
    )
    parser.add_argument("--runtime", default="", choices=["go", "rust"], help="with --kata-config: only this runtime")
    parser.add_argument(
        "--annotation",
        action="append",
        default=[],
        dest="annotations",
        metavar="K=V",
        help="with --kata-config: a sandbox annotation; repeatable",
    )
    parser.add_argument(
        "--format",
        default="",
        metavar="FORM",
        choices=["table", "nfd", "npd"],
        help="with --all: output format: table, nfd or npd",
    )
    parser.add_argument(
        "--metrics",
        nargs="?",
        const="",
        default=None,
        metavar="FILE",
        help="--all as Prometheus metrics; to FILE if given",
    )
    parser.add_argument("--cdi", metavar="COMMAND", help="no container: make a CDI file; see --cdi --help")


def read_record_mode(path: str) -> str:
    """Return the setting `record` of a settings file. Raises InputError."""
    from oci_hooks.host.settings import read_host_settings

    return read_host_settings(Root(), path).record


def work(run: Run) -> int:
    """Carry out the arguments and return the exit code."""
    if run.arguments.kata_config is not None:
        from oci_hooks.host.kata.ask import print_kata_config

        return print_kata_config(run)
    if run.arguments.all or run.arguments.groups or run.arguments.metrics is not None:
        from oci_hooks.host.survey import survey

        return survey(run)
    state = read_state(run)
    run.container = state.id
    if run.arguments.phase == "poststop" or state.status == "stopped":
        return EXIT_DONE
    spec = read_spec(run.root, state)
    if not spec.vfio_devices or is_sandbox(state, spec):
        return EXIT_DONE
    run.apply_annotations(state, spec)
    return check_container(run, state, spec)


def check_container(run: Run, state: State, spec: Spec) -> int:
    """Check everything that a container with VFIO devices needs, and return the exit code."""
    from oci_hooks.host import suite
    from oci_hooks.host.runtime import detect_runtime
    from oci_hooks.host.settings import load_settings

    settings, root = load_settings(run), run.root
    runtime = detect_runtime(root, state, spec, settings.kata_mode, bool(run.arguments.bundle))
    findings = suite.check_container(root, state, spec, runtime, settings, run.deadline)
    code = suite.choose_exit_code(suite.report_findings(run, findings, settings))
    for finding in suite.warn_failure_ignored(runtime, code):
        run.report(finding)
    return code
