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
SANDBOX_ID_ANNOTATIONS = (
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
    "io.podman.annotations.sandbox-id",
)
