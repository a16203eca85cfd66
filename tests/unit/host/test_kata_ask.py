# SPDX-License-Identifier: Apache-2.0
"""vfio-host-check --kata-config: answers, places, exit codes, bad input; and no message that Kata takes for another."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.host import hook as host_hook
from oci_hooks.host.kata.admission import AnnotationFilter
from oci_hooks.host.kata.config import ConfigFile, load_config
from oci_hooks.system import Root

pytestmark = pytest.mark.unit

TEMPLATES = Path(__file__).parents[2] / "support/kata_templates"
IOMMU = "io.katacontainers.config.hypervisor.enable_iommu"
TEXT = """\
[hypervisor.qemu]
path = "/nowhere/qemu"
kernel = "/nowhere/vmlinuz"
image = "/nowhere/image"
shared_fs = "none"
enable_iommu = false
enable_annotations = ["enable_iommu"]
[runtime]
vfio_mode = "guest-kernel"
"""


def ask(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    """Return the exit code and the object that is printed."""
    code = host_hook.main(["--kata-config", *argv, "--json"])
    out, err = capfd.readouterr()
    assert err == ""
    return code, json.loads(out)


def test_kata_ask_values_with_source(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text(TEXT)
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d/10").write_text('\n[hypervisor.qemu]\nmachine_type = "virt"\n')
    code, found = ask(capfd, str(path), "--runtime", "go", "--annotation", f"{IOMMU}=true")
    assert code == 0
    assert (found["enable_iommu"], found["decided"]["enable_iommu"]) == (True, f"annotation {IOMMU}")
    assert (found["machine_type"], found["decided"]["machine_type"]) == ("virt", f"{tmp_path}/config.d/10:3")
    assert (found["vfio_mode"], found["decided"]["vfio_mode"]) == ("guest-kernel", f"{path}:9")
    assert (found["hot_plug_vfio"], found["decided"]["hot_plug_vfio"]) == ("no-port", "default")


def test_kata_ask_refusals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text(TEXT.replace("= false", "= 1"))
    code, found = ask(capfd, str(path), "--runtime", "go")
    assert (code, found) == (1, {"refused": f"load: {path} line 6: enable_iommu is not true or false"})
    code, both = ask(capfd, str(path))
    assert code == 1
    assert list(both) == ["go", "rust"]


def test_kata_ask_uncertain(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text(TEXT.replace("enable_annotations", "Enable_IOMMU = true\nenable_annotations"))
    code, found = ask(capfd, str(path), "--runtime", "go")
    assert (code, list(found)) == (2, ["uncertain"])
    assert f"{path} line 7" in found["uncertain"]


def test_kata_ask_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text(TEXT)
    assert host_hook.main(["--kata-config", str(path), "--runtime", "go"]) == 0
    assert re.search(rf"(?m)^  enable_iommu +false +{re.escape(str(path))}:6$", capfd.readouterr().out)


def complete(text: str, rust: bool) -> str:
    """Return a template with what the committed excerpts leave out and Kata needs."""
    more = [line for line in ('kernel = "/k"', 'image = "/i"') if line.split()[0] + " =" not in text]
    more += [] if "shared_fs" in text else ['shared_fs = "virtio-fs"', 'virtio_fs_daemon = "/d"']
    text = re.sub(r"(?m)^(\[hypervisor\.\w+\])$", "\n".join((r"\1", *more)), text, count=1)
    if rust:
        names = [f'{key} = "{value}"' for key, value in (("name", "virt_container"), ("agent_name", "kata"))]
        missing = [line for line in names if not re.search(rf"(?m)^{line.split()[0]} =", text)]
        text = re.sub(r"(?m)^\[runtime\]$", "\n".join(("[runtime]", *missing)), text)
        text += "" if "[agent.kata]" in text else "\n[agent.kata]\n"
    return text


@pytest.mark.parametrize("name", ["qemu", "clh", "fc", "qemu-runtime-rs", "clh-runtime-rs", "dragonball"])
def test_kata_ask_templates_readable(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime = "rust" if "runtime-rs" in name or name == "dragonball" else "go"
    path = tmp_path / "configuration.toml"
    path.write_text(complete((TEMPLATES / f"{name}.toml").read_text(), runtime == "rust"))
    code, found = ask(capfd, str(path), "--runtime", runtime)
    assert (code, found.get("enable_iommu")) == (0, False), found


# Bad input -----------------------------------------------------------------------------------------------------------


def read_quickly(path: Path, annotations: dict[str, str]) -> list[Any]:
    """Return both readers' readings, made in less than eight seconds together."""
    begun = time.monotonic()
    location = ConfigFile(str(path), str(path), "")
    readings = [load_config(Root("/"), location, flavour, annotations).reading for flavour in ("go", "rs")]
    assert time.monotonic() - begun < 8
    return readings


HEAD = '[hypervisor.qemu]\nshared_fs = "none"\n'


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "".join(f'k{number} = "{"x" * 20}"\n' for number in range(33000)),
        HEAD + "".join(f"[hypervisor.t{number}]\na = 1\n" for number in range(10000)),
        "a = " + "[" * 500000,
        "a." * 500000 + "b = 1",
        '"' * 1000000,
        "a = 1" + "0" * 100000,
    ],
    ids=["1 MiB", "10,000 tables", "deep array", "deep key", "quotes", "digits"],
)
def test_kata_ask_large_file_in_time(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert all(reading.refused for reading in read_quickly(path, {}))


def test_kata_ask_odd_drop_ins(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(HEAD)
    drop_ins = tmp_path / "config.d"
    drop_ins.mkdir()
    os.mkfifo(drop_ins / "fifo")
    (drop_ins / "loop").symlink_to("loop")
    (drop_ins / "directory").mkdir()
    for number in range(4000):
        (drop_ins / f"{number}").write_text(HEAD)
    for reading in read_quickly(path, {}):
        locations = [problem.place.rpartition("/")[2] for problem in reading.refused]
        assert {"fifo", "loop", "directory"} <= set(locations)


@pytest.mark.parametrize("rust", [False, True])
@pytest.mark.parametrize("pattern", ["(a+)+$", "((a*)*b)*$", "(((a{1,900}){1,900}){1,900})", "(" * 3000])
def test_kata_regex_linear_time(pattern: str, rust: bool) -> None:
    begun = time.monotonic()
    assert AnnotationFilter([pattern], rust).allows("a" * 65536 + "!") in (True, False, None)
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize(
    ("pattern", "go", "rust"),
    [
        ("enable_iommu", True, True),
        (r"\Qenable\E", True, False),
        (r"\pL", True, True),
        (r"iommu\z", True, True),
        (r"iommu\Z", False, False),
        ("(?i)IOMMU$", True, True),
        ("(?x)enable _ iommu", False, True),
        ("[[:alpha:]]_", True, True),
        ("e**", False, True),
        ("(", False, False),
        ("(?=e)", False, False),
        ("e{1,1001}nable", False, True),
    ],
)
def test_kata_regex_matches_go_and_rust(pattern: str, go: bool, rust: bool) -> None:
    assert (
        AnnotationFilter([pattern], False).allows("enable_iommu"),
        AnnotationFilter([pattern], True).allows("enable_iommu"),
    ) == (go, rust)


def test_kata_messages_avoid_not_found() -> None:
    """Kata's agent and shim turn an error with this text into gRPC's NotFound."""
    for path in sorted(Path(host_hook.__file__).parent.glob("kata_*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for word in re.findall(r'"[^"]*"', line):
                assert not re.search("not found|not exist", word), f"{path.name}:{number}"
