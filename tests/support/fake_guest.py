# SPDX-License-Identifier: Apache-2.0
"""A made machine: PCI functions in a /sys below a directory, as sysfs lays them out. No kernel acts on it."""

from __future__ import annotations

from pathlib import Path

from oci_hooks.linux.instances import read_instance
from oci_hooks.linux.pci import PCI_DEVICES, Inventory, scan
from oci_hooks.system import Root

NIC = "0000:01:00.0"


class Machine:
    """A machine that grows."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = Root(str(top))
        for directory in ("/sys/bus/pci/drivers", "/sys/bus/pci/devices", "/sys/kernel/iommu_groups"):
            self.place(directory).mkdir(parents=True)
        self.write("/sys/bus/pci/drivers_probe")

    def place(self, path: str) -> Path:
        """Return the location of a path of the machine."""
        return self.top / path.lstrip("/")

    def write(self, path: str, text: str = "") -> None:
        """Make a file and the directories above it."""
        location = self.place(path)
        location.parent.mkdir(parents=True, exist_ok=True)
        location.write_text(text)

    def read(self, path: str) -> str:
        """Return a file's content."""
        return self.place(path).read_text()

    def add(
        self,
        address: str,
        ids: str = "8086:10d3",
        class_code: str = "020000",
        driver: str = "",
        group: str = "",
        **at: str,
    ) -> str:
        """Add a PCI function and return its address. at: above = path of the bridge or root bus that it sits on."""
        above = at.get("above", f"/sys/devices/pci{address[:-5]}")
        lines = [f"PCI_CLASS={class_code.lstrip('0').upper()}", f"PCI_ID={ids.upper()}"]
        self.write(f"{above}/{address}/uevent", "\n".join([f"DRIVER={driver}"] * bool(driver) + lines) + "\n")
        self.write(f"{above}/{address}/driver_override", "(null)\n")
        self.place(f"{PCI_DEVICES}/{address}").symlink_to("../../.." + above[len("/sys") :] + f"/{address}")
        if driver:
            self.write(f"/sys/bus/pci/drivers/{driver}/unbind")
            self.place(f"{PCI_DEVICES}/{address}/driver").symlink_to(self.place(f"/sys/bus/pci/drivers/{driver}"))
        if group:
            self.place(f"/sys/kernel/iommu_groups/{group}/devices").mkdir(parents=True, exist_ok=True)
            self.place(f"{PCI_DEVICES}/{address}/iommu_group").symlink_to(f"../../../kernel/iommu_groups/{group}")
        return address

    def note_bound(self, address: str, driver: str, override: str) -> tuple[str, ...]:
        """Make a function look bound by the hook, and return the undo log's entry. driver, override: earlier ones."""
        self.write(f"{PCI_DEVICES}/{address}/driver_override", "vfio-pci\n")
        found = read_instance(self.root, address)
        assert found is not None
        return ("device", address, driver, override, *map(str, found.as_dict().values()))

    def add_group_node(self, group: str, numbers: str) -> None:
        """Give a group the node that vfio makes when a device of it is bound."""
        self.write(f"/sys/class/vfio/{group}/dev", numbers + "\n")

    def look(self) -> Inventory:
        """Return the picture of the machine."""
        return scan(self.root)
