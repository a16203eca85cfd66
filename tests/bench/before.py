# SPDX-License-Identifier: Apache-2.0
"""Measure another revision of the hooks too: each case twice, in the same turns, so that a drift meets both."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tests.bench.figures import MEMORY, Figure, Result, compute
from tests.bench.timing import BenchError, Case, Samples
from tests.provision import PYTHON, REPOSITORY

# Where the parts find the other revision's tree; unset without one.
VARIABLE = "OCI_VFIO_BENCH_BEFORE"
SUFFIX = " before"
# What a container without VFIO costs, on this machine: the cheapest cases, and those with the most turns.
CHEAPEST = ("plain guest none", "plain host none")
# What is measured in the machine with another revision: peers do not change.
COMPARED = ("bare", "guest none", "host none", "guest 1", "guest 8")


def unpack(revision: str, place: Path) -> Path:
    """Write the hooks of a revision below a directory and return it. Raises BenchError."""
    place.mkdir()
    command = ["git", "archive", revision, "hooks", "oci_hooks"]
    try:
        archive = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
    except FileNotFoundError:
        raise BenchError(f"--compare {revision}: git is missing: apt-get install --no-install-recommends git") from None
    if archive.returncode:
        raise BenchError(f"--compare {revision}: {archive.stderr.decode().strip()}; name a commit, tag or branch")
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
    subprocess.run([PYTHON, "-m", "compileall", "-q", str(place / "oci_hooks")], check=True)
    return place


def find_tree() -> Path | None:
    """Return the tree of the other revision, None without one."""
    return Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def double(cases: Iterable[Case], ours: Path, theirs: Path | None) -> list[Case]:
    """Return the cases, each that starts a hook followed by the same with the other revision's.

    ours, theirs: the trees with the executables; None: only one revision is measured.
    """
    doubled = []
    for case in cases:
        doubled.append(case)
        if theirs and case.command and case.command[0].startswith(f"{ours}/hooks/"):
            executable = f"{theirs}{case.command[0].removeprefix(str(ours))}"
            doubled.append(replace(case, name=case.name + SUFFIX, command=(executable, *case.command[1:])))
    return doubled


def compute_changes(samples: Samples, memory: Samples, revision: str) -> list[Result]:
    """Return the ratio of this tree to the other revision for each case that was measured with both."""
    results = []
    for kind, measured in (("time", samples), (MEMORY, memory)):
        for name in measured:
            figure = Figure(f"{kind}, {name}: this tree / {revision}", name, name + SUFFIX, kind=kind)
            result = compute(figure, measured)
            results += [result] if result else []
    return results


def find_slower(results: Iterable[Result], band: float) -> list[str]:
    """Return a line for each of the cheapest cases that takes longer than the other revision, by more than the band.

    band: a part of the whole, e.g. 0.15. The whole middle half of the single turns has to be above 1, too: a machine
    that was busy for a moment is no change of the hooks.
    """
    return [
        f"{result.figure.about}: {result.ratio:.2f}, above {1 + band:.2f}"
        for result in results
        if result.figure.over in CHEAPEST and result.figure.kind != MEMORY
        if result.ratio > 1 + band and result.low > 1
    ]


def choose(cases: Sequence[Case]) -> list[Case]:
    """Return the cases that are measured with another revision; all without one."""
    return [case for case in cases if case.name in COMPARED] if find_tree() else list(cases)
