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
from pathlib import Path

from tests import packages, provision
from tests.chain import image
from tests.packages import Root
from tests.provision import locked, make_partial, make_stamp, say

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


def make_initramfs(place: Path, kernel: provision.Kernel) -> None:
    """Write the initramfs for a kernel."""
    tree = place.with_name("initramfs.tree")
    for directory in ("usr/bin", "usr/sbin", "usr/lib", "dev", "proc", "sys", "sysroot"):
        (tree / directory).mkdir(parents=True)
    for name in ("bin", "sbin", "lib"):
        (tree / name).symlink_to(f"usr/{name}")
    image.add_modules(tree, kernel, MODULES)
    image.add_busybox(tree)
    shutil.copy(HERE / "systems.init", tree / "init")
    (tree / "init").chmod(0o755)
    for name in ("rig.service", "systems.sh"):
        shutil.copy(HERE / name, tree)
    (tree / "modules").write_text("\n".join([*MODULES, ""]))
    with place.open("wb") as file:
        image.write_cpio(tree, file)
    shutil.rmtree(tree)


def make_command(
    kernel: provision.Kernel, share: Path, scratch: Path, options: list[str], appended: list[str]
) -> list[str]:
    """Return QEMU's command line.

    share: what is the job's directory inside; scratch: for the initramfs, and for what the machine writes to its disk;
    options: the devices; appended: parameters for the kernel.
    """
    make_initramfs(scratch / "initramfs", kernel)
    modules = kernel.image.parent.parent / "lib/modules" / kernel.release
    parameters = ["console=ttyS0", "panic=-1", f"rig.show={provision.REPOSITORY}:{provision.find_cache()}"]
    parameters += [f"rig.modules={modules}", *appended]
    if "loglevel=7" in appended:
        parameters += ["systemd.show_status=1", "systemd.journald.forward_to_console=1"]
    command = ["qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-cpu", "max", *options]
    command += ["-chardev", "file,id=console,path=/proc/self/fd/2", "-serial", "chardev:console"]
    command += ["-chardev", "file,id=output,path=/proc/self/fd/1"]
    command += ["-device", "virtio-serial", "-device", "virtserialport,chardev=output,name=rig.output"]
    command += ["-drive", f"if=none,id=system,format=raw,snapshot=on,file={ensure_system()}"]
    command += ["-device", "virtio-blk-pci,drive=system"]
    command += ["-fsdev", f"local,id=rigshare,path={share},security_model=none"]
    command += ["-device", "virtio-9p-pci,fsdev=rigshare,mount_tag=rig.share"]
    command += ["-kernel", str(kernel.image), "-initrd", str(scratch / "initramfs")]
    return [*command, "-append", " ".join(parameters)]
