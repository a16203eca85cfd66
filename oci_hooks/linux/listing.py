# SPDX-License-Identifier: Apache-2.0
"""List VFIO groups for a person, as a table, and for a program, as JSON: what the surveys of host and guest share."""

from __future__ import annotations

from oci_hooks.findings import make_one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.linux.vfio import Member, VfioGroup

# Base classes of PCI functions (pci.ids) of likely interest.
CLASS_NAMES = {
    "01": "storage",
    "02": "network",
    "03": "display",
    "04": "multimedia",
    "05": "memory",
    "06": "bridge",
    "07": "communication",
    "08": "system",
    "0b": "processor",
    "0c": "serial bus",
    "0d": "wireless",
    "10": "encryption",
    "11": "signal",
    "12": "accelerator",
}


def format_member(member: Member) -> tuple[str, str, str, str]:
    """Return the columns of a member: name, id, class, driver."""
    kind = CLASS_NAMES.get(member.pci.class_code[:2], member.pci.class_code) if member.pci else member.bus
    return member.name, member.pci.id if member.pci else "-", kind or "-", member.driver or "-"


def format_columns(rows: list[tuple[str, ...]]) -> str:
    """Return rows with their columns aligned. A cell may hold a name that a tenant chose: it stays one line."""
    cells = [tuple(map(make_one_line, row)) for row in rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + "\n" for row in cells)


def describe_group(group: VfioGroup, state: str) -> dict[str, Any]:
    """Return a group as an object for --json; schemas/findings.json describes it. state: in the survey's words."""
    return {
        "group": group.name,
        "state": state,
        "number": f"{group.number[0]}:{group.number[1]}" if group.number else None,
        "noiommu": group.noiommu,
        "members": [
            {
                "name": member.name,
                "bus": member.bus,
                "driver": member.driver or None,
                "standing": member.viability,
                "id": member.pci.id if member.pci else None,
                "class": member.pci.class_code if member.pci else None,
            }
            for member in group.members
        ],
    }
