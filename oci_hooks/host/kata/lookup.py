# SPDX-License-Identifier: Apache-2.0
"""Which of Kata's configuration files the sandbox at hand was started with.

The order is the runtime's own (containerd-shim-v2/create.go, loadRuntimeConfig; runtime-rs manager.rs, load_config):
the annotation of 1.x to 3.x, then the shim's option ConfigPath and KATA_CONF_FILE (runtime-rs: the other way round),
then the default places. What only the shim knows is taken from the files that told it.
"""

from __future__ import annotations

from oci_hooks.frozen import Record
from oci_hooks.host.kata.config import KataConfig, Place, find_default_places, load_config, make_place
from oci_hooks.json_input import is_name
from oci_hooks.linux.processes import read_environment
from oci_hooks.oci import CONFIG_PATH_ANNOTATION
from oci_hooks.system import VERSION_FILES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.runtime import Asker
    from oci_hooks.system import Root


class Found(Record):
    """A configuration. certain: whether it is sure to be the one that the sandbox was started with."""

    config: KataConfig | None
    certain: bool


def find_config(root: Root, asker: Asker, annotations: dict[str, str], named: str) -> Found:
    """Return the sandbox's configuration.

    annotations: the sandbox's; named: path from host.toml, "" without one.
    """
    places, certain = find_places(root, asker, annotations, named)
    configs = [load_config(root, place, asker.flavour, annotations) for place in places]
    running = asker.hypervisor
    if running is not None:
        # A file for another hypervisor than the one that runs is not this sandbox's.
        fitting = [config for config in configs if config.hypervisor in ("", running.kind)]
        if len(fitting) > 1:
            fitting = [config for config in fitting if starts(root, config, running.process.pid)] or fitting
        certain = len(fitting) == 1 and (certain or len(configs) > 1)
        configs = fitting or configs
    return Found(configs[0], certain) if configs else Found(None, False)


def find_places(root: Root, asker: Asker, annotations: dict[str, str], named: str) -> tuple[tuple[Place, ...], bool]:
    """Return the files that may be the sandbox's configuration, and whether the first one surely is."""
    if named:
        place = make_place(root, named, "named in host.toml")
        return ((place,), True) if place else ((), False)
    place = None
    if read_major(root) < 4:
        place = make_place(root, annotations.get(CONFIG_PATH_ANNOTATION, ""), "by annotation")
    if place:
        return (place,), True
    shim = asker.shim.pid if asker.shim else 0
    variable = read_environment(root, shim, "KATA_CONF_FILE") if shim else ""
    environment = make_place(root, variable, "KATA_CONF_FILE of the shim")
    if environment and asker.flavour == "rs":
        return (environment,), True
    options = find_options(root, asker)
    if options:
        return options, len(options) == 1
    if environment:
        return (environment,), True
    executable = root.read_link(f"/proc/{shim}/exe") if shim else ""
    defaults = find_default_places(root, asker.flavour, executable)
    # Without the shim at hand the first default place is as good a guess as Kata's own.
    return defaults[:1], bool(defaults)


def find_options(root: Root, asker: Asker) -> tuple[Place, ...]:
    """Return the files that the container engine may have named in its option ConfigPath, without doubles."""
    from oci_hooks.host.kata.handlers import list_kata_handlers

    engines = find_engines(asker)
    handlers = [handler for handler in list_kata_handlers(root) if handler.engine in engines]
    if asker.handler:
        handlers = [handler for handler in handlers if handler.name == asker.handler]
    places: dict[str, Place] = {}
    for handler in handlers:
        reason = f"ConfigPath of runtime {handler.name} in {handler.path}"
        place = make_place(root, handler.config_path, reason)
        if place:
            places.setdefault(place.real, place)
    return tuple(places.values())


def find_engines(asker: Asker) -> tuple[str, ...]:
    """Return which container engines may have started the container: ctr and nerdctl read no engine's configuration."""
    if asker.is_cri:
        return ("containerd", "crio")
    arguments = asker.shim.arguments if asker.shim else ()
    if "moby" in arguments:
        return ("docker",)
    return ("containerd", "crio", "docker") if asker.by_hand else ()


def starts(root: Root, config: KataConfig, pid: int) -> bool:
    """Tell whether a configuration names the executable of the running hypervisor."""
    path = config.hypervisor_setting("path", "").value
    if not isinstance(path, str) or not path or not is_name(path):
        return False
    return root.real_path(path) == root.read_link(f"/proc/{pid}/exe")


def read_major(root: Root) -> int:
    """Return the major version of the Kata that kata-deploy installed, 0 where that is not known."""
    for path in VERSION_FILES:
        word = root.read_text_or(path, "").partition(".")[0]
        if word.isdigit():
            return int(word)
    return 0
