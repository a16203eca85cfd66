# SPDX-License-Identifier: Apache-2.0
"""The inner virtual machine: a QEMU in the outer machine, its monitor, and the agent in its initramfs.

Where the outer machine's processor can virtualize (QEMU emulates AMD's SVM, and that is what this is tested with), the
inner one runs by KVM: emulated once instead of twice. Otherwise it is emulated again, some twenty times slower.
"""

from __future__ import annotations

import base64
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chain.image import Image
from tests.support.rig_control import Wire

# The names of the two ports in the guest: scripts and their output; progress that a script reports meanwhile.
AGENT_PORT = "chain.agent"
EVENT_PORT = "chain.events"
MEMORY = "320M"
# testpmd's memory, in pages of 2 MiB.
HUGEPAGES = 16
KERNEL_ARGUMENTS = (
    "console=ttyS0",
    "loglevel=4",
    "panic=-1",
    "mitigations=off",
    "no_timer_check",
    "tsc=reliable",
    "audit=0",
    f"hugepages={HUGEPAGES}",
)
VIOMMU = ("-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on")
# As Kata adds them for enable_iommu.
VIOMMU_ARGUMENTS = ("intel_iommu=on", "iommu=pt")
# A container manager's patience: what hangs ends a test and not the whole run. All of it is emulated, and others may
# be at work on the same two processors.
LIMIT = 300.0
CONSOLE_LINES = 30


class VmError(Exception):
    """The inner machine did not come up, went down, or did not answer. The text has the end of its console."""


@dataclass(frozen=True)
class Done:
    """The result of a script in the inner machine. output: standard output and standard error, in order."""

    code: int
    output: str


@dataclass(frozen=True)
class Slot:
    """A place for devices. bus: QEMU's name of the port or bridge above it."""

    bus: str
    number: int


BRIDGE_SLOT = Slot("bridge", 1)


class Channel:
    """One connection that QEMU makes to us: a listening socket first, then lines of text."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.listener.settimeout(LIMIT)
        self.connection: socket.socket | None = None
        self.pending = b""

    def accept(self) -> None:
        """Wait until QEMU has connected."""
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(LIMIT)

    def read_line(self) -> str:
        """Return the next line without its end. Raises OSError when none comes any more."""
        assert self.connection is not None
        while b"\n" not in self.pending:
            data = self.connection.recv(65536)
            if not data:
                raise ConnectionError("QEMU has closed the connection")
            self.pending += data
        line, self.pending = self.pending.split(b"\n", 1)
        return line.decode(errors="replace").rstrip("\r")

    def write_line(self, line: str) -> None:
        """Send one line."""
        assert self.connection is not None
        self.connection.sendall(line.encode() + b"\n")

    def close(self) -> None:
        """Close both sockets."""
        self.listener.close()
        if self.connection is not None:
            self.connection.close()


class InnerVm:
    """One inner machine. groups: devices of the outer machine, on vfio-pci, that it has from the start, by group."""

    def __init__(self, image: Image, place: Path, iommu: bool, groups: list[list[str]], spare_ports: int) -> None:
        self.console = place / "console"
        self.monitor = Wire(place / "qmp")
        self.agent = Channel(place / "agent")
        self.events = Channel(place / "events")
        ports = [f"port{number}" for number in range(1, len(groups) + spare_ports + 1)]
        self.free_slots = [Slot(port, 0) for port in ports]
        self.slots = [self.take_slot(group) for group in groups]
        command = make_command(image, place, iommu, ports)
        for slot, group in zip(self.slots, groups):
            for arguments in list_devices(slot, group):
                command += ["-device", make_option(arguments)]
        # QEMU maps all of the machine's memory for the devices, which counts as locked.
        self.process = subprocess.Popen(
            ["prlimit", "--memlock=unlimited", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(place / "qemu.stderr").open("wb"),
        )
        self.stderr = place / "qemu.stderr"

    def take_slot(self, group: list[str]) -> Slot:
        """Return where the devices of one host group go: alone a root port of their own, together behind the bridge.

        With a virtual IOMMU each device has an address space of its own, and QEMU refuses a host's group in two of them
        ("used in multiple address spaces"); behind a conventional bridge they share one, and in the guest a group.
        """
        return BRIDGE_SLOT if len(group) > 1 else self.free_slots.pop(0)

    def wait_for_qemu(self) -> None:
        """Wait until QEMU has made the machine: it has its devices, and the guest is about to boot."""
        self.monitor.listener.settimeout(LIMIT)
        try:
            self.monitor.accept().settimeout(LIMIT)
            for channel in (self.agent, self.events):
                channel.accept()
            assert "QMP" in self.read_monitor()
            self.ask("qmp_capabilities")
        except OSError as error:
            raise self.explain(error) from error

    def wait_until_up(self) -> None:
        """Wait until the agent is there."""
        self.read_done()

    def read_monitor(self) -> dict[str, Any]:
        """Return QEMU's next message that is not an event."""
        while True:
            messages = self.monitor.receive()
            if messages is None:
                raise ConnectionError("QEMU has closed its monitor")
            for message in messages:
                if "event" not in message:
                    return message

    def ask(self, command: str, **arguments: object) -> Any:
        """Have QEMU do something and return its answer. Raises VmError with its words."""
        self.monitor.send({"execute": command, "arguments": arguments})
        answer = self.read_monitor()
        if "error" in answer:
            raise VmError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def plug(self, group: list[str]) -> str:
        """Plug the devices of a group of the host in while the machine runs; return their guest PCI path."""
        slot = self.take_slot(group)
        for arguments in list_devices(slot, group):
            self.ask("device_add", **arguments)
        return self.find_path(slot)

    def find_path(self, slot: Slot) -> str:
        """Return the guest PCI path of a slot, as Kata asks QEMU for it: slot of the port or bridge, slot behind it."""
        for bus in self.ask("query-pci"):
            for device in bus["devices"]:
                if device["qdev_id"] == slot.bus:
                    return f"{device['slot']:02x}/{slot.number:02x}"
        raise VmError(f"QEMU knows no {slot.bus}")

    def execute(self, script: str) -> Done:
        """Run a shell script in the machine and return what came of it."""
        self.start(script)
        return self.read_done()

    def start(self, script: str) -> None:
        """Begin to run a script; `read_done` has what came of it."""
        self.agent.write_line(base64.b64encode(script.encode()).decode())

    def read_done(self) -> Done:
        """Return what came of the script that runs, when it has ended."""
        lines: list[str] = []
        try:
            while True:
                line = self.agent.read_line()
                if line.startswith("@done "):
                    return Done(int(line.split()[1]), "\n".join(lines))
                lines.append(line)
        except OSError as error:
            raise self.explain(error, lines) from error

    def wait_for_event(self) -> str:
        """Return the next line that a script has written to the events' port."""
        try:
            return self.events.read_line()
        except OSError as error:
            raise self.explain(error) from error

    def explain(self, error: OSError, lines: list[str] | None = None) -> VmError:
        """Return an error with all that is known."""
        output = [f"the inner machine: {error}", *(lines or [])]
        for file in (self.stderr, self.console):
            if file.exists():
                output += file.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
        return VmError("\n    ".join(output))

    def stop(self) -> None:
        """Take the machine down."""
        self.process.kill()
        self.process.wait()
        self.monitor.close()
        self.agent.close()
        self.events.close()


def list_devices(slot: Slot, group: list[str]) -> list[dict[str, str]]:
    """Return QEMU's options for each device of a group: one function each, function 0 last, as QEMU requires."""
    many = {"multifunction": "on"} if len(group) > 1 else {}
    return [
        {"driver": "vfio-pci", "host": address, "bus": slot.bus, "addr": f"{slot.number:x}.{function}", **many}
        for function, address in reversed(list(enumerate(group)))
    ]


def make_option(arguments: dict[str, str]) -> str:
    """Return device_add's arguments as -device has them: the driver first."""
    rest = [f"{key}={value}" for key, value in arguments.items() if key != "driver"]
    return ",".join([arguments["driver"], *rest])


def make_command(image: Image, place: Path, iommu: bool, ports: list[str]) -> list[str]:
    """Return QEMU's command line without the devices that are passed through."""
    arguments = (*KERNEL_ARGUMENTS, *(VIOMMU_ARGUMENTS if iommu else ()))
    command = ["/usr/bin/qemu-system-x86_64", "-name", "sandbox-chain,debug-threads=on"]
    command += ["-machine", "q35,accel=kvm:tcg,kernel-irqchip=split", "-cpu", "max", "-smp", "1", "-m", MEMORY]
    command += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    command += ["-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", " ".join(arguments)]
    command += ["-serial", f"file:{place / 'console'}", "-qmp", f"unix:{place / 'qmp'}"]
    # The IOMMU first: QEMU wants it to be there before the devices behind it.
    command += VIOMMU if iommu else ()
    command += ["-device", "virtio-serial"]
    for name in (AGENT_PORT, EVENT_PORT):
        path = place / name.rpartition(".")[2]
        command += ["-chardev", f"socket,id={name},path={path}"]
        command += ["-device", f"virtserialport,chardev={name},name={name}"]
    for number, port in enumerate(ports, 1):
        command += ["-device", f"pcie-root-port,id={port},chassis={number},slot={number}"]
    # Without a reserve, firmware gives an empty bridge no room for what is plugged in later (Kata: qemu.BridgeDevice).
    reserve = "io-reserve=4k,mem-reserve=1m,pref64-reserve=1m"
    command += ["-device", f"pci-bridge,id={BRIDGE_SLOT.bus},chassis_nr={len(ports) + 1},shpc=off,{reserve}"]
    return command
