# SPDX-License-Identifier: Apache-2.0
"""Build the guest add-on: the guest hook with a Python of its own, for the guest image of Kata Containers.

It needs nothing of the image: no Python, no C library, no shell. The archive is to be unpacked at the image's root.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from guest_addon.archive import list_files, set_times, write_archive, write_manifest
from guest_addon.debs import ARCHITECTURE, BuildError, download, unpack
from guest_addon.tree import REPOSITORY, lay_out

PROGRAM = "packaging/guest-addon"
NAME = "oci-vfio-hooks-guest-addon"
# Programs, and the packages of Debian that have them.
TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "patchelf": "patchelf"}
EXIT_FAILED, EXIT_MISSING = 1, 3


def main(argv: list[str]) -> int:
    """Build what the arguments ask for and return the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    dist = REPOSITORY / "dist"
    parser.add_argument("--output", type=Path, default=dist, metavar="DIR", help="where to write the archive (dist/)")
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="also leave the files in this directory, unpacked"
    )
    help_debs = "keep Debian's packages here, and use those that are here already (else the newest are downloaded)"
    parser.add_argument("--debs", type=Path, metavar="DIR", help=help_debs)
    arguments = parser.parse_args(argv)
    missing = [package for program, package in TOOLS.items() if not shutil.which(program)]
    if missing:
        advice = f"apt-get install --no-install-recommends {' '.join(missing)}"
        print(f"{PROGRAM}: missing Debian packages; install them as root: {advice}", file=sys.stderr)
        return EXIT_MISSING
    try:
        build(arguments.output, arguments.directory, arguments.debs)
    except BuildError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def build(output: Path, directory: Path | None, debs: Path | None) -> None:
    """Build the add-on. Raises BuildError."""
    if directory and directory.exists() and any(directory.iterdir()):
        raise BuildError(f"{directory}: is not empty; remove it, or name another one")
    epoch = find_epoch()
    with tempfile.TemporaryDirectory(prefix="guest-addon-") as scratch:
        work, root = Path(scratch), Path(scratch) / "root"
        debs = debs.resolve() if debs else work / "debs"
        download(debs, work / "apt")
        lay_out(work / "debian", unpack(debs, work / "debian"), root)
        write_manifest(root)
        set_times(root, epoch)
        output.mkdir(parents=True, exist_ok=True)
        archive = output / f"{NAME}_{read_version()}_{ARCHITECTURE}.tar.xz"
        write_archive(root, archive, epoch)
        sizes = [path.stat().st_size for path in list_files(root)]
        packed = archive.stat().st_size
        print(f"{PROGRAM}: {sum(sizes) / 1e6:.1f} MB in {len(sizes)} files, packed {packed / 1e6:.1f} MB")
        print(f"{PROGRAM}: {archive}")
        if directory:
            shutil.copytree(root, directory, dirs_exist_ok=True)
            print(f"{PROGRAM}: {directory}")


def read_version() -> str:
    """Return the version of the hooks."""
    found = re.search(r'^__version__ = "(.*)"$', (REPOSITORY / "oci_hooks/__init__.py").read_text(), re.MULTILINE)
    assert found
    return found[1]


def find_epoch() -> int:
    """Return the time, in seconds, that every file gets: SOURCE_DATE_EPOCH, else the last commit's."""
    if os.environ.get("SOURCE_DATE_EPOCH"):
        return int(os.environ["SOURCE_DATE_EPOCH"])
    # A clone's owner may be another user than the one who builds.
    command = ["git", "-c", f"safe.directory={REPOSITORY}", "-C", str(REPOSITORY), "log", "-1", "--format=%ct"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return int(done.stdout) if done.returncode == 0 else 0
