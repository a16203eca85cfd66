# SPDX-License-Identifier: Apache-2.0
"""From findings to a verdict: the modes of host.toml, and checks that could not be made."""

from __future__ import annotations

from oci_hooks.findings import EXIT_DONE, EXIT_REFUSED, Finding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from oci_hooks.host.settings import HostSettings
    from oci_hooks.oci import Spec

# Nodes that nobody gives to a container one by one: where they are listed, everything is.
HOST_ONLY_NODES = ("/dev/mem", "/dev/port", "/dev/kmsg")
ORDER = ("error", "warning", "info")


def run_check(check: Callable[..., tuple[Finding, ...]], *values: Any) -> tuple[Finding, ...]:
    """Return what a check finds. One that the system does not let look must not stop a container: it is a warning."""
    try:
        return check(*values)
    except OSError as error:
        problem = f"could not be made: {error.filename or 'a system call'}: {error.strerror or error}"
        hint = "run the hook as root, with the host's /sys and /proc"
        return (Finding("warning", "check-failed", check.__name__, problem, hint),)


def settle(findings: Iterable[Finding], settings: HostSettings) -> tuple[Finding, ...]:
    """Return the findings as host.toml wants them, errors first, each once.

    settings: `mode` for all checks ("enforce" or "warn"), `checks` for single ones by their code: "warn" tells an error
    as a warning, "enforce" a warning as an error, "ignore" leaves it out. A check's own mode goes first.
    """
    kept = []
    for finding in findings:
        level = choose_level(finding, settings.mode, settings.find_mode(finding.code))
        changed = finding.replace(level=level)
        if level and changed not in kept:
            kept.append(changed)
    return tuple(sorted(kept, key=lambda finding: ORDER.index(finding.level)))


def choose_level(finding: Finding, general: str, own: str) -> str:
    """Return a finding's level under the modes; "" to leave it out."""
    if own == "ignore":
        return ""
    if own == "enforce":
        return finding.level if finding.level == "info" else "error"
    if own == "warn" or general == "warn":
        return "warning" if finding.level == "error" else finding.level
    return finding.level


def excuse_privileged(findings: Iterable[Finding], spec: Spec) -> list[Finding]:
    """Return the findings with no error among them if the container was merely given every node of the host.

    Docker, podman and Kubernetes list all of the host's devices for a privileged container, VFIO groups included: there
    a group is no request, and one that is busy or not bound hurts nobody.
    """
    if not any(device.path in HOST_ONLY_NODES for device in spec.devices):
        return list(findings)
    return [finding.replace(level="warning") if finding.level == "error" else finding for finding in findings]


def choose_exit(findings: Iterable[Finding]) -> int:
    """Return the exit code: refused as soon as one finding is an error."""
    return EXIT_REFUSED if any(finding.level == "error" for finding in findings) else EXIT_DONE
