# SPDX-License-Identifier: Apache-2.0
"""No error in a config.json without a VFIO request may stop a container. Both executables."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from oci_hooks import oci
from tests.support.odd_configs import KINDS, REFUSED, REFUSED_BY_BOTH

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
HOOKS = ("vfio-host-check", "vfio-guest-bind")
GROUP = {"path": "/dev/vfio/4000", "type": "c", "major": 511, "minor": 9}


def make_config(**annotations: str) -> dict[str, Any]:
    """Return an ordinary config.json."""
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/true"], "env": ["PATH=/bin"], "cwd": "/"},
        "annotations": dict(annotations),
        "hooks": {},
        "linux": {"devices": [], "namespaces": [{"type": "pid"}]},
    }


def call(hook: str, bundle: Path, data: bytes, **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Run one of the executables on a bundle with this config.json."""
    (bundle / "config.json").write_bytes(data)
    # The highest pid there can be: no process.
    state = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 4194304, "bundle": str(bundle), **more}
    return subprocess.run(
        [str(REPOSITORY / "hooks" / hook)],
        input=json.dumps(state).encode(),
        capture_output=True,
        timeout=60,
        check=False,
        env={},
    )


def test_odd_configs_at_least_sixty_runnable() -> None:
    """tests/vm/test_odd_configs.py runs them."""
    assert len([kind for kind in KINDS if any(kind not in refused for refused in REFUSED.values())]) >= 60
    assert set(KINDS) > REFUSED_BY_BOTH
    assert all(set(KINDS) > refused for refused in REFUSED.values())


@pytest.mark.parametrize("kind", KINDS)
def test_odd_configs_without_vfio_not_refused(tmp_path: Path, kind: str) -> None:
    data = KINDS[kind](make_config())
    for hook in HOOKS:
        done = call(hook, tmp_path, data)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), hook


@pytest.mark.parametrize("kind", KINDS)
def test_odd_configs_with_vfio_not_ignored(tmp_path: Path, kind: str) -> None:
    """There is no such group, and no process: the hook reports that if it could read the request, else the reason."""
    config = make_config(**{oci.DEVICES_ANNOTATION: "0000:00:00.0"})
    config["linux"]["devices"].append(GROUP)
    data = KINDS[kind](config)
    for hook in HOOKS:
        if hook == "vfio-host-check" and kind == "devices null":
            # The annotation is the guest's; the host checks groups.
            continue
        done = call(hook, tmp_path, data)
        lines = done.stderr.decode().splitlines()
        assert done.returncode in (1, 2), hook
        assert lines[0].startswith(f"{hook}: error: ["), lines
        assert all(line.startswith(f"{hook}: ") and "; " in line for line in lines), lines
        assert b"[internal]" not in done.stderr
