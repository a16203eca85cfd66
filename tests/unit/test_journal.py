# SPDX-License-Identifier: Apache-2.0
"""The journal: whatever was noted is read again, and a torn line is a step that was never begun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks.guest.undo_log import FORMAT, KINDS, NUMBERS, Entry, Journal, format_entry, parse_journal, quote, unquote

pytestmark = pytest.mark.unit

# What a path or an id can hold: any character, and bytes that are no UTF-8.
WORDS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
).map(lambda text: os.fsdecode(os.fsencode(text)))
DIGITS = st.integers(0, 2**64 - 1).map(str)
ENTRIES = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: st.tuples(*[DIGITS if name in NUMBERS else WORDS for name in KINDS[kind]]).map(
        lambda words: Entry(kind, words)
    )
)


def write(entries: list[Entry]) -> bytes:
    """Return a journal with these entries."""
    return f"{FORMAT}\n".encode() + b"".join(format_entry(entry.kind, *entry.words) for entry in entries)


@given(WORDS)
def test_quoting_loses_nothing_and_leaves_nothing_with_a_meaning(text: str) -> None:
    quoted = quote(text)
    assert quoted.isascii()
    assert quoted.isprintable()
    assert "/" not in quoted
    assert os.fsencode(unquote(quoted)) == os.fsencode(text)


@given(WORDS, WORDS)
def test_different_texts_are_quoted_differently(one: str, other: str) -> None:
    assert (quote(one) == quote(other)) == (one == other)


@given(st.lists(ENTRIES, max_size=6))
def test_what_was_noted_is_read(entries: list[Entry]) -> None:
    assert parse_journal(write(entries)) == entries


@given(st.lists(ENTRIES, max_size=4))
def test_a_journal_torn_at_any_byte_is_a_beginning_of_itself(entries: list[Entry]) -> None:
    data = write(entries)
    found = [parse_journal(data[:length]) for length in range(len(data) + 1)]
    assert all(part == entries[: len(part)] for part in found)
    # No entry is lost whose line was written.
    lines = [data[:length].count(b"\n") for length in range(len(data) + 1)]
    assert [len(part) for part in found] == [max(count - 1, 0) for count in lines]


@given(st.binary(max_size=60))
def test_any_bytes_are_read_as_some_entries(data: bytes) -> None:
    for entry in parse_journal(data):
        assert len(entry.words) == len(KINDS[entry.kind])


def test_a_spoilt_line_costs_no_other() -> None:
    data = b"group\t%zz\ngroup\t1\nnews\tx\ngroup\t1\t2\ngroup\t%\ngroup\t2\n"
    assert [entry.words for entry in parse_journal(data)] == [("1",), ("2",)]


def test_a_wrong_number_of_words_is_not_written() -> None:
    with pytest.raises(ValueError, match="device takes address, driver, override, inode, vendor, device, class"):
        format_entry("device", "0000:01:00.0")


def test_notes_are_appended_each_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    journal = Journal(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), str(path))
    writes: list[bytes] = []
    real_write = os.write

    def write_and_see(fd: int, data: bytes) -> int:
        writes.append(data)
        return real_write(fd, data)

    monkeypatch.setattr(os, "write", write_and_see)
    journal.note("device", "0000:01:00.0", "e1000e", "", 5, "8086", "10d3", "020000")
    journal.note("node", "/r\n", "vfio/12", 244, 0)
    journal.close()
    assert writes == [b"device\t0000:01:00.0\te1000e\t\t5\t8086\t10d3\t020000\n", b"node\t%2fr%0a\tvfio%2f12\t244\t0\n"]
    (device, node) = parse_journal(path.read_bytes())
    assert device.words == ("0000:01:00.0", "e1000e", "", "5", "8086", "10d3", "020000")
    assert (node.words[0], node.number(2)) == ("/r\n", 244)


def test_a_note_that_did_not_fit_is_an_error_and_spoils_nothing() -> None:
    # /run is full: the kernel writes a part of the line. The step must not be done then, and the next note is whole.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fill = os.write(writer, b"x" * (1 << 20))
    os.read(reader, 4096)
    journal = Journal(writer, "pipe")
    with pytest.raises(OSError, match="No space left"):
        journal.note("group", "y" * 8000)
    left = fill
    while left > 0:
        left -= len(os.read(reader, 65536))
    journal.note("group", "2")
    data = os.read(reader, 65536)
    os.close(reader)
    journal.close()
    assert [entry.words for entry in parse_journal(data)] == [("2",)]
