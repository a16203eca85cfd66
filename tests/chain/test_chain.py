# SPDX-License-Identifier: Apache-2.0
"""The whole chain: host check, virtual machine, guest hook, DPDK in the container.

The host is the machine these tests run in; the guest is a virtual machine inside it. Two inner machines are booted: one
without a virtual IOMMU, and one that serves all that works, in the order of this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chain import host, image, testpmd
from tests.chain.host import Nics
from tests.chain.inside import Inside
from tests.chain.vmruntime import GuestContainer, HookError, Manner, Sandbox, VmRuntime
from tests.vm import bundles, guest

MACHINE = "chain"
KERNELS = ("6.1",)
# A container's own output on its devices: the hook's map of them, and the nodes.
TELL = "cat /dev/vfio/devices.json; echo; ls /dev/vfio"
# Reports when a program opens a socket for kernel uevents (netlink's protocol 15), as the hook does before it looks
# and waits; there is no udevd. The kernel's trace of system calls has that as an event.
WHEN_LISTENING = """
mount -t tracefs none /sys/kernel/tracing
event=/sys/kernel/tracing/events/syscalls/sys_enter_socket
echo 'family == 16 && protocol == 15' >$event/filter && echo 1 >$event/enable || exit 1
{ head -n 1 /sys/kernel/tracing/trace_pipe && echo listening >/dev/virtio-ports/chain.events; } &
"""


def make_runtime(scratch: Path, enable_iommu: bool = True, hooks_first: bool = False) -> VmRuntime:
    """Return the VM runtime with Kata configured so. scratch: short enough for a socket's name."""
    return VmRuntime(image.find_image(), host.write_configuration(enable_iommu), scratch, hooks_first)


def list_hypervisors() -> list[str]:
    """Return the pids of the QEMUs on the host."""
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/exe") if "qemu" in guest.link_name(path)]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for what the inner machines leave."""
    return tmp_path_factory.mktemp("c")


# Stopped on the host --------------------------------------------------------------------------------------------------


def test_host_check_kata_1_viommu_off_refused_before_vm_starts(nics: Nics, tmp_path: Path) -> None:
    """(b) Kata 1.x to 3.0 runs the hook first: no QEMU is started, and what to change is named by file and line."""
    bundle = host.write_bundle(tmp_path / "b", host.make_config(["/bin/true"], nics.wired))
    runtime = make_runtime(tmp_path, enable_iommu=False, hooks_first=True)
    with pytest.raises(HookError) as error, runtime.run_sandbox(bundle):
        pass
    lines = host.CONFIGURATION.read_text().splitlines()
    (line,) = [number for number, text in enumerate(lines, 1) if text.startswith("enable_iommu")]
    assert "vfio-host-check: error: [viommu-off]" in str(error.value)
    assert f"enable_iommu = false in {host.CONFIGURATION} line {line}" in str(error.value)
    assert list(tmp_path.iterdir()) == [bundle]
    assert list_hypervisors() == []


def test_host_check_group_not_viable_refused(nics: Nics, tmp_path: Path) -> None:
    """(c) One function of a card still has its driver: QEMU could not open the group, and would not report why."""
    bundle = host.write_bundle(tmp_path / "c", host.make_config(["/bin/true"], nics.pair))
    guest.bind_native(nics.pair[1])
    with pytest.raises(HookError) as error, make_runtime(tmp_path, hooks_first=True).run_sandbox(bundle):
        pass
    guest.bind(nics.pair[1], "vfio-pci")
    group = guest.group_of(nics.pair[0])
    assert f"error: [group-not-viable] group {group}: {nics.pair[1]} is bound to e1000e" in str(error.value)
    assert list_hypervisors() == []


# Without a virtual IOMMU ----------------------------------------------------------------------------------------------


def test_host_check_kata_3_viommu_off_refused_with_vm_running(nics: Nics, tmp_path: Path, scratch: Path) -> None:
    """(b) Kata since 3.1 has QEMU up before the hook runs: its command line is the truth, and it is taken down."""
    bundle = host.write_bundle(tmp_path / "b", host.make_config(["/bin/true"], nics.wired))
    runtime = make_runtime(make_directory(scratch / "1"), enable_iommu=False)
    with pytest.raises(HookError) as error, runtime.run_sandbox(bundle):
        pass
    assert "vfio-host-check: error: [viommu-off]" in str(error.value)
    assert list_hypervisors() == []


def test_guest_hook_without_viommu_refused(nics: Nics, tmp_path: Path, scratch: Path) -> None:
    """(b) Nobody has checked, and the virtual machine is up: the hook in the guest stops the container."""
    config = host.make_config(["/bin/true"], nics.wired, check=False)
    bundle = host.write_bundle(tmp_path / "b", config)
    runtime = make_runtime(make_directory(scratch / "2"), enable_iommu=False)
    with runtime.run_sandbox(bundle) as sandbox:
        done = GuestContainer(sandbox, "b", config, Manner()).run()
        assert {device.driver for device in Inside(sandbox.vm).list_nics().values()} == {"e1000e"}
    assert done.code != 0
    assert "vfio-guest-bind: error: [viommu-off]" in done.output


# With everything as it should be --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox(nics: Nics, scratch: Path) -> Iterator[Sandbox]:
    """Run the virtual machine that has the two wired NICs from the start; the host check has let it pass."""
    bundle = host.write_bundle(scratch / "bundle", host.make_config(["/bin/true"], nics.wired))
    with make_runtime(make_directory(scratch / "3")).run_sandbox(bundle) as sandbox:
        yield sandbox


@pytest.fixture
def inside(sandbox: Sandbox) -> Inside:
    """Return the view into the virtual machine."""
    return Inside(sandbox.vm)


def make_directory(path: Path) -> Path:
    """Make a directory and return it."""
    path.mkdir()
    return path


def forward(container: GuestContainer, *wanted: str) -> dict[str, testpmd.Counters]:
    """Run testpmd in a container until it has forwarded packets, and return its counters by port."""
    done = testpmd.run_testpmd(container)
    print(done.output)
    for text in wanted:
        assert text in done.output
    return testpmd.read_counters(done.output)


def test_guest_hook_forwards_packets_between_two_nics(sandbox: Sandbox, inside: Inside, nics: Nics) -> None:
    """(a) config.json lists the host's groups; the container finds the guest's, and its program forwards packets."""
    config = host.make_config(["/bin/sh", "-c", f"{TELL}; exec {host.FORWARD}"], nics.wired)
    before = inside.list_nics()
    groups = sorted(device.group for device in before.values())
    assert groups != sorted(sandbox.groups), "the same numbers in host and guest would prove nothing"
    container = GuestContainer(sandbox, "a", config, Manner("runc"))
    counters = forward(container, *(f"\n{group}\n" for group in groups), "Using IOMMU type 1")
    assert testpmd.is_forwarding(counters), counters
    # (f) as well: what it had is as it was.
    assert inside.list_nics() == before


def test_guest_hook_crun_image_hook_forwards_packets(sandbox: Sandbox, inside: Inside, nics: Nics) -> None:
    """(a) The same under crun, with the hook from the guest image: the agent hands on no devices, only annotations."""
    paths = ",".join(f"path:{path}" for path in sandbox.paths)
    config = host.make_config(["/bin/sh", "-c", f"exec {host.FORWARD}"], nics.wired, {host.PATHS: paths})
    container = GuestContainer(sandbox, "agent", config, Manner("crun", agent=True))
    assert testpmd.is_forwarding(forward(container))


def test_without_hook_no_packets_forwarded(sandbox: Sandbox, nics: Nics) -> None:
    """(a) Left out, the same program in the same container has no port."""
    config = host.make_config(["/bin/sh", "-c", f"exec {host.FORWARD}"], nics.wired, bind=False)
    counters = forward(GuestContainer(sandbox, "none", config, Manner("runc")), "No probed ethernet devices")
    assert not testpmd.is_forwarding(counters), counters


def test_release_restores_native_driver(sandbox: Sandbox, inside: Inside, nics: Nics) -> None:
    """(f) While the container lives its NICs are vfio-pci's; when it has ended, their interfaces are there again."""
    before = inside.list_nics()
    command = f"for nic in {' '.join(before)}; do readlink /sys/bus/pci/devices/$nic/driver; done"
    config = host.make_config(["/bin/sh", "-c", command], nics.wired)
    done = GuestContainer(sandbox, "f", config, Manner("crun")).run()
    assert done.code == 0, done.output
    # The hook warns of the deadline that the tests give it.
    printed = [line for line in done.output.splitlines() if not line.startswith("vfio-guest-bind: warning: ")]
    assert [line.rpartition("/")[2] for line in printed] == ["vfio-pci"] * len(before)
    assert inside.list_nics() == before
    assert {device.driver for device in before.values()} == {"e1000e"}
    assert all(inside.find_interface(address) for address in before)
    assert inside.list_claims() == []


def test_two_containers_one_vfio_one_native_driver(sandbox: Sandbox, inside: Inside, nics: Nics) -> None:
    """(e) One has its NIC as VFIO and sends through it; the other receives that through its NIC's own driver.

    Kata's vfio_mode is one for both of them; here it is "guest-kernel", and only one has the hook's annotation.
    """
    ours, theirs = sandbox.paths
    (other,) = inside.find_addresses(theirs)
    interface = inside.find_interface(other)
    inside.ask(f"ip link set {interface} up")
    (mac,) = inside.ask(f"cat /sys/class/net/{interface}/address")
    received = f"/sys/class/net/{interface}/statistics/rx_packets"
    shared = [{"type": name} for name in bundles.NAMESPACES if name != "network"]
    config = host.make_config(["/bin/sleep", "1000000"], nics.wired, edit={"linux": {"namespaces": shared}})
    native = GuestContainer(sandbox, "native", config, Manner("runc", agent=True))
    inside.ask(f"{native.command('run', '--detach')} </dev/null >/dev/null 2>&1; cat {native.log}")

    command = f"exec {host.TESTPMD} --forward-mode=txonly --eth-peer=0,{mac}"
    config = host.make_config(["/bin/sh", "-c", command], nics.wired, {host.PATHS: f"path:{ours}"})
    vfio = GuestContainer(sandbox, "vfio", config, Manner("runc", agent=True))
    done = testpmd.run_testpmd(vfio, f'read_number("{received}") > 0')
    print(done.output)
    (counters,) = testpmd.read_counters(done.output).values()
    assert counters.sent > 0
    seen = inside.ask(f"{native.command('exec')} /bin/sh -c 'cat {received}; ls /dev'")
    assert int(seen[0]) > 0
    assert "vfio" not in seen
    assert inside.list_nics()[other].driver == "e1000e"
    inside.ask(f"{native.command('delete', '--force')}; ip link set {interface} down")


def test_guest_hook_waits_for_hotplugged_nic(sandbox: Sandbox, inside: Inside, nics: Nics) -> None:
    """(g) Kata plugs a container's devices in while it creates it; the hook waits for the one its annotation names."""
    path = sandbox.vm.find_path(sandbox.vm.free_slots[0])
    config = host.make_config(["/bin/sh", "-c", TELL], [nics.spare], {host.PATHS: f"path:{path}"})
    container = GuestContainer(sandbox, "g", config, Manner("runc"))
    before = inside.list_nics()
    sandbox.vm.start(WHEN_LISTENING + container.run_script())
    assert sandbox.vm.wait_for_event() == "listening"
    assert sandbox.vm.plug([nics.spare]) == path
    done = sandbox.vm.read_done()
    assert done.code == 0, done.output
    ((address, device),) = inside.list_nics().items() - before.items()
    assert inside.find_addresses(path) == [address]
    assert f"\n{device.group}\n" in done.output
    assert address in done.output


def test_guest_hook_multifunction_card_bound_whole(sandbox: Sandbox, inside: Inside, nics: Nics) -> None:
    """(d) A card with two functions is one group in the host and one in the guest, and the container gets it whole."""
    before = inside.list_nics()
    path = sandbox.vm.plug(list(nics.pair))
    inside.wait_for_interfaces(path, len(nics.pair))
    added = {address: device for address, device in inside.list_nics().items() if address not in before}
    assert sorted(added) == inside.find_addresses(path)
    (group,) = {device.group for device in added.values()}
    assert len(added) == 2
    config = host.make_config(
        ["/bin/sh", "-c", f"{TELL}; exec {host.FORWARD}"], nics.pair, {host.PATHS: f"path:{path}"}
    )
    container = GuestContainer(sandbox, "d", config, Manner("crun"))
    counters = forward(container, f"\n{group}\n", *added)
    assert testpmd.is_forwarding(counters), counters
