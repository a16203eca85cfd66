# SPDX-License-Identifier: Apache-2.0
"""The shape of the house: which part may import which, who may change the machine, what a run without VFIO loads.

docs/architecture.md has the same table in words.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).resolve().parents[2] / "oci_hooks"
# Parts that a part may import; the longest matching name is a module's part. "root": modules of no part.
PARTS: dict[str, tuple[str, ...]] = {
    "root": (),
    "linux": ("root",),
    "record": ("root", "linux"),
    "program": ("root", "record"),
    "guest.undo_log": ("root", "linux"),
    "guest.id_mapping": ("root",),
    "guest.settings": ("root", "linux"),
    "guest.request": ("root", "linux"),
    "guest.candidates": ("root", "linux"),
    "guest.selection": ("root", "linux", "guest.candidates", "guest.request"),
    "guest.plan": ("root", "linux", "guest.id_mapping", "guest.request", "guest.selection", "guest.settings"),
    "guest.apply": ("root", "linux", "guest.plan", "guest.undo_log"),
    "guest": (
        *("root", "linux", "program", "guest.apply", "guest.plan", "guest.request", "guest.selection"),
        *("guest.candidates", "guest.settings", "guest.undo_log", "guest.id_mapping"),
    ),
    "host": ("root", "linux", "program"),
    "nri": ("root", "linux", "program", "host"),
    "kata_image": ("root", "linux"),
    "kata_image.apply": ("root", "kata_image"),
    "kata_image.cli": ("root", "kata_image", "kata_image.apply", "guest.settings"),
    "replay": ("root", "linux", "program", "record", "guest", "guest.apply", "guest.undo_log", "host"),
}


def list_modules() -> dict[str, Path]:
    """Return the modules of the package by their names below it; a package has the name of its folder."""
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts).removesuffix("__init__").rstrip("."): path for name, path in paths.items()}


def list_imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Yield what a module imports of the package, lazily and for the type checker too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "oci_hooks":
            source = str(node.module).partition(".")[2]
            for alias in node.names:
                name = f"{source}.{alias.name}".lstrip(".")
                yield name if name in modules else source
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.partition(".")[2] for alias in node.names if alias.name.partition(".")[0] == "oci_hooks"
            )


def find_part(module: str) -> str:
    """Return the part that a module belongs to."""
    fitting = (part for part in PARTS if module == part or module.startswith(f"{part}."))
    return max(fitting, key=len, default="root")


def list_arrows() -> set[tuple[str, str]]:
    """Return who imports whom, module by module."""
    modules = list_modules()
    return {
        (name, target) for name, path in modules.items() if name for target in list_imports(path, modules) if target
    }


def test_imports_follow_part_rules() -> None:
    arrows = list_arrows()
    upward = [
        f"{source} imports {target}"
        for source, target in sorted(arrows)
        if find_part(target) not in (find_part(source), *PARTS[find_part(source)])
    ]
    print(f"{len(list_modules())} modules, {len(arrows)} arrows, {len(upward)} upward")
    assert upward == []


def test_imports_without_cycle() -> None:
    below: dict[str, set[str]] = {}
    for source, target in list_arrows():
        below.setdefault(source, set()).add(target)
    # Whatever imports nothing that is left is taken away, until nothing is left or everything is on a circle.
    while free := [name for name in below if not below[name] & below.keys()]:
        for name in free:
            del below[name]
    assert below == {}


# Calls that change the machine, and the modules that may make them.
CHANGING = {
    "os": (
        *("chmod", "chown", "fchmod", "fchown", "fork", "ftruncate", "kill", "link", "makedirs", "mkdir", "mknod"),
        *("open_tree", "pwrite", "remove", "rename", "replace", "rmdir", "setxattr", "symlink", "truncate", "unlink"),
        *("unshare", "utime", "write"),
    ),
    "fcntl": ("flock", "ioctl"),
    "subprocess": ("Popen", "run"),
}
WRITERS = (
    *("guest/apply/", "guest/claims.py", "guest/locks.py", "guest/undo_log.py", "record/writer.py", "log.py"),
    # Copies of images, and the programs that read and write file systems.
    *("kata_image/apply/", "kata_image/tools.py"),
    # The file that a person names with --output or --metrics.
    "host/files.py",
    # What the kernel knows of a group and a loop device is asked by ioctl.
    *("linux/processes.py", "linux/block_devices.py"),
)


def list_changes(path: Path) -> Iterator[str]:
    """Yield the calls of a module that change the machine, also those given to `root.do`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in CHANGING.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Attribute) and node.attr in ("CDLL", "setns"):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "_ctypes":
            yield node.module


def test_only_these_modules_change_the_machine() -> None:
    changing = {path.relative_to(PACKAGE).as_posix(): set(list_changes(path)) for path in PACKAGE.rglob("*.py")}
    elsewhere = {name: calls for name, calls in changing.items() if calls and not name.startswith(WRITERS)}
    assert elsewhere == {}
    assert sum(bool(calls) for name, calls in changing.items() if name.startswith("guest/apply/")) >= 6


# What a container without VFIO pays for: a module more is about two per cent of an interpreter's start.
IDLE = ("idle",)
# What one pays for where the word is in its config.json all the same.
FAST_PATH = ("findings", "frozen", "idle", "json_input", "loader", "oci", "program", "system")


def list_loaded(hook: str, bundle: Path, config: str) -> set[str]:
    """Return the modules that an executable loads for a container without VFIO, Python's own included."""
    (bundle / "config.json").write_text(config)
    state = f'{{"ociVersion": "1.0.2", "id": "c", "pid": 1, "status": "creating", "bundle": "{bundle}"}}'
    executable = PACKAGE.parent / "hooks" / {"guest": "vfio-guest-bind", "host": "vfio-host-check"}[hook]
    done = subprocess.run(
        [sys.executable, "-ISX", "importtime", executable], input=state, capture_output=True, text=True, check=True
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def choose_ours(loaded: set[str]) -> set[str]:
    """Return the modules that are the hooks' own."""
    return {name for name in loaded if name.partition(".")[0] == "oci_hooks"}


@pytest.mark.parametrize("hook", ["guest", "host"])
def test_idle_container_loads_one_module(tmp_path: Path, hook: str) -> None:
    """With its own name in config.json, which every container has that starts the hook."""
    config = f'{{"hooks": {{"prestart": [{{"path": "/x/vfio-{hook}-x"}}]}}, "linux": {{"devices": []}}}}'
    loaded = list_loaded(hook, tmp_path, config)
    assert choose_ours(loaded) == {"oci_hooks", *(f"oci_hooks.{name}" for name in IDLE)}
    assert loaded.isdisjoint({"os", "__future__", "json", "re"})


@pytest.mark.parametrize("hook", ["guest", "host"])
def test_undecided_container_loads_the_fast_path(tmp_path: Path, hook: str) -> None:
    config = '{"process": {"env": ["A=vfio"]}, "linux": {"devices": []}}'
    own = {"oci_hooks", f"oci_hooks.{hook}", f"oci_hooks.{hook}.hook", *(f"oci_hooks.{name}" for name in FAST_PATH)}
    assert choose_ours(list_loaded(hook, tmp_path, config)) == own


def test_no_module_is_long() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")
    }
    print(max(lengths.items(), key=lambda item: item[1]))
    assert {name: lines for name, lines in lengths.items() if lines > 350} == {}


def test_no_test_is_long() -> None:
    long = []
    for path in (PACKAGE.parent / "tests").rglob("test_*.py"):
        text = path.read_text()
        long += [path.name] if len(text.splitlines()) > 600 else []
        tests = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        long += [node.name for node in tests if node.name[:5] == "test_" and (node.end_lineno or 0) - node.lineno >= 60]
    assert long == []
