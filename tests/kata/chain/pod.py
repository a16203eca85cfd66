# SPDX-License-Identifier: Apache-2.0
"""A pod under Kata's runtime class, made with crictl: its sandbox, its containers, and what they print."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from tests.engines import engine as engines
from tests.engines.engine import IMAGE, PAUSE
from tests.kata.chain.stack import LIMIT, Stack

CLASS = "kata"
CONFIG = "/etc/containerd/config.toml"
LOGS = "/run/logs"
CRICTL = f"""\
#!/bin/sh
exec /usr/bin/crictl --runtime-endpoint unix:///run/containerd/containerd.sock --timeout {LIMIT:.0f}s "$@"
"""
DESCRIBED = {
    "metadata": {"name": "pod", "namespace": "default", "uid": "pod", "attempt": 1},
    # 2: without a network of its own, which would need CNI.
    "linux": {"security_context": {"namespace_options": {"network": 2}}},
    "log_directory": LOGS,
}


def add_class(kata: Stack) -> None:
    """Declare Kata's class as the page on containerd has it, with our pause image, and load the images."""
    engine = kata.engine
    if CLASS in engine.do(f"cat {CONFIG}"):
        return
    engine.write("/usr/local/bin/crictl", CRICTL, "755")
    added = f"/^  .plugins..io.containerd.grpc.v1.cri..$/a sandbox_image = {json.dumps(PAUSE)}"
    engine.do(f"sed -i {shlex.quote(added)} {CONFIG}")
    for line in engines.read_howto("containerd", "Kata's class"):
        engine.do(line)
    engine.do("systemctl restart containerd")
    for image in ("probe", "pause"):
        engine.do(f"ctr -n k8s.io images import /run/{image}.tar")


class Pod:
    """A pod that runs."""

    def __init__(self, kata: Stack, annotations: dict[str, str]) -> None:
        add_class(kata)
        self.kata = kata
        kata.engine.do(f"rm -rf {LOGS}")
        self.described = {**DESCRIBED, "annotations": annotations}
        kata.engine.write("/srv/pod.json", json.dumps(self.described))
        self.sandbox = self.do(f"crictl runp --runtime {CLASS} /srv/pod.json")

    def do(self, line: str) -> str:
        """Run a line that must succeed, and return the last line that it printed."""
        done = self.kata.call(line)
        assert done.code == 0, done.stderr
        return ["", *done.stdout.strip().splitlines()][-1]

    def start(self, name: str, command: Sequence[str] = (), groups: Sequence[str] = ()) -> str:
        """Create and start a container; return its id. command: if not the image's."""
        nodes = ["/dev/vfio/vfio", *(f"/dev/vfio/{group}" for group in groups)] if groups else []
        described: dict[str, Any] = {
            "metadata": {"name": name},
            "image": {"image": IMAGE},
            "log_path": f"{name}.log",
            "devices": [{"container_path": node, "host_path": node, "permissions": "rwm"} for node in nodes],
        }
        if command:
            described["command"] = list(command)
        self.kata.engine.write("/srv/container.json", json.dumps(described))
        made = self.do(f"crictl create --no-pull {self.sandbox} /srv/container.json /srv/pod.json")
        self.do(f"crictl start {made}")
        return made

    def read_log(self, name: str, word: str) -> str:
        """Return what a container has printed, when this word is in it."""
        file = f"{LOGS}/{name}.log"
        return self.kata.call(
            f"for i in $(seq 60); do grep -q {word} {file} && break; sleep 1; done; cat {file}"
        ).stdout

    def remove(self) -> None:
        """Remove the pod."""
        self.do(f"crictl rmp --force {self.sandbox}")
