# SPDX-License-Identifier: Apache-2.0
"""The bundle of a state in which crun says "/"; tests/vm/test_guest_bind.py has crun say so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oci_hooks.files import Root
from oci_hooks.oci import State, mend_bundle

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("bundle", "command", "expected"),
    [
        ("/", "crun create --bundle /run/b --pid-file /run/p name", "/run/b"),
        ("/", "crun --systemd-cgroup run --bundle=/run/b name", "/run/b"),
        ("/", "crun run -b /run/b name", "/run/b"),
        # What is relative is relative to a directory that crun has left.
        ("/", "crun run --bundle b name", "/"),
        ("/", "crun run name", "/"),
        ("/", "crun run --bundle", "/"),
        ("/run/true", "crun run --bundle /run/b name", "/run/true"),
    ],
)
def test_command_line_of_the_runtime_has_it(tmp_path: Path, bundle: str, command: str, expected: str) -> None:
    """Only where the state's is the one that crun gets wrong."""
    place = tmp_path / f"proc/{os.getppid()}"
    place.mkdir(parents=True)
    (place / "cmdline").write_text(command.replace(" ", "\0") + "\0")
    state = State("name", bundle, 1, "created", {})
    assert mend_bundle(Root(str(tmp_path)), state).bundle == expected
