# SPDX-License-Identifier: Apache-2.0
"""A Debian that systemd booted, with our DEBs: the units that they bring, and the hook in a service with little."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nri.peer import Peer
from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import bundles, devices, guest
from tests.vm.bundles import Containers, Done
from tests.vm.guests import units
from tests.vm.guests.units import run_service, show, systemctl, wait_until

MACHINE = "systemd"
KERNELS = ("6.1",)
PRIVILEGES = bundles.REPOSITORY / "docs/reference/privileges.md"
SHIPPED = sorted(path.name for path in (bundles.REPOSITORY / "packaging/systemd").iterdir())
SPECIFICATION = Path("/run/cdi/oci-vfio-hooks.yaml")
CDI = "oci-vfio-cdi"
MISSING = {"path": "/dev/vfio/4000", "type": "c", "major": 511, "minor": 4000}
INSTALLED_HOOK = "/usr/libexec/oci/hooks.d/vfio-guest-bind"


@pytest.fixture(name="nic")
def find_nic(native_drivers: None) -> str:
    """Return the address of the machine's NIC, which goes back to its driver afterwards."""
    return guest.find_device(devices.NIC_E1000E)


@pytest.fixture(autouse=True)
def stop_units() -> Iterator[None]:
    """Leave nothing of a test running."""
    yield
    systemctl("stop", *SHIPPED)
    units.run("systemctl", "reset-failed")
    SPECIFICATION.unlink(missing_ok=True)


def test_systemd_booted() -> None:
    """The drivers are loaded by modules-load.d before anything asks for them, and no unit has failed."""
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    assert systemctl("is-active", "multi-user.target", "systemd-modules-load.service") == "active\nactive"
    assert Path("/sys/module/vfio_pci").is_dir()
    assert Path("/sys/module/vfio_iommu_type1").is_dir()
    assert units.run("systemctl", "--failed", "--plain", "--no-legend").stdout == ""


# The units ------------------------------------------------------------------------------------------------------------


def test_systemd_verifies_units() -> None:
    """Nothing in a unit is unknown to systemd; no manual page is missing, and no program. None is enabled."""
    done = units.run("systemd-analyze", "verify", "--man=no", *SHIPPED)
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    states = units.run("systemctl", "is-enabled", *SHIPPED).stdout.split()
    assert set(states) <= {"disabled", "static"}
    enabled = [name for name in SHIPPED if name != f"{CDI}.service"]
    systemctl("enable", *enabled)
    systemctl("disable", *enabled)


def test_systemd_path_unit_renews_specification(nic: str) -> None:
    """A node that comes brings the device into the specification; one that goes makes the service fail, in words."""
    systemctl("start", f"{CDI}.path")
    assert not SPECIFICATION.exists()
    guest.bind(nic, "vfio-pci")
    wait_until(lambda: SPECIFICATION.exists() and nic in SPECIFICATION.read_text(), "a specification with the NIC")
    assert SPECIFICATION.stat().st_mode & 0o777 == 0o644
    wait_until(lambda: show(f"{CDI}.service", "ActiveState") == "inactive", "the service's end")
    assert show(f"{CDI}.service", "Result") == "success"
    guest.bind_native(nic)
    wait_until(lambda: show(f"{CDI}.service", "ActiveState") == "failed", "the service's failure")
    assert "vfio-host-check: error: [" in units.read_journal(f"{CDI}.service")
    assert nic in SPECIFICATION.read_text()


@pytest.fixture(name="quick")
def make_quick_service() -> Iterator[None]:
    """Have the service do nothing, as fast as on a machine that is not emulated."""
    place = Path(f"/run/systemd/system/{CDI}.service.d")
    place.mkdir()
    (place / "quick.conf").write_text("[Service]\nExecStart=\nExecStart=/bin/true\n")
    systemctl("daemon-reload")
    yield
    (place / "quick.conf").unlink()
    place.rmdir()
    systemctl("daemon-reload")


@pytest.mark.usefixtures("quick")
def test_systemd_path_unit_outlives_many_changes(nic: str) -> None:
    """More changes than systemd's limit for starts in ten seconds: the path unit still waits for the next one."""
    systemctl("start", f"{CDI}.path")
    script = f"for _ in 1 2 3 4 5 6 7 8; do systemctl start {CDI}.service || exit 1; done"
    done = units.run("sh", "-c", script)
    assert done.code == 0, done
    before = show(f"{CDI}.service", "ExecMainStartTimestampMonotonic")
    guest.bind(nic, "vfio-pci")
    wait_until(lambda: show(f"{CDI}.service", "ExecMainStartTimestampMonotonic") != before, "one more start")
    assert show(f"{CDI}.path", "ActiveState") == "active"


def test_systemd_timer_renews_specification(nic: str) -> None:
    """Half a minute after boot has passed: starting the timer starts the service, and it comes again."""
    guest.bind(nic, "vfio-pci")
    systemctl("start", f"{CDI}.timer")
    wait_until(SPECIFICATION.exists, "a specification by the timer")
    wait_until(lambda: show(f"{CDI}.timer", "NextElapseUSecMonotonic") not in ("", "infinity"), "the next time")


def test_systemd_service_takes_options(nic: str) -> None:
    """What /etc/default has is several words of the command line."""
    guest.bind(nic, "vfio-pci")
    defaults = Path("/etc/default/oci-vfio-cdi")
    defaults.write_text("CDI_OPTIONS=--select=class:0200 --select=id:8086:10d3\n")
    try:
        systemctl("start", f"{CDI}.service")
        assert nic in SPECIFICATION.read_text()
        defaults.write_text("CDI_OPTIONS=--select=class:0300\n")
        assert units.run("systemctl", "start", f"{CDI}.service").code != 0
    finally:
        defaults.unlink()


def test_systemd_nri_service(nic: str) -> None:
    """The genuine package's side of NRI takes the plugin, which finds a good group good, and is back when killed."""
    guest.bind(nic, "vfio-pci")
    Path("/run/nri").mkdir(exist_ok=True)
    # Before there is a socket, it is tried again and again.
    systemctl("start", "vfio-nri.service")
    wait_until(lambda: show("vfio-nri.service", "SubState") == "auto-restart", "the first try")
    assert "vfio-nri: error: [" in units.read_journal("vfio-nri.service")
    peer = Peer(Path(os.environ["OCI_VFIO_NRI_PEER"]), Path("/run/nri/nri.sock"))
    try:
        for _ in range(2):
            assert peer.wait_for("synchronized")["synchronized"] is True
            group = guest.group_of(nic)
            wait_until(lambda: "[group-missing]" in ask_peer(peer, MISSING), "a veto")
            major, minor = guest.numbers_of_group(group)
            assert ask_peer(peer, {"path": f"/dev/vfio/{group}", "type": "c", "major": major, "minor": minor}) == ""
            systemctl("kill", "--signal=KILL", "vfio-nri.service")
    finally:
        peer.close()


def ask_peer(peer: Peer, device: dict[str, object]) -> str:
    """Return the plugin's veto of a container with a device, "" for none."""
    container = {"id": "c1", "pod_sandbox_id": "p1", "name": "n", "linux": {"devices": [device]}}
    return str(peer.create({"id": "p1"}, container)["error"])


# The hook in a service ------------------------------------------------------------------------------------------------


def read_block(title: str) -> list[str]:
    """Return the lines of the indented block below a heading of docs/reference/privileges.md."""
    part = PRIVILEGES.read_text().split(f"\n### {title}\n", 1)[1].split("\n#", 1)[0]
    return [line.strip() for line in part.splitlines() if line.startswith("    ")]


def list_restrictions() -> list[str]:
    """Return the settings of a service that the page has, with its lists of capabilities and system calls."""
    capabilities = " ".join(read_block("Guest hook"))
    calls = " ".join(read_block("System calls of the guest hook"))
    listed = read_block("A service with little more than the hook needs")
    return [*listed, f"CapabilityBoundingSet={capabilities}", f"SystemCallFilter={calls}"]


@one_runtime
def test_systemd_restricted_service_binds_and_releases(containers: Containers, nic: str) -> None:
    """The settings in docs/reference/privileges.md are enough, in a system that systemd restricts itself."""
    container, state = guest_calls.make_created(containers, annotations=ask(nic))
    restrictions = list_restrictions()
    assert run_service([INSTALLED_HOOK], *restrictions, text=json.dumps(state)) == Done(0, "", "")
    assert guest.driver_of(nic) == "vfio-pci"
    assert guest_calls.list_dev(container) == [guest.group_of(nic), "devices.json", "vfio"]
    stopped = json.dumps({**state, "status": "stopped"})
    guest_calls.forget_success(str(state["id"]))
    assert run_service([INSTALLED_HOOK, "poststop"], *restrictions, text=stopped) == Done(0, "", "")
    assert guest.driver_of(nic) == "e1000e"


# Which containers a setting is too much for.
FORBIDDEN: dict[str, dict[str, Any]] = {
    "PrivateDevices=yes": {},
    "ProtectKernelTunables=yes": {},
    "ProtectControlGroups=yes": {},
    "RestrictNamespaces=yes": {"user_namespace": 100000},
    "ProtectSystem=strict": {},
}


@one_runtime
@pytest.mark.parametrize("setting", FORBIDDEN)
def test_systemd_setting_too_many_is_refused(containers: Containers, nic: str, setting: str) -> None:
    """With a setting that the page forbids, the hook refuses, in words; the device is as it was."""
    _, state = guest_calls.make_created(containers, annotations=ask(nic), **FORBIDDEN[setting])
    done = run_service([INSTALLED_HOOK], setting, text=json.dumps(state))
    print(setting, done)
    assert done.code == 1
    assert guest_calls.list_findings(done)
    assert guest.driver_of(nic) == "e1000e"


def test_systemd_scope_keeps_permission(nic: str, tmp_path: Path) -> None:
    """podman as it is by default, with the hooks.d file of the DEB: systemd itself manages the container's cgroup.

    systemd sets a device filter of its own. What it sets anew, at a reload or a change of the scope's settings, must
    not take away what the hook has allowed.
    """
    root = bundles.mount_rootfs(tmp_path / "podman")
    command = ["podman", "run", "--detach", "--name=web", "--network=none", "--ulimit=memlock=-1:-1"]
    command += [f"--annotation={guest_calls.DEVICES}={nic}", "--rootfs", str(root), "/bin/sleep", "600"]
    try:
        done = units.run(*command)
        assert done.code == 0, done
        probe = shlex.join(["podman", "exec", "web", *bundles.PROBE])
        for change in ("true", "systemctl daemon-reload", "systemctl set-property --runtime {} TasksMax=500"):
            inspected = units.run("podman", "inspect", "--format={{.State.CgroupPath}}", "web").stdout
            scope = re.search(r"libpod-\w+\.scope", inspected)
            assert scope, inspected
            assert units.run("sh", "-c", change.format(scope[0])).code == 0
            found = units.run("sh", "-c", probe)
            (group,) = found.read_json()["groups"]
            assert group["open"] == "ok", (change, group)
    finally:
        units.run("podman", "rm", "--force", "--time=0", "web")
        units.run("umount", "--lazy", str(root))
    wait_until(lambda: guest.driver_of(nic) == "e1000e", "the release")
