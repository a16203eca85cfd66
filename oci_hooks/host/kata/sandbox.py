# SPDX-License-Identifier: Apache-2.0
"""Collect the facts about a sandbox before its checks: its runtime, its configuration, its hypervisor."""

from __future__ import annotations

import os

from oci_hooks.frozen import Frozen
from oci_hooks.host.hypervisor import KERNEL_EVIDENCE
from oci_hooks.host.kata.config import RELEASE_MAJOR
from oci_hooks.host.kata.lookup import read_major
from oci_hooks.oci import MAP_ANNOTATION, name_devices_annotation
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.hypervisor import Hypervisor
    from oci_hooks.host.kata.config import KataConfig
    from oci_hooks.host.kata.lookup import ConfigLookup
    from oci_hooks.host.runtime import Runtime
    from oci_hooks.system import Root


class Sandbox(Frozen):
    """The known facts about the sandbox.

    config: None if no configuration was found; certain: whether Kata surely reads this one; hypervisor: the running
    one, None if unknown; machine: the host's, as in uname; mode: vfio_mode, "" if not set;
    wanted: whether the container wants VFIO inside the guest; attached: whether the sandbox's hypervisor
    holds the groups already; major: Kata's major release, 0 if unknown.
    """

    runtime: Runtime
    config: KataConfig | None
    certain: bool
    hypervisor: Hypervisor | None
    machine: str
    mode: str
    wanted: bool
    attached: bool
    major: int = 0

    @property
    def is_other_config(self) -> bool:
        """Whether the running QEMU shows that it was started with another configuration than this one.

        Kata adds the virtual IOMMU on x86_64 exactly if enable_iommu is true (qemu_amd64.go, runtime-rs add_iommu). A
        kernel parameter that switches it off does not show which configuration that was.
        """
        vmm = self.hypervisor
        if self.config is None or vmm is None or vmm.kind != "qemu" or self.machine != "x86_64":
            return False
        is_on = self.config.hypervisor_setting("enable_iommu", False).value is True
        has_device = vmm.viommu == "on" or vmm.evidence.startswith(KERNEL_EVIDENCE)
        return vmm.viommu != "" and has_device != is_on

    @property
    def level(self) -> str:
        """The level of findings on a wrong setting: an uncertain file or reading never refuses a container."""
        is_sure = self.certain and not self.is_other_config
        return "error" if is_sure and not (self.config and self.config.reading.uncertain) else "warning"


def inspect_sandbox(
    root: Root, runtime: Runtime, found: ConfigLookup, annotations: dict[str, str], attached: bool
) -> Sandbox:
    """Return the known facts about the sandbox. attached: whether its hypervisor holds all groups of the container."""
    asked = any(annotations.get(name, "").strip() for name in (name_devices_annotation(annotations), MAP_ANNOTATION))
    mode = found.config.runtime_setting("vfio_mode", "").value if found.config else ""
    major = read_major(root)
    if not mode and found.config and found.config.flavour == "go" and major >= RELEASE_MAJOR:
        # The zero value of a Go variable; for older releases it is unknown here.
        mode = str(found.config.reading.values["vfio_mode"])
    wanted = asked or mode == "vfio"
    machine = root.do(read_architecture)
    return Sandbox(
        runtime, found.config, found.certain, runtime.hypervisor, machine, str(mode), wanted, attached, major
    )


@tagged("machine")
def read_architecture() -> str:
    """Return the host's architecture, as in uname."""
    return os.uname().machine
