# SPDX-License-Identifier: Apache-2.0
"""on_failure = "kill": whatever ends the hook without a result, the container's init is killed, and a log has why.

Processes, signals and the pipes are real, on a machine that is made (tests/support/fake_kernel.py).
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from oci_hooks import log, oci
from oci_hooks.guest.apply import guard as guard_module
from oci_hooks.guest.apply.guard import Guard
from oci_hooks.system import Root
from tests.support import fault_injection
from tests.support.fake_kernel import CHANGING, ActingMachine, Container
from tests.support.fault_injection import Steps

pytestmark = pytest.mark.unit

SETTINGS = "/etc/oci-vfio-hooks/guest.toml"
DEVICE = "0000:01:00.0"
LIMIT = 20.0
Prepare = Callable[[], None]


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Iterator[ActingMachine]:
    """Return a machine whose guest.toml has the container killed."""
    machine = ActingMachine(tmp_path)
    machine.write(SETTINGS, 'on_failure = "kill"\n')
    yield machine
    machine.end()


@pytest.fixture(name="container")
def make_container(machine: ActingMachine) -> Container:
    """Return a container that asks for a device."""
    return machine.make_container("c1", DEVICE)


def keep_log(machine: ActingMachine, *prepare: Prepare) -> Prepare:
    """Have a hook's kernel log go to a file, then do the rest."""
    path = machine.place("/kmsg")
    path.write_text("")

    def write(_program: str, level: str, line: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.pwrite(fd, f"{level}: {line}\n".encode(), 0)
        os.close(fd)

    def keep() -> None:
        setattr(log, "write_kmsg", write)  # noqa: B010
        for preparation in prepare:
            preparation()

    return keep


def call(machine: ActingMachine, container: Container, prepare: Prepare) -> tuple[int, str, list[str]]:
    """Run the hook until nothing of it is left; return its exit code, what it said, and the kernel log's lines."""
    with fault_injection.orphans_are_ours():
        known = fault_injection.list_children()
        code, output = machine.call(container.state, prepare=keep_log(machine, prepare))
        for child in fault_injection.list_children() - known:
            os.waitpid(child, 0)
    return code, output, machine.read("/kmsg").splitlines()


def has_been_killed(container: Container) -> bool:
    """Wait until a container's init has ended, and return whether it was killed."""
    return container.init.wait(LIMIT) == -signal.SIGKILL


@pytest.mark.parametrize("nth", [0, 1, 6, 12, 24])
@pytest.mark.parametrize("act", [fault_injection.kill_alone, fault_injection.kill_all, fault_injection.terminate])
def test_hook_ended_at_step_container_killed(
    machine: ActingMachine, container: Container, nth: int, act: Callable[[Steps], None]
) -> None:
    """By its pid, as Kata's agent does it, or with all of its process group; or told to end."""
    before = machine.take_stock()
    ending = Steps(nth, act, CHANGING)
    code, output, lines = call(machine, container, ending.prepare)
    assert ending.has_fired
    assert has_been_killed(container)
    if code < 0:
        assert len(lines) == 1
        assert "error: container c1: error: [hook-killed] the hook: was killed before it had finished; " in lines[0]
        assert "init was killed too" in lines[0]
    else:
        # It has put everything back itself, and said so.
        assert act is fault_injection.terminate
        assert "[interrupted]" in output
        assert "hook-killed" not in "".join(lines)
    machine.kernel.wait()
    assert machine.call(container.stopped, "poststop") == (0, "")
    assert machine.take_stock() == before


def test_hook_killed_container_lives_by_default(machine: ActingMachine, container: Container) -> None:
    machine.write(SETTINGS, 'on_failure = "report"\n')
    killing = Steps(9, fault_injection.kill_alone, CHANGING)
    code, _, lines = call(machine, container, killing.prepare)
    assert (code, lines) == (-signal.SIGKILL, [])
    with pytest.raises(subprocess.TimeoutExpired):
        container.init.wait(0.2)


def test_hook_done_guard_gone(machine: ActingMachine, container: Container) -> None:
    """It is gone before the hook is, so that nobody has to wait for it or to reap it."""
    with fault_injection.orphans_are_ours():
        known = fault_injection.list_children()
        assert machine.call(container.state, prepare=keep_log(machine)) == (0, "")
        assert fault_injection.list_children() == known
    assert machine.list_claims() == ["c1"]
    assert machine.read("/kmsg") == ""
    with pytest.raises(subprocess.TimeoutExpired):
        container.init.wait(0.2)


def test_hook_refuses_guard_silent(machine: ActingMachine) -> None:
    """The hook has its own words, and kills the container itself."""
    container = machine.make_container("c1", "0000:01:00.0,nonsense")
    code, output, lines = call(machine, container, lambda: None)
    assert code == 2
    assert has_been_killed(container)
    assert machine.call(machine.make_container("c2", DEVICE).state)[0] == 0
    container = machine.make_container("c3", DEVICE)
    code, output, lines = call(machine, container, lambda: None)
    assert code == 1
    assert "error: [claimed]" in output
    assert has_been_killed(container)
    assert "hook-killed" not in "".join(lines)


def test_hook_interrupted_by_terminal_container_killed(machine: ActingMachine, container: Container) -> None:
    """Before the first change SIGINT is Python's own KeyboardInterrupt, which is no Exception."""
    interrupting = Steps(1, lambda steps: os.kill(steps.leader, signal.SIGINT), CHANGING)
    code, output, lines = call(machine, container, interrupting.prepare)
    assert code == 1
    assert "[interrupted] the hook: interrupted by SIGINT" in output
    assert has_been_killed(container)
    assert "hook-killed" not in "".join(lines)


def list_processes_of(parent: int) -> list[int]:
    """Return the children of a process."""
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_guard_keeps_nobody_waiting(machine: ActingMachine, container: Container) -> None:
    """The runtime reads the hook's output to its end; locks and claims are the hook's; a group's kill is not for it."""
    stopping = Steps(9, lambda steps: os.kill(steps.leader, signal.SIGSTOP), CHANGING)
    with fault_injection.orphans_are_ours():
        hook = machine.start(container.state, prepare=keep_log(machine, stopping.prepare))
        assert os.WIFSTOPPED(os.waitpid(hook.pid, os.WUNTRACED)[1])
        (guard,) = (pid for pid in list_processes_of(hook.pid) if os.getsid(pid) == pid)
        files = {path.name: os.readlink(path) for path in Path(f"/proc/{guard}/fd").iterdir()}
        assert [files[fd] for fd in "012"] == ["/dev/null"] * 3
        assert not [path for path in files.values() if "oci-vfio-hooks" in path]
        assert os.getpgid(guard) == guard
        os.killpg(os.getpgid(hook.pid), signal.SIGKILL)
        assert hook.finish()[0] == -signal.SIGKILL
        assert has_been_killed(container)
        assert os.waitpid(guard, 0) == (guard, 0)


def test_guard_killed_before_hook(machine: ActingMachine, container: Container) -> None:
    """Then it is as without one; and the hook goes on without it."""

    def kill_guard(steps: Steps) -> None:
        for pid in list_processes_of(steps.leader):
            if os.getsid(pid) == pid:
                os.kill(pid, signal.SIGKILL)

    killing = Steps(9, kill_guard, CHANGING)
    assert call(machine, container, killing.prepare)[:2] == (0, "")
    assert killing.has_fired
    assert container.init.poll() is None


def test_guard_init_gone_nobody_else_killed(machine: ActingMachine, container: Container) -> None:
    """The init's number may be another process's by then: the guard has the process, not the number."""

    def end_init(steps: Steps) -> None:
        container.init.kill()
        os.kill(steps.leader, signal.SIGKILL)

    # The hook's process is no parent of it and can't reap it: a zombie, as under a runtime that is slow to do so.
    code, _, lines = call(machine, container, Steps(9, end_init, CHANGING).prepare)
    assert code == -signal.SIGKILL
    assert len(lines) == 1
    assert has_been_killed(container)


def test_guard_reaped_init_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(guard_module, "log_findings", lambda *words, **_: lines.extend(f.as_line() for f in words[2]))
    with subprocess.Popen(["/bin/sleep", "3600"]) as init:
        descriptor = os.pidfd_open(init.pid)
        init.kill()
    hook = subprocess.Popen(["/bin/true"])
    reader, writer = os.pipe()
    monkeypatch.setattr(os, "setsid", lambda: None)
    state = oci.State("c1", str(tmp_path), init.pid, "created", {})
    Guard(Root(), "a-hook", state).watch(os.pidfd_open(hook.pid), descriptor, writer)
    assert hook.wait() == 0
    assert os.read(reader, 2) == b"."
    assert "init had ended already" in lines[0]
    for fd in (reader, writer, descriptor):
        os.close(fd)


def test_hook_killed_before_guard_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads that the guard is in place: it is all the more needed."""
    monkeypatch.setattr(guard_module, "log_findings", lambda *_, **__: None)
    monkeypatch.setattr(os, "setsid", lambda: None)
    with subprocess.Popen(["/bin/true"]) as hook:
        ended = os.pidfd_open(hook.pid)
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(["/bin/sleep", "3600"]) as init:
        alive = os.pidfd_open(init.pid)
        Guard(Root(), "a-hook", oci.State("c1", str(tmp_path), init.pid, "created", {})).watch(ended, alive, writer)
        assert init.wait(LIMIT) == -signal.SIGKILL
    for fd in (writer, ended, alive):
        os.close(fd)


def test_guard_without_right_to_kill_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    lines: list[str] = []
    monkeypatch.setattr(guard_module, "log_findings", lambda *words, **_: lines.extend(f.as_line() for f in words[2]))
    monkeypatch.setattr("oci_hooks.guest.apply.guard.signal.pidfd_send_signal", refuse)
    monkeypatch.setattr(os, "setsid", lambda: None)
    with subprocess.Popen(["/bin/true"]) as hook:
        descriptor = os.pidfd_open(hook.pid)
    state = oci.State("c1", str(tmp_path), 4194304, "created", {})
    with open(os.devnull, "wb") as nothing:
        Guard(Root(), "a-hook", state).watch(descriptor, descriptor, nothing.fileno())
    os.close(descriptor)
    assert "init cannot be killed: Operation not permitted" in lines[0]


@pytest.mark.parametrize("pid", [0, 1, 4194304])
def test_guard_needs_a_running_init(pid: int) -> None:
    guard = Guard(Root(), "a-hook", oci.State("c1", "/b", pid, "created", {}))
    guard.start()
    assert guard.child is None
    guard.end()


def refuse(name: str, code: int) -> Prepare:
    """Have a function of os fail."""

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    return lambda: setattr(os, name, fail)


@pytest.mark.parametrize(
    "prepare",
    [
        refuse("pidfd_open", errno.ENOSYS),
        lambda: delattr(os, "pidfd_open"),
        lambda: setattr(Guard, "watch", lambda *_: os._exit(1)),
    ],
    ids=["old-kernel", "old-python", "guard-died"],
)
def test_guard_not_to_be_had_warning(machine: ActingMachine, container: Container, prepare: Prepare) -> None:
    """The container gets its devices all the same."""
    code, output, _ = call(machine, container, prepare)
    assert code == 0
    (line,) = output.splitlines()
    assert "warning: [guard-unstarted] the hook: cannot start the process that ends the container" in line
    assert machine.list_claims() == ["c1"]
    assert container.init.poll() is None
