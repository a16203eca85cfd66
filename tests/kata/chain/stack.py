# SPDX-License-Identifier: Apache-2.0
"""Kata on a host: containerd with the genuine shim in a Debian root, its configuration, containers by ctr.

The host is the machine these tests run in. Its processor is QEMU's model of one with AMD's SVM: it has a /dev/kvm of
its own, and Kata's QEMU runs as it does on a server.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.chain import host
from tests.engines.engine import make_engine
from tests.kata.chain.image import CONTAINER_ROOT, ENVIRONMENT, KATA
from tests.vm import bundles, guest
from tests.vm.bundles import Done

# Seconds: for a whole container, its virtual machine included; a quiet machine takes 60.
LIMIT = 500.0
# Seconds that ctr has to end after QEMU, and where Kata's log shows that.
PATIENCE = 30.0
# Seconds that Kata's shim may take to clear away what it has made, when ctr has ended.
LEFT_LIMIT = 60.0
PROGRAMS = ("qemu-system", "virtiofsd", "shim-kata")
PLACES = "/run/vc/sbs /run/vc/vm /run/netns /run/kata-containers/shared/sandboxes"
QEMU_ENDED = "Stop logging QEMU"
CONSOLE_LINES = 60
# What came up so far answers at once.
MODULES = ("kvm_amd", "vhost_vsock", "vhost_net", "vfio-pci", "tun")
LOG = Path("/run/kata.log")
CONFIGURATION = "/etc/kata-containers/configuration.toml"
HOST_HOOK = "/usr/libexec/oci/hooks.d/vfio-host-check"
GUEST_HOOKS = "/usr/share/oci/hooks"
PROBE = ("/usr/bin/python3", "-I", "-S", "/vfio_probe.py")
DEVICES = "io.katacontainers.x.vfio.devices"
RUNTIME = "io.containerd.kata.v2"
# A guest that is emulated is slow: its agent has these seconds to come up, and to see a device.
CONFIGURATION_TEXT = """\
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
valid_hypervisor_paths = ["/usr/bin/qemu-system-x86_64"]
kernel = "/{kata}/vmlinux"
initrd = "/{kata}/initrd"
machine_type = "q35"
kernel_params = "{kernel_params}"
default_vcpus = 1
default_maxvcpus = 1
default_memory = 384
shared_fs = "virtio-fs"
virtio_fs_daemon = "/usr/local/bin/virtiofsd"
valid_virtio_fs_daemon_paths = ["/usr/local/bin/virtiofsd"]
virtio_fs_cache = "auto"
disable_image_nvdimm = true
enable_iommu = {enable_iommu}
hot_plug_vfio = "{hot_plug_vfio}"
cold_plug_vfio = "no-port"
pcie_root_port = 2
guest_hook_path = "{guest_hook_path}"
enable_annotations = ["enable_iommu"]
disable_selinux = true
disable_guest_selinux = true

[agent.kata]
kernel_modules = [{kernel_modules}]
dial_timeout = 350

[runtime]
internetworking_model = "none"
disable_new_netns = false
disable_guest_seccomp = true
sandbox_cgroup_only = false
vfio_mode = "{vfio_mode}"
create_container_timeout = 400
"""
# Debian 12 has the older of the two programs of that name, with other words for the same.
VIRTIOFSD = """\
#!/bin/sh
for word; do
    case $word in
        --shared-dir=*) source=${word#*=};;
        --fd=*) fd=${word#*=};;
    esac
done
exec /usr/lib/qemu/virtiofsd -f --syslog "--fd=$fd" -o "source=$source,cache=auto" --thread-pool-size=1
"""
# cgroup_no_v1 is Kata's default. Without noearly, the kernel looks at every PCI address three times over before it
# starts: a quarter of the time that an emulated guest takes to come up.
KERNEL_PARAMETERS = (
    "cgroup_no_v1=all",
    "mitigations=off",
    "no_timer_check",
    "pci=noearly",
    "swiotlb=1024",
    "audit=0",
    "agent.hotplug_timeout=90",
)
# The values in it that tests change.
USUAL = {
    "kata": KATA,
    "kernel_params": " ".join(KERNEL_PARAMETERS),
    "enable_iommu": "true",
    "guest_hook_path": GUEST_HOOKS,
    "kernel_modules": "",
    "vfio_mode": "guest-kernel",
    "hot_plug_vfio": "root-port",
}


class GuestError(Exception):
    """A virtual machine of Kata's did not come up, or hangs: emulated ones do now and then."""


class SystemLog:
    """What programs write to /dev/log, Kata's shim and QEMU's guest among them: nobody else listens in the machine."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        Path("/dev/log").unlink(missing_ok=True)
        self.socket.bind("/dev/log")
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        """Collect lines for ever, and write them to a file for who looks on."""
        with LOG.open("w") as file:
            while True:
                line = self.socket.recv(65536).decode(errors="replace").rstrip()
                self.lines.append(line)
                print(line, file=file, flush=True)

    def find(self, word: str, since: int = 0) -> list[str]:
        """Return the lines with a word, from a number on."""
        return [line for line in self.lines[since:] if word in line]


class Stack:
    """The host: containerd with Kata, and what its programs log."""

    def __init__(self) -> None:
        bundles.write_settings()
        subprocess.run(["modprobe", "-a", *MODULES], check=True)
        # QEMU maps all of a guest's memory for the devices, which counts as locked.
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self.log = SystemLog()
        self.engine = make_engine(Path("/run/engine"), os.environ[ENVIRONMENT])
        self.engine.write("/usr/local/bin/virtiofsd", VIRTIOFSD, "755")
        self.configure()
        self.engine.do("systemctl restart containerd")
        self.mark = 0
        # What the case that runs has seen, in words.
        self.seen = ""

    def configure(self, **changed: str) -> str:
        """Write Kata's configuration and return it. changed: values of CONFIGURATION_TEXT other than the usual ones."""
        text = CONFIGURATION_TEXT.format(**{**USUAL, **changed})
        self.engine.write(CONFIGURATION, text)
        return text

    def run(self, name: str, config: dict[str, Any]) -> Done:
        """Run a container by ctr to its end. Raises GuestError where its virtual machine ended before, or hangs."""
        self.mark = len(self.log.lines)
        self.engine.write(f"/run/{name}.json", json.dumps(config))
        started = time.monotonic()
        command = ["ctr", "run", "--rm", "--runtime", RUNTIME, "--config", f"/run/{name}.json", name]
        with self.engine.start(*command) as process:
            try:
                self.watch(process, started + LIMIT)
            except GuestError:
                process.kill()
                raise
            finally:
                print(f"{name}: {time.monotonic() - started:.1f} s")
            stdout, stderr = process.communicate()
        print(f"{name}: exit {process.returncode}\n{stdout}{stderr}")
        return Done(process.returncode, stdout, stderr)

    def watch(self, process: subprocess.Popen[str], end: float) -> None:
        """Wait for the end of ctr. Raises GuestError."""
        gone = 0.0
        while process.poll() is None:
            time.sleep(0.5)
            now = time.monotonic()
            gone = gone or (now if self.log.find(QEMU_ENDED, self.mark) else 0.0)
            if now > end or (gone and now > gone + PATIENCE):
                console = "\n".join(self.log.lines[self.mark :][-CONSOLE_LINES:])
                raise GuestError(f"{'QEMU has ended' if gone else 'not done in time'}; the log ends with\n{console}")

    def call(self, line: str) -> Done:
        """Run a line of a shell that may start a virtual machine."""
        started = time.monotonic()
        with self.engine.start("timeout", "--kill-after=10", f"{LIMIT:.0f}", "sh", "-ec", line) as process:
            stdout, stderr = process.communicate()
        took = f"(exit {process.returncode}, {time.monotonic() - started:.0f} s)"
        print(f"$ {line}\n{stdout}{stderr}{took}")
        return Done(process.returncode, stdout, stderr)

    def wait_until_gone(self) -> list[str]:
        """Return what is left of a sandbox when the shim has had the time to end: [] where all is gone."""
        end = time.monotonic() + LEFT_LIMIT
        while (left := self.list_left()) and time.monotonic() < end:
            time.sleep(1)
        return left

    def list_left(self) -> list[str]:
        """Return what is there of a sandbox: QEMUs, Kata's directories and mounts, network namespaces, tasks."""
        found = []
        for path in Path("/proc").glob("[0-9]*/exe"):
            name = guest.link_name(path)
            if any(word in name for word in PROGRAMS):
                found.append(f"process {path.parent.name}: {name}")
        script = f"""
            find {PLACES} -mindepth 1 -maxdepth 1
            grep kata-containers /proc/mounts
            ctr tasks ls -q; ctr containers ls -q
        """
        return found + self.engine.run("sh", "-c", script).stdout.splitlines()

    def clear(self) -> None:
        """Take away what a container that failed has left."""
        script = """
            crictl rmp --force --all
            ctr tasks kill -s KILL --all $(ctr tasks ls -q); ctr tasks rm -f $(ctr tasks ls -q); ctr c rm $(ctr c ls -q)
        """
        self.engine.run("sh", "-c", script)
        for path in Path("/proc").glob("[0-9]*/exe"):
            name = guest.link_name(path)
            if any(word in name for word in PROGRAMS):
                with suppress(ProcessLookupError):
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def close(self) -> None:
        """End it."""
        self.clear()
        self.engine.close()


def make_config(
    command: Sequence[str], addresses: Sequence[str], annotations: dict[str, str] | None = None, check: bool = True
) -> dict[str, Any]:
    """Return the config.json of a container that wants the groups of these devices of the host."""
    entries = host.list_devices(*addresses) if addresses else []
    hooks = {"prestart": [bundles.make_hook(HOST_HOOK)]} if check else {}
    options = bundles.Options(devices=entries, annotations=annotations or {}, hooks=hooks)
    return bundles.make_config(command, f"/{CONTAINER_ROOT}", options, "")
