# SPDX-License-Identifier: Apache-2.0
"""Have a container's groups chosen and planned, wait for devices that are not there yet, and write the claim."""

from __future__ import annotations

import os

from oci_hooks.findings import HookError
from oci_hooks.guest import access, ownership, plan, selection
from oci_hooks.guest.candidates import VIOMMU_HINT, Candidates
from oci_hooks.guest.claims import Claim
from oci_hooks.guest.homes import find_home
from oci_hooks.guest.locks import take_lock
from oci_hooks.guest.noiommu import check_noiommu
from oci_hooks.guest.recovery import repair_claims
from oci_hooks.guest.request import is_pods_request
from oci_hooks.guest.session import Session
from oci_hooks.guest.undo_log import parse_instance
from oci_hooks.linux import pci
from oci_hooks.linux.instances import make_instance
from oci_hooks.linux.usage import UsageFinder
from oci_hooks.system import Deadline, tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci_hooks.guest.request import Request
    from oci_hooks.guest.selection import ChosenGroup
    from oci_hooks.guest.settings import GuestSettings
    from oci_hooks.guest.undo_log import Entry, UndoLog
    from oci_hooks.linux.uevents import Listener
    from oci_hooks.system import Root

# Time that must remain for binding when a device appears.
BIND_SECONDS = 1.0


def wait_for_claim(session: Session) -> tuple[UndoLog, plan.Plan]:
    """Return the container's undo log and plan, waiting for devices that are not there yet. Raises Refusal."""
    listener = settled = None
    root, deadline = session.root, session.run.deadline
    while True:
        try:
            claimed = claim_groups(session, settled)
        except selection.NotAvailableYet as missing:
            if listener is None:
                from oci_hooks.linux.uevents import Listener

                # Devices that come later are being probed by their own drivers, and are read without waiting for these.
                settled = frozenset(root.list_names(pci.PCI_DEVICES))
                try:
                    # Listen before looking again, so that no event is missed.
                    listener = root.do(Listener)
                    # Import now, while waiting anyway: a new device's own driver takes a while to probe it.
                    access.preload_later_steps()
                except HookError as error:
                    # Report the missing device first, then why the hook cannot wait for it.
                    error.findings = missing.findings + error.findings
                    raise
            elif not root.do(wait_for_event, listener, deadline):
                raise missing.after(root.do(deadline.elapsed)) from None
        else:
            if claimed:
                return claimed


@tagged("wait-for-event")
def wait_for_event(listener: Listener, deadline: Deadline) -> str:
    """Return the next event of a device or group; "" when too little time is left to bind one."""
    seconds = deadline.remaining() - BIND_SECONDS
    # With a steady stream of events, only the clock ends the wait.
    return listener.wait(seconds) if seconds > 0 else ""


def claim_groups(session: Session, settled: frozenset[str] | None = None) -> tuple[UndoLog, plan.Plan] | None:
    """Decide once, and write the claim; None if another hook of the same container had to be waited for.

    settled: addresses of devices that were there before the wait; None if there was no wait.
    """
    deadline = session.run.deadline
    lock = session.directory.lock(deadline)
    try:
        session.directory.remove_drafts()
        claims = repair_claims(session, session.directory.read_claims(), lock)
        own = next((claim for claim in claims if claim.path == session.claim_path), None)
        if not own or not own.at_work:
            ownership.check_own_claim(own, session.owner)
            if len(claims) > bool(own):
                from oci_hooks.guest import permits

                permits.revoke_stale_numbers(session.directory, claims, excluding=session.claim_path)
            wanted = plan.make_plan(
                session.root, select_groups(session, claims, settled), session.spec, make_plan_options(session)
            )
            session.root.note("plan", wanted)
            undo_log = open_claim(session, own, wanted.groups)
            if undo_log is not None:
                return undo_log, wanted
    finally:
        os.close(lock)
    session.root.do(wait_for_hook, own, deadline)
    return None


def make_plan_options(session: Session) -> plan.PlanOptions:
    """Return the options for nodes, from settings and request."""
    return plan.PlanOptions(session.settings.owner, session.request.wants_cdev, session.settings.map)


def select_groups(
    session: Session, claims: list[Claim], settled: frozenset[str] | None = None
) -> tuple[ChosenGroup, ...]:
    """Return the groups for the container, from the machine's present devices. Raises NotAvailableYet, Refusal."""
    root, finder = session.root, UsageFinder(session.root, session.run.deadline)
    candidates = make_candidates(root, session.settings, claims, session.claim_path, finder.find, settled)
    candidates = candidates.replace(
        cdevs=find_cdevs(root, session.request), is_pods=is_pods_request(session.state, session.spec)
    )
    inventory = candidates.inventory
    choices = selection.choose_groups(session.request, candidates)
    for finding in check_noiommu((c.group.name for c in choices), session.spec, session.request.wants_cdev):
        # It is decided once more where another run of the hook had to be waited for.
        if finding not in session.run.findings:
            session.run.findings.append(finding)
    own = [entry for claim in claims if claim.path == session.claim_path for entry in claim.entries]
    noted = [entry for entry in reversed(own) if entry.kind == "device" and is_same_device(inventory, entry)]
    before = {entry.words[0]: entry.words[1] for entry in noted}
    return tuple(chosen.replace(drivers_before=before) for chosen in choices)


def choose_viommu_hint(root: Root) -> str:
    """Return what gives this guest IOMMU groups: a virtual IOMMU, or a kernel that uses the one it has."""
    from oci_hooks.linux.firmware import find_unused_iommu

    iommu = find_unused_iommu(root)
    if iommu and iommu.off:
        return f"remove {' '.join(iommu.off)} from the guest kernel's parameters (Kata: kernel_params)"
    if iommu and iommu.parameter:
        return f"boot the guest's kernel with {iommu.parameter}: it has a virtual IOMMU (ACPI table {iommu.table})"
    if iommu:
        return f"use a guest kernel built with {iommu.option}: it has a virtual IOMMU (ACPI table {iommu.table})"
    return VIOMMU_HINT


def make_candidates(
    root: Root,
    settings: GuestSettings,
    claims: list[Claim],
    own: str,
    uses: Callable[[pci.PciDevice], list[str]],
    settled: frozenset[str] | None = None,
) -> Candidates:
    """Return what may be chosen from, as the machine is now. own: path of the claim that does not count, "" for none.

    claims: those that hold; uses: gives the reasons why a device must not be touched; settled: as for pci.scan.
    Raises OSError.
    """
    # Both must allow it: guest.toml for this hook, the kernel's switch for the whole guest.
    noiommu = settings.allow_noiommu and root.read_text_or(pci.NOIOMMU_SWITCH, "N") == "Y"
    inventory, live = pci.scan(root, noiommu, instances=True, settled=settled), pci.list_live_groups(root)
    inventory, live = pci.resolve_noiommu_groups(inventory, live, noiommu)
    return Candidates(
        inventory,
        ownership.find_owners(claims, inventory, own),
        live,
        uses,
        settings.never,
        settings.auto_ids,
        settings.auto_classes,
        settings.force,
        viommu_hint=VIOMMU_HINT if inventory.groups else choose_viommu_hint(root),
    )


def find_cdevs(root: Root, request: Request) -> dict[tuple[int, int], str]:
    """Return the BDFs of devices with their own node by its numbers, if linux.devices may list such a node."""
    if not any(entry.is_cdev for entry in request.entries):
        return {}
    from oci_hooks.linux.vfio import CDEV_CLASS, list_cdevs

    return {number: root.read_link_name(f"{CDEV_CLASS}/{name}/device") for number, name in list_cdevs(root).items()}


def is_same_device(inventory: pci.Inventory, entry: Entry) -> bool:
    """Return whether the device at an entry's address is still the one that the entry records."""
    device = inventory.devices.get(entry.words[0])
    return device is not None and make_instance(device) == parse_instance(entry)


def open_claim(session: Session, own: Claim | None, groups: tuple[str, ...]) -> UndoLog | None:
    """Return the container's undo log with its groups recorded: a new one, or that of an earlier run of the hook.

    None if another process has that one locked. It must not be replaced: it records the devices' original drivers.
    """
    if own is None:
        home = find_home(session.root, session.owner.pid)
        return session.directory.open_undo_log(session.owner.replace(home=home), groups)
    undo_log = session.directory.reopen_undo_log(own)
    if undo_log is not None:
        for name in groups:
            if name not in own.groups:
                undo_log.add("group", name)
    return undo_log


@tagged("wait-for-hook")
def wait_for_hook(claim: Claim, deadline: Deadline) -> None:
    """Wait until the hook that is at work on a claim has ended. Raises Refusal [lock-timeout]."""
    try:
        fd = os.open(claim.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        take_lock(fd, deadline, claim.path)
    finally:
        os.close(fd)
