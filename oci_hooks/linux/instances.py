# SPDX-License-Identifier: Apache-2.0
"""Identify a device across hot plug: another device may have its address now.

A device is identified by the inode number of its directory in sysfs. The kernel creates a new directory for a device
that is plugged in, and does not reuse a number soon (fs/kernfs/dir.c, __kernfs_new_node: cyclic, with a generation).
Vendor, device and class are compared too, because 32-bit numbers wrap around.
"""

from __future__ import annotations

import errno

from oci_hooks.frozen import Frozen
from oci_hooks.linux.pci import PCI_DEVICES, parse_ids, parse_uevent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.linux.pci import PciDevice
    from oci_hooks.system import Root

# Errors of a device that was unplugged: before its directory is opened, and after.
GONE = (errno.ENOENT, errno.ENODEV)


class Instance(Frozen):
    """One PCI function, while it is plugged in. inode: of its directory; the rest as in PciDevice."""

    tag = "instance"

    inode: int = 0
    vendor: str = ""
    device: str = ""
    class_code: str = ""


def make_instance(device: PciDevice) -> Instance:
    """Return the identity of a PCI function."""
    return Instance(device.inode, device.vendor, device.device, device.class_code)


def read_instance(root: Root, address: str) -> Instance | None:
    """Return the identity of the device now at an address, None without one. Raises OSError if it cannot be read."""
    path = f"{PCI_DEVICES}/{address}"
    try:
        return Instance(root.stat(path).st_ino, *parse_ids(parse_uevent(root.read_text(f"{path}/uevent"))))
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
