# SPDX-License-Identifier: Apache-2.0
"""Intel's IOMMU is there, and a kernel parameter disables it."""

from __future__ import annotations

from tests.support.guest_calls import one_runtime
from tests.vm.bundles import Containers
from tests.vm.iommus.scenario import refuse_unused_iommu

MACHINE = "idle-iommu"
KERNELS = ("6.1",)


@one_runtime
def test_disabled_iommu_explained(containers: Containers) -> None:
    refuse_unused_iommu(containers, "DMAR", "remove intel_iommu=off from the guest kernel's parameters")
