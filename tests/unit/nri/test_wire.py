# SPDX-License-Identifier: Apache-2.0
"""vfio-nri's own codecs: Protocol Buffers against the genuine library, the connections against pieces of any size."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hooks.nri import messages
from oci_hooks.nri.transport import FRAME, MESSAGE, Demultiplexer, ProtocolError, frame_message
from oci_hooks.nri.wire import Malformed, decode, encode

pytestmark = pytest.mark.unit

ALL = {
    name: schema
    for name, schema in vars(messages).items()
    if isinstance(schema, dict) and name.isupper() and not name.startswith("_")
}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Return what a field of this kind may have."""
    if isinstance(kind, list):
        return st.lists(values_of(kind[0]), max_size=3)
    if isinstance(kind, dict):
        return st.none() | messages_of(kind)
    plain = {"text": TEXTS, "bytes": st.binary(max_size=12), "int": INT64, "bool": st.booleans()}
    return plain[kind] if kind in plain else st.dictionaries(TEXTS, TEXTS, max_size=3)


def messages_of(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return messages with every field; those in lists are no None."""
    return st.fixed_dictionaries(
        {
            name: st.lists(messages_of(kind[0]), max_size=2)
            if isinstance(kind, list) and isinstance(kind[0], dict)
            else values_of(kind)
            for name, (_, kind) in schema.items()
        }
    )


def make_genuine(name: str) -> Any:
    """Return Google's class for a message of messages.py."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file: Any = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package="t", syntax="proto3")
    types = {"text": 9, "bytes": 12, "int": 3, "bool": 8}

    def add(title: str, schema: dict[str, Any]) -> str:
        message = file.message_type.add(name=title)
        for key, (number, kind) in schema.items():
            field = message.field.add(name=key, number=number, label=1)
            if isinstance(kind, list) or kind == "map":
                field.label = 3
            single = kind[0] if isinstance(kind, list) else kind
            if single == "map":
                entry = "".join(part.capitalize() for part in key.split("_")) + "Entry"
                nested = message.nested_type.add(name=entry)
                nested.options.map_entry = True
                for part, place in (("key", 1), ("value", 2)):
                    nested.field.add(name=part, number=place, label=1, type=9)
                field.type, field.type_name = 11, f".t.{title}.{entry}"
            elif isinstance(single, dict):
                field.type, field.type_name = 11, add(f"{title}_{key}", single)
            else:
                field.type = types[single]
        return f".t.{title}"

    add(name, ALL[name])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}"))


def fill(message: Any, values: dict[str, Any]) -> Any:
    """Give Google's message these values."""
    for name, value in values.items():
        if isinstance(value, dict):
            target = getattr(message, name)
            if hasattr(target, "update"):
                target.update(value)
            else:
                target.SetInParent()
                fill(target, value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    fill(getattr(message, name).add(), item)
                else:
                    getattr(message, name).append(item)
        elif value is not None:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize("name", sorted(ALL))
def test_messages_are_those_of_the_genuine_library(name: str) -> None:
    genuine = make_genuine(name)

    @settings(max_examples=40, deadline=None)
    @given(messages_of(ALL[name]))
    def check(values: dict[str, Any]) -> None:
        message = fill(genuine(), values)
        assert decode(message.SerializeToString(), ALL[name]) == values
        assert genuine.FromString(encode(values, ALL[name])) == message

    check()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(sorted(ALL)))
def test_any_bytes_are_a_message_or_malformed(data: bytes, name: str) -> None:
    try:
        message = decode(data, ALL[name])
    except Malformed:
        return
    assert set(message) == set(ALL[name])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x0a\x05ab", "field 1 is cut off"),
        (b"\x0a", "a number is cut off"),
        (b"\x02\x00", "field number 0"),
        (b"\x0b", "field 1 is of type 3"),
        (b"\x08\x01", "field 1 is of type 0, not 2"),
        (b"\x0a\x01\xff", "field 1 is not UTF-8"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "a number is longer than 64 bits"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=f"^{reason}$"):
        decode(data, messages.REGISTER)


def test_unknown_fields_are_passed_over() -> None:
    later = b"\xa8\x06\x07" + b"\xb1\x06" + b"8" * 8 + b"\xba\x06\x03abc" + b"\xc5\x06" + b"4" * 4
    assert decode(later + b"\x0a\x01n", messages.REGISTER) == {"plugin_name": "n", "plugin_idx": ""}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(1, 9), st.sampled_from([1, 2]), st.binary()), max_size=5),
    st.integers(0, 9000),
    st.lists(st.integers(1, 5000), min_size=1, max_size=9),
)
def test_messages_arrive_whole_however_they_are_cut(
    sent: list[tuple[int, int, int, bytes]], longer: int, cuts: list[int]
) -> None:
    sent = [(connection, stream, kind, data + b"x" * longer) for connection, stream, kind, data in sent]
    stream = b"".join(frame_message(*message) for message in sent)
    incoming, turn = Demultiplexer(), 0
    got: list[tuple[int, int, int, bytes]] = []
    while stream:
        size = cuts[turn % len(cuts)]
        got += incoming.feed(stream[:size])
        stream, turn = stream[size:], turn + 1
    assert got == sent
    assert not incoming.trunk
    assert not any(incoming.connections.values())


def test_no_frame_is_longer_than_the_other_side_reads() -> None:
    data, lengths = frame_message(1, 1, 2, b"x" * 10_000), []
    while data:
        length = FRAME.unpack_from(data)[1]
        lengths.append(length)
        data = data[FRAME.size + length :]
    assert lengths == [4096, 4096, 10_000 + MESSAGE.size - 2 * 4096]


def test_a_connection_that_nobody_opened_is_ignored() -> None:
    incoming = Demultiplexer()
    assert list(incoming.feed(frame_message(7, 1, 1, b"?") + frame_message(1, 1, 1, b"!"))) == [(1, 1, 1, b"!")]


@pytest.mark.parametrize("data", [FRAME.pack(1, 5 << 20), FRAME.pack(1, MESSAGE.size) + MESSAGE.pack(5 << 20, 1, 1, 0)])
def test_what_is_too_long_is_not_waited_for(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="more than"):
        list(Demultiplexer().feed(data))
