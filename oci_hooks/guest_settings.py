# SPDX-License-Identifier: Apache-2.0
"""What guest.toml may say, and what holds where it says nothing."""

from __future__ import annotations

from oci_hooks.plan import NodeOwner
from oci_hooks.records import Record
from oci_hooks.request import normalize_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.files import Root

GUEST_SETTINGS = "/etc/oci-vfio-hooks/guest.toml"
# What a virtual machine itself is made of: virtio and QEMU's own devices, bridges, system management bus, base system
# peripherals, and on the root bus the chipset's SATA and ISA functions.
NEVER = ("id:1af4", "id:1b36", "class:06", "class:0c05", "class:08", "root:0106", "root:0601")


class GuestSettings(Record):
    """Settings of the guest hook; schemas/guest-settings.json describes the file.

    deadline: seconds; on_failure: "report" or "kill"; record: "failure", "always" or "never"; force: BDFs that are
    taken although they are in use; auto_ids, auto_classes, never: see selection.Pool; owner: of nodes.
    """

    deadline: float = 8.0
    on_failure: str = "report"
    allow_noiommu: bool = False
    widen_parent_cgroups: bool = False
    map: bool = True
    record: str = "failure"
    force: tuple[str, ...] = ()
    auto_ids: tuple[str, ...] = ()
    auto_classes: tuple[str, ...] = ()
    never: tuple[str, ...] = NEVER
    owner: NodeOwner = NodeOwner()


def read_guest_settings(root: Root, path: str) -> GuestSettings:
    """Return the guest's settings. path: named on the command line, "" for the usual file, which need not be there.

    Raises InputError [bad-settings] or [settings-unreadable].
    """
    if not path and not root.exists(GUEST_SETTINGS):
        return GuestSettings()
    from oci_hooks.settings import read_settings

    values = read_settings(root, path or GUEST_SETTINGS, "guest-settings", required=bool(path))
    auto = values.pop("auto", {})
    # To the schema 384.0 is a whole number, to the kernel it is none.
    owner = NodeOwner(**{name: int(number) for name, number in values.pop("node", {}).items()})
    force = tuple(map(normalize_address, values.pop("force", ())))
    return GuestSettings(
        **values,
        force=force,
        auto_ids=tuple(auto.get("ids", ())),
        auto_classes=tuple(auto.get("classes", ())),
        never=tuple(auto.get("never", NEVER)),
        owner=owner,
    )
