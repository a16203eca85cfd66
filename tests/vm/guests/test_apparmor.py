# SPDX-License-Identifier: Apache-2.0
"""AppArmor, as Debian's kernel has it unasked: containers under a profile, and the hook under one of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers, Done
from tests.vm.guests import units
from tests.vm.guests.test_systemd import INSTALLED_HOOK, PRIVILEGES

MACHINE = "systemd"
KERNELS = ("6.1",)
# What engines give their containers by default: everything but mounts, the kernel's settings and other processes.
CONTAINER = """
profile container-{name} flags=(attach_disconnected,mediate_deleted) {{
  network,
  capability,
  file,
  umount,
  signal,
  ptrace (trace,read) peer=container-{name},
  deny mount,
  deny @{{PROC}}/sys/kernel/** w,
  deny /sys/kernel/security/** rwklx,
  {more}
}}
"""
TUNABLES = "#include <tunables/global>\n"


@pytest.fixture(autouse=True)
def have_apparmor() -> None:
    """Look whether there is an AppArmor that enforces anything."""
    assert Path("/sys/module/apparmor/parameters/enabled").read_text() == "Y\n"


def load_profile(text: str) -> None:
    """Load a profile into the kernel, in place of one of its name."""
    done = units.run("apparmor_parser", "--replace", "--skip-cache", text=TUNABLES + text)
    assert done.code == 0, done.stderr


@pytest.fixture(name="nic")
def find_nic(native_drivers: None) -> str:
    """Return the address of the machine's NIC, which goes back to its driver afterwards."""
    return guest.find_device(devices.NIC_E1000E)


def confine(profile: str) -> dict[str, object]:
    """Return what config.json needs for a container under a profile."""
    return {"process": {"apparmorProfile": profile}}


def test_apparmor_container_opens_its_nodes(containers: Containers, nic: str) -> None:
    load_profile(CONTAINER.format(name="usual", more=""))
    confined = confine("container-usual")
    assert containers.run("/bin/cat", "/proc/self/attr/current", edit=confined).stdout == "container-usual (enforce)\n"
    done = containers.probe(annotations=ask(nic), edit=confined)
    assert done.code == 0, done.stderr
    (group,) = done.read_json()["groups"]
    assert group["devices"][0]["read_id"] == "ok", group


@one_runtime
def test_apparmor_container_under_a_profile_without_vfio(containers: Containers, nic: str) -> None:
    """The hook opens the nodes in the container's cgroup, not under its profile: the container finds out."""
    load_profile(CONTAINER.format(name="without", more="deny /dev/vfio/** rwklx,"))
    done = containers.probe(annotations=ask(nic), edit=confine("container-without"))
    assert done.code == 0, done.stderr
    print(done.stdout)
    (group,) = done.read_json()["groups"]
    assert group["open"] == "EACCES"


@pytest.fixture(name="own_profile")
def load_own_profile() -> Iterator[str]:
    """Return the name of the profile in docs/reference/privileges.md, which is loaded."""
    part = PRIVILEGES.read_text().split("\n### An AppArmor profile for the guest hook\n", 1)[1].split("\n#", 1)[0]
    lines = [line[4:] for line in part.splitlines() if line.startswith("    ")]
    load_profile("\n".join([*lines, ""]))
    yield lines[0].split()[1]
    units.run("apparmor_parser", "--remove", text=TUNABLES + "\n".join(lines))


@one_runtime
@pytest.mark.parametrize("options", [{}, {"user": 1000}, {"user_namespace": 100000}], ids=["root", "user", "userns"])
def test_apparmor_own_profile_suffices(
    containers: Containers, nic: str, own_profile: str, options: dict[str, int]
) -> None:
    """The hook under the page's profile binds and releases."""
    _, state = guest_calls.make_created(containers, annotations=ask(nic), **options)
    command = ["aa-exec", f"--profile={own_profile}", "--", INSTALLED_HOOK]
    subprocess.run(["dmesg", "--clear"], check=True)
    done = units.run(*command, text=json.dumps(state))
    denied = [line for line in guest.read_kernel_log().splitlines() if 'apparmor="DENIED"' in line]
    print("\n".join(denied))
    assert done == Done(0, "", "")
    assert guest.driver_of(nic) == "vfio-pci"
    guest_calls.forget_success(str(state["id"]))
    done = units.run(*command, "poststop", text=json.dumps({**state, "status": "stopped"}))
    assert done == Done(0, "", "")
    assert guest.driver_of(nic) == "e1000e"
    assert denied == []


@one_runtime
def test_apparmor_own_profile_confines(containers: Containers, nic: str, own_profile: str) -> None:
    """It does confine: a shell under it can write nowhere else, and reads no user's files."""
    Path("/root/secret").write_text("secret")
    for words in ("cat /root/secret", "echo x >/etc/x", "echo x >/usr/bin/x", "echo 1 >/proc/sys/kernel/panic"):
        done = units.run("aa-exec", f"--profile={own_profile}", "--", "/usr/bin/python3", "-c", make_attempt(words))
        assert done.stdout.strip() == "PermissionError", (words, done)
    assert bundles.SETTINGS.is_dir()


def make_attempt(words: str) -> str:
    """Return a line of Python for `cat FILE` or `echo TEXT >FILE` that prints the name of the error."""
    path = words.rsplit(maxsplit=1)[-1].lstrip(">")
    mode = "r" if words.startswith("cat") else "a"
    return f"try:\n open({path!r}, {mode!r})\n print('opened')\nexcept OSError as e:\n print(type(e).__name__)"
