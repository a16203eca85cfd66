# SPDX-License-Identifier: Apache-2.0
"""The programs that the demo's machine runs, and the Debian package of each.

tests/newcomer/test_demo.py holds the table to a real bare root: no file of it is there before, and dpkg says that each
is of its package afterwards. tests/unit/test_newcomer.py holds it to the code, and to the list that is installed.
"""

from __future__ import annotations

from collections.abc import Iterable

PROGRAMS = {
    "/usr/bin/qemu-system-x86_64": "qemu-system-x86",
    "/bin/busybox": "busybox-static",
    "/usr/bin/file": "file",
    "/bin/kmod": "kmod",
    "/bin/udevadm": "udev",
    "/bin/ip": "iproute2",
    "/usr/lib/python3.11/ensurepip/__init__.py": "python3-venv",
    "/usr/sbin/runc": "runc",
    "/usr/bin/crun": "crun",
    "/usr/sbin/debootstrap": "debootstrap",
}


def find_unnamed(packages: Iterable[str]) -> list[str]:
    """Return the programs whose packages are not among these."""
    named = set(packages)
    return [program for program, package in PROGRAMS.items() if package not in named]
