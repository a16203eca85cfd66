# SPDX-License-Identifier: Apache-2.0
"""The new file: made under another name in a directory of its own beside it, and renamed when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile

from oci_hooks.findings import InputError, Refusal
from oci_hooks.kata_image.compression import make_damage
from oci_hooks.kata_image.disk import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

ZEROS = bytes(MIB)
# Name of the new file in the workspace.
DRAFT = "new"


@contextlib.contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Open an image for reading. Raises InputError [image-unreadable] unless it is a regular file, or a link to one."""
    hint = "name a regular file"
    try:
        # Opening a FIFO would wait for a writer, and a device might act.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise InputError("image-unreadable", path, error.strerror or str(error), hint) from None
    found = os.fstat(fd)
    problem = "is empty" if stat.S_ISREG(found.st_mode) and not found.st_size else ""
    if not stat.S_ISREG(found.st_mode):
        problem = f"is {'a directory' if stat.S_ISDIR(found.st_mode) else 'a device, a FIFO or a socket'}"
    if problem:
        os.close(fd)
        raise InputError("image-unreadable", path, problem, hint)
    with open(fd, "rb") as file:
        yield NamedFile(file, path)  # type: ignore[misc]


class NamedFile:
    """An open file that has the name a user gave it, for messages."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self.read = file.read
        self.seek = file.seek
        self.tell = file.tell
        self.fileno = file.fileno


def check_output(path: str, source: BinaryIO, force: bool) -> None:
    """Raise Refusal [output] for a name that is not to be written to. source: the image that is read."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Refusal("output", path, error.strerror or str(error), "name another file") from None
    if os.path.samestat(found, os.fstat(source.fileno())):
        raise Refusal("output", path, "is the image itself, which is never changed", "name another file")
    if not stat.S_ISREG(found.st_mode):
        raise Refusal("output", path, "is a link, a device or a directory", "name another file")
    if not force:
        raise Refusal("output", path, "exists", "name another file, or add --force to replace it")


@contextlib.contextmanager
def open_workspace(path: str) -> Iterator[str]:
    """Make a directory beside the new file, and take it away at the end. Raises Refusal [output]."""
    directory, name = os.path.split(os.path.abspath(path))
    try:
        work = tempfile.mkdtemp(prefix=f".{name[:100]}.", dir=directory)
    except OSError as error:
        hint = "its directory must exist and be writable"
        raise Refusal("output", path, f"cannot be written: {error.strerror or error}", hint) from None
    try:
        yield work
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
        raise Refusal("output", path, problem, "check free space (df) and permissions there") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(draft: str, path: str, mode: int, force: bool) -> None:
    """Give a finished file its name: all of it or nothing. mode: permission bits. Raises OSError, Refusal."""
    with open(draft, "rb") as file:
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    if force:
        os.rename(draft, path)
    else:
        try:
            # Not a rename: somebody may have made a file of that name by now.
            os.link(draft, path)
        except FileExistsError:
            raise Refusal("output", path, "exists by now", "name another file, or add --force") from None
        except PermissionError:
            # A file system without hard links.
            os.rename(draft, path)
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_range(source: BinaryIO, start: int, size: int, target: str) -> str:
    """Copy a part of a file to a new file, zeros as holes; return the SHA-256. Raises InputError, OSError."""
    digest = hashlib.sha256()
    with open(target, "xb") as file:
        source.seek(start)
        remaining = size
        while remaining:
            data = source.read(min(MIB, remaining))
            if not data:
                raise make_damage(source.name, "became shorter while it was read")
            digest.update(data)
            if data == ZEROS[: len(data)]:
                file.seek(len(data), os.SEEK_CUR)
            else:
                file.write(data)
            remaining -= len(data)
        file.truncate(size)
    return digest.hexdigest()


def write_back(source: str, target: BinaryIO, start: int) -> None:
    """Copy a file into another at an offset, only what is different there: holes stay holes. Raises OSError."""
    with open(source, "rb") as file:
        place = start
        while data := file.read(MIB):
            target.seek(place)
            if target.read(len(data)).ljust(len(data), b"\0") != data:
                target.seek(place)
                target.write(data)
            place += len(data)


def append(target: str, chunks: Iterable[bytes]) -> None:
    """Append bytes to a file. Raises OSError."""
    with open(target, "ab") as file:
        for chunk in chunks:
            file.write(chunk)


def digest_file(path: str) -> str:
    """Return a file's SHA-256. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(MIB):
            digest.update(data)
    return digest.hexdigest()
