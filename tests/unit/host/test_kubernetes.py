# SPDX-License-Identifier: Apache-2.0
"""examples/kubernetes works as its README describes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from oci_hooks.host.hook import PROGRAM, add_options
from oci_hooks.program import parse_arguments

pytestmark = pytest.mark.unit

EXAMPLES = Path(__file__).resolve().parents[3] / "examples/kubernetes"


def run_labels(tmp_path: Path, script: str) -> tuple[int, Path]:
    """Run vfio-labels with a substitute for vfio-host-check; return its exit code and the directory it writes to."""
    program = tmp_path / "bin/vfio-host-check"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    features = tmp_path / "nfd/features.d"
    environment = {"PATH": f"{program.parent}:{os.defpath}"}
    done = subprocess.run([EXAMPLES / "vfio-labels", features], env=environment, capture_output=True, check=False)
    return done.returncode, features


@pytest.mark.parametrize("code", [0, 1])
def test_kubernetes_labels_written(tmp_path: Path, code: int) -> None:
    found, features = run_labels(tmp_path, f'echo "args=$*"; exit {code}')
    assert found == 0
    assert [path.name for path in features.iterdir()] == ["vfio"]
    assert (features / "vfio").read_text() == "args=--all --format nfd\n"
    assert (features / "vfio").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in features.parent.iterdir()] == ["features.d"]


def test_kubernetes_labels_kept_on_failure(tmp_path: Path) -> None:
    code, features = run_labels(tmp_path, "exit 2")
    assert code != 0
    assert not list(features.iterdir())
    assert [path.name for path in features.parent.iterdir()] == ["features.d"]


def test_kubernetes_npd_arguments_valid() -> None:
    plugin = json.loads((EXAMPLES / "node-problem-detector.json").read_text())
    (rule,) = plugin["rules"]
    arguments = parse_arguments(PROGRAM, rule["args"], add_options)
    assert (arguments.all, arguments.format) == (True, "npd")
    assert rule["condition"] in [condition["type"] for condition in plugin["conditions"]]
    from oci_hooks.host.survey import NPD_LENGTH

    assert plugin["pluginConfig"]["max_output_length"] == NPD_LENGTH
