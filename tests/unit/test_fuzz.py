# SPDX-License-Identifier: Apache-2.0
"""Defects that fuzzing found stay fixed; fuzzing goes on for two minutes per run of the tests, guided by coverage."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, list_seeds

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
KEPT = sorted((REPOSITORY / "tests/data/fuzz").glob("*/*"))
# Seconds on each processor: two minutes of processor time on the two that CI has.
SECONDS = 60


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_fuzz_saved_findings(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_examples(name: str) -> None:
    for data in list_seeds(name):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=30)
@given(st.data())
def test_fuzz_mutated_examples(name: str, data: st.DataObject) -> None:
    """Mutated examples, as far as that is possible without atheris."""
    example = data.draw(st.sampled_from(list_seeds(name) or [b""]))[:4096]
    at = data.draw(st.integers(0, len(example)))
    to = data.draw(st.integers(at, min(len(example), at + 8)))
    TARGETS[name](example[:at] + data.draw(st.binary(max_size=8)) + example[to:])


def test_fuzz_with_atheris() -> None:
    done = subprocess.run(
        ["/usr/bin/python3", "-m", "tests.fuzz", "--seconds", str(SECONDS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode == 3 and not os.environ.get("OCI_VFIO_NEEDS_ATHERIS"):
        pytest.skip(f"no atheris for this interpreter: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    counted = re.search(r"(\d+) executions, (\d+) targets, 0 failed", done.stdout)
    assert counted
    assert int(counted[2]) == len(TARGETS)
    assert int(counted[1]) > 10_000
