# SPDX-License-Identifier: Apache-2.0
"""Fixtures of a newcomer's tests: machines, one or more per file of tests, removed at its end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from tests import provision
from tests.newcomer import bare
from tests.newcomer.bare import Bare

# Makes a machine of one of packages.BARE_ROOTS: `machines("bare")`.
MakeBare = Callable[[str], Bare]


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    """Install what the tests need on this machine."""
    if os.geteuid() != 0:
        pytest.exit("tests/newcomer makes root file systems: run it as root", returncode=3)
    provision.ensure_packages(bare.PACKAGES)


@pytest.fixture(scope="module")
def machines(tools: None) -> Iterator[MakeBare]:
    """Return a function that makes a machine."""
    scratch = Path(tempfile.mkdtemp(prefix="newcomer-"))
    made: list[Bare] = []

    def make(name: str) -> Bare:
        made.append(bare.make_bare(name, scratch / str(len(made))))
        return made[-1]

    yield make
    for machine in made:
        machine.keep_archives()
    # A gigabyte each: not left to pytest, which keeps the last three.
    shutil.rmtree(scratch)
