# SPDX-License-Identifier: Apache-2.0
"""Claims: each has one container, with one init and cgroup, in one file, and a damaged one affects no other."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from oci_hooks import oci
from oci_hooks.findings import Finding, Refusal, StepError
from oci_hooks.guest import binding, homes, undo_log
from oci_hooks.guest.apply import sysfs_writer
from oci_hooks.guest.claims import STATE_DIRECTORY, ClaimDirectory, Owner
from oci_hooks.guest.homes import Home, find_home, is_occupied
from oci_hooks.system import Deadline, Root
from tests.support.fake_guest import NIC, Machine
from tests.support.fake_kernel import ActingMachine
from tests.unit.guest.test_claims import make_claim
from tests.unit.guest.test_session import DEVICE, INIT, START, bind, end_process, list_claims, make_state, start_process
from tests.unit.guest.test_session import make_directory as make_directory_fixture
from tests.unit.guest.test_session import make_machine as make_machine_fixture

pytestmark = pytest.mark.unit

machine_fixture, directory_fixture = make_machine_fixture, make_directory_fixture
GROUP = "/sys/fs/cgroup/c7"
LIST = "/sys/fs/cgroup/devices/c7"


def release(machine: Machine, container: str = "c1", bundle: str = "/nowhere") -> list[Finding]:
    """Release as at the poststop of a container."""
    state = oci.State(container, bundle, 0, "stopped", {})
    return binding.release(machine.root, state, Deadline(5))


def refuse(machine: Machine, **of: str) -> Finding:
    """Release, and return why not."""
    with pytest.raises(Refusal) as caught:
        release(machine, **of)
    (finding,) = caught.value.findings
    assert finding.level == "error"
    assert finding.hint
    return finding


def add_cgroup(machine: Machine, path: str = GROUP, populated: int = 1) -> Home:
    """Add a cgroup, and return it as a claim notes it."""
    machine.write(f"{path}/cgroup.events", f"populated {populated}\nfrozen 0\n")
    return Home(unified=path, unified_inode=machine.place(path).stat().st_ino)


# The same device -----------------------------------------------------------------------------------------------------


def take_stock(machine: Machine) -> dict[str, str]:
    """Return what is in the files that a release writes to."""
    paths = (f"{DEVICE}/driver_override", "/sys/bus/pci/drivers_probe", "/sys/bus/pci/drivers/e1000e/unbind")
    return {path: machine.read(path) for path in paths}


def replace(machine: Machine, ids: str = "1b36:0010", override: str = "vfio-pci") -> None:
    """Take the network card out, and put another device into its slot; it may look bound by the hook."""
    # It stays elsewhere, so that its inode number is not given out again: file systems do that, sysfs does not.
    machine.write("/unplugged/x")
    os.rename(os.path.realpath(machine.place(DEVICE)), machine.place(f"/unplugged/{time.monotonic_ns()}"))
    machine.place(DEVICE).unlink()
    class_code = "020000" if ids == "8086:10d3" else "010802"
    machine.add(NIC, ids=ids, class_code=class_code, driver="e1000e", group="4")
    machine.write(f"{DEVICE}/driver_override", f"{override}\n")


@pytest.mark.parametrize("ids", ["1b36:0010", "8086:10d3"])
def test_restore_another_device_not_written(machine: Machine, directory: ClaimDirectory, ids: str) -> None:
    make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "igb", "before"))
    end_process(machine)
    replace(machine, ids)
    before = take_stock(machine)
    (finding,) = release(machine)
    assert (finding.level, finding.code, finding.subject) == ("warning", "device-replaced", NIC)
    assert ids in finding.problem
    assert take_stock(machine) == before
    assert list_claims(machine) == []


@pytest.mark.parametrize("word", ["vendor", "device", "class"])
def test_restore_reused_inode_not_written(machine: Machine, directory: ClaimDirectory, word: str) -> None:
    words = list(machine.note_bound(NIC, "igb", "before"))
    words[undo_log.KINDS["device"].index(word) + 1] = "ffff"
    make_claim(directory, "c1", INIT, START, tuple(words))
    end_process(machine)
    before = take_stock(machine)
    assert [finding.code for finding in release(machine)] == ["device-replaced"]
    assert take_stock(machine) == before


def test_restore_override_of_others_not_written(machine: Machine, directory: ClaimDirectory) -> None:
    make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "igb", "before"))
    end_process(machine)
    machine.write(f"{DEVICE}/driver_override", "uio_pci_generic\n")
    before = take_stock(machine)
    (finding,) = release(machine)
    assert (finding.level, finding.code, finding.subject) == ("warning", "override-changed", NIC)
    assert f"driverctl set-override {NIC} igb" in finding.hint
    assert take_stock(machine) == before
    assert list_claims(machine) == []


def test_restore_untouched_device_not_written(machine: Machine, directory: ClaimDirectory) -> None:
    """A kill came between the entry and the first write."""
    entry = machine.note_bound(NIC, "igb", "before")
    machine.write(f"{DEVICE}/driver_override", "before\n")
    make_claim(directory, "c1", INIT, START, entry, done=False)
    before = take_stock(machine)
    assert release(machine) == []
    assert take_stock(machine) == before
    assert list_claims(machine) == []


def test_restore_half_restored_device(machine: Machine, directory: ClaimDirectory) -> None:
    """A kill came after the override by name: that is the hook's, too."""
    entry = machine.note_bound(NIC, "e1000e", "before")
    machine.write(f"{DEVICE}/driver_override", "e1000e\n")
    make_claim(directory, "c1", INIT, START, entry)
    end_process(machine)
    assert release(machine) == []
    assert machine.read(f"{DEVICE}/driver_override").startswith("before\n")


def test_restore_replugged_device_of_same_container(machine: Machine, directory: ClaimDirectory) -> None:
    first = machine.note_bound(NIC, "igb", "first")
    replace(machine)
    make_claim(directory, "c1", INIT, START, first, machine.note_bound(NIC, "e1000e", "second"))
    end_process(machine)
    assert release(machine) == []
    assert machine.read(f"{DEVICE}/driver_override").startswith("second\n")


def make_job(machine: Machine) -> sysfs_writer.Job:
    """Return a job for the network card that is there now."""
    directory = machine.root.host_path(DEVICE)
    writes = (
        sysfs_writer.Write(f"{directory}/driver_override", "vfio-pci\n"),
        sysfs_writer.Write(machine.root.host_path("/sys/bus/pci/drivers_probe"), NIC),
    )
    return sysfs_writer.Job(NIC, writes, directory, os.stat(directory).st_ino)


def test_write_device_replaced_before_the_first_write(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(machine)
    replace(machine)
    before = take_stock(machine)
    monkeypatch.setattr(sysfs_writer, "check_device", lambda _: None)
    (result,) = sysfs_writer.run_jobs([job], Deadline(5))
    assert os.strerror(result.code) == "No such device"
    assert take_stock(machine) == before


@pytest.mark.parametrize("at", [0, 1])
def test_write_device_replaced_between_two_writes(machine: Machine, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """At the first write its directory is open: what is written goes to the device that is gone, or nowhere."""
    job, real, looks = make_job(machine), sysfs_writer.check_device, list[None]()

    def check(of: sysfs_writer.Job) -> None:
        """Have the other device come right after the first look, or right before the second."""
        if len(looks) == at == 1:
            replace(machine, override="(null)")
        real(of)
        if len(looks) == at == 0:
            replace(machine, override="(null)")
        looks.append(None)

    monkeypatch.setattr(sysfs_writer, "check_device", check)
    code, _ = sysfs_writer.do_writes(job)
    assert code != 0
    assert machine.read(f"{DEVICE}/driver_override") == "(null)\n"
    assert machine.read("/sys/bus/pci/drivers_probe") == ""


# The same container --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundle", ["/nowhere", "/elsewhere"])
def test_release_living_container_refused(machine: Machine, directory: ClaimDirectory, bundle: str) -> None:
    path = make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "e1000e", ""))
    before = (Path(path).read_bytes(), take_stock(machine))
    finding = refuse(machine, bundle=bundle)
    assert (finding.code, finding.subject) == ("container-alive", "container c1")
    assert ("another container with this id, in /nowhere" in finding.problem) == (bundle != "/nowhere")
    assert (Path(path).read_bytes(), take_stock(machine)) == before


def test_release_zombie_init_is_ended(machine: Machine, directory: ClaimDirectory) -> None:
    """A runtime calls poststop when the init has ended, which its parent may not have seen yet."""
    make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "e1000e", ""))
    machine.write(f"/proc/{INIT}/stat", machine.read(f"/proc/{INIT}/stat").replace(" S ", " Z "))
    assert release(machine) == []
    assert list_claims(machine) == []


def test_release_without_claim_changes_nothing(tmp_path: Path) -> None:
    machine = ActingMachine(tmp_path)
    container = machine.make_container("c1", "0000:01:00.0")
    for state in (container.stopped, {**container.state, "status": "running"}):
        assert machine.call(state, "poststop") == (0, "")
    assert not machine.place(STATE_DIRECTORY).exists()
    machine.end()


def test_release_dead_container_from_other_bundle(machine: Machine, directory: ClaimDirectory) -> None:
    make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "e1000e", ""))
    end_process(machine)
    assert release(machine, bundle="/elsewhere") == []
    assert list_claims(machine) == []


def test_claim_held_by_remaining_processes(machine: Machine, directory: ClaimDirectory) -> None:
    """Its own poststop takes them; another container's hook, or a poststop from another bundle, does not."""
    home = add_cgroup(machine)
    make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "e1000e", ""), home=home)
    end_process(machine)
    start_process(machine, 8, 80)
    finding = refuse(machine, bundle="/elsewhere")
    assert (finding.code, "still has processes" in finding.problem) == ("container-alive", True)
    _, error = bind(machine, make_state("c2", 8))
    assert error.findings[0].code == "claimed"
    assert list_claims(machine) == ["c1"]
    add_cgroup(machine, populated=0)
    _, error = bind(machine, make_state("c2", 8))
    assert error.findings[0].code == "bind-failed"
    assert list_claims(machine) == []


def test_claim_restart_in_same_cgroup(machine: Machine, directory: ClaimDirectory) -> None:
    home = add_cgroup(machine, "/sys/fs/cgroup/c8")
    make_claim(directory, "c1", INIT, START, machine.note_bound(NIC, "e1000e", ""), home=home)
    end_process(machine)
    start_process(machine, 8, 80)
    _, error = bind(machine, make_state("c1", 8))
    assert error.findings[0].code == "bind-failed"
    assert list_claims(machine) == []


# Cgroups -------------------------------------------------------------------------------------------------------------


def test_find_home_own_cgroups_only(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    mounts = (
        "23 22 0:22 / /sys/fs/cgroup rw - cgroup2 none rw\n24 22 0:23 / /sys/fs/cgroup/devices rw - cgroup x devices\n"
    )
    machine.write("/proc/self/mountinfo", mounts)
    machine.write("/proc/7/cgroup", "3:devices:/c7\n0::/c7\n")
    unified = add_cgroup(machine)
    machine.place(LIST).mkdir(parents=True)
    machine.write("/proc/self/cgroup", "3:devices:/hook\n0::/hook\n")
    both = unified.replace(devices=LIST, devices_inode=machine.place(LIST).stat().st_ino)
    assert find_home(machine.root, INIT) == both
    machine.write("/proc/self/cgroup", "3:devices:/c7\n0::/hook\n")
    assert find_home(machine.root, INIT) == unified
    machine.write("/proc/self/cgroup", "3:devices:/c7\n0::/c7\n")
    assert find_home(machine.root, INIT) == Home()


def test_is_occupied_v2_uses_kernel_count(machine: Machine) -> None:
    home = add_cgroup(machine)
    assert is_occupied(machine.root, home)
    add_cgroup(machine, populated=0)
    assert not is_occupied(machine.root, home)
    # The path of a later one.
    add_cgroup(machine)
    assert not is_occupied(machine.root, home.replace(unified_inode=1))
    shutil.rmtree(machine.place(GROUP))
    assert not is_occupied(machine.root, home)
    assert not is_occupied(machine.root, Home())


def test_is_occupied_v1_walks_directories(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for below in ("", "/a", "/a/b", "/c"):
        machine.write(f"{LIST}{below}/cgroup.procs")
    home = Home(devices=LIST)
    assert not is_occupied(machine.root, home)
    machine.write(f"{LIST}/a/b/cgroup.procs", "12\n")
    assert is_occupied(machine.root, home)
    machine.write(f"{LIST}/a/b/cgroup.procs")
    # As many as a container likes to make: then they are not looked through, and not free.
    monkeypatch.setattr(homes, "MAX_DIRECTORIES", 3)
    assert is_occupied(machine.root, home)


# A claim that can't be read ------------------------------------------------------------------------------------------


def spoil_format(path: Path) -> None:
    """Make it one of an earlier version."""
    path.write_text(path.read_text().replace("hooks 2", "hooks 1"))


def spoil_size(path: Path) -> None:
    """Make it longer than any hook writes."""
    path.write_bytes(path.read_bytes() + b"group\t9\n" * (1 << 18))


def spoil_owner(path: Path) -> None:
    """Have its owner's line be no line."""
    path.write_text(path.read_text().replace("\tinit\t", "\n"))
    path.write_text(path.read_text().replace("init\t", "init\tx"))


def spoil_name(path: Path) -> None:
    """Have it be about another container."""
    path.write_text(path.read_text().replace("container\tother", "container\tmother"))


def spoil_all(path: Path) -> None:
    """Leave nothing of it."""
    path.write_bytes(b"\0" * 100)


SPOILT = {
    spoil_format: "does not have the format of this version",
    spoil_size: "is longer than 1048576 bytes",
    spoil_owner: "does not begin with the entries of its container",
    spoil_name: "is damaged: it names another container, mother",
    spoil_all: "does not have the format of this version",
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_unreadable_claim_blocks_own_container_only(
    machine: Machine, directory: ClaimDirectory, spoil: object, words: str
) -> None:
    path = Path(make_claim(directory, "other", 8, 80, machine.note_bound(NIC, "igb", ""), groups=()))
    assert callable(spoil)
    spoil(path)
    machine.add("0000:02:00.0", driver="e1000e", group="5")
    before = path.read_bytes()
    call, error = bind(machine, make_state(selector="0000:02:00.0"))
    # It comes as far as on this machine any hook does.
    assert error.findings[0].code == "bind-failed"
    (reported,) = [finding for finding in call.findings if finding.code == "claim-unreadable"]
    assert (reported.level, reported.subject) == ("warning", str(path))
    assert words in reported.problem
    assert reported.hint
    finding = refuse(machine, container="other")
    assert (finding.code, words in finding.problem) == ("claim-unreadable", True)
    start_process(machine, 9, 90)
    _, error = bind(machine, make_state("other", 9, "0000:02:00.0"))
    assert error.findings[0].code == "claim-unreadable"
    assert path.read_bytes() == before


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_unreadable_claim_devices_not_given_to_others(
    machine: Machine, directory: ClaimDirectory, spoil: object
) -> None:
    """Its groups and devices, as far as they can be read; else what is bound to vfio-pci and nobody's."""
    machine.add("0000:02:00.0", driver="vfio-pci", group="5")
    path = Path(make_claim(directory, "other", 8, 80, machine.note_bound(NIC, "igb", ""), groups=("6",)))
    assert callable(spoil)
    spoil(path)
    for address in ("0000:02:00.0", NIC)[: 1 if spoil is spoil_all else 2]:
        _, error = bind(machine, make_state(selector=address))
        assert error.findings[0].code == "claimed", address
        assert "container " in error.findings[0].problem
    # With a claim of somebody else it is known whose it is.
    make_claim(directory, "known", INIT, START, groups=("5",))
    _, error = bind(machine, make_state(selector="0000:02:00.0"))
    assert "container known" in error.findings[0].problem


def test_dry_run_unreadable_claim_refused(tmp_path: Path) -> None:
    machine = ActingMachine(tmp_path)
    container = machine.make_container("c1", "0000:01:00.0")
    assert machine.call(container.state) == (0, "")
    spoil_all(machine.place(f"{STATE_DIRECTORY}/claims/c1"))
    before = machine.take_stock()
    for arguments in (("--dry-run",), ("--dry-run", "poststop")):
        code, output = machine.call(container.state, *arguments)
        assert (code, "[claim-unreadable]" in output) == (1, True), output
    assert machine.take_stock() == before
    machine.end()


def test_read_claim_os_error_is_its_problem(directory: ClaimDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = make_claim(directory, "c1"), os.read

    def fail(fd: int, size: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == path:
            raise OSError(5, "Input/output error")
        return real(fd, size)

    monkeypatch.setattr(os, "read", fail)
    (claim,) = directory.read_claims()
    assert (claim.container, claim.problem) == ("c1", "cannot be read: Input/output error")
    assert not claim.is_stale(Root())


def test_undo_log_size_limit_enforced(directory: ClaimDirectory) -> None:
    made = directory.open_undo_log(Owner("c1", INIT, START), ("4",))
    with pytest.raises(StepError) as caught:
        for number in range(300):
            made.add("node", "/" + "x" * 4000, f"vfio/{number}", 511, number)
    (finding,) = caught.value.findings
    assert finding.code == "claim-too-large"
    assert finding.hint
    made.close()
    assert os.stat(made.path).st_size <= undo_log.UNDO_LOG_LIMIT
    (claim,) = directory.read_claims()
    assert claim.problem == ""
    again = directory.reopen_undo_log(claim)
    assert again is not None
    with pytest.raises(StepError, match="claim-too-large"):
        again.add("node", "/" + "x" * 4000, "vfio/1", 511, 1)
    again.close()


def test_undo_log_full_container_refused(tmp_path: Path) -> None:
    """Each node with a number of the host's that is taken away is an entry, with the path of its root file system."""
    machine = ActingMachine(tmp_path, groups=2)
    name = "b" * 200
    count = undo_log.UNDO_LOG_LIMIT // 200
    entries = [{"path": f"/dev/vfio/{n + 100}", "type": "c", "major": 244, "minor": n} for n in range(count)]
    greedy = machine.make_container(name, "0000:01:00.0", linux={"devices": entries})
    (greedy.dev / "vfio").mkdir()
    for number, entry in enumerate(entries):
        os.mknod(f"{greedy.dev.parent}{entry['path']}", 0o20640, os.makedev(244, number))
    other = machine.make_container("c2", "0000:02:00.0")
    before = machine.take_stock()
    code, output = machine.call(greedy.state)
    assert (code, "[claim-too-large]" in output) == (1, True), output[:500]
    assert machine.take_stock() == before
    assert machine.call(other.state) == (0, "")
    machine.end()


# Names ---------------------------------------------------------------------------------------------------------------


def test_undo_log_path_long_id_and_hash_differ(directory: ClaimDirectory) -> None:
    long = "x" * 300
    hashed = os.path.basename(directory.undo_log_path(long))
    assert hashed.startswith("sha256-")
    names = [hashed, long, f"%73{hashed[1:]}"]
    assert len({directory.undo_log_path(name) for name in names}) == 3
    paths = [make_claim(directory, name) for name in names]
    assert sorted(paths) == sorted(claim.path for claim in directory.read_claims())
    assert sorted(claim.container for claim in directory.read_claims()) == sorted(names)
    assert all(claim.problem == "" for claim in directory.read_claims())


def test_release_claim_names_another_container_refused(machine: Machine, directory: ClaimDirectory) -> None:
    path = make_claim(directory, "x" * 300, INIT, START, machine.note_bound(NIC, "igb", ""))
    end_process(machine)
    os.rename(path, f"{machine.root.host_path(STATE_DIRECTORY)}/claims/c1")
    before = take_stock(machine)
    finding = refuse(machine)
    assert (finding.code, "names another container, xxx" in finding.problem) == ("claim-unreadable", True)
    assert take_stock(machine) == before
