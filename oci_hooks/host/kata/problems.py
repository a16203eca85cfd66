# SPDX-License-Identifier: Apache-2.0
"""Report Kata's refusals and uncertain points of a whole configuration as findings."""

from __future__ import annotations

from oci_hooks.findings import Finding
from oci_hooks.host.kata.config import RELEASE, RELEASE_MAJOR
from oci_hooks.host.kata.go_checks import BOTH_PORTS
from oci_hooks.host.kata.hints import OTHER_CONFIG
from oci_hooks.host.kata.rust_checks import BOTH_KINDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.kata.config import KataConfig
    from oci_hooks.host.kata.sandbox import Sandbox

# Findings of one kind, in one configuration; the rest appears once these are fixed.
MAX_PROBLEMS = 3


def check_refused(sandbox: Sandbox, config: KataConfig) -> tuple[Finding, ...]:
    """kata-config-refused: Kata starts no sandbox with this configuration, or with these annotations.

    Refusals of some releases only are reported only by hand: a running shim or hypervisor shows that its Kata accepted
    the configuration. They are errors only if the release is known.
    """
    findings = []
    beforehand = sandbox.runtime.by_hand and sandbox.hypervisor is None
    # Other checks report these.
    problems = [p for p in config.reading.refused if p.code != "unallowed" and p.text not in (BOTH_PORTS, BOTH_KINDS)]
    problems = [p for p in problems if beforehand or p.code == "syntax"]
    for problem in problems[:MAX_PROBLEMS]:
        sure = problem.code == "syntax" or sandbox.major >= RELEASE_MAJOR
        level = sandbox.level if beforehand and sure else "warning"
        release = "Kata" if problem.code == "syntax" else name_release(sandbox.major)
        hint = "correct or remove it; vfio-host-check --kata-config shows the values that Kata uses"
        subject = problem.place or config.place.real
        findings.append(
            Finding(
                level,
                "kata-config-refused",
                subject,
                f"{problem.text}; {release} refuses to start a sandbox with it",
                hint,
            )
        )
    return tuple(findings)


def name_release(major: int) -> str:
    """Return Kata's release as text: the one that our readers reproduce, or the presumed running one."""
    if major >= RELEASE_MAJOR:
        return f"Kata {major}"
    known = f"this host has {major}" if major else "the release on this host is unknown"
    return f"Kata {RELEASE} ({known})"


def check_other(sandbox: Sandbox) -> tuple[Finding, ...]:
    """kata-config-other: the running hypervisor has a virtual IOMMU, and the configuration that was found has none.

    In the opposite case viommu-off reports it.
    """
    config, vmm = sandbox.config, sandbox.hypervisor
    if config is None or vmm is None or vmm.viommu != "on" or not sandbox.is_other_config:
        return ()
    setting = config.describe(config.hypervisor_setting("enable_iommu", False))
    problem = f"{vmm.process} has a virtual IOMMU ({vmm.evidence}), although {setting}; {OTHER_CONFIG}"
    hint = "name the file for this check: [kata] config in /etc/oci-vfio-hooks/host.toml"
    return (Finding("warning", "kata-config-other", config.place.real, problem, hint),)


def check_uncertain(config: KataConfig) -> tuple[Finding, ...]:
    """kata-config-uncertain: Kata's reading of a line cannot be determined."""
    hint = 'use a simple form without duplicates, e.g. enable_annotations = ["enable_iommu"]'
    return tuple(
        Finding("warning", "kata-config-uncertain", problem.place or config.place.real, problem.text, hint)
        for problem in config.reading.uncertain[:MAX_PROBLEMS]
    )
