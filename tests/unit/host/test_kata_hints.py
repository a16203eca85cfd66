# SPDX-License-Identifier: Apache-2.0
"""Every hint of a finding about Kata's configuration, followed to the letter: the finding is gone, and no new one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from oci_hooks.annotations import HYPERVISOR_PREFIX
from oci_hooks.findings import Finding
from oci_hooks.host.kata import checks as kata_checks
from oci_hooks.host.kata import sandbox
from oci_hooks.host.kata.config import ConfigFile, load_config
from oci_hooks.host.kata.lookup import ConfigLookup
from oci_hooks.host.runtime import Runtime
from tests.support.fake_host import HostTree, codes, make_spec
from tests.unit.host.test_kata_checks import BAD, GOOD, RS_NAMES, WANTED, target

pytestmark = pytest.mark.unit

PATH = "/opt/kata/configuration.toml"
PLUGS = 'hot_plug_vfio = "root-port"\ncold_plug_vfio = "no-port"'
RS = GOOD.replace("[runtime]", "pcie_root_port = 1\n[runtime]\n" + RS_NAMES).replace(PLUGS, "")


def check(tree: HostTree, annotations: dict[str, str]) -> list[Finding]:
    """Return the findings about the configuration, as a person gets them before a pod is started."""
    runtime = Runtime("kata", None, None, "c1", "", True, True)
    config = load_config(tree.root, ConfigFile(PATH, PATH, "test"), "", annotations)
    view = sandbox.inspect_sandbox(tree.root, runtime, ConfigLookup(config, True), annotations, False)
    found = kata_checks.check_kata(view.replace(machine="x86_64"), make_spec(), (target(),))
    return [finding for finding in found if finding.code not in ("vfio-mode", "hooks-dropped")]


def follow(tree: HostTree, hint: str, annotations: dict[str, str]) -> None:
    """Follow a hint: its command, its edit of a line, or its annotation."""
    command = re.search(r"mkdir -p .*?\.toml", hint)
    edit = re.search(r"set (\w+) = (.*?) in (/\S+) line (\d+)", hint)
    annotation = re.search(r'annotation (io\.katacontainers\.\S+): "?([^";]*)"?', hint)
    if command:
        subprocess.run(["sh", "-c", command[0].replace("/opt/kata", f"{tree.top}/opt/kata")], check=True)
    elif edit:
        path = tree.top / edit[3].lstrip("/")
        lines = path.read_text().split("\n")
        lines[int(edit[4]) - 1] = f"{edit[1]} = {edit[2]}"
        path.write_text("\n".join(lines))
    else:
        assert annotation, hint
        annotations[annotation[1]] = annotation[2]


@pytest.mark.parametrize(
    ("text", "drop_in", "annotations", "code"),
    [
        (BAD, "", {}, "viommu-off"),
        (GOOD, "[hypervisor.qemu]\nenable_iommu = false\n", {}, "viommu-off"),
        (GOOD, "", {HYPERVISOR_PREFIX + "enable_iommu": "false"}, "viommu-off"),
        (BAD.replace('["enable_iommu"]', "[]"), "", {}, "viommu-off"),
        (GOOD.replace("hypervisor.qemu", "hypervisor.clh"), "", {}, "viommu-off"),
        (GOOD.replace("root-port", "no-port"), "", {}, "no-port"),
        (GOOD, '[hypervisor.qemu]\nhot_plug_vfio = "no-port"\n', {}, "no-port"),
        (GOOD.replace("no-port", "root-port"), "", {}, "port-conflict"),
        (GOOD, '[hypervisor.qemu]\ncold_plug_vfio = "root-port"\n', {}, "port-conflict"),
        (GOOD, "", {HYPERVISOR_PREFIX + "machine_type": "q35"}, "annotation-not-allowed"),
        (RS.replace("pcie_root_port = 1", "pcie_root_port = 0"), "", {}, "no-port"),
        (RS.replace("pcie_root_port = 1", "pcie_root_port = 1\npcie_switch_port = 1"), "", {}, "port-conflict"),
        (RS.replace("enable_iommu = true", "enable_iommu = false"), "", {}, "viommu-off"),
    ],
)
def test_kata_hint_followed_fixes_configuration(
    tmp_path: Path, text: str, drop_in: str, annotations: dict[str, str], code: str
) -> None:
    tree = HostTree(tmp_path)
    tree.write(PATH, text)
    if drop_in:
        tree.write("/opt/kata/config.d/10-x", drop_in)
    given = {**WANTED, **annotations}
    before = check(tree, given)
    hints = [finding.hint for finding in before if finding.code == code]
    assert hints, codes(before)
    for hint in hints:
        follow(tree, hint, given)
    # A pod's ports in stock are the next thing that a person sees, once there is a port at all.
    allowed = {finding.code for finding in before} - {code} | ({"no-port"} if code == "port-conflict" else set())
    after = check(tree, given)
    if code == "no-port" and after:
        follow(tree, after[0].hint, given)
        after = check(tree, given)
    assert {finding.code for finding in after} <= allowed
