# SPDX-License-Identifier: Apache-2.0
"""Faults at every step of the guest hook: kill -9, a signal, an error of the system, a device or a container that goes.

The steps are counted, not listed: a new one is hit without a line here. Whatever happens, the hook ends in words, and
what it did is put back by it, by the release, or by the next hook. tests/vm/test_guest_kill.py does it to real devices.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from oci_hooks.guest.apply import proof
from tests.support import fault_injection
from tests.support.fake_kernel import CHANGING, NATIVE, STEPS, ActingMachine, Container, answer_open
from tests.support.fault_injection import Steps

pytestmark = pytest.mark.unit

GROUP = ("0000:01:00.0", "0000:01:00.1")
# The host's nodes, one of which has the name of the guest's group.
STALE = [{"path": f"/dev/vfio/{name}", "type": "c", "major": 244, "minor": 3} for name in ("77", "1")]
# The first write to sysfs is that of an override.
OVERRIDE = {"oci_hooks.guest.apply.sysfs_writer": ("write_attribute",)}
CLONE_NEWNS = 0x20000
MS_PRIVATE, MS_REC, MS_RDONLY, MS_REMOUNT = 1 << 18, 1 << 14, 1, 32
Act = Callable[[Steps], None]
# The run of CI is shortened: by turns one of these happens at a step. OCI_VFIO_FULL=1: each of them at each step.
FULL = bool(os.environ.get("OCI_VFIO_FULL"))
KILLS: list[Act] = [fault_injection.kill_all, fault_injection.kill_alone]
ERRORS: list[Act] = [
    fault_injection.fail_with(code) for code in (errno.ENOSPC, errno.EMFILE, errno.EIO, errno.EAGAIN, errno.EROFS)
]
Note = Callable[[str, object], None]


def by_turns(acts: list[Act]) -> list[Act]:
    """Return the events of one test each: all of them, or one that is another at each step."""
    return acts if FULL else [lambda happening: acts[happening.nth % len(acts)](happening)]


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Iterator[ActingMachine]:
    """Return a machine with a group of two functions, and another group."""
    machine = ActingMachine(tmp_path, groups=2)
    yield machine
    machine.end()


@pytest.fixture(name="container")
def make_container(machine: ActingMachine) -> Container:
    """Return a container that asks for a group, and has nodes with the host's numbers."""
    container = machine.make_container("c1", GROUP[0], linux={"devices": STALE})
    (container.dev / "vfio").mkdir()
    make_stale(container)
    return container


def make_stale(container: Container) -> None:
    """Make the nodes that the runtime makes of linux.devices."""
    for entry in STALE:
        os.mknod(f"{container.dev.parent}{entry['path']}", 0o20640, os.makedev(244, 3))


def check_words(code: int, said: str, at: object) -> None:
    """Check that a hook ended as it should: done, or refused with a finding, and with no defect of its own."""
    assert code in (0, 1, 2), (at, code, said)
    assert "Traceback" not in said, (at, said)
    assert "[internal]" not in said, (at, said)
    assert code == 0 or "error: [" in said, (at, said)


def sweep(
    machine: ActingMachine,
    state: dict[str, Any],
    act: Act,
    *arguments: str,
    wrapped: dict[str, tuple[str, ...]] = CHANGING,
) -> Iterator[tuple[int, int, str]]:
    """Run the hook with something happening at its first step, its second and so on, as long as it has so many.

    Yields the number of the step, the exit code and the output. Between two runs the caller restores the state.
    """
    nth = 0
    while True:
        happening = Steps(nth, act, wrapped)
        with fault_injection.orphans_are_ours():
            code, output = machine.call(state, *arguments, prepare=happening.prepare)
            happening.wait_for_children()
            machine.kernel.wait()
        if not happening.has_fired:
            assert code == 0, (nth, output)
            return
        yield nth, code, output
        nth += 1


def test_nodes_owned_by_root_of_joined_user_namespace(machine: ActingMachine) -> None:
    """Nobody in the container could open them else."""
    config = {"linux": {"namespaces": [{"type": "user", "path": "/proc/1/ns/user"}]}}
    container = machine.make_container("c1", GROUP[0], **config)
    for kind in ("uid", "gid"):
        machine.write(f"/proc/{container.init.pid}/{kind}_map", "0 100000 65536\n")
    code, output = machine.call(container.state, "--dry-run")
    assert code == 0
    assert "mount /dev/vfio/1: 0600 100000:100000" in output.splitlines()


# Killed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", by_turns(KILLS))
def test_bind_killed_at_every_step(
    machine: ActingMachine, container: Container, kill: Act, record_property: Note
) -> None:
    """By turns the release comes next, the same container's hook again, or another container's."""
    other = machine.make_container("c2", "0000:02:00.0")
    before = machine.take_stock()
    count = 0
    for nth, code, output in sweep(machine, container.state, kill):
        assert code == -signal.SIGKILL, (nth, output)
        if nth % 3 == 0:
            assert machine.call(container.stopped, "poststop") == (0, ""), nth
        elif nth % 3 == 1:
            assert machine.call(container.state) == (0, ""), nth
            assert machine.list_claims() == ["c1"]
            assert machine.call(container.stopped, "poststop") == (0, ""), nth
        else:
            # It asks for another group, and looks after what others left.
            assert machine.call(other.state) == (0, ""), nth
            assert machine.list_claims() == ["c2"], nth
            assert machine.call(other.stopped, "poststop") == (0, "")
        assert machine.take_stock() == before, nth
        count += 1
    assert count > 25
    assert machine.list_claims() == ["c1"]
    record_property("faults", count)


@pytest.mark.parametrize("kill", by_turns(KILLS))
def test_release_killed_at_every_step(
    machine: ActingMachine, container: Container, kill: Act, record_property: Note
) -> None:
    before = machine.take_stock()
    count = 0
    assert machine.call(container.state) == (0, "")
    for nth, code, output in sweep(machine, container.stopped, kill, "poststop"):
        assert code == -signal.SIGKILL, (nth, output)
        assert machine.call(container.stopped, "poststop") == (0, ""), nth
        assert machine.take_stock() == before, nth
        assert machine.call(container.state) == (0, ""), nth
        count += 1
    assert count > 10
    assert machine.take_stock() == before
    record_property("faults", count)


def test_bind_sigterm_at_every_step(machine: ActingMachine, container: Container, record_property: Note) -> None:
    """From the first change on the hook puts everything back itself; before, the signal ends it."""
    before = machine.take_stock()
    count = reported = 0
    for nth, code, output in sweep(machine, container.state, fault_injection.terminate):
        if code == 1:
            assert "[interrupted] the hook: was ended by SIGTERM" in output
            reported += 1
        elif code == 0:
            # It was at its last words.
            assert machine.list_claims() == ["c1"]
            assert machine.call(container.stopped, "poststop") == (0, "")
        else:
            assert code == -signal.SIGTERM, (nth, output)
            assert machine.take_stock()["drivers"] == before["drivers"]
            assert machine.call(container.stopped, "poststop") == (0, "")
        assert machine.take_stock() == before, nth
        count += 1
    assert reported > 15
    record_property("faults", count)


def test_release_dry_run_changes_nothing(machine: ActingMachine, container: Container) -> None:
    assert machine.call(container.stopped, "poststop", "--dry-run") == (0, "")
    assert machine.call(container.state) == (0, "")
    bound = machine.take_stock()
    for state, arguments in ((container.stopped, ()), (container.state, ("poststop",))):
        code, output = machine.call(state, "--dry-run", *arguments)
        assert (code, machine.take_stock()) == (0, bound)
        lines = output.splitlines()
        assert lines[0].startswith(("remove /dev/vfio/devices.json: from the container at ", "remove /dev/vfio/1: "))
        assert f"restore {GROUP[0]}: driver {NATIVE}, driver_override unset" in lines
        assert {line.split()[0] for line in lines} <= {"remove", "create", "restore", "revoke"}


# Errors of the system ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail", by_turns(ERRORS))
def test_bind_error_at_every_step(
    machine: ActingMachine, container: Container, fail: Act, record_property: Note
) -> None:
    before = machine.take_stock()
    count = failed = 0
    for nth, end, output in sweep(machine, container.state, fail, wrapped=STEPS):
        check_words(end, output, nth)
        if end == 0:
            # A log, or what is tried again: nothing is lacking.
            assert machine.list_claims() == ["c1"], nth
            assert set(machine.take_stock()["nodes"]["c1"]) == {"vfio", "vfio/vfio", "vfio/1", "vfio/devices.json"}, nth
            assert machine.call(container.stopped, "poststop") == (0, ""), nth
        failed += end > 0
        assert machine.take_stock() == before, (nth, output)
        count += 1
    assert failed > 20
    record_property("faults", count)


@pytest.mark.parametrize("fail", by_turns(ERRORS))
def test_release_error_at_every_step(
    machine: ActingMachine, container: Container, fail: Act, record_property: Note
) -> None:
    before = machine.take_stock()
    count = 0
    assert machine.call(container.state) == (0, "")
    for nth, end, output in sweep(machine, container.stopped, fail, "poststop", wrapped=STEPS):
        check_words(end, output, nth)
        # A change whose undo failed is undone the second time, or it was reported.
        again, _ = machine.call(container.stopped, "poststop")
        assert again == 0
        after = machine.take_stock()
        assert after["claims"] == []
        if after != before:
            assert end == 1 and any(word in output for word in ("[undo-failed]", "[restore-failed]")), (nth, output)
            mend(machine, container)
        assert machine.take_stock() == before, nth
        assert machine.call(container.state) == (0, ""), nth
        count += 1
    assert count > 10
    record_property("faults", count)


def mend(machine: ActingMachine, container: Container) -> None:
    """Put back by hand what a release could not."""
    mend_drivers(machine)
    for path in (container.dev / "vfio").iterdir():
        path.unlink()
    make_stale(container)


def mend_drivers(machine: ActingMachine) -> None:
    """Give the group back to its driver."""
    for address in GROUP:
        machine.kernel.write(machine.place(f"/sys/bus/pci/devices/{address}/driver_override"), "\n")
        machine.kernel.unbind(address)
        machine.kernel.probe(address)


# What goes away meanwhile --------------------------------------------------------------------------------------------


def test_bind_device_unplugged_at_every_step(tmp_path: Path, record_property: Note) -> None:
    count = 0
    while True:
        machine = ActingMachine(tmp_path / str(count), groups=2)
        container = machine.make_container("c1", GROUP[0])
        drivers = machine.take_stock()["drivers"]
        address = GROUP[count % 2]
        happening = Steps(count, lambda _, gone=address, at=machine: at.unplug(gone), CHANGING)  # type: ignore[misc]
        with fault_injection.orphans_are_ours():
            code, output = machine.call(container.state, prepare=happening.prepare)
            # One of its children may be what unplugs, and take longer on a busy machine than the hook waits for it.
            happening.wait_for_children()
        check_words(code, output, count)
        again, output = machine.call(container.stopped, "poststop")
        check_words(again, output, count)
        if happening.has_fired:
            del drivers[address]
        after = machine.take_stock()
        assert (after["drivers"], after["claims"], after["nodes"]) == (drivers, [], {"c1": {}}), (count, output)
        machine.end()
        if not happening.has_fired:
            break
        count += 1
    assert count > 25
    record_property("faults", count)


def test_bind_container_dies_at_every_step(machine: ActingMachine, record_property: Note) -> None:
    """Its claim is nobody's then: its hook, or the next one, puts the devices back."""
    drivers = machine.take_stock()["drivers"]
    count = 0
    while True:
        container = machine.make_container(f"c{count}", GROUP[0])
        happening = Steps(count, lambda _, dead=container: os.kill(dead.init.pid, 9), CHANGING)  # type: ignore[misc]
        code, output = machine.call(container.state, prepare=happening.prepare)
        check_words(code, output, count)
        container.end()
        other = machine.make_container(f"other{count}", GROUP[1])
        assert machine.call(other.state) == (0, ""), count
        assert machine.list_claims() == [other.name]
        assert machine.call(other.stopped, "poststop") == (0, "")
        assert machine.take_stock()["drivers"] == drivers, count
        other.end()
        if not happening.has_fired:
            break
        count += 1
    assert count > 25
    record_property("faults", count)


def test_bind_dead_container_refused(machine: ActingMachine, container: Container) -> None:
    container.end()
    before = machine.take_stock()
    code, output = machine.call(container.state)
    assert (code, "[no-process]" in output) == (1, True)
    assert machine.take_stock() == before


def test_bind_refused_by_vfio(machine: ActingMachine, container: Container) -> None:
    before = machine.take_stock()
    for code in (errno.ENODEV, errno.EINVAL, errno.EBUSY, errno.EPERM, errno.ENOMEM):
        machine.kernel.refuses = lambda address, driver, why=code: why * (driver == "vfio-pci")  # type: ignore[misc]
        end, output = machine.call(container.state)
        assert (end, f"[bind-failed] {GROUP[0]}" in output) == (1, True), output
        assert machine.take_stock() == before


def test_bind_native_driver_probes_meanwhile(machine: ActingMachine, container: Container) -> None:
    """Hot plug: the kernel announces a device some milliseconds before its driver is bound."""
    for address in GROUP:
        machine.kernel.unbind(address)
    before = machine.take_stock()

    def give_to_driver(_: Steps) -> None:
        with machine.kernel.alone():
            for address in GROUP:
                machine.kernel.probe(address)

    happening = Steps(0, give_to_driver, OVERRIDE)
    assert machine.call(container.state, prepare=happening.prepare) == (0, "")
    assert happening.has_fired
    assert machine.take_stock()["drivers"][GROUP[1]] == ("vfio-pci", "vfio-pci\n")
    assert machine.call(container.stopped, "poststop") == (0, "")
    assert machine.take_stock() == before


def test_bind_open_group_busy_except_own_container(machine: ActingMachine, container: Container) -> None:
    def hold() -> None:
        busy = lambda directory, node, _: (errno.EBUSY, False) if node.is_group else answer_open(directory, node)  # noqa: E731
        setattr(proof, "verify_node", busy)  # noqa: B010

    before = machine.take_stock()
    code, output = machine.call(container.state, prepare=hold)
    assert (code, "[group-busy] /dev/vfio/vfio/1" in output or "[group-busy] /dev/vfio/1" in output) == (1, True), (
        output
    )
    assert machine.take_stock() == before
    assert machine.call(container.state) == (0, "")
    # Its program may have it open by now.
    assert machine.call(container.state, prepare=hold) == (0, "")
    assert machine.call(container.stopped, "poststop") == (0, "")
    assert machine.take_stock() == before


# Where the hook works ------------------------------------------------------------------------------------------------


def mount(place: Path, kind: str, flags: int = 0, options: str = "", source: Path = Path("x")) -> None:
    """Mount something here, in a mount namespace of this process's own."""
    library = ctypes.CDLL(None, use_errno=True)
    arguments = (os.fsencode(source), os.fsencode(place), kind.encode() or None, flags, options.encode() or None)
    if library.mount(*arguments):
        raise OSError(ctypes.get_errno(), "mount", str(place))


def leave_mounts() -> None:
    """Enter a mount namespace of this process's own: what is mounted there ends with it."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount(Path("/"), "", MS_PRIVATE | MS_REC)


def fill(place: Path, left: int) -> None:
    """Have a tmpfs of this many bytes of room."""
    mount(place, "tmpfs", options="size=64k")
    (place / "oci-vfio-hooks/claims").mkdir(0o700, parents=True)
    os.chmod(place / "oci-vfio-hooks", 0o700)
    (place / "filler").write_bytes(b"x" * (65536 - left))


def no_inodes(place: Path) -> None:
    """Have a tmpfs that takes a directory or two and no more."""
    mount(place, "tmpfs", options="nr_inodes=3")


def read_only(place: Path) -> None:
    """Have a read-only file system."""
    mount(place, "tmpfs")
    mount(place, "", MS_REMOUNT | MS_RDONLY)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda place: fill(place, 0), "No space left on device"),
        (no_inodes, "No space left on device"),
        (read_only, "Read-only file system"),
    ],
    ids=["full", "no-inodes", "read-only"],
)
def test_bind_run_read_only(
    machine: ActingMachine, container: Container, spoil: Callable[[Path], None], words: str
) -> None:
    before = machine.take_stock()

    def prepare() -> None:
        leave_mounts()
        spoil(machine.place("/run"))

    code, output = machine.call(container.state, prepare=prepare)
    check_words(code, output, words)
    assert (code, words in output) == (1, True), output
    assert machine.take_stock() == before


def test_bind_run_full_within_undo_log(machine: ActingMachine, record_property: Note) -> None:
    """A page is left, and the container's id takes most of it: each line of the log in turn is torn by the limit."""
    before = machine.take_stock()
    torn = 0
    for length in range(3500, 4100, 10):
        container = machine.make_container("c1", GROUP[0])

        def prepare() -> None:
            leave_mounts()
            fill(machine.place("/run"), 4096)

        code, output = machine.call({**container.state, "id": "x" * length}, prepare=prepare)
        check_words(code, output, length)
        if code == 0:
            # There was space enough; only the namespace with its undo log is gone.
            mend_drivers(machine)
        else:
            assert "No space left on device" in output
            assert container.list_dev() == {}, length
        assert machine.take_stock()["drivers"] == before["drivers"], (length, output)
        torn += code
        container.remove()
    assert torn > 20
    record_property("faults", torn)


def test_bind_without_run_directory(machine: ActingMachine, container: Container) -> None:
    machine.place("/run").rmdir()
    before = machine.take_stock()
    code, output = machine.call(container.state)
    assert (code, "No such file or directory" in output, "/run" in output) == (1, True, True), output
    assert machine.take_stock() == before


def test_release_truncated_undo_log(machine: ActingMachine, container: Container, record_property: Note) -> None:
    """The readable part of a truncated undo log is undone, and nothing else. Without an owner nothing is."""
    before = machine.take_stock()
    assert machine.call(container.state) == (0, "")
    undo_log = machine.place("/run/oci-vfio-hooks/claims/c1")
    whole = undo_log.read_bytes()
    ends = [at for at, byte in enumerate(whole, 1) if byte == ord("\n")]
    cuts = range(len(whole)) if FULL else sorted({0, *ends, *(end - 3 for end in ends)})
    for cut in cuts:
        undo_log.write_bytes(whole[:cut])
        code, output = machine.call(container.stopped, "poststop")
        check_words(code, output, cut)
        owned = cut > whole.index(b"\ngroup\t")
        assert (owned, machine.list_claims()) in ((True, []), (False, ["c1"])), (cut, output)
        assert owned or (code == 1 and f"[claim-unreadable] {undo_log}" in output), (cut, output)
        undo_log.unlink(missing_ok=True)
        known = whole[:cut].rpartition(b"\n")[0].count(b"\ndevice\t")
        left = [driver for driver, _ in machine.take_stock()["drivers"].values()].count("vfio-pci")
        assert left == 2 - known * owned, cut
        if machine.take_stock() != before:
            mend(machine, container)
        assert machine.take_stock() == before, cut
        assert machine.call(container.state) == (0, "")
    assert machine.call(container.stopped, "poststop") == (0, "")
    record_property("faults", len(cuts))


# Limits --------------------------------------------------------------------------------------------------------------


def test_bind_out_of_descriptors(machine: ActingMachine, container: Container, record_property: Note) -> None:
    before = machine.take_stock()
    ends = []
    for limit in range(3, 20):

        def prepare(maximum: int = limit) -> None:
            os.closerange(3, 256)
            resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, 1024))

        code, output = machine.call(container.state, prepare=prepare)
        check_words(code, output, limit)
        assert (machine.take_stock()["drivers"] == before["drivers"]) == (code != 0), (limit, output)
        assert machine.call(container.stopped, "poststop") == (0, ""), limit
        assert machine.take_stock() == before, (limit, output)
        ends.append(code)
    assert ends[0] != 0 and ends[-1] == 0
    record_property("faults", len(ends))


def test_bind_interrupted_system_calls(machine: ActingMachine, container: Container) -> None:
    """EINTR everywhere: a signal with a handler comes all the time, at every call of the system."""
    before = machine.take_stock()

    def prepare() -> None:
        signal.signal(signal.SIGPROF, lambda *_: None)
        signal.siginterrupt(signal.SIGPROF, True)
        signal.setitimer(signal.ITIMER_PROF, 0.0005, 0.0005)

    for _ in range(5):
        assert machine.call(container.state, prepare=prepare) == (0, "")
        assert machine.call(container.stopped, "poststop", prepare=prepare) == (0, "")
        assert machine.take_stock() == before
