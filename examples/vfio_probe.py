#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Take the first steps of a program that drives a device through VFIO, and print the result of each.

    vfio_probe.py [PATH...]

Runs inside a container: opens /dev/vfio/vfio and every group node beside it (noiommu-N too: without an IOMMU), asks
whether the group is viable, sets the IOMMU type, gets each device and reads its vendor and device id through VFIO. Then
every device node in /dev/vfio/devices: binds it to an iommufd of /dev/iommu, attaches an address space and reads the id
likewise. PATHs are opened too, to see that they can't be. Prints one line of JSON; a step that failed has the error's
name instead of "ok", and nothing follows it. Python's minimal package is enough for it: no json, no ctypes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")
    Report = dict[str, object]

# <linux/vfio.h>: _IO(';', 100 + n)
VFIO_SET_IOMMU = 0x3B66
VFIO_GROUP_GET_STATUS = 0x3B67
VFIO_GROUP_SET_CONTAINER = 0x3B68
VFIO_GROUP_GET_DEVICE_FD = 0x3B6A
VFIO_DEVICE_GET_REGION_INFO = 0x3B6C
VFIO_DEVICE_BIND_IOMMUFD = 0x3B76
VFIO_DEVICE_ATTACH_IOMMUFD_PT = 0x3B77
VFIO_GROUP_FLAGS_VIABLE = 1
VFIO_TYPE1_IOMMU = 1
VFIO_NOIOMMU_IOMMU = 8
VFIO_PCI_CONFIG_REGION_INDEX = 7
# <linux/iommufd.h>
IOMMU_IOAS_ALLOC = 0x3B81

DIRECTORY = "/dev/vfio"
DEVICES = "/dev/vfio/devices"
IOMMUFD = "/dev/iommu"
# Before the number of an IOMMU group in the name of a node without an IOMMU.
NOIOMMU = "noiommu-"


def name_error(error: OSError) -> str:
    """Return an error's name, as in EPERM."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def attempt(report: Report, step: str, action: Callable[[], T]) -> T | None:
    """Do one step and note "ok" or the error's name; return its value, or None."""
    try:
        value = action()
    except OSError as error:
        report[step] = name_error(error)
        return None
    report[step] = "ok"
    return value


def open_node(path: str) -> int:
    """Open a device node for reading and writing."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def read_status(group: int) -> int:
    """Return the flags of a group."""
    answer = fcntl.ioctl(group, VFIO_GROUP_GET_STATUS, struct.pack("=II", 8, 0))
    flags: int = struct.unpack("=II", answer)[1]
    return flags


def read_id(device: int) -> str:
    """Return vendor:device out of the configuration space, read through the device's region."""
    # struct vfio_region_info: argsz, flags, index, cap_offset, size, offset
    layout = "=IIIIQQ"
    question = struct.pack(layout, struct.calcsize(layout), 0, VFIO_PCI_CONFIG_REGION_INDEX, 0, 0, 0)
    offset = struct.unpack(layout, fcntl.ioctl(device, VFIO_DEVICE_GET_REGION_INFO, question))[5]
    vendor, number = struct.unpack("<HH", os.pread(device, 4, offset))
    return f"{vendor:04x}:{number:04x}"


def list_directory(path: str) -> list[str]:
    """Return the names in a directory; none where there is no such directory."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def list_members(name: str) -> list[str]:
    """Return the addresses of a group's devices, from sysfs; bridges too."""
    number = name[len(NOIOMMU) :] if name.startswith(NOIOMMU) else name
    return list_directory(f"/sys/kernel/iommu_groups/{number}/devices")


def get_device(group: int, address: str) -> int:
    """Return the file descriptor of a group's device. A bridge is a member too, but VFIO does not hand it out."""
    # A mutable buffer, because only then does fcntl return what the kernel returned: the descriptor.
    device: int = fcntl.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
    return device


def probe_device(group: int, address: str) -> Report:
    """Return what became of getting one device of a group and reading its id."""
    report: Report = {"address": address}
    device = attempt(report, "get_device", lambda: get_device(group, address))
    if device is not None:
        report["id"] = attempt(report, "read_id", lambda: read_id(device))
        os.close(device)
    return report


def probe_group(name: str) -> Report:
    """Return what became of opening a group and all that follows, in a VFIO container of its own."""
    report: Report = {"group": name}
    group = attempt(report, "open", lambda: open_node(f"{DIRECTORY}/{name}"))
    if group is not None:
        use_group(report, group, name)
        # As long as it is open, its devices' own nodes can't be used.
        os.close(group)
    return report


def use_group(report: Report, group: int, name: str) -> None:
    """Do with an open group what can be done with it."""
    status = attempt(report, "get_status", lambda: read_status(group))
    if status is None:
        return
    report["viable"] = bool(status & VFIO_GROUP_FLAGS_VIABLE)
    control = attempt(report, "open_control", lambda: open_node(f"{DIRECTORY}/vfio"))
    if control is None:
        return
    attempt(report, "set_container", lambda: fcntl.ioctl(group, VFIO_GROUP_SET_CONTAINER, struct.pack("=i", control)))
    if report["set_container"] == "ok":
        kind = VFIO_NOIOMMU_IOMMU if name.startswith(NOIOMMU) else VFIO_TYPE1_IOMMU
        attempt(report, "set_iommu", lambda: fcntl.ioctl(control, VFIO_SET_IOMMU, kind))
        if report["set_iommu"] == "ok":
            report["devices"] = [probe_device(group, address) for address in list_members(name)]
    os.close(control)


def probe_device_node(name: str) -> Report:
    """Return what became of opening a device by its own node and using it through an iommufd."""
    report: Report = {"device_node": name}
    device = attempt(report, "open", lambda: open_node(f"{DEVICES}/{name}"))
    if device is not None:
        iommu = attempt(report, "open_iommu", lambda: open_node(IOMMUFD))
        if iommu is not None:
            use_device(report, device, iommu)
            os.close(iommu)
        os.close(device)
    return report


def use_device(report: Report, device: int, iommu: int) -> None:
    """Do with a device's open node and an iommufd what can be done with them."""
    # struct vfio_device_bind_iommufd: argsz, flags, iommufd, out_devid
    binding = bytearray(struct.pack("=IIiI", 16, 0, iommu, 0))
    attempt(report, "bind", lambda: fcntl.ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, binding))
    if report["bind"] != "ok":
        return
    # struct iommu_ioas_alloc: size, flags, out_ioas_id
    space = bytearray(struct.pack("=III", 12, 0, 0))
    attempt(report, "alloc_ioas", lambda: fcntl.ioctl(iommu, IOMMU_IOAS_ALLOC, space))
    if report["alloc_ioas"] != "ok":
        return
    # struct vfio_device_attach_iommufd_pt: argsz, flags, pt_id
    attachment = bytearray(struct.pack("=III", 12, 0, struct.unpack("=III", space)[2]))
    attempt(report, "attach", lambda: fcntl.ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, attachment))
    if report["attach"] == "ok":
        report["id"] = attempt(report, "read_id", lambda: read_id(device))


def probe_path(path: str) -> object:
    """Return "ok" or the name of the error that opening a path ends in."""
    report: Report = {}
    attempt(report, "open", lambda: open_node(path))
    return report["open"]


def write_json(value: object) -> str:
    """Return JSON for the few kinds of values there are here; no string of ours needs escaping but for quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_json(key)}: {write_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(write_json(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "null" if value is None else "true" if value else "false"


def main(paths: list[str]) -> None:
    """Print the report."""
    nodes = list_directory(DIRECTORY)
    report: Report = {
        "nodes": nodes,
        "control": probe_path(f"{DIRECTORY}/vfio"),
        "groups": [probe_group(name) for name in nodes if name.isdigit() or name.startswith(NOIOMMU)],
        "device_nodes": [probe_device_node(name) for name in list_directory(DEVICES)],
        "paths": {path: probe_path(path) for path in paths},
    }
    print(write_json(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
