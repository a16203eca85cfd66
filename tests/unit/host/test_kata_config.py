# SPDX-License-Identifier: Apache-2.0
"""Kata's configuration: lines, drop-ins, annotations, for every template that Kata ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from oci_hooks.annotations import HYPERVISOR_PREFIX
from oci_hooks.host.kata.config import ConfigFile, KataConfig, load_config
from oci_hooks.toml_lines import find_line
from tests.support.fake_host import HostTree

pytestmark = pytest.mark.unit

TEMPLATES = Path(__file__).parents[2] / "support/kata_templates"
PATH = "/opt/kata/share/defaults/kata-containers/configuration-qemu.toml"
IOMMU = HYPERVISOR_PREFIX + "enable_iommu"


def load(tree: HostTree, text: str, drop_ins: dict[str, str] | None = None, **annotations: str) -> KataConfig:
    """Return the configuration of this text with these drop-ins; annotations of the hypervisor by their last word."""
    tree.write(PATH, text)
    for name, content in (drop_ins or {}).items():
        tree.write(f"{PATH.rpartition('/')[0]}/config.d/{name}", content)
    named = {HYPERVISOR_PREFIX + key: value for key, value in annotations.items()}
    return load_config(tree.root, ConfigFile(PATH, PATH, "test"), "", named)


def told(config: KataConfig) -> list[tuple[str, str]]:
    """Return what Kata refuses, as place and text."""
    return [(problem.place, problem.text) for problem in config.reading.refused]


# Lines ---------------------------------------------------------------------------------------------------------------

TABLE = """\
# enable_iommu = true
title = "enable_iommu = true"
[agent.kata]
enable_iommu = true
[hypervisor.clh]
enable_iommu = true  # not this one
[hypervisor.qemu]
valid = [
  "enable_iommu = true",
  "[hypervisor.qemu]",
]
text = '''
enable_iommu = true
[hypervisor.qemu]
'''
enable_iommu_platform = true
enable_iommu = false
[hypervisor.qemu.factory]
enable_iommu = true
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TABLE, 17),
        (TABLE.replace("\n", "\r\n"), 17),
        ("hypervisor.qemu.enable_iommu = true\n", 1),
        ("\n[hypervisor]\nqemu.enable_iommu = true\n", 3),
        ('[hypervisor."qemu"]\n"enable_iommu" = true\n', 2),
        ("[ hypervisor . qemu ]\n  'enable_iommu'=true", 2),
        ("hypervisor = { qemu = { x = 1, enable_iommu = true } }\n", 1),
        ("[hypervisor.qemu]\nenable_iommu = [\n 1,\n 2 ]\n", 2),
        ("[hypervisor.qemu]\n#enable_iommu = true\n", 0),
        ("[hypervisor.qemux]\nenable_iommu = true\n", 0),
        ("enable_iommu = true\n", 0),
        ("", 0),
    ],
)
def test_kata_toml_line_of_key(text: str, line: int) -> None:
    assert find_line(text, ("hypervisor", "qemu", "enable_iommu")) == line


def test_kata_toml_lines_of_templates() -> None:
    """Every key of every template is found where a reader with grep finds it."""
    seen = 0
    for path in sorted(TEMPLATES.iterdir()):
        text = path.read_text()
        table = next(line[1:-1] for line in text.splitlines() if line.startswith("[hypervisor."))
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith(("enable_iommu", "machine_type", "cold_plug_vfio")):
                assert find_line(text, (*table.split("."), line.split()[0])) == number, path.name
                seen += 1
    assert seen > 50


# What decides --------------------------------------------------------------------------------------------------------

PLAIN = '[hypervisor.qemu]\npath = "/q"\nenable_iommu = false\nenable_annotations = ["enable_iommu"]\n'


def test_kata_config_file_decides(tmp_path: Path) -> None:
    config = load(HostTree(tmp_path), PLAIN)
    setting = config.hypervisor_setting("enable_iommu", False)
    assert setting.value is False
    reported = f"enable_iommu = false in {PATH} line 3, not overridden by config.d/ or annotations"
    assert config.describe(setting) == reported


def test_kata_config_date_is_not_boolean(tmp_path: Path) -> None:
    """TOML has dates, in any place; Go and Rust refuse one where they want something else."""
    config = load(HostTree(tmp_path), "[hypervisor.qemu]\nenable_iommu = 2026-11-22\n")
    assert (f"{PATH} line 2", "enable_iommu is not true or false") in told(config)


def test_kata_config_key_not_set(tmp_path: Path) -> None:
    config = load(HostTree(tmp_path), "[hypervisor.qemu]\n#enable_iommu = true\n")
    setting = config.hypervisor_setting("enable_iommu", False)
    assert setting.value is False
    assert config.describe(setting) == f"enable_iommu is not set in {PATH}, config.d/ or annotations"


def test_kata_config_last_drop_in_wins(tmp_path: Path) -> None:
    drop_ins = {
        "20-off": "\n[hypervisor.qemu]\nenable_iommu = false\n",
        "10-on.toml": "[hypervisor.qemu]\nenable_iommu = true\n",
    }
    config = load(HostTree(tmp_path), PLAIN, drop_ins)
    setting = config.hypervisor_setting("enable_iommu", False)
    directory = PATH.rpartition("/")[0] + "/config.d"
    assert setting.value is False
    assert setting.is_drop_in
    assert config.describe(setting) == (
        f"enable_iommu = false in {directory}/20-off line 3, over {directory}/10-on.toml line 2, "
        "not overridden by a later drop-in or annotations"
    )


def test_kata_config_drop_in_keeps_other_keys(tmp_path: Path) -> None:
    config = load(HostTree(tmp_path), PLAIN, {"x": '[hypervisor.qemu]\nmachine_type = "pc"\n'})
    assert config.hypervisor_setting("machine_type").value == "pc"
    assert config.hypervisor_setting("path").value == "/q"


def test_kata_config_drop_in_replaces_array(tmp_path: Path) -> None:
    config = load(HostTree(tmp_path), PLAIN, {"x": "[hypervisor.qemu]\nenable_annotations = []\n"}, enable_iommu="true")
    assert config.hypervisor_setting("enable_annotations").value == []
    assert config.refused == (IOMMU,)
    assert config.hypervisor_setting("enable_iommu").value is False


def test_kata_config_drop_ins_next_to_resolved_file(tmp_path: Path) -> None:
    tree = HostTree(tmp_path)
    tree.write(PATH, PLAIN)
    tree.write(f"{PATH.rpartition('/')[0]}/config.d/1", "[hypervisor.qemu]\nenable_iommu = true\n")
    tree.write("/etc/kata-containers/config.d/1", "[hypervisor.qemu]\nenable_iommu = 7\n")
    tree.link("/etc/kata-containers/configuration.toml", "/opt/kata/share/defaults/kata-containers/configuration.toml")
    tree.link("/opt/kata/share/defaults/kata-containers/configuration.toml", "configuration-qemu.toml")
    from oci_hooks.host.kata.config import make_config_file

    location = make_config_file(tree.root, "/etc/kata-containers/configuration.toml", "test")
    assert location is not None
    assert location.real == PATH
    assert load_config(tree.root, location, "", {}).hypervisor_setting("enable_iommu").value is True


@pytest.mark.parametrize(
    ("content", "said"),
    [("x = ", "is not TOML"), (b"a = 1\n\xff", "is not TOML: byte 6 is not UTF-8"), (None, "Is a directory")],
)
def test_kata_config_unreadable_drop_in_reported(tmp_path: Path, content: str | bytes | None, said: str) -> None:
    tree = HostTree(tmp_path)
    path = f"{PATH.rpartition('/')[0]}/config.d/9"
    if content is None:
        (tmp_path / path.lstrip("/")).mkdir(parents=True)
    else:
        tree.write(path, content)
    config = load(tree, PLAIN)
    (problem,) = [problem for problem in config.reading.refused if problem.place.startswith(path)]
    assert problem.code == "syntax"
    assert said in problem.text
    assert config.hypervisor_setting("enable_iommu").value is False


@pytest.mark.parametrize(
    ("patterns", "admitted"),
    [
        (["enable_iommu"], True),
        (["iommu"], True),
        ([".*"], True),
        (["^enable_iommu$"], True),
        (["enable_iommu_platform"], False),
        (["^iommu"], False),
        ([], False),
        (["kernel_params", "enable_.*u"], True),
        ([r"[[:alpha:]_]+("], False),
        ([r"[[:alpha:]_]+$"], True),
        ("enable_iommu", False),
        ([1], False),
    ],
)
def test_enable_annotations_unanchored_expressions(tmp_path: Path, patterns: object, admitted: bool) -> None:
    import json

    text = f"[hypervisor.qemu]\nenable_iommu = false\nenable_annotations = {json.dumps(patterns)}\n"
    config = load(HostTree(tmp_path), text, enable_iommu="true")
    assert config.hypervisor_setting("enable_iommu").value is admitted
    assert bool(config.refused) is not admitted


def test_kata_config_annotation_beats_files(tmp_path: Path) -> None:
    config = load(HostTree(tmp_path), PLAIN, {"1": "[hypervisor.qemu]\nenable_iommu = true\n"}, enable_iommu="F")
    setting = config.hypervisor_setting("enable_iommu")
    directory = PATH.rpartition("/")[0] + "/config.d"
    assert setting.value is False
    assert config.describe(setting) == f"enable_iommu = false (annotation {IOMMU}), over {directory}/1 line 2"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("T", True), ("0", False)])
def test_kata_annotation_values(tmp_path: Path, text: str, value: object) -> None:
    assert load(HostTree(tmp_path), PLAIN, enable_iommu=text).hypervisor_setting("enable_iommu").value == value


def test_kata_annotation_not_boolean_refused(tmp_path: Path) -> None:
    config = load(HostTree(tmp_path), PLAIN, enable_iommu="yes")
    assert (f"annotation {IOMMU}", "'yes' is neither true nor false") in told(config)
    assert config.hypervisor_setting("enable_iommu").value is False


def test_kata_annotation_vfio_mode_always_allowed(tmp_path: Path) -> None:
    tree = HostTree(tmp_path)
    tree.write(PATH, '[hypervisor.qemu]\n[runtime]\nvfio_mode = "guest-kernel"\n')
    annotations = {"io.katacontainers.config.runtime.vfio_mode": "vfio"}
    config = load_config(tree.root, ConfigFile(PATH, PATH, ""), "", annotations)
    assert config.runtime_setting("vfio_mode").value == "vfio"


def test_kata_annotation_plug_resets_other_setting(tmp_path: Path) -> None:
    text = (
        '[hypervisor.qemu]\nhot_plug_vfio = "bridge-port"\ncold_plug_vfio = "no-port"\nenable_annotations = ["_vfio"]\n'
    )
    config = load(HostTree(tmp_path), text, cold_plug_vfio="root-port")
    assert config.hypervisor_setting("hot_plug_vfio").value == "no-port"
    assert config.hypervisor_setting("cold_plug_vfio").value == "root-port"


def test_kata_annotation_plug_ignored_by_runtime_rs(tmp_path: Path) -> None:
    text = '[hypervisor.qemu]\ncold_plug_vfio = "no-port"\nenable_annotations = [".*"]\n'
    text += '[runtime]\nhypervisor_name = "qemu"\n'
    config = load(HostTree(tmp_path), text, cold_plug_vfio="root-port")
    assert config.flavour == "rs"
    assert config.hypervisor_setting("cold_plug_vfio").value == "no-port"


def test_kata_config_runtime_rs_hypervisor_name(tmp_path: Path) -> None:
    text = '[hypervisor.clh]\n[hypervisor.qemu]\nenable_iommu = true\n[runtime]\nhypervisor_name = "qemu"\n'
    assert load(HostTree(tmp_path), text).hypervisor == "qemu"


def test_kata_config_empty(tmp_path: Path) -> None:
    config = load(HostTree(tmp_path), "")
    assert config.hypervisor == ""
    assert config.hypervisor_setting("enable_iommu", False).value is False
