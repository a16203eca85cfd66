# SPDX-License-Identifier: Apache-2.0
"""Results of the checks for each configuration that Kata ships, and for a running hypervisor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oci_hooks.annotations import HYPERVISOR_PREFIX, RUNTIME_PREFIX
from oci_hooks.findings import Finding
from oci_hooks.host.hypervisor import Hypervisor
from oci_hooks.host.kata import checks as kata_checks
from oci_hooks.host.kata import sandbox
from oci_hooks.host.kata.config import ConfigFile, load_config
from oci_hooks.host.kata.lookup import ConfigLookup
from oci_hooks.host.runtime import Runtime
from oci_hooks.host.targets import Target
from oci_hooks.linux.pci import PciDevice
from oci_hooks.linux.processes import Process
from oci_hooks.linux.vfio import Member, VfioGroup
from oci_hooks.oci import Device
from oci_hooks.system import Root
from tests.support.fake_host import HostTree, codes, make_spec

pytestmark = pytest.mark.unit

TEMPLATES = Path(__file__).parents[2] / "support/kata_templates"
WANTED = {"io.katacontainers.x.vfio.devices": "auto"}
ON = "[hypervisor.{0}]\nenable_iommu = true\n"
QEMU_OFF = Hypervisor(Process(812, "qemu-system-x86_64", ()), "qemu", "off", "no -device intel-iommu or virtio-iommu")
QEMU_ON = Hypervisor(Process(812, "qemu-system-x86_64", ()), "qemu", "on", "-device intel-iommu")
CLH_DUMB = Hypervisor(Process(812, "cloud-hypervisor", ()), "clh", "", "")


def member(name: str = "0000:03:00.0", bus: str = "pci") -> Member:
    """Return a device on vfio-pci."""
    pci = PciDevice(name, "8086", "10d3", "020000", "vfio-pci", "12", "/sys/x", True) if bus == "pci" else None
    return Member(name, bus, "vfio-pci", "vfio", pci)


def target(*members: Member, cdev: str = "") -> Target:
    """Return an entry that means a group with these members."""
    group = VfioGroup("12", "12", (237, 0), members or (member(),))
    return Target(Device("/dev/vfio/12", "c", 237, 0, -1, -1, -1), group, cdev, "numbers")


def check(
    tree: HostTree,
    text: str,
    *,
    drop_in: str = "",
    annotations: dict[str, str] | None = None,
    running: Hypervisor | None = None,
    certain: bool = True,
    machine: str = "x86_64",
    attached: bool = False,
    targets: tuple[Target, ...] = (),
    kind: str = "kata",
    spec: Any = None,
    **asking: Any,
) -> list[Finding]:
    """Return the findings for a configuration."""
    path = "/opt/kata/configuration.toml"
    tree.write(path, text)
    if drop_in:
        tree.write("/opt/kata/config.d/50-x", drop_in)
    named = annotations or {}
    runtime = Runtime(kind, None, running, "c1", "", False, False).replace(**asking)
    config = load_config(tree.root, ConfigFile(path, path, "test"), runtime.flavour, named)
    view = sandbox.inspect_sandbox(tree.root, runtime, ConfigLookup(config, certain), named, attached).replace(
        machine=machine
    )
    found = kata_checks.check_kata(view, spec or make_spec(), targets or (target(),))
    return [finding for finding in found if finding.code != "vfio-mode"]


# Every template ------------------------------------------------------------------------------------------------------
# name, hypervisor; then what is concluded: as it is, when VFIO is wanted in the guest, and when it is wanted and a
# drop-in sets enable_iommu. Columns are sets of words: V viommu-off, U viommu-unsupported, P no-port, C needs-iommufd;
# a small letter is a warning, i viommu-off as information.

TABLE = [
    ("qemu", "qemu", "i P", "V P", "P"),
    ("qemu-coco-dev", "qemu", "i P", "V P", "P"),
    ("qemu-nvidia-cpu", "qemu", "i P", "V P", "P"),
    ("qemu-nvidia-gpu", "qemu", "i", "V", ""),
    ("qemu-nvidia-gpu-snp", "qemu", "i c", "V c", "c"),
    ("qemu-nvidia-gpu-tdx", "qemu", "i c", "V c", "c"),
    ("qemu-snp", "qemu", "i c", "V c", "c"),
    ("qemu-tdx", "qemu", "i c", "V c", "c"),
    # The Go runtime takes no enable_iommu from the table of Cloud Hypervisor, only from the annotation.
    ("clh", "clh", "i P", "V P", "V P"),
    ("clh-azure", "clh", "i P", "V P", "V P"),
    ("fc", "firecracker", "i", "V U", "U"),
    ("stratovirt", "stratovirt", "i", "V U", "U"),
    ("remote", "remote", "i", "V U", "U"),
    ("qemu-runtime-rs", "qemu", "i P", "V P", "P"),
    ("qemu-coco-dev-runtime-rs", "qemu", "i P", "V P", "P"),
    ("qemu-nvidia-cpu-runtime-rs", "qemu", "i P", "V P", "P"),
    ("qemu-nvidia-gpu-runtime-rs", "qemu", "i", "V", ""),
    ("qemu-nvidia-gpu-snp-runtime-rs", "qemu", "i c", "V c", "c"),
    ("qemu-nvidia-gpu-tdx-runtime-rs", "qemu", "i c", "V c", "c"),
    ("qemu-snp-runtime-rs", "qemu", "i P c", "V P c", "P c"),
    ("qemu-tdx-runtime-rs", "qemu", "i P c", "V P c", "P c"),
    ("rs-fc", "firecracker", "i", "V U", "U"),
    ("clh-runtime-rs", "clh", "i", "V U", "U"),
    ("clh-azure-runtime-rs", "clh", "i", "V U", "U"),
    ("dragonball", "dragonball", "i", "V U", "U"),
    ("openvmm-azure-runtime-rs", "openvmm", "i", "V U", "U"),
    ("remote-runtime-rs", "remote", "i", "V U", "U"),
    ("kata-1-qemu", "qemu", "V", "V U", "U"),
    ("kata-2-qemu", "qemu", "i", "V", ""),
]
LETTERS = {"viommu-off": "v", "viommu-unsupported": "u", "no-port": "p", "needs-iommufd": "c"}


def abbreviate(findings: list[Finding]) -> set[str]:
    """Return findings as the letters of the table."""
    letters = [(LETTERS[finding.code], finding.level) for finding in findings]
    return {{"error": letter.upper(), "warning": letter, "info": "i"}[level] for letter, level in letters}


@pytest.mark.parametrize(("name", "hypervisor", "plain", "wanted", "on"), TABLE, ids=[row[0] for row in TABLE])
def test_kata_checks_every_template(
    tmp_path: Path, name: str, hypervisor: str, plain: str, wanted: str, on: str
) -> None:
    text = (TEMPLATES / f"{name}.toml").read_text()
    assert abbreviate(check(HostTree(tmp_path / "1"), text)) == set(plain.split())
    assert abbreviate(check(HostTree(tmp_path / "2"), text, annotations=WANTED)) == set(wanted.split())
    drop_in = ON.format(hypervisor)
    assert abbreviate(check(HostTree(tmp_path / "3"), text, annotations=WANTED, drop_in=drop_in)) == set(on.split())


@pytest.mark.parametrize("name", [row[0] for row in TABLE if row[1] in ("qemu", "clh")])
def test_kata_checks_every_template_with_annotation(tmp_path: Path, name: str) -> None:
    """The annotation counts where the template admits it, and is refused by name where not."""
    text = (TEMPLATES / f"{name}.toml").read_text()
    annotations = {**WANTED, HYPERVISOR_PREFIX + "enable_iommu": "true"}
    found = check(HostTree(tmp_path), text, annotations=annotations)
    admitted = '"enable_iommu"' in text or '".*"' in text
    assert ("viommu-off" in [finding.code for finding in found]) is not admitted
    assert ("warning annotation-not-allowed" in codes(found)) is not admitted


def test_kata_checks_all_templates_listed() -> None:
    listed = {row[0] for row in TABLE} | {"qemu-se", "qemu-se-runtime-rs"}
    assert {path.stem for path in TEMPLATES.iterdir()} == listed


@pytest.mark.parametrize("name", ["qemu-se", "qemu-se-runtime-rs"])
def test_kata_checks_s390x_secure_execution(tmp_path: Path, name: str) -> None:
    """Its mode is vfio and there is no virtual IOMMU: AP queues need none, and zPCI has its own."""
    text = (TEMPLATES / f"{name}.toml").read_text()
    crypto = (target(member("uuid", "ap")),)
    assert check(HostTree(tmp_path / "1"), text, machine="s390x", targets=crypto) == []
    assert codes(check(HostTree(tmp_path / "2"), text, machine="s390x")) == ["warning needs-iommufd"]
    # Switching it on there breaks the sandbox in Go, and nothing in runtime-rs.
    found = check(HostTree(tmp_path / "3"), text, machine="s390x", drop_in=ON.format("qemu"))
    level = "error" if name == "qemu-se" else "warning"
    assert codes(found) == [f"{level} viommu-unsupported", "warning needs-iommufd"]


# What decides --------------------------------------------------------------------------------------------------------

GOOD = """\
[hypervisor.qemu]
machine_type = "q35"
enable_iommu = true
hot_plug_vfio = "root-port"
cold_plug_vfio = "no-port"
enable_annotations = ["enable_iommu"]
path = "/q"
kernel = "/k"
image = "/i"
shared_fs = "none"
[runtime]
vfio_mode = "vfio"
[agent.kata]
"""
RS_NAMES = 'name = "virt_container"\nhypervisor_name = "qemu"\nagent_name = "kata"'
BAD = GOOD.replace("enable_iommu = true", "enable_iommu = false")


def test_kata_checks_good_configuration(tmp_path: Path) -> None:
    assert check(HostTree(tmp_path), GOOD) == []


def test_viommu_off_finding_text(tmp_path: Path) -> None:
    (finding,) = check(HostTree(tmp_path), BAD)
    assert finding.as_line() == (
        "error: [viommu-off] virtual IOMMU: enable_iommu = false in /opt/kata/configuration.toml line 3, "
        "not overridden by config.d/ or annotations; set enable_iommu = true there, or: mkdir -p /opt/kata/config.d && "
        "printf '[hypervisor.qemu]\\nenable_iommu = true\\n' > /opt/kata/config.d/90-viommu.toml; "
        "then start a new sandbox"
    )


@pytest.mark.parametrize(
    ("text", "running", "expected"),
    [
        (GOOD, QEMU_OFF, ["error viommu-off"]),
        (BAD, QEMU_OFF, ["error viommu-off"]),
        (BAD, QEMU_ON, ["warning kata-config-other"]),
        (GOOD, QEMU_ON, []),
        (BAD.replace('"q35"', '"virt"'), QEMU_ON, ["warning kata-config-other"]),
        (BAD, CLH_DUMB, ["error viommu-off"]),
        (GOOD, CLH_DUMB, []),
    ],
)
def test_viommu_running_hypervisor_decides(tmp_path: Path, text: str, running: Hypervisor, expected: list[str]) -> None:
    assert codes(check(HostTree(tmp_path), text, running=running)) == expected


def test_viommu_finding_names_process_and_file(tmp_path: Path) -> None:
    (finding,) = check(HostTree(tmp_path), GOOD, running=QEMU_OFF)
    assert finding.problem == (
        "qemu-system-x86_64 (pid 812) runs without a virtual IOMMU (no -device intel-iommu or virtio-iommu), although "
        "enable_iommu = true in /opt/kata/configuration.toml line 3, not overridden by config.d/ or annotations"
    )


def test_other_configuration_in_force(tmp_path: Path) -> None:
    """A file that the running QEMU contradicts is another one's: nobody is sent to it, and nothing in it refuses."""
    no_port = GOOD.replace('"root-port"', '"no-port"')
    viommu, port = check(HostTree(tmp_path / "1"), no_port, running=QEMU_OFF)
    assert (viommu.level, viommu.code, port.level, port.code) == ("error", "viommu-off", "warning", "no-port")
    for word in (
        "another configuration was in force",
        "ConfigPath",
        "ctr --runtime-config-path",
        "start a new sandbox",
    ):
        assert word in viommu.hint
    assert "/opt/kata" not in viommu.hint
    other, port = check(HostTree(tmp_path / "2"), BAD.replace('"root-port"', '"no-port"'), running=QEMU_ON)
    assert (other.level, other.code, port.level, port.code) == ("warning", "kata-config-other", "warning", "no-port")
    assert "enable_iommu = false in /opt/kata/configuration.toml line 3" in other.problem
    assert "ConfigPath" in other.problem
    # The file may well be the one in force: it agrees, or nothing can be concluded.
    (agreed,) = check(HostTree(tmp_path / "3"), BAD, running=QEMU_OFF)
    assert "/opt/kata/config.d" in agreed.hint
    masked = QEMU_OFF.replace(evidence="kernel parameter iommu=off")
    (off,) = check(HostTree(tmp_path / "4"), GOOD, running=masked)
    assert "another configuration" not in off.hint
    (unknown,) = check(HostTree(tmp_path / "5"), GOOD, running=QEMU_OFF, machine="aarch64")[1:]
    assert unknown.code == "viommu-unsupported"


def test_viommu_without_file_by_running_hypervisor() -> None:
    runtime = Runtime("kata-go", None, QEMU_OFF, "c1", "", False, False)
    view = sandbox.inspect_sandbox(Root(), runtime, ConfigLookup(None, False), WANTED, False).replace(machine="x86_64")
    found = kata_checks.check_kata(view, make_spec(), (target(),))
    assert codes(found) == ["warning kata-config-missing", "error viommu-off"]


def test_kata_checks_uncertain_file_only_warns(tmp_path: Path) -> None:
    text = BAD.replace('"root-port"', '"no-port"')
    assert codes(check(HostTree(tmp_path / "1"), text)) == ["error viommu-off", "error no-port"]
    assert codes(check(HostTree(tmp_path / "2"), text, certain=False)) == ["warning viommu-off", "warning no-port"]
    # What runs is not in doubt.
    found = check(HostTree(tmp_path / "3"), text, certain=False, running=QEMU_OFF)
    assert codes(found) == ["error viommu-off", "warning no-port"]


def test_viommu_guest_kernel_mode_by_annotation(tmp_path: Path) -> None:
    """In guest-kernel mode the guest's driver has the device, and a missing IOMMU hurts nobody."""
    annotations = {RUNTIME_PREFIX + "vfio_mode": "guest-kernel"}
    assert codes(check(HostTree(tmp_path), BAD, annotations=annotations)) == ["info viommu-off"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("intel_iommu=off", ["error viommu-off"]),
        ("quiet iommu=off", ["error viommu-off"]),
        ("intel_iommu=off intel_iommu=on", []),
        ("agent.log=debug iommu=pt", []),
    ],
)
def test_viommu_kernel_parameters_decide(tmp_path: Path, words: str, expected: list[str]) -> None:
    found = check(HostTree(tmp_path), GOOD.replace("enable_iommu", f'kernel_params = "{words}"\nenable_iommu', 1))
    assert codes(found) == expected
    if found:
        assert (
            f'kernel_params = "{words.rsplit(maxsplit=1)[-1]}" in /opt/kata/configuration.toml line 3'
            in found[0].problem
        )


# Support -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "machine", "expected"),
    [
        (('"q35"', '"virt"'), "x86_64", ["error viommu-unsupported"]),
        (('"q35"', '"pc"'), "x86_64", ["error viommu-unsupported"]),
        (('"q35"', '""'), "x86_64", []),
        (('machine_type = "q35"', ""), "x86_64", []),
        (("", ""), "aarch64", ["error viommu-unsupported"]),
        # The Go runtime takes no enable_iommu from the table of Cloud Hypervisor.
        (("hypervisor.qemu", "hypervisor.clh"), "aarch64", ["error viommu-off"]),
        (("hypervisor.qemu", "hypervisor.clh"), "x86_64", ["error viommu-off"]),
    ],
)
def test_viommu_support(tmp_path: Path, change: tuple[str, str], machine: str, expected: list[str]) -> None:
    assert codes(check(HostTree(tmp_path), GOOD.replace(*change), machine=machine)) == expected


def test_viommu_support_go_wrong_machine_refused(tmp_path: Path) -> None:
    text = GOOD.replace('"q35"', '"virt"').replace('vfio_mode = "vfio"', "")
    assert codes(check(HostTree(tmp_path / "1"), text)) == ["error viommu-unsupported"]
    rs = text.replace("[runtime]", '[runtime]\nhypervisor_name = "qemu"')
    assert codes(check(HostTree(tmp_path / "2"), rs)) == ["warning viommu-unsupported"]


# Ports ---------------------------------------------------------------------------------------------------------------

RS = '[hypervisor.qemu]\nenable_iommu = true\n{0}\n[runtime]\nhypervisor_name = "qemu"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, []),
        (GOOD.replace("root-port", "no-port"), ["error no-port"]),
        (GOOD.replace("root-port", "bridge-port"), []),
        (GOOD.replace('"no-port"', '"root-port"'), ["error port-conflict"]),
        (GOOD.replace('cold_plug_vfio = "no-port"', ""), []),
        (GOOD.replace('cold_plug_vfio = "no-port"', "").replace("root-port", "no-port"), ["error no-port"]),
        # Releases before 3.2 have neither key, and need none.
        (GOOD.replace("hot_plug_vfio", "x").replace("cold_plug_vfio", "y"), []),
        (
            GOOD.replace("hypervisor.qemu", "hypervisor.clh").replace("root-port", "bridge-port"),
            ["error viommu-off", "error port-conflict"],
        ),
        (GOOD.replace("hypervisor.qemu", "hypervisor.clh"), ["error viommu-off"]),
        (RS.format("pcie_root_port = 0"), ["error no-port"]),
        (RS.format("pcie_root_port = 2"), []),
        (RS.format("pcie_root_port = 0\npcie_switch_port = 1"), []),
        (RS.format("pcie_root_port = 1\npcie_switch_port = 1"), ["error port-conflict"]),
        (RS.format('pcie_root_port = 0\ncold_plug_vfio = "root-port"'), []),
        (RS.format(""), []),
    ],
)
def test_kata_checks_ports(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert codes(check(HostTree(tmp_path), text)) == expected


def test_ports_attached_device_needs_none(tmp_path: Path) -> None:
    assert check(HostTree(tmp_path), GOOD.replace("root-port", "no-port"), attached=True) == []


@pytest.mark.parametrize(
    ("ports", "asking", "expected"),
    [
        (0, {"is_cri": True, "by_hand": True}, ["warning no-port"]),
        (2, {"is_cri": True, "by_hand": True}, []),
        (0, {"is_cri": False, "by_hand": True}, []),
        (0, {"is_cri": True, "by_hand": False}, []),
    ],
)
def test_ports_pod_needs_spare_ports(tmp_path: Path, ports: int, asking: dict[str, Any], expected: list[str]) -> None:
    text = GOOD.replace("[runtime]", f"pcie_root_port = {ports}\n[runtime]")
    assert codes(check(HostTree(tmp_path), text, **asking)) == expected


# Annotations, groups, hooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "by_hand", "expected"),
    [
        (GOOD, True, "error annotation-not-allowed"),
        # The shim that runs the hook has accepted its annotations, whatever the file contains now.
        (GOOD, False, "warning annotation-not-allowed"),
        (GOOD.replace("[runtime]", "[runtime]\n" + RS_NAMES), True, "warning annotation-not-allowed"),
        (GOOD.replace('["enable_iommu"]', '["machine_type"]'), True, ""),
    ],
)
def test_kata_checks_annotation_not_allowed(tmp_path: Path, text: str, by_hand: bool, expected: str) -> None:
    annotations = {HYPERVISOR_PREFIX + "machine_type": "q35"}
    found = check(HostTree(tmp_path), text, annotations=annotations, by_hand=by_hand)
    assert codes(found) == ([expected] if expected else [])
    if found:
        assert 'enable_annotations = ["enable_iommu", "machine_type"]' in found[0].hint


def test_kata_checks_multi_device_group(tmp_path: Path) -> None:
    both = (target(member(), member("0000:03:00.1")),)
    assert check(HostTree(tmp_path / "1"), GOOD, targets=both) == []
    cold = GOOD.replace('hot_plug_vfio = "root-port"\ncold_plug_vfio = "no-port"', 'cold_plug_vfio = "root-port"')
    assert codes(check(HostTree(tmp_path / "2"), cold, targets=both)) == ["warning multi-device-group"]
    rs = RS.format("pcie_root_port = 2")
    assert codes(check(HostTree(tmp_path / "3"), rs, targets=both)) == ["warning multi-device-group"]
    assert check(HostTree(tmp_path / "4"), rs, targets=(target(*both[0].group.members, cdev="vfio0"),)) == []  # type: ignore[union-attr]


@pytest.mark.parametrize(("address", "expected"), [("0001:03:00.0", ["warning pci-domain"]), ("0000:03:00.0", [])])
def test_kata_checks_pci_domain(tmp_path: Path, address: str, expected: list[str]) -> None:
    assert codes(check(HostTree(tmp_path), GOOD, targets=(target(member(address)),))) == expected


def test_kata_checks_rootless_confidential_warned(tmp_path: Path) -> None:
    text = GOOD.replace("[runtime]", "rootless = true\nconfidential_guest = true\n[runtime]")
    assert codes(check(HostTree(tmp_path), text)) == ["warning needs-iommufd", "warning group-denied"]
    assert check(HostTree(tmp_path), text, attached=True) == []


@pytest.mark.parametrize(
    ("hooks", "path", "kind", "expected"),
    [
        ({"prestart": [{"path": "/x"}]}, "/usr/share/oci/hooks", "kata-rs", ["warning hooks-dropped"]),
        ({}, "/usr/share/oci/hooks", "kata-rs", []),
        ({"prestart": [{"path": "/x"}]}, "", "kata-rs", []),
        ({"prestart": [{"path": "/x"}]}, "/usr/share/oci/hooks", "kata-go", []),
        ({"prestart": [{"path": "/x"}]}, "/usr/share/oci/hooks", "kata", ["warning hooks-dropped"]),
    ],
)
def test_kata_checks_hooks_dropped(
    tmp_path: Path, hooks: dict[str, Any], path: str, kind: str, expected: list[str]
) -> None:
    text = RS.format(f'pcie_root_port = 1\nguest_hook_path = "{path}"')
    assert codes(check(HostTree(tmp_path), text, kind=kind, spec=make_spec(hooks=hooks))) == expected


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({"cdi.k8s.io/vfio": "oci-vfio-hooks/bind=all"}, []),
        ({"cdi.k8s.io/x": "nvidia.com/gpu=0,oci-vfio-hooks/bind=all"}, []),
        ({"cdi.k8s.io/vfio": "oci-vfio-hooks/bind=other"}, ["warning hooks-dropped"]),
        ({"x.k8s.io/vfio": "oci-vfio-hooks/bind=all"}, ["warning hooks-dropped"]),
    ],
)
def test_kata_checks_hooks_by_guest_cdi(tmp_path: Path, annotations: dict[str, str], expected: list[str]) -> None:
    """The finding names the annotation by which a CDI specification in the guest brings the hook; then it is silent."""
    text = RS.format('pcie_root_port = 1\nguest_hook_path = "/usr/share/oci/hooks"')
    spec = make_spec(hooks={"prestart": [{"path": "/x"}]}, annotations=annotations)
    found = check(HostTree(tmp_path), text, kind="kata-rs", spec=spec)
    assert codes(found) == expected
    assert all('annotation cdi.k8s.io/vfio: "oci-vfio-hooks/bind=all"' in finding.hint for finding in found)


KEYS = (
    "enable_iommu",
    "kernel_params",
    "machine_type",
    "pcie_root_port",
    "pcie_switch_port",
    "cold_plug_vfio",
    "hot_plug_vfio",
    "enable_annotations",
    "confidential_guest",
    "rootless",
    "guest_hook_path",
    "path",
)
VALUES = ("1", "-5", "true", '"x"', '""', "[]", '["(["]', "{}", "{a=1}", "2026-11-22", "21:00:00", "1.5", "1" * 30)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("beside", ["", "enable_iommu = true\n", 'cold_plug_vfio = "root-port"\n'])
def test_kata_checks_any_value_type(tmp_path: Path, key: str, beside: str) -> None:
    """Kata may refuse it; it is not for the hook to stumble over."""
    tree, asked = HostTree(tmp_path), target(member(), member("0000:03:00.1"))
    for value in VALUES:
        text = (
            f"[hypervisor.qemu]\n{beside if key not in beside else ''}{key} = {value}\n[runtime]\nvfio_mode = {value}\n"
        )
        for kind in ("kata", "kata-go", "kata-rs"):
            lines = [finding.as_line() for finding in check(tree, text, kind=kind, targets=(asked,))]
            assert all("\n" not in line for line in lines)


def test_vfio_mode_finding_names_file(tmp_path: Path) -> None:
    tree = HostTree(tmp_path)
    tree.write("/c.toml", '[hypervisor.qemu]\n[runtime]\nvfio_mode = "guest-kernel"\n')
    runtime = Runtime("kata-go", None, None, "c1", "", False, False)
    config = load_config(tree.root, ConfigFile("/c.toml", "/c.toml", ""), "go", {})
    (finding,) = kata_checks.check_mode(
        sandbox.inspect_sandbox(tree.root, runtime, ConfigLookup(config, True), {}, False)
    )
    assert finding.level == "info"
    assert 'vfio_mode = "guest-kernel" in /c.toml line 3' in finding.problem
