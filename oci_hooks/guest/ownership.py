# SPDX-License-Identifier: Apache-2.0
"""Decide who owns a claim: which claims are over, who has a group, and which container a poststop belongs to."""

from __future__ import annotations

from oci_hooks.findings import Finding, Refusal
from oci_hooks.guest.claims import list_owners
from oci_hooks.guest.homes import find_home

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.claims import Claim, Owner
    from oci_hooks.linux.pci import Inventory
    from oci_hooks.oci import State
    from oci_hooks.system import Root

UNREADABLE_HINT = "end its container, restore its devices by hand (driverctl unset-override), and remove the file"


def has_ended(root: Root, claim: Claim, own: str, pid: int) -> bool:
    """Check whether a claim has to be undone. own, pid: the path of this container's claim, and its init.

    The claim of an earlier container of the same id is over, too, when this one is in the very same cgroup: which of
    the processes there are left of the earlier one is not known, and each has this container's permission anyway.
    """
    if claim.is_stale(root):
        return True
    if claim.path != own or claim.problem or claim.at_work or claim.is_alive(root):
        return False
    return claim.home == find_home(root, pid)


def check_own_claim(claim: Claim | None, owner: Owner) -> None:
    """Raise Refusal where the claim under a container's id can't be read, or is another, living container's."""
    if claim is None:
        return
    check_readable(claim)
    if (claim.pid, claim.start) != (owner.pid, owner.start):
        problem = (
            f"another container with this id, init process {claim.pid}, already has group {', '.join(claim.groups)}"
        )
        raise Refusal("claimed", f"container {claim.container}", problem, "use another container id")


def check_readable(claim: Claim) -> None:
    """Raise Refusal where it can't be read what a container has."""
    if claim.problem:
        raise Refusal("claim-unreadable", claim.path, claim.problem, UNREADABLE_HINT)


def warn_unreadable(claim: Claim) -> Finding:
    """Return the warning for another container's claim that can't be read."""
    problem = f"{claim.problem}; devices that may belong to its container are not given to others"
    return Finding("warning", "claim-unreadable", claim.path, problem, UNREADABLE_HINT)


def check_release(root: Root, state: State, claim: Claim) -> None:
    """Raise Refusal where the claim under a container's id is not that of the container that ends.

    An id is unique for one runtime's state directory (runc --root), not for a machine; and the status at poststop is
    `running` with Kata's agent. So it is decided by whether the claim's own container has ended. The claim of a hook
    that was killed is put back by the next hook anyway, whichever that is.
    """
    check_readable(claim)
    other = "" if claim.bundle == state.bundle else f"another container with this id, in {claim.bundle}, "
    subject, hint = f"container {state.id}", "its devices are released when it has ended"
    if claim.done and claim.is_alive(root):
        problem = f"{other}has a running init process, {claim.pid}, and keeps its devices"
        raise Refusal("container-alive", subject, problem, hint)
    if other and not claim.at_work and not claim.is_stale(root):
        raise Refusal("container-alive", subject, f"{other}still has processes and keeps its devices", hint)


def find_owners(claims: list[Claim], inventory: Inventory, own: str) -> dict[str, str]:
    """Return which container has which group, by all claims but one. own: the path of that one.

    What can't be read of a claim may be any device that is bound to a VFIO driver and that no other claim has.
    """
    owners = dict(list_owners(claims, excluding=own))
    known = {group for claim in claims for group in claim.groups}
    for claim in claims:
        if claim.problem and claim.path != own:
            named = {entry.words[0] for entry in claim.entries if entry.kind == "device"}
            for device in inventory.devices.values():
                if device.address in named or (device.owned_by_vfio and device.group not in known):
                    owners.setdefault(device.group, claim.container)
    return owners
