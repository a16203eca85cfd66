# SPDX-License-Identifier: Apache-2.0
"""Packages that the demo and the tests install: each by name, its size announced before; missing ones are named."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from examples import run_demo
from oci_hooks.program import make_internal_finding
from tests import packages, provision
from tests.chain import image
from tests.newcomer import bare
from tests.newcomer.programs import PROGRAMS, find_unnamed
from tests.provision import REPOSITORY, MissingError
from tests.vm import rig

# Programs that the rig, the demo and the tests run by name, and the package of Debian that has each. Those of packages
# that are always there (dpkg's own, coreutils, util-linux, mount, tar) belong to `always`.
OWNERS = {
    "always": {
        *("apt-cache", "apt-config", "apt-get", "chroot", "dpkg", "dpkg-deb", "dpkg-query", "env", "mount", "umount"),
        *(
            "rm",
            "sh",
            "test",
            "timeout",
            "true",
            "unshare",
            "setpriv",
            "touch",
            "tail",
            "cat",
            "sed",
            "find",
            "ls",
            "ldd",
        ),
    },
    "qemu-system-x86": {"qemu-system-x86_64"},
    "debootstrap": {"debootstrap"},
    "git": {"git"},
    "kmod": {"modprobe", "depmod"},
    "busybox-static": {"busybox"},
}
LISTS = (provision.TEST_PACKAGES, packages.PACKAGES, image.PACKAGES, bare.PACKAGES)


def find_programs(path: Path) -> set[str]:
    """Return the first words of all lists that a module gives to run, run_twice or subprocess."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0]
        if name in ("run", "run_twice", "Popen") and isinstance(first, (ast.List, ast.Tuple)) and first.elts:
            word = first.elts[0]
            if isinstance(word, ast.Constant) and isinstance(word.value, str):
                found.add(word.value.rpartition("/")[2])
    return found


@pytest.mark.parametrize("name", ["provision.py", "packages.py", "newcomer/bare.py", "chain/image.py", "runner.py"])
def test_provision_programs_belong_to_named_packages(name: str) -> None:
    owned = {program: package for package, programs in OWNERS.items() for program in programs}
    named = {package for each in LISTS for package in each} | {"always"}
    for program in find_programs(REPOSITORY / "tests" / name):
        assert owned.get(program) in named, f"{program}: in which package is it? name that in the lists and here"


@pytest.mark.parametrize("package", provision.RIG_PACKAGES)
def test_demo_packages_each_needed(package: str) -> None:
    """Left out, one at a time: some program has no package then. tests/newcomer holds the table to a bare root."""
    assert find_unnamed(provision.RIG_PACKAGES) == []
    assert find_unnamed(set(provision.RIG_PACKAGES) - {package}) != []


def test_rig_programs_in_package_table() -> None:
    """Programs that check_requirements looks for, by package."""
    asked = re.findall(r'\("[a-z0-9_-]+", "([a-z0-9-]+)"\)', inspect.getsource(rig.check_requirements))
    assert len(asked) >= 3
    assert set(asked) <= set(PROGRAMS.values())


def test_build_packages_match_control() -> None:
    """packaging/build reads it there: real names, no versions, and git and rpm too."""
    text = (REPOSITORY / "packaging/build").read_text()
    function = re.search(r"^list_build_depends\(\) \{.*?^\}", text, re.MULTILINE | re.DOTALL)
    assert function
    script = f"repository={REPOSITORY}\n{function[0]}\nlist_build_depends"
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=True)
    control = (REPOSITORY / "packaging/debian/control").read_text()
    wanted = re.findall(r"^(?:Build-Depends:)?\s+([a-z0-9-]+)", control.partition("Standards")[0], re.MULTILINE)
    real = {name.replace("debhelper-compat", "debhelper") for name in wanted if not name.startswith("dh-sequence")}
    assert set(done.stdout.split()) == real
    assert "git rpm $(list_build_depends)" in text


APT = """Reading package lists...
Need to get 39.5 MB/41.0 MB of archives.
After this operation, 174 MB of additional disk space will be used.
Do you want to continue? [Y/n] N
Abort.
"""


@pytest.mark.parametrize(
    ("printed", "words"), [(APT, " (39.5 MB to load, 174 MB on disk)"), ("E: Unable to lock\n", ""), ("", "")]
)
def test_provision_sizes_from_apt(printed: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, printed, "")

    monkeypatch.setattr("tests.provision.subprocess.run", run)
    assert provision.measure_packages(["x"]) == words


def test_provision_failed_mirror_retried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    script = f"test -e {mark} || {{ touch {mark}; echo hash sum mismatch; exit 100; }}; echo fine"
    assert provision.run_twice(["sh", "-c", script]) == "fine\n"
    assert "hash sum mismatch" in capsys.readouterr().out
    with pytest.raises(MissingError, match="for ever"):
        provision.run_twice(["sh", "-c", "echo for ever; exit 100"])


def test_provision_hanging_command_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provision, "COMMAND_LIMIT", 0.3)
    with pytest.raises(MissingError, match="did not end in"):
        provision.run(["sleep", "100"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, MissingError("x")])
def test_provision_interrupted_leaves_no_partial_root(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    location = provision.find_cache() / "root"
    with pytest.raises(BaseException), provision.locked(location):  # noqa: B017, PT011, RUF100
        (provision.make_partial(location) / "file").write_text("half")
        raise error
    assert not list(provision.find_cache().glob("*.partial"))


@pytest.fixture(name="poor")
def make_poor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Make this a machine that has everything, for a test to take something away."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(provision, "find_missing_packages", lambda _: ["runc"])
    monkeypatch.setattr(provision, "is_rig_made", lambda: False)
    monkeypatch.setattr(run_demo, "ROOM", 0)
    return monkeypatch


@pytest.mark.parametrize(
    ("target", "value", "words"),
    [
        ("platform.machine", lambda: "aarch64", "this machine is aarch64"),
        ("os.geteuid", lambda: 1000, "needs root"),
        ("shutil.which", lambda _: None, "there is no apt-get here: install runc"),
        ("examples.run_demo.ROOM", 1 << 60, "MiB are needed the first time"),
    ],
    ids=["machine", "root", "apt", "room"],
)
def test_demo_missing_requirement_one_line(
    poor: pytest.MonkeyPatch, target: str, value: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, before anything is installed."""
    run_demo.check_machine()
    poor.setattr(target, value)
    assert run_demo.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"demo: [^\n]+\n", err)
    assert words in err


def test_demo_cached_run_needs_no_space(poor: pytest.MonkeyPatch) -> None:
    poor.setattr(run_demo, "ROOM", 1 << 60)
    poor.setattr(provision, "find_missing_packages", lambda _: [])
    poor.setattr(provision, "is_rig_made", lambda: True)
    run_demo.check_machine()


@pytest.mark.parametrize("words", [["x"], ["--chain", "--json"], ["--chain", "crun"], ["--frob"]])
def test_demo_bad_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_demo.main(words)
    assert ended.value.code == 2
    assert "usage: examples/demo" in capsys.readouterr().err


def test_demo_interrupt_without_traceback(poor: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    poor.setattr(run_demo, "check_machine", interrupt)
    assert run_demo.main([]) == 130
    assert "demo: interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["examples/demo", "tests/run", "tests/bench/run"])
def test_scripts_need_python_with_library(script: str) -> None:
    """An interpreter alone (python3-minimal) is not enough: none of them looks for the file."""
    text = (REPOSITORY / script).read_text()
    assert "need_python" in text
    assert "-x /usr/bin/python3" not in text


def run_need_python(tmp_path: Path, script: str, apt: str) -> subprocess.CompletedProcess[str]:
    """Run tests/python.sh's function with /usr/bin/python3 replaced by one without a library.

    script: what the shell does before; apt: what apt-get does.
    """
    text = (REPOSITORY / "tests/python.sh").read_text().replace("/usr/bin/python3 -c", f"{tmp_path}/python3 -c")
    for name, body in (("python3", "exit 1"), ("apt-get", apt)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return subprocess.run(
        ["sh", "-euc", f"{text}\n{script}\nneed_python demo 2; echo went on"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )


ROOT, USER = "id() { echo 0; }", "id() { echo 1000; }"


@pytest.mark.parametrize(
    ("script", "apt", "code", "words"),
    [
        ("command() { return 1; }", "exit 1", 2, "there is no apt-get here"),
        (USER, "exit 1", 2, "install it as root: apt-get install"),
        (ROOT, "echo E: no mirror; exit 100", 2, "says: E: no mirror"),
        (ROOT, "exit 0", 0, "installing python3 with apt"),
    ],
    ids=["no apt", "no root", "no mirror", "installed"],
)
def test_scripts_python_without_library_reported(tmp_path: Path, script: str, apt: str, code: int, words: str) -> None:
    done = run_need_python(tmp_path, script, apt)
    assert (done.returncode, done.stdout) == (code, "" if code else "went on\n")
    assert words in done.stderr.splitlines()[-1]


def test_clone_has_git_files_and_changes(tmp_path: Path) -> None:
    bare.copy_clone(tmp_path / "clone")
    assert (tmp_path / "clone/README.md").read_text() == (REPOSITORY / "README.md").read_text()
    assert (tmp_path / "clone/examples/demo").stat().st_mode & 0o111
    assert not (tmp_path / "clone/.git").exists()
    assert not list((tmp_path / "clone").rglob("__pycache__"))


def test_clone_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an unpacked tarball, or where git isn't installed: all that git lists, and neither caches nor git's own."""
    by_git = set(provision.list_tree())
    monkeypatch.setattr("shutil.which", lambda _: None)
    names = set(provision.list_tree())
    assert by_git <= names
    assert {"README.md", ".ci/run", ".gitignore", "packaging/build", "tests/vm/inside.sh"} <= names
    assert [name for name in names if ".git" in name.split("/") or "__pycache__" in name] == []


@pytest.mark.parametrize(("name", "hint"), [("json", "python3-minimal"), ("oci_hooks.x", "report"), (None, "python3")])
def test_missing_library_hint_not_internal_error(name: str | None, hint: str) -> None:
    """But a module of our own that is not there is one."""
    finding = make_internal_finding(ModuleNotFoundError(f"No module named {name!r}", name=name))
    assert finding.code == "internal"
    assert hint in finding.hint
