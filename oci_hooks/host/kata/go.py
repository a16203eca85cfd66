# SPDX-License-Identifier: Apache-2.0
"""Read Kata's configuration as its Go runtime does: tables, types, defaults, refusals.

Sources, in kata-containers 4.1 (src/runtime): pkg/katautils/config.go (tomlConfig, decodeDropIns, new*HypervisorConfig,
SetKernelParams, checkConfig), pkg/katautils/config-settings.go.in, virtcontainers/hypervisor.go (KernelParamFields);
github.com/BurntSushi/toml v1.6.0 decode.go (unifyStruct: names whatever their case; unifyInt: ranges).
"""

from __future__ import annotations

from oci_hooks.host.kata.model import Ledger, read_layers
from oci_hooks.host.kata.toml import Moment
from oci_hooks.host.kata.toml_go import LenientReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.kata.model import Layer, Reading
    from oci_hooks.host.kata.toml import Keys
    from oci_hooks.system import Root


def name_types(**kinds: str) -> dict[str, str]:
    """Return the type of each key, from lists of keys by type."""
    return {key: kind for kind, keys in kinds.items() for key in keys.split()}


# text, texts (a list), truth; small and large numbers without a sign, number, real; images (a list of tables).
HYPERVISOR = name_types(
    text="path jailer_path kernel initrd image rootfs_type firmware firmware_volume machine_accelerators cpu_features "
    "kernel_params kernel_verity_params machine_type block_device_driver entropy_source shared_fs virtio_fs_daemon "
    "virtio_fs_cache vhost_user_store_path guest_hook_path guest_memory_dump_path seccompsandbox block_device_aio "
    "remote_hypervisor_socket snp_id_block snp_id_auth measurement_algo hot_plug_vfio cold_plug_vfio "
    "extra_monitor_socket",
    texts="valid_hypervisor_paths valid_jailer_paths valid_virtio_fs_daemon_paths virtio_fs_extra_args pflashes "
    "valid_vhost_user_store_paths valid_entropy_sources enable_annotations numa_mapping",
    large="snp_guest_policy rx_rate_limiter_max_rate tx_rate_limiter_max_rate memory_offset default_maxmemory",
    number="disk_rate_limiter_bw_max_rate disk_rate_limiter_bw_one_time_burst disk_rate_limiter_ops_max_rate "
    "disk_rate_limiter_ops_one_time_burst net_rate_limiter_bw_max_rate net_rate_limiter_bw_one_time_burst "
    "net_rate_limiter_ops_max_rate net_rate_limiter_ops_one_time_burst",
    small="tdx_quote_generation_service_socket_port hypervisor_loglevel virtio_fs_cache_size virtio_fs_queue_size "
    "default_maxvcpus default_memory memory_slots default_bridges msize_9p remote_hypervisor_timeout "
    "block_device_logical_sector_size block_device_physical_sector_size vhost_user_reconnect_timeout_sec "
    "indep_iothreads pcie_root_port pcie_switch_port",
    real="default_vcpus",
    truth="block_device_cache_set block_device_cache_direct block_device_cache_noflush enable_vhost_user_store "
    "disable_block_device_use enable_mem_prealloc reclaim_guest_freed_memory enable_hugepages enable_virtio_mem "
    "enable_iommu enable_iommu_platform enable_numa enable_debug disable_nesting_checks enable_iothreads "
    "disable_image_nvdimm disable_vhost_net guest_memory_dump_paging confidential_guest sev_snp_guest "
    "enable_guest_swap rootless disable_seccomp disable_selinux disable_guest_selinux use_legacy_serial",
    images="guest_extension_images",
)
IMAGE = name_types(text="name path verity_params")
RUNTIME = name_types(
    text="internetworking_model jaeger_endpoint jaeger_user jaeger_password vfio_mode guest_selinux_label "
    "emptydir_mode dan_conf pod_resource_api_sock kubelet_root_dir",
    texts="sandbox_bind_mounts experimental",
    truth="enable_tracing disable_new_netns disable_guest_seccomp enable_vcpus_pinning enable_debug "
    "sandbox_cgroup_only static_sandbox_resource_mgmt enable_pprof disable_guest_empty_dir "
    "experimental_force_guest_pull",
    large="create_container_timeout",
)
FACTORY = name_types(text="template_path vm_cache_endpoint", large="vm_cache_number", truth="enable_template")
AGENT = name_types(
    texts="kernel_modules",
    truth="enable_debug enable_tracing debug_console_enabled visible_cdi_devices",
    small="dial_timeout cdh_api_timeout launch_process_timeout",
)
KINDS = {"text": "a string", "texts": "a list of strings", "truth": "true or false", "images": "a list of tables"}
# The largest whole number that fits a float32.
MAX_REAL = 16777215


def read_go(root: Root, path: str, annotations: dict[str, str]) -> Reading:
    """Return the Go runtime's reading of a configuration. path: the main file, links resolved."""
    from oci_hooks.host.kata.go_annotations import apply_annotations
    from oci_hooks.host.kata.go_checks import check_tables, find_values

    ledger = Ledger(root)
    tables = merge_layers(read_layers(root, path, LenientReader, ledger, True), ledger)
    if not ledger.refused or any(tables.values()):
        check_tables(ledger, tables, path)
    ledger.check_files()
    name, values = find_values(ledger, tables)
    decided = apply_annotations(ledger, tables, name, values, annotations)
    return ledger.make_reading("go", tables, name, values, *decided)


# Tables --------------------------------------------------------------------------------------------------------------


def merge_layers(layers: list[Layer], ledger: Ledger) -> dict[str, Any]:
    """Return the merged tables of the files: hypervisor and agent by name, runtime and factory."""
    tables: dict[str, Any] = {"hypervisor": {}, "agent": {}, "runtime": {}, "factory": {}}
    for number, layer in enumerate(layers):
        fresh = decode_layer(layer, ledger, number == 0)
        for table in ("runtime", "factory"):
            tables[table].update(fresh[table])
        if number == 0:
            tables.update(hypervisor=fresh["hypervisor"], agent=fresh["agent"])
        else:
            apply_keys(layer, fresh, tables, ledger)
    return tables


def decode_layer(layer: Layer, ledger: Ledger, is_main: bool) -> dict[str, Any]:
    """Return one file's tables, decoded; values of a wrong type are noted and left out."""
    fresh: dict[str, Any] = {"hypervisor": {}, "agent": {}, "runtime": {}, "factory": {}}
    for key, table in layer.values.items():
        name = fold(key)
        if name in ("hypervisor", "agent"):
            # Anything but a table is skipped silently (unifyMap).
            if isinstance(table, dict):
                decode_named(layer, key, table, fresh[name], ledger, is_main)
        elif name in fresh and not isinstance(table, dict):
            ledger.refuse("load", layer.place((key,)), f"{key} is not a table", "syntax")
        elif name in fresh:
            fresh[name].update(decode_table(layer, (key,), table, (name,), ledger, True))
    return fresh


def decode_named(
    layer: Layer, key: str, table: dict[str, Any], into: dict[str, Any], ledger: Ledger, is_main: bool
) -> None:
    """Decode the tables below [hypervisor] or [agent], each by its name. key: as the file writes it."""
    keys: Keys = (key,)
    for name, below in table.items():
        if not isinstance(below, dict):
            ledger.refuse("load", layer.place((*keys, name)), f"{name} is not a table", "syntax")
            continue
        fresh = decode_table(layer, (*keys, name), below, (fold(key), name), ledger, is_main)
        # [hypervisor] and [Hypervisor]: Go takes them in any order.
        if into.get(name, fresh) != fresh:
            ledger.mark_uncertain(layer.place((*keys, name)), f"{name} is defined twice, and Go may use either")
            ledger.ambiguous.add("")
        into[name] = fresh


def decode_table(
    layer: Layer, keys: Keys, table: dict[str, Any], named: Keys, ledger: Ledger, counts: bool
) -> dict[str, Any]:
    """Return one table's known keys, by their right names.

    keys: as written; named: as Kata names them; counts: whether settings made here take effect at once.
    """
    types = {"hypervisor": HYPERVISOR, "agent": AGENT, "runtime": RUNTIME, "factory": FACTORY}[named[0]]
    fresh: dict[str, Any] = {}
    for key, value in table.items():
        name = fold(key)
        if name not in types:
            continue
        location = layer.place((*keys, key))
        wrong = find_wrong(types[name], value)
        if wrong:
            ledger.refuse("load", location, f"{key} {wrong}", "syntax")
            continue
        if name in fresh and fresh[name] != value:
            ledger.mark_uncertain(location, f"{name} is set twice, in different case, and Go may use either")
            ledger.ambiguous.add(name)
        fresh[name] = value
        if counts:
            ledger.mark((*named, name), location)
    return fresh


def apply_keys(layer: Layer, fresh: dict[str, Any], tables: dict[str, Any], ledger: Ledger) -> None:
    """Apply a drop-in's keys to the named tables (applyKey): here the case of names counts."""
    types = {"hypervisor": HYPERVISOR, "agent": AGENT}
    for keys in layer.keys:
        if len(keys) < 3 or keys[0] not in types:
            continue
        if keys[2] not in types[keys[0]]:
            text = f"the drop-in sets {'.'.join(keys[:3])}, which is not a key of Kata"
            ledger.refuse("load", layer.place(keys[:3]), text, "unknown-key")
        elif keys[2] in fresh[keys[0]].get(keys[1], {}):
            tables[keys[0]].setdefault(keys[1], {})[keys[2]] = fresh[keys[0]][keys[1]][keys[2]]
            if len(keys) == 3:
                ledger.mark(keys, layer.place(keys))


def fold(key: str) -> str:
    """Return a key in lower case as strings.EqualFold compares: long s and the Kelvin sign equal s and k."""
    return key.replace("\u017f", "s").replace("\u212a", "k").lower()


def find_wrong(kind: str, value: Any) -> str:
    """Return why a value is not of a type, "" if it is."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if kind == "small":
        return "" if number and 0 <= value < 1 << 32 else "is not an integer from 0 to 4294967295"
    if kind in ("large", "number"):
        return "" if number else "is not an integer"
    if kind == "real":
        fits = (number and abs(value) <= MAX_REAL) or (isinstance(value, float) and not abs(value) > 3.4028235e38)
        return "" if fits else "is not a 32-bit floating-point number"
    if kind == "images":
        return find_wrong_images(value)
    fits = (
        (kind == "text" and is_text(value))
        or (kind == "texts" and isinstance(value, list) and all(map(is_text, value)))
        or (kind == "truth" and isinstance(value, bool))
    )
    return "" if fits else f"is not {KINDS[kind]}"


def is_text(value: Any) -> bool:
    """Return whether a value is a string and not a date."""
    return isinstance(value, str) and not isinstance(value, Moment)


def find_wrong_images(value: Any) -> str:
    """Return why a value is not a list of images, "" if it is."""
    if not isinstance(value, list) or not all(isinstance(image, dict) for image in value):
        return f"is not {KINDS['images']}"
    wrong = [key for image in value for key in image if fold(key) in IMAGE and not is_text(image[key])]
    return f"has a {wrong[0]} that is not a string" if wrong else ""
