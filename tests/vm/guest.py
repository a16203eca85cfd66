# SPDX-License-Identifier: Apache-2.0
"""For tests inside the machine: find devices, look at and change their drivers, reach QEMU from inside.

Written on its own, not with oci_hooks.linux.pci: a test that reads with the code it tests sees what that code sees.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.support.rig_control import PORT_NAME

PCI = Path("/sys/bus/pci/devices")
GROUPS = Path("/sys/kernel/iommu_groups")
CONTROL_PORT = Path("/dev/virtio-ports") / PORT_NAME
CONTROL_LOCK = Path("/run/rig-control.lock")


def is_inside() -> bool:
    """Return whether this process runs in one of the rig's machines."""
    return "OCI_VFIO_RIG_MACHINE" in os.environ and CONTROL_PORT.exists()


def read_attribute(path: Path) -> str:
    """Return a sysfs attribute without its newline."""
    return path.read_text().strip()


def id_of(address: str) -> str:
    """Return a device's vendor:device, as in 8086:10d3."""
    device = PCI / address
    return f"{read_attribute(device / 'vendor')[2:]}:{read_attribute(device / 'device')[2:]}"


def class_of(address: str) -> str:
    """Return a device's class and subclass, as in 0200."""
    return read_attribute(PCI / address / "class")[2:6]


def find_devices(selector: str) -> list[str]:
    """Return the addresses of all devices with this vendor:device or this class, in order."""
    read = id_of if ":" in selector else class_of
    return sorted(path.name for path in PCI.iterdir() if read(path.name) == selector)


def find_device(selector: str, nth: int = 0) -> str:
    """Return the address of the nth device with this vendor:device or class."""
    found = find_devices(selector)
    assert len(found) > nth, f"this machine has {len(found)} of {selector}, number {nth} was asked for"
    return found[nth]


def find_nvme(serial: str) -> str:
    """Return the address of the NVMe controller with this serial. Its native driver must be bound."""
    for path in PCI.glob("*/nvme/*/serial"):
        if read_attribute(path) == serial:
            return path.parents[2].name
    raise AssertionError(f"no NVMe controller with serial {serial} is bound to nvme")


def link_name(path: Path) -> str:
    """Return the last part of what a link points to; "" when it is not there."""
    try:
        return os.path.basename(os.readlink(path))
    except FileNotFoundError:
        return ""


def group_of(address: str) -> str:
    """Return the number of a device's IOMMU group; "" when it has none."""
    return link_name(PCI / address / "iommu_group")


def members_of(group: str) -> list[str]:
    """Return the addresses of a group's devices."""
    return sorted(path.name for path in (GROUPS / group / "devices").iterdir())


def driver_of(address: str) -> str:
    """Return the driver a device is bound to; "" when to none."""
    return link_name(PCI / address / "driver")


def override_of(address: str) -> str:
    """Return a device's driver_override; "" when unset."""
    value = read_attribute(PCI / address / "driver_override")
    return "" if value == "(null)" else value


def live_groups() -> list[str]:
    """Return the numbers of the groups that have a node, which is: some member is bound to a VFIO driver."""
    nodes = Path("/sys/class/vfio")
    return sorted(path.name for path in nodes.iterdir()) if nodes.is_dir() else []


def numbers_of_group(group: str) -> tuple[int, int]:
    """Return major and minor of a live group's node."""
    major, minor = read_attribute(Path("/sys/class/vfio") / group / "dev").split(":")
    return int(major), int(minor)


def interfaces_of(address: str) -> list[str]:
    """Return the names of a device's network interfaces. udev renames them: `settle` first."""
    return sorted(path.name for path in (PCI / address).glob("net/*"))


def disks_of(address: str) -> list[Path]:
    """Return the nodes of an NVMe controller's disks."""
    return sorted(Path("/dev") / path.name for path in (PCI / address).glob("nvme/*/nvme*n*"))


def settle() -> None:
    """Wait until udev has nothing left to do."""
    subprocess.run(["udevadm", "settle", "--timeout=300"], check=True)


def bind(address: str, driver: str) -> None:
    """Bind a device to this driver, whatever it was bound to before, as an administrator would."""
    if driver == "vfio-pci":
        subprocess.run(["modprobe", driver], check=True)
    (PCI / address / "driver_override").write_text(f"{driver}\n")
    rebind(address)
    assert driver_of(address) == driver, f"{address} is bound to {driver_of(address) or 'nothing'}"


def bind_native(address: str) -> str:
    """Give a device back to the driver the kernel picks by itself and return that driver."""
    (PCI / address / "driver_override").write_text("\n")
    rebind(address)
    settle()
    return driver_of(address)


def rebind(address: str) -> None:
    """Unbind a device and let the kernel choose its driver again."""
    if driver_of(address):
        (PCI / address / "driver/unbind").write_text(address)
    Path("/sys/bus/pci/drivers_probe").write_text(address)


def read_kernel_log() -> str:
    """Return what the kernel log holds now, /dev/kmsg lines of the hooks included."""
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout


def hotplug_ports() -> list[str]:
    """Return QEMU's names of the empty root ports, for device_add's `bus`."""
    return os.environ["OCI_VFIO_RIG_HOTPLUG_PORTS"].split()


def qmp(command: str, **arguments: object) -> Any:
    """Have QEMU do something and return its answer: `qmp("device_add", driver="e1000e", id="x", bus=port)`.

    Hyphens in names of arguments are written as underscores. Raises AssertionError with QEMU's words on an error.
    """
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    answer = ask_rig({"execute": command, "arguments": named})
    assert "error" not in answer, f"{command}: {answer['error']['desc']}"
    return answer["return"]


def wait_for_qmp_event(name: str, **match: object) -> dict[str, Any]:
    """Return QEMU's next event of this name whose data has these values; past ones count, each once."""
    event: dict[str, Any] = ask_rig({"wait": name, "match": match})["event"]
    return event


def ask_rig(request: dict[str, Any]) -> dict[str, Any]:
    """Send one request to the rig and return its answer. One process at a time: the port is nobody else's meanwhile."""
    with CONTROL_LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with CONTROL_PORT.open("r+b", buffering=0) as port:
            port.write(json.dumps(request).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                answer += port.read(65536)
    parsed: dict[str, Any] = json.loads(answer)
    return parsed
