# SPDX-License-Identifier: Apache-2.0
"""Format the survey as Prometheus metrics for node_exporter's textfile collector.

Source: Prometheus' text exposition format 0.0.4, its naming practices, and the rules of `promtool check metrics`.
"""

from __future__ import annotations

from oci_hooks import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oci_hooks.findings import Finding

PREFIX = "oci_vfio_"
# A group that does not exist is not counted.
STATES = {
    "ready": "ready",
    "in use": "in_use",
    "not viable": "not_viable",
    "not bound": "not_bound",
    "host's": "host",
    "bridges only": "bridges_only",
    "no IOMMU": "no_iommu",
}
LEVELS = ("error", "warning", "info")


def format_metrics(has_iommu: bool, states: tuple[str, ...], findings: tuple[Finding, ...]) -> str:
    """Return groups by state and findings by level and code. Series with nothing to count have the value 0.

    has_iommu: whether an IOMMU is in use; states, findings: those of the survey.
    Only `check_failing` has a variable set of series: one for each check that fails now.
    """
    groups = [({"state": label}, states.count(state)) for state, label in STATES.items()]
    levels = [({"level": level}, sum(finding.level == level for finding in findings)) for level in LEVELS]
    failing: dict[tuple[str, str], int] = {}
    for finding in findings:
        if finding.level != "info":
            key = (finding.code, finding.level)
            failing[key] = failing.get(key, 0) + 1
    codes = [({"check": code, "level": level}, count) for (code, level), count in failing.items()]
    return "".join(
        (
            format_family("build_info", "Version of oci-vfio-hooks that made these.", [({"version": __version__}, 1)]),
            format_family("iommu_enabled", "Whether the kernel has an IOMMU in use.", [({}, int(has_iommu))]),
            format_family("groups", "IOMMU groups of this host by their state.", groups),
            format_family("check_findings", "Findings of the last survey by level.", levels),
            format_family("check_failing", "Findings of each check that fails now.", codes),
        )
    )


def format_family(name: str, text: str, series: Iterable[tuple[dict[str, str], int]]) -> str:
    """Return the lines of one gauge. Labels contain only words of this program, which need no escaping."""
    lines = [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} gauge"]
    for labels, value in series:
        inside = ",".join(f'{label}="{word}"' for label, word in labels.items())
        lines.append(f"{PREFIX}{name}{f'{{{inside}}}' if inside else ''} {value}")
    return "\n".join(lines) + "\n"


def is_own(text: str) -> bool:
    """Return whether a file contains such metrics."""
    return text.startswith(f"# HELP {PREFIX}")
