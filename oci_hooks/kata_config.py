# SPDX-License-Identifier: Apache-2.0
"""Kata's configuration as Kata itself would come to it: which file, its drop-ins, the sandbox's annotations.

Sources, in kata-containers: containerd-shim-v2/create.go (loadRuntimeConfig), katautils/config.go (decodeDropIns,
GetDefaultConfigFilePaths), oci/utils.go (checkAnnotationNameIsValid); runtime-rs crates/runtimes/src/manager.rs
(load_config), libs/kata-types/src/config/{default,drop_in}.rs, annotations/mod.rs. 1.x has no
drop-ins.
"""

from __future__ import annotations

from oci_hooks.errors import Finding
from oci_hooks.oci import is_name
from oci_hooks.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.files import Root

GO_DEFAULTS = (
    "/etc/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
    "/opt/kata/share/defaults/kata-containers/configuration.toml",
)
RS_DEFAULTS = (
    "/etc/kata-containers/runtime-rs/configuration.toml",
    "/usr/share/defaults/kata-containers/runtime-rs/configuration.toml",
    "/opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml",
)

PATH_ANNOTATION = "io.katacontainers.config_path"
HYPERVISOR_PREFIX = "io.katacontainers.config.hypervisor."
RUNTIME_PREFIX = "io.katacontainers.config.runtime."

# Keys that an annotation can set, by the runtime that reads it; any other is never taken from an annotation here.
GO_ANNOTATED = (
    "enable_iommu",
    "hot_plug_vfio",
    "cold_plug_vfio",
    "pcie_root_port",
    "pcie_switch_port",
    "machine_type",
    "kernel_params",
    "guest_hook_path",
)
RS_ANNOTATED = (
    "enable_iommu",
    "pcie_root_port",
    "pcie_switch_port",
    "machine_type",
    "kernel_params",
    "guest_hook_path",
)
# strconv.ParseBool
TRUE_WORDS = ("1", "t", "T", "TRUE", "true", "True")
FALSE_WORDS = ("0", "f", "F", "FALSE", "false", "False")


class Place(Record):
    """Where a configuration is. path: as it was named; real: with links resolved; reason: why this one."""

    path: str
    real: str
    reason: str


class Source(Record):
    """One file of a configuration: its path, its text and its values."""

    path: str
    text: str
    values: dict[str, Any]


class Setting(Record):
    """One value, and what decided it.

    keys: tables and key; sources: the files that set it, the last one wins; annotation: name of the one that overrides
    them all, "" without one; is_drop_in: whether the deciding file is a drop-in.
    """

    keys: tuple[str, ...]
    value: Any
    sources: tuple[Source, ...] = ()
    annotation: str = ""
    is_drop_in: bool = False

    @property
    def key(self) -> str:
        """The key without its tables."""
        return self.keys[-1]

    def describe(self) -> str:
        """Return the setting with its place, e.g. `enable_iommu = false in /etc/.../configuration.toml line 302`."""
        text = f"{self.key} = {format_value(self.value)}"
        places = [find_place(source, self.keys) for source in self.sources[-2:]]
        if self.annotation:
            return f"{text} by annotation {self.annotation}" + (f", over {places[-1]}" if places else "")
        if not places:
            return f"{self.key} is not set"
        return f"{text} in {places[-1]}" + (f", over {places[0]}" if len(places) > 1 else "")


class KataConfig(Record):
    """A sandbox's whole configuration.

    place: the file that it starts from; sources: that file and its drop-ins, the last one wins; hypervisor: the name of
    its table, "" without one; flavour: "go" or "rs"; annotations: those that are in force; refused: names of those
    that are not; findings: what could not be read.
    """

    place: Place
    sources: tuple[Source, ...]
    hypervisor: str
    flavour: str
    annotations: dict[str, str]
    refused: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def directory(self) -> str:
        """Where its drop-ins are."""
        return self.place.real.rpartition("/")[0] + "/config.d"

    def hypervisor_setting(self, key: str, default: Any = None) -> Setting:
        """Return a setting of the hypervisor's table, with what decided it."""
        return find_setting(self, ("hypervisor", self.hypervisor, key), HYPERVISOR_PREFIX, default)

    def runtime_setting(self, key: str, default: Any = None) -> Setting:
        """Return a setting of the runtime's table, with what decided it."""
        return find_setting(self, ("runtime", key), RUNTIME_PREFIX, default)

    def describe(self, setting: Setting) -> str:
        """Return a setting with its place and with what did not override it."""
        if setting.annotation:
            return setting.describe()
        later = "annotations" if setting.is_drop_in else "config.d/ or annotations"
        if not setting.sources:
            return f"{setting.key} is not set in {self.place.real}, {later}"
        return f"{setting.describe()}, not overridden by {'a later drop-in or ' if setting.is_drop_in else ''}{later}"


# The file ------------------------------------------------------------------------------------------------------------


def find_default_places(root: Root, flavour: str, shim: str) -> tuple[Place, ...]:
    """Return the configurations at Kata's default places that are there, first the one that it would take.

    flavour: "go", "rs", or "" for both, Go's first; shim: path of the shim's executable, "" when not known: one below
    /opt/kata was built to look there.
    """
    paths: tuple[str, ...] = {"go": GO_DEFAULTS, "rs": RS_DEFAULTS}.get(flavour, GO_DEFAULTS + RS_DEFAULTS)
    if flavour != "rs" and shim.startswith("/opt/kata/"):
        # A Go shim knows one prefix only, its own.
        paths = tuple(path for path in paths if not path.startswith("/usr/"))
    elif flavour == "go" and shim.startswith("/usr/"):
        paths = tuple(path for path in paths if not path.startswith("/opt/"))
    return tuple(place for path in paths for place in (make_place(root, path, "at Kata's default place"),) if place)


def make_place(root: Root, path: str, reason: str) -> Place | None:
    """Return the place of a file that is there, None where there is none."""
    is_there = path.startswith("/") and is_name(path) and root.exists(path)
    return Place(path, root.real_path(path), reason) if is_there else None


# Its content ---------------------------------------------------------------------------------------------------------


def load_config(root: Root, place: Place, flavour: str, annotations: dict[str, str]) -> KataConfig:
    """Return the configuration that begins in a file. What can't be read becomes findings, and is left out.

    flavour: "go" or "rs" where known, else "" (then the file tells); annotations: the sandbox's.
    """
    paths = [place.real, *list_drop_ins(root, place)]
    sources = []
    findings = []
    for path in paths:
        source = read_source(root, path)
        if isinstance(source, Finding):
            findings.append(source)
        else:
            sources.append(source)
    name = name_hypervisor(tuple(sources))
    flavour = flavour or tell_flavour(place, tuple(sources))
    bare = KataConfig(place, tuple(sources), name, flavour, {}, (), tuple(findings))
    allowed, refused = sort_annotations(bare, annotations)
    return bare.replace(annotations=allowed, refused=refused)


def list_drop_ins(root: Root, place: Place) -> list[str]:
    """Return the drop-ins of a configuration: all that is in config.d beside the resolved file, in order of name."""
    directory = place.real.rpartition("/")[0] + "/config.d"
    try:
        return [f"{directory}/{name}" for name in root.list_names(directory)]
    except OSError:
        return []


def read_source(root: Root, path: str) -> Source | Finding:
    """Return one file of a configuration, or the finding that says why it can't be read."""
    from oci_hooks.settings import load_toml

    hint = "Kata can't start a sandbox with it either; mend or move the file"
    try:
        text = root.read_bytes(path).decode("utf-8")
        return Source(path, text, load_toml(text))
    except OSError as error:
        return Finding("warning", "kata-config-unreadable", path, error.strerror or str(error), hint)
    except (ValueError, RecursionError) as error:
        return Finding("warning", "kata-config-unreadable", path, f"is not TOML: {error}", hint)
    except ImportError:
        return Finding(
            "warning",
            "kata-config-unreadable",
            path,
            "needs a TOML reader",
            "apt install python3-tomli, or pip's tomli",
        )


def name_hypervisor(sources: tuple[Source, ...]) -> str:
    """Return the name of the hypervisor's table: runtime-rs says it in [runtime], Go takes the table that is there."""
    name = ""
    for source in sources:
        tables = source.values.get("hypervisor")
        if not name and isinstance(tables, dict) and tables:
            name = next(iter(tables))
        runtime = source.values.get("runtime")
        named = runtime.get("hypervisor_name") if isinstance(runtime, dict) else None
        if isinstance(named, str):
            name = named
    return name


def tell_flavour(place: Place, sources: tuple[Source, ...]) -> str:
    """Return which runtime a configuration is for: runtime-rs names its hypervisor in [runtime], Go does not."""
    runtimes = (source.values.get("runtime") for source in sources)
    named = any(isinstance(runtime, dict) and "hypervisor_name" in runtime for runtime in runtimes)
    return "rs" if named or "runtime-rs" in place.real else "go"


def find_setting(config: KataConfig, keys: tuple[str, ...], prefix: str, default: Any) -> Setting:
    """Return a value and what decided it: an annotation, else the last file that has it, else the default.

    keys: tables and key; prefix: of the annotations that set keys of this table.
    """
    from oci_hooks.tomllines import has_key

    holding = tuple(source for source in config.sources if has_key(source.values, keys))
    name = prefix + keys[-1]
    if name in config.annotations:
        return Setting(keys, read_annotation(config.annotations[name]), holding, name)
    if not holding:
        return Setting(keys, default)
    value: Any = holding[-1].values
    for key in keys:
        value = value[key]
    return Setting(keys, value, holding, "", holding[-1].path != config.place.real)


# Annotations ---------------------------------------------------------------------------------------------------------


def sort_annotations(config: KataConfig, annotations: dict[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the annotations that change the configuration, and the names of those that it does not admit."""
    allowed = {}
    refused = []
    known = RS_ANNOTATED if config.flavour == "rs" else GO_ANNOTATED
    patterns = config.hypervisor_setting("enable_annotations", []).value
    for name, value in sorted(annotations.items()):
        key = name[len(HYPERVISOR_PREFIX) :]
        if name == RUNTIME_PREFIX + "vfio_mode":
            allowed[name] = value
        elif not name.startswith(HYPERVISOR_PREFIX):
            continue
        elif not is_admitted(key, patterns):
            refused.append(name)
        elif key in known:
            allowed[name] = value
    # Setting one of these sets the other to no-port (oci/utils.go, addHypervisorHotColdPlugVfioOverrides).
    for key, other in (("hot_plug_vfio", "cold_plug_vfio"), ("cold_plug_vfio", "hot_plug_vfio")):
        if HYPERVISOR_PREFIX + key in annotations and HYPERVISOR_PREFIX + key in allowed:
            allowed.setdefault(HYPERVISOR_PREFIX + other, "no-port")
    return allowed, tuple(refused)


def is_admitted(key: str, patterns: Any) -> bool:
    """Tell whether enable_annotations admits a key. Its regular expressions are not anchored, in Go and in Rust."""
    import re

    if not isinstance(patterns, list):
        return False
    for pattern in map(str, patterns):
        # Python's expressions are not quite Go's: in doubt nothing is called refused.
        if "[:" in pattern:
            return True
        try:
            if re.search(pattern, key):
                return True
        except re.error:
            return True
    return False


def read_annotation(text: str) -> Any:
    """Return an annotation's value: a truth value where it reads as one, else the text."""
    if text in TRUE_WORDS:
        return True
    return False if text in FALSE_WORDS else text


# Words ---------------------------------------------------------------------------------------------------------------


def format_value(value: Any) -> str:
    """Return a value as TOML writes it."""
    import json

    # default: dates and times, which JSON has not.
    return json.dumps(value, default=str) if not isinstance(value, (dict, list)) else "..."


def find_place(source: Source, keys: tuple[str, ...]) -> str:
    """Return where a file sets a key, in words."""
    from oci_hooks.tomllines import find_line

    line = find_line(source.text, keys)
    return f"{source.path} line {line}" if line else source.path
