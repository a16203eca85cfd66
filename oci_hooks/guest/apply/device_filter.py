# SPDX-License-Identifier: Apache-2.0
"""Change the device filters of a cgroup (version 2), and find those of its ancestors."""

from __future__ import annotations

import os

from oci_hooks.frozen import Frozen
from oci_hooks.guest.apply import bpf, bpf_program
from oci_hooks.guest.apply.cgroup import Cgroup, list_cgroup_ancestors, permit_failed
from oci_hooks.system import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci_hooks.findings import StepError
    from oci_hooks.guest.apply.bpf_program import Numbers
    from oci_hooks.system import Root

    # From a program's instructions and nodes to the new instructions.
    Change = Callable[[bytes, tuple[Numbers, ...]], bytes]


class Replacement(Frozen):
    """A loaded program that is to replace another one.

    cgroup, new, old: descriptors; flags: attach flags of the cgroup's programs; path, nodes: for error messages.
    """

    path: str
    nodes: tuple[Numbers, ...]
    cgroup: int
    flags: int
    old: int
    new: int


class Replacements:
    """Changes of device programs, all prepared before the first is made.

    So nothing begins that cannot be completed. Use it as a context: it closes the descriptors.
    """

    def __init__(self, root: Root, change: Change) -> None:
        self.root = root
        self.change = change
        self.swaps: list[Replacement] = []
        self.open: list[int] = []

    def __enter__(self) -> Replacements:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.open:
            os.close(fd)

    def keep_open(self, fd: int) -> int:
        """Return a descriptor that is closed at the end."""
        self.open.append(fd)
        return fd

    def prepare(self, path: str, nodes: tuple[Numbers, ...]) -> None:
        """Load replacements for the device programs of one cgroup. Raises StepError.

        A cgroup without a program of its own restricts nothing and is left alone, as is a program that stays the same.
        """
        try:
            cgroup = self.keep_open(os.open(self.root.host_path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            flags, programs = bpf.query_programs(cgroup)
            for program in programs:
                old = self.keep_open(bpf.open_program(program))
                code = bpf.dump_program(old)
                changed = self.change(code, nodes)
                if changed != code:
                    new = self.keep_open(bpf.load_program(changed))
                    self.swaps.append(Replacement(path, nodes, cgroup, flags, old, new))
        except (OSError, bpf_program.ProgramError) as error:
            raise explain_failure(error, path, nodes) from None

    def replace_all(self) -> None:
        """Replace the programs. Raises StepError."""
        for swap in self.swaps:
            try:
                bpf.replace_program(swap.cgroup, swap.new, swap.old, swap.flags)
            except (OSError, bpf_program.ProgramError) as error:
                raise explain_failure(error, swap.path, swap.nodes) from None


def explain_failure(error: Exception, path: str, nodes: tuple[Numbers, ...]) -> StepError:
    """Return the error for a cgroup whose device programs cannot be changed."""
    if isinstance(error, OSError):
        return permit_failed(path, f"cannot read or replace its device filter: {error.strerror}", nodes)
    return permit_failed(path, f"cannot change its device filter: {error}", nodes)


def add_nodes(code: bytes, nodes: tuple[Numbers, ...]) -> bytes:
    """Return a program that allows these nodes in addition to all that it allows now."""
    return bpf_program.make_prefix([*bpf_program.read_prefix(code), *nodes]) + bpf_program.strip_prefix(code)


def remove_nodes(code: bytes, nodes: tuple[Numbers, ...]) -> bytes:
    """Return a program without the prefix's instructions for these nodes."""
    return bpf_program.make_prefix(set(bpf_program.read_prefix(code)) - set(nodes)) + bpf_program.strip_prefix(code)


@step("find-filters-above")
def find_programs_above(root: Root, cgroup: Cgroup) -> list[str]:
    """Return the ancestors of a version 2 cgroup that have device programs of their own, the nearest first."""
    found = []
    for path in reversed(list_cgroup_ancestors(cgroup.unified, cgroup.unified_mount)):
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
