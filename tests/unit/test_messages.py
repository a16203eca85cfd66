# SPDX-License-Identifier: Apache-2.0
"""docs/reference/messages.md has the messages of the source as it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]


def test_messages_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("messages", REPOSITORY / "docs/messages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.make_page()
    assert page.count("\n* `[") > 100
    assert (REPOSITORY / "docs/reference/messages.md").read_text() == page, "run: python3 docs/messages.py"
