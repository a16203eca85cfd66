# SPDX-License-Identifier: Apache-2.0
"""SELinux with Debian's policy: what label the hook's nodes have in a container whose config.json has labels."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers
from tests.vm.guests import units

MACHINE = "selinux"
KERNELS = ("6.1",)
# Categories as an engine gives them, to keep containers apart from each other. Debian's policy has no type of theirs.
PROCESS = "unconfined_u:unconfined_r:unconfined_t:s0:c1,c2"
FILES = "system_u:object_r:tmp_t:s0:c1,c2"
LABELS = {"process": {"selinuxLabel": PROCESS}, "linux": {"mountLabel": FILES}}
KINDS: dict[str, dict[str, Any]] = {"root": {}, "user": {"user": 1000}, "user-namespace": {"user_namespace": 100000}}


def read_label(path: Path) -> str:
    """Return the SELinux label of a file, of the link itself if it is one."""
    return os.getxattr(path, "security.selinux", follow_symlinks=False).rstrip(b"\0").decode()


@pytest.fixture(autouse=True)
def label_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the containers' root labelled as an engine's storage is: the one they share has no labels."""
    plain = bundles.mount_rootfs

    def mount_rootfs(bundle: Path) -> Path:
        root = plain(bundle)
        subprocess.run(["umount", str(root)], check=True)
        layers = f"lowerdir={os.environ['OCI_VFIO_ROOTFS']},upperdir={bundle / 'upper'},workdir={bundle / 'work'}"
        options = f'{layers},context="{FILES}"'
        subprocess.run(["mount", "-t", "overlay", "-o", options, "rootfs", str(root)], check=True)
        return root

    monkeypatch.setattr(bundles, "mount_rootfs", mount_rootfs)


def test_selinux_is_on() -> None:
    """systemd has loaded Debian's policy, and labels mean something."""
    assert units.run("selinuxenabled").code == 0
    assert Path("/sys/fs/selinux/enforce").read_text() == "0"
    assert read_label(Path("/dev/null")).split(":")[2] == "null_device_t"


@pytest.mark.parametrize("kind", KINDS)
def test_selinux_labels_of_nodes(containers: Containers, kind: str) -> None:
    """Each node has the label of those that the runtime has made; so has devices.json."""
    nic = guest.find_device(devices.NIC_E1000E)
    container, state = guest_calls.make_created(containers, annotations=ask(nic), edit=LABELS, **KINDS[kind])
    assert guest_calls.call_hook(state).code == 0
    dev = Path(f"/proc/{container.read_pid()}/root/dev")
    made = [dev / "vfio", *sorted((dev / "vfio").iterdir())]
    found = {path.name: read_label(path) for path in made}
    print(kind, read_label(dev), read_label(dev / "null"), found)
    assert found == dict.fromkeys([path.name for path in made], read_label(dev))


@one_runtime
@pytest.mark.parametrize("kind", KINDS)
def test_selinux_container_opens_its_nodes(containers: Containers, kind: str) -> None:
    """Only in permissive mode: Debian's policy has no domain for containers that could be enforced."""
    nic = guest.find_device(devices.NIC_E1000E)
    done = containers.probe(annotations=ask(nic), edit=LABELS, **KINDS[kind])
    assert done.code == 0, done.stderr
    (group,) = done.read_json()["groups"]
    assert group["devices"][0]["read_id"] == "ok", group
