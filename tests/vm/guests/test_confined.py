# SPDX-License-Identifier: Apache-2.0
"""A guest whose files cannot be written, idmapped mounts, and containers of a user who is not root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers
from tests.vm.guests import units

MACHINE = "systemd"
KERNELS = ("6.1",)


@pytest.fixture(name="nic")
def find_nic(native_drivers: None) -> str:
    """Return the address of the machine's NIC, which goes back to its driver afterwards."""
    return guest.find_device(devices.NIC_E1000E)


# Read-only ------------------------------------------------------------------------------------------------------------


@pytest.fixture(name="frozen")
def freeze_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the runtimes, and with them the hook, see a root that cannot be written, as Kata's guest image is.

    /run, /dev and what the kernel has can be.
    """
    for runtime in ("runc", "crun"):
        wrapper = tmp_path / runtime
        script = f'mount -o remount,bind,ro / && ! touch /var/lib/x 2>/dev/null && exec /usr/bin/{runtime} "$@"'
        wrapper.write_text(f"#!/bin/sh\nexec unshare --mount sh -c '{script}' sh \"$@\"\n")
        wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("frozen")
def test_frozen_root_binds_opens_releases(containers: Containers, nic: str) -> None:
    hooks = bundles.guest_hooks("createRuntime", "poststop")
    done = containers.probe(annotations=ask(nic), hooks=hooks)
    assert done.code == 0, done.stderr
    (group,) = done.read_json()["groups"]
    assert group["devices"][0]["read_id"] == "ok", group
    assert guest.driver_of(nic) == "e1000e"
    assert guest_calls.list_claims() == []


@one_runtime
@pytest.mark.usefixtures("frozen")
def test_frozen_root_refuses_in_its_own_words(containers: Containers, nic: str) -> None:
    """What cannot be recorded is no reason to say less about what was refused."""
    done = containers.probe(annotations=ask("0000:00:00.0"))
    print(done.stderr)
    assert done.code != 0
    assert "vfio-guest-bind: error: [" in done.stderr
    assert "Traceback" not in done.stderr


@one_runtime
def test_frozen_run_is_named(containers: Containers, nic: str) -> None:
    """Without a place for claims nothing is bound, and the message names the place."""
    _, state = guest_calls.make_created(containers, annotations=ask(nic))
    shutil.rmtree("/run/oci-vfio-hooks", ignore_errors=True)
    script = 'mount -o remount,bind,ro /run && exec "$0"'
    hook = bundles.find_hook(bundles.GUEST_HOOK)
    done = units.run("unshare", "--mount", "sh", "-c", script, hook, text=json.dumps(state))
    print(done.stderr)
    assert done.code == 1
    assert "/run/oci-vfio-hooks" in done.stderr
    assert "ead-only file system" in done.stderr
    assert guest.driver_of(nic) == "e1000e"


# Users' containers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("containers", ["crun"], indirect=True)
def test_idmapped_mount_of_a_user_namespace(containers: Containers, nic: str) -> None:
    """A file of the guest's root is the container's root's, and the nodes open."""
    Path("/srv/data").mkdir(exist_ok=True)
    Path("/srv/data/file").write_text("x")
    mount = {"destination": "/mnt", "type": "bind", "source": "/srv/data", "options": ["bind", "idmap", "rw"]}
    more = {"user_namespace": 100000, "mounts": [mount]}
    seen = containers.run("/usr/bin/stat", "-c", "%u", "/mnt/file", hooks={}, **more)
    assert seen.stdout == "0\n", seen
    done = containers.probe(annotations=ask(nic), **more)
    assert done.code == 0, done.stderr
    (group,) = done.read_json()["groups"]
    assert group["devices"][0]["read_id"] == "ok", group


@pytest.fixture(name="user")
def make_user() -> str:
    """Return the name of a user who may have containers."""
    subprocess.run(["useradd", "--create-home", "someone"], check=False, capture_output=True)
    return "someone"


def run_rootless(user: str, *arguments: str) -> bundles.Done:
    """Run podman as a user, without systemd's help."""
    own = f"/run/rootless-{user}"
    script = f"mkdir -p {own} && chown {user} {own} && cd / && exec runuser -u {user} -- env XDG_RUNTIME_DIR={own} "
    words = ["podman", "--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=none", *arguments]
    return units.run("sh", "-c", f'{script} HOME=/home/{user} "$@"', "sh", *words)


def test_rootless_podman_is_refused(user: str, nic: str) -> None:
    """A user's own podman runs the hook as that user: it says that it is not root, and nothing is bound."""
    root = bundles.mount_rootfs(Path("/run/rootless-root"))
    # podman and crun write there, as the user.
    for name in ("", "etc", "run"):
        shutil.chown(root / name, user, user)
    run = ["run", "--rm", "--network=none", "--hooks-dir=/usr/share/containers/oci/hooks.d"]
    try:
        plain = run_rootless(user, *run, "--rootfs", str(root), "/bin/true")
        assert plain.code == 0, plain
        # crun throws away what a hook writes, else.
        words = Path(f"/run/rootless-{user}/hook.stderr")
        asks = (f"--annotation={guest_calls.DEVICES}={nic}", f"--annotation=run.oci.hooks.stderr={words}")
        done = run_rootless(user, *run, *asks, "--rootfs", str(root), "/bin/true")
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)
        shutil.rmtree("/run/rootless-root")
    assert done.code != 0
    assert "vfio-guest-bind: error: [not-root]" in words.read_text()
    assert guest.driver_of(nic) == "e1000e"
