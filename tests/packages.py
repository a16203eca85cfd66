# SPDX-License-Identifier: Apache-2.0
"""The packages, and Debian roots to install them in: for tests/packaging and tests/vm/test_installed.py.

A root is made once with debootstrap and never changed; what a test does in it goes to a directory of its own, laid
over it with overlayfs in a mount namespace that ends with the command. Standard library only, like provision.py.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.provision import (
    PYTHON,
    REPOSITORY,
    find_cache,
    list_tree,
    locked,
    make_partial,
    make_stamp,
    read_apt_options,
    run,
    run_debootstrap,
    run_twice,
    say,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

# What packaging/build installs by itself is not here.
PACKAGES = {
    "debootstrap": "Debian roots to install packages in",
    "lintian": "what Debian thinks of a package",
    "rpmlint": "what Fedora and openSUSE think of a package",
    "podman": "reads hooks.d and CDI files",
    "python3-pip": "installing from source",
    "python3-setuptools": "installing from source",
    "python3-venv": "installing from source",
    "python3-wheel": "installing from source",
}
# What the hooks can do without: docs/reference/libraries.md.
RECOMMENDED = ("python3-jsonschema", "python3-pyudev", "python3-tenacity")
DEPENDENCIES = ("kmod", *RECOMMENDED)
# What uses the installed hooks in the machine.
RUNTIMES = ("runc", "crun", "podman")
# Each root: release, what is installed, what is only downloaded for a test to install, what pip puts into /opt/tests.
# The last two are what pytest needs below Python 3.11, which a pip that runs under a newer one does not see.
FLOOR = (
    "bullseye",
    (*DEPENDENCIES, "python3-venv"),
    (),
    (
        "pytest>=7.4",
        "pytest-timeout>=2.1",
        "pyfakefs>=5.3",
        "hypothesis>=6.80",
        "tomli",
        "protobuf>=4",
        "exceptiongroup",
        "typing-extensions",
    ),
)
ROOTS = {
    "debian-11": FLOOR,
    "debian-12": ("bookworm", (), (*DEPENDENCIES, *RUNTIMES), ()),
    "debian-13": ("trixie", (), DEPENDENCIES, ()),
}
# containerd as each release packages it, unpacked over the root of that name: what it makes of a configuration is seen
# in seconds. forky's is the first 2.x of Debian; it runs with the C library of Debian 13.
CONTAINERDS = {"1.6": ("bookworm", "debian-12"), "1.7": ("trixie", "debian-13"), "2.1": ("forky", "debian-13")}
# What tests/engines runs containers with, of each release that has them.
ENGINES = {
    "debian-12": ("containerd", "docker.io", "apparmor", *RUNTIMES),
    "debian-13": ("containerd", "docker.io", "docker-cli", *RUNTIMES),
}
# What a newcomer has: Debian's smallest, and the same with the Python that other packages bring along.
BARE_ROOTS = {
    "bare": ("bookworm", (), (), ()),
    "bare-python": ("bookworm", ("python3-minimal",), (), ()),
}
# What the guest add-on is made of.
ADDON_PARTS = ("packaging/guest", "oci_hooks/", "LICENSE")
# Roots with packages in them are made anew with every change: an older one is of no use, after the runs that have it.
KEPT_SECONDS = 7200.0
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"}


def run_mounted(script: str, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own. more: for subprocess.run."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, **more)


@dataclass(frozen=True)
class Root:
    """A root file system for one test: layers, the topmost first, and a directory that takes what is changed."""

    layers: tuple[Path, ...]
    changes: Path
    binds: tuple[tuple[Path, str], ...] = ()

    def run(
        self, *command: str, text: str = "", code: int | None = 0, cwd: str = "/", limit: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it.

        text: its standard input; code: the exit code it must end with, None for any; limit: seconds that it has.
        """
        environment = {**ENVIRONMENT, "DEBIAN_FRONTEND": "noninteractive"}
        done = run_mounted(self.make_script(cwd), *command, input=text, env=environment, timeout=limit)
        if code is not None and done.returncode != code:
            raise AssertionError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def make_script(self, cwd: str) -> str:
        """Return the shell script that mounts it, and runs its arguments in it."""
        top, work, location = (self.changes / name for name in ("top", "work", "root"))
        for directory in (top, work, location):
            directory.mkdir(parents=True, exist_ok=True)
        layers = f"lowerdir={':'.join(map(str, self.layers))},upperdir={top},workdir={work}"
        lines = [
            f"mount -t overlay -o {layers} root {location}",
            f"mount -t proc proc {location}/proc",
            f"mount --rbind /dev {location}/dev",
            f"mount --rbind /sys {location}/sys",
        ]
        for source, target in self.binds:
            lines += [f"mkdir -p {location}{target}", f"mount --rbind {source} {location}{target}"]
        return "\n".join([*lines, f'exec chroot {location} sh -c \'cd "$0" && exec "$@"\' {cwd} "$@"'])

    def list_changes(self) -> set[str]:
        """Return the paths of everything that was made in it, or changed."""
        top = self.changes / "top"
        # overlayfs notes with a character device what was removed.
        return {f"/{path.relative_to(top)}" for path in top.rglob("*") if not path.is_char_device()}


@functools.cache
def ensure_dist() -> Path:
    """Return a directory with the packages of the tree as it is at the first call, built if they are not there."""
    location = find_cache() / f"dist-{stamp_tree()}"
    if not location.exists():
        with locked(location):
            if not location.exists():
                say("building DEB and RPM packages")
                started = time.monotonic()
                forget_old("dist-*")
                partial = make_partial(location)
                run([str(REPOSITORY / "packaging/build"), str(partial)])
                partial.rename(location)
                say(f"  packages: done in {time.monotonic() - started:.0f} s")
    return location


@functools.cache
def ensure_addon() -> Path:
    """Return a directory with the guest add-on of the tree as it is: its archive, and `tree`, where it is unpacked."""
    location = find_cache() / f"addon-{stamp_tree(ADDON_PARTS)}"
    if not location.exists():
        with locked(location):
            if not location.exists():
                say("building the guest add-on")
                started = time.monotonic()
                forget_old("addon-[0-9a-f]*")
                partial = make_partial(location)
                run(make_addon_command(partial, "--directory", str(partial / "tree")))
                partial.rename(location)
                say(f"  guest add-on: done in {time.monotonic() - started:.0f} s")
    return location


def make_addon_command(output: Path, *options: str) -> list[str]:
    """Return the command that builds the guest add-on, of Debian's packages that are downloaded once."""
    recipe = (REPOSITORY / "packaging/guest_addon/debs.py").read_text()
    debs = find_cache() / f"debs-addon-{make_stamp(recipe)}"
    return [str(REPOSITORY / "packaging/guest-addon"), "--debs", str(debs), "--output", str(output), *options]


def stamp_tree(parts: tuple[str, ...] = ("",)) -> str:
    """Return a name for the contents of all files that go into the packages. parts: how these files' names begin."""
    digest = hashlib.sha256()
    for name in list_tree():
        path = REPOSITORY / name
        # Tests are in the source tarball only.
        if path.is_file() and name.startswith(parts) and not name.startswith("tests/"):
            digest.update(f"{name} {path.stat().st_mode:o}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def forget_old(pattern: str) -> None:
    """Remove directories of the cache that an earlier state of the tree has left."""
    for path in find_cache().glob(pattern):
        if path.is_dir() and time.time() - path.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def ensure_roots(names: Sequence[str] = tuple(ROOTS)) -> None:
    """Make the roots that are missing, side by side: most of the time is the mirror's."""
    with ThreadPoolExecutor() as candidates:
        list(candidates.map(ensure_root, names))


def ensure_root(name: str) -> Path:
    """Return a Debian root of this name, made once."""
    suite, installed, downloaded, requirements = {**ROOTS, **BARE_ROOTS}[name]
    location = find_cache() / f"root-{name}-{make_stamp(suite, *installed, *downloaded, *requirements)}"
    if not location.exists():
        with locked(location):
            if not location.exists():
                make_root(location, suite, installed, downloaded, requirements)
    return location


def make_root(
    place: Path, suite: str, installed: Sequence[str], downloaded: Sequence[str], requirements: Sequence[str]
) -> None:
    """Make a root with debootstrap: Debian's smallest, with the packages in ROOTS."""
    say(f"making a root of Debian {suite} with debootstrap: minbase{''.join(f', {name}' for name in installed)}")
    started = time.monotonic()
    partial = make_partial(place)
    run_debootstrap(partial, suite, installed)
    shutil.copy("/etc/resolv.conf", partial / "etc/resolv.conf")
    run(["chroot", str(partial), "apt-get", "clean"])
    if downloaded:
        # apt finds them in its cache when a test installs them, in seconds and also where there is no network.
        options = ["-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User=root"]
        run_twice(["chroot", str(partial), "apt-get", *options, "update"])
        run_twice(["chroot", str(partial), "apt-get", "install", "-y", "--no-install-recommends", "-d", *downloaded])
    if requirements:
        install_requirements(partial, requirements)
    partial.rename(place)
    say(f"  root of Debian {suite}: done in {time.monotonic() - started:.0f} s")


def install_requirements(root: Path, requirements: Sequence[str]) -> None:
    """Make the virtual environment /opt/tests in a root, which sees the distribution's libraries too.

    What it needs is loaded from outside: this machine knows its way to PyPI (proxies, certificates), the root doesn't.
    """
    version = run(["chroot", str(root), "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
    pip = [PYTHON, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary=:all:"]
    run([*pip, "--python-version", version, "-d", str(root / "opt/wheels"), *requirements])
    run(["chroot", str(root), "python3", "-m", "venv", "--system-site-packages", "/opt/tests"])
    install = ["/opt/tests/bin/python3", "-m", "pip", "install", "-q", "--no-index", "--find-links", "/opt/wheels"]
    # None of this machine's own settings for pip, which name files that are not in there.
    run(["env", "-i", *(f"{k}={v}" for k, v in ENVIRONMENT.items()), "chroot", str(root), *install, *requirements])
    shutil.rmtree(root / "opt/wheels")


def ensure_installed(name: str = "debian-12") -> tuple[Path, Path]:
    """Return the layers, topmost first, of a root in which apt has installed the DEBs and the runtimes."""
    base, dist = ensure_root(name), ensure_dist()
    location = find_cache() / f"installed-{name}-{make_stamp(str(base), str(dist))}"
    if not location.exists():
        with locked(location):
            if not location.exists():
                forget_old("installed-*")
                partial = make_partial(location)
                runtimes = RUNTIMES if set(RUNTIMES) <= set(ROOTS[name][2]) else ()
                install_debs(Root((base,), partial, ((dist, "/mnt/dist"),)), *RECOMMENDED, *runtimes)
                (partial / "top").rename(location)
                shutil.rmtree(partial)
    return location, base


def ensure_containerd(version: str) -> tuple[Path, ...]:
    """Return the layers, topmost first, of a root with our DEBs and a version of CONTAINERDS unpacked."""
    suite, name = CONTAINERDS[version]
    place = find_cache() / f"containerd-{version}-{make_stamp(suite)}"
    if not place.exists():
        with locked(place):
            if not place.exists():
                partial = make_partial(place)
                run(["apt-get", *read_apt_options(suite), "-q", "download", "containerd"], cwd=partial)
                (archive,) = partial.glob("*.deb")
                run(["dpkg-deb", "-x", str(archive), str(partial)])
                archive.unlink()
                # systemd's unit, in a directory that would hide the root's link of that name.
                shutil.rmtree(partial / "lib", ignore_errors=True)
                partial.rename(place)
    return place, *ensure_installed(name)


def ensure_engines(name: str) -> tuple[Path, ...]:
    """Return the layers, topmost first, of a root in which apt has installed our DEBs and ENGINES."""
    base, dist = ensure_root(name), ensure_dist()
    engines = find_cache() / f"engines-{name}-{make_stamp(str(base), *ENGINES[name])}"
    place = find_cache() / f"installed-engines-{name}-{make_stamp(str(engines), str(dist))}"
    with locked(place):
        if not engines.exists():
            install_layer(engines, (base,), (), ENGINES[name])
        if not place.exists():
            forget_old("installed-engines-*")
            install_layer(place, (engines, base), ((dist, "/mnt/dist"),), RECOMMENDED)
    return place, engines, base


def install_layer(
    place: Path, layers: tuple[Path, ...], binds: tuple[tuple[Path, str], ...], names: Sequence[str]
) -> None:
    """Make a layer in which apt has installed packages, and our DEBs where they are mounted."""
    partial = make_partial(place)
    root = Root(layers, partial, binds)
    if binds:
        install_debs(root, *names)
    else:
        options = ["-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User=root"]
        root.run("apt-get", *options, "-q", "update")
        root.run("apt-get", *options, "install", "-y", "-q", "--no-install-recommends", *names)
        root.run("apt-get", "clean")
    (partial / "top").rename(place)
    shutil.rmtree(partial)


def are_wanted_by(files: Sequence[Path]) -> bool:
    """Return whether a file of tests for the machine has PACKAGES = True."""
    return any("\nPACKAGES = True\n" in file.read_text() for file in files)


def make_environment(files: Sequence[Path]) -> dict[str, str]:
    """Return the environment variables for tests in the machine if a file has PACKAGES = True, or ADDON = True."""
    environment = {"OCI_VFIO_INSTALLED": ":".join(map(str, ensure_installed()))} if are_wanted_by(files) else {}
    if any("\nADDON = True\n" in file.read_text() for file in files):
        environment["OCI_VFIO_ADDON"] = str(ensure_addon())
    return environment


def install_debs(root: Root, *more: str) -> None:
    """Install the DEBs that are mounted on /mnt/dist as a user does, and these packages of Debian too."""
    command = shlex.join(["apt-get", "install", "-y", "-q", "--no-install-recommends", *more])
    root.run("sh", "-c", f"{command} ./dist/*.deb", cwd="/mnt")


def list_files(directory: Path) -> Iterator[Path]:
    """Return all files below a directory, links not followed."""
    for top, _, names in os.walk(directory):
        yield from (Path(top) / name for name in names)
