# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the engines' tests: the root of the release whose kernel the machine has. Skipped outside it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
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


@pytest.fixture(autouse=True)
def record_way(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Note which way in which version of which engine a test shows; the version is what the engine prints."""
    mark = request.node.get_closest_marker("way")
    if mark is not None:
        name, way = mark.args
        root = "containerd" if "containerd" in request.fixturenames else "engine"
        printed = request.getfixturevalue(root).run(name, "--version").stdout
        version = re.search(r"[0-9]+(?:\.[0-9]+)+", printed)
        assert version, printed
        record_property("way", f"{name} {version[0]} | {way}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of docs/howto/engines.md, as far as this run shows it."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, ())]
    ways = {value: each.outcome for each in reports for key, value in each.user_properties if key == "way"}
    for way, outcome in sorted(ways.items()):
        terminalreporter.write_line(f"| {way} | {outcome} |")


@pytest.fixture(name="group")
def bind_group() -> Iterator[str]:
    """Return the NIC's group, which vfio-pci has until the test is over."""
    nic, group = guest.find_device(devices.NIC_E1000E), find_group()
    guest.bind(nic, "vfio-pci")
    yield group
    guest.bind_native(nic)
