# SPDX-License-Identifier: Apache-2.0
"""Read an initrd: its archives one after another, their names, and what this tool has appended.

What is appended: zeros to a multiple of four, a small archive that is not compressed and has RECORD only, and the
add-on's archive. The kernel unpacks one archive after another, so the original bytes stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import stat

from oci_hooks.findings import InputError
from oci_hooks.frozen import Frozen
from oci_hooks.kata_image.compression import CHUNK, CPIO, MAGIC_BYTES, Part, find_format, make_damage, read_range
from oci_hooks.kata_image.cpio import CONTENT_LIMIT, CpioError, Member, Source, read_members, write_archive
from oci_hooks.kata_image.model import HOME, RECORD, RECORD_VERSION, SETTINGS, Node, Record, list_parents
from oci_hooks.kata_image.trees import ListedTree, name_kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, BinaryIO

    from oci_hooks.kata_image.model import Addon, AddonFile

# How RECORD begins in the file, where it is not compressed: `remove` looks for it from the end.
MARK = b'{"made_by": "vfio-kata-image", '
# Names in an archive, in all; Debian with a desktop has 400,000.
NAMES_LIMIT = 4_000_000
DIRECTORY, FILE = stat.S_IFDIR | 0o755, stat.S_IFREG


class Archive(Frozen):
    """One archive of an initrd. start, end: offsets; format: of its compression; names: how many it has."""

    start: int
    end: int
    format: str
    names: int


class Initrd(Frozen):
    """What was read of an initrd. size: in bytes; record: what this tool has appended, None if nothing."""

    path: str
    size: int
    archives: tuple[Archive, ...]
    tree: ListedTree
    record: Record | None


def read_initrd(file: BinaryIO) -> Initrd:
    """Return an initrd's archives and names. Raises InputError [image-damaged] or [image-unknown]."""
    size = file.seek(0, 2)
    tree = ListedTree()
    archives: list[Archive] = []
    start = skip_zeros(file, 0, size)
    while start < size:
        archive = read_archive(file, start, size, tree)
        archives.append(archive)
        start = skip_zeros(file, archive.end, size)
    record = parse_record(tree.read(RECORD))
    return Initrd(file.name, size, tuple(archives), tree, record)


def read_archive(file: BinaryIO, start: int, size: int, tree: ListedTree) -> Archive:
    """Read the archive at an offset into the tree and return where it is."""
    file.seek(start)
    format_name = find_format(file.read(MAGIC_BYTES))
    if not format_name:
        raise make_damage(file.name, f"byte {start} begins no archive that a kernel unpacks")
    if format_name == CPIO and start % 4:
        raise make_damage(file.name, f"the cpio archive at byte {start} is not at a multiple of 4, as the kernel asks")
    part = Part(file, start, format_name)
    source = Source(read_range(file, start, size) if format_name == CPIO else part.read_chunks())
    before = len(tree.nodes)
    try:
        while True:
            for member in read_members(source, is_kept):
                take_member(member, tree)
                if len(tree.nodes) > NAMES_LIMIT:
                    raise make_damage(file.name, f"has more than {NAMES_LIMIT} names")
            if format_name == CPIO:
                return Archive(start, start + source.position, CPIO, len(tree.nodes) - before)
            # One compressed part may hold several archives.
            source.skip_zeros()
            if not source.peek():
                return Archive(start, part.end, format_name, len(tree.nodes) - before)
    except CpioError as error:
        raise make_damage(file.name, f"the archive at byte {start}, unpacked: {error}") from None


def take_member(member: Member, tree: ListedTree) -> None:
    """Note one entry."""
    kind = name_kind(member.mode)
    target = member.data.decode("utf-8", "surrogateescape") if kind == "link" else ""
    node = Node(kind, stat.S_IMODE(member.mode), member.uid, member.gid, member.size, target)
    tree.put(member.name, node, member.data if kind == "file" else b"")


def is_kept(name: str) -> bool:
    """Return whether the content of a file is needed: the add-on's, its settings, and the lists of kernel modules."""
    path = name.lstrip("./")
    return path.startswith((f"{HOME}/", SETTINGS)) or path.endswith(("/modules.dep", "/modules.builtin"))


def skip_zeros(file: BinaryIO, start: int, size: int) -> int:
    """Return the offset of the first byte that is not zero."""
    while start < size:
        file.seek(start)
        data = file.read(CHUNK)
        following = data.lstrip(b"\0")
        start += len(data) - len(following)
        if following or not data:
            break
    return start


# What this tool appends -----------------------------------------------------------------------------------------------


def make_appendix(initrd: Initrd, addon: Addon, extra: tuple[AddonFile, ...], record: Record, packed: bytes) -> bytes:
    """Return the bytes to append. packed: the archive of `make_archive`, compressed; record: with its digest."""
    note = encode_record(record)
    missing = [path for path in list_parents((RECORD,)) if initrd.tree.look_up(path) is None]
    mtime = max((file.mtime for file in (*addon.files, *extra)), default=0)
    members = [*(Member(path, DIRECTORY, mtime) for path in missing), Member(RECORD, FILE | 0o644, mtime, note)]
    return b"\0" * (-initrd.size % 4) + write_archive(members) + packed


def make_archive(tree: ListedTree, files: tuple[AddonFile, ...]) -> bytes:
    """Return the archive with the add-on's files, and the directories above them that the guest does not have.

    Directories that are there keep owner and mode: the kernel would give them those of a second entry.
    """
    mtime = max((file.mtime for file in files), default=0)
    parents = list_parents(tuple(file.path for file in files))
    members = [Member(path, DIRECTORY, mtime) for path in parents if tree.look_up(path) is None]
    members += [Member(file.path, FILE | file.mode, file.mtime, file.data) for file in files]
    return write_archive(members)


def encode_record(record: Record) -> bytes:
    """Return a record as the line that is kept in the guest."""
    text = json.dumps(record.as_document()).encode() + b"\n"
    assert text.startswith(MARK)
    return text


def parse_record(text: bytes) -> Record | None:
    """Return the record in a text, None if it is none of ours."""
    try:
        document: Any = json.loads(text.split(b"\n", 1)[0])
    except ValueError:
        return None
    if not isinstance(document, dict) or document.get("version") != RECORD_VERSION:
        return None
    values: Any = {name: document.get(name) for name in Record.field_names()}
    words, numbers = ("tool", "addon", "manifest", "sha256", "archive_sha256"), ("size", "archive_size")
    right = all(isinstance(values[name], str) for name in words) and isinstance(values["settings"], bool)
    right = right and all(type(values[name]) is int and values[name] >= 0 for name in numbers)
    return Record(**values) if right else None


def find_appendix(file: BinaryIO) -> Record:
    """Return the record of what was appended last. Raises InputError [not-added] or [image-changed].

    It is genuine only if the bytes before it have its digest: the caller compares them while copying.
    """
    size = file.seek(0, 2)
    place = find_last(file, size, MARK)
    if place < 0:
        hint = "nothing is to be removed, or it was added in another way"
        raise InputError("not-added", file.name, "has no add-on that this tool has appended", hint)
    file.seek(place)
    record = parse_record(file.read(CONTENT_LIMIT if size - place > CONTENT_LIMIT else size - place))
    if record is None or record.size > place or record.archive_size > size - place:
        raise make_change(file.name, "the record of what was appended is damaged")
    digest = hashlib.sha256()
    for data in read_range(file, size - record.archive_size, size):
        digest.update(data)
    if digest.hexdigest() != record.archive_sha256:
        raise make_change(file.name, "the appended archive is not at its end as this tool has written it")
    return record


def find_last(file: BinaryIO, size: int, mark: bytes) -> int:
    """Return the offset of the last occurrence of a mark, -1 if there is none."""
    end = size
    while end > 0:
        start = max(0, end - CHUNK)
        file.seek(start)
        # So many bytes more that a mark on the border is seen.
        found = file.read(end - start + len(mark) - 1).rfind(mark)
        if found >= 0:
            return start + found
        end = start
    return -1


def make_change(path: str, problem: str) -> InputError:
    """Return the error for an image that was changed after the add-on was put in."""
    return InputError("image-changed", path, problem, "use the original file that `add` was given; it was not changed")


def check_digest(path: str, found: Iterable[bytes], record: Record) -> None:
    """Raise InputError [image-changed] unless these bytes are the original's."""
    digest = hashlib.sha256()
    for data in found:
        digest.update(data)
    if digest.hexdigest() != record.sha256:
        raise make_change(path, "without the add-on, it is not the file that `add` was given")
