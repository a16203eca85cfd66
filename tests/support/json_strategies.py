# SPDX-License-Identifier: Apache-2.0
"""JSON documents for property tests: arbitrary ones, and ones that are right but for a detail or two."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from oci_hooks import oci

# Values at the bounds in the schemas, and values that look like a number and are not.
NUMBERS = st.sampled_from(
    [-2, -1, 0, 1, 3.0, -1.0, 0.5, 1e308, float("inf"), float("nan"), 2**32 - 2, 2**32 - 1, 2**32, 2**64, True, False]
)
# NUL and lone surrogates can be written in JSON, and in no path.
TEXTS = st.one_of(
    st.sampled_from(["", "/", "/x", "c", "b", "u", "p", "user", "a\0b", "/a\0b", "/\ud800", "\udc80", "/x\n", "\n"]),
    st.text(st.characters(), max_size=8),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.integers(), st.floats(), TEXTS)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


# Documents with every member that the schemas know.
WHOLE_STATE = {
    "ociVersion": "1.0.2",
    "id": "c1",
    "status": "created",
    "pid": 7,
    "bundle": "/b",
    "root": "/r",
    "annotations": {"a": "b"},
}
MAPPING = {"containerID": 0, "hostID": 1000, "size": 10}
WHOLE_CONFIG = {
    "annotations": {"a": "b"},
    "root": {"path": "rootfs"},
    "process": {"user": {"uid": 0, "gid": 0}, "env": ["A=1"]},
    "linux": {
        "devices": [
            {"path": "/dev/vfio/12", "type": "c", "major": 1, "minor": 2, "fileMode": 438, "uid": 0, "gid": 0},
        ],
        "namespaces": [{"type": "user"}],
        "uidMappings": [MAPPING],
        "gidMappings": [MAPPING],
    },
}


def list_places(value: Any) -> list[tuple[Any, ...]]:
    """Return the path of a JSON value and of everything in it."""
    if not isinstance(value, (dict, list)):
        return [()]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(), *((key, *rest) for key, inner in items for rest in list_places(inner))]


@st.composite
def nearly(draw: st.DrawFn, whole: Any) -> Any:
    """Return a strategy for a document with one value changed or taken away, now and then more: it is wrong in one
    place, or right in a way that nobody thought of. Most changes keep the kind and go to its edges."""
    document = {"top level": copy.deepcopy(whole)}
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        location: list[Any] = ["top level", *draw(st.sampled_from(list_places(document["top level"])))]
        owner: Any = document
        above, last = location[:-1], location[-1]
        for step in above:
            owner = owner[step]
        how = draw(st.sampled_from(["edge", "edge", "edge", "edge", "anything", "nothing"]))
        if how == "nothing" and above:
            del owner[last]
        elif how == "edge" and isinstance(owner[last], int):
            owner[last] = draw(NUMBERS)
        elif how == "edge" and isinstance(owner[last], str):
            owner[last] = draw(TEXTS)
        else:
            owner[last] = draw(ANYTHING)
    return document["top level"]


STATES = nearly(WHOLE_STATE)
CONFIGS = nearly(WHOLE_CONFIG)
# Parts of a config.json that ask for VFIO.
REQUESTS: list[dict[str, Any]] = [
    {"annotations": {oci.DEVICES_ANNOTATION: "auto"}},
    {"annotations": {"a": None, oci.MAP_ANNOTATION: "[]"}},
    {"linux": {"devices": [{"path": "/dev/vfio/12", "type": "c"}]}},
    {"linux": {"devices": [{"path": "/dev/null", "type": "c"}, {"type": "c", "path": "/dev/./vfio/devices/vfio0"}]}},
]


def write_json(document: object, choose: Callable[[tuple[str, ...]], str]) -> bytes:
    """Return a document as JSON, the letters of "/vfio" in its strings spelled in any way that JSON has for them."""

    def spell(match: re.Match[str]) -> str:
        letter = match[0]
        ways = (letter, f"\\u{ord(letter):04x}", f"\\u{ord(letter):04X}") if len(letter) == 1 else (letter,)
        return choose((*ways, "\\/") if letter == "/" else ways)

    def spell_string(match: re.Match[str]) -> str:
        return re.sub(r"\\u....|\\.|[vfio/]", spell, match[0])

    return re.sub(r'"(?:[^"\\]|\\.)*"', spell_string, json.dumps(document)).encode()
