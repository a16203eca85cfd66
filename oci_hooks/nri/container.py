# SPDX-License-Identifier: Apache-2.0
"""Check a container as NRI describes it, as the host hook checks the one in config.json."""

from __future__ import annotations

from oci_hooks import oci
from oci_hooks.annotations import HANDLER_ANNOTATIONS, SANDBOX_ID_ANNOTATIONS
from oci_hooks.findings import EXIT_DONE, InputError
from oci_hooks.host import suite
from oci_hooks.host.runtime import detect_runtime, find_shim
from oci_hooks.host.settings import load_settings
from oci_hooks.host.targets import find_targets
from oci_hooks.json_input import Mismatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.runtime import Runtime
    from oci_hooks.oci import Spec, State
    from oci_hooks.program import Run
    from oci_hooks.system import Root

# The name of the container's description in findings.
SOURCE = "the container that NRI describes"
# NRI shows neither capabilities nor the limits that the engine adds later, so these cannot be checked.
NOT_SHOWN = ("memlock",)


def check(run: Run, pod: dict[str, Any], container: dict[str, Any], seconds: float) -> int:
    """Check a container that is about to be created, and return the exit code that the hook would return.

    pod, container: the messages; seconds: time after which the runtime stops waiting for the answer. run.details has
    the annotation to add, if there is one.
    """
    run.container = container["id"]
    document = make_document(container)
    if not any(is_vfio_path(device["path"]) for device in document["linux"]["devices"]):
        return EXIT_DONE
    state = make_state(pod, container)
    spec = read_document(document)
    if not spec.vfio_devices or oci.is_sandbox(state, spec):
        return EXIT_DONE
    settings = load_settings(run)
    run.deadline.extend(min(settings.deadline, seconds))
    runtime = find_runtime(run.root, state, spec, settings.kata_mode)
    found = suite.check_container(run.root, state, spec, runtime, settings, run.deadline)
    shown = (finding for finding in found if finding.code not in NOT_SHOWN)
    code = suite.choose_exit_code(suite.report_findings(run, shown, settings))
    if code == EXIT_DONE and settings.nri_annotate and runtime.is_kata:
        run.details["annotations"] = make_annotations(run.root, state, spec)
    return code


def is_vfio_path(path: str) -> bool:
    """Return whether a path names a VFIO group or device, in any notation; the control node alone requests nothing."""
    shortest = oci.normalize_device_path(path) if path.startswith("/") else ""
    return shortest.startswith(oci.GROUP_PREFIX) and shortest != oci.CONTROL_NODE


def make_document(container: dict[str, Any]) -> dict[str, Any]:
    """Return the part of config.json that NRI shows of a container."""
    linux = container["linux"] or {}
    resources = linux.get("resources") or {}
    hooks = {name: entries for name, entries in (container["hooks"] or {}).items() if entries}
    document = {
        "annotations": container["annotations"],
        "process": {"env": container["env"]},
        "mounts": container["mounts"],
        "linux": {
            "devices": [open_numbers(device) for device in linux.get("devices", ())],
            "namespaces": linux.get("namespaces", []),
            "resources": {"devices": [open_numbers(rule) for rule in resources.get("devices", ())]},
        },
    }
    return {**document, "hooks": hooks} if hooks else document


def open_numbers(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its optional numbers as numbers; absent ones are left out."""
    opened = {key: value["value"] if isinstance(value, dict) else value for key, value in message.items()}
    return {key: value for key, value in opened.items() if value is not None}


def make_state(pod: dict[str, Any], container: dict[str, Any]) -> State:
    """Return the state that a hook of this container would get, with the pod's runtime handler and id, and its name."""
    known = {
        HANDLER_ANNOTATIONS[0]: pod["runtime_handler"],
        SANDBOX_ID_ANNOTATIONS[0]: pod["id"],
        oci.CONTAINER_NAME_ANNOTATIONS[0]: container["name"],
    }
    # The pod's process is the sandbox's hypervisor, if there is one.
    return oci.State(container["id"], "", pod["pid"], "creating", {key: value for key, value in known.items() if value})


def read_document(document: dict[str, Any]) -> Spec:
    """Return the part of the document that the checks use. Raises InputError [bad-config]."""
    try:
        return oci.make_spec(document, SOURCE)
    except Mismatch as mismatch:
        hint = "see the container's devices in the pod's description; this comes from the container runtime"
        raise InputError("bad-config", f"{SOURCE}: {mismatch.path}", mismatch.problem, hint) from None


def find_runtime(root: Root, state: State, spec: Spec, mode: str) -> Runtime:
    """Return the runtime that is to create the container, by the pod's runtime handler and its process.

    The parent of this process is no shim, and nothing is created yet, as in a check by hand.
    """
    if mode == "auto" and is_kata_handler(root, state.annotations.get(HANDLER_ANNOTATIONS[0], "")):
        mode = "always"
    runtime = detect_runtime(root, state, spec, mode, by_hand=True)
    return runtime.replace(shim=find_shim(root, state.pid)) if runtime.is_kata and state.pid > 0 else runtime


def is_kata_handler(root: Root, name: str) -> bool:
    """Return whether a runtime handler, of any name, is Kata's according to the engine's configuration."""
    from oci_hooks.host.kata.handlers import list_kata_handlers

    return bool(name) and any(handler.name == name for handler in list_kata_handlers(root))


def make_annotations(root: Root, state: State, spec: Spec) -> dict[str, str]:
    """Return the annotation that names the container's devices to the guest hook; nothing if it already has one.

    The guest's addresses are not known yet, so devices are named by vendor and device.
    """
    if oci.is_annotated(oci.merge_annotations(state, spec)):
        return {}
    groups = [target.group for target in find_targets(root, spec.vfio_devices) if target.group]
    devices = [member.pci for group in groups for member in group.passable if member.pci]
    words = dict.fromkeys(f"id:{device.id}" for device in devices)
    return {oci.DEVICES_ANNOTATION: ",".join(words)} if words else {}
