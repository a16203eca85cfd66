# SPDX-License-Identifier: Apache-2.0
"""The devices and groups of a guest, and what settings and claims allow of them: what selection.py chooses from."""

from __future__ import annotations

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from oci_hooks.linux.pci import Inventory, PciDevice

VIOMMU_HINT = (
    "set enable_iommu = true in [hypervisor.qemu] of Kata's configuration.toml, or start QEMU with -device intel-iommu "
    "(arm64: -machine virt,iommu=smmuv3)"
)


class Candidates(Frozen):
    """The devices and groups that this container may choose from.

    auto_ids, auto_classes: prefixes of `vvvv:dddd` and of the class code that `auto` and counting are confined to, all
    when empty; never: selectors (`id` or `class` prefixes) that they leave out; claims: group -> container that has it;
    live: (major, minor) -> VFIO group that has a node with these numbers; uses: gives the reasons why a device must not
    be touched; forced: BDFs for which guest.toml overrules them; cdevs: (major, minor) -> BDF of the device whose own
    node has these numbers; viommu_hint: what gives this guest IOMMU groups; is_pods: the other containers of the pod
    ask for the same.
    """

    inventory: Inventory
    claims: Mapping[str, str]
    live: Mapping[tuple[int, int], str]
    uses: Callable[[PciDevice], list[str]]
    never: tuple[str, ...] = ()
    auto_ids: tuple[str, ...] = ()
    auto_classes: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    cdevs: Mapping[tuple[int, int], str] = {}
    viommu_hint: str = VIOMMU_HINT
    is_pods: bool = False
