# SPDX-License-Identifier: Apache-2.0
"""Format the guest's survey: tables for a person, JSON for a program (schemas/findings.json)."""

from __future__ import annotations

from oci_hooks.linux.listing import describe_group, format_columns, format_member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.guest.survey_kernel import GuestFacts
    from oci_hooks.guest.survey_picture import ClaimLine, GroupLine, Picture

    Rows = list[tuple[str, ...]]

DRIVER_STATES = {"loaded": "loaded", "loadable": "not loaded; the hook loads it", "missing": "missing"}


def format_picture(picture: Picture) -> str:
    """Return groups, claims and the kernel as tables, with a blank line between them."""
    groups: Rows = [("GROUP", "STATE", "DEVICE", "ID", "CLASS", "DRIVER", "NOT TAKEN BY AUTO BECAUSE")]
    groups += [row for line in picture.lines for row in format_line(line)]
    claims: Rows = [("CLAIM OF", "STATE", "GROUPS", "INIT")]
    claims += [format_claim(line) for line in picture.claims]
    guest: Rows = [("GUEST", "STATE"), *format_facts(picture)]
    tables = [groups, claims, guest] if picture.claims else [groups, guest]
    return "\n".join(map(format_columns, tables))


def format_line(line: GroupLine) -> Rows:
    """Return the rows of a group: one for each member, with its reasons; those of the whole group in the first."""
    first = (line.group.name or "-", line.state)
    whole = [reason for name, reason in line.reasons if not name]
    rows: Rows = []
    for member in line.group.members:
        reasons = whole + [reason for name, reason in line.reasons if name == member.name]
        rows.append((*first, *format_member(member), "; ".join(reasons) or "-"))
        first, whole = ("", ""), []
    return rows or [(*first, "-", "-", "-", "-", "; ".join(whole) or "-")]


def format_claim(line: ClaimLine) -> tuple[str, ...]:
    """Return the row of a claim."""
    claim = line.claim
    return claim.container, line.state, ", ".join(claim.groups) or "-", str(claim.pid or "-")


def format_facts(picture: Picture) -> Rows:
    """Return the rows of the table of the guest."""
    facts, missing = picture.facts, ", ".join(picture.facts.config.missing)
    options = f"missing: {missing}" if missing else "complete"
    return [
        ("auto takes", f"group {', '.join(picture.auto)}" if picture.auto else "nothing"),
        ("IOMMU groups", str(facts.groups or "none")),
        *((name, DRIVER_STATES[state]) for name, state in facts.drivers.items()),
        ("/dev/vfio/N", describe_known(facts.group_nodes)),
        ("/dev/vfio/devices/vfioN", describe_known(facts.device_nodes)),
        ("kernel", facts.release or "not known"),
        (
            "kernel options",
            f"{options} ({facts.config.path})" if facts.config.path else "not known: no /proc/config.gz",
        ),
        ("settings", picture.settings or "none: defaults"),
    ]


def describe_known(value: bool | None) -> str:
    """Return whether the kernel makes a kind of node."""
    return "not known until vfio-pci is loaded" if value is None else "made by this kernel" if value else "not made"


def describe_picture(picture: Picture) -> dict[str, Any]:
    """Return the members of the answer of --json."""
    return {
        "groups": [describe_line(line) for line in picture.lines],
        "claims": [
            {
                "container": line.claim.container,
                "state": line.state,
                "groups": list(line.claim.groups),
                "pid": line.claim.pid or None,
            }
            for line in picture.claims
        ],
        "guest": {"auto": list(picture.auto), **describe_facts(picture.facts), "settings": picture.settings or None},
    }


def describe_line(line: GroupLine) -> dict[str, Any]:
    """Return a group as an object: as the host's survey has it, and what is the guest's."""
    return {
        **describe_group(line.group, line.state),
        "container": line.container or None,
        "reasons": [{"member": name or None, "reason": reason} for name, reason in line.reasons],
    }


def describe_facts(facts: GuestFacts) -> dict[str, Any]:
    """Return the kernel as the members of an object."""
    return {
        "iommu_groups": facts.groups,
        "drivers": facts.drivers,
        "group_nodes": facts.group_nodes,
        "device_nodes": facts.device_nodes,
        "kernel": facts.release or None,
        "kernel_config": facts.config.path or None,
        "missing_options": list(facts.config.missing),
    }
