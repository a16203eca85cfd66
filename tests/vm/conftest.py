# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests in the machine. Outside the machine they are skipped, and tests/run fails if any was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import guest
from tests.vm.bundles import Containers, write_settings

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that want another machine than the one they are in."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        wanted = getattr(getattr(item, "module", None), "MACHINE", None)
        if wanted is None:
            raise pytest.UsageError(f'{item.path}: says no machine; write MACHINE = "standard" at its top')
        if not guest.is_inside():
            item.add_marker(pytest.mark.skip(reason="runs in the virtual machine: tests/run --vm"))
        elif wanted != os.environ["OCI_VFIO_RIG_MACHINE"]:
            item.add_marker(pytest.mark.skip(reason=f"runs in the machine {wanted}: tests/run --vm"))


@pytest.fixture(autouse=True)
def patient_settings() -> None:
    """Start each test with settings that only raise the hooks' deadline; write_settings in a test replaces them."""
    if guest.is_inside():
        write_settings()


@pytest.fixture
def native_drivers() -> Iterator[None]:
    """Give every device that a test took back to its native driver afterwards."""
    before = {path.name: guest.driver_of(path.name) for path in guest.PCI.iterdir()}
    yield
    for address, driver in before.items():
        if not (guest.PCI / address).exists():
            continue
        if guest.override_of(address) or guest.driver_of(address) != driver:
            guest.bind_native(address)


@pytest.fixture(params=["runc", "crun"])
def containers(request: pytest.FixtureRequest, native_drivers: None) -> Iterator[Containers]:
    """Make and run containers, under each of the two runtimes; afterwards nothing of them is left."""
    made = Containers(str(request.param))
    yield made
    made.destroy_all()
