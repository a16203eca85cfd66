# SPDX-License-Identifier: Apache-2.0
"""The lines of the documents' code blocks: all that a reader may type.

Markdown: a block that is indented by four spaces more than the text around it, or fenced. ReST: a literal block after
`::`. A line that a backslash breaks is one line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.provision import REPOSITORY

# An item of a list: what belongs to it is indented as far as its text.
ITEM = re.compile(r"^( *)(?:[*+-]|\d+\.) +")
FENCE = re.compile(r"^ *(```|~~~)")
SECTION = re.compile(r"^## (.*)$", re.MULTILINE)
INSTALL = REPOSITORY / "docs/howto/install.md"


@dataclass(frozen=True)
class Line:
    """A line of a code block. document: from the repository's top; block: which of the document's it is."""

    document: str
    block: int
    text: str


def list_documents() -> list[Path]:
    """Return all documents for users: README, docs, manual pages, the examples' READMEs."""
    markdown = [*(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "examples").rglob("README*")]
    top = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    return [*top, *sorted(markdown), *sorted((REPOSITORY / "docs").rglob("*.rst"))]


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a document's code blocks, in order."""
    text = path.read_text()
    blocks = find_literal_blocks(text) if path.suffix == ".rst" else find_code_blocks(text)
    name = str(path.relative_to(REPOSITORY))
    return [Line(name, number, line) for number, block in enumerate(blocks) for line in join_lines(block)]


def read_install_lines() -> list[str]:
    """Return the lines of the installation page, in order."""
    return [line.text for line in read_lines(INSTALL)]


def read_section(title: str, path: Path = REPOSITORY / "README.md") -> list[str]:
    """Return the lines of the code blocks below one heading of the second level."""
    headings = list(SECTION.finditer(path.read_text()))
    ends = [*(heading.start() for heading in headings[1:]), None]
    for heading, end in zip(headings, ends):
        if heading[1] == title:
            blocks = find_code_blocks(path.read_text()[heading.end() : end])
            return [line for block in blocks for line in join_lines(block)]
    raise AssertionError(f"{path}: no section {title!r}")


def strip_remark(line: str) -> str:
    """Return a line without the comment after a `#`: the typed part."""
    return re.sub(r"\s+# .*$", "", line)


def find_code_blocks(text: str) -> list[list[str]]:
    """Return the code blocks of a Markdown text."""
    blocks: list[list[str]] = []
    inside = fenced = False
    before = ""
    margin = 0
    for line in text.splitlines():
        if FENCE.match(line):
            fenced = not fenced
            if fenced:
                blocks.append([])
        elif fenced:
            blocks[-1].append(line.strip())
        elif not line.strip():
            pass
        elif inside and indent_of(line) >= margin + 4:
            blocks[-1].append(line.strip())
        elif not before and indent_of(line) >= margin + 4 and not ITEM.match(line):
            blocks.append([line.strip()])
            inside = True
        else:
            inside = False
            item = ITEM.match(line)
            margin = item.end() if item else min(margin, indent_of(line))
        before = line.strip()
    return [block for block in blocks if block]


def find_literal_blocks(text: str) -> list[list[str]]:
    """Return the literal blocks of a ReST text."""
    blocks: list[list[str]] = []
    margin: int | None = None
    begun = False
    for line in text.splitlines():
        if not line.strip():
            continue
        if margin is not None and indent_of(line) > margin:
            if not begun:
                blocks.append([])
                begun = True
            blocks[-1].append(line.strip())
            continue
        margin, begun = (indent_of(line), False) if line.rstrip().endswith("::") else (None, False)
    return blocks


def indent_of(line: str) -> int:
    """Return how many spaces a line begins with."""
    return len(line) - len(line.lstrip(" "))


def join_lines(block: list[str]) -> list[str]:
    """Return a block's lines, those that end with a backslash joined with the next."""
    return "\n".join(block).replace("\\\n", " ").splitlines()
