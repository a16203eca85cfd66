# SPDX-License-Identifier: Apache-2.0
"""Read what the firmware reports of IOMMUs, to explain why the kernel uses none.

Sources: the kernel's Documentation/admin-guide/kernel-parameters.txt (intel_iommu, amd_iommu, iommu) and
drivers/acpi/viot.c. AMD's IOMMU needs no parameter: drivers/iommu/amd/init.c knows no amd_iommu=on.
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root

ACPI_TABLES = "/sys/firmware/acpi/tables"
# Kernel parameters that disable IOMMUs.
OFF_PARAMETERS = ("iommu=off", "intel_iommu=off", "amd_iommu=off")


class UnusedIommu(Frozen):
    """An IOMMU that the firmware reports.

    table: the ACPI table that describes it; option: the kernel's build option for its driver; parameter: the kernel
    parameter that enables it, "" if it needs none or the kernel was booted with it.
    """

    table: str
    option: str
    parameter: str = ""


# In the order in which they are looked up. Not IORT, arm64's: a machine without an SMMU has one, too.
KNOWN_IOMMUS = (
    UnusedIommu("DMAR", "CONFIG_INTEL_IOMMU", "intel_iommu=on"),
    UnusedIommu("IVRS", "CONFIG_AMD_IOMMU"),
    UnusedIommu("VIOT", "CONFIG_VIRTIO_IOMMU"),
)


def find_unused_iommu(root: Root) -> UnusedIommu | None:
    """Return the IOMMU that the firmware reports, None if it reports none. For a kernel without IOMMU groups."""
    tables = root.list_names(ACPI_TABLES)
    found = next((iommu for iommu in KNOWN_IOMMUS if iommu.table in tables), None)
    if found and found.parameter in read_kernel_parameters(root):
        return found.replace(parameter="")
    return found


def find_off_parameters(root: Root) -> list[str]:
    """Return the kernel parameters that disable the machine's IOMMU: ["intel_iommu=off"]."""
    return [word for word in read_kernel_parameters(root) if word in OFF_PARAMETERS]


def read_kernel_parameters(root: Root) -> list[str]:
    """Return the words of the kernel's command line."""
    return root.read_text_or("/proc/cmdline", "").split()
