# SPDX-License-Identifier: Apache-2.0
"""A host with many devices, groups and processes: what a check of one group reads does not grow with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oci_hooks import program
from oci_hooks.host import checks
from oci_hooks.host import hook as host_hook
from oci_hooks.linux import holders
from oci_hooks.system import Deadline, Root
from tests.support.fake_host import HostTree, fill_host

pytestmark = pytest.mark.unit

QEMU = "/usr/bin/qemu-system-x86_64"
# A check of a group on the large host may take this much more than one of a free group on the small host.
RATIO = 1.5
# Above those of real processes: the hook reads its own ancestors.
PIDS = 5_000_000


class Host:
    """A made host; what a run of the hook asks of it is counted."""

    def __init__(self, top: Path, devices: int, members: int, processes: int) -> None:
        self.tree = HostTree(top)
        self.asked: list[str] = []
        nodes = fill_host(self.tree, devices, members, devices // members // 2)
        # The container's hypervisor, which has its group already or not yet; nobody knows but the kernel.
        self.tree.process(50, QEMU, "-device", "intel-iommu", opened=("/dev/kvm", "/dev/vfio/0"))
        for pid in range(PIDS, PIDS + processes):
            self.tree.process(pid, "/usr/bin/other", opened=("/dev/null",))
        entries = [{"path": path, "type": "c", "major": major, "minor": minor} for path, major, minor in nodes[:1]]
        entries.append({"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196})
        linux = {"devices": entries, "resources": {"devices": [{"allow": True, "access": "rwm"}]}}
        process = {"capabilities": {"effective": ["CAP_IPC_LOCK"]}}
        self.tree.write("/run/b/config.json", json.dumps({"ociVersion": "1.0.2", "process": process, "linux": linux}))

    def run(self, monkeypatch: pytest.MonkeyPatch, *argv: str, pid: int = 0) -> int:
        """Run the hook and return its exit code. pid: of the state's process."""
        asked = self.asked = []

        class CountingRoot(Root):
            def ask(self, question: Any, path: str, *more: object) -> Any:
                asked.append(path)
                return super().ask(question, path, *more)

        state = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": pid, "bundle": "/run/b"}
        monkeypatch.setattr(program, "RecordingRoot", lambda: CountingRoot(str(self.tree.top)))
        monkeypatch.setattr(program.Run, "is_recorded", lambda _run, _code: False)
        monkeypatch.setattr(program, "read_input", lambda *_: json.dumps(state).encode())
        return host_hook.main(list(argv))


@pytest.fixture(name="small", scope="module")
def make_small(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """Return an idle host with two groups."""
    return Host(tmp_path_factory.mktemp("small"), 4, 2, 0)


@pytest.fixture(name="large", scope="module")
def make_large(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """Return a host with 512 devices, 256 groups and many processes."""
    return Host(tmp_path_factory.mktemp("large"), 512, 2, 99)


def make_busy(monkeypatch: pytest.MonkeyPatch, word: str = "busy") -> None:
    """Have the kernel say that each group is busy."""
    monkeypatch.setattr(checks, "read_group_status", lambda _root, _node: word)


def test_check_reads_no_more_on_large_host(small: Host, large: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group is free: neither other devices nor any process is looked at."""
    assert small.run(monkeypatch) == large.run(monkeypatch) == 0
    assert len(large.asked) == len(small.asked)
    assert not [path for path in large.asked if path.startswith(f"/proc/{PIDS // 1000}")]


def test_check_own_hypervisor_on_large_host(small: Host, large: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox has the group already: only its own hypervisor is looked at."""
    codes = [small.run(monkeypatch, pid=50)]
    make_busy(monkeypatch)
    monkeypatch.setattr(holders, "list_holders", lambda *_: pytest.fail("other processes were examined"))
    assert [*codes, large.run(monkeypatch, pid=50)] == [0, 0]
    assert len(large.asked) <= RATIO * len(small.asked)


def test_check_other_hypervisor_on_large_host(large: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one's hypervisor: of a hundred processes only its descriptors are read."""
    examined = []

    def list_files(location: str, *_: Any) -> list[str]:
        examined.append(location.rpartition("/")[2])
        return holders_list_files(location)

    holders_list_files = holders.list_vfio_files
    monkeypatch.setattr(holders, "list_vfio_files", list_files)
    make_busy(monkeypatch)
    assert large.run(monkeypatch) == 1
    assert examined == ["50"]


def test_named_free_group_examines_no_process(large: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "list_holders", lambda *_: pytest.fail("processes were examined"))
    assert large.run(monkeypatch, "--group", "0") == 0


@pytest.mark.parametrize("status", ["busy", "denied"])
def test_named_group_names_its_holder(
    large: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], status: str
) -> None:
    make_busy(monkeypatch, status)
    assert large.run(monkeypatch, "--group", "0") == (status == "busy")
    line = capfd.readouterr().out.splitlines()[1]
    assert line.split()[:3] == ["0", "in", "use"]
    assert line.endswith(" qemu-system-x86_64 (pid 50)")


@pytest.mark.parametrize("argv", [("--all",), ("--cdi", "list")])
def test_survey_cut_short_reported(
    large: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    """A list without users would be taken for one of free groups."""

    def count_down(_deadline: Deadline) -> None:
        left.pop()
        if not left:
            raise TimeoutError

    # Each program's name, then the descriptors of the hypervisor and of twelve others.
    left = [0] * (100 + 13)
    monkeypatch.setattr(holders, "check_time", count_down)
    assert large.run(monkeypatch, *argv) == 0
    assert capfd.readouterr().err == (
        "vfio-host-check: warning: [holders-unknown] host: the search for the users of groups stopped after 13 of 100 "
        "processes: the list of users is not complete; raise deadline in host.toml\n"
    )
    left = [0] * 1000
    assert large.run(monkeypatch, *argv) == 0
    assert capfd.readouterr().err == ""


def test_survey_without_privilege_reported(
    large: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A user who is not root may not know who has a group."""

    def refuse(location: str, *_: Any) -> list[str]:
        raise PermissionError(location)

    monkeypatch.setattr(holders, "list_vfio_files", refuse)
    assert large.run(monkeypatch, "--all") == 0
    assert capfd.readouterr().err == (
        "vfio-host-check: warning: [holders-unknown] host: the hook lacks the privilege to check 100 of 100 processes "
        "(CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH) for open groups: the list of users is not complete; run it as root\n"
    )
