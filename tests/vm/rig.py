# SPDX-License-Identifier: Apache-2.0
"""Boot a machine, run one command in it, come back with its exit code.

Debian's kernel in QEMU by virtme-ng: the machine's root is this machine's root, read-only, so what is in the
repository and in the cache is there under the same path. Emulated unless RIG_ACCEL=kvm: /dev/kvm may be there and
still hang a guest for ever.
"""

from __future__ import annotations

import os
import selectors
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Callable

from tests import provision
from tests.progress import PROGRESS
from tests.provision import MissingError
from tests.support.rig_control import PORT_NAME, Relay, Wire
from tests.support.rig_starvation import measure_starvation
from tests.vm import systems
from tests.vm.devices import Board
from tests.vm.machines import Machine

# A boot takes 25 s on two idle processors, and several times that on a busy machine.
BOOT_LIMIT = 200.0
# A machine that gets hardly any processor is given up all the same, after this many times its limit.
PATIENCE = 4
# One test may hang in the kernel until its own limits end it, but not for so long (seconds).
SILENCE_LIMIT = 900.0
# An emulated timer that starves on a busy machine looks broken to the kernel, which then gives up the boot. And the
# first cpuset that a runtime makes for a container, as the end of the last, has the kernel patch its page allocator
# while the other emulated processor runs that: two panics were seen at such places.
KERNEL_ARGUMENTS = ("no_timer_check", "cgroup_disable=cpuset")
# Where the job's shared directory is inside.
SHARE = Path("/run/rig")
CONSOLE_KEPT = 16384
# Seconds that what was killed has to be gone: one that the kernel holds longer is not waited for.
KILLED_LIMIT = 20.0
INSIDE = Path(__file__).resolve().parent / "inside.sh"
# What is held so outlives nobody: kill -9 of the caller, of unshare or of virtme-ng takes its PID namespace along.
# A virtual machine left behind would eat a processor for ever.
LEASH = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child")


class BootError(Exception):
    """The machine did not do what it was booted for: never reached its command, died, or ran over its limit."""


@dataclass(frozen=True)
class Job:
    """A command to run in the machine, and its options.

    command: an argument vector; share: a directory that is SHARE inside, and writable; limit: seconds for the command;
    repeatable: whether to run it once more where the machine died under it, or fell silent.
    """

    command: tuple[str, ...]
    share: Path
    limit: float = 900.0
    environment: dict[str, str] = field(default_factory=dict)
    repeatable: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of a run. boot_seconds: until the command started; seconds: until power-off."""

    exit_code: int
    boot_seconds: float
    seconds: float


def run_in_vm(machine: Machine, kernel: provision.Kernel, job: Job, write: Callable[[bytes], None]) -> Outcome:
    """Boot the machine and run the job's command; its output goes to `write` as it comes.

    A machine that failed is tried once more: emulating two processors at once is not free of races. About one boot in
    fifteen was seen to stall, and of some hundred machines two died where the kernel patches its own code, and one fell
    silent. What the hook itself brings down, it brings down twice.
    """
    check_requirements()
    try:
        return boot(machine, kernel, job, write)
    except MachineError as error:
        print(f"rig: {machine.name}: {error}\n-- {machine.name}: one more try", file=sys.stderr, flush=True)
        return boot(machine, kernel, job, write)


def write_output(data: bytes) -> None:
    """Write what comes out of the machine to standard output, as it is and at once: the usual `write`."""
    sys.stdout.flush()
    while data:
        data = data[os.write(1, data) :]


class MachineError(BootError):
    """The machine failed, not its command: it never reached that, died or fell silent, and may be tried once more."""


def check_requirements() -> None:
    """Report what is missing on this machine."""
    for command, package in (("qemu-system-x86_64", "qemu-system-x86"), ("file", "file"), ("depmod", "kmod")):
        if shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            raise MissingError(f"{command} is not there: apt-get install --no-install-recommends {package}")
    if shutil.which("busybox") is None:
        raise MissingError("no busybox for the initramfs: apt-get install --no-install-recommends busybox-static")


def boot(machine: Machine, kernel: provision.Kernel, job: Job, write: Callable[[bytes], None]) -> Outcome:
    """Boot once. Raises MachineError if a retry may help, BootError for all other failures but an exit."""
    scratch = Path(tempfile.mkdtemp(prefix="rig-"))
    control, qmp = Wire(scratch / "control"), Wire(scratch / "qmp")
    try:
        board = Board(scratch)
        machine.plug(board)
        write_script(job, board, machine, kernel)
        command = make_command(machine, kernel, job, board)
        return Run(command, make_environment(scratch), Relay(control, qmp), write).watch(job)
    finally:
        control.close()
        qmp.close()
        shutil.rmtree(scratch, ignore_errors=True)


def make_environment(scratch: Path) -> dict[str, str]:
    """Return the environment for virtme-ng, whose programs call each other by name.

    scratch: the directory for its temporary files, which it leaves behind when it is killed.
    """
    venv = provision.ensure_venv("rig", provision.RIG_REQUIREMENTS)
    path = f"{venv / 'bin'}:{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
    return {**os.environ, "PATH": path, "LC_ALL": "C.UTF-8", "TMPDIR": str(scratch)}


def write_script(job: Job, board: Board, machine: Machine, kernel: provision.Kernel) -> None:
    """Write the job as a script into the shared directory, because a kernel's command line is short."""
    environment = {
        **job.environment,
        "OCI_VFIO_RIG_MACHINE": machine.name,
        "OCI_VFIO_RIG_KERNEL": kernel.version,
        "OCI_VFIO_RIG_HOTPLUG_PORTS": " ".join(board.hotplug_ports),
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items())]
    script = job.share / "job.sh"
    script.write_text("\n".join([*lines, f"cd {shlex.quote(str(provision.REPOSITORY))}", shlex.join(job.command), ""]))


def is_verbose() -> bool:
    """Return whether the user wants to see the kernel's console."""
    return bool(os.environ.get("RIG_VERBOSE"))


def make_command(machine: Machine, kernel: provision.Kernel, job: Job, board: Board) -> list[str]:
    """Return the command line that boots a machine: virtme-ng's, or QEMU's own for one with a Debian of its own."""
    appended = [*KERNEL_ARGUMENTS, f"loglevel={7 if is_verbose() else 4}"]
    appended += [*machine.iommu.kernel_arguments, *machine.kernel_arguments]
    if machine.system:
        system = systems.SYSTEMS[machine.system]
        size = ["-smp", str(machine.cpus), "-m", machine.memory, "-accel", "kvm" if is_kvm() else "tcg"]
        qemu = [*size, *list_qemu_options(machine, board, system.board)]
        return systems.make_command(system, kernel, job.share, board.scratch, qemu, appended)
    qemu = list_qemu_options(machine, board)
    command = ["vng", "--run", str(kernel.image), "--disable-microvm", "--force-9p", "--verbose"]
    command += [] if is_kvm() else ["--disable-kvm"]
    command += ["--cpus", str(machine.cpus), "--memory", machine.memory, "--user", "root"]
    command += [f"--append={argument}" for argument in appended]
    command += [f"--rwdir={SHARE}={job.share}"]
    inside = ["sh", str(INSIDE), str(SHARE / "job.sh"), str(provision.REPOSITORY), str(provision.find_cache())]
    command += [f"--qemu-opts={shlex.join(qemu)}", "--exec", shlex.join(inside)]
    return command


def is_kvm() -> bool:
    """Return whether the user wants /dev/kvm to be used."""
    return os.environ.get("RIG_ACCEL") == "kvm"


def list_qemu_options(machine: Machine, board: Board, kind: str = "q35,kernel-irqchip=split") -> list[str]:
    """Return QEMU's options that all machines have: the devices, the wires, and this machine's files.

    kind: of QEMU's machines, with its options.
    """
    qemu = ["-machine", f"{kind}{machine.iommu.machine}"]
    qemu += [*machine.iommu.qemu, *board.arguments]
    qemu += ["-chardev", f"socket,id=rigcontrol,path={board.scratch / 'control'}"]
    qemu += ["-device", "virtio-serial", "-device", f"virtserialport,chardev=rigcontrol,name={PORT_NAME}"]
    # The root once more, for inside.sh: virtme-ng's own is without a cache.
    qemu += ["-fsdev", "local,id=rigroot,path=/,security_model=none,readonly=on,multidevs=remap"]
    qemu += ["-device", "virtio-9p-pci,fsdev=rigroot,mount_tag=rig.root"]
    qemu += ["-qmp", f"unix:{board.scratch / 'qmp'}"]
    return qemu


def wait_for_end(stream: IO[bytes]) -> None:
    """Wait until no process has the other end of a pipe any more: those that the leash kills take a moment to die."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(timeout=KILLED_LIMIT) and os.read(stream.fileno(), 65536):
            pass


class Run:
    """A machine that is running: its output, its two wires and its process, watched by one loop."""

    def __init__(
        self, command: list[str], environment: dict[str, str], relay: Relay, write: Callable[[bytes], None]
    ) -> None:
        self.relay = relay
        self.write = write
        self.started = time.monotonic()
        self.up_at: float | None = None
        self.heard_at = self.started
        self.console = b""
        self.selector = selectors.DefaultSelector()
        # In a session of its own: it hears nothing of Ctrl-C, which reaches its caller.
        self.process = subprocess.Popen(
            [*LEASH, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def watch(self, job: Job) -> Outcome:
        """Serve the machine until it powers off or runs over its limit. No process of it is left after that."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.selector.register(self.process.stdout, selectors.EVENT_READ, self.read_output)
        self.selector.register(self.process.stderr, selectors.EVENT_READ, self.read_console)
        for wire, handle in ((self.relay.control, self.relay.handle_control), (self.relay.qmp, self.relay.handle_qmp)):
            self.selector.register(wire.listener, selectors.EVENT_READ, self.make_acceptor(wire, handle))
        try:
            while self.is_watching():
                self.check_limits(job)
                for key, _ in self.selector.select(timeout=1.0):
                    key.data(key.fileobj)
        finally:
            self.process.kill()
            self.process.wait()
            wait_for_end(self.process.stdout)
            self.process.stdout.close()
            self.process.stderr.close()
            self.selector.close()
        return self.judge(job)

    def is_watching(self) -> bool:
        """Return whether the output or a wire is still open: the last message may come in after the last output."""
        listeners = (self.relay.control.listener, self.relay.qmp.listener)
        return any(key.fileobj not in listeners for key in self.selector.get_map().values())

    def make_acceptor(self, wire: Wire, handle: Callable[[dict[str, object]], None]) -> Callable[[object], None]:
        """Return what to do when QEMU connects to the wire."""

        def receive(connection: object) -> None:
            messages = wire.receive()
            if messages is None:
                self.selector.unregister(connection)  # type: ignore[arg-type]
                return
            for message in messages:
                handle(message)
            if self.relay.up and self.up_at is None:
                self.up_at = time.monotonic()

        def accept(_listener: object) -> None:
            self.selector.register(wire.accept(), selectors.EVENT_READ, receive)

        return accept

    def read_output(self, stream: IO[bytes]) -> None:
        """Pass on what the command printed."""
        data = os.read(stream.fileno(), 65536)
        if not data:
            self.selector.unregister(stream)
            return
        self.heard_at = time.monotonic()
        self.write(data)

    def read_console(self, stream: IO[bytes]) -> None:
        """Keep the end of the output of the kernel, QEMU and virtme-ng: it explains a machine that never came up."""
        data = os.read(stream.fileno(), 65536)
        if not data:
            self.selector.unregister(stream)
            return
        self.console = (self.console + data)[-CONSOLE_KEPT:]
        PROGRESS.note(data.decode(errors="replace"))
        if is_verbose():
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()

    def check_limits(self, job: Job) -> None:
        """Raise when the boot or the command takes too long, not counting what the machine waited for a processor."""
        now = time.monotonic()
        since, allowed = (self.started, BOOT_LIMIT) if self.up_at is None else (self.up_at, job.limit)
        if self.up_at is not None and job.repeatable and now - max(self.heard_at, self.up_at) > SILENCE_LIMIT:
            raise MachineError(f"nothing was heard of it for {SILENCE_LIMIT:.0f} s{self.quote_console()}")
        # Measuring is dear, and not needed while all is well.
        if now - since <= allowed:
            return
        if now - since <= min(allowed + measure_starvation(self.process.pid), PATIENCE * allowed):
            return
        spent = f"{now - since:.0f} s, which is {allowed:.0f} s and what it waited for a processor"
        if self.up_at is None:
            raise MachineError(f"the command was not reached in {spent}{self.quote_console()}")
        raise BootError(f"the hard limit was reached: {spent}{self.quote_console()}")

    def quote_console(self) -> str:
        """Return the last lines of the console, for the end of a message."""
        lines = self.console.decode(errors="replace").strip().splitlines()[-20:]
        return "; its console ended with:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""

    def judge(self, job: Job) -> Outcome:
        """Return what came of the run, which has ended by itself."""
        now = time.monotonic()
        if self.up_at is None:
            code = self.process.returncode
            raise MachineError(f"ended with {code} before the command was reached{self.quote_console()}")
        if self.relay.exit_code is None:
            words = f"the machine went down before its command had ended{self.quote_console()}"
            raise MachineError(words) if job.repeatable else BootError(words)
        return Outcome(self.relay.exit_code, self.up_at - self.started, now - self.started)
