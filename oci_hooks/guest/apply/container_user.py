# SPDX-License-Identifier: Apache-2.0
"""Take on the ids and capabilities of a container's first process, in a child that then opens its nodes.

The hook is root with all capabilities, so that its own opening proves nothing about a container's user: neither that
the owner of a node is right, nor a directory on the way to it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.credentials import Credentials

CLONE_NEWUSER = 0x10000000
# struct __user_cap_header_struct: version 3, this process (include/uapi/linux/capability.h).
CAPABILITY_VERSION = 0x20080522
# What opening a device's node may ask for: of the file system, of vfio (no-IOMMU), of other drivers.
OPENING = {"CAP_DAC_OVERRIDE": 1, "CAP_DAC_READ_SEARCH": 2, "CAP_SYS_RAWIO": 17, "CAP_SYS_ADMIN": 21}


def become_user(credentials: Credentials, pid: int) -> bool:
    """Become the container's user for good, and return whether that worked; only in a child that ends afterwards.

    pid: a process in the container's user namespace. It does not work without CAP_SETUID and CAP_SETGID, nor with a
    user namespace that the hook may not enter, nor in a Python without ctypes.
    """
    try:
        import struct

        from oci_hooks.guest.apply.system_calls import call_libc, find_address

        if credentials.user_namespace and not shares_user_namespace(pid):
            namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            try:
                call_libc("setns", namespace, CLONE_NEWUSER)
            finally:
                os.close(namespace)
        if set(os.getgroups()) != set(credentials.groups):
            os.setgroups(credentials.groups)
        os.setresgid(credentials.gid, credentials.gid, credentials.gid)
        # Real and saved id stay root's: with them gone the capabilities that are kept would be gone too, and any
        # process of the container's user could send this one signals. Opening asks for the effective id.
        os.setresuid(-1, credentials.uid, -1)
        mask = sum(1 << number for name, number in OPENING.items() if name in credentials.capabilities)
        header = bytearray(struct.pack("=Ii", CAPABILITY_VERSION, 0))
        # effective, permitted, inheritable, for the first 32 capabilities and for the rest
        sets = bytearray(struct.pack("=6I", mask, mask, 0, 0, 0, 0))
        call_libc("capset", find_address(header), find_address(sets))
    except (OSError, OverflowError, ValueError, ImportError):
        # More groups than the kernel has room for; a Python without ctypes.
        return False
    return True


def shares_user_namespace(pid: int) -> bool:
    """Return whether a process is in this one's user namespace. Raises OSError."""
    return os.stat(f"/proc/{pid}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino
