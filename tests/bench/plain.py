# SPDX-License-Identifier: Apache-2.0
"""Measurements on the plain machine: containers without VFIO, and the host check on a made host.

The made host is mounted over /sys and /dev, so that the executable itself is measured. Hence `unshare`: this module
runs as a program in a mount namespace of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable

from tests.bench import before
from tests.bench.timing import Case, Samples, list_imports, take_turns, weigh
from tests.provision import REPOSITORY
from tests.support.fake_host import HostTree, fill_host

BARE = ("/usr/bin/python3", "-I", "-S", "-c", "pass")
HOST_HOOK = str(REPOSITORY / "hooks/vfio-host-check")
GUEST_HOOK = str(REPOSITORY / "hooks/vfio-guest-bind")
# These runs are short, and the more there are the less the machine's other work matters.
MORE = 10
DEVICES = 500
GROUPS = 64
CONTROL = {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196}
# Where the hooks look, as a runtime starts them.
SETTINGS = Path("/etc/oci-vfio-hooks")
# What a user sets; and the same with a sign and a string that only a whole TOML reader knows.
PLAIN = {
    "guest": 'deadline = 30\non_failure = "kill"\n[auto]\nids = ["8086:10d3", "15b3"]\n',
    "host": 'deadline = 30\nmode = "enforce"\n[checks]\nmemlock = "ignore"\n',
}
ANY = {name: text.replace("30", "+30").replace('"', "'") for name, text in PLAIN.items()}
UNLIMITED = {"type": "RLIMIT_MEMLOCK", "hard": 2**64 - 1, "soft": 2**64 - 1}


def write_bundle(directory: Path, groups: Sequence[tuple[str, int, int]] = ()) -> bytes:
    """Write a bundle for a container with these groups (path, major, minor) and return its state.

    It is as podman writes it for a container that needs little: `podman run --device /dev/vfio/12` and no more.
    """
    directory.mkdir()
    entries = [{"path": path, "type": "c", "major": major, "minor": minor} for path, major, minor in groups]
    listed = [CONTROL, *entries] if entries else []
    rules = [
        {"allow": True, **{key: entry[key] for key in ("type", "major", "minor")}, "access": "rwm"} for entry in listed
    ]
    config = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/true"],
            "env": ["PATH=/usr/bin:/bin", "HOME=/root", "HOSTNAME=container"],
            "cwd": "/",
            "capabilities": {"bounding": ["CAP_IPC_LOCK"], "effective": ["CAP_IPC_LOCK"]},
            "rlimits": [UNLIMITED],
        },
        "mounts": [
            {"destination": location, "type": "tmpfs", "source": "tmpfs"} for location in ("/proc", "/dev", "/sys")
        ],
        "annotations": {"io.podman.annotations.autoremove": "FALSE", "org.opencontainers.image.stopSignal": "15"},
        "linux": {
            "devices": listed,
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "resources": {"devices": [{"allow": False, "access": "rwm"}, *rules]},
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    state = {"ociVersion": "1.0.2", "id": directory.name, "status": "creating", "pid": 1, "bundle": str(directory)}
    return json.dumps(state).encode()


def make_host(top: Path) -> list[tuple[str, int, int]]:
    """Make a host with 500 PCI devices, each in a group of its own, and return the nodes of 64 that vfio-pci has."""
    host = HostTree(top)
    nodes = fill_host(host, DEVICES, 1, GROUPS)
    host.write("/dev/null")
    host.write("/dev/vfio/vfio")
    return nodes


def put_in_place(top: Path) -> None:
    """Mount a made host over this machine, for this mount namespace alone."""
    for directory in ("sys", "dev"):
        subprocess.run(["mount", "--bind", str(top / directory), f"/{directory}"], check=True)


def take_away() -> None:
    """Undo put_in_place."""
    for directory in ("dev", "sys"):
        subprocess.run(["umount", f"/{directory}"], check=True)


def list_cases_without_vfio(scratch: Path) -> list[Case]:
    """Return what a container without VFIO pays for."""
    state = write_bundle(scratch / "plain")
    return [
        Case("plain bare", BARE),
        Case("plain guest none", (GUEST_HOOK,), state),
        Case("plain host none", (HOST_HOOK,), state),
    ]


def list_cases_of_host(scratch: Path, nodes: Sequence[tuple[str, int, int]]) -> list[Case]:
    """Return the checks of containers with one group and with all."""
    return [
        Case("host 1", (HOST_HOOK,), write_bundle(scratch / "one", nodes[:1])),
        Case(f"host {GROUPS}", (HOST_HOOK,), write_bundle(scratch / "all", nodes)),
    ]


def make_writer(path: Path, text: str) -> Callable[[], None]:
    """Return a function that writes a file."""

    def write() -> None:
        path.write_text(text)

    return write


def list_cases_of_settings(scratch: Path, nodes: Sequence[tuple[str, int, int]]) -> list[Case]:
    """Return a check and a dry run, each without settings, with plain ones and with any others."""
    bundle = scratch / "settings"
    host = write_bundle(bundle, nodes[:1])
    config = json.loads((bundle / "config.json").read_text())
    config["annotations"] = {"io.katacontainers.x.vfio.devices": "0000:00:00.0"}
    (bundle / "config.json").write_text(json.dumps(config))
    commands = {"guest": ((GUEST_HOOK, "--dry-run"), host), "host": ((HOST_HOOK,), host)}
    cases = []
    for name, (command, state) in commands.items():
        file = SETTINGS / f"{name}.toml"
        cases.append(Case(f"settings {name} none", command, state))
        for kind, texts in (("", PLAIN), (" any", ANY)):
            cases.append(Case(f"settings {name}{kind}", command, state, make_writer(file, texts[name]), file.unlink))
    return cases


@contextmanager
def empty_settings() -> Iterator[None]:
    """Have a directory of settings with nothing in it, for this mount namespace alone."""
    made = not SETTINGS.exists()
    SETTINGS.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "settings", str(SETTINGS)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(SETTINGS)], check=True)
        if made:
            SETTINGS.rmdir()


def measure(parts: Sequence[str], runs: int) -> dict[str, object]:
    """Return samples of these parts ("plain", "host", "scale"), memory and imports."""
    samples: Samples = {}
    memory: Samples = {}
    imports: dict[str, object] = {}
    with TemporaryDirectory(prefix="bench-") as directory:
        scratch = Path(directory)
        other = before.find_tree()
        none = before.double(list_cases_without_vfio(scratch), REPOSITORY, other)
        if "plain" in parts:
            samples |= take_turns(none, runs * MORE, "container without VFIO, plain machine")
            memory |= weigh(none, runs)
            for hook in (GUEST_HOOK, HOST_HOOK):
                imports[f"{Path(hook).name}, container without VFIO"] = list_imports(hook, (), none[-1].stdin)
        if "host" in parts:
            nodes = make_host(scratch / "host")
            put_in_place(scratch / "host")
            cases = before.double(list_cases_of_host(scratch, nodes), REPOSITORY, other)
            samples |= take_turns(cases, runs * MORE, f"host check, {DEVICES} devices")
            memory |= weigh(cases, runs)
            with empty_settings():
                settings = before.double(list_cases_of_settings(scratch, nodes), REPOSITORY, other)
                samples |= take_turns(settings, runs * MORE, "settings")
            imports[f"vfio-host-check, {GROUPS} groups"] = list_imports(HOST_HOOK, (), cases[-1].stdin)
            take_away()
        if "scale" in parts:
            from tests.bench import scale

            samples |= scale.measure_here(scratch, runs)
    return {"samples": samples, "memory": memory, "imports": imports}


if __name__ == "__main__":
    result, number, *wanted = sys.argv[1:]
    Path(result).write_text(json.dumps(measure(wanted, int(number))))
