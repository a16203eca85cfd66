# SPDX-License-Identifier: Apache-2.0
"""`vfio-guest-bind --all` on what is odd, hostile or unreadable: findings and exit codes, never a traceback."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.guest.claims import STATE_DIRECTORY, ClaimDirectory
from oci_hooks.guest.settings import GUEST_SETTINGS
from oci_hooks.system import Root
from tests.support.fake_guest import NIC
from tests.support.fake_survey import CONFIG, Bench, list_codes, list_states

pytestmark = pytest.mark.unit


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, monkeypatch, capfd)


class ClosedRoot(Root):
    """A made tree of which some directories cannot be read."""

    def __init__(self, top: str, closed: tuple[str, ...]) -> None:
        super().__init__(top)
        self.closed = closed

    def ask(self, question: Callable[..., Any], path: str, *more: object) -> Any:
        """Return the answer, unless the path is closed. Raises OSError."""
        if path.startswith(self.closed):
            raise PermissionError(13, "Permission denied", path)
        return super().ask(question, path, *more)


@pytest.mark.parametrize(
    "text", ["neverr = 1\n", "deadline = \n", '[auto]\nnever = "id:1af4"\n', "\0\xff", "force = [7]"]
)
def test_survey_bad_settings_refused(bench: Bench, text: str) -> None:
    """As each container would be: exit code 2, and the line of the mistake."""
    bench.machine.write(GUEST_SETTINGS, text)
    code, out, err = bench.run()
    assert (code, out) == (2, "")
    assert "error: [bad-settings]" in err


@pytest.mark.parametrize(
    ("path", "subject"),
    [
        ("/sys/bus/pci/devices", "PCI devices"),
        ("/sys/kernel/iommu_groups", "IOMMU groups"),
        ("/sys/class/vfio", "PCI devices"),
    ],
)
def test_survey_unreadable_sysfs_named(bench: Bench, path: str, subject: str) -> None:
    bench.root = ClosedRoot(bench.root.top, (path,))
    answer = bench.ask()
    found = {
        finding["subject"]: finding["problem"] for finding in answer["findings"] if finding["code"] == "check-failed"
    }
    assert found[subject] == f"cannot be checked: {path}: Permission denied"


def test_survey_unchecked_use_is_a_use(bench: Bench) -> None:
    """A run fails there; auto must not be said to take the device."""
    bench.machine.place("/proc/self/mountinfo").unlink()
    answer = bench.ask()
    group = next(group for group in answer["groups"] if group["group"] == "4")
    assert (group["state"], answer["guest"]["auto"]) == ("in use", [])
    (reason,) = group["reasons"]
    assert "cannot be checked: " in reason["reason"]
    assert "/proc/self/mountinfo: No such file or directory" in reason["reason"]


def test_survey_claims_of_others_unreadable(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user than root: what is bound to vfio-pci may be anybody's."""
    bench.machine.add("0000:00:06.0", "8086:10c9", "020000", "vfio-pci", "6")
    bench.hold("web", "6")

    def refuse(_directory: ClaimDirectory) -> Iterator[str]:
        raise PermissionError(13, "Permission denied", f"{STATE_DIRECTORY}/claims")

    monkeypatch.setattr(ClaimDirectory, "list_files", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    answer = bench.ask()
    assert list_codes(answer) == ["check-failed", "check-failed"]
    assert [finding["subject"] for finding in answer["findings"]] == ["this survey", "claims"]
    assert (list_states(answer)["6"], answer["guest"]["auto"]) == ("claimed", ["4"])


def test_survey_odd_files_among_claims(bench: Bench) -> None:
    directory = bench.hold("web", "4")
    place = Path(directory.path, "claims")
    (place / "directory").mkdir()
    os.mkfifo(place / "pipe")
    (place / "link").symlink_to("web")
    (place / ".4711").write_text("draft")
    (place / "empty").write_text("")
    (place / "junk").write_bytes(b"\xff\0\n" * 99)
    Path(os.fsdecode(bytes(place) + b"/bad-\xff")).write_text("oci-vfio-hooks 99\n")
    (place / "large").write_bytes(b"x" * (2 << 20))
    answer = bench.ask()
    assert sorted(claim["state"] for claim in answer["claims"]) == ["held", *["unreadable"] * 4]
    assert list_codes(answer, "warning") == ["claim-unreadable"] * 4
    assert list_states(answer)["4"] == "claimed"
    _, out, _ = bench.run()
    assert "\\udcff" in out


def test_survey_claims_are_a_file(bench: Bench) -> None:
    bench.machine.write(f"{STATE_DIRECTORY}/claims", "x")
    answer = bench.ask()
    assert list_codes(answer) == ["check-failed"]


def test_survey_vanished_and_odd_devices(bench: Bench) -> None:
    """Gone between listing and reading; a group that lists what is not there; names that are no text; no number."""
    machine = bench.machine
    machine.place("/sys/bus/pci/devices/0000:00:1e.0").symlink_to("nowhere")
    machine.place("/sys/kernel/iommu_groups/4/devices/0000:00:1e.0").symlink_to("nowhere")
    machine.place("/sys/kernel/iommu_groups/x y").mkdir()
    machine.add("0000:00:09.0", "8086:1572", "020000", "igb", "11")
    machine.place("/sys/kernel/iommu_groups/11/devices/\x1b[31m\n7").mkdir()
    os.mkdir(os.fsencode(machine.place("/sys/kernel/iommu_groups")) + b"/\xff\xfe")
    machine.add_group_node("4", "511:seven")
    machine.write("/sys/bus/pci/devices-odd", "")
    answer = bench.ask()
    assert answer["guest"]["auto"] == ["4", "11"]
    four = next(group for group in answer["groups"] if group["group"] == "4")
    assert [member["name"] for member in four["members"]] == [NIC, "0000:00:1e.0"]
    assert four["number"] is None
    _, out, _ = bench.run()
    assert all(line.isprintable() for line in out.split("\n"))
    assert "\\x1b[31m\\n7" in out
    assert "\\udcff\\udcfe" in out


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        gzip.compress(CONFIG.encode())[:40],
        gzip.compress(b"\0" * (64 << 20)),
        gzip.compress(b"\xff=y\n"),
    ],
    ids=["empty", "no gzip", "cut", "bomb", "no option"],
)
def test_survey_odd_kernel_config(bench: Bench, data: bytes) -> None:
    bench.machine.place("/proc/config.gz").write_bytes(data)
    answer = bench.ask()
    assert (answer["guest"]["kernel_config"], answer["guest"]["missing_options"], answer["exit"]) == (None, [], 0)


def test_survey_odd_release(bench: Bench) -> None:
    """What becomes a part of a path leads nowhere else."""
    bench.machine.place("/proc/config.gz").unlink()
    bench.machine.write("/proc/sys/kernel/osrelease", "x/../../../etc\n")
    bench.machine.write("/etc/config", CONFIG)
    assert bench.ask()["guest"]["kernel"] is None


def test_survey_empty_machine(bench: Bench, tmp_path: Path) -> None:
    """Nothing there at all: no PCI, no /proc."""
    (tmp_path / "nothing").mkdir()
    bench.root = Root(str(tmp_path / "nothing"))
    answer = bench.ask()
    assert answer["groups"] == []
    assert list_codes(answer, "error") == ["nothing-to-take", "no-vfio-driver"]
    assert answer["exit"] == 1
