# SPDX-License-Identifier: Apache-2.0
"""Initrds of one and several archives: what is in them, what is added, and the original's bytes back again."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks.findings import InputError, Refusal
from oci_hooks.kata_image import tools
from oci_hooks.kata_image.apply.output import NamedFile
from oci_hooks.kata_image.cli import main
from oci_hooks.kata_image.cpio import Member, write_archive
from oci_hooks.kata_image.decision import check_guest
from oci_hooks.kata_image.initrd import Initrd, read_initrd
from oci_hooks.kata_image.model import AddonFile
from tests.support.kata_images import FILES, HOME, make_addon

DIRECTORY, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG, stat.S_IFLNK | 0o777
GUEST = [
    Member(".", DIRECTORY),
    Member("usr", DIRECTORY),
    Member("usr/lib", DIRECTORY),
    Member("usr/share", DIRECTORY),
    Member("lib", LINK, 0, b"usr/lib"),
    Member("init", FILE | 0o755, 0, b"#!/bin/sh\n" * 50),
    Member("usr/lib/modules", DIRECTORY),
    Member("usr/lib/modules/6.1", DIRECTORY),
    Member("usr/lib/modules/6.1/modules.dep", FILE | 0o644, 0, b"kernel/drivers/vfio/pci/vfio-pci.ko:\n"),
]
PLAIN = write_archive(GUEST)
EARLY = write_archive([Member("early", FILE | 0o644, 0, b"early")])
PACKED = {
    "cpio": PLAIN,
    "gzip": gzip.compress(PLAIN),
    "xz": lzma.compress(PLAIN, check=lzma.CHECK_CRC32),
    "lzma": lzma.compress(PLAIN, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress(PLAIN),
}
INITRDS = {
    **PACKED,
    "two of gzip": gzip.compress(EARLY) + gzip.compress(PLAIN),
    "early, gzip": EARLY + gzip.compress(PLAIN),
    "zeros between": EARLY + bytes(4096) + gzip.compress(PLAIN),
    "zeros behind": gzip.compress(PLAIN) + bytes(1001),
    "two in one": gzip.compress(EARLY + bytes(512) + PLAIN),
}


def read(place: Path) -> Initrd:
    """Read an initrd."""
    with place.open("rb") as file:
        return read_initrd(NamedFile(file, str(place)))  # type: ignore[arg-type]


@pytest.fixture(name="addon", scope="module")
def give_addon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an add-on."""
    return make_addon(tmp_path_factory.mktemp("addon"))


@pytest.mark.parametrize("name", INITRDS)
def test_names_and_contents_are_read(tmp_path: Path, name: str) -> None:
    place = tmp_path / "initrd"
    place.write_bytes(INITRDS[name])
    found = read(place)
    assert found.tree.read("lib/modules/6.1/modules.dep").startswith(b"kernel/")
    assert found.tree.list_names("lib/modules") == ["6.1"]
    assert ("early" in found.tree.nodes) == ("early" in name or "two" in name or "between" in name)
    assert found.archives[-1].end == len(INITRDS[name].rstrip(b"\0")) or found.archives[-1].format in ("cpio", "gzip")


@pytest.mark.parametrize("name", INITRDS)
def test_added_and_removed_byte_by_byte(
    tmp_path: Path, addon: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    old, new, back = (tmp_path / each for each in ("old", "new", "back"))
    old.write_bytes(INITRDS[name])
    old.chmod(0o640)
    assert main(["add", str(old), "--output", str(new), "--addon", str(addon)]) == 0
    assert old.read_bytes() == INITRDS[name] == new.read_bytes()[: old.stat().st_size]
    found = read(new)
    for path, (mode, data) in FILES.items():
        node = found.tree.look_up(path)
        assert node is not None and (node.kind, node.mode, node.uid, node.gid) == ("file", mode, 0, 0)
        assert not path.startswith(HOME) or found.tree.read(path) == data
    # A directory that was there is not listed again: the kernel would change its mode.
    assert new.read_bytes().count(b"usr/share\0") == old.read_bytes().count(b"usr/share\0")
    assert [archive.start % 4 for archive in found.archives if archive.format == "cpio"].count(0) >= 1
    assert new.stat().st_mode & 0o777 == 0o640
    assert main(["remove", str(new), "--output", str(back)]) == 0
    assert back.read_bytes() == INITRDS[name]
    assert sorted(os.listdir(tmp_path)) == ["back", "new", "old"]


def test_same_input_gives_same_bytes(tmp_path: Path, addon: Path) -> None:
    (tmp_path / "old").write_bytes(INITRDS["gzip"])
    for name in ("one", "two"):
        assert main(["add", str(tmp_path / "old"), "--output", str(tmp_path / name), "--addon", str(addon)]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("name", ["cpio", "gzip", "xz", "bzip2", "lzma"])
def test_every_cut_is_refused(tmp_path: Path, name: str) -> None:
    whole = PACKED[name].rstrip(b"\0")
    place = tmp_path / "initrd"
    for end in range(7, len(whole), max(1, len(whole) // 60)):
        place.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"\[image-(damaged|unknown)\]"):
            read(place)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (PACKED["gzip"] + b"what is this", "byte [0-9]+ begins no archive"),
        (PACKED["gzip"] + b"\0" * (-len(PACKED["gzip"]) % 4 + 1) + EARLY, "not at a multiple of 4"),
        (b"\x02\x21\x4c\x18" + bytes(100), "compressed with lz4"),
        (gzip.compress(b"no archive"), "ends after 10 bytes"),
        (gzip.compress(PLAIN + b"junk"), "ends after|no cpio header"),
        (PACKED["gzip"][:-8] + bytes(8), "gzip part at byte 0: .*check"),
    ],
)
def test_what_a_kernel_would_not_unpack(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "initrd").write_bytes(data)
    with pytest.raises(InputError, match=problem):
        read(tmp_path / "initrd")


@given(st.sampled_from(sorted(INITRDS)), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1))
def test_any_change_is_read_or_refused(name: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(INITRDS[name])
    for place, value in changes:
        data[place % len(data)] = value
    with contextlib.suppress(InputError):
        read_initrd(NamedFile(io.BytesIO(bytes(data)), "initrd"))  # type: ignore[arg-type]


def test_links_are_followed_as_in_the_guest(tmp_path: Path) -> None:
    links = [
        Member("a", LINK, 0, b"b"),
        Member("b", LINK, 0, b"a"),
        Member("up", LINK, 0, b"../../usr"),
        Member("absolute", LINK, 0, b"/usr/lib"),
    ]
    (tmp_path / "initrd").write_bytes(write_archive([*GUEST, *links]))
    tree = read(tmp_path / "initrd").tree
    assert tree.list_names("up/lib/modules") == tree.list_names("absolute/modules") == ["6.1"]
    assert tree.look_up("a/x") is None and tree.list_names("a") == [] and tree.read("a") == b""
    node = tree.look_up("lib")
    assert node is not None and (node.kind, node.target) == ("link", "usr/lib")


# What is in the way ---------------------------------------------------------------------------------------------------

WANTED = (AddonFile("opt/oci-vfio-hooks/bin/python3", 0o755, 0, b""),)


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ([Member("opt", FILE | 0o644, 0, b"")], "foreign-file"),
        ([Member("opt", LINK, 0, b"nowhere")], "foreign-file"),
        ([Member("opt", LINK, 0, b"init")], "foreign-file"),
        ([Member("opt", DIRECTORY), Member(HOME, DIRECTORY)], "foreign-file"),
        ([Member("opt", DIRECTORY), Member(HOME, LINK, 0, b"/usr")], "foreign-file"),
        ([Member("opt", LINK, 0, b"usr"), Member("usr/oci-vfio-hooks", DIRECTORY)], "foreign-file"),
        (
            [Member("opt", DIRECTORY), Member(HOME, DIRECTORY), Member(f"{HOME}/image.json", FILE | 0o644, 0, b"{}")],
            "already-added",
        ),
    ],
)
def test_what_is_in_the_way_is_named(tmp_path: Path, members: list[Member], code: str) -> None:
    (tmp_path / "initrd").write_bytes(write_archive([*GUEST, *members]))
    with pytest.raises(Refusal, match=rf"\[{code}\]"):
        check_guest("image", read(tmp_path / "initrd").tree, WANTED)


def test_directory_behind_a_link_is_used(tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(write_archive([*GUEST, Member("opt", LINK, 0, b"usr")]))
    missing = check_guest("image", read(tmp_path / "initrd").tree, WANTED)
    assert missing == [HOME, f"{HOME}/bin"]


def test_hook_of_a_package_is_foreign(tmp_path: Path, addon: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hook = Member("usr/share/oci/hooks/prestart/vfio-guest-bind", FILE | 0o755, 0, b"#!/usr/bin/python3\n")
    above = [
        Member(name, DIRECTORY) for name in ("usr/share/oci", "usr/share/oci/hooks", "usr/share/oci/hooks/prestart")
    ]
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(write_archive([*GUEST, *above, hook]))
    assert main(["add", str(old), "--output", str(new), "--addon", str(addon)]) == 1
    assert "[foreign-file]" in capfd.readouterr().err and not new.exists()
    assert main(["show", str(old), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert (shown["addon"], shown["hook"]) == (None, True)


# What was changed since ----------------------------------------------------------------------------------------------


def test_remove_refuses_what_was_changed_since(tmp_path: Path, addon: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old, new, back = (tmp_path / each for each in ("old", "new", "back"))
    old.write_bytes(INITRDS["early, gzip"])
    assert main(["add", str(old), "--output", str(new), "--addon", str(addon)]) == 0
    whole = new.read_bytes()
    changes = {
        "the original's part": whole[:120] + b"X" + whole[121:],
        "the last archive": whole[:-9] + b"X" + whole[-8:],
        "something behind": whole + EARLY,
        "cut": whole[:-100],
        "the size in the record": whole.replace(b'"size": ', b'"size": 9'),
        "its version": whole.replace(b'"version": 1', b'"version": 2'),
        "a huge size": whole.replace(b'"archive_size": ', b'"archive_size": 999999999'),
    }
    for name, data in changes.items():
        assert data != whole
        new.write_bytes(data)
        capfd.readouterr()
        assert main(["remove", str(new), "--output", str(back)]) == 2, name
        assert "[image-changed]" in capfd.readouterr().err, name
        assert not back.exists()
    assert main(["remove", str(old), "--output", str(back)]) == 2
    assert "[not-added]" in capfd.readouterr().err


# zstd -----------------------------------------------------------------------------------------------------------------

# A frame of one empty block: magic, a descriptor with a size of one byte, the size, the block's header.
EMPTY_FRAME = b"\x28\xb5\x2f\xfd" + b"\x20" + b"\0" + b"\1\0\0"


def test_zstd_without_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "PATH", ("/nowhere",))
    (tmp_path / "initrd").write_bytes(EMPTY_FRAME)
    with pytest.raises(Refusal, match=r"\[tool-missing\] zstd: is not installed; install zstd"):
        read(tmp_path / "initrd")


@pytest.mark.parametrize("end", range(4, len(EMPTY_FRAME)))
def test_zstd_frame_that_is_cut(tmp_path: Path, end: int) -> None:
    (tmp_path / "initrd").write_bytes(EMPTY_FRAME[:end])
    with pytest.raises(InputError, match=r"\[image-damaged\]"):
        read(tmp_path / "initrd")


@pytest.mark.parametrize(
    ("init", "words"), [(b"/lib/systemd/systemd", "yes, by systemd"), (b"sbin/init", "no systemd")]
)
def test_who_declares_the_cdi_specification(
    tmp_path: Path, addon: Path, capfd: pytest.CaptureFixture[str], init: bytes, words: str
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(write_archive([Member("init", LINK, 0, init)]))
    assert main(["add", str(old), "--output", str(new), "--addon", str(addon)]) == 0
    capfd.readouterr()
    assert main(["show", str(new)]) == 0
    assert f"CDI at boot  {words}" in capfd.readouterr().out
