# SPDX-License-Identifier: Apache-2.0
"""Kill a container's init, so that no container runs without the devices it was promised."""

from __future__ import annotations

import os

from oci_hooks.linux.processes import read_start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.oci import State
    from oci_hooks.system import Root


def kill_container(root: Root, state: State) -> None:
    """Kill a container's init, so that nothing runs without the devices it was promised (on_failure = "kill")."""
    # Never this machine's init, nor a process group.
    if state.pid > 1 and read_start_time(root, state.pid):
        root.do(os.kill, state.pid, 9)
