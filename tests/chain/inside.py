# SPDX-License-Identifier: Apache-2.0
"""Looking into the inner machine: its NICs, their groups and drivers. A script each: a program start is dear."""

from __future__ import annotations

from dataclasses import dataclass

from tests.chain.innervm import InnerVm
from tests.vm.devices import NIC_E1000E

LIST = r"""
cd /sys/bus/pci/devices || exit 1
for address in *; do
    read -r vendor <$address/vendor; read -r device <$address/device; read -r override <$address/driver_override
    group=$(readlink $address/iommu_group); driver=$(readlink $address/driver)
    echo "$address,${vendor#0x}:${device#0x},${group##*/},${driver##*/},$override"
done
"""


@dataclass(frozen=True)
class Device:
    """A PCI function of the guest. group, driver: "" for none; override: driver_override, "(null)" when unset."""

    group: str
    driver: str
    override: str


@dataclass(frozen=True)
class Inside:
    """The contents of the guest's sysfs."""

    vm: InnerVm

    def ask(self, script: str) -> list[str]:
        """Run a script that must succeed and return the lines it prints."""
        done = self.vm.execute(script)
        assert done.code == 0, done.output
        return [line for line in done.output.splitlines() if line]

    def list_nics(self) -> dict[str, Device]:
        """Return the guest's passed-through NICs by address, in order."""
        rows = [line.split(",") for line in self.ask(LIST)]
        return {address: Device(*rest) for address, ids, *rest in rows if ids == NIC_E1000E}

    def find_addresses(self, path: str) -> list[str]:
        """Return the functions in the slot of a guest PCI path: slot of the port / slot behind it."""
        port, slot = path.split("/")
        found = self.ask(f"cd /sys/bus/pci/devices/0000:00:{port}.0 && ls -d 0000:*:{slot}.*")
        return sorted(found)

    def wait_for_interfaces(self, path: str, count: int) -> None:
        """Wait until the native driver has created interfaces of all functions in a slot, by polling."""
        port, slot = path.split("/")
        interfaces = f"/sys/bus/pci/devices/0000:00:{port}.0/0000:*:{slot}.*/net/*"
        self.ask(f"until set -- {interfaces} && [ -e $1 ] && [ $# = {count} ]; do :; done")

    def find_interface(self, address: str) -> str:
        """Return the network interface of a NIC that its native driver has."""
        (name,) = self.ask(f"ls /sys/bus/pci/devices/{address}/net")
        return name

    def list_claims(self) -> list[str]:
        """Return the containers that have devices by the hook."""
        return self.ask("ls /run/oci-vfio-hooks/claims")
