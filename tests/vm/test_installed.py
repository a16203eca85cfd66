# SPDX-License-Identifier: Apache-2.0
"""The hooks as the packages install them, and nothing of the checkout: used in a fresh root of Debian 12.

apt has installed the DEBs and the runtimes into it (outside: there is no network in here). Each command runs changed
into that root, which has this machine's kernel and devices and none of its /usr, /etc or repository. What is run is
what docs/howto/install.md and examples/README.md tell a user to.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packages import Root
from tests.support.podman import CONTAINERS_CONF, make_storage_conf
from tests.vm import bundles, devices, guest
from tests.vm.bundles import PROBE, Container, Containers, Done

MACHINE = "single"
KERNELS = ("6.1", "6.12")
# The runner makes them and passes their paths.
PACKAGES = True

# Where the DEB has put them.
EXAMPLES = "/usr/share/doc/oci-vfio-hooks/examples"
HOOKS_D = "/usr/share/containers/oci/hooks.d"
DEVICES = "io.katacontainers.x.vfio.devices"
INSTALL = bundles.REPOSITORY / "docs/howto/install.md"
HOOK_LOG = bundles.BUNDLES / "hook.log"
# There is no room for images: the container's root is a directory.
STORAGE_CONF = make_storage_conf("vfs")


@pytest.fixture(scope="module")
def fresh() -> Root:
    """Return a fresh Debian 12 with the packages, and the machine's kernel and devices."""
    layers = tuple(map(Path, os.environ["OCI_VFIO_INSTALLED"].split(":")))
    changes = Path("/run/fresh")
    bundles.BUNDLES.mkdir(exist_ok=True)
    bundles.write_settings()
    for name, text in (("containers.conf", CONTAINERS_CONF), ("storage.conf", STORAGE_CONF)):
        path = changes / "top/etc/containers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # A link to where the rig keeps the kernel, which leads nowhere in there.
    modules = Path("/lib/modules", os.uname().release)
    # The settings hold a deadline for a machine that is emulated.
    shared = (bundles.BUNDLES, bundles.SETTINGS, modules)
    root = Root(layers, changes, tuple((path.resolve(), str(path)) for path in shared))
    root.run("test", "!", "-e", str(bundles.REPOSITORY))
    return root


@pytest.fixture
def image(native_drivers: None) -> Iterator[Path]:
    """Return a root file system for a container of podman."""
    bundle = bundles.BUNDLES / "image"
    yield bundles.mount_rootfs(bundle)
    subprocess.run(["umount", "--lazy", bundle / "rootfs"], check=True)
    subprocess.run(["rm", "-r", bundle], check=True)


def run(root: Root, *command: str, cwd: str = "/") -> Done:
    """Run a command that starts a container, to its end; the hook's words are in stderr under each runtime."""
    HOOK_LOG.unlink(missing_ok=True)
    done = root.run(*command, code=None, cwd=cwd, limit=bundles.LIMIT)
    return Done(done.returncode, done.stdout, done.stderr + (HOOK_LOG.read_text() if HOOK_LOG.exists() else ""))


def run_bundle(root: Root, container: Container, runtime: str) -> Done:
    """Run a container with a runtime that is installed in the root."""
    container.write_config(container.config, {"run.oci.hooks.stderr": str(HOOK_LOG)})
    return run(root, runtime, "run", "--bundle", str(container.bundle), container.name)


def read_lines(readme: Path, start: str) -> list[str]:
    """Return the commands that a README shows, from the first line with these words to the end of its block."""
    lines = readme.read_text().partition(start)[2].splitlines()[1:]
    block: list[str] = []
    for line in lines:
        if line.startswith("    "):
            block.append(line.strip())
        elif block:
            return block
    return block


def follow(root: Root, line: str, image: Path, *global_options: str) -> Done:
    """Run a README's line unchanged, in the examples' directory, on an image that is a directory with the probe."""
    words = shlex.split(line, comments=True)
    if words[0] != "podman":
        return run(root, "sh", "-ec", line, cwd=EXAMPLES)
    before = words[: words.index("IMAGE")]
    assert before[:2] == ["podman", "run"], line
    log = ["--annotation", f"run.oci.hooks.stderr={HOOK_LOG}"]
    return run(root, "podman", *global_options, *before[1:], *log, "--rootfs", str(image), *PROBE)


def check_probe(done: Done) -> None:
    """Raise AssertionError unless the probe has used the NIC, and its own driver has it again."""
    assert done.code == 0, done.stderr
    (group,) = done.read_json()["groups"]
    assert [member["id"] for member in group["devices"]] == [devices.NIC_E1000E], done.stdout
    assert guest.driver_of(guest.find_device(devices.NIC_E1000E)) == "e1000e"


def test_installed_config_json(fresh: Root, containers: Containers) -> None:
    declared = json.loads(fresh.run("cat", f"{EXAMPLES}/config.json/guest.json").stdout)
    container = containers.make(*PROBE, hooks=declared["hooks"], annotations=declared["annotations"])
    check_probe(run_bundle(fresh, container, containers.runtime))


def test_line_for_podman(fresh: Root, image: Path) -> None:
    (line,) = read_lines(INSTALL, "Podman and CRI-O now run the hooks")
    check_probe(follow(fresh, line, image))


def test_installed_podman_without_annotation(fresh: Root, image: Path) -> None:
    done = follow(fresh, "podman run IMAGE", image)
    assert done.code == 0, done.stderr
    report = done.read_json()
    assert (report["groups"], report["nodes"]) == ([], [])


def test_installed_cdi(fresh: Root, image: Path) -> None:
    install, line = read_lines(Path(f"{fresh.layers[0]}{EXAMPLES}/README.md"), "**CDI**")
    assert follow(fresh, install, image).code == 0
    # A directory without hooks, so that it must be the CDI file that brings them.
    check_probe(follow(fresh, line, image, "--hooks-dir", "/srv"))


def test_installed_check_always(fresh: Root, image: Path) -> None:
    readme = Path(f"{fresh.layers[0]}{EXAMPLES}/README.md")
    *installs, line = read_lines(readme, "**Podman and CRI-O, the check for every container**")
    for install in installs:
        assert follow(fresh, install, image).code == 0
    nic = guest.find_device(devices.NIC_E1000E)
    group = guest.group_of(nic)
    guest.bind(nic, "vfio-pci")
    guest.settle()
    held = os.open(f"/dev/vfio/{group}", os.O_RDWR)
    try:
        done = follow(fresh, line.replace("IMAGE", f"--device /dev/vfio/{group} IMAGE"), image)
    finally:
        os.close(held)
        fresh.run("rm", "-r", "/etc/containers/oci", "/etc/containers/containers.conf.d")
    assert done.code != 0
    assert "vfio-host-check: error: [group-busy]" in done.stderr, done.stderr


@pytest.mark.parametrize("containers", ["runc"], indirect=True)
def test_installed_docker_wrapper(fresh: Root, containers: Containers) -> None:
    install, _ = read_lines(Path(f"{fresh.layers[0]}{EXAMPLES}/README.md"), "**Docker**")
    fresh.run("sh", "-ec", install, cwd=EXAMPLES)
    container = containers.make(*PROBE, hooks={}, annotations={DEVICES: "auto"})
    check_probe(run_bundle(fresh, container, "/usr/local/sbin/vfio-runc"))


@pytest.mark.parametrize("containers", ["crun"], indirect=True)
def test_installed_replay_tool(fresh: Root, containers: Containers) -> None:
    declared = json.loads(fresh.run("cat", f"{EXAMPLES}/config.json/guest.json").stdout)
    container = containers.make(*PROBE, hooks=declared["hooks"], annotations={DEVICES: "0000:00:00.0"})
    done = run_bundle(fresh, container, "crun")
    assert done.code != 0
    output = re.search(r"vfio-guest-bind: error: \[([a-z-]+)\]", done.stderr)
    assert output, done.stderr
    reported = fresh.run("vfio-hook-replay", "explain").stdout
    assert output.group(1) in reported
    assert "0000:00:00.0" in reported


def test_installed_host_check_by_hand(fresh: Root) -> None:
    (line,) = [line for line in read_lines(INSTALL, "for the check:") if "--all" in line]
    done = fresh.run("sh", "-c", f"{line} --json", code=None, limit=bundles.LIMIT)
    nic = guest.find_device(devices.NIC_E1000E)
    found = [member["name"] for group in json.loads(done.stdout)["groups"] for member in group["members"]]
    assert nic in found, done.stdout
