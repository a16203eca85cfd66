# SPDX-License-Identifier: Apache-2.0
"""JSON without the json package: the same value as json.loads, the same refusals, and words for them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks.findings import EXIT_BAD_INPUT, InputError
from oci_hooks.idle import scan_text
from oci_hooks.json_input import parse_json
from tests.support.json_strategies import ANYTHING

pytestmark = pytest.mark.unit

# Pieces of JSON, right and wrong: chained at random they are near-JSON more often than random characters are.
PIECES = st.sampled_from(
    ["{", "}", "[", "]", ",", ":", '"', '"a"', '"\\u00e9"', '"\\ud800"', '"\\q"', "\\", "1", "-", "01", "1.", "1e5"]
    + ["1e999", "-0", ".5", "true", "True", "null", "NaN", "Infinity", "-Infinity", "nan", " ", "\t", "\n", "\r"]
    + ["\f", "\v", "\u00a0", "\ufeff", "\0", "\x01", "'a'", "/*x*/", "9" * 30, "0x1"]
)


def read_both(text: str) -> tuple[str, str]:
    """Return what parse_json and json.loads make of a text; an exception's type for a refusal."""
    answers = []
    readers: list[Callable[[], Any]] = [lambda: parse_json(text.encode(), "x"), lambda: json.loads(text)]
    for read in readers:
        try:
            answers.append(repr(read()))
        except (InputError, ValueError, RecursionError):
            answers.append("refused")
    return answers[0], answers[1]


@given(st.lists(PIECES, max_size=12).map("".join))
def test_parse_json_near_json_as_json_module(text: str) -> None:
    ours, theirs = read_both(text)
    assert ours == theirs


@given(ANYTHING, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_parse_json_as_json_module(value: object, ascii_only: bool, indent: Any) -> None:
    # A lone surrogate has no UTF-8.
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace").decode()
    ours, theirs = read_both(text)
    assert ours == theirs != "refused"


@given(ANYTHING, st.data())
def test_parse_json_mutated_as_json_module(value: object, data: st.DataObject) -> None:
    text = json.dumps(value)
    location = data.draw(st.integers(0, len(text)))
    text = text[:location] + data.draw(PIECES) + text[location + data.draw(st.integers(0, 1)) :]
    ours, theirs = read_both(text)
    assert ours == theirs


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff{}", "line 1 column 1"),
        (b'{"a": "\xe9}', "line 1 column 7"),
        ("{}".encode("utf-16"), "line 1 column 1"),
        (b"{", "line 1 column 2"),
        (b'{"a":\n 1,}', "line 2 column 4"),
        (b"{} {}", "line 1 column 4"),
        (b"'a'", "line 1 column 1"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' * 100_000, "is nested too deeply"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_parse_json_bad_text_refused(data: bytes, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(data, "the state")
    finding = caught.value.findings[0]
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert (finding.code, finding.subject) == ("bad-json", "the state")
    assert problem in finding.problem
    assert finding.hint


def test_parse_json_long_number_as_json_module() -> None:
    # Newer Pythons refuse to convert so many digits, older ones do it.
    ours, theirs = read_both("9" * 5000)
    assert ours == theirs


def test_parse_json_invalid_utf_8_surrogateescaped() -> None:
    assert parse_json(b'{"\xff": "\xe6\x9d \xe6\x9d\x9f"}', "x") == {"\udcff": "\udce6\udc9d \u675f"}


def test_parse_json_last_duplicate_key_wins() -> None:
    assert parse_json(b'{"a": 1, "a": 2}', "x") == {"a": 2}


def test_parse_json_uses_c_scanner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oci_hooks.json_input.parse_slowly", lambda *_: pytest.fail("json was loaded for nothing"))
    assert parse_json(b' {"a": [1, -2.5, true, null, "\\u00e9", NaN]}\n', "x")["a"][:4] == [1, -2.5, True, None]


def test_parse_json_without_c_scanner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_json", None)
    with pytest.raises(ImportError):
        scan_text("{}")
    assert parse_json(b'{"a": [1]}', "x") == {"a": [1]}
