# SPDX-License-Identifier: Apache-2.0
"""The documents' pictures are what docs/pictures.py draws of what the documents have."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs import pictures
from tests.provision import REPOSITORY


@pytest.mark.parametrize("path", pictures.draw_all(), ids=lambda path: str(path.name))
def test_committed_picture_is_what_the_script_draws(path: Path) -> None:
    assert path.read_text() == pictures.draw_all()[path], "run: python3 -m docs.pictures"


@pytest.mark.parametrize("text", pictures.draw_all().values(), ids=[path.name for path in pictures.draw_all()])
def test_picture_is_whole_and_has_both_colour_schemes(text: str) -> None:
    top = ElementTree.fromstring(text)  # noqa: S314 - we drew it ourselves
    assert top.tag == "{http://www.w3.org/2000/svg}svg"
    width, height = (float(top.attrib[name]) for name in ("width", "height"))
    for rect in top.iter("{http://www.w3.org/2000/svg}rect"):
        x, y = (float(rect.get(name, 0)) for name in ("x", "y"))
        assert x + float(rect.attrib["width"]) <= width
        assert y + float(rect.attrib["height"]) <= height
    assert "@media (prefers-color-scheme: dark)" in text


def test_plot_has_each_figure_with_a_target() -> None:
    rows = pictures.read_table(pictures.PERFORMANCE.read_text())
    plot = (pictures.IMAGES / "performance.svg").read_text()
    assert sum(bool(row.target) for row in rows) == plot.count("(≤ ") >= 10
    assert plot.count(" missed<") == sum(bool(row.target) and row.ratio > row.target for row in rows)


def test_each_picture_is_shown() -> None:
    shown = "".join(path.read_text() for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")))
    for path in pictures.draw_all():
        assert f"images/{path.name})" in shown


def test_files_in_the_picture_are_there() -> None:
    for _, files, _ in pictures.WAY:
        for file in files.split(", "):
            assert (REPOSITORY / "oci_hooks" / file).exists(), file
