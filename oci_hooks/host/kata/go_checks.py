# SPDX-License-Identifier: Apache-2.0
"""Validate decoded tables as Kata's Go runtime does, and derive the values that it uses.

Sources, in kata-containers 4.1 (src/runtime): pkg/katautils/config.go (new*HypervisorConfig, toGuestExtensionImages,
SetKernelParams, validateBindMounts, checkConfig), pkg/katautils/create.go, pkg/device/config/config.go.
"""

from __future__ import annotations

from oci_hooks.host.kata.model import check_sizes, has_wrong_verity, read_parameters, split_parameters, write_parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.kata.model import Ledger

# Tables below [hypervisor], and which of them Kata supports.
HYPERVISORS = ("qemu", "clh", "firecracker", "dragonball", "stratovirt", "remote")
DEFAULT_PATHS = {
    "path": "/usr/bin/qemu-system-x86_64",
    "kernel": "/usr/share/kata-containers/vmlinuz.container",
}
DEFAULT_IMAGES = (
    "/usr/share/kata-containers/kata-containers.img",
    "/usr/share/kata-containers/kata-containers-initrd.img",
)
NO_PORT = "no-port"
PORTS = ("bridge-port", "root-port", "switch-port")
BOTH_PORTS = "hot_plug_vfio and cold_plug_vfio are both set, but Kata accepts only one of them"
MAX_PORTS = 16
BLOCK_DRIVERS = ("virtio-scsi", "virtio-blk", "virtio-mmio", "nvdimm", "virtio-blk-ccw")
BLOCK_AIO = ("io_uring", "native", "threads")
SHARED_FS = ("virtio-9p", "virtio-fs", "virtio-fs-nydus", "none")
NETWORK_MODELS = ("default", "macvtap", "tcfilter", "none")
EMPTY_DIR_MODES = ("shared-fs", "block-encrypted", "block-plain")
VFIO_MODES = ("vfio", "guest-kernel")
MONITORS = ("hmp", "qmp", "qmp-pretty")
SYSTEMD_PARAMETERS = (
    ("systemd.unit", "kata-containers.target"),
    ("systemd.mask", "systemd-networkd.service"),
    ("systemd.mask", "systemd-networkd.socket"),
)
# Allowed words; if the file has none or "", the first one is used.
CHOICES = {
    "block_device_driver": BLOCK_DRIVERS,
    "block_device_aio": BLOCK_AIO,
    "shared_fs": SHARED_FS,
    "extra_monitor_socket": MONITORS,
}
# For each hypervisor: the files that it needs, and the words that it checks.
FILES = {
    "qemu": "path kernel initrd image firmware firmware_volume",
    "clh": "path kernel initrd image firmware",
    "firecracker": "path jailer_path kernel initrd image firmware",
    "stratovirt": "path kernel initrd image",
    "dragonball": "kernel image",
}
WORDS = {
    "qemu": "block_device_driver block_device_aio shared_fs extra_monitor_socket",
    "clh": "block_device_driver shared_fs",
    "firecracker": "block_device_driver",
    "stratovirt": "block_device_driver shared_fs",
}
MIB = 1 << 20


def check_tables(ledger: Ledger, tables: dict[str, Any], path: str) -> None:
    """Note the refusals of LoadConfiguration. path: the main file, for problems without a line."""
    for name, table in tables["hypervisor"].items():
        if name not in HYPERVISORS:
            location = ledger.place("hypervisor", name) or path
            ledger.refuse("load", location, f"[hypervisor.{name}] is not a hypervisor of Kata's Go runtime")
        else:
            check_hypervisor(ledger, name, table, path)
    if not tables["hypervisor"]:
        lost = [image for image in DEFAULT_IMAGES if not ledger.root.exists(image)]
        if lost:
            ledger.refuse("load", path, f"has no [hypervisor.NAME], and Kata's built-in default {lost[0]} is missing")
        else:
            ledger.mark_uncertain(path, "has no [hypervisor.NAME], so Kata uses its built-in defaults")
    check_runtime(ledger, tables["runtime"], path)
    name = next(iter(tables["hypervisor"]), "qemu")
    if tables["factory"].get("vm_cache_number") and name != "qemu":
        ledger.refuse("load", ledger.place("factory", "vm_cache_number"), "only QEMU supports a VM cache")


def check_hypervisor(ledger: Ledger, name: str, table: dict[str, Any], path: str) -> None:  # noqa: PLR0912 - one rule a line
    """Note the refusals of the hypervisor's own function."""

    def refuse(key: str, text: str) -> None:
        ledger.refuse("load", ledger.place("hypervisor", name, key) or path, text)

    for key in FILES.get(name, "").split():
        file = table.get(key) or DEFAULT_PATHS.get(key, "")
        ledger.need_file(file, key, ledger.place("hypervisor", name, key) or path, bool(table.get(key)))
    for key in WORDS.get(name, "").split():
        if table.get(key) and table[key] not in CHOICES[key]:
            refuse(key, f"{key} {table[key]} is not one of {', '.join(CHOICES[key])}")
    shared = table.get("shared_fs") or "virtio-fs"
    if name in ("qemu", "clh", "stratovirt"):
        if shared.startswith("virtio-fs") and not table.get("virtio_fs_daemon"):
            refuse("shared_fs", f"{shared} needs virtio_fs_daemon")
        if name != "qemu" and shared == "virtio-9p":
            refuse("shared_fs", f"{name} does not support virtio-9p")
    images = [key for key in ("image", "initrd") if table.get(key)]
    if name in ("clh", "stratovirt") and not images:
        refuse("image", "neither image nor initrd is set")
    if name == "stratovirt" and len(images) > 1:
        refuse("initrd", "image and initrd are both set")
    if name != "clh" and name in WORDS and name != "firecracker":
        check_sizes(table, refuse)
    if name == "qemu":
        for file in table.get("pflashes", ()):
            ledger.need_file(file or "/", "pflashes", ledger.place("hypervisor", name, "pflashes"), True)
        check_images(table, refuse)
    if name != "remote":
        check_initrd(ledger, name, table)
    if name != "remote" and any(
        not key for key, _ in read_parameters(split_parameters(table.get("kernel_params", "")))
    ):
        refuse("kernel_params", "kernel_params has a parameter without a name")
    if name in ("qemu", "clh"):
        check_ports(name, table, refuse)


def check_images(table: dict[str, Any], refuse: Any) -> None:
    """Note extension images that Kata refuses."""
    for image in table.get("guest_extension_images", ()):
        folded = {key.lower(): value for key, value in image.items()}
        name = folded.get("name", "")
        if not name or not all(char.isascii() and (char.isalnum() or char in "-_") for char in name):
            refuse("guest_extension_images", f"guest_extension_images has the invalid name {name!r}")
        if has_wrong_verity(folded.get("verity_params", "")):
            refuse("guest_extension_images", "guest_extension_images has invalid verity_params")


def check_initrd(ledger: Ledger, name: str, table: dict[str, Any]) -> None:
    """Note an image without content, and an initrd that does not fit the machine's memory."""
    memory = table.get("default_memory", 0)
    memory = memory if memory >= 256 else 2048
    for key in ("image", "initrd"):
        if not table.get(key) or key not in FILES[name].split():
            continue
        try:
            size = ledger.root.stat(table[key]).st_size
        except (OSError, ValueError):
            continue
        location = ledger.place("hypervisor", name, key)
        if size == 0:
            ledger.refuse("load", location, f"{key} {table[key]} is empty")
        elif key == "initrd" and size // MIB >= memory:
            ledger.refuse("load", location, f"initrd {table[key]} does not fit into default_memory ({memory} MiB)")


def check_ports(name: str, table: dict[str, Any], refuse: Any) -> None:
    """Note PCIe ports that Kata refuses (checkPCIeConfig)."""
    ports = {key: table.get(key) or NO_PORT for key in ("hot_plug_vfio", "cold_plug_vfio")}
    used = [key for key, port in ports.items() if port != NO_PORT]
    if len(used) > 1:
        refuse("cold_plug_vfio", BOTH_PORTS)
    elif used and (table.get("machine_type") or "q35") in ("q35", "virt"):
        allowed = ("root-port",) if name == "clh" else PORTS
        if ports[used[0]] not in allowed:
            refuse(used[0], f"{used[0]} {ports[used[0]]} is not one of {NO_PORT}, {', '.join(allowed)}")


def check_runtime(ledger: Ledger, table: dict[str, Any], path: str) -> None:
    """Note Kata's refusals for [runtime]."""

    def refuse(key: str, text: str) -> None:
        ledger.refuse("load", ledger.place("runtime", key) or path, text)

    choices = {"internetworking_model": NETWORK_MODELS, "vfio_mode": VFIO_MODES, "emptydir_mode": EMPTY_DIR_MODES}
    for key, words in choices.items():
        if table.get(key) and table[key] not in words:
            refuse(key, f"{key} {table[key]} is not one of {', '.join(words)}")
    if table.get("experimental"):
        refuse("experimental", f"experimental lists {table['experimental'][0]}, which this Kata release does not have")
    if table.get("disable_new_netns") and table.get("internetworking_model") != "none":
        refuse("disable_new_netns", 'disable_new_netns needs internetworking_model = "none"')
    names = set()
    for mount in table.get("sandbox_bind_mounts", ()):
        ledger.need_file(mount or "/", "sandbox_bind_mounts", ledger.place("runtime", "sandbox_bind_mounts"), True)
        name = ledger.root.real_path(mount).rpartition("/")[2] if mount and "\0" not in mount else ""
        if not mount or name in names:
            refuse("sandbox_bind_mounts", f"sandbox_bind_mounts has an empty or duplicate name: {name!r}")
        names.add(name)


# Values --------------------------------------------------------------------------------------------------------------


def find_values(ledger: Ledger, tables: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the hypervisor's name and the runtime's values from the tables, before annotations."""
    names = [name for name in tables["hypervisor"] if name in HYPERVISORS]
    name = names[0] if names else ""
    if len(names) > 1:
        listed = ", ".join(f"[hypervisor.{name}]" for name in names)
        ledger.mark_uncertain(
            ledger.place("hypervisor", name, "path"), f"{listed} are all present, and Go may use any of them"
        )
    table = tables["hypervisor"].get(name, {})
    has_ports = name in ("qemu", "clh")
    values: dict[str, Any] = {
        "hypervisor": name,
        "machine_type": (table.get("machine_type") or ("" if name == "remote" else "q35")),
        "enable_iommu": name == "qemu" and table.get("enable_iommu", False),
        "hot_plug_vfio": (table.get("hot_plug_vfio") or NO_PORT) if has_ports else "",
        "cold_plug_vfio": (table.get("cold_plug_vfio") or NO_PORT) if has_ports else "",
        "pcie_root_port": min(table.get("pcie_root_port", 0), MAX_PORTS) if has_ports else 0,
        "pcie_switch_port": min(table.get("pcie_switch_port", 0), MAX_PORTS) if has_ports else 0,
        "vfio_mode": tables["runtime"].get("vfio_mode") or "vfio",
        "kernel_params": write_parameters(list_parameters(ledger, tables, name, table)),
        "guest_hook_path": table.get("guest_hook_path", "") if name != "dragonball" else "",
        "confidential_guest": has_ports and table.get("confidential_guest", False),
        "rootless": has_ports and table.get("rootless", False),
    }
    if name in ("firecracker", "dragonball"):
        values["machine_type"] = ""
    return name, values


def list_parameters(ledger: Ledger, tables: dict[str, Any], name: str, table: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the kernel parameters: Kata's own, the agent's, then the file's (SetKernelParams)."""
    pairs: list[tuple[str, str]] = []
    if table.get("image") and name != "remote":
        pairs += SYSTEMD_PARAMETERS
    if name not in ("remote", "dragonball") and (table.get("block_device_driver") or "virtio-scsi") == "virtio-scsi":
        pairs.append(("scsi_mod.scan", "none"))
    agents = [list_agent_parameters(agent) for agent in tables["agent"].values()]
    if any(agent != agents[0] for agent in agents):
        ledger.mark_uncertain("", "several [agent.NAME] tables are present, and Go may use any of them")
    pairs += agents[0] if agents else []
    text = table.get("kernel_params", "") if name != "remote" else ""
    return [*pairs, *read_parameters(text.split() if name == "stratovirt" else split_parameters(text))]


def list_agent_parameters(agent: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the kernel parameters that an agent's table adds (KataAgentKernelParams)."""
    pairs = []
    if agent.get("enable_debug"):
        pairs.append(("agent.log", "debug"))
    if agent.get("enable_tracing"):
        pairs.append(("agent.trace", "true"))
    if agent.get("debug_console_enabled"):
        pairs += [("agent.debug_console", ""), ("agent.debug_console_vport", "1026")]
    for key in ("cdh_api_timeout", "launch_process_timeout"):
        if agent.get(key):
            pairs.append((f"agent.{key}", str(agent[key])))
    if agent.get("visible_cdi_devices"):
        pairs.append(("agent.visible_cdi_devices", "true"))
    return pairs
