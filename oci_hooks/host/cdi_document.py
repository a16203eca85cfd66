# SPDX-License-Identifier: Apache-2.0
"""Build a CDI document for groups of this host, as an object, JSON or YAML. Pure: reads nothing, writes nothing.

Source: SPEC.md of the Container Device Interface (tags.cncf.io/container-device-interface); its package parser defines
the rules for names, its package cdi the version that each feature needs.
"""

from __future__ import annotations

import json

from oci_hooks.findings import Finding
from oci_hooks.frozen import Frozen
from oci_hooks.oci import CONTROL_NODE, DEVICES_ANNOTATION, IOMMUFD_NODE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from oci_hooks.host.cdi_groups import Offer

KIND = "oci-vfio-hooks/group"
ALL = "all"
# First line of a YAML file; the next run recognizes its own file by it.
HEADER = "# Made by vfio-host-check --cdi, which replaces this file without asking.\n"
# The convention of the SR-IOV network device plugin; Kata's agent and vfio-guest-bind follow it too.
VARIABLE = "PCIDEVICE_OCI_VFIO_HOOKS_GROUP_"
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
ALNUM = LETTERS | frozenset("0123456789")
NAME_CHARACTERS = ALNUM | frozenset("-_.:")


class Form(Frozen):
    """Options of a CDI document. cdev: nodes of devices, not of groups; hook: path of the host check, "" for no
    hook; annotate: the guest hook's annotation on each device.
    """

    cdev: bool
    hook: str
    annotate: bool


# The document ---------------------------------------------------------------------------------------------------------


def make_document(offers: Iterable[Offer], form: Form) -> tuple[dict[str, Any], list[Finding]]:
    """Return the CDI document that offers these groups, and a finding for each name that cannot be used.

    Each group is a device named by its number, and by the address of each device in it; `all` is every group.
    """
    passable = sorted(offers, key=lambda offer: (len(offer.group.name), offer.group.name))
    devices = {offer.group.name: make_device(offer.group.name, [offer], form) for offer in passable}
    findings = []
    for offer in passable:
        for member, node in offer.nodes.items():
            problem = refuse_name(member, devices)
            if problem:
                hint = f"request its group: {KIND}={offer.group.name}"
                findings.append(Finding("warning", "cdi-name", f"device {member}", problem, hint))
                continue
            # A group's node serves all of its devices, a device's own node only that device.
            alone = offer.replace(nodes={member: node}) if form.cdev else offer
            devices[member] = make_device(member, [alone], form)
    if passable:
        devices[ALL] = make_device(ALL, passable, form)
    document: dict[str, Any] = {
        "cdiVersion": "",
        "kind": KIND,
        "devices": list(devices.values()),
        "containerEdits": make_common_edits(form),
    }
    document["cdiVersion"] = find_version(document)
    return document, findings


def make_device(name: str, offers: list[Offer], form: Form) -> dict[str, Any]:
    """Return a device of the document. Device numbers are omitted: the engine reads the node's current ones."""
    nodes = dict.fromkeys(node for offer in offers for node in offer.nodes.values())
    edits = {
        "env": [make_variable(offer) for offer in offers],
        "deviceNodes": [{"path": node, "permissions": "rw"} for node in nodes],
    }
    if not form.annotate:
        return {"name": name, "containerEdits": edits}
    ids = dict.fromkeys(word for offer in offers for word in list_ids(offer))
    annotations = {DEVICES_ANNOTATION: ",".join(ids) or "auto"}
    return {"name": name, "annotations": annotations, "containerEdits": edits}


def make_variable(offer: Offer) -> str:
    """Return the variable that names the devices of a group: one per group, so that none overrides another."""
    return f"{VARIABLE}{offer.group.name}={','.join(offer.nodes)}"


def list_ids(offer: Offer) -> list[str]:
    """Return the annotation values that select a group's devices in the guest, where their addresses differ."""
    return [f"id:{member.pci.id}" for member in offer.group.passable if member.pci and member.name in offer.nodes]


def make_common_edits(form: Form) -> dict[str, Any]:
    """Return the edits for every container that requests a device: the node of all groups, and the host check."""
    node = IOMMUFD_NODE if form.cdev else CONTROL_NODE
    edits: dict[str, Any] = {"deviceNodes": [{"path": node, "permissions": "rw"}]}
    if form.hook:
        arguments = [form.hook.rpartition("/")[2]]
        edits["hooks"] = [{"hookName": "createRuntime", "path": form.hook, "args": arguments}]
    return edits


def refuse_name(name: str, taken: Iterable[str]) -> str:
    """Return why the name of a device cannot be used, "" if it can."""
    if name in taken or name == ALL:
        return "has the name of another device of the CDI file, and is left out"
    if not name or not NAME_CHARACTERS.issuperset(name) or not ALNUM.issuperset(name[:1] + name[-1:]):
        return "has a name that CDI does not allow (letters, digits, - _ . :), and is left out"
    return ""


def find_version(document: dict[str, Any]) -> str:
    """Return the lowest CDI version with all features of a document; engines refuse versions that they do not know."""
    if any("annotations" in device for device in document["devices"]):
        return "0.6.0"
    if any(device["name"][0] not in LETTERS for device in document["devices"]):
        return "0.5.0"
    return "0.3.0"


# Text -----------------------------------------------------------------------------------------------------------------


def format_document(document: dict[str, Any], form: str) -> str:
    """Return the text of a CDI file. form: "json" or "yaml"."""
    if form == "json":
        return json.dumps(document, indent=2) + "\n"
    return HEADER + "\n".join(list_yaml_lines(document)) + "\n"


def list_yaml_lines(value: dict[str, Any] | list[Any]) -> Iterator[str]:
    """Yield an object or array as lines of YAML. Scalars are written as JSON, which YAML 1.2 accepts."""
    entries = [(f"{key}:", item) for key, item in value.items()] if isinstance(value, dict) else None
    for head, item in entries if entries is not None else [("-", item) for item in value]:
        if not isinstance(item, (dict, list)) or not item:
            yield f"{head} {json.dumps(item)}"
        elif head == "-":
            first, *others = list_yaml_lines(item)
            yield f"- {first}"
            yield from (f"  {line}" for line in others)
        else:
            yield head
            yield from (f"  {line}" for line in list_yaml_lines(item))


def is_own(text: str) -> bool:
    """Return whether this program made a CDI file: by its first line, or as JSON of our kind in exactly our layout."""
    if text.startswith(HEADER):
        return True
    try:
        document = json.loads(text)
    except ValueError:
        return False
    return isinstance(document, dict) and document.get("kind") == KIND and format_document(document, "json") == text
