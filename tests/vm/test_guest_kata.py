# SPDX-License-Identifier: Apache-2.0
"""The way Kata's agent calls a guest hook, under a real runtime.

Kata's agent runs the regular files in <guest_hook_path>/prestart with the hook's kind as the only argument, an empty
environment, the bundle /run/kata-containers/<id> as working directory, `status` "created", before pivot_root, for the
pause container too, and ignores how they end. A script under the runtime's createRuntime does just that here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hooks import oci
from tests.support import guest_calls
from tests.support.guest_calls import DEVICES, ask
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Container, Containers

MACHINE = "standard"
HOOKS = Path("/usr/share/oci/hooks")
PACKAGE = Path("/usr/lib/python3/dist-packages/oci_hooks")
CONTAINER_TYPE = "io.katacontainers.pkg.oci.container_type"
AGENT = """#!/bin/sh
# What the agent does with one hook: the state through a pipe, nothing of the environment, no care for the result.
cd {bundle} || exit 1
sed 's/"status":"[a-z]*"/"status":"{status}"/' | tee {bundle}/{kind}.state |
    env -i {hook} {kind} >{bundle}/{kind}.log 2>&1
exit 0
"""
# Its poststop hook as a CDI specification has it, without an argument, and the state that the agent gives to it.
CDI_POSTSTOP = """#!/bin/sh
cd /
sed 's/"status":"[a-z]*"/"status":"running"/' {bundle}/prestart.state | env -i {hook} >{bundle}/poststop.log 2>&1
exit 0
"""


@pytest.fixture
def guest_image(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the hook as a guest image has it, and have bundles where the agent has them."""
    bundles.install_image_hooks(HOOKS)
    if not PACKAGE.exists():
        shutil.copytree(bundles.REPOSITORY / "oci_hooks", PACKAGE)
    monkeypatch.setattr(bundles, "BUNDLES", Path("/run/kata-containers"))
    yield
    shutil.rmtree(HOOKS)
    if "OCI_VFIO_HOOKS_DIR" not in os.environ:
        shutil.rmtree(PACKAGE)


def make_agent(container: Container, kind: str, status: str, text: str = AGENT) -> dict[str, Any]:
    """Return the entry of `hooks` that calls the guest hook of this kind as the agent does. text: of the script."""
    script = container.bundle / f"agent-{kind}"
    hook = HOOKS / kind / bundles.GUEST_HOOK
    script.write_text(text.format(bundle=container.bundle, status=status, hook=hook, kind=kind))
    script.chmod(0o755)
    return bundles.make_hook(str(script))


def make_container(containers: Containers, annotations: dict[str, str], poststop: str = AGENT) -> Container:
    """Return a container that runs the probe, with the agent's calls under createRuntime and poststop."""
    container = containers.make(*bundles.PROBE, annotations=annotations, hooks={})
    hooks = {
        "createRuntime": [make_agent(container, "prestart", "created")],
        "poststop": [make_agent(container, "poststop", "stopped", poststop)],
    }
    container.write_config({**container.config, "hooks": hooks}, {})
    return container


@pytest.mark.usefixtures("guest_image")
@pytest.mark.parametrize("poststop", [AGENT, CDI_POSTSTOP], ids=["image", "cdi"])
def test_kata_agent_runs_hook(containers: Containers, poststop: str) -> None:
    """The hook finds its package from its path in the image, and the container from its limited input."""
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    container = make_container(containers, {**ask(nic), CONTAINER_TYPE: "pod_container"}, poststop)
    assert container.bundle.parent == Path("/run/kata-containers")
    done = container.run()
    # The tests' own deadline is more than the agent allows.
    (warning,) = (container.bundle / "prestart.log").read_text().splitlines()
    assert "warning: [deadline-too-long] /etc/oci-vfio-hooks/guest.toml: deadline: 60 s is too long: " in warning
    assert done.code == 0, done.stderr
    (group,) = done.read_json()["groups"]
    assert [device["id"] for device in group["devices"]] == [devices.NIC_E1000E]
    assert (container.bundle / "poststop.log").read_text() == ""
    assert guest_calls.look_at_drivers() == before
    assert guest_calls.list_claims() == []


@pytest.mark.usefixtures("guest_image")
def test_kata_agent_ignores_failure_on_failure_kill(containers: Containers) -> None:
    """By default the hook can only report that, in the guest's kernel log too; with on_failure = "kill" nothing
    runs."""
    annotations = ask(guest.members_of(guest.group_of(guest.find_device(devices.NIC_E1000)))[0])
    container = make_container(containers, annotations)
    done = container.run()
    assert done.code == 0, done.stderr
    assert done.read_json()["nodes"] == []
    output = f"vfio-guest-bind: error: [bridge] {annotations[guest_calls.DEVICES]}"
    assert output in (container.bundle / "prestart.log").read_text()
    assert f"container {container.name}: error: [bridge]" in guest.read_kernel_log()

    container = make_container(containers, annotations)
    with guest_calls.settings("deadline = 60", 'on_failure = "kill"'):
        done = container.run()
    assert done.code != 0
    assert done.stdout == ""
    assert f"container {container.name}: error: [bridge]" in guest.read_kernel_log()


@pytest.mark.usefixtures("guest_image")
def test_kata_agent_mixed_pod(containers: Containers) -> None:
    """Each container of a pod has all annotations of the pod; only the one that is named gets devices.

    A hook that waited for a device here would do so for the settings' 60 s, and report that it has none.
    """
    nic = guest.find_device(devices.NIC_E1000E)
    for name in oci.CONTAINER_NAME_ANNOTATIONS:
        pod = {f"{DEVICES}.web": nic, CONTAINER_TYPE: "pod_container"}
        sandbox = make_container(containers, {**pod, CONTAINER_TYPE: "pod_sandbox", name: "web"})
        sidecar, web = (make_container(containers, {**pod, name: value}) for value in ("sidecar", "web"))
        for container, groups in ((sandbox, 0), (sidecar, 0), (web, 1)):
            done = container.run()
            lines = (container.bundle / "prestart.log").read_text().splitlines()
            # The settings' deadline is longer than the agent's, and only a container that gets devices hears of it.
            assert ["[deadline-too-long]" in line for line in lines] == [True] * groups
            assert done.code == 0, done.stderr
            assert len(done.read_json()["groups"]) == groups
    assert guest_calls.list_claims() == []


@pytest.mark.parametrize("shared", [False, True], ids=["own-pids", "shared-pids"])
def test_create_container_hook_refused(containers: Containers, shared: bool) -> None:
    """This kind of hook runs in the container's namespaces: runc's state has pid 1 then, and crun's none."""
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    container = containers.make("/bin/true", annotations=ask(nic), hooks=bundles.guest_hooks("createContainer"))
    if shared:
        kept = [entry for entry in container.config["linux"]["namespaces"] if entry["type"] != "pid"]
        container.write_config({**container.config, "linux": {**container.config["linux"], "namespaces": kept}}, {})
    done = container.run()
    print(done)
    assert done.code != 0
    assert "[no-process] process" in done.stderr
    assert "declare the hook under createRuntime" in done.stderr
    assert guest_calls.look_at_drivers() == before
    assert guest_calls.list_claims() == []


def test_kata_agent_pause_container_skipped(tmp_path: Path) -> None:
    """It has the pod's annotations, and no process here: touching anything would be an error."""
    nic = guest.find_device(devices.NIC_E1000E)
    for mark in ("pod_sandbox", "pod_container"):
        options = bundles.Options(annotations={**ask(nic), CONTAINER_TYPE: mark})
        config = bundles.make_config(["/pause"], str(tmp_path), options, "/none")
        state = {"ociVersion": "", "id": "pod", "status": "", "pid": 0, "bundle": str(tmp_path)}
        (tmp_path / "config.json").write_text(json.dumps(config))
        done = guest_calls.fork_hook({**state, "annotations": config["annotations"]}, "prestart")
        assert done.code == (0 if mark == "pod_sandbox" else 1), done
    assert "[no-process]" in done.stderr
    assert guest.driver_of(nic) == "e1000e"


def test_kata_1_config_location() -> None:
    """The bundle of Kata 1.x has no config.json; it is below /run/libcontainer."""
    nic = guest.find_device(devices.NIC_E1000E)
    location = Path("/run/libcontainer/one")
    location.mkdir(parents=True)
    try:
        config = bundles.make_config(["/bin/true"], "/nowhere", bundles.Options(annotations=ask(nic)), "/none")
        (location / "config.json").write_text(json.dumps(config))
        state = {"ociVersion": "1.0", "id": "one", "status": "", "pid": 1, "bundle": "/run/kata-containers/one"}
        done = guest_calls.fork_hook(state, "prestart", "--dry-run")
        assert done.code == 0, done.stderr
        assert f"probe {nic}: vfio-pci" in done.stdout
    finally:
        shutil.rmtree(location.parent)
