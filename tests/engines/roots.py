# SPDX-License-Identifier: Apache-2.0
"""Roots for the engines' tests: one of each Debian release with its engines, containerd 2.1 over one, and crictl.

Made on the plain machine, before anything boots; the machine finds the paths in its environment.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests import packages, provision
from tests.provision import locked, make_partial, run

RELEASES = ("debian-12", "debian-13")
# crictl, by the Go module proxy.
CRICTL = "sigs.k8s.io/cri-tools/cmd/crictl@v1.34.0"


def make_environment(files: Sequence[Path]) -> dict[str, str]:
    """Return the environment variables for tests in the machine if one of the files has ENGINES = True."""
    if not any("\nENGINES = True\n" in file.read_text() for file in files):
        return {}
    crictl = ensure_crictl()
    layers = {f"engines-{name}": (crictl, *packages.ensure_engines(name)) for name in RELEASES}
    layers["containerd-2"] = (crictl, packages.ensure_containerd("2.1")[0], *packages.ensure_engines("debian-13"))
    return {f"OCI_VFIO_{re.sub('-', '_', name).upper()}": ":".join(map(str, paths)) for name, paths in layers.items()}


def ensure_crictl() -> Path:
    """Return a layer with crictl, linked statically, so that it runs in every root."""
    place = provision.find_cache() / f"crictl-{provision.make_stamp(CRICTL)}"
    if not place.exists():
        with locked(place):
            if not place.exists():
                if shutil.which("go") is None:
                    raise provision.MissingError("crictl is built with Go 1.24 or later, which is not on PATH")
                partial = make_partial(place)
                target = partial / "usr/bin"
                target.mkdir(parents=True)
                settings = {"GOBIN": str(target), "CGO_ENABLED": "0", "HOME": os.path.expanduser("~")}
                run(["go", "install", "-ldflags=-s -w", CRICTL], env=settings)
                partial.rename(place)
    return place
