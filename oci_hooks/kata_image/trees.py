# SPDX-License-Identifier: Apache-2.0
"""The files of a guest, whatever they are kept in: an initrd's list, a directory; apply/ext4.py has a third kind."""

from __future__ import annotations

import os
import stat

from oci_hooks.kata_image.model import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Tree(Protocol):
        """What can be asked of a guest's files. Paths have no leading slash."""

        def look_up(self, path: str) -> Node | None:
            """Return what has this name, None if nothing has. Links above it are followed, the last one is not."""

        def list_names(self, path: str) -> list[str]:
            """Return the names in a directory, links followed; none if there is no such directory."""

        def read(self, path: str) -> bytes:
            """Return the content of a file, b"" if it cannot be read."""


# As the kernel does (MAXSYMLINKS).
LINKS_FOLLOWED = 40
KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}


def name_kind(mode: int) -> str:
    """Return the kind of a node by its type bits."""
    return KINDS.get(stat.S_IFMT(mode), "other")


def follow_links(path: str, last: bool, read_link: Callable[[list[str]], str | None]) -> list[str] | None:
    """Return the names of a path with its links replaced, as in a root of its own; None for a circle of links.

    last: replace the last name's, too; read_link: returns the target of the link with these names, None for no link.
    """
    done: list[str] = []
    names, links = path.split("/")[::-1], 0
    while names:
        name = names.pop()
        if name in ("", "."):
            continue
        if name == "..":
            done = done[:-1]
            continue
        target = read_link([*done, name]) if names or last else None
        if target is None:
            done.append(name)
            continue
        links += 1
        if links > LINKS_FOLLOWED:
            return None
        done = [] if target.startswith("/") else done
        names += target.split("/")[::-1]
    return done


class ListedTree:
    """The nodes of an initrd, by path, with the contents of some files."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.contents: dict[str, bytes] = {}
        self.children: dict[str, set[str]] = {}

    def put(self, name: str, node: Node, data: bytes) -> None:
        """Take a node as the kernel does: links above it are followed, and a later one of a name replaces the earlier.

        data: content of a file, b"" if it is not to be kept.
        """
        path = self.follow(name, last=False)
        parent, _, last = path.rpartition("/")
        if path:
            self.nodes[path] = node
            self.children.setdefault(parent, set()).add(last)
            self.contents.pop(path, None)
        if path and data:
            self.contents[path] = data

    def follow(self, path: str, last: bool) -> str:
        """Return a path with its links replaced; the last name's too, if asked. "\0" for a circle of links."""

        def read_link(names: list[str]) -> str | None:
            node = self.nodes.get("/".join(names))
            return node.target if node is not None and node.kind == "link" else None

        found = follow_links(path, last, read_link)
        return "\0" if found is None else "/".join(found)

    def look_up(self, path: str) -> Node | None:
        """Return a node; see Tree."""
        return self.nodes.get(self.follow(path, last=False))

    def list_names(self, path: str) -> list[str]:
        """Return the names in a directory; see Tree."""
        return sorted(self.children.get(self.follow(path, last=True), []))

    def read(self, path: str) -> bytes:
        """Return a file's content; see Tree."""
        return self.contents.get(self.follow(path, last=True), b"")


class DirectoryTree:
    """The files below a directory of this machine, whose links stay inside of it."""

    def __init__(self, top: str) -> None:
        self.top = top

    def resolve(self, path: str, last: bool) -> str:
        """Return the place on this machine of a guest's path, links replaced as in the guest; "" for a circle."""

        def read_link(names: list[str]) -> str | None:
            place = "/".join([self.top, *names])
            return os.readlink(place) if os.path.islink(place) else None

        found = follow_links(path, last, read_link)
        return "" if found is None else "/".join([self.top, *found])

    def look_up(self, path: str) -> Node | None:
        """Return a node; see Tree."""
        place = self.resolve(path, last=False)
        try:
            found = os.lstat(place)
        except OSError:
            return None
        target = os.readlink(place) if stat.S_ISLNK(found.st_mode) else ""
        mode = stat.S_IMODE(found.st_mode)
        return Node(name_kind(found.st_mode), mode, found.st_uid, found.st_gid, found.st_size, target)

    def list_names(self, path: str) -> list[str]:
        """Return the names in a directory; see Tree."""
        try:
            return sorted(os.listdir(self.resolve(path, last=True)))
        except OSError:
            return []

    def read(self, path: str) -> bytes:
        """Return a file's content; see Tree."""
        try:
            place = self.resolve(path, last=True)
            if not stat.S_ISREG(os.stat(place).st_mode):
                return b""
            with open(place, "rb") as file:
                return file.read()
        except OSError:
            return b""
