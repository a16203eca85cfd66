# SPDX-License-Identifier: Apache-2.0
"""The guest add-on under Kata's genuine agent: its files at their places, and nothing of the repository.

The tests are those of the hook under the agent, by guest_hook_path and by the add-on's CDI specification.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kata.agent import Agent
from tests.kata.test_agent import (
    test_agent_binds_opens_restores,
    test_agent_cdi_brings_hook,
    test_agent_drops_hooks_where_spec_has_hooks,
    test_agent_kills_slow_hook,
)
from tests.vm import bundles, guest

MACHINE = "standard"
KERNELS = ("6.1",)
KATA = True
ADDON = True
__all__ = [
    "test_agent_binds_opens_restores",
    "test_agent_cdi_brings_hook",
    "test_agent_drops_hooks_where_spec_has_hooks",
    "test_agent_kills_slow_hook",
]
TOP = Path("/opt/oci-vfio-hooks")
HOOKS = Path("/usr/share/oci/hooks")
CDI = Path("/var/run/cdi/oci-vfio-hooks.json")


@pytest.fixture(scope="module", autouse=True)
def unpacked() -> Iterator[None]:
    """Have the add-on's files in this machine, as in an image."""
    if not guest.is_inside():
        yield
        return
    tree = Path(os.environ["OCI_VFIO_ADDON"]) / "tree"
    for place in (TOP, HOOKS):
        # What this machine has there, outside, is not touched: these directories are overlays.
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(f"{tree}{place}", place)
    yield
    for place in (TOP, HOOKS):
        shutil.rmtree(place)


@pytest.fixture
def agent(native_drivers: None) -> Iterator[Agent]:
    """Return a running agent whose guest image has the add-on."""
    bundles.write_settings()
    made = Agent(HOOKS)
    yield made
    made.close()


@pytest.fixture
def cdi() -> Iterator[str]:
    """Have the CDI specification where the agent reads it, and return the name of its device."""
    subprocess.run([TOP / "bin/declare-cdi"], env={}, check=True)
    assert [path.name for path in CDI.parent.iterdir()] == [CDI.name]
    yield "oci-vfio-hooks/bind=all"
    CDI.unlink()
