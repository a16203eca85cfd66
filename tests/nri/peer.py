# SPDX-License-Identifier: Apache-2.0
"""Builds peer/ once, and talks to it: what containerd 1.7 asks its NRI plugins, without containerd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.provision import find_cache, locked, make_partial, make_stamp, run

SOURCE = Path(__file__).resolve().parent / "peer"
SECONDS = 60


def find_go() -> str:
    """Return Go's command; "" where there is none."""
    return shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin") or ""


def ensure_peer(go: str) -> Path:
    """Return the program, built from the versions in go.mod and go.sum; modules come from the Go module proxy."""
    place = find_cache() / f"nri-peer-{make_stamp(*(path.read_text() for path in sorted(SOURCE.iterdir())))}"
    if not place.exists():
        with locked(place):
            if not place.exists():
                partial = make_partial(place)
                settings = {"HOME": os.path.expanduser("~"), "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
                run([go, "build", "-buildvcs=false", "-o", str(partial / "peer"), "."], cwd=SOURCE, env=settings)
                partial.rename(place)
    return place / "peer"


class Peer:
    """The runtime's side, listening on a socket."""

    def __init__(self, program: Path, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [str(program), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.wait_for("listening")

    def wait_for(self, word: str) -> dict[str, Any]:
        """Return the next line that has this key, which must be true."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told: dict[str, Any] = json.loads(line)
            if told.get(word) is not None:
                return told
        raise AssertionError(f"the peer ended before it was {word}: {self.close()}")

    def create(self, pod: dict[str, Any], container: dict[str, Any]) -> dict[str, Any]:
        """Ask the plugins about a container; return error, adjust and seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"pod": pod, "container": container}) + "\n")
        self.process.stdin.flush()
        return self.wait_for("error")

    def close(self) -> str:
        """End it, and return what it logged."""
        return self.process.communicate(timeout=SECONDS)[1]
