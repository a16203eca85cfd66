# SPDX-License-Identifier: Apache-2.0
"""A kernel boots what vfio-kata-image has written: an initrd, and disk images as NVDIMM and as virtio disks.

The add-on is a small stand-in; that the genuine one runs in such a guest is tests/packaging's and tests/vm's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests import provision
from tests.runtime.test_kata_image import LARGE, make_erofs, run
from tests.support.kata_images import MIB, make_addon, make_ext4, make_image, make_initrd, make_root

MODULES = ("crc32c_generic", "nfit", "nd_pmem", "ext4", "erofs", "virtio_pci", "virtio_blk")
BUSYBOX = ("sh", "mount", "umount", "insmod", "poweroff", "stat", "mkdir")
# Seconds: the machine is emulated, and others may be at work.
BOOT_LIMIT = 240
INIT = """#!/bin/sh
mkdir /proc /sys /mnt
mount -t devtmpfs none /dev; mount -t proc none /proc; mount -t sysfs none /sys
for module in /modules/*; do insmod $module; done
echo "root: $(stat -c "%a %u:%g" /opt/oci-vfio-hooks/bin/python3)"
echo "root: $(/usr/share/oci/hooks/prestart/vfio-guest-bind one two)"
for device in pmem0p1:ext4 vda1:ext4 vdb1:erofs; do
    mount -o ro -t ${device#*:} /dev/${device%:*} /mnt
    echo "$device: $(stat -c '%a %u:%g' /mnt/opt/oci-vfio-hooks/bin/python3)"
    echo "$device: $(/mnt/opt/oci-vfio-hooks/bin/python3 one two)"
    umount /mnt
done
poweroff -f
"""


def list_modules(directory: Path) -> list[str]:
    """Return the files of MODULES and of what they need, each after what it needs."""
    lines = (directory / "modules.dep").read_text().splitlines()
    needs = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    order: list[str] = []

    def add(path: str) -> None:
        for each in reversed(needs[path]):
            add(each)
        if path not in order:
            order.append(path)

    for name in MODULES:
        add(next(path for path in needs if path.endswith(f"/{name}.ko")))
    return order


def make_guest(place: Path, kernel: provision.Kernel) -> Path:
    """Make the tree of a guest that mounts disks, runs the hook of each and says what it saw."""
    root = make_root(place)
    directory = kernel.image.parents[1] / "lib/modules" / kernel.release
    (root / "modules").mkdir()
    for number, path in enumerate(list_modules(directory)):
        shutil.copy(directory / path, root / f"modules/{number:02d}.ko")
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "usr/bin/busybox")
    for name in BUSYBOX:
        (root / "usr/bin" / name).symlink_to("busybox")
    (root / "init").unlink()
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    return root


def boot(kernel: provision.Kernel, initrd: Path, nvdimm: Path, *disks: Path) -> str:
    """Boot a machine with these images and return what its console says."""
    memory = f"memory-backend-file,id=m0,mem-path={nvdimm},size={nvdimm.stat().st_size},readonly=on"
    command = ["qemu-system-x86_64", "-M", "pc,nvdimm=on", "-cpu", "max", "-m", "256,slots=2,maxmem=2G"]
    command += ["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
    command += ["-kernel", str(kernel.image), "-initrd", str(initrd)]
    command += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]
    command += ["-object", memory, "-device", "nvdimm,memdev=m0,unarmed=on"]
    for disk in disks:
        command += ["-drive", f"file={disk},format=raw,if=virtio,readonly=on"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=BOOT_LIMIT)
    return done.stdout.decode(errors="replace").replace("\r", "")


def test_kernel_reads_what_was_written(tmp_path: Path) -> None:
    kernel = provision.ensure_kernel()
    root = make_guest(tmp_path / "root", kernel)
    make_initrd(tmp_path / "initrd", root)
    filesystem = make_ext4(tmp_path / "fs", make_root(tmp_path / "guest"), 12 * MIB)
    make_image(tmp_path / "nvdimm", filesystem)
    make_image(tmp_path / "disk", filesystem, dax=False)
    make_image(tmp_path / "erofs", make_erofs(tmp_path / "fs.erofs", tmp_path / "guest"), dax=False)
    # The disk images are too small for it, so that they are grown.
    addon = make_addon(tmp_path, LARGE)
    names = ("initrd", "nvdimm", "disk", "erofs")
    for name in names:
        run("add", tmp_path / name, "--output", tmp_path / f"new-{name}", "--addon", addon)
        os.unlink(tmp_path / name)
    console = boot(kernel, *(tmp_path / f"new-{name}" for name in names))
    print(console)
    said = re.findall(r"^(root|pmem0p1:ext4|vda1:ext4|vdb1:erofs): (.*)$", console, re.MULTILINE)
    expected = [("root", "755 0:0"), ("root", "stand-in 1.2.3 one two")]
    for name in ("pmem0p1:ext4", "vda1:ext4", "vdb1:erofs"):
        expected += [(name, "755 0:0"), (name, "stand-in 1.2.3 one two")]
    assert said == expected
