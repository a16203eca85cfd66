# SPDX-License-Identifier: Apache-2.0
"""Where the genuine parts of Kata are that the tests run: none is in the repository, and none is built here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from tests.provision import REPOSITORY, MissingError

# Beside the repository, where its developers keep them.
BESIDE = REPOSITORY.parent / "shared/kata"


def make_environment(files: Sequence[Path]) -> dict[str, str]:
    """Return what tests in the machine find in their environment if a file among them has KATA = True."""
    if not any("\nKATA = True\n" in file.read_text() for file in files):
        return {}
    return {"OCI_VFIO_KATA_AGENT": str(find_agent())}


def find_agent() -> Path:
    """Return the path of Kata's agent: KATA_AGENT's, or that beside the repository. Raises MissingError."""
    return find_program(
        "KATA_AGENT", "kata-agent", "the agent of the Kata you run (usr/bin/kata-agent in its guest image)"
    )


def find_shim() -> Path:
    """Return the path of Kata's Go shim: KATA_SHIM's, or that beside the repository. Raises MissingError."""
    return find_program("KATA_SHIM", "containerd-shim-kata-v2", "the shim of the Kata you run (/opt/kata/bin has it)")


def find_program(variable: str, name: str, whose: str) -> Path:
    """Return the path of a program: that in the environment, or that beside the repository. Raises MissingError."""
    path = Path(os.environ.get(variable) or BESIDE / name).resolve()
    if not os.access(path, os.X_OK):
        raise MissingError(f"{path}: no such program; set {variable} to {whose}")
    return path


# By kind of tests: what there must be.
NEEDED: dict[str, tuple[Callable[[], Path], ...]] = {"kata": (find_agent,), "kata-chain": (find_agent, find_shim)}
