# SPDX-License-Identifier: Apache-2.0
"""An arm64 machine without an SMMU: both hooks say so, and how to have one there."""

from __future__ import annotations

import subprocess

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "arm64-no-iommu"
KERNELS = ("arm64",)


@one_runtime
def test_guest_without_smmu_refused(containers: Containers) -> None:
    nic = guest.find_device(devices.NIC_E1000E)
    for wish in (nic, "auto"):
        done = containers.probe(annotations=ask(wish))
        print(done.stderr)
        assert done.code != 0
        assert "[viommu-off]" in done.stderr
    assert guest.driver_of(nic) == "e1000e"
    assert guest_calls.list_claims() == []


def test_host_without_smmu_refused() -> None:
    command = [bundles.find_hook(bundles.HOST_HOOK), "--all"]
    done = subprocess.run(command, capture_output=True, text=True, env={}, check=False)
    print(done)
    assert done.returncode == 1
    assert "[iommu-off]" in done.stdout + done.stderr
    assert "intel_iommu" not in done.stdout + done.stderr
