# SPDX-License-Identifier: Apache-2.0
"""Device programs as instructions: add a prefix that allows nodes, and remove it again. Pure.

The prefix allows exactly the wanted nodes and leaves every other access to the program that follows. It contains a mark
and its length: any later process, even one that runs after this one was killed, can find it and cut it off.

Sources: include/uapi/linux/bpf.h (instructions, the context of a device program),
Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    # Major and minor of a character device.
    Numbers = tuple[int, int]

# struct bpf_cgroup_dev_ctx, to which register 1 points: three 32-bit words. The first is access << 16 | type.
CONTEXT_TYPE, CONTEXT_MAJOR, CONTEXT_MINOR = 0, 4, 8
BPF_DEVCG_DEV_CHAR = 2
BPF_DEVCG_ACC_MKNOD, BPF_DEVCG_ACC_READ, BPF_DEVCG_ACC_WRITE = 1, 2, 4

# Operation codes: class | source | operation. Only 32-bit comparisons and sums, after a 32-bit load: so the verifier
# inserts zero extensions on no machine, and the prefix in a dump is the prefix that was loaded.
MOV64_K = 0xB7  # dst = imm
MOV32_X = 0xBC  # dst = src, upper half 0
AND32_K = 0x54  # dst &= imm
RSH32_K = 0x74  # dst >>= imm
LDX_W = 0x61  # dst = *(u32 *)(src + off)
JNE32_K = 0x56  # if dst != imm: pc += off
JSET32_K = 0x46  # if dst & imm: pc += off
EXIT = 0x95

# The mark, which no compiler writes: register 0 is set to this, and at once to the length of the prefix.
MAGIC = 0x76_66_69_6F  # "vfio"
SIZE = 8  # bytes per instruction
HEAD = 10  # instructions before the first node
PER_NODE = 4
# A register that only the kernel writes: blinded constants (net.core.bpf_jit_harden) go through it.
HIDDEN_REGISTER = 11


class ProgramError(Exception):
    """A device program cannot be read, loaded or replaced. The text is the reason, without a subject."""


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

    nodes: major and minor of character devices; none gives no instruction. Creating a node (mknod) is never allowed by
    it. Register 1 is unchanged; a program may rely on nothing else at its start.
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
    """Return the nodes that a program's prefix allows, sorted; empty if it has no such prefix."""
    length = measure_prefix(instructions)
    return [read_node(instructions, index) for index in range(HEAD, length, PER_NODE)]


def strip_prefix(instructions: bytes) -> bytes:
    """Return the program as it was before it got a prefix; the same bytes if it has none."""
    while True:
        length = measure_prefix(instructions)
        if not length:
            return instructions
        instructions = instructions[length * SIZE :]


def measure_prefix(instructions: bytes) -> int:
    """Return the number of instructions in our prefix of a program, 0 for none.

    The mark is not sufficient: every byte must be what this module would write for the nodes read from it.
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
    """Return major and minor in the two comparisons at this index."""
    return read_immediate(instructions, index), read_immediate(instructions, index + 1)


def read_immediate(instructions: bytes, index: int) -> int:
    """Return the immediate of the instruction at this index, without sign; 0 past the end."""
    word = instructions[index * SIZE + 4 : index * SIZE + 8]
    return int.from_bytes(word, sys.byteorder)


def make_loadable(instructions: bytes) -> bytes:
    """Return dumped instructions in a loadable form. Raises ProgramError if that is not possible.

    On s390x, ppc64le and riscv64 the verifier inserts zero extensions, a 32-bit move with 1 in its immediate, and
    refuses them in a new program. An ordinary move has the same effect.
    """
    if not any(instructions):
        raise ProgramError("the kernel hides its instructions (net.core.bpf_jit_harden=2)")
    code = []
    for start in range(0, len(instructions), SIZE):
        instruction = instructions[start : start + SIZE]
        operation, registers, offset, immediate = struct.unpack("=BBhi", instruction)
        # The second half of a 64-bit load has no operation and no register.
        if HIDDEN_REGISTER in (registers & 15, registers >> 4):
            raise ProgramError("the kernel hides (blinds) its constants (net.core.bpf_jit_harden)")
        if operation == MOV32_X and immediate == 1 and offset == 0:
            instruction = struct.pack("=BBhi", operation, registers, 0, 0)
        code.append(instruction)
    return b"".join(code)
