# SPDX-License-Identifier: Apache-2.0
"""cpio archives as the kernel unpacks them into its root file system: format "newc".

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst and init/initramfs.c.
"""

from __future__ import annotations

import stat

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Without and with a checksum of the data; the headers are the same.
MAGICS = (b"070701", b"070702")
HEADER = 110
TRAILER = "TRAILER!!!"
# PATH_MAX of the kernel, which skips what is longer.
NAME_LIMIT = 4096
# What one member's content may be to be kept in memory.
CONTENT_LIMIT = 16 << 20
# Archives are padded to this, as cpio does: a reader of blocks gets whole ones.
BLOCK = 512


class CpioError(Exception):
    """The bytes are not a cpio archive, or it ends too early. The text names the place."""


class Member(Frozen):
    """One entry. mode: with the type's bits; mtime: seconds since 1970; data: of a file, target of a link."""

    name: str
    mode: int
    mtime: int = 0
    data: bytes = b""
    uid: int = 0
    gid: int = 0
    size: int = 0
    nlink: int = 1


class Source:
    """Bytes that come in chunks, read in order."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = iter(chunks)
        self.rest = b""
        self.position = 0

    def peek(self) -> bytes:
        """Return what is there without another chunk, at least one byte; b"" at the end."""
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return b""
            self.rest = chunk
        return self.rest

    def read(self, count: int) -> bytes:
        """Return exactly this many bytes. Raises CpioError if there are fewer."""
        parts, missing = [], count
        while missing:
            part = self.peek()[:missing]
            if not part:
                raise CpioError(f"ends after {self.position} bytes, in the middle of an entry")
            self.rest = self.rest[len(part) :]
            self.position += len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def skip(self, count: int) -> None:
        """Pass over this many bytes. Raises CpioError if there are fewer."""
        while count:
            count -= len(self.read(min(count, len(self.peek()) or 1)))

    def skip_zeros(self) -> None:
        """Pass over zero bytes, which the kernel takes for padding between archives."""
        while part := self.peek():
            following = part.lstrip(b"\0")
            self.position += len(part) - len(following)
            self.rest = following
            if following:
                return


def read_members(source: Source, is_wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Yield the entries of one archive, up to its trailer. Raises CpioError.

    is_wanted: whether a file's content is needed; that of links always is.
    """
    while True:
        header = source.read(HEADER)
        if header[:6] not in MAGICS:
            raise CpioError(f"byte {source.position - HEADER}: no cpio header (newc)")
        try:
            fields = [int(header[place : place + 8], 16) for place in range(6, HEADER, 8)]
        except ValueError:
            raise CpioError(f"byte {source.position - HEADER}: a header with a field that is not hexadecimal") from None
        _, mode, uid, gid, nlink, mtime, size, *_, name_size, _ = fields
        if not 0 < name_size <= NAME_LIMIT:
            raise CpioError(f"byte {source.position - HEADER}: a name of {name_size} bytes")
        name = source.read(name_size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        source.skip(-(HEADER + name_size) % 4)
        if name == TRAILER:
            return
        kept = size <= CONTENT_LIMIT and (stat.S_ISLNK(mode) or (stat.S_ISREG(mode) and is_wanted(name)))
        data = source.read(size) if kept else b""
        source.skip(0 if kept else size)
        source.skip(-size % 4)
        yield Member(name, mode, mtime, data, uid, gid, size, nlink)


def write_archive(members: Iterable[Member]) -> bytes:
    """Return the members as one archive with its trailer, padded with zeros to whole blocks."""
    # Inode numbers only tell hard links from each other, and there are none.
    parts = [pack_member(member, number) for number, member in enumerate(members, 1)]
    archive = b"".join([*parts, pack_member(Member(TRAILER, 0), 0)])
    return archive + b"\0" * (-len(archive) % BLOCK)


def pack_member(member: Member, number: int) -> bytes:
    """Return one entry: header, name and data, each padded to four bytes. number: of its inode."""
    name = member.name.encode("utf-8", "surrogateescape") + b"\0"
    links = 2 if stat.S_ISDIR(member.mode) else 1
    numbers = (number, member.mode, member.uid, member.gid, links, member.mtime & 0xFFFFFFFF, len(member.data))
    fields = (*numbers, 0, 0, 0, 0, len(name), 0)
    head = MAGICS[0] + b"".join(b"%08X" % field for field in fields) + name
    return b"".join([head, b"\0" * (-len(head) % 4), member.data, b"\0" * (-len(member.data) % 4)])
