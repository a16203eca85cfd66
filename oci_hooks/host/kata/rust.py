# SPDX-License-Identifier: Apache-2.0
"""Read Kata's configuration as runtime-rs does: merging of files, tables, types, refusals.

Sources, in kata-containers 4.1 (src/libs/kata-types/src/config): drop_in.rs, mod.rs, runtime.rs, agent.rs,
hypervisor/mod.rs (the structures; `deny_unknown_fields` where present).
"""

from __future__ import annotations

from oci_hooks.host.kata.go import name_types
from oci_hooks.host.kata.model import Ledger, read_layers
from oci_hooks.host.kata.rust_types import find_wrong
from oci_hooks.host.kata.toml import StrictReader, Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.kata.model import Layer, Reading
    from oci_hooks.host.kata.toml import Keys
    from oci_hooks.system import Root

HYPERVISOR = name_types(
    text="path ctlpath jailer_path prefetch_list_path block_device_driver block_device_aio vhost_user_store_path "
    "kernel kernel_params kernel_verity_params initrd image rootfs_type firmware vm_rootfs_driver cpu_features "
    "log_level guest_memory_dump_path extra_monitor_socket dbg_monitor_socket cold_plug_vfio "
    "machine_type machine_accelerators entropy_source guest_swap_path snp_id_block snp_id_auth guest_hook_path "
    "initdata seccomp_sandbox selinux_label shared_fs virtio_fs_daemon virtio_fs_cache hypervisor_socket "
    "default_gpu_model memory_path device_state_path",
    texts="valid_hypervisor_paths valid_ctlpaths valid_jailer_paths valid_vhost_user_store_paths pflashes "
    "valid_entropy_sources enable_annotations valid_virtio_fs_daemon_paths virtio_fs_extra_args",
    u64="memory_offset disk_rate_limiter_bw_max_rate disk_rate_limiter_bw_one_time_burst num_queues "
    "disk_rate_limiter_ops_max_rate disk_rate_limiter_ops_one_time_burst guest_swap_size_percent "
    "guest_swap_create_threshold_secs rx_rate_limiter_max_rate tx_rate_limiter_max_rate",
    u32="indep_iothreads block_device_logical_sector_size block_device_physical_sector_size queue_size "
    "default_maxvcpus default_bridges pcie_root_port pcie_switch_port default_memory overhead_memory "
    "default_maxmemory memory_slots network_queues snp_guest_policy tdx_quote_generation_service_socket_port "
    "virtio_fs_cache_size virtio_fs_queue_size default_gpus",
    i32="hypervisor_timeout",
    real="default_vcpus overhead_vcpus",
    truth="disable_nesting_checks enable_iothreads disable_block_device_use block_device_cache_set "
    "block_device_cache_direct block_device_cache_noflush disable_image_nvdimm enable_vhost_user_store "
    "disable_nested_virtualization enable_debug guest_memory_dump_paging enable_iommu enable_iommu_platform "
    "reclaim_guest_freed_memory enable_mem_prealloc enable_hugepages enable_virtio_mem enable_guest_swap "
    "disable_vhost_net rootless disable_seccomp confidential_guest sev_snp_guest virtio_fs_is_dax boot_to_be_template "
    "boot_from_template disable_guest_selinux disable_selinux",
    pages="hugepage_type",
    images="guest_extension_images",
    factory="factory",
    user="rootless_user",
)
RUNTIME = name_types(
    text="name hypervisor_name agent_name log_level internetworking_model jaeger_endpoint jaeger_user jaeger_password "
    "emptydir_mode vfio_mode dan_conf pod_resource_api_sock",
    texts="experimental sandbox_bind_mounts",
    truth="enable_debug disable_new_netns sandbox_cgroup_only enable_vcpus_pinning enable_tracing enable_pprof "
    "static_sandbox_resource_mgmt disable_guest_seccomp keep_abnormal use_passfd_io",
    u32="passfd_listener_port",
    mounts="shared_mounts",
)
AGENT = name_types(
    text="log_level policy",
    texts="kernel_modules",
    truth="enable_debug enable_tracing debug_console_enabled visible_cdi_devices",
    u32="server_port log_port passfd_listener_port dial_timeout_ms reconnect_timeout_ms cdh_api_timeout_ms "
    "create_container_timeout health_check_request_timeout_ms container_pipe_size launch_process_timeout",
    memory="mem_agent",
)
# Two names of one field, which is then set twice.
ALIASES = (("extra_monitor_socket", "dbg_monitor_socket"), ("enable", "mem_agent_enable"))


def read_rust(root: Root, path: str, annotations: dict[str, str]) -> Reading:
    """Return runtime-rs's reading of a configuration. path: the main file, links resolved."""
    from oci_hooks.host.kata.rust_annotations import apply_annotations
    from oci_hooks.host.kata.rust_checks import adjust, find_values, validate

    ledger = Ledger(root)
    tables = merge_layers(read_layers(root, path, StrictReader, ledger, False), ledger)
    tables = decode(tables, ledger, path)
    for name, table in tables["hypervisor"].items():
        adjust(ledger, name, table, "load", path)
    for mount in tables["runtime"].get("sandbox_bind_mounts", ()):
        ledger.need_file(
            split_mount(mount), "sandbox_bind_mounts", ledger.place("runtime", "sandbox_bind_mounts"), True
        )
    decided = apply_annotations(ledger, tables, annotations, path)
    name = tables["runtime"].get("hypervisor_name", "")
    values = find_values(tables, name)
    validate(ledger, tables, path)
    ledger.check_files()
    return ledger.make_reading("rs", tables, name, values, *decided)


def split_mount(mount: str) -> str:
    """Return a bind mount's path, without :ro or :rw (mount.rs, split_bind_mounts)."""
    return mount[:-3] if mount.endswith((":ro", ":rw")) else mount


# Merging -------------------------------------------------------------------------------------------------------------


def merge_layers(layers: list[Layer], ledger: Ledger) -> dict[str, Any]:
    """Return the merged tables of the files: a table is merged key by key, any other value is replaced."""
    merged = Table()
    for layer in layers:
        merge(merged, layer.values, (), layer, ledger)
    return merged


def merge(base: dict[str, Any], over: dict[str, Any], keys: Keys, layer: Layer, ledger: Ledger) -> None:
    """Merge one table into another (drop_in.rs, merge_tables), and note where each key is set."""
    for key, value in over.items():
        ledger.mark((*keys, key), layer.place((*keys, key)))
        if isinstance(value, Table):
            below = base.get(key)
            if not isinstance(below, Table):
                below = base[key] = Table()
            merge(below, value, (*keys, key), layer, ledger)
        else:
            base[key] = value


# Types ---------------------------------------------------------------------------------------------------------------


def decode(merged: dict[str, Any], ledger: Ledger, path: str) -> dict[str, Any]:
    """Return the known keys of the tables; values that runtime-rs refuses are noted and left out."""
    tables: dict[str, Any] = {"hypervisor": {}, "agent": {}, "runtime": {}}
    for name, table in tables.items():
        found = merged.get(name, {})
        if not isinstance(found, dict):
            ledger.refuse("load", ledger.place(name) or path, f"{name} is not a table", "syntax")
        elif name == "runtime":
            table.update(decode_table(found, RUNTIME, False, (name,), ledger))
        else:
            for inner, below in found.items():
                keys = (name, inner)
                if not isinstance(below, dict):
                    ledger.refuse("load", ledger.place(*keys), f"{inner} is not a table", "syntax")
                else:
                    types = HYPERVISOR if name == "hypervisor" else AGENT
                    table[inner] = decode_table(below, types, name == "agent", keys, ledger)
    return tables


def decode_table(
    table: dict[str, Any], types: dict[str, str], closed: bool, keys: Keys, ledger: Ledger
) -> dict[str, Any]:
    """Return a table's known keys. closed: whether an unknown one is refused."""
    fresh = {}
    for key, value in table.items():
        location = ledger.place(*keys, key)
        if key not in types:
            if closed:
                ledger.refuse("load", location, f"{'.'.join((*keys, key))} is not a key of runtime-rs")
            continue
        wrong = find_wrong(types[key], value)
        if wrong:
            ledger.refuse("load", location, f"{key} {wrong}", "syntax")
        else:
            fresh[key] = value
    for one, other in ALIASES:
        if one in fresh and other in fresh:
            ledger.refuse("load", ledger.place(*keys, other), f"{one} and {other} are two names of one key")
    return fresh
