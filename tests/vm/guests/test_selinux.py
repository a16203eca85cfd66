# SPDX-License-Identifier: Apache-2.0
"""SELinux with Debian's policy: what label the hook's nodes have in a container whose config.json has labels."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers
from tests.vm.guests import units

MACHINE = "selinux"
KERNELS = ("6.1",)
# As an engine gives them: the pair of categories keeps containers apart from each other.
PROCESS = "unconfined_u:unconfined_r:unconfined_t:s0:c1,c2"
FILES = "system_u:object_r:tmp_t:s0:c1,c2"
LABELS = {"process": {"selinuxLabel": PROCESS}, "linux": {"mountLabel": FILES}}
ENFORCE = Path("/sys/fs/selinux/enforce")
KINDS = {"root": {}, "user": {"user": 1000}, "user-namespace": {"user_namespace": 100000}}


def read_label(path: Path) -> str:
    """Return the SELinux label of a file, of the link itself if it is one."""
    return os.getxattr(path, "security.selinux", follow_symlinks=False).rstrip(b"\0").decode()


@pytest.fixture(name="mode", params=["permissive", "enforcing"])
def set_mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Have SELinux only report, or enforce; return which."""
    ENFORCE.write_text("1" if request.param == "enforcing" else "0")
    yield str(request.param)
    ENFORCE.write_text("0")


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


@pytest.mark.parametrize("kind", KINDS)
def test_selinux_container_opens_its_nodes(containers: Containers, mode: str, kind: str) -> None:
    """The container's domain may use its own files; it may not use another's, which shows that SELinux is at work."""
    nic = guest.find_device(devices.NIC_E1000E)
    done = containers.probe(annotations=ask(nic), edit=LABELS, **KINDS[kind])
    print(mode, done)
    denied = units.run("sh", "-c", "dmesg | grep 'avc:  denied' | tail -20").stdout
    assert done.code == 0, (done.stderr, denied)
    (group,) = done.read_json()["groups"]
    assert group["devices"][0]["read_id"] == "ok", (group, denied)
