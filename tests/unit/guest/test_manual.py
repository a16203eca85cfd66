# SPDX-License-Identifier: Apache-2.0
"""The manual pages name every code, key, annotation and option that the guest hook knows."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from oci_hooks import oci
from oci_hooks.schema import load_schema

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]
MANUAL = REPOSITORY / "docs" / "man"
# What the guest hook is made of; the host's modules have their own page.
GUEST_PARTS = ("*.py", "linux/*.py", "guest/**/*.py")
HOST_ONLY = ("schema.py", "vfio.py")


def find_codes() -> set[str]:
    """Return the codes that the guest's modules can give a finding."""
    made = re.compile(
        r'(?:Refusal|StepError|InputError|NotAvailableYet|Finding)\(\s*(?:"(?:error|warning|info)",\s*)?"([a-z-]+)"'
    )
    named = re.compile(r'"(bad-[a-z]+)"')
    paths = {path for part in GUEST_PARTS for path in (REPOSITORY / "oci_hooks").glob(part)}
    texts = [path.read_text() for path in sorted(paths) if path.name not in HOST_ONLY]
    codes = {code for text in texts for pattern in (made, named) for code in pattern.findall(text)}
    # A finding whose code is a variable.
    return codes - {"error", "warning", "info"}


def test_manual_guest_codes_have_entry_and_example() -> None:
    page = (MANUAL / "vfio-guest-bind.1.rst").read_text()
    entries = {
        name.strip() for line in page.splitlines() if re.fullmatch(r"[a-z][a-z, -]+", line) for name in line.split(",")
    }
    codes = find_codes()
    assert len(codes) > 30
    assert codes - entries == set()
    assert page.count("Example: ``[") >= 30


def test_manual_guest_toml_keys() -> None:
    page = (MANUAL / "oci-vfio-guest.toml.5.rst").read_text()
    properties = load_schema("guest-settings")["properties"]
    keys = [key for key in properties if "properties" not in properties[key]]
    keys += [key for table in ("auto", "node") for key in properties[table]["properties"]]
    missing = [key for key in keys if not re.search(rf"^(\w+, )?{key}( =|,|$)", page, re.MULTILINE)]
    assert missing == []


def test_manual_annotations_and_options() -> None:
    page = (MANUAL / "vfio-guest-bind.1.rst").read_text()
    for annotation in (oci.DEVICES_ANNOTATION, oci.MAP_ANNOTATION, oci.LOG_ANNOTATION, oci.RECORD_ANNOTATION):
        assert f"``{annotation}``\n" in page
    command = [str(REPOSITORY / "hooks" / "vfio-guest-bind"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"--[a-z-]+", text))
    assert {"--bundle", "--dry-run"} <= options
    assert [option for option in sorted(options) if f"**{option}**" not in page] == []


def test_manual_settings_examples_valid() -> None:
    from oci_hooks.plain_toml import load_toml
    from oci_hooks.schema import find_mistakes

    page = (MANUAL / "oci-vfio-guest.toml.5.rst").read_text()
    top, auto, node = re.split(r"^Table .*$", page, flags=re.MULTILINE)
    for table, text in (("", top), ("[auto]", auto), ("[node]", node)):
        examples = re.findall(r"Example: ``([^`]+)``", text)
        assert examples
        for example in examples:
            values = load_toml(f"{table}\n{example}\n")
            assert find_mistakes(values, "guest-settings", "example", "bad", "") == (), json.dumps(values)
