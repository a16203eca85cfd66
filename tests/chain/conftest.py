# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the chain's tests: the host's NICs, and bundles for virtual machines. Skipped outside the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chain import host
from tests.vm import guest

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests outside the machine they need."""
    for item in items:
        if HERE in item.path.parents and not guest.is_inside():
            item.add_marker(pytest.mark.skip(reason="runs in the virtual machine: tests/run chain"))


@pytest.fixture(scope="session", autouse=True)
def prepared() -> None:
    """Make the machine a host."""
    if guest.is_inside():
        host.prepare()


@pytest.fixture(scope="session")
def nics() -> Iterator[host.Nics]:
    """Bind the host's NICs to vfio-pci, as an administrator does before he gives them away."""
    found = host.find_nics()
    for address in found.list_all():
        guest.bind(address, "vfio-pci")
    yield found
    for address in found.list_all():
        guest.bind_native(address)
