# SPDX-License-Identifier: Apache-2.0
"""Explain why the hook cannot write below /run: it is not the machine's root, or the file system is read-only."""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root


def refuse_without_root(root: Root, path: str) -> None:
    """Raise Refusal [not-root] if this process is not the machine's root, as a rootless engine's hook isn't.

    Root of a user namespace has no rights over the machine's devices (user_namespaces(7)).
    """
    from oci_hooks.settings import ALL_USERS

    user = os.geteuid()
    words = root.read_text_or("/proc/self/uid_map", "").split()
    if user == 0 and words in ([], ALL_USERS):
        return
    who = f"user {user}" if user else f"user {words[1]}, who is root in a user namespace only"
    problem = f"the hook runs as {who}, and only the machine's root can bind devices"
    raise Refusal("not-root", path, problem, "run the container engine as root: a rootless one cannot pass devices")


def explain_error(error: OSError, path: str) -> Exception:
    """Return what to raise instead of an error of the directory of claims, or of a file in it. path: its own."""
    if error.errno != errno.EROFS:
        return error
    problem = "the hook must write there: Read-only file system"
    hint = "mount a tmpfs on /run; in a restricted service of systemd: RuntimeDirectory=oci-vfio-hooks"
    return Refusal("state-directory", path, problem, hint)
