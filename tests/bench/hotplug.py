# SPDX-License-Identifier: Apache-2.0
"""Hot plug: how long after the kernel's uevent the group's node is in the container.

QEMU plugs a NIC in while the hook waits for it. The clock starts when this process hears the kernel's event, which the
hook receives too, and stops when inotify reports the node.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from tests.bench.timing import BenchError, check_exit, start
from tests.vm import devices, guest

# include/uapi/linux/netlink.h; the kernel's own events are multicast group 1.
NETLINK_KOBJECT_UEVENT = 15
KERNEL_GROUP = 1
# include/uapi/linux/inotify.h
IN_CREATE = 0x100
LIMIT = 60.0
NIC = "bench-nic"


def plug() -> None:
    """Have QEMU plug a NIC in, of the kind whose driver is loaded."""
    guest.qmp("device_add", driver="e1000e", id=NIC, bus=guest.hotplug_ports()[0], romfile="")


def unplug() -> None:
    """Have QEMU take the NIC out and wait until it is gone."""
    guest.qmp("device_del", id=NIC)
    guest.wait_for_qmp_event("DEVICE_DELETED", device=NIC)
    guest.settle()


def find_address() -> str:
    """Return the address that a NIC gets in the empty port."""
    before = set(guest.find_devices(devices.NIC_E1000E))
    with listen() as events:
        plug()
        (address,) = {wait_for_device(events)} - before
    guest.settle()
    unplug()
    return address


def listen() -> socket.socket:
    """Return a socket that hears the kernel's events."""
    heard = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT)
    heard.bind((0, KERNEL_GROUP))
    return heard


def wait_for_device(events: socket.socket, wanted: str = "", happening: str = "add") -> str:
    """Return the address of the next PCI function that appears, or that something else happens to; wanted: only its."""
    while True:
        wait(events.fileno(), "the kernel's event")
        action, _, path = events.recv(65536).partition(b"\0")[0].decode().partition("@")
        address = path.rpartition("/")[2]
        if action == happening and (guest.PCI / address).exists() and wanted in ("", address):
            return address


def wait(fd: int, what: str) -> None:
    """Wait until there is something to read."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(LIMIT * 1000):
        raise BenchError(f"{what} did not come within {LIMIT:g} s")


def watch(directory: Path) -> int:
    """Return an inotify descriptor for entries created in a directory."""
    library = ctypes.CDLL(None, use_errno=True)
    fd: int = library.inotify_init1(os.O_CLOEXEC)
    if fd < 0 or library.inotify_add_watch(fd, os.fsencode(directory), IN_CREATE) < 0:
        raise BenchError(f"{directory} can't be watched: {os.strerror(ctypes.get_errno())}")
    return fd


def read_created(fd: int) -> list[str]:
    """Return the names that were made, waiting for one at least."""
    wait(fd, "the node")
    data, names = os.read(fd, 65536), []
    while data:
        # struct inotify_event: wd, mask, cookie, len, name.
        (length,) = struct.unpack_from("=I", data, 12)
        names.append(data[16 : 16 + length].rstrip(b"\0").decode())
        data = data[16 + length :]
    return names


def measure(command: Sequence[str], state: bytes, address: str, directory: Path) -> float:
    """Return the seconds from the event of this device to a group's node in a container. Raises BenchError.

    command: the hook; directory: the container's /dev/vfio, which must be there.
    """
    created = watch(directory)
    with NamedTemporaryFile() as output, listen() as events:
        try:
            _, pid = start(command, state, output.name)
            wait_for_listener(pid)
            plug()
            wait_for_device(events, address)
            begun = time.perf_counter()
            while not any(name.isdigit() for name in read_created(created)):
                pass
            seconds = time.perf_counter() - begun
            check_exit(command, os.waitpid(pid, 0)[1], output.name)
        finally:
            os.close(created)
    guest.settle()
    return seconds


def measure_native(address: str) -> float:
    """Return the seconds from the event of this device until its native driver has it, which no hook can come before.

    The kernel takes no device from a driver that is still taking it up.
    """
    with listen() as events:
        plug()
        wait_for_device(events, address)
        begun = time.perf_counter()
        wait_for_device(events, address, "bind")
        seconds = time.perf_counter() - begun
    guest.settle()
    return seconds


def measure_kernel(address: str) -> float:
    """Return the seconds from the event of this device to the node of its group, with the least that can bind it.

    This process is there already, writes the same files as the hook, and looks at nothing but the device's driver. In
    some turns it comes before the native driver, which then never has the device: a tenth of the time.
    """
    path = guest.PCI / address
    with listen() as events:
        plug()
        wait_for_device(events, address)
        begun = time.perf_counter()
        write(path / "driver_override", "vfio-pci\n")
        while guest.driver_of(address) != "vfio-pci":
            write(path / "driver/unbind", address)
            write(guest.PCI.parent / "drivers_probe", address)
        node = Path(f"/dev/vfio/{guest.group_of(address)}")
        while not node.exists():
            pass
        seconds = time.perf_counter() - begun
    guest.settle()
    return seconds


def write(path: Path, text: str) -> None:
    """Write to an attribute; its own driver may not have the device yet, or have it again."""
    with contextlib.suppress(OSError):
        path.write_text(text)


def wait_for_listener(pid: int) -> None:
    """Wait until a process hears the kernel's events and has nothing to do."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        lines = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:]]
        hears = any(line[1] == str(NETLINK_KOBJECT_UEVENT) and line[2] == str(pid) for line in lines)
        if hears and Path(f"/proc/{pid}/syscall").read_text().split()[0] in ("7", "271"):
            # In poll(2) or ppoll(2): it waits.
            return
        time.sleep(0.02)
    raise BenchError("the hook does not wait for the device")
