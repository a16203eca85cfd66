# SPDX-License-Identifier: Apache-2.0
"""Claims: which container has which group, in one undo log each below /run/oci-vfio-hooks, locked across processes.

A claim names its owner: the container by id and bundle, its init by pid and start time, and its cgroups. This shows
when the container has ended, which not every runtime reports by poststop, and which container a poststop is for: an id
is unique only within one runtime's state directory. A locked undo log means that a hook is at work on it; an undo log
that is neither locked nor done was left by a killed hook.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from oci_hooks.findings import Refusal
from oci_hooks.frozen import Frozen
from oci_hooks.guest.homes import Home, is_occupied
from oci_hooks.guest.locks import take_lock, try_lock
from oci_hooks.guest.rights import explain_error, refuse_without_root
from oci_hooks.guest.undo_log import FORMAT, OWNER, UNDO_LOG_LIMIT, Entry, UndoLog, parse_undo_log, quote, unquote
from oci_hooks.linux.processes import read_start_time
from oci_hooks.system import Descriptor, Root, step, tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from oci_hooks.system import Deadline

STATE_DIRECTORY = "/run/oci-vfio-hooks"
# Prefix of the file name for an id that is too long to be one; no other id gets it.
HASH_PREFIX = "sha256-"
# Errors of the hook's own process, which are no defect of a claim.
RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Owner(Frozen):
    """The owner of a claim.

    container: its id; pid, start: its init process (start in clock ticks since boot); bundle: path of its bundle; home:
    its cgroups.
    """

    tag = "owner"

    container: str
    pid: int
    start: int
    bundle: str = ""
    home: Home = Home()


class Claim(Frozen):
    """A container's claim, as its undo log has it now.

    container: its id; pid, start, bundle, home: as in Owner; groups: those it has; entries: all of the undo log; done:
    its hook succeeded; at_work: its hook still runs; problem: why it cannot be undone, "" if it can; with a problem the
    other fields hold only what could be read.
    """

    tag = "claim"

    path: str
    container: str
    pid: int
    start: int
    groups: tuple[str, ...]
    entries: tuple[Entry, ...]
    done: bool
    at_work: bool
    bundle: str = ""
    home: Home = Home()
    problem: str = ""

    def is_stale(self, root: Root) -> bool:
        """Return whether it must be undone: its hook was killed, or all processes of its container have ended."""
        if self.at_work or self.problem:
            return False
        return not (self.done and (self.is_alive(root) or is_occupied(root, self.home)))

    def is_alive(self, root: Root) -> bool:
        """Return whether the container's init is still the same process."""
        return self.start > 0 and read_start_time(root, self.pid) == self.start


class ClaimDirectory:
    """The claims of a machine. path: their directory on this machine; root: access to the system."""

    def __init__(self, path: str = "", root: Root | None = None) -> None:
        self.root = root or Root()
        self.path = path or self.root.host_path(STATE_DIRECTORY)

    @step("prepare-claims")
    def prepare(self) -> None:
        """Create the directory, for root only.

        Raises Refusal [state-directory] if others can change it, [not-root] for a hook without root's rights; OSError.
        """
        for path in (self.path, f"{self.path}/claims"):
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                found = os.lstat(path)
                if (
                    not os.path.isdir(path)
                    or os.path.islink(path)
                    or found.st_uid != os.geteuid()
                    or found.st_mode & 0o22
                ):
                    refuse_without_root(self.root, path)
                    problem = "must be a directory that root owns and only root can write to"
                    raise Refusal("state-directory", path, problem, "remove it; the hook creates it again") from None
            except OSError as error:
                refuse_without_root(self.root, path)
                raise explain_error(error, path) from None

    @step("lock-claims")
    def lock(self, deadline: Deadline) -> Descriptor:
        """Return a descriptor that holds the machine-wide lock. Raises Refusal [lock-timeout]."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = Descriptor(os.open(f"{self.path}/lock", flags, 0o600))
        except OSError as error:
            raise explain_error(error, self.path) from None
        try:
            take_lock(fd, deadline, f"{self.path}/lock")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def undo_log_path(self, container: str) -> str:
        """Return the path of a container's undo log, for any id."""
        name = quote(container)
        if name.startswith((".", HASH_PREFIX)):
            name = f"%{ord(name[0]):02x}{name[1:]}"
        if len(name) > 200:
            import hashlib

            name = HASH_PREFIX + hashlib.sha256(container.encode("utf-8", "surrogateescape")).hexdigest()
        return f"{self.path}/claims/{name}"

    @step("read-claims")
    def read_claims(self, excluding: str = "") -> list[Claim]:
        """Return every claim, but for the one of a path. Without the lock they may change while they are read."""
        paths = (f"{self.path}/claims/{name}" for name in self.list_files() if not name.startswith("."))
        claims = (self.read_claim(path) for path in paths if path != excluding)
        return [claim for claim in claims if claim is not None]

    @step("remove-drafts")
    def remove_drafts(self) -> None:
        """Remove the drafts of killed hooks. Call it with the lock held, as hooks create and rename drafts under it."""
        for name in self.list_files():
            path = f"{self.path}/claims/{name}"
            if name.startswith(".") and not os.path.isdir(path):
                os.unlink(path)

    def list_files(self) -> list[str]:
        """Return the file names of undo logs and drafts."""
        try:
            return sorted(os.listdir(f"{self.path}/claims"))
        except FileNotFoundError:
            return []

    @step("read-claim")
    def read_claim(self, path: str) -> Claim | None:
        """Return one claim; None if the path does not exist or is not a regular file.

        A claim that cannot be read is returned with a problem. Raises OSError if this process lacks descriptors or
        memory.
        """
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return None
            # O_NONBLOCK: if a pipe has replaced the file since, open() must not wait for its other end.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                # Shared: two that only read, a hook and a survey, are not at work for each other.
                at_work = not try_lock(fd, fcntl.LOCK_SH)
                data = read_head(fd, UNDO_LOG_LIMIT + 1)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in RESOURCE_ERRNOS:
                raise
            return make_claim(path, [], False).replace(problem=f"cannot be read: {error.strerror}")
        claim = make_claim(path, parse_undo_log(data), at_work)
        return claim.replace(problem=self.find_problem(claim, data))

    def find_problem(self, claim: Claim, data: bytes) -> str:
        """Return why a claim cannot be undone, "" if it can. data: the content of its file."""
        if len(data) > UNDO_LOG_LIMIT:
            return f"is longer than {UNDO_LOG_LIMIT} bytes"
        if not data.startswith(FORMAT.encode() + b"\n"):
            return f"does not have the format of this version of the hook, {FORMAT}"
        if tuple(entry.kind for entry in claim.entries[: len(OWNER)]) != OWNER:
            return "is damaged: it does not begin with the entries of its container"
        if self.undo_log_path(claim.container) != claim.path:
            return f"is damaged: it names another container, {claim.container}"
        return ""

    @step("read-undo-log")
    def read_entries(self, undo_log: UndoLog) -> tuple[Entry, ...]:
        """Return the entries that this run has added to an undo log, even if the file was removed meanwhile."""
        return tuple(parse_undo_log(os.pread(undo_log.fd, UNDO_LOG_LIMIT, undo_log.kept)))

    @step("read-whole-undo-log")
    def read_all_entries(self, undo_log: UndoLog) -> tuple[Entry, ...]:
        """Return all entries of an undo log, including those of earlier runs of this container's hook."""
        return tuple(parse_undo_log(os.pread(undo_log.fd, UNDO_LOG_LIMIT, 0)))

    @step("open-undo-log")
    def open_undo_log(self, owner: Owner, groups: tuple[str, ...]) -> UndoLog:
        """Write a new claim and return its undo log, locked. Call it with the machine-wide lock held.

        This replaces an older undo log of the same container, which must have been undone or taken over before.
        """
        path = self.undo_log_path(owner.container)
        draft = f"{self.path}/claims/.{os.getpid()}"
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            undo_log = UndoLog(fd, path)
            undo_log.write(f"{FORMAT}\n".encode())
            undo_log.add("container", owner.container)
            undo_log.add("bundle", owner.bundle)
            undo_log.add("init", owner.pid, owner.start)
            undo_log.add("cgroup", *owner.home.as_dict().values())
            for name in groups:
                undo_log.add("group", name)
            # Other hooks never see a claim that is incomplete or not locked.
            os.rename(draft, path)
        except BaseException:
            os.close(fd)
            os.unlink(draft)
            raise
        return undo_log

    def add_revoked(self, claim: Claim, numbers: str) -> None:
        """Record in a claim that its container no longer has some device numbers. Raises OSError.

        Call it with the machine-wide lock held, also while a hook is at work on the claim: an entry is one write.
        """
        try:
            fd = os.open(claim.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        size = os.fstat(fd).st_size
        try:
            UndoLog(fd, claim.path, torn=ends_mid_line(fd), size=size).add("revoked", numbers)
        except OSError:
            # Remove a partial line: the hook at work would append its next line directly to it.
            os.ftruncate(fd, size)
            raise
        finally:
            os.close(fd)

    @step("reopen-undo-log")
    def reopen_undo_log(self, claim: Claim) -> UndoLog | None:
        """Return the undo log of an existing claim, locked; None if a hook, or a blocked step of one, has the lock.

        Also None if the file has just gone: a hook that fails removes its claim without the machine-wide lock.
        """
        try:
            fd = os.open(claim.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        if try_lock(fd):
            size = os.fstat(fd).st_size
            return UndoLog(fd, claim.path, size if claim.done else 0, ends_mid_line(fd), size)
        os.close(fd)
        return None


def make_claim(path: str, entries: list[Entry], at_work: bool) -> Claim:
    """Return the claim that an undo log's entries describe."""
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry.kind, entry)
    container = first["container"].words[0] if "container" in first else name_container(path)
    pid, start = (first["init"].number(0), first["init"].number(1)) if "init" in first else (0, 0)
    bundle = first["bundle"].words[0] if "bundle" in first else ""
    home = make_home(first["cgroup"]) if "cgroup" in first else Home()
    groups = tuple(entry.words[0] for entry in entries if entry.kind == "group")
    return Claim(path, container, pid, start, groups, tuple(entries), "done" in first, at_work, bundle, home)


def make_home(entry: Entry) -> Home:
    """Return the cgroups in an entry of the kind `cgroup`."""
    return Home(entry.words[0], entry.number(1), entry.words[2], entry.number(3))


def name_container(path: str) -> str:
    """Return the container's id from the name of its claim; the name itself if the id cannot be derived from it."""
    name = path.rpartition("/")[2]
    try:
        return unquote(name)
    except ValueError:
        return name


def read_head(fd: int, maximum: int) -> bytes:
    """Return the first bytes of a file. Raises OSError."""
    data = b""
    while len(data) < maximum:
        more = os.read(fd, maximum - len(data))
        if not more:
            break
        data += more
    return data


def ends_mid_line(fd: int) -> bool:
    """Return whether the last line of an undo log is incomplete."""
    return os.pread(fd, 1, max(os.fstat(fd).st_size - 1, 0)) != b"\n"


def list_owners(claims: list[Claim], excluding: str) -> Iterator[tuple[str, str]]:
    """Yield (group, container) for every claim but one. excluding: its path."""
    for claim in claims:
        if claim.path != excluding:
            for group in claim.groups:
                yield group, claim.container


@tagged("remove-claim")
def remove_claim(path: str) -> None:
    """Remove a claim that was undone. Raises OSError."""
    if os.path.lexists(path):
        os.unlink(path)
