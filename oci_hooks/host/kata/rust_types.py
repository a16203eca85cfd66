# SPDX-License-Identifier: Apache-2.0
"""Types of the values in runtime-rs's configuration."""

from __future__ import annotations

from oci_hooks.host.kata.go import is_text, name_types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


# Nested structures: their keys, and whether an unknown one is refused.
INSIDE = {
    "images": (name_types(text="name path verity_params"), False),
    "factory": (name_types(text="template_path", truth="enable_template"), True),
    "user": (name_types(text="user_name", u32="uid gid", u32s="groups"), True),
    "mounts": (name_types(text="name src_ctr src_path dst_ctr dst_path"), True),
    "memory": (
        name_types(
            truth="enable mem_agent_enable memcg_disable memcg_swap compact_disable",
            u8="memcg_swappiness_max memcg_period_psi_percent_limit memcg_eviction_psi_percent_limit "
            "compact_period_psi_percent_limit compact_psi_percent_limit compact_order",
            u64="memcg_period_secs memcg_eviction_run_aging_count_min compact_period_secs compact_threshold "
            "compact_force_times",
            i64="compact_sec_max",
        ),
        True,
    ),
}
LISTS = ("images", "mounts")
RANGES = {
    "u8": (0, 255),
    "u32": (0, (1 << 32) - 1),
    "u64": (0, (1 << 64) - 1),
    "i32": (-(1 << 31), (1 << 31) - 1),
    "i64": (-(1 << 63), (1 << 63) - 1),
}


def find_wrong(kind: str, value: Any) -> str:
    """Return why a value is not of a type, "" if it is."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if kind in RANGES:
        least, maximum = RANGES[kind]
        return "" if number and least <= value <= maximum else f"is not an integer from {least} to {maximum}"
    if kind in INSIDE:
        values = value if kind in LISTS and isinstance(value, list) else [value]
        return next(filter(None, (find_wrong_inside(kind, part) for part in values)), "")
    fits = {
        "text": is_text(value),
        "texts": isinstance(value, list) and all(map(is_text, value)),
        "truth": isinstance(value, bool),
        "real": number or isinstance(value, float),
        "pages": value in ("hugetlbfs", "thp"),
        "u32s": isinstance(value, list) and not any(find_wrong("u32", part) for part in value),
    }
    words = {
        "text": "a string",
        "texts": "a list of strings",
        "truth": "true or false",
        "real": "a number",
        "pages": "hugetlbfs or thp",
        "u32s": "a list of unsigned 32-bit integers",
    }
    return "" if fits[kind] else f"is not {words[kind]}"


def find_wrong_inside(kind: str, value: Any) -> str:
    """Return why a nested table is refused, "" if it is accepted."""
    types, closed = INSIDE[kind]
    if not isinstance(value, dict):
        return "is not a table"
    if kind == "images" and "name" not in value:
        return "has no name"
    if closed and not value.keys() <= types.keys():
        return f"has keys unknown to runtime-rs: {', '.join(sorted(value.keys() - types.keys()))}"
    return next(
        (f"has {key}, which {w}" for key in value if key in types and (w := find_wrong(types[key], value[key]))), ""
    )
