# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the recordings' tests: find a hook's recording, and run it again on the machine where it was made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from oci_hooks.record.reader import Recording, read_record
from oci_hooks.replay.rerun import find_differences
from tests.vm import bundles
from tests.vm.bundles import Done

# Where the runner takes them from, to keep them as test data.
KEEP = os.environ.get("OCI_VFIO_KEEP_RECORDS", "")
LARGEST = 60_000
# The second where the first can't be written.
PLACES = (Path("/var/lib/oci-vfio-hooks/records"), Path("/run/oci-vfio-hooks/records"))


def check_record(done: Done, code: str, name: str = "") -> Recording:
    """Return the record that a failed hook left: small, with this code, and the same when it is run again."""
    assert f"[{code}]" in done.stderr, done.stderr
    assert "recorded]" not in done.stderr, done.stderr
    return check_file(list_records()[-1], code, name)


def list_records() -> list[Path]:
    """Return the machine's records, the newest last: their names begin with the time."""
    return sorted((path for location in PLACES for path in location.glob("*.tar.gz")), key=lambda path: path.name)


def check_file(path: Path, code: str, name: str = "") -> Recording:
    """Return a record: for nobody else to read, small, with this code (or none), and the same when it is run again."""
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert path.stat().st_size < LARGEST
    record = read_record(path)
    assert code in [finding.code for finding in record.findings] or (not code and record.about["exit"] == 0)
    if KEEP:
        shutil.copy(path, Path(KEEP) / f"{record.about['program'].split('-')[1]}-{name or code}.tar.gz")
    differences = find_differences(record)
    assert differences == [], "\n".join(differences)
    return record


def check_host(state: str) -> Done:
    """Run the host hook with a state."""
    hook = bundles.find_hook(bundles.HOST_HOOK)
    done = subprocess.run([hook], input=state, capture_output=True, text=True, timeout=120, check=False)
    return Done(done.returncode, done.stdout, done.stderr)
