# SPDX-License-Identifier: Apache-2.0
"""Map user and group ids between the inside and the outside of a user namespace (user_namespaces(7))."""

from __future__ import annotations

from oci_hooks.oci import IdMapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.oci import Spec, State
    from oci_hooks.system import Root

# chown(2) interprets this id as "leave it as it is".
NO_ID = 0xFFFFFFFF


def resolve_id_mappings(root: Root, state: State, spec: Spec) -> Spec:
    """Return the spec with the id mappings of the user namespace that the container's init is in (user_namespaces(7)).

    config.json has no mappings, or made-up ones, if the container joins a namespace by path, as in a pod.
    """
    if "user" not in spec.namespaces:
        return spec
    uids, gids = (read_mappings(root, f"/proc/{state.pid}/{kind}_map") for kind in ("uid", "gid"))
    return spec.replace(uid_mappings=uids or spec.uid_mappings, gid_mappings=gids or spec.gid_mappings)


def read_mappings(root: Root, path: str) -> tuple[IdMapping, ...]:
    """Return the mappings in a process's uid_map or gid_map; none if it cannot be read."""
    rows = (line.split() for line in root.read_text_or(path, "").split("\n"))
    return tuple(IdMapping(*map(int, row)) for row in rows if len(row) == 3 and "".join(row).isdecimal())


def map_id(container_id: int, mappings: tuple[IdMapping, ...]) -> int:
    """Return the id outside the user namespace for one inside; -1 if it is unmapped. Without mappings: the same id."""
    if not mappings:
        return container_id if container_id < NO_ID else -1
    for mapping in mappings:
        if 0 <= container_id - mapping.container_id < mapping.size:
            outside = mapping.host_id + container_id - mapping.container_id
            return outside if outside < NO_ID else -1
    return -1
