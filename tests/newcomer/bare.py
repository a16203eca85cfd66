# SPDX-License-Identifier: Apache-2.0
"""A newcomer's machine: Debian's smallest root as `/`, and a clean clone of the work tree in it, nothing else.

How it is made (all of it was tried; what is cheaper hides something):

* debootstrap makes the root once (tests/packages.py); overlayfs takes what a test changes.
* A namespace of mounts and one of processes, and pivot_root in place of chroot: nothing of this machine is left to be
  found by accident, user namespaces work (the kernel refuses them in a chroot), and no process outlives the test.
* virtme-ng exports `/` to its virtual machine by 9p. That is the bare root then: the machine in it sees no library,
  no program and no cache but what the line under test has put there. QEMU emulates, as everywhere.
* apt reaches the mirror as here, by name server, proxy and mirror of this machine; pip by this machine's certificates
  and index. Packages that an earlier run has loaded lie in apt's own cache (a layer below), not installed.
* The clone is what git lists in the work tree, changes and new files included: no .git, nothing ignored, no cache.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests import packages
from tests.provision import REPOSITORY, find_cache, list_tree, run

PACKAGES = {"git": "which files a clone has", "debootstrap": "a newcomer's root"}
# Where a newcomer has his clone.
CLONE = "/root/oci-vfio-hooks"
ARCHIVES = "var/cache/apt/archives"
# This machine's settings to reach PyPI, or a mirror behind a proxy.
HANDED_ON = ("http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_DEFAULT_TIMEOUT")
CERTIFICATES = "opt/way-out/certificates.pem"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "TERM": "dumb"}
# Lines of a command's output that a failure quotes.
LINES_QUOTED = 60


@dataclass(frozen=True)
class Done:
    """The result of a command. seconds: its duration."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    def quote(self) -> str:
        """Return the last lines of what it printed."""
        lines = [*self.stdout.splitlines(), *self.stderr.splitlines()]
        return "\n".join([f"ended with {self.code} after {self.seconds:.0f} s:", *lines[-LINES_QUOTED:]])


@dataclass(frozen=True)
class Bare:
    """A newcomer's machine. layers: of its root, the topmost first; changes: what is changed in it."""

    layers: tuple[Path, ...]
    changes: Path

    def run(self, *command: str, limit: float = 300.0, code: int | None = 0, **environment: str) -> Done:
        """Run a command in the clone's directory to its end.

        limit: seconds after which it is killed; code: the exit code it must end with, None for any.
        """
        started = time.monotonic()
        with self.start(*command, **environment) as process:
            try:
                out, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                err += f"killed after its limit of {limit:.0f} s"
        done = Done(process.returncode, out, err, time.monotonic() - started)
        if code is not None and done.code != code:
            raise AssertionError(f"`{shlex.join(command)}` {done.quote()}")
        return done

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command in the clone's directory, in a process group of its own. All that it starts ends with it."""
        leash = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]
        leash += ["--pid", "--fork", "--kill-child"]
        return subprocess.Popen(
            [*leash, "sh", "-ec", self.make_script(), "sh", *command],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**ENVIRONMENT, **self.make_way_out(), **environment},
        )

    def make_script(self) -> str:
        """Return the shell script that makes the root `/` and runs its arguments there, not as the first process."""
        top, work, location = (self.changes / name for name in ("top", "work", "root"))
        layers = f"lowerdir={':'.join(map(str, self.layers))},upperdir={top},workdir={work}"
        return "\n".join(
            [
                f"mount -t overlay -o {layers} root {location}",
                f"mount -t proc proc {location}/proc",
                f"mount --rbind /dev {location}/dev",
                f"mount --rbind /sys {location}/sys",
                f"cd {location}",
                "pivot_root . .",
                "umount -l .",
                f'exec sh -c \'cd {CLONE}; "$@"; exit $?\' sh "$@"',
            ]
        )

    def make_way_out(self) -> dict[str, str]:
        """Return what pip and apt find in their environment."""
        found = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
        return {**found, "PIP_CERT": f"/{CERTIFICATES}"} if (self.changes / "top" / CERTIFICATES).exists() else found

    def keep_archives(self) -> None:
        """Give the packages that apt has loaded to the runs that come."""
        store = find_archives() / ARCHIVES
        for path in (self.changes / "top" / ARCHIVES).glob("*.deb"):
            if path.is_file() and not (store / path.name).exists():
                partial = store / "partial" / f"{path.name}.{os.getpid()}"
                shutil.copy(path, partial)
                partial.rename(store / path.name)


def make_bare(name: str, changes: Path) -> Bare:
    """Return a machine made of one of packages.BARE_ROOTS, with a clone in it; changes: an empty directory for it."""
    for directory in ("work", "root", f"top{CLONE}", "top/etc/apt/apt.conf.d", f"top/{CERTIFICATES}/.."):
        os.makedirs(os.path.normpath(changes / directory), exist_ok=True)
    copy_clone(changes / f"top{CLONE}")
    shutil.copy("/etc/resolv.conf", changes / "top/etc/resolv.conf")
    proxies = [line for line in run(["apt-config", "dump"]).splitlines() if line.startswith("Acquire::http")]
    (changes / "top/etc/apt/apt.conf.d/99way-out").write_text("\n".join([*proxies, ""]))
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    if certificates:
        shutil.copy(certificates, changes / "top" / CERTIFICATES)
    return Bare((find_archives(), packages.ensure_root(name)), changes)


def find_archives() -> Path:
    """Return the layer with the packages that apt has loaded in earlier runs."""
    layer = find_cache() / "archives-bare"
    (layer / ARCHIVES / "partial").mkdir(parents=True, exist_ok=True)
    return layer


def copy_clone(target: Path) -> None:
    """Copy what git lists of the work tree: what a clone of it would have if all were committed."""
    for name in list_tree():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target / name, follow_symlinks=False)
