# SPDX-License-Identifier: Apache-2.0
"""Claim, bind, put back, release on a made machine: what is left behind when it fails, is killed or is stuck."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from oci_hooks import oci
from oci_hooks.findings import Finding, HookError, Refusal
from oci_hooks.guest import binding, decision, selection, session
from oci_hooks.guest.apply import drivers, kill
from oci_hooks.guest.claims import STATE_DIRECTORY, Claim, ClaimDirectory, Owner
from oci_hooks.guest.request import read_request
from oci_hooks.guest.settings import GuestSettings
from oci_hooks.guest.signals import Interrupted, interruptible
from oci_hooks.guest.undo_log import UndoLog
from oci_hooks.linux import pci
from oci_hooks.linux.pci import PCI_DEVICES
from oci_hooks.program import Arguments, Run
from oci_hooks.system import Deadline, Root
from tests.support.fake_guest import NIC, Machine
from tests.unit.guest.test_claims import STAT, make_claim

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]
DEVICE = f"{PCI_DEVICES}/{NIC}"
INIT, START = 7, 70
OWNER = Owner("c1", INIT, START)
CGROUPS = "23 22 0:22 / /sys/fs/cgroup rw - cgroup2 none rw\n"


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Machine:
    """Return a machine with vfio, one network card in group 4, and a container's init."""
    machine = Machine(tmp_path)
    machine.add(NIC, driver="e1000e", group="4")
    machine.write("/sys/bus/pci/drivers/vfio-pci/bind")
    machine.write("/sys/module/vfio_iommu_type1/parameters/x")
    machine.write("/proc/self/mountinfo", f"22 1 0:21 / / rw - 9p root rw\n{CGROUPS}")
    machine.write("/proc/self/cgroup", "0::/hook\n")
    start_process(machine, INIT, START)
    machine.place("/run").mkdir()
    return machine


@pytest.fixture(name="directory")
def make_directory(machine: Machine) -> ClaimDirectory:
    """Return the machine's claims."""
    directory = ClaimDirectory(root=machine.root)
    directory.prepare()
    return directory


def start_process(machine: Machine, pid: int, start: int) -> None:
    """Add a process."""
    machine.write(f"/proc/{pid}/stat", STAT.format(pid=pid, state="S", start=start))
    machine.write(f"/proc/{pid}/cgroup", f"0::/c{pid}\n")


def end_process(machine: Machine, pid: int = INIT) -> None:
    """Have a process end."""
    shutil.rmtree(machine.place(f"/proc/{pid}"))


def make_run(machine: Machine, seconds: float = 5) -> Run:
    """Return a run of the hook."""
    return Run("vfio-guest-bind", Arguments(), Deadline(seconds), machine.root)


def make_state(container: str = "c1", pid: int = INIT, selector: str = NIC) -> oci.State:
    """Return the state of a container that asks for a device."""
    return oci.State(container, "/nowhere", pid, "created", {oci.DEVICES_ANNOTATION: selector})


def bind(machine: Machine, state: oci.State, run: Run | None = None) -> tuple[Run, HookError]:
    """Bind, which cannot succeed on this machine, and return the reported findings."""
    spec = oci.make_spec({}, "config.json")
    request = read_request(state, spec)
    run = run or make_run(machine)
    assert request is not None
    with pytest.raises(HookError) as caught:
        binding.bind(run, state, spec, request, GuestSettings())
    return run, caught.value


def list_claims(machine: Machine) -> list[str]:
    """Return the files of claims."""
    return sorted(os.listdir(machine.place(f"{STATE_DIRECTORY}/claims")))


def test_bind_failure_leaves_no_claim_override_descriptor(machine: Machine) -> None:
    before = len(os.listdir("/proc/self/fd"))
    _, error = bind(machine, make_state())
    assert [finding.code for finding in error.findings] == ["bind-failed"]
    assert list_claims(machine) == []
    assert machine.read(f"{DEVICE}/driver_override").startswith("\n")
    assert len(os.listdir("/proc/self/fd")) == before
    # The machine-wide lock is free.
    os.close(ClaimDirectory(root=machine.root).lock(Deadline(0.1)))


def test_bind_internal_error_rolls_back_and_reports(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(drivers, "bind_devices", fail)
    monkeypatch.setattr(drivers, "undo", lambda *_: [Finding("error", "restore-failed", NIC, "x", "y")])
    run, state = make_run(machine), make_state()
    spec = oci.make_spec({}, "config.json")
    request = read_request(state, spec)
    assert request is not None
    with pytest.raises(ZeroDivisionError):
        binding.bind(run, state, spec, request, GuestSettings())
    assert [finding.code for finding in run.findings] == ["restore-failed"]
    assert list_claims(machine) == []


def test_bind_without_process_refused(machine: Machine) -> None:
    # /proc/1 is the machine's init, where createContainer's state means the container's.
    start_process(machine, 1, 10)
    for pid, problem in ((0, "not running"), (8, "not running"), (1, "createContainer")):
        _, error = bind(machine, make_state(pid=pid))
        assert error.findings[0].code == "no-process"
        assert problem in error.findings[0].problem
        assert "createRuntime" in error.findings[0].hint
    assert not machine.place(STATE_DIRECTORY).exists()


NEW_MOUNTS, JOINED_MOUNTS = {"type": "mount"}, {"type": "mount", "path": "/proc/1/ns/mnt"}


@pytest.mark.parametrize(
    ("namespaces", "own", "inits", "explained"),
    [
        ([NEW_MOUNTS], 2, 2, True),
        ([{"type": "pid"}, NEW_MOUNTS], 2, 2, True),
        ([NEW_MOUNTS], 1, 2, False),
        ([NEW_MOUNTS], None, None, False),
        # Without a mount namespace of its own, the container has the runtime's.
        ([{"type": "pid"}], 1, 1, False),
        ([JOINED_MOUNTS], 1, 1, False),
        ([], 1, 1, False),
    ],
)
def test_bind_failure_in_containers_mount_namespace_explained(
    machine: Machine, namespaces: list[dict[str, str]], own: int | None, inits: int | None, explained: bool
) -> None:
    for name, number in (("self", own), (INIT, inits)):
        machine.place(f"/proc/{name}/ns").mkdir(parents=True)
        if number:
            machine.place(f"/proc/{name}/ns/mnt").symlink_to(f"mnt:[{number}]")
    state, spec = make_state(), oci.make_spec({"linux": {"namespaces": namespaces}}, "config.json")
    request = read_request(state, spec)
    assert request is not None
    with pytest.raises(HookError) as caught:
        binding.bind(make_run(machine), state, spec, request, GuestSettings())
    first, *rest = caught.value.findings
    assert (first.code == "no-process") == explained
    assert ("createRuntime" in first.hint) == explained
    assert not explained or rest


def test_bind_group_of_live_container_refused(machine: Machine, directory: ClaimDirectory) -> None:
    start_process(machine, 8, 80)
    make_claim(directory, "other", 8, 80)
    _, error = bind(machine, make_state())
    assert error.findings[0].code == "claimed"
    assert "container other" in error.findings[0].problem
    assert list_claims(machine) == ["other"]


@pytest.mark.parametrize("how", ["gone", "reused"])
def test_bind_group_of_ended_container_taken_over(machine: Machine, directory: ClaimDirectory, how: str) -> None:
    make_claim(directory, "other", 8, 80, machine.note_bound(NIC, "e1000e", "before"))
    if how == "reused":
        start_process(machine, 8, 81)
    _, error = bind(machine, make_state())
    assert error.findings[0].code == "bind-failed"
    assert list_claims(machine) == []


def test_repair_blocked_claim_keeps_group_and_time(machine: Machine, directory: ClaimDirectory) -> None:
    unbind = machine.place("/sys/bus/pci/drivers/e1000e/unbind")
    unbind.unlink()
    os.mkfifo(unbind)
    make_claim(directory, "other", 8, 80, machine.note_bound(NIC, "igb", ""))
    run, error = bind(machine, make_state(), make_run(machine, 3.0))
    assert [(finding.level, finding.code) for finding in run.findings] == [("warning", "unbind-blocked")]
    assert error.findings[0].code == "claimed"
    assert list_claims(machine) == ["other"]
    assert run.deadline.remaining() > 0.2


def test_repair_stale_claim_ignores_pid_releases_lock(
    machine: Machine, directory: ClaimDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pid may be another container's by now; and a child that hangs must not stop every hook on the machine."""
    start_process(machine, 8, 81)
    make_claim(directory, "other", 8, 80)
    seen = []

    def undo(
        _root: Root, _entries: object, pid: int, _deadline: Deadline, close_fds: tuple[int, ...] = ()
    ) -> list[Finding]:
        seen.append((pid, [os.readlink(f"/proc/self/fd/{fd}") for fd in close_fds]))
        return []

    monkeypatch.setattr(drivers, "undo", undo)
    bind(machine, make_state())
    assert seen == [(0, [f"{directory.path}/lock"]), (INIT, [])]


@pytest.mark.parametrize("pid", [0, 1])
def test_kill_container_pid_0_and_1_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch, pid: int) -> None:
    """0 is the hook's own process group, 1 this machine's init."""
    start_process(machine, pid, START)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("killed"))
    kill.kill_container(machine.root, make_state(pid=pid))


def test_wait_leaves_time_to_bind() -> None:
    assert decision.wait_for_event(cast(Any, None), Deadline(decision.BIND_SECONDS / 2)) == ""


def test_second_signal_is_ignored() -> None:
    """The undo is not interrupted by the next signal."""
    with pytest.raises(Interrupted, match="SIGTERM"), interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGHUP)
    for number in (signal.SIGTERM, signal.SIGHUP):
        assert signal.signal(number, signal.SIG_DFL) == signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_claim_same_id_live_container_refused(machine: Machine, directory: ClaimDirectory) -> None:
    start_process(machine, 8, 80)
    make_claim(directory, "c1", 8, 80)
    _, error = bind(machine, make_state())
    assert error.findings[0].code == "claimed"
    assert "process 8" in error.findings[0].problem
    assert list_claims(machine) == ["c1"]


def test_bind_second_run_failure_keeps_first_run(machine: Machine, directory: ClaimDirectory) -> None:
    path = make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "igb", "before"))
    first = Path(path).read_bytes()
    bind(machine, make_state())
    assert Path(path).read_bytes() == first


def test_bind_locked_undo_log_waited_for(
    machine: Machine, directory: ClaimDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "igb", "before"))
    first = Path(path).read_bytes()
    taken: list[int] = []
    real = ClaimDirectory.reopen_undo_log

    def take_first(self: ClaimDirectory, claim: Claim) -> UndoLog | None:
        """Let another hook of this container lock the undo log between the look and the reopening."""
        if not taken:
            taken.append(os.open(path, os.O_RDONLY))
            import fcntl

            fcntl.flock(taken[0], fcntl.LOCK_EX)
        return real(self, claim)

    monkeypatch.setattr(ClaimDirectory, "reopen_undo_log", take_first)
    _, error = bind(machine, make_state(), make_run(machine, 0.3))
    assert error.findings[0].code == "lock-timeout"
    assert Path(path).read_bytes() == first
    os.close(taken[0])


def test_release_is_idempotent(machine: Machine, directory: ClaimDirectory) -> None:
    make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "e1000e", "before"))
    end_process(machine)
    for _ in range(2):
        assert binding.release(machine.root, make_state(), Deadline(5)) == []
        assert list_claims(machine) == []
        assert machine.read(f"{DEVICE}/driver_override").startswith("before\n")


@pytest.mark.parametrize(("text", "seconds"), [("deadline = 20", 20), ("deadline = -1", 5), (None, 8)])
def test_release_uses_deadline_of_settings(
    machine: Machine, directory: ClaimDirectory, text: str | None, seconds: float
) -> None:
    """Settings that are wrong keep nothing from being put back."""
    make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "e1000e", "before"))
    end_process(machine)
    if text:
        machine.write("/etc/oci-vfio-hooks/guest.toml", text)
    deadline = Deadline(5)
    assert binding.release(machine.root, make_state(), deadline) == []
    assert (deadline.seconds, list_claims(machine)) == (seconds, [])


def test_release_blocked_keeps_claim(machine: Machine, directory: ClaimDirectory) -> None:
    machine.write("/etc/oci-vfio-hooks/guest.toml", "deadline = 0.2")
    unbind = machine.place("/sys/bus/pci/drivers/e1000e/unbind")
    unbind.unlink()
    os.mkfifo(unbind)
    make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "igb", ""))
    end_process(machine)
    (finding,) = binding.release(machine.root, make_state(), Deadline(0.2))
    assert finding.code == "unbind-blocked"
    assert list_claims(machine) == ["c1"]


def test_bind_device_unplugged_during_plan_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = selection.choose_groups

    def unplug(*arguments: object) -> object:
        choices: object = real(*arguments)
        machine.place(DEVICE).unlink()
        return choices

    monkeypatch.setattr(selection, "choose_groups", unplug)
    _, error = bind(machine, make_state())
    assert isinstance(error, Refusal)
    assert error.findings[0].code == "device-gone"
    assert error.findings[0].subject == NIC
    assert error.findings[0].hint
    assert list_claims(machine) == []


def test_wait_without_pyudev_reports_missing_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyudev", None)
    _, error = bind(machine, make_state(selector="0000:09:00.0"))
    assert [finding.code for finding in error.findings] == ["no-such-device", "no-pyudev"]


@pytest.fixture(name="hook")
def start_hook(machine: Machine) -> Iterator[subprocess.Popen[str]]:
    """Start a hook in a process of its own, whose unbind blocks."""
    unbind = machine.place("/sys/bus/pci/drivers/e1000e/unbind")
    unbind.unlink()
    os.mkfifo(unbind)
    program = f"""
import json, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from oci_hooks import oci
from oci_hooks.guest.apply import drivers
from oci_hooks.guest import binding
from oci_hooks.guest import selection
from oci_hooks.program import Arguments, Run
from oci_hooks.system import Deadline
from oci_hooks.findings import HookError
from oci_hooks.system import Root
from oci_hooks.guest.settings import GuestSettings
from oci_hooks.guest.request import read_request
root = Root({str(machine.top)!r})
state = oci.State("c1", "/nowhere", {INIT}, "created", {{oci.DEVICES_ANNOTATION: {NIC!r}}})
spec = oci.make_spec({{}}, "config.json")
run = Run("x", Arguments(), Deadline(20), root)
try:
    binding.bind(run, state, spec, read_request(state, spec), GuestSettings())
except HookError as error:
    print(json.dumps([finding.as_dict() for finding in error.findings]))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not machine.read(f"{DEVICE}/driver_override").startswith("vfio-pci") and time.monotonic() < deadline:
            time.sleep(0.02)
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_while_binding_rolls_back(machine: Machine, hook: subprocess.Popen[str], number: signal.Signals) -> None:
    hook.send_signal(number)
    reported, _ = hook.communicate(timeout=20)
    (finding,) = json.loads(reported)
    assert finding["code"] == "interrupted"
    assert number.name in finding["problem"]
    assert list_claims(machine) == []
    assert machine.read(f"{DEVICE}/driver_override").startswith("\n")


def test_repair_killed_hook_by_next_run(machine: Machine, hook: subprocess.Popen[str]) -> None:
    hook.kill()
    hook.wait(timeout=20)
    assert list_claims(machine) == ["c1"]
    # Its child still hangs, and has the undo log's lock.
    _, error = bind(machine, make_state("c2"), make_run(machine, 0.5))
    assert error.findings[0].code == "claimed"
    os.close(os.open(machine.place("/sys/bus/pci/drivers/e1000e/unbind"), os.O_RDONLY | os.O_NONBLOCK))
    time.sleep(0.3)
    end_process(machine)
    assert binding.release(machine.root, make_state(), Deadline(5)) == []
    assert list_claims(machine) == []
    assert machine.read(f"{DEVICE}/driver_override").startswith("\n")


# Without an IOMMU ----------------------------------------------------------------------------------------------------

BOUND, FREE = "0000:05:00.0", "0000:06:00.0"


@pytest.fixture(name="bare")
def make_bare_machine(tmp_path: Path) -> Machine:
    """Return a machine without an IOMMU: one network card bound to vfio-pci, so that it has a group, and one not."""
    machine = Machine(tmp_path)
    machine.add(BOUND, driver="vfio-pci", group="5")
    machine.add_group_node("noiommu-5", "511:5")
    machine.add(FREE, driver="e1000e")
    machine.write(pci.NOIOMMU_SWITCH, "Y\n")
    machine.write("/proc/self/mountinfo", "22 1 0:21 / / rw - 9p root rw\n")
    return machine


def choose(
    machine: Machine, selector: str = "", entry: str = "", *, owner: str = "", allowed: bool = True, **more: Any
) -> list[str]:
    """Return the groups of a container that asks so, while another one may have the bound device."""
    listed = {"path": entry, "type": "c", "major": 511, "minor": 5}
    spec = oci.make_spec({"linux": {"devices": [listed] if entry else []}, **more}, "config.json")
    state = make_state(selector=selector) if selector else oci.State("c1", "/nowhere", INIT, "created", {})
    request = read_request(state, spec)
    assert request is not None
    settings = GuestSettings(allow_noiommu=allowed)
    work = session.Session(make_run(machine), state, spec, request, settings, ClaimDirectory("/nowhere"), OWNER)
    held = [Claim(f"/nowhere/claims/{owner}", owner, 1, 1, (f"noiommu:{BOUND}",), (), True, False)] if owner else []
    return [chosen.group.name for chosen in decision.select_groups(work, held)]


@pytest.mark.parametrize("path", ["/dev/vfio/noiommu-5", "/dev/vfio/12"])
def test_noiommu_group_matched_by_device_number(bare: Machine, path: str) -> None:
    assert choose(bare, entry=path) == [f"noiommu:{BOUND}"]


def test_noiommu_group_name_same_when_bound(bare: Machine) -> None:
    assert choose(bare, "auto") == [f"noiommu:{BOUND}", f"noiommu:{FREE}"]
    assert choose(bare, BOUND) == [f"noiommu:{BOUND}"]
    # A claim of before it was bound holds.
    assert choose(bare, "auto", owner="c2") == [f"noiommu:{FREE}"]
    assert choose(bare, "auto", owner="c1") == [f"noiommu:{BOUND}", f"noiommu:{FREE}"]
    for asked in ((BOUND, ""), ("", "/dev/vfio/noiommu-5")):
        with pytest.raises(Refusal, match=r"\[claimed\].*container c2"):
            choose(bare, *asked, owner="c2")
    # Without the path, another container's numbers are the host's by accident.
    assert choose(bare, entry="/dev/vfio/12", owner="c2") == [f"noiommu:{FREE}"]


@pytest.mark.parametrize("asked", [(BOUND,), ("auto",), ("", "/dev/vfio/noiommu-5")])
def test_noiommu_device_needs_allow_noiommu(bare: Machine, asked: tuple[str, ...]) -> None:
    with pytest.raises(Refusal, match=r"\[viommu-off\] " + BOUND):
        choose(bare, *asked, allowed=False)
    bare.write(pci.NOIOMMU_SWITCH, "N\n")
    with pytest.raises(Refusal, match=r"\[viommu-off\] " + BOUND):
        choose(bare, *asked)


@pytest.mark.parametrize(
    ("table", "parameters", "advice"),
    [
        ("FACP", "ro", "set enable_iommu = true in [hypervisor.qemu]"),
        # Every arm64 machine has one.
        ("IORT", "ro", "-machine virt,iommu=smmuv3"),
        ("DMAR", "ro intel_iommu=sm_on", "boot the guest's kernel with intel_iommu=on: "),
        ("DMAR", "ro intel_iommu=on,sm_on", "use a guest kernel built with CONFIG_INTEL_IOMMU: "),
        ("DMAR", "ro intel_iommu=off intel_iommu=on", "use a guest kernel built with CONFIG_INTEL_IOMMU: "),
        ("DMAR", "ro intel_iommu=on iommu=off", "remove iommu=off from the guest kernel's parameters"),
        ("DMAR", "ro amd_iommu=off", "boot the guest's kernel with intel_iommu=on: "),
        ("IVRS", "ro amd_iommu=fullflush,off", "remove amd_iommu=fullflush,off from the guest kernel's parameters"),
        ("FACP", "ro iommu=off", "set enable_iommu = true in [hypervisor.qemu]"),
        ("DMAR", "ro intel_iommu=on", "use a guest kernel built with CONFIG_INTEL_IOMMU: "),
        ("DMAR", "ro intel_iommu=off", "remove intel_iommu=off from the guest kernel's parameters"),
        ("IVRS", "ro", "use a guest kernel built with CONFIG_AMD_IOMMU: "),
        ("VIOT", "ro", "use a guest kernel built with CONFIG_VIRTIO_IOMMU: "),
    ],
)
def test_unused_iommu_explained(tmp_path: Path, table: str, parameters: str, advice: str) -> None:
    machine = Machine(tmp_path)
    machine.add(FREE)
    machine.write(f"/sys/firmware/acpi/tables/{table}", "")
    machine.write("/proc/cmdline", parameters)
    for asked in (FREE, "auto"):
        with pytest.raises(Refusal) as caught:
            choose(machine, asked)
        (finding,) = caught.value.findings
        assert finding.code == "viommu-off"
        assert advice in finding.hint


@pytest.mark.parametrize("asked", [(BOUND,), ("auto",), ("", "/dev/vfio/noiommu-5")])
def test_noiommu_device_needs_rawio(bare: Machine, asked: tuple[str, ...]) -> None:
    """Refused before anything is bound: the kernel would not open it for this container."""
    sets = {name: ["CAP_SYS_RAWIO"] for name in ("bounding", "permitted")}
    assert f"noiommu:{BOUND}" in choose(bare, *asked, process={"capabilities": sets, "noNewPrivileges": True})
    with pytest.raises(Refusal, match=r"\[capability-missing\] " + BOUND):
        choose(bare, *asked, process={"capabilities": {}})
