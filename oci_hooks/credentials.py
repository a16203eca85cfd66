# SPDX-License-Identifier: Apache-2.0
"""Read from config.json who a container's first process is once its program runs: ids and capabilities.

When hooks run, the container's init still has the runtime's privileges: what it will have is computed from
process.user, process.capabilities and process.noNewPrivileges (runtime-spec, config.md) by the rules of execve(2) in
capabilities(7). tests/vm/test_noiommu.py compares the result with /proc/self/status in containers of runc and crun.
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.oci import Spec

RAW_IO = "CAP_SYS_RAWIO"
OVERRIDE = "CAP_DAC_OVERRIDE"


class Credentials(Frozen):
    """Ids and capabilities of a container's first process, behind execve(2).

    uid, gid, groups: inside the container's user namespace; capabilities: effective ones, in order; gains: whether a
    program file of another user, or with capabilities of its own, can give it more; gainable: the capabilities that it
    has or can get from such a file; user_namespace: the container has one, whose capabilities the kernel does not count
    where it asks for one of the whole machine's (capable(), include/linux/capability.h).
    """

    tag = "credentials"

    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: tuple[str, ...]
    gains: bool
    gainable: tuple[str, ...]
    user_namespace: bool

    @property
    def opens_all(self) -> bool:
        """Return whether neither owner nor mode of a file keeps it from being opened (capabilities(7))."""
        return OVERRIDE in self.capabilities and not self.user_namespace


def read_credentials(spec: Spec) -> Credentials | None:
    """Return the credentials that config.json gives to the container's first process, None where it describes none.

    Without process.capabilities a process has none, as with runc and crun. Values of a wrong type count as absent: the
    runtime decides about them.
    """
    process = read_object(spec.raw, "process")
    if not process:
        return None
    sets = read_object(process, "capabilities")
    bounding, inheritable, permitted, ambient = (
        read_names(sets, name) for name in ("bounding", "inheritable", "permitted", "ambient")
    )
    sealed = process.get("noNewPrivileges") is True
    if spec.uid:
        # The kernel lets a capability be ambient only if it is permitted and inheritable as well.
        effective = ambient & permitted & inheritable
    else:
        # Root gets all of these, whatever `effective` has; without new privileges only what it had already.
        effective = (bounding | inheritable) & permitted if sealed else bounding | inheritable
    gains = bool(spec.uid) and not sealed
    gainable = effective | (bounding if gains else frozenset())
    groups = read_object(process, "user").get("additionalGids")
    return Credentials(
        spec.uid,
        spec.gid,
        tuple(group for group in groups if type(group) is int) if isinstance(groups, list) else (),
        tuple(sorted(effective)),
        gains,
        tuple(sorted(gainable)),
        "user" in spec.namespaces,
    )


def read_object(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a member that is an object, an empty one without such a member."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def read_names(sets: dict[str, Any], name: str) -> frozenset[str]:
    """Return the capabilities in one set of process.capabilities, in capital letters."""
    names = sets.get(name)
    return frozenset(text.upper() for text in names if isinstance(text, str)) if type(names) is list else frozenset()
