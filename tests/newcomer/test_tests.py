# SPDX-License-Identifier: Apache-2.0
"""tests/run where not even Python is: it installs what its tests need, and each of them can be collected."""

from __future__ import annotations

import re

from tests.newcomer import lines
from tests.newcomer.conftest import MakeBare
from tests.provision import REPOSITORY
from tests.runner import KINDS

LIMIT = 1200.0


def test_tests_run_lists_all_packages(machines: MakeBare) -> None:
    """`tests/run`, up to where the first test would run: collecting imports every module of the tests."""
    (line,) = (line for line in lines.read_section("Try it") if line.startswith("tests/run"))
    machine = machines("bare")
    done = machine.run("sh", "-c", f"{lines.strip_remark(line)} --list", limit=LIMIT)
    machine.keep_archives()
    for kind in KINDS:
        assert f"== {kind}\n" in done.stdout
    counted = [int(number) for number in re.findall(r"^(\d+) tests collected", done.stdout, re.MULTILINE)]
    assert len(counted) >= 5, done.quote()
    assert min(counted) > 0
    again = machine.run("sh", "-c", "tests/run --list lint", limit=LIMIT)
    assert "installing" not in again.stdout
    # What CONTRIBUTING has a newcomer run next.
    first = lines.read_section("Your first change, in ten minutes", REPOSITORY / "CONTRIBUTING.md")
    (line,) = (line for line in first if "bin/pytest" in line)
    machine.run("sh", "-c", lines.strip_remark(line))
