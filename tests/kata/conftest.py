# SPDX-License-Identifier: Apache-2.0
"""An agent for each test, and drivers put back after it. Outside the machine the tests are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kata.agent import HOOKS, Agent
from tests.vm import bundles, guest
from tests.vm.conftest import native_drivers

HERE = Path(__file__).resolve().parent
SPECIFICATION = bundles.REPOSITORY / "packaging/guest_addon/root/opt/oci-vfio-hooks/cdi/oci-vfio-hooks.json"
__all__ = ["native_drivers"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests outside the machine they need."""
    for item in items:
        if HERE in item.path.parents and not guest.is_inside():
            item.add_marker(pytest.mark.skip(reason="runs in the virtual machine: tests/run kata"))


@pytest.fixture
def agent(native_drivers: None) -> Iterator[Agent]:
    """Return a running agent whose guest image has our hook."""
    bundles.write_settings()
    made = Agent()
    yield made
    made.close()


@pytest.fixture
def cdi() -> Iterator[str]:
    """Have the guest add-on's CDI specification, for the repository's hook, and return the name of its device."""
    specification = json.loads(SPECIFICATION.read_text())
    for hook in specification["devices"][0]["containerEdits"]["hooks"]:
        hook["path"] = str(HOOKS / "prestart" / bundles.GUEST_HOOK)
    place = Path("/var/run/cdi/oci-vfio-hooks.json")
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(specification))
    yield f"{specification['kind']}={specification['devices'][0]['name']}"
    place.unlink()
