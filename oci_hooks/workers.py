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
    from collections.abc import Callable, Iterable

    from oci_hooks.command import Deadline


# How long a killed child may take to end.
KILL_SECONDS = 0.1


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
    """How a job ended. code: errno, 0 for success, ETIMEDOUT where it still blocks; path: of the write that failed;
    started: False where there was no process to be had for it, or that was killed: it has to be done again."""

    address: str
    code: int
    path: str
    started: bool = True

    @property
    def blocked(self) -> bool:
        """Whether the kernel still holds the child in a write."""
        return self.code == errno.ETIMEDOUT


class Worker(Record):
    """A child at work. pipe: says how it ended; pid: 0, and pipe -1, where it could not be started, because of code."""

    job: Job
    pid: int
    pipe: int
    code: int = 0


def run_jobs(
    jobs: Iterable[Job],
    deadline: Deadline,
    private: tuple[int, ...] = (),
    meanwhile: Callable[[], None] | None = None,
) -> list[Result]:
    """Do the jobs side by side and return how each ended, in their order.

    private: descriptors that a child must not keep open: a child that hangs keeps what it inherited, locks among it;
    meanwhile: what this process does where it would only wait for the kernel.
    """
    workers: list[Worker] = []
    results: list[Result] = []
    try:
        for job in jobs:
            worker = start_worker(job, private)
            # Where processes or descriptors are few, the next begins when the first has ended.
            while not worker.pid and len(results) < len(workers):
                results.append(finish_worker(workers[len(results)], deadline))
                worker = start_worker(job, private)
            workers.append(worker)
        if workers and meanwhile:
            meanwhile()
        for worker in workers[len(results) :]:
            results.append(finish_worker(worker, deadline))
    finally:
        # After an interruption: nothing may still be written while what was done is put back.
        for worker in workers[len(results) :]:
            end_worker(worker)
    return results


def start_worker(job: Job, private: tuple[int, ...]) -> Worker:
    """Start a child for a job."""
    try:
        reader, writer = os.pipe()
    except OSError as error:
        return Worker(job, 0, -1, error.errno or errno.EIO)
    parent = os.getpid()
    code = errno.EIO
    try:
        pid = os.fork()
        if pid == 0:
            # Each descriptor that is free is one more for the writes.
            os.close(reader)
            detach(private)
            code, index = do_writes(job)
            os.write(writer, f"{code} {index}".encode())
    except OSError as error:
        os.close(reader)
        return Worker(job, 0, -1, error.errno or errno.EIO)
    finally:
        # Whatever happens in the child, also a signal's exception: it must not return into the hook.
        if os.getpid() != parent:
            os._exit(code and 1)
        os.close(writer)
    return Worker(job, pid, reader)


def detach(private: tuple[int, ...]) -> None:
    """Let go of what the runtime waits for: a child that hangs must not keep its pipes open."""
    # Where the limit on open files is reached there is no number for a fourth.
    os.close(0)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (1, 2):
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


def finish_worker(worker: Worker, deadline: Deadline) -> Result:
    """Wait for a child until the deadline and return how its job ended."""
    job = worker.job
    if not worker.pid:
        return Result(job.address, worker.code, "", started=False)
    if not wait_for_answer(worker, deadline.remaining()):
        end_worker(worker)
        return Result(job.address, errno.ETIMEDOUT, "")
    words = os.read(worker.pipe, 64).split()
    end_worker(worker)
    if len(words) != 2:
        # Killed (out of memory): how far it came is not known, so it is as if it had not begun.
        return Result(job.address, errno.EIO, "", started=False)
    code, index = int(words[0]), int(words[1])
    return Result(job.address, code, job.writes[index].path if code else "")


def wait_for_answer(worker: Worker, seconds: float) -> bool:
    """Tell whether a child has answered, or died, within some seconds."""
    import select

    poller = select.poll()
    poller.register(worker.pipe, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def end_worker(worker: Worker) -> None:
    """Kill a child unless it has answered, and reap it, unless it hangs in the kernel. Twice is as once.

    The kill takes effect when the kernel lets go of it, so that the job's remaining writes are not done late.
    """
    if not worker.pid or not is_open(worker.pipe):
        return
    if not wait_for_answer(worker, 0):
        import signal

        os.kill(worker.pid, signal.SIGKILL)
    # What has answered, or can be killed, ends at once; its end closes the pipe.
    if wait_for_answer(worker, KILL_SECONDS):
        reap(worker.pid)
    # Last: as long as it is open, the child has still to be ended.
    os.close(worker.pipe)


def reap(pid: int) -> None:
    """Take a child's exit code from the kernel."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        # The runtime ignores its children (SIGCHLD, inherited), and so the kernel has; or a signal came right after.
        return


def is_open(fd: int) -> bool:
    """Tell whether a descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
