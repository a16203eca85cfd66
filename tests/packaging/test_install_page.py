# SPDX-License-Identifier: Apache-2.0
"""docs/howto/install.md, executed line by line."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from oci_hooks import __version__
from tests.newcomer import lines
from tests.packages import Root
from tests.packaging.conftest import MakeRoot
from tests.provision import REPOSITORY

# Lines that another test runs: where there are devices, and where what is left is looked for.
ELSEWHERE = {"podman run": "tests/vm/test_installed.py", "apt purge": "tests/newcomer/test_install.py"}


def test_every_line_of_the_page_works(dist: Path, bare: MakeRoot, tmp_path: Path) -> None:
    """Each line in a fresh root of Debian 12; `packaging/build` has run already, and its packages are in dist/."""
    tree = tmp_path / "clone"
    names = shutil.ignore_patterns(".*", "__pycache__", "dist")
    shutil.copytree(REPOSITORY, tree, ignore=names)
    shutil.copytree(dist, tree / "dist")
    root = bare("debian-12")
    root = Root(root.layers, root.changes, ((tree, "/root/clone"),))
    done = [run_line(line, root, tree, tmp_path) for line in lines.read_install_lines()]
    assert len(done) >= 11
    # What the lines promise is there.
    for command in ("vfio-host-check", "vfio-guest-bind", "vfio-hook-replay"):
        root.run(command, "--help")
    output = root.run("/opt/oci-vfio-hooks/bin/vfio-guest-bind", text="{}", code=2).stderr
    assert "missing required key id, bundle" in output


def run_line(line: str, root: Root, tree: Path, tmp_path: Path) -> str:
    """Run one line where it can be run, and return where that was."""
    words = shlex.split(line)
    if words[0] == "packaging/build":
        assert (REPOSITORY / words[0]).stat().st_mode & 0o111
        return "the fixture dist"
    if words[0] == "rpmbuild":
        # On this machine, which has the tool, below a home of its own.
        home = tmp_path / "home"
        command = [*words[:1], "--define", f"_topdir {home}/rpmbuild", *words[1:]]
        subprocess.run(command, cwd=tree, check=True, capture_output=True)
        return "here"
    if words[0] == "dnf":
        # There is no Fedora here: what the shell makes of the line are packages that rpmbuild has just made.
        script = f'dnf() {{ shift; printf "%s\\n" "$@"; }}; {line}'
        command, environment = ["/bin/bash", "-ec", script], {"HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        paths = done.stdout.splitlines()
        assert all(Path(path).is_file() for path in paths), paths
        names = [Path(path).name.rpartition(f"-{__version__}")[0] for path in paths]
        assert names in (["python3-oci-vfio-hooks", side] for side in ("oci-vfio-hooks", "oci-vfio-hooks-guest"))
        return "nowhere"
    if " ".join(words[:2]) in ELSEWHERE:
        return ELSEWHERE[" ".join(words[:2])]
    if words[:3] == ["python3", "-m", "venv"] or words[0].endswith("/pip"):
        return run_pip_line(words, root, tree)
    if "apt" in words:
        line = line.replace("apt install", "apt install -y --no-install-recommends")
    # There is no IOMMU here, and the check reports that.
    code = 1 if "--all" in words else 0
    result = root.run("sh", "-c", line, cwd="/root/clone", code=None)
    assert result.returncode in (0, code), result.stdout + result.stderr
    return "in the root"


def run_pip_line(words: list[str], root: Root, tree: Path) -> str:
    """Run a line with pip on this machine, which knows its way to PyPI, at the place that the root has it."""
    location = root.changes / "top"
    if words[0] == "python3":
        # The interpreter is the root's, at the same path here.
        subprocess.run(["/usr/bin/python3", *words[1:-1], "--copies", str(location) + words[-1]], check=True)
        return "here"
    pip = [str(location / "opt/oci-vfio-hooks/bin/python3"), "-m", "pip", *words[1:]]
    subprocess.run(pip, cwd=tree, check=True, capture_output=True)
    # A line that contains its path gets the path in the root.
    for path in (location / "opt/oci-vfio-hooks/bin").iterdir():
        if path.read_bytes().startswith(b"#!"):
            path.write_text(path.read_text().replace(str(location), ""))
    return "here"
