# SPDX-License-Identifier: Apache-2.0
"""Documents and a host full of secrets, and the search for them in what was recorded."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from oci_hooks import program
from oci_hooks.host import hook as host_hook
from oci_hooks.program import Arguments, Run, run_work, summarize
from oci_hooks.record import writer as record_writer
from oci_hooks.record.hidehost import Redactor
from oci_hooks.record.reader import Recording, read_record
from oci_hooks.schema import load_schema
from oci_hooks.system import Deadline, RecordingRoot, name_tag, tagged
from tests.support.fake_host import HostTree

PACKAGE = Path(__file__).resolve().parents[2] / "oci_hooks"
RECORDS = sorted((PACKAGE.parent / "tests/data/records").glob("*.tar.gz"))
CONTAINER = "0123456789abcdef" * 4
GUEST_SETTINGS = "/etc/oci-vfio-hooks/guest.toml"
SECRET = "secretword"  # noqa: S105 - a word to look for
NIC = "0000:03:00.0"
DEVICES = [
    {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196},
    {"path": "/dev/vfio/12", "type": "c", "major": 237, "minor": 0, "fileMode": 384, "uid": 0, "gid": 0},
    {"path": "/dev/ttyS7", "type": "c", "major": 4, "minor": 71},
]
LINUX = {
    "devices": DEVICES,
    "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}, {"type": "mount"}],
    "resources": {"devices": [{"allow": True, "type": "c", "major": 237, "minor": 0, "access": "rwm"}]},
    "cgroupsPath": "/a/b",
    "sysctl": {"net.core.somaxconn": "128"},
    "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["accept"], "action": "SCMP_ACT_ALLOW"}]},
    "maskedPaths": ["/proc/kcore"],
    "mountLabel": "system_u:object_r:x",
}
PROCESS = {
    "user": {"uid": 1000, "gid": 1000, "username": "app"},
    "args": ["/bin/app", "--token=1"],
    "env": ["PATH=/bin", "FLAG", "PCIDEVICE_INTEL_COM_NIC=0000:03:00.0,x", "PCIDEVICE_A_INFO={}"],
    "cwd": "/",
    "capabilities": {"effective": ["CAP_IPC_LOCK", "CAP_CHOWN"], "bounding": ["CAP_CHOWN"]},
    "rlimits": [{"type": "RLIMIT_MEMLOCK", "soft": 1 << 30, "hard": 1 << 30}],
    "apparmorProfile": "profile",
    "selinuxLabel": "label",
}
MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
    {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind", "rw"]},
    {"destination": "/srv", "type": "cifs", "source": "//srv/x", "options": ["username=a", "password=b"]},
]
HOOK = {"path": "/hook", "args": ["hook", "--key=1"], "env": ["TOKEN=1"], "timeout": 5}
# As `runc spec`, podman (with containerd's annotations) and Kata below CRI write them.
CONFIGS: dict[str, dict[str, Any]] = {
    "runc": {
        "ociVersion": "1.0.2",
        "process": PROCESS,
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "host",
        "mounts": MOUNTS,
        "linux": LINUX,
    },
    "podman": {
        "ociVersion": "1.1.0",
        "process": PROCESS,
        "root": {"path": "/var/lib/containers/storage/overlay/x/merged"},
        "hostname": "host",
        "domainname": "domain",
        "mounts": [*MOUNTS, {"destination": "/etc/hosts", "type": "bind", "source": "/run/x", "options": ["bind"]}],
        "hooks": {"prestart": [HOOK], "createRuntime": [HOOK], "poststop": [HOOK]},
        "linux": {**LINUX, "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}], "intelRdt": {"closID": "x"}},
        "annotations": {
            "io.container.manager": "libpod",
            "io.podman.annotations.label": "https://user:password@host/",
            "org.opencontainers.image.stopSignal": "15",
            "run.oci.keep_original_groups": "1",
        },
    },
    "kata": {
        "ociVersion": "1.0.2",
        "process": {**PROCESS, "commandLine": "x"},
        "root": {"path": "rootfs"},
        "mounts": MOUNTS,
        "hooks": {"prestart": [HOOK]},
        "linux": LINUX,
        "annotations": {
            "io.katacontainers.config.agent.policy": "cG9saWN5",
            "io.katacontainers.config.hypervisor.cc_init_data": "H4sI",
            "io.katacontainers.config.hypervisor.kernel_params": "agent.https_proxy=http://u:p@h quiet",
            "io.katacontainers.config.runtime.create_container_timeout": "60",
            "io.kubernetes.cri.image-name": "registry/image",
            "io.kubernetes.cri.sandbox-namespace": "team",
            "io.kubernetes.pod.uid": "uid",
        },
    },
}
# What the hooks go by, and so is kept: test_the_manual_lists_what_is_kept holds it to the manual's table.
GOES_BY = {"annotations": {"io.katacontainers.x.vfio.devices": "auto", "io.kubernetes.cri.sandbox-id": CONTAINER}}


def plant(value: Any, name: str, count: list[int]) -> Any:
    """Return a JSON value with a secret in place of each string, and one more member in each object."""
    if isinstance(value, str):
        count[0] += 1
        return f"{name}{SECRET}{count[0]}x"
    if isinstance(value, list):
        return [plant(item, name, count) for item in value]
    if isinstance(value, dict):
        planted = {key: plant(item, name, count) for key, item in value.items()}
        return {**planted, plant("", name, count): plant("", name, count)}
    return value


def extend(value: Any, name: str, count: list[int]) -> Any:
    """Return a JSON value with a secret at the end of each string: the reader knows the beginning."""
    if isinstance(value, str):
        count[0] += 1
        return f"{value}{name}{SECRET}{count[0]}x"
    if isinstance(value, list):
        return [extend(item, name, count) for item in value]
    return {key: extend(item, name, count) for key, item in value.items()} if isinstance(value, dict) else value


def list_forms(secret: str) -> Iterator[bytes]:
    """Yield how a text can be written: plain, reversed, escaped, in hexadecimal, in base64 at any place."""
    yield secret.encode()
    yield secret[::-1].encode()
    yield "".join(f"\\u{ord(c):04x}" for c in secret).encode()
    yield quote("".join(secret)).encode()
    yield secret.encode().hex().encode()
    for offset in range(3):
        yield base64.b64encode(bytes(offset) + secret.encode())[4:-4]


def find_secrets(data: bytes, secret: str = SECRET) -> list[str]:
    """Return what a recording holds of the planted secrets, in whatever form."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        text = b"\n".join(tar.extractfile(member).read() for member in tar)  # type: ignore[union-attr]
    found = [form.decode() for form in list_forms(secret) if form in text or form in data]
    return found + [text[m.start() - 60 : m.end() + 20].decode() for m in re.finditer(secret.encode(), text)][:3]


class TreeRoot(RecordingRoot):
    """The live system's notes of a made tree."""

    def __init__(self, top: str) -> None:
        super().__init__()
        self.tree = top

    def ask(self, question: Callable[..., Any], path: str, *more: object) -> Any:
        """Return a reading function's result for a path below the tree."""
        entry = self.add("ask", name_tag(question), (path,))
        answer = self.call_noted(entry, question, self.tree + path, *more)
        if isinstance(answer, str) and answer.startswith(self.tree):
            entry.answer = answer = answer[len(self.tree) :]
        return answer


def run_host(
    tree: HostTree, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: str = ""
) -> tuple[Recording, bytes]:
    """Run the host hook on a tree, and return its recording and the bytes of it."""
    monkeypatch.setattr(record_writer, "DIRECTORY", str(tree.top / "records"))
    monkeypatch.setattr(program, "read_input", read_input)
    monkeypatch.setattr(os, "getppid", getppid)
    read_input.data = json.dumps(state).encode()  # type: ignore[attr-defined]
    root = TreeRoot(str(tree.top))
    run = Run("vfio-host-check", Arguments(), Deadline(60.0), root)
    outcome = run_work(run, host_hook.work)
    run.record_asked = run.record_asked or asked
    (output,) = record_writer.save_recording(summarize(run, outcome), root.notes)
    assert output.code == "recorded", output
    return read_record(output.subject), Path(output.subject).read_bytes()


@tagged("read-state")
def read_input(_deadline: Deadline, _begun: bytes) -> bytes:
    """Return the state that a test sets."""
    data: bytes = read_input.data  # type: ignore[attr-defined]
    return data


def getppid() -> int:
    """Return the id of Kata's shim in the tree."""
    return 800


def make_tree(tmp_path: Path) -> HostTree:
    """Return a Kata host whose files, processes and their command lines are full of secrets."""
    tree = HostTree(tmp_path)
    tree.pci(NIC, "vfio-pci", "12")
    tree.pci("0000:03:00.1", "ixgbe", "12")
    tree.vfio("12", 0)
    for path, text in HOST_FILES.items():
        tree.write(path, text)
    tree.link("/proc/812/exe", "/usr/bin/qemu-system-x86_64")
    tree.link("/proc/800/exe", "/usr/bin/containerd-shim-kata-v2")
    tree.write("/usr/bin/qemu-system-x86_64")
    return tree


def name_secrets(text: str) -> str:
    """Return a text with each $ replaced by a secret of its own."""
    pieces = text.split("$")
    return "".join(f"{piece}{SECRET}{index}x" for index, piece in enumerate(pieces[:-1])) + pieces[-1]


QEMU_WORDS = [
    "/usr/bin/qemu-system-x86_64",
    "-name",
    f"sandbox-{CONTAINER},debug-threads=on,$",
    "-uuid",
    "$",
    "-machine",
    "q35,accel=kvm,kernel_irqchip=split,memory-encryption=$",
    "-object",
    "secret,id=sec0,data=$,format=base64",
    "-object=secret,data=$",
    "--token=$",
    "-device",
    "vfio-pci,host=0000:03:00.0,id=$,x-secret=$",
    "-device",
    '{"driver":"virtio-blk","serial":"$","drive":"$"}',
    "-append",
    "root=/dev/vda agent.https_proxy=http://user:$@proxy $",
    "-drive",
    "file=/run/$,password-secret=$",
    "-netdev",
    "tap,id=$,script=$",
    "-fw_cfg",
    "name=opt/$,string=$",
    "$",
    "-",
    "",
]
SHIM_WORDS = [
    "/usr/bin/containerd-shim-kata-v2",
    "-namespace",
    "k8s.io",
    "-address",
    "unix://user:$@/run/x",
    "-publish-binary",
    "/usr/bin/$",
    "-id",
    CONTAINER,
    "--password=$",
    "-debug",
    "$",
]
KATA_TOML = """\
# $
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64" # $
machine_type = "q35"
kernel_params = "agent.http_proxy=http://u:$@h intel_iommu=off $"
enable_iommu = true
enable_annotations = ["enable_iommu", "kernel_params"]
hot_plug_vfio = "root-port"
image = "/opt/$"
remote_hypervisor_socket = \"\"\"
$
\"\"\"
valid_entropy_sources = ["$", '$']
[agent.kata]
kernel_modules = ["$"]
[runtime]
vfio_mode = "vfio"
"token-$" = "$"
jaeger_password = '$'
pcie = {a = "$", "$" = 1}
"""
HOST_FILES = {
    path: name_secrets(text)
    for path, text in {
        "/proc/812/cmdline": "\0".join(QEMU_WORDS),
        "/proc/812/status": "Name:\t$\nUmask:\t0022\nTgid:\t812\nPPid:\t800\n",
        "/proc/812/environ": "TOKEN=$\0KATA_CONF_FILE=/x\0",
        "/proc/800/cmdline": "\0".join(SHIM_WORDS),
        "/proc/800/status": "Name:\t$\nTgid:\t800\nPPid:\t1\n",
        "/proc/800/environ": "PASSWORD=$\0",
        "/proc/900/cmdline": "/usr/bin/app\0--token=$\0",
        "/proc/900/fd/3": "",
        "/proc/self/limits": "Limit Soft Hard Units\nMax locked memory 65536 65536 bytes\n$\n",
        "/proc/cmdline": "BOOT_IMAGE=/vmlinuz root=UUID=$ rd.luks.key=$ intel_iommu=on proxy=http://u:$@h",
        "/etc/kata-containers/configuration.toml": KATA_TOML,
        "/etc/kata-containers/config.d/10-own.toml": '[agent.kata]\ntoken = "$"\n',
        "/etc/containerd/config.toml": (
            'imports = ["/etc/containerd/conf.d/*.toml"]\n'
            "[plugins.'io.containerd.grpc.v1.cri'.registry.configs.r.auth]\npassword = \"$\"\n"
            "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n"
        ),
        "/etc/crio/crio.conf": '[crio.image]\nglobal_auth_file = "$"\n',
        "/etc/docker/daemon.json": '{"http-proxy": "http://u:$@h", "$": 1, "runtimes": {"runc": {"path": "$"}}}',
        "/etc/oci-vfio-hooks/host.toml": '# $\ndeadline = 60\n[checks]\nmemlock = "warn" # $\n',
    }.items()
}


def merge(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the members of another one."""
    return {**config, "annotations": {**config.get("annotations", {}), **more["annotations"]}}


def tell(told: str = "", *names: str) -> Redactor:
    """Return what decides for a run with these words in its findings."""
    return Redactor(told, names, {GUEST_SETTINGS: load_schema("guest-settings")})
