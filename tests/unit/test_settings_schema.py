# SPDX-License-Identifier: Apache-2.0
"""The readers of host.toml and guest.toml and their schemas are of one opinion; so are the plain reader and tomllib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oci_hooks.guest.settings import make_guest_settings
from oci_hooks.host.settings import is_code, make_host_settings
from oci_hooks.plain_toml import load_toml, read_plain
from oci_hooks.schema import load_schema
from oci_hooks.settings import Table

pytestmark = pytest.mark.unit

READERS: dict[str, Callable[[Table], object]] = {"guest": make_guest_settings, "host": make_host_settings}
SCHEMAS = {name: load_schema(f"{name}-settings") for name in READERS}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples/settings"

# Values that a hand-written reader and a schema may see differently.
RIGHT_AND_WRONG = """
enforce warn Warn ignore auto always never failure report kill / // a/b /ä ~ C:/x
0000:02:00.0 02:00.0 000:02:00.0 0000:3B:00.0 0000:02:20.0 0000:02:1f.7 0000:02:00.8 0000:02:00.00 000000000:02:00.0
10000:e1:00.0 \u0660000:02:00.0 0000:02:00.\u0660 10de 10de: :10de 8086:10d3 8086:10d3:0 8086:10D3
02 020 0200 020000 02000000 \ufb00 id:1af4 id: id:1af4:1 id:1af4:1000 class:06 class:060 root:0106 root: bus:06
"""
BLANK = ["", "\n", "warn\n", "0000:02:00.0\n", " 0000:02:00.0", "class:06\n", "10de\n", "/a\0b", "/a\n"]
WORDS = st.sampled_from([*RIGHT_AND_WRONG.split(), *BLANK])
NUMBERS = st.sampled_from(
    [0, -1, 1, 0.0, -0.0, 0.1, 0.09999, 5e-324, 384.0, 384.5, 511, 511.0, 512, 600, 600.0, 600.1, 3600, 3600.0, 3600.01]
    + [4294967294, 4294967294.0, 4294967295, 2**64, 10**400, -(10**400), 1e308, 1e16, 8, 8.0]
)
SCALARS = st.one_of(
    WORDS, NUMBERS, st.booleans(), st.text(max_size=12), st.integers(), st.floats(allow_nan=False, allow_infinity=False)
)
ODD = st.sampled_from(["mode", "", "x", "A", "a b", "group-busy", "group_busy", "-a", "a-", "a\n", "é", "1a", "uid"])
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.one_of(SCALARS, st.dates(), st.times(), st.datetimes()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD, inner, max_size=3),
    max_leaves=6,
)


def make_values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return values that a schema mostly lets through: each key there or not, of its kind or of any."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"]) | SCALARS
    if schema.get("type") == "array":
        return st.lists(st.from_regex(schema["items"]["pattern"]) | WORDS, max_size=4) | ANYTHING
    if schema.get("type") == "object":
        right = st.fixed_dictionaries({}, optional={k: make_values(v) for k, v in schema.get("properties", {}).items()})
        more = schema.get("additionalProperties")
        rest = make_values(more) if isinstance(more, dict) else ANYTHING
        few = st.dictionaries(
            ODD | st.sampled_from(["memlock", "group-busy"]), rest, max_size=1 if more is False else 3
        )
        # An unknown key in one of four.
        added = st.one_of(few, *[st.just({})] * (0 if isinstance(more, dict) else 3))
        return st.builds(lambda one, other: {**other, **one}, right, added)
    kinds = {"number": NUMBERS, "integer": NUMBERS, "boolean": st.booleans(), "string": WORDS}
    return kinds[schema["type"]] | SCALARS


def read(name: str, values: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Return where a reader finds mistakes: tables, key and number of the item."""
    table = Table(values)
    READERS[name](table)
    return {
        (
            *mistake.keys[: -1 if mistake.problem.startswith("unknown key") else None],
            *[mistake.item] * (mistake.item >= 0),
        )
        for mistake in table.list_mistakes()
    }


def judge(name: str, values: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Return where jsonschema finds mistakes; of an unknown key it names the table."""
    found = {tuple(error.absolute_path) for error in jsonschema.Draft7Validator(SCHEMAS[name]).iter_errors(values)}
    # The value of a key that is no code is not checked.
    return {steps for steps in found if steps[:1] != ("checks",) or len(steps) == 1 or is_code(steps[1])}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=300)
@given(st.data())
def test_reader_and_schema_find_the_same_mistakes(name: str, data: st.DataObject) -> None:
    values = data.draw(make_values(SCHEMAS[name]) | ANYTHING)
    assume(isinstance(values, dict))
    assert read(name, values) == judge(name, values)


@pytest.mark.parametrize("name", READERS)
def test_settings_property_accepts_and_refuses(name: str) -> None:
    """The property above is not one of refusals alone."""
    seen = []

    @settings(max_examples=300, derandomize=True, database=None)
    @given(make_values(SCHEMAS[name]))
    def count(values: dict[str, Any]) -> None:
        seen.append((bool(values), bool(read(name, values))))

    count()
    assert sum(full and not wrong for full, wrong in seen) >= 20
    assert sum(wrong for _, wrong in seen) >= 20


@pytest.mark.parametrize("name", READERS)
def test_schemas_are_valid_and_closed(name: str) -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMAS[name])
    tables = [SCHEMAS[name], *(value for value in SCHEMAS[name]["properties"].values() if "properties" in value)]
    assert len(tables) >= 2
    assert all(table["additionalProperties"] is False for table in tables)


# The plain reader ----------------------------------------------------------------------------------------------------

SHORT = r"""
a b-1 mode = # " "" "x" ' [ ] , [a] [b] [[a]] a.b true false {} [] [,] \n \ "#" "=]" ["a",]
1 0 -1 +1 01 1_0 0o17 0o8 0x1f 1.5 1. .5 0.0 1e3 00.5 inf nan 2026-11-22 99999999999999999999 """
LONG = ['["a", "b"]', '["a" "b"]', "= 7\n", "a = true\n", '[x]\nk = "v" # c\n', '"""', "# x", " = "]
ODD_SIGNS = [" ", "\t", "\n", "\n\n", "\r\n", "é", "\0", "\u2028", "\x7f", "\ufeff", "\u0663", "\u0663.\u0663"]
PIECES = st.sampled_from([*SHORT.split(), *LONG, *ODD_SIGNS])


@settings(max_examples=2000)
@given(st.lists(PIECES, max_size=10).map("".join))
def test_read_plain_matches_tomllib(text: str) -> None:
    plain = read_plain(text)
    if plain is not None:
        # repr: 1, 1.0 and True are three values, and the order of keys is the text's.
        assert repr(plain) == repr(load_toml(text))


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("a = true", True),
        ("a=false#x", False),
        ("\ta\t=\t8\t# eight", 8),
        ("a = 0", 0),
        ("a = 0.0", 0.0),
        ("a = 0o0600", 0o600),
        ("a = 2.50", 2.5),
        ('a = ""', ""),
        ('a = "x # y"  # z', "x # y"),
        ("a = []", []),
        ('a = [ "x", "y=]" , ] # z', ["x", "y=]"]),
    ],
)
def test_read_plain_lines(line: str, value: object) -> None:
    assert repr(read_plain(f"# first\n\n{line}\n[t] # x\n")) == repr({"a": value, "t": {}})


@pytest.mark.parametrize("name", READERS)
def test_example_settings_are_plain(name: str) -> None:
    """The installed example without its comment signs is plain TOML, which costs no import."""
    text = (EXAMPLES / f"{name}.toml").read_text()
    whole = "".join(
        f"{line[1:] if line.startswith('#') and line[1:2] not in (' ', '#', chr(10)) else line}"
        for line in text.splitlines(keepends=True)
    )
    values = read_plain(whole)
    assert values is not None
    assert set(values) == set(SCHEMAS[name]["properties"])
    assert json.dumps(values) == json.dumps(load_toml(whole))
    assert read(name, values) == set()
