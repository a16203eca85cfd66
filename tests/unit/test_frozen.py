# SPDX-License-Identifier: Apache-2.0
"""Records and findings: immutable values, and one harmless line per finding."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks.findings import Finding, HookError, InputError, StepError, make_one_line
from oci_hooks.frozen import Frozen

pytestmark = pytest.mark.unit


class Point(Frozen):
    """A record with a default."""

    x: int
    y: int = 2


class Named(Point):
    """A record with an inherited field."""

    name: str = ""


def test_frozen_fields_by_position_and_name() -> None:
    assert Point(1).as_dict() == {"x": 1, "y": 2}
    assert Point(1, 3) == Point(y=3, x=1)
    assert Named(1, 2, "a").as_dict() == {"x": 1, "y": 2, "name": "a"}


@pytest.mark.parametrize(
    ("values", "named", "said"),
    [((), {}, "lacks x"), ((1, 2, 3), {}, "takes 2 fields"), ((1,), {"z": 1}, "has no z")],
)
def test_frozen_wrong_fields_refused(values: tuple[Any, ...], named: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Point(*values, **named)


def test_frozen_is_immutable() -> None:
    point: Any = Point(1)
    with pytest.raises(AttributeError, match="immutable"):
        point.x = 2
    assert point.x == 1
    assert (point.replace(y=5), point) == (Point(1, 5), Point(1))


def test_frozen_equality_and_hash() -> None:
    assert len({Point(1), Point(1, 2), Point(1, 3)}) == 2
    assert Point(1) != Named(1)
    assert repr(Point(1)) == "Point(x=1, y=2)"


@given(st.text(st.characters()))
def test_make_one_line_any_text(text: str) -> None:
    line = make_one_line(text)
    assert line.isprintable() or line == ""
    assert len(line.splitlines()) <= 1
    line.encode("utf-8")


def test_finding_long_problem_keeps_hint() -> None:
    line = Finding("error", "ambiguous", "linux.devices", "x" * 5000, "say which").as_line()
    assert len(line) <= 2000
    assert line.endswith("...; say which")
    assert line.startswith("error: [ambiguous] linux.devices: xxx")


def test_finding_long_subject_cut() -> None:
    assert len(Finding("error", "code", "s" * 5000, "problem", "hint " * 1000).as_line()) <= 2000


def test_hook_error_carries_findings() -> None:
    findings = (Finding("error", "a", "s", "p"), Finding("error", "b", "s", "p", "h"))
    error = InputError.from_findings(findings)
    assert isinstance(error, InputError)
    assert (error.findings, error.exit_code, str(error)) == (findings, 2, "error: [a] s: p")
    assert issubclass(StepError, HookError)
    assert StepError("a", "s", "p").exit_code == 1
