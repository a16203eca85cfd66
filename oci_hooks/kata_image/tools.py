# SPDX-License-Identifier: Apache-2.0
"""Run the programs that know file systems and compressions: e2fsprogs, erofs-utils, zstd.

Their output is not translated, they read nothing from the terminal, and nothing of the user's environment decides where
they are found.
"""

from __future__ import annotations

import os
import subprocess
import threading

from oci_hooks.findings import Refusal
from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
PACKAGES = {
    "zstd": "zstd",
    **dict.fromkeys(("debugfs", "e2fsck", "resize2fs"), "e2fsprogs"),
    **dict.fromkeys(("mkfs.erofs", "fsck.erofs", "dump.erofs"), "erofs-utils"),
}
CHUNK = 1 << 20
# What fakeroot(1) works by. This process has it already.
FAKEROOT = ("FAKEROOTKEY", "LD_PRELOAD", "LD_LIBRARY_PATH", "FAKED_MODE")
# Lines of a program's own report that are passed on.
LINES_TOLD = 4


class Done(Frozen):
    """How a program ended. output: of standard output; errors: of standard error."""

    code: int
    output: bytes
    errors: str


def find_tool(name: str) -> str:
    """Return the path of a program. Raises Refusal [tool-missing] with the package that has it."""
    for directory in PATH:
        if os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    package = PACKAGES[name]
    raise Refusal("tool-missing", name, "is not installed", f"install {package} (Debian: apt install {package})")


def make_environment(**more: str) -> dict[str, str]:
    """Return the environment that the programs get."""
    faked = {name: os.environ[name] for name in FAKEROOT if FAKEROOT[0] in os.environ and name in os.environ}
    return {"PATH": ":".join(PATH), "LC_ALL": "C", **faked, **more}


def run_tool(
    name: str,
    *arguments: str,
    cwd: str = "/",
    text: str = "",
    codes: Sequence[int] = (0,),
    descriptors: Sequence[int] = (),
    environment: dict[str, str] | None = None,
) -> Done:
    """Run a program to its end.

    text: its standard input; codes: exit codes that are no failure; descriptors: open files that it keeps;
    environment: variables for it.

    Raises Refusal [tool-missing] or [tool-failed] with the end of what it reported.
    """
    done = subprocess.run(  # noqa: S603 - a list, without a shell
        [find_tool(name), *arguments],
        cwd=cwd,
        input=text.encode(),
        capture_output=True,
        check=False,
        env=make_environment(**(environment or {})),
        pass_fds=descriptors,
    )
    errors = done.stderr.decode("utf-8", "replace")
    if done.returncode not in codes:
        lines = (errors or done.stdout.decode("utf-8", "replace")).strip().splitlines()[-LINES_TOLD:]
        problem = f"ended with {done.returncode}: {' / '.join(lines) or 'without a message'}"
        raise Refusal("tool-failed", name, problem, "nothing was written; check free space, and the image itself")
    return Done(done.returncode, done.stdout, errors)


def run_filter(command: Sequence[str], chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Yield what a program makes of the chunks. name: of the program. Raises Refusal as `run_tool` does."""
    process = subprocess.Popen(  # noqa: S603 - a list, without a shell
        [find_tool(command[0]), *command[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=make_environment(),
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    feeder = threading.Thread(target=feed, args=(process.stdin, chunks), daemon=True)
    feeder.start()
    try:
        while data := process.stdout.read(CHUNK):
            yield data
        errors = process.stderr.read().decode("utf-8", "replace").strip()
        if process.wait():
            raise Refusal("tool-failed", name, f"ended with {process.returncode}: {errors}", "check the image")
    finally:
        process.kill()
        process.wait()
        feeder.join()
        process.stdout.close()
        process.stderr.close()


def feed(pipe: object, chunks: Iterable[bytes]) -> None:
    """Write the chunks to a program and close its input; it may have ended before."""
    try:
        for chunk in chunks:
            pipe.write(chunk)  # type: ignore[attr-defined]
        pipe.close()  # type: ignore[attr-defined]
    except OSError:
        pass
