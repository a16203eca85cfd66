# SPDX-License-Identifier: Apache-2.0
"""`vfio-host-check --metrics`: the survey for Prometheus. tests/packaging/test_cdi.py has promtool's word on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oci_hooks import program
from oci_hooks.host import hook as host_hook
from oci_hooks.system import Root
from tests.support.fake_host import HostTree

pytestmark = pytest.mark.unit

SAMPLE = re.compile(r'([a-z][a-z_]*[a-z])(?:\{([a-z]+="[a-z0-9._-]+"(?:,[a-z]+="[a-z0-9._-]+")*)\})? ([0-9]+)')


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostTree:
    monkeypatch.setattr(program, "RecordingRoot", lambda: Root(str(tmp_path)))
    made = HostTree(tmp_path)
    made.pci("0000:03:00.0", "vfio-pci", "12")
    made.pci("0000:04:00.0", "vfio-pci", "13")
    made.pci("0000:04:00.1", "ixgbe", "13")
    made.pci("0000:05:00.0", "i915", "14")
    for minor, group in enumerate(("12", "13")):
        made.vfio(group, minor)
    return made


def read_samples(text: str) -> dict[tuple[str, str], int]:
    """Return the samples by name and labels. Each family has its HELP and TYPE first; every line is of the format."""
    samples, family = {}, ""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert line.endswith(".") and len(line.split()) > 4
            assert next(lines) == f"# TYPE {family} gauge"
            # Counters alone end with _total, and a gauge of ours has no unit.
            assert family.startswith("oci_vfio_") and not family.endswith(("_total", "_count", "_sum"))
            continue
        found = SAMPLE.fullmatch(line)
        assert found and found[1] == family, line
        assert (found[1], found[2] or "") not in samples
        samples[found[1], found[2] or ""] = int(found[3])
    return samples


@pytest.mark.usefixtures("tree")
def test_groups_by_state_and_checks_that_fail(capfd: pytest.CaptureFixture[str]) -> None:
    assert host_hook.main(["--all", "--metrics"]) == 1
    out, err = capfd.readouterr()
    assert "[group-not-viable] group 13" in err
    samples = read_samples(out)
    states = {labels: value for (name, labels), value in samples.items() if name == "oci_vfio_groups"}
    words = ("ready", "in_use", "not_viable", "not_bound", "host", "bridges_only", "no_iommu")
    assert states == {f'state="{word}"': int(word in ("ready", "not_viable", "host")) for word in words}
    assert samples["oci_vfio_check_failing", 'check="group-not-viable",level="error"'] == 1
    assert samples["oci_vfio_check_findings", 'level="error"'] == 1
    assert samples["oci_vfio_check_findings", 'level="info"'] == 0
    assert samples["oci_vfio_iommu_enabled", ""] == 1


def test_the_file_is_renewed_each_time_and_never_another_ones(
    tree: HostTree, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tree.write("/var/lib/node/vfio.prom", "other_metric 1\n")
    assert host_hook.main(["--metrics=/var/lib/node/vfio.prom"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "error: [output] /var/lib/node/vfio.prom" in err
    assert place.read_text() == "other_metric 1\n"
    place.unlink()
    assert host_hook.main(["--metrics=/var/lib/node/vfio.prom"]) == 1
    first = place.stat()
    assert read_samples(place.read_text())["oci_vfio_groups", 'state="ready"'] == 1
    host_hook.main(["--metrics=/var/lib/node/vfio.prom"])
    # Its modification time shows when the survey was made (node_textfile_mtime_seconds).
    assert place.stat().st_ino != first.st_ino
