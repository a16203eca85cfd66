# SPDX-License-Identifier: Apache-2.0
"""Find the configuration file that containerd, CRI-O or Docker sets for each Kata runtime.

Kata's shim gets it as the option ConfigPath and does not publish it. Sources: containerd's
docs/man/containerd-config.toml.5 (imports, plugins), crio.conf(5) and crio.conf.d(5), dockerd's daemon.json;
kata-deploy writes the first two.
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.json_input import is_valid_path
from oci_hooks.system import DOCKER_CONFIG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from oci_hooks.system import Root

CONTAINERD_CONFIGS = (
    "/etc/containerd/config.toml",
    "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
    "/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
)
# The same plugin in containerd's configuration version 3, 2 and 1.
CRI_PLUGINS = ("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", "cri")
CRIO_CONFIG = "/etc/crio/crio.conf"
CRIO_DROP_INS = "/etc/crio/crio.conf.d"
# containerd refuses a cycle of imports; here the chain is cut.
MAX_IMPORTS = 50


class Handler(Frozen):
    """A runtime handler. name: e.g. "kata-qemu"; engine: "containerd", "crio", "docker"; config_path: "" if not set;
    path: the file that defines it."""

    name: str
    engine: str
    config_path: str
    path: str


def list_kata_handlers(root: Root) -> tuple[Handler, ...]:
    """Return the runtime handlers of this host that run Kata; a later file overrides an earlier one."""
    found = {}
    for handler in (*list_containerd(root), *list_crio(root), *list_docker(root)):
        found[handler.engine, handler.name] = handler
    return tuple(found.values())


def list_containerd(root: Root) -> Iterator[Handler]:
    """Yield the Kata runtimes of containerd's configuration and of the files that it imports."""
    waiting = [path for path in CONTAINERD_CONFIGS if root.exists(path)]
    seen: list[str] = []
    while waiting and len(seen) < MAX_IMPORTS:
        path = waiting.pop(0)
        if path in seen:
            continue
        seen.append(path)
        values = read_toml(root, path)
        for plugin in CRI_PLUGINS:
            runtimes = dig(values, "plugins", plugin, "containerd", "runtimes")
            for name, runtime in sorted(runtimes.items()):
                if is_kata(name, dig(runtime).get("runtime_type")):
                    yield Handler(name, "containerd", text_of(dig(runtime, "options").get("ConfigPath")), path)
        imports = values.get("imports")
        for pattern in filter(is_valid_path, map(str, imports if isinstance(imports, list) else ())):
            waiting.extend(expand(root, pattern, path))


def list_crio(root: Root) -> Iterator[Handler]:
    """Yield the Kata runtimes of CRI-O's configuration and its drop-ins."""
    for path in (CRIO_CONFIG, *(f"{CRIO_DROP_INS}/{name}" for name in root.list_names(CRIO_DROP_INS))):
        for name, runtime in sorted(dig(read_toml(root, path), "crio", "runtime", "runtimes").items()):
            values = dig(runtime)
            if is_kata(name, values.get("runtime_path")):
                yield Handler(name, "crio", text_of(values.get("runtime_config_path")), path)


def list_docker(root: Root) -> Iterator[Handler]:
    """Yield the Kata runtimes of Docker's configuration."""
    from oci_hooks.findings import InputError
    from oci_hooks.json_input import parse_json

    try:
        values = parse_json(root.read_bytes(DOCKER_CONFIG), DOCKER_CONFIG)
    except (OSError, InputError):
        return
    for name, runtime in sorted(dig(values, "runtimes").items()):
        if is_kata(name, dig(runtime).get("runtimeType")):
            yield Handler(name, "docker", text_of(dig(runtime, "options").get("ConfigPath")), DOCKER_CONFIG)


def is_kata(name: str, kind: object) -> bool:
    """Return whether a runtime is Kata's, by its type or path, or else by its name."""
    return "kata" in text_of(kind) or name.startswith("kata")


def expand(root: Root, pattern: str, importer: str) -> list[str]:
    """Return the files of an import: an absolute path or one relative to the importing file, with * and ?."""
    from fnmatch import fnmatch

    if not pattern.startswith("/"):
        pattern = f"{importer.rpartition('/')[0]}/{pattern}"
    directory, _, last = pattern.rpartition("/")
    # Only the last component is matched: kata-deploy, k3s and containerd's own default use no other pattern.
    return [f"{directory}/{name}" for name in root.list_names(directory or "/") if fnmatch(name, last)]


def read_toml(root: Root, path: str) -> dict[str, Any]:
    """Return the values of a TOML file; empty if unreadable: errors in the engine's own files are not reported here."""
    from oci_hooks.plain_toml import read_toml

    try:
        return read_toml(root.read_bytes(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError, ImportError):
        return {}


def dig(value: Any, *keys: str) -> dict[str, Any]:
    """Return a nested table; empty if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def text_of(value: object) -> str:
    """Return a string, or "" for anything else."""
    return value if isinstance(value, str) else ""
