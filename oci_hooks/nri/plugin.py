# SPDX-License-Identifier: Apache-2.0
"""vfio-nri: connects to the container runtime's NRI socket, and vetoes a container that the host check would refuse.

It keeps no state between requests, and ends when the socket closes. The runtime decides whether and how long it waits:
without an answer in time containerd closes the connection and creates the container.
"""

from __future__ import annotations

import os

from oci_hooks.findings import EXIT_DONE, Finding, HookError, InputError, Refusal
from oci_hooks.log import report
from oci_hooks.nri import container, messages
from oci_hooks.nri.transport import (
    PLUGIN_CONNECTION,
    REQUEST,
    RESPONSE,
    RUNTIME_CONNECTION,
    Demultiplexer,
    ProtocolError,
    frame_message,
)
from oci_hooks.nri.wire import Malformed, decode, encode
from oci_hooks.program import Arguments, Run, open_standard_descriptors, run_work
from oci_hooks.system import Deadline, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from argparse import Namespace
    from typing import Any

PROGRAM = "vfio-nri"
SOCKET = "/var/run/nri/nri.sock"
# containerd lists all running containers to each new plugin first; it may be busy with another plugin.
REGISTRATION_SECONDS = 30.0
# containerd's plugin_request_timeout, until it has sent its own; the answer must arrive before.
REQUEST_SECONDS = 2.0
SHARE = 0.75
# A peer that does not accept an answer of some hundred bytes is stuck.
SEND_SECONDS = 10.0
# Codes of google.rpc.Status.
FAILED_PRECONDITION, UNIMPLEMENTED = 9, 12
# Maximum number of errors in one veto; the log has all.
MOST_ERRORS = 3
# Methods that request nothing here but need an answer.
UNCONCERNED = ("Shutdown", "StateChange", "UpdateContainer", "StopContainer")
HINT = (
    'is NRI on? containerd: [plugins."io.containerd.nri.v1.nri"] disable = false; CRI-O: [crio.nri] enable_nri = true'
)


def main(argv: list[str]) -> int:
    """Run the plugin until the socket closes or a signal arrives, and return the exit code. argv: without the name."""
    open_standard_descriptors()
    try:
        arguments = parse_arguments(argv)
        serve(arguments.socket, Plugin(arguments.index, arguments.settings, Root()))
    except HookError as error:
        report(PROGRAM, "", error.findings)
        return error.exit_code
    return EXIT_DONE


def parse_arguments(argv: list[str]) -> Namespace:
    """Return the command line. Raises InputError [bad-arguments]."""
    from argparse import ArgumentParser

    from oci_hooks import __version__

    class Parser(ArgumentParser):
        """A parser that reports errors as findings."""

        def error(self, message: str) -> None:  # type: ignore[override]
            raise InputError("bad-arguments", "arguments", message, f"see {PROGRAM} --help")

    parser = Parser(prog=PROGRAM, allow_abbrev=False, description="NRI plugin: check VFIO groups on the host.")
    parser.add_argument("--socket", default=SOCKET, metavar="PATH", help=f"the runtime's socket ({SOCKET})")
    parser.add_argument("--index", default="90", metavar="NN", help="place among the plugins, 00 to 99 (90)")
    parser.add_argument("--settings", default="", metavar="FILE", help="settings to use instead of those in /etc")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    arguments = parser.parse_args(argv)
    if len(arguments.index) != 2 or not (arguments.index.isascii() and arguments.index.isdigit()):
        raise InputError("bad-arguments", "arguments", f"{arguments.index!r} is not an index", "use two digits: 90")
    return arguments


# The socket ----------------------------------------------------------------------------------------------------------


def serve(path: str, plugin: Plugin) -> None:
    """Answer the runtime until it closes the socket or SIGTERM or SIGINT comes.

    Raises Refusal: nri-unreachable, nri-refused, nri-no-answer, nri-protocol.
    """
    import select

    signals = catch_signals()
    poller = select.poll()
    with connect(path) as sock:
        poller.register(sock, select.POLLIN)
        poller.register(signals, select.POLLIN)
        until = Deadline(REGISTRATION_SECONDS)
        try:
            sock.sendall(plugin.register())
            while True:
                ready = [fd for fd, _ in poller.poll(None if plugin.is_configured else until.remaining() * 1000)]
                if signals in ready:
                    return
                if not ready:
                    raise make_refusal("nri-no-answer", path, f"did not answer within {REGISTRATION_SECONDS:.0f} s")
                data = sock.recv(1 << 16)
                if not data:
                    break
                for answer in plugin.feed(data):
                    sock.sendall(answer)
        except (ConnectionResetError, BrokenPipeError):
            pass
        except OSError as error:
            raise make_refusal("nri-no-answer", path, error.strerror or str(error)) from None
        except (ProtocolError, Malformed) as error:
            problem = f"violates the NRI protocol: {error}"
            raise Refusal("nri-protocol", path, problem, "report it with the runtime's version") from None
    if not plugin.is_configured:
        raise make_refusal("nri-refused", path, "was closed before the plugin was registered")


def connect(path: str) -> socket.socket:
    """Return a connection to the runtime. Raises Refusal [nri-unreachable]."""
    import socket

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(SEND_SECONDS)
    try:
        sock.connect(path)
    except (OSError, ValueError) as error:
        sock.close()
        problem = f"cannot connect to it: {getattr(error, 'strerror', None) or error}"
        raise make_refusal("nri-unreachable", path, problem) from None
    return sock


def make_refusal(code: str, path: str, problem: str) -> Refusal:
    """Return the error for a runtime that the plugin cannot work with."""
    return Refusal(code, path, problem, HINT)


def catch_signals() -> int:
    """Return a descriptor that becomes readable on SIGTERM or SIGINT, so that an answer is finished first."""
    import signal

    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    return readable


# The conversation ----------------------------------------------------------------------------------------------------


class Plugin:
    """The protocol of one connection, without the socket.

    index: position among the plugins; settings: path, "" for the usual file; root: access to the system.
    """

    def __init__(self, index: str, settings: str, root: Root) -> None:
        self.index = index
        self.settings = settings
        self.root = root
        self.incoming = Demultiplexer()
        self.seconds = REQUEST_SECONDS
        self.is_configured = False

    def register(self) -> bytes:
        """Return the bytes to send first."""
        payload = encode({"plugin_name": PROGRAM, "plugin_idx": self.index}, messages.REGISTER)
        request = {"service": messages.RUNTIME_SERVICE, "method": "RegisterPlugin", "payload": payload}
        return frame_message(RUNTIME_CONNECTION, 1, REQUEST, encode(request, messages.REQUEST))

    def feed(self, data: bytes) -> list[bytes]:
        """Return the bytes to send after receiving these. Raises ProtocolError, Malformed, Refusal."""
        answers = []
        for connection, stream, kind, message in self.incoming.feed(data):
            if (connection, kind) == (PLUGIN_CONNECTION, REQUEST):
                reply = self.answer(decode(message, messages.REQUEST))
                answers.append(frame_message(connection, stream, RESPONSE, encode(reply, messages.RESPONSE)))
            elif (connection, kind) == (RUNTIME_CONNECTION, RESPONSE):
                self.take_response(decode(message, messages.RESPONSE))
            else:
                raise ProtocolError(f"a message of kind {kind} on connection {connection}")
        return answers

    def take_response(self, response: dict[str, Any]) -> None:
        """Handle the runtime's answer to the registration. Raises Refusal [nri-refused]."""
        status = response["status"]
        if status and status["code"]:
            problem = f"the runtime refused it: {status['message']}"
            raise Refusal("nri-refused", f"plugin {self.index}-{PROGRAM}", problem, "see the runtime's log")

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the response to a request."""
        method = request["method"] if request["service"] == messages.PLUGIN_SERVICE else ""
        payload = request["payload"]
        if method == "Configure":
            return {"payload": self.configure(decode(payload, messages.CONFIGURE))}
        if method == "Synchronize":
            return {"payload": encode(decode(payload, messages.SYNCHRONIZE), messages.SYNCHRONIZED)}
        if method == "CreateContainer":
            return self.create_container(decode(payload, messages.CREATE))
        if method in UNCONCERNED:
            return {}
        return {"status": {"code": UNIMPLEMENTED, "message": f"{PROGRAM} has no {request['method']}"}}

    def configure(self, request: dict[str, Any]) -> bytes:
        """Set the runtime's time limit, and return the events that the plugin subscribes to."""
        # CRI-O, and containerd before 1.7.3, send none.
        if request["request_timeout"] > 0:
            self.seconds = request["request_timeout"] / 1000
        self.is_configured = True
        return encode({"events": 1 << (messages.CREATE_CONTAINER - 1)}, messages.CONFIGURED)

    def create_container(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the response to CreateContainer: a veto, nothing, or an annotation."""
        pod = request["pod"] or decode(b"", messages.POD)
        described = request["container"] or decode(b"", messages.CONTAINER)
        seconds = self.seconds * SHARE
        run = Run(PROGRAM, Arguments(settings=self.settings), Deadline(seconds), self.root)
        outcome = run_work(run, lambda run: container.check(run, pod, described, seconds))
        if outcome.findings:
            report(PROGRAM, described["id"], outcome.findings)
        if outcome.code != EXIT_DONE:
            return {"status": {"code": FAILED_PRECONDITION, "message": format_veto(outcome.findings)}}
        annotations = run.details.get("annotations")
        if not annotations:
            return {}
        return {"payload": encode({"adjust": {"annotations": annotations}}, messages.CREATED)}


def format_veto(findings: list[Finding]) -> str:
    """Return the errors among the findings on one line, as the host check prints them."""
    errors = [finding.as_line() for finding in findings if finding.level == "error"]
    more = f" | and {len(errors) - MOST_ERRORS} more errors, in the journal" if len(errors) > MOST_ERRORS else ""
    return f"{PROGRAM}: {' | '.join(errors[:MOST_ERRORS])}{more}"
