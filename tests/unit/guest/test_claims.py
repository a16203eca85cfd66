# SPDX-License-Identifier: Apache-2.0
"""Claims: who has which group, who is at work, and what a killed hook or an ended container left."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oci_hooks.findings import Refusal
from oci_hooks.guest.claims import Claim, ClaimDirectory, Owner, list_owners
from oci_hooks.guest.homes import Home
from oci_hooks.guest.locks import alarm
from oci_hooks.guest.undo_log import UndoLog
from oci_hooks.linux.processes import read_start_time
from oci_hooks.system import Deadline, Root

pytestmark = pytest.mark.unit

NOWHERE = Home()
HOSTILE_IDS = [
    "../x",
    ".",
    "..",
    "a/b",
    "/",
    "x" * 300,
    "\u4e2d" * 100,
    "a\nb",
    "a\tb",
    ".1234",
    "%2e",
    "lock",
    "a%2fb",
    "\x7f",
]
STAT = "{pid} (a ) R b) {state} 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {start} 0 0\n"


@pytest.fixture(name="directory")
def make_directory(tmp_path: Path) -> ClaimDirectory:
    """Return a directory of claims that is ready."""
    directory = ClaimDirectory(str(tmp_path / "run"))
    directory.prepare()
    return directory


@pytest.fixture(name="other")
def start_other() -> Iterator[int]:
    """Return the pid of a process that lives as long as the test."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process.pid
        process.kill()


def write_stat(top: Path, pid: int, start: int, state: str = "S") -> Root:
    """Return a root with one process."""
    path = top / f"proc/{pid}/stat"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAT.format(pid=pid, state=state, start=start))
    return Root(str(top))


def make_claim(
    directory: ClaimDirectory,
    container: str,
    pid: int = 7,
    start: int = 70,
    *entries: tuple[str, ...],
    groups: tuple[str, ...] = ("4",),
    done: bool = True,
    bundle: str = "/nowhere",
    home: Home = NOWHERE,
) -> str:
    """Create the claim of a container whose hook has ended, and return its path."""
    undo_log = directory.open_undo_log(Owner(container, pid, start, bundle, home), groups)
    for kind, *words in entries:
        undo_log.add(kind, *words)
    if done:
        undo_log.add("done")
    undo_log.close()
    return undo_log.path


def read_one(directory: ClaimDirectory) -> Claim:
    """Return the only claim."""
    (claim,) = directory.read_claims()
    return claim


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", HOSTILE_IDS, ids=ascii)
def test_undo_log_path_any_id_inside_directory(directory: ClaimDirectory, container: str) -> None:
    path = make_claim(directory, container)
    assert os.path.dirname(path) == f"{directory.path}/claims"
    assert os.listdir(f"{directory.path}/claims") == [os.path.basename(path)]
    assert read_one(directory).container == container


def test_undo_log_path_unique_for_id(directory: ClaimDirectory) -> None:
    ids = [*HOSTILE_IDS, "x" * 301, "a b", "a", "A", "%2e%2e"]
    assert len({directory.undo_log_path(container) for container in ids}) == len(ids)


# The directory -------------------------------------------------------------------------------------------------------


def test_prepare_claims_root_only_any_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        ClaimDirectory(str(tmp_path / "run")).prepare()
    finally:
        os.umask(old)
    assert {(tmp_path / path).stat().st_mode & 0o777 for path in ("run", "run/claims")} == {0o700}


def put_file(path: Path) -> None:
    """Put a file where the directory belongs."""
    path.write_text("")


def put_link(path: Path) -> None:
    """Put a link to a directory there."""
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def put_open(path: Path) -> None:
    """Put a directory there that others may write to."""
    path.mkdir()
    path.chmod(0o777)


def put_anothers(path: Path) -> None:
    """Put another user's directory there."""
    path.mkdir()
    os.chown(path, 1234, 1234)


@pytest.mark.parametrize("put", [put_file, put_link, put_open, put_anothers])
def test_prepare_claims_foreign_directory_refused(tmp_path: Path, put: object) -> None:
    assert callable(put)
    put(tmp_path / "run")
    with pytest.raises(Refusal) as caught:
        ClaimDirectory(str(tmp_path / "run")).prepare()
    (finding,) = caught.value.findings
    assert (finding.code, finding.subject) == ("state-directory", str(tmp_path / "run"))
    assert finding.hint


ALL_USERS = "         0          0 4294967295\n"
ROOTLESS = "         0       1000          1\n         1     100000      65536\n"


@pytest.mark.parametrize("found", [False, True], ids=["missing", "root's"])
@pytest.mark.parametrize(("user", "users", "who"), [(1000, ALL_USERS, "1000,"), (0, ROOTLESS, "1000, who is root in")])
def test_prepare_claims_without_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool, user: int, users: str, who: str
) -> None:
    """A rootless engine: the directory cannot be created, or is the machine's root's, whom its namespace lacks."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/uid_map").write_text(users)
    if found:
        put_anothers(tmp_path / "run")
    else:
        monkeypatch.setattr(os, "mkdir", raise_error(errno.EACCES))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(Refusal) as caught:
        ClaimDirectory(str(tmp_path / "run"), Root(str(tmp_path))).prepare()
    (finding,) = caught.value.findings
    assert finding.code == "not-root"
    assert f"user {who}" in finding.problem


def test_prepare_claims_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", raise_error(errno.EROFS))
    with pytest.raises(Refusal, match="Read-only") as caught:
        ClaimDirectory(str(tmp_path / "run")).prepare()
    (finding,) = caught.value.findings
    assert (finding.code, finding.subject) == ("state-directory", str(tmp_path / "run"))
    assert "/run" in finding.hint
    monkeypatch.setattr(os, "mkdir", raise_error(errno.ENOSPC))
    with pytest.raises(OSError, match="space"):
        ClaimDirectory(str(tmp_path / "run")).prepare()


def test_lock_claims_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is there, from before /run was made read-only, or a service's was."""
    directory = ClaimDirectory(str(tmp_path / "run"))
    directory.prepare()
    monkeypatch.setattr(os, "open", raise_error(errno.EROFS))
    with pytest.raises(Refusal) as caught:
        directory.lock(Deadline(1.0))
    assert caught.value.findings[0].code == "state-directory"


def raise_error(code: int) -> Callable[..., None]:
    """Return a system call that fails."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_read_claims_ignores_non_files(directory: ClaimDirectory, put: object) -> None:
    """A pipe would have every hook on the machine wait for its other end."""
    assert callable(put)
    for name in ("odd", ".odd"):
        put(Path(directory.path) / "claims" / name)
    directory.open_undo_log(Owner("c1", 7, 70), ("4",)).close()
    directory.remove_drafts()
    assert [claim.container for claim in directory.read_claims()] == ["c1"]
    assert directory.read_claim(directory.undo_log_path("odd")) is None


# Locks ---------------------------------------------------------------------------------------------------------------


def test_read_claim_hook_at_work(directory: ClaimDirectory) -> None:
    undo_log = directory.open_undo_log(Owner("c1", 7, 70), ("4", "5"))
    claim = read_one(directory)
    assert (claim.container, claim.pid, claim.start, claim.groups) == ("c1", 7, 70, ("4", "5"))
    assert (claim.at_work, claim.done) == (True, False)
    assert not claim.is_stale(Root())
    assert directory.reopen_undo_log(claim) is None
    undo_log.add("done")
    undo_log.close()
    claim = read_one(directory)
    assert (claim.at_work, claim.done) == (False, True)


def test_claim_of_killed_hook_is_stale(directory: ClaimDirectory) -> None:
    child = os.fork()
    if child == 0:
        try:
            directory.open_undo_log(Owner("c1", 7, 70), ("4",)).add(
                "device", "0000:01:00.0", "e1000e", "", 5, "8086", "10d3", "020000"
            )
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    claim = read_one(directory)
    assert (claim.at_work, claim.done) == (False, False)
    assert claim.is_stale(Root())
    assert [entry.kind for entry in claim.entries] == ["container", "bundle", "init", "cgroup", "group", "device"]


def test_lock_waits_until_deadline(directory: ClaimDirectory) -> None:
    held = directory.lock(Deadline(1))
    begun = time.monotonic()
    with pytest.raises(Refusal) as caught:
        directory.lock(Deadline(0.2))
    assert 0.15 < time.monotonic() - begun < 5
    assert caught.value.findings[0].code == "lock-timeout"
    assert "fuser" in caught.value.findings[0].hint
    os.close(held)
    os.close(directory.lock(Deadline(0.2)))


def test_alarm_repeats_until_delivered() -> None:
    """One that comes when Python is about to enter a system call does not end that call."""
    reader, writer = os.pipe()
    with pytest.raises(TimeoutError), alarm(Deadline(0.01)):
        # As if the first had come there: it is taken before anybody hears it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        signal.sigwait({signal.SIGALRM})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        assert select.select([reader], [], [], 30) == ([], [], []), "nobody writes"
        pytest.fail("it rang once")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    os.close(reader)
    os.close(writer)


def test_lock_timeout_leaves_no_descriptor(directory: ClaimDirectory) -> None:
    held = directory.lock(Deadline(1))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(Refusal):
            directory.lock(Deadline(0.01))
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(held)


def test_lock_acquired_when_released(directory: ClaimDirectory) -> None:
    held = directory.lock(Deadline(1))
    child = os.fork()
    if child == 0:
        time.sleep(0.2)
        os._exit(0)
    # The child holds it too, until it ends.
    os.close(held)
    os.close(directory.lock(Deadline(10)))
    os.waitpid(child, 0)


# What is stale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "state", "stale"),
    [(70, "S", False), (70, "R", False), (70, "Z", True), (70, "X", True), (71, "S", True), (0, "S", True)],
)
def test_claim_stale_after_process_ended(
    directory: ClaimDirectory, tmp_path: Path, start: int, state: str, stale: bool
) -> None:
    make_claim(directory, "c1")
    assert read_one(directory).is_stale(write_stat(tmp_path, 7, start, state)) == stale


def test_claim_stale_without_process(directory: ClaimDirectory, tmp_path: Path) -> None:
    make_claim(directory, "c1")
    assert read_one(directory).is_stale(Root(str(tmp_path)))


def test_claim_unfinished_is_stale(directory: ClaimDirectory, tmp_path: Path) -> None:
    make_claim(directory, "c1", done=False)
    assert read_one(directory).is_stale(write_stat(tmp_path, 7, 70))


def test_read_start_time_zombie_is_zero(other: int) -> None:
    assert read_start_time(Root(), other) > 0
    assert read_start_time(Root(), os.getpid()) < read_start_time(Root(), other) + 1
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert read_start_time(Root(), child) == 0
    os.waitpid(child, 0)
    assert read_start_time(Root(), child) == 0


# Drafts, torn and vanishing journals ---------------------------------------------------------------------------------


def test_draft_of_killed_hook_removed(directory: ClaimDirectory) -> None:
    draft = Path(f"{directory.path}/claims/.4242")
    draft.write_text("oci-vfio-hooks 2\ncontainer\tc1\n")
    directory.remove_drafts()
    assert directory.read_claims() == []
    assert not draft.exists()


def test_read_claims_changes_nothing(directory: ClaimDirectory) -> None:
    # --dry-run looks without the machine-wide lock, while another hook is about to rename its draft.
    draft = Path(f"{directory.path}/claims/.4242")
    draft.write_text("")
    make_claim(directory, "c1")
    assert [claim.container for claim in directory.read_claims()] == ["c1"]
    assert draft.exists()


def test_open_undo_log_write_error_leaves_no_draft(directory: ClaimDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="No space"):
        directory.open_undo_log(Owner("c1", 7, 70), ("4",))
    monkeypatch.undo()
    assert os.listdir(f"{directory.path}/claims") == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_read_claim_removed_meanwhile(directory: ClaimDirectory) -> None:
    path = make_claim(directory, "c1")
    claim = read_one(directory)
    os.unlink(path)
    assert directory.reopen_undo_log(claim) is None
    assert directory.read_claim(path) is None


def test_reopen_undo_log_torn_line_continued(directory: ClaimDirectory) -> None:
    path = make_claim(directory, "c1")
    with open(path, "ab") as file:
        file.write(b"device\t0000:01:00.0\te100")
    undo_log = directory.reopen_undo_log(read_one(directory))
    assert isinstance(undo_log, UndoLog)
    undo_log.add("group", "5")
    undo_log.close()
    assert read_one(directory).groups == ("4", "5")


def test_read_entries_only_of_this_run(directory: ClaimDirectory) -> None:
    make_claim(directory, "c1")
    undo_log = directory.reopen_undo_log(read_one(directory))
    assert undo_log is not None
    undo_log.add("device", "0000:01:00.0", "e1000e", "", 5, "8086", "10d3", "020000")
    assert [entry.kind for entry in directory.read_entries(undo_log)] == ["device"]
    # Also when somebody removed the file meanwhile: the steps have to be undone all the same.
    os.unlink(undo_log.path)
    assert [entry.kind for entry in directory.read_entries(undo_log)] == ["device"]
    undo_log.close()


def test_list_owners_excludes_own_claim(directory: ClaimDirectory) -> None:
    make_claim(directory, "c1", groups=("4", "5"))
    make_claim(directory, "c2", groups=("6",))
    claims = directory.read_claims()
    assert dict(list_owners(claims, excluding=directory.undo_log_path("c3"))) == {"4": "c1", "5": "c1", "6": "c2"}
    assert dict(list_owners(claims, excluding=directory.undo_log_path("c1"))) == {"6": "c2"}
