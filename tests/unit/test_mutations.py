# SPDX-License-Identifier: Apache-2.0
"""The tests bite: each safeguard is taken out of a copy of the hooks, one at a time, and some test fails for it.

A mutation whose line is no longer there is an error. OCI_VFIO_FULL=1 tries all of them, a usual run every fourth.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import mutations_four, mutations_one, mutations_three, mutations_two

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
MUTATIONS = [*mutations_one.ROWS, *mutations_two.ROWS, *mutations_three.ROWS, *mutations_four.ROWS]


@pytest.fixture(name="copy", scope="module")
def make_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the hooks and their tests."""
    copy = tmp_path_factory.mktemp("copy")
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("oci_hooks", "hooks", "tests", "docs", "examples"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=leave, symlinks=True)
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    return copy


# All of them take a quarter of an hour: OCI_VFIO_FULL=1 has each run, a usual run every fourth.
TRIED = MUTATIONS if "OCI_VFIO_FULL" in os.environ else MUTATIONS[::4]


def find_module(top: Path, module: str) -> Path:
    """Return the file of a module; "../hooks/NAME" is one of the executables."""
    name = module if module.startswith("../") else f"{module}.py"
    return top / "oci_hooks" / name


@pytest.mark.parametrize(
    ("module", "line"), [(module, line) for _, module, line, *_ in MUTATIONS], ids=[name for name, *_ in MUTATIONS]
)
def test_mutation_line_exists(module: str, line: str) -> None:
    """Once: a mutation whose line is no longer there has to be written anew with the code."""
    assert find_module(REPOSITORY, module).read_text().count(line) == 1


@pytest.mark.parametrize(
    ("module", "line", "instead", "tests"), [rest for _, *rest in TRIED], ids=[name for name, *_ in TRIED]
)
def test_mutation_makes_a_test_fail(copy: Path, module: str, line: str, instead: str, tests: str) -> None:
    file, *options = tests.split(" ", 1)
    path = find_module(copy, module)
    whole = path.read_text()
    path.write_text(whole.replace(line, instead))
    try:
        words = options[0].split(" ", 1) if options else []
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/unit/{file}", *words]
        done = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
    finally:
        path.write_text(whole)
    # 1: a test failed. Any other code is no result.
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout
