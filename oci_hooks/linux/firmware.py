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


class UnusedIommu(Frozen):
    """An IOMMU that the firmware reports.

    table: the ACPI table that describes it; option: the kernel's build option for its driver; name: of its kernel
    parameter, "" if it has none; parameter: the one that enables it, "" if it needs none or the kernel was booted with
    it; off: the parameters that disable it, of those that the kernel was booted with.
    """

    table: str
    option: str
    name: str = ""
    parameter: str = ""
    off: tuple[str, ...] = ()


# In the order in which they are looked up. Not IORT, arm64's: a machine without an SMMU has one, too.
KNOWN_IOMMUS = (
    UnusedIommu("DMAR", "CONFIG_INTEL_IOMMU", "intel_iommu", "intel_iommu=on"),
    UnusedIommu("IVRS", "CONFIG_AMD_IOMMU", "amd_iommu"),
    UnusedIommu("VIOT", "CONFIG_VIRTIO_IOMMU"),
)


def find_unused_iommu(root: Root) -> UnusedIommu | None:
    """Return the IOMMU that the firmware reports, None if it reports none. For a kernel without IOMMU groups."""
    tables = root.list_names(ACPI_TABLES)
    found = next((iommu for iommu in KNOWN_IOMMUS if iommu.table in tables), None)
    if not found or not found.name:
        return found
    words = root.read_text_or("/proc/cmdline", "").split()
    # Each word is a list of options, and a later one overrides an earlier one.
    given = {word: word.partition("=")[2].split(",") for word in words if word.startswith(f"{found.name}=")}
    last = [value for values in given.values() for value in values if value in ("on", "off")][-1:]
    off = [word for word, values in given.items() if last == ["off"] and "off" in values]
    off += [word for word in words if word == "iommu=off"]
    return found.replace(off=tuple(off), parameter="" if last == ["on"] else found.parameter)
