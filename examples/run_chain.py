# SPDX-License-Identifier: Apache-2.0
"""The demo of the whole chain: `examples/demo --chain`.

In the rig's machine, which is the host here, a virtual machine is started for a container, as Kata does. First with a
configuration that can't work: the check stops it. Then with a good one: packets flow. Exit code 0 only if it is so.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.chain import host, image, testpmd
from tests.chain.inside import Inside
from tests.chain.vmruntime import GuestContainer, HookError, Manner, VmRuntime
from tests.vm import guest

COLUMN = 42


def show_inside() -> int:
    """Show both in the machine and return the exit code."""
    started = time.monotonic()
    host.prepare()
    nics = host.find_nics()
    for address in nics.wired:
        guest.bind(address, "vfio-pci")
    config = host.make_config(["/bin/sh", "-c", f"ls -d /dev/vfio/[0-9]*; exec {host.FORWARD}"], nics.wired)
    with tempfile.TemporaryDirectory(prefix="chain-") as directory:
        bundle = host.write_bundle(Path(directory) / "bundle", config)
        stopped = show_stopped(bundle, Path(directory), nics)
        forwarded = show_forwarded(bundle, Path(directory), nics)
    print(f"{time.monotonic() - started:.0f} s in the machine", flush=True)
    return 0 if stopped and forwarded else 1


def show_stopped(bundle: Path, scratch: Path, nics: host.Nics) -> bool:
    """Show (b): enable_iommu = false in Kata's configuration. Returns whether it was stopped."""
    print(f"\n(b) {host.CONFIGURATION} has enable_iommu = false\n")
    print_host(nics)
    runtime = VmRuntime(image.find_image(), host.write_configuration(enable_iommu=False), scratch, hooks_first=True)
    try:
        with runtime.run_sandbox(bundle):
            print_rows("guest", ["a virtual machine was started: that is wrong"] * 2)
    except HookError as error:
        print_arrow("x")
        print(str(error).rpartition("stderr: ")[2].strip())
        print("no virtual machine was started", flush=True)
        return "[viommu-off]" in str(error)
    return False


def show_forwarded(bundle: Path, scratch: Path, nics: host.Nics) -> bool:
    """Show (a): the same container with enable_iommu = true. Returns whether packets flowed."""
    print("\n(a) the same with enable_iommu = true\n")
    print_host(nics)
    runtime = VmRuntime(image.find_image(), host.write_configuration(enable_iommu=True), scratch)
    with runtime.run_sandbox(bundle) as sandbox:
        print_arrow("│ vfio-host-check says nothing; QEMU")
        inside = Inside(sandbox.vm)
        before = inside.list_nics()
        print_rows("guest", [f"group {nic.group}: {address}, {nic.driver}" for address, nic in before.items()])
        container = GuestContainer(sandbox, "demo", host.read_config(bundle), Manner())
        done = testpmd.run_testpmd(container)
        after = inside.list_nics()
    counters = testpmd.read_counters(done.output)
    if not testpmd.is_forwarding(counters):
        print(done.output)
        return False
    print_arrow("│ vfio-guest-bind")
    print_rows("container", [line for line in done.output.splitlines() if line.startswith("/dev/vfio/")])
    print_arrow("│ dpdk-testpmd, its own counters")
    print_rows("packets", [f"{port.received} in, {port.sent} out" for port in counters.values()])
    print_arrow("│ the container has ended")
    print_rows("guest", [f"group {nic.group}: {address}, {nic.driver}" for address, nic in after.items()])
    return after == before


def print_host(nics: host.Nics) -> None:
    """Print what the host has."""
    print_rows("host", [f"group {guest.group_of(nic)}: {nic}, {guest.driver_of(nic)}" for nic in nics.wired])


def print_rows(name: str, cells: list[str]) -> None:
    """Print one level of the picture: its name, and what there is of each NIC."""
    print(f"{name:11}" + "".join(f"{cell:{COLUMN}}" for cell in cells), flush=True)


def print_arrow(*marks: str) -> None:
    """Print the path from one level to the next; one mark represents both NICs."""
    print_rows("", [f"    {mark}" for mark in (marks * 2)[:2]])


if __name__ == "__main__":
    sys.exit(show_inside())
