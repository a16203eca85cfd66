# SPDX-License-Identifier: Apache-2.0
"""Device programs: the prefix's answers, finding and removing it again, and messages of refusals."""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks.guest.apply import bpf, bpf_program

pytestmark = pytest.mark.unit

MASK = 0xFFFFFFFF
BLOCK, CHAR = 1, 2
MKNOD, READ, WRITE = 1, 2, 4


# A machine for the few instructions that device programs are made of, written from the instruction set's document -----


def run(code: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """Return what a program answers. Fails on a register that was never set, a jump out of the program, a loop."""
    context = struct.pack("=III", access << 16 | kind, major, minor)
    registers: dict[int, Any] = {1: "context", 10: "stack"}
    instructions = [struct.unpack_from("=BBhi", code, start) for start in range(0, len(code), 8)]
    counter = 0
    for _ in range(1000):
        operation, pair, offset, immediate = instructions[counter]
        counter += 1
        dst, src = (pair & 15, pair >> 4) if sys.byteorder == "little" else (pair >> 4, pair & 15)
        if operation == 0x95:
            return int(registers[0]) & MASK
        if operation == 0x61:
            assert registers[src] == "context"
            (registers[dst],) = struct.unpack_from("=I", context, offset)
        elif operation == 0xB7:
            registers[dst] = immediate & 0xFFFFFFFFFFFFFFFF
        elif operation == 0xBC:
            registers[dst] = registers[src] & MASK
        elif operation == 0xBF:
            registers[dst] = registers[src]
        elif operation == 0x54:
            registers[dst] = registers[dst] & immediate & MASK
        elif operation == 0x74:
            registers[dst] = (registers[dst] & MASK) >> immediate
        elif operation == 0x56:
            counter += offset if registers[dst] & MASK != immediate & MASK else 0
        elif operation == 0x46:
            counter += offset if registers[dst] & immediate & MASK else 0
        elif operation == 0x5D:
            counter += offset if registers[dst] != registers[src] else 0
        else:
            raise AssertionError(f"unknown operation {operation:#x}")
        assert counter >= 0
    raise AssertionError("does not end")


def make(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """Return one instruction, encoded without the code under test."""
    pair = dst | src << 4 if sys.byteorder == "little" else dst << 4 | src
    return struct.pack("=BBhi", code, pair, off, imm)


DENY = make(0xB7) + make(0x95)
ALLOW = make(0xB7, imm=1) + make(0x95)
# As runc writes it: type and access are separated, then rule by rule. Allows c 5:* rw and b 5:1 rwm.
LIKE_RUNC = b"".join(
    [
        make(0x61, dst=2, src=1, off=0),
        make(0x54, dst=2, imm=0xFFFF),
        make(0x61, dst=3, src=1, off=0),
        make(0x74, dst=3, imm=16),
        make(0x61, dst=4, src=1, off=4),
        make(0x61, dst=5, src=1, off=8),
        make(0x56, dst=2, imm=2, off=6),
        make(0xBC, dst=1, src=3),
        make(0x54, dst=1, imm=6),
        make(0x5D, dst=1, src=3, off=3),
        make(0x56, dst=4, imm=5, off=2),
        make(0xB7, dst=0, imm=1),
        make(0x95),
        make(0x56, dst=2, imm=1, off=4),
        make(0x56, dst=4, imm=5, off=3),
        make(0x56, dst=5, imm=1, off=2),
        make(0xB7, dst=0, imm=1),
        make(0x95),
        make(0xB7, dst=0, imm=0),
        make(0x95),
    ]
)
PROGRAMS = [DENY, ALLOW, LIKE_RUNC]

# Few numbers, so that questions meet nodes and near misses often; and the whole width.
numbers = st.sampled_from([0, 1, 5, 6, 10, 196, 243, 511, 0x7FFFFFFF, 0x80000000, MASK]) | st.integers(0, MASK)
nodes = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12)
kinds = st.sampled_from([BLOCK, CHAR]) | st.integers(0, 0xFFFF)
accesses = st.integers(0, 7) | st.integers(0, 0xFFFF)


def test_bpf_interpreter_matches_kernel() -> None:
    """The interpreter here gives the kernel's results, on which the tests below rely."""
    assert run(LIKE_RUNC, CHAR, READ, 5, 9) == 1
    assert run(LIKE_RUNC, CHAR, READ | MKNOD, 5, 9) == 0
    assert run(LIKE_RUNC, BLOCK, 7, 5, 1) == 1
    assert run(LIKE_RUNC, BLOCK, 7, 5, 2) == 0
    with pytest.raises(KeyError):
        run(make(0x95), CHAR, READ, 0, 0)


# The prefix -----------------------------------------------------------------------------------------------------------


@given(nodes, st.sampled_from(PROGRAMS), kinds, accesses, st.data())
def test_prefix_allows_only_its_nodes(
    wanted: list[tuple[int, int]], program: bytes, kind: int, access: int, data: st.DataObject
) -> None:
    major, minor = data.draw(st.sampled_from(wanted) | st.tuples(numbers, numbers))
    answer = run(bpf_program.make_prefix(wanted) + program, kind, access, major, minor)
    if kind == CHAR and access in (0, READ, WRITE, READ | WRITE) and (major, minor) in wanted:
        assert answer == 1
    else:
        assert answer == run(program, kind, access, major, minor)


@pytest.mark.parametrize(
    ("kind", "access", "major", "minor", "answer"),
    [
        (CHAR, READ, 243, 0, 1),
        (CHAR, WRITE, 243, 0, 1),
        (CHAR, READ | WRITE, 243, 0, 1),
        (CHAR, READ | WRITE, 10, 196, 1),
        (CHAR, MKNOD, 243, 0, 0),
        (CHAR, READ | WRITE | MKNOD, 243, 0, 0),
        (CHAR, READ | 8, 243, 0, 0),
        (BLOCK, READ, 243, 0, 0),
        (CHAR | BLOCK, READ, 243, 0, 0),
        (CHAR | 0x8000, READ, 243, 0, 0),
        (CHAR, READ, 243, 1, 0),
        (CHAR, READ, 242, 0, 0),
        (CHAR, READ, 10, 0, 0),
        (CHAR, READ, 243, 196, 0),
        (CHAR, READ, 1, 1, 0),
    ],
)
def test_prefix_before_a_program_that_denies_all(kind: int, access: int, major: int, minor: int, answer: int) -> None:
    assert run(bpf_program.make_prefix([(243, 0), (10, 196)]) + DENY, kind, access, major, minor) == answer


@given(nodes, st.sampled_from(PROGRAMS))
def test_prefix_read_and_stripped(wanted: list[tuple[int, int]], program: bytes) -> None:
    code = bpf_program.make_prefix(wanted) + program
    assert bpf_program.read_prefix(code) == sorted(set(wanted))
    assert bpf_program.strip_prefix(code) == program


@given(nodes, nodes)
def test_strip_prefix_removes_stacked_prefixes(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    assert bpf_program.strip_prefix(bpf_program.make_prefix(one) + bpf_program.make_prefix(other) + DENY) == DENY


@pytest.mark.parametrize("program", PROGRAMS)
def test_strip_prefix_without_prefix_unchanged(program: bytes) -> None:
    assert bpf_program.read_prefix(program) == []
    assert bpf_program.strip_prefix(program) == program


def test_make_prefix_empty_without_nodes() -> None:
    assert bpf_program.make_prefix([]) == b""


def test_make_prefix_ignores_order_and_duplicates() -> None:
    """The same nodes are the same program: a second run must see that there is nothing to replace."""
    assert bpf_program.make_prefix([(10, 196), (1, 3), (10, 196)]) == bpf_program.make_prefix([(1, 3), (10, 196)])


@given(nodes, st.data())
def test_read_prefix_verifies_every_byte(wanted: list[tuple[int, int]], data: st.DataObject) -> None:
    """A program that looks like ours but is not, byte by byte, is somebody else's and is not cut."""
    code = bytearray(bpf_program.make_prefix(wanted) + LIKE_RUNC)
    length = bpf_program.HEAD + bpf_program.PER_NODE * len(set(wanted))
    node_bytes = {
        8 * index + byte
        for start in range(bpf_program.HEAD, length, bpf_program.PER_NODE)
        for index in (start, start + 1)
        for byte in range(4, 8)
    }
    spoilt = data.draw(st.sampled_from(sorted(set(range(8 * length)) - node_bytes)))
    code[spoilt] ^= data.draw(st.integers(1, 255))
    assert bpf_program.read_prefix(bytes(code)) == []
    assert bpf_program.strip_prefix(bytes(code)) == code


@pytest.mark.parametrize("cut", [0, 8, 16, 24, 8 * 10, 8 * 13])
def test_read_prefix_truncated_ignored(cut: int) -> None:
    torn = bpf_program.make_prefix([(10, 196)])[:cut]
    assert bpf_program.read_prefix(torn) == []
    assert bpf_program.strip_prefix(torn) == torn


# Dumps ----------------------------------------------------------------------------------------------------------------


@given(nodes, st.sampled_from(PROGRAMS))
def test_make_loadable_plain_dump_unchanged(wanted: list[tuple[int, int]], program: bytes) -> None:
    code = bpf_program.make_prefix(wanted) + program
    assert bpf_program.make_loadable(code) == code


def test_make_loadable_zero_extension_becomes_move() -> None:
    inserted = make(0xBC, dst=3, src=3, imm=1)
    assert bpf_program.make_loadable(inserted + DENY) == make(0xBC, dst=3, src=3) + DENY


def test_make_loadable_skips_wide_load_second_half() -> None:
    code = make(0x18, dst=2, imm=7) + make(0, imm=9) + DENY
    assert bpf_program.make_loadable(code) == code


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (bytes(64), "bpf_jit_harden=2"),
        (make(0xB7, dst=11, imm=5) + DENY, "blinds"),
        (make(0xBF, dst=2, src=11) + DENY, "blinds"),
    ],
)
def test_make_loadable_unsupported_refused(code: bytes, words: str) -> None:
    with pytest.raises(bpf_program.ProgramError, match=words):
        bpf_program.make_loadable(code)


@pytest.mark.parametrize(
    ("size", "maps", "words"),
    [
        (16, 1, "maps"),
        (0, 0, "0 bytes"),
        (bpf.DUMP_LIMIT + 8, 0, "bytes"),
    ],
)
def test_dump_program_not_copyable_refused(monkeypatch: pytest.MonkeyPatch, size: int, maps: int, words: str) -> None:
    monkeypatch.setattr(bpf, "read_info", lambda _program, asked: (size, maps, DENY[:asked]))
    with pytest.raises(bpf_program.ProgramError, match=words):
        bpf.dump_program(3)


# System calls, with the kernel played ---------------------------------------------------------------------------------

Kernel = Callable[[int, bytearray], int]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], list[tuple[int, bytes]]]:
    """Put a function in the kernel's place, and return the list of the calls that will be made."""

    def install(kernel: Kernel) -> list[tuple[int, bytes]]:
        calls: list[tuple[int, bytes]] = []

        def call(command: int, attributes: bytearray) -> int:
            calls.append((command, bytes(attributes)))
            return kernel(command, attributes)

        monkeypatch.setattr(bpf, "call_bpf", call)
        return calls

    return install


Play = Callable[[Kernel], list[tuple[int, bytes]]]


def fail_with(code: int) -> Kernel:
    """Return a kernel that refuses."""

    def kernel(_command: int, _attributes: bytearray) -> int:
        raise OSError(code, "played")

    return kernel


def test_query_programs_grows_buffer(play: Play) -> None:
    def kernel(_command: int, attributes: bytearray) -> int:
        count = struct.unpack_from("=I", attributes, 24)[0]
        if count < 100:
            raise OSError(errno.ENOSPC, "played")
        struct.pack_into("=I", attributes, 12, bpf.BPF_F_ALLOW_MULTI)
        struct.pack_into("=I", attributes, 24, 3)
        return 0

    calls = play(kernel)
    assert bpf.query_programs(7) == (bpf.BPF_F_ALLOW_MULTI, [0, 0, 0])
    assert [struct.unpack_from("=II", attributes) for _, attributes in calls] == [(7, 6), (7, 6)]


def test_query_programs_passes_error_on(play: Play) -> None:
    play(fail_with(errno.EBADF))
    with pytest.raises(OSError, match="played") as caught:
        bpf.query_programs(7)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize(
    ("flags", "sent", "old"),
    [
        (bpf.BPF_F_ALLOW_MULTI, bpf.BPF_F_ALLOW_MULTI | bpf.BPF_F_REPLACE, 9),
        (1, 1, 0),
        (0, 0, 0),
    ],
)
def test_replace_program_keeps_attach_flags(play: Play, flags: int, sent: int, old: int) -> None:
    calls = play(lambda _command, _attributes: 0)
    bpf.replace_program(7, 8, 9, flags)
    assert calls == [(bpf.BPF_PROG_ATTACH, struct.pack("=IIIII", 7, 8, 6, sent, old))]


@pytest.mark.parametrize(
    ("code", "flags", "words"),
    [
        (errno.ENOENT, bpf.BPF_F_ALLOW_MULTI, "bpf_link"),
        (errno.EPERM, 0, "prevents replacing it"),
        (errno.EINVAL, bpf.BPF_F_ALLOW_MULTI, "needs Linux 5.6"),
    ],
)
def test_replace_program_link_refused(play: Play, code: int, flags: int, words: str) -> None:
    play(fail_with(code))
    with pytest.raises(bpf_program.ProgramError, match=words):
        bpf.replace_program(7, 8, 9, flags)


def test_replace_program_passes_error_on(play: Play) -> None:
    play(fail_with(errno.EBADF))
    with pytest.raises(OSError, match="played"):
        bpf.replace_program(7, 8, 9, bpf.BPF_F_ALLOW_MULTI)


def test_load_program_retries_after_signal(play: Play) -> None:
    refusals = [errno.EAGAIN, errno.EAGAIN]

    def kernel(_command: int, _attributes: bytearray) -> int:
        if refusals:
            raise OSError(refusals.pop(), "played")
        return 33

    calls = play(kernel)
    assert bpf.load_program(DENY) == 33
    assert len(calls) == 3


def test_load_program_limits_retries(play: Play) -> None:
    play(fail_with(errno.EAGAIN))
    with pytest.raises(bpf_program.ProgramError, match="rejects the changed program"):
        bpf.load_program(DENY)


def test_load_program_raises_memlock_and_restores_it(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.11. The limit is put back."""
    import resource

    limits = [(65536, 65536)]
    monkeypatch.setattr(resource, "getrlimit", lambda _which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _which, new: limits.append(new))

    def kernel(_command: int, _attributes: bytearray) -> int:
        if limits[-1][0] != resource.RLIM_INFINITY:
            raise OSError(errno.EPERM, "played")
        return 33

    play(kernel)
    assert bpf.load_program(DENY) == 33
    assert limits[-1] == (65536, 65536)
    assert len(limits) == 3


def test_load_program_reports_verifier_log(play: Play) -> None:
    import ctypes

    log = b"0: (95) exit\nR0 !read_ok\nprocessed 1 insns (limit 1000000)\n\0"

    def kernel(_command: int, attributes: bytearray) -> int:
        _, size, where = struct.unpack_from("=IIQ", attributes, 24)
        if where:
            assert size >= len(log)
            ctypes.memmove(where, log, len(log))
        raise OSError(errno.EACCES, "played")

    play(kernel)
    with pytest.raises(bpf_program.ProgramError, match=r"rejects the changed program: played \(R0 !read_ok\)"):
        bpf.load_program(make(0x95))


def test_load_program_attributes(play: Play) -> None:
    import ctypes

    seen = []

    def kernel(command: int, attributes: bytearray) -> int:
        kind, count, code, word = struct.unpack_from("=IIQQ", attributes)
        seen.append((command, kind, count, ctypes.string_at(code, 8 * count), ctypes.string_at(word)))
        assert bytes(attributes[48:64]) == b"a_name_of_sixte\0"
        return 33

    play(kernel)
    assert bpf.load_program(LIKE_RUNC, "a_name_of_sixteen") == 33
    assert seen == [(bpf.BPF_PROG_LOAD, bpf.BPF_PROG_TYPE_CGROUP_DEVICE, 20, LIKE_RUNC, b"Apache")]


def test_call_bpf_unknown_architecture_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "n", "r", "v", "pdp11")))
    with pytest.raises(OSError, match="pdp11"):
        bpf.call_bpf(bpf.BPF_PROG_QUERY, bytearray(8))


def test_bpf_import_without_ctypes() -> None:
    """Otherwise every container with a device would pay for it, even if its cgroup allows all already."""
    import subprocess

    code = (
        "import sys; from oci_hooks.guest.apply import bpf, cgroup; "
        "sys.exit(not sys.modules.keys().isdisjoint({'ctypes', '_ctypes', 're'}))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-S", "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}
        ).returncode
        == 0
    )
