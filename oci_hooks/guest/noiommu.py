# SPDX-License-Identifier: Apache-2.0
"""Check what vfio's no-IOMMU mode asks of a container, before anything is bound.

The kernel opens such a group only for CAP_SYS_RAWIO (drivers/vfio/group.c, vfio_group_fops_open), gives its device no
node of its own (drivers/vfio/vfio.h, vfio_device_add), and is tainted by binding it (vfio_group_find_or_alloc).
"""

from __future__ import annotations

from oci_hooks.credentials import RAW_IO, read_credentials
from oci_hooks.findings import Finding, Refusal
from oci_hooks.linux.pci import NOIOMMU_GROUP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oci_hooks.oci import Spec


def check_noiommu(groups: Iterable[str], spec: Spec, wants_cdev: bool) -> list[Finding]:
    """Return the warnings on groups without an IOMMU; none where a container has no such group.

    groups: names of the container's groups; wants_cdev: whether devices' own nodes are requested. Raises Refusal.
    """
    addresses = [name[len(NOIOMMU_GROUP) :] for name in groups if name.startswith(NOIOMMU_GROUP)]
    if not addresses:
        return []
    subject = ", ".join(addresses)
    if wants_cdev:
        problem = "has no device node of iommufd, because it has no IOMMU"
        hint = "remove cdev from the annotation, or give the virtual machine a virtual IOMMU"
        raise Refusal("no-cdev", subject, problem, hint)
    problem = "is used without an IOMMU: it can write to all of the guest's memory, and binding it taints the kernel"
    hint = "give the virtual machine a virtual IOMMU, and remove allow_noiommu from guest.toml"
    return [*check_capability(subject, spec), Finding("warning", "noiommu-group", subject, problem, hint)]


def check_capability(subject: str, spec: Spec) -> list[Finding]:
    """Return a warning where the container's process has CAP_SYS_RAWIO by its program file at most.

    Raises Refusal [capability-missing] where it cannot have it.
    """
    credentials = read_credentials(spec)
    if credentials is None or (RAW_IO in credentials.capabilities and not credentials.user_namespace):
        return []
    asks = f"has no IOMMU, so the kernel opens it only for a process with {RAW_IO}"
    if credentials.user_namespace:
        problem = f"{asks} of the whole guest, which no process in a user namespace has"
        raise Refusal("capability-missing", subject, problem, "run the container without a user namespace")
    sets = "bounding, effective and permitted" if not credentials.uid else "bounding, permitted, inheritable, ambient"
    hint = f"add {RAW_IO} to {sets} of process.capabilities in config.json"
    if RAW_IO in credentials.gainable:
        problem = f"{asks}, and user {credentials.uid} of the container has it only by a program file that has it"
        hint = f"check with getcap that its program has {RAW_IO.lower()}, or {hint}"
        return [Finding("warning", "capability-missing", subject, problem, hint)]
    problem = f"{asks}, which user {credentials.uid} of the container does not have"
    if credentials.uid == 0:
        hint += "; podman, docker: --cap-add SYS_RAWIO; Kubernetes: capabilities.add of the securityContext"
    else:
        hint += "; podman, docker, Kubernetes: run it as root with SYS_RAWIO added"
    raise Refusal("capability-missing", subject, problem, hint)
