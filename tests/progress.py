# SPDX-License-Identifier: Apache-2.0
"""Show progress: a line when a step begins, and one with its seconds when it has ended.

On a terminal the seconds run meanwhile, in a line that the next one overwrites, so that there is never silence. What
commands printed goes to the log, if there is one. Standard library only, like provision.py.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, TextIO

ERASE = "\r\033[K"


class Progress:
    """Prints lines and running seconds. Several threads may print."""

    def __init__(self, stream: TextIO | None = None, interval: float = 1.0) -> None:
        """stream: where to print; None: wherever standard output goes. interval: seconds between two looks."""
        self.stream = stream
        self.interval = interval
        self.log: IO[str] | None = None
        self.lock = threading.RLock()
        self.steps: dict[str, float] = {}
        self.drawn = False
        self.at_line_start = True

    def find_stream(self) -> TextIO:
        """Return where to print."""
        return self.stream or sys.stdout

    def say(self, text: str) -> None:
        """Print a line at once."""
        self.write(f"{text}\n")

    def write(self, text: str) -> None:
        """Print text as it is, and at once."""
        if not text:
            return
        with self.lock:
            stream = self.find_stream()
            # One write: other processes may print there too.
            stream.write((ERASE if self.drawn else "") + text)
            stream.flush()
            self.drawn = False
            self.at_line_start = text.endswith("\n")
        self.note(text)

    def note(self, text: str) -> None:
        """Write text to the log only."""
        with self.lock:
            if self.log is not None:
                self.log.write(text)
                self.log.flush()

    @contextlib.contextmanager
    def keep_log(self, path: Path) -> Iterator[None]:
        """Write a log meanwhile, in place of the last one."""
        with path.open("w", errors="replace") as log:
            self.log = log
            try:
                yield
            finally:
                self.log = None

    @contextlib.contextmanager
    def step(self, name: str, what: str = "") -> Iterator[None]:
        """Do something that takes long. name: its short name; what: the line at its beginning, if not the name."""
        self.say(what or name)
        started = time.monotonic()
        with self.lock:
            self.steps[name] = started
        ended = threading.Event()
        # Each step has a thread of its own; the one that has begun last draws the line for all.
        ticker = threading.Thread(target=self.tick, args=(name, ended), daemon=True)
        if self.find_stream().isatty():
            ticker.start()
        try:
            yield
        finally:
            ended.set()
            if ticker.ident is not None:
                ticker.join()
            with self.lock:
                del self.steps[name]
        self.say(f"  {name}: done in {time.monotonic() - started:.0f} s")

    def tick(self, name: str, ended: threading.Event) -> None:
        """Draw the running seconds until the step has ended."""
        while not ended.wait(self.interval):
            with self.lock:
                if self.at_line_start and name == next(reversed(self.steps)):
                    now = time.monotonic()
                    words = ", ".join(f"{step} {now - since:.0f} s" for step, since in self.steps.items())
                    stream = self.find_stream()
                    stream.write(f"{ERASE}  ... {words}"[:100])
                    stream.flush()
                    self.drawn = True


# The one that everything here prints through: a line of one thread does not break that of another.
PROGRESS = Progress()
