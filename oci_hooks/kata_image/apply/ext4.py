# SPDX-License-Identifier: Apache-2.0
"""Read and write an ext4 file system by e2fsprogs' own programs, without mounting it and without root.

Source: debugfs(8), resize2fs(8), e2fsck(8).
"""

from __future__ import annotations

import os
import re

from oci_hooks.findings import InputError, Refusal, StepError
from oci_hooks.kata_image.addon import NAME
from oci_hooks.kata_image.ext4 import is_enough, measure_need, plan_growth, read_superblock
from oci_hooks.kata_image.model import Node
from oci_hooks.kata_image.tools import run_tool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from oci_hooks.kata_image.model import AddonFile

ABOUT = re.compile(r"Type: (\S+(?: \S+)?) +Mode: +(\d+).*?User: +(\d+) +Group: +(\d+).*?Size: (\d+)", re.DOTALL)
LINK = re.compile(r'^Fast link dest: "(.*)"$', re.MULTILINE)
KINDS = {"regular": "file", "directory": "directory", "symlink": "link"}
# resize2fs may want more for a group's tables than was planned; each further try adds as much.
GROWTH_TRIES = 6
GROWTH_BLOCKS = 4096
# What the new nodes have in addition to their content.
TIMES = ("atime", "ctime", "mtime", "crtime")


class Ext4Tree:
    """The files of a file system in an open image. start: its offset; see trees.Tree."""

    def __init__(self, source: BinaryIO, start: int) -> None:
        # By its descriptor: a question mark in a name would begin debugfs's options.
        self.fd = source.fileno()
        self.device = f"/proc/self/fd/{self.fd}?offset={start}"

    def ask(self, request: str, path: str) -> bytes:
        """Return what debugfs answers, b"" for a path that needs quoting: it is none that is looked for."""
        if not NAME.fullmatch(path):
            return b""
        return run_tool("debugfs", "-R", f"{request} /{path}", self.device, descriptors=(self.fd,)).output

    def look_up(self, path: str) -> Node | None:
        """Return a node; see trees.Tree."""
        return parse_stat(self.ask("stat", path).decode("utf-8", "replace"))

    def list_names(self, path: str) -> list[str]:
        """Return the plain names in a directory; see trees.Tree."""
        lines = self.ask("ls -p", path).decode("utf-8", "replace").splitlines()
        names = [line.split("/")[5] for line in lines if line.count("/") == 7]
        return sorted(name for name in names if name not in (".", "..") and NAME.fullmatch(name))

    def read(self, path: str) -> bytes:
        """Return a file's content; see trees.Tree."""
        return self.ask("cat", path)


def parse_stat(text: str) -> Node | None:
    """Return the node that debugfs's `stat` describes, None for no description."""
    found = ABOUT.search(text)
    if not found:
        return None
    link = LINK.search(text)
    mode, uid, gid, size = int(found[2], 8) & 0o7777, int(found[3]), int(found[4]), int(found[5])
    return Node(KINDS.get(found[1], "other"), mode, uid, gid, size, link[1] if link else "")


def check_filesystem(place: str, path: str) -> None:
    """Raise InputError [image-damaged] unless e2fsck finds a file system in order. path: of the image, for messages."""
    done = run_tool("e2fsck", "-f", "-n", place, codes=range(256))
    with open(place, "rb") as file:
        clean = read_superblock(file, 0).clean
    if done.code or not clean:
        lines = done.output.decode("utf-8", "replace").strip().splitlines()
        problem = (
            f"its ext4 has errors: {lines[-1] if lines else done.errors}" if done.code else "its ext4 was not unmounted"
        )
        raise InputError("image-damaged", path, problem, "repair a copy of its partition by e2fsck -f")


def make_room(place: str, path: str, files: tuple[AddonFile, ...], directories: list[str]) -> int:
    """Grow the file system in a file until the add-on fits, if it does not; return the bytes of the file.

    Raises Refusal [image-full] with what is missing, and OSError.
    """
    with open(place, "rb") as file:
        found = read_superblock(file, 0)
    need = measure_need(files, directories, found.block)
    blocks = plan_growth(found, need)
    for _ in range(GROWTH_TRIES):
        if is_enough(found, need):
            break
        os.truncate(place, max(blocks * found.block, os.stat(place).st_size))
        done = run_tool("resize2fs", "-f", place, codes=range(256))
        if done.code:
            break
        with open(place, "rb") as file:
            found = read_superblock(file, 0)
        blocks = max(blocks, found.blocks) + GROWTH_BLOCKS
    if not is_enough(found, need):
        missing = max(0, need.blocks - found.usable) * found.block
        problem = f"lacks {missing} bytes and {max(0, need.inodes - found.free_inodes)} inodes, and cannot be grown"
        raise Refusal("image-full", path, problem, "make it by osbuilder with ROOT_FREE_SPACE=32")
    return os.stat(place).st_size


def write_files(place: str, work: str, files: tuple[AddonFile, ...], directories: list[str], time: int) -> None:
    """Put files and directories into the file system in a file. time: of the change, seconds since 1970.

    Raises StepError [not-written], OSError.
    """
    script = [f"set_current_time @{time}", *(line for each in directories for line in make_directory(each, time))]
    for number, file in enumerate(files):
        # debugfs reads the content from a file: a name of ours, without anything to quote.
        with open(f"{work}/{number}", "xb") as content:
            content.write(file.data)
        directory, _, name = file.path.rpartition("/")
        script += [f"cd /{directory}/.", f"write {number} {name}", "cd /"]
        script += set_owner(file.path, 0o100000 | file.mode, file.mtime)
    done = run_tool("debugfs", "-w", "-f", "-", place, cwd=work, text="\n".join([*script, ""]))
    # The first line of its errors is its version. It goes on after an error and ends with 0.
    problems = [line for line in done.errors.splitlines() if not line.startswith("debugfs 1.")]
    for number in range(len(files)):
        os.unlink(f"{work}/{number}")
    if problems:
        raise StepError("not-written", "debugfs", problems[0], "nothing was written; check free space")


def make_directory(path: str, time: int) -> list[str]:
    """Return debugfs's lines that make a directory."""
    above, _, name = path.rpartition("/")
    # debugfs does not follow a link that is the last name of a directory's path.
    return [f"mkdir /{above}/./{name}", *set_owner(path, 0o40755, time)]


def set_owner(path: str, mode: int, time: int) -> list[str]:
    """Return debugfs's lines that give a node to root. mode: with type bits."""
    values = {"mode": f"0{mode:o}", "uid": "0", "gid": "0", **dict.fromkeys(TIMES, f"@{time}")}
    return [f"set_inode_field /{path} {name} {value}" for name, value in values.items()]


def verify_files(source: BinaryIO, start: int, work: str, files: tuple[AddonFile, ...]) -> None:
    """Read the files back from an image, by one debugfs. Raises StepError [not-written] if one is different."""
    script = [
        line for number, file in enumerate(files) for line in (f"stat /{file.path}", f"dump /{file.path} {number}")
    ]
    device = f"/proc/self/fd/{source.fileno()}?offset={start}"
    text = "\n".join([*script, ""])
    done = run_tool("debugfs", "-f", "-", device, cwd=work, text=text, descriptors=(source.fileno(),))
    # It repeats each request before the answer.
    answers = done.output.decode("utf-8", "replace").split("debugfs: stat /")[1:]
    for number, (file, answer) in enumerate(zip(files, [*answers, *([""] * len(files))])):
        node = parse_stat(answer)
        try:
            with open(f"{work}/{number}", "rb") as content:
                data = content.read()
            os.unlink(f"{work}/{number}")
        except FileNotFoundError:
            data = b""
        if node != Node("file", file.mode, 0, 0, len(file.data)) or data != file.data:
            raise StepError("not-written", f"/{file.path}", f"was read back as {node}", "report this")
