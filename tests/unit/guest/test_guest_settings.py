# SPDX-License-Identifier: Apache-2.0
"""guest.toml: each key, each mistake, and what holds without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from oci_hooks import plain_toml
from oci_hooks.findings import InputError
from oci_hooks.guest.recovery import UNDO_SECONDS
from oci_hooks.guest.settings import (
    GUEST_SETTINGS,
    KATA_DEADLINE,
    KATA_SECONDS,
    NEVER,
    GuestSettings,
    NodeOwner,
    check_deadline,
    read_guest_settings,
)
from oci_hooks.system import Root

pytestmark = pytest.mark.unit

WHOLE = """
deadline = 2.5
on_failure = "kill"
allow_noiommu = true
widen_parent_cgroups = true
map = false
record = "always"
force = ["0000:02:00.0", "00000000:3b:00.0", "00010000:e1:00.0"]
[auto]
ids = ["10de", "8086:10d3"]
classes = ["02", "0302", "010802"]
never = ["id:1af4", "class:06", "root:0106"]
[node]
mode = 0o660
uid = 1000
gid = 2000
"""


def write(tmp_path: Path, text: str, path: str = GUEST_SETTINGS) -> Root:
    """Return a root with this settings file."""
    location = tmp_path / path.lstrip("/")
    location.parent.mkdir(parents=True)
    location.write_text(text)
    return Root(str(tmp_path))


def test_guest_settings_without_file_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_toml, "load_toml", lambda _text: pytest.fail("a TOML reader was loaded for nothing"))
    assert read_guest_settings(Root(str(tmp_path)), "") == GuestSettings()


def test_guest_settings_empty_file_defaults(tmp_path: Path) -> None:
    assert read_guest_settings(write(tmp_path, "# nothing\n"), "") == GuestSettings()


def test_guest_settings_every_key_applied(tmp_path: Path) -> None:
    found = read_guest_settings(write(tmp_path, WHOLE), "")
    assert found == GuestSettings(
        deadline=2.5,
        on_failure="kill",
        allow_noiommu=True,
        widen_parent_cgroups=True,
        map=False,
        record="always",
        # As sysfs writes them: another spelling would never be found.
        force=("0000:02:00.0", "0000:3b:00.0", "10000:e1:00.0"),
        auto_ids=("10de", "8086:10d3"),
        auto_classes=("02", "0302", "010802"),
        never=("id:1af4", "class:06", "root:0106"),
        owner=NodeOwner(0o660, 1000, 2000),
    )
    # A key that the schema lets through and nobody reads would be a setting that is not in force.
    usual = GuestSettings()
    assert [key for key, value in found.as_dict().items() if value == getattr(usual, key)] == []


def test_guest_settings_partial_file(tmp_path: Path) -> None:
    found = read_guest_settings(write(tmp_path, '[auto]\nids = ["10de"]\n[node]\nmode = 0o666\n'), "")
    assert (found.auto_ids, found.never, found.deadline) == (("10de",), NEVER, 8.0)
    assert found.owner == NodeOwner(0o666, -1, -1)
    assert read_guest_settings(write(tmp_path / "x", "[auto]\nnever = []\n"), "").never == ()


def test_guest_settings_integral_float_accepted(tmp_path: Path) -> None:
    owner = read_guest_settings(write(tmp_path, "[node]\nmode = 384.0\nuid = 1000.0\n"), "").owner
    assert (oct(owner.mode), str(owner.uid), owner.gid) == ("0o600", "1000", -1)


def test_guest_settings_from_command_line(tmp_path: Path) -> None:
    root = write(tmp_path, 'on_failure = "kill"\n')
    write(tmp_path, "deadline = 3\n", "/other/x.toml")
    found = read_guest_settings(root, "/other/x.toml")
    assert (found.deadline, found.on_failure) == (3, "report")
    with pytest.raises(InputError) as caught:
        read_guest_settings(root, "/no/such.toml")
    assert caught.value.findings[0].code == "settings-unreadable"


@pytest.mark.parametrize(
    ("deadline", "bundle", "warned"),
    [
        ("8.5", "/run/kata-containers/c1", False),
        ("8.6", "/run/kata-containers/c1", True),
        ("30", "/run/kata-containers/c1", True),
        ("30", "/run/containerd/io.containerd.runtime.v2.task/k8s.io/c1", False),
    ],
)
def test_guest_settings_deadline_above_agents(tmp_path: Path, deadline: str, bundle: str, warned: bool) -> None:
    settings = read_guest_settings(write(tmp_path, f"deadline = {deadline}\n"), "")
    findings = check_deadline(settings, "", bundle)
    assert [(finding.level, finding.code) for finding in findings] == [("warning", "deadline-too-long")] * warned
    if warned:
        assert findings[0].subject == "/etc/oci-vfio-hooks/guest.toml: deadline"
        assert findings[0].problem.startswith(f"{deadline} s is too long: Kata's agent kills a hook after 10 s")
    assert check_deadline(GuestSettings(), "", "/run/kata-containers/c1") == []


def test_guest_settings_deadline_leaves_time_to_restore() -> None:
    assert KATA_DEADLINE + UNDO_SECONDS <= KATA_SECONDS
