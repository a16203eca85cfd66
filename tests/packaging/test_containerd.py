# SPDX-License-Identifier: Apache-2.0
"""examples/containerd/add-runtime, on each containerd that Debian has: only the class is new in what is in force.

`containerd config dump` is compared before and after here once more, by a reader of TOML: add-runtime compares lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
import tomllib

from tests import packages
from tests.newcomer.lines import read_section
from tests.packages import Root
from tests.provision import REPOSITORY

HOWTO = REPOSITORY / "docs/howto/containerd.md"
EXAMPLES = "/usr/share/doc/oci-vfio-hooks/examples"
CONFIG = "/etc/containerd/config.toml"
PLUGINS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
CLUSTER = """\
version = 2
[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.example/pause:3.9"
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
    [plugins."io.containerd.grpc.v1.cri".containerd]
      snapshotter = "native"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
        runtime_type = "io.containerd.runc.v2"
        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
          SystemdCgroup = true
"""
VERSION_3 = """\
version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "registry.example/pause:3.9"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
options = {SystemdCgroup = true}
"""
KATA = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
  runtime_type = "io.containerd.kata.v2"
  pod_annotations = ["example.com/*"]  # ours
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata.options]
    ConfigPath = "/opt/kata/configuration.toml"
"""
IMPORTS = 'imports = ["/etc/containerd/conf.d/*.toml"]\n'
# Debian's own file is in the package; None: there is no file.
FILES: dict[str, str | None] = {"none": None, "empty": "", "comment": "# nothing\n", "cluster": CLUSTER}
MakeContainerd = Callable[[str], Root]


@pytest.fixture(params=sorted(packages.CONTAINERDS))
def containerd(request: pytest.FixtureRequest, dist: Path, tmp_path: Path) -> Root:
    """Return a root with our packages and a containerd as apt unpacks it, the base spec and the examples in place."""
    root = Root(packages.ensure_containerd(str(request.param)), tmp_path / "root")
    assert f" {request.param}." in root.run("containerd", "--version").stdout
    stub = tmp_path / "root/top/usr/bin/systemctl"
    stub.parent.mkdir(parents=True, exist_ok=True)
    # The how-to restarts containerd; whether it takes the configuration is what counts here.
    stub.write_text("#!/bin/sh\ncontainerd config dump >/dev/null\n")
    stub.chmod(0o755)
    return root


def write(root: Root, text: str | None, path: str = CONFIG) -> None:
    """Make a file in the root as given; None: take it away."""
    root.run("sh", "-c", f"mkdir -p $(dirname {path}) && rm -f {path}")
    if text is not None:
        root.run("tee", path, text=text)


def dump(root: Root) -> dict[str, Any]:
    """Return what is in force. `dump` wants a file where the daemon doesn't."""
    there = root.run("test", "-e", CONFIG, code=None).returncode == 0
    command = ("containerd", "--config", CONFIG if there else "/dev/null", "config", "dump")
    return {**tomllib.loads(root.run(*command).stdout), "imports": []}


def take_classes(config: dict[str, Any]) -> dict[str, Any]:
    """Take the runtime classes out of what is in force, and return them."""
    classes: dict[str, Any] = config["plugins"][PLUGINS[config["version"]]]["containerd"].pop("runtimes")
    return classes


def add(root: Root, name: str, code: int = 0) -> str:
    """Run add-runtime; return what it printed."""
    done = root.run("containerd/add-runtime", name, f"containerd/{name}.toml", code=code, cwd=EXAMPLES)
    return done.stdout + done.stderr


def follow_howto(root: Root) -> None:
    """Type the lines of the how-to for the class vfio."""
    change, *lines = read_section("Declare once: a runtime class", HOWTO)
    assert change == f"cd {EXAMPLES}"
    for line in lines:
        root.run("sh", "-ec", line, cwd=EXAMPLES)


@pytest.mark.parametrize("file", ["debian", *FILES])
def test_only_the_class_is_new(containerd: Root, file: str) -> None:
    if file != "debian":
        write(containerd, FILES[file])
    before = dump(containerd)
    follow_howto(containerd)
    after = dump(containerd)
    had, has = take_classes(before), take_classes(after)
    assert after == before
    ours = has.pop("vfio")
    assert has == had
    assert ours["base_runtime_spec"] == "/etc/containerd/vfio-spec.json"
    assert ours["container_annotations"] == ours["pod_annotations"] == ["io.katacontainers.x.vfio*"]
    assert ours.get("options", {}).get("SystemdCgroup", False) is (file == "cluster")
    assert "has the class vfio already" in add(containerd, "vfio")


def test_cdi_is_where_the_page_has_it(containerd: Root) -> None:
    """1.6 has no CDI, 1.7 has it after the page's two keys, 2.1 has it on."""
    version = containerd.run("containerd", "--version").stdout.split()[2]
    config = dump(containerd)
    section = config["plugins"][PLUGINS[config["version"]]]
    wanted = next(value for key, value in {"1.6": None, "1.7": False, "2.1": True}.items() if version.startswith(key))
    assert section.get("enable_cdi") is wanted
    if wanted is False:
        _, *keys = read_section("By CDI", HOWTO)
        write(containerd, "\n".join(["version = 2", f'[plugins."{PLUGINS[2]}"]', *keys]))
        section = dump(containerd)["plugins"][PLUGINS[2]]
        assert section["enable_cdi"] is True
        assert section["cdi_spec_dirs"] == ["/etc/cdi", "/var/run/cdi"]


def test_a_class_that_is_there_gets_what_it_lacks(containerd: Root) -> None:
    write(containerd, CLUSTER + KATA)
    before = dump(containerd)
    add(containerd, "kata")
    after = dump(containerd)
    had, has = take_classes(before), take_classes(after)
    assert after == before
    assert has["runc"] == had["runc"]
    changed = {key: value for key, value in has["kata"].items() if value != had["kata"].get(key)}
    assert changed == {
        "base_runtime_spec": "/etc/containerd/vfio-spec.json",
        "privileged_without_host_devices": True,
        "pod_annotations": ["example.com/*", "io.katacontainers.*"],
        "container_annotations": ["io.katacontainers.*"],
    }


def test_the_class_goes_where_the_section_in_force_is(containerd: Root) -> None:
    main = IMPORTS + 'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\nsandbox_image = "registry.example/other:1"\n'
    write(containerd, main)
    write(containerd, CLUSTER, "/etc/containerd/conf.d/cluster.toml")
    before = dump(containerd)
    assert "/etc/containerd/conf.d/cluster.toml: class vfio added" in add(containerd, "vfio")
    after = dump(containerd)
    take_classes(before)
    assert take_classes(after)["vfio"]["options"]["SystemdCgroup"] is True
    assert after == before
    assert containerd.run("cat", CONFIG).stdout == main


@pytest.mark.parametrize("containerd", ["2.1"], indirect=True)
def test_version_3(containerd: Root) -> None:
    write(containerd, VERSION_3)
    before = dump(containerd)
    assert take_classes(before)["runc"]["options"]["SystemdCgroup"] is True
    add(containerd, "vfio")
    after = dump(containerd)
    assert take_classes(after)["vfio"]["options"]["SystemdCgroup"] is True
    assert after == before


DEEP = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]\n'
REFUSED = {
    "cri-disabled-by-docker": ('disabled_plugins = ["cri"]\n', "vfio", 'disabled_plugins has "cri"'),
    "cri-disabled": (
        'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n',
        "vfio",
        'disabled_plugins has "cri"',
    ),
    "no-version": ("oom_score = -999\n", "vfio", "has no `version`"),
    "no-toml": ("version = 2\n[[[\n", "vfio", "config dump` failed"),
    "other-type": (f'version = 2\n{DEEP}runtime_type = "io.containerd.runc.v2"\n', "kata", "change it by hand"),
    "other-spec": (f'version = 2\n{DEEP}base_runtime_spec = "/etc/mine.json"\n', "kata", "change it by hand"),
    "list-of-lines": (f'version = 2\n{DEEP}pod_annotations = [\n"a",\n]\n', "kata", "has more than one line"),
    "inline": (
        'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\n'
        'runtimes = {runc = {runtime_type = "io.containerd.runc.v2"}}\n',
        "vfio",
        "error: ",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_it_cannot_prove_it_leaves_alone(containerd: Root, case: str) -> None:
    text, name, words = REFUSED[case]
    write(containerd, text)
    said = add(containerd, name, code=1)
    assert words in said
    assert said.startswith("add-runtime: error: ")
    assert containerd.run("cat", CONFIG).stdout == text
