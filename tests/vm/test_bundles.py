# SPDX-License-Identifier: Apache-2.0
"""The fixtures' promises, with a shell script as the hook: containers run, and a hook's output is visible."""

from __future__ import annotations

import json
from pathlib import Path

from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"


def write_hook(directory: Path, body: str) -> dict[str, list[dict[str, object]]]:
    """Return `hooks` with a shell script under createRuntime."""
    script = directory / "hook.sh"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return {"createRuntime": [bundles.make_hook(str(script))]}


def test_bundle_container_runs(containers: Containers) -> None:
    """An ordinary container: output, exit code, words."""
    done = containers.run("/bin/sh", "-c", "echo out; echo err >&2; exit 3", hooks={})
    assert (done.code, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_bundle_failing_hook_stops_container(containers: Containers, tmp_path: Path) -> None:
    """Both runtimes give up, and the test sees why."""
    hooks = write_hook(tmp_path, "echo because I say so >&2; exit 1")
    done = containers.run("/bin/true", hooks=hooks)
    assert done.code != 0
    assert "because I say so" in done.stderr


def test_bundle_hook_gets_state(containers: Containers, tmp_path: Path) -> None:
    """The state is on the hook's standard input, and the init it names is there."""
    hooks = write_hook(tmp_path, f"cat > {tmp_path}/state")
    container = containers.make("/bin/sleep", "60", hooks=hooks)
    assert container.create().code == 0
    state = json.loads((tmp_path / "state").read_text())
    assert state["pid"] == container.read_pid()
    assert state["status"] == {"runc": "creating", "crun": "created"}[containers.runtime]
    assert container.start().code == 0
    assert container.execute("/bin/hostname").stdout == "container\n"
    assert container.read_state()["status"] == "running"
    assert container.delete().code == 0
    container.wait()


def test_probe_without_a_hook_gets_no_group(containers: Containers) -> None:
    """The nodes are there, with the host's numbers; the device cgroup denies them."""
    report = containers.probe("/dev/null", "/dev/mem", hooks={}, devices=bundles.vfio_devices("77")).read_json()
    assert report["nodes"] == ["77", "vfio"]
    assert report["groups"] == [{"group": "77", "open": "EPERM"}]
    assert report["paths"]["/dev/null"] == "ok"


def test_probe_with_an_allow_rule_gets_the_device(containers: Containers) -> None:
    """With the guest's own numbers allowed in config.json, VFIO works without any hook: the probe is right."""
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    group = guest.group_of(nic)
    major, minor = guest.numbers_of_group(group)
    rules = [
        {"allow": True, "type": "c", "major": x, "minor": y, "access": "rw"} for x, y in ((major, minor), (10, 196))
    ]
    listed = [bundles.vfio_devices()[0], bundles.vfio_device(group, major, minor)]
    report = containers.probe(hooks={}, devices=listed, device_rules=rules).read_json()
    assert report["groups"] == [
        {
            "group": group,
            "open": "ok",
            "get_status": "ok",
            "viable": True,
            "open_control": "ok",
            "set_container": "ok",
            "set_iommu": "ok",
            "devices": [{"address": nic, "get_device": "ok", "read_id": "ok", "id": devices.NIC_E1000E}],
        }
    ]


def test_bundle_user_namespace_and_readonly_root(containers: Containers) -> None:
    """The options that change what a container is."""
    script = "cat /proc/self/uid_map; touch /new 2>&1 || true"
    done = containers.run("/bin/sh", "-c", script, hooks={}, user_namespace=100000, readonly_root=True)
    assert done.code == 0, done.stderr
    assert done.stdout.split()[:3] == ["0", "100000", "65536"]
    assert "Read-only file system" in done.stdout


def test_bundle_cleanup(containers: Containers) -> None:
    """Bundles and mounts go with the test."""
    containers.run("/bin/true", hooks={})
    containers.destroy_all()
    assert not any(bundles.BUNDLES.iterdir())
    assert str(bundles.BUNDLES) not in Path("/proc/self/mountinfo").read_text()
