# SPDX-License-Identifier: Apache-2.0
"""Make guest images as Kata's osbuilder lays them out, and an add-on, small ones: without root, without mounting.

Layout: kata-containers 4.1.0, tools/osbuilder/image-builder/image_builder.sh and nsdax.gpl.c.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import struct
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

MIB = 1 << 20
SBIN = {**os.environ, "PATH": f"/usr/sbin:/sbin:{os.environ.get('PATH', '/usr/bin:/bin')}"}
HOME = "opt/oci-vfio-hooks"
HOOK = b'#!/bin/sh\nexec /opt/oci-vfio-hooks/bin/python3 "$@"\n'
# A program without a library would be the interpreter; what it does is for the test in the machine to see.
PYTHON = b"#!/bin/sh\necho stand-in 1.2.3 $*\n"
FILES = {
    f"{HOME}/bin/python3": (0o755, PYTHON),
    f"{HOME}/lib/library.zip": (0o644, random.Random(1).randbytes(30_000)),  # noqa: S311 - what doesn't compress
    f"{HOME}/cdi/oci-vfio-hooks.json": (0o644, b'{"cdiVersion": "0.6.0"}\n'),
    "usr/lib/systemd/system/kata-agent.service.d/oci-vfio-hooks.conf": (0o644, b"[Service]\n"),
    "usr/share/oci/hooks/prestart/vfio-guest-bind": (0o755, HOOK),
    "usr/share/oci/hooks/poststop/vfio-guest-bind": (0o755, HOOK),
}
TIME = 1_700_000_000


def run(*command: str | Path, text: bytes = b"") -> bytes:
    """Run a program that must succeed and return what it printed."""
    done = subprocess.run(command, input=text, capture_output=True, check=False, env=SBIN)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


# The add-on ----------------------------------------------------------------------------------------------------------


def add_manifest(files: dict[str, tuple[int, bytes]]) -> dict[str, tuple[int, bytes]]:
    """Return the files with the manifest that sha256sum would make of them."""
    lines = [f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, (_, data) in sorted(files.items())]
    return {**files, f"{HOME}/manifest.sha256": (0o644, "".join(lines).encode())}


def pack_addon(place: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Write a tar.xz of these members."""
    with tarfile.open(place, "w:xz", preset=0) as archive:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return place


def make_member(name: str, mode: int = 0o644, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    """Return the header of a member."""
    info = tarfile.TarInfo(name)
    info.mode, info.type, info.linkname, info.mtime = mode, kind, target, TIME
    return info


def list_members(files: dict[str, tuple[int, bytes]]) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Return the members of an archive of these files, with the manifest."""
    return [(make_member(path, mode), data) for path, (mode, data) in sorted(add_manifest(files).items())]


def make_addon(directory: Path, files: dict[str, tuple[int, bytes]] | None = None) -> Path:
    """Write an add-on as packaging/guest-addon names it."""
    name = "oci-vfio-hooks-guest-addon_1.2.3_amd64.tar.xz"
    return pack_addon(directory / name, list_members(FILES if files is None else files))


# Guests --------------------------------------------------------------------------------------------------------------


def make_root(place: Path, *more: str) -> Path:
    """Make the tree of a small guest. more: paths of further files."""
    for name in ("usr/bin", "usr/sbin", "usr/lib/modules/6.1.0-test", "etc", "dev", "opt"):
        (place / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib"):
        (place / name).symlink_to(f"usr/{name}")
    (place / "usr/sbin/init").write_bytes(random.Random(2).randbytes(700_000))  # noqa: S311
    (place / "usr/sbin/init").chmod(0o755)
    (place / "init").symlink_to("sbin/init")
    (place / "etc/machine-id").touch()
    modules = place / "usr/lib/modules/6.1.0-test"
    (modules / "modules.dep").write_text("kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n")
    (modules / "modules.builtin").write_text("kernel/drivers/iommu/iommufd/iommufd.ko\n")
    for name in more:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"{name}\n")
    return place


def make_cpio(root: Path) -> bytes:
    """Return what osbuilder's initrd_builder.sh makes of a tree by cpio, as root's."""
    names = run("find", root, "-printf", "%P\n")
    done = subprocess.run(
        ["cpio", "-H", "newc", "-o", "--quiet", "-R", "0:0"], cwd=root, input=names, capture_output=True, check=True
    )
    return done.stdout


def make_initrd(place: Path, root: Path, packing: str = "gzip") -> Path:
    """Write an initrd of a tree."""
    data = make_cpio(root)
    packed = {
        "gzip": lambda: gzip.compress(data, 9),
        "zstd": lambda: run("zstd", "-q", "-c", text=data),
        "xz": lambda: run("xz", "--check=crc32", "-c", text=data),
        "cpio": lambda: data,
    }[packing]()
    place.write_bytes(packed)
    return place


def make_ext4(place: Path, root: Path, size: int, *options: str) -> Path:
    """Make a file system of a tree, as image_builder.sh does but for the mount: everything is root's."""
    place.touch()
    os.truncate(place, size)
    more = ["-E", "root_owner=0:0", *options]
    run("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-m", "3", *more, "-d", root, place)
    return place


def make_disk(size: int, start: int, label: str = "dos", second: int = 0) -> bytes:
    """Return the first sectors of a disk with a partition from an offset to the last sector but one.

    second: bytes of a second partition behind it.
    """
    place = Path(os.environ.get("TMPDIR", "/tmp")) / f"disk-{os.getpid()}"  # noqa: S108 - gone at once
    place.touch()
    os.truncate(place, size)
    kind = "83" if label == "dos" else "L"
    first = f"start={start // 512}, size={(size - start - second) // 512 - 34}, type={kind}\n"
    more = f"start={(size - second) // 512}, size={second // 512 - 34}\n" if second else ""
    try:
        run("sfdisk", "-q", place, text=f"label: {label}\nlabel-id: 0x1234abcd\n{first}{more}".encode())
        return place.read_bytes()
    finally:
        place.unlink()


def make_dax_block() -> bytes:
    """Return the kernel's block for a pmem device with DAX: struct nd_pfn_sb, 2 MiB before the data."""
    block = bytearray(4096)
    struct.pack_into("<16s", block, 0, b"NVDIMM_PFN_INFO")
    # version_minor, dataoff, mode (RAM), align; the checksum is at the end.
    struct.pack_into("<H", block, 54, 2)
    struct.pack_into("<Q", block, 56, 2 * MIB)
    struct.pack_into("<I", block, 72, 1)
    struct.pack_into("<I", block, 84, 2 * MIB)
    low = high = 0
    for (word,) in struct.iter_unpack("<I", bytes(block)):
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFFFFFFFFFF
    struct.pack_into("<Q", block, 4088, ((high << 32) | low) & 0xFFFFFFFFFFFFFFFF)
    return bytes(block)


def make_image(place: Path, filesystem: Path, dax: bool = True, label: str = "dos", second: int = 0) -> Path:
    """Write an image of a file system as osbuilder does: MBR, 1 MiB, partition; before them 2 MiB for an NVDIMM."""
    header = 2 * MIB if dax else 0
    # 34 sectors behind the partition: osbuilder leaves one, a GPT's copy needs 33.
    size = MIB + filesystem.stat().st_size + second + MIB
    with place.open("wb") as file:
        if dax:
            file.write(make_disk(header + size, MIB + header, label, second)[:4096])
            file.write(make_dax_block())
        file.seek(header)
        file.write(make_disk(size, MIB, label, second))
        with filesystem.open("rb") as content:
            file.seek(header + MIB)
            while data := content.read(MIB):
                if data.strip(b"\0"):
                    file.write(data)
                else:
                    file.seek(len(data), os.SEEK_CUR)
        file.truncate(header + size)
    return place
