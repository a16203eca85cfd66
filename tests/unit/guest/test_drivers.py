# SPDX-License-Identifier: Apache-2.0
"""Binding and putting back on a made machine, where no kernel answers: the ways in which binding fails.

That binding succeeds is for the virtual machine to prove: there is nothing here that could bind.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from oci_hooks.findings import Finding, StepError
from oci_hooks.guest.access import preload_later_steps
from oci_hooks.guest.apply import drivers, permission, sysfs_writer
from oci_hooks.guest.apply.permission import Grant, Widening
from oci_hooks.guest.plan import Rebind
from oci_hooks.guest.undo_log import Entry, UndoLog, parse_undo_log
from oci_hooks.linux.instances import Instance, read_instance
from oci_hooks.linux.pci import PCI_DEVICES
from oci_hooks.system import Deadline
from tests.support.fake_guest import NIC, Machine

pytestmark = pytest.mark.unit

DEVICE = f"{PCI_DEVICES}/{NIC}"
NATIVE = Rebind(NIC, "e1000e", "")


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Machine:
    """Return a machine with one network card."""
    machine = Machine(tmp_path)
    machine.add(NIC, driver="e1000e", group="4")
    return machine


@pytest.fixture(name="journal")
def make_journal(tmp_path: Path) -> UndoLog:
    """Return an open undo log."""
    path = tmp_path / "journal"
    return UndoLog(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), str(path))


def read_entries(journal: UndoLog) -> list[Entry]:
    """Return what was noted."""
    return parse_undo_log(Path(journal.path).read_bytes())


def identify(machine: Machine, address: str) -> Instance:
    """Return which device is at an address."""
    return read_instance(machine.root, address) or Instance()


def bind(machine: Machine, journal: UndoLog, *rebinds: Rebind, seconds: float = 10) -> Finding:
    """Bind, which fails on this machine, and return the findings."""
    rebinds = tuple(rebind.replace(instance=identify(machine, rebind.address)) for rebind in rebinds or (NATIVE,))
    with pytest.raises(StepError) as caught:
        drivers.bind_devices(machine.root, rebinds, journal, Deadline(seconds), preload_later_steps)
    (finding,) = caught.value.findings
    assert finding.hint
    return finding


def note_bound(machine: Machine, driver: str, override: str) -> Entry:
    """Have the card look bound by the hook, and return the entry for it."""
    kind, *words = machine.note_bound(NIC, driver, override)
    return Entry(kind, tuple(words))


def undo(machine: Machine, entries: list[Entry], seconds: float = 10) -> list[Finding]:
    """Put back what these entries note."""
    return drivers.undo(machine.root, entries, 0, Deadline(seconds))


def test_bind_refused_by_driver_restores_override(machine: Machine, journal: UndoLog) -> None:
    finding = bind(machine, journal)
    assert (finding.code, finding.subject) == ("bind-failed", NIC)
    assert "vfio-pci did not bind to the device, which now is bound to e1000e" in finding.problem
    assert machine.read(f"{DEVICE}/driver_override") == "vfio-pci\n"
    assert machine.read("/sys/bus/pci/drivers/e1000e/unbind") == NIC
    assert machine.read("/sys/bus/pci/drivers_probe") == NIC
    entries = read_entries(journal)
    assert [entry.words[:3] for entry in entries] == [(NIC, "e1000e", "")]
    assert undo(machine, entries) == []
    assert machine.read(f"{DEVICE}/driver_override") == "\nfio-pci\n"  # a file keeps what an attribute does not


def test_bind_writes_undo_entry_first(machine: Machine, journal: UndoLog, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Entry]] = []

    def look(*_: object) -> list[sysfs_writer.Result]:
        seen.append(read_entries(journal))
        return [sysfs_writer.Result(NIC, errno.EIO, "x"), sysfs_writer.Result("0000:02:00.0", 0, "")]

    monkeypatch.setattr(drivers, "run_jobs", look)
    bind(machine, journal, Rebind(NIC, "e1000e", "x"), Rebind("0000:02:00.0", "", ""))
    assert [[entry.words[:3] for entry in entries] for entries in seen] == [
        [(NIC, "e1000e", "x"), ("0000:02:00.0", "", "")]
    ]


def test_bind_undo_log_unwritable_writes_nothing(machine: Machine) -> None:
    undo_log = UndoLog(os.open("/dev/full", os.O_WRONLY), "/dev/full")
    with pytest.raises(OSError, match="No space"):
        drivers.bind_devices(machine.root, (Rebind(NIC, "e1000e", ""),), undo_log, Deadline(10), preload_later_steps)
    assert machine.read(f"{DEVICE}/driver_override") == "(null)\n"


def test_probe_busy_retried_until_limit(machine: Machine, journal: UndoLog) -> None:
    machine.place(f"{DEVICE}/driver").unlink()
    finding = bind(machine, journal, Rebind(NIC, "", ""))
    assert finding.code == "bind-failed"
    assert "which now has no driver" in finding.problem


def test_probe_without_tenacity_retried_once(
    machine: Machine, journal: UndoLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tenacity", None)
    machine.place(f"{DEVICE}/driver").unlink()
    finding = bind(machine, journal, Rebind(NIC, "", ""))
    assert finding.code == "bind-failed"
    assert "needs the package tenacity, which is not installed" in finding.problem
    assert "apt install python3-tenacity" in finding.hint


def test_bind_unplugged_device_fails(machine: Machine, journal: UndoLog) -> None:
    machine.place(DEVICE).unlink()
    assert bind(machine, journal).code == "device-gone"
    assert undo(machine, read_entries(journal)) == []


def test_bind_override_write_error_fails(machine: Machine, journal: UndoLog) -> None:
    machine.place(f"{DEVICE}/driver_override").unlink()
    machine.place(f"{DEVICE}/driver_override").mkdir()
    finding = bind(machine, journal)
    assert finding.code == "bind-failed"
    assert "driver_override: Is a directory" in finding.problem
    # That goes wrong when it is put back, too, and is not passed over because the driver is right: the claim stays.
    (left,) = undo(machine, read_entries(journal))
    assert (left.code, left.subject) == ("restore-unstarted", NIC)
    assert left.code in drivers.UNFINISHED
    assert left.hint


def test_unbind_blocked_fails_at_deadline(machine: Machine, journal: UndoLog) -> None:
    unbind = machine.place("/sys/bus/pci/drivers/e1000e/unbind")
    unbind.unlink()
    os.mkfifo(unbind)
    finding = bind(machine, journal, seconds=0.3)
    assert (finding.code, finding.subject) == ("unbind-blocked", NIC)
    assert "from e1000e did not complete within 0.3 s" in finding.problem
    # It has its driver still; only the override is to be put back.
    assert undo(machine, read_entries(journal)) == []


def test_restore_unbind_blocked_reported(machine: Machine) -> None:
    unbind = machine.place("/sys/bus/pci/drivers/e1000e/unbind")
    unbind.unlink()
    os.mkfifo(unbind)
    (finding,) = undo(machine, [note_bound(machine, "igb", "")], seconds=0.3)
    assert finding.code == "unbind-blocked"
    assert finding.code in drivers.UNFINISHED
    assert finding.hint


def test_restore_without_process_reported_and_retryable(
    machine: Machine, journal: UndoLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    finding = bind(machine, journal)
    assert finding.code == "bind-failed"
    assert "cannot start the helper process that binds the driver: Resource temporarily unavailable" in finding.problem
    (left,) = undo(machine, [note_bound(machine, "igb", "")])
    assert left.code == "restore-unstarted"
    assert left.code in drivers.UNFINISHED
    assert left.hint


@pytest.mark.parametrize(
    ("driver", "problem", "hint"),
    [
        ("igb", "could not restore driver igb; the device is bound to e1000e", f"driverctl set-override {NIC} igb"),
        (
            "",
            "could not restore its earlier state, no driver; the device is bound to e1000e",
            f"echo {NIC} > {DEVICE}/driver/unbind",
        ),
    ],
)
def test_restore_driver_missing_reported(machine: Machine, driver: str, problem: str, hint: str) -> None:
    (finding,) = undo(machine, [note_bound(machine, driver, "before")])
    assert finding.code == "restore-failed"
    assert problem in finding.problem
    assert hint in finding.hint
    assert finding.code not in drivers.UNFINISHED
    # The override is put back all the same.
    assert machine.read(f"{DEVICE}/driver_override").startswith("before\n")


def test_restore_uses_first_entry_of_device(machine: Machine) -> None:
    entries = [note_bound(machine, "e1000e", "first"), note_bound(machine, "vfio-pci", "second")]
    assert undo(machine, entries) == []
    assert machine.read(f"{DEVICE}/driver_override").startswith("first\n")


def test_undo_continues_after_failed_entry(machine: Machine) -> None:
    machine.write(f"{DEVICE}/driver_override", "vfio-pci\n")
    machine.place("/dev/vfio").mkdir(parents=True)
    spoilt = Entry("node", (str(machine.top), "vfio/1", "zz", "0"))
    entries = [note_bound(machine, "e1000e", "x"), spoilt, Entry("done", ())]
    (finding,) = undo(machine, entries)
    assert finding.code == "undo-failed"
    assert finding.hint
    assert machine.read(f"{DEVICE}/driver_override").startswith("x\n")


def test_bind_leaves_real_sysfs_alone(machine: Machine, journal: UndoLog, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    real = sysfs_writer.run_jobs

    def see(jobs: list[sysfs_writer.Job], *more: object) -> list[sysfs_writer.Result]:
        paths.extend(write.path for job in jobs for write in job.writes)
        return real(jobs, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(drivers, "run_jobs", see)
    bind(machine, journal)
    undo(machine, [note_bound(machine, "igb", "")])
    assert len(paths) > 6
    assert all(path.startswith(f"{machine.top}/sys/") for path in paths)


def test_grant_round_trips_through_undo_log(journal: UndoLog) -> None:
    for grant in (
        Grant(
            ((10, 196), (244, 0)),
            "/sys/fs/cgroup/a b",
            (Widening("/x/a pod", ("rw", "")), Widening("/x/a pod/c", ("r", "rw"))),
        ),
        Grant(((10, 196),), "", ()),
    ):
        journal.add("permit", *permission.format_grant(grant))
        assert permission.parse_grant(read_entries(journal)[-1]) == grant
