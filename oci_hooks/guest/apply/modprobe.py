# SPDX-License-Identifier: Apache-2.0
"""Load the kernel's VFIO drivers unless they are loaded, or report the missing kernel options."""

from __future__ import annotations

import os

from oci_hooks.findings import StepError, make_one_line
from oci_hooks.linux import pci
from oci_hooks.system import read_pipe, tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Deadline, Root

# Without PATH: the runtime's may be anything, or missing.
MODPROBE = ("/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe", "/usr/bin/modprobe")
NO_MODPROBE = "modprobe is not installed"
OPTIONS = (
    "CONFIG_VFIO, CONFIG_VFIO_PCI, CONFIG_VFIO_IOMMU_TYPE1 (before Linux 6.2 CONFIG_VFIO_VIRQFD too) and the driver of "
    "the virtual IOMMU (CONFIG_INTEL_IOMMU or CONFIG_VIRTIO_IOMMU)"
)


def load_drivers(root: Root, deadline: Deadline) -> None:
    """Load vfio-pci and vfio_iommu_type1 unless they are loaded. Raises StepError [no-vfio-driver]."""
    missing = list_missing_modules(root)
    if not missing:
        return
    output = ""
    path = find_modprobe(root)
    if path:
        output = root.do(run_modprobe, root.host_path(path), missing, deadline)
    if "vfio-pci" in list_missing_modules(root):
        raise explain_missing("vfio-pci", output or NO_MODPROBE, OPTIONS)


def find_modprobe(root: Root) -> str:
    """Return the path of modprobe, "" if it is not installed."""
    return next((path for path in MODPROBE if root.exists(path)), "")


def explain_missing(module: str, reason: str, options: str) -> StepError:
    """Return the error for a module that is not there. reason: why it cannot be loaded; options: that are missing."""
    problem = f"is not part of this kernel and cannot be loaded: {reason}"
    return StepError("no-vfio-driver", module, problem, f"build the kernel with {options}")


def list_missing_modules(root: Root) -> list[str]:
    """Return which of the two modules are not loaded."""
    missing = [] if root.exists(f"{pci.PCI_DRIVERS}/vfio-pci") else ["vfio-pci"]
    # It has parameters, so that sysfs shows it even if it is built in.
    return missing + ([] if root.exists("/sys/module/vfio_iommu_type1") else ["vfio_iommu_type1"])


@tagged("modprobe")
def run_modprobe(path: str, modules: list[str], deadline: Deadline) -> str:
    """Run modprobe on modules, with an empty environment, and return its output, or why it does not run.

    Raises StepError at the deadline.
    """
    import signal

    # subprocess.run would wait, even after its timeout, for a modprobe that hangs in the kernel.
    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, writer, fd) for fd in (1, 2)]  # type: ignore[misc]
    try:
        pid = os.posix_spawn(path, [path, "-a", *modules], {}, file_actions=actions)
    except OSError as error:
        os.close(reader)
        return f"{path}: {error.strerror}"
    finally:
        os.close(writer)
    try:
        output = read_pipe(reader, deadline)
    finally:
        os.close(reader)
    if output is not None:
        os.waitpid(pid, 0)
        return make_one_line(output.decode("utf-8", "replace").strip())
    os.kill(pid, signal.SIGKILL)
    hint = "load vfio-pci when the guest boots"
    raise StepError("no-vfio-driver", "vfio-pci", "modprobe did not finish before the deadline", hint)
