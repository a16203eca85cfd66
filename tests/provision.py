# SPDX-License-Identifier: Apache-2.0
"""Install what the tests and the demo need on this machine.

Everything that is not a Debian package is in one cache directory outside the repository. Each piece is made under
another name and renamed when it is whole, so that a run that was broken off leaves nothing that looks finished.
Standard library only: this runs before anything else is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.progress import PROGRESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

REPOSITORY = Path(__file__).resolve().parent.parent
# The interpreter the hooks run under on Debian; another `python` may come first on PATH.
PYTHON = "/usr/bin/python3"
# Not on the PATH of everybody who may run it.
DEPMOD = "/usr/sbin/depmod"
DEBIAN_MIRROR = "http://deb.debian.org/debian"
DEBIAN_SECURITY_MIRROR = "http://deb.debian.org/debian-security"
DEBIAN_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# Each package with its purpose, which a user needs to know if it is missing.
RIG_PACKAGES = {
    "qemu-system-x86": "the virtual machine",
    "busybox-static": "virtme-ng's initramfs",
    "file": "virtme-ng asks it for the kernel's version",
    "kmod": "kernel modules",
    "udev": "device events in the virtual machine",
    "iproute2": "network interfaces in the virtual machine",
    "python3-venv": "virtme-ng comes from PyPI",
    "runc": "a container runtime",
    "crun": "another container runtime",
    "debootstrap": "the containers' root file system",
}
TEST_PACKAGES = {
    **RIG_PACKAGES,
    "driverctl": "what people rebind devices with today",
    "bpftool": "device cgroup programs, seen from outside",
    "e2fsprogs": "a file system on a disk that must not be taken, and of Kata's guest images",
    "erofs-utils": "the other file system of Kata's guest images",
    "fakeroot": "Kata's guest images without root",
    "fdisk": "partition tables of Kata's guest images",
    "cpio": "initrds of Kata's guests",
    "zstd": "initrds of Kata's guests",
    "btrfs-progs": "a file system whose numbers are not those of its mount",
    "dmsetup": "a volume on a disk that must not be taken",
    "podman": "a container engine that knows hooks.d",
    "procps": "processes",
    "locales": "character maps, for tests of odd encodings",
    "git": "which files are the tree's: packages are named by their contents",
    "strace": "which files a hook opens",
    "linux-libc-dev": "the numbers of system calls and capabilities",
    "patchelf": "the guest add-on's own interpreter",
    "python3-jsonschema": "the hooks' own dependency",
    "python3-pyudev": "the hooks' own dependency",
    "python3-tenacity": "the hooks' own dependency",
}

RIG_REQUIREMENTS = ("virtme-ng>=1.42",)
TEST_REQUIREMENTS = (
    "pytest>=7.4",
    "pytest-timeout>=2.1",
    "pyfakefs>=5.3",
    "hypothesis>=6.80",
    # A newer one finds more, which belongs to who takes it up, not to the next change that is sent.
    "ruff>=0.12,<0.18",
    "mypy>=1.11,<2.5",
    "types-jsonschema>=4.20",
    "jsonschema>=3.2",
    "pyudev>=0.22",
    "tenacity>=6.2",
    "tomli>=1.1",
    # The peer of the NRI plugin's own codec.
    "protobuf>=4",
    "types-protobuf>=4",
)

# What lint runs on the documents. The tests do without, and so does a machine that only runs tests.
DOCUMENT_REQUIREMENTS = ("codespell>=2.3,<3", "mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "docutils>=0.20")

# The root file system that containers get: Debian's smallest with a Python that can run a probe.
ROOTFS_PACKAGES = {"probe": ("python3-minimal",)}

# Kernels the virtual machine can boot, and the Debian release each comes from.
KERNEL_SUITES = {"6.1": "bookworm", "6.12": "trixie", "arm64": "bookworm"}
DEFAULT_KERNEL = "6.1"
# Those that are for another processor than this machine's.
KERNEL_ARCHITECTURES = {"arm64": "arm64"}

# As in .gitignore, and git's own: a directory, in a second work tree a file.
MADE_HERE = re.compile(r"/(\.git$|(\.[a-z]+_cache|\.git|\.hypothesis|__pycache__|[^/]*\.egg-info)/)|^/(build|dist)/")
# No command that is run here (apt, debootstrap, pip) takes as many seconds on the slowest mirror that was seen.
COMMAND_LIMIT = 1800.0


class MissingError(Exception):
    """A requirement is missing and cannot be installed. The text names the remedy."""


def say(text: str) -> None:
    """Print the current step, without buffering."""
    PROGRESS.say(text)


def list_tree() -> list[str]:
    """Return the names of all files of the work tree that a clone would have if all were committed, sorted.

    Without git, as in an unpacked tarball: all files but what is made here.
    """
    command = [
        "git",
        "-c",
        f"safe.directory={REPOSITORY}",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    if (REPOSITORY / ".git").exists() and shutil.which("git"):
        names = run(command, cwd=REPOSITORY).split("\0")
    else:
        paths = [Path(top, name) for top, _, files in os.walk(REPOSITORY) for name in files]
        names = [str(path.relative_to(REPOSITORY)) for path in paths]
        names = [name for name in names if not MADE_HERE.search(f"/{name}")]
    # What is deleted and not committed yet is still listed.
    return sorted(name for name in names if name and os.path.lexists(REPOSITORY / name))


def find_cache() -> Path:
    """Return the cache directory, made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cache = Path(base) / "oci-vfio-hooks"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def run(
    command: Sequence[str], cwd: Path | None = None, env: dict[str, str] | None = None, limit: float | None = None
) -> str:
    """Run a command to its end and return its standard output. Raises MissingError with its output if it fails.

    limit: seconds that it has, if not COMMAND_LIMIT.
    """
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=limit or COMMAND_LIMIT,
        )
    except FileNotFoundError as error:
        raise MissingError(f"{command[0]}: command not found") from error
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"`{shlex.join(command)}` did not end in {limit or COMMAND_LIMIT:.0f} s") from error
    PROGRESS.note(f"$ {shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise MissingError(f"`{shlex.join(command)}` ended with {done.returncode}:\n{tail}")
    return done.stdout


def run_twice(command: Sequence[str], clear: Callable[[], None] = lambda: None) -> str:
    """Run a command that asks a mirror, once more when it fails: a mirror that is being updated does.

    clear: takes away what the first time has left.
    """
    try:
        return run(command)
    except MissingError as error:
        say(f"  once more: {error}")
        clear()
        return run(command)


def find_missing_packages(names: Iterable[str]) -> list[str]:
    """Return those of the packages that are not installed."""
    wanted = list(names)
    listing = subprocess.run(
        ["/usr/bin/dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    installed = {line.split()[0] for line in listing.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in wanted if name not in installed]


def ensure_packages(packages: dict[str, str]) -> None:
    """Install the Debian packages that are missing. packages: name → what it is for."""
    missing = find_missing_packages(packages)
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() != 0:
        reasons = "\n".join(f"  {name}: {packages[name]}" for name in missing)
        raise MissingError(f"missing Debian packages:\n{reasons}\ninstall them as root: {shlex.join(command)}")
    if shutil.which("apt-get") is None:
        raise MissingError(f"there is no apt-get here: what is needed is named as in Debian: {' '.join(missing)}")
    with PROGRESS.step("package lists", "getting apt's package lists"):
        run_twice(["apt-get", "update", "-q"])
    what = f"installing {len(missing)} Debian packages{measure_packages(missing)}: {' '.join(missing)}"
    with PROGRESS.step("packages", what):
        # A fresh machine may be at its own updates.
        run_twice([*command, "-o", "DPkg::Lock::Timeout=600"])


def measure_packages(names: Sequence[str]) -> str:
    """Return how much apt will load and how much room that takes, for the middle of a line; empty where it isn't known.

    apt prints it when it has to ask, and the answer is no.
    """
    command = ["apt-get", "install", "--assume-no", "--no-install-recommends", *names]
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=COMMAND_LIMIT)
    load = re.search(r"^Need to get (\S+ [kMG]?B)[ /]", done.stdout, re.MULTILINE)
    room = re.search(r"^After this operation, (\S+ \S+) of additional disk space", done.stdout, re.MULTILINE)
    return f" ({load[1]} to load, {room[1]} on disk)" if load and room else ""


def make_stamp(*parts: str) -> str:
    """Return a short name for what something is made of: another recipe, another directory."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold the right to make a place in the cache: two runs may need the same at the same time."""
    with (find_cache() / f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except BaseException:
            # Broken off, by Ctrl-C too: half a root is of no use, and large.
            shutil.rmtree(place.with_name(f"{place.name}.partial"), ignore_errors=True)
            raise


def find_venv(name: str, requirements: Sequence[str]) -> Path:
    """Return the path of the virtual environment of that name."""
    version = run([PYTHON, "-c", "import sys; print(sys.version)"])
    return find_cache() / f"venv-{name}-{make_stamp(version, *requirements)}"


def ensure_venv(name: str, requirements: Sequence[str]) -> Path:
    """Return a virtual environment of the system's Python that has the requirements."""
    location = find_venv(name, requirements)
    # A virtual environment knows its own path, so it is made in place and marked when it is whole.
    mark = location / "complete"
    if mark.exists():
        return location
    with locked(location):
        if not mark.exists():
            what = f"making a virtual environment with {', '.join(requirements)}"
            with PROGRESS.step(f"virtual environment {name}", what):
                shutil.rmtree(location, ignore_errors=True)
                run([PYTHON, "-m", "venv", str(location)])
                run_twice([str(location / "bin/pip"), "install", "--disable-pip-version-check", "-q", *requirements])
                mark.touch()
    return location


def find_rootfs(name: str = "probe") -> Path:
    """Return the path of the root file system of that name."""
    return find_cache() / f"rootfs-{name}-{make_stamp(*ROOTFS_PACKAGES[name])}"


def ensure_rootfs(name: str = "probe") -> Path:
    """Return the root file system for containers of this name, made once with debootstrap."""
    packages = ROOTFS_PACKAGES[name]
    location = find_rootfs(name)
    if location.exists():
        return location
    with locked(location):
        if not location.exists():
            make_rootfs(location, packages)
    return location


def make_rootfs(place: Path, packages: Sequence[str]) -> None:
    """Make a root file system of Debian's smallest and these packages."""
    what = f"making the containers' root file system with debootstrap: minbase, {', '.join(packages)}"
    with PROGRESS.step("root file system", what):
        partial = make_partial(place)
        run_debootstrap(partial, "bookworm", packages)
        for useless in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
            shutil.rmtree(partial / useless, ignore_errors=True)
        partial.rename(place)


def run_debootstrap(place: Path, suite: str, packages: Sequence[str]) -> None:
    """Make Debian's smallest root and these packages in an empty directory; once more when the mirror fails.

    In a mount namespace: what it mounts in there is gone with it, however it ends.
    """
    include = [f"--include={','.join(packages)}"] if packages else []
    command = ["debootstrap", "--variant=minbase", *include, suite, str(place), find_mirror()]
    command = ["unshare", "--mount", "--propagation", "private", *command]

    def clear() -> None:
        shutil.rmtree(place)
        place.mkdir()

    run_twice(command, clear)


def make_partial(place: Path) -> Path:
    """Return an empty directory next to a path, to be renamed to it. Remains of an aborted run are removed."""
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def find_mirror() -> str:
    """Return the mirror this machine gets Debian's packages from, so that only one has to be reachable."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Codename: bookworm", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    )
    uris = targets.stdout.split()
    return uris[0].rstrip("/") if uris else DEBIAN_MIRROR


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot. version: as in KERNEL_SUITES; release: as `uname -r` prints it; image: its bzImage."""

    version: str
    release: str
    image: Path


def ensure_kernel(version: str = DEFAULT_KERNEL) -> Kernel:
    """Return Debian's kernel of that version, unpacked in the cache.

    Not installed: that would run update-initramfs and touch /boot of a machine that only wants to run tests, and a
    kernel of another Debian release could not be installed at all.
    """
    location = find_cache() / f"kernel-{version}"
    if not location.exists():
        with locked(location):
            if not location.exists():
                unpack_kernel(location, version)
    (image,) = location.glob("boot/vmlinuz-*")
    return Kernel(version, image.name.split("-", 1)[1], image)


def unpack_kernel(place: Path, version: str) -> None:
    """Make the directory of a kernel."""
    suite = KERNEL_SUITES[version]
    with PROGRESS.step(f"kernel {version}", f"getting Debian's kernel {version} from {suite}"):
        partial = make_partial(place)
        unpack_package(partial, suite, KERNEL_ARCHITECTURES.get(version, "amd64"))
        partial.rename(place)


def unpack_package(partial: Path, suite: str, architecture: str) -> None:
    """Get the kernel's package of a Debian release and unpack it in a directory, its modules' index made."""
    options = read_apt_options(suite, architecture)
    package = find_kernel_package(options, architecture)
    run(["apt-get", *options, "-q", "download", package], cwd=partial)
    (archive,) = partial.glob("*.deb")
    run(["dpkg-deb", "-x", str(archive), str(partial)])
    archive.unlink()
    if not (partial / "lib").exists():
        # Since Debian 13 the modules are packed under /usr/lib, and depmod looks under /lib.
        (partial / "lib").symlink_to("usr/lib")
    release = package.split("-", 2)[2]
    run([DEPMOD, "-b", str(partial), release])


def find_kernel_package(apt_options: Sequence[str], architecture: str) -> str:
    """Return the name of the package that linux-image-amd64, or another architecture's, depends on today."""
    name = f"linux-image-{architecture}"
    for line in run(["apt-cache", *apt_options, "depends", name]).splitlines():
        name = line.rpartition(" ")[2]
        if "Depends:" in line and name.startswith("linux-image-"):
            return name
    raise MissingError(f"apt-cache does not know what linux-image-{architecture} depends on; try `apt-get update`")


def read_apt_options(suite: str, architecture: str = "amd64") -> list[str]:
    """Return the options by which apt sees this Debian release and nothing else, its lists fresh.

    The machine's own apt is left as it is: sources, lists and state of their own, in the cache.
    """
    apt = find_cache() / "apt" / (suite if architecture == "amd64" else f"{suite}-{architecture}")
    (apt / "lists/partial").mkdir(parents=True, exist_ok=True)
    (apt / "archives/partial").mkdir(parents=True, exist_ok=True)
    sources = apt / "sources.list"
    signed = f"[signed-by={DEBIAN_KEYRING} arch={architecture}]"
    sources.write_text(
        f"deb {signed} {find_mirror()} {suite} main\ndeb {signed} {DEBIAN_SECURITY_MIRROR} {suite}-security main\n"
    )
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "Dir::Etc::sourcelist": str(sources),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": str(apt / "lists"),
        "Dir::State::status": "/dev/null",
        "Dir::Cache": str(apt),
        # Nothing but the package lists: translations are half of what apt-get update loads.
        "Acquire::Languages": "none",
        # root's cache directory is not readable for the user _apt.
        "APT::Sandbox::User": "root",
    }
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    run(["apt-get", *options, "-q", "update"])
    return options


def ensure_cdi_check() -> Path:
    """Return the program of tests/cdi: CDI's own package, in the version of go.mod, built with Go.

    Debian's Go, where no other is on the PATH. The modules come from the Go module proxy, held to go.sum.
    """
    source = REPOSITORY / "tests/cdi"
    stamp = make_stamp(*(path.read_text() for path in sorted(source.iterdir())))
    place = find_cache() / f"cdi-check-{stamp}"
    if not place.exists():
        with locked(place):
            if not place.exists():
                if not shutil.which("go"):
                    ensure_packages({"golang-go": "CDI's own package, which judges the CDI files"})
                with PROGRESS.step("CDI's own package", "getting and building CDI's own package"):
                    partial = make_partial(place)
                    work = find_cache() / "go"
                    environment = {"GOPATH": str(work), "GOCACHE": str(work / "build"), "GOFLAGS": "-mod=readonly"}
                    command = ["go", "build", "-buildvcs=false", "-o", str(partial / "cdi-check"), "."]
                    run(command, cwd=source, env=environment)
                    partial.rename(place)
    return place / "cdi-check"


def ensure_promtool() -> Path:
    """Return Prometheus' own promtool, unpacked from Debian's package: installed, that would start a server."""
    place = find_cache() / "promtool-bookworm"
    if not place.exists():
        with locked(place):
            if not place.exists():
                with PROGRESS.step("promtool", "getting Debian's promtool"):
                    partial = make_partial(place)
                    run(["apt-get", *read_apt_options("bookworm"), "-q", "download", "prometheus"], cwd=partial)
                    (archive,) = partial.glob("*.deb")
                    run(["dpkg-deb", "-x", str(archive), str(partial)])
                    archive.unlink()
                    partial.rename(place)
    return place / "usr/bin/promtool"


def is_rig_made() -> bool:
    """Return whether all is there that ensure_rig makes."""
    marks = (find_venv("rig", RIG_REQUIREMENTS) / "complete", find_cache() / f"kernel-{DEFAULT_KERNEL}", find_rootfs())
    return all(mark.exists() for mark in marks)


def ensure_rig() -> tuple[Kernel, Path]:
    """Return the usual kernel and root file system, with all other requirements of the rig, made in parallel."""
    with ThreadPoolExecutor() as candidates:
        venv = candidates.submit(ensure_venv, "rig", RIG_REQUIREMENTS)
        kernel = candidates.submit(ensure_kernel)
        rootfs = candidates.submit(ensure_rootfs)
        venv.result()
        return kernel.result(), rootfs.result()


def compile_hooks() -> None:
    """Byte-compile the package for the interpreter the hooks run under; the virtual machine sees it read-only."""
    run([PYTHON, "-m", "compileall", "-q", str(REPOSITORY / "oci_hooks")])


def die(error: MissingError) -> int:
    """Report what is missing and return the exit code for it."""
    print(f"tests: {error}", file=sys.stderr, flush=True)
    return 3
