# SPDX-License-Identifier: Apache-2.0
"""A Debian root with its container engines in the machine: its daemons, the images they get, the how-to's lines.

The root is pivoted into, in a mount namespace that lives as long as the tests: daemons and their clients see the same
sockets, and runc makes containers as on an installed system. There is no systemd in the machine: a small `systemctl`
restarts the daemons, and no network: containers have none.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.newcomer.lines import read_section
from tests.support.podman import CONTAINERS_CONF, make_storage_conf
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Done

HOWTO = bundles.REPOSITORY / "docs/howto"
EXAMPLES = "/usr/share/doc/oci-vfio-hooks/examples"
DEVICES = "io.katacontainers.x.vfio.devices"
IMAGE = "registry.example/probe:1"
PAUSE = "registry.example/pause:3.9"
# Prints its environment, opens each group that it sees, and names it: what no hook has allowed does not open.
PROGRAM = (
    "/bin/sh",
    "-c",
    "export -p; for g in /dev/vfio/[0-9]*; do [ -e $g ] && { : <>$g; } && echo opened $g; done; echo ran",
)
BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "sleep", "ls", "cat")
LIMIT = 240.0
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
MOUNTS = """\
mkdir -p $1 && mount -t tmpfs -o mode=0755 engine $1
mkdir -p $1/top $1/work $1/root
mount -t overlay -o lowerdir=$2,upperdir=$1/top,workdir=$1/work root $1/root
cd $1/root
mount -t proc proc proc && mount --rbind /dev dev && mount --rbind /sys sys
for place in run tmp var/lib/containerd var/lib/docker var/lib/containers; do
    mkdir -p $place && mount -t tmpfs -o mode=0755 $place $place
done
kernel=lib/modules/$(uname -r)
mkdir -p usr/$kernel run/udev mnt etc/oci-vfio-hooks
mount --bind $(readlink -f /$kernel) usr/$kernel
mount --bind /etc/oci-vfio-hooks etc/oci-vfio-hooks
pivot_root . mnt && cd / && umount -l /mnt
echo ready && exec sleep infinity
"""
# `systemctl restart NAME`: what the unit runs, without a network, where the last one has ended.
SYSTEMCTL = """\
#!/bin/sh
set -e
[ "$1" = restart ]
case $2 in
    containerd) command=containerd; ask="ctr version";;
    docker) command="dockerd --iptables=false --ip6tables=false --bridge=none"; ask="docker version";;
esac
log=/run/$2.log
if [ -e /run/$2.main ]; then
    kill $(cat /run/$2.main)
    tail --pid=$(cat /run/$2.main) -f /dev/null
fi
setsid $command </dev/null >>$log 2>&1 &
echo $! >/run/$2.main
for turn in $(seq 60); do
    $ask >/dev/null 2>&1 && exit 0
    kill -0 $(cat /run/$2.main) 2>/dev/null || break
    sleep 1
done
tail -20 $log >&2
exit 1
"""
# The default time limit is for machines that are not emulated.
CRICTL = """\
#!/bin/sh
exec /usr/bin/crictl --runtime-endpoint unix:///run/containerd/containerd.sock --timeout 120s "$@"
"""
STORAGE_CONF = make_storage_conf("overlay")


@dataclass(frozen=True)
class Engine:
    """A root with engines. holder: the process that keeps its namespace."""

    holder: subprocess.Popen[str]

    def run(self, *command: str, text: str | None = None) -> Done:
        """Run a command in it."""
        done = subprocess.run(
            [*self.enter(), "--", *command],
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            env=ENVIRONMENT,
            timeout=LIMIT,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def enter(self) -> list[str]:
        """Return what a command is prefixed with to run in it."""
        pid = self.holder.pid
        return ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--root=/proc/{pid}/root", f"--wd=/proc/{pid}/root"]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in it, which the caller waits for."""
        return subprocess.Popen(
            [*self.enter(), "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=ENVIRONMENT,
        )

    def type(self, line: str, where: str = EXAMPLES) -> Done:
        """Type a line of the how-to."""
        started = time.monotonic()
        done = self.run("sh", "-ec", f"cd {where}; {line}")
        print(f"$ {line}\n{done.stdout}{done.stderr}(exit {done.code}, {time.monotonic() - started:.0f} s)")
        return done

    def do(self, line: str) -> str:
        """Type a line that must succeed; return what it printed."""
        done = self.type(line)
        assert done.code == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: str, text: str, mode: str = "644") -> None:
        """Write a file in it."""
        done = self.run("install", "-D", "-m", mode, "/dev/stdin", path, text=text)
        assert done.code == 0, done.stderr

    def close(self) -> None:
        """End its daemons, and its namespace with its holder."""
        self.run("sh", "-c", "for file in /run/*.main; do kill $(cat $file); done; podman rm -fa")
        self.holder.kill()
        self.holder.wait()


def make_engine(place: Path, layers: str) -> Engine:
    """Mount a root of these layers, and start what keeps it."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", MOUNTS, "sh", str(place), layers]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    engine = Engine(holder)
    engine.write("/usr/local/bin/systemctl", SYSTEMCTL, "755")
    engine.write("/usr/local/bin/crictl", CRICTL, "755")
    engine.write("/etc/containers/containers.conf", CONTAINERS_CONF)
    engine.write("/etc/containers/storage.conf", STORAGE_CONF)
    for name, command_line in ((IMAGE, PROGRAM), (PAUSE, ("/bin/sleep", "3600"))):
        archive = make_image(name, command_line)
        Path(f"/proc/{holder.pid}/root/run/{name.split('/')[1].split(':')[0]}.tar").write_bytes(archive)
    return engine


def make_image(name: str, command: Sequence[str]) -> bytes:
    """Return an image as `docker save` writes it: busybox, and a command."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for directory in ("bin", "dev", "proc", "sys", "etc", "tmp"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        tar.add(BUSYBOX.resolve(), "bin/busybox")
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": list(command), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest(layer.getvalue())}"]},
    }
    text = json.dumps(config).encode()
    manifest = [{"Config": f"{digest(text)}.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    image = io.BytesIO()
    parts = ((f"{digest(text)}.json", text), ("layer.tar", layer.getvalue()))
    with tarfile.open(fileobj=image, mode="w") as tar:
        for path, data in (*parts, ("manifest.json", json.dumps(manifest).encode())):
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return image.getvalue()


def digest(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of some bytes."""
    from hashlib import sha256

    return sha256(data).hexdigest()


def read_howto(page: str, section: str) -> list[str]:
    """Return the lines of a section of a how-to; the examples' directory is where they are typed anyway."""
    lines = read_section(section, HOWTO / f"{page}.md")
    return [line for line in lines if line != f"cd {EXAMPLES}"]


def fill(line: str, **options: str) -> str:
    """Return a how-to's line with IMAGE as our image, PROGRAM left out: the image has one.

    options: `devices` for another value of the annotation; `more` put before IMAGE.
    """
    line = line.replace("IMAGE PROGRAM", f"{options.get('more', '')} {IMAGE}")
    return line.replace(f"{DEVICES}=auto", f"{DEVICES}={options.get('devices', 'auto')}")


def find_group() -> str:
    """Return the NIC's group, which its own driver has."""
    check_back()
    return guest.group_of(guest.find_device(devices.NIC_E1000E))


def check_opened(done: Done, group: str) -> None:
    """Raise AssertionError unless the container opened the group, and its own driver has the NIC again."""
    assert done.code == 0, done.stderr
    assert f"opened /dev/vfio/{group}" in done.stdout, done.stdout
    check_back()


def check_back() -> None:
    """Raise AssertionError unless the NIC's own driver has it; poststop may come a little later than the exit."""
    nic = guest.find_device(devices.NIC_E1000E)
    end = time.monotonic() + 60
    while guest.driver_of(nic) != "e1000e" and time.monotonic() < end:
        time.sleep(0.5)
    assert guest.driver_of(nic) == "e1000e"


def check_refused(done: Done, line: str) -> None:
    """Raise AssertionError unless it failed with the hook's line."""
    assert done.code != 0
    assert line in done.stdout + done.stderr, done.stdout + done.stderr
    check_back()


def quote(words: Sequence[str]) -> str:
    """Return words as a shell takes them."""
    return shlex.join(words)


def read_layers(name: str) -> str:
    """Return the layers of a root that the runner has made, as overlayfs takes them."""
    return os.environ[f"OCI_VFIO_{name.upper().replace('-', '_')}"]
