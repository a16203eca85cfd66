# SPDX-License-Identifier: Apache-2.0
"""`vfio-host-check --cdi`: the groups of this host as devices of the Container Device Interface, and a list of them."""

from __future__ import annotations

import os
import sys

from oci_hooks.findings import EXIT_REFUSED, Finding, InputError
from oci_hooks.host import checks
from oci_hooks.host.cdi_document import KIND, Form, format_document, is_own, make_document
from oci_hooks.host.cdi_groups import find_unmatched, list_offers, parse_choices, report_offers
from oci_hooks.host.files import put_file
from oci_hooks.host.hypervisor import may_use_vfio
from oci_hooks.host.settings import load_settings
from oci_hooks.host.suite import choose_exit_code, report_findings
from oci_hooks.host.survey import describe_line, report_unfinished
from oci_hooks.linux.holders import HolderFinder
from oci_hooks.linux.listing import format_columns
from oci_hooks.log import write_stdout
from oci_hooks.oci import CONTROL_NODE, IOMMUFD_NODE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from typing import Any

    from oci_hooks.host.cdi_groups import Offer
    from oci_hooks.host.settings import HostSettings
    from oci_hooks.program import Run
    from oci_hooks.system import Root

COMMANDS = ("generate", "list")
# The packages' install path; another path is used only if this program was started from there.
HOOK = "/usr/libexec/oci/hooks.d/vfio-host-check"
# Engines read files with these endings only, and no .yml.
FORMS = {".json": "json", ".yaml": "yaml"}


def add_cdi_options(parser: ArgumentParser) -> None:
    """Add the options of --cdi to the parser."""
    parser.usage = "vfio-host-check --cdi [generate|list] [OPTIONS]"
    parser.description = "Write this host's VFIO groups as devices of the Container Device Interface."
    parser.add_argument(
        "--cdi", nargs="?", const="generate", choices=COMMANDS, metavar="COMMAND", help="generate (the default) or list"
    )
    parser.add_argument("--output", default="", metavar="FILE", help="write FILE, if it would change, not stdout")
    parser.add_argument("--format", default="", choices=["json", "yaml"], help="yaml, or what FILE's name ends with")
    parser.add_argument(
        "--select",
        action="append",
        default=[],
        dest="selects",
        metavar="WHAT",
        help="only N, BDF, id:VVVV:DDDD, class:CC; repeatable",
    )
    parser.add_argument("--cdev", action="store_true", help="/dev/vfio/devices/* and /dev/iommu, not groups")
    parser.add_argument("--annotate", action="store_true", help="add vfio-guest-bind's annotation (CDI 0.6.0)")
    parser.add_argument("--no-hook", action="store_true", help="leave out the host check as createRuntime hook")
    parser.add_argument("--force", action="store_true", help="replace FILE even if something else made it")


def work_cdi(run: Run) -> int:
    """Carry out the arguments after --cdi and return the exit code. Raises InputError, Refusal."""
    arguments, root = run.arguments, run.root
    choices = parse_choices(arguments.selects)
    form = choose_form(arguments.output, arguments.format)
    settings = load_settings(run)
    finder = HolderFinder(root, run.deadline, may_use_vfio)
    offers = list_offers(root, arguments.cdev, finder)
    findings = [*checks.check_iommu(root), *find_unmatched(choices, offers), *report_unfinished(finder)]
    chosen = tuple(offer for offer in offers if not choices or any(choice.fits(offer.group) for choice in choices))
    if arguments.cdi == "list":
        run.details["groups"] = [describe_offer(offer) for offer in chosen]
        if not arguments.json:
            write_stdout(format_offers(chosen))
        return conclude(run, findings, settings)
    findings += report_offers(chosen, choices)
    passable = tuple(offer for offer in chosen if not offer.obstacles)
    if not passable:
        findings += [report_empty(arguments.output)] if offers else []
        return max(conclude(run, findings, settings), EXIT_REFUSED)
    document, more = make_document(passable, Form(arguments.cdev, choose_hook(arguments.no_hook), arguments.annotate))
    findings += [*check_common_node(root, arguments.cdev), *more]
    run.details["cdi"] = document
    text = format_document(document, form)
    # Findings are reported even if the file cannot be written.
    code = conclude(run, findings, settings)
    if arguments.output:
        write_output(run, text, passable)
    elif not arguments.json:
        write_stdout(text)
    return code


def conclude(run: Run, findings: list[Finding], settings: HostSettings) -> int:
    """Record the findings under the modes of host.toml and return the exit code."""
    return choose_exit_code(report_findings(run, findings, settings))


def choose_form(output: str, named: str) -> str:
    """Return "json" or "yaml". Raises InputError if name and format contradict, or if no engine reads the name."""
    if not output:
        return named or "yaml"
    form = FORMS.get(os.path.splitext(output)[1], "")
    if not form:
        hint = "use a name that ends with .yaml or .json, e.g. --output=/run/cdi/oci-vfio-hooks.yaml"
        raise InputError("bad-arguments", f"--output {output}", "no engine reads a file of this name", hint)
    if named not in ("", form):
        problem = f"contradicts --format {named}"
        raise InputError("bad-arguments", f"--output {output}", problem, "leave --format out")
    return form


def choose_hook(left_out: bool) -> str:
    """Return the path of the host check for the hook, "" for no hook: this program's own path if it has that name."""
    if left_out:
        return ""
    own = os.path.realpath(sys.argv[0])
    return own if os.path.basename(own) == os.path.basename(HOOK) else HOOK


def check_common_node(root: Root, cdev: bool) -> tuple[Finding, ...]:
    """control-node-missing: the node that every device of the file needs does not exist."""
    node, module = (IOMMUFD_NODE, "iommufd") if cdev else (CONTROL_NODE, "vfio")
    if root.exists(node):
        return ()
    hint = f"load it: modprobe {module}"
    return (
        Finding(
            "error", "control-node-missing", node, "is not on the host, and every device of the CDI file needs it", hint
        ),
    )


def report_empty(output: str) -> Finding:
    """cdi-empty: CDI allows no file without a device."""
    problem = "no group can be passed, and CDI allows no file without devices"
    if output:
        problem += f"; {output} is unchanged"
    hint = "list the reasons: vfio-host-check --cdi list"
    return Finding("error", "cdi-empty", "host", problem, hint)


def write_output(run: Run, text: str, passable: tuple[Offer, ...]) -> None:
    """Write this text as the CDI file. Raises Refusal [output]."""
    path = os.path.abspath(run.arguments.output)
    written = put_file(run.root, path, text, is_own, run.arguments.force)
    run.details["written"] = written
    if written:
        groups = f"{len(passable)} group{'s' if len(passable) > 1 else ''}"
        hint = f"use it: podman run --device {KIND}={passable[0].group.name}"
        run.report(Finding("info", "cdi-written", path, f"written with {groups}", hint))


# The list -------------------------------------------------------------------------------------------------------------


def format_offers(offers: tuple[Offer, ...]) -> str:
    """Return the list as text: the name to request, or the reason why there is none."""
    rows: list[tuple[str, ...]] = [("CDI DEVICE", "GROUP", "STATE", "DEVICES", "WHY NOT")]
    for offer in offers:
        members = ",".join(member.name for member in offer.group.passable) or "-"
        reasons = "; ".join(f"{finding.problem}; {finding.hint}" for finding in offer.obstacles)
        name = "-" if offer.obstacles else f"{KIND}={offer.group.name}"
        rows.append((name, offer.group.name, offer.line.state, members, reasons or "-"))
    return format_columns(rows)


def describe_offer(offer: Offer) -> dict[str, Any]:
    """Return a group of the list as an object for --json."""
    names = [] if offer.obstacles else [offer.group.name, *offer.nodes]
    return {
        **describe_line(offer.line),
        "cdi": [f"{KIND}={name}" for name in names],
        "obstacles": [finding.as_dict() for finding in offer.obstacles],
    }
