# SPDX-License-Identifier: Apache-2.0
"""Find the block devices that are built on others: volumes, arrays, loop devices. Changes nothing.

Sources: Documentation/ABI (sysfs-block, sysfs-block-dm, sysfs-block-loop), loop(4).
"""

from __future__ import annotations

import os

from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root

BLOCK_CLASS = "/sys/class/block"
# The prefix of a device-mapper volume's uuid names its creator (sysfs-block-dm; lvm2, cryptsetup, multipath-tools).
MAPPER_KINDS = {"LVM": "LVM volume", "CRYPT": "dm-crypt volume", "mpath": "multipath device", "part": "partition"}
# include/uapi/linux/loop.h; struct loop_info64 begins with device, inode and, for a block device, its number.
LOOP_GET_STATUS64, LOOP_INFO_SIZE, LOOP_INFO_HEAD = 0x4C05, 232, "=QQQ"


def name_block(root: Root, path: str, blocks: dict[str, str]) -> str:
    """Return the kernel's name for a path in /dev, or "major:minor" of a node that has another name."""
    name = root.real_path(path)[len("/dev/") :].replace("/", "!")
    if name in blocks:
        return name
    try:
        number = root.stat(path).st_rdev
    except OSError:
        return name
    return f"{os.major(number)}:{os.minor(number)}"


def read_loops(root: Root, blocks: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return "major:minor" of a block device -> the loop devices that are backed by it.

    A loop device is not in its backing device's `holders`, as a volume is. If it is backed by a file, the file's disk
    is mounted.
    """
    loops: dict[str, tuple[str, ...]] = {}
    for name in blocks:
        path = root.read_text_or(f"{BLOCK_CLASS}/{name}/loop/backing_file", "") if name.startswith("loop") else ""
        if path:
            number = find_backing(root, name, path, blocks)
            loops[number] = (*loops.get(number, ()), name)
    return loops


def find_backing(root: Root, loop: str, path: str, blocks: dict[str, str]) -> str:
    """Return "major:minor" of a loop device's backing device, "0:0" for a file. path: as sysfs names it."""
    try:
        number = root.ask(read_backing_device, f"/dev/{loop}")
    except OSError:
        # Without a node for the ioctl: the device that has this name now.
        name = name_block(root, path.replace(" (deleted)", ""), blocks)
        return root.read_text_or(f"{BLOCK_CLASS}/{name}/dev", name)
    return f"{os.major(number)}:{os.minor(number)}"


@tagged("loop-backing")
def read_backing_device(path: str) -> int:
    """Return the number of a loop device's backing device, 0 for a file (loop(4)). Raises OSError.

    path: the loop device's node.
    """
    import fcntl
    from struct import unpack_from

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        answer = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(LOOP_INFO_SIZE))
    finally:
        os.close(fd)
    return int(unpack_from(LOOP_INFO_HEAD, answer)[2])


def describe_holder(root: Root, name: str) -> str:
    """Return a description of a block device that is built on others."""
    volume = root.read_text_or(f"{BLOCK_CLASS}/{name}/dm/name", "")
    if volume:
        maker = root.read_text_or(f"{BLOCK_CLASS}/{name}/dm/uuid", "").partition("-")[0].rstrip("0123456789")
        return f"{MAPPER_KINDS.get(maker, 'device-mapper volume')} {volume} ({name})"
    kinds = {"md": "RAID array", "loop": "loop device"}
    return next((f"{kind} {name}" for prefix, kind in kinds.items() if name.startswith(prefix)), name)
