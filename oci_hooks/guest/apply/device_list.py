# SPDX-License-Identifier: Apache-2.0
"""Device lists of cgroup version 1 (Documentation/admin-guide/cgroup-v1/devices.rst): read, allow, deny.

A cgroup is in one of two states (kernel: security/device_cgroup.c): it denies all but what it lists, or it allows all
but what it does not show, and lists "a *:* rwm". A write to devices.allow or devices.deny changes one entry, the one
with exactly these numbers, by the letters written; one with a wildcard is another entry. An access that is denied to a
parent is denied to its children, too.
"""

from __future__ import annotations

import errno

from oci_hooks.guest.apply.cgroup import ACCESS, MadeNode, permit_failed, write_kernel_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.apply.bpf_program import Numbers
    from oci_hooks.system import Root

# Type, major, minor and access in a line.
Rule = tuple[str, str, str, str]


def read_rules(root: Root, path: str) -> list[Rule]:
    """Return the lines of a cgroup's devices.list; none if it cannot be read."""
    return [parse_rule(line) for line in root.read_text_or(f"{path}/devices.list", "").splitlines()]


def parse_rule(line: str) -> Rule:
    """Return type, major, minor and access of a line of devices.list, e.g. "c 10:196 rw"."""
    kind, numbers, access = (line.split() + ["", "", ""])[:3]
    major, _, minor = numbers.partition(":")
    return kind, major, minor, access


def permits_by_default(rules: list[Rule]) -> bool:
    """Return whether a cgroup allows all but what it does not show."""
    return any(kind == "a" for kind, *_ in rules)


def find_missing(rules: list[Rule], node: MadeNode) -> str:
    """Return the access, of "rw", that an entry for a node must add; "" if a rule allows both already."""
    if any(covers(rule, node) for rule in rules):
        return ""
    own = [access for *entry, access in rules if entry == ["c", str(node.major), str(node.minor)]]
    return remove_letters(ACCESS, "".join(own))


def remove_letters(access: str, others: str) -> str:
    """Return an access without some letters, in its order."""
    return "".join(letter for letter in access if letter not in others)


def covers(rule: Rule, node: MadeNode) -> bool:
    """Return whether a rule allows reading and writing of a node: the kernel requires one rule that allows both."""
    kind, major, minor, access = rule
    return (
        kind in ("a", "c")
        and major in ("*", str(node.major))
        and minor in ("*", str(node.minor))
        and set(ACCESS) <= set(access)
    )


def allow_node(root: Root, path: str, numbers: Numbers, access: str) -> None:
    """Allow one node in a cgroup of version 1. Raises StepError, which names the parent if that lacks it."""
    rule = f"c {numbers[0]}:{numbers[1]} {access}"
    try:
        write_kernel_file(root.host_path(f"{path}/devices.allow"), rule)
    except OSError as error:
        problem = f"the kernel rejects the device rule {rule}: {error.strerror}"
        parent = path.rpartition("/")[0]
        # Kernel: devcgroup_update_access, parent_has_perm.
        if error.errno == errno.EPERM and root.exists(f"{parent}/devices.list"):
            problem = f"the kernel rejects the device rule {rule}, because the parent cgroup {parent} does not allow it"
        raise permit_failed(path, problem, [numbers]) from None


def deny_node(root: Root, path: str, numbers: Numbers, access: str) -> None:
    """Remove one node from a cgroup of version 1, if that still exists. Raises StepError."""
    rule = f"c {numbers[0]}:{numbers[1]} {access}"
    try:
        write_kernel_file(root.host_path(f"{path}/devices.deny"), rule)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ENODEV:
            # The directory was removed between opening and writing.
            return
        raise permit_failed(path, f"cannot remove the device rule {rule}: {error.strerror}") from None
