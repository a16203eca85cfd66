# SPDX-License-Identifier: Apache-2.0
"""Writes that may block for ever: they end at the deadline, and nothing waits for a child that hangs.

A FIFO without a reader replaces a sysfs attribute whose driver hangs: opening it for writing blocks in the kernel.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.guest.apply import sysfs_writer
from oci_hooks.guest.apply.sysfs_writer import Job, Result, Write, run_jobs
from oci_hooks.system import Deadline
from tests.support.fault_injection import list_children

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]


def make_file(path: Path) -> str:
    """Make an empty file and return its path."""
    path.write_text("")
    return str(path)


def make_blocking(path: Path) -> str:
    """Make an attribute whose write blocks, and return its path."""
    os.mkfifo(path)
    return str(path)


def count_descriptors() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def test_run_jobs_writes_in_order(tmp_path: Path) -> None:
    path = make_file(tmp_path / "a")
    other = tmp_path / "b"
    jobs = [
        Job("one", (Write(path, "vfio-pci\n"), Write(path, "x"))),
        Job("other", (Write(make_file(other), "0000:01:00.0"),)),
    ]
    before = count_descriptors(), list_children()
    assert run_jobs(jobs, Deadline(10)) == [Result("one", 0, ""), Result("other", 0, "")]
    # The second write is at the beginning of the attribute again, as sysfs wants it.
    assert (Path(path).read_text(), other.read_text()) == ("xfio-pci\n", "0000:01:00.0")
    assert (count_descriptors(), list_children()) == before


def test_run_jobs_first_failure_ends_job(tmp_path: Path) -> None:
    last = make_file(tmp_path / "last")
    gone = str(tmp_path / "gone/attribute")
    jobs = [Job("a", (Write(gone, "x"), Write(last, "x"))), Job("b", (Write("/dev/full", "x"),))]
    assert run_jobs(jobs, Deadline(10)) == [Result("a", errno.ENOENT, gone), Result("b", errno.ENOSPC, "/dev/full")]
    assert Path(last).read_text() == ""


def test_run_jobs_tolerated_error(tmp_path: Path) -> None:
    last = make_file(tmp_path / "last")
    job = Job("a", (Write(str(tmp_path / "gone"), "x", (errno.ENOENT,)), Write("/dev/full", "x"), Write(last, "x")))
    assert run_jobs([job], Deadline(10)) == [Result("a", errno.ENOSPC, "/dev/full")]
    job = job.replace(writes=(job.writes[0], job.writes[2]))
    assert run_jobs([job], Deadline(10)) == [Result("a", 0, "")]
    assert Path(last).read_text() == "x"


@pytest.mark.parametrize("order", [1, -1], ids=["in a thread", "in the first thread"])
def test_run_jobs_blocked_write_ends_at_deadline(tmp_path: Path, order: int) -> None:
    blocking, free = make_blocking(tmp_path / "unbind"), make_file(tmp_path / "free")
    before = count_descriptors()
    begun = time.monotonic()
    jobs = [Job("stuck", (Write(blocking, "x"), Write(free, "late"))), Job("free", (Write(free, "y"),))]
    stuck, other = run_jobs(jobs[::order], Deadline(1))[::order]
    assert 0.9 < time.monotonic() - begun < 20
    assert (stuck.blocked, stuck.code, stuck.started) == (True, errno.ETIMEDOUT, True)
    assert other == Result("free", 0, "")
    assert count_descriptors() == before
    # Killed: what it had still to do is not done when the kernel lets go at last.
    os.close(os.open(blocking, os.O_RDONLY | os.O_NONBLOCK))
    time.sleep(0.1)
    assert Path(free).read_text() == "y"


def test_writer_child_closes_runtime_descriptors(tmp_path: Path) -> None:
    # The runtime reads the hook's output to its end, which does not come while anybody holds the pipe.
    blocking = make_blocking(tmp_path / "unbind")
    program = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from oci_hooks.guest.apply import sysfs_writer
from oci_hooks.system import Deadline
private = os.open({str(tmp_path)!r}, os.O_RDONLY)
os.kill = lambda *_: None  # a child in a driver's remove() outlives SIGKILL
job = sysfs_writer.Job("stuck", (sysfs_writer.Write({blocking!r}, "x"),))
(result,) = sysfs_writer.run_jobs([job], Deadline(2), (private,))
(child,) = open(f"/proc/self/task/{{os.getpid()}}/children").read().split()
links = [os.readlink(f"/proc/{{child}}/fd/{{fd}}") for fd in os.listdir(f"/proc/{{child}}/fd")]
print(result.blocked, child, {str(tmp_path)!r} in links, [links.count("/dev/null") >= 3])
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert time.monotonic() - begun < 25
    blocked, child, has_private, has_null = done.stdout.split()
    os.kill(int(child), signal.SIGKILL)
    assert (blocked, has_private, has_null) == ("True", "False", "[True]")
    assert done.stderr == ""


def test_writer_child_dies_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_: Job) -> tuple[int, int]:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0, 0

    monkeypatch.setattr(sysfs_writer, "do_writes", die)
    job = Job("a", (Write(make_file(tmp_path / "a"), "x"),))
    assert run_jobs([job], Deadline(10)) == [Result("a", errno.EIO, "", started=False)]


def test_writer_child_exception_stays_in_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's cleanup is done once, by the parent."""
    parent = os.getpid()
    trace = tmp_path / "trace"

    def fail(_: Job) -> tuple[int, int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(sysfs_writer, "do_writes", fail)
    job = Job("a", (Write(make_file(tmp_path / "a"), "x"),))
    try:
        assert run_jobs([job], Deadline(10)) == [Result("a", errno.EIO, "", started=False)]
    finally:
        with trace.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if os.getpid() != parent:
            os._exit(1)
    assert trace.read_text() == f"{parent}\n"


def test_run_jobs_without_process_fails_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    before = count_descriptors(), list_children()
    files = [make_file(tmp_path / name) for name in "ab"]
    results = run_jobs([Job(path, (Write(path, "x"),)) for path in files], Deadline(10))
    assert results == [Result(path, errno.EAGAIN, "", started=False) for path in files]
    assert [Path(path).read_text() for path in files] == ["", ""]
    assert (count_descriptors(), list_children()) == before


@pytest.mark.parametrize("haves", [[False, False], [True, False], [False, True]])
def test_run_jobs_without_thread_done_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, haves: list[bool]) -> None:
    start, supply = _thread.start_new_thread, iter(haves)

    def start_new_thread(*arguments: Any) -> int:
        if not next(supply):
            raise RuntimeError("can't start new thread")
        return start(*arguments)

    monkeypatch.setattr(_thread, "start_new_thread", start_new_thread)
    files = [make_file(tmp_path / name) for name in "abc"]
    results = run_jobs([Job(path, (Write(path, "x"),)) for path in files], Deadline(10))
    assert results == [Result(path, 0, "") for path in files]
    assert [Path(path).read_text() for path in files] == ["x", "x", "x"]


def open_reading(pipes: list[str]) -> list[int]:
    """Open pipes for reading, without waiting for a writer: one that never comes must not keep the test."""
    return [os.open(pipe, os.O_RDONLY | os.O_NONBLOCK) for pipe in pipes]


def read_all(fds: list[int]) -> list[bytes]:
    """Read and close descriptors."""
    contents = [os.read(fd, 100) for fd in fds]
    for fd in fds:
        os.close(fd)
    return contents


@pytest.mark.parametrize("first", range(4))
def test_run_jobs_in_parallel(tmp_path: Path, first: int) -> None:
    """A pipe takes a writer when it has a reader: each is done while all others still wait."""
    pipes = [make_blocking(tmp_path / name) for name in "abcd"]
    readers: list[int] = []

    def read_the_others_later() -> None:
        readers.extend(open_reading([pipes[first]]))
        poller = select.poll()
        poller.register(readers[0], select.POLLIN)
        assert poller.poll(10000), "nothing was written while others waited"
        readers.extend(open_reading(pipes[:first] + pipes[first + 1 :]))

    jobs = [Job(pipe, (Write(pipe, "x"),)) for pipe in pipes]
    results = run_jobs(jobs, Deadline(20), while_waiting=read_the_others_later)
    assert results == [Result(pipe, 0, "") for pipe in pipes]
    assert read_all(readers) == [b"x"] * 4


def test_run_jobs_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that finds no free descriptor waits until the others have closed theirs."""
    real = sysfs_writer.do_jobs

    def do_jobs(jobs: tuple[Job, ...], writer: int) -> None:
        limit = count_descriptors() + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        real(jobs, writer)

    monkeypatch.setattr(sysfs_writer, "do_jobs", do_jobs)
    pipes = [make_blocking(tmp_path / name) for name in "ab"]
    free = make_file(tmp_path / "free")
    # Two at a time at most are open: the others wait until both pipes have a reader.
    jobs = [Job(pipe, (Write(pipe, "x"),)) for pipe in pipes] + [Job(free, (Write(free, "x"),))] * 6
    readers: list[int] = []

    def read_late() -> None:
        time.sleep(0.2)
        readers.extend(open_reading(pipes))

    results = run_jobs(jobs, Deadline(20), while_waiting=read_late)
    assert [result.code for result in results] == [0] * 8
    assert read_all(readers) == [b"x", b"x"]


def test_run_jobs_without_descriptor_fails_job(tmp_path: Path) -> None:
    path = make_file(tmp_path / "a")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count_descriptors() + 20, limits[1]))
    opened = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        (result,) = run_jobs([Job("a", (Write(path, "x"),))], Deadline(10))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in opened:
            os.close(fd)
    assert (result.code, result.started) == (errno.EMFILE, False)
    assert Path(path).read_text() == ""


def test_run_jobs_interrupt_ends_children_first(tmp_path: Path) -> None:
    blocking, last = make_blocking(tmp_path / "unbind"), make_file(tmp_path / "last")

    class Told(Exception):
        """Raised by the signal's handler."""

    def tell(*_: object) -> None:
        raise Told

    def interrupt_soon() -> None:
        while Path(last).read_text() != "y":
            time.sleep(0.01)
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    old = signal.signal(signal.SIGALRM, tell)
    before = count_descriptors(), list_children()
    jobs = [Job("a", (Write(blocking, "x"), Write(last, "late"))), Job("b", (Write(last, "y"),))]
    try:
        with pytest.raises(Told):
            run_jobs(jobs, Deadline(20), while_waiting=interrupt_soon)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert (count_descriptors(), list_children()) == before
    os.close(os.open(blocking, os.O_RDONLY | os.O_NONBLOCK))
    time.sleep(0.1)
    assert Path(last).read_text() == "y"


@pytest.mark.parametrize("name", ["waitpid", "close"])
def test_end_child_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A signal arrives right after a child was reaped, or right after its pipe was closed: the signal is reported."""
    parent, before = os.getpid(), (count_descriptors(), list_children())
    real, pipe = getattr(os, name), os.pipe()
    monkeypatch.setattr(os, "pipe", lambda: pipe)

    def interrupted(number: int, *more: int) -> None:
        real(number, *more)
        if os.getpid() == parent and number != pipe[1]:
            monkeypatch.undo()
            raise InterruptedError("told to end")

    monkeypatch.setattr(os, name, interrupted)
    with pytest.raises(InterruptedError):
        run_jobs([Job("a", (Write(make_file(tmp_path / "a"), "x"),))], Deadline(10))
    assert (count_descriptors(), list_children()) == before


def test_run_jobs_with_sigchld_ignored(tmp_path: Path) -> None:
    # SIG_IGN for SIGCHLD is inherited through exec, and the kernel then reaps the children by itself.
    path = make_file(tmp_path / "a")
    old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run_jobs([Job("a", (Write(path, "x"),))], Deadline(10)) == [Result("a", 0, "")]
    finally:
        signal.signal(signal.SIGCHLD, old)


def test_run_jobs_while_waiting_runs_in_parallel(tmp_path: Path) -> None:
    """A pipe holds its writer until it has a reader."""
    pipe = make_blocking(tmp_path / "pipe")
    readers: list[int] = []
    job = Job("0000:01:00.0", (Write(pipe, "x"),))
    results = run_jobs([job], Deadline(10), while_waiting=lambda: readers.extend(open_reading([pipe])))
    assert ([result.code for result in results], read_all(readers)) == ([0], [b"x"])


def test_run_jobs_empty() -> None:
    assert run_jobs([], Deadline(10), while_waiting=lambda: pytest.fail("there was nothing to wait for")) == []
