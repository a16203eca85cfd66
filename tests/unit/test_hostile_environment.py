# SPDX-License-Identifier: Apache-2.0
"""Both executables, started in a hostile or broken environment: their output is the same as ever.

It is compared with the output in an empty environment: for a container without VFIO, for one whose
annotation cannot be read, and for one that requests a device that does not exist.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest

from oci_hooks import oci

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
HOOKS = ("vfio-guest-bind", "vfio-host-check")
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "wrong": {"annotations": {oci.DEVICES_ANNOTATION: 5}},
    "group": {"linux": {"devices": [{"path": "/dev/vfio/4000", "type": "c", "major": 244, "minor": 9}]}},
}
NAMES = (
    "json",
    "os",
    "sys",
    "oci_hooks",
    "jsonschema",
    "pyudev",
    "tenacity",
    "sitecustomize",
    "usercustomize",
    "_json",
)
Options = dict[str, Any]


def plant(top: Path) -> Path:
    """Make a directory with modules and programs that nobody may load or start: each leaves a mark."""
    trap = top / "trap"
    trap.mkdir()
    for name in NAMES:
        (trap / f"{name}.py").write_text(f"open({str(top / 'sprung')!r}, 'w').write({name!r})\nraise SystemExit(77)\n")
    for name in ("modprobe", "python3", "sh", "runc", "udevadm"):
        (trap / name).write_text(f"#!/bin/sh\necho {name} > {top}/sprung\nexit 77\n")
        (trap / name).chmod(0o755)
    return trap


def spoil_variables(top: Path) -> Options:
    """Set every variable that affects Python, the C library or a shell."""
    trap = plant(top)
    names = (
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONUSERBASE",
        "PYTHONPYCACHEPREFIX",
        "PATH",
        "HOME",
        "TMPDIR",
        "XDG_CACHE_HOME",
    )
    more = {
        "PYTHONSTARTUP": f"{trap}/os.py",
        "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error",
        "PYTHONBREAKPOINT": "os.x",
    }
    more |= {"PYTHONIOENCODING": "utf-16", "PYTHONDEVMODE": "1", "PYTHONUTF8": "0", "LC_ALL": "tr_TR.ISO-8859-9"}
    more |= {"BASH_ENV": f"{trap}/sh", "ENV": f"{trap}/sh", "MODPROBE_OPTIONS": "-C /nowhere", "TZ": "../../x"}
    return {"env": {**dict.fromkeys(names, str(trap)), **more}, "cwd": trap}


def stand_among_modules(top: Path) -> Options:
    """Start it in a directory with a json.py."""
    return {"cwd": plant(top)}


def lose_directory(top: Path) -> Options:
    """Start it in a directory that is deleted."""
    gone = top / "gone"

    def leave() -> None:
        os.mkdir(gone)
        os.chdir(gone)
        os.rmdir(gone)

    return {"preexec_fn": leave}


def few_descriptors(_: Path) -> Options:
    """Allow it eight open files."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))}


def little_memory(_: Path) -> Options:
    """Allow it 24 MiB of its own."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_DATA, (24 << 20, 24 << 20))}


def no_files(_: Path) -> Options:
    """Allow it no file of any length; its records can't be written."""

    def forbid() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    return {"preexec_fn": forbid}


def strict_umask(_: Path) -> Options:
    """Have every file it makes be unreadable."""
    return {"umask": 0o777}


def odd_signals(_: Path) -> Options:
    """Have it inherit ignored and blocked signals."""

    def spoil() -> None:
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))

    return {"preexec_fn": spoil}


def low_priority_and_stack(_: Path) -> Options:
    """Allow it half a MiB of stack, and no core."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (512 << 10, 512 << 10))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return {"preexec_fn": limit}


def call(hook: str, bundle: Path, **options: Any) -> tuple[int, bytes, bytes]:
    """Run one of the executables on a bundle and return exit code, standard output and error output."""
    # The highest pid there can be: no process.
    state = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 4194304, "bundle": str(bundle)}
    done = subprocess.run(
        [str(REPOSITORY / "hooks" / hook)],
        input=json.dumps(state).encode(),
        capture_output=True,
        timeout=60,
        check=False,
        **{"env": {}, **options},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "spoil",
    [
        spoil_variables,
        stand_among_modules,
        lose_directory,
        few_descriptors,
        little_memory,
        no_files,
        strict_umask,
        odd_signals,
        low_priority_and_stack,
    ],
)
def test_hook_same_output_in_hostile_environment(tmp_path: Path, hook: str, spoil: Callable[[Path], Options]) -> None:
    options = spoil(tmp_path)
    for number, (name, config) in enumerate(CONFIGS.items()):
        bundle = tmp_path / f"bundle-{name}"
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(config))
        plain = call(hook, bundle)
        assert plain[0] == (0, 2, 1)[number]
        assert call(hook, bundle, **options) == plain, name
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_hook_closed_descriptors_not_reused(tmp_path: Path, hook: str, closed: tuple[int, ...]) -> None:
    """No file that it opens gets the number of a standard stream, and with it that stream's output."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["wrong"]))

    def close() -> None:
        for fd in closed:
            os.close(fd)

    code, out, output = call(hook, tmp_path, preexec_fn=close)
    assert (code, out) == (2, b"")
    assert (b"error: [" in output) == (2 not in closed)
