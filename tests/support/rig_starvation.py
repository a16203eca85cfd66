# SPDX-License-Identifier: Apache-2.0
"""Measure how long a machine has waited for a processor: this time must not count against its limits.

On a busy host an emulated machine was seen to get one second of eight. By the clock it hangs; it only waits. A machine
that really hangs either spins or sleeps, and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")


def measure_starvation(pid: int, proc: Path = PROC) -> float:
    """Return the seconds that the hungriest thread among a process and its descendants has waited to be run."""
    waits = [read_wait(thread) for process in find_family(pid, proc) for thread in list_threads(proc / str(process))]
    return max(waits, default=0.0)


def find_family(pid: int, proc: Path) -> Iterator[int]:
    """Return a process and all its descendants that live now."""
    yield pid
    for thread in list_threads(proc / str(pid)):
        try:
            children = (thread / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield from find_family(int(child), proc)


def list_threads(process: Path) -> list[Path]:
    """Return the directories of a process's threads; none when it has ended meanwhile."""
    try:
        return list((process / "task").iterdir())
    except OSError:
        return []


def read_wait(thread: Path) -> float:
    """Return the seconds a thread was ready to run and was not. Zero where the kernel does not count it."""
    try:
        # time on a processor, time waiting for one (both in ns), times it got one
        return int((thread / "schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
