# SPDX-License-Identifier: Apache-2.0
"""What holds for the unit tests: property tests have no time limit an example, a busy machine is no defect."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("unit", deadline=None)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def garbage_is_collected() -> Iterator[None]:
    """Switch the collector on again after a hook that ran in this process: a test run is not over as soon."""
    yield
    gc.enable()
