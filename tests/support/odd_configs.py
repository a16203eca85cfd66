# SPDX-License-Identifier: Apache-2.0
"""Kinds of config.json that break the specification, or look as if they did. Runtimes run most of them happily.

Each takes a good config.json and returns the bytes of the odd one. tests/vm/test_odd_configs.py has runc and crun run
them, tests/unit/test_odd_configs.py gives them to the executables alone.
"""

from __future__ import annotations

import copy
import json
from typing import Any, Callable

Config = dict[str, Any]
Kind = Callable[[Config], bytes]

# Placeholder for raw text in a document that json.dumps writes.
MARK = "(raw text)"
MIB = 1 << 20


def at(*way: str | int, value: Any) -> Kind:
    """Return the kind with this value at this place; the objects on the way are made, a list is appended to."""

    def make(config: Config) -> bytes:
        return json.dumps(put(config, way, value)).encode()

    return make


def put(config: Config, way: tuple[str | int, ...], value: Any) -> Config:
    """Return a copy of a config.json with a value at a place. "+": one more in a list."""
    whole = copy.deepcopy(config)
    owner: Any = whole
    *above, last = way
    for step in above:
        owner = owner.setdefault(step, {}) if isinstance(owner, dict) else owner[step]
    if last == "+":
        owner.append(value)
    else:
        owner[last] = value
    return whole


def without(*way: str) -> Kind:
    """Return the kind that lacks a member."""

    def make(config: Config) -> bytes:
        whole = copy.deepcopy(config)
        owner = whole
        for step in way[:-1]:
            owner = owner.get(step, {})
        owner.pop(way[-1], None)
        return json.dumps(whole).encode()

    return make


def raw(*way: str | int, text: bytes) -> Kind:
    """Return the kind with this text at this place, as it is."""

    def make(config: Config) -> bytes:
        return json.dumps(put(config, way, MARK)).encode().replace(f'"{MARK}"'.encode(), text)

    return make


def around(before: bytes = b"", after: bytes = b"") -> Kind:
    """Return the kind with text around the object."""
    return lambda config: before + json.dumps(config).encode() + after


def first(member: bytes) -> Kind:
    """Return the kind whose object has this text in front of its first member."""
    return lambda config: b"{" + member + json.dumps(config).encode()[1:]


def device(**members: Any) -> Kind:
    """Return the kind with one more device; None takes a member away."""
    entry = {"path": "/dev/odd", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 0, "gid": 0, **members}
    return at("linux", "devices", "+", value={key: value for key, value in entry.items() if value is not None})


def mapped(**mapping: Any) -> Kind:
    """Return the kind in a user namespace with this mapping."""

    def make(config: Config) -> bytes:
        whole = put(config, ("linux", "namespaces", "+"), {"type": "user"})
        return json.dumps(
            put(put(whole, ("linux", "uidMappings"), [mapping]), ("linux", "gidMappings"), [mapping])
        ).encode()

    return make


def many(number: int) -> dict[str, Any]:
    """Return one of many devices, two of each."""
    return {"path": f"/dev/odd{number // 2}", "type": "c", "major": 1, "minor": 3}


def other_case(config: Config) -> bytes:
    """Return the kind whose members have names in another case, which Go takes."""
    return json.dumps(
        {("Annotations" if key == "annotations" else key): value for key, value in config.items()}
    ).encode()


def comment(config: Config) -> bytes:
    """Return the kind with comments in it, which yajl takes."""
    return json.dumps(config, indent=1).encode().replace(b"\n", b' /* "{[ */ // "\n', 3)


KINDS: dict[str, Kind] = {
    # annotations
    "annotation null": at("annotations", "a", value=None),
    "annotation without a name": at("annotations", "", value="b"),
    "annotation not UTF-8": raw("annotations", "a", text=b'"\xff\xfe"'),
    "annotation cut UTF-8": raw("annotations", "a", text=b'"\xe6\x9d"'),
    "annotation half a surrogate pair": raw("annotations", "a", text=b'"\\ud800"'),
    "annotation with NUL": raw("annotations", "a", text=b'"x\\u0000y"'),
    "annotation with an escape": raw("annotations", "a", text=b'"\\u001b[31m"'),
    "annotation with a raw tab": raw("annotations", "a", text=b'"x\ty"'),
    "annotation of 1 MiB": at("annotations", "a", value="x" * MIB),
    "annotation of 5 MiB": at("annotations", "a", value="x" * 5 * MIB),
    "annotations by the thousand": at("annotations", value={f"a{number}": "b" for number in range(5000)}),
    "annotation number": at("annotations", "a", value=5),
    "annotation object": at("annotations", "a", value={"b": "c"}),
    "annotation name not UTF-8": first(b'"annotations": {"\xff": "b"}, '),
    "annotations twice": first(b'"annotations": {"a": null}, '),
    "annotations null": at("annotations", value=None),
    "annotations list": at("annotations", value=["a"]),
    "annotation of ours that asks for nothing": at("annotations", "io.katacontainers.x.vfio.log", value=None),
    "annotation name with NUL": at("annotations", "a\0", value="b"),
    "annotation twice": raw("annotations", text=b'{"a": "b", "a": "c"}'),
    "annotation with line separators": raw("annotations", "a", text='"\u2028\u0085\x7f"'.encode()),
    # environment
    "variable not UTF-8": raw("process", "env", "+", text=b'"A=\xff"'),
    "variable null": at("process", "env", "+", value=None),
    "variable number": at("process", "env", "+", value=5),
    "variable without a value": at("process", "env", "+", value="A"),
    "variable that speaks of it": raw("process", "env", "+", text=b'"A=/dev/vfio/12 io.katacontainers.x.vfio \xff"'),
    "variable that speaks of it in escapes": raw("process", "env", "+", text=b'"A=\\u0076fio"'),
    "variable of 100 KiB": at("process", "env", "+", value="A=" + "x" * 100000),
    "variables by the thousand": at("process", "env", value=["PATH=/bin", *(f"A{number}=b" for number in range(5000))]),
    "environment null": at("process", "env", value=None),
    "environment not there": without("process", "env"),
    # devices
    "device without a path": device(path=None),
    "device without a path or a type": device(path=None, type=None),
    "device without a type": device(type=None),
    "device with a relative path": device(path="dev/odd"),
    "device path not UTF-8": first(b'"odd": {"path": "/dev/vfio/\xff"}, '),
    "device with a negative number": device(major=-1, minor=-1),
    "device with a number of another kind": device(major="1"),
    "device with a whole float": device(major=1.0),
    "device with a mode below zero": device(fileMode=-1),
    "device with a large mode": device(fileMode=2**32 - 1),
    "device of nobody": device(uid=2**32 - 1, gid=2**32 - 1),
    "device of no user": device(uid=2**32),
    "device with members of its own": device(odd=[None, {}]),
    "device with a path that goes up": device(path="/dev/x/../odd"),
    "device with a blank in its path": device(path="/dev/odd \n"),
    "devices by the hundred": lambda config: json.dumps(
        put(config, ("linux", "devices"), config["linux"]["devices"] + [many(number) for number in range(300)])
    ).encode(),
    "device null": at("linux", "devices", "+", value=None),
    "device text": at("linux", "devices", "+", value="/dev/odd"),
    "devices null": at("linux", "devices", value=None),
    "device with an upper-case type": device(type="C"),
    # namespaces and mappings
    "mapping without containerID": mapped(hostID=100000, size=65536),
    "mapping without anything": mapped(),
    "mapping with a null": mapped(containerID=None, hostID=100000, size=65536),
    "mappings null": at("linux", "uidMappings", value=None),
    "namespace with a null": at("linux", "namespaces", "+", value={"type": "cgroup", "path": None}),
    "namespace without a type": at("linux", "namespaces", "+", value={}),
    "namespace null": at("linux", "namespaces", "+", value=None),
    # process and root
    "user null": at("process", "user", value=None),
    "user id null": at("process", "user", "uid", value=None),
    "user id float": at("process", "user", "uid", value=0.0),
    "user id below zero": at("process", "user", "uid", value=-1),
    "root without a path": at("root", value={"readonly": False}),
    "root null": at("root", value=None),
    "limits null": at("process", "rlimits", value=None),
    "other systems": at("windows", value={"layerFolders": None, "devices": [{"id": "vfio", "idType": ""}]}),
    "hooks of another kind": at("hooks", "odd", value=[]),
    # the text
    "text behind the object": around(after=b" and more"),
    "a second object": around(after=b'\n{"annotations": {"io.katacontainers.x.vfio.devices": "auto"}}'),
    "NUL behind the object": around(after=b"\0" * 100),
    "blanks before the object": around(before=b" \r\n\t" * 1000),
    "a byte order mark": around(before=b"\xef\xbb\xbf"),
    "3,000 arrays deep": first(b'"odd": ' + b"[" * 3000 + b"]" * 3000 + b", "),
    "9,000 objects deep": first(b'"odd": ' + b'{"a":' * 9000 + b"null" + b"}" * 9000 + b", "),
    "a number of 5,000 digits": first(b'"odd": ' + b"9" * 5000 + b", "),
    "a number beyond every bound": first(b'"odd": 1e999, '),
    "17 MiB of blanks": around(before=b" " * (17 * MIB)),
    "17 MiB of text": first(b'"odd": "' + b"x" * (17 * MIB) + b'", '),
    "17 MiB that speak of it": first(b'"odd": "/dev/vfio/12' + b"x" * (17 * MIB) + b'", '),
    "a member not UTF-8": first(b'"odd \xff": "\xc0\x80", '),
    "a member twice": first(b'"linux": {"devices": [{}]}, '),
    "a member without a name": first(b'"": null, '),
    "a name of 1 MiB": first(b'"' + b"x" * MIB + b'": null, '),
    "tabs and carriage returns": lambda config: json.dumps(config, indent="\t").encode().replace(b"\n", b"\r\n"),
    "a member in another case": other_case,
    "a comma too many": first(b'"odd": [1,], '),
    "single quotes": first(b"'odd': 1, "),
    "comments": comment,
    "no number": first(b'"odd": NaN, '),
    "a wrong escape": first(b'"odd": "\\q", '),
    "a line feed in a text": first(b'"odd": "\n", '),
}

# Kinds that the runtime itself does not run: both, runc (seen with 1.1.5), crun (seen with 1.8.1). Others may run more.
REFUSED_BY_BOTH = {
    "annotation with a raw tab",
    "annotation number",
    "annotation object",
    "device without a path or a type",
    "device without a type",
    "device with a whole float",
    "device with a negative number",
    "device with a mode below zero",
    "device of no user",
    "device null",
    "device text",
    "mapping without anything",
    "namespace without a type",
    "namespace null",
    "user id float",
    "user id below zero",
    "root without a path",
    "root null",
    "a byte order mark",
    "a comma too many",
    "single quotes",
    "no number",
    "a wrong escape",
    "a line feed in a text",
}
REFUSED = {
    "runc": REFUSED_BY_BOTH
    | {
        "annotations list",
        "variable null",
        "variable number",
        "variable without a value",
        "device with a number of another kind",
        "device with an upper-case type",
        "comments",
    },
    "crun": REFUSED_BY_BOTH
    | {
        "annotation null",
        "annotation not UTF-8",
        "annotation cut UTF-8",
        "annotation name not UTF-8",
        "annotations twice",
        "annotation of ours that asks for nothing",
        "variable not UTF-8",
        "variable that speaks of it",
        "device without a path",
        "device with a relative path",
        "device path not UTF-8",
        "device with a large mode",
        "other systems",
        "text behind the object",
        "a second object",
        "a member not UTF-8",
        "a member twice",
    },
}
