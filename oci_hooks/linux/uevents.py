# SPDX-License-Identifier: Apache-2.0
"""Wait for a PCI device or a VFIO group to appear, by the kernel's uevents.

The only module that uses pyudev, loaded only if there is something to wait for. The events are the kernel's own (source
"kernel"): a Kata guest whose init is the agent has no udevd, and a container never gets udevd's.
"""

from __future__ import annotations

import time

from oci_hooks.findings import StepError
from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SUBSYSTEMS = ("pci", "vfio")


@tagged("listen")
class Listener:
    """A listener that receives events from its creation on: create it first, then look, then wait. Raises StepError."""

    def __init__(self) -> None:
        from oci_hooks.schema import load_site_packages

        load_site_packages()
        try:
            import pyudev

            self.monitor: Any = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
            for subsystem in SUBSYSTEMS:
                self.monitor.filter_by(subsystem)
            self.monitor.start()
        except (ImportError, OSError) as error:
            # Missing libudev shows when a context is created; opening the socket may be denied.
            hint = "apt install python3-pyudev, or attach the device before the container starts"
            problem = f"is needed to wait for a device, and cannot be used: {error}"
            raise StepError("no-pyudev", "pyudev", problem, hint) from None

    def wait(self, seconds: float) -> str:
        """Return the next event of a PCI device or VFIO group ("add /devices/..."), "" after the seconds are over."""
        end = time.monotonic() + seconds
        while True:
            remaining = max(end - time.monotonic(), 0.0)
            try:
                event = self.monitor.poll(timeout=remaining)
            except OSError as error:
                # ENOBUFS: the socket could not hold all events, so look again.
                return f"lost {error.strerror}"
            if event is not None:
                return f"{event.action} {event.device_path}"
            # libudev filters the kernel's events when it reads them, so poll() also returns for other events.
            if not remaining:
                return ""
