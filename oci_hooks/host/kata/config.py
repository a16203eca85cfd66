# SPDX-License-Identifier: Apache-2.0
"""Find and read Kata's configuration as Kata does: the file, its drop-ins, the sandbox's annotations.

The readers are in go.py and rust.py. Sources, in kata-containers: containerd-shim-v2/create.go
(loadRuntimeConfig), katautils/config.go (GetDefaultConfigFilePaths); runtime-rs crates/runtimes/src/manager.rs
(load_config), libs/kata-types/src/config/default.rs. 1.x has no drop-ins.
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.json_input import is_valid_path
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.kata.model import Reading
    from oci_hooks.system import Root


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
# The Kata release whose behaviour our readers reproduce.
RELEASE = "4.1"
RELEASE_MAJOR = int(RELEASE.partition(".")[0])


class ConfigFile(Frozen):
    """A configuration file. path: as named; real: with links resolved; reason: why this file was chosen."""

    path: str
    real: str
    reason: str


class Setting(Frozen):
    """One value and its source.

    keys: tables and key; value: in effect; written: as merged from the files, the same unless Kata changes it;
    places: "FILE line N" of the last two that set it; annotation: name of the one that overrides them, "" without one;
    is_drop_in: whether the deciding file is a drop-in.
    """

    keys: tuple[str, ...]
    value: Any
    written: Any = None
    places: tuple[str, ...] = ()
    annotation: str = ""
    is_drop_in: bool = False

    @property
    def key(self) -> str:
        """The key without its tables."""
        return self.keys[-1]

    def describe(self) -> str:
        """Return the setting with its place, e.g. `enable_iommu = false in /etc/.../configuration.toml line 302`."""
        if self.annotation:
            text = f"{self.key} = {format_value(self.value)} (annotation {self.annotation})"
            return text + (f", over {self.places[-1]}" if self.places else "")
        if not self.places:
            return f"{self.key} is not set"
        text = f"{self.key} = {format_value(self.written)} in {self.places[-1]}"
        return text + (f", over {self.places[0]}" if len(self.places) > 1 else "")


class KataConfig(Frozen):
    """A sandbox's whole configuration.

    place: the main file; flavour: "go" or "rs"; reading: the values and problems that this runtime gets from it.
    """

    place: ConfigFile
    flavour: str
    reading: Reading

    @property
    def hypervisor(self) -> str:
        """The name of its table, "" without one."""
        return self.reading.hypervisor or next(iter(self.reading.tables["hypervisor"]), "")

    @property
    def refused(self) -> tuple[str, ...]:
        """Names of annotations that are not allowed."""
        return self.reading.unallowed

    @property
    def directory(self) -> str:
        """The directory of its drop-ins."""
        return self.place.real.rpartition("/")[0] + "/config.d"

    def hypervisor_setting(self, key: str, default: Any = None) -> Setting:
        """Return a setting of the hypervisor's table, with its source."""
        return find_setting(self, ("hypervisor", self.hypervisor, key), default)

    def runtime_setting(self, key: str, default: Any = None) -> Setting:
        """Return a setting of the runtime's table, with its source."""
        return find_setting(self, ("runtime", key), default)

    def describe(self, setting: Setting) -> str:
        """Return a setting with its source, and the later sources that do not override it."""
        if setting.annotation:
            return setting.describe()
        later = "annotations" if setting.is_drop_in else "config.d/ or annotations"
        if not setting.places:
            return f"{setting.key} is not set in {self.place.real}, {later}"
        return f"{setting.describe()}, not overridden by {'a later drop-in or ' if setting.is_drop_in else ''}{later}"


# The file ------------------------------------------------------------------------------------------------------------


def find_default_files(root: Root, flavour: str, shim: str) -> tuple[ConfigFile, ...]:
    """Return the existing configuration files at Kata's default paths, in Kata's order.

    flavour: "go", "rs", or "" for both, Go's first; shim: path of the shim's executable, "" if unknown: a shim below
    /opt/kata was built to look there.
    """
    paths: tuple[str, ...] = {"go": GO_DEFAULTS, "rs": RS_DEFAULTS}.get(flavour, GO_DEFAULTS + RS_DEFAULTS)
    if flavour != "rs" and shim.startswith("/opt/kata/"):
        # A Go shim knows only its own prefix.
        paths = tuple(path for path in paths if not path.startswith("/usr/"))
    elif flavour == "go" and shim.startswith("/usr/"):
        paths = tuple(path for path in paths if not path.startswith("/opt/"))
    return tuple(
        location
        for path in paths
        for location in (make_config_file(root, path, "at Kata's default place"),)
        if location
    )


def make_config_file(root: Root, path: str, reason: str) -> ConfigFile | None:
    """Return the configuration file at a path, None if there is none."""
    is_there = path.startswith("/") and is_valid_path(path) and root.exists(path)
    return ConfigFile(path, root.real_path(path), reason) if is_there else None


# Its content ---------------------------------------------------------------------------------------------------------


def load_config(root: Root, location: ConfigFile, flavour: str, annotations: dict[str, str]) -> KataConfig:
    """Return the configuration that starts with a file. Unreadable parts are problems of its reading, and are left out.

    flavour: "go" or "rs" where known, else "" (then the file decides); annotations: the sandbox's.
    """
    answer: dict[str, Any] | None = root.do(read_kata, root, location.real, flavour, annotations)
    if answer is None:
        # A recording of an earlier version has the files only.
        answer = read_kata(root, location.real, flavour, annotations)
    reading = make_reading(answer)
    return KataConfig(location, reading.flavour, reading)


@tagged("read-kata")
def read_kata(root: Root, path: str, flavour: str, annotations: dict[str, str]) -> dict[str, Any]:
    """Return the runtime's reading of a configuration as JSON; make_reading converts it.

    A step: a recording keeps less of the files than Kata's refusals depend on, so it keeps the answer.
    """
    from oci_hooks.host.kata.go import read_go
    from oci_hooks.host.kata.rust import read_rust

    reading = None
    if flavour != "go":
        reading = read_rust(root, path, annotations)
        # runtime-rs names its hypervisor in [runtime], Go does not.
        if flavour != "rs" and "runtime-rs" not in path and ("runtime", "hypervisor_name") not in reading.marks:
            reading = None
    reading = reading or read_go(root, path, annotations)
    return {**reading.as_dict(), "marks": list(reading.marks.items()), "tables": list_keys(reading.tables)}


def list_keys(tables: dict[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """Return tables as pairs of keys and value, and an entry for each table of hypervisors or agents itself."""
    pairs: list[tuple[tuple[str, ...], Any]] = []
    for table, values in tables.items():
        for key, value in values.items():
            if table in ("hypervisor", "agent"):
                pairs.append(((table, key), None))
                pairs += [((table, key, name), item) for name, item in value.items()]
            else:
                pairs.append(((table, key), value))
    return pairs


def make_reading(answer: dict[str, Any]) -> Reading:
    """Return the reading in an answer of read_kata, live or from a recording."""
    from oci_hooks.host.kata.model import Reading

    tables: dict[str, Any] = {"hypervisor": {}, "agent": {}, "runtime": {}, "factory": {}}
    for keys, value in answer["tables"]:
        table = tables[keys[0]]
        if len(keys) == 3:
            table = table.setdefault(keys[1], {})
        table[keys[-1]] = {} if value is None and len(keys) == 2 else value
    lists = {name: tuple(answer[name]) for name in ("unallowed", "refused", "uncertain")}
    marks = {tuple(keys): tuple(locations) for keys, locations in answer["marks"]}
    return Reading(**{**answer, **lists, "marks": marks, "tables": tables})


def find_setting(config: KataConfig, keys: tuple[str, ...], default: Any) -> Setting:
    """Return a value and its source: an annotation, else the last file that sets it, else the default.

    keys: tables and key.
    """
    reading = config.reading
    key = keys[-1]
    table: Any = reading.tables
    for name in keys[:-1]:
        table = table.get(name, {})
    locations = reading.marks.get(keys, ()) if key in table else ()
    annotation = reading.by_annotation.get(key, "")
    if not locations and not annotation:
        return Setting(keys, default, default)
    written = table.get(key, default)
    value = reading.values.get(key, written)
    is_drop_in = bool(locations) and not locations[-1].startswith(f"{config.place.real} line")
    return Setting(keys, value, written, locations, annotation, is_drop_in and locations[-1] != config.place.real)


def format_value(value: Any) -> str:
    """Return a value as TOML writes it."""
    import json

    return json.dumps(value, default=str) if not isinstance(value, (dict, list)) else "..."
