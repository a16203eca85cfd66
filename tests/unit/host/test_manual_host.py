# SPDX-License-Identifier: Apache-2.0
"""The manual pages of the host hook and of the replay tool: every code, key and option; --help fits a screen."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from oci_hooks.schema import load_schema

REPOSITORY = Path(__file__).resolve().parents[3]
MANUAL = REPOSITORY / "docs/man"


def read_help(*command: str) -> str:
    """Return the output of one of the executables with --help on a terminal of 80 columns."""
    path = REPOSITORY / "hooks" / command[0]
    done = subprocess.run(
        [path, *command[1:], "--help"], env={"COLUMNS": "80"}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_manual_host_codes() -> None:
    # tests/unit/host/test_host_hook.py holds this list to the code.
    listed = set(re.findall(r"^\| (`.*?`) \|", (REPOSITORY / "docs/reference/codes-host.md").read_text(), re.MULTILINE))
    codes = {code for cell in listed for code in re.findall(r"[a-z][a-z-]+", cell)}
    assert len(codes) > 25
    page = (MANUAL / "vfio-host-check.1.rst").read_text().partition("\nDIAGNOSTICS\n")[2]
    entries = {name.strip() for line in re.findall(r"^[a-z][a-z, -]+$", page, re.MULTILINE) for name in line.split(",")}
    assert codes - entries == set()


def test_manual_host_toml_keys() -> None:
    page = (MANUAL / "oci-vfio-host.toml.5.rst").read_text()
    properties = load_schema("host-settings")["properties"]
    keys = [key for key in properties if properties[key].get("type") != "object"]
    keys += list(properties["kata"]["properties"])
    assert [key for key in keys if not re.search(rf"^{key}( = .*)?$", page, re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("vfio-host-check", [""]),
        ("vfio-hook-replay", ["", "list", "explain", "show", "run", "diff", "export"]),
        ("vfio-kata-image", ["", "show", "add", "remove"]),
    ],
)
def test_manual_host_options(name: str, commands: list[str]) -> None:
    page = (MANUAL / f"{name}.1.rst").read_text()
    for command in commands:
        options = re.findall(r"--[a-z-]+", read_help(name, *filter(None, [command])))
        assert "--help" in options
        assert [option for option in options if f"**{option}**" not in page] == []
        assert f"\n{command}\n" in page


def test_every_option_of_cdi_has_an_entry() -> None:
    page = (MANUAL / "vfio-host-check.1.rst").read_text()
    options = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", read_help("vfio-host-check", "--cdi"), re.MULTILINE))
    assert len(options) > 10
    assert [option for option in options if f"**{option}**" not in page] == []
    lines = read_help("vfio-host-check", "--cdi").splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["vfio-host-check", "vfio-guest-bind", "vfio-hook-replay", "vfio-kata-image"])
def test_host_help_fits_screen(name: str) -> None:
    lines = read_help(name).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
