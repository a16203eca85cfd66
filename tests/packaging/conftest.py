# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the packages' tests: the packages, built once, and roots to install them in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import pytest

from tests import packages, provision
from tests.packages import Root

# Makes a root with these packages installed, to change at will: `installed("debian-12")`.
MakeRoot = Callable[[str], Root]


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    """Install what the tests need."""
    if os.geteuid() != 0:
        pytest.exit("tests/packaging makes root file systems: run it as root", returncode=3)
    provision.ensure_packages(packages.PACKAGES)


@pytest.fixture(scope="session")
def dist(tools: None) -> Path:
    """Return the directory with the packages of the tree as it is."""
    # Side by side: one mostly waits for the mirror, the other doesn't.
    packages.ensure_roots()
    return packages.ensure_dist()


@pytest.fixture
def bare(dist: Path, tmp_path: Path) -> MakeRoot:
    """Return a function that gives a root with nothing in it but Debian's smallest."""
    return lambda name: Root((packages.ensure_root(name),), tmp_path / name, ((dist, "/mnt/dist"),))


@pytest.fixture
def installed(dist: Path, tmp_path: Path) -> MakeRoot:
    """Return a function that gives a root in which apt has installed all DEBs."""
    return lambda name: Root(packages.ensure_installed(name), tmp_path / name, ((dist, "/mnt/dist"),))
