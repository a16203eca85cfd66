# SPDX-License-Identifier: Apache-2.0
"""Kata's genuine agent as process 1 of a guest whose image has busybox, the agent and the guest add-on.

In namespaces of its own: the agent mounts /run and all else as in a virtual machine. Its network and its devices are
this machine's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.kata.agent import Agent
from tests.vm import bundles

IMAGE = Path("/srv/image")
ROOTS = IMAGE / "roots"
HOOKS = "/usr/share/oci/hooks"
CDI = "oci-vfio-hooks.json"
# As Kata's runtimes have it since 3.14.
CMDLINE = "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all agent.unified_cgroup_hierarchy=1\n"
# $1: the image. proc is mounted for the sake of the command line; the agent mounts the rest.
BECOME_INIT = """
    mount --rbind "$1" "$1"
    mount -t proc proc "$1/proc"
    mount --bind "$1/cmdline" "$1/proc/cmdline"
    cd "$1"
    /usr/sbin/pivot_root . old
    exec /bin/busybox sh -c "/bin/busybox umount -l /old; exec /sbin/init"
"""


def make_image() -> None:
    """Make the image: /var/run is a directory, as docs/howto/kata.md says for an image whose init is the agent."""
    shutil.copytree(Path(os.environ["OCI_VFIO_ADDON"]) / "tree", IMAGE)
    for name in ("bin", "sbin", "old", "proc", "sys", "dev", "run", "roots", "var/run/cdi", "etc/oci-vfio-hooks"):
        (IMAGE / name).mkdir(parents=True)
    (IMAGE / "cmdline").write_text(CMDLINE)
    shutil.copy(IMAGE / "opt/oci-vfio-hooks/cdi" / CDI, IMAGE / "var/run/cdi")
    shutil.copy(bundles.SETTINGS / "guest.toml", IMAGE / "etc/oci-vfio-hooks")
    shutil.copy("/bin/busybox", IMAGE / "bin")
    agent = os.environ["OCI_VFIO_KATA_AGENT"]
    shutil.copy(agent, IMAGE / "sbin/init")
    # The agent's own, at the places where it looks for them. Kata's release is linked statically.
    listed = subprocess.run(["ldd", agent], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listed):
        target = Path(f"{IMAGE}{library}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)


class InitAgent(Agent):
    """The agent as process 1. Made once a machine: what is mounted for it is left."""

    roots = ROOTS

    def __init__(self) -> None:
        make_image()
        subprocess.run(["mount", "--bind", ROOTS, ROOTS], check=True)
        subprocess.run(["mount", "--make-shared", ROOTS], check=True)
        super().__init__(Path(HOOKS))

    def launch(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start the agent."""
        namespaces = ["--mount", "--propagation", "slave", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        command = ["unshare", *namespaces, "sh", "-ec", BECOME_INIT, "sh", str(IMAGE)]
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT
        )

    def find_root(self) -> Path:
        """Return the agent's root directory, as it is seen from here."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return Path(f"/proc/{children[0]}/root" if children else "/nowhere")

    def find_socket(self) -> Path:
        """Return where the agent listens."""
        return self.find_root() / "run/agent.sock"

    def place_root(self, name: str) -> str:
        """Make the root file system of a container, and return the path by which the agent finds it."""
        return f"/{bundles.mount_rootfs(self.roots / name).relative_to(IMAGE)}"

    def list_claims(self) -> list[str]:
        """Return the names of the containers that have a claim in this guest."""
        return sorted(path.name for path in (self.find_root() / "run/oci-vfio-hooks/claims").iterdir())

    def close(self) -> None:
        """End the agent, and with it all that is in its namespaces."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.log.close()
