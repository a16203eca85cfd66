# SPDX-License-Identifier: Apache-2.0
"""Both hooks and the replay tool without each library: docs/reference/libraries.md, tested with the executables.

The library is taken away as if it were not installed: in a mount namespace, from a copy laid over the directory where
Debian has it. Without root there are no mount namespaces.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from oci_hooks.linux.pci import scan
from oci_hooks.system import Root

pytestmark = [pytest.mark.unit, pytest.mark.skipif(os.geteuid() != 0, reason="hides a library by a mount")]

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD = REPOSITORY / "tests/data/records/guest-in-use.tar.gz"
HOOKS = ("vfio-guest-bind", "vfio-host-check")
LIBRARIES = ("jsonschema", "pyudev", "tenacity")
WITHOUT = [(), *((name,) for name in LIBRARIES), LIBRARIES]
# $1: an empty directory; $2: names of libraries; the rest: the command.
HIDE = """
mount -t tmpfs hidden "$1"
for place in /usr/lib/python3/dist-packages /usr/local/lib/python3*/dist-packages /usr/lib/python3*/site-packages; do
    if [ -d "$place" ]; then
        number=$((number + 1))
        mkdir "$1/up$number" "$1/work$number"
        mount -t overlay -o "lowerdir=$place,upperdir=$1/up$number,workdir=$1/work$number" hidden "$place"
        for name in $2; do rm -rf "$place/$name" "$place/$name.py"; done
    fi
done
shift 2
exec "$@"
"""
ABSENT = "0000:ff:1f.7"
NOTHING: dict[str, object] = {"ociVersion": "1.0.2", "root": {"path": "rootfs"}}
WITH_VFIO: dict[str, object] = {
    **NOTHING,
    "annotations": {"io.katacontainers.x.vfio.devices": ABSENT},
    "linux": {"devices": [{"path": "/dev/vfio/4711", "type": "c", "major": 511, "minor": 4711}]},
}


class Bench:
    """Runs the executables with libraries hidden."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.bundle = top / "bundle"
        self.bundle.mkdir()
        (top / "hidden").mkdir()

    def run(
        self, without: tuple[str, ...], *command: str, text: str = "", code: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command without these libraries. code: that it must end with."""
        unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", HIDE, "sh"]
        line = [*unshare, str(self.top / "hidden"), " ".join(without), *command]
        done = subprocess.run(line, input=text, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr
        assert code is None or done.returncode == code, done.stderr
        return done

    def call(
        self, without: tuple[str, ...], hook: str, config: object, settings: str = "deadline = 1.5\n"
    ) -> subprocess.CompletedProcess[str]:
        """Run a hook for a container with this config.json, bytes of it or a value, and with these settings."""
        text = config if isinstance(config, str) else json.dumps(config)
        (self.bundle / "config.json").write_text(text)
        (self.top / "x.toml").write_text(settings + 'record = "never"\n')
        state = {
            "ociVersion": "1.0.2",
            "id": "c1",
            "status": "creating",
            "pid": os.getpid(),
            "bundle": str(self.bundle),
        }
        path = str(REPOSITORY / "hooks" / hook)
        return self.run(without, path, "--settings", str(self.top / "x.toml"), text=json.dumps(state))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def list_system() -> list[str]:
    """Return the claims that there are."""
    return sorted(str(path) for path in Path("/run/oci-vfio-hooks").rglob("*") if "records" not in path.parts)


@pytest.mark.parametrize("without", WITHOUT, ids="+".join)
def test_hidden_library_not_importable(bench: Bench, without: tuple[str, ...]) -> None:
    script = f"import importlib.util as u; print(*(name for name in {LIBRARIES} if not u.find_spec(name)))"
    assert bench.run(without, "/usr/bin/python3", "-I", "-c", script, code=0).stdout.split() == list(without)


@pytest.mark.parametrize("hook", HOOKS)
def test_without_libraries_same_result(bench: Bench, hook: str) -> None:
    """A container without VFIO, and wrong settings; good ones are read in the tests below."""
    for config, settings, code in ((NOTHING, "", 0), (WITH_VFIO, "dead_line = 3\ndeadline = true\n", 2)):
        there, away = (bench.call(without, hook, config, settings) for without in ((), LIBRARIES))
        assert there.returncode == away.returncode == code
        assert (there.stdout, there.stderr) == (away.stdout, away.stderr)
        assert len(there.stderr.splitlines()) == code


@pytest.mark.parametrize("without", WITHOUT[1:], ids="+".join)
def test_host_check_without_libraries(bench: Bench, without: tuple[str, ...]) -> None:
    there, away = (bench.call(names, "vfio-host-check", WITH_VFIO) for names in ((), without))
    assert there.returncode == 1
    assert (away.returncode, away.stderr) == (there.returncode, there.stderr)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{ASK, ", "[bad-json]"),
        ('{ASK, "linux": []}', "linux: expected object, found "),
        (
            '{ASK, "linux": {"devices": [{"type": "c"}, {"path": "/dev/vfio/7"}]}}',
            "linux.devices[0]: missing required key path",
        ),
    ],
)
def test_without_jsonschema_same_code(bench: Bench, hook: str, config: str, said: str) -> None:
    # A container that asks for no VFIO is not stopped by what is wrong in its config.json.
    config = config.replace("ASK", '"annotations": {"io.katacontainers.x.vfio.devices": "auto"}')
    for without in ((), ("jsonschema",)):
        done = bench.call(without, hook, config)
        assert done.returncode == 2
        assert said in done.stderr
        assert all(line.startswith(f"{hook}: error: [") and "; " in line for line in done.stderr.splitlines())


@pytest.mark.parametrize("without", WITHOUT, ids="+".join)
def test_without_pyudev_missing_device_reported(bench: Bench, without: tuple[str, ...]) -> None:
    if not scan(Root()).devices:
        pytest.skip("this machine has no PCI function")
    before = list_system()
    done = bench.call(without, "vfio-guest-bind", WITH_VFIO)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert "error: [no-such-device] " in lines[0]
    assert f"{ABSENT} matches no PCI device in this guest" in lines[0]
    assert ("waited" in lines[0]) == ("pyudev" not in without)
    if "pyudev" in without:
        assert lines[1:] == [
            "vfio-guest-bind: error: [no-pyudev] pyudev: is needed to wait for a device, and cannot be used: No module "
            "named 'pyudev'; apt install python3-pyudev, or attach the device before the container starts"
        ]
    else:
        assert lines[1:] == []
    assert list_system() == before


@pytest.mark.parametrize("without", WITHOUT, ids="+".join)
def test_without_jsonschema_recording_refused(bench: Bench, without: tuple[str, ...]) -> None:
    tool = str(REPOSITORY / "hooks/vfio-hook-replay")
    for command in ("explain", "show", "run"):
        done = bench.run(without, tool, command, str(RECORD))
        if "jsonschema" in without:
            assert done.returncode == 2
            assert done.stdout == ""
            hint = "cannot be validated: install python3-jsonschema (apt install python3-jsonschema)"
            assert done.stderr == f"vfio-hook-replay: {RECORD}: {hint}\n"
        else:
            assert (done.returncode, done.stderr) == (0, "")
