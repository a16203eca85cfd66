# SPDX-License-Identifier: Apache-2.0
"""Names of other programs' annotations, by which a run with VFIO identifies runtime, sandbox and configuration.

oci.py has the names that every container's run needs.
"""

from __future__ import annotations

KATA_PREFIX = "io.katacontainers.pkg.oci."
CONFIG_PATH_ANNOTATION = "io.katacontainers.config_path"
HYPERVISOR_PREFIX = "io.katacontainers.config.hypervisor."
RUNTIME_PREFIX = "io.katacontainers.config.runtime."
AGENT_PREFIX = "io.katacontainers.config.agent."
CRI_PREFIXES = ("io.kubernetes.cri.", "io.kubernetes.cri-o.")
HANDLER_ANNOTATIONS = ("io.containerd.cri.runtime-handler", "io.kubernetes.cri-o.RuntimeHandler")
CDI_PREFIX = "cdi.k8s.io/"
# The device of the guest add-on's CDI specification, which declares the guest hook.
GUEST_CDI_DEVICE = "oci-vfio-hooks/bind=all"
SANDBOX_ID_ANNOTATIONS = (
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
    "io.podman.annotations.sandbox-id",
)


def asks_for_guest_cdi(annotations: dict[str, str]) -> bool:
    """Return whether a container names the CDI device that declares the guest hook. A value may list several."""
    values = [value for name, value in annotations.items() if name.startswith(CDI_PREFIX)]
    return any(GUEST_CDI_DEVICE in value.split(",") for value in values)
