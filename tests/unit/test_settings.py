# SPDX-License-Identifier: Apache-2.0
"""Settings files: accepted and refused values, and the place in the error. host.toml represents both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oci_hooks import plain_toml, settings
from oci_hooks.findings import EXIT_BAD_INPUT, Finding, InputError
from oci_hooks.host.settings import HOST_SETTINGS, HostSettings, read_host_settings
from oci_hooks.plain_toml import read_plain
from oci_hooks.system import Root

pytestmark = pytest.mark.unit

WHOLE = """
mode = "warn"
deadline = 2.5
record = "always"
[checks]
group-busy = "ignore"
viommu-off = "enforce"
[kata]
mode = "always"
config = "/opt/kata/share/defaults/kata-containers/configuration-qemu.toml"

[nri]
annotate = true
"""
ALL = HostSettings(
    mode="warn",
    deadline=2.5,
    record="always",
    checks=(("group-busy", "ignore"), ("viommu-off", "enforce")),
    kata_mode="always",
    kata_config="/opt/kata/share/defaults/kata-containers/configuration-qemu.toml",
    nri_annotate=True,
)


def write(tmp_path: Path, text: str | bytes) -> Root:
    """Return a root with this host.toml."""
    path = tmp_path / HOST_SETTINGS.lstrip("/")
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Root(str(tmp_path))


def refuse(root: Root, path: str = "") -> tuple[Finding, ...]:
    """Return the findings of the error that reading these settings raises."""
    with pytest.raises(InputError) as caught:
        read_host_settings(root, path)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return caught.value.findings


def test_read_settings_without_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_toml, "load_toml", lambda _text: pytest.fail("a TOML reader was loaded for nothing"))
    assert read_host_settings(Root(str(tmp_path)), "") == HostSettings()


def test_read_settings_named_file_missing_refused(tmp_path: Path) -> None:
    (finding,) = refuse(Root(str(tmp_path)), "/x.toml")
    assert (finding.code, finding.subject) == ("settings-unreadable", "/x.toml")


@pytest.mark.parametrize("text", ["", "# nothing\n", 'mode = "enforce"\n', "[kata]\n", "[checks]\n"])
def test_read_settings_empty(tmp_path: Path, text: str) -> None:
    assert read_host_settings(write(tmp_path, text), "") == HostSettings()


def test_host_settings_every_key_applied(tmp_path: Path) -> None:
    assert read_host_settings(write(tmp_path, WHOLE), "") == ALL
    # A key that the schema lets through and nobody reads would be a setting that is not in force.
    assert [key for key, value in ALL.as_dict().items() if value == getattr(HostSettings(), key)] == []
    assert (ALL.find_mode("viommu-off"), ALL.find_mode("memlock")) == ("enforce", "")


@pytest.mark.parametrize(
    "text",
    [
        WHOLE.replace("\n", "\r\n"),
        WHOLE.replace("[kata]\nmode", "kata.mode").replace("\nconfig", "\nkata.config").replace("[checks]\n", ""),
        WHOLE.replace("2.5", "25e-1"),
        WHOLE.replace('"warn"', "'warn'"),
    ],
)
def test_read_settings_spelling_variants(tmp_path: Path, text: str) -> None:
    if "kata.mode" in text:
        text = text.replace("group-busy", "checks.group-busy").replace("viommu-off", "checks.viommu-off")
    assert read_plain(text) is None
    assert read_host_settings(write(tmp_path, text), "") == ALL


def test_read_settings_every_mistake_with_line(tmp_path: Path) -> None:
    text = 'moed = 1\nmode = 1\n\ndeadline = "x"\n[checks]\n"A b" = "warn"\n[kata]\nmode = [\n "auto",\n]\n'
    findings = refuse(write(tmp_path, text))
    assert [finding.subject.partition(".toml ")[2] for finding in findings] == [
        "line 1: moed",
        "line 2: mode",
        "line 4: deadline",
        'line 6: checks."A b"',
        "line 8: kata.mode",
    ]
    assert findings[3].problem == "unknown key; keys of this table are codes of findings, e.g. group-busy"
    assert all(finding.code == "bad-settings" and finding.hint for finding in findings)


def test_read_settings_mistakes_limited(tmp_path: Path) -> None:
    text = "".join(f"x{number} = 1\n" for number in range(100))
    assert len(refuse(write(tmp_path, text))) == settings.MAX_FINDINGS


def test_read_settings_parent_not_directory(tmp_path: Path) -> None:
    """ENOTDIR is an error, and not the same as an absent file."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/oci-vfio-hooks").write_text("")
    assert refuse(Root(str(tmp_path)))[0].code == "settings-unreadable"


# Who may write it ----------------------------------------------------------------------------------------------------


class OwnedRoot(Root):
    """A root whose files belong to somebody, asked by a hook of somebody."""

    def __init__(self, top: Path, mode: int, uid: int, gid: int, me: int) -> None:
        super().__init__(str(top))
        self.mode, self.uid, self.gid, self.me = mode, uid, gid, me

    def stat(self, path: str) -> os.stat_result:
        """Return the stat of a file with this owner and mode."""
        found = list(super().stat(path))
        found[0], found[4], found[5] = 0o100000 | self.mode, self.uid, self.gid
        return os.stat_result(found)

    def do(self, function, *arguments):  # type: ignore[no-untyped-def]
        """Return who runs the hook."""
        return self.me if function is os.geteuid else super().do(function, *arguments)


ALL_USERS = "         0          0 4294967295\n"
ROOTLESS = "         0       1000          1\n"


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "me", "uid_map", "said"),
    [
        (0o644, 0, 0, 0, ALL_USERS, ""),
        (0o600, 0, 0, 0, ALL_USERS, ""),
        (0o000, 0, 0, 0, ALL_USERS, ""),
        # The group of root is root.
        (0o664, 0, 0, 0, ALL_USERS, ""),
        (0o664, 0, 7, 0, ALL_USERS, "can be written by others (mode 0664)"),
        (0o666, 0, 0, 0, ALL_USERS, "can be written by others (mode 0666)"),
        (0o646, 0, 0, 0, ALL_USERS, "can be written by others (mode 0646)"),
        (0o600, 1000, 1000, 0, ALL_USERS, "belongs to user 1000"),
        (0o444, 65534, 65534, 0, ALL_USERS, "belongs to user 65534"),
        # A person tries something with settings of his own; or with the machine's.
        (0o644, 1000, 1000, 1000, ALL_USERS, ""),
        (0o644, 0, 0, 1000, ALL_USERS, ""),
        (0o644, 1001, 1000, 1000, ALL_USERS, "belongs to user 1001"),
        # Podman without root: root's file, seen from a user namespace that has no number for root.
        (0o644, 65534, 65534, 0, ROOTLESS, ""),
        (0o646, 65534, 65534, 0, ROOTLESS, "can be written by others"),
        (0o644, 1001, 65534, 0, ROOTLESS, "belongs to user 1001"),
        (0o644, 65534, 65534, 0, "", "belongs to user 65534"),
    ],
)
def test_check_file_writable_by(
    tmp_path: Path, mode: int, uid: int, gid: int, me: int, uid_map: str, said: str
) -> None:
    write(tmp_path, 'mode = "warn"\n')
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/uid_map").write_text(uid_map)
    root = OwnedRoot(tmp_path, mode, uid, gid, me)
    if not said:
        assert read_host_settings(root, "").mode == "warn"
        return
    (finding,) = refuse(root)
    assert (finding.code, finding.subject) == ("bad-settings", HOST_SETTINGS)
    assert said in finding.problem
    assert finding.hint.startswith(("chown root:root /etc", "chmod go-w /etc"))


# What it needs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["guest", "host"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "not plain"])
def test_read_settings_loads_no_library(tmp_path: Path, name: str, plain: bool) -> None:
    """jsonschema never, and tomllib only for what is not plain."""
    text = 'deadline = 30\nrecord = "never"\n' if plain else "deadline = +30\nrecord = 'never'\n"
    script = (
        f"import sys; sys.path.insert(0, {os.getcwd()!r})\n"
        "from oci_hooks.system import Root\n"
        f"from oci_hooks.{name}.settings import read_{name}_settings as read\n"
        f"assert read(Root(), {str(tmp_path / 'x.toml')!r}).deadline == 30\n"
        "print(*sys.modules)\n"
    )
    (tmp_path / "x.toml").write_text(text)
    command = [sys.executable, "-IS", "-c", script]
    modules = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert "oci_hooks.settings" in modules
    assert "jsonschema" not in modules
    # Below 3.11 the TOML reader is a package, for which the site-packages are needed.
    if plain or sys.version_info >= (3, 11):
        assert {"json", "site", "oci_hooks.schema"} & modules == set()
    assert plain == ("re" not in modules)


def test_read_settings_plain_without_tomllib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.9 and 3.10 without tomli."""
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    assert read_host_settings(write(tmp_path / "a", WHOLE), "") == ALL
    (finding,) = refuse(write(tmp_path / "b", "mode = 'warn'\n"))
    assert finding.code == "settings-unreadable"
    assert "python3-tomli" in finding.hint
    (finding,) = refuse(write(tmp_path / "c", "mode = 7\n"))
    assert (finding.code, finding.subject) == ("bad-settings", f"{HOST_SETTINGS} line 1: mode")
