# SPDX-License-Identifier: Apache-2.0
"""No secret gets into a recording: planted in every string of whole configurations, command lines and files of a host.

And what is left out changes nothing: the hook comes to the same findings with what is kept.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from oci_hooks import program
from oci_hooks.findings import Finding
from oci_hooks.guest import hook as guest_hook
from oci_hooks.host import hook as host_hook
from oci_hooks.host.kata.config import ConfigFile, KataConfig, load_config
from oci_hooks.oci import MAP_ANNOTATION
from oci_hooks.program import Arguments, Run, run_work, summarize
from oci_hooks.record import encoding, hidehost, hidetext, hidewords, privacy
from oci_hooks.record import writer as record_writer
from oci_hooks.record.hidehost import Redactor
from oci_hooks.record.hidetext import HYPERVISOR_KEYS, LEFT_OUT, RUNTIME_KEYS, hide_text
from oci_hooks.record.privacy import hide_document, hide_finding
from oci_hooks.record.reader import Recording, read_record
from oci_hooks.replay.kinds import KINDS
from oci_hooks.replay.rerun import ReplayRoot, find_differences
from oci_hooks.schema import load_schema
from oci_hooks.system import Deadline, RecordingRoot, name_tag, tagged
from tests.support.fake_host import HostTree
from tests.support.kata_corpus import SAMPLE, lay_out, load_cases

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).resolve().parents[3] / "oci_hooks"
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
        """Return what a reading function says of a path below the tree."""
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
def read_input(_deadline: Deadline) -> bytes:
    """Return the state that a test sets."""
    data: bytes = read_input.data  # type: ignore[attr-defined]
    return data


def getppid() -> int:
    """Return the id of Kata's shim in the tree."""
    return 800


@pytest.fixture(name="tree")
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


# Documents ------------------------------------------------------------------------------------------------------------


def merge(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the members of another one."""
    return {**config, "annotations": {**config.get("annotations", {}), **more["annotations"]}}


@pytest.mark.parametrize("how", [plant, extend])
@pytest.mark.parametrize("name", CONFIGS)
def test_hide_document_keeps_no_string_of_tenant(name: str, how: Callable[..., Any]) -> None:
    count = [0]
    planted = how({key: value for key, value in CONFIGS[name].items() if key not in ("root", "linux")}, "v", count)
    # A path below /dev/vfio and the root file system are what the hooks go by.
    linux = how({key: value for key, value in LINUX.items() if key != "devices"}, "l", count)
    linux["devices"] = [{**how(device, "d", count), "path": f"/dev/tty{SECRET}"} for device in DEVICES]
    reported = hide_document(json.dumps(merge({**planted, "linux": linux}, GOES_BY)).encode(), "config.json")
    assert count[0] > 45
    assert SECRET.encode() not in reported
    kept = json.loads(reported)
    assert kept["annotations"]["io.katacontainers.x.vfio.devices"] == "auto"
    assert [type(value) for value in kept["linux"].values()] == [type(value) for value in linux.values()]
    assert len(kept["process"]["env"]) == len(planted["process"]["env"])


@pytest.mark.parametrize("name", CONFIGS)
def test_hide_document_keeps_deciding_values(name: str) -> None:
    """Word for word, so that a replay comes to the same."""
    reported = json.loads(hide_document(json.dumps(merge(CONFIGS[name], GOES_BY)).encode(), "config.json"))
    assert reported["root"] == CONFIGS[name]["root"]
    assert reported["annotations"]["io.kubernetes.cri.sandbox-id"] == CONTAINER
    assert reported["linux"]["devices"] == [*DEVICES[:2], {**DEVICES[2], "path": "/" + LEFT_OUT}]
    assert reported["linux"]["resources"] == LINUX["resources"]
    assert [entry["type"] for entry in reported["linux"]["namespaces"]] == ["pid", "network", "mount"]
    assert reported["process"]["user"] == {"uid": 1000, "gid": 1000, f"{LEFT_OUT} 3": LEFT_OUT}
    assert reported["process"]["env"] == [
        f"{LEFT_OUT}={LEFT_OUT}",
        LEFT_OUT,
        f"PCIDEVICE_INTEL_COM_NIC=0000:03:00.0,{LEFT_OUT}",
        f"{LEFT_OUT}={LEFT_OUT}",
    ]
    assert reported["process"]["rlimits"] == PROCESS["rlimits"]
    assert reported["process"]["capabilities"]["effective"] == ["CAP_IPC_LOCK", LEFT_OUT]
    assert [mount["destination"] for mount in reported["mounts"][:3]] == [LEFT_OUT, "/dev", LEFT_OUT]
    assert reported["mounts"][1]["options"] == ["rbind", LEFT_OUT]


def test_hide_state_keeps_deciding_values() -> None:
    state = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 7, "bundle": "/run/b", "root": SECRET}
    state["annotations"] = {f"a{SECRET}": SECRET, "io.kubernetes.cri.x" + SECRET: SECRET, "x": None}
    reported = json.loads(hide_document(json.dumps({**state, SECRET: [SECRET]}).encode(), "state.json"))
    names = [f"{LEFT_OUT} 1", f"io.kubernetes.cri.{LEFT_OUT} 2", f"{LEFT_OUT} 3"]
    assert reported["annotations"] == dict(zip(names, [LEFT_OUT, LEFT_OUT, None]))
    assert {key: reported[key] for key in ("id", "status", "pid", "bundle")} == {
        key: state[key] for key in ("id", "status", "pid", "bundle")
    }
    assert SECRET not in json.dumps(reported)


@pytest.mark.parametrize(
    "text",
    [
        '{"env": ["A=secret",]}',
        '{"a": "secret \\" secret\\u00e9',
        '{"a" "secret"}',
        '"secret" "x"',
        '{"secret": ge}',
        '{"a": secret}',
        '{"a": truegeheim}',
        '{"a": 1geheim}',
        '{"a": "b"} secret',
        "TOKEN=secret\n",
        '{"a": "secret\x01"}',
        '{"a": "\\ugeheim"}',
        '{"a": "\\secret"}',
        '{"ä": "gehéim€😀", }',
        '\ufeff{"a": "secret"}',
        '{"a": "secret\\',
        '{"a": "secret',
        '{"a": "\\u0067\\u0065\\u0068eim",}',
        "[" * 5000 + '"secret"',
    ],
)
def test_hide_text_keeps_json_mistake(text: str) -> None:
    """At the same place, in the same words."""
    hidden = hide_document(text.encode(), "config.json")
    assert b"secret" not in hidden
    assert b"\\u0067" not in hidden
    assert len(hidden) == len(text.encode())
    errors = []
    for each in (text, hidden.decode()):
        with pytest.raises((json.JSONDecodeError, RecursionError)) as caught:
            json.loads(each)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_hide_text_keeps_invalid_bytes() -> None:
    data = b'{"a": "secret \xc3", "b": \xff\xe2\x28 "/dev/vfio/12", "c": "x vfio y"}'
    hidden = hide_document(data, "config.json")
    assert b"secret" not in hidden
    assert b'"/dev/vfio/12"' in hidden
    assert b"vfiox" in hidden
    for each in (data, hidden):
        with pytest.raises(UnicodeDecodeError) as caught:
            each.decode()
        assert caught.value.start == data.index(b"\xc3")


# Of what a text is made that a reader could look at again and again.
UNITS = ['\\"', '"', "\\\\", "\\", '"\\', "[", "a", '","', "\\u", 'é"', "\\u00", "1", "{\n", '"\\"', '\\"\\']


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("head", ['{"a": "', ""])
def test_hide_text_linear_time(head: str, unit: str) -> None:
    """Twice the text is twice the work, whatever it is made of."""
    counts = []
    for size in (4096, 8192):
        count = [0]

        def add(count: list[int] = count) -> None:
            count[0] += 1

        data = (head + unit * size).encode()
        hide_text(data, add)
        counts.append(count[0])
        assert count[0] <= 2 * len(data)
    assert counts[1] <= 2 * counts[0] + 8


HIDE_ALL = """
import sys
from oci_hooks.record.hidetext import hide_text
for unit in sys.argv[1:]:
    size = 1 << 20 if unit == sys.argv[1] else 1 << 17
    for head in ('{"a": "', ""):
        for tail in ("", "\\\\"):
            data = (head + unit * (size // len(unit)) + tail).encode()
            assert len(hide_text(data)) == len(data)
"""


def test_hide_text_one_mebibyte_in_time() -> None:
    """Of escaped quotes 32 KiB took five seconds once, so this would take an hour. The system stops it before that."""
    done = subprocess.run(
        [sys.executable, "-c", HIDE_ALL, *UNITS],
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (20, 20)),
    )
    assert (done.returncode, done.stderr) == (0, b"")


# The machine ----------------------------------------------------------------------------------------------------------


def test_hide_kata_host_keeps_no_secret(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once: configuration, command lines, files. And the hook comes to the same findings again."""
    count = [0]
    config = extend(CONFIGS["kata"], "v", count)
    config["root"] = CONFIGS["kata"]["root"]
    config["linux"] = {**config["linux"], "devices": [*DEVICES[:2], {**DEVICES[2], "path": f"/dev/tty{SECRET}"}]}
    config["linux"]["namespaces"] = [{"type": "pid", "path": f"/run/{SECRET}"}]
    tree.write("/run/b/config.json", json.dumps(merge(config, GOES_BY)))
    mark = {"io.katacontainers.pkg.oci.bundle_path": f"/run/{SECRET}", f"x{SECRET}": SECRET}
    state = {"ociVersion": "", "id": CONTAINER, "status": "", "pid": 812, "bundle": "/run/b", "annotations": mark}
    found, data = run_host(tree, state, monkeypatch)
    codes = [finding.code for finding in found.findings]
    assert "viommu-off" in codes
    assert "group-not-viable" in codes
    assert find_secrets(data) == []
    paths = {event.get("path", "") for event in found.events}
    assert paths >= {"/proc/812/cmdline", "/etc/kata-containers/configuration.toml", "/proc/800/cmdline"}
    assert find_differences(found) == []


def test_hide_kata_host_without_running_hypervisor(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kata's configuration decides, on its lines."""
    config = merge(CONFIGS["kata"], GOES_BY)
    del config["annotations"]["io.katacontainers.config.hypervisor.kernel_params"]
    tree.write("/run/b/config.json", json.dumps(config))
    state = {"ociVersion": "", "id": CONTAINER, "status": "", "pid": 0, "bundle": "/run/b", "annotations": {"x": "y"}}
    found, data = run_host(tree, state, monkeypatch)
    (viommu,) = (finding for finding in found.findings if finding.code == "viommu-off")
    assert 'kernel_params = "intel_iommu=off" in /etc/kata-containers/configuration.toml line 5' in viommu.problem
    assert find_secrets(data) == []
    assert find_secrets(data, "https_proxy") == []
    assert find_differences(found) == []


def test_full_recording_hides_nothing(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.write("/run/b/config.json", json.dumps(merge(CONFIGS["podman"], GOES_BY)))
    state = {"ociVersion": "", "id": CONTAINER, "status": "", "pid": 812, "bundle": "/run/b", "annotations": {"x": "y"}}
    found, _ = run_host(tree, state, monkeypatch, "full")
    assert found.about["full"] is True
    assert json.loads(found.documents["config.json"]) == merge(CONFIGS["podman"], GOES_BY)
    answers = {event["path"]: event.get("answer") for event in found.events if event.get("ask") == "read"}
    assert encoding.decode(answers["/proc/812/cmdline"], KINDS) == HOST_FILES["/proc/812/cmdline"].encode()
    assert LEFT_OUT not in json.dumps(found.events)
    assert find_differences(found) == []


def tell(told: str = "", *names: str) -> Redactor:
    """Return what decides for a run with these words in its findings."""
    return Redactor(told, names, {GUEST_SETTINGS: load_schema("guest-settings")})


def read(path: str, answer: object, question: str = "read") -> dict[str, Any]:
    """Return the event of a read."""
    kept = {"!": "bytes", "text": answer} if question == "read" else answer
    return {"at": 0.0, "ask": question, "path": path, "answer": kept}


NETWORK = "network"
MOUNTINFO = """\
22 1 8:1 /@secret / rw,relatime shared:1 - ext4 /dev/root rw,errors=secret
30 22 0:45 /secret /mnt/secret rw - cifs //srv/secret rw,username=secret,password=secret
31 22 0:46 / /var/lib/secret rw,secret - overlay overlay rw,lowerdir=/secret,upperdir=/secret
32 22 0:47 / /home/secret rw - fuse.secret user@secret:/ rw
33 22 8:17 / /data rw - xfs /dev/sdb1 rw
34 22 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate
35 22 0:29 /x /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices,release_agent=/secret
secret
"""
FILES = {
    "/proc/self/mountinfo": (
        MOUNTINFO,
        "22 1 8:1 / / rw - ext4 /dev/root rw\n"
        "30 22 0:45 / /(left-out) rw - cifs /(left-out) rw\n"
        "31 22 0:46 / /(left-out) rw - overlay /(left-out) rw\n"
        "32 22 0:47 / /(left-out) rw - other /(left-out) rw\n"
        "33 22 8:17 / /data rw - xfs /dev/sdb1 rw\n"
        "34 22 0:28 / /sys/fs/cgroup rw - cgroup2 /(left-out) rw\n"
        "35 22 0:29 /x /sys/fs/cgroup/devices rw - cgroup /(left-out) rw,devices\n"
        "(left out)\n",
    ),
    "/proc/cmdline": ("root=secret intel_iommu=on key=secret iommu=pt", "(left out) intel_iommu=on iommu=pt"),
    "/proc/swaps": (
        "Filename Type\n/dev/dm-1 partition 1 2 3\n/home/secret file 1 2 3\n",
        "Filename Type\n/dev/dm-1 partition 1 2 3\n/(left-out) file 0 0 0\n",
    ),
    "/proc/net/route": ("Iface Dest\neth0 0A00A8C0 01 secret\n", "Iface 0\neth0 0\n"),
    "/proc/net/if_inet6": (
        f"{'20010db8' * 4} 02 40 00 80 eth0\n{'fd00' * 8} 03 40 00 80 eth1\n",
        f"{'20010db8' * 4} 02 40 00 80 eth0\n{'0' * 32} 03 40 00 80 eth1\n",
    ),
    "/proc/7/stat": ("7 (secret ) x) S 1 2 3", "7 ((left out)) S 1 2 3"),
    "/proc/7/status": ("Name:\tgeheim\nPPid:\t1\nTgid:\t7\nNSpid:\t7\t1\n", "PPid:\t1\nTgid:\t7\nNSpid:\t7\t1\n"),
    "/proc/7/comm": ("secret\n", "(left out)"),
    "/proc/7/environ": ("TOKEN=secret\0KATA_CONF_FILE=/etc/kata.toml\0", "KATA_CONF_FILE=/etc/kata.toml"),
    "/proc/7/uid_map": (" 0 100000 65536\n", " 0 100000 65536\n"),
    "/proc/7/task/9/children": ("11 12 ", "11 12 "),
    "/proc/consoles": ("ttyS0 -W- (EC p a) 4:64\n", "ttyS0 -W- (EC p a) 4:64\n"),
    "/x/spec.json": ('{"root": {"path": "r"}, "hostname": "secret"}', None),
    "/x/bad.json": ('{"root": {"path": secret}', None),
    "/proc/7/maps": ("7f00-8000 r-xp /secret", "(left out)"),
    "/proc/7/cmdline": ("/usr/bin/dpdk\0--key=secret\0", "dpdk"),
    "/proc/8/cmdline": ("secret: worker\0--key=secret\0", "(left out)"),
    "/proc/9/cmdline": (
        f"/bin/firecracker\0--id\0geheim\0--api-sock\0/run/{CONTAINER}/secret\0--key=secret\0",
        f"firecracker\0--(left out)\0(left out)\0--(left out)\0"
        f"(left out)/{CONTAINER}/(left out)\0--(left out)=(left out)\0",
    ),
    "/proc/10/cmdline": ("crun\0--log\0/secret\0create\0--bundle\0/run/b\0-f\0/x/spec.json\0id", None),
    GUEST_SETTINGS: (
        '# secret\n[auto]\nids = ["8086:10d3", "secret"]\ngeheim = "secret"\n[node]\nmode = 384\n',
        '\n\nauto.ids = ["8086:10d3", "(left out)"]\nauto."(left out) 2" = "(left out)"\n\nnode.mode = 384\n',
    ),
    "/etc/kata-containers/x.toml": ('[runtime]\na = "secret"\nx = secret # secret\n', "\n\nx = xxxxxx # xxxxxx"),
    "/opt/kata/VERSION": ("3.2.0\n", "3.2.0\n"),
}


@pytest.mark.parametrize("path", FILES)
def test_hide_file_keeps_form(path: str) -> None:
    text, expected = FILES[path]
    reported = (
        "in-use: holds /dev/sdb1, mounted on /data; mounted on /; 2001:0db8:2001:0db8:2001:0db8:2001:0db8; dpdk (pid 7)"
    )
    kept = tell(reported, CONTAINER).hide_file(path, text)
    assert "secret" not in kept
    assert expected is None or kept == expected
    if path == "/proc/10/cmdline":
        assert "--bundle\0/run/b\0-f\0/x/spec.json" in kept
    if path == "/x/spec.json":
        assert json.loads(kept) == {"root": {"path": "r"}, "hostname": LEFT_OUT}


def test_hide_events_other_processes() -> None:
    events = [
        read("/proc", ["1", "2", "3", "5", "self"], "listdir"),
        read("/proc/1/fd", ["0", "1"], "listdir"),
        read("/proc/1/fd/0", "/home/secret", "readlink"),
        read("/proc/1/fd/1", "socket:[1]", "readlink"),
        read("/proc/2/fd", ["0", "1"], "listdir"),
        read("/proc/2/fd/0", "/home/secret", "readlink"),
        read("/proc/2/fd/1", "/dev/vfio/18", "readlink"),
        read("/proc/2/cmdline", "/usr/bin/dpdk\0--key=secret\0"),
        {"at": 0.0, "ask": "listdir", "path": "/proc/3/fd", "errno": 13},
        read("/proc/4/cmdline", "/usr/bin/qemu-system-x86_64\0-device\0intel-iommu"),
        read("/proc/4/environ", "KATA_CONF_FILE=/etc/kata.toml\0TOKEN=secret"),
        read("/proc/5/fd", ["3", "4"], "listdir"),
        read("/proc/5/fd/3", "/dev/ttyS0", "readlink"),
        read("/proc/5/fd/4", "/dev/shm/secret", "readlink"),  # noqa: S108
        read("/sys/x", "y"),
        read("eth0", "10.0.0.1", "ipv4"),
        read("eth1", "10.0.0.2", "ipv4"),
        read("/proc/net", [["address", "e0", "10.0.0.2"], ["address", "e1", "10.9.9.9"], ["route", "e1", ""]], NETWORK),
        read("/x", "secret", "ask_something_new"),
    ]
    reported = tell("dpdk (pid 2) has it; /dev/ttyS0 is open; with address 10.0.0.2").hide_events(events)
    assert "secret" not in json.dumps(reported)
    text = {"!": "bytes"}
    assert [(event["path"], event["answer"]) for event in reported] == [
        ("/proc", ["2", "5", "self"]),
        ("/proc/2/fd", ["1"]),
        ("/proc/2/fd/1", "/dev/vfio/18"),
        ("/proc/2/cmdline", {**text, "text": "dpdk"}),
        ("/proc/4/cmdline", {**text, "text": "qemu-system-x86_64\0-device\0intel-iommu"}),
        ("/proc/4/environ", {**text, "text": "KATA_CONF_FILE=/etc/kata.toml"}),
        ("/proc/5/fd", ["3"]),
        ("/proc/5/fd/3", "/dev/ttyS0"),
        ("/sys/x", {**text, "text": "y"}),
        ("eth0", "0.0.0.0"),  # noqa: S104
        ("eth1", "10.0.0.2"),
        ("/proc/net", [["address", "e0", "10.0.0.2"], ["address", "e1", "0.0.0.0"], ["route", "e1", ""]]),  # noqa: S104
        ("/x", LEFT_OUT),
    ]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_hidden_recording_replays_same(path: Path) -> None:
    found = read_record(path)
    reported = "\n".join(f"{finding.subject}: {finding.problem}; {finding.hint}" for finding in found.findings)
    settings = {location: load_schema(schema) for location, schema in hidehost.SETTINGS.items()}
    events = Redactor(reported, (found.about["container"],), settings).hide_events(list(found.events))
    documents = {name: hide_document(data, name) for name, data in found.documents.items()}
    assert find_differences(found.replace(events=tuple(events), documents=documents)) == find_differences(found)


# Findings, and what goes with them ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "problem", "kept"),
    [
        ("bad-config", 'expected one of c, b, found "secret"', "expected one of c, b, found (left out)"),
        ("bad-config", "expected object, found string", "expected object, found string"),
        ("bad-state", 'expected a name, found ["found secret"]', 'expected a name, found ["found (left out)'),
        ("bad-settings", "unknown key secret; known are a, b", "unknown key (left out); known are a, b"),
        ("internal", "ValueError: invalid literal: 'secret'", "ValueError: invalid literal: '(left out)'"),
        ("internal", "KeyError: \"secret'", "KeyError: '(left out)'"),
        ("in-use", "found mounted on /data", "found mounted on /data"),
    ],
)
def test_hide_finding_quotes_no_value(code: str, problem: str, kept: str) -> None:
    if "[" in problem:
        kept = "expected a name, found (left out)"
        problem = 'expected a name, found ["secret"]'
    assert hide_finding(Finding("error", code, "x", problem)).problem == kept


@pytest.mark.parametrize(
    ("code", "subject", "problem", "kept"),
    [
        ("bad-config", "/b/config.json: annotations.secret", "x", "/b/config.json: annotations.(left out)"),
        ("bad-config", "/b/config.json: linux.devices[0].path", "x", "/b/config.json: linux.devices[0].path"),
        ("bad-settings", '/x.toml line 1: "secret"', "unknown key; known are a", "/x.toml line 1: (left out)"),
        ("bad-settings", "/x.toml: auto", "unknown key secret; known are a", "/x.toml: (left out)"),
        ("bad-settings", "/x.toml: auto.ids", "expected a list, found string", "/x.toml: auto.ids"),
    ],
)
def test_hide_finding_names_no_key(code: str, subject: str, problem: str, kept: str) -> None:
    hidden = hide_finding(Finding("error", code, subject, problem))
    assert hidden.subject == kept
    assert "secret" not in hidden.problem


def test_hide_traceback_without_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "DIRECTORY", str(tmp_path))
    run = Run("vfio-guest-bind", Arguments(), Deadline(8.0), RecordingRoot())

    def work(_run: Run) -> int:
        word = SECRET
        numbers: dict[str, int] = {}
        try:
            return int(word)
        except ValueError:
            return numbers[word]

    (output,) = record_writer.save_recording(summarize(run, run_work(run, work)), [])
    text = read_record(output.subject).about["traceback"]
    assert find_secrets(Path(output.subject).read_bytes()) == []
    assert "ValueError: invalid literal" in text
    assert "KeyError: '(left out)'" in text
    assert "test_privacy.py" in text


def test_hide_hook_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "DIRECTORY", str(tmp_path))
    monkeypatch.setenv(f"A_{SECRET}", SECRET)
    monkeypatch.setenv("PYTHONPATH", SECRET)
    run = Run("vfio-guest-bind", Arguments(), Deadline(8.0), RecordingRoot())
    (output,) = record_writer.save_recording(summarize(run, run_work(run, guest_hook.work)), [])
    kept = read_record(output.subject).about["environment"]
    assert "PYTHONPATH" in kept
    assert kept[-1] == LEFT_OUT
    assert find_secrets(Path(output.subject).read_bytes()) == []


# Code and lists together ----------------------------------------------------------------------------------------------


def test_kept_keys_cover_kata_settings() -> None:
    """Who reads one more adds it to HYPERVISOR_KEYS or RUNTIME_KEYS, or a replay would come to something else."""
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if not path.name.startswith("hide"))
    read_keys = set(re.findall(r'hypervisor_setting\(\s*"(\w+)"', text))
    for group in re.findall(r"hypervisor_setting\(key\) for key in \((.*?)\)", text):
        read_keys |= set(re.findall(r"\w+", group))
    assert read_keys > {"enable_iommu", "rootless"}
    assert read_keys <= set(HYPERVISOR_KEYS)
    assert set(re.findall(r'runtime_setting\(\s*"(\w+)"', text)) <= set(RUNTIME_KEYS)


def test_questions_all_listed() -> None:
    """An answer to another one is left out: who asks it decides what of it is kept, in hidehost.py."""
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    tags = {name: tag for tag, name in re.findall(r'@tagged\("([\w-]+)"\)\s+def (\w+)', text)}
    names = {name.rpartition(".")[2] for name in re.findall(r"(?:self|root)\.ask\(([\w.]+),", text)} - {"question"}
    asked = {tags.get(name, name) for name in names}
    assert asked > {"listdir", "read"}
    assert asked <= {*hidehost.QUESTIONS, *hidehost.ADDRESS_QUESTIONS, "read"}


def test_kept_annotations_cover_read_ones() -> None:
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "privacy.py")
    names = {name for name in re.findall(r'"(io\.[\w./-]+[\w])"', text) if name.count(".") > 2 and ".v1" not in name}
    unknown = [name for name in names if name not in privacy.DECIDING and not name.startswith(MAP_ANNOTATION)]
    assert unknown == []


def test_own_settings_paths_listed() -> None:
    """By their places, as the code that reads them has these."""
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if not path.name.startswith("hide"))
    assert set(re.findall(r'_SETTINGS = "(/etc/[\w./-]+\.toml)"', text)) == set(hidehost.SETTINGS)


# Kata's configuration -------------------------------------------------------------------------------------------------

PROBLEMS = ("refused", "uncertain")


def load_again(path: Path, flavour: str, annotations: dict[str, str]) -> tuple[KataConfig, KataConfig, bytes]:
    """Return a configuration as it is read, as a replay of the recording has it, and the recorded events."""
    root = RecordingRoot()
    location = ConfigFile(str(path), root.real_path(str(path)), "test")
    config = load_config(root, location, flavour, annotations)
    events = tell().hide_events(record_writer.list_events(root.notes, {}, False))
    data = json.dumps(events).encode()
    again = ReplayRoot(Recording("", {}, tuple(json.loads(data)), {}, ()))
    replayed = load_config(again, location, flavour, annotations)
    assert again.unexpected == []
    return config, replayed, data


def list_settings(config: KataConfig) -> list[Any]:
    """Return all settings of a configuration by which the host hook goes, and what was decided of it."""
    own = [config.hypervisor_setting(key) for key in HYPERVISOR_KEYS]
    own += [config.runtime_setting(key) for key in RUNTIME_KEYS]
    own = [setting.replace(value=hidetext.keep_setting(setting.value, setting.key)) for setting in own]
    own = [setting.replace(written=hidetext.keep_setting(setting.written, setting.key)) for setting in own]
    words = hidewords.list_words()
    problems = [
        [hidewords.hide_problem(problem.as_dict(), words) for problem in getattr(config.reading, name)]
        for name in PROBLEMS
    ]
    values = {key: hidetext.keep_setting(value, key) for key, value in config.reading.values.items()}
    return [config.flavour, config.hypervisor, config.refused, own, values, problems, config.reading.by_annotation]


@pytest.mark.parametrize("flavour", ["go", "rs"])
def test_replay_kata_reading_as_recorded(flavour: str, tmp_path: Path) -> None:
    """Of every tenth configuration with the answers of Kata's own readers: values, and what is refused."""
    kinds = set()
    for number, case in enumerate(load_cases(SAMPLE)[::10]):
        path = lay_out(case, tmp_path / str(number) / "case")
        config, again, _ = load_again(path, flavour, case["annotations"] or {})
        assert list_settings(again) == list_settings(config)
        kinds.add("refused" if config.reading.refused else "uncertain" if config.reading.uncertain else "taken")
    assert kinds >= {"refused", "taken"}


@pytest.mark.parametrize("flavour", ["go", "rs"])
@pytest.mark.parametrize(
    "text",
    [
        'kernel = "/$/$"',
        'image = "/$"\nkernel = "/proc/cmdline"',
        'shared_fs = "$"',
        'block_device_aio = "$ is none of"',
        "virtio_fs_daemon = '$'",
        'guest_extension_images = [{name = "$ $", path = "/$"}]',
        'enable_iommu = "$"',
        "path = $",
        'path = "\\$"',
        "$ = 1\n$ = 2",
        "[agent.kata]\n$ = 1",
        '[runtime]\nvfio_mode = "guest-kernel"\ninternetworking_model = "$"\nexperimental = ["$"]',
        '[runtime]\nsandbox_bind_mounts = ["/$", "$"]',
        '[runtime]\nhypervisor_name = "qemu"\nagent_name = "$"\nname = "$"',
    ],
)
def test_hide_kata_refusal_quotes_nothing(flavour: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text(f"[hypervisor.qemu]\n{text}\n".replace("$", SECRET))
    annotations = {
        "io.katacontainers.config.agent.policy": f"{SECRET}!",
        "io.katacontainers.config.runtime.create_container_timeout": SECRET,
        f"io.katacontainers.config.runtime.{SECRET}": SECRET,
        "io.katacontainers.config.hypervisor.path": f"/{SECRET}",
    }
    config, again, data = load_again(path, flavour, annotations)
    assert config.reading.refused
    assert SECRET.encode() not in data
    assert list_settings(again) == list_settings(config)


@pytest.mark.parametrize("place", ["/x line 3", f"annotation {SECRET}"])
def test_hide_kata_finding_keeps_reader_words(place: str) -> None:
    problem = f"shared_fs {SECRET} is none of virtio-9p; Kata 4.1 (here is 3) refuses to start a sandbox with it"
    hidden = hide_finding(Finding("warning", "kata-config-refused", place, problem, "h"))
    assert hidden.problem == problem.replace(SECRET, LEFT_OUT)
    assert hidden.subject == place.replace(SECRET, LEFT_OUT)
    assert hide_finding(hidden) == hidden
    doubt = hide_finding(Finding("warning", "kata-config-uncertain", place, f"{SECRET} is there twice", ""))
    assert doubt.problem == f"{LEFT_OUT} is there twice"


def test_replay_recording_without_kata_reading(tmp_path: Path) -> None:
    """One of an earlier version: it is read again from what was kept of the files."""
    path = tmp_path / "configuration.toml"
    path.write_text("[hypervisor.qemu]\nenable_iommu = true\n")
    root = RecordingRoot()
    location = ConfigFile(str(path), str(path), "test")
    load_config(root, location, "go", {})
    events = [event for event in record_writer.list_events(root.notes, {}, True) if "ask" in event]
    again = load_config(ReplayRoot(Recording("", {}, tuple(events), {}, ())), location, "go", {})
    assert again.hypervisor_setting("enable_iommu").value is True
