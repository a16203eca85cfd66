# SPDX-License-Identifier: Apache-2.0
"""Fuzz the readers, guided by coverage: python3 -m tests.fuzz [--seconds N | --runs N] [TARGET...]

  --seconds N   in all, shared out among the targets (default 120; tests/run uses that)
  --runs N      executions in all instead, e.g. 1000000

Targets are the functions of tests/fuzz/targets.py; all of them without a name. Prints the executions of each. What made
one fail is written to tests/data/fuzz/TARGET/ and is a unit test from then on. atheris comes from PyPI, into a virtual
environment of its own. Exit code: 0, 1 when something failed, 3 when atheris is not to be had.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import provision
from tests.provision import REPOSITORY, MissingError, say

KEPT = REPOSITORY / "tests/data/fuzz"
REQUIREMENTS = ("atheris>=2.3", "jsonschema>=3.2", "tomli>=1.1", "pyudev>=0.22", "tenacity>=6.2")
DONE = re.compile(r"number_of_executed_units: (\d+)")
COVERED = re.compile(r"cov: (\d+)")


def main(arguments: list[str]) -> int:
    """Fuzz what the command line asks for and return the exit code."""
    parser = ArgumentParser(prog="tests.fuzz", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    options = parser.parse_args(arguments)
    try:
        python = provision.ensure_venv("fuzz", REQUIREMENTS) / "bin/python"
    except MissingError as error:
        return provision.die(error)
    known = list_targets(python)
    names = options.targets or known
    if not set(names) <= set(known):
        parser.error(f"the targets are {', '.join(known)}")
    workers = len(os.sched_getaffinity(0))
    share = max(1, options.seconds * workers // len(names))
    limit = [f"-runs={options.runs // len(names)}"] if options.runs else [f"-max_total_time={share}"]
    with ThreadPoolExecutor(max_workers=workers) as candidates:
        counts = list(candidates.map(lambda name: fuzz(python, name, limit), names))
    say(f"{sum(map(abs, counts))} executions, {len(names)} targets, {sum(count < 0 for count in counts)} failed")
    return 1 if any(count < 0 for count in counts) else 0


def list_targets(python: Path) -> list[str]:
    """Return the names of all targets."""
    program = "from tests.fuzz.targets import TARGETS; print(*TARGETS)"
    return provision.run([str(python), "-c", program], cwd=REPOSITORY).split()


def fuzz(python: Path, name: str, limit: list[str]) -> int:
    """Fuzz one target; return how often it was executed, negative when it failed."""
    kept = KEPT / name
    with tempfile.TemporaryDirectory(prefix="fuzz-") as corpus:
        program = "import sys; from tests.fuzz.targets import list_seeds\n"
        program += f"for n, data in enumerate(list_seeds({name!r})): open(f'{corpus}/{{n}}', 'wb').write(data)"
        provision.run([str(python), "-c", program], cwd=REPOSITORY)
        command = [str(python), "-m", "tests.fuzz.one", name, corpus, *([str(kept)] if kept.is_dir() else [])]
        # A reader that takes many seconds for four thousand bytes is a defect too.
        command += [*limit, "-max_len=4096", "-timeout=25", "-print_final_stats=1", f"-artifact_prefix={corpus}/found-"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, errors="replace", check=False)
        output = done.stdout + done.stderr
        for path in Path(corpus).glob("found-*"):
            kept.mkdir(parents=True, exist_ok=True)
            (kept / path.name[len("found-") :][:20]).write_bytes(path.read_bytes())
    executions = int((DONE.findall(output) or ["0"])[-1])
    covered = (COVERED.findall(output) or ["0"])[-1]
    say(f"{name:13} {executions:9} executions, {covered} edges{'' if done.returncode == 0 else ', FAILED'}")
    if done.returncode:
        say("\n".join(line for line in output.splitlines() if not line.startswith(("#", "INFO")))[-3000:])
    return -max(executions, 1) if done.returncode else executions


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
