# SPDX-License-Identifier: Apache-2.0
"""The executables' first lines: in any locale they find the bundle and write what they have to, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oci_hooks import oci

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
HOOKS = ("vfio-host-check", "vfio-guest-bind")
GROUP = {"path": "/dev/vfio/4000", "type": "c", "major": 511, "minor": 9}
LATIN_1 = "de_DE.ISO-8859-1"
# What a person may call a directory; the last one is no UTF-8.
NAMES = [b"plain", "\u00fc".encode(), "\u675f".encode(), "\U0001f4e6".encode(), b"\xff\xfe"]
# A bracket in a set: a future version of `re` may take it for something else, and this one warns of that.
KATA = """\
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
machine_type = "q35"
enable_annotations = ["[[z]"]
"""


@pytest.fixture(name="locales", scope="module")
def make_locales(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Return the variables of some locales; the one that is not UTF-8 is made here, as few machines have it."""
    location = tmp_path_factory.mktemp("locales")
    made = {"none": {}, "C": {"LC_ALL": "C"}, "POSIX": {"LANG": "POSIX"}, "gone": {"LC_ALL": "xx_YY.UTF-8"}}
    if not Path("/usr/share/i18n/charmaps/ISO-8859-1.gz").exists():
        pytest.skip("no character maps: apt-get install locales")
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(location / LATIN_1)]
    subprocess.run(command, check=True, capture_output=True)
    latin = {"LC_ALL": LATIN_1, "LOCPATH": str(location)}
    script = "import sys; print(sys.getfilesystemencoding())"
    done = subprocess.run(
        ["/usr/bin/python3", "-IS", "-c", script], env=latin, capture_output=True, text=True, check=True
    )
    # The locale works: this is what the hooks have to live with.
    assert done.stdout == "iso8859-1\n"
    return {**made, "latin-1": latin}


def call(
    hook: str, bundle: bytes, environment: dict[str, str], *arguments: str, **more: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run one of the executables for a container in this bundle."""
    state = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 4194304, "bundle": "(bundle)"}
    data = json.dumps(state, ensure_ascii=False).encode().replace(b"(bundle)", bundle)
    return subprocess.run(
        [str(REPOSITORY / "hooks" / hook), *arguments],
        input=data,
        capture_output=True,
        timeout=60,
        check=False,
        env=environment,
        **more,
    )


def make_bundle(top: Path, name: bytes, config: dict[str, Any]) -> bytes:
    """Make a bundle's directory and return its path."""
    location = os.fsencode(top) + b"/" + name
    os.mkdir(location)
    with open(location + b"/config.json", "w", encoding="utf-8") as file:
        json.dump(config, file)
    return location


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_bundle_path_in_any_locale(tmp_path: Path, locales: dict[str, dict[str, str]], hook: str, name: bytes) -> None:
    nothing = make_bundle(tmp_path, name, {})
    wrong = make_bundle(tmp_path, name + b"2", {"annotations": {oci.DEVICES_ANNOTATION: 5}})
    output = set()
    for environment in locales.values():
        done = call(hook, nothing, environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        done = call(hook, wrong, environment)
        assert done.returncode == 2
        assert b"error: [bad-config]" in done.stderr
        output.add(done.stderr)
    # The same words in all of them, and in UTF-8.
    (words,) = output
    assert (name if name != b"\xff\xfe" else b"\\udcff\\udcfe") in words


@pytest.mark.parametrize("hook", HOOKS)
def test_output_in_any_locale(tmp_path: Path, locales: dict[str, dict[str, str]], hook: str) -> None:
    """To stdout, as JSON and as text, and with --debug, with what no character set but UTF-8 has."""
    annotations = {oci.DEVICES_ANNOTATION: "\u675f\udcff", oci.LOG_ANNOTATION: "on"}
    config = {"annotations": annotations, "linux": {"devices": [{**GROUP, "path": "/dev/vfio/\u675f"}]}}
    bundle = make_bundle(tmp_path, "\u675f".encode(), config)
    for environment in locales.values():
        for arguments in (
            ("--json",),
            ("--debug",),
            ("--bundle", os.fsdecode(bundle), "--pid", "4194304"),
            ("--help",),
        ):
            done = call(hook, bundle, environment, *arguments)
            assert done.returncode == (0 if "--help" in arguments else 2 if hook == "vfio-guest-bind" else 1), (
                done.stderr
            )
            assert b"[internal]" not in done.stderr
            assert b"Traceback" not in done.stderr
            if "--json" in arguments:
                assert json.loads(done.stdout)["findings"]


def test_executables_without_python_warnings(tmp_path: Path) -> None:
    (tmp_path / "kata.toml").write_text(KATA)
    (tmp_path / "host.toml").write_text(f'[kata]\nmode = "always"\nconfig = "{tmp_path}/kata.toml"\n')
    config = {
        "annotations": {"io.katacontainers.config.hypervisor.enable_iommu": "true"},
        "linux": {"devices": [GROUP]},
    }
    bundle = make_bundle(tmp_path, b"b", config)
    arguments = ["--settings", str(tmp_path / "host.toml")]
    for hook, environment in ((HOOKS[0], {}), (HOOKS[0], {"PYTHONWARNINGS": "always", "PYTHONDEVMODE": "1"})):
        done = call(hook, bundle, environment, *arguments)
        assert done.returncode == 1
        # It did come to the pattern.
        assert b"[annotation-not-allowed]" in done.stderr
        assert all(line.startswith(b"vfio-host-check: ") for line in done.stderr.splitlines()), done.stderr


@pytest.mark.parametrize("hook", HOOKS)
def test_executables_suppress_warnings(tmp_path: Path, hook: str) -> None:
    """A copy whose module warns in every way that Python has, at its compilation too."""
    (tmp_path / "hooks").mkdir()
    shutil.copy(REPOSITORY / "hooks" / hook, tmp_path / "hooks")
    (tmp_path / "oci_hooks").mkdir()
    (tmp_path / "oci_hooks/__init__.py").touch()
    for name in ("idle", "loader"):
        shutil.copy(REPOSITORY / f"oci_hooks/{name}.py", tmp_path / "oci_hooks")
    module = """\
import _warnings, re, warnings
'a' is 'b'
def main(argv, begun):
    re.compile("[[a]")
    for kind in (Warning, UserWarning, DeprecationWarning, FutureWarning, ResourceWarning, BytesWarning):
        warnings.warn("w", kind)
        _warnings.warn("w", kind)
    open("/dev/null")
    print("done", flush=True)
    return 0
"""
    for name in ("host", "guest"):
        (tmp_path / f"oci_hooks/{name}").mkdir()
        (tmp_path / f"oci_hooks/{name}/hook.py").write_text(module)
    command = [tmp_path / "hooks" / hook]
    done = subprocess.run(command, input="no state", capture_output=True, text=True, check=True, env={})
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("library", ["python3.99", f"python{sys.version_info[0]}.{sys.version_info[1]}"])
def test_executables_from_any_virtual_environment(tmp_path: Path, hook: str, library: str) -> None:
    """/usr/bin/python3 runs the hook wherever it is: the package has no part that is compiled for one version."""
    (tmp_path / "bin").mkdir()
    shutil.copy(REPOSITORY / "hooks" / hook, tmp_path / "bin")
    location = tmp_path / "lib" / library / "site-packages"
    shutil.copytree(REPOSITORY / "oci_hooks", location / "oci_hooks", ignore=shutil.ignore_patterns("__pycache__"))
    (location / "oci_hooks/__init__.py").write_text('__version__ = "77"')
    done = subprocess.run([tmp_path / "bin" / hook, "--version"], capture_output=True, text=True, check=True, env={})
    assert (done.stdout, done.stderr) == (f"{hook} 77\n", "")


@pytest.mark.parametrize("hook", HOOKS)
def test_executables_behind_links(tmp_path: Path, hook: str) -> None:
    """A link to the file, as the packages have it in /usr/bin, a link to that, and a directory that is one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/one").symlink_to(os.path.relpath(REPOSITORY / "hooks" / hook, tmp_path / "bin"))
    (tmp_path / "two").symlink_to("bin/one")
    (tmp_path / "three").symlink_to(REPOSITORY / "hooks")
    for path in ("bin/one", "two", f"three/{hook}"):
        command = [str(tmp_path / path), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={}, cwd="/")
        assert done.stdout.startswith(f"{hook} ")
    relative = [f"./{hook}", "--version"]
    subprocess.run(relative, capture_output=True, check=True, env={}, cwd=REPOSITORY / "hooks")


def test_executables_write_no_bytecode(tmp_path: Path) -> None:
    """Neither for a container without VFIO nor for one with; what a person has compiled is loaded."""
    for name in ("hooks", "oci_hooks"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for config in ({}, {"annotations": {oci.DEVICES_ANNOTATION: 5}}):
        bundle = make_bundle(tmp_path, b"b%d" % len(config), config)
        state = json.dumps({"ociVersion": "1.0.2", "id": "c1", "pid": 4194304, "bundle": os.fsdecode(bundle)})
        for hook in (tmp_path / "hooks").iterdir():
            command = [str(hook), *([] if hook.name in HOOKS else ["--help"])]
            subprocess.run(command, input=state, text=True, capture_output=True, timeout=60, check=False, env={})
            assert list(tmp_path.rglob("*.pyc")) == [], hook.name
    subprocess.run(["/usr/bin/python3", "-m", "compileall", "-q", "oci_hooks"], cwd=tmp_path, check=True)
    for module in ("__init__", "idle"):
        # Without the source's text a module still loads: from its bytecode, which has the source's time and size.
        source = tmp_path / f"oci_hooks/{module}.py"
        status = source.stat()
        source.write_text("?" * status.st_size)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    bundle = make_bundle(tmp_path, b"none", {})
    for name in HOOKS:
        state = json.dumps({"ociVersion": "1.0.2", "id": "c1", "pid": 4194304, "bundle": os.fsdecode(bundle)})
        subprocess.run([tmp_path / "hooks" / name], input=state, text=True, timeout=60, check=True, env={})


@pytest.mark.parametrize("python", [sys.executable, "/usr/bin/python3"])
def test_load_site_packages_runs_no_sitecustomize_or_pth(tmp_path: Path, python: str) -> None:
    """With jsonschema, neither sitecustomize nor a .pth file is run; Debian has the former."""
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(77)")
    script = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(REPOSITORY)!r}]
from oci_hooks.schema import find_mistakes
assert find_mistakes({{}}, "state", "x", "y", "z")
print([name for name in ("sitecustomize", "usercustomize") if name in sys.modules])
"""
    done = subprocess.run([python, "-IS", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
