# SPDX-License-Identifier: Apache-2.0
"""Decide whether `enable_annotations` allows a key, in Go and in Rust.

An expression is run as both libraries run it, all states in parallel: the time is its length times the key's, whereas
Python's `re` takes exponential time for `(a+)+$`.

Sources: kata-containers src/runtime/pkg/oci/utils.go (regexpContains), src/libs/kata-types/src/config/hypervisor/mod.rs
(is_annotation_enabled): both look for the expression anywhere in the key.
"""

from __future__ import annotations

from oci_hooks.host.kata.characters import ASCII, WORDS
from oci_hooks.host.kata.regex import Expression, Invalid, Unsure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.kata.regex import Node

# Characters of an expression, and states of its compiled program.
MAX_PATTERN_LENGTH = 5000
MAX_STATES = 20000
# States times characters, for all keys together: one or two seconds.
MAX_WORK = 2000000


class AnnotationFilter:
    """The expressions of one `enable_annotations`.

    programs: each compiled expression, None if it cannot be decided here; work: how much may still be done.
    """

    def __init__(self, patterns: list[str], rust: bool) -> None:
        self.rust = rust
        self.is_shut = False
        self.work = MAX_WORK
        self.programs: list[list[Node] | None] = []
        for pattern in patterns:
            try:
                self.programs.append(self.compile(pattern))
            except Unsure:
                self.programs.append(None)
            except (Invalid, RecursionError):
                # Go skips an expression that it cannot parse; Rust then allows nothing at all.
                self.is_shut = rust or self.is_shut

    def compile(self, pattern: str) -> list[Node]:
        """Return the compiled program of an expression. Raises Invalid, Unsure."""
        self.work -= 100 + 20 * len(pattern)
        if len(pattern) > MAX_PATTERN_LENGTH or self.work < 0:
            raise Unsure("expression too long")
        program: list[Node] = []
        compile_node(Expression(pattern, self.rust).read(), program)
        program.append(("end",))
        self.work -= len(program)
        return program

    def allows(self, key: str) -> bool | None:
        """Return whether a key is allowed; None if that cannot be decided here."""
        if self.is_shut:
            return False
        if self.work < 0:
            return None
        answers = [self.matches(program, key) for program in self.programs]
        if None in answers and (self.rust or True not in answers):
            return None
        return True in answers

    def matches(self, program: list[Node] | None, key: str) -> bool | None:
        """Return whether a program finds its expression in a key; None if that cannot be decided here."""
        if program is None or not set(key) <= set(ASCII):
            return None
        self.work -= 20 + len(program) * (len(key) + 1)
        return run(program, key) if self.work >= 0 else None


def compile_node(node: Node, program: list[Node]) -> None:  # noqa: PLR0912 - one rule a line
    """Append an expression's states: ("set", characters), ("look", place), ("split", one, other), ("end",)."""
    if len(program) > MAX_STATES:
        raise Unsure("compiled expression too large")
    kind = node[0]
    if kind in ("set", "look"):
        program.append(node)
    elif kind == "all":
        for part in node[1]:
            compile_node(part, program)
    elif kind == "any":
        ends = []
        for chosen in node[1][:-1]:
            split = len(program)
            program.append(())
            compile_node(chosen, program)
            ends.append(len(program))
            program.append(())
            program[split] = ("split", split + 1, len(program))
        compile_node(node[1][-1], program)
        for end in ends:
            program[end] = ("split", len(program), len(program))
    elif kind == "times":
        _, part, least, maximum = node
        for _ in range(least):
            compile_node(part, program)
        begin = len(program)
        for _ in range(1 if maximum < 0 else maximum - least):
            split = len(program)
            program.append(())
            compile_node(part, program)
            if maximum < 0:
                program.append(("split", begin, begin))
            program[split] = ("split", split + 1, -1)
        for location in range(begin, len(program)):
            if program[location][0] == "split" and program[location][2] == -1:
                program[location] = ("split", program[location][1], len(program))


def run(program: list[Node], key: str) -> bool:
    """Return whether a program finds its expression anywhere in a key."""
    current: set[int] = set()
    for position in range(len(key) + 1):
        found: set[int] = set()
        follow(program, [0, *current], key, position, found)
        if len(program) - 1 in found:
            return True
        char = key[position : position + 1]
        current = {state + 1 for state in found if char and program[state][0] == "set" and char in program[state][1]}
    return False


def follow(program: list[Node], waiting: list[int], key: str, position: int, found: set[int]) -> None:
    """Add all states to `found` that can be reached without reading a character."""
    while waiting:
        state = waiting.pop()
        if state in found:
            continue
        found.add(state)
        step = program[state]
        if step[0] == "split":
            waiting += step[1:]
        elif step[0] == "look" and is_at(step[1], key, position):
            waiting.append(state + 1)


def is_at(location: str, key: str, position: int) -> bool:
    """Return whether a position in a key is such a location."""
    if location in ("begin", "end"):
        return position == (0 if location == "begin" else len(key))
    before, after = key[position - 1 : position] if position else "", key[position : position + 1]
    edge = (before != "" and before in WORDS) != (after != "" and after in WORDS)
    return edge == (location == "edge")
