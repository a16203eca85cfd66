# SPDX-License-Identifier: Apache-2.0
"""Write to sysfs in a child process under a deadline, because such a write may block for ever.

A driver's remove() can hang, and a process cannot cancel its own blocked write (driverctl, dpdk-devbind and libvirt
hang with it). In the child each device has a thread of its own, so that devices are bound in parallel: most of the time
is spent waiting, and a thread starts in half the time of a process and needs less memory.
"""

from __future__ import annotations

import _thread
import errno
import os

from oci_hooks.frozen import Frozen
from oci_hooks.guest.apply.child import end_child, start_child
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from oci_hooks.system import Deadline

# Seconds that a killed child may take to end: this comes off the time that is left for undoing.
KILL_SECONDS = 0.1
# Enough for a thread, instead of the usual 8 MiB, which count where memory is limited.
STACK_BYTES = 1 << 18
# A thread found no free descriptor: it can retry when the other threads have closed theirs.
CROWDED_ERRNOS = (errno.EMFILE, errno.ENFILE)


class Write(Frozen):
    """One write to a sysfs attribute. tolerated: errno values that mean there was nothing to do."""

    tag = "write"

    path: str
    data: str
    tolerated: tuple[int, ...] = ()


class Job(Frozen):
    """The writes for one device, in order.

    address: BDF; directory: of the device in sysfs, "" if the device's identity does not matter; inode: of that
    directory. If another device has the address, the job writes nothing and ends with ENODEV.
    """

    tag = "job"

    address: str
    writes: tuple[Write, ...]
    directory: str = ""
    inode: int = 0


class Result(Frozen):
    """The result of a job.

    code: errno, 0 for success, ETIMEDOUT if it still blocks; path: of the write that failed; started: False if no
    process was available for it, or the process was killed: the job must be done again.
    """

    tag = "job-result"

    address: str
    code: int
    path: str
    started: bool = True

    @property
    def blocked(self) -> bool:
        """Return whether the kernel still holds the child in a write."""
        return self.code == errno.ETIMEDOUT


@tagged("write-sysfs")
def run_jobs(
    jobs: Iterable[Job],
    deadline: Deadline,
    close_fds: tuple[int, ...] = (),
    while_waiting: Callable[[], None] | None = None,
) -> list[Result]:
    """Do the jobs in parallel and return their results, in order.

    close_fds: descriptors that the child must close (child.start_child); while_waiting: work for this process while the
    kernel binds.
    """
    jobs = tuple(jobs)
    if not jobs:
        return []
    try:
        child = start_child(lambda writer: do_jobs(jobs, writer), close_fds)
    except OSError as error:
        return [Result(job.address, error.errno or errno.EIO, "", started=False) for job in jobs]
    try:
        if while_waiting:
            while_waiting()
        answers, ended = read_answers(child.pipe, len(jobs), deadline)
        end_child(child, KILL_SECONDS)
    finally:
        # Also after an exception, such as a signal to end: nothing may be written while the changes are undone.
        end_child(child, KILL_SECONDS)
    return [make_result(job, answers.get(index), ended) for index, job in enumerate(jobs)]


def make_result(job: Job, answer: tuple[int, int] | None, ended: bool) -> Result:
    """Return a job's result. answer: errno and index of the last write; ended: whether the child is gone."""
    if answer:
        code, index = answer
        return Result(job.address, code, job.writes[index].path if code else "")
    if ended:
        # Killed (out of memory): its progress is unknown, so the job counts as not begun.
        return Result(job.address, errno.EIO, "", started=False)
    return Result(job.address, errno.ETIMEDOUT, "")


def read_answers(pipe: int, count: int, deadline: Deadline) -> tuple[dict[int, tuple[int, int]], bool]:
    """Wait for this number of answers, until the deadline or the child's end.

    Returns errno and index of the last write by the job's index, and whether the child has ended.
    """
    import select

    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    output, ended = b"", False
    while output.count(b"\n") < count and not ended and poller.poll(deadline.remaining() * 1000):
        more = os.read(pipe, 65536)
        output, ended = output + more, not more
    # Each line is a single write, so none is incomplete.
    lines = (tuple(map(int, line.split())) for line in output.splitlines())
    return {job: (code, index) for job, code, index in lines}, ended


# In the child --------------------------------------------------------------------------------------------------------


def do_jobs(jobs: tuple[Job, ...], writer: int) -> None:
    """Do the jobs, each in a thread, the last in this one; send each result as soon as it is there."""
    left: list[int] = []
    locks = []
    never = make_locked_lock()
    _thread.stack_size(STACK_BYTES)
    for number in range(len(jobs) - 1):
        lock = make_locked_lock()
        try:
            _thread.start_new_thread(do_job_in_thread, (jobs, number, writer, left, lock, never))
            locks.append(lock)
        except RuntimeError:
            # No thread is available.
            left.append(number)
    do_job(jobs, len(jobs) - 1, writer, left)
    for lock in locks:
        lock.acquire()
    # Jobs that had no thread or no descriptor.
    for number in left:
        send_answer(writer, number, do_writes(jobs[number]))


def make_locked_lock() -> _thread.LockType:
    """Return a lock in the locked state."""
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock


def do_job_in_thread(
    jobs: tuple[Job, ...], number: int, writer: int, left: list[int], lock: _thread.LockType, never: _thread.LockType
) -> None:
    """Do one job in a thread, release `lock`, then block on `never` until the child ends.

    A thread that returns opens libgcc in Python before 3.9.6 (bpo-44434), and without a free descriptor for that the C
    library aborts the process.
    """
    try:
        do_job(jobs, number, writer, left)
    finally:
        lock.release()
        never.acquire()


def do_job(jobs: tuple[Job, ...], number: int, writer: int, left: list[int]) -> None:
    """Do one job and send its result, or leave it for later."""
    answer = do_writes(jobs[number])
    if answer[0] in CROWDED_ERRNOS:
        left.append(number)
    else:
        send_answer(writer, number, answer)


def send_answer(writer: int, number: int, answer: tuple[int, int]) -> None:
    """Send a job's result. answer: errno and index of the last write.

    Raises BrokenPipeError if the hook was killed: the remaining writes are then left to the next hook.
    """
    os.write(writer, f"{number} {answer[0]} {answer[1]}\n".encode())


def do_writes(job: Job) -> tuple[int, int]:
    """Do a job's writes until one fails. Return errno and index of that write, or zero and the number of writes."""
    done, device = 0, -1
    try:
        device = open_device(job)
        for write in job.writes:
            check_device(job)
            try:
                write_attribute(find_relative(job, write.path), write.data, device)
            except OSError as error:
                if error.errno not in write.tolerated:
                    raise
            done += 1
    except OSError as error:
        return error.errno or errno.EIO, done
    finally:
        if device >= 0:
            os.close(device)
    return 0, done


def open_device(job: Job) -> int:
    """Return a descriptor of the device's directory, -1 for a job without one. Raises OSError.

    Attributes opened relative to it are this device's only: those of a device that is gone cannot be opened
    (kernfs_iop_lookup: ENOENT) or written (kernfs_fop_write_iter: ENODEV), whatever has its address by then.
    """
    if not job.directory:
        return -1
    fd = os.open(job.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if os.fstat(fd).st_ino != job.inode:
        os.close(fd)
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), job.directory)
    return fd


def check_device(job: Job) -> None:
    """Raise OSError if another device has the job's address, by which unbinding and probing work.

    Between this check and the write are some microseconds; a kernel takes milliseconds to replace a device.
    """
    if job.directory and os.stat(job.directory).st_ino != job.inode:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), job.directory)


def find_relative(job: Job, path: str) -> str:
    """Return an attribute's path relative to the device's directory; unchanged if it is elsewhere."""
    return path[len(job.directory) + 1 :] if job.directory and path.startswith(f"{job.directory}/") else path


def write_attribute(path: str, data: str, directory: int = -1) -> None:
    """Write one sysfs attribute, in the single write that the kernel requires. Raises OSError.

    directory: descriptor from which a relative path starts.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory if directory >= 0 else None)
    try:
        os.write(fd, data.encode())
    finally:
        os.close(fd)
