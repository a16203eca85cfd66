# SPDX-License-Identifier: Apache-2.0
"""Access the container's /dev without trusting any name in it.

The tree below the root file system comes from the image. The hook descends it component by component with descriptors
that follow no link, and creates nodes relative to them (CVE-2025-23267 and CVE-2024-0132 are flaws of hooks that do
not).

At createRuntime the container's /dev is a mount in the mount namespace of its init process, before pivot_root:
/proc/PID/root still is the runtime's root there, and the same path leads to the mount.
"""

from __future__ import annotations

import errno
import os
import stat

from oci_hooks.findings import StepError
from oci_hooks.frozen import Frozen
from oci_hooks.linux.mounts import read_mounts
from oci_hooks.system import DEFAULT_LIMIT, Descriptor, Root, read_file, tagged

# Where its file system belongs: the kernel creates the directory if SELinux is on (security/selinux/selinuxfs.c).
SELINUX = "/sys/fs/selinux"
FOLLOW_NOTHING = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class ExistingEntry(Frozen):
    """An existing entry in the container. kind: "char", "file", "directory", "symbolic link", "special file"."""

    kind: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int


def open_rootfs(pid: int, rootfs: str) -> int:
    """Return a descriptor of the root file system in the mount namespace of a process. Raises OSError.

    pid: the container's init, 0 for this process's own namespace; rootfs: its real path. After pivot_root (a hook that
    is run by hand on a running container) the process's root is the root file system.
    """
    top = f"/proc/{pid}/root" if pid else "/"
    fd = os.open(top, os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if pid and not is_same_directory(os.fstat(fd), os.stat("/")):
            return os.dup(fd)
        return open_path(fd, rootfs.strip("/"))
    finally:
        os.close(fd)


def is_same_directory(one: os.stat_result, other: os.stat_result) -> bool:
    """Return whether two stats are of one directory."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


@tagged("open-dev")
def open_dev(pid: int, rootfs: str) -> Descriptor:
    """Return a descriptor of the container's /dev. Raises OSError."""
    root = open_rootfs(pid, rootfs)
    try:
        return Descriptor(os.open("dev", FOLLOW_NOTHING, dir_fd=root))
    finally:
        os.close(root)


def open_below(directory: int, name: str) -> int:
    """Return a descriptor of a directory in a directory, following no link. Raises OSError: ENOENT if it is missing."""
    return os.open(name, FOLLOW_NOTHING, dir_fd=directory)


def open_path(directory: int, path: str) -> int:
    """Return a descriptor of a directory some levels below one, following no link. Raises OSError."""
    fd = os.dup(directory)
    for name in path.split("/") if path else ():
        try:
            inner = open_below(fd, name)
        finally:
            os.close(fd)
        fd = inner
    return fd


def create_directory(directory: int, name: str) -> None:
    """Create a directory that all users may search. Raises OSError."""
    old = os.umask(0)
    try:
        os.mkdir(name, 0o755, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.EOVERFLOW:
            raise
        create_directory_as_owner(directory, name)
    finally:
        os.umask(old)


def create_directory_as_owner(directory: int, name: str) -> None:
    """Create a directory with the owner of its parent directory. Raises OSError.

    A file system that belongs to a user namespace accepts no entry whose owner is unmapped in that namespace, as this
    process's user is (EOVERFLOW; kernel: fsuidgid_has_mapping).
    """
    owner = os.fstat(directory)
    uid, gid = os.geteuid(), os.getegid()
    try:
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)
        os.mkdir(name, 0o755, dir_fd=directory)
    finally:
        os.seteuid(uid)
        os.setegid(gid)


def explain_tree_error(error: OSError, rootfs: str) -> StepError:
    """Return the error for a failed descent into the container's tree."""
    # O_NOFOLLOW with O_DIRECTORY reports ENOTDIR for a link too.
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        problem = "/dev or /dev/vfio in the container is a symbolic link or a file, not a directory"
        return StepError("hostile-tree", rootfs, problem, "mount a tmpfs on /dev, as runtimes do by default")
    if error.errno == errno.ENOENT:
        problem = "has no directory /dev in the container's mount namespace"
        return StepError("no-rootfs", rootfs, problem, "check root.path in config.json")
    problem = f"cannot prepare {error.filename or '/dev/vfio'} in the container: {error.strerror}"
    hint = "mount a tmpfs on /dev, where root can write before the container starts; see dmesg"
    return StepError("container-dev", rootfs, problem, hint)


def inspect_node(directory: int, name: str) -> ExistingEntry | None:
    """Return the entry with a name in a directory, None if there is none. Raises other OSErrors."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    kinds = {stat.S_IFCHR: "char", stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symbolic link"}
    kind = kinds.get(stat.S_IFMT(found.st_mode), "special file")
    numbers = (os.major(found.st_rdev), os.minor(found.st_rdev))
    return ExistingEntry(kind, *numbers, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)


def is_guest_dev(directory: int) -> bool:
    """Return whether a directory is on the guest's own /dev (a bind mount of it), where the hook creates no nodes."""
    return os.fstat(directory).st_dev == os.stat("/dev").st_dev


def is_foreign_mount(dev: int, pid: int, rootfs: str) -> bool:
    """Return whether a container's /dev is a directory of this machine that is mounted there.

    Nodes in such a directory outlive the container, and cannot be found again when the container's mounts are gone. A
    file system of the container's own ends with it; a directory of its root file system is found by the same path.

    dev: descriptor of /dev; pid: the container's init, 0 for this process's own namespace; rootfs: real path of the
    root file system. Raises OSError.
    """
    number = find_file_system(dev, pid)
    if number and all(mount.number != number for mount in read_mounts(Root(), f" {number} ")):
        return False
    try:
        own = open_dev(0, rootfs)
    except OSError:
        return True
    try:
        return not is_same_directory(os.fstat(dev), os.fstat(own))
    finally:
        os.close(own)


def find_file_system(fd: int, pid: int) -> str:
    """Return the "major:minor" that mountinfo has for a descriptor's file system, "" if it has none.

    Found by the mount's id (proc(5)): the numbers that stat() returns for btrfs and others are in no mountinfo. Raises
    OSError.
    """
    number = read_mount_id(fd).split()[1]
    text = read_file(f"/proc/{pid or 'self'}/mountinfo", DEFAULT_LIMIT)
    lines = (line.split(b" ", 3) for line in text.split(b"\n"))
    return next((fields[2].decode() for fields in lines if fields[0] == number and len(fields) > 3), "")


def crosses_mount(parent: int, directory: int) -> bool:
    """Return whether a directory below another one is a mount, and so on another file system. Raises OSError."""
    return read_mount_id(parent) != read_mount_id(directory)


def read_mount_id(fd: int) -> bytes:
    """Return the id of the mount that a descriptor is on (proc(5), /proc/pid/fdinfo, mnt_id). Raises OSError."""
    lines = read_file(f"/proc/self/fdinfo/{fd}", 4096).splitlines()
    return next(line for line in lines if line.startswith(b"mnt_id:"))


def create_node(directory: int, name: str, numbers: tuple[int, int], mode: int, uid: int, gid: int) -> None:
    """Create a character device node. Raises OSError.

    mknod sets the mode and lchown the owner: neither follows a link that another process may put in its place.
    """
    old = os.umask(0)
    try:
        os.mknod(name, stat.S_IFCHR | mode, os.makedev(*numbers), dir_fd=directory)
    finally:
        os.umask(old)
    os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)


def remove_node(directory: int, name: str, numbers: tuple[int, int]) -> bool:
    """Remove a node if it is a character device with these numbers, and return whether it was. Raises OSError."""
    found = inspect_node(directory, name)
    if found is None or found.kind != "char" or (found.major, found.minor) != numbers:
        return False
    os.unlink(name, dir_fd=directory)
    return True


def remove_directory(directory: int, name: str) -> None:
    """Remove a directory, unless it is not empty or already gone. Raises OSError."""
    try:
        os.rmdir(name, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY):
            return
        # On a read-only file system the kernel refuses before it looks for the name (do_rmdir, mnt_want_write).
        if error.errno != errno.EROFS or inspect_node(directory, name) is not None:
            raise


def write_file(directory: int, name: str, data: bytes) -> None:
    """Write a new file that all users may read. Raises OSError: EEXIST if the name exists."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        # A short write is no error; writing the rest fails if there is no space.
        while data:
            data = data[os.write(fd, data) :]
        os.fchmod(fd, 0o644)
    finally:
        os.close(fd)


def read_head(directory: int, name: str, size: int) -> bytes:
    """Return the first bytes of a regular file, none of anything else. Raises OSError.

    The type is checked on an O_PATH descriptor first: opening a device can have side effects, and a pipe blocks.
    """
    location = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(location).st_mode):
            return b""
        fd = os.open(f"/proc/self/fd/{location}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, size)
        finally:
            os.close(fd)
    finally:
        os.close(location)


def read_label(directory: int) -> str:
    """Return the SELinux label of a directory, "" where SELinux is off. Raises OSError.

    Runtimes mount the container's /dev with the option context (linux.mountLabel), so that all in it has this label.
    """
    if not os.path.isdir(SELINUX):
        return ""
    return os.getxattr(directory, "security.selinux").rstrip(b"\0").decode()


def remove_file(directory: int, name: str) -> None:
    """Remove a regular file; any other kind of entry with that name is not the hook's. Raises OSError."""
    found = inspect_node(directory, name)
    if found and found.kind == "file":
        os.unlink(name, dir_fd=directory)
