# SPDX-License-Identifier: Apache-2.0
"""Our readers of Kata's configuration against Kata's genuine ones, case by case (docs/reference/kata-conformance.md).

A committed sample always, and the whole corpus where it is at hand.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from oci_hooks.host.kata.config import ConfigFile, load_config
from oci_hooks.host.kata.model import Reading
from oci_hooks.system import Root
from tests.support import kata_corpus
from tests.support.kata_corpus import Case

pytestmark = pytest.mark.unit

FILES = [kata_corpus.SAMPLE, *(path for path in kata_corpus.CORPORA if path.exists())]
# The share of what Kata refuses that an administrator hears of, as refused or as uncertain.
HEARD = {"go": 0.95, "rs": 0.90}
MOST_UNCERTAIN = 0.02
MOST_SECONDS = 90


def read_case(case: Case, main: Path, flavour: str) -> Reading:
    """Return what our reader makes of a case."""
    path = str(main)
    root = Root("/")
    location = ConfigFile(path, root.real_path(path), "test")
    return load_config(root, location, flavour, case["annotations"]).reading


def compare(reading: Reading, truth: dict[str, object]) -> str:
    """Return the relation of a reading and Kata's answer."""
    if "refused" in truth:
        return "refused" if reading.refused else "unsure of refused" if reading.uncertain else "missed"
    if reading.refused:
        return "false error"
    if reading.uncertain:
        return "uncertain"
    return "agrees" if all(reading.values.get(key) == truth[key] for key in truth) else "differs"


@pytest.mark.parametrize("flavour", ["go", "rs"])
@pytest.mark.parametrize("path", FILES, ids=["sample", "corpus"][: len(FILES)])
def test_kata_readers_agree_with_kata(
    path: Path, flavour: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = kata_corpus.load_cases(path)
    assert len(cases) >= 300
    mains = [kata_corpus.lay_out(case, tmp_path / str(case["id"])) for case in cases]
    table: dict[str, Counter[str]] = {}
    wrong = []
    begun = time.monotonic()
    for case, main in zip(cases, mains):
        how = compare(read_case(case, main, flavour), case[flavour])
        table.setdefault(kata_corpus.name_class(case), Counter())[how] += 1
        if how in ("differs", "false error", "missed"):
            wrong.append(f"{how}: {case['id']}")
    seconds = time.monotonic() - begun
    total: Counter[str] = sum(table.values(), Counter())
    with capsys.disabled():
        print(f"\n{path.name}, {flavour}: {len(cases)} cases in {seconds:.1f} s")
        for name, counts in (*sorted(table.items()), ("all", total)):
            print(f"  {name:22} " + ", ".join(f"{how} {counts[how]}" for how in sorted(counts)))
        print("  " + "; ".join(wrong) if wrong else "  none is wrong")
    accepted = total["agrees"] + total["differs"] + total["uncertain"] + total["false error"]
    refused = total["refused"] + total["unsure of refused"] + total["missed"]
    assert total["differs"] == total["false error"] == 0, wrong
    assert total["uncertain"] <= MOST_UNCERTAIN * accepted
    assert total["refused"] >= HEARD[flavour] * refused
    assert seconds < MOST_SECONDS
