# SPDX-License-Identifier: Apache-2.0
"""The examples are what their readers (podman, CRI-O, containerd, Docker, a CDI library) take."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomllib

from oci_hooks.guest import settings as guest_settings
from oci_hooks.host import settings as host_settings
from oci_hooks.schema import find_mistakes
from tests.provision import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
GUEST_PATH = "/usr/libexec/oci/hooks.d/vfio-guest-bind"
HOST_PATH = "/usr/libexec/oci/hooks.d/vfio-host-check"
STAGES = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
STRINGS = {"type": "array", "items": {"type": "string"}}
HOOK = {
    "type": "object",
    "required": ["path"],
    "additionalProperties": False,
    "properties": {
        "path": {"enum": [GUEST_PATH, HOST_PATH]},
        "args": {**STRINGS, "minItems": 1},
        "env": STRINGS,
        "timeout": {"type": "integer", "minimum": 1},
    },
}
HOOKS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {stage: {"type": "array", "items": HOOK, "minItems": 1} for stage in STAGES},
}
# oci-hooks(5), version 1.0.0.
HOOKS_D = {
    "type": "object",
    "required": ["version", "hook", "when", "stages"],
    "additionalProperties": False,
    "properties": {
        "version": {"const": "1.0.0"},
        "hook": HOOK,
        "when": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": False,
            "properties": {
                "always": {"type": "boolean"},
                "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
                "commands": STRINGS,
                "hasBindMounts": {"type": "boolean"},
            },
        },
        "stages": {"type": "array", "items": {"enum": STAGES}, "minItems": 1},
    },
}
# The Container Device Interface's SPEC.md, 0.5.0, as far as it is about hooks.
CDI = {
    "type": "object",
    "required": ["cdiVersion", "kind", "devices"],
    "additionalProperties": False,
    "properties": {
        "cdiVersion": {"const": "0.5.0"},
        "kind": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z][A-Za-z0-9_-]*[A-Za-z0-9]$"},
        "devices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "containerEdits"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "pattern": "^[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?$"},
                    "containerEdits": {
                        "type": "object",
                        "required": ["hooks"],
                        "additionalProperties": False,
                        "properties": {
                            "hooks": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "required": ["hookName", "path"],
                                    "additionalProperties": False,
                                    "properties": {"hookName": {"enum": STAGES}, **HOOK["properties"]},  # type: ignore[dict-item]
                                },
                            }
                        },
                    },
                },
            },
        },
    },
}
CONFIG = {
    "type": "object",
    "required": ["hooks"],
    "additionalProperties": False,
    "properties": {"hooks": HOOKS, "annotations": {"type": "object", "additionalProperties": {"type": "string"}}},
}


def load(path: Path) -> Any:
    """Return the value of a JSON file."""
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("pattern", "schema"), [("hooks.d/*.json", HOOKS_D), ("cdi/*.json", CDI), ("config.json/*.json", CONFIG)]
)
def test_examples_json_matches_reader_schema(pattern: str, schema: dict[str, Any]) -> None:
    paths = sorted(EXAMPLES.glob(pattern))
    assert paths
    for path in paths:
        jsonschema.Draft7Validator(schema).validate(load(path))


@pytest.mark.parametrize("name", ["vfio-host-check", "vfio-guest-bind"])
def test_examples_hooks_d_matches_only_own_annotations(name: str) -> None:
    ((pattern, value),) = load(EXAMPLES / f"hooks.d/{name}.json")["when"]["annotations"].items()
    for rest in ("", ".devices", ".devices.web", ".record"):
        assert re.search(pattern, f"io.katacontainers.x.vfio{rest}")
    assert not re.search(pattern, "io.katacontainers.x.vfiox")
    assert not re.search(pattern, "xio.katacontainers.x.vfio")
    assert re.search(value, "")
    # podman's regular expressions are Go's: nothing that they don't have.
    assert not re.search(r"\(\?", pattern)


def test_examples_settings_show_every_default() -> None:
    host, guest = ((EXAMPLES / f"settings/{name}.toml").read_text() for name in ("host", "guest"))
    # As they are installed, they say nothing.
    assert tomllib.loads(host) == tomllib.loads(guest) == {}
    values = {}
    for name, text in (("host", host), ("guest", guest)):
        values[name] = tomllib.loads(re.sub(r"^#(?=[a-z_\[])", "", text, flags=re.MULTILINE))
        assert find_mistakes(values[name], f"{name}-settings", name, "bad", "") == ()
        schema = settings_schema(name)
        assert set(values[name]) == set(schema["properties"])
    defaults = guest_settings.GuestSettings()
    for key in ("deadline", "on_failure", "map", "allow_noiommu", "widen_parent_cgroups"):
        assert values["guest"][key] == getattr(defaults, key), key
    assert host_settings.HOST_SETTINGS in host
    assert guest_settings.GUEST_SETTINGS in guest


def settings_schema(name: str) -> dict[str, Any]:
    """Return the schema of host.toml or guest.toml."""
    return dict(load(REPOSITORY / f"oci_hooks/schemas/{name}-settings.json"))


@pytest.mark.parametrize("side", ["host", "guest"])
def test_examples_containerd_base_spec(side: str) -> None:
    base = {"ociVersion": "1.0.2", "process": {"cwd": "/"}, "hooks": {"poststop": [{"path": "/other"}]}}
    fragment = EXAMPLES / f"config.json/{side}.json"
    done = subprocess.run(
        [EXAMPLES / "containerd/add-hooks", fragment],
        input=json.dumps(base),
        capture_output=True,
        text=True,
        check=True,
    )
    spec = json.loads(done.stdout)
    assert spec["process"] == base["process"]
    for phase, hooks in load(fragment)["hooks"].items():
        assert spec["hooks"][phase][-len(hooks) :] == hooks
    assert spec["hooks"]["poststop"][0] == {"path": "/other"}
    for name in ("vfio", "kata"):
        runtime = tomllib.loads((EXAMPLES / f"containerd/{name}.toml").read_text())
        assert runtime["base_runtime_spec"] in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize(
    "call", [["--root", "/r", "create", "--bundle", "BUNDLE", "c"], ["create", "--bundle=BUNDLE", "c"], ["create", "c"]]
)
def test_docker_wrapper_adds_hooks_once_execs_runtime(tmp_path: Path, call: list[str]) -> None:
    wrapper = tmp_path / "vfio-runc"
    hooks = EXAMPLES / "config.json/guest.json"
    text = (EXAMPLES / "docker/vfio-runc").read_text()
    text = text.replace('"/usr/bin/runc"', '"/bin/echo"').replace('"/etc/oci-vfio-hooks/hooks.json"', f'"{hooks}"')
    wrapper.write_text(text)
    wrapper.chmod(0o755)
    present = {"path": "/usr/bin/dockerd-hook"}
    (tmp_path / "config.json").write_text(json.dumps({"hooks": {"prestart": [present]}, "process": {}}))
    call = [word.replace("BUNDLE", str(tmp_path)) for word in call]
    for _ in range(2):
        done = subprocess.run([wrapper, *call], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == " ".join(call) + "\n"
        config = load(tmp_path / "config.json")
        declared = load(hooks)
        hooks_there = {"prestart": [present], **declared["hooks"]}
        assert config == {"hooks": hooks_there, "process": {}, "annotations": declared["annotations"]}


@pytest.mark.parametrize(
    ("devices", "own", "has"),
    [
        (["/dev/kvm"], {}, {"a": "auto"}),
        (["/dev/kvm"], {"a": "0000:01:00.0", "b": "c"}, {"a": "0000:01:00.0", "b": "c"}),
        (["/dev/vfio/vfio", "/dev/vfio/12"], {}, {}),
        (["/dev/vfio/12"], {"a": "id:8086:10d3"}, {"a": "id:8086:10d3"}),
    ],
)
def test_docker_wrapper_adds_annotations_where_none_says_otherwise(
    devices: list[str], own: dict[str, str], has: dict[str, str]
) -> None:
    text = (EXAMPLES / "docker/vfio-runc").read_text().rpartition("main()")[0]
    wrapper: dict[str, Any] = {}
    exec(compile(text, "vfio-runc", "exec"), wrapper)  # noqa: S102 - it is ours, and has no .py to import
    config: dict[str, Any] = {"linux": {"devices": [{"path": path} for path in devices]}, "annotations": own}
    wrapper["add_annotations"](config, {"annotations": {"a": "auto"}})
    assert config["annotations"] == has


def test_docker_wrapper_leaves_rest_of_config(tmp_path: Path) -> None:
    wrapper = tmp_path / "vfio-runc"
    wrapper.write_text((EXAMPLES / "docker/vfio-runc").read_text().replace('"/usr/bin/runc"', '"/bin/echo"'))
    wrapper.chmod(0o755)
    done = subprocess.run([wrapper, "state", "c"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "state c\n"
    (runtime,) = load(EXAMPLES / "docker/daemon.json")["runtimes"].values()
    assert f"{Path(runtime['path']).parent}/" in (EXAMPLES / "README.md").read_text()


def test_examples_match_readme_list() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for line in re.findall(r"^    (.*)$", readme, re.MULTILINE):
        for word in re.findall(r"(?<![\w/])(?:hooks\.d|cdi|containerd|config\.json|docker|settings)/[\w.-]+", line):
            assert (EXAMPLES / word).is_file(), line
    for directory in ("hooks.d", "cdi", "containerd", "docker", "settings"):
        for path in (EXAMPLES / directory).iterdir():
            assert path.name in readme, path
