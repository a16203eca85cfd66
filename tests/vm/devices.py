# SPDX-License-Identifier: Apache-2.0
"""The devices a machine can be given. Each function plugs one case into a board; a machine is a list of them.

Nobody outside needs to know a slot or an address: tests find their devices in sysfs by vendor:device, class or serial.
"""

from __future__ import annotations

from pathlib import Path

# What the devices are in sysfs: vendor:device.
NIC_E1000E = "8086:10d3"
NIC_E1000 = "8086:100e"
EDU = "1234:11e8"
NVME = "1b36:0010"
XHCI = "1b36:000d"
TESTDEV = "1b36:0005"
SERIAL = "1b36:0002"
CAN = "10e8:8406"

DISK_SIZE = 64 << 20
# Nobody boots from these NICs; the firmware would run each one's boot ROM, emulated.
NO_ROM = "romfile="


class Board:
    """QEMU's arguments as they grow, and the names that are taken. scratch: a directory for the disks' files."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.arguments: list[str] = []
        self.hotplug_ports: list[str] = []
        self.counts: dict[str, int] = {}

    def take_number(self, kind: str) -> int:
        """Return the next number of this kind, from 1."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return self.counts[kind]

    def add(self, *arguments: str) -> None:
        """Append arguments to QEMU's command line."""
        self.arguments.extend(arguments)


def add_root_port(board: Board) -> str:
    """Add a PCIe root port and return its name: what sits behind it has an IOMMU group of its own."""
    number = board.take_number("port")
    name = f"port{number}"
    # Chassis 1 and up for ports; bridges have numbers of their own, from 100.
    board.add("-device", f"pcie-root-port,id={name},chassis={number},slot={number}")
    return name


def add_bridge(board: Board) -> str:
    """Add a conventional PCI bridge and return its name: all that sits behind it is one IOMMU group with it."""
    number = board.take_number("bridge")
    name = f"bridge{number}"
    board.add("-device", f"pci-bridge,id={name},chassis_nr={100 + number}")
    return name


def add_dead_end(board: Board) -> str:
    """Add a network that leads nowhere and return its name."""
    name = f"net{board.take_number('net')}"
    board.add("-netdev", f"user,id={name},restrict=on")
    return name


def add_nic(board: Board) -> None:
    """Add a NIC alone in its group (driver e1000e)."""
    board.add("-device", f"e1000e,{NO_ROM},bus={add_root_port(board)},netdev={add_dead_end(board)}")


def add_nic_on_root_bus(board: Board) -> None:
    """Add a NIC alone in its group, without a port of its own: more than nine ports with a NIC stop the firmware.

    Each port wants 4 KiB of I/O ports for what is behind it, and there are no more than that.
    """
    board.add("-device", f"e1000e,{NO_ROM},bus=pcie.0,netdev={add_dead_end(board)}")


def add_nics_behind_bridge(board: Board, number: int = 2) -> None:
    """Add NICs (driver e1000) and the bridge above them, all in one group."""
    bridge = add_bridge(board)
    for slot in range(1, number + 1):
        board.add("-device", f"e1000,{NO_ROM},bus={bridge},addr={slot},netdev={add_dead_end(board)}")


def add_wired_nics(board: Board) -> None:
    """Add two NICs, each alone in its group, wired to each other: what one sends, the other receives."""
    hub = board.take_number("hub")
    for _ in range(2):
        name = f"net{board.take_number('net')}"
        board.add("-netdev", f"hubport,id={name},hubid={hub}")
        board.add("-device", f"e1000e,{NO_ROM},bus={add_root_port(board)},netdev={name}")


def add_two_function_nics(board: Board) -> None:
    """Add a card with two NICs as its functions, which are one group, wired to each other."""
    hub, port = board.take_number("hub"), add_root_port(board)
    # Function 0 last: it makes the others known.
    for function in (1, 0):
        name = f"net{board.take_number('net')}"
        board.add("-netdev", f"hubport,id={name},hubid={hub}")
        location = f"bus={port},addr=0.{function},multifunction=on"
        board.add("-device", f"e1000e,{NO_ROM},{location},netdev={name}")


def add_edu(board: Board) -> None:
    """Add a device that no driver wants."""
    board.add("-device", f"edu,bus={add_root_port(board)}")


def add_serial(board: Board) -> None:
    """Add a card with a serial port (driver serial, 8250_pci) that leads nowhere."""
    name = f"serial{board.take_number('serial')}"
    board.add("-chardev", f"null,id={name}", "-device", f"pci-serial,bus={add_root_port(board)},chardev={name}")


def add_can(board: Board) -> None:
    """Add a card with a CAN interface (driver kvaser_pci) on a bus of its own."""
    name = f"can{board.take_number('can')}"
    board.add("-object", f"can-bus,id={name}", "-device", f"kvaser_pci,bus={add_root_port(board)},canbus={name}")


def add_nvme(board: Board, serial: str, size: int = DISK_SIZE) -> None:
    """Add an NVMe disk, empty at each boot, with this serial. size: in bytes."""
    number = board.take_number("disk")
    image = board.scratch / f"disk{number}.img"
    with image.open("wb") as file:
        file.truncate(size)
    board.add("-drive", f"if=none,id=disk{number},format=raw,file={image}")
    board.add("-device", f"nvme,bus={add_root_port(board)},serial={serial},drive=disk{number}")


def add_sriov_nvme(board: Board, serial: str) -> None:
    """Add an NVMe controller without a disk that can make four virtual functions, each in a group of its own."""
    number = board.take_number("subsystem")
    board.add("-device", f"nvme-subsys,id=subsystem{number}")
    board.add(
        "-device",
        f"nvme,bus={add_root_port(board)},serial={serial},subsys=subsystem{number},sriov_max_vfs=4,"
        "sriov_vq_flexible=8,sriov_vi_flexible=4,max_ioqpairs=16,msix_qsize=16",
    )


def add_usb_behind_bridge(board: Board) -> None:
    """Add a USB controller (driver xhci_hcd) and a device without driver behind one bridge.

    A group with two endpoints that is QEMU's own (vendor 1b36): the guest hook never takes it by itself.
    """
    bridge = add_bridge(board)
    board.add("-device", f"qemu-xhci,bus={bridge},addr=1", "-device", f"pci-testdev,bus={bridge},addr=2")


def add_hotplug_port(board: Board) -> None:
    """Add an empty root port that a device can be plugged into while the machine runs."""
    board.hotplug_ports.append(add_root_port(board))
