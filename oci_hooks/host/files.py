# SPDX-License-Identifier: Apache-2.0
"""Write the file that --output or --metrics names, the only file that vfio-host-check writes."""

from __future__ import annotations

import os
import stat
import tempfile

from oci_hooks.findings import Refusal
from oci_hooks.system import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci_hooks.system import Root

MODE = 0o644
LIMIT = 16 << 20


def put_file(
    root: Root, path: str, text: str, is_own: Callable[[str], bool], force: bool = False, renew: bool = False
) -> bool:
    """Ensure a file with this text and mode 0644; return whether it was written. A correct file is left alone.

    path: absolute; is_own: returns whether a file's text was made by this program; force: also replace other files;
    renew: always write, for files whose modification time matters. Raises Refusal [output], with nothing changed.
    Readers see the old file or the new one, never a part.
    """
    try:
        found = find_mode(root, path)
        if found is not None and not stat.S_ISREG(found):
            raise Refusal("output", path, "is not a regular file", "name another file")
        if found is not None:
            old = root.read_bytes(path, LIMIT).decode("utf-8", "surrogateescape")
            if not renew and old == text and stat.S_IMODE(found) == MODE:
                return False
            if not (force or is_own(old)):
                hint = "name another file, or remove this one; --cdi has --force"
                raise Refusal("output", path, "was made by another program and is not replaced", hint)
        replace_file(root, path, text.encode())
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
        hint = f"run it as root; {os.path.dirname(os.path.dirname(path)) or '/'} must exist and be writable"
        raise Refusal("output", path, problem, hint) from None
    return True


def find_mode(root: Root, path: str) -> int | None:
    """Return type and mode of a path without following links; None if it does not exist. Raises OSError."""
    if root.read_link(path):
        return stat.S_IFLNK
    try:
        return root.stat(path).st_mode
    except FileNotFoundError:
        return None


@step("replace-file")
def replace_file(root: Root, path: str, data: bytes) -> None:
    """Write a file under a temporary name and rename it; its directory is created. Raises OSError."""
    place = root.host_path(path)
    directory, _, name = place.rpartition("/")
    if not os.path.isdir(directory):
        os.mkdir(directory)
        # Independent of the umask, here and below: engines without root privileges read the file too.
        os.chmod(directory, 0o755)  # noqa: S103 - as /etc/cdi is
    # A name that nobody has: a killed run may have left a draft. CDI and node_exporter read other endings only.
    fd, draft = tempfile.mkstemp(prefix=f".{name}.", suffix=".new", dir=directory)
    try:
        try:
            write_all(fd, data)
            os.fchmod(fd, MODE)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(draft, place)
    except BaseException:
        os.unlink(draft)
        raise


def write_all(fd: int, data: bytes) -> None:
    """Write all of the data. Raises OSError."""
    while data:
        data = data[os.write(fd, data) :]
