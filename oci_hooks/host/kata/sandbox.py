# SPDX-License-Identifier: Apache-2.0
"""What is known of a sandbox before it is checked: its runtime, its configuration, its hypervisor."""

from __future__ import annotations

import os

from oci_hooks.frozen import Frozen
from oci_hooks.host.kata.config import RELEASE_MAJOR
from oci_hooks.host.kata.lookup import read_major
from oci_hooks.oci import DEVICES_ANNOTATION, MAP_ANNOTATION
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.hypervisor import Hypervisor
    from oci_hooks.host.kata.config import KataConfig
    from oci_hooks.host.kata.lookup import ConfigLookup
    from oci_hooks.host.runtime import Runtime
    from oci_hooks.system import Root


class Sandbox(Frozen):
    """What is known of the sandbox.

    config: None where no configuration was found; certain: whether it is sure to be the one that Kata reads;
    hypervisor: the running one, None where not known; machine: the host's, as uname says; mode: vfio_mode, "" where it
    is not set; wanted: whether the container wants VFIO inside the guest; attached: whether the sandbox's hypervisor
    holds the groups already; major: Kata's major release, 0 where not known.
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
    def level(self) -> str:
        """How bad a wrong setting is: a file or a reading that is in doubt never refuses a container."""
        return "error" if self.certain and not (self.config and self.config.reading.uncertain) else "warning"


def inspect_sandbox(
    root: Root, runtime: Runtime, found: ConfigLookup, annotations: dict[str, str], attached: bool
) -> Sandbox:
    """Return what is known of the sandbox. attached: whether its hypervisor holds all of the container's groups."""
    asked = any(annotations.get(name, "").strip() for name in (DEVICES_ANNOTATION, MAP_ANNOTATION))
    mode = found.config.runtime_setting("vfio_mode", "").value if found.config else ""
    major = read_major(root)
    if not mode and found.config and found.config.flavour == "go" and major >= RELEASE_MAJOR:
        # The zero value of a Go variable; of older releases it is not known here.
        mode = str(found.config.reading.values["vfio_mode"])
    wanted = asked or mode == "vfio"
    machine = root.do(read_architecture)
    return Sandbox(
        runtime, found.config, found.certain, runtime.hypervisor, machine, str(mode), wanted, attached, major
    )


@tagged("machine")
def read_architecture() -> str:
    """Return the host's architecture, as uname says it."""
    return os.uname().machine
