# SPDX-License-Identifier: Apache-2.0
"""The guest hook under Kata's genuine agent, which finds it in its guest_hook_path."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from tests.kata.agent import Agent, AgentError
from tests.support import guest_calls
from tests.support.guest_calls import ask
from tests.vm import bundles, devices, guest

MACHINE = "standard"
KERNELS = ("6.1",)
# The runner says where the agent is.
KATA = True


def read_groups(done: bundles.Done) -> list[dict[str, Any]]:
    """Return what the probe reported of the groups it found."""
    groups: list[dict[str, Any]] = done.read_json()["groups"]
    return groups


def read_kernel_log() -> str:
    """Return the log of the guest's kernel."""
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout


def test_agent_binds_opens_restores(agent: Agent) -> None:
    """The whole way: the annotation names the NIC, the container reads it through VFIO, poststop gives it back."""
    nic = guest.find_devices(devices.NIC_E1000E)[0]
    done = agent.run("one", *bundles.PROBE, annotations=ask(nic))
    (group,) = read_groups(done)
    assert (group["group"], group["viable"]) == (guest.group_of(nic), True)
    (device,) = group["devices"]
    assert (device["address"], device["read_id"]) == (nic, "ok")
    assert guest.driver_of(nic) == "vfio-pci"
    assert guest_calls.list_claims() == ["one"]
    agent.remove("one")
    assert guest.driver_of(nic) == "e1000e"
    assert guest_calls.list_claims() == []
    assert agent.list_errors() == []


def test_agent_claimed_group_refused(agent: Agent) -> None:
    """The agent ignores how a hook ends: the second container runs, without the device, and the log has the line."""
    nic = guest.find_devices(devices.NIC_E1000E)[0]
    agent.create("holder", "/bin/sleep", "600", annotations=ask(nic))
    assert guest_calls.list_claims() == ["holder"]
    done = agent.run("second", *bundles.PROBE, annotations=ask(nic))
    assert read_groups(done) == []
    assert "[claimed]" in "".join(agent.list_errors())
    agent.remove("second")
    agent.remove("holder")
    assert guest.driver_of(nic) == "e1000e"


def test_agent_on_failure_kill_stops_container(agent: Agent) -> None:
    bundles.write_settings('on_failure = "kill"\n')
    with pytest.raises(AgentError, match="Broken pipe"):
        agent.create("refused", *bundles.PROBE, annotations=ask("0000:00:00.0"))
    # The agent gives up on the container before it has read the hook's words: they are in the guest's kernel log.
    assert re.search(r"vfio-guest-bind\S* .*\[in-use\] 0000:00:00.0", read_kernel_log())
    assert guest_calls.list_claims() == []


def test_agent_takes_counted_group(agent: Agent) -> None:
    """Mode vfio of Kata's Go runtime: linux.devices has the host's numbers, and one group is free."""
    first, second = guest.find_devices(devices.NIC_E1000E)
    guest.bind(first, "vfio-pci")
    bundles.write_settings(f'[auto]\nids = ["{devices.NIC_E1000E}"]\n')
    agent.create("holder", "/bin/sleep", "600", annotations=ask(first))
    done = agent.run("counted", *bundles.PROBE, devices=bundles.vfio_devices("77"))
    assert [group["group"] for group in read_groups(done)] == [guest.group_of(second)]
    agent.remove("counted")
    assert guest.driver_of(second) == "e1000e"


def test_agent_drops_hooks_where_spec_has_hooks(agent: Agent) -> None:
    """What runtime-rs sends: a `hooks` object without hooks. The hooks of the image are then not run."""
    nic = guest.find_devices(devices.NIC_E1000E)[0]
    done = agent.run("plain", *bundles.PROBE, empty_hooks=True, annotations=ask(nic))
    assert read_groups(done) == []
    assert guest.driver_of(nic) == "e1000e"


@pytest.mark.parametrize("empty_hooks", [True, False], ids=["runtime-rs", "go"])
def test_agent_cdi_brings_hook(agent: Agent, cdi: str, empty_hooks: bool) -> None:
    """A CDI specification in the guest declares the hook, and a container annotation asks for it."""
    nic = guest.find_devices(devices.NIC_E1000E)[0]
    annotations = {**ask(nic), "cdi.k8s.io/vfio": cdi}
    done = agent.run("named", *bundles.PROBE, empty_hooks=empty_hooks, annotations=annotations)
    assert [group["group"] for group in read_groups(done)] == [guest.group_of(nic)], agent.list_errors()
    agent.remove("named")
    assert guest.driver_of(nic) == "e1000e"
    assert guest_calls.list_claims() == []


def test_agent_kills_slow_hook(agent: Agent) -> None:
    """The agent kills a hook after 10 s and starts the container; with "kill" the hook's guard ends that."""
    # The deadline of the tests' settings is longer than the agent's, and the device never arrives.
    bundles.write_settings('on_failure = "kill"\n')
    # What the agent finds broken depends on whether it is writing to the init then, or reading.
    with pytest.raises(AgentError, match=r"Broken pipe|failed to receive async message from peer"):
        agent.create("slow", *bundles.PROBE, annotations=ask("0000:7f:00.0"))
    agent.wait_until(lambda: "[hook-killed]" in read_kernel_log())


def test_agent_names_container_of_pod(agent: Agent) -> None:
    """Kubernetes copies the pod's annotations to each container; the kubelet names the container."""
    nic = guest.find_devices(devices.NIC_E1000E)[0]
    for name, groups in (("other", []), ("packets", [guest.group_of(nic)])):
        annotations = {"io.kubernetes.cri.container-name": name, f"{guest_calls.DEVICES}.packets": nic}
        done = agent.run(name, *bundles.PROBE, annotations=annotations)
        assert [group["group"] for group in read_groups(done)] == groups
        agent.remove(name)
    assert guest.driver_of(nic) == "e1000e"
    assert agent.list_errors() == []


def test_agent_releases_read_only_root(agent: Agent) -> None:
    """At poststop the agent has the root file system still mounted, read-only."""
    nic = guest.find_devices(devices.NIC_E1000E)[0]
    done = agent.run("fixed", *bundles.PROBE, annotations=ask(nic), readonly_root=True)
    assert [group["group"] for group in read_groups(done)] == [guest.group_of(nic)], agent.list_errors()
    agent.remove("fixed")
    assert guest.driver_of(nic) == "e1000e"
    assert agent.list_errors() == []
    assert guest_calls.list_claims() == []
