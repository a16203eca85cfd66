# SPDX-License-Identifier: Apache-2.0
"""The host hook as a whole: states in, exit code and lines out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from oci_hooks import program
from oci_hooks.guest import hook as guest_hook
from oci_hooks.host import checks, survey
from oci_hooks.host import hook as host_hook
from oci_hooks.schema import load_schema
from oci_hooks.system import Root
from tests.support.fake_host import HostTree

pytestmark = pytest.mark.unit

HOOK = Path(__file__).resolve().parents[3] / "hooks/vfio-host-check"
NIC = "0000:03:00.0"
GROUP = {"path": "/dev/vfio/12", "type": "c", "major": 237, "minor": 0}
CONTROL = {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196}
PROCESS = {"capabilities": {"effective": ["CAP_IPC_LOCK"]}}
RULES = {"devices": [{"allow": True, "access": "rwm"}]}
KATA = """\
[hypervisor.qemu]
machine_type = "q35"
enable_iommu = false
hot_plug_vfio = "root-port"
path = "/q"
kernel = "/k"
image = "/i"
shared_fs = "none"
[runtime]
vfio_mode = "vfio"
"""
CONFIG = "/etc/kata-containers/configuration.toml"
QEMU = "/usr/bin/qemu-system-x86_64"


class Bench:
    """A made host on which the hook runs in this process."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.tree = HostTree(top)
        self.capfd = capfd
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(program, "RecordingRoot", lambda: Root(str(top)))
        # Records would go to this machine's /var.
        monkeypatch.setattr(program.Run, "is_recorded", lambda _run, _code: False)
        self.tree.pci(NIC, "vfio-pci", "12")
        self.tree.vfio("12", 0)
        self.set_config()

    def set_config(self, *devices: Any, **parts: Any) -> None:
        """Write config.json; without devices: the good group and the control node."""
        linux = {"devices": list(devices or (CONTROL, GROUP)), "resources": RULES}
        document = {"ociVersion": "1.0.2", "process": PROCESS, "linux": linux, **parts}
        self.tree.write("/run/b/config.json", json.dumps(document))

    def run(self, state: Any, *argv: str) -> tuple[int, str, str]:
        """Run the hook with this state and return exit code, stdout and stderr."""
        data = state if isinstance(state, bytes) else json.dumps(state).encode()
        self.monkeypatch.setattr(program, "read_input", lambda *_: data)
        code = host_hook.main(list(argv))
        out, err = self.capfd.readouterr()
        return code, out, err


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, monkeypatch, capfd)


def state(**changes: Any) -> dict[str, Any]:
    """Return runc's state."""
    return {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 70, "bundle": "/run/b", **changes}


def kata_go(pid: int = 812, **annotations: str) -> dict[str, Any]:
    """Return the state that Kata's Go runtime writes."""
    mark = {"io.katacontainers.pkg.oci.bundle_path": "/run/b"}
    return state(ociVersion="", status="", pid=pid, annotations={**mark, **annotations})


# A container of a plain runtime --------------------------------------------------------------------------------------


def test_host_hook_good_container(bench: Bench) -> None:
    assert bench.run(state()) == (0, "", "")


def test_host_hook_bad_group_one_line(bench: Bench) -> None:
    bench.tree.pci("0000:03:00.1", "ixgbe", "12")
    code, out, err = bench.run(state())
    assert (code, out) == (1, "")
    assert err == (
        "vfio-host-check: error: [group-not-viable] group 12: 0000:03:00.1 "
        "is bound to ixgbe (other members: 0000:03:00.0 "
        "vfio-pci); bind it with: driverctl set-override 0000:03:00.1 vfio-pci\n"
    )


def test_host_hook_reports_every_group(bench: Bench) -> None:
    bench.tree.pci("0000:05:00.0", "ixgbe", "15")
    bench.set_config(
        CONTROL, GROUP, {**GROUP, "path": "/dev/vfio/15", "minor": 9}, {**GROUP, "path": "/dev/vfio/99", "minor": 8}
    )
    code, _, err = bench.run(state())
    assert code == 1
    assert [line.split("[")[1].split("]")[0] for line in err.splitlines()] == ["group-not-viable", "group-missing"]


def test_host_hook_plain_container_no_kata_findings(bench: Bench) -> None:
    bench.tree.write(CONFIG, KATA)
    assert bench.run(state())[0] == 0


def test_host_hook_plain_container_permission_warnings(bench: Bench) -> None:
    bench.tree.write("/run/b/config.json", json.dumps({"linux": {"devices": [GROUP]}}))
    bench.tree.write("/proc/self/limits", "Max locked memory  65536  65536  bytes\n")
    code, _, err = bench.run(state())
    assert code == 0
    for word in ("[control-node-missing]", "[group-denied]", "[memlock]"):
        assert f"warning: {word}" in err


def test_host_hook_privileged_container_not_refused(bench: Bench) -> None:
    """It lists every node of the host, and starts as it would without the hook."""
    bench.tree.pci("0000:03:00.1", "ixgbe", "12")
    everything = [CONTROL, GROUP, {"path": "/dev/mem", "type": "c", "major": 1, "minor": 1}]
    bench.set_config(*everything)
    code, _, err = bench.run(state())
    assert code == 0
    assert "warning: [group-not-viable]" in err
    # Kata passes what is listed, privileged or not.
    assert bench.run(kata_go(pid=70))[0] == 1


# Nothing to do -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "changes", "argv"),
    [
        ({}, {}, ()),
        ({"linux": {"devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]}}, {}, ()),
        ({"linux": {"devices": [CONTROL]}}, {}, ()),
        ({"linux": {"devices": [{**GROUP, "type": "b"}]}}, {}, ()),
        ({"linux": {"devices": [GROUP]}, "annotations": {"io.kubernetes.cri.container-type": "sandbox"}}, {}, ()),
        (
            {"linux": {"devices": [GROUP]}},
            {"annotations": {"io.katacontainers.pkg.oci.container_type": "pod_sandbox"}},
            (),
        ),
        ({"linux": {"devices": [GROUP]}}, {"status": "stopped"}, ()),
        ({"linux": {"devices": [GROUP]}}, {}, ("poststop",)),
    ],
)
def test_host_hook_without_vfio_silent(bench: Bench, document: Any, changes: Any, argv: tuple[str, ...]) -> None:
    """Whatever the state of Kata's configuration, of the settings and of the group."""
    bench.tree.write("/run/b/config.json", json.dumps(document))
    bench.tree.write(CONFIG, "no toml")
    bench.tree.write("/etc/oci-vfio-hooks/host.toml", "no toml")
    bench.tree.pci("0000:03:00.1", "ixgbe", "12")
    assert bench.run(state(**changes), *argv) == (0, "", "")


def test_host_hook_without_vfio_imports_only_fast_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"ociVersion": "1.0.2", "linux": {"devices": []}}')
    text = json.dumps(state(bundle=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-ISX", "importtime", str(HOOK)],
        input=text,
        capture_output=True,
        text=True,
        env={},
        check=False,
    )
    assert done.returncode == 0
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "oci_hooks.oci" in modules
    heavy = {"json", "re", "typing", "pathlib", "argparse", "dataclasses", "enum", "logging", "tomllib", "subprocess"}
    ours = {
        "oci_hooks.host.checks",
        "oci_hooks.linux.pci",
        "oci_hooks.linux.vfio",
        "oci_hooks.settings",
        "oci_hooks.host.kata.config",
    }
    assert modules & (heavy | ours) == set()
    assert not [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


# Kata ----------------------------------------------------------------------------------------------------------------


def test_host_hook_viommu_off_by_configuration(bench: Bench) -> None:
    bench.tree.write(CONFIG, KATA)
    code, _, err = bench.run(kata_go(pid=70))
    assert code == 1
    assert f"[viommu-off] virtual IOMMU: enable_iommu = false in {CONFIG} line 3, not overridden by" in err


def test_host_hook_viommu_off_by_running_qemu(bench: Bench) -> None:
    bench.tree.write(CONFIG, KATA.replace("false", "true"))
    bench.tree.process(812, QEMU, "-machine", "q35")
    code, _, err = bench.run(kata_go())
    assert code == 1
    assert "[viommu-off] virtual IOMMU: qemu-system-x86_64 (pid 812) runs without a virtual IOMMU" in err


def test_host_hook_viommu_on_in_running_qemu(bench: Bench) -> None:
    bench.tree.write(CONFIG, KATA)
    bench.tree.process(812, QEMU, "-machine", "q35", "-device", "intel-iommu")
    code, _, stderr = bench.run(kata_go())
    assert code == 0
    # The file has no virtual IOMMU, so it is not the one that QEMU was started with.
    (line,) = stderr.splitlines()
    assert line.startswith(f"vfio-host-check: warning: [kata-config-other] {CONFIG}: ")


def test_host_hook_kata_1_reads_config_json_annotations(bench: Bench) -> None:
    bench.tree.write(CONFIG, '[hypervisor.qemu]\nmachine_type = "q35"\n#enable_iommu = true\n[runtime]\n')
    bench.set_config(annotations={"io.katacontainers.x.vfio.devices": "auto"})
    code, _, err = bench.run(state(status="", ociVersion="", pid=70))
    assert code == 1
    assert f"error: [viommu-off] virtual IOMMU: enable_iommu is not set in {CONFIG}, config.d/ or annotations" in err


def test_host_hook_guest_kernel_mode_not_refused(bench: Bench) -> None:
    bench.tree.write(CONFIG, KATA.replace('"vfio"', '"guest-kernel"'))
    code, _, err = bench.run(kata_go(pid=70))
    assert code == 0
    assert "info: [viommu-off]" in err
    assert "info: [vfio-mode] vfio_mode: " in err
    assert "so the guest's own driver gets the device" in err
    assert "warning" not in err
    # A site where no container may start without VFIO.
    bench.tree.write("/etc/oci-vfio-hooks/host.toml", '[checks]\nviommu-off = "enforce"\n')
    code, _, err = bench.run(kata_go(pid=70))
    assert (code, "error: [viommu-off]" in err) == (1, True)


def test_host_hook_runtime_rs_warns_failure_ignored(bench: Bench) -> None:
    bench.tree.write("/etc/kata-containers/runtime-rs/configuration.toml", KATA + 'hypervisor_name = "qemu"\n')
    bench.tree.process(812, QEMU)
    code, _, err = bench.run(state(pid=812))
    assert code == 1
    assert "error: [viommu-off]" in err
    assert "warning: [failure-ignored] runtime-rs" in err


def test_host_hook_missing_kata_config_warned(bench: Bench) -> None:
    code, _, err = bench.run(kata_go(pid=70))
    assert code == 0
    assert "warning: [kata-config-missing]" in err


@pytest.mark.parametrize(("mode", "code"), [("never", 0), ("auto", 1), ("always", 1)])
def test_host_hook_kata_mode(bench: Bench, mode: str, code: int) -> None:
    bench.tree.write(CONFIG, KATA)
    bench.tree.write("/etc/oci-vfio-hooks/host.toml", f'[kata]\nmode = "{mode}"\n')
    assert bench.run(kata_go(pid=70))[0] == code


# Settings, input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "level"),
    [
        ('mode = "warn"\n', 0, "warning"),
        ('[checks]\ngroup-missing = "warn"\n', 0, "warning"),
        ('[checks]\ngroup-missing = "ignore"\n', 0, ""),
        ('mode = "warn"\n[checks]\ngroup-missing = "enforce"\n', 1, "error"),
    ],
)
def test_host_hook_check_modes(bench: Bench, text: str, code: int, level: str) -> None:
    bench.set_config(CONTROL, {**GROUP, "path": "/dev/vfio/99", "minor": 8})
    bench.tree.write("/etc/oci-vfio-hooks/host.toml", text)
    found, _, err = bench.run(state())
    assert found == code
    assert (f"{level}: [group-missing]" in err) if level else err == ""


def test_host_hook_wrong_settings_only_with_vfio(bench: Bench) -> None:
    bench.tree.write("/etc/oci-vfio-hooks/host.toml", 'moed = "warn"\n')
    code, _, err = bench.run(state())
    assert code == 2
    assert "[bad-settings] /etc/oci-vfio-hooks/host.toml line 1: moed: unknown key; known keys: checks, " in err


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "[bad-json] state on stdin"),
        (b"{", "[bad-json]"),
        (b"[]", "[bad-state]"),
        (b'{"id": "c1", "bundle": 3}', "bundle: expected string, found 3"),
        (b'{"id": "c1", "bundle": "/nowhere"}', "[bundle-unreadable] /nowhere/config.json"),
    ],
)
def test_host_hook_bad_input(bench: Bench, data: bytes, said: str) -> None:
    code, out, err = bench.run(data)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_host_hook_crun_wrong_bundle_resolved(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a user namespace crun reports "/"; its command line still has the bundle."""
    bench.tree.process(60, "/usr/bin/crun", "create", "--bundle", "/run/b", "c1")
    monkeypatch.setattr("os.getppid", lambda: 60)
    bench.tree.pci("0000:03:00.1", "ixgbe", "12")
    code, _, err = bench.run(state(bundle="/", status="created"))
    assert code == 1
    assert "[group-not-viable]" in err


def test_host_hook_by_hand(bench: Bench) -> None:
    assert host_hook.main(["--bundle", "/run/b"]) == 0
    assert host_hook.main(["--bundle", "/nowhere"]) == 2
    bench.tree.write(CONFIG, KATA)
    bench.tree.process(812, QEMU)
    assert host_hook.main(["--bundle", "/run/b", "--pid", "812"]) == 1
    assert "[viommu-off]" in bench.capfd.readouterr().err


def test_host_hook_json_matches_schema(bench: Bench) -> None:
    bench.tree.pci("0000:03:00.1", "ixgbe", "12")
    code, out, _ = bench.run(state(), "--json")
    answer = json.loads(out)
    jsonschema.validate(answer, load_schema("findings"))
    assert (code, answer["exit"]) == (1, 1)
    assert answer["findings"][0]["code"] == "group-not-viable"


@pytest.mark.parametrize("main", [host_hook.main, guest_hook.main], ids=["host", "guest"])
@pytest.mark.parametrize("argv", [("--frob",), ("start",), ("--pid", "x"), ("--bundle",)], ids=" ".join)
@pytest.mark.parametrize("first", [True, False])
def test_host_hook_bad_arguments_in_json(
    capfd: pytest.CaptureFixture[str], main: Callable[[list[str]], int], argv: tuple[str, ...], first: bool
) -> None:
    code = main(["--json", *argv] if first else [*argv, "--json"])
    reported = capfd.readouterr()
    answer = json.loads(reported.out)
    jsonschema.validate(answer, load_schema("findings"))
    (finding,) = answer["findings"]
    assert (code, answer["exit"], finding["code"], bool(finding["hint"])) == (2, 2, "bad-arguments", True)
    assert reported.err.count("\n") == 1
    assert finding["problem"] in reported.err


def test_host_executable_empty_environment(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"linux": {"devices": [{**GROUP, "path": "/dev/vfio/4999"}]}}))
    # No record: it would go to this machine's /var.
    (tmp_path / "host.toml").write_text('record = "never"\n')
    done = subprocess.run(
        [sys.executable, "-IS", str(HOOK), "--settings", str(tmp_path / "host.toml")],
        input=json.dumps(state(bundle=str(tmp_path), pid=0)),
        capture_output=True,
        text=True,
        env={},
        cwd="/",
        check=False,
    )
    assert done.returncode == 1
    assert "error: [" in done.stderr
    assert "internal" not in done.stderr


# Preflight -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def host_of_groups(bench: Bench) -> Bench:
    """A host with a group of each kind."""
    tree = bench.tree
    tree.pci("0000:00:01.0", "pcieport", "1", "060400")
    tree.pci("0000:00:02.0", "ahci", "2", "010601")
    tree.pci("0000:00:03.0", "", "3", "ff0000")
    tree.pci("0000:05:00.0", "vfio-pci", "10")
    tree.vfio("10", 3)
    tree.process(50, "/usr/bin/testpmd", opened=("/dev/vfio/10",))
    return bench


def test_survey_table(host_of_groups: Bench) -> None:
    assert host_hook.main(["--all"]) == 0
    out, err = host_of_groups.capfd.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "GROUP  STATE         DEVICE        ID         CLASS    DRIVER    IN USE BY",
        "1      bridges only  0000:00:01.0  8086:10d3  bridge   pcieport  -",
        "2      host's        0000:00:02.0  8086:10d3  storage  ahci      -",
        "3      not bound     0000:00:03.0  8086:10d3  ff0000   -         -",
        "10     in use        0000:05:00.0  8086:10d3  network  vfio-pci  testpmd (pid 50)",
        "12     ready         0000:03:00.0  8086:10d3  network  vfio-pci  -",
    ]


def test_survey_opens_nothing(host_of_groups: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "read_group_status", lambda _root, _node: pytest.fail("opened"))
    assert host_hook.main(["--all"]) == 0


def test_survey_half_bound_group_reported(host_of_groups: Bench) -> None:
    host_of_groups.tree.pci("0000:03:00.1", "ixgbe", "12")
    assert host_hook.main(["--all", "--format", "npd"]) == 1
    out, err = host_of_groups.capfd.readouterr()
    assert out.startswith("group-not-viable: group 12: 0000:03:00.1 is bound to ixgbe")
    assert len(out.rstrip("\n")) <= 80
    assert "[group-not-viable]" in err


def test_survey_without_group_nodes_fine(bench: Bench) -> None:
    """With CONFIG_VFIO_GROUP off there are only the devices' own nodes."""
    bench.tree.pci("0000:06:00.0", "vfio-pci", "16", vfio_dev="vfio3")
    assert host_hook.main(["--all"]) == 0


def test_survey_without_iommu_reported(bench: Bench) -> None:
    import shutil

    shutil.rmtree(bench.tree.top / "sys/kernel/iommu_groups")
    assert host_hook.main(["--all", "--format", "npd"]) == 1
    assert bench.capfd.readouterr().out.startswith("iommu-off: host: ")


def test_survey_npd_good_host(host_of_groups: Bench) -> None:
    assert host_hook.main(["--all", "--format", "npd"]) == 0
    assert host_of_groups.capfd.readouterr().out == "1 VFIO groups ready\n"


def test_survey_nfd_labels(host_of_groups: Bench) -> None:
    host_of_groups.tree.write(CONFIG, KATA.replace("false", "true"))
    assert host_hook.main(["--all", "--format", "nfd"]) == 0
    labels = dict(line.split("=") for line in host_of_groups.capfd.readouterr().out.splitlines())
    assert labels == {
        "vfio.iommu": "true",
        "vfio.groups-ready": "1",
        "vfio.groups-in-use": "1",
        "vfio.groups-not-viable": "0",
        "vfio.device-8086-10d3": "1",
        "vfio.kata-viommu": "true",
    }


def test_survey_json_matches_schema(host_of_groups: Bench) -> None:
    host_of_groups.tree.write(CONFIG, KATA)
    host_of_groups.tree.mdev("6f7a0b1e", "20", driver="vfio_mdev")
    code = host_hook.main(["--all", "--json"])
    answer = json.loads(host_of_groups.capfd.readouterr().out)
    jsonschema.validate(answer, load_schema("findings"))
    assert {group["state"] for group in answer["groups"]} >= {"ready", "in use", "bridges only", "host's", "not bound"}
    # vfio_mode = vfio without a virtual IOMMU contradicts itself: a problem before any container comes.
    assert code == 1
    assert [finding["code"] for finding in answer["findings"]] == ["viommu-off"]
    assert answer["kata"][0]["path"] == CONFIG


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("--group", "12"), 0),
        (("--group", "/dev/vfio/12"), 0),
        (("--group", "2"), 1),
        (("--group", "12", "--group", "99"), 1),
        (("--group", "x"), 2),
        (("--group", "noiommu-0"), 1),
    ],
)
def test_survey_named_groups(host_of_groups: Bench, argv: tuple[str, ...], code: int) -> None:
    assert host_hook.main(list(argv)) == code


def test_survey_lists_kata_configurations(host_of_groups: Bench) -> None:
    host_of_groups.tree.write(CONFIG, KATA.replace("false", "true"))
    host_of_groups.tree.write(
        "/opt/kata/clh.toml", '[hypervisor.clh]\nenable_iommu = false\n[runtime]\nvfio_mode = "guest-kernel"\n'
    )
    host_of_groups.tree.write(
        "/etc/crio/crio.conf", '[crio.runtime.runtimes.kata]\nruntime_config_path = "/opt/kata/clh.toml"\n'
    )
    assert host_hook.main(["--all"]) == 0
    lines = host_of_groups.capfd.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index("") + 1 :]]
    assert table[0] == ["KATA", "HYPERVISOR", "VFIO_MODE", "ENABLE_IOMMU", "PORT"]
    assert ["/opt/kata/clh.toml", "clh", "guest-kernel", "false", "-"] in table
    assert [CONFIG, "qemu", "vfio", "true", "hot", "root-port"] in table


@pytest.mark.parametrize("vendor", ["8086", "10de"])
def test_survey_label_names_valid(vendor: str) -> None:
    import re

    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", f"vfio.device-{vendor}-10d3")


# The list of codes ---------------------------------------------------------------------------------------------------


def test_host_codes_match_documented_table() -> None:
    import re

    top = Path(host_hook.__file__).parents[2]
    modules = (
        *(
            "host/checks",
            "host/container_checks",
            "host/hook",
            "host/kata/checks",
            "host/kata/problems",
            "host/suite",
            "host/survey",
            "host/cdi",
            "host/cdi_document",
            "host/cdi_groups",
            "host/files",
        ),
        "settings",
    )
    text = "".join((top / f"oci_hooks/{name}.py").read_text() for name in modules)
    shared = "".join((top / f"oci_hooks/{name}.py").read_text() for name in ("oci", "program", "json_input"))
    pattern = (
        r'(?:Finding|InputError|unreadable)\(\s*(?:(?:"\w+"|view\.level|level|[a-z]+),\s*)?"([a-z]+(?:-[a-z0-9]+)*)",'
    )
    used = set(re.findall(pattern, text)) - {"error", "warning", "info"}
    table = (top / "docs/reference/codes-host.md").read_text()
    listed = set(re.findall(r"^\| `([a-z0-9-]+)` \|", table, re.M))
    also = set(re.findall(r'"([a-z]+(?:-[a-z0-9]+)*)"', text + shared))
    assert used - listed == set()
    assert listed - also == set()


def test_host_hook_does_not_import_survey() -> None:
    assert "preflight" not in vars(host_hook)
    assert survey.survey.__module__ == "oci_hooks.host.survey"
    assert os.path.exists(HOOK)
