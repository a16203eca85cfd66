# SPDX-License-Identifier: Apache-2.0
"""The configuration that a sandbox was started with, and the detection of the runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.host.hypervisor import find_hypervisor
from oci_hooks.host.kata.handlers import list_kata_handlers
from oci_hooks.host.kata.lookup import find_config
from oci_hooks.host.runtime import Runtime, detect_runtime, find_shim
from oci_hooks.linux.processes import Process, read_process
from tests.support.fake_host import HostTree, make_spec, make_state

pytestmark = pytest.mark.unit

ETC = "/etc/kata-containers/configuration.toml"
USR = "/usr/share/defaults/kata-containers/configuration.toml"
OPT = "/opt/kata/share/defaults/kata-containers/configuration.toml"
OPT_QEMU = "/opt/kata/share/defaults/kata-containers/configuration-qemu.toml"
OPT_CLH = "/opt/kata/share/defaults/kata-containers/configuration-clh.toml"
RS_ETC = "/etc/kata-containers/runtime-rs/configuration.toml"
RS_OPT = "/opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml"
SHIM = "/opt/kata/bin/containerd-shim-kata-v2"
ANNOTATION = "io.katacontainers.config_path"


def host(tmp_path: Path, *paths: str, shim: str = "", environment: str = "", options: tuple[str, ...] = ()) -> HostTree:
    """Return a host with these configurations, each for QEMU, and a shim."""
    tree = HostTree(tmp_path)
    for path in paths:
        tree.write(path, f'[hypervisor.{"clh" if "clh" in path else "qemu"}]\npath = "/q"\n')
    if shim:
        tree.process(40, shim, *options, environment=environment)
    return tree


def ask(tree: HostTree, kind: str = "kata-go", **changes: Any) -> Runtime:
    """Return a Kata that asks, with the host's shim if there is one."""
    shim = read_process(tree.root, 40) if (tree.top / "proc/40").exists() else None
    runtime: Runtime = Runtime(kind, shim, None, "c1", "", False, False).replace(**changes)
    return runtime


def place(tree: HostTree, runtime: Runtime, named: str = "", **annotations: str) -> tuple[str, bool]:
    """Return the path of the configuration and whether it is certain."""
    found = find_config(
        tree.root, runtime, {ANNOTATION if k == "path" else k: v for k, v in annotations.items()}, named
    )
    return found.config.place.path if found.config else "", found.certain


# Order ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "there", "shim", "expected"),
    [
        ("kata-go", (ETC, USR, OPT), "", ETC),
        ("kata-go", (USR, OPT), "", USR),
        ("kata-go", (USR, OPT), SHIM, OPT),
        ("kata-go", (USR, OPT), "/usr/bin/containerd-shim-kata-v2", USR),
        ("kata-go", (RS_ETC, RS_OPT), "", ""),
        ("kata-rs", (ETC, OPT, RS_OPT), "", RS_OPT),
        ("kata-rs", (RS_ETC, RS_OPT), "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2", RS_ETC),
        ("kata", (RS_OPT, OPT), "", OPT),
        ("kata", (RS_OPT,), "", RS_OPT),
        ("kata-1", (ETC,), "", ETC),
        ("kata-go", (), "", ""),
    ],
)
def test_find_config_default_files(tmp_path: Path, kind: str, there: tuple[str, ...], shim: str, expected: str) -> None:
    tree = host(tmp_path, *there, shim=shim)
    assert place(tree, ask(tree, kind)) == (expected, bool(expected))


@pytest.mark.parametrize(
    ("kind", "is_cri", "expected"),
    [
        # containerd's option before the variable in Go, behind it in runtime-rs; without CRI there is no option.
        ("kata-go", True, OPT_QEMU),
        ("kata-rs", True, "/env.toml"),
        ("kata-go", False, "/env.toml"),
    ],
)
def test_find_config_option_and_variable(tmp_path: Path, kind: str, is_cri: bool, expected: str) -> None:
    tree = host(tmp_path, ETC, OPT_QEMU, "/env.toml", shim=SHIM, environment="A=b\0KATA_CONF_FILE=/env.toml\0")
    tree.write("/etc/containerd/config.toml", CONTAINERD)
    assert place(tree, ask(tree, kind, is_cri=is_cri)) == (expected, True)


def test_find_config_path_annotation(tmp_path: Path) -> None:
    tree = host(tmp_path, ETC, "/mine.toml", shim=SHIM, environment="KATA_CONF_FILE=/etc/x")
    assert place(tree, ask(tree), path="/mine.toml") == ("/mine.toml", True)
    assert place(tree, ask(tree), path="/gone.toml") == (ETC, True)
    tree.write("/opt/kata/VERSION", "4.0.0\n")
    assert place(tree, ask(tree), path="/mine.toml") == (ETC, True)


@pytest.mark.parametrize("path", ["/c\0", "/\ud800", "\0", ""])
def test_find_config_invalid_path_skipped(tmp_path: Path, path: str) -> None:
    """JSON and TOML can write NUL and lone surrogates; an annotation's may be a tenant's."""
    tree = host(tmp_path, ETC)
    assert place(tree, ask(tree), path=path) == (ETC, True)
    assert place(tree, ask(tree), named=path or "x") == ("", False)


def test_handlers_odd_engine_files_ignored(tmp_path: Path) -> None:
    tree = host(tmp_path, ETC)
    tree.write("/etc/containerd/config.toml", 'imports = ["/etc/\\u0000/*.toml", "\\u0000", 3]\n')
    tree.write("/etc/crio/crio.conf", f"a = {'[' * 5000}")
    assert list_kata_handlers(tree.root) == ()


def test_find_config_host_toml_first(tmp_path: Path) -> None:
    tree = host(tmp_path, ETC, "/mine.toml", "/host.toml")
    assert place(tree, ask(tree), "/host.toml", path="/mine.toml") == ("/host.toml", True)
    assert place(tree, ask(tree), "/gone.toml") == ("", False)


# Handlers ------------------------------------------------------------------------------------------------------------

CONTAINERD = f"""
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata.options]
ConfigPath = "{OPT_QEMU}"
"""
BOTH = (
    CONTAINERD
    + f"""
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata-clh]
runtime_type = "io.containerd.kata-clh.v2"
options.ConfigPath = "{OPT_CLH}"
"""
)


@pytest.mark.parametrize("plugin", ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", "cri"])
def test_handlers_containerd_versions(tmp_path: Path, plugin: str) -> None:
    tree = HostTree(tmp_path)
    tree.write("/etc/containerd/config.toml", CONTAINERD.replace("io.containerd.grpc.v1.cri", plugin))
    (handler,) = list_kata_handlers(tree.root)
    assert (handler.name, handler.config_path) == ("kata", OPT_QEMU)


def test_handlers_containerd_imports_override(tmp_path: Path) -> None:
    tree = HostTree(tmp_path)
    tree.write(
        "/etc/containerd/config.toml", 'imports = ["conf.d/*.toml", "/opt/kata/containerd/x.toml"]\n' + CONTAINERD
    )
    tree.write("/etc/containerd/conf.d/a.toml", BOTH.replace(OPT_QEMU, "/a.toml"))
    tree.write("/etc/containerd/conf.d/a.txt", BOTH.replace(OPT_QEMU, "/never.toml"))
    tree.write("/opt/kata/containerd/x.toml", 'imports = ["/etc/containerd/config.toml"]\n')
    handlers = {handler.name: handler for handler in list_kata_handlers(tree.root)}
    assert handlers["kata"].config_path == "/a.toml"
    assert handlers["kata"].path == "/etc/containerd/conf.d/a.toml"
    assert handlers["kata-clh"].config_path == OPT_CLH


def test_handlers_crio_and_docker(tmp_path: Path) -> None:
    tree = HostTree(tmp_path)
    tree.write(
        "/etc/crio/crio.conf", '[crio.runtime.runtimes.kata]\nruntime_path = "/opt/kata/bin/containerd-shim-kata-v2"\n'
    )
    tree.write("/etc/crio/crio.conf.d/99-kata", f'[crio.runtime.runtimes.kata]\nruntime_config_path = "{OPT_QEMU}"\n')
    runtime = {"runtimeType": "io.containerd.kata.v2", "options": {"ConfigPath": OPT_CLH}}
    tree.write("/etc/docker/daemon.json", json.dumps({"runtimes": {"k": runtime}}))
    found = {(handler.engine, handler.name): handler.config_path for handler in list_kata_handlers(tree.root)}
    assert found == {("crio", "kata"): OPT_QEMU, ("docker", "k"): OPT_CLH}


@pytest.mark.parametrize("text", ["", "x = ", "plugins = 3\n", 'imports = "x"\n', "[plugins]\ncri = 1\n"])
def test_handlers_without_kata(tmp_path: Path, text: str) -> None:
    tree = HostTree(tmp_path)
    tree.write("/etc/containerd/config.toml", text)
    tree.write("/etc/docker/daemon.json", text or "[]")
    assert list_kata_handlers(tree.root) == ()


@pytest.mark.parametrize(
    ("handler", "running", "expected"),
    [
        ("kata", "", (OPT_QEMU, True)),
        ("kata-clh", "", (OPT_CLH, True)),
        # Which of the two is not known: the first one, but it refuses nothing.
        ("", "", (OPT_QEMU, False)),
        ("", "/opt/kata/bin/cloud-hypervisor", (OPT_CLH, True)),
        ("", "/opt/kata/bin/qemu-system-x86_64", (OPT_QEMU, True)),
        # What runs is for neither file.
        ("kata", "/opt/kata/bin/cloud-hypervisor", (OPT_QEMU, False)),
    ],
)
def test_find_config_by_handler(tmp_path: Path, handler: str, running: str, expected: tuple[str, bool]) -> None:
    tree = host(tmp_path, ETC, OPT_QEMU, OPT_CLH)
    tree.write("/etc/containerd/config.toml", BOTH)
    if running:
        tree.process(812, running)
    runtime = ask(tree, handler=handler, is_cri=True, hypervisor=find_hypervisor(tree.root, 812))
    assert place(tree, runtime) == expected


def test_find_config_by_hypervisor_path(tmp_path: Path) -> None:
    tree = host(tmp_path, OPT_QEMU)
    tree.write("/opt/b.toml", '[hypervisor.qemu]\npath = "/opt/kata/bin/qemu-system-x86_64-snp"\n')
    tree.write("/etc/containerd/config.toml", BOTH.replace(OPT_CLH, "/opt/b.toml"))
    tree.process(812, "/opt/kata/bin/qemu-system-x86_64-snp")
    assert place(tree, ask(tree, is_cri=True, hypervisor=find_hypervisor(tree.root, 812))) == ("/opt/b.toml", True)


def test_find_config_docker_own_files(tmp_path: Path) -> None:
    tree = host(tmp_path, ETC, OPT_CLH, shim=SHIM, options=("-namespace", "moby"))
    tree.write("/etc/docker/daemon.json", f'{{"runtimes": {{"kata": {{"options": {{"ConfigPath": "{OPT_CLH}"}}}}}}}}')
    assert place(tree, ask(tree)) == (OPT_CLH, True)


# Who asks ------------------------------------------------------------------------------------------------------------

MARK = {"io.katacontainers.pkg.oci.bundle_path": "/run/b"}


@pytest.mark.parametrize(
    ("status", "annotations", "pid", "mode", "by_hand", "kind"),
    [
        ("creating", {}, 70, "auto", False, "plain"),
        ("created", {}, 70, "auto", False, "plain"),
        ("", MARK, 812, "auto", False, "kata-go"),
        ("", {}, 812, "auto", False, "kata-1"),
        ("creating", MARK, 812, "auto", False, "kata-rs"),
        ("creating", {}, 812, "auto", False, "kata-rs"),
        ("creating", {}, 70, "always", False, "kata"),
        ("", MARK, 812, "never", False, "plain"),
        ("", {}, 0, "auto", True, "plain"),
        ("", {}, 812, "auto", True, "kata"),
        ("", {}, 0, "always", True, "kata"),
        ("", {"io.containerd.cri.runtime-handler": "kata-qemu"}, 0, "auto", True, "kata"),
        ("", {"io.containerd.cri.runtime-handler": "runc"}, 0, "auto", True, "plain"),
    ],
)
def test_detect_runtime(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    annotations: dict[str, str],
    pid: int,
    mode: str,
    by_hand: bool,
    kind: str,
) -> None:
    tree = HostTree(tmp_path)
    tree.process(812, "/usr/bin/qemu-system-x86_64")
    tree.process(70, "/usr/bin/sleep")
    tree.process(60, "/usr/bin/runc", "create")
    monkeypatch.setattr("os.getppid", lambda: 60)
    runtime = detect_runtime(tree.root, make_state(pid, status, annotations), make_spec(), mode, by_hand)
    assert runtime.kind == kind
    assert runtime.is_kata == (kind != "plain")


@pytest.mark.parametrize(
    ("executable", "found"),
    [
        ("/opt/kata/bin/containerd-shim-kata-v2", True),
        ("/usr/bin/containerd-shim-kata-qemu-v2", True),
        ("/usr/bin/kata-runtime", True),
        ("/usr/bin/containerd-shim-runc-v2", False),
        ("/usr/bin/runc", False),
    ],
)
def test_find_shim(tmp_path: Path, executable: str, found: bool) -> None:
    tree = HostTree(tmp_path)
    tree.process(40, executable, "-id", "c1")
    tree.process(45, "/usr/bin/oci-add-hooks", parent=40)
    for pid in (40, 45):
        shim = find_shim(tree.root, pid)
        assert (shim == Process(40, executable.rpartition("/")[2], (executable, "-id", "c1"))) is found


def test_detect_runtime_pod_sandbox(tmp_path: Path) -> None:
    annotations = {"io.kubernetes.cri.sandbox-id": "pod7", "io.kubernetes.cri.container-type": "container"}
    runtime = detect_runtime(HostTree(tmp_path).root, make_state(0, "", annotations), make_spec(), "auto", False)
    assert (runtime.sandbox, runtime.is_cri) == ("pod7", True)
