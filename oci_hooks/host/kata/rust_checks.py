# SPDX-License-Identifier: Apache-2.0
"""Fill in defaults and validate decoded tables as runtime-rs does.

Sources, in kata-containers 4.1 (src/libs/kata-types/src/config): adjust_config and validate in hypervisor/mod.rs,
qemu.rs, ch.rs, dragonball.rs, firecracker.rs, remote.rs, openvmm.rs, runtime.rs, agent.rs, shared_mount.rs; default.rs.
"""

from __future__ import annotations

import os
import re

from oci_hooks.host.kata.model import check_sizes, has_wrong_verity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from oci_hooks.host.kata.model import Ledger, Refuse

# For each supported hypervisor: the least memory in MiB, the most processors.
LIMITS = {
    "qemu": (64, 256),
    "clh": (64, 256),
    "dragonball": (64, 256),
    "firecracker": (128, 32),
    "remote": (64, 32),
    "openvmm": (64, 256),
}
# Defaults for keys that are not set, or are "" or 0.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qemu": {
        "path": "/usr/bin/qemu-system-x86_64",
        "machine_type": "q35",
        "entropy_source": "/dev/urandom",
        "default_memory": 128,
        "memory_slots": 128,
    },
    "clh": {
        "path": "/usr/bin/cloud-hypervisor",
        "entropy_source": "/dev/urandom",
        "default_memory": 128,
        "memory_slots": 128,
    },
    "dragonball": {"entropy_source": "/dev/urandom", "default_memory": 128, "memory_slots": 128},
    "firecracker": {"entropy_source": "/dev/urandom", "default_memory": 128},
    "remote": {"hypervisor_socket": "/run/peerpod/hypervisor.sock", "default_memory": 64, "memory_slots": 128},
    "openvmm": {"memory_slots": 128},
}
FILES = "path ctlpath jailer_path kernel image initrd firmware entropy_source prefetch_list_path"
BLOCK_DRIVERS = ("virtio-blk-pci", "virtio-blk-ccw", "virtio-blk-mmio", "virtio-pmem", "virtio-scsi")
BLOCK_AIO = ("io_uring", "native", "threads")
CACHES = ("never", "auto", "always")
NETWORK_MODELS = ("macvtap", "none", "tcfilter", "l3forwarding")
EMPTY_DIR_MODES = ("shared-fs", "block-encrypted", "block-plain")
BOTH_KINDS = "pcie_root_port and pcie_switch_port are both set, but runtime-rs accepts only one of them"
MOUNT_PATH = re.compile(r"(/[-\w.]+)+/?")


def adjust(ledger: Ledger, name: str, table: dict[str, Any], stage: str, path: str) -> None:
    """Fill in a hypervisor's defaults, and note unresolvable paths.

    stage: "load", or "annotations" for the second time; path: the main file, for problems without a line.
    """

    def location(key: str) -> str:
        return ledger.place("hypervisor", name, key) or path

    if name not in LIMITS:
        place_ = ledger.place("hypervisor", name) or path
        ledger.refuse(stage, place_, f"[hypervisor.{name}] is not a hypervisor of runtime-rs")
        return
    named = {key for key in table if table[key]}
    for key, value in DEFAULTS[name].items():
        table[key] = table.get(key) or value
    if not table.get("kernel") and name not in ("remote", "openvmm"):
        ledger.refuse(
            stage, location("kernel"), "kernel is not set, and the default is a file in the shim's own directory"
        )
    if stage == "load":
        for key in FILES.split():
            ledger.need_file(table.get(key, ""), key, location(key), key in named and key != "entropy_source")
        for key in ("pflashes", "guest_extension_images"):
            for part in table.get(key, ()):
                ledger.need_file(part if isinstance(part, str) else part.get("path", ""), key, location(key), True)
        if name == "remote":
            ledger.need_file(table["hypervisor_socket"], "hypervisor_socket", location("hypervisor_socket"), False)
    if not table.get("disable_block_device_use"):
        table["block_device_driver"] = table.get("block_device_driver") or BLOCK_DRIVERS[0]
        if table.get("block_device_aio") and table["block_device_aio"] not in BLOCK_AIO:
            ledger.refuse(
                stage,
                location("block_device_aio"),
                f"block_device_aio {table['block_device_aio']} is unknown to runtime-rs",
            )
        if table.get("enable_vhost_user_store"):
            store = table.get("vhost_user_store_path") or "/var/run/vhost-user"
            ledger.need_file(store, "vhost_user_store_path", location("vhost_user_store_path"), False)
    table["vm_rootfs_driver"] = table.get("vm_rootfs_driver") or BLOCK_DRIVERS[0]
    adjust_shared(ledger, table, location)


def adjust_shared(ledger: Ledger, table: dict[str, Any], location: Callable[[str], str]) -> None:
    """Fill in the defaults of the shared file system (SharedFsInfo)."""
    shared = table.get("shared_fs")
    if shared == "none":
        del table["shared_fs"]
        return
    if shared == "":
        shared = table["shared_fs"] = "virtio-fs"
    if shared in ("virtio-fs", "virtio-fs-nydus", "inline-virtio-fs"):
        if shared != "inline-virtio-fs":
            daemon = table.get("virtio_fs_daemon", "")
            ledger.need_file(daemon, "virtio_fs_daemon", location("virtio_fs_daemon"), True)
        if table.get("virtio_fs_cache", "") in ("", "none"):
            table["virtio_fs_cache"] = "never"


def find_values(tables: dict[str, Any], name: str) -> dict[str, Any]:
    """Return runtime-rs's values from the tables."""
    table = tables["hypervisor"].get(name, {})
    return {
        "hypervisor": name,
        "machine_type": table.get("machine_type", ""),
        "enable_iommu": table.get("enable_iommu", False),
        "cold_plug_vfio": table.get("cold_plug_vfio", ""),
        "pcie_root_port": table.get("pcie_root_port", 0),
        "pcie_switch_port": table.get("pcie_switch_port", 0),
        "vfio_mode": tables["runtime"].get("vfio_mode", ""),
        "kernel_params": table.get("kernel_params", ""),
        "guest_hook_path": table.get("guest_hook_path", ""),
        "confidential_guest": table.get("confidential_guest", False),
        "rootless": table.get("rootless", False),
    }


# Validation ----------------------------------------------------------------------------------------------------------


def validate(ledger: Ledger, tables: dict[str, Any], path: str) -> None:
    """Note runtime-rs's refusals in all tables, used or not."""
    for name, table in tables["hypervisor"].items():
        if name in LIMITS:

            def refuse(key: str, text: str, name: str = name) -> None:
                ledger.refuse("validate", ledger.place("hypervisor", name, key) or path, text)

            validate_common(name, table, refuse)
            validate_own(name, table, refuse)
            validate_blocks(table, refuse)
            validate_shared(table, refuse)
    validate_runtime(ledger, tables["runtime"], path)
    for name, agent in tables["agent"].items():
        dial = agent.get("dial_timeout_ms", 10)
        location = ledger.place("agent", name, "dial_timeout_ms") or path
        if dial == 0:
            ledger.refuse("validate", location, "dial_timeout_ms is 0")
        elif agent.get("reconnect_timeout_ms", 3000) < dial:
            ledger.refuse("validate", location, "reconnect_timeout_ms is less than dial_timeout_ms")


def validate_common(name: str, table: dict[str, Any], refuse: Refuse) -> None:
    """Note the refusals that apply to every hypervisor's table."""
    if table.get("image") and table.get("initrd"):
        refuse("initrd", "image and initrd are both set")
    if table["vm_rootfs_driver"] not in BLOCK_DRIVERS:
        refuse("vm_rootfs_driver", f"vm_rootfs_driver {table['vm_rootfs_driver']} is unknown to runtime-rs")
    for image in table.get("guest_extension_images", ()):
        if not image["name"] or not all(c.isascii() and (c.isalnum() or c in "-_") for c in image["name"]):
            refuse("guest_extension_images", f"guest_extension_images has the invalid name {image['name']!r}")
        if has_wrong_verity(image.get("verity_params", "")):
            refuse("guest_extension_images", "guest_extension_images has invalid verity_params")
    if table.get("pcie_root_port") and table.get("pcie_switch_port"):
        refuse("pcie_switch_port", BOTH_KINDS)
    if not table.get("memory_slots"):
        refuse("memory_slots", "memory_slots is 0")
    least, maximum = LIMITS[name]
    if table.get("default_memory", 0) < least:
        refuse("default_memory", f"default_memory is less than {least} MiB")
    processors = os.cpu_count() or 1
    wanted = table.get("default_maxvcpus", 0)
    if name not in ("remote", "dragonball") and min(wanted or processors, processors) > maximum:
        refuse("default_maxvcpus", f"default_maxvcpus is more than {maximum}")


def validate_own(name: str, table: dict[str, Any], refuse: Refuse) -> None:
    """Note one hypervisor's refusals in its own table."""
    images = [key for key in ("image", "initrd") if table.get(key)]
    if name in ("qemu", "clh"):
        for key in ("jailer_path", "valid_jailer_paths"):
            if table.get(key):
                refuse(key, f"{key} is set, but {name} has no jailer")
        if table.get("confidential_guest") and table["vm_rootfs_driver"] == "virtio-blk-mmio":
            refuse("vm_rootfs_driver", "a confidential guest does not support virtio-blk-mmio")
        no_image = table["vm_rootfs_driver"].endswith("ccw") and table.get("confidential_guest")
        if not images and not (name == "qemu" and no_image):
            refuse("image", "neither image nor initrd is set")
    if name == "qemu":
        if not table.get("disable_block_device_use") and table.get("block_device_driver") == "virtio-blk-mmio":
            refuse("block_device_driver", "QEMU does not support virtio-blk-mmio")
        if table.get("enable_guest_swap"):
            refuse("enable_guest_swap", "QEMU does not support enable_guest_swap")
    if name == "dragonball":
        validate_dragonball(table, images, refuse)
    if name in ("firecracker", "openvmm") and not table.get("path"):
        refuse("path", "path is not set")
    if name == "firecracker" and not table.get("image"):
        refuse("image", "image is not set")
    if name == "remote":
        validate_remote(table, refuse)


def validate_dragonball(table: dict[str, Any], images: list[str], refuse: Refuse) -> None:
    """Note Dragonball's refusals in its table."""
    for key in (
        *("path", "valid_hypervisor_paths", "ctlpath", "valid_ctlpaths", "enable_iothreads", "firmware"),
        *("enable_iommu", "enable_iommu_platform", "default_bridges", "pcie_root_port", "pcie_switch_port"),
        *("machine_type", "pflashes", "rootless"),
    ):
        if table.get(key):
            refuse(key, f"{key} is set, but dragonball does not support it")
    drivers = ("virtio-blk-pci", "virtio-blk-mmio", "virtio-pmem")
    if not table.get("disable_block_device_use") and table["block_device_driver"] not in drivers:
        refuse("block_device_driver", f"dragonball does not support {table['block_device_driver']}")
    if not images:
        refuse("image", "neither image nor initrd is set")
    if table.get("shared_fs", "virtio-fs") not in ("virtio-fs", "inline-virtio-fs"):
        refuse("shared_fs", f"dragonball does not support {table['shared_fs']}")


def validate_remote(table: dict[str, Any], refuse: Refuse) -> None:
    """Note the remote hypervisor's refusals in its table."""
    for key in ("initrd", "rootfs_type"):
        if table.get(key):
            refuse(key, f"{key} is set, but the remote hypervisor does not support it")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    if 0 < table.get("default_maxmemory", 0) < memory:
        refuse("default_maxmemory", "default_maxmemory is less than this machine's memory")
    if 0 < table.get("default_maxvcpus", 0) < (os.cpu_count() or 1):
        refuse("default_maxvcpus", "default_maxvcpus is less than this machine's processor count")


def validate_blocks(table: dict[str, Any], refuse: Refuse) -> None:
    """Note refusals of block devices (BlockDeviceInfo)."""
    if table.get("disable_block_device_use"):
        return
    if table["block_device_driver"] not in BLOCK_DRIVERS:
        refuse("block_device_driver", f"block_device_driver {table['block_device_driver']} is unknown to runtime-rs")
    check_sizes(table, refuse)


def validate_shared(table: dict[str, Any], refuse: Refuse) -> None:
    """Note refusals of the shared file system (SharedFsInfo)."""
    shared = table.get("shared_fs")
    if shared is None:
        return
    if shared not in ("virtio-fs", "inline-virtio-fs", "virtio-fs-nydus"):
        refuse("shared_fs", f"shared_fs {shared} is unknown to runtime-rs")
    elif table.get("virtio_fs_cache") not in CACHES:
        refuse("virtio_fs_cache", f"virtio_fs_cache {table.get('virtio_fs_cache')} is not one of {', '.join(CACHES)}")


def validate_runtime(ledger: Ledger, table: dict[str, Any], path: str) -> None:
    """Note refusals in [runtime]."""
    choices = {
        "internetworking_model": NETWORK_MODELS,
        "vfio_mode": ("vfio", "guest-kernel"),
        "emptydir_mode": EMPTY_DIR_MODES,
    }
    for key, words in choices.items():
        if table.get(key) and table[key] not in words:
            location = ledger.place("runtime", key) or path
            ledger.refuse("validate", location, f"{key} {table[key]} is not one of {', '.join(words)}")
    for mount in table.get("shared_mounts", ()):
        keys = ("name", "src_ctr", "dst_ctr", "src_path", "dst_path")
        paths = [mount.get(key, "") for key in keys[3:]]
        wrong = not all(mount.get(key) for key in keys)
        if wrong or any(".." in p.split("/") or not MOUNT_PATH.fullmatch(p) for p in paths):
            ledger.refuse("validate", ledger.place("runtime", "shared_mounts"), "shared_mounts has an invalid entry")
