# SPDX-License-Identifier: Apache-2.0
"""The only door through which the hooks read the system.

Every reading function takes a `Root`: "/" on the live system, a made tree in a test, and whatever stands in for
them when a run is recorded or replayed. Plain system calls: most files here are sysfs attributes of a few bytes.
"""

from __future__ import annotations

import os
from errno import EBUSY, EFBIG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# A sysfs attribute is a page at most; config.json of a tenant may be anything.
DEFAULT_LIMIT = 16 << 20
# include/uapi/linux/sockios.h
SIOCGIFADDR = 0x8915


class Root:
    """A directory tree read as if it were the system's root. Paths are absolute, as on the live system.

    top: the directory that stands for "/".
    """

    def __init__(self, top: str = "/") -> None:
        self.top = top.rstrip("/")

    def host_path(self, path: str) -> str:
        """Return where the path really lies on this machine."""
        return self.top + path if path != "/" else self.top or "/"

    def read_bytes(self, path: str, limit: int = DEFAULT_LIMIT) -> bytes:
        """Return the file's content. Raises OSError; EFBIG when there is more than `limit` bytes."""
        fd = os.open(self.host_path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return b"".join(read_chunks(fd, limit, path))
        finally:
            os.close(fd)

    def read_text(self, path: str) -> str:
        """Return the file's content without the white space around it. Raises OSError."""
        return self.read_bytes(path).decode("utf-8", "surrogateescape").strip()

    def read_text_or(self, path: str, default: str) -> str:
        """Return the file's content, or the default where the file can't be read."""
        try:
            return self.read_text(path)
        except OSError:
            return default

    def list_names(self, path: str) -> list[str]:
        """Return the names in a directory, sorted; empty where there is no such directory. Raises other OSErrors."""
        try:
            return sorted(os.listdir(self.host_path(path)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read_link(self, path: str) -> str:
        """Return the target of a symbolic link, or "" where there is none."""
        try:
            return os.readlink(self.host_path(path))
        except OSError:
            return ""

    def link_name(self, path: str) -> str:
        """Return the last component of a link's target ("" without a link): sysfs says driver and group so."""
        return self.read_link(path).rpartition("/")[2]

    def stat(self, path: str) -> os.stat_result:
        """Return the stat of a path, links followed. Raises OSError."""
        return os.stat(self.host_path(path))

    def exists(self, path: str) -> bool:
        """Tell whether there is anything at this path, links followed."""
        try:
            self.stat(path)
        except OSError:
            return False
        return True

    def real_path(self, path: str) -> str:
        """Return the path with every link resolved, still as seen from this root."""
        real = os.path.realpath(self.host_path(path))
        return real[len(self.top) :] if self.top and real.startswith(self.top + "/") else real

    def read_ipv4(self, interface: str) -> str:
        """Return the first IPv4 address of a network interface, "" without one. A made tree has none.

        Source: netdevice(7), SIOCGIFADDR. The files in /proc/net tell addresses without their interfaces.
        """
        if self.top:
            return ""
        # The socket module proper imports enum and selectors.
        import _socket
        import fcntl

        sock = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        try:
            # struct ifreq: 16 bytes of name, then a sockaddr_in: family, port, address.
            answer = fcntl.ioctl(sock.fileno(), SIOCGIFADDR, os.fsencode(interface)[:15].ljust(40, b"\0"))
        except OSError:
            return ""
        finally:
            sock.close()
        return _socket.inet_ntoa(answer[20:24])

    def is_held(self, path: str) -> bool:
        """Tell whether a block device's node can't be opened because it is in exclusive use. Nothing else is asked.

        Source: open(2), O_EXCL without O_CREAT: EBUSY when the device is mounted or otherwise used by the system.
        """
        try:
            os.close(os.open(self.host_path(path), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            return error.errno == EBUSY
        return False


def read_chunks(fd: int, limit: int, name: str) -> Iterator[bytes]:
    """Yield what a descriptor holds, to its end. Raises OSError; EFBIG past `limit` bytes."""
    total = 0
    while True:
        chunk = os.read(fd, 65536)
        if not chunk:
            return
        total += len(chunk)
        if total > limit:
            raise OSError(EFBIG, f"more than {limit} bytes", name)
        yield chunk
