# SPDX-License-Identifier: Apache-2.0
"""Run the checks in order, and derive the exit code from their findings and the modes of host.toml."""

from __future__ import annotations

from oci_hooks.findings import EXIT_DONE, EXIT_REFUSED, Finding
from oci_hooks.host import checks, container_checks
from oci_hooks.host.hypervisor import may_use_vfio
from oci_hooks.host.targets import find_targets
from oci_hooks.linux.holders import HolderFinder
from oci_hooks.oci import HOST_ONLY_NODES, merge_annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from oci_hooks.host.runtime import Runtime
    from oci_hooks.host.settings import HostSettings
    from oci_hooks.host.targets import Target
    from oci_hooks.oci import Spec, State
    from oci_hooks.program import Run
    from oci_hooks.system import Deadline, Root


ORDER = ("error", "warning", "info")
# Codes that can be enforced although they are only information in some cases.
ENFORCEABLE = ("viommu-off",)


def run_check(subject: str, check: Callable[..., tuple[Finding, ...]], *values: Any) -> tuple[Finding, ...]:
    """Return a check's findings; a check that the system does not allow to run gives a warning, not an error.

    subject: the object of the check, in an administrator's words.
    """
    try:
        return check(*values)
    except OSError as error:
        problem = f"cannot be checked: {error.filename or 'a system call'}: {error.strerror or error}"
        hint = "run the hook as root, with the host's /sys and /proc"
        return (Finding("warning", "check-failed", subject, problem, hint),)


def apply_overrides(findings: Iterable[Finding], settings: HostSettings) -> tuple[Finding, ...]:
    """Return the findings under the modes of host.toml, errors first, without duplicates.

    settings: `mode` for all checks ("enforce" or "warn"), `checks` for single ones by code: "warn" turns an error into
    a warning, "enforce" a warning into an error, "ignore" omits it. A check's own mode takes precedence.
    """
    kept = []
    for finding in findings:
        level = override_level(finding, settings.mode, settings.find_mode(finding.code))
        changed = finding.replace(level=level)
        if level and changed not in kept:
            kept.append(changed)
    return tuple(sorted(kept, key=lambda finding: ORDER.index(finding.level)))


def override_level(finding: Finding, general: str, own: str) -> str:
    """Return a finding's level under the modes; "" to omit it."""
    if own == "ignore":
        return ""
    if own == "enforce":
        return "error" if finding.level != "info" or finding.code in ENFORCEABLE else "info"
    if own == "warn" or general == "warn":
        return "warning" if finding.level == "error" else finding.level
    return finding.level


def downgrade_privileged(findings: Iterable[Finding], spec: Spec) -> list[Finding]:
    """Return the findings with errors turned into warnings if the container was merely given every node of the host.

    Docker, podman and Kubernetes list all of the host's devices for a privileged container, VFIO groups included. Such
    an entry is not a request, and a busy or unbound group does no harm.
    """
    if not any(device.path in HOST_ONLY_NODES for device in spec.devices):
        return list(findings)
    return [finding.replace(level="warning") if finding.level == "error" else finding for finding in findings]


def report_findings(run: Run, findings: Iterable[Finding], settings: HostSettings) -> tuple[Finding, ...]:
    """Add the findings to a run's report under the modes of host.toml, and return them as they are reported."""
    reported = apply_overrides(findings, settings)
    for finding in reported:
        run.report(finding)
    return reported


def choose_exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code: refused if any finding is an error."""
    return EXIT_REFUSED if any(finding.level == "error" for finding in findings) else EXIT_DONE


def check_container(
    root: Root, state: State, spec: Spec, runtime: Runtime, settings: HostSettings, deadline: Deadline
) -> list[Finding]:
    """Return the findings of all checks for a container with VFIO devices, before the modes of host.toml."""
    targets = find_targets(root, spec.vfio_devices)
    finder = HolderFinder(root, deadline, may_use_vfio)
    findings = check_host(root, targets)
    for target in targets:
        findings += check_target(root, target, runtime, state, finder)
    if runtime.is_kata:
        return findings + check_kata_sandbox(root, state, spec, runtime, targets, settings, finder)
    return downgrade_privileged(findings + check_plain_runtime(root, spec, runtime, targets), spec)


def check_host(root: Root, targets: tuple[Target, ...]) -> list[Finding]:
    """Return the findings on the host itself."""
    findings = [*run_check("control node", checks.check_host_control_node, root, targets)]
    if any(target.group is None and not target.found_by for target in targets):
        findings += run_check("host IOMMU", checks.check_iommu, root)
    return findings


def check_target(root: Root, target: Target, runtime: Runtime, state: State, finder: HolderFinder) -> list[Finding]:
    """Return the findings on one entry of linux.devices and its group."""
    return [
        *run_check("group existence", checks.check_group_exists, root, target),
        *run_check("device number", checks.check_device_numbers, target, runtime),
        *run_check("no-IOMMU mode", checks.check_noiommu, target, runtime),
        *run_check("mediated devices", checks.check_mediated, target),
        *run_check("group members", checks.check_empty, target),
        *run_check("group viability", checks.check_viability, target),
        *run_check("group status", checks.check_group_status, root, target, runtime, state, finder),
    ]


def check_plain_runtime(root: Root, spec: Spec, runtime: Runtime, targets: tuple[Target, ...]) -> list[Finding]:
    """Return the findings on a plain runtime's container, which uses the host's devices without a guest."""
    return [
        *run_check("control node", container_checks.check_control_node, spec, targets),
        *run_check("device rules", container_checks.check_device_rules, spec, targets),
        *run_check("locked memory limit", container_checks.check_memlock, root, spec, runtime),
    ]


def check_kata_sandbox(
    root: Root,
    state: State,
    spec: Spec,
    runtime: Runtime,
    targets: tuple[Target, ...],
    settings: HostSettings,
    finder: HolderFinder,
) -> list[Finding]:
    """Return the findings on Kata's configuration, or on the running hypervisor."""
    from oci_hooks.host.kata.checks import check_kata
    from oci_hooks.host.kata.lookup import find_config
    from oci_hooks.host.kata.sandbox import inspect_sandbox

    annotations = merge_annotations(state, spec)
    found = find_config(root, runtime, annotations, settings.kata_config)
    attached = all(checks.is_attached(root, target, runtime, finder) for target in targets)
    sandbox = inspect_sandbox(root, runtime, found, annotations, attached)
    findings = [*run_check("Kata configuration", check_kata, sandbox, spec, targets)]
    if sandbox.wanted:
        findings += run_check("locked memory limit", container_checks.check_memlock, root, spec, runtime)
        if sandbox.mode == "vfio":
            findings += run_check("control node", container_checks.check_control_node, spec, targets)
    return findings


def warn_failure_ignored(runtime: Runtime, code: int) -> tuple[Finding, ...]:
    """Return the warning that a refusal has no effect, if the runtime is known to ignore it."""
    if code == EXIT_DONE or runtime.kind != "kata-rs":
        return ()
    problem = "ignores the failure of this hook and starts the sandbox anyway"
    hint = "reject such pods earlier, e.g. by an admission webhook, or use Kata's Go runtime"
    return (Finding("warning", "failure-ignored", "runtime-rs", problem, hint),)
