# SPDX-License-Identifier: Apache-2.0
"""The host of the chain, the rig's machine "chain": its NICs, Kata's configuration, bundles that ask for NICs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chain.innervm import HUGEPAGES
from tests.vm import bundles, devices, guest

CONFIGURATION = Path("/etc/kata-containers/configuration.toml")
# Without vfio_mode, as Kata 1.x has it: who asks for VFIO devices wants them as such.
CONFIGURATION_TEXT = """\
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
machine_type = "q35"
enable_iommu = {}
hot_plug_vfio = "no-port"
cold_plug_vfio = "root-port"
guest_hook_path = "/usr/share/oci/hooks"
enable_annotations = ["enable_iommu"]
"""
# This runtime is not Kata's, so that the check would not look for a configuration by itself before there is a QEMU.
SETTINGS = f'[kata]\nmode = "always"\nconfig = "{CONFIGURATION}"\n'
# Where the package has it in the guest.
GUEST_HOOK = "/usr/libexec/oci/hooks.d/vfio-guest-bind"
PATHS = "io.katacontainers.x.vfio.devices"
# It shows its counters each second. No device is named: it takes what it finds open.
TESTPMD = (
    f"/usr/bin/dpdk-testpmd --in-memory --no-telemetry -m {HUGEPAGES * 2} --lcores 0@0,1@0 -- "
    "--total-num-mbufs=2048 --no-lsc-interrupt --stats-period=1"
)
FORWARD = f"{TESTPMD} --forward-mode=io --tx-first"


@dataclass(frozen=True)
class Nics:
    """The host's NICs, by address. wired: two, each alone in its group; pair: the two functions of a card; spare."""

    wired: tuple[str, str]
    pair: tuple[str, str]
    spare: str

    def list_all(self) -> tuple[str, ...]:
        """Return all their addresses."""
        return (*self.wired, *self.pair, self.spare)


def prepare() -> None:
    """Make this machine a host: KVM where its processor can, and settings for the check on it."""
    # Not an error where it can't: QEMU emulates then.
    subprocess.run(["modprobe", "-q", "kvm_amd"], check=False)
    bundles.write_settings(host=SETTINGS)


def find_nics() -> Nics:
    """Return the NICs: the card is the group with two; the others come in the order they were plugged in."""
    alone: list[str] = []
    pair: list[str] = []
    for address in guest.find_devices(devices.NIC_E1000E):
        together = len(guest.members_of(guest.group_of(address))) > 1
        (pair if together else alone).append(address)
    (first, second), (left, right, spare) = pair, alone
    return Nics((left, right), (first, second), spare)


def write_configuration(enable_iommu: bool) -> Path:
    """Write Kata's configuration.toml and return its path."""
    CONFIGURATION.parent.mkdir(exist_ok=True)
    CONFIGURATION.write_text(CONFIGURATION_TEXT.format(str(enable_iommu).lower()))
    return CONFIGURATION


def list_devices(*addresses: str) -> list[dict[str, Any]]:
    """Return linux.devices as a container manager writes it: the groups of these devices, with the host's numbers."""
    entries = [bundles.vfio_devices()[0]]
    for group in dict.fromkeys(guest.group_of(address) for address in addresses):
        major, minor = guest.numbers_of_group(group)
        entries.append(bundles.vfio_device(group, major, minor))
    return entries


def make_config(
    command: Sequence[str],
    addresses: Sequence[str] = (),
    annotations: dict[str, str] | None = None,
    check: bool = True,
    bind: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Return the config.json of a container that wants these devices of the host.

    check, bind: whether it has the host's hook under prestart and the guest's under createRuntime and poststop.
    """
    hooks: dict[str, list[dict[str, Any]]] = {}
    if check:
        hooks["prestart"] = [bundles.make_hook(bundles.find_hook(bundles.HOST_HOOK))]
    if bind:
        hooks["createRuntime"] = [bundles.make_hook(GUEST_HOOK)]
        hooks["poststop"] = [bundles.make_hook(GUEST_HOOK, "poststop")]
    options = bundles.Options(
        devices=list_devices(*addresses) if addresses else (), annotations=annotations or {}, hooks=hooks, **more
    )
    return bundles.make_config(command, "rootfs", options, "")


def read_config(bundle: Path) -> dict[str, Any]:
    """Return a bundle's config.json."""
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text())
    return config


def write_bundle(directory: Path, config: dict[str, Any]) -> Path:
    """Write a bundle on the host."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory
