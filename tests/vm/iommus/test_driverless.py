# SPDX-License-Identifier: Apache-2.0
"""The virtio IOMMU is there, and Debian's kernel has no driver for it."""

from __future__ import annotations

from tests.support.guest_calls import one_runtime
from tests.vm.bundles import Containers
from tests.vm.iommus.scenario import refuse_unused_iommu

MACHINE = "virtio-iommu"
KERNELS = ("6.1",)


@one_runtime
def test_missing_driver_explained(containers: Containers) -> None:
    refuse_unused_iommu(containers, "VIOT", "use a guest kernel built with CONFIG_VIRTIO_IOMMU")
