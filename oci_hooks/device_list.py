# SPDX-License-Identifier: Apache-2.0
"""Device lists of cgroup version 1 (Documentation/admin-guide/cgroup-v1/devices.rst): read, add a node, take it out.

A cgroup is in one of two states (kernel: security/device_cgroup.c): it denies all but what it lists, or it permits all
but what it does not show, and lists "a *:* rwm". A write to devices.allow or devices.deny changes one entry, that of
the very same numbers; one with a wildcard is another entry. What a parent loses, its children lose.
"""

from __future__ import annotations

import errno

from oci_hooks.cgroup import ACCESS, Node, fail, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oci_hooks.files import Root


def allow_node(root: Root, path: str, major: int, minor: int) -> None:
    """Permit one node to a cgroup of version 1. Raises StepError, which names the parent if that lacks it."""
    try:
        write_file(root.host_path(f"{path}/devices.allow"), f"c {major}:{minor} {ACCESS}")
    except OSError as error:
        problem = f"c {major}:{minor} {ACCESS} is not accepted: {error.strerror}"
        parent = path.rpartition("/")[0]
        # Kernel: devcgroup_update_access, parent_has_perm.
        if error.errno == errno.EPERM and root.exists(f"{parent}/devices.list"):
            problem = f"c {major}:{minor} {ACCESS} is not accepted, because the parent cgroup {parent} lacks it"
        raise fail(path, problem, [(major, minor)]) from None


def deny_node(root: Root, path: str, major: int, minor: int) -> None:
    """Take one node from a cgroup of version 1, if that is still there. Raises StepError."""
    try:
        write_file(root.host_path(f"{path}/devices.deny"), f"c {major}:{minor} {ACCESS}")
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ENODEV:
            # The directory went away between opening and writing.
            return
        raise fail(path, f"c {major}:{minor} {ACCESS} can't be taken back: {error.strerror}") from None


def lacks(root: Root, path: str, nodes: Iterable[Node]) -> bool:
    """Tell whether a version 1 cgroup does not have one of the nodes, by its devices.list."""
    rules = [parse_rule(line) for line in root.read_text_or(f"{path}/devices.list", "").splitlines()]
    return not all(any(covers(rule, node) for rule in rules) for node in nodes)


def parse_rule(line: str) -> tuple[str, str, str, str]:
    """Return kind, major, minor and access of a line of devices.list, e.g. "c 10:196 rw"."""
    kind, numbers, access = (line.split() + ["", "", ""])[:3]
    major, _, minor = numbers.partition(":")
    return kind, major, minor, access


def covers(rule: tuple[str, str, str, str], node: Node) -> bool:
    """Tell whether a rule permits reading and writing of a node."""
    kind, major, minor, access = rule
    return (
        kind in ("a", "c")
        and major in ("*", str(node.major))
        and minor in ("*", str(node.minor))
        and set(ACCESS) <= set(access)
    )
