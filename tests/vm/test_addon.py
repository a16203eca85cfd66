# SPDX-License-Identifier: Apache-2.0
"""The guest add-on at work: tests of the hook where its root has the add-on, busybox and nothing else.

Most tests are those of other files. The runtimes, with libraries of their own, run in a mount namespace that has such
a root, this machine's devices and its /run. So do the hooks that they start: no C library, Python or udevd there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hooks import __version__
from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, guest
from tests.vm.bundles import Containers
from tests.vm.test_guest_bind import (
    hardened_bpf,
    test_guest_bind_by_counting,
    test_guest_bind_failure_rolls_back,
    test_guest_bind_mounted_disk_refused,
    test_guest_bind_opens_group,
    test_guest_bind_user_namespace,
)
from tests.vm.test_guest_end import LIMIT, start_hook, test_guest_hook_stopped_then_killed
from tests.vm.test_guest_hotplug import IDS, no_udev, plug, plugged

MACHINE = "standard"
KERNELS = ("6.1",)
# The runner builds it and passes its path.
ADDON = True
__all__ = [
    "hardened_bpf",
    "plugged",
    "test_guest_bind_by_counting",
    "test_guest_bind_failure_rolls_back",
    "test_guest_bind_mounted_disk_refused",
    "test_guest_bind_opens_group",
    "test_guest_bind_user_namespace",
    "test_guest_hook_stopped_then_killed",
]
# Not in /run, which is shared with it.
ROOT = Path("/srv/addon")
SHARED = ("/dev", "/proc", "/sys", "/run", "/etc/oci-vfio-hooks", "/var/lib/oci-vfio-hooks")
HOOKS = Path("/usr/share/oci/hooks/prestart")
# What this machine has by the names of what is in that root.
PROGRAMS = Path("/run/addon-programs")
MODULES = Path("/lib/modules", os.uname().release)
# $1: the root; $2: where the kernel's modules really are; the others: what is mounted in it.
BECOME_ROOT = """
    mount --bind "$1" "$1"
    root=$1
    mount --bind "$2" "$root/lib/modules/$(uname -r)"
    shift 2
    for each; do mount --rbind "$each" "$root$each"; done
    cd "$root"
    /usr/sbin/pivot_root . old
    exec /bin/busybox sh -c "/bin/busybox umount -l /old && echo ready && exec /bin/busybox sleep 100000"
"""


def make_root() -> None:
    """Make the root: the add-on, busybox, and the runtimes with their own loader and libraries."""
    shutil.copytree(Path(os.environ["OCI_VFIO_ADDON"]) / "tree", ROOT)
    for name in ("/bin", "/old", "/runtimes", str(MODULES), *SHARED):
        Path(f"{ROOT}{name}").mkdir(parents=True)
    shutil.copy("/bin/busybox", ROOT / "bin/busybox")
    (ROOT / "bin/modprobe").symlink_to("busybox")
    for name in ("runc", "crun"):
        program = str(shutil.which(name))
        shutil.copy(program, ROOT / "runtimes" / name)
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        libraries = re.findall(r"(/\S+) \(0x", listed)
        for library in libraries:
            shutil.copy(library, ROOT / "runtimes" / Path(library).name)
        (loader,) = (Path(library).name for library in libraries if "/ld-linux" in library)
        options = ["--set-interpreter", f"/runtimes/{loader}", "--force-rpath", "--set-rpath", "/runtimes"]
        subprocess.run(["patchelf", *options, ROOT / "runtimes" / name], check=True)


@pytest.fixture(autouse=True, scope="module")
def bare_root() -> Iterator[None]:
    """Have runtimes and hook run in the root with the add-on, by the names that the tests know them by."""
    if not guest.is_inside():
        yield
        return
    make_root()
    bundles.write_settings()
    # A container's mounts below /run come after this.
    subprocess.run(["mount", "--make-rshared", "/run"], check=True)
    command = ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", BECOME_ROOT, "sh", str(ROOT)]
    command += [str(MODULES.resolve()), *SHARED]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "ready\n"
    PROGRAMS.mkdir()
    HOOKS.mkdir(parents=True)
    for path, program in (
        (PROGRAMS / "runc", "/runtimes/runc"),
        (PROGRAMS / "crun", "/runtimes/crun"),
        (HOOKS / bundles.GUEST_HOOK, HOOKS / bundles.GUEST_HOOK),
    ):
        path.write_text(f'#!/bin/sh\nexec /usr/bin/nsenter --target {holder.pid} --mount {program} "$@"\n')
        path.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{PROGRAMS}:{os.environ['PATH']}")
        patch.setenv("OCI_VFIO_HOOKS_DIR", str(HOOKS))
        yield
    # Other files' tests may follow in this machine.
    holder.kill()
    holder.wait()
    shutil.rmtree(HOOKS)
    subprocess.run(["mount", "--make-rprivate", "/run"], check=True)


def test_addon_is_what_runs() -> None:
    """In there, no other program and no library is at any usual place."""
    find = ["find", "/bin", "/lib", "/sbin", "/usr", "/lib64", "-xdev", "-type", "f"]
    command = ["nsenter", "--target", read_holder(), "--mount", "/bin/busybox", *find]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    systemd = "/usr/lib/systemd/system/kata-agent.service.d/oci-vfio-hooks.conf"
    hooks = [f"/usr/share/oci/hooks/{kind}/{bundles.GUEST_HOOK}" for kind in ("poststop", "prestart")]
    assert sorted(found) == sorted(["/bin/busybox", systemd, *hooks])
    answer = guest_calls.call_hook(None, "--version")
    assert answer.stdout == f"vfio-guest-bind {__version__}\n"
    answer = guest_calls.call_hook(None, "--all", "--json")
    assert answer.code == 0, answer.stderr


def read_holder() -> str:
    """Return the pid of the process that has the root."""
    found = re.search(r"--target (\d+)", (PROGRAMS / "runc").read_text())
    assert found
    return found[1]


@one_runtime
@pytest.mark.usefixtures("plugged")
def test_addon_waits_for_device(containers: Containers) -> None:
    """No udevd, and no udev of the image's: the add-on's own pyudev and libudev hear the kernel's event."""
    container, state = guest_calls.make_created(containers, annotations=ask(f"id:{IDS}"))
    with no_udev(), guest_calls.settings("deadline = 60"):
        hook = start_hook(state)
        plug()
        assert hook.wait(LIMIT) == 0
        assert hook.stderr and hook.stderr.read() == ""
    (address,) = guest.find_devices(IDS)
    assert guest.driver_of(address) == "vfio-pci"
    assert guest_calls.list_dev(container) == sorted(["devices.json", guest.group_of(address), "vfio"])
    assert guest_calls.release(state).code == 0
