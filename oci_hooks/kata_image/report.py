# SPDX-License-Identifier: Apache-2.0
"""What vfio-kata-image prints: an image's layout, the hook in it, what the kernel has, lines for configuration.toml."""

from __future__ import annotations

from oci_hooks.findings import make_one_line
from oci_hooks.frozen import Frozen
from oci_hooks.kata_image.initrd import Initrd, parse_record
from oci_hooks.kata_image.model import HOME, HOOK_FILES, HOOKS, RECORD, SETTINGS
from oci_hooks.linux.kernel import NEEDED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Union

    from oci_hooks.kata_image.disk import Image
    from oci_hooks.kata_image.kernel import KernelFile
    from oci_hooks.kata_image.trees import Tree

    Found = Union[Image, Initrd]

MODULE_PLACES = ("lib/modules", "usr/lib/modules")
# Modules that have a part in passing a device through, by the name that modprobe takes.
MODULES = ("vfio", "vfio-pci", "vfio_iommu_type1", "virtio-iommu", "iommufd")
# Beside linux.kernel.NEEDED: permission in the container's cgroup, and the nodes themselves.
MORE_NEEDED = (("CONFIG_CGROUP_BPF",), ("CONFIG_BPF_SYSCALL",), ("CONFIG_DEVTMPFS",))


class Module(Frozen):
    """A kernel module in a guest. how: "module" or "built in"."""

    release: str
    name: str
    how: str


class Guest(Frozen):
    """What is in a guest. addon: version, "" if unknown, None without it; hook: whether the agent would find one;
    settings: whether it has a guest.toml; systemd: whether that is its init, and not Kata's agent."""

    addon: str | None
    hook: bool
    settings: bool
    systemd: bool
    modules: tuple[Module, ...]

    @property
    def other(self) -> bool:
        """Return whether the hook is from somewhere else than the add-on."""
        return self.hook and self.addon is None


def read_guest(tree: Tree) -> Guest:
    """Return what is in a guest that concerns the hook."""
    record = parse_record(tree.read(RECORD))
    addon = record.addon if record else ("" if tree.look_up(HOME) is not None else None)
    hook = any(is_hook(tree, path) for path in HOOK_FILES)
    settings = tree.look_up(SETTINGS) is not None
    return Guest(addon, hook, settings, is_systemd(tree), tuple(list_modules(tree)))


def is_systemd(tree: Tree) -> bool:
    """Return whether systemd is the init: a link, as its package and osbuilder make it."""
    nodes = [tree.look_up(path) for path in ("init", "sbin/init", "usr/sbin/init")]
    return any(node is not None and node.target.endswith("/systemd") for node in nodes)


def is_hook(tree: Tree, path: str) -> bool:
    """Return whether the agent would run this file: it takes no links and nothing that is not executable."""
    node = tree.look_up(path)
    return node is not None and node.kind == "file" and bool(node.mode & 0o111)


def list_modules(tree: Tree) -> list[Module]:
    """Return those of MODULES that a guest has, by the lists of depmod and of the kernel's build."""
    found: dict[tuple[str, str], str] = {}
    for place in MODULE_PLACES:
        for release in tree.list_names(place):
            for file, how in (("modules.dep", "module"), ("modules.builtin", "built in")):
                text = tree.read(f"{place}/{release}/{file}").decode("utf-8", "replace")
                names = {line.partition(":")[0].rpartition("/")[2].partition(".ko")[0] for line in text.splitlines()}
                names = {name.replace("-", "_") for name in names}
                for name in MODULES:
                    if name.replace("-", "_") in names:
                        found.setdefault((release, name), how)
    return [Module(release, name, how) for (release, name), how in sorted(found.items())]


def list_missing(kernel: KernelFile) -> list[str]:
    """Return what a kernel lacks for the hook, in words: "CONFIG_A or CONFIG_B"."""
    options = kernel.options
    rows = [*NEEDED, *MORE_NEEDED]
    # The option is new in 6.2; before, groups were always there.
    if "CONFIG_VFIO_DEVICE_CDEV" in options or "CONFIG_VFIO_GROUP" in options:
        rows.append(("CONFIG_VFIO_GROUP", "CONFIG_VFIO_DEVICE_CDEV"))
    return [" or ".join(row[:2]) for row in rows if not any(options.get(name) in ("y", "m") for name in row)]


def list_lines(path: str, is_initrd: bool, modules: tuple[Module, ...]) -> list[str]:
    """Return the lines for Kata's configuration.toml. path: of the image, as it is to be named there."""
    loadable = any(module.name == "vfio-pci" and module.how == "module" for module in modules)
    quoted = path.replace("\\", "\\\\").replace('"', '\\"')
    lines = [
        "[hypervisor.qemu]",
        f'{"initrd" if is_initrd else "image"} = "{make_one_line(quoted)}"',
        'machine_type = "q35"',
        "enable_iommu = true",
        'hot_plug_vfio = "root-port"    # runtime-rs: pcie_root_port = 2',
        f'guest_hook_path = "/{HOOKS}"',
    ]
    if loadable:
        lines += ["[agent.kata]", 'kernel_modules = ["vfio-pci"]']
    return lines


# Texts ----------------------------------------------------------------------------------------------------------------


def describe_layout(found: Found) -> list[tuple[str, str]]:
    """Return rows of words about the container of the guest's files."""
    size = ("size", f"{found.size} bytes")
    if isinstance(found, Initrd):
        parts = ", ".join(f"{each.format} at {each.start} ({each.names} names)" for each in found.archives)
        return [("format", "initrd"), size, ("archives", parts)]
    table = found.tables[-1]
    place = f"{table.kind}, {len(table.partitions)} partition{'s' * (len(table.partitions) > 1)}"
    return [
        ("format", "disk image"),
        size,
        ("table", f"{place}, the first at {found.start}, {found.room} bytes"),
        ("NVDIMM header", "yes" if found.dax else "no"),
        ("file system", found.filesystem or "unknown"),
        ("dm-verity", "yes: it cannot be changed" if found.verity else "no"),
    ]


def describe_guest(guest: Guest, kernel: KernelFile | None) -> list[tuple[str, str]]:
    """Return rows of words about what is in the guest. kernel: None if none was named."""
    addon = "no" if guest.addon is None else f"yes, version {guest.addon or 'unknown'}"
    hook = "yes, not of the add-on" if guest.other else "yes" if guest.hook else "no"
    modules = ", ".join(f"{each.name} ({each.how}, {each.release})" for each in guest.modules)
    rows = [("add-on", addon), ("hook", hook), ("guest.toml", "yes" if guest.settings else "no")]
    rows.append(("modules", modules or "none for VFIO in the image: the kernel must have them built in"))
    if guest.addon is not None:
        hint = "no systemd: /var/run/cdi has to be made in another way (docs/howto/kata.md)"
        rows.append(("CDI at boot", "yes, by systemd" if guest.systemd else hint))
    if kernel is not None:
        missing = ", ".join(list_missing(kernel))
        rows.append(("kernel", f"{kernel.path}: {f'lacks {missing}' if missing else 'has what the hook needs'}"))
    return rows


def format_lines(lines: list[str]) -> str:
    """Return the lines for Kata's configuration with a heading."""
    return "".join(["\nin Kata's configuration.toml:\n", *(f"    {line}\n" for line in lines)])


def format_rows(rows: list[tuple[str, str]]) -> str:
    """Return rows as lines, the second column aligned."""
    width = max(len(name) for name, _ in rows) + 2
    return "".join(f"{name.ljust(width)}{make_one_line(text)}\n" for name, text in rows)


def make_document(found: Found, guest: Guest | None, kernel: KernelFile | None, lines: list[str]) -> Any:
    """Return the same as JSON's types. guest: None if the file system could not be read."""
    document: dict[str, Any] = {"path": found.path, "size": found.size, "configuration": lines}
    if isinstance(found, Initrd):
        archives = [{"offset": each.start, "end": each.end, "format": each.format} for each in found.archives]
        document |= {"format": "initrd", "archives": archives}
    else:
        document |= {"format": "image", "table": found.tables[-1].kind, "offset": found.start, "room": found.room}
        document |= {"dax": found.dax, "filesystem": found.filesystem or None, "verity": found.verity}
    if guest is not None:
        modules = [each.as_dict() for each in guest.modules]
        document |= {
            "addon": guest.addon,
            "hook": guest.hook,
            "settings": guest.settings,
            "systemd": guest.systemd,
            "modules": modules,
        }
    if kernel is not None:
        document["kernel"] = {"path": kernel.path, "missing": list_missing(kernel)}
    return document
