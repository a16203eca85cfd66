# SPDX-License-Identifier: Apache-2.0
"""Apply the sandbox's annotations to the Go runtime's configuration, and find those that it refuses.

Sources, in kata-containers 4.1 (src/runtime): pkg/oci/utils.go (addAnnotations and all that it calls),
virtcontainers/pkg/annotations/annotations.go; Go's strconv.
"""

from __future__ import annotations

import os
import re

from oci_hooks.annotations import AGENT_PREFIX, HYPERVISOR_PREFIX, RUNTIME_PREFIX
from oci_hooks.host.kata.admission import AnnotationFilter
from oci_hooks.host.kata.go_checks import BLOCK_AIO, BLOCK_DRIVERS, NETWORK_MODELS, NO_PORT, PORTS, VFIO_MODES
from oci_hooks.host.kata.model import has_wrong_verity, read_parameters, write_parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.kata.model import Ledger

# strconv.ParseBool
TRUE_WORDS = ("1", "t", "T", "TRUE", "true", "True")
FALSE_WORDS = ("0", "f", "F", "FALSE", "false", "False")
TRUTHS = [
    "enable_vhost_user_store",
    "disable_image_nvdimm",
    "use_legacy_serial",
    "enable_virtio_mem",
    "enable_mem_prealloc",
    "reclaim_guest_freed_memory",
    "enable_hugepages",
    "enable_iommu",
    "enable_iommu_platform",
    "enable_guest_swap",
    "rootless",
    "disable_block_device_use",
    "enable_iothreads",
    "block_device_cache_set",
    "block_device_cache_direct",
    "block_device_cache_noflush",
    "disable_vhost_net",
]
NUMBERS = [
    "vhost_user_reconnect_timeout_sec",
    "pcie_root_port",
    "pcie_switch_port",
    "default_memory",
    "memory_slots",
    "memory_offset",
    "default_max_vcpus",
    "indep_iothreads",
    "blk_logical_sector_size",
    "blk_physical_sector_size",
    "virtio_fs_cache_size",
    "msize_9p",
    "rx_rate_limiter_max_rate",
    "tx_rate_limiter_max_rate",
]
RUNTIME_TRUTHS = ["disable_guest_seccomp", "sandbox_cgroup_only", "experimental_force_guest_pull", "disable_new_netns"]
GLOBS = {
    "path": "valid_hypervisor_paths",
    "jailer_path": "valid_jailer_paths",
    "virtio_fs_daemon": "valid_virtio_fs_daemon_paths",
    "vhost_user_store_path": "valid_vhost_user_store_paths",
    "entropy_source": "valid_entropy_sources",
}
CHOICES = {
    "block_device_driver": BLOCK_DRIVERS,
    "block_device_aio": BLOCK_AIO,
    "shared_fs": ("virtio-9p", "virtio-fs"),
    "hot_plug_vfio": ("", NO_PORT, *PORTS),
    "cold_plug_vfio": ("", NO_PORT, *PORTS),
}
# One annotation differs in its name (annotations.go, EnableVCPUsPinning).
PINNING = "io.katacontainers.enable_vcpus_pinning"
MAX_CPUS = 240
FLOAT = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MAX_NUMBER = (1 << 64) - 1
NOT_A_NUMBER = "is not an unsigned 64-bit integer"


def apply_annotations(
    ledger: Ledger, tables: dict[str, Any], name: str, values: dict[str, Any], annotations: dict[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Apply the annotations to the values.

    Return the annotation that set each value, and the names of those that are not allowed.
    """
    table = tables["hypervisor"].get(name, {})
    # Only Dragonball's table has a list that Kata does not read.
    gate = AnnotationFilter(table.get("enable_annotations", []) if name != "dragonball" else [], False)
    decided: dict[str, str] = {}
    unallowed = []
    for annotation, text in sorted(annotations.items()):
        location = f"annotation {annotation}"
        if annotation.startswith(HYPERVISOR_PREFIX):
            key = annotation[len(HYPERVISOR_PREFIX) :]
            admitted = gate.allows(key)
            if admitted is None:
                ledger.mark_uncertain(
                    find_allowed_list(ledger, name), f"cannot determine whether enable_annotations allows {key}"
                )
            elif not admitted:
                unallowed.append(annotation)
                ledger.refuse("annotations", location, f"enable_annotations does not allow {key}", "unallowed")
            if admitted is not False:
                wrong = find_wrong(ledger, tables, name, key, text)
                if wrong:
                    ledger.refuse("annotations", location, wrong)
                elif admitted:
                    set_value(values, decided, key, text)
        elif annotation.startswith((RUNTIME_PREFIX, AGENT_PREFIX)) or annotation == PINNING:
            wrong = find_wrong_other(annotation, text)
            if wrong:
                ledger.refuse("annotations", location, wrong)
            elif annotation == RUNTIME_PREFIX + "vfio_mode":
                values["vfio_mode"], decided["vfio_mode"] = text, annotation
    check_together(ledger, table, name, annotations)
    return decided, tuple(unallowed)


def find_allowed_list(ledger: Ledger, name: str) -> str:
    """Return where the list of allowed annotations is set."""
    return ledger.place("hypervisor", name, "enable_annotations")


def find_wrong(ledger: Ledger, tables: dict[str, Any], name: str, key: str, text: str) -> str:  # noqa: PLR0911 - one rule a line
    """Return why Kata refuses an annotation's value, "" if it accepts it."""
    table = tables["hypervisor"].get(name, {})
    if key in TRUTHS:
        return "" if text in TRUE_WORDS + FALSE_WORDS else f"{text!r} is neither true nor false"
    if key in NUMBERS:
        return find_wrong_number(name, key, int(text[:30])) if is_number(text) else f"{text!r} {NOT_A_NUMBER}"
    if key in CHOICES:
        return "" if text in CHOICES[key] else f"{text!r} is not one of {', '.join(filter(None, CHOICES[key]))}"
    if key in GLOBS:
        return find_wrong_path(ledger, table.get(GLOBS[key], []), text, GLOBS[key])
    if key == "default_vcpus":
        return find_wrong_cpus(name, text)
    if key == "kernel_params":
        pairs = read_parameters(text.split())
        return "has a parameter without a name" if any(not pair[0] for pair in pairs) else ""
    if key == "kernel_verity_params":
        return "is not a valid list of dm-verity parameters" if has_wrong_verity(text) else ""
    if key == "default_gpus" and name == "remote":
        return "" if is_number(text) else f"{text!r} {NOT_A_NUMBER}"
    if key == "virtio_fs_extra_args":
        return "" if is_list(text) else f"{text!r} is not a JSON list of strings"
    if key in ("cc_init_data", "numa_mapping") and text:
        ledger.mark_uncertain(f"annotation {HYPERVISOR_PREFIX}{key}", "vfio-host-check does not check this value")
    return ""


def is_number(text: str) -> bool:
    """Return whether strconv.ParseUint accepts a text, base 10, 64 bits."""
    return text.isascii() and text.isdigit() and int(text[:30]) <= MAX_NUMBER


def find_wrong_number(name: str, key: str, number: int) -> str:
    """Return why Kata refuses a number, "" if it accepts it."""
    if key == "default_memory" and number < 256 and name != "remote":
        return "is less than 256 MiB"
    if key == "default_max_vcpus" and name != "remote" and number % (1 << 32) > min(os.cpu_count() or 1, MAX_CPUS):
        return "exceeds this machine's processor count"
    if key == "indep_iothreads" and not 1 <= number <= 50:
        return "is not a number from 1 to 50"
    if key == "msize_9p" and number == 0:
        return "must not be 0"
    if key.endswith("sector_size") and number and (not 512 <= number <= 65536 or number & (number - 1)):
        return "is not a power of 2 from 512 to 65536"
    return ""


def find_wrong_cpus(name: str, text: str) -> str:
    """Return why Kata refuses a number of processors, "" if it accepts it."""
    if not FLOAT.fullmatch(text):
        return f"{text!r} is not a number"
    number = float(text.replace("_", ""))
    if "_" in text or number < 0 or number > 3.4028235e38:
        return f"{text!r} is not a number"
    return "exceeds this machine's processor count" if name != "remote" and number > (os.cpu_count() or 1) else ""


def find_wrong_path(ledger: Ledger, patterns: list[str], text: str, key: str) -> str:
    """Return why Kata refuses a path, "" if one of the patterns matches it on this machine."""
    from fnmatch import fnmatchcase

    parts = text.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted)):
            if "\0" in text or not ledger.root.exists(text):
                ledger.mark_uncertain("", f"{text} is missing on this machine")
            return ""
    return f"{key} does not allow {text}"


def find_wrong_other(annotation: str, text: str) -> str:
    """Return why Kata refuses the value of an annotation of the runtime or the agent, "" if it accepts it."""
    key = annotation.rpartition(".")[2]
    truth = text in TRUE_WORDS + FALSE_WORDS
    if annotation == PINNING or (annotation.startswith(RUNTIME_PREFIX) and key in RUNTIME_TRUTHS):
        return "" if truth else f"{text!r} is neither true nor false"
    if annotation == AGENT_PREFIX + "enable_tracing":
        return "" if truth else f"{text!r} is neither true nor false"
    if annotation in (RUNTIME_PREFIX + "create_container_timeout", AGENT_PREFIX + "container_pipe_size"):
        return "" if is_number(text) else f"{text!r} {NOT_A_NUMBER}"
    if annotation == RUNTIME_PREFIX + "experimental":
        return "this Kata release has no experimental features"
    choices = {RUNTIME_PREFIX + "internetworking_model": NETWORK_MODELS, RUNTIME_PREFIX + "vfio_mode": VFIO_MODES}
    if annotation in choices and text not in choices[annotation]:
        return f"{text!r} is not one of {', '.join(choices[annotation])}"
    return "is not base64" if annotation == AGENT_PREFIX + "policy" and not is_base64(text) else ""


def is_list(text: str) -> bool:
    """Return whether a text is a list of strings in JSON, or null."""
    from oci_hooks.findings import InputError
    from oci_hooks.json_input import parse_json

    try:
        value = parse_json(text.encode("utf-8", "replace"), "annotation")
    except InputError:
        return False
    return value is None or (isinstance(value, list) and all(isinstance(word, (str, type(None))) for word in value))


def is_base64(text: str) -> bool:
    """Return whether a text is base64, line ends ignored."""
    from base64 import b64decode

    try:
        b64decode(text.replace("\n", "").replace("\r", ""), validate=True)
    except ValueError:
        return False
    return True


def check_together(ledger: Ledger, table: dict[str, Any], name: str, annotations: dict[str, str]) -> None:
    """Note combinations of annotations that Kata refuses although each alone is valid."""
    found = {key: annotations.get(HYPERVISOR_PREFIX + key, "") for key in ("shared_fs", "virtio_fs_daemon")}
    if found["shared_fs"] == "virtio-fs" and not (found["virtio_fs_daemon"] or table.get("virtio_fs_daemon")):
        ledger.refuse("annotations", f"annotation {HYPERVISOR_PREFIX}shared_fs", "virtio-fs needs virtio_fs_daemon")
    sizes = []
    for key in ("logical_sector_size", "physical_sector_size"):
        text = annotations.get(f"{HYPERVISOR_PREFIX}blk_{key}", "")
        own = table.get(f"block_device_{key}", 0) if name in ("qemu", "clh", "stratovirt") else 0
        sizes.append(int(text[:30]) if is_number(text) else own)
    if all(sizes) and sizes[0] > sizes[1]:
        location = f"annotation {HYPERVISOR_PREFIX}blk_logical_sector_size"
        ledger.refuse("annotations", location, "the logical sector size is larger than the physical one")


def set_value(values: dict[str, Any], decided: dict[str, str], key: str, text: str) -> None:
    """Apply an annotation's valid value."""
    annotation = HYPERVISOR_PREFIX + key
    if key in ("enable_iommu", "rootless"):
        values[key], decided[key] = text in TRUE_WORDS, annotation
    elif key in ("machine_type", "guest_hook_path") and text:
        values[key], decided[key] = text, annotation
    elif key in ("pcie_root_port", "pcie_switch_port") and int(text) > 0:
        values[key], decided[key] = int(text) % (1 << 32), annotation
    elif key == "kernel_params" and text:
        pairs = read_parameters(values[key].split(" "))
        for pair in read_parameters(text.split()):
            pairs = [*(old for old in pairs if old[0] != pair[0]), pair]
        values[key], decided[key] = write_parameters(pairs), annotation
    elif key in ("hot_plug_vfio", "cold_plug_vfio"):
        # Each resets the other; annotations come in order of name here, and Go looks at cold_plug_vfio last.
        other = "cold_plug_vfio" if key == "hot_plug_vfio" else "hot_plug_vfio"
        if key == "hot_plug_vfio" and decided.get("cold_plug_vfio") == HYPERVISOR_PREFIX + "cold_plug_vfio":
            return
        values.update({key: text or NO_PORT, other: NO_PORT})
        decided.update({key: annotation, other: annotation})
