# SPDX-License-Identifier: Apache-2.0
"""Debian as a whole on a disk, booted by systemd: its image, and an initramfs that shows it this machine's files.

The image is a root of Debian 12 with our DEBs, runc, crun, podman, AppArmor and SELinux' reference policy, all by apt,
and labelled as SELinux' policy wants it. It is never changed: QEMU forgets what a boot has written. The initramfs
mounts what virtme-ng shows in the other machines: the repository, the cache and the job, each under its own path.
Made on the plain machine, before anything boots.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import packages, provision
from tests.chain import image
from tests.nri import peer
from tests.packages import Root
from tests.provision import locked, make_partial, make_stamp, run, say

HERE = Path(__file__).resolve().parent
# The last is what makes the others' file of contexts, and setfiles.
INSTALLED = (
    *("systemd-sysv", "dbus", "udev", "kmod", "iproute2", "procps"),
    *(*packages.RUNTIMES, "uidmap", "netavark", "apparmor", "strace"),
    *("selinux-policy-default", "selinux-utils", "policycoreutils"),
)
# What the initramfs needs until it has Debian's root, with all other modules, below /sysroot.
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "9p", "9pnet_virtio", "virtio_console")
CONTEXTS = "/etc/selinux/default/contexts/files/file_contexts"
IMAGE_SIZE = "4G"
ARM64_PACKAGES = {"qemu-system-arm": "the arm64 virtual machine", "debootstrap": "its Debian"}
ARM64_INSTALLED = ("python3", "kmod", "udev", "runc", "crun", "iproute2", "busybox-static", "procps")
# Podman's services start podman several times at each boot, for nothing.
SCRIPT = f"""
    systemctl disable podman.service podman.socket podman-restart.service podman-auto-update.timer
    echo guest >/etc/hostname
    : >/etc/fstab
    : >/etc/machine-id
    mkdir /run/whole
    mount --bind / /run/whole
    setfiles -F -r /run/whole {CONTEXTS} /run/whole
    mke2fs -q -t ext4 -E lazy_itable_init=1 -d /run/whole /mnt/image/disk {IMAGE_SIZE}
"""


@dataclass(frozen=True)
class System:
    """A Debian on a disk. ensure: makes the disk's image, and returns its path; qemu: QEMU's program for it.

    board: which of QEMU's machines, with options; cpu: which processor; console: the kernel's name of the serial port;
    init: what the initramfs starts; busybox: returns the path of one that runs there.
    """

    ensure: Callable[[], Path]
    qemu: str = "qemu-system-x86_64"
    board: str = "q35,kernel-irqchip=split"
    cpu: str = "max"
    console: str = "ttyS0"
    init: str = "/lib/systemd/systemd"
    busybox: Callable[[], Path] = lambda: Path("/bin/busybox")


def ensure_system() -> Path:
    """Return the image of a disk with Debian and our DEBs of the tree as it is, made if it is not there."""
    base, dist = packages.ensure_root("bare"), packages.ensure_dist()
    engines = provision.find_cache() / f"system-debian-{make_stamp(str(base), *INSTALLED)}"
    place = provision.find_cache() / f"system-{make_stamp(str(engines), str(dist), SCRIPT)}.img"
    if not place.exists():
        with locked(place):
            if not engines.exists():
                packages.install_layer(engines, (base,), (), INSTALLED)
            if not place.exists():
                forget_old()
                make_system(place, (engines, base), dist)
    return place


def make_environment(files: Sequence[Path]) -> dict[str, str]:
    """Return what tests in these files find in their environment: the runtime's side of NRI, where one asks for it.

    The disk is made here as well: before the machine's time begins to count.
    """
    names = {path.parent.name for path in files}
    if "arm64" in names:
        # The containers' root is the same Debian: one with amd64's programs is of no use there.
        ensure_arm64()
        return {"OCI_VFIO_ROOTFS": str(find_arm64())}
    if "guests" not in names:
        return {}
    go = peer.find_go()
    if not go:
        raise provision.MissingError("the runtime's side of NRI is built with Go 1.24 or later, which is not on PATH")
    ensure_system()
    return {"OCI_VFIO_NRI_PEER": str(peer.ensure_peer(go))}


def make_system(place: Path, layers: tuple[Path, ...], dist: Path) -> None:
    """Install the DEBs over these layers, label the files, and write all of them into a file system's image."""
    say("making the disk of a Debian that boots by systemd")
    started = time.monotonic()
    partial = make_partial(place)
    root = Root(layers, partial, ((dist, "/mnt/dist"), (partial, "/mnt/image")))
    packages.install_debs(root, *packages.RECOMMENDED)
    root.run("sh", "-ec", SCRIPT)
    (partial / "disk").rename(place)
    shutil.rmtree(partial)
    say(f"  done in {time.monotonic() - started:.0f} s")


def forget_old() -> None:
    """Remove images of an earlier state of the tree, after the runs that have them."""
    for path in provision.find_cache().glob("system-*.img"):
        if time.time() - path.stat().st_mtime > packages.KEPT_SECONDS:
            path.unlink(missing_ok=True)


# arm64 ----------------------------------------------------------------------------------------------------------------


def ensure_arm64() -> Path:
    """Return the image of a disk with an arm64 Debian, whose packages are unpacked and not configured."""
    place = find_arm64().with_suffix(".img")
    if not place.exists():
        provision.ensure_packages(ARM64_PACKAGES)
        with locked(place):
            if not place.exists():
                make_arm64(place)
    return place


def find_arm64() -> Path:
    """Return where the arm64 Debian's directory is, when it is made."""
    return provision.find_cache() / f"arm64-{make_stamp(*ARM64_INSTALLED)}"


def make_arm64(place: Path) -> None:
    """Get and unpack the packages, without running a program of theirs, and write them into a file system's image."""
    say("making the disk of an arm64 Debian")
    started = time.monotonic()
    root = make_partial(find_arm64())
    include = f"--include={','.join(ARM64_INSTALLED)}"
    words = ["--arch=arm64", "--foreign", "--variant=minbase", include, "bookworm", str(root), provision.find_mirror()]
    provision.run_twice(["debootstrap", *words])
    archives = root / "var/cache/apt/archives"
    for archive in sorted(archives.glob("*.deb")):
        run(["dpkg-deb", "-x", str(archive), str(root)])
    shutil.rmtree(archives)
    for name, text in (("passwd", "root:x:0:0:root:/root:/bin/sh\n"), ("group", "root:x:0:\n")):
        (root / "etc" / name).write_text(text)
    disk = place.with_suffix(".disk")
    run(["mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=1", "-d", str(root), str(disk), "2G"])
    root.rename(find_arm64())
    disk.rename(place)
    say(f"  done in {time.monotonic() - started:.0f} s")


SYSTEMS = {
    "debian": System(ensure_system),
    "arm64": System(
        ensure_arm64,
        qemu="qemu-system-aarch64",
        board="virt,gic-version=3",
        cpu="cortex-a57",
        console="ttyAMA0",
        init="/run/plain-init",
        busybox=lambda: find_arm64() / "bin/busybox",
    ),
}


# Booting --------------------------------------------------------------------------------------------------------------


def make_initramfs(place: Path, kernel: provision.Kernel, busybox: Path) -> None:
    """Write the initramfs for a kernel. busybox: for its processor."""
    tree = place.with_name("initramfs.tree")
    for directory in ("usr/bin", "usr/sbin", "usr/lib", "dev", "proc", "sys", "sysroot"):
        (tree / directory).mkdir(parents=True)
    for name in ("bin", "sbin", "lib"):
        (tree / name).symlink_to(f"usr/{name}")
    image.add_modules(tree, kernel, MODULES)
    image.add_busybox(tree)
    shutil.copy(busybox, tree / "usr/bin/busybox")
    shutil.copy(HERE / "systems.init", tree / "init")
    (tree / "init").chmod(0o755)
    for name in ("rig.service", "systems.sh", "plain-init"):
        shutil.copy(HERE / name, tree)
    (tree / "modules").write_text("\n".join([*MODULES, ""]))
    with place.open("wb") as file:
        image.write_cpio(tree, file)
    shutil.rmtree(tree)


def make_command(
    system: System, kernel: provision.Kernel, share: Path, scratch: Path, options: list[str], appended: list[str]
) -> list[str]:
    """Return QEMU's command line.

    share: what is the job's directory inside; scratch: for the initramfs, and for what the machine writes to its disk;
    options: the devices; appended: parameters for the kernel.
    """
    disk = system.ensure()
    make_initramfs(scratch / "initramfs", kernel, system.busybox())
    modules = kernel.image.parent.parent / "lib/modules" / kernel.release
    parameters = [f"console={system.console}", "panic=-1", f"rig.init={system.init}", f"rig.modules={modules}"]
    parameters += [f"rig.show={provision.REPOSITORY}:{provision.find_cache()}", *appended]
    if "loglevel=7" in appended:
        parameters += ["systemd.show_status=1", "systemd.journald.forward_to_console=1"]
    command = [system.qemu, "-nodefaults", "-no-reboot", "-display", "none", "-cpu", system.cpu, *options]
    command += ["-chardev", "file,id=console,path=/proc/self/fd/2", "-serial", "chardev:console"]
    command += ["-chardev", "file,id=output,path=/proc/self/fd/1"]
    command += ["-device", "virtio-serial", "-device", "virtserialport,chardev=output,name=rig.output"]
    command += ["-drive", f"if=none,id=system,format=raw,snapshot=on,file={disk}"]
    command += ["-device", "virtio-blk-pci,drive=system"]
    command += ["-fsdev", f"local,id=rigshare,path={share},security_model=none"]
    command += ["-device", "virtio-9p-pci,fsdev=rigshare,mount_tag=rig.share"]
    command += ["-kernel", str(kernel.image), "-initrd", str(scratch / "initramfs")]
    return [*command, "-append", " ".join(parameters)]
