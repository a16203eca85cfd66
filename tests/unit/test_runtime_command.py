# SPDX-License-Identifier: Apache-2.0
"""The bundle of a state in which crun reports "/"; tests/vm/test_guest_bind.py has that crun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oci_hooks.oci import State, find_config, resolve_bundle
from oci_hooks.system import Root

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
def test_resolve_bundle_from_runtime_command(tmp_path: Path, bundle: str, command: str, expected: str) -> None:
    """Only where the state's is the one that crun gets wrong."""
    location = tmp_path / f"proc/{os.getppid()}"
    location.mkdir(parents=True)
    (location / "cmdline").write_text(command.replace(" ", "\0") + "\0")
    state = State("name", bundle, 1, "created", {})
    assert resolve_bundle(Root(str(tmp_path)), state).bundle == expected


@pytest.mark.parametrize("command", ["runc run name", "runc run --bundle b name", "runc run -b /run/\udcff name"])
def test_resolve_bundle_runc_lost_byte(tmp_path: Path, command: str) -> None:
    """Go's encoder writes U+FFFD for a byte of a path that is not UTF-8. runc works in the bundle."""
    location = tmp_path / f"proc/{os.getppid()}"
    location.mkdir(parents=True)
    (location / "cmdline").write_bytes(os.fsencode(command.replace(" ", "\0")))
    (location / "cwd").symlink_to("/run/\udcff")
    state = State("name", "/run/\ufffd", 1, "created", {})
    assert resolve_bundle(Root(str(tmp_path)), state).bundle == "/run/\udcff"
    # A directory that has this character in its name is the right one.
    bundle = tmp_path / "run/\ufffd"
    bundle.mkdir(parents=True)
    (bundle / "config.json").touch()
    assert resolve_bundle(Root(str(tmp_path)), state).bundle == "/run/\ufffd"


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("crun run --config /run/other.json --bundle /b name", True),
        ("/usr/bin/crun create -f /run/other.json name", True),
        ("crun run --config other.json name", False),
        # Kata 1.x means its own configuration by that.
        ("kata-runtime --config /run/other.json create name", False),
        ("runc run name", False),
        ("", False),
    ],
)
def test_find_config_option_of_crun(tmp_path: Path, command: str, found: bool) -> None:
    location = tmp_path / f"proc/{os.getppid()}"
    location.mkdir(parents=True)
    (location / "cmdline").write_text(command.replace(" ", "\0"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/other.json").write_text("{}")
    state = State("name", "/b", 1, "created", {})
    assert find_config(Root(str(tmp_path)), state) == ("/run/other.json" if found else "/b/config.json")
    # The bundle's own goes first.
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text("{}")
    assert find_config(Root(str(tmp_path)), state) == "/b/config.json"
