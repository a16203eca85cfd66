# SPDX-License-Identifier: Apache-2.0
"""Measurements in the virtual machine: the guest hook compared with the usual ways to bind devices.

Every case starts from the same: all NICs at their native driver, udev with nothing left to do. The containers are made
once and wait, as they do at createRuntime; `vfio-guest-bind poststop` takes back what a run gave, and is not timed.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench import before, go_hook, hotplug, lift, scale
from tests.bench.plain import BARE
from tests.bench.timing import BenchError, Case, Samples, list_imports, take_turns, time_command, weigh
from tests.support import guest_calls
from tests.vm import bundles, devices, guest

GUEST_HOOK = str(lift.HOOKS / "hooks/vfio-guest-bind")
HOST_HOOK = str(lift.HOOKS / "hooks/vfio-host-check")
DEVICES = "io.katacontainers.x.vfio.devices"
# What the kernel itself takes: the same files, written by the least that can write them.
SHELL = """
for address in "$@"; do
    echo vfio-pci >/sys/bus/pci/devices/$address/driver_override
    echo $address >/sys/bus/pci/devices/$address/driver/unbind
    echo $address >/sys/bus/pci/drivers_probe
done
"""
DRIVERCTL = 'for address in "$@"; do driverctl --nosave set-override $address vfio-pci || exit; done'
# With how many devices in as many groups the hook and its peers are measured.
COUNTS = (1, 2, 4, 8, 16)
MANY = 8
TRUE = ("/bin/true",)
# Cases that open all files that the others open too.
LIFTED = ("bare", "guest none", "host none", "guest 1", "shell 1", "go 1", "driverctl 1", "devbind 1")


class Waiting:
    """A container that is created and waits, its devices named by the annotation."""

    def __init__(self, name: str, addresses: Sequence[str]) -> None:
        annotations = {DEVICES: ",".join(addresses)} if addresses else {}
        options = bundles.Options(
            hooks={}, annotations=annotations, devices=bundles.vfio_devices() if addresses else ()
        )
        self.addresses = addresses
        self.container = bundles.Container("crun", name, ("/bin/sleep", "3600"), options)
        done = self.container.create()
        if done.code:
            raise BenchError(f"crun create {name} ended with {done.code}: {done.stderr}")
        state = self.container.read_state()
        self.state = json.dumps(state).encode()
        self.stopped = json.dumps({**state, "status": "stopped"}).encode()

    def release(self) -> None:
        """Have the hook put everything back."""
        # The container lives on for the next run, so its claim has to be that of a hook that was killed.
        guest_calls.forget_success(self.container.name)
        time_command((GUEST_HOOK, "poststop"), self.stopped)
        guest.settle()

    def make_case(self, name: str) -> Case:
        """Return the case of a hook that binds the devices."""
        return Case(name, (GUEST_HOOK,), self.state, restore=self.release)


def give_back(addresses: Sequence[str]) -> None:
    """Give devices back to their native driver."""
    for address in addresses:
        (guest.PCI / address / "driver_override").write_text("\n")
        guest.rebind(address)
    guest.settle()


def make_peer(name: str, addresses: Sequence[str], *command: str) -> Case:
    """Return the case of another program that binds these devices."""
    return Case(name, (*command, *addresses), restore=functools.partial(give_back, addresses))


def list_go_cases(nics: Sequence[str]) -> list[Case]:
    """Return the predecessor's hook with one device and with eight; nothing where nobody built it."""
    executable = go_hook.prepare()
    counts = (1, MANY) if executable else ()
    return [
        Case(
            f"go {count}",
            (executable,),
            go_hook.make_state(f"bench-go-{count}", nics[:count]),
            restore=functools.partial(give_back, nics[:count]),
        )
        for count in counts
    ]


def list_guest_cases() -> list[Case]:
    """Return the hook with one device and more, and the same work done by others."""
    nics = guest.find_devices(devices.NIC_E1000E)
    together = guest.find_devices(devices.NIC_E1000)
    many, first = nics[:MANY], nics[:1]
    none = Waiting("bench-none", ())
    return [
        Case("bare", BARE),
        Case("guest none", (GUEST_HOOK,), none.state),
        Case("host none", (HOST_HOOK,), none.state),
        *(Waiting(f"bench-{number}", nics[:number]).make_case(f"guest {number}") for number in COUNTS),
        Waiting("bench-together", together).make_case("guest 8 in one group"),
        make_bound_case(Waiting("bench-bound", first), first),
        *(make_peer(f"shell {number}", nics[:number], "/bin/sh", "-c", SHELL, "sh") for number in COUNTS),
        *list_go_cases(nics),
        make_peer("driverctl 1", first, "/bin/sh", "-c", DRIVERCTL, "sh"),
        make_peer(f"driverctl {MANY}", many, "/bin/sh", "-c", DRIVERCTL, "sh"),
        make_peer("devbind 1", first, "dpdk-devbind.py", "-b", "vfio-pci"),
        make_peer(f"devbind {MANY}", many, "dpdk-devbind.py", "-b", "vfio-pci"),
    ]


def make_bound_case(waiting: Waiting, addresses: Sequence[str]) -> Case:
    """Return the case of a device that is bound to vfio-pci already."""

    def bind() -> None:
        for address in addresses:
            guest.bind(address, "vfio-pci")
        guest.settle()

    def restore() -> None:
        waiting.release()
        give_back(addresses)

    return Case("guest bound", (GUEST_HOOK,), waiting.state, prepare=bind, restore=restore)


def list_runc_cases(place: Path = lift.HOOKS, suffix: str = "") -> list[Case]:
    """Return `runc run` of /bin/true: without a hook, with both hooks and no VFIO, with a device and back.

    place: of the hooks, which the tests' helpers use, too; suffix: of the cases' names.
    """
    nic = guest.find_device(devices.NIC_E1000E)
    both = {phase: bundles.guest_hooks(phase)[phase] for phase in ("createRuntime", "poststop")}
    host = {"prestart": [bundles.make_hook(str(place / "hooks/vfio-host-check"))]}
    asked = bundles.Options(hooks=both, annotations={DEVICES: nic}, devices=bundles.vfio_devices())
    hooks = bundles.Options(hooks={**host, "createRuntime": both["createRuntime"]})
    cases = [make_runc_case(f"runc hooks{suffix}", hooks), make_runc_case(f"runc device{suffix}", asked)]
    return cases if suffix else [make_runc_case("runc", bundles.Options(hooks={})), *cases]


def make_runc_case(name: str, options: bundles.Options) -> Case:
    """Return the case of one container, from nothing to its end."""
    container = bundles.Container("runc", f"bench-{name.replace(' ', '-')}", TRUE, options)
    command = ("runc", "run", "--bundle", str(container.bundle), container.name)
    return Case(name, command, restore=guest.settle)


def prepare_hooks() -> Path | None:
    """Put the hooks in their place and those of the other revision in theirs; return that, None without one."""
    lift.install_hooks()
    lift.use_hooks()
    tree = before.find_tree()
    if not tree:
        return None
    lift.install_hooks(tree, lift.BEFORE)
    return lift.BEFORE


def measure(parts: Sequence[str], runs: int) -> dict[str, object]:
    """Return samples of these parts ("guest", "hotplug", "scale", "runc"), memory and imports."""
    samples: Samples = {}
    memory: Samples = {}
    imports: dict[str, object] = {}
    # As the machine is where nobody configured anything: without settings.
    subprocess.run(["modprobe", "-a", "vfio-pci"], check=True)
    guest.settle()
    other = prepare_hooks()
    if "guest" in parts:
        cases = before.double(before.choose(list_guest_cases()), lift.HOOKS, other)
        lift.lift(case for case in cases if case.name.removesuffix(before.SUFFIX) in LIFTED)
        samples |= take_turns(cases, runs, "guest hook and its peers")
        weighed = ("bare", "guest none", f"guest {MANY}")
        chosen = [case for case in cases if case.name.removesuffix(before.SUFFIX) in weighed]
        memory |= weigh(chosen, min(runs, 3))
        last = chosen[-1]
        imports[f"vfio-guest-bind, {MANY} groups"] = list_imports(GUEST_HOOK, (), last.stdin)
        last.restore()
    if "hotplug" in parts:
        nic = hotplug.find_address()
        waiting = Waiting("bench-hotplug", (nic,))
        measures = {
            "hotplug": functools.partial(measure_hotplug, waiting, nic),
            "hotplug native": functools.partial(hotplug.measure_native, nic),
            "hotplug kernel": functools.partial(hotplug.measure_kernel, nic),
        }
        if other:
            hook = GUEST_HOOK.replace(str(lift.HOOKS), str(other))
            measures[f"hotplug{before.SUFFIX}"] = functools.partial(measure_hotplug, waiting, nic, hook)
        cases = [Case(name, measure=run, restore=hotplug.unplug) for name, run in measures.items()]
        cases.append(Case("hotplug bare", BARE))
        samples |= take_turns(cases, runs, "hot plug")
    if "scale" in parts:
        nic = guest.find_devices(devices.NIC_E1000E)[0]
        guest.bind(nic, "vfio-pci")
        samples |= scale.measure_inside(HOST_HOOK, nic, runs)
        give_back([nic])
    if "runc" in parts:
        cases = list_runc_cases()
        if other:
            lift.use_hooks(other)
            cases += list_runc_cases(other, before.SUFFIX)
            lift.use_hooks()
        lift.lift(cases)
        samples |= take_turns(cases, runs, "runc run")
    return {"samples": samples, "memory": memory, "imports": imports}


def measure_hotplug(waiting: Waiting, address: str, hook: str = GUEST_HOOK) -> float:
    """Return the seconds from the kernel's uevent to the group's node in the container, its hook waiting for that."""
    directory = Path(f"/proc/{waiting.container.read_pid()}/root/dev/vfio")
    seconds = hotplug.measure((hook,), waiting.state, address, directory)
    waiting.release()
    return seconds


if __name__ == "__main__":
    result, number, *wanted = sys.argv[1:]
    Path(result).write_text(json.dumps(measure(wanted, int(number))))
    os.sync()
