# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the engines' tests: the root of the release whose kernel the machine has. Skipped outside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.engine import Engine, find_group, make_engine, read_layers
from tests.vm import bundles, devices, guest

HERE = Path(__file__).resolve().parent
RELEASES = {"6.1": "debian-12", "6.12": "debian-13"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests outside the machine they need."""
    for item in items:
        if HERE in item.path.parents and not guest.is_inside():
            item.add_marker(pytest.mark.skip(reason="runs in the virtual machine: tests/run engines"))


@pytest.fixture(scope="session")
def release() -> str:
    """Return the name of the root: Debian 12 under its own kernel, Debian 13 under its own."""
    return RELEASES[os.environ["OCI_VFIO_RIG_KERNEL"]]


@pytest.fixture(scope="session")
def engine(release: str) -> Iterator[Engine]:
    """Return the release's root with podman, Docker and containerd."""
    bundles.write_settings()
    made = make_engine(Path("/run/engine"), read_layers(f"engines-{release}"))
    yield made
    made.close()


@pytest.fixture
def containerd(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Return a root with a containerd that runs: the release's own, or 2.1 over Debian 13."""
    if request.param == "own":
        yield engine
        return
    made = make_engine(Path("/run/engine-2"), read_layers("containerd-2"))
    yield made
    made.close()


@pytest.fixture(name="group")
def bind_group() -> Iterator[str]:
    """Return the NIC's group, which vfio-pci has until the test is over."""
    nic, group = guest.find_device(devices.NIC_E1000E), find_group()
    guest.bind(nic, "vfio-pci")
    yield group
    guest.bind_native(nic)
