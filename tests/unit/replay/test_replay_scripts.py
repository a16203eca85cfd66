# SPDX-License-Identifier: Apache-2.0
"""Each script of examples/replay works as described."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPTS = REPOSITORY / "examples/replay"
RECORD = REPOSITORY / "tests/data/records/guest-bridge.tar.gz"
REPLAY = f"{sys.executable} -m oci_hooks.replay.cli"


def run(*words: str | Path, text: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "VFIO_HOOK_REPLAY": REPLAY}
    return subprocess.run(words, input=text, capture_output=True, text=True, check=False, env=env, cwd=cwd)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a bundle of a container that asks for what no machine has."""
    path = tmp_path / "bundle"
    path.mkdir()
    config = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "annotations": {"io.katacontainers.x.vfio.devices": "nonsense"},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_script(path: Path, *changes: tuple[str, str]) -> Path:
    """Return a copy of catch-state that keeps things below a directory of the test."""
    text = (SCRIPTS / "catch-state").read_text().replace("/run/vfio-caught", str(path / "caught"))
    for old, new in changes:
        text = text.replace(old, new)
    (path / "catch-state").write_text(text)
    (path / "catch-state").chmod(0o755)
    return path / "catch-state"


def test_catch_state_replayed(bundle: Path, tmp_path: Path) -> None:
    state = json.dumps({"ociVersion": "1.0.2", "id": "c", "bundle": str(bundle), "pid": 1, "status": "creating"})
    hook = REPOSITORY / "hooks/vfio-guest-bind"
    first = run(make_script(tmp_path), hook, "--dry-run", text=state)
    assert first.returncode == 2
    assert "[bad-annotation]" in first.stderr
    (caught,) = (tmp_path / "caught").iterdir()
    assert caught.stat().st_mode & 0o777 == 0o700
    assert (caught / "state.json").read_text() == state
    assert (caught / "config.json").read_text() == (bundle / "config.json").read_text()
    assert (caught / "exit").read_text() == "2\n"
    assert "PYTHONPATH" in (caught / "environment").read_text().split()
    assert str(REPOSITORY) not in (caught / "environment").read_text()
    (bundle / "config.json").unlink()
    again = run(SCRIPTS / "replay-state", caught, hook, "--dry-run")
    assert again.returncode == 2
    assert "[bad-annotation]" in again.stderr


def test_catch_state_passes_exit_code(bundle: Path, tmp_path: Path) -> None:
    state = json.dumps({"id": "c", "bundle": str(bundle)})
    script = make_script(tmp_path)
    assert run(script, "/bin/true", text=state).returncode == 0
    assert run(script, text=state).returncode == 0


def test_replay_state_from_recording(tmp_path: Path) -> None:
    with tarfile.open(RECORD) as tar:
        for name in ("state.json", "config.json"):
            (tmp_path / name).write_bytes(tar.extractfile(name).read())  # type: ignore[union-attr]
    done = run(SCRIPTS / "replay-state", tmp_path, "cat")
    assert json.loads(done.stdout)["bundle"] == str(tmp_path)


def test_replay_state_usage() -> None:
    done = run(SCRIPTS / "replay-state")
    assert done.returncode == 2
    assert "replay-state DIRECTORY HOOK" in done.stderr


@pytest.mark.parametrize("stamp", ["", "[   12.345678] ", "Jan 02 03:04:05 host kata[7]: "])
def test_record_text_round_trip(stamp: str, tmp_path: Path) -> None:
    output = run(SCRIPTS / "record-to-text", RECORD)
    assert output.returncode == 0, output.stderr
    log = "".join(f"{stamp}{line}\r\n" for line in ["boot", *output.stdout.splitlines(), "more"])
    back = subprocess.run([SCRIPTS / "record-from-text"], input=log.encode(), capture_output=True, check=False)
    assert back.returncode == 0, back.stderr
    assert back.stdout == RECORD.read_bytes()


def test_record_from_text_truncated_refused() -> None:
    lines = run(SCRIPTS / "record-to-text", RECORD).stdout.splitlines()
    for text, words in (("\n".join(lines[:3] + lines[4:]), "part"), ("nothing", "no record")):
        done = run(SCRIPTS / "record-from-text", text=text)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stdout == ""


def test_report_script(tmp_path: Path) -> None:
    done = run(SCRIPTS / "report", RECORD, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[bridge]" in done.stdout
    assert "the same as recorded" in done.stdout
    assert (tmp_path / RECORD.name).read_bytes() == RECORD.read_bytes()
    assert re.search(r"^  config\.json$", done.stderr, re.MULTILINE)


def test_replay_scripts_documented() -> None:
    text = (SCRIPTS / "README.md").read_text()
    for path in SCRIPTS.iterdir():
        assert f"({path.name})" in text or path.name == "README.md"
        assert os.access(path, os.X_OK) or path.name == "README.md"
