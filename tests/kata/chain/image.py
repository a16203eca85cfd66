# SPDX-License-Identifier: Apache-2.0
"""Build what Kata's shim boots (kernel, initrd with the agent and the guest hook), and the root it is started in.

The initrd is a selection of files of a Debian root in which apt has installed the DEBs, as in tests/chain, with Kata's
agent as the program that runs. Where there is a guest add-on, an archive with the hook and all that it needs, that
brings the hook: the one that KATA_GUEST_ADDON names, or that of packaging/guest-addon. Run on the plain machine, before
anything boots.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import packages, provision
from tests.chain import image as inner
from tests.engines import roots
from tests.kata import genuine
from tests.provision import find_cache, locked, make_partial, make_stamp, run, say

HERE = Path(__file__).resolve().parent
# The kernel is unpacked, and the index of modules made, on this machine.
PACKAGES = provision.RIG_PACKAGES | {"git": "which files go into the packages"}
ENVIRONMENT = "OCI_VFIO_KATA_CHAIN"
ADDON = "KATA_GUEST_ADDON"
ADDON_BUILDER = provision.REPOSITORY / "packaging/guest-addon"
# Loaded by the guest's init: what Kata's agent needs, and the NIC's own driver. Nothing loads the VFIO modules but the
# hook, or kernel_modules of Kata's configuration.
MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_scsi", "virtio_console", "vmw_vsock_virtio_transport", "virtiofs", "overlay"),
    *("e1000e", "vfio-pci", "vfio_iommu_type1"),
)
# Where the layer has things.
KATA = "usr/share/kata-containers"
CONTAINER_ROOT = "srv/probe"
# What the agent is linked to.
AGENT_LIBRARIES = (
    *(f"{inner.LIBRARIES}/{name}" for name in ("libc.so.6", "libgcc_s.so.1", "libm.so.6")),
    "/usr/lib64/ld-linux-x86-64.so.2",
)


def make_environment(files: Sequence[Path]) -> dict[str, str]:
    """Return what tests in the machine find in their environment if a file among them has KATA_CHAIN = True."""
    if not any("\nKATA_CHAIN = True\n" in file.read_text() for file in files):
        return {}
    agent, shim = genuine.find_agent(), genuine.find_shim()
    layers = (ensure_layer(agent, shim), roots.ensure_crictl(), *ensure_host())
    return {ENVIRONMENT: ":".join(map(str, layers))}


def ensure_host() -> tuple[Path, ...]:
    """Return the layers, topmost first, of a root with our DEBs, containerd 1.6 and QEMU with its virtiofsd."""
    *upper, base = packages.ensure_containerd("1.6")
    place = find_cache() / f"kata-qemu-{make_stamp(str(base))}"
    if not place.exists():
        with locked(place):
            if not place.exists():
                packages.install_layer(place, (base,), (), ("qemu-system-x86", "iproute2"))
    return (*upper, place, base)


def ensure_layer(agent: Path, shim: Path) -> Path:
    """Return the layer with Kata: shim, kernel, initrd, and a root for containers. Made if it is not there."""
    installed = packages.ensure_installed()
    kernel = provision.ensure_kernel()
    addon = ensure_addon()
    files = (agent, shim, *([addon] if addon else []))
    parts = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    sources = [path.read_text() for path in (HERE / "image.py", HERE / "init", Path(inner.__file__))]
    place = find_cache() / f"kata-chain-{make_stamp(str(installed[0]), kernel.release, *parts, *sources)}"
    if not place.exists():
        with locked(place):
            if not place.exists():
                packages.forget_old("kata-chain-*")
                make_layer(place, installed, kernel, shim, Guest(agent, addon))
    return place


def ensure_addon() -> Path | None:
    """Return the archive with the hook that the guest gets: KATA_GUEST_ADDON's, or what the tree builds; else None."""
    if os.environ.get(ADDON):
        return Path(os.environ[ADDON]).resolve()
    if not ADDON_BUILDER.exists():
        return None
    place = find_cache() / f"kata-addon-{packages.stamp_tree()}"
    with locked(place):
        if not place.exists():
            packages.forget_old("kata-addon-*")
            partial = make_partial(place)
            say("building the guest add-on")
            run([str(ADDON_BUILDER), "--output", str(partial)])
            partial.rename(place)
    (archive,) = place.glob("*.tar.*")
    return archive


@dataclass(frozen=True)
class Guest:
    """What the guest has of its own. agent: Kata's; addon: an archive with the hook, else it is that of the DEBs."""

    agent: Path
    addon: Path | None


def make_layer(place: Path, installed: tuple[Path, ...], kernel: provision.Kernel, shim: Path, guest: Guest) -> None:
    """Make the layer."""
    say("making Kata's kernel and initrd")
    started = time.monotonic()
    partial = make_partial(place)
    kata = partial / KATA
    kata.mkdir(parents=True)
    (kata / "vmlinux").write_bytes(inner.unpack_kernel(kernel.image.read_bytes()))
    (partial / "usr/bin").mkdir()
    shutil.copy(shim, partial / "usr/bin/containerd-shim-kata-v2")
    tree = partial / "tree"
    fill_guest(tree, installed, kernel, guest)
    with (kata / "initrd").open("wb") as file:
        inner.write_cpio(tree, file)
    shutil.rmtree(tree)
    fill_container_root(partial / CONTAINER_ROOT, installed)
    size = (kata / "initrd").stat().st_size
    partial.rename(place)
    say(f"  initrd {size / inner.MEGABYTE:.1f} MB, done in {time.monotonic() - started:.0f} s")


def fill_guest(tree: Path, installed: tuple[Path, ...], kernel: provision.Kernel, guest: Guest) -> None:
    """Make the guest's root as a directory."""
    make_directories(tree)
    inner.copy_installed(tree, installed, AGENT_LIBRARIES)
    if guest.addon:
        run(["tar", "-xf", str(guest.addon), "-C", str(tree)])
        # kmod and its libraries are a tenth of such a guest, which takes that much longer to unpack it.
        (tree / "usr/sbin/modprobe").symlink_to("../bin/busybox")
    else:
        inner.copy_installed(tree, installed, inner.PYTHON)
        paths = (*inner.HOOK, *inner.HELPERS, inner.PACKAGES_OF_PYTHON)
        inner.copy_installed(tree, installed, paths, inner.LOADED_LATER)
    inner.add_modules(tree, kernel, MODULES)
    inner.add_busybox(tree)
    shutil.copy(guest.agent, tree / "usr/bin/kata-agent")
    shutil.copy(HERE / "init", tree / "init")


def fill_container_root(root: Path, installed: tuple[Path, ...]) -> None:
    """Make the containers' root: busybox, and the Python that runs the probe."""
    make_directories(root)
    inner.copy_installed(root, installed, inner.PYTHON)
    inner.add_busybox(root)
    shutil.copy(provision.REPOSITORY / "examples/vfio_probe.py", root)


def make_directories(tree: Path) -> None:
    """Make the directories that a root has."""
    for name in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", *inner.DIRECTORIES):
        (tree / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
