# SPDX-License-Identifier: Apache-2.0
"""Read which VFIO devices a container requests: annotation, predecessor's map, linux.devices. Pure."""

from __future__ import annotations

from oci_hooks import json_input, oci
from oci_hooks.findings import InputError
from oci_hooks.frozen import Frozen
from oci_hooks.linux.pci import HEX, is_class, is_hex_list, normalize_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.linux.pci import PciDevice

SYNTAX = "expected a comma-separated list of 0000:02:00.0, id:8086:10d3, class:0200, path:02/00, auto, cdev"
MAP_SYNTAX = 'write [{"host-group": 12, "devices": [{"host-address": "0000:3b:00.0", "guest-path": "02/00"}]}]'
# Characters of an annotation: five thousand addresses. A tenant's text must not use up the deadline.
TEXT_LIMIT = 64 << 10


class Selector(Frozen):
    """One way to name devices.

    kind: "address", "id", "class", "path" or "auto"; value: the address (BDF), `vvvv:dddd`, the class code's first
    digits, the guest PCI path `[dddd:[bb/]]ss.f/ss.f`; host_address: the device's BDF on the host where known.
    """

    tag = "selector"

    kind: str
    value: str
    host_address: str = ""

    def __str__(self) -> str:
        """Return the selector as a user writes it."""
        return self.value if self.kind in ("address", "auto") else f"{self.kind}:{self.value}"


class Request(Frozen):
    """One container's request.

    source: its origin, for errors; selectors: from an annotation; entries: from linux.devices, if there is no
    annotation; hints: BDFs in PCIDEVICE_* variables; wants_cdev: iommufd device nodes are requested.
    """

    tag = "request"

    source: str
    selectors: tuple[Selector, ...] = ()
    entries: tuple[oci.Device, ...] = ()
    hints: tuple[str, ...] = ()
    wants_cdev: bool = False


def read_request(state: oci.State, spec: oci.Spec) -> Request | None:
    """Return the container's request, or None if it requests nothing.

    The container's own annotation decides where there is one, or else the pod's, then the predecessor's map, then
    linux.devices (docs/reference/annotations.md).
    Raises InputError [bad-annotation].
    """
    if oci.is_sandbox(state, spec):
        return None
    entries = spec.vfio_devices
    annotations = oci.merge_annotations(state, spec)
    name = oci.name_devices_annotation(annotations)
    text, old_map = annotations.get(name), annotations.get(oci.MAP_ANNOTATION)
    for key, value in ((name, text), (oci.MAP_ANNOTATION, old_map)):
        if value is not None and len(value) > TEXT_LIMIT:
            problem = f"is longer than {TEXT_LIMIT} characters"
            raise InputError("bad-annotation", f"annotation {key}", problem, "select devices by id:, class: or auto")
    if text is not None:
        source = f"annotation {name}"
        words = [word.strip() for word in text.split(",")]
        # Without duplicates: a thousand of them would be searched a thousand times.
        selectors = tuple(dict.fromkeys(parse_selector(word, source) for word in words if word != "cdev"))
        if not selectors:
            raise InputError("bad-annotation", source, f"{text!r} names no device", SYNTAX)
        known = parse_map(old_map) if old_map is not None else ()
        return Request(source, add_host_addresses(selectors, known), entries, wants_cdev="cdev" in words)
    if old_map is not None:
        return Request(f"annotation {oci.MAP_ANNOTATION}", parse_map(old_map), entries)
    if entries:
        return Request("linux.devices", (), entries, read_hints(spec))
    return None


def is_pods_request(state: oci.State, spec: oci.Spec) -> bool:
    """Return whether the container asks by its pod's annotation, as each container of the pod does."""
    annotations = oci.merge_annotations(state, spec)
    has_name = any(annotations.get(name) for name in oci.CONTAINER_NAME_ANNOTATIONS)
    return has_name and oci.name_devices_annotation(annotations) == oci.DEVICES_ANNOTATION in annotations


def parse_selector(word: str, source: str) -> Selector:
    """Return the selector in one word of the annotation. Raises InputError [bad-annotation]."""
    kind, separator, value = word.partition(":")
    value = value.strip().lower()
    if word == "auto":
        return Selector("auto", "auto")
    if separator and kind == "id" and is_hex_list(value.split(":"), (4, 4)):
        return Selector("id", value)
    # Class; class and subclass; or both and the interface.
    if separator and kind == "class" and is_class(value):
        return Selector("class", value)
    if separator and kind == "path":
        path = normalize_path(value)
        if path:
            return Selector("path", path)
    address = normalize_address(word)
    if address:
        return Selector("address", address)
    raise InputError("bad-annotation", source, f"invalid device selector {word!r}", SYNTAX)


def normalize_path(text: str) -> str:
    """Return a guest PCI path as `[dddd:[bb:]]ss.f/ss.f`, or "" if the text is invalid.

    Kata writes slots with two digits (src/agent/src/pci.rs); a function after a dot and a root complex before a colon
    (`0001:02/00`, `0001:80:02/00`) are accepted, too.
    """
    root, colon, steps = text.rpartition(":")
    roots = root.split(":") if colon else []
    if len(roots) > 2 or not is_hex_list(roots, (4, 2)[: len(roots)]):
        return ""
    result = []
    for step in steps.split("/"):
        slot, dot, function = step.partition(".")
        if not dot:
            function = "0"
        if not 1 <= len(slot) <= 2 or not HEX.issuperset(slot) or int(slot, 16) > 31 or function not in set("01234567"):
            return ""
        result.append(f"{int(slot, 16):02x}.{function}")
    return ":".join([*roots, "/".join(result)])


def parse_map(text: str) -> tuple[Selector, ...]:
    """Return the selectors in the map that dgibson/kata-vfio-tools put into io.katacontainers.x.vfio.

    A list of host groups, each `{"host-group": ..., "devices": [{"host-address": BDF, "guest-path": {"Path": ["02.0",
    "00.0"]}}]}`; a bare list or a string `02/00` is accepted for the path, too. Raises InputError [bad-annotation].
    """
    from oci_hooks.json_input import parse_json

    source = f"annotation {oci.MAP_ANNOTATION}"
    groups = parse_json(text.encode("utf-8", "surrogatepass"), source)
    selectors = []
    for index, group in enumerate(expect(groups, list, source, "top level")):
        devices = expect(group, dict, source, f"[{index}]").get("devices")
        for number, device in enumerate(expect(devices, list, source, f"[{index}].devices")):
            where = f"[{index}].devices[{number}]"
            path = read_map_path(expect(device, dict, source, where).get("guest-path"), source, f"{where}.guest-path")
            host = expect(device.get("host-address", ""), str, source, f"{where}.host-address")
            selectors.append(Selector("path", path, normalize_address(host)))
    if not selectors:
        raise InputError("bad-annotation", source, "names no device", "list devices with a guest-path")
    return tuple(selectors)


def read_map_path(value: Any, source: str, where: str) -> str:
    """Return the guest path of one entry of the map. Raises InputError [bad-annotation]."""
    if isinstance(value, dict):
        # Go matches a field's name in any case.
        value = next((steps for key, steps in value.items() if key.lower() == "path"), None)
    text = "/".join(map(str, value)) if isinstance(value, list) else value
    path = normalize_path(text.lower()) if isinstance(text, str) else ""
    if not path:
        raise InputError("bad-annotation", f"{source}: {where}", "expected a path such as 02/00", MAP_SYNTAX)
    return path


def expect(value: Any, kind: Any, source: str, where: str) -> Any:
    """Return the value if it is of this kind. Raises InputError [bad-annotation] with its place in the map."""
    if not isinstance(value, kind):
        names = {list: "array", dict: "object", str: "string"}
        problem = f"expected {names[kind]}, found {json_input.name_json_type(value)}"
        raise InputError("bad-annotation", f"{source}: {where}", problem, MAP_SYNTAX)
    return value


def add_host_addresses(selectors: tuple[Selector, ...], known: tuple[Selector, ...]) -> tuple[Selector, ...]:
    """Return the selectors with the map's host addresses for the same guest paths."""
    hosts = {(selector.kind, selector.value): selector.host_address for selector in known}
    return tuple(s.replace(host_address=hosts.get((s.kind, s.value), "")) for s in selectors)


def read_hints(spec: oci.Spec) -> tuple[str, ...]:
    """Return the addresses in PCIDEVICE_* variables (SR-IOV device plugin).

    Kata 2.4 to 3.7 translates them to guest addresses, other versions leave the host's. So they are only hints: an
    address that matches no candidate is ignored.
    """
    hints = []
    for text in spec.environment:
        name, _, value = text.partition("=")
        if name.startswith("PCIDEVICE_") and not name.endswith("_INFO"):
            hints += [address for address in map(normalize_address, value.split(",")) if address]
    return tuple(dict.fromkeys(hints))


def matches(selector: Selector, device: PciDevice) -> bool:
    """Return whether a selector matches a device."""
    if selector.kind == "address":
        return device.address == selector.value
    if selector.kind == "id":
        return device.id == selector.value
    if selector.kind == "class":
        return device.class_code.startswith(selector.value)
    return matches_path(selector.value, device.path)


def matches_path(wanted: str, path: str) -> bool:
    """Return whether a device's path in sysfs is the guest PCI path: the slots from the root bus to it.

    wanted: `[dddd:[bb:]]ss.f/ss.f`. Without a root complex any matches, as Kata omits it in a VM with a single one;
    path: e.g. /sys/devices/pci0000:00/0000:00:02.0/0000:01:00.0.
    """
    root, _, steps = wanted.rpartition(":")
    top, slots = split_path(path)
    return slots == steps and (not root or top == root or (":" not in root and top.startswith(f"{root}:")))


def split_path(path: str) -> tuple[str, str]:
    """Return root complex and slots of a device's path in sysfs: "0000:00" and "02.0/00.0".

    The last directory of that name is the root complex: it may be below a device of another one (VMD) or of a platform.
    """
    top, _, below = path.rpartition("/pci")[2].partition("/")
    return top, "/".join(step.rpartition(":")[2] for step in below.split("/"))
