# SPDX-License-Identifier: Apache-2.0
"""Permissions of several claims: with the end of one the others keep theirs; a number is one container's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from oci_hooks.findings import StepError
from oci_hooks.guest import binding, homes, permits, recovery
from oci_hooks.guest.apply import device_filter, device_list, drivers, permission
from oci_hooks.guest.apply.cgroup import Cgroup, MadeNode
from oci_hooks.guest.claims import Claim, ClaimDirectory, Owner
from oci_hooks.guest.homes import Home
from oci_hooks.guest.undo_log import Entry
from oci_hooks.linux.pci import PCI_DEVICES
from oci_hooks.system import Deadline
from tests.support.fake_guest import NIC, Machine
from tests.unit.guest.test_claims import STAT, make_claim
from tests.unit.guest.test_session import CGROUPS, bind, make_state, start_process

pytestmark = pytest.mark.unit

CONTROL, GROUP = MadeNode("vfio/vfio", 10, 196), MadeNode("vfio/4", 243, 0, is_group=True)
POD = "/d/pod"


class Lists:
    """Device lists of version 1, with what the kernel does to those below (security/device_cgroup.c)."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top = top
        self.refused = ""
        monkeypatch.setattr(device_list, "write_kernel_file", self.write)

    def make(self, path: str, *rules: str) -> None:
        """Make a cgroup that denies all but what it lists."""
        (self.top / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        self.place(path).write_text("".join(f"{rule}\n" for rule in rules))
        (self.place(path).parent / "cgroup.procs").write_text("")

    def place(self, path: str) -> Path:
        """Return a cgroup's devices.list."""
        return self.top / path.lstrip("/") / "devices.list"

    def read(self, *paths: str) -> list[set[str]]:
        """Return what cgroups list."""
        return [set(self.place(path).read_text().splitlines()) for path in paths]

    def write(self, path: str, rule: str) -> None:
        """Play the kernel. Raises OSError."""
        directory, _, name = path.rpartition("/")
        location = Path(directory) / "devices.list"
        if not location.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if self.refused and self.refused in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        kind, numbers, access = rule.split()
        below = location.parent.rglob("devices.list") if name == "devices.deny" else [location]
        for each in below:
            entries = dict(line.rsplit(" ", 1) for line in each.read_text().splitlines())
            had = entries.pop(f"{kind} {numbers}", "")
            now = set(had) | set(access) if name == "devices.allow" else set(had) - set(access)
            if now:
                entries[f"{kind} {numbers}"] = "".join(letter for letter in "rwm" if letter in now)
            each.write_text("".join(f"{key} {value}\n" for key, value in entries.items()))


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path) -> Machine:
    """Return a machine with a device, where only the numbers of /dev/vfio/vfio and of 243:0 are some device's."""
    machine = Machine(tmp_path)
    machine.add(NIC, driver="vfio-pci", group="4")
    machine.add_group_node("4", "243:0")
    for numbers in ("10:196", "243:0"):
        machine.write(f"/sys/dev/char/{numbers}/uevent")
    for pid, start in ((7, 70), (8, 80)):
        machine.write(f"/proc/{pid}/stat", STAT.format(pid=pid, state="S", start=start))
    machine.place("/run").mkdir()
    return machine


@pytest.fixture(name="claims")
def make_claims(machine: Machine) -> ClaimDirectory:
    """Return the machine's claims."""
    claims = ClaimDirectory(root=machine.root)
    claims.prepare()
    return claims


@pytest.fixture(name="lists")
def make_lists(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Lists:
    """Return the machine's device lists: of a pod with two containers."""
    lists = Lists(machine.top, monkeypatch)
    for path in (POD, f"{POD}/c1", f"{POD}/c2"):
        lists.make(path, "c 1:3 rwm")
    return lists


def start(claims: ClaimDirectory, name: str, *nodes: MadeNode, widen: bool = True, home: Home | None = None) -> str:
    """Give nodes to a container of the pod, whose claim is made for it, and return where that is."""
    pid = {"c1": 7, "c2": 8}[name]
    undo_log = claims.open_undo_log(Owner(name, pid, pid * 10, "/nowhere", home or Home()), ("4",))
    permits.claim_numbers(claims, nodes, undo_log, Deadline(5))
    permits.allow_nodes(claims, place(name), list(nodes), widen, None, undo_log, Deadline(5))
    undo_log.add("done")
    undo_log.close()
    return undo_log.path


def place(name: str) -> Cgroup:
    """Return a container's cgroup."""
    return Cgroup(1, "", f"{POD}/{name}", "", "/d")


def end(claims: ClaimDirectory, path: str) -> None:
    """Undo a claim's permissions, and remove it."""
    claim = read(claims, path)
    assert permits.revoke_claim(claims, claim) == []
    os.unlink(path)


def read(claims: ClaimDirectory, path: str) -> Claim:
    """Return a claim."""
    claim = claims.read_claim(path)
    assert claim is not None
    return claim


# A parent that two have -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["c1", "c2"])
def test_parent_rule_kept_while_needed(claims: ClaimDirectory, lists: Lists, first: str) -> None:
    before = lists.read(POD, f"{POD}/c1", f"{POD}/c2")
    paths = {"c1": start(claims, "c1", CONTROL, GROUP), "c2": start(claims, "c2", CONTROL)}
    assert lists.read(POD) == [{"c 1:3 rwm", "c 10:196 rw", "c 243:0 rw"}]
    second = "c2" if first == "c1" else "c1"
    end(claims, paths[first])
    assert "c 10:196 rw" in lists.read(POD)[0]
    assert "c 10:196 rw" in lists.read(f"{POD}/{second}")[0]
    assert ("c 243:0 rw" in lists.read(POD)[0]) is (second == "c1")
    end(claims, paths[second])
    assert lists.read(POD, f"{POD}/c1", f"{POD}/c2") == before


def test_parent_rules_restored_after_last_release(claims: ClaimDirectory, lists: Lists) -> None:
    lists.make(POD, "c 10:196 r", "c 243:* rwm")
    lists.make(f"{POD}/c2", "c 10:196 rm")
    before = lists.read(POD, f"{POD}/c1", f"{POD}/c2")
    paths = [start(claims, "c1", CONTROL, GROUP), start(claims, "c2", CONTROL)]
    for path in paths:
        end(claims, path)
    # Of the second one what the first one's end took from the pod is gone too: a child has no more than its parent.
    assert lists.read(POD, f"{POD}/c1", f"{POD}/c2") == before


@pytest.mark.parametrize(
    ("place", "home", "refused"),
    [
        (Cgroup(9, "/u/c", "/d", shared=("/d",)), Home("/u/c"), True),
        (Cgroup(9, "/u/c", "/d/c"), Home("/u/c", 0, "/d/c"), True),
        (Cgroup(9, "/u/c", "/d/c"), Home("/u/c", 0, "/d/x"), False),
        (Cgroup(9, "/u", "/d", shared=("/u", "/d")), Home("/u/c", 0, "/d/x"), False),
    ],
)
def test_shared_cgroup_checked_in_both_hierarchies(
    claims: ClaimDirectory, place: Cgroup, home: Home, refused: bool
) -> None:
    """One in which the container is alone is enough to keep another one's devices from it."""
    other = Claim("/run/c1", "c1", 7, 70, ("4",), (), True, False, "/b", home)
    try:
        permits.check_alone(claims.root, place, [other])
    except StepError as error:
        assert refused, error
    else:
        assert not refused


def test_allow_nodes_shared_cgroup_refused(claims: ClaimDirectory, lists: Lists) -> None:
    inode = os.stat(lists.place(f"{POD}/c2").parent).st_ino
    for known, refused in ((inode + 1, False), (inode, True), (0, True)):
        path = make_claim(claims, "c1", home=Home("", 0, f"{POD}/c2", known))
        if refused:
            before = lists.read(f"{POD}/c2")
            with pytest.raises(StepError, match=rf"\[permit-failed\] {POD}/c2: container c1 is in this cgroup too"):
                start(claims, "c2", CONTROL)
            assert lists.read(f"{POD}/c2") == before
        else:
            end(claims, start(claims, "c2", CONTROL))
        os.unlink(path)


def test_failed_run_revokes_own_grants(claims: ClaimDirectory, lists: Lists) -> None:
    start(claims, "c1", CONTROL)
    before = lists.read(POD, f"{POD}/c1", f"{POD}/c2")
    undo_log = claims.open_undo_log(Owner("c2", 8, 80), ("4",))
    permits.claim_numbers(claims, (CONTROL, GROUP), undo_log, Deadline(5))
    permits.allow_nodes(claims, place("c2"), [CONTROL, GROUP], True, None, undo_log, Deadline(5))
    assert permits.undo_grants(claims, undo_log, claims.read_entries(undo_log), Deadline(5)) == []
    assert lists.read(POD, f"{POD}/c1", f"{POD}/c2") == before


def test_failed_second_run_keeps_first_grants(claims: ClaimDirectory, lists: Lists) -> None:
    path = start(claims, "c1", CONTROL)
    before = lists.read(POD, f"{POD}/c1")
    undo_log = claims.reopen_undo_log(read(claims, path))
    assert undo_log is not None
    permits.allow_nodes(claims, place("c1"), [CONTROL], True, None, undo_log, Deadline(5))
    assert permits.undo_grants(claims, undo_log, claims.read_entries(undo_log), Deadline(5)) == []
    assert lists.read(POD, f"{POD}/c1") == before


def test_second_run_adds_no_duplicate_numbers(claims: ClaimDirectory, lists: Lists) -> None:
    path = start(claims, "c1", GROUP)
    before = read(claims, path).entries
    undo_log = claims.reopen_undo_log(read(claims, path))
    assert undo_log is not None
    assert permits.claim_numbers(claims, (GROUP,), undo_log, Deadline(5)) is False
    assert read(claims, path).entries == before


def test_revoke_without_lock_keeps_claim(claims: ClaimDirectory, lists: Lists) -> None:
    path = start(claims, "c1", CONTROL)
    before = lists.read(POD)
    lock = claims.lock(Deadline(5))
    undo_log = claims.reopen_undo_log(read(claims, path))
    assert undo_log is not None
    (finding,) = permits.undo_grants(claims, undo_log, read(claims, path).entries, Deadline(0.1))
    assert (finding.code, recovery.is_unfinished([finding]), lists.read(POD)) == ("permission-left", True, before)
    os.close(lock)


# The end of an init ---------------------------------------------------------------------------------------------------


def test_revoke_with_and_without_init(machine: Machine, claims: ClaimDirectory, lists: Lists) -> None:
    before = lists.read(f"{POD}/c1")
    start(claims, "c1", CONTROL, GROUP)
    machine.place("/proc/7/stat").unlink()
    assert binding.release(machine.root, make_state(), Deadline(5)) == []
    assert lists.read(f"{POD}/c1") == before


@pytest.mark.parametrize("inner", ["", "/inner/most"])
def test_revoke_failure_with_processes_keeps_claim(
    machine: Machine, claims: ClaimDirectory, lists: Lists, inner: str
) -> None:
    undo_log = claims.open_undo_log(Owner("c1", 7, 70, "/nowhere"), ("4",))
    undo_log.add(*machine.note_bound(NIC, "e1000e", "before"))
    permits.claim_numbers(claims, (GROUP,), undo_log, Deadline(5))
    permits.allow_nodes(claims, place("c1"), [GROUP], False, None, undo_log, Deadline(5))
    undo_log.add("done")
    undo_log.close()
    machine.place("/proc/7/stat").unlink()
    lists.refused = "/c1/devices.deny"
    for path in ("/inner", "/inner/most"):
        lists.make(f"{POD}/c1{path}")
    machine.write(f"{POD}/c1{inner}/cgroup.procs", "31\n41\n")
    (finding,) = binding.release(machine.root, make_state(), Deadline(5))
    assert (finding.level, finding.code, finding.subject) == ("error", "permission-left", f"{POD}/c1")
    assert "device numbers 243:0 cannot be revoked from its processes 31 41" in finding.problem
    assert finding.hint.startswith("end them with: kill -9 31 41")
    # What keeps its permission keeps its device.
    assert machine.read(f"{PCI_DEVICES}/{NIC}/driver_override") == "vfio-pci\n"
    assert os.listdir(f"{claims.path}/claims") == ["c1"]
    # With no process left it is worth a word, and no more.
    machine.write(f"{POD}/c1{inner}/cgroup.procs", "")
    findings = binding.release(machine.root, make_state(), Deadline(5))
    assert findings[0].code == "undo-failed"
    assert "no process is left to use them" in findings[0].problem
    assert os.listdir(f"{claims.path}/claims") == []


def test_revoke_unscanned_cgroup_counts_as_occupied(
    machine: Machine, claims: ClaimDirectory, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(claims, "c1", GROUP, widen=False)
    machine.place("/proc/7/stat").unlink()
    lists.refused = "/c1/devices.deny"
    lists.make(f"{POD}/c1/inner")
    machine.write(f"{POD}/c1/inner/cgroup.procs")
    monkeypatch.setattr(homes, "MAX_DIRECTORIES", 1)
    (finding,) = binding.release(machine.root, make_state(), Deadline(5))
    assert finding.code == "permission-left"
    assert os.listdir(f"{claims.path}/claims") == ["c1"]


def test_revoke_recreated_cgroup_unchanged(claims: ClaimDirectory, lists: Lists) -> None:
    inode = os.stat(lists.place(f"{POD}/c1").parent).st_ino
    lists.make(POD, "c 243:* rw")
    path = start(claims, "c1", GROUP, widen=False, home=Home("", 0, f"{POD}/c1", inode + 1))
    now = lists.read(f"{POD}/c1")
    end(claims, path)
    assert lists.read(f"{POD}/c1") == now


def test_revoke_damaged_entry_reported(claims: ClaimDirectory, lists: Lists) -> None:
    before = lists.read(f"{POD}/c1")
    path = start(claims, "c1", GROUP)
    entries = (Entry("permit", ("243:x", "", "rw /d")), *read(claims, path).entries)
    (finding,) = permits.revoke(claims.root, entries, None, ())
    assert finding.code == "undo-failed"
    assert lists.read(f"{POD}/c1") == before


# Numbers that are given out anew --------------------------------------------------------------------------------------


def test_revoke_stale_numbers_only(machine: Machine, claims: ClaimDirectory, lists: Lists) -> None:
    path = start(claims, "c1", CONTROL, GROUP)
    held = claims.read_claims()
    permits.revoke_stale_numbers(claims, held, excluding="")
    assert lists.read(f"{POD}/c1") == [{"c 1:3 rwm", "c 10:196 rw", "c 243:0 rw"}]
    machine.place("/sys/dev/char/243:0/uevent").unlink()
    machine.place("/sys/dev/char/243:0").rmdir()
    permits.revoke_stale_numbers(claims, held, excluding=path)
    assert "c 243:0 rw" in lists.read(f"{POD}/c1")[0]
    permits.revoke_stale_numbers(claims, held, excluding="")
    assert lists.read(f"{POD}/c1") == [{"c 1:3 rwm", "c 10:196 rw"}]
    assert permission.list_numbers(read(claims, path).entries) == set()
    assert [grant.nodes for grant in permission.list_grants(read(claims, path).entries)] == [((10, 196),)]
    # Recorded, so that it is done once, and any later permission is not the hook's.
    size = os.stat(path).st_size
    permits.revoke_stale_numbers(claims, claims.read_claims(), excluding="")
    assert os.stat(path).st_size == size


def test_revoke_stale_numbers_before_bind(
    machine: Machine, claims: ClaimDirectory, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = start(claims, "c1", CONTROL, GROUP)
    machine.place("/sys/dev/char/243:0/uevent").unlink()
    machine.place("/sys/dev/char/243:0").rmdir()
    machine.write("/sys/bus/pci/drivers/vfio-pci/bind")
    machine.write("/sys/module/vfio_iommu_type1/parameters/x")
    machine.write("/proc/self/mountinfo", f"22 1 0:21 / / rw - 9p root rw\n{CGROUPS}")
    machine.write("/proc/self/cgroup", "0::/hook\n")
    start_process(machine, 8, 80)
    other = machine.add("0000:02:00.0", driver="e1000e", group="5")
    seen = []
    monkeypatch.setattr(drivers, "bind_devices", lambda *_: seen.extend(lists.read(f"{POD}/c1")))
    bind(machine, make_state("c2", 8, other))
    assert seen == [{"c 1:3 rwm", "c 10:196 rw"}]
    assert permission.list_numbers(read(claims, path).entries) == set()


def test_claim_numbers_revokes_from_other_container(machine: Machine, claims: ClaimDirectory, lists: Lists) -> None:
    """Its node too, where that can be reached, and its parents' permission only from who does not need it."""
    first = start(claims, "c1", CONTROL, GROUP)
    undo_log = claims.open_undo_log(Owner("c2", 8, 80), ("4",))
    assert permits.claim_numbers(claims, (CONTROL, GROUP), undo_log, Deadline(5)) is True
    assert lists.read(f"{POD}/c1", POD) == [{"c 1:3 rwm", "c 10:196 rw"}] * 2
    permits.allow_nodes(claims, place("c2"), [GROUP], True, None, undo_log, Deadline(5))
    assert lists.read(f"{POD}/c2", POD) == [{"c 1:3 rwm", "c 243:0 rw"}, {"c 1:3 rwm", "c 10:196 rw", "c 243:0 rw"}]
    end(claims, first)
    assert lists.read(f"{POD}/c2", POD) == [{"c 1:3 rwm", "c 243:0 rw"}] * 2


def test_claim_numbers_unrevocable_refused(claims: ClaimDirectory, lists: Lists) -> None:
    start(claims, "c1", CONTROL, GROUP)
    lists.refused = "/c1/devices.deny"
    undo_log = claims.open_undo_log(Owner("c2", 8, 80), ("4",))
    with pytest.raises(StepError) as caught:
        permits.claim_numbers(claims, (CONTROL, GROUP), undo_log, Deadline(5))
    (finding,) = caught.value.findings
    assert (finding.code, finding.subject) == ("permission-left", "device number 243:0")
    assert "cannot be revoked from container c1, which had it for a device that was unplugged" in finding.problem
    assert finding.hint == "end container c1, then start this one again"


def test_claim_numbers_cdev_refused_once(machine: Machine, claims: ClaimDirectory, lists: Lists) -> None:
    """It may be open by now, which cannot be detected; after that the number is revoked before it is reused."""
    cdev = MadeNode("vfio/devices/vfio0", 243, 0)
    machine.write("/sys/class/vfio-dev/vfio0/dev", "243:0\n")
    start(claims, "c1", cdev)
    undo_log = claims.open_undo_log(Owner("c2", 8, 80), ("4",))
    with pytest.raises(StepError, match=r"\[numbers-reused\] /dev/vfio/devices/vfio0: has device number 243:0"):
        permits.claim_numbers(claims, (cdev,), undo_log, Deadline(5))
    assert permits.claim_numbers(claims, (cdev,), undo_log, Deadline(5)) is False


def test_allow_nodes_lost_device_refused(machine: Machine, claims: ClaimDirectory, lists: Lists) -> None:
    """Its number may be another's by now: the one who looks first finds its own device gone, the other one revokes."""
    make_claim(claims, "c2", 8, 80)
    undo_log = claims.open_undo_log(Owner("c1", 7, 70), ("4",))
    undo_log.add(*machine.note_bound(NIC, "e1000e", ""))
    permits.claim_numbers(claims, (CONTROL, GROUP), undo_log, Deadline(5))
    other = claims.open_undo_log(Owner("c3", 8, 80), ("5",))
    assert permits.claim_numbers(claims, (GROUP,), other, Deadline(5)) is True
    before = lists.read(f"{POD}/c1")
    with pytest.raises(StepError, match=r"\[device-gone\] /dev/vfio/4"):
        permits.allow_nodes(claims, place("c1"), [CONTROL, GROUP], False, None, undo_log, Deadline(5))
    assert lists.read(f"{POD}/c1") == before
    # The device that is in its place is not the one that was bound; nor is a number that is another's now.
    machine.write("/sys/class/vfio/4/dev", "243:1\n")
    with pytest.raises(StepError, match=r"\[device-gone\] /dev/vfio/4"):
        permits.claim_numbers(claims, (GROUP,), undo_log, Deadline(5))
    machine.write("/sys/class/vfio/4/dev", "243:0\n")
    machine.place(f"{PCI_DEVICES}/{NIC}").unlink()
    with pytest.raises(StepError, match=rf"\[device-gone\] {NIC}"):
        permits.claim_numbers(claims, (GROUP,), undo_log, Deadline(5))


def test_remove_nodes_of_number(machine: Machine, claims: ClaimDirectory, lists: Lists) -> None:
    """Of a container whose init lives: this process."""
    rootfs = machine.place("/rootfs")
    (rootfs / "dev/vfio").mkdir(parents=True)
    for name, numbers in (("4", (243, 0)), ("vfio", (10, 196)), ("5", (243, 5))):
        os.mknod(rootfs / "dev/vfio" / name, 0o20600, os.makedev(*numbers))
    entries = [("node", str(rootfs), f"vfio/{name}", "243", minor) for name, minor in (("4", "0"), ("5", "5"))]
    pid = os.getpid()
    machine.place(f"/proc/{pid}").mkdir()
    machine.place(f"/proc/{pid}/stat").symlink_to(f"/proc/{pid}/stat")
    begun = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    make_claim(claims, "c9", pid, begun, ("numbers", "243:0,243:5"), *entries)
    undo_log = claims.open_undo_log(Owner("c2", 8, 80), ("4",))
    assert permits.claim_numbers(claims, (GROUP,), undo_log, Deadline(5)) is True
    assert sorted(os.listdir(rootfs / "dev/vfio")) == ["5", "vfio"]


def test_allow_nodes_early_failure_adds_no_entry(claims: ClaimDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing is to be taken back, which could not be done either."""

    def refuse(*_: object) -> None:
        raise StepError("permit-failed", "/u", "can't be read", "x")

    monkeypatch.setattr(device_filter.Replacements, "prepare", refuse)
    undo_log = claims.open_undo_log(Owner("c1", 7, 70), ("4",))
    with pytest.raises(StepError, match="permit-failed"):
        permits.allow_nodes(claims, Cgroup(1, "/u", "", "/"), [CONTROL], False, None, undo_log, Deadline(5))
    assert not permits.has_grant(claims.read_entries(undo_log))
