# SPDX-License-Identifier: Apache-2.0
"""The add-on's archive is not trusted: names that lead elsewhere, links, devices, wrong sums, damaged files."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from oci_hooks.findings import InputError
from oci_hooks.kata_image import addon as reader
from oci_hooks.kata_image.addon import find_usual, read_addon
from tests.support import kata_images
from tests.support.kata_images import FILES, HOME, list_members, make_addon, make_member, pack_addon

EVIL = [
    ("/etc/passwd", {}),
    ("../etc/passwd", {}),
    (f"{HOME}/../../etc/passwd", {}),
    (f"{HOME}/./x", {}),
    (f"{HOME}//x", {}),
    (f"{HOME}/a b", {}),
    (f"{HOME}/a\nb", {}),
    (f'{HOME}/a"b', {}),
    (f"{HOME}/ä", {}),
    ("etc/passwd", {}),
    ("usr/bin/x", {}),
    (f"{HOME}x/y", {}),
    (f"{HOME}/image.json", {}),
    (f"{HOME}/link", {"kind": tarfile.SYMTYPE, "target": "/etc/passwd"}),
    (f"{HOME}/link", {"kind": tarfile.SYMTYPE, "target": "bin/python3"}),
    (f"{HOME}/link", {"kind": tarfile.LNKTYPE, "target": f"{HOME}/bin/python3"}),
    (f"{HOME}/null", {"kind": tarfile.CHRTYPE}),
    (f"{HOME}/disk", {"kind": tarfile.BLKTYPE}),
    (f"{HOME}/fifo", {"kind": tarfile.FIFOTYPE}),
    (f"{HOME}/root", {"mode": 0o4755}),
    (f"{HOME}/group", {"mode": 0o2755}),
]


def test_archive_is_read(tmp_path: Path) -> None:
    found = read_addon(str(make_addon(tmp_path)))
    assert {file.path: (file.mode, file.data) for file in found.files} == kata_images.add_manifest(FILES)
    assert (found.version, len(found.manifest), found.mtime) == ("1.2.3", 64, kata_images.TIME)


def test_directory_is_read_as_its_archive(tmp_path: Path) -> None:
    archive = make_addon(tmp_path)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "addon")  # noqa: S202 - ours
    found = read_addon(str(tmp_path / "addon"))
    assert found.files == read_addon(str(archive)).files
    assert found.version == ""


@pytest.mark.parametrize(("name", "more"), EVIL)
def test_evil_member_is_refused(tmp_path: Path, name: str, more: dict[str, object]) -> None:
    # Its manifest has it, so that nothing but the check of its name or type refuses it.
    members = {info.name: (info, data) for info, data in list_members({**FILES, name: (0o644, b"x")})}
    members[name] = (make_member(name, **more), b"x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"\[addon-damaged\]") as caught:
        read_addon(str(pack_addon(tmp_path / "addon.tar.xz", members.values())))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "problem"), [("more", "is not in the manifest"), ("bin/python3", "one name twice")])
def test_member_more_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    archive = pack_addon(tmp_path / "addon.tar.xz", [*list_members(FILES), (make_member(f"{HOME}/{name}"), b"x")])
    with pytest.raises(InputError, match=problem):
        read_addon(str(archive))


@pytest.mark.parametrize("kind", ["link to outside", "link inside", "directory link", "FIFO"])
def test_evil_directory_is_refused(tmp_path: Path, kind: str) -> None:
    with tarfile.open(make_addon(tmp_path)) as opened:
        opened.extractall(tmp_path / "addon")  # noqa: S202 - ours
    place = tmp_path / "addon" / HOME / "evil"
    if kind == "FIFO":
        os.mkfifo(place)
    else:
        place.symlink_to(
            {"link to outside": "/etc/passwd", "link inside": "bin/python3", "directory link": "/etc"}[kind]
        )
    with pytest.raises(InputError, match=r"\[addon-damaged\].*evil: is a link, a device or a FIFO"):
        read_addon(str(tmp_path / "addon"))


@pytest.mark.parametrize("path", [*FILES, f"{HOME}/manifest.sha256"])
def test_missing_or_changed_file_is_refused(tmp_path: Path, path: str) -> None:
    members = list_members(FILES)
    lacking = [(info, data) for info, data in members if info.name != path]
    with pytest.raises(InputError, match=r"\[addon-damaged\].*lacks"):
        read_addon(str(pack_addon(tmp_path / "lacking.tar", lacking)))
    changed = [(info, data + b" " if info.name == path else data) for info, data in members]
    with pytest.raises(InputError, match=r"\[addon-damaged\].*is not (the file|a line)"):
        read_addon(str(pack_addon(tmp_path / "changed.tar", changed)))


def test_every_cut_of_an_archive_is_refused(tmp_path: Path) -> None:
    whole = make_addon(tmp_path, {**FILES, f"{HOME}/lib/library.zip": (0o644, b"small")}).read_bytes()
    # The last bytes are xz's footer.
    for end in (*range(0, len(whole) - 1, 37), len(whole) - 1):
        place = tmp_path / "cut.tar.xz"
        place.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"\[addon-damaged\]"):
            read_addon(str(place))


def test_archive_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "SIZE_LIMIT", 1000)
    with pytest.raises(InputError, match="has more than 1000 bytes"):
        read_addon(str(make_addon(tmp_path)))
    monkeypatch.setattr(reader, "SIZE_LIMIT", 1 << 20)
    monkeypatch.setattr(reader, "NAMES_LIMIT", 3)
    with pytest.raises(InputError, match="has more than 3 names"):
        read_addon(str(tmp_path / "oci-vfio-hooks-guest-addon_1.2.3_amd64.tar.xz"))


def test_modes_become_plain_ones(tmp_path: Path) -> None:
    files = {**FILES, f"{HOME}/a": (0o777, b"a"), f"{HOME}/b": (0o600, b"b"), f"{HOME}/c": (0o500, b"c")}
    found = {file.path: file.mode for file in read_addon(str(make_addon(tmp_path, files))).files}
    assert [found[f"{HOME}/{name}"] for name in "abc"] == [0o755, 0o644, 0o755]


def test_usual_place_is_the_newest_of_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "USUAL", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"\[addon-missing\]"):
        find_usual(str(tmp_path))
    (tmp_path / "dist").mkdir()
    for number, name in enumerate(("0.1.0", "0.2.0")):
        place = tmp_path / f"dist/oci-vfio-hooks-guest-addon_{name}_amd64.tar.xz"
        place.touch()
        os.utime(place, (number, number))
    assert find_usual(str(tmp_path)).endswith("_0.2.0_amd64.tar.xz")


def test_missing_addon(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[addon-missing\] .*nothing: No such file"):
        read_addon(str(tmp_path / "nothing"))
