# SPDX-License-Identifier: Apache-2.0
"""Permissions on a real kernel: cgroups of version 2 and 1, real VFIO nodes, opened from inside before and after.

Programs are loaded and attached by the few lines below, not by the module under test.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oci_hooks.findings import StepError
from oci_hooks.guest.apply import bpf, cgroup, permission
from oci_hooks.guest.apply.cgroup import MadeNode
from oci_hooks.guest.apply.permission import Grant, Widening
from oci_hooks.system import Root
from tests.support.proving import prove_nodes
from tests.vm import devices, guest

MACHINE = "standard"
KERNELS = ("6.1", "6.12")

ROOT = Root()
UNIFIED = Path("/sys/fs/cgroup")
NODES = Path("/run/permission-nodes")
HARDEN = Path("/proc/sys/net/core/bpf_jit_harden")
ALLOW_OVERRIDE, ALLOW_MULTI = 1, 2
VFIO, MEM, NULL, ZERO = MadeNode("vfio", 10, 196), MadeNode("mem", 1, 1), MadeNode("null", 1, 3), MadeNode("zero", 1, 5)


# Programs of the tests' own -------------------------------------------------------------------------------------------


def call_bpf(command: int, attributes: bytes) -> int:
    """Make the system call."""
    block = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = ctypes.CDLL(None, use_errno=True).syscall(321, command, block, len(attributes))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"bpf {command}")
    return result


def load(*instructions: tuple[int, int, int, int]) -> int:
    """Load a device program of (operation, registers, offset, immediate) and return its descriptor."""
    code = b"".join(struct.pack("<BBhi", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    word = ctypes.create_string_buffer(b"GPL")
    where, license_at = ctypes.addressof(buffer), ctypes.addressof(word)
    return call_bpf(5, struct.pack("<IIQQ72x", 15, len(instructions), where, license_at))


def attach(program: int, path: Path, flags: int = ALLOW_MULTI) -> None:
    """Attach a program to a cgroup and let go of it."""
    fd = os.open(path, os.O_RDONLY)
    call_bpf(8, struct.pack("<IIII", fd, program, 6, flags))
    os.close(fd)
    os.close(program)


RETURN_0 = ((0xB7, 0, 0, 0), (0x95, 0, 0, 0))
RETURN_1 = ((0xB7, 0, 0, 1), (0x95, 0, 0, 0))
# Block devices and /dev/null only: r2 = *(u16 *)r1; r2 != 2 (char) → yes; major 1 and minor 3 → yes; else no.
ONLY_NULL = (
    (0x61, 0x12, 0, 0),
    (0x54, 0x02, 0, 0xFFFF),
    (0x55, 0x02, 4, 2),
    (0x61, 0x12, 4, 0),
    (0x55, 0x02, 4, 1),
    (0x61, 0x12, 8, 0),
    (0x55, 0x02, 2, 3),
    *RETURN_1,
    *RETURN_0,
)


def list_programs(path: Path) -> list[int]:
    """Return the ids of a cgroup's device programs, as bpftool lists them."""
    command = ["bpftool", "cgroup", "show", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "device" in line]


def dump(program: int) -> str:
    """Return a program's instructions, as bpftool lists them."""
    command = ["bpftool", "prog", "dump", "xlated", "id", str(program), "opcodes"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# A container's cgroup, without a container ----------------------------------------------------------------------------


class Container:
    """A process in a cgroup below another, and nodes in a directory."""

    def __init__(self, top: Path, pod: str = "test-pod", rules: Callable[[Path], None] | None = None) -> None:
        self.pod = top / pod
        self.path = self.pod / "container"
        self.pod.mkdir()
        if rules:
            # Of version 1: all can be denied only to a cgroup without children, and a child begins with its parent's.
            rules(self.pod)
        self.path.mkdir()
        self.process = subprocess.Popen(["sleep", "600"])
        (self.path / "cgroup.procs").write_text(str(self.process.pid))
        NODES.mkdir()
        # Where nodes can be opened, whatever /run is mounted with.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "dev", "nodes", NODES], check=True)
        self.directory = os.open(NODES, os.O_PATH | os.O_DIRECTORY)
        self.place = cgroup.find_cgroup(ROOT, self.process.pid)

    def remove(self) -> None:
        """Leave nothing."""
        os.close(self.directory)
        self.process.kill()
        self.process.wait()
        subprocess.run(["umount", NODES], check=True)
        NODES.rmdir()
        self.path.rmdir()
        self.pod.rmdir()

    def make(self, *nodes: MadeNode) -> None:
        """Make nodes."""
        for node in nodes:
            os.mknod(NODES / node.name, 0o20600, os.makedev(node.major, node.minor))

    def open(self, node: MadeNode, flags: int = os.O_RDWR) -> int:
        """Return errno of opening a node from inside, 0 when it opens: the test's own proof."""
        return self.attempt(lambda: os.open(NODES / node.name, flags))

    def mknod(self, node: MadeNode, kind: int = 0o20600) -> int:
        """Return errno of making a node from inside, 0 when it can be made."""
        return self.attempt(lambda: os.mknod(NODES / "new", kind, os.makedev(node.major, node.minor)))

    def attempt(self, work: Callable[[], object]) -> int:
        """Return errno of doing something from inside, 0 when it succeeds."""
        child = os.fork()
        if child == 0:
            try:
                (self.path / "cgroup.procs").write_text("0")
                work()
                os._exit(0)
            except OSError as error:
                os._exit(error.errno or 255)
            finally:
                os._exit(254)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def prove(self, *nodes: MadeNode) -> list[int]:
        """Return the result of the module under test."""
        return [check.error for check in prove_nodes(ROOT, self.place, self.directory, nodes)]

    def plan(self, *nodes: MadeNode, widen_parents: bool = False) -> Grant:
        """Return what the module under test would do."""
        return permission.plan_grant(ROOT, self.place, nodes, widen_parents)


@pytest.fixture(autouse=True, scope="module")
def _vfio() -> None:
    """10:196 is a device only with the module."""
    subprocess.run(["modprobe", "vfio-pci"], check=True)


@pytest.fixture
def container() -> Iterator[Container]:
    """A cgroup of version 2, nothing attached."""
    made = Container(UNIFIED)
    yield made
    made.remove()


@pytest.fixture
def two_groups(native_drivers: None) -> tuple[MadeNode, MadeNode]:
    """Two real groups with a node each."""
    nodes = []
    for nth in (0, 1):
        nic = guest.find_device(devices.NIC_E1000E, nth)
        guest.bind(nic, "vfio-pci")
        group = guest.group_of(nic)
        nodes.append(MadeNode(group, *guest.numbers_of_group(group), is_group=True))
    return nodes[0], nodes[1]


EPERM = errno.EPERM


# Version 2 ------------------------------------------------------------------------------------------------------------


def test_permission_exactly_the_node(container: Container, two_groups: tuple[MadeNode, MadeNode]) -> None:
    group, neighbour = two_groups
    everything = (group, neighbour, VFIO, MEM, NULL, ZERO)
    container.make(*everything)
    assert container.place.unified == str(container.path)
    # Nothing attached: all open, nothing to do, nothing done.
    assert container.prove(*everything) == [0] * 6
    permission.allow(ROOT, container.plan(group))
    assert list_programs(container.path) == []

    attach(load(*ONLY_NULL), container.path)
    (program,) = list_programs(container.path)
    original = dump(program)
    before = [EPERM, EPERM, EPERM, EPERM, 0, EPERM]
    assert container.prove(*everything) == [container.open(node) for node in everything] == before

    grant = container.plan(group, VFIO)
    permission.allow(ROOT, grant)
    after = [0, EPERM, 0, EPERM, 0, EPERM]
    assert container.prove(*everything) == [container.open(node) for node in everything] == after
    assert container.open(group, os.O_RDONLY) == container.open(group, os.O_WRONLY) == 0
    # Nor may it be made, nor is the block device of the same numbers anything new.
    assert container.mknod(group) == EPERM
    assert container.mknod(group, 0o60600) == 0
    os.unlink(NODES / "new")

    # Once more changes nothing; the program is the same one.
    (program,) = list_programs(container.path)
    permission.allow(ROOT, grant)
    assert list_programs(container.path) == [program]

    permission.disallow(ROOT, grant)
    assert container.prove(*everything) == [container.open(node) for node in everything] == before
    (program,) = list_programs(container.path)
    assert dump(program) == original


def test_permission_two_programs(container: Container, two_groups: tuple[MadeNode, MadeNode]) -> None:
    """As systemd attaches its own program in addition to the runtime's."""
    group, neighbour = two_groups
    container.make(group, neighbour, NULL)
    attach(load(*RETURN_0), container.path)
    attach(load(*ONLY_NULL), container.path)
    assert container.prove(group, neighbour, NULL) == [EPERM] * 3
    grant = container.plan(group)
    permission.allow(ROOT, grant)
    assert len(list_programs(container.path)) == 2
    assert container.prove(group, neighbour, NULL) == [0, EPERM, EPERM]
    permission.disallow(ROOT, grant)
    assert container.prove(group, neighbour, NULL) == [EPERM] * 3


@pytest.mark.parametrize("flags", [0, ALLOW_OVERRIDE, ALLOW_MULTI])
def test_permission_any_attach_flags(container: Container, flags: int) -> None:
    container.make(VFIO, MEM)
    attach(load(*RETURN_0), container.path, flags)
    grant = container.plan(VFIO)
    permission.allow(ROOT, grant)
    assert len(list_programs(container.path)) == 1
    assert [container.open(VFIO), container.open(MEM)] == [0, EPERM]
    permission.disallow(ROOT, grant)
    assert [container.open(VFIO), container.open(MEM)] == [EPERM, EPERM]


def test_permission_revoked_by_next_process(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs, killed after the first: the next process knows only the undo log's grant."""
    container.make(VFIO, MEM)
    attach(load(*RETURN_0), container.path)
    attach(load(*ONLY_NULL), container.path)
    dumps = [dump(program) for program in list_programs(container.path)]
    grant = container.plan(VFIO)
    child = os.fork()
    if child == 0:
        try:
            replace = bpf.replace_program

            def replace_and_die(*arguments: int) -> None:
                replace(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(bpf, "replace_program", replace_and_die)
            permission.allow(ROOT, grant)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [dump(program) for program in list_programs(container.path)] != dumps

    code = (
        "from oci_hooks import system; from oci_hooks.guest.apply import permission;"
        f"permission.disallow(system.Root(), permission.Grant({grant.nodes!r}, {grant.unified!r}, ()))"
    )
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env=environment)
    assert [dump(program) for program in list_programs(container.path)] == dumps
    # And after a kill, allowing continues.
    permission.allow(ROOT, grant)
    assert [container.open(VFIO), container.open(MEM)] == [0, EPERM]


def test_permission_ancestor_unchanged_named(container: Container) -> None:
    container.make(VFIO)
    attach(load(*RETURN_0), container.path)
    attach(load(*RETURN_0), container.pod)
    above = list_programs(container.pod)
    permission.allow(ROOT, container.plan(VFIO))
    assert list_programs(container.pod) == above
    checks = prove_nodes(ROOT, container.place, container.directory, [VFIO])
    assert [check.is_denied for check in checks] == [True]
    error = permission.explain_denial(ROOT, container.place, checks)
    assert f"the parent cgroup {container.pod} has a device filter of its own" in str(error)


def test_permission_own_scope_changed() -> None:
    """As under systemd: crun's container is below its scope, and systemd's program is on the scope."""
    container = Container(UNIFIED, "test-pod.scope")
    try:
        container.make(VFIO, MEM)
        for path in (container.pod, container.path):
            attach(load(*RETURN_0), path)
        grant = container.plan(VFIO)
        (container.pod / "other").mkdir()
        permission.allow(ROOT, grant)
        # Another one is in the scope: it is not for this container alone.
        assert [container.open(VFIO), container.open(MEM)] == [EPERM, EPERM]
        (container.pod / "other").rmdir()
        permission.allow(ROOT, grant)
        assert [container.open(VFIO), container.open(MEM)] == [0, EPERM]
        permission.disallow(ROOT, grant)
        assert [container.open(VFIO), container.open(MEM)] == [EPERM, EPERM]
    finally:
        container.remove()


def refused(container: Container) -> str:
    """Return the error of allowing, which must leave the programs unchanged and name the rule to add."""
    before = list_programs(container.path)
    with pytest.raises(StepError) as caught:
        permission.allow(ROOT, container.plan(VFIO))
    assert list_programs(container.path) == before
    assert container.open(VFIO) == EPERM
    (finding,) = caught.value.findings
    assert finding.code == "permit-failed"
    rule = '{"allow": true, "type": "c", "major": 10, "minor": 196, "access": "rw"}'
    assert finding.hint == f"add to linux.resources.devices: {rule}"
    return finding.problem


def test_permission_hardened_jit_refused(container: Container) -> None:
    """net.core.bpf_jit_harden=2: constants are blinded, the dump is empty or in terms of a hidden register."""
    container.make(VFIO)
    before = HARDEN.read_text()
    HARDEN.write_text("2")
    try:
        attach(load(*ONLY_NULL), container.path)
        assert "bpf_jit_harden" in refused(container)
        # A kernel that shows no addresses shows no blinded program either.
        child = os.fork()
        if child == 0:
            try:
                Path("/proc/sys/kernel/kptr_restrict").write_text("2")
                os._exit(0 if "hides its instructions" in refused(container) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        HARDEN.write_text(before)
        Path("/proc/sys/kernel/kptr_restrict").write_text("0")


def test_permission_link_program_refused(container: Container) -> None:
    container.make(VFIO)
    fd = os.open(container.path, os.O_RDONLY)
    program = load(*RETURN_0)
    # BPF_LINK_CREATE: prog_fd, target_fd, attach_type, flags.
    link = call_bpf(28, struct.pack("<IIII48x", program, fd, 6, 0))
    try:
        assert "bpf_link" in refused(container)
    finally:
        for each in (link, program, fd):
            os.close(each)


def test_permission_program_with_map_refused(container: Container) -> None:
    container.make(VFIO)
    # BPF_MAP_CREATE: an array of one entry; then a 64-bit load of its address by descriptor.
    array = call_bpf(0, struct.pack("<IIII56x", 2, 4, 4, 1))
    attach(load((0x18, 0x12, 0, array), (0, 0, 0, 0), *RETURN_0), container.path)
    os.close(array)
    assert "maps" in refused(container)


def test_permission_program_with_call_refused(container: Container) -> None:
    """If the dump cannot be loaded again, the verifier's last line is reported."""
    container.make(VFIO)
    attach(load((0x85, 0, 0, 5), *RETURN_0), container.path)
    assert "the kernel rejects the changed program" in refused(container)


# Proofs ---------------------------------------------------------------------------------------------------------------


def test_permission_group_held(container: Container, two_groups: tuple[MadeNode, MadeNode]) -> None:
    group, _ = two_groups
    container.make(group)
    holder = os.open(NODES / group.name, os.O_RDWR)
    try:
        assert container.prove(group) == [errno.EBUSY]
    finally:
        os.close(holder)
    # The proof itself holds it no longer than it takes.
    assert container.prove(group) == [0]
    assert container.prove(group) == [0]


@pytest.mark.usefixtures("native_drivers")
def test_permission_group_not_viable(container: Container) -> None:
    """Of two cards in a group one is still bound to its native driver."""
    cards = guest.find_devices(devices.NIC_E1000)
    guest.bind(cards[0], "vfio-pci")
    name = guest.group_of(cards[0])
    group = MadeNode(name, *guest.numbers_of_group(name), is_group=True)
    container.make(group)
    checks = prove_nodes(ROOT, container.place, container.directory, [group])
    assert [(check.error, check.is_viable) for check in checks] == [(0, False)]
    guest.bind(cards[1], "vfio-pci")
    checks = prove_nodes(ROOT, container.place, container.directory, [group])
    assert [(check.error, check.is_viable) for check in checks] == [(0, True)]


def test_permission_leaves_no_process_in_cgroup(container: Container) -> None:
    container.make(NULL)
    container.prove(NULL)
    assert (container.path / "cgroup.procs").read_text().split() == [str(container.process.pid)]


# Version 1, in addition to version 2
# -----------------------------------------------------------------------------------

LEGACY = Path("/run/cgroup-devices")


def deny_all(path: Path) -> None:
    """Begin as runtimes do, and allow /dev/null."""
    (path / "devices.deny").write_text("a")
    (path / "devices.allow").write_text("c 1:3 rwm")


@pytest.fixture
def hierarchy() -> Iterator[Path]:
    """Give a hierarchy of version 1, in addition to the other."""
    LEGACY.mkdir()
    subprocess.run(["mount", "-t", "cgroup", "-o", "devices", "devices", LEGACY], check=True)
    yield LEGACY
    subprocess.run(["umount", LEGACY], check=True)
    LEGACY.rmdir()


@pytest.fixture
def legacy(hierarchy: Path) -> Iterator[Container]:
    """Give a cgroup of version 1 that allows all."""
    made = Container(hierarchy)
    yield made
    made.remove()


@pytest.fixture
def legacy_below(hierarchy: Path) -> Iterator[Container]:
    """Give a cgroup of version 1 whose parent denies all but /dev/null, as it does itself."""
    made = Container(hierarchy, rules=deny_all)
    deny_all(made.path)
    yield made
    made.remove()


def test_permission_v1_exactly_the_node(legacy: Container, two_groups: tuple[MadeNode, MadeNode]) -> None:
    group, neighbour = two_groups
    everything = (group, neighbour, VFIO, MEM, NULL)
    legacy.make(*everything)
    assert (legacy.place.devices, legacy.place.shared) == (str(legacy.path), (str(UNIFIED),))
    deny_all(legacy.path)
    listed = (legacy.path / "devices.list").read_text()
    before = [EPERM, EPERM, EPERM, EPERM, 0]
    assert legacy.prove(*everything) == [legacy.open(node) for node in everything] == before
    grant = legacy.plan(group, VFIO)
    permission.allow(ROOT, grant)
    permission.allow(ROOT, grant)
    after = [0, EPERM, 0, EPERM, 0]
    assert legacy.prove(*everything) == [legacy.open(node) for node in everything] == after
    assert legacy.mknod(group) == EPERM
    permission.disallow(ROOT, grant)
    assert legacy.prove(*everything) == before
    assert (legacy.path / "devices.list").read_text() == listed


def test_permission_v1_parent_lacks_rule(legacy_below: Container) -> None:
    legacy = legacy_below
    legacy.make(VFIO, MEM, NULL)
    listed = [(path / "devices.list").read_text() for path in (legacy.pod, legacy.path)]
    with pytest.raises(StepError, match=f"the parent cgroup {legacy.pod} does not allow it") as caught:
        permission.allow(ROOT, legacy.plan(VFIO))
    assert '"major": 10, "minor": 196' in caught.value.findings[0].hint

    grant = legacy.plan(VFIO, widen_parents=True)
    assert [widening.path for widening in grant.devices] == [str(legacy.pod), str(legacy.path)]
    permission.allow(ROOT, grant)
    assert legacy.prove(VFIO, MEM, NULL) == [0, EPERM, 0]
    permission.disallow(ROOT, grant)
    assert legacy.prove(VFIO, MEM, NULL) == [EPERM, EPERM, 0]
    assert [(path / "devices.list").read_text() for path in (legacy.pod, legacy.path)] == listed


def test_permission_v1_and_v2(legacy: Container) -> None:
    """The kernel asks both; the container's own cgroup of each is widened."""
    legacy.make(VFIO, MEM)
    both = UNIFIED / "test-both"
    both.mkdir()
    try:
        (both / "cgroup.procs").write_text(str(legacy.process.pid))
        legacy.place = cgroup.find_cgroup(ROOT, legacy.process.pid)
        attach(load(*RETURN_0), both)
        deny_all(legacy.path)
        grant = legacy.plan(VFIO)
        assert (grant.unified, grant.devices) == (str(both), (Widening(str(legacy.path), ("rw",)),))
        assert legacy.prove(VFIO, MEM) == [EPERM, EPERM]
        permission.allow(ROOT, grant)
        assert legacy.prove(VFIO, MEM) == [0, EPERM]
        permission.disallow(ROOT, grant)
        assert legacy.prove(VFIO, MEM) == [EPERM, EPERM]
    finally:
        (UNIFIED / "cgroup.procs").write_text(str(legacy.process.pid))
        both.rmdir()
