# SPDX-License-Identifier: Apache-2.0
"""Parse the regular expressions of `enable_annotations` as Go's and Rust's libraries do.

Python's `re` reads some of them differently (`$`, `\\Q`, `\\pL`, `{`, `[[:alpha:]]`) and warns about others, so this
module parses an expression into a tree; admission.py runs it. Only matches in ASCII text are of interest.

Sources: go/src/regexp/syntax/parse.go; crates.io regex-syntax 0.8 (ast/parse.rs).
"""

from __future__ import annotations

import unicodedata

from oci_hooks.host.kata.characters import ASCII, CATEGORIES, DIGITS, PERL, POSIX, SCRIPTS, WORDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    # An expression as a tree: its kind and parts. "set": characters; "look": place; "all", "any": parts; "times".
    Node = tuple[Any, ...]

# Both libraries accept the same letters; \0 to \7 are octal numbers in Go and an error in Rust.
CONTROLS = "abfnrtv"
MAX_REPEATS = 1000
MAX_DEPTH = 50


class Unsure(Exception):
    """The expression cannot be parsed here with the libraries' certainty."""


class Invalid(Exception):
    """The library refuses the expression."""


class Expression:
    """Parser of one expression.

    position: the next character; folds, is_verbose: whether (?i) and (?x) are on; is_simple: whether the preceding
    part was one character.
    """

    def __init__(self, text: str, rust: bool) -> None:
        self.text = text
        self.rust = rust
        self.position = 0
        self.folds = False
        self.is_verbose = False
        self.is_simple = False
        self.depth = 0
        self.names: set[str] = set()

    def read(self) -> Node:
        """Return the whole expression's tree. Raises Invalid, Unsure."""
        tree = self.read_choice()
        if self.position < len(self.text):
            raise Invalid("unmatched closing parenthesis")
        return tree

    def next(self, word: str) -> bool:
        """Skip a word if it comes next, and return whether it did."""
        if self.text.startswith(word, self.position):
            self.position += len(word)
            return True
        return False

    def take(self) -> str:
        """Return the next character. Raises Invalid at the end."""
        if self.position == len(self.text):
            raise Invalid("unexpected end")
        self.position += 1
        return self.text[self.position - 1]

    def read_choice(self) -> Node:
        """Return alternatives, up to the end of the group."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unsure("groups nested too deeply")
        outer = self.folds, self.is_verbose
        choices: list[Node] = []
        parts: list[Node] = []
        repeated = False
        while self.skip_blanks() and not self.text.startswith(")", self.position):
            if self.next("|"):
                choices.append(("all", parts))
                parts, repeated = [], False
                continue
            times = self.read_times()
            if times is None:
                begun = self.position
                parts += self.read_item()
                repeated, self.is_simple = False, self.position == begun + 1 and self.text[begun] != "."
                continue
            if not parts or (repeated and not self.rust):
                raise Invalid("nothing to repeat")
            if parts[-1] == ("flags",):
                raise Unsure("repeated flags")
            self.is_simple = False
            parts[-1] = ("times", parts[-1], *times)
            repeated = True
        self.depth -= 1
        self.folds, self.is_verbose = outer
        return ("any", [*choices, ("all", parts)])

    def skip_blanks(self) -> bool:
        """Skip blanks and comments if (?x) is on; return whether any text follows."""
        while self.is_verbose and self.text[self.position : self.position + 1] in tuple(" \t\n\r\v\f#"):
            end = self.text.find("\n", self.position) if self.text[self.position] == "#" else self.position
            self.position = end + 1 if end >= 0 else len(self.text)
        return self.position < len(self.text)

    def read_times(self) -> tuple[int, int] | None:
        """Return the repetition of the preceding part (-1: unlimited), None without one."""
        begun = self.position
        times = next((t for word, t in (("*", (0, -1)), ("+", (1, -1)), ("?", (0, 1))) if self.next(word)), None)
        if times is None and self.next("{"):
            least = self.read_number()
            maximum = least
            if self.next(","):
                maximum = -1 if self.text.startswith("}", self.position) else self.read_number()
            if (self.rust or self.is_verbose) and " " in self.text[begun : self.text.find("}", begun) + 1]:
                raise Unsure("blanks in a repetition")
            if least is None or maximum is None or not self.next("}"):
                if self.rust:
                    raise Invalid("repetition without a number")
                self.position = begun
                return None
            if (maximum != -1 and least > maximum) or (not self.rust and max(least, maximum) > MAX_REPEATS):
                raise Invalid("invalid bounds of a repetition")
            if max(least, maximum) > 50 and self.rust and not self.is_simple:
                raise Unsure("repetition that may exceed Rust's size limit")
            times = (least, maximum)
        if times is not None:
            self.next("?")
        return times

    def read_number(self) -> int | None:
        """Return a decimal number, None if there is none."""
        begun = self.position
        while self.position < len(self.text) and self.text[self.position] in DIGITS:
            self.position += 1
        digits = self.text[begun : self.position]
        if not self.rust and len(digits) > 1 and digits[0] == "0":
            return None
        return int(digits[:8]) if digits else None

    def read_item(self) -> list[Node]:  # noqa: PLR0911 - one rule a line
        """Return the next character, class, location or group; several for Go's quotation."""
        char = self.take()
        if char == "(":
            return [self.read_group()]
        if char == "[":
            return [("set", self.read_class())]
        if char == ".":
            return [("set", ASCII)]
        if char in ("^", "$"):
            return [("look", "begin" if char == "^" else "end")]
        if char != "\\":
            return [self.literal(char)]
        locations = {"A": "begin", "z": "end", "b": "edge", "B": "no edge"}
        letter = self.text[self.position : self.position + 1]
        if letter in locations and letter:
            self.position += 1
            if self.rust and letter == "b" and self.text.startswith("{", self.position):
                raise Unsure("special word boundary")
            return [("look", locations[letter])]
        if letter == "Q" and not self.rust:
            end = self.text.find("\\E", self.position + 1)
            quoted = self.text[self.position + 1 : end if end >= 0 else len(self.text)]
            self.position = end + 2 if end >= 0 else len(self.text)
            return [self.literal(c) for c in quoted]
        if self.rust and letter in ("<", ">") and letter:
            raise Unsure("special word boundary")
        found = self.read_escape()
        return [self.literal(found) if isinstance(found, str) else ("set", "".join(found))]

    def literal(self, char: str) -> Node:
        """Return a character as a set; one that is not ASCII is never found, unless (?i) makes it so."""
        if self.folds and not char.isascii():
            raise Unsure("case folding outside ASCII")
        return ("set", char.lower() + char.upper() if self.folds else char)

    def read_escape(self) -> str | list[str]:
        """Return the meaning of a backslash and the next characters: one character, or the list of a class."""
        char = self.take()
        if char.lower() in PERL and char.isascii():
            chars = PERL[char.lower()]
            return [c for c in ASCII if (c in chars) == char.islower()]
        if char in "pP":
            return self.read_property(char == "P")
        if char in "xuU" and (self.rust or char == "x"):
            return self.read_hexadecimal({"x": 2, "u": 4, "U": 8}[char])
        if char in CONTROLS and char != "b":
            return "\n"
        if char in "01234567" and not self.rust:
            digits = char
            while len(digits) < 3 and self.text[self.position : self.position + 1] in tuple("01234567"):
                digits += self.take()
            if char != "0" and len(digits) == 1:
                raise Invalid("back reference")
            return chr(int(digits, 8))
        if char.isascii() and not char.isalnum():
            return char
        raise Invalid(f"\\{char} is not a valid escape")

    def read_hexadecimal(self, digits: int) -> str:
        """Return the character of \\x41 or \\x{41}."""
        if self.next("{"):
            end = self.text.find("}", self.position)
            word = self.text[self.position : max(end, self.position)]
            self.position = end + 1
        else:
            word = self.text[self.position : self.position + digits]
            self.position += len(word)
            if len(word) < digits:
                raise Invalid("too few digits")
        if not word or not all(c in POSIX["xdigit"] for c in word) or int(word, 16) > 0x10FFFF:
            raise Invalid("not a hexadecimal code point")
        return chr(int(word, 16))

    def read_property(self, negated: bool) -> list[str]:
        """Return the characters of \\pL or \\p{Lu}. negated: for \\P."""
        name = self.take()
        if name == "{":
            end = self.text.find("}", self.position)
            if end < 0:
                raise Invalid("unterminated property")
            name = self.text[self.position : end]
            self.position = end + 1
            if name.startswith("^") and self.rust:
                raise Invalid("negated property")
            if name.startswith("^"):
                negated, name = not negated, name[1:]
        if name in SCRIPTS:
            return [c for c in ASCII if (c in SCRIPTS[name]) != negated]
        if name not in CATEGORIES or (self.folds and len(name) > 1):
            raise Unsure(f"property {name}")
        return [c for c in ASCII if unicodedata.category(c).startswith(name) != negated]

    def read_class(self) -> str:
        """Return the characters of [a-z]."""
        negated = self.next("^")
        chars: set[str] = set()
        is_first = True
        while is_first or not self.next("]"):
            rest = self.text[self.position : self.position + 2]
            if self.is_verbose and rest[:1] in tuple(" \t#\n"):
                raise Unsure("blanks in a class")
            if rest == "[:":
                chars |= set(self.read_named())
            elif self.rust and (rest[:1] == "[" or rest in ("&&", "--", "~~")):
                raise Unsure("set operation or nested class")
            else:
                chars |= self.read_range()
            is_first = False
        if self.folds:
            if any(not c.isascii() for c in chars):
                raise Unsure("case folding outside ASCII")
            chars |= {c.lower() for c in chars} | {c.upper() for c in chars}
        return "".join(c for c in ASCII if (c in chars) != negated)

    def read_named(self) -> list[str]:
        """Return the characters of [:alpha:] in a class."""
        end = self.text.find(":]", self.position + 2)
        name = self.text[self.position + 2 : max(end, 0)]
        negated = name.startswith("^")
        if end < 0 or name.lstrip("^") not in POSIX:
            if self.rust or end < 0:
                raise Unsure("nested or named class")
            raise Invalid("unknown class")
        self.position = end + 2
        return [c for c in ASCII if (c in POSIX[name.lstrip("^")]) != negated]

    def read_range(self) -> set[str]:
        """Return the characters of a-z, a or \\d in a class."""
        low = self.read_member()
        rest = self.text[self.position : self.position + 2]
        if len(rest) < 2 or rest[0] != "-" or rest[1] == "]" or (self.rust and rest[1] == "-"):
            return set(low)
        if not isinstance(low, str):
            if self.rust:
                raise Invalid("range that begins with a class")
            return set(low)
        self.position += 1
        high = self.read_member()
        if not isinstance(high, str) or high < low:
            raise Invalid("invalid range")
        within = {c for c in ASCII if low <= c <= high}
        return within | ({high} if not high.isascii() else set())

    def read_member(self) -> str | list[str]:
        """Return one character of a class, or the list of an escape's."""
        char = self.take()
        if char != "\\":
            return char
        if self.text[self.position : self.position + 1] in ("b", "A", "z", "B", "<", ">"):
            if self.text[self.position] in "<>" and not self.rust:
                return self.take()
            raise Invalid("assertion in a class")
        return self.read_escape()

    def read_group(self) -> Node:
        """Return a group, whose parenthesis was read, or what flags leave behind."""
        outer = self.folds, self.is_verbose
        if self.next("?"):
            if self.next("P<") or (not self.text.startswith(("<=", "<!"), self.position) and self.next("<")):
                end = self.text.find(">", self.position)
                name = self.text[self.position : max(end, self.position)]
                if not name or name in self.names or not all(c in WORDS for c in name):
                    raise Invalid("invalid group name")
                if self.rust and name[0] in DIGITS:
                    raise Invalid("invalid group name")
                self.names.add(name)
                self.position = end + 1
            elif self.read_flags():
                return ("flags",)
        tree = self.read_choice()
        if not self.next(")"):
            raise Invalid("missing closing parenthesis")
        self.folds, self.is_verbose = outer
        return tree

    def read_flags(self) -> bool:
        """Read flags up to `:` or `)`; return whether no group follows. Only i matters for a key of one line."""
        begun = self.position
        off = False
        while True:
            char = self.take()
            if char in ":)":
                break
            if char == "-" and not off:
                off = True
            elif char == "i":
                self.folds = not off
            elif char == "x" and self.rust:
                self.is_verbose = not off
            elif char in "uR" and self.rust:
                raise Unsure(f"flag {char}")
            elif char not in "msU":
                raise Invalid("unknown flag")
        word = self.text[begun : self.position - 1]
        if word.endswith("-") or (self.rust and len(set(word)) < len(word)) or (self.rust and not word and char == ")"):
            raise Invalid("invalid flags")
        return char == ")"
