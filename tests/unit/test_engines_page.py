# SPDX-License-Identifier: Apache-2.0
"""docs/howto/engines.md has each way that the engines' tests show, and no other as run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs/howto/engines.md"
MARK = re.compile(r'@pytest\.mark\.way\("(\w+)", "([^"]+)"\)\n(?:@[^\n]*\n)*def test_')
RUN = re.compile(r"^\| (\w+) ([0-9.]+) \| (.+) \| (\w+) \|$", re.MULTILINE)


def test_page_has_the_ways_of_the_tests() -> None:
    marked = {
        way for file in (REPOSITORY / "tests/engines").glob("test_*.py") for way in MARK.findall(file.read_text())
    }
    assert len(marked) == 12
    page = PAGE.read_text()
    declared, _, run = page.partition("\n## What was run\n")
    assert {way for _, way in marked} == set(re.findall(r"^\| [^|]*\| ([^|]+) \| ", declared, re.MULTILINE)) - {"way"}
    rows = RUN.findall(run)
    assert {(engine, way) for engine, _, way, _ in rows} == marked
    assert {outcome for *_, outcome in rows} == {"passed"}
