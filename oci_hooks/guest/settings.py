# SPDX-License-Identifier: Apache-2.0
"""Settings of the guest hook (guest.toml) and their defaults."""

from __future__ import annotations

from oci_hooks.findings import Finding
from oci_hooks.frozen import Frozen
from oci_hooks.linux.pci import is_class, is_id, normalize_address
from oci_hooks.system import USUAL_SECONDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.settings import Table
    from oci_hooks.system import Root

GUEST_SETTINGS = "/etc/oci-vfio-hooks/guest.toml"
# Kata's agent has every bundle below it (src/agent/src/rpc.rs, CONTAINER_BASE).
KATA_BUNDLES = "/run/kata-containers/"
# The agent's limit for a hook in seconds (kata-sys-util, hooks.rs), and the deadline that leaves time to restore.
KATA_SECONDS = 10.0
KATA_DEADLINE = 8.5
# (uid_t)-1 means "leave as it is" to chown(2).
MAX_ID = 0xFFFFFFFE
# Devices of the virtual machine itself: virtio and QEMU's own devices, bridges, system management bus, base system
# peripherals, and on the root bus the chipset's SATA and ISA functions.
NEVER = ("id:1af4", "id:1b36", "class:06", "class:0c05", "class:08", "root:0106", "root:0601")


class NodeOwner(Frozen):
    """Owner and mode that guest.toml sets for nodes; -1 if it does not."""

    mode: int = -1
    uid: int = -1
    gid: int = -1


class GuestSettings(Frozen):
    """Settings of the guest hook; schemas/guest-settings.json describes the file.

    deadline: seconds; on_failure: "report" or "kill"; record: "failure", "always" or "never"; force: BDFs of devices to
    bind although they are in use; auto_ids, auto_classes, never: see candidates.Candidates; owner: of nodes.
    """

    deadline: float = USUAL_SECONDS
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
    """Return the guest's settings. path: named on the command line, "" for the usual file, which is optional.

    Raises InputError [bad-settings] or [settings-unreadable].
    """
    if not path:
        try:
            root.stat(GUEST_SETTINGS)
        except FileNotFoundError:
            # The settings of an empty file, without its reader.
            return GuestSettings()
        except OSError:
            # The reader reports it.
            pass
    from oci_hooks.settings import read_settings

    return read_settings(root, path or GUEST_SETTINGS, make_guest_settings, required=bool(path))


def check_deadline(settings: GuestSettings, path: str, bundle: str) -> list[Finding]:
    """Return a warning where Kata's agent kills the hook before its deadline. Arguments as above; bundle: of the state.

    Not an error: a hook of a CDI specification can have a longer timeout.
    """
    if settings.deadline <= KATA_DEADLINE or not bundle.startswith(KATA_BUNDLES):
        return []
    problem = (
        f"{settings.deadline:g} s is too long: Kata's agent kills a hook after {KATA_SECONDS:g} s, before its report"
    )
    hint = f"set deadline = {KATA_DEADLINE:g} or less, unless a CDI specification gives the hook a longer timeout"
    return [Finding("warning", "deadline-too-long", f"{path or GUEST_SETTINGS}: deadline", problem, hint)]


def make_guest_settings(table: Table) -> GuestSettings:
    """Return the settings in guest.toml; reads every key that schemas/guest-settings.json defines."""
    usual = GuestSettings()
    auto, node = table.table("auto"), table.table("node")
    maximum = "a number above 0, at most 3600"
    force = table.texts("force", (), is_address, "an address as sysfs writes it, e.g. 0000:02:00.0")
    return GuestSettings(
        deadline=table.number("deadline", usual.deadline, lambda seconds: 0 < seconds <= 3600, maximum),
        on_failure=table.word("on_failure", usual.on_failure, "report", "kill"),
        allow_noiommu=table.switch("allow_noiommu", usual.allow_noiommu),
        widen_parent_cgroups=table.switch("widen_parent_cgroups", usual.widen_parent_cgroups),
        map=table.switch("map", usual.map),
        record=table.word("record", usual.record, "failure", "always", "never"),
        force=tuple(normalize_address(text) for text in force if isinstance(text, str)),
        auto_ids=auto.texts("ids", (), is_id, "a vendor or vendor:device in lower case, e.g. 8086:10d3"),
        auto_classes=auto.texts("classes", (), is_class, "a class of 2, 4 or 6 digits in lower case, e.g. 0200"),
        never=auto.texts("never", NEVER, is_kind, "id:VENDOR, id:VENDOR:DEVICE, class:CLASS or root:CLASS"),
        owner=NodeOwner(
            node.whole("mode", usual.owner.mode, 0o777, "permission bits from 0o000 to 0o777"),
            node.whole("uid", usual.owner.uid, MAX_ID, f"a number from 0 to {MAX_ID}"),
            node.whole("gid", usual.owner.gid, MAX_ID, f"a number from 0 to {MAX_ID}"),
        ),
    )


def is_address(text: str) -> bool:
    """Return whether a text is a BDF as sysfs writes it, or with a longer domain."""
    return text.count(":") == 2 and text == text.strip().lower() and bool(normalize_address(text))


def is_kind(text: str) -> bool:
    """Return whether a text is a rule for `auto.never`."""
    kind, _, value = text.partition(":")
    return is_id(value) if kind == "id" else kind in ("class", "root") and is_class(value)
