# SPDX-License-Identifier: Apache-2.0
"""Survey the guest before any container asks, for `vfio-guest-bind --all`. Reads only, and no standard input."""

from __future__ import annotations

from oci_hooks.findings import EXIT_DONE, EXIT_REFUSED, InputError
from oci_hooks.guest.settings import read_guest_settings
from oci_hooks.guest.survey_picture import look_around
from oci_hooks.guest.survey_text import describe_picture, format_picture
from oci_hooks.log import write_stdout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.program import Arguments, Run


def survey(run: Run) -> int:
    """Print what this guest has for containers, and return the exit code. Raises InputError.

    0: no finding is an error; 1: one is, so that a container would not get a device.
    """
    check_arguments(run.arguments)
    settings = read_guest_settings(run.root, run.arguments.settings)
    run.deadline.extend(settings.deadline)
    picture = look_around(run, settings)
    run.details.update(describe_picture(picture))
    if not run.arguments.json:
        write_stdout(format_picture(picture))
    return EXIT_REFUSED if any(finding.level == "error" for finding in run.findings) else EXIT_DONE


def check_arguments(arguments: Arguments) -> None:
    """Raise InputError [bad-arguments] where arguments for a container are given, too."""
    given = {
        "KIND": arguments.phase,
        "--bundle": arguments.bundle,
        "--pid": arguments.pid,
        "--dry-run": arguments.dry_run,
    }
    wrong = ", ".join(name for name, value in given.items() if value)
    if wrong:
        hint = "leave it out, or leave out --all"
        raise InputError("bad-arguments", "--all", f"is without a container and does not go with {wrong}", hint)
