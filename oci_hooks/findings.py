# SPDX-License-Identifier: Apache-2.0
"""Findings that the hooks report, and the exceptions that carry them."""

from __future__ import annotations

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    E = TypeVar("E", bound="HookError")

EXIT_DONE = 0
EXIT_REFUSED = 1
EXIT_BAD_INPUT = 2

# Characters in a reported line.
LINE_LIMIT = 2000


class Finding(Frozen):
    """One reported problem or fact, printed on one line.

    level: "error", "warning" or "info"; code: stable, for programs; subject: the object concerned
    ("group 12", "/etc/...toml"); problem: what is wrong with it; hint: what the user can do.
    """

    tag = "finding"

    level: str
    code: str
    subject: str
    problem: str
    hint: str = ""

    def as_line(self) -> str:
        """Return `level: [code] subject: problem; hint`, without a control character.

        A long text is cut in the middle, because the hint is at the end.
        """
        hint = make_one_line(self.hint, LINE_LIMIT // 2)
        text = make_one_line(
            f"{self.level}: [{self.code}] {self.subject}: {self.problem}", LINE_LIMIT - len(hint) - len("; ")
        )
        return f"{text}; {hint}" if hint else text


class HookError(Exception):
    """The hook cannot continue. Carries the findings to report; `exit_code` is the exit code of the process."""

    exit_code = EXIT_REFUSED

    def __init__(self, code: str, subject: str, problem: str, hint: str = "") -> None:
        self.findings: tuple[Finding, ...] = (Finding("error", code, subject, problem, hint),)
        super().__init__(self.findings[0].as_line())

    @classmethod
    def from_findings(cls: type[E], findings: tuple[Finding, ...]) -> E:
        """Return an error that carries several findings; the first one is its text."""
        first = findings[0]
        error = cls(first.code, first.subject, first.problem, first.hint)
        error.findings = findings
        return error


class InputError(HookError):
    """State, config.json, settings or arguments are unusable. Nothing was changed on the system."""

    exit_code = EXIT_BAD_INPUT


class Refusal(HookError):
    """The request cannot or must not be carried out. Decided before anything was changed."""


class StepError(HookError):
    """A step of the plan failed. Raised where all changes are undone."""


def make_one_line(text: str, limit: int = LINE_LIMIT) -> str:
    """Return the text with every control character escaped, so that a tenant's string stays one harmless line.

    limit: length in characters above which the text is cut.
    """
    # An escape is longer than its character, so text behind the limit stays behind it.
    kept = text[: limit + 1]
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in kept)
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."
