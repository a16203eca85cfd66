# SPDX-License-Identifier: Apache-2.0
"""The executables as `pip install .` installs them: no foreign code runs in them, not even before they are isolated."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from oci_hooks import __version__
from tests.provision import PYTHON, REPOSITORY

HOOKS = ("vfio-host-check", "vfio-guest-bind")
GROUP = {"path": "/dev/vfio/4000", "type": "c", "major": 511, "minor": 9}


@pytest.fixture(name="venv", scope="module")
def make_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a virtual environment in which pip has installed the tree. No network: without what it needs of others."""
    top = tmp_path_factory.mktemp("pip")
    leave = shutil.ignore_patterns(".*", "__pycache__", "tests", "*.egg-info", "build", "dist")
    shutil.copytree(REPOSITORY, top / "sources", ignore=leave)
    build = [
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(top / "wheels"),
        str(top / "sources"),
    ]
    subprocess.run([PYTHON, *build], check=True, capture_output=True)
    subprocess.run([PYTHON, "-m", "venv", str(top / "venv")], check=True)
    (wheel,) = (top / "wheels").glob("*.whl")
    pip = [str(top / "venv/bin/pip"), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return top / "venv"


def plant(venv: Path, top: Path) -> dict[str, str]:
    """Put a program into each place from which Python runs one by itself, and return variables that name more."""
    trap = top / "trap"
    trap.mkdir()
    # Of the virtual environment, of the user, and one that a variable names.
    (site,) = venv.glob("lib/python3*/site-packages")
    user = top / "user" / site.relative_to(venv)
    user.mkdir(parents=True)
    for location in (site, user, trap):
        mark = f"open({str(top / 'sprung')!r}, 'a').write({str(location)!r})"
        (location / "evil.pth").write_text(f"import sys; {mark}\n")
        for name in ("sitecustomize", "usercustomize"):
            (location / f"{name}.py").write_text(mark + "\n")
    names = ("PYTHONPATH", "PYTHONHOME", "HOME", "PYTHONPYCACHEPREFIX", "PYTHONPLATLIBDIR")
    more = {"PYTHONUSERBASE": str(top / "user"), "PYTHONSTARTUP": str(trap / "sitecustomize.py"), "PYTHONINSPECT": "1"}
    return {**dict.fromkeys(names, str(trap)), **more, "VIRTUAL_ENV": str(venv), "PATH": f"{venv}/bin:/usr/bin:/bin"}


@pytest.mark.parametrize("hook", HOOKS)
def test_pip_no_code_runs_before_hook(venv: Path, tmp_path: Path, hook: str) -> None:
    environment = plant(venv, tmp_path)
    # The traps work: this interpreter falls into them.
    subprocess.run([f"{venv}/bin/python3", "-c", "pass"], env={"PYTHONPATH": str(tmp_path / "trap")}, check=True)
    assert (tmp_path / "sprung").exists()
    os.unlink(tmp_path / "sprung")

    def call(state: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [f"{venv}/bin/{hook}", *arguments]
        return subprocess.run(
            command,
            input=json.dumps(state),
            env=environment,
            cwd=tmp_path / "trap",
            capture_output=True,
            text=True,
            check=False,
        )

    state = {"id": "c1", "pid": 4194304, "bundle": str(tmp_path)}
    (tmp_path / "config.json").write_text("{}")
    done = call(state)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # What goes on with other libraries: a mistake that is explained, and a device that is asked for.
    done = call({})
    assert done.returncode == 2
    assert "missing required key" in done.stderr
    (tmp_path / "config.json").write_text(json.dumps({"linux": {"devices": [GROUP]}}))
    done = call(state)
    assert done.returncode == 1
    assert f"{hook}: error: [" in done.stderr
    assert call({}, "--version").stdout == f"{hook} {__version__}\n"
    assert not (tmp_path / "sprung").exists(), (tmp_path / "sprung").read_text()


@pytest.mark.parametrize("hook", HOOKS)
def test_pip_keeps_executable_bytes(venv: Path, hook: str) -> None:
    path = venv / "bin" / hook
    assert path.read_bytes() == (REPOSITORY / "hooks" / hook).read_bytes()
    assert path.stat().st_mode & 0o111


def test_pip_uninstall_removes_executables(venv: Path) -> None:
    subprocess.run([f"{venv}/bin/pip", "uninstall", "-q", "-y", "oci-vfio-hooks"], check=True, capture_output=True)
    assert not [path for path in (venv / "bin").iterdir() if path.name.startswith("vfio-")]
