# SPDX-License-Identifier: Apache-2.0
"""Progress as a user sees it, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import threading
from pathlib import Path

import pytest

from tests.progress import ERASE, Progress


class Terminal(io.StringIO):
    """A stream that claims to be a terminal; `drawn` is set when the running seconds have been drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = threading.Event()

    def isatty(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Keep what is written."""
        done = super().write(text)
        if "..." in text:
            self.drawn.set()
        return done


def test_progress_step_line_and_seconds() -> None:
    stream = io.StringIO()
    progress = Progress(stream, interval=0.01)
    with progress.step("kernel", "getting the kernel"):
        pass
    assert stream.getvalue() == "getting the kernel\n  kernel: done in 0 s\n"


def test_progress_failed_step_not_done() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    with pytest.raises(OSError, match="no mirror"), progress.step("kernel"):
        raise OSError("no mirror")
    assert (stream.getvalue(), progress.steps) == ("kernel\n", {})


def test_progress_terminal_seconds_overwritten() -> None:
    stream = Terminal()
    progress = Progress(stream, interval=0.01)
    with progress.step("kernel"), progress.step("root"):
        assert stream.drawn.wait(20)
        progress.say("a line")
    assert re.search(r"\r\x1b\[K  \.\.\. kernel 0 s, root 0 s", stream.getvalue())
    assert f"{ERASE}a line\n" in stream.getvalue()


def test_progress_seconds_keep_partial_line() -> None:
    """The virtual machine prints in pieces."""
    stream = Terminal()
    progress = Progress(stream, interval=0.01)
    with progress.step("machine"):
        progress.write("half a ")
        stream.drawn.clear()
        before = stream.getvalue()
        assert not stream.drawn.wait(0.2)
        progress.write("line\n")
        assert stream.getvalue() == f"{before}line\n"
        assert stream.drawn.wait(20)


def test_progress_real_terminal() -> None:
    """Through a pseudo-terminal, as long as the step lasts."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream, os.fdopen(master, "rb", buffering=0) as output:
        progress = Progress(stream, interval=0.01)
        with progress.step("packages"):
            seen = b""
            while seen.count(b"... packages") < 3:
                seen += output.read(1024)


def test_progress_log_complete(tmp_path: Path) -> None:
    """The log has the output of commands, too, and none of the running seconds."""
    progress = Progress(io.StringIO())
    log = tmp_path / "demo.log"
    log.write_text("an older run")
    with progress.keep_log(log):
        progress.say("installing")
        progress.note("$ apt-get install x\nUnpacking x\n")
    progress.note("nobody wants it")
    assert log.read_text() == "installing\n$ apt-get install x\nUnpacking x\n"
