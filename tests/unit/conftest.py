# SPDX-License-Identifier: Apache-2.0
"""Settings of the unit tests: property tests have no time limit per example, as a busy machine is no defect.

They try the same examples in each run: a new one that fails belongs to whoever looks for it (OCI_VFIO_FULL=1), not to
the next change that is sent.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from oci_hooks.guest.apply import proof, sysfs_writer

settings.register_profile("unit", deadline=None, derandomize="OCI_VFIO_FULL" not in os.environ)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def garbage_is_collected() -> Iterator[None]:
    """Switch the collector on again after a hook that ran in this process: a test run is not over as soon."""
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def time_to_die(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a killed child more time to end: where others are at work too, a tenth of a second may not be enough."""
    for module in (proof, sysfs_writer):
        monkeypatch.setattr(module, "KILL_SECONDS", 5.0)


@pytest.fixture(name="stdin")
def make_stdin() -> Iterator[int]:
    """Return the writing end of what is stdin for this test."""
    saved = os.dup(0)
    reader, writer = os.pipe()
    os.dup2(reader, 0)
    os.close(reader)
    yield writer
    os.dup2(saved, 0)
    os.close(saved)
