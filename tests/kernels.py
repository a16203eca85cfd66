# SPDX-License-Identifier: Apache-2.0
"""The kernels that a machine can be booted with: Debian's, and our own, built from Debian's source.

No Debian kernel has iommufd, VFIO's device nodes or its no-IOMMU mode. And theirs boot in several times the seconds
of one that has nothing in it but what the tests need, all built in. What to configure: tests/vm/kernels.
Standard library only, like provision.py.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests import provision
from tests.progress import PROGRESS
from tests.provision import DEPMOD, REPOSITORY, Kernel, MissingError, find_cache, locked, make_partial, make_stamp, run

FRAGMENTS = REPOSITORY / "tests/vm/kernels"
# Debian's source package, and the release that has it. The same version for everybody, as long as the mirror has it.
SOURCE_SUITE = "trixie"
SOURCE_PACKAGE = "linux-source-6.12"
SOURCE_VERSION = "6.12.118-1"
PACKAGES = {
    "gcc": "compiling the tests' own kernel",
    "make": "compiling the tests' own kernel",
    "bc": "compiling the tests' own kernel",
    "bison": "compiling the tests' own kernel",
    "flex": "compiling the tests' own kernel",
    "libc6-dev": "compiling the tests' own kernel",
    "libelf-dev": "compiling the tests' own kernel",
    "xz-utils": "unpacking the kernel's source",
}
# Compiling takes 6 minutes on two processors (12 of one), and several times that where others are at work as well.
BUILD_LIMIT = 3600.0


@dataclass(frozen=True)
class Recipe:
    """A kernel of our own. fragments: files of tests/vm/kernels, each laid over those before it and allnoconfig."""

    about: str
    fragments: tuple[str, ...]


# In this order from one tree: each is an incremental build after the first.
OWN_KERNELS = {
    "full": Recipe("everything the tests need, and every VFIO option that Debian leaves out", ("full.config",)),
    "no-group": Recipe(
        "as full, without VFIO_GROUP: devices have their own nodes only", ("full.config", "no-group.config")
    ),
}
KERNELS = {
    **{version: f"Debian's, from {suite}" for version, suite in provision.KERNEL_SUITES.items()},
    **{name: recipe.about for name, recipe in OWN_KERNELS.items()},
}


def ensure_kernel(name: str) -> Kernel:
    """Return the kernel of this name, Debian's unpacked or our own built, in the cache."""
    if name not in OWN_KERNELS:
        return provision.ensure_kernel(name)
    place = find_own_kernels()
    if not place.exists():
        provision.ensure_packages(PACKAGES)
        place = find_own_kernels()
        with locked(place):
            if not place.exists():
                build_kernels(place)
    (image,) = (place / name).glob("boot/vmlinuz-*")
    return Kernel(name, image.name.split("-", 1)[1], image)


def are_built() -> bool:
    """Return whether our own kernels are in the cache. Nobody's test run compiles them: tests/vm/kernel does."""
    return find_own_kernels().exists()


def find_fast_kernel() -> str:
    """Return what files of tests boot that ask for no kernel by name: our own where it was built, else Debian's."""
    return "full" if are_built() else provision.DEFAULT_KERNEL


def find_own_kernels() -> Path:
    """Return where our own kernels are when they are built: another place for another source, fragment or compiler."""
    compiler = run(["gcc", "--version"]).splitlines()[0] if shutil.which("gcc") else ""
    texts = [path.read_text() for path in sorted(FRAGMENTS.glob("*.config"))]
    recipes = [f"{name} {recipe.fragments}" for name, recipe in OWN_KERNELS.items()]
    return find_cache() / f"kernels-own-{make_stamp(SOURCE_VERSION, compiler, *recipes, *texts)}"


def build_kernels(place: Path) -> None:
    """Build all of our own kernels from one tree, and forget the tree."""
    partial = make_partial(place)
    with PROGRESS.step("kernel source", f"getting {SOURCE_PACKAGE} from {SOURCE_SUITE}"):
        tree = unpack_source(partial / "source")
    for name, recipe in OWN_KERNELS.items():
        with PROGRESS.step(f"kernel {name}", f"compiling the kernel {name}: {recipe.about}"):
            configure(tree, recipe)
            compile_kernel(tree, name, partial / name)
    shutil.rmtree(partial / "source")
    forget_old(place)
    partial.rename(place)


def unpack_source(directory: Path) -> Path:
    """Return the source's tree, unpacked in a new directory. A version that the mirror has no more: the newest."""
    directory.mkdir()
    options = provision.read_apt_options(SOURCE_SUITE)
    download = ["apt-get", *options, "-q", "download"]
    try:
        run([*download, f"{SOURCE_PACKAGE}={SOURCE_VERSION}"], cwd=directory)
    except MissingError:
        provision.say(f"  {SOURCE_PACKAGE} {SOURCE_VERSION} is not to be had: the newest")
        run([*download, SOURCE_PACKAGE], cwd=directory)
    (archive,) = directory.glob("*.deb")
    run(["dpkg-deb", "-x", str(archive), str(directory)])
    archive.unlink()
    packed = directory / f"usr/src/{SOURCE_PACKAGE}.tar.xz"
    run(["tar", "-xJf", str(packed), "-C", str(directory)])
    packed.unlink()
    return directory / SOURCE_PACKAGE


def configure(tree: Path, recipe: Recipe) -> None:
    """Write a .config of nothing but the recipe's fragments. Raises MissingError for a line that had no effect."""
    text = "".join((FRAGMENTS / name).read_text() for name in recipe.fragments)
    wanted = read_options(text)
    fragment = tree.parent / "all.config"
    fragment.write_text("".join(f"{line}\n" for line in wanted.values()))
    make(tree, f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig")
    taken = set((tree / ".config").read_text().splitlines())
    lost = [line for line in wanted.values() if line not in taken and not is_absence(line, taken)]
    if lost:
        raise MissingError(f"this kernel did not take, for want of another option: {', '.join(lost)}")


def read_options(text: str) -> dict[str, str]:
    """Return the options of a fragment's text, each with its line; the last line for one counts."""
    lines = re.findall(r"^(?:# )?(CONFIG_\w+)(=.*| is not set)$", text, re.MULTILINE)
    return {name: f"# {name}{rest}" if rest.startswith(" ") else f"{name}{rest}" for name, rest in lines}


def is_absence(line: str, taken: set[str]) -> bool:
    """Return whether a line wants an option unset that is in no other way in what the kernel took."""
    name = line.split()[1] if line.startswith("# ") else ""
    return bool(name) and not any(other.startswith(f"{name}=") for other in taken)


def compile_kernel(tree: Path, name: str, place: Path) -> None:
    """Compile what a tree is configured for, and put image and list of what is built in where virtme-ng looks."""
    version = f"LOCALVERSION=-{name}"
    # With nothing to identify the build by: the same sources make the same kernel.
    make(tree, version, "KBUILD_BUILD_USER=rig", "KBUILD_BUILD_HOST=rig", "bzImage", "modules")
    release = run(["make", "-s", version, "kernelrelease"], cwd=tree).strip()
    boot = place / "boot"
    boot.mkdir(parents=True)
    shutil.copy(tree / "arch/x86/boot/bzImage", boot / f"vmlinuz-{release}")
    shutil.copy(tree / ".config", boot / f"config-{release}")
    # modprobe and the hooks read there that the drivers are built in.
    make(tree, version, f"INSTALL_MOD_PATH={place}", f"DEPMOD={DEPMOD}", "modules_install")
    for link in ("build", "source"):
        (place / "lib/modules" / release / link).unlink(missing_ok=True)


def make(tree: Path, *arguments: str) -> None:
    """Run make with as many jobs as there are processors, a little behind whatever else is at work.

    Not far behind: tests wait for it.
    """
    jobs = len(os.sched_getaffinity(0))
    run(["nice", "-n", "2", "make", "-s", f"-j{jobs}", *arguments], cwd=tree, limit=BUILD_LIMIT)


def forget_old(place: Path) -> None:
    """Remove kernels of earlier recipes that no run of the last hours can be using."""
    for old in place.parent.glob("kernels-own-*"):
        if old.is_dir() and old != place and time.time() - old.stat().st_mtime > 7200:
            shutil.rmtree(old)


def main(arguments: list[str]) -> int:
    """Make the kernels of these names ready, our own if there are none, and print the paths of their images."""
    if not set(arguments) <= set(KERNELS):
        print(
            "\n".join(
                ["usage: tests/vm/kernel [NAME...]", *(f"    {name:10} {about}" for name, about in KERNELS.items())]
            )
        )
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        for name in arguments or OWN_KERNELS:
            print(ensure_kernel(name).image)
    except MissingError as error:
        return provision.die(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
