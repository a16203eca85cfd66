# SPDX-License-Identifier: Apache-2.0
"""Apply the sandbox's annotations to runtime-rs's configuration, and find those that it refuses or ignores.

Sources, in kata-containers 4.1: src/libs/kata-types/src/annotations/mod.rs (update_config_by_annotation),
src/libs/kata-types/src/config/hypervisor/mod.rs (replace_kernel_params, validate_path_pattern); crates.io glob 0.3.
"""

from __future__ import annotations

import re

from oci_hooks.annotations import AGENT_PREFIX, HYPERVISOR_PREFIX, RUNTIME_PREFIX
from oci_hooks.host.kata.admission import AnnotationFilter
from oci_hooks.host.kata.model import SIZES, has_wrong_verity, is_there, read_parameters, write_parameters
from oci_hooks.host.kata.rust_checks import LIMITS, adjust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.kata.model import Ledger

TRUTHS = [
    "enable_iothreads",
    "disable_block_device_use",
    "block_device_cache_set",
    "block_device_cache_direct",
    "block_device_cache_noflush",
    "disable_image_nvdimm",
    "enable_vhost_user_store",
    "enable_iommu",
    "enable_iommu_platform",
    "enable_mem_prealloc",
    "enable_hugepages",
    "enable_virtio_mem",
    "enable_guest_swap",
    "disable_vhost_net",
    "rootless",
]
# By the number's width in bits.
NUMBERS = {
    **dict.fromkeys(
        [
            "indep_iothreads",
            "default_max_vcpus",
            "pcie_root_port",
            "pcie_switch_port",
            "memory_slots",
            "network_queues",
            "default_gpus",
            "virtio_fs_cache_size",
            "blk_logical_sector_size",
            "blk_physical_sector_size",
            "block_device_queue_size",
        ],
        32,
    ),
    **dict.fromkeys(
        ["memory_offset", "rx_rate_limiter_max_rate", "tx_rate_limiter_max_rate", "block_device_num_queues"], 64
    ),
}
TEXTS = [
    "block_device_driver",
    "kernel_params",
    "cpu_features",
    "machine_type",
    "machine_accelerators",
    "shared_fs",
    "default_gpu_model",
    "virtio_fs_cache",
    "virtio_fs_extra_args",
]
GLOBS = {
    "path": "valid_hypervisor_paths",
    "jailer_path": "valid_jailer_paths",
    "vhost_user_store_path": "valid_vhost_user_store_paths",
    "entropy_source": "valid_entropy_sources",
    "virtio_fs_daemon": "valid_virtio_fs_daemon_paths",
}
FILES = ("kernel", "image", "initrd", "firmware", "guest_hook_path")
# Keys of the table whose annotation has another name.
TABLE_KEYS = {
    "default_max_vcpus": "default_maxvcpus",
    "blk_logical_sector_size": SIZES[0],
    "blk_physical_sector_size": SIZES[1],
}
MAX_PORTS = 16
OTHER_TRUTHS = (
    *(RUNTIME_PREFIX + key for key in ["disable_guest_seccomp", "enable_pprof", "sandbox_cgroup_only"]),
    *(RUNTIME_PREFIX + key for key in ["enable_vcpus_pinning", "disable_new_netns"]),
    AGENT_PREFIX + "enable_tracing",
)
OTHER_NUMBERS = (
    RUNTIME_PREFIX + "create_container_timeout",
    AGENT_PREFIX + "container_pipe_size",
    AGENT_PREFIX + "cdh_api_timeout_ms",
)
RUNTIMES = ("virt-container", "linux-container", "wasm-container")
FLOAT = re.compile(r"[+-]?(inf|infinity|nan|([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?)", re.IGNORECASE)


def apply_annotations(  # noqa: PLR0912 - one rule a line
    ledger: Ledger, tables: dict[str, Any], annotations: dict[str, str], path: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Apply the annotations to the tables.

    Return the annotation that set each value, and the names of those that are ignored. path: the main file.
    """
    decided: dict[str, str] = {}
    runtime = tables["runtime"]
    for key, found in (("hypervisor_name", "hypervisor"), ("agent_name", "agent")):
        wanted = annotations.get(RUNTIME_PREFIX + key)
        if wanted is not None and wanted in tables[found]:
            runtime[key] = wanted
            decided["hypervisor" if key == "hypervisor_name" else key] = RUNTIME_PREFIX + key
    for key in ("name", "hypervisor_name", "agent_name"):
        if not runtime.get(key):
            ledger.refuse("annotations", ledger.place("runtime", key) or path, f"[runtime] has no {key}")
    name = runtime.get("hypervisor_name", "")
    for key, found in (("hypervisor_name", "hypervisor"), ("agent_name", "agent")):
        if runtime.get(key) and runtime[key] not in tables[found]:
            location = ledger.place("runtime", key) or path
            ledger.refuse("annotations", location, f"{key} is {runtime[key]}, but there is no [{found}.{runtime[key]}]")
    table = tables["hypervisor"].get(name, {})
    gate = AnnotationFilter(table.get("enable_annotations", []), True)
    unallowed = []
    for annotation, text in sorted(annotations.items()):
        location = f"annotation {annotation}"
        key = annotation[len(HYPERVISOR_PREFIX) :]
        admitted = gate.allows(key) if annotation.startswith(HYPERVISOR_PREFIX) else False
        if admitted is None:
            where = ledger.place("hypervisor", name, "enable_annotations")
            ledger.mark_uncertain(where, f"cannot determine whether enable_annotations allows {key}")
        elif admitted:
            wrong = set_value(ledger, name, table, key, text, decided)
        elif annotation.startswith(HYPERVISOR_PREFIX):
            unallowed.append(annotation)
            continue
        else:
            wrong = apply_runtime_annotation(runtime, annotation, text, decided)
        if admitted is not None and wrong:
            ledger.refuse("annotations", location, wrong)
    sizes = [table.get(key, 0) for key in SIZES]
    if all(sizes) and sizes[0] > sizes[1]:
        ledger.refuse("annotations", path, "the logical sector size is larger than the physical one")
    for other, below in tables["hypervisor"].items():
        adjust(ledger, other, below, "annotations", path)
    return decided, tuple(unallowed)


def set_value(ledger: Ledger, name: str, table: dict[str, Any], key: str, text: str, decided: dict[str, str]) -> str:  # noqa: PLR0912, PLR0911 - one rule a line
    """Apply an annotation's value; return why runtime-rs refuses it, "" if it accepts it."""
    word = text.strip()
    value: Any = text
    if key in TRUTHS:
        if word not in ("true", "false"):
            return f"{text!r} is neither true nor false"
        value = word == "true"
    elif key in NUMBERS:
        wrong = find_wrong_number(key, word)
        if wrong:
            return wrong
        value = int(word)
    elif key in GLOBS:
        wrong = find_wrong_path(ledger, table.get(GLOBS[key], []), text, GLOBS[key])
        if wrong:
            return wrong
    elif key in FILES:
        if text and not is_there(ledger.root, text):
            return f"{text} is missing on the host, where runtime-rs looks for it"
    elif key == "prefetch_files.list":
        if text and not is_there(ledger.root, text):
            return f"{text} is missing on the host"
    elif key in ("default_vcpus", "default_memory", "hugepage_type", "kernel_verity_params", "cc_init_data"):
        return find_wrong_special(ledger, name, key, text)
    elif key not in TEXTS:
        return f"{key} is not an annotation of runtime-rs"
    if key == "kernel_params":
        value = replace_parameters(table.get(key, ""), text)
    elif key == "shared_fs":
        value = word
    table[TABLE_KEYS.get(key, key)] = value
    decided[key] = HYPERVISOR_PREFIX + key
    return ""


def find_wrong_number(key: str, word: str) -> str:
    """Return why a number is refused, "" if it is accepted."""
    if not is_number(word, NUMBERS[key]):
        return f"{word!r} is not an unsigned {NUMBERS[key]}-bit integer"
    number = int(word)
    if key in ("pcie_root_port", "pcie_switch_port") and number > MAX_PORTS:
        return f"is more than {MAX_PORTS}"
    if key.endswith("sector_size") and number and (not 512 <= number <= 65536 or number & (number - 1)):
        return "is not a power of 2 from 512 to 65536"
    return ""


def is_number(word: str, bits: int) -> bool:
    """Return whether Rust parses a text as an unsigned number: one leading plus is allowed."""
    digits = word[1:] if word.startswith("+") else word
    return digits.isascii() and digits.isdigit() and len(digits) < 1000 and int(digits) < 1 << bits


def find_wrong_special(ledger: Ledger, name: str, key: str, text: str) -> str:  # noqa: PLR0911 - one rule a line
    """Return why a value of a special type is refused, "" if it is accepted."""
    least, maximum = LIMITS.get(name, (0, 0))
    word = text.strip()
    if key == "default_vcpus":
        if not FLOAT.fullmatch(word):
            return f"{text!r} is not a number"
        return f"is more than {maximum}" if float(word) > maximum else ""
    if key == "default_memory":
        if not word.isascii() or not word.isdigit():
            if word[:1].isdigit():
                ledger.mark_uncertain(f"annotation {HYPERVISOR_PREFIX}{key}", "sizes with a unit are not checked")
            return ""
        return f"is less than {least} MiB" if int(word[:30]) < least else ""
    if key == "hugepage_type":
        return "" if word in ("hugetlbfs", "thp") else f"{text!r} is neither hugetlbfs nor thp"
    if key == "kernel_verity_params":
        return "is not a valid list of dm-verity parameters" if has_wrong_verity(text) else ""
    ledger.mark_uncertain(f"annotation {HYPERVISOR_PREFIX}{key}", "vfio-host-check does not check this value")
    return ""


def find_wrong_path(ledger: Ledger, patterns: list[str], text: str, key: str) -> str:
    """Return why a path is refused, "" if one of the patterns matches it. Here a star also matches slashes."""
    from fnmatch import fnmatchcase

    for pattern in patterns:
        if "**" in pattern or "[" in pattern or pattern.count("*") > 5 or len(text) > 4096:
            ledger.mark_uncertain("", f"vfio-host-check cannot evaluate the pattern {pattern} of {key}")
            return ""
        if fnmatchcase(text, pattern):
            return ""
    return f"{key} does not allow {text}"


def replace_parameters(old: str, new: str) -> str:
    """Return the kernel parameters after an annotation, which replaces those of the same names."""
    words = [word.strip() for word in new.split(" ") if word.strip()]
    if not new:
        return old
    names = {word.partition("=")[0] for word in words}
    kept = [pair for pair in read_parameters(w.strip() for w in old.split(" ") if w.strip()) if pair[0] not in names]
    return " ".join(filter(None, (write_parameters(kept), " ".join(words))))


def apply_runtime_annotation(runtime: dict[str, Any], annotation: str, text: str, decided: dict[str, str]) -> str:
    """Apply an annotation of runtime or agent; return why runtime-rs refuses it, "" if it accepts it."""
    word = text.strip()
    if annotation in OTHER_TRUTHS:
        return "" if word in ("true", "false") else f"{text!r} is neither true nor false"
    if annotation in OTHER_NUMBERS:
        return "" if is_number(word, 32) else f"{text!r} is not an unsigned 32-bit integer"
    if annotation == RUNTIME_PREFIX + "name":
        return "" if text in RUNTIMES else f"{text!r} is not one of {', '.join(RUNTIMES)}"
    if annotation in (RUNTIME_PREFIX + "internetworking_model", RUNTIME_PREFIX + "vfio_mode"):
        key = annotation[len(RUNTIME_PREFIX) :]
        runtime[key], decided[key] = text, annotation
    if annotation == RUNTIME_PREFIX + "shared_mounts":
        return apply_shared_mounts(runtime, text)
    return ""


def apply_shared_mounts(runtime: dict[str, Any], text: str) -> str:
    """Apply an annotation's shared mounts; return why runtime-rs refuses them, "" if it accepts them."""
    from oci_hooks.findings import InputError
    from oci_hooks.host.kata.rust_types import find_wrong
    from oci_hooks.json_input import parse_json

    try:
        mounts = parse_json(text.encode("utf-8", "replace"), "shared_mounts")
    except InputError:
        return "is not JSON"
    if not isinstance(mounts, list) or find_wrong("mounts", mounts):
        return "is not a list of mounts"
    runtime["shared_mounts"] = mounts
    return ""
