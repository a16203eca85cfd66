# SPDX-License-Identifier: Apache-2.0
"""Kata's genuine agent as an ordinary process in the machine, and a client of its service (ttrpc on a Unix socket)."""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

from oci_hooks.nri import wire
from oci_hooks.nri.messages import REQUEST, RESPONSE
from oci_hooks.nri.transport import MESSAGE
from oci_hooks.nri.transport import REQUEST as REQUEST_KIND
from tests.kata import messages
from tests.vm import bundles

SERVICE = "grpc.AgentService"
SOCKET = Path("/run/agent.sock")
LOG = Path("/run/agent.log")
HOOKS = Path("/run/hooks")
# Where the agent keeps a container's bundle.
BUNDLES = Path("/run/kata-containers")
ROOTS = Path("/run/roots")
# What the agent mounts for a sandbox, and leaves mounted when it is killed.
SANDBOX_NAMESPACES = Path("/run/sandbox-ns")
# Seconds: for any one thing; between two looks.
LIMIT = 120.0
INTERVAL = 0.1


class AgentError(Exception):
    """The agent refused a request: its words."""


class Agent:
    """A running agent with one sandbox, in a guest whose image has our hook.

    hooks: the image's guest_hook_path, if it is not to be made of the repository's hook.
    """

    roots = ROOTS

    def __init__(self, hooks: Path | None = None) -> None:
        if hooks is None:
            hooks = HOOKS
            bundles.install_image_hooks(HOOKS)
            # Where the copies look for their package.
            (HOOKS / "oci_hooks").symlink_to(bundles.REPOSITORY / "oci_hooks")
        environment = {"KATA_AGENT_SERVER_ADDR": f"unix://{SOCKET}", "KATA_AGENT_LOG_LEVEL": "info", "PATH": os.defpath}
        self.log = LOG.open("wb")
        self.process = self.launch(environment)
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.settimeout(LIMIT)
        self.stream = -1
        self.names: list[str] = []
        self.wait_until(self.connect)
        self.call("CreateSandbox", messages.CREATE_SANDBOX, hostname="h", sandbox_id="s", guest_hook_path=str(hooks))

    def launch(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start the agent."""
        command = [os.environ["OCI_VFIO_KATA_AGENT"]]
        return subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)

    def find_socket(self) -> Path:
        """Return where the agent listens."""
        return SOCKET

    def place_root(self, name: str) -> str:
        """Make the root file system of a container, and return the path by which the agent finds it."""
        return str(bundles.mount_rootfs(self.roots / name))

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so; an agent that ends before is a failure."""
        pidfd = os.pidfd_open(self.process.pid)
        with os.fdopen(pidfd) as file:
            for _ in range(int(LIMIT / INTERVAL)):
                if is_so():
                    return
                ended, _, _ = select.select([file], [], [], INTERVAL)
                assert not ended, f"the agent ended: {self.read_log()[-1000:]}"
        raise AssertionError(f"not so after {LIMIT} s; the agent's log ends with {self.read_log()[-1000:]}")

    def connect(self) -> bool:
        """Connect, if the agent listens by now."""
        return self.connection.connect_ex(str(self.find_socket())) == 0

    def call(self, method: str, schema: wire.Schema, answer: wire.Schema | None = None, **fields: Any) -> Any:
        """Make one call and return its answer. Raises AgentError."""
        self.stream += 2
        request = {"service": SERVICE, "method": method, "payload": wire.encode(fields, schema)}
        data = wire.encode({**request, "timeout_nano": int(LIMIT * 1e9)}, REQUEST)
        self.connection.sendall(MESSAGE.pack(len(data), self.stream, REQUEST_KIND, 0) + data)
        length, stream, _, _ = MESSAGE.unpack(self.receive(MESSAGE.size))
        assert stream == self.stream
        response = wire.decode(self.receive(length), RESPONSE)
        if response["status"] and response["status"]["code"]:
            raise AgentError(response["status"]["message"])
        return wire.decode(response["payload"], answer or {})

    def receive(self, size: int) -> bytes:
        """Return so many bytes of the connection."""
        data = b""
        while len(data) < size:
            piece = self.connection.recv(size - len(data))
            assert piece, f"the agent closed the connection; its log ends with {self.read_log()[-1000:]}"
            data += piece
        return data

    def create(self, name: str, *command: str, empty_hooks: bool = False, **options: Any) -> None:
        """Create a container. empty_hooks: send a `hooks` object without hooks, as runtime-rs does. Raises AgentError.

        options: fields of bundles.Options.
        """
        root = self.place_root(name)
        self.names.append(name)
        config = bundles.make_config(command, root, bundles.Options(**{"hooks": {}, **options}), f"/kata/{name}")
        # The network is the sandbox's, and so is the virtual machine.
        namespaces = [{"type": kind} for kind in bundles.NAMESPACES if kind != "network"]
        config["linux"]["namespaces"] = namespaces
        spec = messages.keep_known(config, messages.SPEC)
        if not empty_hooks:
            del spec["hooks"]
        self.call("CreateContainer", messages.CREATE, container_id=name, exec_id=name, OCI=spec)

    def start(self, name: str) -> None:
        """Start a created container."""
        self.call("StartContainer", messages.NAMED, container_id=name)

    def run(self, name: str, *command: str, **options: Any) -> bundles.Done:
        """Create and start a container, and return what it printed and how it ended."""
        self.create(name, *command, **options)
        self.start(name)
        # The agent forgets the streams of a process that was waited for.
        stdout, stderr = self.read(name, "ReadStdout"), self.read(name, "ReadStderr")
        named = {"container_id": name, "exec_id": name}
        ended = self.call("WaitProcess", messages.PROCESS_NAMED, messages.WAIT_ANSWER, **named)
        return bundles.Done(ended["status"], stdout, stderr)

    def read(self, name: str, method: str) -> str:
        """Return what a container writes to a stream until it ends."""
        text = b""
        named = {"container_id": name, "exec_id": name}
        while True:
            try:
                piece = self.call(method, messages.READ, messages.READ_ANSWER, len=65536, **named)["data"]
            except AgentError:
                # The agent has no other sign for the end.
                return text.decode()
            if not piece:
                return text.decode()
            text += piece

    def remove(self, name: str) -> None:
        """Remove a container: the poststop hooks run."""
        self.call("RemoveContainer", messages.REMOVE, container_id=name, timeout=30)
        self.names.remove(name)
        subprocess.run(["umount", "--lazy", str(self.roots / name / "rootfs")], check=True)

    def read_log(self) -> str:
        """Return what the agent has logged."""
        return LOG.read_text(errors="replace")

    def list_errors(self) -> list[str]:
        """Return the errors of the guest hook that the agent has logged, with the escapes of its JSON.

        The tests' deadline is longer than the agent's, which is a warning.
        """
        return re.findall(r"vfio-guest-bind: error: \[[^\n]*?(?=\\n|\n|$)", self.read_log())

    def close(self) -> None:
        """Remove the containers, end the agent and take away what it leaves behind."""
        for name in list(self.names):
            # One that was refused is none.
            with suppress(AgentError):
                self.remove(name)
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.log.close()
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for place in reversed([each for each in mounted if each.startswith((f"{SANDBOX_NAMESPACES}/", f"{BUNDLES}/"))]):
            subprocess.run(["umount", "--lazy", place], check=True)
        for name in self.names:
            subprocess.run(["umount", "--lazy", str(ROOTS / name / "rootfs")], check=True)
        for path in (SANDBOX_NAMESPACES, BUNDLES, ROOTS, HOOKS):
            shutil.rmtree(path, ignore_errors=True)
        SOCKET.unlink(missing_ok=True)
