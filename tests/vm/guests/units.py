# SPDX-License-Identifier: Apache-2.0
"""For tests in a guest whose init is systemd: call it, wait for what it does, run a command as a service."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence

from tests.vm.bundles import Done

# systemd reacts at once; a program that it starts takes seconds in an emulated machine.
LIMIT = 120.0


def run(*command: str, text: str = "") -> Done:
    """Run a command and return what came of it. text: its standard input."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=LIMIT, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def systemctl(*words: str) -> str:
    """Run systemctl, which must succeed, and return its output without the newline."""
    done = run("systemctl", *words)
    assert done.code == 0, (words, done, *(read_journal(word) for word in words if "." in word))
    return done.stdout.strip()


def show(unit: str, name: str) -> str:
    """Return a property of a unit."""
    return systemctl("show", "--value", f"--property={name}", unit)


def read_journal(unit: str) -> str:
    """Return what a unit has logged in this boot."""
    return run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}").stdout


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds. what: for the message when it never does."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.2)


def run_service(command: Sequence[str], *properties: str, text: str = "") -> Done:
    """Run a command as a service with these properties, to its end. text: its standard input."""
    options = [f"--property={each}" for each in properties]
    return run("systemd-run", "--quiet", "--pipe", "--wait", "--collect", *options, "--", *command, text=text)
