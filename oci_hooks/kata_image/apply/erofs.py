# SPDX-License-Identifier: Apache-2.0
"""Make an EROFS file system anew with more files: it is read-only, so that nothing can be added to one.

Source: mkfs.erofs(1), fsck.erofs(1), dump.erofs(1). To keep owners and device nodes needs root, or fakeroot.
"""

from __future__ import annotations

import os
import re
import stat

from oci_hooks.findings import Finding, Refusal, StepError
from oci_hooks.kata_image.decision import check_guest
from oci_hooks.kata_image.report import read_guest
from oci_hooks.kata_image.tools import run_tool
from oci_hooks.kata_image.trees import DirectoryTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.kata_image.model import AddonFile
    from oci_hooks.kata_image.report import Module

UUID = re.compile(r"UUID: +([0-9a-f-]{36})")
FEATURES = re.compile(r"Filesystem features: +(.*)")
# As osbuilder calls it: without data in inodes, which DAX cannot map.
OPTIONS = ("-Enoinline_data",)
SKIPPED = "skipped"


def extract(partition: str, place: str, preserve: bool) -> DirectoryTree:
    """Unpack a file system into a new directory. preserve: with owners and permissions, which only root can give.

    Raises Refusal [tool-failed] for a damaged one.
    """
    kept = ("--preserve", *list_attribute_options()) if preserve else ("--no-preserve",)
    done = run_tool("fsck.erofs", f"--extract={place}", *kept, partition)
    # A device node that it may not make is a warning to it, also for root in a container.
    lines = [line for line in f"{done.output.decode('utf-8', 'replace')}{done.errors}".splitlines() if SKIPPED in line]
    if preserve and lines:
        hint = "run it where device nodes may be made (CAP_MKNOD), or in fakeroot"
        raise Refusal("tool-failed", "fsck.erofs", lines[0].strip(), hint)
    return DirectoryTree(place)


def list_attribute_options() -> tuple[str, ...]:
    """Return the options that keep extended attributes; none where fsck.erofs cannot, before 1.8."""
    done = run_tool("fsck.erofs", "--help", codes=range(256))
    return ("--xattrs",) if "xattrs" in f"{done.output.decode('utf-8', 'replace')}{done.errors}" else ()


def list_warnings(path: str) -> list[Finding]:
    """Return what a user has to know of the new image. path: of the image."""
    if list_attribute_options():
        return []
    problem = "extended attributes (file capabilities, SELinux labels) of its files are lost"
    hint = "if it has any, use erofs-utils 1.8 or later, or unpack the add-on before osbuilder makes the image"
    return [Finding("warning", "attributes-lost", path, problem, hint)]


def change(partition: str, work: str, path: str, files: tuple[AddonFile, ...]) -> tuple[Module, ...]:
    """Replace the file system in a file by one with more files; return the kernel modules in the guest.

    path: of the image, for messages. Raises Refusal [needs-root], and what `check_guest` does.
    """
    if os.geteuid():
        problem = "has EROFS, which is unpacked and made anew: only root can keep the owners of its files"
        raise Refusal("needs-root", path, problem, "run it as root, or in fakeroot: fakeroot vfio-kata-image ...")
    about = run_tool("dump.erofs", "-s", partition).output.decode("utf-8", "replace")
    tree = extract(partition, f"{work}/tree", preserve=True)
    directories = check_guest(path, tree, files)
    modules = read_guest(tree).modules
    before = list_nodes(f"{work}/tree")
    write_files(tree, files, directories)
    uuid, features = UUID.search(about), FEATURES.search(about)
    packed = ("-zlz4hc",) if features and "0padding" in features[1] else ()
    kept = (f"-U{uuid[1]}",) if uuid else ()
    os.unlink(partition)
    # The time of the newest file in place of now: the same input gives the same bytes.
    newest = find_newest(f"{work}/tree")
    arguments = ("--quiet", *OPTIONS, *packed, *kept, partition, f"{work}/tree")
    run_tool("mkfs.erofs", *arguments, environment={"SOURCE_DATE_EPOCH": str(newest)})
    check_kept(partition, work, before)
    return modules


def write_files(tree: DirectoryTree, files: tuple[AddonFile, ...], directories: list[str]) -> None:
    """Write the files into the unpacked tree, as root's. Raises OSError."""
    time = max(file.mtime for file in files)
    times = {tree.resolve(each.rpartition("/")[0], last=True): 0.0 for each in directories}
    times = {place: os.stat(place).st_mtime for place in times if os.path.isdir(place)}
    for directory in directories:
        place = tree.resolve(directory, last=True)
        os.mkdir(place)
        os.chmod(place, 0o755)  # noqa: S103 - as the directories above it
        os.chown(place, 0, 0)
    for file in files:
        place = tree.resolve(file.path, last=False)
        with open(place, "xb") as content:
            content.write(file.data)
        os.chmod(place, file.mode)
        os.chown(place, 0, 0)
        os.utime(place, (file.mtime, file.mtime))
    for place in (tree.resolve(each, last=True) for each in directories):
        os.utime(place, (time, time))
    # The directories that were there keep their time, so that the same input gives the same bytes.
    for place, old in times.items():
        if place not in {tree.resolve(each, last=True) for each in directories}:
            os.utime(place, (old, old))


def list_nodes(top: str) -> dict[str, tuple[int, int, int, int]]:
    """Return type and mode, owner, group and size of each node below a directory, by path. Raises OSError."""
    nodes = {}
    for directory, directories, names in os.walk(top):
        for name in (*directories, *names):
            found = os.lstat(f"{directory}/{name}")
            size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
            nodes[f"{directory}/{name}"[len(top) :]] = (found.st_mode, found.st_uid, found.st_gid, size)
    return nodes


def find_newest(top: str) -> int:
    """Return the time of the newest node below a directory, in seconds since 1970. Raises OSError."""
    walk = ((directory, name) for directory, *lists in os.walk(top) for names in lists for name in names)
    return int(max([os.lstat(f"{directory}/{name}").st_mtime for directory, name in walk], default=0))


def check_kept(partition: str, work: str, before: dict[str, tuple[int, int, int, int]]) -> None:
    """Unpack the new file system. Raises StepError [not-written] unless all of the old one is in it."""
    extract(partition, f"{work}/again", preserve=True)
    after = list_nodes(f"{work}/again")
    lost = [path for path, node in before.items() if after.get(path) != node]
    if lost:
        raise StepError("not-written", lost[0], "is not in the new file system as it was in the old one", "report this")


def verify(partition: str, work: str, files: tuple[AddonFile, ...]) -> None:
    """Read the files back from a partition. Raises StepError [not-written] if one is not as it should be."""
    tree = extract(partition, f"{work}/checked", preserve=True)
    for file in files:
        node = tree.look_up(file.path)
        right = node is not None and (node.kind, node.mode, node.uid, node.gid) == ("file", file.mode, 0, 0)
        if not right or tree.read(file.path) != file.data:
            raise StepError("not-written", f"/{file.path}", f"was read back as {node}", "report this")
