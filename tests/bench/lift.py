# SPDX-License-Identifier: Apache-2.0
"""Have everything that is measured in the machine's memory: programs, libraries, modules.

The rig's machine has its files from outside by 9p, where each opening is a conversation of several milliseconds. No
guest is like that, and a program of many small files, as any in Python is, would be measured as slower than it is. So
every file that a case opens is lifted into the writable layer of its overlay, which is a tmpfs: the peers' as well as
the hooks' and the bare interpreter's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile

from tests.bench.timing import ENVIRONMENT, BenchError, Case
from tests.provision import PYTHON, REPOSITORY

# Below /usr, so that the hooks are in the same file system as the programs that they are compared with.
HOOKS = Path("/usr/local/lib/oci-vfio-hooks")
# Those of another revision.
BEFORE = Path("/usr/local/lib/oci-vfio-hooks-before")
# The hooks' own deadline, to be replaced by one that does not end a measurement where the machine is busy. A
# guest.toml would do the same, and have the time of reading it in every figure.
DEADLINES = {"system.py": "USUAL_SECONDS = 8.0\n"}
OVERLAYS = ("/usr/", "/etc/")
QUOTED_PATH = re.compile(r'"(/[^"]+)"')


def install_hooks(tree: Path = REPOSITORY, place: Path = HOOKS) -> None:
    """Copy the hooks of a tree to their place, have them wait longer, and byte-compile them."""
    for name in ("hooks", "oci_hooks"):
        shutil.copytree(tree / name, place / name)
    for name, line in DEADLINES.items():
        module = place / "oci_hooks" / name
        if line not in module.read_text():
            raise BenchError(f"{module} does not say {line!r} any more")
        module.write_text(module.read_text().replace(line, line.replace("8.0", "100.0")))
    subprocess.run([PYTHON, "-m", "compileall", "-q", str(place / "oci_hooks")], check=True)


def use_hooks(place: Path = HOOKS) -> None:
    """Have the tests' helpers use the hooks in this place."""
    os.environ["OCI_VFIO_HOOKS_DIR"] = str(place / "hooks")


def lift(cases: Iterable[Case]) -> None:
    """Run each case once and lift the files that it opened."""
    lifted: set[str] = set()
    for case in cases:
        for path in list_files(case) - lifted:
            status = os.stat(path)
            # An overlay copies a file into its writable layer when its owner is set, also to the same.
            os.chown(path, status.st_uid, status.st_gid)
            lifted.add(path)


def list_files(case: Case) -> set[str]:
    """Return the files that a case opens in the overlays."""
    with NamedTemporaryFile("r") as trace:
        case.prepare()
        # With seccomp only these calls are slowed: the hook has a deadline.
        options = ["-f", "--seccomp-bpf", "-qq", "-e", "trace=open,openat,execve", "-o", trace.name]
        command = ["strace", *options, *case.command]
        done = subprocess.run(command, input=case.stdin, capture_output=True, env=ENVIRONMENT, check=False)
        if done.returncode:
            raise BenchError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()}")
        case.restore()
        paths = {os.path.realpath(path) for path in QUOTED_PATH.findall(trace.read())}
    return {path for path in paths if path.startswith(OVERLAYS) and os.path.isfile(path)}
