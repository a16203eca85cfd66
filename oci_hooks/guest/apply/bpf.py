# SPDX-License-Identifier: Apache-2.0
"""Device programs of a cgroup (version 2): list, read, load and replace them, by bpf(2).

Every program attached to a cgroup and to its ancestors must allow an access, so a further program never widens
anything: the one that denies must be replaced, by itself with a prefix (bpf_program.py).

Sources: include/uapi/linux/bpf.h (commands, attributes), kernel/bpf/cgroup.c (attaching), kernel/bpf/syscall.c (dump).

system_calls.py is imported only when a system call is really made: a cgroup that allows all already needs none.
"""

from __future__ import annotations

import errno
import os
import struct

from oci_hooks.guest.apply.bpf_program import SIZE, ProgramError, make_loadable

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

# In bytes. The kernel accepts a million instructions from a privileged user; a device program has some hundred.
DUMP_LIMIT = 1 << 20


def query_programs(cgroup: int) -> tuple[int, list[int]]:
    """Return the attach flags and ids of the device programs of one cgroup, without those of its ancestors.

    cgroup: descriptor of a directory of the version 2 hierarchy. The flags are BPF_F_ALLOW_*, 0 without any program.
    Raises OSError: EBADF or EINVAL if it is no such directory, EPERM without CAP_NET_ADMIN.
    """
    from oci_hooks.guest.apply.system_calls import find_address

    count = 64
    while True:
        ids = bytearray(4 * count)
        # target_fd, attach_type, query_flags, attach_flags, prog_ids, prog_cnt
        attributes = bytearray(struct.pack("=IIIIQI4x", cgroup, BPF_CGROUP_DEVICE, 0, 0, find_address(ids), count))
        try:
            call_bpf(BPF_PROG_QUERY, attributes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            count *= 2
            continue
        flags, _, found = struct.unpack_from("=IQI", attributes, 12)
        return flags, list(struct.unpack_from(f"={found}I", ids))


def open_program(program_id: int) -> int:
    """Return a descriptor of the program with this id. Raises OSError: ENOENT if it is gone."""
    # start_id, next_id, open_flags
    return call_bpf(BPF_PROG_GET_FD_BY_ID, bytearray(struct.pack("=III", program_id, 0, 0)))


def dump_program(program: int) -> bytes:
    """Return a program's instructions, loadable again. Raises OSError, and ProgramError if they are not available.

    program: descriptor. The instructions are those after the verifier's translation; the kernel keeps no others.
    """
    size, maps, _ = read_info(program, 0)
    if maps:
        raise ProgramError("it uses BPF maps, which the hook cannot copy")
    if not 0 < size <= DUMP_LIMIT:
        raise ProgramError(f"the kernel reports that it has {size} bytes")
    _, _, instructions = read_info(program, size)
    return make_loadable(instructions)


def read_info(program: int, size: int) -> tuple[int, int, bytes]:
    """Return the size of a program in bytes, the number of maps it uses, and its first `size` bytes. Raises OSError."""
    from oci_hooks.guest.apply.system_calls import find_address

    buffer = bytearray(max(size, 1))
    # struct bpf_prog_info: type, id, tag, jited_prog_len, xlated_prog_len, jited_prog_insns, xlated_prog_insns,
    # load_time, created_by_uid, nr_map_ids, map_ids, name. The kernel fills in no more than this length.
    layout = "=II8sIIQQQIIQ16s"
    info = bytearray(struct.pack(layout, 0, 0, b"", 0, size, 0, find_address(buffer) if size else 0, 0, 0, 0, 0, b""))
    # bpf_fd, info_len, info
    call_bpf(BPF_OBJ_GET_INFO_BY_FD, bytearray(struct.pack("=IIQ", program, len(info), find_address(info))))
    found = struct.unpack(layout, info)
    return found[4], found[9], bytes(buffer[:size])


def load_program(instructions: bytes, name: str = "vfio_hooks") -> int:
    """Load a device program and return its descriptor. Raises ProgramError with the verifier's last line.

    name: for bpftool, at most 15 letters, digits and underscores.
    """
    try:
        return try_load(instructions, name, None)
    except OSError as error:
        refusal = error
    if refusal.errno == errno.EPERM:
        try:
            return load_without_limit(instructions, name)
        except (OSError, ValueError):
            # ValueError: the limit cannot be raised either. Report the first refusal.
            pass
    raise ProgramError(
        f"the kernel rejects the changed program: {refusal.strerror}{read_verifier_log(instructions, name)}"
    )


def load_without_limit(instructions: bytes, name: str) -> int:
    """Load a program while RLIMIT_MEMLOCK is raised: before Linux 5.11 its memory counts against that.

    Raises OSError, and ValueError if the limit cannot be raised.
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
    from oci_hooks.guest.apply.system_calls import find_address

    code = bytearray(instructions)
    # As in runc. The license matters only for helpers that require "GPL", and a copy cannot call any.
    license_name = bytearray(b"Apache\0")
    attributes = bytearray(
        # prog_type, insn_cnt, insns, license, log_level, log_size, log_buf, kern_version, prog_flags, prog_name
        struct.pack(
            "=IIQQIIQII16s",
            BPF_PROG_TYPE_CGROUP_DEVICE,
            len(instructions) // SIZE,
            find_address(code),
            find_address(license_name),
            1 if log is not None else 0,
            len(log) if log is not None else 0,
            find_address(log) if log is not None else 0,
            0,
            0,
            name.encode()[:15],
        )
    )
    for attempt in range(5):
        try:
            return call_bpf(BPF_PROG_LOAD, attributes)
        except OSError as error:
            # The verifier stops when a signal is pending (libbpf retries as often).
            if error.errno != errno.EAGAIN or attempt == 4:
                raise
    raise AssertionError("unreachable")


def read_verifier_log(instructions: bytes, name: str) -> str:
    """Return the verifier's last line about a program that it refused, as " (...)"; "" if there is none."""
    log = bytearray(1 << 16)
    try:
        os.close(try_load(instructions, name, log))
    except OSError:
        lines = log.partition(b"\0")[0].decode("ascii", "replace").split("\n")
        words = [line for line in lines if line and not line.startswith(("processed ", "verification time", "stack "))]
        return f" ({words[-1]})" if words else ""
    return ""


def replace_program(cgroup: int, new: int, old: int, flags: int) -> None:
    """Replace one program by another on a cgroup, atomically. Raises ProgramError or OSError.

    cgroup, new, old: descriptors; flags: attach flags of the cgroup's programs (`query_programs`).
    """
    multi = flags & BPF_F_ALLOW_MULTI
    # Without ALLOW_MULTI there is one program, which attaching replaces.
    given = flags | BPF_F_REPLACE if multi else flags
    # target_fd, attach_bpf_fd, attach_type, attach_flags, replace_bpf_fd
    attributes = bytearray(struct.pack("=IIIII", cgroup, new, BPF_CGROUP_DEVICE, given, old if multi else 0))
    try:
        call_bpf(BPF_PROG_ATTACH, attributes)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise ProgramError("it is attached by a bpf_link, which only its owner can update") from None
        if error.errno == errno.EPERM and not multi:
            raise ProgramError("a program of a parent cgroup, or a bpf_link, prevents replacing it") from None
        if error.errno == errno.EINVAL and multi:
            raise ProgramError("replacing one of several programs needs Linux 5.6 or later") from None
        raise


def call_bpf(command: int, attributes: bytearray) -> int:
    """Make the system call bpf(2) and return its result, a descriptor for some commands. Raises OSError.

    command: BPF_*; attributes: its part of union bpf_attr, into which the kernel writes answers. Memory that it points
    to must outlive the call.
    """
    from oci_hooks.guest.apply.system_calls import call_libc, find_address

    number = SYSCALL_NUMBERS.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"the hook does not know the number of bpf(2) on {os.uname().machine}")
    try:
        return call_libc("syscall", number, command, find_address(attributes), len(attributes))
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"bpf command {command}") from None
