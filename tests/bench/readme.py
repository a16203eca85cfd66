# SPDX-License-Identifier: Apache-2.0
"""The table in the README: between two marks, so that the next run can replace it."""

from __future__ import annotations

from pathlib import Path

BEGIN = "<!-- bench: tests/bench/run --readme writes this -->"
END = "<!-- bench: end -->"


def replace_table(readme: Path, text: str) -> None:
    """Replace what stands between the marks. Raises ValueError where they are not there."""
    head, begin, rest = readme.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks {BEGIN} and {END}")
    readme.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
