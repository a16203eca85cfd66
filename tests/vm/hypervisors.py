# SPDX-License-Identifier: Apache-2.0
"""Real QEMUs inside the machine, as Kata would have them: paused, with or without a virtual IOMMU, holding a group."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vm import guest

VIOMMU = ("-device", "intel-iommu,caching-mode=on")
# QEMU in an emulated machine takes its time to come up.
LIMIT = 120.0


@contextmanager
def run_qemu(sandbox: str, *options: str, address: str = "") -> Iterator[int]:
    """Run a paused QEMU and give its pid. sandbox: whose it is; address: a device on vfio-pci that it is given."""
    command = ["/usr/bin/qemu-system-x86_64", "-name", f"sandbox-{sandbox},debug-threads=on", "-S", "-nodefaults"]
    command += ["-display", "none", "-machine", "q35,accel=tcg", "-m", "64", *options]
    if address:
        command += ["-device", f"vfio-pci,host={address}"]
    with subprocess.Popen(["prlimit", "--memlock=unlimited", *command], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until_up(process, f"/dev/vfio/{guest.group_of(address)}" if address else "")
            yield process.pid
        finally:
            process.kill()


def wait_until_up(process: subprocess.Popen[str], node: str) -> None:
    """Wait until a QEMU holds this node; without one, until it is QEMU at all."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"QEMU ended: {process.stderr.read() if process.stderr else ''}")
        links = [guest.link_name(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
        name = guest.link_name(Path(f"/proc/{process.pid}/exe"))
        if name.startswith("qemu") and (not node or node.rpartition("/")[2] in links):
            return
        time.sleep(0.2)
    raise AssertionError(f"QEMU is not up after {LIMIT} s, or does not hold {node}")
