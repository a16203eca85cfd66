# SPDX-License-Identifier: Apache-2.0
"""A small VM runtime FOR TESTS: what Kata does around a bundle, as far as hooks can see it. Not part of the product.

On the host (the outer machine): it runs the hooks that config.json has under prestart, with the state that Kata's Go
runtime writes, and starts a virtual machine with the devices of the groups in linux.devices, with a virtual IOMMU if
configuration.toml says so. In the guest (the inner machine): it runs runc or crun on the bundle, with the hooks that
config.json has under createRuntime and poststop, or with those of the guest image as Kata's agent does.

What was read of Kata is in its source: src/runtime/pkg/katautils/hook.go and create.go, src/agent/src/sandbox.rs.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

from tests.chain.image import CONTAINER_ROOT, Image
from tests.chain.innervm import Done, InnerVm
from tests.vm import guest

# Bridges and host bridges go with a group, but are never passed through (virtcontainers/device/drivers/utils.go).
BRIDGES = ("0600", "0604")
SPARE_PORTS = 2
# Where Kata's agent has its bundles, and where guest_hook_path of configuration.toml points to.
AGENT_BUNDLES = "/run/kata-containers"
GUEST_HOOKS = "/usr/share/oci/hooks"
# What the agent does with a hook: the state on stdin, an empty environment, the bundle as working directory, the
# hook's kind as its argument, and no care for how it ends.
AGENT_HOOK = """#!/bin/sh
cd {bundle} || exit 1
sed 's/"status":"[a-z]*"/"status":"{status}"/' | env -i {hooks}/{kind}/vfio-guest-bind {kind} >>{bundle}/hook.log 2>&1
exit 0
"""


class HookError(Exception):
    """A host hook has failed; the text is the runtime's message, with the hook's line in it."""


@dataclass(frozen=True)
class Manner:
    """One way of running a container in the guest.

    runtime: runc or crun. agent: as Kata's agent: no VFIO devices in config.json (vfio_mode "guest-kernel"), none of
    its hooks, but those of the guest image.
    """

    runtime: str = "runc"
    agent: bool = False


@dataclass
class Sandbox:
    """A virtual machine for containers. groups: the host's, of linux.devices; paths: where their devices sit in it."""

    vm: InnerVm
    groups: list[str]
    paths: list[str]


@dataclass(frozen=True)
class VmRuntime:
    """The runtime. configuration: Kata's file. hooks_first: prestart hooks run before QEMU is started, with the
    runtime's own pid, as in Kata 1.x to 3.0; else when it is up, with QEMU's pid, as since 3.1. tell: for what it does.
    """

    image: Image
    configuration: Path
    scratch: Path
    hooks_first: bool = False
    tell: Callable[[str], None] = lambda _: None

    @contextmanager
    def run_sandbox(self, bundle: Path) -> Iterator[Sandbox]:
        """Start the virtual machine for a bundle; it ends with the context. Raises HookError."""
        spec = json.loads((bundle / "config.json").read_text())
        groups = list_groups(spec)
        if self.hooks_first:
            run_host_hooks(spec, bundle, os.getpid(), annotations=False)
        self.tell(f"starting QEMU with the devices of groups {', '.join(groups)}")
        vm = InnerVm(self.image, self.scratch, self.wants_iommu(), [list_passed(g) for g in groups], SPARE_PORTS)
        try:
            vm.wait_for_qemu()
            if not self.hooks_first:
                run_host_hooks(spec, bundle, vm.process.pid)
            vm.wait_until_up()
            yield Sandbox(vm, groups, [vm.find_path(slot) for slot in vm.slots])
        finally:
            vm.stop()

    def wants_iommu(self) -> bool:
        """Return the virtual IOMMU's setting in configuration.toml; a missing key means no."""
        configuration = tomllib.loads(self.configuration.read_text())
        return bool(configuration["hypervisor"]["qemu"].get("enable_iommu", False))


def list_groups(spec: dict[str, Any]) -> list[str]:
    """Return the host's groups that linux.devices asks for."""
    paths = [Path(entry["path"]) for entry in spec["linux"].get("devices", [])]
    return [path.name for path in paths if path.parent == Path("/dev/vfio") and path.name != "vfio"]


def list_passed(group: str) -> list[str]:
    """Return the devices of a group that are passed through."""
    return [address for address in guest.members_of(group) if guest.class_of(address) not in BRIDGES]


def run_host_hooks(spec: dict[str, Any], bundle: Path, pid: int, annotations: bool = True) -> None:
    """Run the hooks under prestart. annotations: whether the state has them, as since Kata 2.4. Raises HookError."""
    state = {"ociVersion": "", "id": bundle.name, "status": "", "pid": pid, "bundle": str(bundle)}
    if annotations:
        state["annotations"] = spec.get("annotations", {})
    for hook in spec.get("hooks", {}).get("prestart", []):
        done = subprocess.run(
            hook.get("args", [hook["path"]]),
            executable=hook["path"],
            input=json.dumps(state),
            capture_output=True,
            text=True,
            timeout=hook.get("timeout"),
            check=False,
        )
        if done.returncode != 0:
            raise HookError(f"exit status {done.returncode}: stdout: {done.stdout}, stderr: {done.stderr}")


class GuestContainer:
    """A container in the inner machine, made from a config.json of the host."""

    def __init__(self, sandbox: Sandbox, name: str, config: dict[str, Any], manner: Manner) -> None:
        self.vm = sandbox.vm
        self.name = name
        self.runtime = manner.runtime
        self.bundle = f"{AGENT_BUNDLES}/{name}"
        self.log = f"{self.bundle}/hook.log"
        self.config = make_guest_config(config, manner, self.bundle)
        done = self.vm.execute(self.make_bundle_script(manner))
        assert done.code == 0, done.output

    def make_bundle_script(self, manner: Manner) -> str:
        """Return the script that writes the bundle in the guest."""
        files = {"config.json": json.dumps(self.config)}
        if manner.agent:
            for kind, status in (("prestart", "created"), ("poststop", "stopped")):
                files[f"agent-{kind}"] = AGENT_HOOK.format(
                    bundle=self.bundle, status=status, hooks=GUEST_HOOKS, kind=kind
                )
        lines = [f"mkdir -p {self.bundle} && cd {self.bundle} && umask 022 && : >hook.log || exit 1"]
        for file, text in files.items():
            lines.append(f"printf %s {shlex.quote(text)} >{file} && chmod 755 {file} || exit 1")
        return "\n".join(lines)

    def command(self, action: str, *more: str) -> str:
        """Return the shell's words for one action of the runtime."""
        bundle = ("--bundle", self.bundle) if action in ("run", "create") else ()
        return shlex.join([self.runtime, action, *bundle, *more, self.name])

    def run(self) -> Done:
        """Run the container to its end; the hooks' output is at the end of the result."""
        return self.vm.execute(self.run_script())

    def run_script(self, reader: str = "cat") -> str:
        """Return the script that runs the container to its end. reader: what its output goes through."""
        return f"set -o pipefail\n{self.command('run')} 2>&1 | {reader}\ncode=$?\ncat {self.log}\nexit $code"


def make_guest_config(config: dict[str, Any], manner: Manner, bundle: str) -> dict[str, Any]:
    """Return the config.json that the guest gets."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    made["linux"]["cgroupsPath"] = f"/{Path(bundle).name}"
    made["root"] = {"path": f"/{CONTAINER_ROOT}", "readonly": False}
    hooks = made.pop("hooks", {})
    made["hooks"] = {kind: hooks[kind] for kind in ("createRuntime", "poststop") if kind in hooks}
    if manner.agent:
        made["hooks"] = {
            kind: [{"path": f"{bundle}/agent-{script}"}]
            for kind, script in (("createRuntime", "prestart"), ("poststop", "poststop"))
        }
        devices = made["linux"].get("devices", [])
        made["linux"]["devices"] = [entry for entry in devices if not entry["path"].startswith("/dev/vfio/")]
    if manner.runtime == "crun":
        made.setdefault("annotations", {})["run.oci.hooks.stderr"] = f"{bundle}/hook.log"
    return made
