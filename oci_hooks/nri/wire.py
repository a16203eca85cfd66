# SPDX-License-Identifier: Apache-2.0
"""Encode and decode Protocol Buffers, as far as NRI needs them: from bytes to dictionaries and back.

Hand-written, for six messages with a dozen used fields: code that protoc generates needs one version of its library
(3.12 on Debian 11, 3.21 on 12, 6 on PyPI), which would be the hooks' only mandatory dependency. A property test
compares the results with that library's. Source: protobuf.dev/programming-guides/encoding.

A schema is a dictionary: name of a field -> (number, kind). Kinds: "text", "bytes", "int", "bool", "map" (of texts),
another schema for a message, and a list of one of these for a repeated field. Unknown fields are skipped.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Schema = dict[str, tuple[int, Any]]

# Types of fields on the wire: a varint, eight bytes, a length and its bytes, four bytes.
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
SIZES = {FIXED64: 8, FIXED32: 4}
HIGHEST_FIELD = (1 << 29) - 1
ENTRY: Schema = {"key": (1, "text"), "value": (2, "text")}
EMPTY: dict[str, object] = {"text": "", "bytes": b"", "int": 0, "bool": False}


class Malformed(Exception):
    """These bytes are not a valid message of this kind."""


# Reading -------------------------------------------------------------------------------------------------------------


def decode(data: bytes, schema: Schema) -> dict[str, Any]:
    """Return a message's fields by name: all of the schema's; an absent field is empty, an absent message None.

    Raises Malformed.
    """
    message: dict[str, Any] = {name: make_empty(kind) for name, (_, kind) in schema.items()}
    fields = {number: (name, kind) for name, (number, kind) in schema.items()}
    for number, wire_type, value in read_fields(data):
        if number not in fields:
            continue
        name, kind = fields[number]
        if isinstance(kind, list) and kind[0] in ("int", "bool"):
            raise Malformed(f"field {number}: packed numbers are not used here")
        item = read_value(value, wire_type, kind[0] if isinstance(kind, list) else kind, number)
        if isinstance(kind, list):
            message[name].append(item)
        elif kind == "map":
            message[name][item["key"]] = item["value"]
        else:
            # If a message occurs twice, the encoding requires merging; Go's library never writes it twice.
            message[name] = item
    return message


def make_empty(kind: Any) -> Any:
    """Return the value of an absent field."""
    if isinstance(kind, list):
        return []
    if isinstance(kind, dict):
        return None
    return {} if kind == "map" else EMPTY[kind]


def read_fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Yield number, type and raw value of each field of a message. Raises Malformed."""
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        number, wire_type = key >> 3, key & 7
        if not 1 <= number <= HIGHEST_FIELD:
            raise Malformed(f"field number {number}")
        if wire_type == VARINT:
            value, at = read_varint(data, at)
            yield number, wire_type, value
            continue
        if wire_type == LENGTH:
            size, at = read_varint(data, at)
        elif wire_type in SIZES:
            size = SIZES[wire_type]
        else:
            raise Malformed(f"field {number} is of type {wire_type}")
        if size > len(data) - at:
            raise Malformed(f"field {number} is cut off")
        yield number, wire_type, data[at : at + size]
        at += size


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at an offset, unsigned, and the offset after it. Raises Malformed."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise Malformed("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 63:
            raise Malformed("a number is longer than 64 bits")
    return value & (1 << 64) - 1, at


def read_value(value: int | bytes, wire_type: int, kind: Any, number: int) -> Any:
    """Return a field's value. Raises Malformed."""
    wanted = VARINT if kind in ("int", "bool") else LENGTH
    if wire_type != wanted:
        raise Malformed(f"field {number} is of type {wire_type}, not {wanted}")
    if isinstance(value, int):
        if kind == "bool":
            return value != 0
        return value - (1 << 64) if value >> 63 else value
    if kind == "bytes":
        return value
    if kind != "text":
        return decode(value, ENTRY if kind == "map" else kind)
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Malformed(f"field {number} is not UTF-8") from None


# Writing -------------------------------------------------------------------------------------------------------------


def encode(message: dict[str, Any], schema: Schema) -> bytes:
    """Return the bytes of a message. Empty values are left out, as in proto3."""
    parts = []
    for name, value in message.items():
        number, kind = schema[name]
        if isinstance(kind, list):
            parts += [write_value(number, item, kind[0]) for item in value]
        elif kind == "map":
            parts += [write_value(number, {"key": key, "value": text}, ENTRY) for key, text in value.items()]
        elif value not in ("", b"", 0, None):
            parts.append(write_value(number, value, kind))
    return b"".join(parts)


def write_value(number: int, value: Any, kind: Any) -> bytes:
    """Return one field with its key."""
    if kind in ("int", "bool"):
        return write_varint(number << 3 | VARINT) + write_varint(int(value))
    if isinstance(kind, dict):
        value = encode(value, kind)
    elif kind == "text":
        # Surrogates represent bytes from the system that are not UTF-8; the message must be UTF-8.
        value = value.encode("utf-8", "replace")
    return write_varint(number << 3 | LENGTH) + write_varint(len(value)) + bytes(value)


def write_varint(value: int) -> bytes:
    """Return a number as a varint; a negative one has 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
