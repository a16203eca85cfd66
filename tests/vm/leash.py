# SPDX-License-Identifier: Apache-2.0
"""Run a command that must not outlive its caller: `leash.py COMMAND...`, with standard input held open by the caller.

When the caller dies, by whatever signal, standard input ends, and the command goes with all of its process group. A
virtual machine left behind would eat a processor for ever.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys


def main(command: list[str]) -> int:
    """Run the command; kill its process group when standard input ends; return its exit code."""
    # Ctrl-C and a polite end reach the leash itself; what it holds is in another session and hears nothing of it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    pidfd = os.pidfd_open(child.pid)
    try:
        select.select([0, pidfd], [], [])
    finally:
        if not select.select([pidfd], [], [], 0)[0]:
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
