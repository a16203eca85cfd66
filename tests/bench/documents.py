# SPDX-License-Identifier: Apache-2.0
"""The tables in the documents: each between two marks, so that the next run can replace it, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.figures import Cost, Result, format_costs, format_table
from tests.provision import REPOSITORY


@dataclass(frozen=True)
class Place:
    """The place of a table. path: the document, from the repository's top; begin, end: the lines around it."""

    path: str
    begin: str
    end: str


WHOLE = Place("docs/performance.md", "<!-- bench: tests/bench/run --document writes this -->", "<!-- bench: end -->")
SHORT = Place(
    "README.md",
    "<!-- bench: the short table, written by tests/bench/run --document -->",
    "<!-- bench: end of the short table -->",
)
COSTS = Place(
    "docs/performance.md",
    "<!-- bench: the cost of each number of groups, written by tests/bench/run --document -->",
    "<!-- bench: end of the costs -->",
)
# Figures of the short table that a user compares; it has each target that is missed, too.
SHOWN = (
    "container without VFIO: guest hook / bare interpreter",
    "container without VFIO: host check / bare interpreter",
    "the same in the VM: host check / bare interpreter",
    "guest hook, 1 device / driverctl, 1 device",
    "guest hook, 8 groups / 8 times driverctl in a row",
    "guest hook, 8 groups / dpdk-devbind with 8 addresses",
    "guest hook, 16 groups / 1 group",
    "over the bare interpreter, 8 groups / shell, one after another",
    "uevent to node in the container / bare interpreter's start",
    "`runc run`, both hooks, no VFIO / without hooks",
)


def write_documents(results: Sequence[Result], costs: Sequence[Cost], about: str, top: Path = REPOSITORY) -> None:
    """Put the figures into the documents and draw their plots. about: the line under the whole table."""
    from docs import pictures

    replace_table(top / WHOLE.path, WHOLE, f"{format_table(results)}\n\n{about}")
    if costs:
        replace_table(top / COSTS.path, COSTS, format_costs(costs))
    shown = [result for result in results if result.figure.about in SHOWN or "missed" in result.verdict]
    replace_table(top / SHORT.path, SHORT, format_table(shown))
    pictures.write_all()


def replace_table(document: Path, place: Place, text: str) -> None:
    """Replace what is between the marks. Raises ValueError where they are not there."""
    head, begin, rest = document.read_text().partition(place.begin)
    _, end, tail = rest.partition(place.end)
    if not begin or not end:
        raise ValueError(f"{document} lacks {place.begin} and {place.end}")
    document.write_text(f"{head}{place.begin}\n\n{text}\n\n{place.end}{tail}")
