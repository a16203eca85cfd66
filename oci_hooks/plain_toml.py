# SPDX-License-Identifier: Apache-2.0
"""Read the plain subset of TOML, which most settings files use.

The imports of tomllib (re, typing, datetime) take longer than the rest of a hook's settings code. A
line is plain if it is empty, a comment, `[table]`, or `key = value` with a boolean, a number without sign or exponent,
a string without escapes, or a list of such strings. A file with any other line, valid or not, is left to tomllib.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")

BLANK = " \t"
BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
TRUTH = {"true": True, "false": False}
# A float with more digits has no exact value, and no setting allows a longer integer.
MAX_DIGITS = 15


class NotPlain(Exception):
    """This text needs a complete TOML reader, to read it or to refuse it."""


def read_plain(text: str) -> dict[str, Any] | None:
    """Return the value of a plain TOML text, the same as tomllib's; None if it is not plain."""
    values: dict[str, Any] = {}
    table = values
    try:
        # A tab is the only control character allowed in a comment or a string.
        if not text.replace("\n", " ").replace("\t", " ").isprintable():
            return None
        for line in (whole.strip(BLANK) for whole in text.split("\n")):
            if line.startswith("["):
                table = add(values, read_header(line), {})
            elif line and not line.startswith("#"):
                key, _, value = line.partition("=")
                add(table, read_key(key), read_value(value.lstrip(BLANK)))
    except NotPlain:
        return None
    return values


def add(table: dict[str, Any], key: str, value: Any) -> Any:
    """Put a value into a table and return it. Raises NotPlain if the key exists."""
    if key in table:
        raise NotPlain
    table[key] = value
    return value


def read_key(text: str) -> str:
    """Return a bare key. Raises NotPlain."""
    key = text.strip(BLANK)
    if not key or not BARE.issuperset(key):
        raise NotPlain
    return key


def read_header(line: str) -> str:
    """Return the name in `[name]`. Raises NotPlain."""
    name, bracket, rest = line[1:].partition("]")
    if not bracket:
        raise NotPlain
    check_end(rest)
    return read_key(name)


def read_value(text: str) -> Any:
    """Return the value behind an equals sign. Raises NotPlain."""
    if text.startswith('"'):
        value, rest = read_string(text)
        check_end(rest)
        return value
    if text.startswith("["):
        return read_list(text)
    return read_word(text.partition("#")[0].rstrip(BLANK))


def read_string(text: str) -> tuple[str, str]:
    """Return a string without escapes, and what follows it. Raises NotPlain."""
    value, quote, rest = text[1:].partition('"')
    if not text.startswith('"') or not quote or "\\" in value:
        raise NotPlain
    return value, rest.lstrip(BLANK)


def read_list(text: str) -> list[str]:
    """Return a list of strings on one line. Raises NotPlain."""
    items = []
    rest = text[1:].lstrip(BLANK)
    while not rest.startswith("]"):
        item, rest = read_string(rest)
        items.append(item)
        if rest.startswith(","):
            rest = rest[1:].lstrip(BLANK)
        elif not rest.startswith("]"):
            raise NotPlain
    check_end(rest[1:])
    return items


def read_word(word: str) -> bool | int | float:
    """Return a boolean or a number. Raises NotPlain."""
    if word in TRUTH:
        return TRUTH[word]
    if len(word) <= MAX_DIGITS:
        whole, dot, fraction = word.partition(".")
        if is_decimal(whole) and (whole == "0" or whole[0] != "0"):
            if not dot:
                return int(whole)
            if is_decimal(fraction):
                return float(word)
        if word.startswith("0o") and word[2:] and set("01234567").issuperset(word[2:]):
            return int(word[2:], 8)
    raise NotPlain


def is_decimal(text: str) -> bool:
    """Return whether a text is one or more of the digits 0 to 9."""
    return text.isascii() and text.isdecimal()


def check_end(rest: str) -> None:
    """Raise NotPlain if anything but a comment follows."""
    rest = rest.lstrip(BLANK)
    if rest and not rest.startswith("#"):
        raise NotPlain


def read_toml(text: str) -> dict[str, Any]:
    """Return the value of a TOML text, without a library if it is plain. Raises the exceptions of load_toml."""
    values = read_plain(text)
    return load_toml(text) if values is None else values


def load_toml(text: str) -> dict[str, Any]:
    """Return the value of a TOML text. Raises ValueError with the line; ImportError below 3.11 without tomli."""
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from oci_hooks.schema import load_site_packages

        load_site_packages()
        import tomli as tomllib
    values: dict[str, Any] = tomllib.loads(text, parse_float=read_float)
    return values


def read_float(text: str) -> float:
    """Return a number. Raises ValueError for nan and inf: no bound of a schema excludes nan."""
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text} is not a finite number")
    return value
