# SPDX-License-Identifier: Apache-2.0
"""Run commands in turn and time each as a whole process: from its start until it was waited for.

In turn, because a machine's speed drifts: what is compared was measured within the same second or two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Callable

# What a peer finds its helpers by; the hooks need none.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
# GNU time forks from a process of its own small size: the peak of a child that Python starts is Python's at least.
TIME = "/usr/bin/time"
Samples = dict[str, list[float]]
# After this many seconds a user wants to hear that something is going on.
PATIENCE = 15.0


class BenchError(Exception):
    """Something that is measured did not do its work, so that its time means nothing."""


def do_nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    name: in the samples; command: an argument vector; stdin: what it reads; prepare, restore: done before and after
    each run, not timed; measure: instead of starting the command, something else that returns seconds.
    """

    name: str
    command: Sequence[str] = ()
    stdin: bytes = b""
    prepare: Callable[[], None] = do_nothing
    restore: Callable[[], None] = do_nothing
    measure: Callable[[], float] | None = field(default=None)

    def take(self) -> float:
        """Return the seconds of one run. Raises BenchError."""
        self.prepare()
        seconds = self.measure() if self.measure else time_command(self.command, self.stdin)
        self.restore()
        return seconds

    def take_memory(self) -> float:
        """Return the peak memory of one run in KiB. Raises BenchError."""
        self.prepare()
        kibibytes = weigh_command(self.command, self.stdin)
        self.restore()
        return kibibytes


def take_turns(cases: Iterable[Case], runs: int, about: str) -> Samples:
    """Return seconds of each case, as many as there are runs, after one run that is not counted."""
    cases = list(cases)
    samples: Samples = {case.name: [] for case in cases}
    started = reported = time.monotonic()
    for number in range(runs + 1):
        for case in cases:
            seconds = case.take()
            if number:
                samples[case.name].append(seconds)
        if time.monotonic() - reported > PATIENCE:
            reported = time.monotonic()
            say(f"{about}: turn {number} of {runs} is over after {reported - started:.0f} s")
    say(f"{about}: {len(cases)} cases, {runs} runs each, {time.monotonic() - started:.0f} s")
    return samples


def weigh(cases: Iterable[Case], runs: int) -> Samples:
    """Return the peak memory of each case in KiB, as many figures as there are runs."""
    cases = list(cases)
    samples: Samples = {case.name: [] for case in cases}
    for _ in range(runs):
        for case in cases:
            samples[case.name].append(case.take_memory())
    return samples


def time_command(command: Sequence[str], stdin: bytes) -> float:
    """Return the seconds of one run of a command. Raises BenchError with its output if it fails."""
    with NamedTemporaryFile() as output:
        begun, pid = start(command, stdin, output.name)
        _, status = os.waitpid(pid, 0)
        seconds = time.perf_counter() - begun
        check_exit(command, status, output.name)
    return seconds


def start(command: Sequence[str], stdin: bytes, output: str) -> tuple[float, int]:
    """Start a command and return the time before (perf_counter) and its pid. output: file for its output."""
    # A state is some hundred bytes, and a pipe holds 64 KiB.
    reader, writer = os.pipe()
    os.write(writer, stdin)
    os.close(writer)
    opened = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [(os.POSIX_SPAWN_DUP2, reader, 0), (os.POSIX_SPAWN_OPEN, 1, output, opened, 0o600)]
    begun = time.perf_counter()
    pid = os.posix_spawnp(command[0], list(command), ENVIRONMENT, file_actions=[*actions, (os.POSIX_SPAWN_DUP2, 1, 2)])
    os.close(reader)
    return begun, pid


def check_exit(command: Sequence[str], status: int, output: str) -> None:
    """Raise BenchError unless a command succeeded. status: of waitpid; output: file with its output."""
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise BenchError(f"{' '.join(command)} ended with {code}: {Path(output).read_text(errors='replace').strip()}")


def weigh_command(command: Sequence[str], stdin: bytes) -> float:
    """Return the peak memory of one run in KiB: ru_maxrss of wait4(2), the largest process of those it started."""
    with NamedTemporaryFile("r") as figure:
        done = subprocess.run(
            [TIME, "-f", "%M", "-o", figure.name, *command],
            input=stdin,
            capture_output=True,
            env=ENVIRONMENT,
            check=False,
        )
        if done.returncode:
            raise BenchError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()}")
        return float(figure.read())


def list_imports(executable: str, arguments: Sequence[str], stdin: bytes) -> list[tuple[int, int, str]]:
    """Return what a hook imports: microseconds by itself, with what it imports, and the module's name."""
    command = ["/usr/bin/python3", "-I", "-S", "-X", "importtime", executable, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, env=ENVIRONMENT, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()}")
    rows = [line.split(":", 1)[1].split("|") for line in done.stderr.decode().splitlines() if line.startswith("import")]
    return [(int(own), int(whole), name.rstrip()[1:]) for own, whole, name in rows if own.strip().isdigit()]


def say(text: str) -> None:
    """Print the current step, without buffering."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
