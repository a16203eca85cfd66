# SPDX-License-Identifier: Apache-2.0
"""Read the guest add-on: an archive (tar, compressed as Python can read it) or a directory with the same content.

Nothing is unpacked to disk. An archive is not trusted: names, types and sizes are checked before anything of it goes
into an image, and every file below HOME must be in its manifest with its digest.
"""

from __future__ import annotations

import glob
import hashlib
import lzma
import os
import re
import stat
import tarfile
import zlib

from oci_hooks.findings import InputError
from oci_hooks.kata_image.model import HOME, HOOK_FILES, MANIFEST, PLACES, RECORD, Addon, AddonFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import NoReturn

# Where a package puts it, and where a build in a checkout does.
USUAL = "/usr/share/oci-vfio-hooks"
ARCHIVES = "oci-vfio-hooks-guest-addon_*.tar*"
# Several times what it has. In bytes, all files together; names.
SIZE_LIMIT = 256 << 20
NAMES_LIMIT = 20_000
# Names that need no quoting in any of the programs that read them.
NAME = re.compile(r"[A-Za-z0-9_+@=,.-]+(/[A-Za-z0-9_+@=,.-]+)*")
DIGEST_LINE = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(.+)")
VERSION_NAME = re.compile(r"guest-addon_([0-9][A-Za-z0-9.+~-]*?)_[a-z0-9]+(\.tar.*)?$")


def read_addon(path: str) -> Addon:
    """Return the add-on in an archive or a directory. Raises InputError [addon-missing] or [addon-damaged]."""
    try:
        if os.path.isdir(path):
            files = tuple(check_files(path, read_directory(path)))
        else:
            with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:*") as archive:
                files = tuple(check_files(path, read_archive(path, archive)))
    except OSError as error:
        hint = "name the add-on by --addon; packaging/guest-addon builds it"
        raise InputError("addon-missing", path, error.strerror or str(error), hint) from None
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError, ArithmeticError) as error:
        refuse(path, f"cannot be read: {error}")
    by_path = {file.path: file for file in files}
    if len(by_path) != len(files):
        refuse(path, "has one name twice")
    check_manifest(path, by_path)
    manifest = hashlib.sha256(by_path[MANIFEST].data).hexdigest()
    return Addon(tuple(sorted(files, key=lambda file: file.path)), find_version(path), manifest)


def find_usual(checkout: str) -> str:
    """Return the newest add-on where a package or a build has put one. checkout: directory of the sources.

    Raises InputError [addon-missing].
    """
    for directory in (USUAL, f"{checkout}/dist"):
        found = [path for path in glob.glob(f"{glob.escape(directory)}/{ARCHIVES}") if not path.endswith(".sha256")]
        if found:
            return max(found, key=os.path.getmtime)
    hint = "name it by --addon; packaging/guest-addon builds it"
    raise InputError("addon-missing", f"{USUAL}/{ARCHIVES}", "there is no add-on", hint)


def refuse(path: str, problem: str) -> NoReturn:
    """Raise InputError [addon-damaged]."""
    raise InputError("addon-damaged", path, problem, "nothing was written; fetch or build the add-on anew")


# Its files ------------------------------------------------------------------------------------------------------------


def read_archive(path: str, archive: tarfile.TarFile) -> Iterator[AddonFile]:
    """Yield the regular files of a tar archive. Raises InputError for any other member, and tarfile's errors."""
    total = 0
    for number, member in enumerate(archive):
        if number > NAMES_LIMIT:
            refuse(path, f"has more than {NAMES_LIMIT} names")
        name = check_name(path, member.name)
        if member.isdir():
            continue
        if not member.isreg():
            refuse(path, f"{name}: is a link, a device or a FIFO; only files and directories may be in it")
        total += member.size
        if total > SIZE_LIMIT:
            refuse(path, f"has more than {SIZE_LIMIT} bytes")
        stream = archive.extractfile(member)
        data = stream.read() if stream else b""
        if len(data) != member.size:
            refuse(path, f"{name}: is cut short")
        yield AddonFile(name, member.mode, int(member.mtime), data)
    # What follows the last member is padding; a compressed archive that was cut there is noticed at its end only.
    while archive.fileobj is not None and (rest := archive.fileobj.read(1 << 20)):
        total += len(rest)
        if total > SIZE_LIMIT:
            refuse(path, f"has more than {SIZE_LIMIT} bytes")


def read_directory(path: str) -> Iterator[AddonFile]:
    """Yield the regular files below a directory. Raises InputError for any other kind of node, and OSError."""
    total = number = 0
    # Not followed: a link is refused below.
    for top, directories, names in os.walk(path, followlinks=False, onerror=raise_error):
        for name in (*directories, *names):
            number += 1
            place = f"{top}/{name}"
            found = os.lstat(place)
            inside = check_name(path, place[len(path) :].lstrip("/"))
            if stat.S_ISDIR(found.st_mode):
                continue
            if not stat.S_ISREG(found.st_mode):
                refuse(path, f"{inside}: is a link, a device or a FIFO; only files and directories may be in it")
            total += found.st_size
            if total > SIZE_LIMIT or number > NAMES_LIMIT:
                refuse(path, f"has more than {SIZE_LIMIT} bytes or {NAMES_LIMIT} names")
            with open(place, "rb") as file:
                yield AddonFile(inside, stat.S_IMODE(found.st_mode), int(found.st_mtime), file.read())


def raise_error(error: OSError) -> None:
    """Pass on what os.walk would leave out."""
    raise error


def check_name(path: str, name: str) -> str:
    """Return a member's name without "./". Raises InputError for one that could lead elsewhere."""
    inside = name[2:] if name.startswith("./") else name
    inside = inside.rstrip("/")
    if inside in ("", "."):
        return "."
    if not NAME.fullmatch(inside) or {".", ".."} & set(inside.split("/")):
        refuse(path, f"{name!r}: is not a plain relative path")
    return inside


def check_files(path: str, files: Iterable[AddonFile]) -> Iterator[AddonFile]:
    """Yield the files with the permissions they get. Raises InputError for one in another place than PLACES."""
    for file in files:
        if not file.path.startswith(PLACES):
            refuse(path, f"{file.path}: is outside of {', '.join(PLACES)}")
        if file.path == RECORD:
            refuse(path, f"{file.path}: is the name of this tool's own record")
        if file.mode & (stat.S_ISUID | stat.S_ISGID):
            refuse(path, f"{file.path}: is set-user-ID or set-group-ID")
        # Root's, and nobody else's to change.
        yield file.replace(mode=0o755 if file.mode & 0o100 else 0o644, mtime=min(max(file.mtime, 0), 0x7FFFFFFF))


# Its manifest ---------------------------------------------------------------------------------------------------------


def check_manifest(path: str, files: dict[str, AddonFile]) -> None:
    """Raise InputError unless the manifest has each file below HOME, and each of its lines is right.

    The manifest is what sha256sum(1) prints; names are relative to the add-on's root or to HOME.
    """
    missing = [name for name in (MANIFEST, *HOOK_FILES) if name not in files]
    if missing:
        refuse(path, f"lacks {missing[0]}")
    listed = set()
    for line in files[MANIFEST].data.decode("utf-8", "replace").splitlines():
        found = DIGEST_LINE.fullmatch(line)
        if not found:
            refuse(path, f"{MANIFEST}: {line[:80]!r} is not a line of sha256sum")
        name = next((each for each in (found[2], f"{HOME}/{found[2]}") if each in files), "")
        if not name:
            refuse(path, f"lacks {found[2]}, which its manifest has")
        if hashlib.sha256(files[name].data).hexdigest() != found[1]:
            refuse(path, f"{name}: is not the file that the manifest has")
        listed.add(name)
    others = [name for name in files if name.startswith(f"{HOME}/") and name != MANIFEST and name not in listed]
    if others:
        refuse(path, f"{others[0]}: is not in the manifest")


def find_version(path: str) -> str:
    """Return the version in an archive's name, "" if it has none: the add-on itself names none."""
    found = VERSION_NAME.search(os.path.basename(path.rstrip("/")))
    return found[1] if found else ""
