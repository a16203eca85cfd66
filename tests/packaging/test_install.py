# SPDX-License-Identifier: Apache-2.0
"""Packages in Debian roots: installed as a user does, run as a runtime does, upgraded, taken away again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from oci_hooks import __version__
from tests import packages, provision
from tests.packages import Root
from tests.packaging.conftest import MakeRoot
from tests.provision import REPOSITORY
from tests.runner import limit_tests, read_report
from tests.skips import find_unknown

LIBEXEC = "/usr/libexec/oci/hooks.d"
PACKAGES = ("oci-vfio-hooks", "oci-vfio-hooks-guest", "oci-vfio-hooks-nri")
HOOKS = [
    f"{LIBEXEC}/vfio-host-check",
    f"{LIBEXEC}/vfio-guest-bind",
    "/usr/share/oci/hooks/prestart/vfio-guest-bind",
    "/usr/bin/vfio-host-check",
    "/usr/bin/vfio-guest-bind",
]
DEBIANS = ["debian-12", "debian-13"]
OURS = re.compile(r"vfio|oci[-_]hooks|/oci(/|$)")


def make_bundle(root: Root, *devices: dict[str, object]) -> str:
    """Write a bundle into a root and return the state of its container."""
    bundle = root.changes / "bundle"
    bundle.mkdir(parents=True, exist_ok=True)
    config = {"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "linux": {"devices": list(devices)}}
    (bundle / "config.json").write_text(json.dumps(config))
    state = {"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 1, "bundle": str(bundle)}
    return json.dumps(state)


def use_hooks(root: Root, hooks: list[str], **environment: str) -> None:
    """Run hooks as a runtime does: nothing asked for, a device asked for that is not there, a state that is none."""
    nothing = make_bundle(root)
    bound = Root(root.layers, root.changes, ((root.changes / "bundle", str(root.changes / "bundle")), *root.binds))
    change = [f"{name}={value}" for name, value in environment.items()]

    def call(hook: str, state: str, code: int) -> str:
        return bound.run("env", "-i", *change, hook, text=state, code=code).stderr

    for hook in hooks:
        assert call(hook, nothing, 0) == ""
        # Looks a mistake up with jsonschema: the site-packages of this installation are found too.
        assert "missing required key id" in call(hook, "{}", 2)
        version = bound.run(hook, "--version").stdout
        assert version == f"{Path(hook).name} {__version__}\n"
    missing = make_bundle(root, {"path": "/dev/vfio/4711", "type": "c", "major": 511, "minor": 4711})
    for hook in hooks:
        output = call(hook, missing, 1)
        assert re.match(rf"{Path(hook).name}: error: \[[a-z-]+\] ", output), output
        assert "Traceback" not in output


@pytest.mark.parametrize("name", DEBIANS)
def test_debs_install_on_fresh_debian(installed: MakeRoot, name: str) -> None:
    root = installed(name)
    # A library that an attacker's environment names must not be loaded.
    use_hooks(root, HOOKS, PYTHONPATH="/nowhere", PYTHONHOME="/nowhere")
    layer = root.layers[0]
    compiled = {path.name.partition(".")[0] for path in layer.rglob("dist-packages/oci_hooks/**/*.pyc")}
    assert compiled == {path.stem for path in (REPOSITORY / "oci_hooks").rglob("*.py")}
    # The hooks use what was compiled on installation and leave nothing behind: no file of ours is new.
    assert not [path for path in root.list_changes() if "__pycache__" in path]
    replay_a_record(root)
    for library in ("jsonschema", "pyudev", "tenacity"):
        root.run("python3", "-I", "-c", f"import {library}")


@pytest.mark.parametrize("name", DEBIANS)
def test_debs_without_recommended_packages(bare: MakeRoot, name: str) -> None:
    """Python and its own library: the hooks with settings, and the replay tool, which reports the missing library."""
    root = bare(name)
    packages.install_debs(root)
    for library in ("jsonschema", "pyudev", "tenacity"):
        root.run("python3", "-I", "-c", f"import {library}", code=1)
    root.run(
        "sh",
        "-ec",
        "mkdir -p /etc/oci-vfio-hooks; cd /etc/oci-vfio-hooks; echo 'deadline = 20' | tee host.toml > guest.toml",
    )
    use_hooks(root, HOOKS)
    root.run("sh", "-ec", "cd /etc/oci-vfio-hooks; echo 'dead_line = 20' | tee host.toml > guest.toml")
    state = make_bundle(root, {"path": "/dev/vfio/4711", "type": "c", "major": 511, "minor": 4711})
    bound = Root(root.layers, root.changes, ((root.changes / "bundle", str(root.changes / "bundle")),))
    for hook in HOOKS:
        assert "line 1: dead_line: unknown key; " in bound.run(hook, text=state, code=2).stderr
    output = bound.run("vfio-hook-replay", "explain", code=2).stderr
    assert output.startswith("vfio-hook-replay: ")
    assert output.endswith("(apt install python3-jsonschema)\n")
    root.run("apt-get", "purge", "-y", "python3-oci-vfio-hooks", *PACKAGES)


@pytest.mark.parametrize("name", DEBIANS)
def test_debs_purge_leaves_nothing(installed: MakeRoot, name: str) -> None:
    root = installed(name)
    root.run(
        "sh", "-c", "mkdir -p /etc/oci-vfio-hooks && touch /etc/oci-vfio-hooks/host.toml /etc/oci-vfio-hooks/guest.toml"
    )
    use_hooks(root, HOOKS[:2])
    root.run("apt-get", "purge", "-y", "python3-oci-vfio-hooks", *PACKAGES)
    left = root.run("find", "/", "-xdev", "-not", "-path", "/mnt/*", "-not", "-path", "/root/*").stdout.splitlines()
    before = {f"/{path.relative_to(root.layers[-1])}" for path in root.layers[-1].rglob("*")}
    assert [path for path in left if OURS.search(path) and path not in before] == []


def test_debs_upgrade_keeps_settings_removes_old_files(dist: Path, installed: MakeRoot, tmp_path: Path) -> None:
    root = installed("debian-12")
    newer = tmp_path / "newer"
    newer.mkdir()
    for deb in dist.glob("*.deb"):
        tree = newer / deb.stem
        subprocess.run(["dpkg-deb", "-R", deb, tree], check=True)
        control = tree / "DEBIAN/control"
        control.write_text(control.read_text().replace(f"{__version__}-1", f"{__version__}-2"))
        # A module that the newer version does not have any more.
        for path in tree.rglob("oci_hooks/linux/uevents.py"):
            path.unlink()
        subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-b", tree, newer], check=True, capture_output=True)
    root = Root(root.layers, root.changes, ((newer, "/mnt/newer"),))
    root.run("sh", "-ec", "mkdir -p /etc/oci-vfio-hooks; echo 'mode = \"warn\"' > /etc/oci-vfio-hooks/host.toml")
    root.run("sh", "-ec", "dpkg -i /mnt/newer/*.deb")
    assert root.run(
        "sh", "-c", "ls /usr/lib/python3/dist-packages/oci_hooks/linux/__pycache__ | grep -c ^uevents", code=1
    )
    root.run("apt-get", "remove", "-y", "python3-oci-vfio-hooks")
    assert root.run("ls", "/etc/oci-vfio-hooks").stdout == "host.toml\n"
    assert root.run("ls", "/usr/lib/python3/dist-packages/oci_hooks", code=2).stdout == ""


def test_rpms_install_with_dependencies(dist: Path, installed: MakeRoot) -> None:
    root = installed("debian-12")
    root.run("dpkg", "--purge", "python3-oci-vfio-hooks", *PACKAGES)
    before = root.list_changes()
    rpms = sorted(path for path in dist.glob("*.noarch.rpm"))
    # Debian's libraries are not in the RPM database, hence --nodeps; test_build.py looks at what is required.
    run_rpm(root, "-i", "--nodeps", *(str(path) for path in rpms))
    use_hooks(root, HOOKS)
    run_rpm(root, "-V", "--nodeps", *PACKAGES, "python3-oci-vfio-hooks")
    run_rpm(root, "-e", *PACKAGES, "python3-oci-vfio-hooks")
    assert [path for path in root.list_changes() - before if OURS.search(path)] == []


def run_rpm(root: Root, *arguments: str) -> None:
    """Run this machine's rpm on a root."""
    inside = Root(root.layers, root.changes, root.binds)
    script = inside.make_script("/").rpartition("exec chroot")[0]
    location = root.changes / "root"
    # Kept in the root, so that the next call knows what is installed.
    command = f'{script}\nexec rpm --root {location} --dbpath /var/lib/rpm "$@"'
    done = packages.run_mounted(command, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pip_into_usr_local(installed: MakeRoot, tmp_path: Path) -> None:
    root = installed("debian-12")
    root.run("dpkg", "--purge", "python3-oci-vfio-hooks", *PACKAGES)
    target = root.changes / "top"
    pip = [provision.PYTHON, "-m", "pip", "install", "-q", "--root", str(target), "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--break-system-packages", str(copy_sources(tmp_path))], check=True, capture_output=True)
    assert (target / "usr/local/lib/python3.11/dist-packages/oci_hooks").is_dir()
    use_hooks(root, ["/usr/local/bin/vfio-host-check", "/usr/local/bin/vfio-guest-bind"])


def copy_sources(tmp_path: Path) -> Path:
    """Return a copy of the sources: pip leaves build directories behind."""
    location = tmp_path / "sources"
    names = shutil.ignore_patterns(".*", "__pycache__", "tests", "*.egg-info", "build", "dist")
    return Path(shutil.copytree(REPOSITORY, location, ignore=names))


def test_executable_without_interpreter_options_reexecs(tmp_path: Path) -> None:
    # Build systems write first lines anew and may leave the options out.
    hook = tmp_path / "lib" / "vfio-host-check"
    hook.parent.mkdir()
    hook.write_text((REPOSITORY / "hooks/vfio-host-check").read_text().replace("python3 -IBSXutf8", "python3", 1))
    hook.chmod(0o755)
    (tmp_path / "oci_hooks/host").mkdir(parents=True)
    for name, text in (
        ("__init__", ""),
        ("idle", "def begin(argv, claims): return b''"),
        ("loader", "def load_hook(name): return __import__(name, fromlist=['main'])"),
        (
            "host/hook",
            "import sys\nf = sys.flags\n"
            "def main(argv, begun):\n"
            "    print(f.isolated, f.no_site, f.utf8_mode, f.dont_write_bytecode, argv, flush=True)\n"
            "    return 0",
        ),
    ):
        (tmp_path / f"oci_hooks/{name}.py").write_text(text)
    done = subprocess.run([hook, "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == "1 1 1 1 ['a b']\n"


def test_unit_tests_on_debian_11(dist: Path, tmp_path: Path) -> None:
    """Debian 11: Python 3.9, jsonschema 3.2, pyudev 0.22, tenacity 6.2."""
    root = Root((packages.ensure_root("debian-11"),), tmp_path / "root", ((REPOSITORY, "/mnt/repository"),))
    report = "import sys, jsonschema, pyudev; print(sys.version_info[:2], jsonschema.__version__, pyudev.__version__)"
    assert root.run("/opt/tests/bin/python3", "-c", report).stdout == "(3, 9) 3.2.0 0.22.0\n"
    pytest_command = ["/opt/tests/bin/python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", *limit_tests()]
    # Tests of the tests themselves give the same result there.
    pytest_command += [
        "--junitxml=/root/junit.xml",
        "--ignore=tests/unit/test_mutations.py",
        "--deselect=tests/unit/test_fuzz.py::test_fuzz_with_atheris",
        "tests/unit",
    ]
    if "OCI_VFIO_FULL" not in os.environ:
        # A fault at every step: five minutes, and what they show depends on the hook more than on the interpreter.
        pytest_command.append("--ignore=tests/unit/guest/test_faults.py")
    done = root.run(*pytest_command, cwd="/mnt/repository", code=None)
    print(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    skipped = read_report(root.changes / "top/root/junit.xml", 0).skips
    print("\n".join(map(str, skipped)))
    assert find_unknown(skipped) == []


def replay_a_record(root: Root) -> None:
    """Have the replay tool run a hook again that failed on another machine, as an ordinary user."""
    record = REPOSITORY / "tests/data/records/guest-in-use.tar.gz"
    shutil.copy(record, root.changes / "record.tar.gz")
    bound = Root(root.layers, root.changes, ((root.changes, "/mnt/records"), *root.binds))
    tool = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "vfio-hook-replay"]
    assert "[in-use]" in bound.run(*tool, "run", "/mnt/records/record.tar.gz").stdout
    assert "in-use" in bound.run(*tool, "explain", "/mnt/records/record.tar.gz").stdout


def test_debs_install_on_debian_11(dist: Path, tmp_path: Path) -> None:
    root = Root((packages.ensure_root("debian-11"),), tmp_path / "root", ((dist, "/mnt/dist"),))
    root.run("sh", "-ec", "dpkg -i /mnt/dist/*.deb")
    use_hooks(root, HOOKS)
    replay_a_record(root)


def test_examples_kata_guest_image(dist: Path, bare: MakeRoot, capsys: pytest.CaptureFixture[str]) -> None:
    root = bare("debian-12")
    script = REPOSITORY / "examples/kata-guest-image/add-to-rootfs"
    # The tree is this machine's to look at and to change, as an image's is: mounted, and not entered.
    location = root.changes / "root"
    mounted = root.make_script("/").rpartition("mount -t proc")[0]
    debs = [next(dist.glob(f"{package}_*.deb")) for package in ("python3-oci-vfio-hooks", "oci-vfio-hooks-guest")]
    command = f"{mounted}\nmount --rbind /dev {location}/dev\nexec {script} {location} {debs[0]} {debs[1]}"
    done = packages.run_mounted(command)
    assert done.returncode == 0, done.stdout + done.stderr
    added = re.search(r": (\d+) MB$", done.stdout, re.MULTILINE)
    assert added, done.stdout
    with capsys.disabled():
        print(f"\n  Kata guest image: {done.stdout.splitlines()[0].rpartition('/')[2]}")
    output = (script.parent / "README.md").read_text()
    stated = re.search(r"these are (\d+):", output)
    # README and measurement may differ by what a point release of Debian does to Python.
    assert stated and abs(int(stated.group(1)) - int(added.group(1))) <= 5, done.stdout
    use_hooks(root, ["/usr/share/oci/hooks/prestart/vfio-guest-bind", "/usr/share/oci/hooks/poststop/vfio-guest-bind"])
    assert not [path for path in root.list_changes() if path.endswith(".deb")]


def test_daemonset_installs_the_check(bare: MakeRoot, dist: Path, tmp_path: Path) -> None:
    """The content of the DaemonSet's image is copied onto a node with Python, and the check runs there. Idempotent."""
    payload = tmp_path / "payload"
    for name in ("python3-oci-vfio-hooks_*.deb", "oci-vfio-hooks_*.deb"):
        (package,) = dist.glob(name)
        subprocess.run(["dpkg-deb", "-x", str(package), str(payload)], check=True)
    node = bare("debian-12")
    node.run("sh", "-c", "apt-get install -y -q --no-install-recommends python3")
    script = REPOSITORY / "examples/kubernetes/install-hooks/install"
    place = node.changes / "top"
    (place / "usr/bin").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HOST": str(place), "PAYLOAD": str(payload), "ONCE": "1"}
    for _ in range(2):
        done = subprocess.run([script], env=environment, capture_output=True, text=True, check=True)
        assert "install: done: " in done.stdout
    assert "vfio-host-check" in node.run("vfio-host-check", "--version").stdout
    empty = {**environment, "HOST": str(tmp_path / "nothing")}
    refused = subprocess.run([script], env=empty, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "has no /usr/bin/python3" in refused.stderr
