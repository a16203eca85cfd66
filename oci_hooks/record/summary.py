# SPDX-License-Identifier: Apache-2.0
"""What a recording has of a run besides its steps."""

from __future__ import annotations

from oci_hooks.findings import Finding
from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Summary(Frozen):
    """What a recording has of a run besides its steps.

    program: the executable's name; container: its id, "" where not known; arguments: the command line, by name; code:
    the exit code; seconds: how long it took; error: an exception that nobody foresaw; full: nothing is left out.
    """

    program: str
    container: str
    arguments: dict[str, Any]
    code: int
    seconds: float
    findings: list[Finding]
    error: Exception | None
    full: bool
