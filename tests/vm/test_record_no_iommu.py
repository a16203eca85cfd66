# SPDX-License-Identifier: Apache-2.0
"""Records of a machine without a virtual IOMMU, by the guest's hook and by the host's."""

from __future__ import annotations

import json

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.support.kept_recordings import check_host, check_record
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers

MACHINE = "no-iommu"


@one_runtime
def test_record_guest_without_iommu(containers: Containers) -> None:
    _, state = guest_calls.make_created(containers, annotations=ask(guest.find_device(devices.NIC_E1000E)))
    check_record(guest_calls.fork_hook(state), "viommu-off")


@one_runtime
def test_record_host_without_iommu(containers: Containers) -> None:
    _, state = guest_calls.make_created(containers, devices=bundles.vfio_devices("12"))
    check_record(check_host(json.dumps(state)), "iommu-off")
