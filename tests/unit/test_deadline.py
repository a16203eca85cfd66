# SPDX-License-Identifier: Apache-2.0
"""The deadline counts from the start of the hook's process, because a runtime that kills a hook counts from there."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oci_hooks.system import MAX_AGE, Deadline, read_age

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
# A hook that waits for its state before it reads its settings, and prints what is left of 9 s.
HOOK = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from oci_hooks.program import Hook, run_hook

def work(run):
    run.record = "never"
    os.read(0, 1)
    before = run.deadline.remaining()
    run.deadline.extend(9)
    print(before, run.deadline.remaining(), run.deadline.elapsed(), flush=True)
    return 0

os._exit(run_hook(Hook("a-hook", 9, work, lambda _: None, lambda _: "", kmsg=False), []))
"""


def make_stat(age: float, name: str = "python3") -> str:
    """Return the stat of a process that has existed for so many seconds."""
    ticks = int((time.clock_gettime(time.CLOCK_BOOTTIME) - age) * os.sysconf("SC_CLK_TCK"))
    return f"77 ({name}) {' '.join(['S', *['1'] * 18, str(ticks), *['0'] * 30])}\n"


def write_stat(top: Path, text: str) -> str:
    """Write a process's stat and return its path."""
    path = top / "stat"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["python3", "a) S 1 (b", "x y z"])
def test_deadline_counts_from_start_of_process(tmp_path: Path, name: str) -> None:
    deadline = Deadline(8, write_stat(tmp_path, make_stat(3, name)))
    # Not read yet: most containers have no VFIO devices.
    assert deadline.remaining() > 7.5
    deadline.extend(8)
    assert 4 < deadline.remaining() < 5.02
    deadline.extend(2)
    assert deadline.remaining() == 0
    assert deadline.elapsed() == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "77 (python3) S 1",
        make_stat(3).replace(" 1 ", " one ").replace(" S ", " S x " * 9),
        make_stat(-60),
        make_stat(MAX_AGE + 1),
        make_stat(86400 * 365 * 300),
        f"77 (p) {' '.join(['S', *['1'] * 18, '9' * 400])}",
        "\udcff\0",
    ],
    ids=["empty", "short", "words", "future", "older", "before-boot", "huge", "bytes"],
)
def test_deadline_odd_stat_counts_from_now(tmp_path: Path, text: str) -> None:
    """Not negative, and no traceback: then it counts from the start of the hook's work, in full."""
    path = tmp_path / "stat"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_age(str(path)) is None
    deadline = Deadline(8, str(path))
    deadline.extend(8)
    assert 7 < deadline.remaining() <= 8


def test_deadline_unreadable_stat_counts_from_now(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        deadline = Deadline(8, str(path))
        deadline.extend(8)
        assert 7 < deadline.remaining() <= 8


def test_deadline_of_several_runs_counts_from_now() -> None:
    """vfio-nri and a replay are no process of one hook."""
    deadline = Deadline(8)
    deadline.extend(8)
    assert 7 < deadline.remaining() <= 8


def test_hook_deadline_includes_start() -> None:
    """A real process: what it takes until its settings are read is gone from its deadline, an exec before included."""
    started = time.monotonic()
    command = ["/bin/sh", "-c", 'read line; exec "$0" -ISc "$1"', sys.executable, HOOK]
    hook = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert hook.stdin and hook.stdout
    with hook.stdin, hook.stdout:
        ready, _, _ = select.select([hook.stdout], [], [], 1.0)
        assert not ready
        hook.stdin.write(b"\n.")
        hook.stdin.flush()
        before, after, elapsed = map(float, hook.stdout.read().split())
    assert hook.wait() == 0
    assert before > after
    assert after <= 9 - 1.0
    # A tick of the kernel's is 10 ms.
    assert 1.0 <= elapsed <= time.monotonic() - started + 0.02
