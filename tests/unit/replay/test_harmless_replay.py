# SPDX-License-Identifier: Apache-2.0
"""A replay of a stranger's recording opens, writes and runs nothing on this machine."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.record.bounds import RecordError
from oci_hooks.record.reader import read_record, unpack
from oci_hooks.replay import cli as replay_cli
from oci_hooks.replay.rerun import LiveRoot, sealed
from oci_hooks.system import read_file

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]
REAL = REPOSITORY / "tests/data/records/guest-success-runc.tar.gz"
BRIDGE = REPOSITORY / "tests/data/records/guest-bridge.tar.gz"
HOST = REPOSITORY / "tests/data/records/host-group-busy.tar.gz"
Edit = Callable[[dict[str, Any], list[dict[str, Any]]], None]


def test_replay_opens_nothing_but_code(tmp_path: Path) -> None:
    """Also to read: a name in a stranger's recording may be a pipe's, or a device's."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "file.json").write_text("{}")
    for path in (tmp_path / "file", tmp_path / "file.json", Path("/etc/passwd"), REPOSITORY / "README.md"):
        with sealed(), pytest.raises(PermissionError, match="a replay changes nothing"):
            path.read_bytes()
    with sealed():
        (REPOSITORY / "oci_hooks/schemas/state.json").read_bytes()
        os.close(os.open("/dev/null", os.O_RDWR))


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_run_live_reads_only_regular_files(kind: str, tmp_path: Path) -> None:
    """Of settings and of Kata's configuration a recording gives the names."""
    path = {"pipe": tmp_path / "pipe", "device": Path("/dev/zero"), "directory": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match="is not a regular file"):
        LiveRoot(b"").ask(read_file, str(path), 100)
    (tmp_path / "file").write_text("x")
    assert LiveRoot(b"").read_text(str(tmp_path / "file")) == "x"


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_read_record_regular_file_only(kind: str, tmp_path: Path) -> None:
    path = {"pipe": tmp_path / "x.tar.gz", "device": Path("/dev/zero"), "directory": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises((RecordError, IsADirectoryError), match=r"is not a regular file|Is a directory"):
        read_record(path)
    assert replay_cli.main(["--directory", str(tmp_path), "list"]) == 0


def test_find_record_skips_unreadable(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A container's id finds its recording, among any other files."""
    (tmp_path / "1.tar.gz").write_bytes(REAL.read_bytes())
    (tmp_path / "2.tar.gz").write_bytes(b"nothing")
    container = read_record(REAL).about["container"]
    assert replay_cli.main(["--directory", str(tmp_path), "explain", container]) == 0
    assert "1.tar.gz" in capfd.readouterr().out


def test_read_record_truncated_stream_refused() -> None:
    with pytest.raises(RecordError, match="ends too early"):
        unpack(gzip.compress(b"x" * 1000)[:-9])
