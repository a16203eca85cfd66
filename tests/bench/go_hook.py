# SPDX-License-Identifier: Apache-2.0
"""The hook's predecessor as a peer, if somebody has built it: it binds devices, and that is all it does.

It is `vfio-hook` of github.com/dgibson/kata-vfio-tools at 3e34c63 (Go, Apache-2.0); nothing of it is in this
repository. `CGO_ENABLED=0 go build .` makes one executable, which --go-hook or OCI_VFIO_GO_HOOK names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

# On the machine that starts the benchmark, what a user sets; in the virtual machine, where its copy is.
VARIABLE = "OCI_VFIO_GO_HOOK"
# In the machine's memory, as all that is measured.
PLACE = Path("/usr/local/lib/oci-vfio-hooks-go")
# Where it looks for the config.json of a container, by its id.
CONTAINERS = Path("/run/libcontainer")
ANNOTATION = "io.katacontainers.x.vfio"


def prepare() -> str:
    """Copy the executable to its place and return that; "" without one."""
    if not os.environ.get(VARIABLE):
        return ""
    shutil.copy(os.environ[VARIABLE], PLACE)
    PLACE.chmod(0o755)
    return str(PLACE)


def make_state(name: str, addresses: Sequence[str]) -> bytes:
    """Write a container's config.json and return its state. addresses: of devices on the root bus 0000:00."""
    devices = [{"host-address": address, "guest-path": {"Path": [address[len("0000:00:") :]]}} for address in addresses]
    annotation = json.dumps([{"host-group": "1", "devices": devices}])
    (CONTAINERS / name).mkdir(parents=True)
    config = {"ociVersion": "1.0.2", "annotations": {ANNOTATION: annotation}}
    (CONTAINERS / name / "config.json").write_text(json.dumps(config))
    return json.dumps({"ociVersion": "1.0.2", "id": name, "status": "creating", "pid": 1, "bundle": "/"}).encode()
