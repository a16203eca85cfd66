# SPDX-License-Identifier: Apache-2.0
"""The table of kernels, and how fragments are read: building one takes minutes and is shown by every boot."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import kernels, provision


def test_every_fragment_belongs_to_a_kernel() -> None:
    used = {name for recipe in kernels.OWN_KERNELS.values() for name in recipe.fragments}
    assert used == {path.name for path in kernels.FRAGMENTS.glob("*.config")}


def test_debian_and_own_kernels_have_different_names() -> None:
    assert set(kernels.KERNELS) == {*provision.KERNEL_SUITES, *kernels.OWN_KERNELS}
    assert len(kernels.KERNELS) == len(provision.KERNEL_SUITES) + len(kernels.OWN_KERNELS)


def test_full_kernel_has_all_of_vfio() -> None:
    options = kernels.read_options((kernels.FRAGMENTS / "full.config").read_text())
    for name in ("IOMMUFD", "VFIO_GROUP", "VFIO_DEVICE_CDEV", "VFIO_NOIOMMU", "VFIO_PCI"):
        assert options[f"CONFIG_{name}"] == f"CONFIG_{name}=y"


def test_last_line_for_an_option_counts() -> None:
    text = "CONFIG_A=y\n# a comment\nCONFIG_B=y\n# CONFIG_A is not set\n"
    assert kernels.read_options(text) == {"CONFIG_A": "# CONFIG_A is not set", "CONFIG_B": "CONFIG_B=y"}


@pytest.mark.parametrize(
    ("line", "taken", "absent"),
    [
        ("# CONFIG_A is not set", {"CONFIG_B=y"}, True),
        ("# CONFIG_A is not set", {"CONFIG_A=y"}, False),
        ("CONFIG_A=y", {"CONFIG_B=y"}, False),
    ],
)
def test_an_option_that_the_kernel_does_not_know_is_absent(line: str, taken: set[str], absent: bool) -> None:
    assert kernels.is_absence(line, taken) == absent


def test_an_option_without_effect_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make` drops silently what depends on another option; a test on such a kernel would show nothing."""
    monkeypatch.setattr(kernels, "FRAGMENTS", tmp_path)
    monkeypatch.setattr(kernels, "make", lambda tree, *_: (tree / ".config").write_text("CONFIG_A=y\n"))
    (tmp_path / "x.config").write_text("CONFIG_A=y\nCONFIG_B=y\n")
    (tmp_path / "tree").mkdir()
    with pytest.raises(provision.MissingError, match=r"for want of another option: CONFIG_B=y$"):
        kernels.configure(tmp_path / "tree", kernels.Recipe("", ("x.config",)))


def test_another_fragment_is_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels.find_own_kernels()
    (tmp_path / "full.config").write_text("CONFIG_A=y\n")
    monkeypatch.setattr(kernels, "FRAGMENTS", tmp_path)
    assert kernels.find_own_kernels() != before


def test_kernels_are_built_together_and_their_source_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(directory: Path) -> Path:
        (directory / "tree").mkdir(parents=True)
        return directory / "tree"

    def compile_one(_tree: Path, name: str, place: Path) -> None:
        (place / "boot").mkdir(parents=True)
        (place / f"boot/vmlinuz-6.12.0-{name}").touch()

    place = tmp_path / "kernels-own-1"
    monkeypatch.setattr(kernels, "find_own_kernels", lambda: place)
    monkeypatch.setattr(provision, "ensure_packages", lambda _: None)
    monkeypatch.setattr(kernels, "unpack_source", unpack)
    monkeypatch.setattr(kernels, "configure", lambda *_: None)
    monkeypatch.setattr(kernels, "compile_kernel", compile_one)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in kernels.OWN_KERNELS:
        assert kernels.ensure_kernel(name).release == f"6.12.0-{name}"
    assert sorted(path.name for path in place.iterdir()) == sorted(kernels.OWN_KERNELS)
