# SPDX-License-Identifier: Apache-2.0
"""A device that comes while the hook waits: it is read at once, although its own driver is still probing it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oci_hooks.guest import access, decision
from oci_hooks.guest.selection import NotAvailableYet
from oci_hooks.linux import pci, uevents
from oci_hooks.system import Deadline, Root
from tests.support.fake_host import HostTree

pytestmark = pytest.mark.unit

OLD, NEW = "0000:00:02.0", "0000:05:00.0"


@pytest.fixture(name="tree")
def make_tree(tmp_path: Path) -> HostTree:
    """Return a machine with a device that was there before, and one that was plugged in."""
    tree = HostTree(tmp_path)
    tree.pci(OLD, "ahci", "1", class_code="010601")
    tree.pci(NEW, "e1000e", "2")
    for name, value in (("vendor", "0x8086"), ("device", "0x10d3"), ("class", "0x020000")):
        tree.write(f"/sys/devices/pci0000:00/{NEW}/{name}", f"{value}\n")
    return tree


class LockedRoot(Root):
    """A root in which nobody gets the lock of the new device."""

    def ask(self, question: Any, path: str, *more: object) -> Any:
        if path.endswith(f"{NEW}/uevent"):
            raise BlockingIOError(path)
        return super().ask(question, path, *more)


@pytest.mark.parametrize("driver", ["e1000e", "vfio-pci", ""])
def test_scan_reads_new_device_without_its_lock(tree: HostTree, driver: str) -> None:
    """The result is the one that its uevent file has, with and without a driver."""
    (tree.top / f"sys/devices/pci0000:00/{NEW}/driver").unlink()
    if driver:
        tree.link(f"/sys/devices/pci0000:00/{NEW}/driver", f"/sys/bus/pci/drivers/{driver}")
    (tree.top / f"sys/devices/pci0000:00/{NEW}/uevent").write_text(
        "PCI_CLASS=20000\nPCI_ID=8086:10D3\n" + (f"DRIVER={driver}\n" if driver else "")
    )
    usual = pci.scan(tree.root, instances=True)
    assert usual.devices[NEW].driver == driver
    settled = frozenset({OLD})
    assert pci.scan(LockedRoot(str(tree.top)), instances=True, settled=settled) == usual


def test_scan_reads_other_devices_at_once(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single attributes take four reads in place of one."""
    monkeypatch.setattr(pci, "read_attributes", lambda *_: pytest.fail("single attributes were read"))
    everything = frozenset({OLD, NEW})
    assert pci.scan(tree.root, settled=everything) == pci.scan(tree.root)


def test_scan_new_device_gone_meanwhile(tree: HostTree) -> None:
    (tree.top / f"sys/devices/pci0000:00/{NEW}/device").unlink()
    assert set(pci.scan(tree.root, settled=frozenset({OLD})).devices) == {OLD}


def test_wait_for_claim_knows_new_devices(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """New are those that were not there when the hook began to listen, in each further look."""
    looks: list[frozenset[str] | None] = []

    def claim(_session: Any, settled: frozenset[str] | None) -> Any:
        looks.append(settled)
        if len(looks) < 3:
            raise NotAvailableYet("no-such-device", "annotation", "matches nothing", "attach it")
        return "undo log", "plan"

    listener = SimpleNamespace(wait=lambda _seconds: f"add /devices/pci0000:00/{NEW}")
    monkeypatch.setattr(decision, "claim_groups", claim)
    monkeypatch.setattr(uevents, "Listener", lambda: listener)
    monkeypatch.setattr(access, "preload_later_steps", lambda: None)
    session: Any = SimpleNamespace(root=tree.root, run=SimpleNamespace(deadline=Deadline(5)))
    claimed: Any = decision.wait_for_claim(session)
    assert claimed == ("undo log", "plan")
    assert looks == [None, {OLD, NEW}, {OLD, NEW}]
