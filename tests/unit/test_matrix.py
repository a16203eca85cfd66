# SPDX-License-Identifier: Apache-2.0
"""docs/reference/matrix.md has the tests of the machine as they are."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = """
@pytest.fixture(name="tree")
def make_tree(containers): ...
@pytest.fixture
def old(): subprocess.run(["mount", "-t", "cgroup", "-o", "devices", "devices", PLACE])
def test_both(containers): ...
@one_runtime
def test_one(tree): ...
@pytest.mark.parametrize("containers", ["runc"], indirect=True)
def test_named(containers, old): ...
@pytest.mark.parametrize("case", CASES)
def test_none(case): ...
def helper(containers): ...
"""


@pytest.fixture(name="matrix", scope="module")
def load_matrix() -> ModuleType:
    """Return the program that writes the page."""
    spec = importlib.util.spec_from_file_location("matrix", REPOSITORY / "docs/matrix.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_matrix_page_is_current(matrix: ModuleType) -> None:
    page = matrix.make_page()
    assert (REPOSITORY / "docs/reference/matrix.md").read_text() == page, "run: python3 docs/matrix.py"
    for name in ("noiommu", "cdev", "permission", "amd"):
        assert name in page


def test_matrix_reads_tests_of_a_file(matrix: ModuleType) -> None:
    assert list(matrix.list_tests(ast.parse(FILE))) == [
        ("runc", False),
        ("crun", False),
        ("crun", False),
        ("runc", True),
        (matrix.NO_RUNTIME, False),
    ]
