# SPDX-License-Identifier: Apache-2.0
"""Read the kernel: PCI, IOMMU groups, VFIO, processes, mounts, uevents. Changes nothing; knows no container."""
