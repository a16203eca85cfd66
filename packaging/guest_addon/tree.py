# SPDX-License-Identifier: Apache-2.0
"""Lay the add-on's files out as they are in the guest."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from guest_addon.closure import OWN, Closure, Library, find_closure
from guest_addon.debs import BuildError, Package, run

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
STATIC = HERE / "root"
# Where everything of the runtime is in the guest.
PREFIX = "opt/oci-vfio-hooks"
PYTHON = "python3.11"
LOADER = "ld-linux-x86-64.so.2"
# By the names that they are looked for by. libc and libm first: the others need them.
LIBRARIES = ("libc.so.6", "libm.so.6", "libz.so.1", "libexpat.so.1", "libffi.so.8", "libudev.so.1")
LIBRARY_PLACES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
DIST_PACKAGES = "usr/lib/python3/dist-packages"
PHASES = ("prestart", "poststop")
HOOK = "vfio-guest-bind"
COMMON_LICENSES = "usr/share/common-licenses"


def find_library(debian: Path) -> Library:
    """Return where the modules of an unpacked Debian and of the repository are. Raises BuildError."""
    places = (STATIC / PREFIX / "lib" / PYTHON, REPOSITORY, debian / "usr/lib" / PYTHON, debian / DIST_PACKAGES)
    names = run([*make_python_command(debian), "-c", "import sys; print(*sys.builtin_module_names)"]).split()
    return Library(places, debian / "usr/lib" / PYTHON / "lib-dynload", frozenset(names))


def make_python_command(debian: Path) -> list[str]:
    """Return the command that runs the Python of an unpacked Debian, with its own C library."""
    libraries = ":".join(str(debian / place) for place in LIBRARY_PLACES)
    loader = debian / LIBRARY_PLACES[0] / LOADER
    return [str(loader), "--library-path", libraries, str(debian / "usr/bin" / PYTHON), "-IBS"]


def lay_out(debian: Path, packages: Sequence[Package], root: Path) -> None:
    """Make the add-on's tree in an empty directory.

    debian: a root with the packages unpacked. Raises BuildError.
    """
    top = root / PREFIX
    closure = find_closure(find_library(debian))
    copy_interpreter(debian, top)
    copy_static(root)
    compile_modules(debian, closure, top / "lib" / PYTHON)
    for extension in closure.extensions.values():
        copy(extension, top / "lib" / PYTHON / "lib-dynload" / extension.name)
    # A recording is made by the schemas, and names the versions of the libraries.
    for schema in sorted((REPOSITORY / OWN / "schemas").glob("*.json")):
        copy(schema, top / "lib" / PYTHON / OWN / "schemas" / schema.name)
    for info in sorted((debian / DIST_PACKAGES).glob("*.egg-info/PKG-INFO")):
        copy(info, top / "lib" / PYTHON / info.parent.name / info.name)
    write_licenses(debian, packages, top)
    set_modes(root)


def copy_interpreter(debian: Path, top: Path) -> None:
    """Copy the interpreter, its loader and its libraries, and let it find these where they will be."""
    (top / "bin").mkdir(parents=True)
    shutil.copy(debian / "usr/bin" / PYTHON, top / "bin/python3")
    for name in (LOADER, *LIBRARIES):
        found = [path for path in (debian / place / name for place in LIBRARY_PLACES) if path.exists()]
        if not found:
            raise BuildError(f"{name}: is not in Debian's packages")
        copy(found[0], top / "lib" / name)
    # RPATH and not RUNPATH: it beats LD_LIBRARY_PATH, and holds for the libraries of libraries too.
    place = f"/{PREFIX}/lib"
    options = ["--set-interpreter", f"{place}/{LOADER}", "--force-rpath", "--set-rpath", place]
    run(["patchelf", *options, str(top / "bin/python3")])


def copy_static(root: Path) -> None:
    """Copy what is in the guest as it is in root/ here; Kata's agent wants a regular file for each kind of hook."""
    for path in sorted(STATIC.rglob("*")):
        # Modules are compiled.
        if path.is_file() and path.suffix != ".py":
            copy(path, root / path.relative_to(STATIC))
    hooks = root / "usr/share/oci/hooks"
    for phase in PHASES[1:]:
        copy(hooks / PHASES[0] / HOOK, hooks / phase / HOOK)


def compile_modules(debian: Path, closure: Closure, place: Path) -> None:
    """Compile the modules of a closure into a directory, without their sources. Raises BuildError.

    A module without source is the fastest to load: nothing is compared.
    """
    jobs = []
    for name, source in sorted(closure.sources.items()):
        stem = name.replace(".", "/") + ("/__init__" if source.name == "__init__.py" else "")
        (place / stem).parent.mkdir(parents=True, exist_ok=True)
        jobs.append([str(source), str(place / f"{stem}.pyc"), f"/{PREFIX}/lib/{PYTHON}/{stem}.py"])
    command = [*make_python_command(debian), str(HERE / "compile_modules.py")]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"compiling modules: {done.stdout}{done.stderr}")


def write_licenses(debian: Path, packages: Iterable[Package], top: Path) -> None:
    """Write what the add-on contains and by which licences: Debian's files of each package, and ours."""
    place = top / "licenses"
    named: set[str] = set()
    lines = ["# Debian packages that files of the add-on are from: package, version, source package, its version."]
    for package in packages:
        text = (debian / "usr/share/doc" / package.name / "copyright").read_text(errors="replace")
        named.update(re.findall(rf"/{COMMON_LICENSES}/([A-Za-z0-9.-]*[A-Za-z0-9])", text))
        write(place / package.name / "copyright", text)
        lines.append(f"{package.name} {package.version} {package.source}")
    for name in sorted(named):
        path = debian / COMMON_LICENSES / name
        if path.exists():
            copy(path, place / "common-licenses" / name)
    copy(REPOSITORY / "LICENSE", place / "oci-vfio-hooks/LICENSE")
    write(top / "packages", "".join(f"{line}\n" for line in lines))


def set_modes(root: Path) -> None:
    """Give every file the mode it has for all users."""
    for path in root.rglob("*"):
        is_program = path.is_dir() or path.parent.name in ("bin", *PHASES) or path.name == LOADER
        path.chmod(0o755 if is_program else 0o644)


def copy(source: Path, target: Path) -> None:
    """Copy a file's content, following links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write(target: Path, text: str) -> None:
    """Write a text file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
