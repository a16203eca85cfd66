# SPDX-License-Identifier: Apache-2.0
"""AMD's IOMMU: Debian's kernel uses it unasked."""

from tests.vm.iommus.scenario import (  # noqa: F401 - pytest finds them here
    test_auto_leaves_iommu_alone,
    test_group_opens_with_hook_only,
    test_host_check_ready,
)

MACHINE = "amd-iommu"
KERNELS = ("6.1", "full")
