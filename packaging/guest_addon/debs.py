# SPDX-License-Identifier: Apache-2.0
"""Debian's packages whose files the add-on contains."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUITE = "bookworm"
ARCHITECTURE = "amd64"
MIRROR = "http://deb.debian.org/debian"
SECURITY_MIRROR = "http://deb.debian.org/debian-security"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Each with what the add-on takes of it.
PACKAGES = {
    "python3.11-minimal": "the interpreter",
    "libpython3.11-minimal": "its library: what it starts with",
    "libpython3.11-stdlib": "its library: the rest",
    "libc6": "the C library and the loader",
    "zlib1g": "the interpreter is linked with it",
    "libexpat1": "the interpreter is linked with it",
    "libffi8": "ctypes",
    "python3-pyudev": "waits for devices that are plugged in late",
    "libudev1": "pyudev",
    "python3-tenacity": "tries a device again that vfio-pci did not take at once",
    "base-files": "the texts of licences",
}


class BuildError(Exception):
    """The add-on cannot be built: why, and what to do."""


@dataclass(frozen=True)
class Package:
    """A package of Debian. source: name and version of its source package."""

    name: str
    version: str
    source: str


def run(command: Sequence[str], cwd: Path | None = None) -> str:
    """Run a command and return what it printed. Raises BuildError."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def list_missing(place: Path) -> list[str]:
    """Return the names of the packages that are not in a directory."""
    return [name for name in PACKAGES if not list(place.glob(f"{name}_*.deb"))]


def download(place: Path, work: Path) -> None:
    """Download the packages that are not in a directory yet. work: an empty directory for apt's own files.

    apt has sources of its own, so that the release of this machine does not matter. Raises BuildError.
    """
    missing = list_missing(place)
    if not missing:
        return
    place.mkdir(parents=True, exist_ok=True)
    for directory in ("lists/partial", "archives/partial"):
        (work / directory).mkdir(parents=True)
    signed = f"[signed-by={KEYRING} arch={ARCHITECTURE}]"
    sources = f"deb {signed} {MIRROR} {SUITE} main\ndeb {signed} {SECURITY_MIRROR} {SUITE}-security main\n"
    (work / "sources.list").write_text(sources)
    (work / "status").touch()
    settings = {
        "APT::Architecture": ARCHITECTURE,
        "Dir::Etc::sourcelist": str(work / "sources.list"),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": str(work / "lists"),
        "Dir::State::status": str(work / "status"),
        "Dir::Cache": str(work),
        "Acquire::Languages": "none",
        # The user _apt may not be able to read these directories.
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-q", *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]
    run([*apt, "update"])
    run([*apt, "download", *missing], cwd=place)


def unpack(place: Path, root: Path) -> list[Package]:
    """Unpack the packages of a directory into a root, and return what they are. Raises BuildError."""
    packages = []
    for name in PACKAGES:
        found = sorted(place.glob(f"{name}_*.deb"))
        if len(found) != 1:
            raise BuildError(f"{place}: {len(found)} packages {name}; one is needed: remove the others")
        run(["dpkg-deb", "-x", str(found[0]), str(root)])
        packages.append(read_package(found[0]))
    return packages


def read_package(deb: Path) -> Package:
    """Return what a package is. Raises BuildError."""
    lines = run(["dpkg-deb", "-f", str(deb), "Package", "Version", "Source"]).splitlines()
    fields = dict(line.split(": ", 1) for line in lines)
    name, version = fields["Package"], fields["Version"]
    # The field has a version of its own where that is another one.
    source, _, other = fields.get("Source", name).partition(" ")
    return Package(name, version, f"{source} {other.strip('()') or version}")
