# SPDX-License-Identifier: Apache-2.0
"""Mount file systems in another mount namespace. Loaded only for containers with a user namespace.

A file system is created detached (fsopen(2), fsmount(2), Linux 5.2) and attached by a child that enters the namespace
(setns(2)). Python has setns only from 3.12, and the other calls not at all. The numbers of the new mount calls are the
same on every architecture but alpha.
"""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import StepError
from oci_hooks.guest.apply.child import end_child, start_child
from oci_hooks.guest.apply.system_calls import call_libc
from oci_hooks.system import Deadline, read_pipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SYS_MOVE_MOUNT = 429
SYS_FSOPEN = 430
SYS_FSCONFIG = 431
SYS_FSMOUNT = 432

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NOEXEC = 8
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40
CLONE_NEWNS = 0x20000
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# Seconds that a mount may take, and a killed child to end.
MOUNT_SECONDS = 2.0
END_SECONDS = 0.5


def make_tmpfs(label: str = "") -> int:
    """Return a descriptor of a new, detached tmpfs that belongs to this user namespace. Raises StepError.

    label: the SELinux label of all that is in it, as with the mount option context (mount(8)).
    """
    try:
        context = call_libc("syscall", SYS_FSOPEN, b"tmpfs", FSOPEN_CLOEXEC)
        try:
            call_libc("syscall", SYS_FSCONFIG, context, FSCONFIG_SET_STRING, b"mode", b"0755", 0)
            call_libc("syscall", SYS_FSCONFIG, context, FSCONFIG_SET_STRING, b"size", b"64k", 0)
            if label:
                call_libc("syscall", SYS_FSCONFIG, context, FSCONFIG_SET_STRING, b"context", label.encode(), 0)
            call_libc("syscall", SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
            attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC
            return call_libc("syscall", SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)
        finally:
            os.close(context)
    except OSError as error:
        hint = "a container with a user namespace needs Linux 5.2 or later, and CAP_SYS_ADMIN for the hook"
        raise StepError("mount-failed", "/dev/vfio", f"cannot create a tmpfs for it: {error.strerror}", hint) from None


def mount_tree(pid: int, tree: int, directory: int) -> None:
    """Mount a detached tree over a directory of another process's mount namespace. Raises StepError.

    pid: a process in that namespace; tree, directory: descriptors.
    """

    def move() -> None:
        flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
        call_libc("syscall", SYS_MOVE_MOUNT, tree, b"", directory, b"", flags)

    code = run_in_mount_namespace(pid, move)
    if code:
        problem = f"cannot mount a tmpfs on it in the container: {os.strerror(code)}"
        raise StepError("mount-failed", "/dev/vfio", problem, "see dmesg; give the hook CAP_SYS_ADMIN in the guest")


def unmount(pid: int, directory: int, name: str) -> None:
    """Unmount what mount_tree() mounted on a directory's entry. Raises OSError."""

    def unmount() -> None:
        os.fchdir(directory)
        call_libc("umount2", name.encode(), MNT_DETACH | UMOUNT_NOFOLLOW)

    code = run_in_mount_namespace(pid, unmount)
    # EINVAL: nothing is mounted there.
    if code not in (0, errno.EINVAL):
        raise OSError(code, os.strerror(code), name)


def run_in_mount_namespace(pid: int, work: Callable[[], None]) -> int:
    """Run a function in another process's mount namespace, in a child.

    Return its errno, 0 for success; EIO if the child died without an answer, ETIMEDOUT if it does not finish in time: a
    mount may wait for a file system that does not answer.
    """
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def enter(answer: int) -> None:
        code = 0
        try:
            call_libc("setns", namespace, CLONE_NEWNS)
            work()
        except OSError as error:
            code = error.errno or errno.EIO
        os.write(answer, bytes([code]))

    try:
        child = start_child(enter)
    finally:
        os.close(namespace)
    try:
        answer = read_pipe(child.pipe, Deadline(MOUNT_SECONDS), 1)
    finally:
        end_child(child, END_SECONDS)
    if answer is None:
        return errno.ETIMEDOUT
    return answer[0] if answer else errno.EIO
