# SPDX-License-Identifier: Apache-2.0
"""A made guest on which `vfio-guest-bind --all` runs in this process."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from oci_hooks import program
from oci_hooks.guest import hook as guest_hook
from oci_hooks.guest.claims import ClaimDirectory
from oci_hooks.schema import load_schema
from oci_hooks.system import Root
from tests.support.fake_guest import NIC, Machine
from tests.unit.guest.test_claims import STAT, make_claim

BUS = "/sys/devices/pci0000:00"
RELEASE = "6.12.1-kata"
CONFIG = "\n".join(
    f"CONFIG_{name}=y"
    for name in ("VFIO", "VFIO_GROUP", "VFIO_PCI", "VFIO_IOMMU_TYPE1", "VFIO_DEVICE_CDEV", "INTEL_IOMMU")
)


class Bench:
    """A made guest on which the hook runs in this process, as root as far as it knows."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.machine = Machine(top)
        self.capfd = capfd
        self.monkeypatch = monkeypatch
        self.root = Root(str(top))
        monkeypatch.setattr(program, "RecordingRoot", lambda: self.root)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        machine = self.machine
        machine.add("0000:00:00.0", "8086:29c0", "060000", group="0")
        machine.add("0000:00:02.0", "1b36:000c", "060400", "pcieport", "3")
        machine.add(NIC, "8086:10d3", "020000", "e1000e", "4", above=f"{BUS}/0000:00:02.0")
        machine.write("/sys/bus/pci/drivers/vfio-pci/bind")
        machine.write("/sys/module/vfio_iommu_type1/parameters/x")
        machine.place("/sys/class/vfio").mkdir(parents=True)
        machine.write("/proc/self/mountinfo", "22 1 0:21 / / rw - 9p root rw\n")
        machine.write("/proc/sys/kernel/osrelease", f"{RELEASE}\n")
        self.configure(CONFIG)

    def configure(self, text: str) -> None:
        """Give the kernel a configuration."""
        path = self.machine.place("/proc/config.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr of `--all`."""
        code = guest_hook.main(["--all", *arguments])
        out, err = self.capfd.readouterr()
        assert "[internal]" not in err
        assert "Traceback" not in err
        return code, out, err

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Return the answer of `--all --json`, which keeps to the schema."""
        code, out, _ = self.run("--json", *arguments)
        answer: dict[str, Any] = json.loads(out)
        jsonschema.validate(answer, load_schema("findings"))
        assert answer["exit"] == code
        return answer

    def hold(self, container: str, *groups: str) -> ClaimDirectory:
        """Give a living container these groups."""
        self.machine.write("/proc/7/stat", STAT.format(pid=7, state="S", start=70))
        directory = ClaimDirectory(root=self.machine.root)
        self.machine.place("/run").mkdir(exist_ok=True)
        directory.prepare()
        make_claim(directory, container, groups=groups)
        return directory


def list_states(answer: dict[str, Any]) -> dict[str, str]:
    """Return the state of each group."""
    return {group["group"]: group["state"] for group in answer["groups"]}


def list_codes(answer: dict[str, Any], level: str = "") -> list[str]:
    """Return the codes of the findings, of one level if it is given."""
    return [finding["code"] for finding in answer["findings"] if level in ("", finding["level"])]
