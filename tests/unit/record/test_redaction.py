# SPDX-License-Identifier: Apache-2.0
"""The recorded part of a machine: files, processes, links, addresses, command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.record import encoding, hidehost
from oci_hooks.record.hidehost import Redactor
from oci_hooks.record.hidetext import LEFT_OUT
from oci_hooks.record.privacy import hide_document
from oci_hooks.record.reader import read_record
from oci_hooks.replay.kinds import KINDS
from oci_hooks.replay.rerun import find_differences
from oci_hooks.schema import load_schema
from tests.support.fake_host import HostTree
from tests.support.planted_secrets import (
    CONFIGS,
    CONTAINER,
    DEVICES,
    GOES_BY,
    GUEST_SETTINGS,
    HOST_FILES,
    RECORDS,
    SECRET,
    extend,
    find_secrets,
    make_tree,
    merge,
    run_host,
    tell,
)

pytestmark = pytest.mark.unit


@pytest.fixture(name="tree")
def make_tree_fixture(tmp_path: Path) -> HostTree:
    """Return a Kata host whose files, processes and their command lines are full of secrets."""
    return make_tree(tmp_path)


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
    "/proc/7/status": ("Name:\tsecret\nPPid:\t1\nTgid:\t7\nNSpid:\t7\t1\n", "PPid:\t1\nTgid:\t7\nNSpid:\t7\t1\n"),
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
        f"/bin/firecracker\0--id\0secret\0--api-sock\0/run/{CONTAINER}/secret\0--key=secret\0",
        f"firecracker\0--(left out)\0(left out)\0--(left out)\0"
        f"(left out)/{CONTAINER}/(left out)\0--(left out)=(left out)\0",
    ),
    "/proc/10/cmdline": ("crun\0--log\0/secret\0create\0--bundle\0/run/b\0-f\0/x/spec.json\0id", None),
    GUEST_SETTINGS: (
        '# secret\n[auto]\nids = ["8086:10d3", "secret"]\nsecret = "secret"\n[node]\nmode = 384\n',
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
