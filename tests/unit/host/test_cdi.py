# SPDX-License-Identifier: Apache-2.0
"""`vfio-host-check --cdi`: what the file offers, what it leaves out, and what becomes of the file that was there.

tests/packaging/test_cdi.py holds the files to CDI's own package.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from oci_hooks import program
from oci_hooks.findings import InputError
from oci_hooks.host import cdi_document, cdi_groups
from oci_hooks.host import hook as host_hook
from oci_hooks.host.cdi_document import HEADER, KIND
from oci_hooks.system import Root
from tests.support.fake_host import HostTree

pytestmark = pytest.mark.unit

NIC, TWIN, HOSTS = "0000:3b:00.0", "0000:3b:00.1", "0000:00:1f.0"
CONTROL = "/dev/vfio/vfio"


class Bench:
    """A made host with two good groups, one with two devices, and one of the host's own."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.tree, self.capfd = HostTree(top), capfd
        monkeypatch.setattr(program, "RecordingRoot", lambda: Root(str(top)))
        self.tree.pci(NIC, "vfio-pci", "13", vfio_dev="vfio0")
        self.tree.pci(TWIN, "vfio-pci", "13", vfio_dev="vfio1")
        self.tree.pci("0000:04:00.0", "vfio-pci", "7", class_code="030000")
        self.tree.pci(HOSTS, "i915", "2")
        self.tree.vfio("13", 0)
        self.tree.vfio("7", 1)
        self.tree.write(CONTROL)
        self.file = top / "run/cdi/vfio.json"
        (top / "run").mkdir()

    def run(self, *argv: str) -> tuple[int, str, str]:
        """Run it and return exit code, stdout and stderr."""
        code = host_hook.main(["--cdi", *argv])
        out, err = self.capfd.readouterr()
        return code, out, err

    def read(self, *argv: str) -> tuple[int, dict[str, Any], str]:
        """Run it and return exit code, the JSON document on stdout, stderr."""
        code, out, err = self.run("generate", "--format=json", *argv)
        return code, json.loads(out) if out else {}, err

    def write(self, *argv: str) -> tuple[int, str]:
        """Have it write the file and return exit code and stderr."""
        code, out, err = self.run("generate", "--output=/run/cdi/vfio.json", *argv)
        assert out == ""
        return code, err


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, monkeypatch, capfd)


def names(document: dict[str, Any]) -> list[str]:
    return [device["name"] for device in document["devices"]]


# What it offers -------------------------------------------------------------------------------------------------------


def test_each_group_is_a_device_by_number_and_by_address_and_all_together(bench: Bench) -> None:
    code, document, err = bench.read()
    assert (code, err) == (0, "")
    assert names(document) == ["7", "13", "0000:04:00.0", NIC, TWIN, "all"]
    by_name = {device["name"]: device["containerEdits"] for device in document["devices"]}
    assert by_name["13"] == {
        "env": [f"PCIDEVICE_OCI_VFIO_HOOKS_GROUP_13={NIC},{TWIN}"],
        "deviceNodes": [{"path": "/dev/vfio/13", "permissions": "rw"}],
    }
    assert by_name[NIC] == by_name[TWIN] == by_name["13"]
    assert [node["path"] for node in by_name["all"]["deviceNodes"]] == ["/dev/vfio/7", "/dev/vfio/13"]
    assert len(by_name["all"]["env"]) == 2
    # Once for all devices of a container: the control node and the host check.
    hook = {
        "hookName": "createRuntime",
        "path": "/usr/libexec/oci/hooks.d/vfio-host-check",
        "args": ["vfio-host-check"],
    }
    assert document["containerEdits"] == {"deviceNodes": [{"path": CONTROL, "permissions": "rw"}], "hooks": [hook]}
    assert (document["kind"], document["cdiVersion"]) == ("oci-vfio-hooks/group", "0.5.0")


def test_with_cdev_a_device_brings_its_own_node_only(bench: Bench) -> None:
    for name in ("vfio0", "vfio1"):
        bench.tree.write(f"/dev/vfio/devices/{name}")
    bench.tree.write("/dev/iommu")
    code, document, err = bench.read("--cdev", "--no-hook")
    assert code == 0
    # The kernel made no node for the device in group 7.
    assert names(document) == ["13", NIC, TWIN, "all"]
    assert "warning: [cdev-missing] group 7" in err
    nodes = {
        device["name"]: [n["path"] for n in device["containerEdits"]["deviceNodes"]] for device in document["devices"]
    }
    both = ["/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"]
    assert nodes == {"13": both, NIC: both[:1], TWIN: both[1:], "all": both}
    assert document["devices"][2]["containerEdits"]["env"] == [f"PCIDEVICE_OCI_VFIO_HOOKS_GROUP_13={TWIN}"]
    assert document["containerEdits"] == {"deviceNodes": [{"path": "/dev/iommu", "permissions": "rw"}]}


def test_with_cdev_a_device_without_number_has_no_node(bench: Bench) -> None:
    """Linux 6.1 to 6.5 have the directory vfio-dev/vfioN in sysfs, without a node that it could belong to."""
    for address, name in ((NIC, "vfio0"), (TWIN, "vfio1")):
        (bench.tree.top / f"sys/devices/pci0000:00/{address}/vfio-dev/{name}/dev").unlink()
    bench.tree.write("/dev/iommu")
    code, document, err = bench.read("--cdev")
    assert (code, document) == (1, {})
    codes = [line.split(": ")[2] for line in err.splitlines()]
    assert codes == ["[cdi-empty] host", "[cdev-missing] group 7", "[cdev-missing] group 13"]
    assert "or boot Linux 6.6 or later with CONFIG_VFIO_DEVICE_CDEV" in err


def test_the_annotation_for_the_guest_raises_the_version(bench: Bench) -> None:
    _, document, _ = bench.read("--annotate")
    assert document["cdiVersion"] == "0.6.0"
    assert document["devices"][1]["annotations"] == {"io.katacontainers.x.vfio.devices": "id:8086:10d3"}


@pytest.mark.parametrize(
    ("what", "groups"),
    [
        ("13", ["13"]),
        (NIC, ["13"]),
        ("3B:00.1", ["13"]),
        ("id:8086:10d3", ["7", "13"]),
        ("id:8086", ["7", "13"]),
        ("class:03", ["7"]),
        ("class:0200,7", ["7", "13"]),
    ],
)
def test_what_is_selected(bench: Bench, what: str, groups: list[str]) -> None:
    bench.tree.pci("0000:05:00.0", "vfio-pci", "8")
    (bench.tree.top / "sys/devices/pci0000:00/0000:05:00.0/uevent").write_text("DRIVER=vfio-pci\nPCI_ID=10DE:1234\n")
    bench.tree.vfio("8", 2)
    code, document, err = bench.read(f"--select={what}")
    # The host's own device has that id and class too: it was not named.
    assert (code, err) == (0, "")
    assert [name for name in names(document) if name.isdigit()] == groups


def test_yaml_and_json_are_the_same_document(bench: Bench) -> None:
    _, document, _ = bench.read()
    _, text, _ = bench.run()
    assert text.startswith(HEADER)
    assert text == cdi_document.format_document(document, "yaml")
    assert '\n  - name: "7"\n    containerEdits:\n      env:\n        - "PCIDEVICE_OCI_VFIO_HOOKS_GROUP_7=' in text


def test_the_list_has_every_group_with_its_reason(bench: Bench) -> None:
    code, out, err = bench.run("list")
    rows = [line.split(None, 4) for line in out.splitlines()[1:]]
    assert (code, err) == (0, "")
    assert [row[:3] for row in rows] == [
        ["-", "2", "host's"],
        [f"{KIND}=7", "7", "ready"],
        [f"{KIND}=13", "13", "ready"],
    ]
    assert rows[0][3:] == [HOSTS, f"{HOSTS} is bound to i915; bind it with: driverctl set-override {HOSTS} vfio-pci"]
    code, out, err = bench.run("list", "--json")
    assert [group["cdi"] for group in json.loads(out)["groups"]][2] == [f"{KIND}={n}" for n in ("13", NIC, TWIN)]


# The file -------------------------------------------------------------------------------------------------------------


def test_the_file_is_written_whole_once_and_again_only_when_it_would_differ(bench: Bench) -> None:
    mask = os.umask(0o077)
    try:
        code, err = bench.write()
    finally:
        os.umask(mask)
    assert code == 0 and "info: [cdi-written]" in err and f"--device {KIND}=7" in err
    first = bench.file.stat()
    assert stat.S_IMODE(first.st_mode) == 0o644
    assert stat.S_IMODE(bench.file.parent.stat().st_mode) == 0o755
    assert bench.write() == (0, "")
    assert (bench.file.stat().st_ino, bench.file.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert bench.write("--select=13")[0] == 0
    assert bench.file.stat().st_ino != first.st_ino
    assert os.listdir(bench.file.parent) == ["vfio.json"]


# Ten bad things, each with a finding, and nothing lost ----------------------------------------------------------------


def make_bad(bench: Bench, what: str) -> None:
    """Spoil the host in one way."""
    tree = bench.tree
    if what == "busy":
        tree.process(7, "/usr/bin/qemu-system-x86_64", opened=("/dev/vfio/13",))
    elif what == "half-bound":
        tree.pci("0000:3b:00.2", "ixgbe", "13")
    elif what == "no-node":
        (tree.top / "dev/vfio/13").unlink()
    elif what == "name":
        tree.mdev("vdev 1", "13", driver="vfio_mdev")
    elif what == "control":
        (tree.top / CONTROL[1:]).unlink()
    elif what == "noiommu":
        tree.pci("0000:09:00.0", "vfio-pci", "9")
        tree.write("/sys/kernel/iommu_groups/9/name", "vfio-noiommu\n")
        tree.vfio("noiommu-9", 3)


@pytest.mark.parametrize(
    ("what", "code", "finding", "offered"),
    [
        ("busy", 0, "warning: [group-busy] group 13: is in use by qemu-system-x86_64 (pid 7)", ["7", "13"]),
        ("half-bound", 0, "warning: [group-not-viable] group 13: 0000:3b:00.2 is bound to ixgbe", ["7"]),
        ("no-node", 0, "warning: [group-missing] group 13: /dev/vfio/13 is not on the host", ["7"]),
        ("name", 0, "warning: [cdi-name] device vdev 1: ", ["7", "13"]),
        ("control", 1, "error: [control-node-missing] /dev/vfio/vfio", ["7", "13"]),
        ("noiommu", 0, "warning: [noiommu-group] group noiommu-9", ["7", "13"]),
    ],
)
def test_a_bad_group_costs_only_itself(bench: Bench, what: str, code: int, finding: str, offered: list[str]) -> None:
    make_bad(bench, what)
    found, err = bench.write()
    assert found == code
    assert finding in err
    document = json.loads(bench.file.read_text())
    assert [name for name in names(document) if name.isdigit()] == offered
    assert "vdev 1" not in names(document)


@pytest.mark.parametrize(
    ("what", "finding"),
    [
        ("2", f"error: [group-not-viable] group 2: {HOSTS} is bound to i915; bind it with: driverctl"),
        ("99", "error: [group-missing] --select 99"),
    ],
)
def test_a_selected_group_that_cannot_be_passed_is_an_error_and_the_others_are_written(
    bench: Bench, what: str, finding: str
) -> None:
    code, err = bench.write("--select=7", f"--select={what}")
    assert code == 1 and finding in err
    assert names(json.loads(bench.file.read_text()))[0] == "7"
    before = bench.file.stat()
    code, err = bench.write(f"--select={what}")
    assert code == 1 and "error: [cdi-empty] host" in err
    now = bench.file.stat()
    assert (now.st_ino, now.st_mtime_ns, now.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def test_a_host_without_iommu_keeps_the_file_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "RecordingRoot", lambda: Root(str(tmp_path)))
    tree = HostTree(tmp_path)
    tree.write("/run/cdi/x.yaml", HEADER)
    assert host_hook.main(["--cdi", "--output=/run/cdi/x.yaml"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "error: [iommu-off] host" in err and err.count("\n") == 1
    assert (tmp_path / "run/cdi/x.yaml").read_text() == HEADER


@pytest.mark.parametrize("text", ["kind: example.com/nic\n", f'{{"kind": "{KIND}"}}', "", "\udce9"])
def test_a_file_of_somebody_else_is_replaced_only_with_force(bench: Bench, text: str) -> None:
    bench.tree.write("/run/cdi/vfio.json", text.encode("utf-8", "surrogateescape"))
    before = bench.file.stat()
    code, err = bench.write()
    assert code == 1
    assert "error: [output] /run/cdi/vfio.json" in err and "--force" in err
    now = bench.file.stat()
    assert (now.st_ino, now.st_mtime_ns, now.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert bench.write("--force")[0] == 0
    assert names(json.loads(bench.file.read_text()))


@pytest.mark.parametrize("kind", ["directory", "link", "fifo", "no-directory", "file-above"])
def test_an_output_that_cannot_be_written(bench: Bench, kind: str) -> None:
    place = bench.file
    if kind not in ("no-directory", "file-above"):
        place.parent.mkdir()
    if kind == "directory":
        place.mkdir()
    elif kind == "link":
        place.symlink_to("elsewhere.json")
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "file-above":
        place.parent.write_text("")
    output = "/run/none/cdi/vfio.json" if kind == "no-directory" else "/run/cdi/vfio.json"
    before = sorted(bench.tree.top.joinpath("run").rglob("*"))
    code, out, err = bench.run(f"--output={output}", "--force")
    assert (code, out) == (1, "")
    assert f"error: [output] {output}" in err
    assert sorted(bench.tree.top.joinpath("run").rglob("*")) == before


def test_a_draft_that_a_killed_run_left_is_in_nobodys_way(bench: Bench) -> None:
    """Its name had the process id, which a later run may get: with that name it could not be written any more."""
    bench.file.parent.mkdir(parents=True, exist_ok=True)
    bench.file.with_name(f".{bench.file.name}.{os.getpid()}.new").write_text("half")
    assert bench.write()[0] == 0
    assert json.loads(bench.file.read_text())["kind"] == "oci-vfio-hooks/group"


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.write()[0] == 0
    before = bench.file.read_bytes()

    def fail(*_values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    code, err = bench.write("--select=7")
    assert code == 1 and "[output] /run/cdi/vfio.json" in err and "No space left" in err
    assert bench.file.read_bytes() == before
    assert os.listdir(bench.file.parent) == ["vfio.json"]


@pytest.mark.parametrize(
    "argv",
    [
        ("--output=/run/cdi/x.yml",),
        ("--output=/run/cdi/x.json", "--format=yaml"),
        ("--select=",),
        ("--select=nic",),
        ("--select=id:80",),
        ("--select=class:x",),
        ("--bundle=/b",),
        ("destroy",),
    ],
)
def test_arguments_that_mean_nothing(bench: Bench, argv: tuple[str, ...]) -> None:
    code, out, err = bench.run(*argv)
    assert (code, out) == (2, "")
    assert "error: [bad-arguments]" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        *(("13", True), ("0000:3b:00.0", True), ("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", True), ("05.0004", True)),
        *(("a_b-c.d:e", True), ("x", True), ("", False), ("-a", False), ("a.", False), ("a b", False), ("a/b", False)),
        *(("a=b", False), ("ä", False), ("all", False), ("taken", False), ("a\n", False)),
    ],
)
def test_names_that_cdi_allows(name: str, allowed: bool) -> None:
    assert (cdi_document.refuse_name(name, ["taken"]) == "") is allowed


def test_a_word_of_select_is_one_thing() -> None:
    assert [str(choice) for choice in cdi_groups.parse_choices(("3b:00.0, 7", "id:8086"))] == [NIC, "7", "id:8086"]
    # As lspci and nvidia-smi write it; a mediated device has no address.
    words = ("0000:3B:00.0", "00000000:3b:00.0", "6F7A0B1E-4a5b-4c6d-8e7f-0123456789ab")
    assert [choice.value for choice in cdi_groups.parse_choices(words)] == [NIC, NIC, words[2].lower()]
    with pytest.raises(InputError, match="bad-arguments"):
        cdi_groups.parse_choices(("7,,8",))
