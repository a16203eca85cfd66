# SPDX-License-Identifier: Apache-2.0
"""NRI's connections: two of ttrpc on one socket, one for each direction.

Frames of the socket: connection and length, four bytes each, big-endian, and the data (containerd/nri
pkg/net/multiplex/mux.go). In a connection's data, messages: length and stream, four bytes each, kind and flags, one
each, and the data (containerd/ttrpc PROTOCOL.md). A message may begin in one frame and end in another.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FRAME = struct.Struct(">II")
MESSAGE = struct.Struct(">IIBB")
# On the first connection the runtime sends requests to the plugin, on the second the plugin to the runtime.
PLUGIN_CONNECTION, RUNTIME_CONNECTION = 1, 2
REQUEST, RESPONSE = 1, 2
LONGEST_MESSAGE = 4 << 20
LONGEST_FRAME = LONGEST_MESSAGE + MESSAGE.size
# The other side reads into 4096 bytes and fails on a longer frame (ttrpc's bufio.Reader, mux.go conn.Read).
FRAME_SENT = 4096


class ProtocolError(Exception):
    """The other side violates the protocol."""


class Demultiplexer:
    """Splits the socket's bytes into complete messages."""

    def __init__(self) -> None:
        self.trunk = bytearray()
        self.connections = {PLUGIN_CONNECTION: bytearray(), RUNTIME_CONNECTION: bytearray()}

    def feed(self, data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield connection, stream, kind and data of each message that these bytes complete. Raises ProtocolError."""
        self.trunk += data
        while len(self.trunk) >= FRAME.size:
            connection, length = FRAME.unpack_from(self.trunk)
            if length > LONGEST_FRAME:
                raise ProtocolError(f"a frame of {length} bytes, more than {LONGEST_FRAME}")
            if len(self.trunk) < FRAME.size + length:
                return
            piece = self.trunk[FRAME.size : FRAME.size + length]
            del self.trunk[: FRAME.size + length]
            # As in mux.go, data for a connection that was never opened is dropped.
            if connection in self.connections:
                self.connections[connection] += piece
                yield from self.take_messages(connection)

    def take_messages(self, connection: int) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield the complete messages in a connection's data. Raises ProtocolError."""
        waiting = self.connections[connection]
        while len(waiting) >= MESSAGE.size:
            length, stream, kind, _ = MESSAGE.unpack_from(waiting)
            if length > LONGEST_MESSAGE:
                raise ProtocolError(f"a message of {length} bytes, more than {LONGEST_MESSAGE}")
            if len(waiting) < MESSAGE.size + length:
                return
            data = bytes(waiting[MESSAGE.size : MESSAGE.size + length])
            del waiting[: MESSAGE.size + length]
            yield connection, stream, kind, data


def frame_message(connection: int, stream: int, kind: int, data: bytes) -> bytes:
    """Return a message as bytes for the socket."""
    whole = MESSAGE.pack(len(data), stream, kind, 0) + data
    pieces = (whole[at : at + FRAME_SENT] for at in range(0, len(whole), FRAME_SENT))
    return b"".join(FRAME.pack(connection, len(piece)) + piece for piece in pieces)
