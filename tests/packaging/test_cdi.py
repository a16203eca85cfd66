# SPDX-License-Identifier: Apache-2.0
"""CDI files judged by CDI's own package (tests/cdi), and metrics by Prometheus' own promtool."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from oci_hooks import program
from oci_hooks.host import hook as host_hook
from oci_hooks.host.cdi_document import KIND
from oci_hooks.system import Root
from tests import provision
from tests.support.fake_host import HostTree

UNITS = provision.REPOSITORY / "packaging/systemd"


@pytest.fixture(scope="module", autouse=True)
def judges() -> None:
    """Have both programs before the first test: 25 s on a quiet machine, once."""
    provision.ensure_cdi_check()
    provision.ensure_promtool()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostTree:
    """Return a host with three groups: of a function, of two, and of a mediated device with an odd name."""
    monkeypatch.setattr(program, "RecordingRoot", lambda: Root(str(tmp_path)))
    made = HostTree(tmp_path)
    for address, group, cdev in (("0000:3b:00.0", "13", "vfio0"), ("0000:3b:00.1", "13", "vfio1")):
        made.pci(address, "vfio-pci", group, vfio_dev=cdev)
        made.write(f"/dev/vfio/devices/{cdev}")
    made.pci("10000:e1:00.0", "vfio-pci", "107")
    made.mdev("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "9", driver="vfio_mdev")
    made.mdev("vdev 1", "9", driver="vfio_mdev")
    for minor, group in enumerate(("13", "107", "9")):
        made.vfio(group, minor)
    made.write("/dev/vfio/vfio")
    made.write("/dev/iommu")
    (tmp_path / "run").mkdir()
    return made


def judge(path: Path, *devices: str) -> dict[str, Any]:
    """Return the result of CDI's own package for a file, and the edits of a container that requests these devices."""
    command = [str(provision.ensure_cdi_check()), str(path), *devices]
    answer: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return answer


@pytest.mark.parametrize("form", ["json", "yaml"])
@pytest.mark.parametrize("options", [(), ("--cdev",), ("--annotate",), ("--no-hook", "--select=13")])
def test_cdis_own_package_takes_the_file(tree: HostTree, form: str, options: tuple[str, ...]) -> None:
    assert host_hook.main(["--cdi", f"--output=/run/cdi/vfio.{form}", *options]) == 0
    answer = judge(tree.top / f"run/cdi/vfio.{form}")
    assert answer["problems"] is None
    # The lowest version that is enough.
    assert answer["version"] == answer["minimum"] == ("0.6.0" if "--annotate" in options else "0.5.0")
    assert {f"{KIND}={name}" for name in ("13", "0000:3b:00.0", "all")} <= set(answer["devices"])
    assert len(answer["devices"]) == {(): 8, ("--cdev",): 4, ("--annotate",): 8}.get(options, 4)


@pytest.mark.parametrize("name", ["13", "10000:e1:00.0", "all", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"])
def test_each_kind_of_name_is_resolved(tree: HostTree, name: str) -> None:
    assert host_hook.main(["--cdi", "--output=/run/cdi/vfio.yaml"]) == 0
    # It looks at the nodes of this machine; what it is asked for is found by then.
    answer = judge(tree.top / "run/cdi/vfio.yaml", f"{KIND}={name}")
    assert answer["unresolved"] is None
    assert [problem for problem in answer["problems"] or [] if "failed to stat CDI host device" not in problem] == []


def test_the_judge_refuses_what_is_wrong(tree: HostTree) -> None:
    assert host_hook.main(["--cdi", "--output=/run/cdi/vfio.json"]) == 0
    path = tree.top / "run/cdi/vfio.json"
    document = json.loads(path.read_text())
    wrong: list[dict[str, Any]] = [
        {**document, "cdiVersion": "0.3.0"},
        {**document, "kind": "oci-vfio-hooks"},
        {**document, "devices": [{**document["devices"][0], "name": "a b"}]},
        {**document, "devices": [document["devices"][0]] * 2},
        {**document, "containerEdits": {"hooks": [{"hookName": "createRuntime"}]}},
    ]
    for number, spoilt in enumerate(wrong):
        place = tree.write(f"/run/wrong-{number}.json", json.dumps(spoilt))
        assert judge(place)["problems"], spoilt
    assert judge(path, f"{KIND}=14")["unresolved"] == [f"{KIND}=14"]


def test_promtool_has_nothing_to_say_of_the_metrics(tree: HostTree) -> None:
    assert host_hook.main(["--metrics=/run/vfio.prom"]) == 0
    text = (tree.top / "run/vfio.prom").read_text()
    lint = [str(provision.ensure_promtool()), "check", "metrics"]
    done = subprocess.run(lint, input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert 'oci_vfio_groups{state="ready"} 3\n' in text
    # And it would have.
    bad = text.replace("oci_vfio_iommu_enabled", "oci_vfio_iommu_total")
    done = subprocess.run(lint, input=bad, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "_total" in done.stderr


def test_the_units_are_right_and_run_a_command_that_is_understood() -> None:
    service = (UNITS / "oci-vfio-cdi.service").read_text()
    (command,) = [line.partition("=")[2] for line in service.splitlines() if line.startswith("ExecStart=")]
    path, *argv = command.removesuffix(" $CDI_OPTIONS").split()
    from oci_hooks.host.cdi import add_cdi_options

    arguments = program.parse_arguments("vfio-host-check", argv, add_cdi_options, by_hand=True)
    assert (path, arguments.cdi) == ("/usr/bin/vfio-host-check", "generate")
    assert arguments.output == "/run/cdi/oci-vfio-hooks.yaml"
    assert "[Install]" not in service
