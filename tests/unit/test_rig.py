# SPDX-License-Identifier: Apache-2.0
"""The rig without a machine: limits, the retry, the leash, the wires. With one: tests/vm/test_rig.py."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import provision
from tests.support import rig_control, rig_starvation
from tests.support.rig_control import Relay, Wire
from tests.vm import machines, rig, systems
from tests.vm.devices import Board

KERNEL = provision.Kernel("6.1", "6.1.0", Path("/nowhere/vmlinuz"))


@pytest.fixture
def wires(tmp_path: Path) -> Iterator[tuple[Wire, Wire]]:
    """Two wires that nobody has connected to."""
    made = Wire(tmp_path / "control"), Wire(tmp_path / "qmp")
    yield made
    for wire in made:
        wire.close()


def connect(wire: Wire, path: Path) -> socket.socket:
    """Connect to a wire as QEMU does."""
    other = socket.socket(socket.AF_UNIX)
    other.connect(str(path))
    wire.accept()
    return other


def read_line(connection: socket.socket) -> Any:
    """Return the next message on the far end of a wire."""
    with connection.makefile("rb") as file:
        return json.loads(file.readline())


def run_shell(
    script: str, wires: tuple[Wire, Wire], limit: float = 60.0, repeatable: bool = False
) -> tuple[rig.Outcome, bytes]:
    """Run a shell script in the place of a machine; return what came of it and what it printed."""
    printed = bytearray()
    job = rig.Job((), Path("/nowhere"), limit, repeatable=repeatable)
    outcome = rig.Run(["sh", "-c", script], dict(os.environ), Relay(*wires), printed.extend).watch(job)
    return outcome, bytes(printed)


def say_through(path: Path, *messages: dict[str, object]) -> str:
    """Return a command that writes these messages to a wire and hangs up."""
    lines = "".join(json.dumps(message) + "\n" for message in messages)
    program = (
        f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); s.sendall({lines.encode()!r})"
    )
    return shlex.join([sys.executable, "-c", program])


def test_rig_returns_exit_code_and_output(wires: tuple[Wire, Wire], tmp_path: Path) -> None:
    """The exit code is the one from inside, not the emulator's."""
    output = say_through(tmp_path / "control", {"up": True}, {"exit": 7})
    outcome, printed = run_shell(f"echo hello; {output}; exit 1", wires)
    assert outcome.exit_code == 7
    assert printed == b"hello\n"


def test_rig_early_exit_shows_output(wires: tuple[Wire, Wire]) -> None:
    """A wrong option of QEMU's is readable."""
    with pytest.raises(rig.MachineError, match="no such device"):
        run_shell("echo no such device >&2; exit 1", wires)


def test_rig_hanging_boot_killed(wires: tuple[Wire, Wire], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never up: stalled, and no process is left, not even a grandchild."""
    monkeypatch.setattr(rig, "BOOT_LIMIT", 3.0)
    with pytest.raises(rig.MachineError, match="not reached"):
        # Its pid out here: in there it has another.
        run_shell(f"(cd -P /proc/self; echo $PWD > {tmp_path}/pid; exec sleep 1000) & wait", wires)
    assert_dead(int(Path((tmp_path / "pid").read_text().strip()).name))


def test_rig_command_over_limit_killed(wires: tuple[Wire, Wire], tmp_path: Path) -> None:
    """Up, but never done."""
    with pytest.raises(rig.BootError, match="hard limit"):
        run_shell(f"{say_through(tmp_path / 'control', {'up': True})}; exec sleep 1000", wires, limit=0.5)


@pytest.mark.parametrize(("repeatable", "error"), [(False, rig.BootError), (True, rig.MachineError)])
def test_rig_crash_during_command_fails(
    wires: tuple[Wire, Wire], tmp_path: Path, repeatable: bool, error: type[rig.BootError]
) -> None:
    """A kernel panic: up, no exit code. What may be run twice may be tried again."""
    with pytest.raises(rig.BootError, match="went down") as raised:
        run_shell(say_through(tmp_path / "control", {"up": True}), wires, repeatable=repeatable)
    assert raised.type is error


@pytest.mark.parametrize("repeatable", [False, True])
def test_rig_silent_machine_killed(
    wires: tuple[Wire, Wire], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeatable: bool
) -> None:
    """Not while it talks; and a developer's own command may be silent for as long as it likes."""
    monkeypatch.setattr(rig, "SILENCE_LIMIT", 1.5)
    script = f"{say_through(tmp_path / 'control', {'up': True})}; sleep 1; echo here; sleep 1; echo here; sleep 1000"
    error, words = (rig.MachineError, "nothing was heard of it") if repeatable else (rig.BootError, "hard limit")
    with pytest.raises(error, match=words):
        run_shell(script, wires, 60.0 if repeatable else 4.0, repeatable)


def assert_dead(pid: int) -> None:
    """Fail when the process does not end. It was killed, but it may not have got round to dying."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(pidfd) as file:
        ended, _, _ = select.select([file], [], [], 10)
    assert ended, f"process {pid} still runs"


def make_thread(proc: Path, pid: int, tid: int, waited: float, children: str = "") -> None:
    """Make the files of one thread as in /proc."""
    thread = proc / str(pid) / "task" / str(tid)
    thread.mkdir(parents=True)
    (thread / "schedstat").write_text(f"5000000000 {int(waited * 1e9)} 17\n")
    (thread / "children").write_text(children)


def test_measure_starvation_of_descendants(tmp_path: Path) -> None:
    """The leash and virtme-ng sleep; QEMU's processors, far below them, wait. Who has ended is passed over."""
    make_thread(tmp_path, 10, 10, 0.1, "11 99")
    make_thread(tmp_path, 11, 11, 0.2, "12")
    make_thread(tmp_path, 12, 12, 0.5)
    make_thread(tmp_path, 12, 13, 54.5)
    make_thread(tmp_path, 77, 77, 1000.0)
    assert rig_starvation.measure_starvation(10, tmp_path) == 54.5
    assert rig_starvation.measure_starvation(99, tmp_path) == 0.0


def test_rig_starved_boot_gets_more_time(
    wires: tuple[Wire, Wire], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up after its limit by the clock, because it was not let run; given up after some times the limit."""
    monkeypatch.setattr(rig, "BOOT_LIMIT", 3.0)
    monkeypatch.setattr(rig, "PATIENCE", 200)
    monkeypatch.setattr(rig, "measure_starvation", lambda _pid: 1000.0)
    late = f"sleep 1.2; {say_through(tmp_path / 'control', {'up': True}, {'exit': 0})}"
    assert run_shell(late, wires)[0].exit_code == 0
    monkeypatch.setattr(rig, "PATIENCE", 2)
    with pytest.raises(rig.MachineError, match="not reached"):
        run_shell("sleep 1000", wires)


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["holder", "leash", "command"])
def test_leash_kills_all_descendants(victim: int) -> None:
    """All processes are ended, even without a chance to report, and even one in a session of its own."""
    program = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    script = "setsid sleep 1000 & echo; exec sleep 1000"
    reader, writer = os.pipe()
    holder = subprocess.Popen([sys.executable, "-c", program, *rig.LEASH, "sh", "-c", script], stdout=writer)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as output:
        assert output.readline() == b"\n"
        os.kill(list(rig_starvation.find_family(holder.pid, rig_starvation.PROC))[victim], signal.SIGKILL)
        # Whoever lives has the other end of the pipe.
        ended, _, _ = select.select([output], [], [], 10)
        assert ended
        assert output.read() == b""
    holder.wait()


def make_job(tmp_path: Path) -> rig.Job:
    """Return a job that would do nothing."""
    return rig.Job(("true",), tmp_path)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_rig_failed_machine_retried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """Once, not twice."""
    boots: list[int] = []

    def boot(*_arguments: object) -> rig.Outcome:
        boots.append(1)
        if len(boots) <= failures:
            raise rig.MachineError("not reached")
        return rig.Outcome(0, 1.0, 2.0)

    monkeypatch.setattr(rig, "boot", boot)
    monkeypatch.setattr(rig, "check_requirements", lambda: None)
    machine = machines.MACHINES["single"]
    if failures < 2:
        assert rig.run_in_vm(machine, KERNEL, make_job(tmp_path), print).exit_code == 0
    else:
        with pytest.raises(rig.MachineError):
            rig.run_in_vm(machine, KERNEL, make_job(tmp_path), print)
    assert len(boots) == min(failures + 1, 2)


def test_rig_failed_command_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that hangs would hang again."""
    boots: list[int] = []

    def boot(*_arguments: object) -> rig.Outcome:
        boots.append(1)
        raise rig.BootError("the hard limit was reached")

    monkeypatch.setattr(rig, "boot", boot)
    monkeypatch.setattr(rig, "check_requirements", lambda: None)
    with pytest.raises(rig.BootError):
        rig.run_in_vm(machines.MACHINES["single"], KERNEL, make_job(tmp_path), print)
    assert len(boots) == 1


def test_rig_missing_program_names_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the command that installs it."""
    monkeypatch.setattr("shutil.which", lambda *_arguments, **_named: None)
    with pytest.raises(provision.MissingError, match="apt-get install --no-install-recommends qemu-system-x86"):
        rig.check_requirements()


@pytest.mark.parametrize("machine", machines.MACHINES.values(), ids=list(machines.MACHINES))
def test_rig_duplicate_device_name_refused(machine: machines.Machine, tmp_path: Path) -> None:
    """QEMU refuses a second device with one id; its firmware stops at the tenth port with a NIC."""
    board = Board(tmp_path)
    machine.plug(board)
    words = [word for argument in board.arguments for word in argument.split(",")]
    names = [word for word in words if word.startswith("id=")]
    assert len(names) == len(set(names))
    assert board.take_number("port") <= 10


@pytest.mark.parametrize("machine", machines.MACHINES.values(), ids=list(machines.MACHINES))
def test_rig_iommu_only_on_request(machine: machines.Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device and kernel argument go together; emulation unless asked for otherwise."""
    monkeypatch.delenv("RIG_ACCEL", raising=False)
    # Neither a disk nor an initramfs is made for a unit test.
    monkeypatch.setattr(systems, "make_initramfs", lambda *_: None)
    for name, system in systems.SYSTEMS.items():
        monkeypatch.setitem(systems.SYSTEMS, name, replace(system, ensure=lambda: tmp_path, busybox=lambda: tmp_path))
    command = rig.make_command(machine, KERNEL, make_job(tmp_path), Board(tmp_path))
    text = shlex.join(command)
    is_intel = machine.iommu == machines.INTEL_IOMMU
    assert ("-iommu" in text, "intel_iommu=on" in text) == (bool(machine.iommu.qemu), is_intel)
    assert ("iommu=smmuv3" in text) == (machine.iommu == machines.SMMU_IOMMU)
    if machine.system:
        assert command[command.index("-accel") + 1] == "tcg"
        return
    assert "--disable-kvm" in command
    monkeypatch.setenv("RIG_ACCEL", "kvm")
    assert "--disable-kvm" not in rig.make_command(machine, KERNEL, make_job(tmp_path), Board(tmp_path))


def test_relay_passes_qmp_commands(wires: tuple[Wire, Wire], tmp_path: Path) -> None:
    """The greeting is ours, what follows is inside's."""
    relay = Relay(*wires)
    inside, qemu = connect(wires[0], tmp_path / "control"), connect(wires[1], tmp_path / "qmp")
    with inside, qemu:
        relay.handle_qmp({"QMP": {}})
        assert read_line(qemu) == {"execute": "qmp_capabilities"}
        relay.handle_qmp({"return": {}})
        relay.handle_control({"execute": "device_del", "arguments": {"id": "x"}})
        assert read_line(qemu) == {"execute": "device_del", "arguments": {"id": "x"}}
        relay.handle_qmp({"error": {"desc": "no x"}})
        assert read_line(inside) == {"error": {"desc": "no x"}}


def test_relay_hands_out_each_event_once(wires: tuple[Wire, Wire], tmp_path: Path) -> None:
    """Past events count, and a second wait waits for a second event."""
    relay = Relay(*wires)
    with connect(wires[0], tmp_path / "control") as inside:
        gone = {"event": "DEVICE_DELETED", "data": {"device": "x"}}
        relay.handle_qmp({"event": "DEVICE_DELETED", "data": {"path": "/machine/x"}})
        relay.handle_qmp(gone)
        wish = {"wait": "DEVICE_DELETED", "match": {"device": "x"}}
        relay.handle_control(wish)
        assert read_line(inside) == {"event": gone}
        relay.handle_control(wish)
        assert relay.waiting == wish
        relay.handle_qmp(gone)
        assert read_line(inside) == {"event": gone}


def test_wire_joins_partial_lines(tmp_path: Path) -> None:
    """A message may come in pieces, two may come at once."""
    wire = Wire(tmp_path / "wire")
    with connect(wire, tmp_path / "wire") as other:
        other.sendall(b'{"up": true}\n{"ex')
        assert wire.receive() == [{"up": True}]
        other.sendall(b'it": 3}\n')
        assert wire.receive() == [{"exit": 3}]
    assert wire.receive() is None
    wire.close()


def test_rig_port_name_matches_inside() -> None:
    """inside.sh can't import it."""
    assert f"/dev/virtio-ports/{rig_control.PORT_NAME}" in rig.INSIDE.read_text()
