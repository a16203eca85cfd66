# SPDX-License-Identifier: Apache-2.0
"""Give each test the marker of its directory."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
MARKERS = {name: name for name in ("unit", "runtime", "packaging", "newcomer", "vm", "chain")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its directory, so that `-m vm` and the counts by kind need no lines in the tests."""
    for item in items:
        if HERE in item.path.parents:
            marker = MARKERS.get(item.path.relative_to(HERE).parts[0])
            if marker is not None:
                item.add_marker(marker)
