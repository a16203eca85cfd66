# SPDX-License-Identifier: Apache-2.0
"""vfio-nri with containerd 1.7 as Debian 13 has it, asked by crictl: vetoed, started, untouched, unchecked."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

import pytest

from tests.engines.engine import IMAGE, PAUSE, Engine
from tests.engines.test_engines import POD, wait_for_log
from tests.vm.bundles import Done

MACHINE = "single"
KERNELS = ("6.12",)
# The runner makes the roots and crictl, and passes their paths.
ENGINES = True

CONFIG = "/etc/containerd/config.toml"
# The how-to's lines, and our pause image instead of a registry's.
NRI = """
[plugins."io.containerd.nri.v1.nri"]
  disable = false
"""
PLUGIN = "setsid vfio-nri </dev/null >/run/nri.log 2>&1 & echo $! >/run/nri.main"
WAIT = "for i in $(seq 60); do grep -q '{}' {} && exit 0; sleep 0.5; done; cat {}; exit 1"
CONNECTED = "vfio-nri.* connected"


@pytest.fixture(name="sandbox")
def start_pod(engine: Engine) -> Iterator[str]:
    """Return the id of a pod under the default runtime, of a containerd with NRI and the plugin."""
    section = '/^  .plugins..io.containerd.grpc.v1.cri..$/a sandbox_image = "PAUSE"'.replace("PAUSE", PAUSE)
    engine.do(f"grep -q sandbox_image {CONFIG} || sed -i {shlex.quote(section)} {CONFIG}")
    engine.write("/srv/nri.toml", NRI)
    engine.do(f"cat /srv/nri.toml >>{CONFIG}; systemctl restart containerd")
    for image in ("probe", "pause"):
        engine.do(f"ctr -n k8s.io images import /run/{image}.tar")
    engine.do(PLUGIN)
    engine.do(WAIT.format(CONNECTED, "/run/containerd.log", "/run/containerd.log /run/nri.log"))
    engine.write("/srv/pod.json", json.dumps(POD))
    yield engine.do("crictl runp /srv/pod.json").strip().splitlines()[-1]
    engine.type("crictl rmp --force --all; kill $(cat /run/nri.main)")


def create(engine: Engine, sandbox: str, name: str, *nodes: str) -> Done:
    """Create a container with these nodes, and return how that ended."""
    entries = [{"container_path": node, "host_path": node, "permissions": "rwm"} for node in nodes]
    described = {"metadata": {"name": name}, "image": {"image": IMAGE}, "devices": entries, "log_path": f"{name}.log"}
    engine.write("/srv/container.json", json.dumps(described))
    return engine.type(f"crictl create --no-pull {sandbox} /srv/container.json /srv/pod.json")


@pytest.mark.way("containerd", "pod, checked by vfio-nri")
def test_nri(engine: Engine, sandbox: str, group: str) -> None:
    node, missing = f"/dev/vfio/{group}", "/dev/vfio/4000"
    made = create(engine, sandbox, "good", "/dev/vfio/vfio", node)
    assert made.code == 0, made.stderr
    engine.do(f"crictl start {made.stdout.split()[-1]}")
    assert f"opened {node}" in wait_for_log(engine, "good")
    # Without VFIO: not checked. A node that belongs to no group: refused, with the line that the journal has, too.
    assert create(engine, sandbox, "plain").code == 0
    engine.do(f"mknod {missing} c 511 4000")
    try:
        refused = create(engine, sandbox, "bad", "/dev/vfio/vfio", missing)
        assert refused.code != 0
        assert "vfio-nri: error: [group-missing] group 4000" in refused.stderr, refused.stderr
        assert "[group-missing]" in engine.do("cat /run/nri.log")
        # Stopped, it costs containerd's 2 s; killed, nothing. The container is created unchecked.
        engine.do("kill -STOP $(cat /run/nri.main)")
        assert create(engine, sandbox, "slow", missing).code == 0
        engine.do("kill -KILL $(cat /run/nri.main)")
        assert create(engine, sandbox, "dead", missing).code == 0
        # Started anew, as systemd does, it is asked again.
        engine.do(PLUGIN)
        again = create_until_refused(engine, sandbox, missing)
        assert "vfio-nri: error: [group-missing]" in again.stderr
        engine.do("kill $(cat /run/nri.main); tail --pid=$(cat /run/nri.main) -f /dev/null")
        assert "Traceback" not in engine.do("cat /run/nri.log")
    finally:
        engine.do(f"rm {missing}")


def create_until_refused(engine: Engine, sandbox: str, node: str) -> Done:
    """Create containers until one is refused: containerd takes a moment to take a plugin."""
    for turn in range(20):
        done = create(engine, sandbox, f"turn-{turn}", node)
        if done.code != 0:
            break
    return done
