# SPDX-License-Identifier: Apache-2.0
"""The guest hook called without a runtime in between, and what it leaves behind. For tests inside the machine."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Callable, NoReturn

import pytest

from tests.vm import bundles, guest
from tests.vm.bundles import Container, Containers, Done

# The annotation that names a container's devices.
DEVICES = "io.katacontainers.x.vfio.devices"
PACKAGE = bundles.REPOSITORY / "oci_hooks"
CLAIMS = Path("/run/oci-vfio-hooks/claims")
SETTINGS = Path("/etc/oci-vfio-hooks/guest.toml")
# For tests where it makes no difference which runtime it is: the one that starts faster.
one_runtime = pytest.mark.parametrize("containers", ["crun"], indirect=True)


def call_hook(state: dict[str, Any] | None, *arguments: str, hook: str = "", **more: Any) -> Done:
    """Run the guest hook with a state on standard input. more: for subprocess.run; hook: path of another copy."""
    path = hook or bundles.find_hook(bundles.GUEST_HOOK)
    text = "" if state is None else json.dumps(state)
    done = subprocess.run(
        [path, *arguments], input=text, capture_output=True, text=True, timeout=120, check=False, **more
    )
    return Done(done.returncode, done.stdout, done.stderr)


def fork_hook(state: dict[str, Any] | None, *arguments: str, prepare: Callable[[], None] = lambda: None) -> Done:
    """Run the guest hook's code in a fork of this process, which has it imported: ten times as fast as starting it.

    prepare: called in the child first, for example to have it break at some step. A signal that ends the hook is its
    negative exit code.
    """
    import_hook()
    with TemporaryFile() as stdin, TemporaryFile() as stdout, TemporaryFile() as stderr:
        stdin.write(b"" if state is None else json.dumps(state).encode())
        stdin.seek(0)
        child = os.fork()
        if child == 0:
            be_hook((stdin, stdout, stderr), arguments, prepare)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stdout.seek(0)
        stderr.seek(0)
        return Done(code, stdout.read().decode(), stderr.read().decode())


def be_hook(streams: Iterable[IO[bytes]], arguments: Iterable[str], *prepare: Callable[[], None]) -> NoReturn:
    """Be the guest hook in this process, a fork, to its end.

    streams: standard input, output and error; prepare: called first.
    """
    try:
        for target, file in enumerate(streams):
            os.dup2(file.fileno(), target)
        for preparation in prepare:
            preparation()
        os._exit(importlib.import_module("oci_hooks.guest.hook").main(list(arguments)))
    finally:
        # An exception that the hook let through must not come back as another pytest.
        os._exit(70)


def name_module(path: Path) -> str:
    """Return the dotted name of a module of the package."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def import_hook() -> None:
    """Import all of the guest hook, so that a fork need not."""
    for name in (
        "argparse",
        "jsonschema",
        "pyudev",
        "syslog",
        "tenacity",
        *sorted(name_module(path) for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")),
    ):
        # What only the host hook has is no harm; what this interpreter lacks would be an error in the hook too.
        importlib.import_module(name)


def list_findings(done: Done) -> list[str]:
    """Return the errors and warnings that the hook wrote, a line each."""
    return [line for line in done.stderr.splitlines() if "error: [" in line or "warning: [" in line]


def forget_success(container: str) -> None:
    """Have a claim be that of a hook that was killed at its very end, so that a release puts it back.

    Else nothing is put back while the container lives; and what is put back can only be looked at while it does.
    """
    path = CLAIMS / container
    if path.exists():
        path.write_text("".join(line for line in path.read_text().splitlines(True) if line != "done\n"))


def release(state: dict[str, Any]) -> Done:
    """Run the guest hook as poststop, with a state as runc gives it, stopped and without a pid, for a killed hook."""
    forget_success(str(state["id"]))
    stopped = {key: value for key, value in state.items() if key != "pid"}
    return call_hook({**stopped, "status": "stopped"}, "poststop")


def make_created(containers: Containers, **options: Any) -> tuple[Container, dict[str, Any]]:
    """Return a container that is created and waits, without any hook, and its state: for hooks called by hand."""
    container = containers.make("/bin/sleep", "600", **{"hooks": {}, **options})
    done = container.create()
    assert done.code == 0, done.stderr
    return container, container.read_state()


def list_dev(container: Container) -> list[str]:
    """Return the names in a created container's /dev/vfio, sorted; empty without such a directory."""
    path = Path(f"/proc/{container.read_pid()}/root/dev/vfio")
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def look_at_drivers() -> dict[str, tuple[str, str]]:
    """Return driver and override of every PCI function."""
    return {path.name: (guest.driver_of(path.name), guest.override_of(path.name)) for path in guest.PCI.iterdir()}


def list_claims() -> list[str]:
    """Return the names of the containers that have a claim."""
    return sorted(path.name for path in CLAIMS.iterdir()) if CLAIMS.is_dir() else []


@contextmanager
def settings(*lines: str) -> Iterator[Path]:
    """Have a guest.toml with these lines and nothing else, meanwhile."""
    SETTINGS.parent.mkdir(exist_ok=True)
    SETTINGS.write_text("\n".join([*lines, ""]))
    try:
        yield SETTINGS
    finally:
        bundles.write_settings()


def ask(devices: Sequence[str] | str) -> dict[str, str]:
    """Return the annotations of a container that asks for these devices."""
    return {DEVICES: devices if isinstance(devices, str) else ",".join(devices)}


def list_programs(cgroup: str) -> list[int]:
    """Return the ids of the device programs of a cgroup of version 2."""
    command = ["bpftool", "--json", "cgroup", "show", cgroup]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [program["id"] for program in json.loads(done.stdout or "[]") if "device" in program["attach_type"]]
