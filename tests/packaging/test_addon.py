# SPDX-License-Identifier: Apache-2.0
"""packaging/guest-addon: what is in it, the same bytes twice, and the hook at work where there is nothing else.

tests/vm/test_addon.py has the hook's real work, tests/kata Kata's own agent with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hooks import __version__
from tests import packages, provision
from tests.packages import run_mounted
from tests.provision import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "packaging"))

from guest_addon import archive, closure, debs, tree

PYTHON = "/opt/oci-vfio-hooks/bin/python3"
FLAGS = "-IBSXutf8"
HOOK = "/usr/share/oci/hooks/prestart/vfio-guest-bind"
HOOKS = (HOOK, "/usr/share/oci/hooks/poststop/vfio-guest-bind")
MAX_BYTES, MAX_PACKED_BYTES = 16_000_000, 6_000_000
# A hook that starts by so much more slowly than with Debian's own Python has a defect.
MAX_RATIO = 1.05
PAIRS = 100
DEVICES = "io.katacontainers.x.vfio.devices"


class BareRoot:
    """A root file system with the add-on, the kernel's own file systems, and perhaps busybox."""

    def __init__(self, path: Path, addon: Path, has_busybox: bool) -> None:
        self.path = path
        self.bundle = path / "bundle"
        shutil.copytree(addon, path)
        for name in ("dev", "proc", "sys", "bundle"):
            (path / name).mkdir()
        if has_busybox:
            (path / "bin").mkdir()
            shutil.copy("/bin/busybox", path / "bin/busybox")
            for name in ("sh", "modprobe", "mount"):
                (path / "bin" / name).symlink_to("busybox")

    def run(self, *command: str, text: str = "", code: int = 0) -> str:
        """Run a command in it that must end with this code, and return what it printed."""
        script = 'for each in dev proc sys; do mount --rbind /$each "$0/$each"; done; exec chroot "$0" "$@"'
        done = run_mounted(script.replace("$0", str(self.path)), *command, input=text, env={})
        assert done.returncode == code, (
            f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done.stdout + done.stderr

    def write_settings(self, text: str) -> None:
        """Write the hook's settings file in it."""
        place = self.path / "etc/oci-vfio-hooks"
        place.mkdir(parents=True, exist_ok=True)
        (place / "guest.toml").write_text(text)

    def make_state(self, annotations: dict[str, str]) -> str:
        """Write a bundle into it and return the state of its container."""
        (self.bundle / "config.json").write_text(json.dumps({"ociVersion": "1.0.2", "annotations": annotations}))
        state = {"ociVersion": "1.0.2", "id": "c", "status": "created", "pid": 2, "bundle": "/bundle"}
        return json.dumps(state)


@pytest.fixture(scope="session")
def addon(tools: None) -> Path:
    """Return the directory with the add-on's archive, and `tree`."""
    return packages.ensure_addon()


@pytest.fixture(params=["nothing", "busybox"])
def bare_root(addon: Path, tmp_path: Path, request: pytest.FixtureRequest) -> BareRoot:
    """Return a root with the add-on and nothing else, and one with busybox."""
    return BareRoot(tmp_path / "root", addon / "tree", request.param == "busybox")


@pytest.fixture(scope="session")
def library(tools: None, addon: Path, tmp_path_factory: pytest.TempPathFactory) -> closure.Library:
    """Return where the modules are that the add-on is made of."""
    debian = tmp_path_factory.mktemp("debian")
    command = packages.make_addon_command(Path("unused"))
    debs.unpack(Path(command[command.index("--debs") + 1]), debian)
    return tree.find_library(debian)


def test_addon_sizes(addon: Path) -> None:
    files = archive.list_files(addon / "tree")
    size = sum(path.stat().st_size for path in files)
    (packed,) = addon.glob("*.tar.xz")
    print(f"{size} bytes in {len(files)} files, packed {packed.stat().st_size}")
    assert packed.name == f"oci-vfio-hooks-guest-addon_{__version__}_amd64.tar.xz"
    assert size <= MAX_BYTES
    assert packed.stat().st_size <= MAX_PACKED_BYTES


def test_addon_contents(addon: Path) -> None:
    top = addon / "tree"
    # Kata's agent wants no links, and an image's own tools cannot lose what is not there.
    assert not [path for path in top.rglob("*") if path.is_symlink()]
    for name in HOOKS:
        path = top / name[1:]
        assert path.stat().st_mode & 0o7777 == 0o755
        script = path.read_text().splitlines()
        assert script[0] == f"#!{PYTHON} {FLAGS}"
        assert len(script) < 20
    # No source, and nothing that is there twice.
    assert not list(top.rglob("*.py"))
    lines = (line.split("  ") for line in (top / archive.MANIFEST).read_text().splitlines())
    listed = {name: digest for digest, name in lines}
    files = {str(path.relative_to(top)): path for path in archive.list_files(top)}
    assert set(listed) == set(files) - {archive.MANIFEST}
    assert {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in listed} == listed


def test_addon_archive_is_tree(addon: Path, tmp_path: Path) -> None:
    (packed,) = addon.glob("*.tar.xz")
    with tarfile.open(packed) as file:
        members = {member.name: member for member in file.getmembers()}
        assert {(member.uid, member.gid, member.uname) for member in members.values()} == {(0, 0, "root")}
    # /usr and what is below it are the image's, which may have links there.
    directories = [name for name, member in members.items() if member.isdir()]
    assert [name for name in directories if not name.startswith("opt/oci-vfio-hooks")] == []
    subprocess.run(["sh", "-ec", 'umask 077; tar -C "$0" -xf "$1"', tmp_path, packed], check=True)
    modes = {name: (tmp_path / name).stat().st_mode for name in members}
    assert modes == {name: (addon / "tree" / name).stat().st_mode for name in members}
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", archive.MANIFEST], cwd=tmp_path, check=True)


def test_addon_names_licenses(addon: Path) -> None:
    top = addon / "tree/opt/oci-vfio-hooks"
    lines = [line.split() for line in (top / "packages").read_text().splitlines() if not line.startswith("#")]
    assert [name for name, _, _, _ in lines] == list(debs.PACKAGES)
    for name in debs.PACKAGES:
        assert (top / "licenses" / name / "copyright").stat().st_size > 200
    assert (top / "licenses/oci-vfio-hooks/LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    # What has parts under it comes with its text.
    assert {"LGPL-2.1", "GPL-2"} <= {path.name for path in (top / "licenses/common-licenses").iterdir()}


def test_addon_is_reproducible(addon: Path, tmp_path: Path) -> None:
    (packed,) = addon.glob("*.tar.xz")
    with tarfile.open(packed) as file:
        epoch = file.getmembers()[0].mtime
    environment = {"PATH": os.environ["PATH"], "SOURCE_DATE_EPOCH": str(epoch), "TZ": "Pacific/Kiritimati"}
    command = packages.make_addon_command(tmp_path / "again")
    subprocess.run(["sh", "-c", 'umask 077; exec "$0" "$@"', *command], cwd="/", env=environment, check=True)
    (again,) = (tmp_path / "again").iterdir()
    assert again.name == packed.name
    assert again.read_bytes() == packed.read_bytes()


def test_addon_refuses_what_it_would_overwrite(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    command = packages.make_addon_command(tmp_path, "--directory", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        f"packaging/guest-addon: {tmp_path}: is not empty; remove it, or name another one\n",
    )
    done = subprocess.run([sys.executable, *command], env={"PATH": "/"}, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.endswith("apt-get install --no-install-recommends apt dpkg patchelf\n")


def test_closure_leaves_nothing_out(library: closure.Library) -> None:
    """What Python's own modules import in functions is in the add-on, or in the table of what is not reached."""
    found = closure.find_closure(library)
    assert set(closure.list_left_out(library, found)) == set(closure.NOT_REACHED)
    for name in closure.OMITTED:
        assert name not in found.sources and name not in found.extensions
    ours = {name for name in found.sources if closure.is_own(name)}
    assert {"oci_hooks.guest.survey", "oci_hooks.guest.apply.guard", "oci_hooks.record.writer"} <= ours
    assert not [name for name in ours if name.startswith(("oci_hooks.host", "oci_hooks.replay", "oci_hooks.nri"))]
    # Compiled without: none that would have to hold.
    assert not [name for name in ours if "\n    assert " in found.sources[name].read_text()]


def list_imported_names(source: Path) -> Iterator[str]:
    """Yield what a module of ours imports, by a way of its own: the lines that begin with `import` or `from`."""
    text = re.sub(r"^if TYPE_CHECKING:\n(?:(?: +.*)?\n)+", "", source.read_text(), flags=re.MULTILINE)
    for names in re.findall(r"^ *import ([\w., ]+?)(?: as \w+)?(?:  #.*)?$", text, re.MULTILINE):
        yield from names.split(", ")
    yield from re.findall(r"^ *from ([\w.]+) import ", text, re.MULTILINE)


def test_addon_modules_can_be_imported(addon: Path, library: closure.Library, tmp_path: Path) -> None:
    """By the add-on's own interpreter, in an empty root: each of its modules, and all that ours name."""
    top = addon / "tree/opt/oci-vfio-hooks/lib" / tree.PYTHON
    names = {str(path.relative_to(top).with_suffix("")).replace("/", ".") for path in top.rglob("*.pyc")}
    names |= {path.name.partition(".")[0] for path in (top / "lib-dynload").iterdir()}
    assert "asyncio.__init__" in names
    ours = {name: source for name, source in closure.find_closure(library).sources.items() if closure.is_own(name)}
    named = set().union(*(list_imported_names(source) for source in ours.values()))
    assert {"oci_hooks.guest.survey_kernel", "tomllib", "tenacity", "pyudev", "jsonschema", "_json"} <= named
    names = {name.removesuffix(".__init__") for name in names | named} - set(closure.OMITTED)
    script = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(len(sys.argv) - 1)"
    root = BareRoot(tmp_path / "root", addon / "tree", False)
    assert root.run(PYTHON, FLAGS, "-c", script, *sorted(names)) == f"{len(names)}\n"
    assert len(names) > 250


def test_addon_loads_nothing_of_the_image(addon: Path) -> None:
    """In a root that has libraries of the same names, and an environment that names them first: only its own."""
    script = """
        mount -t tmpfs none /opt; mkdir /opt/oci-vfio-hooks; mount --bind "$1/opt/oci-vfio-hooks" /opt/oci-vfio-hooks
        exec env -i LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu PYTHONPATH=/usr/lib/python3.11 \\
            "$2" "$3" -c 'import ctypes, json, pyudev, sys; pyudev.Context(); print(*sys.path)
print(open("/proc/self/maps").read())'
    """
    done = run_mounted(script, str(addon / "tree"), PYTHON, FLAGS)
    assert done.returncode == 0, done.stderr
    path, _, maps = done.stdout.partition("\n")
    # The C library also reads, as data, what the image has of the locale C.UTF-8.
    files = {line.split()[5] for line in maps.splitlines() if " r-xp " in line and line.split()[5:]} - {"[vdso]"}
    files.discard("[vsyscall]")
    assert len(files) >= 8
    assert [file for file in files if not file.startswith("/opt/oci-vfio-hooks/")] == []
    assert [each for each in path.split() if not each.startswith("/opt/oci-vfio-hooks/")] == []


def test_hook_in_a_bare_root(bare_root: BareRoot) -> None:
    """The paths that end early: the version, nothing asked for, states that are none, and nothing to take."""
    for hook in HOOKS:
        assert bare_root.run(hook, "--version") == f"vfio-guest-bind {__version__}\n"
        assert bare_root.run(hook, text=bare_root.make_state({})) == ""
        output = bare_root.run(hook, text="{}", code=2)
        assert "vfio-guest-bind: error: [bad-state] state on stdin: top level: missing required key id" in output
    output = bare_root.run(HOOK, text=bare_root.make_state({DEVICES: "\x7f"}), code=2)
    assert "[bad-annotation]" in output
    # A terminal's control character is spelled out, by a codec that is a module.
    assert "\\x7f" in output
    # Kata's agent, or systemd, mounts it.
    (bare_root.path / "run").mkdir()
    bare_root.write_settings("deadline = 1\n")
    state = bare_root.make_state({DEVICES: "0000:ff:1f.7"})
    output = bare_root.run(HOOK, text=state, code=1)
    assert "vfio-guest-bind: error: [" in output
    assert "[internal]" not in output
    assert "Traceback" not in output
    # What it has refused it has recorded.
    records = list((bare_root.path / "var/lib/oci-vfio-hooks/records").iterdir())
    assert len(records) == len(HOOKS) + 2
    for record in records:
        with tarfile.open(record) as file:
            assert file.getmembers()


def test_hook_reads_settings_in_a_bare_root(bare_root: BareRoot) -> None:
    (bare_root.path / "run").mkdir()
    state = bare_root.make_state({DEVICES: "0000:ff:1f.7"})
    # Plain settings are read without tomllib, others with it.
    for text in ('deadline = 1\nrecord = "never"\n', 'deadline = 1\nrecord = """never"""\n'):
        bare_root.write_settings(text)
        assert "[settings" not in bare_root.run(HOOK, text=state, code=1)
        assert not (bare_root.path / "var").exists()
    bare_root.write_settings("dead_line = 3\n")
    assert "line 1: dead_line: unknown key; " in bare_root.run(HOOK, text=state, code=2)


def test_survey_in_a_bare_root(bare_root: BareRoot) -> None:
    """By hand, as in Kata's debug console. What this machine has is another matter: 0 or 1, and a picture of it."""
    script = f"{HOOK} --all --json; [ $? -le 1 ]"
    if (bare_root.path / "bin/sh").exists():
        picture = json.loads(bare_root.run("/bin/sh", "-c", script).partition("\n}\n")[0] + "}")
        assert picture["program"] == "vfio-guest-bind"
        assert picture["exit"] in (0, 1)
    assert bare_root.run(HOOK, "--help").startswith("usage: vfio-guest-bind ")


def test_addon_waits_without_udev(bare_root: BareRoot) -> None:
    """pyudev finds the add-on's libudev, and listens to the kernel itself: no udevd, no ldconfig."""
    listen = "from oci_hooks.linux.uevents import Listener; print(repr(Listener().wait(0.01)))"
    assert bare_root.run(PYTHON, FLAGS, "-c", listen) == "''\n"
    versions = "import pyudev, tenacity; from oci_hooks.record.writer import find_versions; print(find_versions())"
    assert "unknown" not in bare_root.run(PYTHON, FLAGS, "-c", versions)


def test_addon_declares_cdi(addon: Path, bare_root: BareRoot) -> None:
    """At each boot, when /run is empty; and CDI's own package takes the file, which declares hooks that are there."""
    declare = "/opt/oci-vfio-hooks/bin/declare-cdi"
    for name in ("run", "var"):
        (bare_root.path / name).mkdir()
    (bare_root.path / "var/run").symlink_to("../run")
    for _ in range(2):
        assert bare_root.run(declare) == ""
    (path,) = (bare_root.path / "run/cdi").iterdir()
    assert path.read_bytes() == (addon / "tree/opt/oci-vfio-hooks/cdi" / path.name).read_bytes()
    command = [str(provision.ensure_cdi_check()), str(path), "oci-vfio-hooks/bind=all"]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert answer["problems"] is None
    declared = answer["container"]["hooks"]
    assert [(kind, hook["path"]) for kind, (hook,) in declared.items()] == [
        ("prestart", HOOKS[0]),
        ("poststop", HOOKS[1]),
    ]
    unit = (addon / "tree/usr/lib/systemd/system/kata-agent.service.d/oci-vfio-hooks.conf").read_text()
    assert unit.splitlines()[-1] == f"ExecStartPre=-{declare}"


def measure(command: list[str]) -> float:
    """Return the seconds of processor time that a command takes."""
    _, code, used = os.wait4(os.posix_spawn(command[0], command, {}), 0)
    assert code == 0
    return used.ru_utime + used.ru_stime


def compare() -> None:
    """Print the ratio of pairs of bare starts, in the median: of the add-on's Python to Debian's."""
    commands = [[python, FLAGS, "-c", "pass"] for python in (PYTHON, "/usr/bin/python3")]
    rows = [[measure(command) for command in commands] for _ in range(PAIRS)]
    print(sorted(ours / debians for ours, debians in rows)[PAIRS // 2])


def test_addon_starts_as_fast_as_debians_python(addon: Path) -> None:
    """In pairs, by processor time: what else this machine does is not counted."""
    # The interpreter finds its loader and its libraries only at the place that they are made for.
    script = """
        mount -t tmpfs none /opt; mkdir /opt/oci-vfio-hooks; mount --bind "$1/opt/oci-vfio-hooks" /opt/oci-vfio-hooks
        cd "$2"; exec "$3" -c "from tests.packaging.test_addon import compare; compare()"
    """
    done = run_mounted(script, str(addon / "tree"), str(REPOSITORY), sys.executable)
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout)
    print(f"{ratio:.3f} of the time of Debian's python3")
    assert ratio <= MAX_RATIO
