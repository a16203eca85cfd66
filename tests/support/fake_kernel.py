# SPDX-License-Identifier: Apache-2.0
"""A made machine whose kernel acts, so that the guest hook succeeds on it, and may be killed or made to fail at it.

The hook is all there: its processes, locks, journals, files and nodes are real, and so is a kill -9. The made kernel
gives three answers: what a write to sysfs brings about, what opening a VFIO node comes to (no device here has those
numbers), and where "/" is. What only a real kernel can show is in tests/vm.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Callable, TypeVar

from oci_hooks import log, oci, program, system
from oci_hooks.guest import hook as guest_hook
from oci_hooks.guest.apply import cgroup, proof, sysfs_writer
from oci_hooks.linux.pci import PCI_DEVICES
from oci_hooks.record import writer as record_writer
from oci_hooks.system import RecordingRoot
from tests.support.fake_guest import Machine
from tests.support.fault_injection import CHANGES
from tests.support.guest_calls import be_hook, import_hook

NATIVE = "e1000e"
T = TypeVar("T")
Prepare = Callable[[], None]
CALLS = ("open", "fork", "pipe")


# As they were before a test wrapped them (tests/support/fault_injection.py): what the kernel does is no step of the
# hook.
UNWRAPPED = {name: getattr(os, name) for name in (*CHANGES["os"], *CALLS)}
# Functions that change this machine, and the hook's other questions to the system.
CHANGING = {**CHANGES, "oci_hooks.guest.apply.sysfs_writer": ("write_attribute",)}
STEPS = {**CHANGING, "os": (*CHANGES["os"], *CALLS)}


class Kernel:
    """The reaction of drivers to writes to sysfs."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.refuses: Callable[[str, str], int] = lambda address, driver: 0

    def write_attribute(self, path: str, data: str, directory: int = -1) -> None:
        """Replace sysfs_writer.write_attribute: a write that has begun is completed. Raises OSError."""
        if directory >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
        os.close(UNWRAPPED["open"](path, os.O_WRONLY | os.O_CLOEXEC))
        with self.alone():
            child = UNWRAPPED["fork"]()
            if child == 0:
                # It has the lock, too, and so keeps it to its end when the hook is killed.
                os.setsid()
                # The hook's limits are not the kernel's.
                resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
                vars(os).update(UNWRAPPED)
                code = errno.EIO
                try:
                    code = self.write(Path(path), data)
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise OSError(code, os.strerror(code), path)

    def write(self, path: Path, data: str) -> int:
        """Do one write. Returns errno."""
        if not path.exists():
            return errno.ENOENT
        if path.name == "driver_override":
            path.write_text(data if data.strip() else "(null)\n")
        elif path.name == "unbind":
            return self.unbind(data)
        elif path.name == "drivers_probe":
            return self.probe(data)
        return 0

    def wait(self) -> None:
        """Wait until the writes that were begun are finished, also those of a hook that was killed."""
        with self.alone():
            return

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have nothing else happen on the machine."""
        with (self.top / "kernel-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Not by closing alone: who was forked meanwhile has it open, too.
                fcntl.flock(lock, fcntl.LOCK_UN)

    def unbind(self, address: str) -> int:
        """Take a function from its driver."""
        location = self.place(address)
        if not (location / "driver").is_symlink():
            return errno.ENODEV
        (location / "driver").unlink()
        self.add_finding(location, "")
        return 0

    def probe(self, address: str) -> int:
        """Bind a function to the driver of its override, or its own."""
        location = self.place(address)
        if not location.exists():
            return errno.ENODEV
        if (location / "driver").is_symlink():
            return 0
        override = (location / "driver_override").read_text().strip()
        driver = NATIVE if override == "(null)" else override
        code = self.refuses(address, driver)
        if code:
            return code
        (location / "driver").symlink_to(self.top / f"sys/bus/pci/drivers/{driver}")
        self.add_finding(location, driver)
        return 0

    def place(self, address: str) -> Path:
        """Return the path of a function."""
        return self.top / f"{PCI_DEVICES}/{address}".lstrip("/")

    def add_finding(self, place: Path, driver: str) -> None:
        """Have the function's uevent and its VFIO group follow its driver."""
        lines = [line for line in (place / "uevent").read_text().splitlines() if not line.startswith("DRIVER=")]
        (place / "uevent").write_text("\n".join([f"DRIVER={driver}"] * bool(driver) + lines) + "\n")
        group = os.path.basename(os.readlink(place / "iommu_group"))
        node = self.top / f"sys/class/vfio/{group}"
        members = (self.top / f"sys/kernel/iommu_groups/{group}/devices").iterdir()
        if any(os.path.basename(os.path.realpath(member / "driver")) == "vfio-pci" for member in members):
            node.mkdir(parents=True, exist_ok=True)
            (node / "dev").write_text(f"511:{group}\n")
        elif node.exists():
            shutil.rmtree(node)


class PlacedRoot(RecordingRoot):
    """The root of a hook's run, on a made machine. top: its directory."""

    def __init__(self, top: str) -> None:
        super().__init__()
        self.top = top

    def ask(self, question: Callable[..., T], path: str, *more: object) -> T:
        """Return a reading function's result for a path, and note it. Raises OSError."""
        return super().ask(question, self.host_path(path), *more)


class Container:
    """A container that is being created: a real process, a bundle, a root file system with a /dev."""

    def __init__(self, machine: ActingMachine, name: str, devices: str, **more: Any) -> None:
        self.machine = machine
        self.name = name
        self.bundle = machine.top / f"bundles/{name}"
        self.dev = self.bundle / "rootfs/dev"
        self.dev.mkdir(parents=True)
        self.init = subprocess.Popen(["/bin/sleep", "3600"], stdin=subprocess.DEVNULL)
        config = {"root": {"path": str(self.bundle / "rootfs")}, "annotations": {oci.DEVICES_ANNOTATION: devices}}
        (self.bundle / "config.json").write_text(json.dumps({**config, **more}))
        self.enlist()

    def enlist(self) -> None:
        """Have its init be a process of the machine."""
        self.machine.write(f"/proc/{self.init.pid}/cgroup", "0::/\n")
        self.show(True)

    def show(self, alive: bool) -> None:
        """Have its init be there, or gone, for the machine: its process goes on for the next time."""
        stat = self.machine.place(f"/proc/{self.init.pid}/stat")
        stat.unlink(missing_ok=True)
        if alive:
            stat.symlink_to(f"/proc/{self.init.pid}/stat")

    @property
    def state(self) -> dict[str, Any]:
        """The OCI state that its runtime gives to hooks."""
        return {"ociVersion": "1.0.2", "id": self.name, "pid": self.init.pid, "bundle": f"/bundles/{self.name}"}

    @property
    def stopped(self) -> dict[str, Any]:
        """The OCI state at poststop, as runc writes it."""
        return {"ociVersion": "1.0.2", "id": self.name, "bundle": f"/bundles/{self.name}", "status": "stopped"}

    def list_dev(self) -> dict[str, tuple[int, int]]:
        """Return the entries of its /dev: mode and device number by name."""
        found = {}
        for path in sorted(self.dev.rglob("*")):
            status = path.lstat()
            found[str(path.relative_to(self.dev))] = (status.st_mode, status.st_rdev)
        return found

    def end(self) -> None:
        """Kill its init."""
        self.init.kill()
        self.init.wait()

    def remove(self) -> None:
        """End it and take its bundle away."""
        self.end()
        self.machine.containers.remove(self)
        shutil.rmtree(self.bundle)


class Run:
    """A hook at work in a fork of this process, which has it imported: a hundred times as fast as starting it."""

    def __init__(self, machine: ActingMachine, state: dict[str, Any], arguments: tuple[str, ...], prepare: Prepare):
        self.said = TemporaryFile()  # noqa: SIM115 - closed by finish
        with TemporaryFile() as stdin:
            stdin.write(json.dumps(state).encode())
            stdin.seek(0)
            self.pid = os.fork()
            if self.pid == 0:
                be_hook((stdin, self.said, self.said), arguments, machine.enter, prepare)

    def finish(self) -> tuple[int, str]:
        """Wait for its end; return its exit code, negative for a signal, and its output."""
        status = os.waitpid(self.pid, 0)[1]
        with self.said:
            self.said.seek(0)
            return os.waitstatus_to_exitcode(status), self.said.read().decode()


class ActingMachine(Machine):
    """A machine with groups of two functions each."""

    def __init__(self, top: Path, groups: int = 1) -> None:
        super().__init__(top)
        import_hook()
        self.kernel = Kernel(top)
        self.containers: list[Container] = []
        for path in ("/sys/bus/pci/drivers/vfio-pci/unbind", "/sys/module/vfio_iommu_type1/parameters/x"):
            self.write(path)
        self.write("/proc/self/mountinfo", "22 1 0:21 / / rw - 9p root rw\n")
        self.write("/proc/self/cgroup", "0::/\n")
        self.place("/run").mkdir()
        for group in range(1, groups + 1):
            for function in range(2):
                address = self.add(f"0000:{group:02x}:00.{function}", driver=NATIVE, group=str(group))
                member = self.place(f"/sys/kernel/iommu_groups/{group}/devices/{address}")
                member.symlink_to(self.place(f"{PCI_DEVICES}/{address}"))

    def enter(self) -> None:
        """Make this process one on this machine."""
        setattr(sysfs_writer, "write_attribute", self.kernel.write_attribute)  # noqa: B010
        setattr(proof, "verify_node", answer_open)  # noqa: B010
        # Where so many are at work at once, the usual time may be short.
        setattr(guest_hook, "SECONDS", 20.0)  # noqa: B010
        setattr(system.Deadline, "extend", lambda *_: None)  # noqa: B010
        setattr(log, "write_kmsg", lambda *_: None)  # noqa: B010
        setattr(program, "RecordingRoot", self.make_root)  # noqa: B010
        for name in ("DIRECTORY", "SPARE_DIRECTORY"):
            setattr(record_writer, name, str(self.place("/var/lib/records")))

    def make_root(self) -> RecordingRoot:
        """Return the root of this machine."""
        return PlacedRoot(str(self.top))

    def make_container(self, name: str, devices: str, **more: Any) -> Container:
        """Return a container that asks for devices. more: members of config.json."""
        self.containers.append(Container(self, name, devices, **more))
        return self.containers[-1]

    def start(self, state: dict[str, Any], *arguments: str, prepare: Prepare = lambda: None) -> Run:
        """Start the guest hook. prepare: called in its process first. With status "stopped" the container has ended."""
        for container in self.containers:
            if container.name == state["id"]:
                container.show(state.get("status") != "stopped")
        return Run(self, state, arguments, prepare)

    def call(self, state: dict[str, Any], *arguments: str, prepare: Prepare = lambda: None) -> tuple[int, str]:
        """Run the guest hook to its end; return its exit code and output."""
        return self.start(state, *arguments, prepare=prepare).finish()

    def share_namespace(self, container: Container, prepare: Prepare) -> int:
        """Give a container's init a mount namespace of its own, prepared by this; return its pid."""
        container.end()
        container.init = subprocess.Popen(["/bin/sleep", "3600"], stdin=subprocess.DEVNULL, preexec_fn=prepare)  # noqa: PLW1509
        container.enlist()
        return container.init.pid

    def list_claims(self) -> list[str]:
        """Return the names of claims."""
        location = self.place("/run/oci-vfio-hooks/claims")
        return sorted(name for name in os.listdir(location) if name[0] != ".") if location.is_dir() else []

    def take_stock(self) -> dict[str, Any]:
        """Return all that the hook changes: drivers, overrides, groups, nodes, claims."""
        drivers = {}
        for path in sorted(self.place(PCI_DEVICES).iterdir()):
            driver = os.path.basename(os.readlink(path / "driver")) if (path / "driver").is_symlink() else ""
            drivers[path.name] = (driver, (path / "driver_override").read_text())
        classes = self.place("/sys/class/vfio")
        return {
            "drivers": drivers,
            "groups": sorted(os.listdir(classes)) if classes.is_dir() else [],
            "nodes": {container.name: container.list_dev() for container in self.containers},
            "claims": self.list_claims(),
        }

    def unplug(self, address: str) -> None:
        """Take a function away, as the kernel does: its VFIO group, its group, its directory."""
        with self.kernel.alone():
            self.take_away(address)

    def take_away(self, address: str) -> None:
        """Remove what sysfs has of a function."""
        location = self.place(f"{PCI_DEVICES}/{address}")
        if not location.is_symlink():
            return
        if (location / "driver").is_symlink():
            self.kernel.unbind(address)
        group = self.place(f"/sys/kernel/iommu_groups/{os.path.basename(os.readlink(location / 'iommu_group'))}")
        (group / "devices" / address).unlink()
        if not os.listdir(group / "devices"):
            shutil.rmtree(group)
        shutil.rmtree(os.path.realpath(location))
        location.unlink()

    def end(self) -> None:
        """Take the containers away."""
        for container in self.containers:
            container.end()


def answer_open(directory: int, node: cgroup.MadeNode, _flags: int = os.O_RDWR) -> tuple[int, bool]:
    """Replace proof.verify_node: a node with the right numbers opens."""
    try:
        found = os.stat(node.name, dir_fd=directory, follow_symlinks=False)
    except OSError as error:
        return error.errno or errno.EIO, False
    return (0, True) if proof.is_device(found, node) else (errno.ENODEV, False)
