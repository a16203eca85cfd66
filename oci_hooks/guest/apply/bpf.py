# SPDX-License-Identifier: Apache-2.0
"""Device programs of a cgroup (version 2): read one, put a permission in front of it, take it away again.

Every program attached to a cgroup and to its ancestors must say yes, so a further program never widens anything: the
one that says no has to be replaced. It is replaced by itself with a prefix that says yes to exactly the wanted nodes
and leaves every other question to what stood there before. The prefix bears a mark and says how long it is: any later
process, also one that runs after this one was killed, can find it and cut it off.

Sources: include/uapi/linux/bpf.h (commands, attributes, instructions), kernel/bpf/cgroup.c (attaching, the question
that a device program answers), kernel/bpf/syscall.c (the dump), Documentation/bpf/standardization/instruction-set.rst.
`ctypes` costs as much as half an interpreter's start: it is imported only when a system call is really made.
"""

from __future__ import annotations

import errno
import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    # Major and minor of a character device.
    Numbers = tuple[int, int]

# The number of bpf(2), by the machine's name in uname(2).
SYSCALL_NUMBERS = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "s390x": 351,
    "ppc64le": 361,
    "ppc64": 361,
}

BPF_PROG_LOAD = 5
BPF_PROG_ATTACH = 8
BPF_PROG_GET_FD_BY_ID = 13
BPF_OBJ_GET_INFO_BY_FD = 15
BPF_PROG_QUERY = 16

BPF_PROG_TYPE_CGROUP_DEVICE = 15
BPF_CGROUP_DEVICE = 6
BPF_F_ALLOW_MULTI = 2
BPF_F_REPLACE = 4

# struct bpf_cgroup_dev_ctx, what register 1 points to: three 32-bit words. The first is access << 16 | type.
CONTEXT_TYPE, CONTEXT_MAJOR, CONTEXT_MINOR = 0, 4, 8
BPF_DEVCG_DEV_CHAR = 2
BPF_DEVCG_ACC_MKNOD, BPF_DEVCG_ACC_READ, BPF_DEVCG_ACC_WRITE = 1, 2, 4

# Operation codes: class | source | operation. Only 32-bit comparisons and sums, after a 32-bit load: then no machine's
# verifier inserts zero extensions, and the prefix in a dump is the prefix that was loaded.
MOV64_K = 0xB7  # dst = imm
MOV32_X = 0xBC  # dst = src, upper half 0
AND32_K = 0x54  # dst &= imm
RSH32_K = 0x74  # dst >>= imm
LDX_W = 0x61  # dst = *(u32 *)(src + off)
JNE32_K = 0x56  # if dst != imm: pc += off
JSET32_K = 0x46  # if dst & imm: pc += off
EXIT = 0x95

# What no compiler writes: register 0 is set to this, and at once to the length of the prefix.
MAGIC = 0x76_66_69_6F  # "vfio"
SIZE = 8  # bytes an instruction
HEAD = 10  # instructions in front of the first node
PER_NODE = 4
# Register that only the kernel writes: blinded constants (net.core.bpf_jit_harden) go through it.
HIDDEN_REGISTER = 11
# Bytes. The kernel takes a million instructions of a privileged user; a device program has some hundred.
DUMP_LIMIT = 1 << 20


class ProgramError(Exception):
    """A device program can't be read, loaded or replaced. The text says why, without a subject."""


# Instructions: pure ---------------------------------------------------------------------------------------------------


def make_instruction(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """Return one instruction as struct bpf_insn of this machine.

    code: operation; dst, src: registers; off: jump distance in instructions or offset in bytes; imm: 32 bits, signed
    or not.
    """
    # Two bit fields share a byte; which one is the lower half depends on the machine.
    registers = dst | src << 4 if sys.byteorder == "little" else dst << 4 | src
    return struct.pack("=BBhI", code, registers, off, imm & 0xFFFFFFFF)


def make_prefix(nodes: Iterable[Numbers]) -> bytes:
    """Return instructions that end with 1 for reading or writing one of these devices, and else fall through.

    nodes: major and minor of character devices; none gives no instruction. Making a node (mknod) is never permitted by
    it. Register 1 stays what it was, which is all that a program may rely on at its start.
    """
    wanted = sorted(set(nodes))
    if not wanted:
        return b""
    length = HEAD + PER_NODE * len(wanted)
    other_access = ~(BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE)
    code = [
        make_instruction(MOV64_K, dst=0, imm=MAGIC),
        make_instruction(MOV64_K, dst=0, imm=length),
        make_instruction(LDX_W, dst=2, src=1, off=CONTEXT_TYPE),
        make_instruction(MOV32_X, dst=3, src=2),
        make_instruction(AND32_K, dst=3, imm=0xFFFF),
        make_instruction(JNE32_K, dst=3, imm=BPF_DEVCG_DEV_CHAR, off=length - 6),
        make_instruction(RSH32_K, dst=2, imm=16),
        make_instruction(JSET32_K, dst=2, imm=other_access, off=length - 8),
        make_instruction(LDX_W, dst=3, src=1, off=CONTEXT_MAJOR),
        make_instruction(LDX_W, dst=4, src=1, off=CONTEXT_MINOR),
    ]
    for major, minor in wanted:
        code += [
            make_instruction(JNE32_K, dst=3, imm=major, off=3),
            make_instruction(JNE32_K, dst=4, imm=minor, off=2),
            make_instruction(MOV64_K, dst=0, imm=1),
            make_instruction(EXIT),
        ]
    return b"".join(code)


def read_prefix(instructions: bytes) -> list[Numbers]:
    """Return the nodes that a program's prefix permits, sorted; empty where it has no prefix of ours."""
    length = measure_prefix(instructions)
    return [read_node(instructions, index) for index in range(HEAD, length, PER_NODE)]


def strip_prefix(instructions: bytes) -> bytes:
    """Return the program as it was before a prefix was put in front of it; the same bytes where it has none."""
    while True:
        length = measure_prefix(instructions)
        if not length:
            return instructions
        instructions = instructions[length * SIZE :]


def measure_prefix(instructions: bytes) -> int:
    """Return how many instructions of a program are our prefix, 0 for none.

    The mark alone is not believed: every byte must be what this module would write for the nodes read from it.
    """
    if instructions[:SIZE] != make_instruction(MOV64_K, dst=0, imm=MAGIC):
        return 0
    length = read_immediate(instructions, 1)
    if length > len(instructions) // SIZE:
        return 0
    nodes = [read_node(instructions, index) for index in range(HEAD, length - PER_NODE + 1, PER_NODE)]
    prefix = make_prefix(nodes)
    return length if prefix and prefix == instructions[: length * SIZE] else 0


def read_node(instructions: bytes, index: int) -> Numbers:
    """Return major and minor that the two comparisons at this index ask for."""
    return read_immediate(instructions, index), read_immediate(instructions, index + 1)


def read_immediate(instructions: bytes, index: int) -> int:
    """Return the immediate of the instruction at this index, without sign; 0 past the end."""
    word = instructions[index * SIZE + 4 : index * SIZE + 8]
    return int.from_bytes(word, sys.byteorder)


def make_loadable(instructions: bytes) -> bytes:
    """Return dumped instructions as they can be loaded again. Raises ProgramError where that can't be done.

    On s390x, ppc64le and riscv64 the verifier inserts zero extensions, a 32-bit move with 1 in its immediate, which it
    refuses when it meets them in a new program. As an ordinary move they do the same.
    """
    if not any(instructions):
        raise ProgramError("the kernel shows only zeros for it (net.core.bpf_jit_harden=2)")
    code = []
    for start in range(0, len(instructions), SIZE):
        instruction = instructions[start : start + SIZE]
        operation, registers, offset, immediate = struct.unpack("=BBhi", instruction)
        # The second half of a 64-bit load has no operation and no register.
        if HIDDEN_REGISTER in (registers & 15, registers >> 4):
            raise ProgramError("its constants are blinded (net.core.bpf_jit_harden)")
        if operation == MOV32_X and immediate == 1 and offset == 0:
            instruction = struct.pack("=BBhi", operation, registers, 0, 0)
        code.append(instruction)
    return b"".join(code)


# System calls ---------------------------------------------------------------------------------------------------------


def query_programs(cgroup: int) -> tuple[int, list[int]]:
    """Return how the device programs of one cgroup are attached, and their ids; ancestors' programs are not among them.

    cgroup: descriptor of a directory of the version 2 hierarchy. The first number is of BPF_F_ALLOW_*, 0 without any
    program. Raises OSError: EBADF or EINVAL where it is no such directory, EPERM without CAP_NET_ADMIN.
    """
    import ctypes

    count = 64
    while True:
        ids = (ctypes.c_uint32 * count)()
        # target_fd, attach_type, query_flags, attach_flags, prog_ids, prog_cnt
        attributes = bytearray(
            struct.pack("=IIIIQI4x", cgroup, BPF_CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), len(ids))
        )
        try:
            call_bpf(BPF_PROG_QUERY, attributes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            count *= 2
            continue
        flags, _, found = struct.unpack_from("=IQI", attributes, 12)
        return flags, list(ids)[:found]


def open_program(program_id: int) -> int:
    """Return a descriptor of the program with this id. Raises OSError: ENOENT when it is gone."""
    # start_id, next_id, open_flags
    return call_bpf(BPF_PROG_GET_FD_BY_ID, bytearray(struct.pack("=III", program_id, 0, 0)))


def dump_program(program: int) -> bytes:
    """Return a program's instructions, loadable again. Raises OSError, and ProgramError where they can't be had.

    program: descriptor. What the verifier has translated is read, not what was once loaded: that is not kept.
    """
    size, maps, _ = read_info(program, 0)
    if maps:
        raise ProgramError("it uses maps, and is not copied")
    if not 0 < size <= DUMP_LIMIT:
        raise ProgramError(f"the kernel says that it has {size} bytes")
    _, _, instructions = read_info(program, size)
    return make_loadable(instructions)


def read_info(program: int, size: int) -> tuple[int, int, bytes]:
    """Return the size of a program in bytes, how many maps it uses, and its first `size` bytes. Raises OSError."""
    import ctypes

    buffer = ctypes.create_string_buffer(max(size, 1))
    # struct bpf_prog_info: type, id, tag, jited_prog_len, xlated_prog_len, jited_prog_insns, xlated_prog_insns,
    # load_time, created_by_uid, nr_map_ids, map_ids, name. The kernel fills as much of it as is asked for.
    layout = "=II8sIIQQQIIQ16s"
    info = bytearray(
        struct.pack(layout, 0, 0, b"", 0, size, 0, ctypes.addressof(buffer) if size else 0, 0, 0, 0, 0, b"")
    )
    block = (ctypes.c_char * len(info)).from_buffer(info)
    # bpf_fd, info_len, info
    call_bpf(BPF_OBJ_GET_INFO_BY_FD, bytearray(struct.pack("=IIQ", program, len(info), ctypes.addressof(block))))
    found = struct.unpack(layout, info)
    return found[4], found[9], buffer.raw[:size]


def load_program(instructions: bytes, name: str = "vfio_hooks") -> int:
    """Load a device program and return its descriptor. Raises ProgramError with the verifier's last words.

    name: for bpftool, 15 characters of letters, digits and underscores at most.
    """
    try:
        return try_load(instructions, name, None)
    except OSError as error:
        refusal = error
    if refusal.errno == errno.EPERM:
        try:
            return load_without_limit(instructions, name)
        except (OSError, ValueError):
            # ValueError: not even the limit can be raised. The first refusal is the one to tell.
            pass
    raise ProgramError(f"a copy of it is not accepted: {refusal.strerror}{ask_verifier(instructions, name)}")


def load_without_limit(instructions: bytes, name: str) -> int:
    """Load a program with RLIMIT_MEMLOCK raised meanwhile: before Linux 5.11 its memory counts against that.

    Raises OSError, and ValueError where the limit can't be raised.
    """
    import resource

    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        return try_load(instructions, name, None)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)


def try_load(instructions: bytes, name: str, log: bytearray | None) -> int:
    """Load a device program and return its descriptor. log: filled by the verifier if given. Raises OSError."""
    import ctypes

    code = ctypes.create_string_buffer(instructions, len(instructions))
    # Programs of runc bear the same word. It matters only to functions that want "GPL", and a copy can call none.
    license_name = ctypes.create_string_buffer(b"Apache")
    where = ctypes.addressof((ctypes.c_char * len(log)).from_buffer(log)) if log is not None else 0
    attributes = bytearray(
        # prog_type, insn_cnt, insns, license, log_level, log_size, log_buf, kern_version, prog_flags, prog_name
        struct.pack(
            "=IIQQIIQII16s",
            BPF_PROG_TYPE_CGROUP_DEVICE,
            len(instructions) // SIZE,
            ctypes.addressof(code),
            ctypes.addressof(license_name),
            1 if log is not None else 0,
            len(log) if log is not None else 0,
            where,
            0,
            0,
            name.encode()[:15],
        )
    )
    for attempt in range(5):
        try:
            return call_bpf(BPF_PROG_LOAD, attributes)
        except OSError as error:
            # The verifier gives up when a signal waits (libbpf retries as often).
            if error.errno != errno.EAGAIN or attempt == 4:
                raise
    raise AssertionError("unreachable")


def ask_verifier(instructions: bytes, name: str) -> str:
    """Return the verifier's last word about a program that it refused, as " (...)"; "" where it has none."""
    log = bytearray(1 << 16)
    try:
        os.close(try_load(instructions, name, log))
    except OSError:
        lines = log.partition(b"\0")[0].decode("ascii", "replace").split("\n")
        words = [line for line in lines if line and not line.startswith(("processed ", "verification time", "stack "))]
        return f" ({words[-1]})" if words else ""
    return ""


def replace_program(cgroup: int, new: int, old: int, flags: int) -> None:
    """Put one program in the place of another on a cgroup, with no moment in between. Raises ProgramError or OSError.

    cgroup, new, old: descriptors; flags: how the programs of this cgroup are attached (`query_programs`).
    """
    multi = flags & BPF_F_ALLOW_MULTI
    # Without ALLOW_MULTI there is one program, and attaching replaces it.
    given = flags | BPF_F_REPLACE if multi else flags
    # target_fd, attach_bpf_fd, attach_type, attach_flags, replace_bpf_fd
    attributes = bytearray(struct.pack("=IIIII", cgroup, new, BPF_CGROUP_DEVICE, given, old if multi else 0))
    try:
        call_bpf(BPF_PROG_ATTACH, attributes)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise ProgramError("it is held by a bpf_link, which only its owner can update") from None
        if error.errno == errno.EPERM and not multi:
            raise ProgramError("an ancestor's program, or a bpf_link, does not let it be replaced") from None
        if error.errno == errno.EINVAL and multi:
            raise ProgramError("the kernel can't replace a program (before 5.6)") from None
        raise


def call_bpf(command: int, attributes: bytearray) -> int:
    """Make the system call bpf(2) and return what it returns, a descriptor for some commands. Raises OSError.

    command: BPF_*; attributes: the part of union bpf_attr for it; the kernel writes answers into it. Memory that it
    points to must outlive the call.
    """
    import ctypes

    number = SYSCALL_NUMBERS.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of bpf(2) on {os.uname().machine} is not known")
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    block = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    result: int = call(
        ctypes.c_long(number), ctypes.c_long(command), ctypes.byref(block), ctypes.c_ulong(len(attributes))
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"bpf command {command}")
    return result
