# SPDX-License-Identifier: Apache-2.0
"""packaging/build: what is in the packages, what they need, the same bytes twice, and what lint tools think of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from oci_hooks import __version__
from tests import packages
from tests.packages import list_files
from tests.provision import REPOSITORY

EXECUTABLES = {
    "oci-vfio-hooks": ["usr/libexec/oci/hooks.d/vfio-host-check"],
    "oci-vfio-hooks-guest": [
        "usr/libexec/oci/hooks.d/vfio-guest-bind",
        "usr/share/oci/hooks/prestart/vfio-guest-bind",
        "usr/share/oci/hooks/poststop/vfio-guest-bind",
    ],
    "oci-vfio-hooks-nri": ["usr/bin/vfio-nri"],
}


# Requirements of each, in addition to the module and Python: the guest's kernel may have vfio-pci as a module.
MORE: dict[str, list[str]] = {"oci-vfio-hooks": [], "oci-vfio-hooks-guest": ["kmod"], "oci-vfio-hooks-nri": []}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command that must succeed and return what it printed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unpack(dist: Path, kind: str, package: str, place: Path) -> None:
    """Unpack the payload of one package."""
    place.mkdir()
    if kind == "deb":
        run("dpkg-deb", "-x", dist / f"{package}_{__version__}-1_all.deb", place)
    else:
        rpm = dist / f"{package}-{__version__}-1.noarch.rpm"
        run("sh", "-ec", 'rpm2cpio "$1" | cpio -idm --quiet', "sh", rpm, cwd=place)


def test_build_versions_agree() -> None:
    changelog = (REPOSITORY / "packaging/debian/changelog").read_text()
    assert changelog.startswith(f"oci-vfio-hooks ({__version__}-1) ")
    spec = (REPOSITORY / "packaging/rpm/oci-vfio-hooks.spec").read_text()
    assert re.search(r"^Version: +(\S+)$", spec, re.MULTILINE).group(1) == __version__  # type: ignore[union-attr]
    assert f" - {__version__}-1\n" in spec.partition("%changelog")[2].split("\n\n")[0]
    assert f"\n## {__version__} " in (REPOSITORY / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("kind", ["deb", "rpm"])
@pytest.mark.parametrize("package", list(EXECUTABLES))
def test_build_executables_unchanged(dist: Path, tmp_path: Path, kind: str, package: str) -> None:
    unpack(dist, kind, package, tmp_path / "payload")
    for name in EXECUTABLES[package]:
        path = tmp_path / "payload" / name
        # Kata's agent takes regular files only. The first line keeps the environment out: no tool may change it.
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o7777 == 0o755
        assert path.read_bytes() == (REPOSITORY / "hooks" / path.name).read_bytes()
        assert path.read_text().startswith("#!/usr/bin/python3 -IBSXutf8\n")
    commands = {path.name for path in (tmp_path / "payload/usr/bin").iterdir()}
    completions = tmp_path / "payload/usr/share/bash-completion/completions"
    assert {path.name for path in completions.iterdir()} == commands
    for path in completions.iterdir():
        done = run("bash", "-c", f'. {path} && complete -p "$0"', path.name)
        assert "--help" in done
        assert (" export " in done) == (path.name == "vfio-hook-replay")
    pages = {path.name.partition(".")[0] for path in (tmp_path / "payload/usr/share/man").glob("man[18]/*")}
    assert commands == pages != set()
    assert not list((tmp_path / "payload").rglob("*.toml.pyc"))


@pytest.mark.parametrize("kind", ["deb", "rpm"])
def test_links_of_the_installed_readme_lead_somewhere(dist: Path, tmp_path: Path, kind: str) -> None:
    unpack(dist, kind, "oci-vfio-hooks", tmp_path / "payload")
    (readme,) = (
        path for path in (tmp_path / "payload/usr/share/doc").rglob("README.md") if "examples" not in path.parts
    )
    links = re.findall(r"\]\(((?:docs|examples)/[^)#]+)", readme.read_text())
    assert len(links) >= 10
    assert [link for link in links if not (readme.parent / link).exists()] == []
    assert not list((readme.parent / "docs").rglob("*.py"))


@pytest.mark.parametrize("kind", ["deb", "rpm"])
def test_build_contains_whole_package(dist: Path, tmp_path: Path, kind: str) -> None:
    unpack(dist, kind, "python3-oci-vfio-hooks", tmp_path / "payload")
    (package,) = (tmp_path / "payload").rglob("oci_hooks")
    wanted = {path.relative_to(REPOSITORY / "oci_hooks") for path in (REPOSITORY / "oci_hooks").rglob("*.py")}
    wanted |= {path.relative_to(REPOSITORY / "oci_hooks") for path in (REPOSITORY / "oci_hooks").rglob("*.json")}
    found = {path.relative_to(package) for path in list_files(package) if path.suffix != ".pyc"}
    assert found == wanted
    compiled = {path.name.partition(".")[0] for path in package.rglob("*.pyc")}
    # Debian compiles on installation, for the Python that is there.
    assert compiled == ({path.stem for path in wanted if path.suffix == ".py"} if kind == "rpm" else set())


def test_debs_depend_on_python_recommend_libraries(dist: Path) -> None:
    def read(package: str, field: str) -> list[str]:
        text = run("dpkg-deb", "-f", dist / f"{package}_{__version__}-1_all.deb", field)
        return sorted(text.strip().split(", "))

    assert read("python3-oci-vfio-hooks", "Depends") == ["python3:any"]
    assert read("python3-oci-vfio-hooks", "Recommends") == [
        "python3 (>= 3.11~) | python3-tomli",
        *packages.RECOMMENDED,
    ]
    for package in EXECUTABLES:
        needed = [*MORE[package], f"python3-oci-vfio-hooks (= {__version__}-1)", "python3:any"]
        assert read(package, "Depends") == needed
        assert read(package, "Recommends") == [""]


def test_rpms_require_python_recommend_libraries(dist: Path) -> None:
    def read(package: str, what: str = "--requires") -> set[str]:
        lines = run("rpm", "-qp", what, dist / f"{package}-{__version__}-1.noarch.rpm").splitlines()
        # What every RPM needs of rpm itself, and of itself.
        return {line for line in lines if not line.startswith(("rpmlib(", "config("))}

    module = {line.partition(" ")[0] for line in read("python3-oci-vfio-hooks")}
    assert module == {"/bin/sh", "python(abi)"}
    libraries = {f"python3dist({name.partition('-')[2]})" for name in packages.RECOMMENDED}
    assert read("python3-oci-vfio-hooks", "--recommends") == {
        *libraries,
        "(python3dist(tomli) if python3 < 3.11)",
    }
    for package in EXECUTABLES:
        assert read(package) == {*MORE[package], "/usr/bin/python3", f"python3-oci-vfio-hooks = {__version__}-1"}


def test_lintian_clean(dist: Path) -> None:
    command = ["lintian", "--allow-root", "--pedantic", "-I"]
    assert run(*command, *dist.glob("*.deb")) == ""


def test_rpmlint_clean(dist: Path) -> None:
    output = run("rpmlint", "-r", REPOSITORY / "packaging/rpm/rpmlintrc", *dist.glob("*.rpm"))
    assert re.search(r" 0 errors, 0 warnings, 0 badness", output), output
    assert not re.search(r"^\S+: [EW]: ", output, re.MULTILINE), output


def test_lint_overrides_have_comments() -> None:
    files = [*REPOSITORY.glob("packaging/debian/*.lintian-overrides"), REPOSITORY / "packaging/rpm/rpmlintrc"]
    assert len(files) == 5
    for path in files:
        lines = path.read_text().splitlines()
        for before, line in zip(["", *lines], lines):
            assert line.startswith("#") or not line or before, f"{path}: {line}: why?"


def test_build_is_reproducible(dist: Path, tmp_path: Path) -> None:
    # The source tarball is a tree without git, at another place; another user's umask, language, zone and day.
    tree = tmp_path / "somewhere else"
    tree.mkdir()
    run("tar", "-xf", dist / f"oci-vfio-hooks-{__version__}.tar.gz", "--strip-components=1", "-C", tree)
    for path in tree.rglob("*.py"):
        os.utime(path)
    epoch = run("rpm", "-qp", "--qf", "%{BUILDTIME}", next(dist.glob("*.src.rpm")))
    environment = {"SOURCE_DATE_EPOCH": epoch, "TZ": "Pacific/Kiritimati", "LANG": "tr_TR.UTF-8", "HOME": str(tmp_path)}
    script = 'umask 077 && exec packaging/build "$1"'
    again = tmp_path / "again"
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", again], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in dist.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert len(names) == 10
    differing = [name for name in names if (dist / name).read_bytes() != (again / name).read_bytes()]
    shutil.rmtree(again)
    assert differing == []
