# SPDX-License-Identifier: Apache-2.0
"""The linters before a commit are those of tests/run lint, in the same versions, and both find what they should."""

from __future__ import annotations

import re

from tests import provision, runner
from tests.provision import REPOSITORY

CONFIG = REPOSITORY / ".pre-commit-config.yaml"
# The site is built in seconds, but from a virtual environment of its own, and only links depend on it.
ONLY_IN_LINT = {"mkdocs"}


def test_versions_before_a_commit_are_those_of_lint() -> None:
    asked = re.findall(r'"([a-z-]+[>=<][^"]*)"', CONFIG.read_text())
    assert len(asked) >= 8
    assert set(asked) <= {*provision.TEST_REQUIREMENTS, *provision.DOCUMENT_REQUIREMENTS}


def test_each_linter_runs_before_a_commit() -> None:
    entries = [line.split()[:2] for line in re.findall(r"entry: (.*)", CONFIG.read_text())]
    linters = [list(command[:2]) for command in (*runner.LINTERS, *runner.DOCUMENT_LINTERS)]
    wanted = [[word for word in words if word != "."] for words in linters if words[0] not in ONLY_IN_LINT]
    assert [entry[: len(words)] for entry, words in zip(entries, wanted)] == wanted


def test_each_page_is_in_the_sites_navigation() -> None:
    """mkdocs warns of a page that is missing there, and --strict makes that an error: the setting must stay."""
    text = (REPOSITORY / "mkdocs.yml").read_text()
    for name in ("omitted_files", "not_found", "anchors"):
        assert re.search(rf"^    {name}: warn$", text, re.MULTILINE)
    pages = [path.relative_to(REPOSITORY / "docs") for path in (REPOSITORY / "docs").rglob("*.md")]
    # Those in folders are added by docs/site_hooks.py.
    named = [str(page) for page in pages if page.parent.name == ""]
    assert len(named) >= 6
    assert [page for page in named if f": {page}\n" not in text] == []
