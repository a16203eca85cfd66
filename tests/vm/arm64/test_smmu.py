# SPDX-License-Identifier: Apache-2.0
"""arm64's SMMUv3, with Debian 12's kernel."""

from tests.vm.iommus.scenario import (  # noqa: F401 - pytest finds them here
    test_auto_leaves_iommu_alone,
    test_group_opens_with_hook_only,
    test_host_check_ready,
)

MACHINE = "arm64"
KERNELS = ("arm64",)
