# SPDX-License-Identifier: Apache-2.0
"""Links in the README and the other documents lead to existing targets, and lists in two of them are equal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.test_architecture import PARTS

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    *REPOSITORY.glob("*.md"),
    *(path for top in ("docs", "examples", "tests") for path in REPOSITORY.glob(f"{top}/**/*.md")),
]
CAPABILITY = r"CAP_[A-Z_]+"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_docs_links_valid(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_summary_names_the_capabilities_that_were_tried() -> None:
    """tests/vm/test_guest_privilege.py runs the hooks with the lists of docs/reference/privileges.md."""
    text = (REPOSITORY / "docs/reference/privileges.md").read_text()
    lists = {
        title: set(re.findall(CAPABILITY, block))
        for title, block in re.findall(r"^### (.*)\n\n((?:    .*\n)+)", text, re.MULTILINE)
    }
    rows = {
        hook: [set(re.findall(CAPABILITY, part)) for part in re.split(r"[|;]", cells)]
        for hook, cells in re.findall(r"^\| `(\S+)` \|(.*)\|$", text, re.MULTILINE)
    }
    always, user, user_namespace = rows["vfio-guest-bind"]
    assert always == lists["Guest hook"]
    assert user == lists["Guest hook, a container whose user is not root"]
    assert user | user_namespace == lists["Guest hook, a container with a user namespace"]
    assert rows["vfio-host-check"][0] == lists["Host check"]


def test_architecture_has_the_table_of_imports() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text().partition("| part | may import")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\S+)`", line) for line in text.splitlines() if line.startswith("| `")]
    assert {part: set(others) for part, *others in rows} == {part: set(others) for part, others in PARTS.items()}


def test_files_that_architecture_names_are_there() -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", (REPOSITORY / "docs/architecture.md").read_text()))
    assert len(named) >= 20
    tops = (REPOSITORY, REPOSITORY / "oci_hooks")
    assert [name for name in sorted(named) if not any((top / name).exists() for top in tops)] == []


def test_readme_fits_two_screens() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120


# Words that a reader of English stumbles over, and what to write. Only in pages that were gone through.
PLAIN_PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *REPOSITORY.glob("docs/**/*.md"),
]
AVOIDED = {
    r"\bbeside\b": "compared with, next to, in addition to",
    r"\b(is|are|was) told\b|\btells (which|what|who|how)\b": "reports, prints, logs",
    r"\bstands? (in|on|at|there|beside)\b": "is",
    r"\blies? (in|on|at|below|beside)\b": "is",
    r"can't be had|as good as": "is not available",
    r"\bmend(s|ed)?\b": "fix, solve",
}


@pytest.mark.parametrize("page", PLAIN_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_page_is_in_plain_english(page: Path) -> None:
    found = [
        f"line {number}: {match[0]!r}; write: {advice}"
        for number, line in enumerate(page.read_text().splitlines(), 1)
        for pattern, advice in AVOIDED.items()
        if (match := re.search(pattern, line, re.IGNORECASE))
    ]
    assert found == []
