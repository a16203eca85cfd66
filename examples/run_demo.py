# SPDX-License-Identifier: Apache-2.0
"""The demo: a virtual machine with a virtual IOMMU and a NIC, containers under runc and crun, with hooks and without.

Run by examples/demo. Outside it gets what is missing and boots; inside (`--inside`) it runs the containers and judges
each row. Exit code 0 only when every row is as it should be.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import provision
from tests.vm import bundles, devices, guest, machines, rig
from tests.vm.bundles import Containers, Done

# The group's number on the host. In the guest the group has another one, and its node other numbers.
HOST_GROUP = "42"
LIMIT = 900.0


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    runtime: str
    case: str
    seen: str
    right: bool


def main(arguments: list[str]) -> int:
    """Show everything; the exit code says whether all was right."""
    if arguments == ["--inside"]:
        return show_inside()
    if arguments not in ([], ["--chain"]):
        print("usage: examples/demo [--chain]", file=sys.stderr)
        return 2
    try:
        return boot_chain() if arguments else boot_and_show()
    except provision.MissingError as error:
        return provision.die(error)
    except rig.BootError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def boot_and_show() -> int:
    """Get what is missing, boot, and run this file inside."""
    started = time.monotonic()
    provision.ensure_packages(provision.RIG_PACKAGES)
    kernel, rootfs = provision.ensure_rig()
    print(f"booting Linux {kernel.release} with a virtual IOMMU and a NIC (emulated: this takes half a minute)")
    command = (provision.PYTHON, "-u", "-m", "examples.run_demo", "--inside")
    return run_inside("single", kernel, command, {"OCI_VFIO_ROOTFS": str(rootfs)}, started)


def boot_chain() -> int:
    """Get what is missing for the whole chain, boot, and run the other file inside."""
    from tests.chain import image

    started = time.monotonic()
    provision.ensure_packages(provision.RIG_PACKAGES)
    kernel, _ = provision.ensure_rig()
    environment = {image.ENVIRONMENT: str(image.ensure_image().place)}
    print(f"booting Linux {kernel.release} with NICs, and in it a virtual machine (emulated: this takes minutes)")
    command = (provision.PYTHON, "-u", "-m", "examples.run_chain")
    return run_inside("chain", kernel, command, environment, started)


def run_inside(
    machine: str, kernel: provision.Kernel, command: tuple[str, ...], environment: dict[str, str], started: float
) -> int:
    """Run a command in one of the rig's machines, and return its exit code."""
    provision.compile_hooks()
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="rig-share-") as share:
        job = rig.Job(command, Path(share), LIMIT, environment)
        outcome = rig.run_in_vm(machines.MACHINES[machine], kernel, job, rig.write_output)
    print(f"{time.monotonic() - started:.0f} s in all")
    return outcome.exit_code


def show_inside() -> int:
    """Run the containers under each runtime, print the table, return the exit code."""
    bundles.write_settings()
    nic = guest.find_device(devices.NIC_E1000E)
    print(f"the NIC is {nic}, {guest.id_of(nic)}, in group {guest.group_of(nic)}, driver {guest.driver_of(nic)}")
    print(f"config.json lists /dev/vfio/vfio and /dev/vfio/{HOST_GROUP}: what the group is called on the host")
    rows: list[Row] = []
    for runtime in ("runc", "crun"):
        print(f"\n{runtime}")
        containers = Containers(runtime)
        try:
            rows += show_runtime(containers, nic)
        finally:
            containers.destroy_all()
    print_table(rows)
    return 0 if all(row.right for row in rows) else 1


def show_runtime(containers: Containers, nic: str) -> list[Row]:
    """Return the rows of one runtime."""
    return [
        show_without_hook(containers),
        show_with_hook(containers, nic),
        show_release(containers, nic),
        *show_host_check(containers, nic),
    ]


def show_without_hook(containers: Containers) -> Row:
    """Show (a): the group is listed, nobody does anything about it."""
    done = containers.probe(devices=bundles.vfio_devices(HOST_GROUP), hooks={})
    tell("(a) no hook", done)
    groups = read_groups(done)
    seen = ", ".join(f"open /dev/vfio/{group['group']}: {group['open']}" for group in groups) or "no group"
    return Row(containers.runtime, "(a) no hook", seen, [group["open"] for group in groups] == ["EPERM"])


def show_with_hook(containers: Containers, nic: str) -> Row:
    """Show (b): the same with vfio-guest-bind, down to the device's id read through VFIO."""
    hooks = bundles.guest_hooks("createRuntime", "poststop")
    done = containers.probe(devices=bundles.vfio_devices(HOST_GROUP), hooks=hooks)
    tell("(b) with vfio-guest-bind", done)
    case = "(b) with vfio-guest-bind"
    wanted = {"address": nic, "get_device": "ok", "read_id": "ok", "id": guest.id_of(nic)}
    for group in read_groups(done):
        if group.get("devices") == [wanted] and group["viable"] and group["group"] == guest.group_of(nic):
            seen = f"group {group['group']} viable, type 1 set, {wanted['id']} through VFIO as in sysfs"
            return Row(containers.runtime, case, seen, True)
    return Row(containers.runtime, case, shorten(done.stderr) or f"not the device's id: {done.stdout.strip()}", False)


def show_release(containers: Containers, nic: str) -> Row:
    """Show what the poststop hook of (b) left: the NIC as it was."""
    guest.settle()
    driver, override = guest.driver_of(nic), guest.override_of(nic)
    seen = f"driver {driver or 'none'}, driver_override {override or 'empty'}"
    return Row(containers.runtime, "    after its end", seen, (driver, override) == ("e1000e", ""))


def show_host_check(containers: Containers, nic: str) -> list[Row]:
    """Show (c): vfio-host-check under prestart, on a half-bound group and on a good one."""
    half = guest.find_device(devices.TESTDEV)
    guest.bind(half, "vfio-pci")
    guest.bind(nic, "vfio-pci")
    bad = run_host_check(containers, guest.group_of(half))
    tell("(c) vfio-host-check, group not viable", bad)
    good = run_host_check(containers, guest.group_of(nic))
    tell("(c) vfio-host-check, good group", good)
    guest.bind_native(half)
    guest.bind_native(nic)
    refused = "group-not-viable" in bad.stderr and "xhci_hcd" in bad.stderr and bad.code != 0
    return [
        Row(containers.runtime, "(c) check: not viable", "refused" if bad.code else "container started", refused),
        Row(containers.runtime, "(c) check: good", "container started" if not good.code else "refused", not good.code),
    ]


def run_host_check(containers: Containers, group: str) -> Done:
    """Run a container that does nothing, with the host's hook, for this group of this machine."""
    numbers = guest.numbers_of_group(group)
    listed = [bundles.vfio_devices()[0], bundles.vfio_device(group, *numbers)]
    hooks = {"prestart": [bundles.make_hook(bundles.find_hook(bundles.HOST_HOOK))]}
    return containers.run("/bin/true", devices=listed, hooks=hooks)


def read_groups(done: Done) -> list[dict[str, Any]]:
    """Return what the probe says of each group; none when the container did not start."""
    return list(done.read_json()["groups"]) if done.stdout.strip() else []


def tell(case: str, done: Done) -> None:
    """Print what a container printed, and what the hook said."""
    print(f"  {case}: exit code {done.code}")
    # runc quotes what a hook said; crun does not.
    for line in (done.stdout + done.stderr).replace("\\n", "\n").replace('\\"', '"').strip().splitlines():
        print(f"    {line}")


def shorten(text: str) -> str:
    """Return what the hook said last, without what the runtime says around it."""
    lines = text.replace("\\n", "\n").strip().strip('"').splitlines()
    said = [line[line.find("vfio-") :] for line in lines if "vfio-" in line]
    return said[-1] if said else (lines or [""])[-1]


def print_table(rows: list[Row]) -> None:
    """Print all rows."""
    print(f"\n{'':7} {'':26} {'seen':62} as it should be")
    for row in rows:
        print(f"{row.runtime:7} {row.case:26} {row.seen:62} {'yes' if row.right else 'NO'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
