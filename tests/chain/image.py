# SPDX-License-Identifier: Apache-2.0
"""Build the inner virtual machine's files: Debian's kernel, unpacked, and an initramfs with the guest hook.

The initramfs is a selection of files out of a Debian root in which apt has installed the DEBs, runc and crun; beside
them busybox, the kernel's modules for the few devices there are, and the containers' root with DPDK's testpmd. Run on
the plain machine, before anything boots.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests import packages, provision
from tests.packages import Root
from tests.provision import locked, make_partial, make_stamp, run, say

# Twice emulated, a hook takes a minute where it takes a second on a machine.
SETTINGS = "deadline = 240\n"
HERE = Path(__file__).resolve().parent
# What the containers' root is made of is taken from this machine.
PACKAGES = {
    **provision.RIG_PACKAGES,
    "git": "which files go into the packages",
    "dpdk-dev": "dpdk-testpmd, the program in the inner machine's containers",
}
ENVIRONMENT = "OCI_VFIO_CHAIN_IMAGE"
# Directories are taken whole.
PYTHON = ("/usr/bin/python3", "/usr/bin/python3.11", "/usr/lib/python3.11")
# The hook needs more than Python: kmod loads modules, and pyudev has ctypes look for libudev, which runs ldconfig.
HELPERS = ("/usr/bin/kmod", "/usr/sbin/modprobe", "/usr/sbin/ldconfig", "/etc/ld.so.cache")
PACKAGES_OF_PYTHON = "/usr/lib/python3/dist-packages"
HOOK = ("/usr/bin/vfio-guest-bind", "/usr/libexec/oci", "/usr/share/oci", f"{PACKAGES_OF_PYTHON}/oci_hooks")
RUNTIMES = ("/usr/bin/runc", "/usr/bin/crun")
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
# Loaded by name while programs run, so that no list of what they are linked to has them.
LOADED_LATER = (f"{LIBRARIES}/libudev.so.1",)
# No hook ever imports these, and with the libraries they bring they are the greater part of Python.
STANDARD = "/usr/lib/python3.11"
LEFT_OUT = (
    *(f"{STANDARD}/{name}" for name in ("distutils", "lib2to3", "pydoc_data", "test")),
    *(f"{STANDARD}/{name}" for name in ("turtle.py", "unittest", "wsgiref", "xmlrpc")),
    *(
        f"{STANDARD}/lib-dynload/{name}.*"
        for name in ("_codecs_*", "_curses*", "_dbm", "_sqlite3", "_ssl", "_test*", "audioop", "nis", "readline", "xx*")
    ),
    *(f"{PACKAGES_OF_PYTHON}/{name}" for name in ("*/tests", "pbr", "pkg_resources", "setuptools")),
)
# modprobe loads what these need as well. Nothing loads the VFIO modules but the hook.
MODULES = ("virtio_pci", "virtio_console", "e1000e", "vfio-pci", "vfio_iommu_type1")
MODULE_LISTS = ("modules.order", "modules.builtin", "modules.builtin.modinfo")
CONTAINER_ROOT = "containers/dpdk"
TESTPMD = Path("/usr/bin/dpdk-testpmd")
DPDK_DRIVERS = ("librte_bus_pci.so", "librte_mempool_ring.so", "librte_net_e1000.so")
XZ_MAGIC = b"\xfd7zXZ\x00"
DIRECTORIES = ("dev", "proc", "sys", "run", "tmp", "etc", "root", "mnt")
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Image:
    """The files for QEMU, below one directory of the cache."""

    place: Path

    @property
    def kernel(self) -> Path:
        """Return the kernel as an ELF file: to unpack a bzImage takes an emulated machine very long."""
        return self.place / "vmlinux"

    @property
    def initramfs(self) -> Path:
        """Return the initramfs, which is not compressed, for the same reason."""
        return self.place / "initramfs"

    @property
    def sizes(self) -> Path:
        """Return the file with the sizes of the parts."""
        return self.place / "sizes"


def find_image() -> Image:
    """Return the image inside the outer machine, where nothing can be made: tests/run has named it."""
    return Image(Path(os.environ[ENVIRONMENT]))


def make_environment(files: Iterable[Path]) -> dict[str, str]:
    """Return what the tests in these files find in their environment: the image, if any of them is the chain's."""
    return {ENVIRONMENT: str(ensure_image().place)} if any(file.parent == HERE for file in files) else {}


def ensure_image() -> Image:
    """Return the image for the tree as it is, made if it is not there."""
    provision.ensure_packages(PACKAGES)
    layers = packages.ensure_installed()
    kernel = provision.ensure_kernel()
    sources = [path.read_text() for path in (HERE / "image.py", HERE / "init", HERE / "agent")]
    location = provision.find_cache() / f"chain-{make_stamp(str(layers[0]), kernel.release, *sources)}"
    if not location.exists():
        with locked(location):
            if not location.exists():
                packages.forget_old("chain-*")
                make_image(location, layers, kernel)
    return Image(location)


def make_image(place: Path, layers: tuple[Path, ...], kernel: provision.Kernel) -> None:
    """Make kernel and initramfs."""
    say("making the inner machine's kernel and initramfs")
    started = time.monotonic()
    partial = make_partial(place)
    (partial / "vmlinux").write_bytes(unpack_kernel(kernel.image.read_bytes()))
    tree = partial / "tree"
    sizes = fill_tree(tree, layers, kernel)
    with (partial / "initramfs").open("wb") as file:
        write_cpio(tree, file)
    shutil.rmtree(tree)
    sizes["in all"] = (partial / "initramfs").stat().st_size
    lines = [f"{size / MEGABYTE:6.1f} MB {name}" for name, size in sizes.items()]
    (partial / "sizes").write_text("\n".join(lines) + "\n")
    partial.rename(place)
    for line in lines:
        say(f"  {line}")
    say(f"  done in {time.monotonic() - started:.0f} s")


def unpack_kernel(image: bytes) -> bytes:
    """Return the ELF file in a bzImage that is packed with xz, as Debian's are. Raises MissingError."""
    start = image.find(XZ_MAGIC)
    if start < 0:
        raise provision.MissingError("the kernel's image holds nothing packed with xz")
    return lzma.LZMADecompressor().decompress(image[start:])


def fill_tree(tree: Path, layers: tuple[Path, ...], kernel: provision.Kernel) -> dict[str, int]:
    """Make the initramfs as a directory and return the size of each part in bytes."""
    for directory in ("usr/bin", "usr/sbin", "usr/lib64", *DIRECTORIES):
        (tree / directory).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    sizes: dict[str, int] = {}

    def note(part: str) -> None:
        sizes[part] = measure(tree) - sum(sizes.values())

    copy_installed(tree, layers, RUNTIMES)
    note("runc, crun and their libraries")
    copy_installed(tree, layers, PYTHON)
    note("Python")
    copy_installed(tree, layers, HOOK)
    note("the guest hook itself")
    copy_installed(tree, layers, (*HELPERS, PACKAGES_OF_PYTHON), LOADED_LATER)
    note("what the hook needs beside: kmod, jsonschema, pyudev, tenacity")
    add_modules(tree, kernel, MODULES)
    note("kernel modules")
    add_busybox(tree)
    for name in ("init", "agent"):
        shutil.copy(HERE / name, tree / name)
    (tree / "etc/oci-vfio-hooks").mkdir()
    (tree / "etc/oci-vfio-hooks/guest.toml").write_text(SETTINGS)
    note("busybox, init, agent")
    add_container_root(tree / CONTAINER_ROOT)
    note("the containers' root: testpmd and its libraries")
    return sizes


def copy_installed(
    tree: Path, layers: tuple[Path, ...], paths: tuple[str, ...], libraries: tuple[str, ...] = ()
) -> None:
    """Copy these files and directories of the root with the DEBs, and the libraries of all programs in them."""
    script = """
        for path in "$@"; do find "$path" -name '*.so' -o -type f -perm /111; done >/tmp/programs
        # Below /usr, where /lib leads to.
        xargs ldd </tmp/programs 2>/dev/null | grep -o '/lib[^ :]*[.]so[^ :]*' |
            sed 's,^/lib,/usr/lib,' | sort -u >/tmp/libraries
        # Each under the name it is asked for by, and what that is a link to.
        { printf '%s\\n' "$@"; cat /tmp/libraries; } >/tmp/paths
        xargs realpath </tmp/paths >/tmp/targets
        sort -u /tmp/paths /tmp/targets | xargs cp -a --parents -t /mnt/tree
    """
    with tempfile.TemporaryDirectory(prefix="chain-") as scratch:
        root = Root(layers, Path(scratch), ((tree, "/mnt/tree"),))
        root.run("sh", "-ec", f"rm -r {' '.join(LEFT_OUT)}\n{script}", "sh", *paths, *libraries)


def add_modules(tree: Path, kernel: provision.Kernel, modules: Iterable[str] = MODULES) -> None:
    """Add these modules and those that they need, with an index of just these."""
    source = kernel.image.parent.parent
    wanted = run(["modprobe", "-d", str(source), "-S", kernel.release, "--show-depends", "-a", *modules])
    for line in wanted.splitlines():
        kind, _, path = line.partition(" ")
        if kind == "insmod":
            copy_below(Path(path.strip()).relative_to(source), source, tree)
    for name in MODULE_LISTS:
        copy_below(Path("lib/modules", kernel.release, name), source, tree)
    run([provision.DEPMOD, "-b", str(tree), kernel.release])


def copy_below(path: Path, source: Path, tree: Path) -> None:
    """Copy one file from a tree to the same place in another."""
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / path, tree / path)


def add_busybox(tree: Path) -> None:
    """Add busybox and all its commands that nothing else has put there."""
    shutil.copy("/bin/busybox", tree / "usr/bin/busybox")
    for command in run(["/bin/busybox", "--list"]).split():
        if not any(
            (tree / "usr" / part / command).is_symlink() or (tree / "usr" / part / command).exists()
            for part in ("bin", "sbin")
        ):
            (tree / "usr/bin" / command).symlink_to("busybox")


def add_container_root(root: Path) -> None:
    """Make the containers' root: a shell, testpmd, its libraries, and DPDK's driver for the NIC."""
    for directory in ("usr/bin", "usr/lib64", "dev", "proc", "sys", "tmp", "etc"):
        (root / directory).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    shutil.copy("/bin/busybox", root / "usr/bin/busybox")
    for command in ("sh", "ls", "cat", "readlink", "sleep", "true", "ip"):
        (root / "usr/bin" / command).symlink_to("busybox")
    (drivers,) = Path(LIBRARIES, "dpdk").glob("pmds-*")
    for program in (TESTPMD, *(drivers / driver for driver in DPDK_DRIVERS)):
        copy_file(str(program), root)
        for word in run(["ldd", str(program)]).split():
            if word.startswith("/"):
                copy_file(f"/usr{word}" if word.startswith("/lib") else word, root)


def copy_file(path: str, root: Path) -> None:
    """Copy a file of this machine to the same path below a root, a link as a link.

    Some of DPDK's drivers are both linked to and loaded by name, and must be the same file both times.
    """
    real = os.path.realpath(path)
    for name in {path, real}:
        (root / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(real, root / real.lstrip("/"))
    link = root / path.lstrip("/")
    if real != path and not link.exists() and not link.is_symlink():
        link.symlink_to(real)


def measure(tree: Path) -> int:
    """Return the size of all regular files below a directory, in bytes."""
    return sum(path.lstat().st_size for path in packages.list_files(tree) if not path.is_symlink())


def write_cpio(tree: Path, file: BinaryIO) -> None:
    """Write a directory as the archive that the kernel reads (Documentation/driver-api/early-userspace)."""
    for number, path in enumerate([*sorted(tree.rglob("*")), None]):
        if path is None:
            write_entry(file, number, "TRAILER!!!", 0, b"")
            return
        mode = path.lstat().st_mode
        data = b""
        if stat.S_ISLNK(mode):
            data = os.readlink(path).encode()
        elif stat.S_ISREG(mode):
            data = path.read_bytes()
        write_entry(file, number, str(path.relative_to(tree)), mode, data)


def write_entry(file: BinaryIO, number: int, name: str, mode: int, data: bytes) -> None:
    """Write one file of the archive: a header of thirteen numbers, the name, the contents, each filled up to four."""
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    for part in (header + encoded, data):
        file.write(part + b"\0" * (-len(part) % 4))
