# SPDX-License-Identifier: Apache-2.0
"""The virtio IOMMU, which Cloud Hypervisor has too: Debian 12's kernel has no driver for it."""

from tests.vm.iommus.scenario import (  # noqa: F401 - pytest finds them here
    test_auto_leaves_iommu_alone,
    test_group_opens_with_hook_only,
    test_host_check_ready,
)

MACHINE = "virtio-iommu"
KERNELS = ("full",)
