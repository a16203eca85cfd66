# SPDX-License-Identifier: Apache-2.0
"""Device filters of cgroup version 2: change the programs of a cgroup, and find those above it."""

from __future__ import annotations

import os

from oci_hooks.cgroup import Cgroup, fail, list_ancestors
from oci_hooks.files import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci_hooks.bpf import Numbers
    from oci_hooks.files import Root


def change_programs(
    root: Root, path: str, nodes: tuple[Numbers, ...], change: Callable[[bytes, tuple[Numbers, ...]], bytes]
) -> None:
    """Replace each device program of one cgroup of version 2 by a changed one. Raises StepError.

    change: from a program's instructions and the nodes to the new instructions. A cgroup without a program of its own
    restricts nothing, and is left alone.
    """
    from oci_hooks import bpf

    fd = -1
    try:
        fd = os.open(root.host_path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        flags, programs = bpf.query_programs(fd)
        for program in programs:
            change_program(fd, flags, program, lambda code: change(code, nodes))
    except OSError as error:
        problem = f"its device programs can't be read or replaced: {error.strerror}"
        raise fail(path, problem, nodes) from None
    except bpf.ProgramError as error:
        raise fail(path, f"its device program can't be changed: {error}", nodes) from None
    finally:
        if fd >= 0:
            os.close(fd)


def change_program(cgroup: int, flags: int, program: int, change: Callable[[bytes], bytes]) -> None:
    """Replace one device program by a changed one, or leave it where that is the same. Raises OSError, ProgramError.

    cgroup: descriptor; flags: how its programs are attached; program: id.
    """
    from oci_hooks import bpf

    old = bpf.open_program(program)
    try:
        code = bpf.dump_program(old)
        changed = change(code)
        if changed == code:
            return
        new = bpf.load_program(changed)
        try:
            bpf.replace_program(cgroup, new, old, flags)
        finally:
            os.close(new)
    finally:
        os.close(old)


def add_nodes(code: bytes, nodes: tuple[Numbers, ...]) -> bytes:
    """Return a program that permits these nodes besides all that it permits now."""
    from oci_hooks import bpf

    return bpf.make_prefix([*bpf.read_prefix(code), *nodes]) + bpf.strip_prefix(code)


def remove_nodes(code: bytes, nodes: tuple[Numbers, ...]) -> bytes:
    """Return a program without what was once added for these nodes."""
    from oci_hooks import bpf

    return bpf.make_prefix(set(bpf.read_prefix(code)) - set(nodes)) + bpf.strip_prefix(code)


@step
def find_programs_above(root: Root, cgroup: Cgroup) -> list[str]:
    """Return the ancestors of a version 2 cgroup that have device programs of their own, the nearest first."""
    from oci_hooks import bpf

    found = []
    for path in reversed(list_ancestors(cgroup.unified, cgroup.unified_mount)):
        try:
            fd = os.open(root.host_path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if bpf.query_programs(fd)[1]:
                found.append(path)
        except OSError:
            continue
        finally:
            os.close(fd)
    return found
