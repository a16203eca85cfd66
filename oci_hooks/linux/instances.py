# SPDX-License-Identifier: Apache-2.0
"""Identify a device across hot plug: an address is a place, and another device may be there now.

A device is known by the inode number of its directory in sysfs. The kernel makes a new directory for a device that is
plugged in, and gives no number twice (fs/kernfs/dir.c, __kernfs_new_node: in turn, with a generation). Vendor, device
and class are compared too, because numbers of 32 bits come round.
"""

from __future__ import annotations

import errno

from oci_hooks.frozen import Frozen
from oci_hooks.linux.pci import PCI_DEVICES, parse_ids, parse_uevent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.linux.pci import PciDevice
    from oci_hooks.system import Root

# A device that was unplugged: before its directory is opened, and after.
GONE = (errno.ENOENT, errno.ENODEV)


class Instance(Frozen):
    """One PCI function, while it is plugged in. inode: of its directory; the rest as of a PciDevice."""

    tag = "instance"

    inode: int = 0
    vendor: str = ""
    device: str = ""
    class_code: str = ""


def make_instance(device: PciDevice) -> Instance:
    """Return which device a PCI function is."""
    return Instance(device.inode, device.vendor, device.device, device.class_code)


def read_instance(root: Root, address: str) -> Instance | None:
    """Return which device is at an address now, None where there is none. Raises OSError where it can't be read."""
    path = f"{PCI_DEVICES}/{address}"
    try:
        return Instance(root.stat(path).st_ino, *parse_ids(parse_uevent(root.read_text(f"{path}/uevent"))))
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
