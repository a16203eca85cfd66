# SPDX-License-Identifier: Apache-2.0
"""docs/howto/install.md where not even Python is: each way on a machine of its own, and both hooks used there.

`packaging/build` on the first, its DEBs on a second, pip on a third. The other lines:
tests/packaging/test_install_page.py.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass

import pytest

from oci_hooks import __version__
from tests.newcomer import lines
from tests.newcomer.bare import CLONE, Bare
from tests.newcomer.conftest import MakeBare
from tests.provision import REPOSITORY

LIMIT = 900.0
HOOKS = ("vfio-host-check", "vfio-guest-bind")
RECORDS = f"{CLONE}/tests/data/records"
# A record of each hook, of a run that failed, and the code that it failed with.
RECORDED = {"vfio-host-check": ("host-iommu-off", "iommu-off"), "vfio-guest-bind": ("guest-in-use", "in-use")}
# What a run of the clone's own programs left in it is no part of a test.
DIST = f"{CLONE}/dist"


def find_lines(*beginnings: str) -> list[str]:
    """Return the lines of the page that begin with one of these, in order."""
    found = [line for line in lines.read_install_lines() if line.startswith(beginnings)]
    assert {begin for begin in beginnings for line in found if line.startswith(begin)} == set(beginnings)
    return found


@pytest.fixture(name="built", scope="module")
def build(machines: MakeBare) -> Bare:
    """Run the page's line that builds the packages on a machine that has nothing."""
    machine = machines("bare")
    (line,) = find_lines("packaging/build")
    machine.run("sh", "-c", line, limit=LIMIT)
    machine.keep_archives()
    return machine


def test_build_needs_exactly_the_packages_in_control(built: Bare) -> None:
    """dpkg is content with debian/control's own build dependencies; its usual compilers are not needed."""
    built.run("dpkg-checkbuilddeps", "-I", "packaging/debian/control")
    built.run("dpkg-query", "-s", "build-essential", code=1)
    names = built.run("ls", "dist").stdout.split()
    packages = {"oci-vfio-hooks", "oci-vfio-hooks-guest", "oci-vfio-hooks-nri", "python3-oci-vfio-hooks"}
    assert {name.split("_")[0] for name in names if name.endswith(".deb")} == packages
    assert {name.rpartition("-0")[0] for name in names if name.endswith(".noarch.rpm")} == packages


@dataclass(frozen=True)
class Installed:
    """A machine with the DEBs. before: its files without them."""

    machine: Bare
    before: set[str]


@pytest.fixture(name="installed", scope="module")
def install(built: Bare, machines: MakeBare) -> Installed:
    """Run the page's lines that install the DEBs, without what they recommend, on a machine that has nothing else."""
    machine = machines("bare")
    shutil.copytree(built.changes / f"top{DIST}", machine.changes / f"top{DIST}")
    before = list_files(machine)
    for line in find_lines("apt update && apt install ./dist"):
        machine.run("sh", "-c", answer_apt(line), limit=LIMIT)
    return Installed(machine, before)


def answer_apt(line: str) -> str:
    """Return a line with apt's question answered, and without recommended packages."""
    return line.replace("apt install", "apt install -y --no-install-recommends").replace("apt purge", "apt purge -y")


def test_debs_install_and_run(installed: Installed) -> None:
    machine = installed.machine
    assert len(find_lines("apt update && apt install ./dist")) == 2
    for line in find_lines("vfio-guest-bind"):
        machine.run("sh", "-c", line)
    # None of what the packages recommend is there: a hook needs nothing but the interpreter's own library.
    for library in ("jsonschema", "pyudev", "tenacity"):
        machine.run("python3", "-I", "-c", f"import {library}", code=1)
    use_hooks(machine, "/usr/bin")
    lacking = call(machine, f"/usr/bin/vfio-hook-replay run {RECORDS}/guest-in-use.tar.gz", 2)
    assert "apt install python3-jsonschema" in lacking
    machine.run("apt", "install", "-y", "--no-install-recommends", "python3-jsonschema", limit=LIMIT)
    use_tool(machine, "/usr/bin")


# The wrapper for a line of the documents, and its exit code: there is no IOMMU here, and each line reports that.
BUNDLE = "/root/d"
DOCUMENTED = {
    "vfio-guest-bind --dry-run --bundle /path/to/bundle": 1,
    "vfio-guest-bind --all": 1,
    "vfio-host-check --bundle /path/to/bundle": 1,
    "vfio-host-check --bundle DIR": 1,
    "vfio-host-check --all": 1,
    "vfio-host-check --all --json": 1,
    "vfio-host-check --all --format nfd": 1,
    "vfio-host-check --all --format npd": 1,
    "vfio-host-check --group 12": 1,
    "vfio-hook-replay list": 0,
    "vfio-hook-replay explain": 0,
    "vfio-hook-replay show": 0,
    'mkdir -p "$ROOTFS_DIR/etc/oci-vfio-hooks"': 0,
    'echo \'on_failure = "kill"\' > "$ROOTFS_DIR/etc/oci-vfio-hooks/guest.toml"': 0,
}


def test_documented_commands_run(installed: Installed) -> None:
    """As they are written, with a bundle in place of the path."""
    shown = {lines.strip_remark(line.text) for path in lines.list_documents() for line in lines.read_lines(path)}
    machine = installed.machine
    machine.run("sh", "-c", prepare("vfio-guest-bind"))
    # A run that leaves a recording, for the tool to print.
    call(machine, f"examples/replay/replay-state {BUNDLE} /usr/bin/vfio-guest-bind", 1)
    for line, code in DOCUMENTED.items():
        assert line in shown
        if line.startswith("vfio-host-check --bundle"):
            # A bundle on which the check reports something.
            machine.run("sh", "-c", prepare("vfio-host-check"))
        typed = line.replace("/path/to/bundle", BUNDLE).replace("DIR", BUNDLE) if "ROOTFS" not in line else line
        done = machine.run("sh", "-c", typed, code=code, ROOTFS_DIR="/root/image")
        assert "Traceback" not in done.stderr
        assert "bad-arguments" not in done.stderr + done.stdout
    machine.run("vfio-guest-bind", "--settings", "/root/image/etc/oci-vfio-hooks/guest.toml", "--version")


def test_documented_example_commands_run(installed: Installed) -> None:
    """In the directory where the package has them, as in the README."""
    location = "/usr/share/doc/oci-vfio-hooks/examples"
    for document, directory in (("README.md", location), ("kubernetes/README.md", f"{location}/kubernetes")):
        for line in lines.read_lines(REPOSITORY / "examples" / document):
            if line.text.startswith("install ") and "/etc/docker/" not in line.text and "detector" not in line.text:
                installed.machine.run("sh", "-ec", f"mkdir -p /etc/systemd/system; cd {directory}\n{line.text}")
    installed.machine.run("test", "-x", "/usr/local/sbin/vfio-labels")


def test_purge_leaves_nothing(installed: Installed) -> None:
    """Files that the lines above created belong to the user, who removes them first."""
    machine = installed.machine
    made = (
        "/etc/containers /etc/containerd /etc/cdi /etc/systemd/system/vfio-* /usr/local/sbin/vfio-* /etc/oci-vfio-hooks"
    )
    (line,) = find_lines("apt purge")
    machine.run("sh", "-ec", f"rm -rf {made}; {answer_apt(line)}")
    left = {name for name in list_files(machine) - installed.before if re.search(r"vfio|oci[-_]hooks", name)}
    assert left == set()


def test_pip_install_into_virtual_environment(machines: MakeBare) -> None:
    machine = machines("bare")
    for line in find_lines("apt update && apt install python3-venv", "python3 -m venv", "/opt/oci-vfio-hooks/bin/pip"):
        machine.run("sh", "-c", answer_apt(line), limit=LIMIT)
    machine.keep_archives()
    use_tool(machine, "/opt/oci-vfio-hooks/bin")
    use_hooks(machine, "/opt/oci-vfio-hooks/bin")


def test_hooks_python_minimal_reported(machines: MakeBare) -> None:
    """python3-minimal has an interpreter, and not what the hooks import: no defect of theirs, and no traceback."""
    machine = machines("bare-python")
    for hook in HOOKS:
        output = call(machine, f"echo '{{}}' | hooks/{hook}", 1)
        assert re.match(rf"{hook}: error: \[internal\] .*'json'; Python's standard library is incomplete", output), (
            output
        )
        assert output.count("\n") == 1
    output = call(machine, "hooks/vfio-hook-replay list", 1)
    assert re.fullmatch(
        r"vfio-hook-replay: No module named '\w+'; install Python with its whole library.*\n", output
    ), output


def list_files(machine: Bare) -> set[str]:
    """Return the paths of all files of a machine, but of its user's and what a running system makes."""
    return set(machine.run("find", "/", "-xdev", "-path", "/root", "-prune", "-o", "-print").stdout.splitlines())


def use_hooks(machine: Bare, place: str) -> None:
    """Run both hooks of a location: version, settings good and bad, a state that is none, and what others recorded."""
    for hook in HOOKS:
        assert machine.run(f"{place}/{hook}", "--version").stdout == f"{hook} {__version__}\n"
        output = call(machine, f"echo '{{}}' | {place}/{hook}", 2)
        assert re.match(rf"{hook}: error: \[bad-state\] ", output), output
        use_record(machine, place, hook)
    # The settings of the examples, each key in use.
    machine.run("sh", "-ec", "mkdir -p /etc/oci-vfio-hooks; cp examples/settings/*.toml /etc/oci-vfio-hooks/")
    machine.run("sed", "-i", r"s/^#\([a-z_[]\)/\1/", "/etc/oci-vfio-hooks/host.toml", "/etc/oci-vfio-hooks/guest.toml")
    for hook, side in zip(HOOKS, ("host", "guest")):
        use_record(machine, place, hook)
        script = f"echo 'dedline = 3' >/root/bad.toml; {prepare(hook)} {place}/{hook} --settings /root/bad.toml"
        options = "--dry-run" if side == "guest" else ""
        output = call(machine, f"{script} --bundle /root/d {options}", 2)
        assert "dedline" in output
        assert re.search(rf"{hook}: error: \[bad-settings\] ", output), f"{side}: {output}"
    machine.run("rm", "-r", "/etc/oci-vfio-hooks")


def prepare(hook: str) -> str:
    """Return the shell's line that takes state and config.json out of a hook's record, as examples/replay has it."""
    record = f"{RECORDS}/{RECORDED[hook][0]}.tar.gz"
    return f"mkdir -p /root/d; tar -xzf {record} -C /root/d state.json config.json;"


def use_tool(machine: Bare, place: str) -> None:
    """Run the hooks' code again on the machines that were recorded."""
    for name, code in RECORDED.values():
        assert f"[{code}]" in machine.run(f"{place}/vfio-hook-replay", "run", f"{RECORDS}/{name}.tar.gz").stdout


def use_record(machine: Bare, place: str, hook: str) -> None:
    """Run a hook with a recorded state on this machine, where no device is."""
    options = "--dry-run" if hook == "vfio-guest-bind" else ""
    output = call(machine, f"{prepare(hook)} examples/replay/replay-state /root/d {place}/{hook} {options}", 1)
    assert re.search(rf"{hook}: error: \[[a-z-]+\] ", output), output
    assert "settings" not in output


def call(machine: Bare, script: str, code: int) -> str:
    """Run a line of the shell and return what it wrote to standard error; no traceback is ever among it."""
    output = machine.run("sh", "-c", script, code=code).stderr
    assert "Traceback" not in output
    return output
