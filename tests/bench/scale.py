# SPDX-License-Identifier: Apache-2.0
"""The host check on a busy host: many devices, groups, processes and descriptors.

Here the devices are made ones and the processes real; in the machine the group and the hypervisor that has it are real,
too. A host without the crowd is measured before it comes and after it has gone.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.plain import HOST_HOOK, MORE, put_in_place, take_away, write_bundle
from tests.bench.timing import Case, Samples, take_turns
from tests.support.fake_host import HostTree, fill_host

DEVICES, MEMBERS, GROUPS = 512, 2, 64
PROCESSES, DESCRIPTORS = 4000, 50
# In an emulated machine.
FEW = 300
# Nobody stays for longer, whatever becomes of the benchmark.
SECONDS = "1800"
# Each of them reads all descriptors: by stat(2), by readlink(2), and both.
PEERS = {"fuser": "fuser {0}", "ls": "ls -l /proc/[0-9]*/fd; true", "lsof": "lsof -n -w {0}"}


@contextmanager
def run_crowd(number: int, descriptors: int, *paths: str) -> Iterator[None]:
    """Have so many processes with so many descriptors each. paths: files that one more process has open."""
    files: list[int] = []
    while len(files) < descriptors - 3:
        files += [*os.pipe(), os.eventfd(0), os.open("/etc/passwd", os.O_RDONLY)]
    pids = []
    try:
        for file in files:
            os.set_inheritable(file, True)
        pids += [start_sleeper() for _ in range(number)]
        for path in paths:
            files.append(os.open(path, os.O_RDWR))
            os.set_inheritable(files[-1], True)
        pids += [start_sleeper()] if paths else []
        for file in files:
            os.close(file)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def start_sleeper() -> int:
    """Start a process that does nothing and has the inheritable descriptors of this one."""
    return os.posix_spawn("/bin/sleep", ["sleep", SECONDS], {})


def make_host(top: Path, devices: int, groups: int) -> list[tuple[str, int, int]]:
    """Make a host and return the nodes of the groups that vfio-pci has."""
    host = HostTree(top)
    nodes = fill_host(host, devices, MEMBERS, groups)
    host.write("/dev/null")
    host.write("/dev/vfio/vfio")
    return nodes


@contextmanager
def be_on(top: Path) -> Iterator[None]:
    """Have a made host in the place of this one."""
    put_in_place(top)
    try:
        yield
    finally:
        take_away()


def list_surveys(name: str, hook: str, node: str) -> list[Case]:
    """Return the survey of all groups, and peers that look who has this node open."""
    peers = [Case(f"{name} {peer}", ("/bin/sh", "-c", line.format(node))) for peer, line in PEERS.items()]
    return [Case(f"{name} all", (hook, "--all")), *peers]


def measure_here(scratch: Path, runs: int) -> Samples:
    """Return samples of a check of one free group, on a small host and on a busy one, and of surveys of the latter."""
    small, large = scratch / "small", scratch / "large"
    make_host(small, 2 * MEMBERS, 1)
    nodes = make_host(large, DEVICES, GROUPS)
    state = write_bundle(scratch / "scale", nodes[:1])
    idle, busy = Case("scale idle", (HOST_HOOK,), state), Case("scale busy", (HOST_HOOK,), state)
    before = measure_idle(small, idle, runs * MORE // 2)
    held = nodes[1][0]
    with run_crowd(PROCESSES, DESCRIPTORS), be_on(large), run_crowd(0, 3, held):
        samples = take_turns([busy], runs * MORE, f"host check, {PROCESSES} processes")
        samples |= take_turns(list_surveys("scale", HOST_HOOK, held), (runs + 1) // 2, f"survey, {PROCESSES} processes")
    after = measure_idle(small, idle, runs * MORE // 2)
    return samples | {idle.name: before[idle.name] + after[idle.name]}


def measure_idle(top: Path, case: Case, runs: int) -> Samples:
    """Return samples of a check on a small host without a crowd."""
    with be_on(top):
        return take_turns([case], runs, "host check, small host")


def measure_inside(hook: str, address: str, runs: int) -> Samples:
    """Return samples of checks of a real group: free, and in use by the container's own hypervisor.

    address: a function that is bound to vfio-pci.
    """
    from tests.vm import guest
    from tests.vm.hypervisors import VIOMMU, run_qemu

    node = f"/dev/vfio/{guest.group_of(address)}"
    number = os.stat(node).st_rdev
    with TemporaryDirectory() as directory:
        state = write_bundle(Path(directory) / "bundle", [(node, os.major(number), os.minor(number))])
        with run_qemu("bench", *VIOMMU) as pid:
            cases = [Case("scale vm idle", (hook,), state), Case("scale vm idle own", (hook,), set_pid(state, pid))]
            samples = take_turns(cases, runs, "host check, few processes")
        with run_crowd(FEW, DESCRIPTORS):
            case = Case("scale vm busy", (hook,), state)
            samples |= take_turns([case], runs, f"host check, {FEW} processes")
            with run_qemu("bench", *VIOMMU, address=address) as pid:
                cases = [Case("scale vm busy own", (hook,), set_pid(state, pid))]
                samples |= take_turns(cases, runs, "host check, its hypervisor has the group")
                surveys = list_surveys("scale vm", hook, node)
                samples |= take_turns(surveys, (runs + 1) // 2, f"survey, {FEW} processes")
    return samples


def set_pid(state: bytes, pid: int) -> bytes:
    """Return a state with another process."""
    return json.dumps({**json.loads(state), "pid": pid}).encode()
