# SPDX-License-Identifier: Apache-2.0
"""cpio archives: what is written is read back, in pieces of any size; whatever is cut or turned is refused."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks.kata_image.cpio import BLOCK, CONTENT_LIMIT, CpioError, Member, Source, read_members, write_archive

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
NUMBERS = st.integers(0, 0xFFFFFFFF)


def make_member(name: str, kind: int, bits: int, mtime: int, data: bytes) -> Member:
    """Return a member as it is read: only files and links have content."""
    content = data if kind in (stat.S_IFREG, stat.S_IFLNK) else b""
    links = 2 if kind == stat.S_IFDIR else 1
    return Member(name, kind | bits, mtime, content, 0, 0, len(content), links)


KINDS = st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO])
MEMBERS = st.lists(
    st.builds(
        make_member,
        NAMES.filter(lambda name: name != "TRAILER!!!"),
        KINDS,
        st.integers(0, 0o7777),
        NUMBERS,
        st.binary(max_size=50),
    )
)


def split(data: bytes, size: int) -> list[bytes]:
    """Return data in pieces of some bytes."""
    return [data[place : place + size] for place in range(0, len(data), size)]


@given(MEMBERS, st.integers(1, 200))
def test_written_members_are_read_back(members: list[Member], size: int) -> None:
    archive = write_archive(members)
    assert len(archive) % BLOCK == 0
    source = Source(split(archive, size))
    assert list(read_members(source, lambda _name: True)) == members
    source.skip_zeros()
    assert source.peek() == b"" and source.position == len(archive)


@given(MEMBERS.filter(bool), st.data())
def test_every_cut_is_refused(members: list[Member], data: st.DataObject) -> None:
    archive = write_archive(members).rstrip(b"\0")
    end = data.draw(st.integers(0, len(archive) - 1))
    with pytest.raises(CpioError):
        list(read_members(Source([archive[:end]]), lambda _name: True))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    with pytest.raises(CpioError):
        list(read_members(Source([data]), lambda _name: True))


def test_content_that_nobody_wants_is_not_kept() -> None:
    archive = write_archive(
        [Member("a", stat.S_IFREG | 0o644, 0, b"one"), Member("b", stat.S_IFREG | 0o644, 0, b"two")]
    )
    found = list(read_members(Source([archive]), lambda name: name == "b"))
    assert [(each.name, each.data, each.size) for each in found] == [("a", b"", 3), ("b", b"two", 3)]


def test_content_above_the_limit_is_not_kept() -> None:
    archive = write_archive([Member("a", stat.S_IFREG | 0o644, 0, bytes(CONTENT_LIMIT + 1))])
    assert [each.data for each in read_members(Source([archive]), lambda _name: True)] == [b""]


@pytest.mark.parametrize(
    ("place", "text", "problem"),
    [
        (0, b"070703", "byte 0: no cpio header"),
        (0, b"070707", "byte 0: no cpio header"),
        (14, b"0000zzzz", "not hexadecimal"),
        (94, b"00000000", "a name of 0 bytes"),
        (94, b"00001001", "a name of 4097 bytes"),
        (94, b"FFFFFFFF", "a name of 4294967295 bytes"),
        (54, b"FFFFFFFF", "ends after"),
    ],
)
def test_header_with_a_wrong_field(place: int, text: bytes, problem: str) -> None:
    archive = bytearray(write_archive([Member("name", stat.S_IFREG | 0o644, 0, b"data")]))
    archive[place : place + len(text)] = text
    with pytest.raises(CpioError, match=problem):
        list(read_members(Source([bytes(archive)]), lambda _name: True))
