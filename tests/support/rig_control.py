# SPDX-License-Identifier: Apache-2.0
"""The two wires between the rig and its machine: QEMU's monitor (QMP), and a line protocol to the tests inside.

Inside writes one JSON object a line to a virtio-serial port, the rig answers with one:
    {"up": true}                                           the command is about to start
    {"exit": 0}                                            the command has ended
    {"execute": "device_del", "arguments": {...}}          do this in QEMU        -> {"return": ...} or {"error": ...}
    {"wait": "DEVICE_DELETED", "match": {"device": "x"}}   wait for QEMU's event  -> {"event": {...}}
The first two are not answered. The rig listens and QEMU connects, so that nobody has to try until a socket is there.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

# QEMU's name for the port; inside it is /dev/virtio-ports/<name>.
PORT_NAME = "rig.control"

Message = dict[str, Any]


class Wire:
    """One connection that carries a JSON object a line. path: of the socket QEMU connects to."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.connection: socket.socket | None = None
        self.pending = b""

    def accept(self) -> socket.socket:
        """Take QEMU's connection and return it."""
        self.connection, _ = self.listener.accept()
        return self.connection

    def receive(self) -> list[Message] | None:
        """Return the messages that have come in, or None when the other side has gone."""
        assert self.connection is not None
        try:
            data = self.connection.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            return None
        *lines, self.pending = (self.pending + data).split(b"\n")
        return [json.loads(line) for line in lines if line.strip()]

    def send(self, message: Message) -> None:
        """Send one message."""
        if self.connection is not None:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Close both sockets."""
        self.listener.close()
        if self.connection is not None:
            self.connection.close()


class Relay:
    """Carries requests from inside to QMP and the answers back; remembers events until somebody waits for them.

    One request at a time comes from inside (tests take a lock), so answers need no numbers.
    """

    def __init__(self, control: Wire, qmp: Wire) -> None:
        self.control = control
        self.qmp = qmp
        self.up = False
        self.exit_code: int | None = None
        self.events: list[Message] = []
        self.waiting: Message | None = None
        self.greeted = False

    def handle_control(self, message: Message) -> None:
        """Take one message from inside."""
        if "up" in message:
            self.up = True
        elif "exit" in message:
            self.exit_code = int(message["exit"])
        elif "wait" in message:
            self.waiting = message
            self.answer_waiting()
        else:
            self.qmp.send({"execute": message["execute"], "arguments": message.get("arguments", {})})

    def handle_qmp(self, message: Message) -> None:
        """Take one message from QEMU's monitor."""
        if "QMP" in message:
            self.qmp.send({"execute": "qmp_capabilities"})
        elif "event" in message:
            self.events.append(message)
            self.answer_waiting()
        elif not self.greeted:
            # The answer to qmp_capabilities: ours, nobody inside asked.
            self.greeted = True
        else:
            self.control.send(message)

    def answer_waiting(self) -> None:
        """Send the event that inside waits for, if it has happened. Each event is handed out once."""
        if self.waiting is None:
            return
        for event in self.events:
            if is_match(event, self.waiting):
                self.events.remove(event)
                self.waiting = None
                self.control.send({"event": event})
                return


def is_match(event: Message, wanted: Message) -> bool:
    """Return whether this is the event waited for."""
    data = event.get("data", {})
    return bool(event["event"] == wanted["wait"]) and all(
        data.get(key) == value for key, value in wanted.get("match", {}).items()
    )
