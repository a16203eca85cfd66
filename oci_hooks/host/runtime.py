# SPDX-License-Identifier: Apache-2.0
"""Detect the runtime that started the hook: a Kata runtime (which one), or a plain runc or crun.

Detection uses their behaviour: Kata's shim is the parent process; Kata Go writes a state without a status, runtime-rs
writes one; Kata up to 2.3 passes no annotations (facts: katautils/hook.go, kata-sys-util/src/hooks.rs).
"""

from __future__ import annotations

import os

from oci_hooks.annotations import CRI_PREFIXES, HANDLER_ANNOTATIONS, KATA_PREFIX, SANDBOX_ID_ANNOTATIONS
from oci_hooks.frozen import Frozen
from oci_hooks.host import hypervisor as vmm
from oci_hooks.linux.processes import Process, list_family, list_process_ancestors, read_process
from oci_hooks.oci import merge_annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.hypervisor import Hypervisor
    from oci_hooks.oci import Spec, State
    from oci_hooks.system import Root

SHIM_NAMES = ("containerd-shim-kata", "kata-runtime", "shim-kata", "kata-shim")


class Runtime(Frozen):
    """The runtime that started the hook.

    kind: "kata-go", "kata-rs", "kata-1" (1.x to 2.3, no annotations), "kata" (not known which) or "plain";
    shim: Kata's shim, None if it is not an ancestor; hypervisor: the one with the state's pid, None if that process is
    none; sandbox: id of the sandbox, the container's by default; handler: name of the runtime handler in Kubernetes, ""
    if unknown; is_cri: whether Kubernetes' container runtime interface started it; by_hand: whether a user did.
    """

    kind: str
    shim: Process | None
    hypervisor: Hypervisor | None
    sandbox: str
    handler: str
    is_cri: bool
    by_hand: bool

    @property
    def is_kata(self) -> bool:
        """Return whether it is a Kata runtime."""
        return self.kind != "plain"

    @property
    def flavour(self) -> str:
        """Return the language of the configuration's reader: "go", "rs", or "" if unknown."""
        return {"kata-go": "go", "kata-1": "go", "kata-rs": "rs"}.get(self.kind, "")


def detect_runtime(root: Root, state: State, spec: Spec, mode: str, by_hand: bool) -> Runtime:
    """Return the runtime. mode: "auto", "always" or "never" from host.toml; by_hand: started by a user."""
    hypervisor = vmm.find_hypervisor(root, state.pid)
    parent = None if by_hand else find_shim(root, root.do(os.getppid))
    annotations = merge_annotations(state, spec)
    handler = next((value for name in HANDLER_ANNOTATIONS if (value := annotations.get(name))), "")
    names = list(annotations)
    return Runtime(
        name_runtime_kind(state, parent, hypervisor, mode, by_hand, names, handler),
        parent,
        hypervisor,
        next((value for name in SANDBOX_ID_ANNOTATIONS if (value := annotations.get(name))), state.id),
        handler,
        any(name.startswith(CRI_PREFIXES) for name in names),
        by_hand,
    )


def name_runtime_kind(
    state: State,
    shim: Process | None,
    hypervisor: Hypervisor | None,
    mode: str,
    by_hand: bool,
    annotations: list[str],
    handler: str,
) -> str:
    """Return Runtime.kind."""
    if mode == "never":
        return "plain"
    marked = any(name.startswith(KATA_PREFIX) for name in annotations)
    if by_hand:
        return "kata" if mode == "always" or hypervisor or marked or handler.startswith("kata") else "plain"
        # No other runtime leaves the status empty: the OCI specification forbids it.
    if not state.status:
        return "kata-go" if state.annotations else "kata-1"
    if shim or hypervisor or marked:
        return "kata-rs"
    return "kata" if mode == "always" else "plain"


def find_shim(root: Root, parent: int) -> Process | None:
    """Return Kata's shim among a process and its ancestors, None if there is none.

    parent: the process that started the hook; another program may be in between, such as oci-add-hooks.
    """
    for pid in list_process_ancestors(root, parent)[:4]:
        process = read_process(root, pid)
        first = process.arguments[0].rpartition("/")[2] if process.arguments else ""
        if process.name.startswith(SHIM_NAMES) or first.startswith(SHIM_NAMES):
            return process
    return None


def belongs_to_sandbox(root: Root, runtime: Runtime, state: State, holder: Process) -> bool:
    """Return whether a process that holds a group belongs to the container's own sandbox.

    It is the state's process or a child of it, a child of the shim, or a hypervisor that was started for this sandbox:
    Kata's QEMU has the sandbox id in -name, Cloud Hypervisor in the path of its socket.
    """
    chain = list_process_ancestors(root, holder.pid)
    if state.pid > 0 and set(chain) & set(list_process_ancestors(root, state.pid)[:1]):
        return True
    if runtime.shim and runtime.shim.pid in chain:
        return True
    return bool(vmm.name_hypervisor_kind(holder.name)) and any(
        f"sandbox-{identity}" in argument.split(",") or f"/{identity}/" in argument
        for argument in holder.arguments[1:]
        for identity in {runtime.sandbox, state.id}
    )


def list_sandbox_processes(root: Root, runtime: Runtime, state: State) -> tuple[int, ...]:
    """Return the likely processes of the own sandbox: those of the state and of the shim, with children."""
    shim = runtime.shim.pid if runtime.shim else 0
    return tuple(dict.fromkeys((*list_family(root, state.pid), *list_family(root, shim))))
