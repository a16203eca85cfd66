# SPDX-License-Identifier: Apache-2.0
"""Settings files that can't be used, through both executables: one line, exit code 2, nothing changed, no waiting."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest

from oci_hooks.plain_toml import read_plain

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
HOOKS = {"guest": "vfio-guest-bind", "host": "vfio-host-check"}
CONFIG = {
    "ociVersion": "1.0.2",
    "root": {"path": "rootfs"},
    "annotations": {"io.katacontainers.x.vfio.devices": "0000:ff:1f.7"},
    "linux": {"devices": [{"path": "/dev/vfio/4711", "type": "c", "major": 511, "minor": 4711}]},
}
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to somebody else")


def list_system() -> dict[str, float]:
    """Return the files that a hook may leave on a machine other than recordings, with their times."""
    top = Path("/run/oci-vfio-hooks")
    return {str(path): path.lstat().st_mtime for path in top.rglob("*") if "records" not in path.parts}


def run(name: str, settings: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a hook as a runtime does, for a container that asks for devices, with these settings."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps(CONFIG))
    state = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": os.getpid(), "bundle": str(bundle)}
    return subprocess.run(
        [REPOSITORY / "hooks" / HOOKS[name], "--settings", settings],
        input=json.dumps(state),
        capture_output=True,
        text=True,
        timeout=60,
        env={},
        check=False,
    )


def refuse(name: str, settings: Path, tmp_path: Path) -> str:
    """Have a hook refuse these settings, and return its line without program, level and the file's path."""
    before = list_system()
    done = run(name, settings, tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    head = f"{HOOKS[name]}: error: "
    assert line.startswith(head)
    assert str(settings) in line
    # The remedy follows the problem.
    assert "; " in line
    assert list_system() == before
    return line[len(head) :].replace(str(settings), "FILE", 1)


@functools.cache
def has_toml() -> bool:
    """Return whether the hooks' interpreter can read TOML: below Python 3.11 that needs a package."""
    script = "import sys, importlib.util as u; sys.exit(not (u.find_spec('tomllib') or u.find_spec('tomli')))"
    return subprocess.run(["/usr/bin/python3", "-I", "-c", script], check=False).returncode == 0


NO_TOML = "[settings-unreadable] FILE: needs a full TOML parser, which is not installed; apt "


@pytest.fixture(name="settings")
def make_settings(tmp_path: Path) -> Path:
    """Return the path of a settings file that is not there yet."""
    return tmp_path / "x.toml"


# The file ------------------------------------------------------------------------------------------------------------


TEXTS = {
    "latin": (b"deadline = 3\n# \xff\n", "byte 15 is not UTF-8; save the file as UTF-8"),
    "utf-16": ("deadline = 3\n".encode("utf-16"), "byte 0 is not UTF-8; save the file as UTF-8"),
    "bom": (b"\xef\xbb\xbfdeadline = 3\n", "begins with a byte order mark; save it as UTF-8 without a byte order mark"),
    "key twice": (
        b"deadline = 3\nrecord = 'never'\ndeadline = 3\n",
        "is not TOML: Cannot overwrite a value (at line 3,",
    ),
    "table twice": (b"[a]\n[a]\n", "is not TOML: Cannot declare ('a',) twice (at line 2,"),
    "no value": (b"\n\ndeadline = \n", "is not TOML: Invalid value (at line 3,"),
    "open string": (b'deadline = 3\nrecord = "nev\n', "is not TOML: Illegal character"),
    "nul": (b"deadline = 3\0\n", "is not TOML: "),
    "xml": (b"<xml/>\n", "is not TOML: Invalid statement (at line 1,"),
    "json": (b'{"deadline": 3}\n', "is not TOML: Invalid statement (at line 1,"),
    "yaml": (b"deadline: 3\n", "is not TOML: Expected '=' after a key"),
    "nan": (b"deadline = nan\n", "is not TOML: nan is not a finite number"),
    "infinite": (b"deadline = 1e999\n", "is not TOML: 1e999 is not a finite number"),
    "deep": (b"a = " + b"[" * 5000 + b"\n", "is not TOML: "),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize(("data", "said"), TEXTS.values(), ids=TEXTS)
def test_settings_invalid_text_refused(name: str, tmp_path: Path, settings: Path, data: bytes, said: str) -> None:
    settings.write_bytes(data)
    needs_toml = said.startswith("is not TOML") and not has_toml()
    assert refuse(name, settings, tmp_path).startswith(NO_TOML if needs_toml else f"[bad-settings] FILE: {said}")


@pytest.mark.parametrize("name", HOOKS)
def test_settings_oversized_file_refused(name: str, tmp_path: Path, settings: Path) -> None:
    settings.write_bytes(b"# x\n" * (512 << 10))
    output = "has 2097152 bytes, above the limit of 65536 for a settings file; check that it is the right file"
    assert refuse(name, settings, tmp_path).startswith(f"[settings-unreadable] FILE: {output}")


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "device", "absent", "dangling", "loop"])
def test_settings_path_not_regular_file_refused(name: str, tmp_path: Path, settings: Path, kind: str) -> None:
    if kind == "directory":
        settings.mkdir()
    elif kind == "fifo":
        os.mkfifo(settings)
    elif kind == "socket":
        os.mknod(settings, 0o140644)
    elif kind == "device":
        settings = Path("/dev/zero")
    elif kind == "dangling":
        settings.symlink_to("y.toml")
    elif kind == "loop":
        settings.symlink_to("x.toml")
    words = {
        "directory": "is a directory, not a file",
        "absent": "No such file or directory",
        "dangling": "No such file or directory",
        "loop": "Too many levels of symbolic links",
    }
    line = refuse(name, settings, tmp_path)
    assert line.startswith(
        f"[settings-unreadable] FILE: {words.get(kind, 'is a FIFO, a socket or a device, not a file')}; "
    )


@AS_ROOT
@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize(
    ("mode", "uid", "said"),
    [
        (0o600, 1000, "belongs to user 1000, who could change what the hook does as root; chown root:root "),
        (0o444, 65534, "belongs to user 65534, who could change what the hook does as root; chown root:root "),
        (0o666, 0, "can be written by others (mode 0666), who could change what the hook does as root; chmod go-w "),
    ],
)
def test_settings_file_writable_by_others_refused(
    name: str, tmp_path: Path, settings: Path, mode: int, uid: int, said: str
) -> None:
    settings.write_text("deadline = 30\n")
    os.chown(settings, uid, uid)
    settings.chmod(mode)
    assert refuse(name, settings, tmp_path).startswith(f"[bad-settings] FILE: {said}")


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("mode", [0o000, 0o400, 0o600, 0o640, 0o644])
def test_settings_file_owned_by_root_read(name: str, tmp_path: Path, settings: Path, mode: int) -> None:
    # The guest hook waits for its device.
    settings.write_text('deadline = 1.2\nrecord = "never"\n')
    settings.chmod(mode)
    done = run(name, settings, tmp_path)
    assert done.returncode == 1
    assert "settings" not in done.stderr


# Values --------------------------------------------------------------------------------------------------------------

SECONDS = "expected a number above 0, at most 3600, found"
HOST_SECONDS = "expected a number from 0.1 to 600, found"
ADDRESS = "expected an address as sysfs writes it, e.g. 0000:02:00.0, found"
ID = "expected a vendor or vendor:device in lower case, e.g. 8086:10d3, found"
CLASS = "expected a class of 2, 4 or 6 digits in lower case, e.g. 0200, found"
KIND = "expected id:VENDOR, id:VENDOR:DEVICE, class:CLASS or root:CLASS, found"
BITS = "expected permission bits from 0o000 to 0o777, found"
NUMBER = "expected a number from 0 to 4294967294, found"
TRUTH = "expected true or false, found"
RECORD = "expected one of failure, always, never, found"
GUEST = [
    ("deadline = 0", "deadline", f"{SECONDS} 0"),
    ("deadline = -1", "deadline", f"{SECONDS} -1"),
    ("deadline = -0.0", "deadline", f"{SECONDS} -0.0"),
    ("deadline = 3601", "deadline", f"{SECONDS} 3601"),
    ("deadline = 3600.5", "deadline", f"{SECONDS} 3600.5"),
    ("deadline = 1e308", "deadline", f"{SECONDS} 1e+308"),
    ("deadline = 0x" + "f" * 6000, "deadline", f"{SECONDS} a value too large to show"),
    ("deadline = true", "deadline", f"{SECONDS} true"),
    ('deadline = "8"', "deadline", f'{SECONDS} "8"'),
    ('deadline = ""', "deadline", f'{SECONDS} ""'),
    ("deadline = [8]", "deadline", f"{SECONDS} [8]"),
    ("deadline = {seconds = 8}", "deadline", f'{SECONDS} {{"seconds": 8}}'),
    ("[deadline]", "deadline", f"{SECONDS} {{}}"),
    ("deadline = 2026-11-22", "deadline", f'{SECONDS} "2026-11-22"'),
    ("deadline = 21:00:00", "deadline", f'{SECONDS} "21:00:00"'),
    ('on_failure = "die"', "on_failure", 'expected one of report, kill, found "die"'),
    ('on_failure = "Kill"', "on_failure", 'expected one of report, kill, found "Kill"'),
    ('on_failure = ""', "on_failure", 'expected one of report, kill, found ""'),
    ("on_failure = true", "on_failure", "expected one of report, kill, found true"),
    ('on_failure = ["kill"]', "on_failure", 'expected one of report, kill, found ["kill"]'),
    ("map = 1", "map", f"{TRUTH} 1"),
    ('map = "true"', "map", f'{TRUTH} "true"'),
    ("[map]", "map", f"{TRUTH} {{}}"),
    ("allow_noiommu = 0", "allow_noiommu", f"{TRUTH} 0"),
    ('allow_noiommu = "Y"', "allow_noiommu", f'{TRUTH} "Y"'),
    ("widen_parent_cgroups = 1.0", "widen_parent_cgroups", f"{TRUTH} 1.0"),
    ('record = "sometimes"', "record", f'{RECORD} "sometimes"'),
    ("record = false", "record", f"{RECORD} false"),
    ('force = "0000:02:00.0"', "force", "expected a list, each item an address as sysfs writes it, e.g. 0000:"),
    ("force = {}", "force", "expected a list, each item an address"),
    ('force = ["02:00.0"]', "force[0]", f'{ADDRESS} "02:00.0"'),
    ('force = ["0000:02:00.0", "0000:02:20.0"]', "force[1]", f'{ADDRESS} "0000:02:20.0"'),
    ('force = ["0000:02:00.8"]', "force[0]", f'{ADDRESS} "0000:02:00.8"'),
    ('force = ["0000:3B:00.0"]', "force[0]", f'{ADDRESS} "0000:3B:00.0"'),
    ('force = ["0000:02:00.0\\n"]', "force[0]", f'{ADDRESS} "0000:02:00.0\\n"'),
    ('force = ["\\u0660000:02:00.0"]', "force[0]", f'{ADDRESS} "\\u0660000:02:00.0"'),
    ('force = [""]', "force[0]", f'{ADDRESS} ""'),
    ('force = [["0000:02:00.0"]]', "force[0]", f'{ADDRESS} ["0000:02:00.0"]'),
    ('force = ["0000:02:00.0", 7]', "force[1]", f"{ADDRESS} 7"),
    ("force = [2026-11-22T21:00:00Z]", "force[0]", f'{ADDRESS} "2026-11-22 21:00:00+00:00"'),
    ("dead_line = 3", "dead_line", "unknown key; known keys: allow_noiommu, auto, deadline, force, map, node, on_"),
    ("Deadline = 3", "Deadline", "unknown key; known keys: "),
    ('"" = 3', '""', "unknown key; known keys: "),
    ('"dead line" = 3', '"dead line"', "unknown key; known keys: "),
    ('"\\u001b[2J" = 3', '"\\u001b[2J"', "unknown key; known keys: "),
    ("node.deadline = 3", "node.deadline", "unknown key; known keys: gid, mode, uid"),
    ("auto = 3", "auto", "expected a table, [auto], found 3"),
    ("auto = []", "auto", "expected a table, [auto], found []"),
    ("[[auto]]", "auto", "expected a table, [auto], found [{}]"),
    ("[auto]\nid = []", "auto.id", "unknown key; known keys: classes, ids, never"),
    ('[auto]\nids = "10de"', "auto.ids", "expected a list, each item a vendor or vendor:device"),
    ('[auto]\nids = ["10DE"]', "auto.ids[0]", f'{ID} "10DE"'),
    ('[auto]\nids = ["10de", "8086:10d3", "8086:"]', "auto.ids[2]", f'{ID} "8086:"'),
    ('[auto]\nids = ["10de:0001:0002"]', "auto.ids[0]", f'{ID} "10de:0001:0002"'),
    ("[auto]\nids = [0x10de]", "auto.ids[0]", f"{ID} 4318"),
    ('[auto]\nclasses = ["020"]', "auto.classes[0]", f'{CLASS} "020"'),
    ('[auto]\nclasses = ["02", ""]', "auto.classes[1]", f'{CLASS} ""'),
    ("[auto]\nclasses = [true]", "auto.classes[0]", f"{CLASS} true"),
    ('[auto]\nnever = ["1af4"]', "auto.never[0]", f'{KIND} "1af4"'),
    ('[auto]\nnever = ["id:"]', "auto.never[0]", f'{KIND} "id:"'),
    ('[auto]\nnever = ["bus:06"]', "auto.never[0]", f'{KIND} "bus:06"'),
    ("node = 3", "node", "expected a table, [node], found 3"),
    ("[node]\nmode = 0o7777", "node.mode", f"{BITS} 4095"),
    ("[node]\nmode = 660", "node.mode", f"{BITS} 660"),
    ("[node]\nmode = -1", "node.mode", f"{BITS} -1"),
    ('[node]\nmode = "0660"', "node.mode", f'{BITS} "0660"'),
    ("[node]\nmode = 384.5", "node.mode", f"{BITS} 384.5"),
    ("[node]\nuid = true", "node.uid", f"{NUMBER} true"),
    ("[node]\nuid = 4294967295", "node.uid", f"{NUMBER} 4294967295"),
    ('[node]\ngid = "kvm"', "node.gid", f'{NUMBER} "kvm"'),
    ("[node.gid]", "node.gid", f"{NUMBER} {{}}"),
]  # fmt: skip
MODE = "expected one of enforce, warn, found"
OWN_MODE = "expected one of enforce, warn, ignore, found"
KATA_MODE = "expected one of auto, always, never, found"
PATH = "expected an absolute path, found"
HOST = [
    ('moed = "warn"', "moed", "unknown key; known keys: checks, deadline, kata, mode, nri, record;"),
    ('on_failure = "kill"', "on_failure", "unknown key; known keys: "),
    ('mode = "audit"', "mode", f'{MODE} "audit"'),
    ('mode = "ignore"', "mode", f'{MODE} "ignore"'),
    ("mode = true", "mode", f"{MODE} true"),
    ("[mode]", "mode", f"{MODE} {{}}"),
    ("deadline = 0", "deadline", f"{HOST_SECONDS} 0"),
    ("deadline = 0.09", "deadline", f"{HOST_SECONDS} 0.09"),
    ("deadline = 601", "deadline", f"{HOST_SECONDS} 601"),
    ('deadline = "8"', "deadline", f'{HOST_SECONDS} "8"'),
    ("deadline = false", "deadline", f"{HOST_SECONDS} false"),
    ('record = "failures"', "record", f'{RECORD} "failures"'),
    ('[kata]\nmode = "sometimes"', "kata.mode", f'{KATA_MODE} "sometimes"'),
    ("[kata.mode]", "kata.mode", f"{KATA_MODE} {{}}"),
    ('[kata]\nconfig = "configuration.toml"', "kata.config", f'{PATH} "configuration.toml"'),
    ('[kata]\nconfig = ""', "kata.config", f'{PATH} ""'),
    ('[kata]\nconfig = "/a\\u0000b"', "kata.config", f'{PATH} "/a\\u0000b"'),
    ('[kata]\nconfig = ["/a"]', "kata.config", f'{PATH} ["/a"]'),
    ("[kata]\nconfg = 1", "kata.confg", "unknown key; known keys: config, mode"),
    ("kata = 3", "kata", "expected a table, [kata], found 3"),
    ('kata = "/etc/kata"', "kata", 'expected a table, [kata], found "/etc/kata"'),
    ("[[kata]]", "kata", "expected a table, [kata], found [{}]"),
    ('checks = "warn"', "checks", 'expected a table, [checks], found "warn"'),
    ('[checks]\ngroup-busy = "no"', "checks.group-busy", f'{OWN_MODE} "no"'),
    ("[checks]\ngroup-busy = false", "checks.group-busy", f"{OWN_MODE} false"),
    ("[checks.group-busy]", "checks.group-busy", f"{OWN_MODE} {{}}"),
    ('[checks]\ngroup_busy = "warn"', "checks.group_busy", "unknown key; keys of this table are codes of findings"),
    ('[checks]\n"group-busy\\n" = "warn"', 'checks."group-busy\\n"', "unknown key; keys of this table are codes"),
    ('[checks]\n"" = "warn"', 'checks.""', "unknown key; keys of this table are codes of findings"),
]  # fmt: skip
VALUES = [(name, *row) for name, rows in (("guest", GUEST), ("host", HOST)) for row in rows]


@pytest.mark.parametrize(("name", "text", "key", "said"), VALUES, ids=[f"{row[0]}-{row[1][:30]!r}" for row in VALUES])
def test_settings_wrong_value_refused(
    name: str, tmp_path: Path, settings: Path, text: str, key: str, said: str
) -> None:
    settings.write_text(f"# a comment\n{text}\n")
    # A key that is written with an escape is not looked for in the text.
    line = "" if "\\" in key else f" line {1 + len(text.splitlines())}"
    found = refuse(name, settings, tmp_path)
    if not has_toml() and read_plain(text) is None:
        assert found.startswith(NO_TOML)
        return
    assert found.startswith(f"[bad-settings] FILE{line}: {key}: {said}")
    assert found.endswith("; correct or remove it")


def test_settings_table_has_many_rows() -> None:
    assert len(VALUES) >= 90
