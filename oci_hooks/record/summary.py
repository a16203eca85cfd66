# SPDX-License-Identifier: Apache-2.0
"""Summarize a run for its recording: everything but its steps."""

from __future__ import annotations

from oci_hooks.findings import Finding
from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Summary(Frozen):
    """The part of a recording other than the run's steps.

    program: the executable's name; container: its id, "" if unknown; arguments: the command line, by name; code:
    the exit code; seconds: the duration; error: an unexpected exception; full: nothing is redacted.
    """

    program: str
    container: str
    arguments: dict[str, Any]
    code: int
    seconds: float
    findings: list[Finding]
    error: Exception | None
    full: bool
