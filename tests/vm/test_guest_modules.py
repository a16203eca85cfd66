# SPDX-License-Identifier: Apache-2.0
"""The VFIO drivers as modules: not loaded yet, and not to be had."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import devices, guest
from tests.vm.bundles import Containers

MACHINE = "standard"
KERNELS = ("6.1",)
VFIO_PCI = Path("/sys/bus/pci/drivers/vfio-pci")
HIDDEN = Path("/etc/modprobe.d/hidden.conf")


@one_runtime
def test_guest_modules_loaded_or_reported(containers: Containers) -> None:
    """Nothing but their absence is different; when they can't be had, the words name what the kernel lacks."""
    nic = guest.find_device(devices.NIC_E1000E)
    before = guest_calls.look_at_drivers()
    container, state = guest_calls.make_created(containers, annotations=ask(nic))
    subprocess.run(["modprobe", "-r", "vfio-pci", "vfio_iommu_type1"], check=True)
    answer = json.loads(guest_calls.call_hook(None, "--all", "--json").stdout)
    assert answer["guest"]["drivers"] == {"vfio-pci": "loadable", "vfio_iommu_type1": "loadable"}
    # The survey loads nothing.
    assert not VFIO_PCI.exists()
    HIDDEN.write_text("install vfio-pci /bin/false\n")
    try:
        done = guest_calls.call_hook(state, env={})
    finally:
        HIDDEN.unlink()
    assert done.code == 1
    assert "[no-vfio-driver] vfio-pci: is not part of this kernel and cannot be loaded" in done.stderr
    for option in ("CONFIG_VFIO,", "CONFIG_VFIO_PCI", "CONFIG_VFIO_IOMMU_TYPE1", "CONFIG_INTEL_IOMMU"):
        assert option in done.stderr
    assert guest_calls.look_at_drivers() == before
    assert guest_calls.list_claims() == []

    assert not VFIO_PCI.exists()
    done = guest_calls.call_hook(state, env={})
    assert (done.code, done.stderr) == (0, "")
    assert guest_calls.list_dev(container) == sorted(["devices.json", guest.group_of(nic), "vfio"])
