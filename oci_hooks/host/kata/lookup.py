# SPDX-License-Identifier: Apache-2.0
"""Find the Kata configuration file with which the sandbox was started.

The order is the runtime's own (containerd-shim-v2/create.go, loadRuntimeConfig; runtime-rs manager.rs, load_config):
the annotation of 1.x to 3.x, then the shim's option ConfigPath and KATA_CONF_FILE (runtime-rs: in reverse order),
then the default paths. ConfigPath, which only the shim knows, is read from the engines' configuration files.
"""

from __future__ import annotations

from oci_hooks.annotations import CONFIG_PATH_ANNOTATION
from oci_hooks.frozen import Frozen
from oci_hooks.host.kata.config import ConfigFile, KataConfig, find_default_files, load_config, make_config_file
from oci_hooks.json_input import is_valid_path
from oci_hooks.linux.processes import read_environment
from oci_hooks.system import VERSION_FILES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.runtime import Runtime
    from oci_hooks.system import Root


class ConfigLookup(Frozen):
    """A configuration. certain: whether it surely is the one with which the sandbox was started."""

    config: KataConfig | None
    certain: bool


def find_config(root: Root, runtime: Runtime, annotations: dict[str, str], named: str) -> ConfigLookup:
    """Return the sandbox's configuration.

    annotations: the sandbox's; named: path from host.toml, "" without one.
    """
    locations, certain = find_config_files(root, runtime, annotations, named)
    configs = [load_config(root, location, runtime.flavour, annotations) for location in locations]
    running = runtime.hypervisor
    if running is not None:
        # A file for a hypervisor other than the running one is not this sandbox's.
        fitting = [config for config in configs if config.hypervisor in ("", running.kind)]
        if len(fitting) > 1:
            fitting = [config for config in fitting if names_hypervisor(root, config, running.process.pid)] or fitting
        certain = len(fitting) == 1 and (certain or len(configs) > 1)
        configs = fitting or configs
    return ConfigLookup(configs[0], certain) if configs else ConfigLookup(None, False)


def find_config_files(
    root: Root, runtime: Runtime, annotations: dict[str, str], named: str
) -> tuple[tuple[ConfigFile, ...], bool]:
    """Return the files that may be the sandbox's configuration, and whether the first one surely is."""
    if named:
        location = make_config_file(root, named, "named in host.toml")
        return ((location,), True) if location else ((), False)
    location = None
    if read_major(root) < 4:
        location = make_config_file(root, annotations.get(CONFIG_PATH_ANNOTATION, ""), "by annotation")
    if location:
        return (location,), True
    shim = runtime.shim.pid if runtime.shim else 0
    variable = read_environment(root, shim, "KATA_CONF_FILE") if shim else ""
    environment = make_config_file(root, variable, "KATA_CONF_FILE of the shim")
    if environment and runtime.flavour == "rs":
        return (environment,), True
    options = find_options(root, runtime)
    if options:
        return options, len(options) == 1
    if environment:
        return (environment,), True
    executable = root.read_link(f"/proc/{shim}/exe") if shim else ""
    defaults = find_default_files(root, runtime.flavour, executable)
    # Without a known shim the first default path is the best guess.
    return defaults[:1], bool(defaults)


def find_options(root: Root, runtime: Runtime) -> tuple[ConfigFile, ...]:
    """Return the files that the container engine may have set in its option ConfigPath, without duplicates."""
    from oci_hooks.host.kata.handlers import list_kata_handlers

    engines = find_engines(runtime)
    handlers = [handler for handler in list_kata_handlers(root) if handler.engine in engines]
    if runtime.handler:
        handlers = [handler for handler in handlers if handler.name == runtime.handler]
    locations: dict[str, ConfigFile] = {}
    for handler in handlers:
        reason = f"ConfigPath of runtime {handler.name} in {handler.path}"
        location = make_config_file(root, handler.config_path, reason)
        if location:
            locations.setdefault(location.real, location)
    return tuple(locations.values())


def find_engines(runtime: Runtime) -> tuple[str, ...]:
    """Return the container engines that may have started the container: ctr and nerdctl read no engine's file."""
    if runtime.is_cri:
        return ("containerd", "crio")
    arguments = runtime.shim.arguments if runtime.shim else ()
    if "moby" in arguments:
        return ("docker",)
    return ("containerd", "crio", "docker") if runtime.by_hand else ()


def names_hypervisor(root: Root, config: KataConfig, pid: int) -> bool:
    """Return whether a configuration names the executable of the running hypervisor."""
    path = config.hypervisor_setting("path", "").value
    if not isinstance(path, str) or not path or not is_valid_path(path):
        return False
    return root.real_path(path) == root.read_link(f"/proc/{pid}/exe")


def read_major(root: Root) -> int:
    """Return the major version of Kata that kata-deploy installed, 0 if unknown."""
    for path in VERSION_FILES:
        word = root.read_text_or(path, "").partition(".")[0]
        if word.isdigit():
            return int(word)
    return 0
