# SPDX-License-Identifier: Apache-2.0
"""Writes to sysfs that may block for ever, done in child processes under a deadline.

A driver's remove() can hang, and a blocked write can't be called off from its own process (driverctl, dpdk-devbind and
libvirt hang with it). Each device has a child of its own, so that devices are also bound side by side.
"""

from __future__ import annotations

import errno
import os

from oci_hooks.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oci_hooks.command import Deadline


class Write(Record):
    """One write to a sysfs attribute. tolerated: errno values that mean there was nothing to do."""

    path: str
    data: str
    tolerated: tuple[int, ...] = ()


class Job(Record):
    """The writes for one device, in order. address: BDF."""

    address: str
    writes: tuple[Write, ...]


class Result(Record):
    """How a job ended. code: errno, 0 for success, ETIMEDOUT where it still blocks; path: of the write that failed."""

    address: str
    code: int
    path: str

    @property
    def blocked(self) -> bool:
        """Whether the kernel still holds the child in a write."""
        return self.code == errno.ETIMEDOUT


def run_jobs(jobs: Iterable[Job], deadline: Deadline, private: tuple[int, ...] = ()) -> list[Result]:
    """Do the jobs side by side and return how each ended, in their order.

    private: descriptors that a child must not keep open: a child that hangs keeps what it inherited, locks among it.
    """
    started = [(job, *start_worker(job, private)) for job in jobs]
    return [finish_worker(job, pid, pipe, deadline) for job, pid, pipe in started]


def start_worker(job: Job, private: tuple[int, ...]) -> tuple[int, int]:
    """Start a child for a job and return its pid and the pipe that will say how it ended."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    # Whatever happens here, the child must not return into the hook.
    code = errno.EIO
    try:
        detach(private)
        code, index = do_writes(job)
        os.write(writer, f"{code} {index}".encode())
    finally:
        os._exit(code and 1)
    raise AssertionError("unreachable")


def detach(private: tuple[int, ...]) -> None:
    """Let go of what the runtime waits for: a child that hangs must not keep its pipes open."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in private:
        os.close(fd)


def do_writes(job: Job) -> tuple[int, int]:
    """Do a job's writes until one fails. Return errno and the number of the write, or zero and how many there were."""
    for index, write in enumerate(job.writes):
        try:
            write_attribute(write.path, write.data)
        except OSError as error:
            if error.errno not in write.tolerated:
                return error.errno or errno.EIO, index
    return 0, len(job.writes)


def write_attribute(path: str, data: str) -> None:
    """Write one sysfs attribute, in the single write that the kernel wants. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data.encode())
    finally:
        os.close(fd)


def finish_worker(job: Job, pid: int, pipe: int, deadline: Deadline) -> Result:
    """Wait for a child until the deadline and return how its job ended."""
    import select

    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    try:
        if not poller.poll(deadline.remaining() * 1000):
            import signal

            # It takes effect when the kernel lets go, so that the job's remaining writes are not done late.
            os.kill(pid, signal.SIGKILL)
            return Result(job.address, errno.ETIMEDOUT, job.writes[-1].path)
        words = os.read(pipe, 64).split()
    finally:
        os.close(pipe)
    os.waitpid(pid, 0)
    if len(words) != 2:
        return Result(job.address, errno.EIO, "")
    code, index = int(words[0]), int(words[1])
    return Result(job.address, code, job.writes[index].path if code else "")
