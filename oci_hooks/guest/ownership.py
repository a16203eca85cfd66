# SPDX-License-Identifier: Apache-2.0
"""Decide who owns a claim: which claims have ended, who has a group, and which container a poststop is for."""

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
    """Return whether a claim must be undone. own, pid: the path of this container's claim, and its init.

    The claim of an earlier container with the same id has ended, too, if this container is in the same cgroup:
    remaining processes of the earlier one cannot be identified, and they have this container's permissions anyway.
    """
    if claim.is_stale(root):
        return True
    if claim.path != own or claim.problem or claim.at_work or claim.is_alive(root):
        return False
    return claim.home == find_home(root, pid)


def check_own_claim(claim: Claim | None, owner: Owner) -> None:
    """Raise Refusal if the claim under a container's id is unreadable, or belongs to another, running container."""
    if claim is None:
        return
    check_readable(claim)
    if (claim.pid, claim.start) != (owner.pid, owner.start):
        problem = (
            f"another container with this id, init process {claim.pid}, already has group {', '.join(claim.groups)}"
        )
        raise Refusal("claimed", f"container {claim.container}", problem, "use another container id")


def check_readable(claim: Claim) -> None:
    """Raise Refusal if a container's claim cannot be read."""
    if claim.problem:
        raise Refusal("claim-unreadable", claim.path, claim.problem, UNREADABLE_HINT)


def warn_unreadable(claim: Claim) -> Finding:
    """Return the warning for another container's claim that cannot be read."""
    problem = f"{claim.problem}; devices that may belong to its container are not given to others"
    return Finding("warning", "claim-unreadable", claim.path, problem, UNREADABLE_HINT)


def check_release(root: Root, state: State, claim: Claim) -> None:
    """Raise Refusal if the claim under a container's id is not that of the container that ends.

    An id is unique only within one runtime's state directory (runc --root), and Kata's agent passes the status
    `running` at poststop. So the hook checks whether the claim's own container has ended. If a hook was killed, the
    next hook on this machine undoes its claim.
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
    """Return the owner of each group, from all claims but one. own: the path of that one.

    A claim that cannot be read may own any device that is bound to a VFIO driver and belongs to no other claim.
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
