# SPDX-License-Identifier: Apache-2.0
"""The undo log: all entries are read again, and a torn line is a step that was never begun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hooks.guest.undo_log import (
    FORMAT,
    KINDS,
    NUMBERS,
    Entry,
    UndoLog,
    format_entry,
    parse_undo_log,
    quote,
    unquote,
)

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
    """Return an undo log with these entries."""
    return f"{FORMAT}\n".encode() + b"".join(format_entry(entry.kind, *entry.words) for entry in entries)


@given(WORDS)
def test_quote_round_trips_without_special_characters(text: str) -> None:
    quoted = quote(text)
    assert quoted.isascii()
    assert quoted.isprintable()
    assert "/" not in quoted
    assert os.fsencode(unquote(quoted)) == os.fsencode(text)


@given(WORDS, WORDS)
def test_quote_is_injective(one: str, other: str) -> None:
    assert (quote(one) == quote(other)) == (one == other)


@given(st.lists(ENTRIES, max_size=6))
def test_undo_log_round_trip(entries: list[Entry]) -> None:
    assert parse_undo_log(write(entries)) == entries


@given(st.lists(ENTRIES, max_size=4))
def test_parse_undo_log_torn_is_prefix(entries: list[Entry]) -> None:
    data = write(entries)
    found = [parse_undo_log(data[:length]) for length in range(len(data) + 1)]
    assert all(part == entries[: len(part)] for part in found)
    # No entry is lost whose line was written.
    lines = [data[:length].count(b"\n") for length in range(len(data) + 1)]
    assert [len(part) for part in found] == [max(count - 1, 0) for count in lines]


@given(st.binary(max_size=60))
def test_parse_undo_log_any_bytes(data: bytes) -> None:
    for entry in parse_undo_log(data):
        assert len(entry.words) == len(KINDS[entry.kind])


def test_parse_undo_log_skips_damaged_line() -> None:
    data = b"group\t%zz\ngroup\t1\nnews\tx\ngroup\t1\t2\ngroup\t%\ngroup\t2\n"
    assert [entry.words for entry in parse_undo_log(data)] == [("1",), ("2",)]


def test_undo_log_wrong_word_count_refused() -> None:
    with pytest.raises(ValueError, match="device takes address, driver, override, inode, vendor, device, class"):
        format_entry("device", "0000:01:00.0")


def test_undo_log_entry_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    undo_log = UndoLog(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), str(path))
    writes: list[bytes] = []
    real_write = os.write

    def write_and_see(fd: int, data: bytes) -> int:
        writes.append(data)
        return real_write(fd, data)

    monkeypatch.setattr(os, "write", write_and_see)
    undo_log.add("device", "0000:01:00.0", "e1000e", "", 5, "8086", "10d3", "020000")
    undo_log.add("node", "/r\n", "vfio/12", 244, 0)
    undo_log.close()
    assert writes == [b"device\t0000:01:00.0\te1000e\t\t5\t8086\t10d3\t020000\n", b"node\t%2fr%0a\tvfio%2f12\t244\t0\n"]
    (device, node) = parse_undo_log(path.read_bytes())
    assert device.words == ("0000:01:00.0", "e1000e", "", "5", "8086", "10d3", "020000")
    assert (node.words[0], node.number(2)) == ("/r\n", 244)


def test_undo_log_short_write_fails_cleanly() -> None:
    # /run is full: the kernel writes a part of the line. The step must not be done then, and the next note is whole.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fill = os.write(writer, b"x" * (1 << 20))
    os.read(reader, 4096)
    undo_log = UndoLog(writer, "pipe")
    with pytest.raises(OSError, match="No space left"):
        undo_log.add("group", "y" * 8000)
    left = fill
    while left > 0:
        left -= len(os.read(reader, 65536))
    undo_log.add("group", "2")
    data = os.read(reader, 65536)
    os.close(reader)
    undo_log.close()
    assert [entry.words for entry in parse_undo_log(data)] == [("2",)]
