# SPDX-License-Identifier: Apache-2.0
"""Waiting for devices: to the deadline, through events of no interest and lost ones."""

from __future__ import annotations

import errno
import os
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from oci_hooks.findings import StepError
from oci_hooks.linux.uevents import Listener

pytestmark = pytest.mark.unit

EVENT = SimpleNamespace(action="add", device_path="/devices/pci0000:00/0000:00:05.0")


class FakeMonitor:
    """Imitates pyudev's monitor: None is also returned for an event that its filter drops, long before the end."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events
        self.filters: list[str] = []
        self.started = False

    def filter_by(self, subsystem: str) -> None:
        """Take note of a subsystem."""
        self.filters.append(subsystem)

    def start(self) -> None:
        """Begin to listen."""
        self.started = True

    def poll(self, timeout: float) -> Any:
        """Return the next event."""
        if not self.events:
            time.sleep(timeout)
            return None
        event = self.events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event


def listen(monkeypatch: pytest.MonkeyPatch, events: list[Any], context: Any = object) -> tuple[Listener, FakeMonitor]:
    """Return a listener that hears these events."""
    monitor = FakeMonitor(events)
    module: Any = ModuleType("pyudev")
    module.Context = context
    module.Monitor = SimpleNamespace(from_netlink=lambda _context, source: monitor if source == "kernel" else None)
    monkeypatch.setitem(sys.modules, "pyudev", module)
    return Listener(), monitor


def test_listener_listens_before_first_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, monitor = listen(monkeypatch, [EVENT])
    assert monitor.started
    assert set(monitor.filters) == {"pci", "vfio"}
    assert listener.wait(5) == "add /devices/pci0000:00/0000:00:05.0"


def test_listener_ignores_other_events(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, _ = listen(monkeypatch, [None, None, EVENT])
    assert listener.wait(5).startswith("add ")
    listener, _ = listen(monkeypatch, [None, None])
    begun = time.monotonic()
    assert listener.wait(0.2) == ""
    assert time.monotonic() - begun > 0.15


def test_listener_reports_lost_events(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, _ = listen(monkeypatch, [OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))])
    assert listener.wait(5) == "lost No buffer space available"


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_listener_zero_timeout_polls(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    listener, _ = listen(monkeypatch, [EVENT])
    assert listener.wait(seconds).startswith("add ")
    assert listener.wait(seconds) == ""


def lack_libudev() -> None:
    """Do what pyudev does without libudev."""
    raise ImportError("No library named udev")


def lack_permission() -> None:
    """Do what pyudev does where a netlink socket is denied."""
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("context", [lack_libudev, lack_permission])
def test_listener_without_pyudev_fails_with_hint(monkeypatch: pytest.MonkeyPatch, context: Any) -> None:
    with pytest.raises(StepError) as caught:
        listen(monkeypatch, [], context)
    (finding,) = caught.value.findings
    assert finding.code == "no-pyudev"
    assert "python3-pyudev" in finding.hint


def test_listener_real_monitor_times_out() -> None:
    begun = time.monotonic()
    Listener().wait(0.1)
    assert time.monotonic() - begun < 10
