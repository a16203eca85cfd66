# SPDX-License-Identifier: Apache-2.0
"""Nodes that a container can open after the hook, and the privileges that the hooks need.

The lists are read from docs/reference/privileges.md, so that it has exactly what was run.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Container, Containers, Done

MACHINE = "standard"
KERNELS = ("6.1",)
PRIVILEGES = bundles.REPOSITORY / "docs/reference/privileges.md"
UNISTD = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
Number = tuple[str, int, int]


# What opens ----------------------------------------------------------------------------------------------------------

# Of each of 512 majors these minors are tried, in addition to every device that the machine has.
MAJORS, MINORS = range(512), (0, 1, 2, 3, 5, 7, 8, 9, 11, 63, 64, 128, 196, 200, 255)
KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK}


def list_numbers() -> set[Number]:
    """Return the device numbers to try."""
    numbers = {(kind, major, minor) for kind in KINDS for major in MAJORS for minor in MINORS}
    for kind, directory in (("c", "char"), ("b", "block")):
        for path in Path(f"/sys/dev/{directory}").iterdir():
            major, minor = path.name.split(":")
            numbers.add((kind, int(major), int(minor)))
    return numbers


def make_nodes(numbers: set[Number]) -> Path:
    """Create a node of each number and return their directory."""
    top = Path("/run/every-node")
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir()
    for kind, major, minor in numbers:
        os.mknod(top / f"{kind}-{major}-{minor}", KINDS[kind] | 0o600, os.makedev(major, minor))
    return top


def find_permitted(container: Container, top: Path) -> set[Number]:
    """Return the numbers whose opening inside the container's cgroup is not answered with EPERM."""
    answer = Path("/run/every-answer")
    child = os.fork()
    if child == 0:
        try:
            Path(f"/sys/fs/cgroup/{container.name}/cgroup.procs").write_text("0")
            answer.write_text("\n".join(name for name in os.listdir(top) if try_open(top / name) != errno.EPERM))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    words = [name.split("-") for name in answer.read_text().split()]
    answer.unlink()
    return {(kind, int(major), int(minor)) for kind, major, minor in words}


def try_open(path: Path) -> int:
    """Return what opening a node comes to, as errno."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def test_guest_privilege_only_own_nodes_open(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    container, state = guest_calls.make_created(containers, annotations=ask(nic))
    numbers = list_numbers()
    assert len(numbers) > 15_000
    top = make_nodes(numbers)
    before = find_permitted(container, top)
    # The sweep finds allowed devices: those that every runtime gives every container (config-linux.md, default
    # devices).
    assert ("c", 1, 3) in before
    assert len(before) < 1000
    assert guest_calls.fork_hook(state) == Done(0, "", "")
    own = {("c", 10, 196), ("c", *guest.numbers_of_group(guest.group_of(nic)))}
    assert own <= numbers
    assert find_permitted(container, top) - before == own
    assert guest_calls.release(state).code == 0
    assert find_permitted(container, top) == before
    shutil.rmtree(top)


# With how little -----------------------------------------------------------------------------------------------------


def read_list(title: str) -> list[str]:
    """Return the words of the indented block below a heading of docs/reference/privileges.md."""
    part = PRIVILEGES.read_text().split(f"\n### {title}\n", 1)[1].split("\n#", 1)[0]
    words = " ".join(line.strip() for line in part.splitlines() if line.startswith("    ")).split()
    assert words, title
    return words


def read_capabilities() -> dict[str, int]:
    """Return the kernel's capabilities by name (include/uapi/linux/capability.h)."""
    text = Path("/usr/include/linux/capability.h").read_text()
    return {name: int(number) for name, number in re.findall(r"#define\s+(CAP_\w+)\s+(\d+)", text)}


def keep_capabilities(names: Sequence[str]) -> Callable[[], None]:
    """Return what leaves a process and all that it executes only these capabilities."""
    known = read_capabilities()
    kept = {known[name] for name in names}
    library = ctypes.CDLL(None)

    def drop() -> None:
        for number in range(max(known.values()) + 1):
            if number not in kept and library.prctl(24, number, 0, 0, 0):  # PR_CAPBSET_DROP
                raise OSError(f"capability {number}")

    return drop


def read_calls() -> dict[str, int]:
    """Return this machine's system calls by name."""
    return {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", UNISTD.read_text())}


def allow_calls(names: Sequence[str]) -> Callable[[], None]:
    """Return what leaves a process and all that it executes only these system calls: another one kills it.

    Of use with close_fds=False only: subprocess would make a system call of its own between this and execve.
    """
    known = read_calls()
    numbers = sorted(known[name] for name in names)
    # Classic BPF on struct seccomp_data: load nr; equal to one of these → allow; else kill (seccomp(2)).
    code = [struct.pack("<HBBI", 0x20, 0, 0, 0)]
    code += [struct.pack("<HBBI", 0x15, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    code += [struct.pack("<HBBI", 0x06, 0, 0, 0x80000000), struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)]
    library = ctypes.CDLL(None, use_errno=True)

    def restrict() -> None:
        filters = ctypes.create_string_buffer(b"".join(code))
        program = ctypes.create_string_buffer(struct.pack("<H6xQ", len(code), ctypes.addressof(filters)))
        if library.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            raise OSError(ctypes.get_errno(), "seccomp")

    return restrict


GUEST_CASES: dict[str, dict[str, Any]] = {
    "root": {"devices": bundles.vfio_devices("77")},
    "user": {"user": 1000},
    "user-namespace": {"user_namespace": 100000},
}
CAPABILITY_TITLES = {
    "root": ("Guest hook",),
    "user": ("Guest hook", "Guest hook, a container whose user is not root"),
    "user-namespace": ("Guest hook", "Guest hook, a container with a user namespace"),
}


@one_runtime
@pytest.mark.parametrize("case", GUEST_CASES)
def test_guest_privilege_documented_set_suffices(containers: Containers, case: str) -> None:
    """The real executable, to bind and to release, with the capabilities and system calls that are written down."""
    nic = guest.find_device(devices.NIC_E1000E)
    # The lists are those with the module loaded: modprobe has needs of its own.
    guest.bind(nic, "vfio-pci")
    guest.bind_native(nic)
    _, state = guest_calls.make_created(containers, annotations=ask(nic), **GUEST_CASES[case])
    capabilities = [name for title in CAPABILITY_TITLES[case] for name in read_list(title)]
    drop, restrict = keep_capabilities(capabilities), allow_calls(read_list("System calls of the guest hook"))

    def prepare() -> None:
        drop()
        restrict()

    # With a guard, which needs calls of its own.
    with guest_calls.settings("deadline = 60", 'on_failure = "kill"'):
        done = guest_calls.call_hook(state, preexec_fn=prepare, close_fds=False)
    assert (done.code, done.stderr) == (0, "")
    assert guest.driver_of(nic) == "vfio-pci"
    guest_calls.forget_success(str(state["id"]))
    done = guest_calls.call_hook({**state, "status": "stopped"}, "poststop", preexec_fn=prepare, close_fds=False)
    assert (done.code, done.stderr) == (0, "")
    assert guest.driver_of(nic) == "e1000e"


@one_runtime
def test_guest_privilege_each_one_needed(containers: Containers) -> None:
    """None is there for nothing: without it the hook refuses in words and leaves the device as it was."""
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    _, state = guest_calls.make_created(containers, annotations=ask(nic))
    names = read_list("Guest hook")
    for missing in names:
        drop = drop_one(missing)
        done = guest_calls.fork_hook(state, prepare=drop)
        assert done.code == 1, (missing, done)
        assert guest_calls.list_findings(done), missing
        assert guest_calls.fork_hook({**state, "status": "stopped"}, "poststop").code == 0
        assert guest_calls.look_at_drivers() == before, missing


def drop_one(name: str) -> Callable[[], None]:
    """Return what takes one capability from this process (capset(2)); there is no exec that would give it back."""
    mask = ~(1 << read_capabilities()[name])

    def drop() -> None:
        library = ctypes.CDLL(None, use_errno=True)
        header = ctypes.create_string_buffer(struct.pack("<Ii", 0x20080522, 0))
        data = ctypes.create_string_buffer(24)
        library.capget(header, data)
        effective, permitted, _, high, high_permitted, _ = struct.unpack("<6I", data.raw)
        low = mask & 0xFFFFFFFF
        new = (effective & low, permitted & low, 0, high & (mask >> 32) & 0xFFFFFFFF, high_permitted, 0)
        if library.capset(header, ctypes.create_string_buffer(struct.pack("<6I", *new))):
            raise OSError(ctypes.get_errno(), "capset")

    return drop


@pytest.fixture(name="group")
def make_group(native_drivers: None) -> Iterator[str]:
    """Return a group that is ready for a container."""
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    yield guest.group_of(nic)


@pytest.mark.parametrize("good", [True, False])
def test_host_privilege_documented_set_suffices(group: str, tmp_path: Path, good: bool) -> None:
    """A good group and one that is not there; the check opens the group and looks at who holds it."""
    entry = bundles.vfio_device(group, *guest.numbers_of_group(group)) if good else bundles.vfio_device("999")
    (tmp_path / "config.json").write_text(json.dumps({"linux": {"devices": [entry]}}))
    drop = keep_capabilities(read_list("Host check"))
    restrict = allow_calls(read_list("System calls of the host check"))

    def prepare() -> None:
        drop()
        restrict()

    state = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "bundle": str(tmp_path), "pid": os.getpid()}
    done = guest_calls.call_hook(state, hook=bundles.find_hook(bundles.HOST_HOOK), preexec_fn=prepare, close_fds=False)
    assert done.code == (0 if good else 1), done
    assert ("[group-missing]" in done.stderr) != good
