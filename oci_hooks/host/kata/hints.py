# SPDX-License-Identifier: Apache-2.0
"""Write hints for findings on Kata's configuration, as instructions that can be followed literally."""

from __future__ import annotations

from oci_hooks.annotations import HYPERVISOR_PREFIX
from oci_hooks.host.kata.admission import AnnotationFilter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.kata.config import KataConfig, Setting

# Characters that printf(1) or a quoted shell word would change.
UNSAFE = ("\\", "'", "%")
# What decides which file it is (containerd-shim-v2/create.go, loadRuntimeConfig); the shim does not publish it.
OTHER_CONFIG = (
    "another configuration was in force when it started: the runtime's option ConfigPath (containerd, Docker), "
    "runtime_config_path (CRI-O) or ctr --runtime-config-path may name it"
)


def write_fix(config: KataConfig, setting: Setting, value: str) -> str:
    """Return how to set a setting of the hypervisor's table, at the place that decides it.

    value: as TOML writes it.
    """
    if setting.annotation:
        return f"set the sandbox's annotation {setting.annotation}: {value}"
    line = f"{setting.key} = {value}"
    if setting.is_drop_in:
        return f"set {line} in {setting.places[-1]}"
    if any(word in line for word in UNSAFE):
        return f"set {line} in {setting.places[-1] if setting.places else config.place.real}"
    path = f"{config.directory}/90-{setting.key.replace('_', '-')}.toml"
    table = f"[hypervisor.{config.hypervisor}]"
    return f"mkdir -p {config.directory} && printf '{table}\\n{line}\\n' > {path}; then start a new sandbox"


def make_viommu_hint(config: KataConfig | None, setting: Setting | None, is_other: bool) -> str:
    """Return how to enable the virtual IOMMU. is_other: the hypervisor was started with another configuration."""
    if is_other:
        return f"{OTHER_CONFIG}; set enable_iommu = true there, and start a new sandbox"
    annotation = f'annotation {HYPERVISOR_PREFIX}enable_iommu: "true"'
    if config is None or setting is None:
        return f"set enable_iommu = true in Kata's configuration.toml, or the sandbox's {annotation}"
    is_ignored = setting.written is True and setting.value is not True
    if setting.annotation or is_ignored:
        return f"set the sandbox's {annotation}"
    # An annotation that is not allowed would be refused or ignored.
    patterns = config.hypervisor_setting("enable_annotations", []).value
    admitted = AnnotationFilter(patterns, config.flavour == "rs").allows("enable_iommu")
    other = f", or the sandbox's {annotation}" if admitted else ""
    if setting.is_drop_in:
        return f"set enable_iommu = true in {setting.places[-1]}{other}"
    drop_in = f"printf '[hypervisor.{config.hypervisor}]\\nenable_iommu = true\\n' > {config.directory}/90-viommu.toml"
    return f"set enable_iommu = true there, or: mkdir -p {config.directory} && {drop_in}; then start a new sandbox"
