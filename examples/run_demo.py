# SPDX-License-Identifier: Apache-2.0
"""The demo: a virtual machine with a virtual IOMMU and a NIC, containers under runc and crun, with hooks and without.

Run by examples/demo. Outside it gets what is missing and boots; inside (`--inside`) it runs the containers and judges
each row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable

from tests import provision
from tests.progress import PROGRESS
from tests.provision import MissingError, say
from tests.vm import bundles, devices, guest, machines, rig
from tests.vm.bundles import Containers, Done

# The group's number on the host. In the guest the group has another one, and its node other numbers.
HOST_GROUP = "42"
LIMIT = 900.0
# What apt, the kernel and the root file system take is less than half of it.
ROOM = 2 << 30
RUNTIMES = ("runc", "crun")
CASES = ("a", "b", "c")
ROWS_FILE = "rows.json"
EPILOG = "exit code: 0 all rows as they should be, 1 one is not, 2 this machine lacks something, 130 interrupted"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    runtime: str
    case: str
    seen: str
    right: bool


def main(arguments: list[str]) -> int:
    """Show what is asked for and return the exit code, which EPILOG explains."""
    asked = parse_arguments(arguments)
    if asked.inside:
        return show_inside(asked.words)
    # Whoever asks for JSON reads nothing else from standard output.
    PROGRESS.stream = sys.stderr if asked.json else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = provision.find_cache() / "demo.log"
    try:
        check_machine()
        with PROGRESS.keep_log(log):
            return boot_chain() if asked.chain else boot_and_show(asked.words, asked.json, log)
    except MissingError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except rig.BootError as error:
        print(f"demo: {error}\nall that was printed is in {log}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the virtual machine is gone, nothing is mounted", file=sys.stderr)
        return 130


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return what the command line asks for."""
    about = "Show in an emulated virtual machine what the hooks do for a container. Nothing of this machine is changed"
    parser = argparse.ArgumentParser("examples/demo", description=f"{about} but by apt.", epilog=EPILOG)
    parser.add_argument("words", nargs="*", metavar="RUNTIME|CASE", help="only this: runc, crun; a, b, c", default=[])
    parser.add_argument("--chain", action="store_true", help="from the host's group to DPDK's packets, a VM in the VM")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, and all else to standard error")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    for word in asked.words:
        if word not in (*RUNTIMES, *CASES):
            parser.error(f"{word!r} is neither a runtime ({', '.join(RUNTIMES)}) nor a case ({', '.join(CASES)})")
    if asked.chain and (asked.json or asked.words):
        parser.error("--chain shows one picture: nothing else goes with it")
    return asked


def check_machine() -> None:
    """Raise MissingError with one clear line where this machine can't run the demo, before anything is installed."""
    if platform.machine() != "x86_64":
        raise MissingError(
            f"this machine is {platform.machine()}: the demo boots an x86_64 on this machine's own files"
        )
    if os.geteuid() != 0:
        raise MissingError("needs root, for apt and for the virtual machine's process namespace: sudo examples/demo")
    packages = provision.find_missing_packages(provision.RIG_PACKAGES)
    if packages and shutil.which("apt-get") is None:
        raise MissingError(f"there is no apt-get here: install {', '.join(packages)} (Debian's names) by hand")
    cache = provision.find_cache()
    for location in (cache, Path("/usr")) if packages or not provision.is_rig_made() else ():
        free = shutil.disk_usage(location).free
        if free < ROOM:
            raise MissingError(f"{location} has {free >> 20} MiB free: {ROOM >> 20} MiB are needed the first time")


def make_ready() -> provision.Kernel:
    """Print what is missing and how large it is, and install it."""
    if not provision.is_rig_made():
        say("a first run gets, besides what apt installs, 600 MB: a kernel, a root file system, virtme-ng from PyPI")
        say(f"they go to {provision.find_cache()}, where a later run finds them")
    provision.ensure_packages(provision.RIG_PACKAGES)
    rig.check_requirements()
    return provision.ensure_rig()[0]


def boot_and_show(words: Sequence[str], as_json: bool, log: Path) -> int:
    """Get what is missing, boot, run this file inside, print the table and how to go on."""
    started = time.monotonic()
    kernel = make_ready()
    command = (provision.PYTHON, "-u", "-m", "examples.run_demo", "--inside", *words)
    environment = {"OCI_VFIO_ROOTFS": str(provision.ensure_rootfs())}
    rows: list[Row] = []
    about = f"booting Linux {kernel.release} with a virtual IOMMU and a NIC (emulated: this takes half a minute)"

    def take(share: Path) -> None:
        path = share / ROWS_FILE
        rows.extend(Row(**row) for row in (json.loads(path.read_text()) if path.exists() else ()))

    code = run_inside("single", kernel, command, environment, about, take)
    if code not in (0, 1) or not rows:
        say(f"the virtual machine's program ended with {code}; all that was printed is in {log}")
        return 1
    print_table(rows)
    say(f"\n{time.monotonic() - started:.0f} s in all; all that was printed, and what apt said: {log}")
    say("one case once more: examples/demo crun b     any command in that machine: tests/run --in single COMMAND")
    if as_json:
        print(json.dumps([{**asdict(row), "case": row.case.strip()} for row in rows], indent=1))
    return 0 if all(row.right for row in rows) else 1


def boot_chain() -> int:
    """Get what is missing for the whole chain, boot, and run the other file inside."""
    from tests.chain import image

    started = time.monotonic()
    kernel = make_ready()
    provision.ensure_packages(image.PACKAGES)
    environment = {image.ENVIRONMENT: str(image.ensure_image().place)}
    about = f"booting Linux {kernel.release} with NICs, and in it a virtual machine (emulated: this takes minutes)"
    command = (provision.PYTHON, "-u", "-m", "examples.run_chain")
    code = run_inside("chain", kernel, command, environment, about)
    say(f"{time.monotonic() - started:.0f} s in all")
    return code


def run_inside(
    machine: str,
    kernel: provision.Kernel,
    command: tuple[str, ...],
    environment: dict[str, str],
    about: str,
    take: Callable[[Path], None] = lambda share: None,
) -> int:
    """Run a command in one of the rig's machines, and return its exit code.

    about: the line to print before; take: reads what the command has left in the shared directory.
    """
    provision.compile_hooks()
    with tempfile.TemporaryDirectory(prefix="rig-share-") as share, PROGRESS.step("virtual machine", about):
        job = rig.Job(command, Path(share), LIMIT, environment)

        def write(data: bytes) -> None:
            PROGRESS.write(data.decode(errors="replace"))

        outcome = rig.run_in_vm(machines.MACHINES[machine], kernel, job, write)
        take(Path(share))
    return outcome.exit_code


def show_inside(words: Sequence[str]) -> int:
    """Run the containers under each runtime, leave the rows for the outside, return the exit code."""
    bundles.write_settings()
    nic = guest.find_device(devices.NIC_E1000E)
    print(f"the NIC is {nic}, {guest.id_of(nic)}, in group {guest.group_of(nic)}, driver {guest.driver_of(nic)}")
    print(f"config.json lists /dev/vfio/vfio and /dev/vfio/{HOST_GROUP}: what the group is called on the host")
    rows: list[Row] = []
    for runtime in [name for name in RUNTIMES if name in words] or RUNTIMES:
        print(f"\n{runtime}")
        containers = Containers(runtime)
        try:
            rows += show_runtime(containers, nic, [case for case in CASES if case in words] or CASES)
        finally:
            containers.destroy_all()
    (rig.SHARE / ROWS_FILE).write_text(json.dumps([asdict(row) for row in rows]))
    return 0 if all(row.right for row in rows) else 1


def show_runtime(containers: Containers, nic: str, cases: Sequence[str]) -> list[Row]:
    """Return the rows of one runtime."""
    rows: list[Row] = []
    if "a" in cases:
        rows.append(show_without_hook(containers))
    if "b" in cases:
        rows += [show_with_hook(containers, nic), show_release(containers, nic)]
    if "c" in cases:
        rows += show_host_check(containers, nic)
    return rows


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
    """Return the probe's result for each group; none if the container did not start."""
    return list(done.read_json()["groups"]) if done.stdout.strip() else []


def tell(case: str, done: Done) -> None:
    """Print the container's output, and the hook's."""
    print(f"  {case}: exit code {done.code}")
    # runc quotes a hook's output; crun does not.
    for line in (done.stdout + done.stderr).replace("\\n", "\n").replace('\\"', '"').strip().splitlines():
        print(f"    {line}")


def shorten(text: str) -> str:
    """Return the hook's last line, without the text that the runtime adds."""
    lines = text.replace("\\n", "\n").strip().strip('"').splitlines()
    output = [line[line.find("vfio-") :] for line in lines if "vfio-" in line]
    return output[-1] if output else (lines or [""])[-1]


def print_table(rows: list[Row]) -> None:
    """Print all rows."""
    say(f"\n{'':7} {'':26} {'seen':62} as it should be")
    for row in rows:
        say(f"{row.runtime:7} {row.case:26} {row.seen:62} {'yes' if row.right else 'NO'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
