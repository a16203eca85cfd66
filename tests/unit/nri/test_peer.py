# SPDX-License-Identifier: Apache-2.0
"""vfio-nri against the runtime's side of NRI as containerd 1.7 has it: the genuine Go package, no codec of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.oci import DEVICES_ANNOTATION
from tests.nri.peer import Peer, ensure_peer, find_go
from tests.support.fake_host import VFIO_MAJOR, HostTree

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]
GROUP = {"path": "/dev/vfio/12", "type": "c", "major": VFIO_MAJOR}
NULL = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}
KATA = {"id": "p1", "runtime_handler": "kata-qemu", "annotations": {"a": "b"}, "linux": {"cgroup_parent": "/x"}}
BAD = (
    "rpc error: code = FailedPrecondition desc = vfio-nri: error: [group-not-viable] group 12: 0000:03:00.1 is bound to"
)
VIOMMU = '[hypervisor.qemu]\npath = "/usr/bin/qemu-system-x86_64"\nmachine_type = "q35"\nenable_iommu = true\n'
# The executable, on a made tree instead of this machine.
PLUGIN = """\
import sys
from oci_hooks.nri import plugin
from oci_hooks.system import Root
plugin.Root = lambda: Root(sys.argv[1])
sys.exit(plugin.main(sys.argv[2:]))
"""


@pytest.fixture(name="program", scope="module")
def make_program() -> Path:
    """Return the peer's program."""
    go = find_go()
    if not go:
        pytest.skip("no Go: the genuine NRI runtime's side can't be built")
    return ensure_peer(go)


@pytest.fixture(name="peer")
def make_peer(program: Path, tmp_path: Path) -> Iterator[Peer]:
    """Return a runtime that listens."""
    peer = Peer(program, tmp_path / "nri.sock")
    yield peer
    print(peer.close())


@pytest.fixture(name="tree")
def make_tree(tmp_path: Path) -> HostTree:
    """Return a host with one good group, and Kata with a virtual IOMMU."""
    tree = HostTree(tmp_path / "host")
    tree.pci("0000:03:00.0", "vfio-pci", "12")
    tree.vfio("12", 0)
    tree.write("/etc/kata-containers/configuration.toml", VIOMMU)
    return tree


@pytest.fixture(name="running")
def start_plugin(peer: Peer, tree: HostTree) -> Iterator[subprocess.Popen[str]]:
    """Return a plugin that the runtime has taken."""
    command = [sys.executable, "-c", PLUGIN, str(tree.top), "--socket", str(peer.path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert peer.wait_for("synchronized")["synchronized"] is True
    # From then on the runtime takes a moment to put the plugin on its list: until it asks it, it asks nobody.
    missing = {**GROUP, "path": "/dev/vfio/4000", "minor": 4000}
    limit = time.monotonic() + 20
    while not peer.create({"id": "p0"}, make_container(missing))["error"]:
        assert time.monotonic() < limit
    yield process
    process.kill()
    process.wait()


def make_container(*devices: Any, **parts: Any) -> dict[str, Any]:
    """Return a container as containerd describes it, with members that the plugin does not know."""
    linux = {"devices": list(devices), "resources": {"memory": {"limit": {"value": 1 << 30}}}, "cgroups_path": "/c"}
    return {"id": "c1", "pod_sandbox_id": "p1", "name": "n", "state": 1, "args": ["x"], "linux": linux, **parts}


def find_annotations(told: dict[str, Any]) -> dict[str, str]:
    """Return the annotations that the runtime would add."""
    assert told["error"] == ""
    annotations: dict[str, str] = told["adjust"].get("annotations") or {}
    return annotations


def test_it_vetoes_and_lets_pass(peer: Peer, tree: HostTree, running: subprocess.Popen[str]) -> None:
    good = make_container(GROUP, annotations={"k": "v" * 9000}, env=["A=b"], rlimits=[{"type": "RLIMIT_CORE"}])
    assert find_annotations(peer.create({"id": "p1"}, good)) == {}
    tree.pci("0000:03:00.1", "ixgbe", "12")
    told = peer.create({"id": "p1"}, good)
    assert told["error"].startswith(f"{BAD} ixgbe")
    assert find_annotations(peer.create({"id": "p1"}, make_container(NULL))) == {}
    # A message of many frames, and an empty one.
    assert peer.create({"id": "p1"}, make_container(GROUP, labels={"l": "x" * 300_000}))["error"].startswith(BAD)
    assert find_annotations(peer.create({}, {})) == {}
    # containerd gives up after 2 s.
    assert told["seconds"] < 1.5
    assert running.poll() is None


def test_it_adds_the_annotation(peer: Peer, tree: HostTree, running: subprocess.Popen[str]) -> None:
    # Read for each container: the plugin need not be started anew.
    assert find_annotations(peer.create(KATA, make_container(GROUP))) == {}
    tree.write("/etc/oci-vfio-hooks/host.toml", "[nri]\nannotate = true\n")
    assert find_annotations(peer.create(KATA, make_container(GROUP))) == {DEVICES_ANNOTATION: "id:8086:10d3"}
    assert running.poll() is None


def test_without_it_containers_are_created(peer: Peer, tree: HostTree, running: subprocess.Popen[str]) -> None:
    tree.pci("0000:03:00.1", "ixgbe", "12")
    assert peer.create({"id": "p1"}, make_container(GROUP))["error"].startswith(BAD)
    running.kill()
    running.wait()
    assert peer.create({"id": "p1"}, make_container(GROUP))["error"] == ""


def test_a_plugin_that_hangs_is_dropped_after_the_runtimes_time(
    peer: Peer, tree: HostTree, running: subprocess.Popen[str]
) -> None:
    tree.pci("0000:03:00.1", "ixgbe", "12")
    os.kill(running.pid, signal.SIGSTOP)
    told = peer.create({"id": "p1"}, make_container(GROUP))
    assert told["error"] == ""
    assert 1.9 < told["seconds"] < 20
    # Once it runs again its socket is closed, and it ends for systemd to start it anew.
    os.kill(running.pid, signal.SIGCONT)
    assert running.wait(timeout=60) == 0


def test_it_ends_with_the_runtime(peer: Peer, running: subprocess.Popen[str]) -> None:
    peer.close()
    assert running.wait(timeout=60) == 0
    assert running.stderr is not None
    # Nothing but the refusal that the fixture waited for.
    (line,) = running.stderr.read().splitlines()
    assert "[group-missing] group 4000" in line
