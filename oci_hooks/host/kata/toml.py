# SPDX-License-Identifier: Apache-2.0
"""Parse TOML 1.1 as Kata's two readers do, with the line of every key.

Both of Kata's libraries read TOML 1.1 (`\\e`, `\\xHH`, inline tables over several lines), Python's tomllib only 1.0,
and no Python library reports the line of a key. The two differ in their rules on duplicates: the Rust crate is strict
and is followed here; toml_go.py has the Go library's rules.

Sources: toml.io/en/v1.1.0; crates.io toml 1.1 (de/parser/*.rs), toml_parser 1.1 (decoder/*.rs).
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

    Keys = tuple[str, ...]

# Limit of a key's parts, and of nested arrays and tables, as in the Rust crate (de/parser/mod.rs, LIMIT).
MAX_DEPTH = 80
MAX_WORD_LENGTH = 1000
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")
BLANK = re.compile(r"[ \t]*")
SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
LINE_END = re.compile(r"[ \t]*(?:#[^\r\n]*)?(?:\r?\n|\Z)")
BARE = re.compile(r"[A-Za-z0-9_-]+")
WORD = re.compile(r"[^\s,#\]}=]+")
# A blank and a time may follow a date.
DECIMAL = re.compile(r"[+-]?(?:0|[1-9](?:_?[0-9])*)")
RADIX = re.compile(r"0x[0-9A-Fa-f](?:_?[0-9A-Fa-f])*|0o[0-7](?:_?[0-7])*|0b[01](?:_?[01])*")
FLOAT = re.compile(r"[+-]?(?:inf|nan|(?:0|[1-9](?:_?[0-9])*)(?:\.[0-9](?:_?[0-9])*)?(?:[eE][+-]?[0-9](?:_?[0-9])*)?)")
CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9](:([0-5][0-9]|60)(\.[0-9]+)?)?"
DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
MOMENT = re.compile(rf"{DATE}([Tt ]{CLOCK}([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])?)?|{CLOCK}")
MOMENT_WORD = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[^\s,#\]}=]*")
ESCAPE = re.compile(r"\\(?:([btnfre\"\\])|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))")
ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b", '"': '"', "\\": "\\"}
BASIC = re.compile(r'"((?:[^"\\\r\n]|\\[^\r\n])*)"')
LITERAL = re.compile(r"'([^'\r\n]*)'")
LONG_BASIC = re.compile(r'"""(?:\r?\n)?((?:[^"\\]|\\[\s\S]|"{1,2}(?!"))*(?:"{1,2}(?="""))?)"""(?!")')
LONG_LITERAL = re.compile(r"'''(?:\r?\n)?((?:[^']|'{1,2}(?!'))*(?:'{1,2}(?='''))?)'''(?!')")


class TomlError(ValueError):
    """The library refuses the text. line: from 1."""

    def __init__(self, problem: str, line: int) -> None:
        self.problem = problem
        self.line = line
        super().__init__(f"{problem} (line {line})")


class Moment(str):
    """A date or a time, as written: no key of Kata accepts one."""


class Table(dict):  # type: ignore[type-arg]
    """A table. implicit: only its sub-tables were named; dotted: created by a dotted key; inline: closed."""

    implicit = dotted = inline = False


class Tables(list):  # type: ignore[type-arg]
    """An array of tables, made by [[headers]]."""


class StrictReader:
    """Reads one text into `values`; `keys`: every table and key in order; `lines`: the last line of each key."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.counted = (0, 1)
        self.depth = 0
        self.values = Table()
        self.keys: list[Keys] = []
        self.lines: dict[Keys, int] = {}
        self.table: Keys = ()
        self.current = self.values

    def read(self) -> None:
        """Read the whole text. Raises TomlError."""
        control = CONTROL.search(self.text)
        if control:
            self.fail(f"the character {control[0]!r} is not allowed", control.start())
        while True:
            self.skip(SPACE)
            if self.position == len(self.text):
                return
            if self.peek("[["):
                self.read_header("[[", "]]")
            elif self.peek("["):
                self.read_header("[", "]")
            else:
                self.read_pair()
            end = LINE_END.match(self.text, self.position)
            if not end:
                self.fail("unexpected text at the end of the line")
            self.position = end.end()

    # Small steps -----------------------------------------------------------------------------------------------------

    def peek(self, word: str) -> bool:
        """Return whether a word comes next in the text."""
        return self.text.startswith(word, self.position)

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Skip the text that a pattern matches, which may be empty."""
        found = pattern.match(self.text, self.position)
        self.position = found.end() if found else self.position

    def take(self, word: str) -> None:
        """Skip a required word. Raises TomlError."""
        if not self.peek(word):
            self.fail(f"expected {word!r}")
        self.position += len(word)

    def line(self, position: int = -1) -> int:
        """Return the line of a position, by default the current one. Fast if asked for in ascending order."""
        position = self.position if position < 0 else position
        begun, line = self.counted if self.counted[0] <= position else (0, 1)
        line += self.text.count("\n", begun, position)
        self.counted = (position, line)
        return line

    def fail(self, problem: str, position: int = -1) -> NoReturn:
        """Raise TomlError."""
        raise TomlError(problem, self.line(position))

    # Keys and tables -------------------------------------------------------------------------------------------------

    def read_header(self, opening: str, closing: str) -> None:
        """Read `[table]` or `[[array]]`."""
        line = self.line()
        self.take(opening)
        keys = self.read_keys()
        self.take(closing)
        self.keys.append(keys)
        self.lines.setdefault(keys, line)
        self.table = keys
        self.open_table(keys, opening == "[[")

    def read_pair(self) -> None:
        """Read `key = value` in the current table."""
        line = self.line()
        keys = self.read_keys()
        self.take("=")
        self.skip(BLANK)
        whole = (*self.table, *keys)
        self.keys.append(whole)
        self.put_pair(keys, whole)
        self.lines[whole] = line

    def read_keys(self) -> Keys:
        """Return a key of one or more parts, and skip the blanks after it."""
        keys = []
        while True:
            self.skip(BLANK)
            found = BARE.match(self.text, self.position)
            if found:
                keys.append(found[0])
                self.position = found.end()
            elif self.peek('"') and not self.peek('"""'):
                keys.append(self.read_string(BASIC, True))
            elif self.peek("'") and not self.peek("'''"):
                keys.append(self.read_string(LITERAL, False))
            else:
                self.fail("a key is missing, or has a character that must be quoted")
            self.skip(BLANK)
            if len(keys) > MAX_DEPTH:
                self.fail(f"a key has more than {MAX_DEPTH} parts")
            if not self.peek("."):
                return tuple(keys)
            self.position += 1

    def open_table(self, keys: Keys, is_array: bool) -> None:
        """Make the table of a header the current one (document.rs, start_table and finish_table)."""
        parent = self.descend(self.values, keys[:-1], False)
        old = parent.get(keys[-1])
        if is_array:
            if old is None:
                old = parent[keys[-1]] = Tables()
            if not isinstance(old, Tables):
                self.fail(f"{keys[-1]} is already defined, but not as an array of tables")
            old.append(Table())
            self.current = old[-1]
        elif old is None:
            self.current = parent[keys[-1]] = Table()
        elif isinstance(old, Table) and old.implicit and not old.dotted:
            old.implicit = False
            self.current = old
        else:
            self.fail(f"{'.'.join(keys)} is defined twice")

    def put_pair(self, keys: Keys, whole: Keys) -> Any:
        """Read a value, set it in the current table, and return it (document.rs, capture_key_value).

        keys: below the current table; whole: from the top.
        """
        value = self.read_value(whole, False)
        parent = self.descend(self.current, keys[:-1], True)
        if keys[-1] in parent or (keys[:-1] and not parent.implicit):
            self.fail(f"{keys[-1]} is defined twice")
        parent[keys[-1]] = value
        return value

    def descend(self, table: Table, keys: Keys, dotted: bool) -> Table:
        """Return the nested table at some keys, created if missing (document.rs, descend_path)."""
        for key in keys:
            if key not in table:
                table[key] = Table()
                table[key].implicit, table[key].dotted, table[key].inline = True, dotted, table.inline
            below = table[key]
            if isinstance(below, Tables):
                below = below[-1]
            if not isinstance(below, Table) or (below.inline and not (below.dotted and table.inline)):
                self.fail(f"{key} is already defined, but not as a table that can be extended")
            if dotted and not below.implicit:
                self.fail(f"{key} is defined twice")
            below.dotted = below.dotted or dotted
            table = below
        return table

    # Values ----------------------------------------------------------------------------------------------------------

    def read_value(self, keys: Keys, in_array: bool) -> Any:
        """Return the value at the current position. keys: the value's keys; in_array: whether it is an element."""
        if self.peek('"'):
            return self.read_string(LONG_BASIC if self.peek('"""') else BASIC, True)
        if self.peek("'"):
            return self.read_string(LONG_LITERAL if self.peek("'''") else LITERAL, False)
        if self.peek("[") or self.peek("{"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                self.fail(f"more than {MAX_DEPTH} nested arrays or tables")
            value = self.read_array(keys) if self.peek("[") else self.read_inline_table(keys, in_array)
            self.depth -= 1
            return value
        return self.read_word()

    def read_string(self, pattern: re.Pattern[str], escapes: bool) -> str:
        """Return a string."""
        found = pattern.match(self.text, self.position)
        if not found:
            self.fail("unterminated string")
        begin, text, self.position = self.position, found[1], found.end()
        if not escapes or "\\" not in text:
            return text
        if pattern is LONG_BASIC:
            text = fold_lines(text)
        parts: list[str] = []
        location = 0
        while True:
            slash = text.find("\\", location)
            if slash < 0:
                return "".join((*parts, text[location:]))
            escape = ESCAPE.match(text, slash)
            if not escape:
                self.fail(f"{text[slash : slash + 2]!r} is not a valid escape", begin)
            code = escape[2] or escape[3] or escape[4]
            if code and (int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) <= 0xDFFF):
                self.fail(f"{escape[0]} is not a Unicode character", begin)
            parts += (text[location:slash], chr(int(code, 16)) if code else ESCAPED[escape[1]])
            location = escape.end()

    def read_array(self, keys: Keys) -> list[Any]:
        """Return an array."""
        values: list[Any] = []
        self.take("[")
        while True:
            self.skip(SPACE)
            if self.peek("]"):
                break
            values.append(self.read_value(keys, True))
            self.skip(SPACE)
            if not self.peek(","):
                break
            self.position += 1
        self.take("]")
        return values

    def read_inline_table(self, keys: Keys, in_array: bool) -> Table:
        """Return an inline table. in_array: for LenientReader."""
        table = Table()
        table.inline = True
        for inner, line in self.list_inline(keys):
            value = self.read_value((*keys, *inner), False)
            parent = self.descend(table, inner[:-1], True)
            if inner[-1] in parent:
                self.fail(f"{inner[-1]} is defined twice")
            parent[inner[-1]] = value
            self.lines[(*keys, *inner)] = line
        return table

    def list_inline(self, keys: Keys) -> Iterator[tuple[Keys, int]]:
        """Yield the keys of an inline table with their lines; the caller reads the value after each."""
        self.take("{")
        while True:
            self.skip(SPACE)
            if self.peek("}"):
                break
            line = self.line()
            inner = self.read_keys()
            self.take("=")
            self.skip(BLANK)
            self.keys.append((*keys, *inner))
            yield inner, line
            self.skip(SPACE)
            if not self.peek(","):
                break
            self.position += 1
        self.take("}")

    def read_word(self) -> Any:
        """Return a truth value, a number, a date or a time."""
        found = MOMENT_WORD.match(self.text, self.position) or WORD.match(self.text, self.position)
        word = found[0] if found else ""
        value: Any
        if len(word) > MAX_WORD_LENGTH:
            self.fail("a number or a date is too long")
        if word in ("true", "false"):
            value = word == "true"
        elif DECIMAL.fullmatch(word) or RADIX.fullmatch(word):
            value = int(word.replace("_", ""), 0 if RADIX.fullmatch(word) else 10)
            if not -(1 << 63) <= value < 1 << 63:
                self.fail(f"{word} is out of range")
        elif FLOAT.fullmatch(word):
            value = float(word.replace("_", ""))
            if value in (float("inf"), float("-inf")) and "inf" not in word:
                self.fail(f"{word} is out of range")
        elif MOMENT.fullmatch(word):
            value = Moment(word)
        else:
            self.fail(f"{word or self.text[self.position : self.position + 1]!r} is not a valid value")
        self.position += len(word)
        return value


def fold_lines(text: str) -> str:
    """Return a long string without its line-ending backslashes and the white space after them."""
    parts = []
    location = 0
    for found in re.finditer(r"\\(?:[ \t]*\r?\n[ \t\r\n]*|[\s\S])", text):
        if "\n" in found[0]:
            parts.append(text[location : found.start()])
            location = found.end()
    return "".join((*parts, text[location:]))
