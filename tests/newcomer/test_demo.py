# SPDX-License-Identifier: Apache-2.0
"""The demo where only python3-minimal is: README's line, a second run, Ctrl-C, what it lacks."""

from __future__ import annotations

import json
import os
import re
import selectors
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass

import pytest

from tests import provision
from tests.newcomer import lines
from tests.newcomer.bare import Bare, Done
from tests.newcomer.conftest import MakeBare
from tests.newcomer.programs import PROGRAMS, find_unnamed
from tests.support.rig_starvation import PROC, find_family

DEMO = "examples/demo"
# Seconds that a demo has here: six times what it takes on a quiet machine.
DEMO_LIMIT = 900.0
# On a terminal there is never silence for longer.
SILENCE = 5.0
ROW = re.compile(r"^(runc|crun) +(\S.*?) {2,}(\S.*?) +(yes|NO)$", re.MULTILINE)
CASES = ["(a) no hook", "(b) with vfio-guest-bind", "after its end", "(c) check: not viable", "(c) check: good"]
# What a run may leave: nothing below /tmp, nothing mounted, no process.
LOOK = r"""
for link in /proc/[0-9]*/exe; do
    pid=${link#/proc/}; pid=${pid%/exe}
    case $(readlink "$link") in
    *qemu*|*python3*) echo "process $pid: $(tr '\0' ' ' </proc/$pid/cmdline)" ;;
    esac
done
ls -A /tmp | sed 's/^/temporary: /'
find /root/.cache -name '*.partial' | sed 's/^/partial: /'
cut -d' ' -f2 /proc/mounts | grep -v -e '^/dev' -e '^/sys' -e '^/proc$' -e '^/$' | sed 's/^/mount: /'
"""


@dataclass(frozen=True)
class Tried:
    """A machine, and what README's line did there the first time."""

    machine: Bare
    first: Done


@pytest.fixture(name="tried", scope="module")
def run_first_time(machines: MakeBare) -> Tried:
    """Run README's line of the demo on a machine that has nothing."""
    machine = machines("bare-python")
    line = next(line for line in lines.read_section("Try it") if line.startswith(DEMO))
    done = machine.run("sh", "-c", line, limit=DEMO_LIMIT, code=None)
    machine.keep_archives()
    return Tried(machine, done)


def test_demo_every_row_as_expected(tried: Tried) -> None:
    rows = ROW.findall(tried.first.stdout)
    assert [(row[0], row[1]) for row in rows] == [(name, case) for name in ("runc", "crun") for case in CASES]
    assert [row for row in rows if row[3] != "yes"] == [], tried.first.quote()
    assert tried.first.code == 0, tried.first.quote()


def test_demo_lists_packages_before_install(tried: Tried) -> None:
    """It shows number and size of the packages, further installs, the log's path, and each step with its seconds."""
    out = tried.first.stdout
    sizes = re.search(r"installing (\d+) Debian packages \((\S+ \S?B) to load, (\S+ \S?B) on disk\)", out)
    assert sizes, tried.first.quote()
    assert out.index(sizes[0]) < out.index("packages: done in")
    assert "apt installs, 600 MB" in out
    for step in ("packages", "kernel 6.1", "root file system", "virtual environment rig", "virtual machine"):
        assert re.search(rf"^  {step}: done in \d+ s$", out, re.MULTILINE), step
    log = re.search(r"(/root/.cache/oci-vfio-hooks/demo\.log)", out)
    assert log
    text = (tried.machine.changes / "top" / log[1][1:]).read_text(errors="replace")
    assert "$ apt-get install" in text
    assert "as it should be" in text
    assert "examples/demo crun b" in out


def test_demo_programs_belong_to_named_packages(tried: Tried) -> None:
    """A package that is left out of the list, but comes with another one today, is missed here."""
    assert find_unnamed(provision.RIG_PACKAGES) == []
    owners = tried.machine.run("dpkg-query", "-S", *PROGRAMS, code=None).stdout
    for program, package in PROGRAMS.items():
        # python3.11-venv has the files, python3-venv is what follows Debian's own version.
        owner = "python3.11-venv" if package == "python3-venv" else package
        assert re.search(rf"^{re.escape(owner)}: {re.escape(program)}$", owners, re.MULTILINE), f"{program}: {owners}"
    # None of them was there before: whoever needs it has to name it.
    assert [name for name in PROGRAMS for layer in tried.machine.layers if os.path.lexists(f"{layer}{name}")] == []


def test_demo_second_run_installs_nothing_keeps_output(tried: Tried) -> None:
    """On a terminal, with the rows as JSON: nothing else is on standard output."""
    script = f"{DEMO} --json crun b >/root/rows.json"
    started = time.monotonic()
    with tried.machine.start("script", "-qefc", script, "/dev/null") as process:
        output, silence = watch(process, DEMO_LIMIT)
    assert process.returncode == 0, output[-3000:]
    rows = json.loads((tried.machine.changes / "top/root/rows.json").read_text())
    assert [(row["runtime"], row["case"], row["right"]) for row in rows] == [
        ("crun", case, True) for case in CASES[1:3]
    ]
    assert "installing" not in output
    assert "making" not in output
    assert time.monotonic() - started < tried.first.seconds
    assert silence < SILENCE
    assert "... virtual machine" in output


def watch(process: subprocess.Popen[str], limit: float) -> tuple[str, float]:
    """Return what a process prints until it ends, and the longest time for which it printed nothing (seconds)."""
    assert process.stdout is not None
    output, silence = b"", 0.0
    heard = started = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() - started < limit:
            if not selector.select(timeout=1.0):
                continue
            data = os.read(process.stdout.fileno(), 65536)
            silence, heard = max(silence, time.monotonic() - heard), time.monotonic()
            if not data:
                process.wait(timeout=60)
                return output.decode(errors="replace"), silence
            output += data
    process.kill()
    raise AssertionError(f"did not end in {limit:.0f} s: {output[-3000:]!r}")


def test_demo_sigint_leaves_nothing(tried: Tried) -> None:
    """While the machine boots: the process group gets SIGINT, as from a terminal."""
    script = f"trap : INT; {DEMO}; echo code $?; {LOOK}"
    process = tried.machine.start("sh", "-c", script)
    try:
        output = wait_for(process, "booting")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert out.strip().splitlines()[-1] == "code 130", output + out + err
    assert "demo: interrupted" in err
    assert "Traceback" not in err


def wait_for(process: subprocess.Popen[str], word: str) -> str:
    """Return what a process prints up to a line with this word, and wait until QEMU runs below it."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if word in line:
            break
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any("qemu-system" in read_program(pid) for pid in find_family(process.pid, PROC)):
            return output
        time.sleep(0.5)
    raise AssertionError(f"no virtual machine was started: {output}")


def read_program(pid: int) -> str:
    """Return a process's command line; empty when it has ended."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def refuse(machine: Bare, before: str, command: str = DEMO) -> str:
    """Return the one line that the demo prints where it can't run. before: the shell's lines that make it so."""
    script = f"{before}\nexec {command}"
    done = machine.run("unshare", "--mount", "sh", "-ec", script, limit=300, code=2)
    output = [line for line in done.stderr.splitlines() if line]
    assert len(output) == 1, done.quote()
    assert done.stdout == ""
    return output[0]


def test_demo_without_qemu_for_architecture(tried: Tried) -> None:
    """The package is there, its program isn't; and a machine of another kind."""
    output = refuse(tried.machine, "mount --bind /dev/null /usr/bin/qemu-system-x86_64")
    assert output.startswith("demo: qemu-system-x86_64 is not there: apt-get install")
    output = refuse(tried.machine, "", f"setarch i686 {DEMO}")
    assert output.startswith("demo: this machine is i686")


def test_demo_without_root(tried: Tried) -> None:
    user = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "env", "HOME=/tmp/home"]
    output = refuse(tried.machine, "chmod 0755 /root", shlex.join([*user, DEMO]))
    assert output == "demo: needs root, for apt and for the virtual machine's process namespace: sudo examples/demo"


def test_demo_without_disk_space(tried: Tried) -> None:
    """A cache that is empty, on a file system of 64 MiB."""
    output = refuse(tried.machine, "mount -t tmpfs -o size=64m none /root/.cache")
    assert re.fullmatch(
        r"demo: /root/.cache/oci-vfio-hooks has 6\d MiB free: 2048 MiB are needed the first time", output
    )


def test_demo_without_apt(machines: MakeBare) -> None:
    """With a Python that is too small, which is met before anything runs in it, and with the whole one."""
    machine = machines("bare-python")
    hide = "mount --bind /dev/null /usr/bin/apt-get"
    assert refuse(machine, hide).startswith("demo: there is no apt-get here to install Python with")
    user = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", DEMO]
    output = refuse(machine, "chmod 0755 /root", shlex.join(user))
    assert (
        output
        == "demo: Python's library is missing; install it as root: apt-get install --no-install-recommends python3"
    )
    machine.run("sh", "-ec", "apt-get update -q; apt-get install -y -q --no-install-recommends python3")
    assert refuse(machine, hide).startswith("demo: there is no apt-get here: install qemu-system-x86, busybox-static")
