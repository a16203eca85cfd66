# SPDX-License-Identifier: Apache-2.0
"""vfio-nri: which containers it vetoes, with what words, and what it makes of a runtime that talks nonsense."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oci_hooks.findings import Finding, HookError
from oci_hooks.nri import messages, plugin
from oci_hooks.nri.transport import Demultiplexer, ProtocolError, frame_message
from oci_hooks.nri.wire import Malformed, decode, encode
from oci_hooks.oci import DEVICES_ANNOTATION
from oci_hooks.system import Root
from tests.support.fake_host import VFIO_MAJOR, HostTree

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]
NIC = "0000:03:00.0"
GROUP = {"path": "/dev/vfio/12", "type": "c", "major": VFIO_MAJOR, "minor": 0}
CONTROL = {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196}
NULL = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}
KATA = {"id": "p1", "runtime_handler": "kata-qemu"}
VIOMMU = '[hypervisor.qemu]\npath = "/usr/bin/qemu-system-x86_64"\nmachine_type = "q35"\nenable_iommu = {}\n'
CONTAINERD = '[plugins.cri.containerd.runtimes.{}]\nruntime_type = "io.containerd.kata.v2"\n'
BAD = "[group-not-viable] group 12: 0000:03:00.1 is bound to ixgbe"


@pytest.fixture(name="tree")
def make_tree(tmp_path: Path) -> HostTree:
    """Return a host with one good group."""
    tree = HostTree(tmp_path)
    tree.pci(NIC, "vfio-pci", "12")
    tree.vfio("12", 0)
    return tree


def call(side: plugin.Plugin, method: str, payload: bytes, service: str = messages.PLUGIN_SERVICE) -> dict[str, Any]:
    """Ask the plugin as the runtime does, and return the response."""
    request = encode({"service": service, "method": method, "payload": payload}, messages.REQUEST)
    (answer,) = side.feed(frame_message(1, 3, 1, request))
    ((connection, stream, kind, data),) = Demultiplexer().feed(answer)
    assert (connection, stream, kind) == (1, 3, 2)
    return decode(data, messages.RESPONSE)


def create(tree: HostTree, *devices: Any, pod: Any = None, **parts: Any) -> tuple[str, dict[str, str]]:
    """Return the veto ("" without one) and the added annotations for a container with these devices."""
    container = {"id": "c1", "linux": {"devices": list(devices)}, **parts}
    payload = encode({"pod": pod or {"id": "p1"}, "container": container}, messages.CREATE)
    response = call(plugin.Plugin("90", "", Root(str(tree.top))), "CreateContainer", payload)
    adjust = decode(response["payload"], messages.CREATED)["adjust"]
    return (response["status"] or {}).get("message", ""), adjust["annotations"] if adjust else {}


def test_a_good_container_is_not_touched(tree: HostTree) -> None:
    assert create(tree, CONTROL, GROUP) == ("", {})


def test_a_bad_group_is_vetoed_with_the_hooks_line(tree: HostTree, capfd: pytest.CaptureFixture[str]) -> None:
    tree.pci("0000:03:00.1", "ixgbe", "12")
    veto, _ = create(tree, CONTROL, GROUP)
    assert veto.startswith(f"vfio-nri: error: {BAD}")
    assert "driverctl set-override 0000:03:00.1 vfio-pci" in veto
    assert veto in capfd.readouterr().err


@pytest.mark.parametrize("path", ["/dev/vfio/12", "/dev//vfio/./12", "//dev/vfio/12"])
def test_a_path_is_vfios_however_it_is_written(tree: HostTree, path: str) -> None:
    tree.pci("0000:03:00.1", "ixgbe", "12")
    assert BAD in create(tree, {**GROUP, "path": path})[0]


def test_without_vfio_nothing_of_the_host_is_read(tree: HostTree) -> None:
    tree.write("/etc/oci-vfio-hooks/host.toml", "no toml")
    odd = {"path": "null", "type": "?", "major": -5, "minor": 3}
    assert create(tree, NULL, odd, CONTROL) == ("", {})
    veto, _ = create(tree, GROUP)
    assert "[bad-settings] /etc/oci-vfio-hooks/host.toml" in veto


def test_a_device_that_is_none_is_refused_by_its_place(tree: HostTree) -> None:
    veto, _ = create(tree, GROUP, {**GROUP, "type": "x"})
    assert "[bad-config] the container that NRI describes: linux.devices[1].type: expected one of c, b, u, p" in veto


def test_the_modes_of_host_toml_hold(tree: HostTree) -> None:
    tree.pci("0000:03:00.1", "ixgbe", "12")
    tree.write("/etc/oci-vfio-hooks/host.toml", 'mode = "warn"')
    assert create(tree, GROUP) == ("", {})


def test_a_privileged_container_is_excused(tree: HostTree) -> None:
    tree.pci("0000:03:00.1", "ixgbe", "12")
    assert create(tree, GROUP, {"path": "/dev/mem", "type": "c", "major": 1, "minor": 1}) == ("", {})


@pytest.mark.parametrize("handler", ["kata-qemu", "secure"])
def test_the_pods_handler_brings_katas_checks(tree: HostTree, handler: str) -> None:
    tree.write("/etc/containerd/config.toml", CONTAINERD.format("secure"))
    tree.write("/etc/kata-containers/configuration.toml", VIOMMU.format("false"))
    wanted = {DEVICES_ANNOTATION: "auto", "io.kubernetes.cri.container-type": "container"}
    pod = {"id": "p1", "runtime_handler": handler}
    veto, _ = create(tree, CONTROL, GROUP, pod=pod, annotations=wanted)
    assert "[viommu-off]" in veto
    assert create(tree, CONTROL, GROUP, pod={"id": "p1", "runtime_handler": "runc"}, annotations=wanted) == ("", {})


def test_an_annotation_names_the_devices_only_where_it_is_asked_for(tree: HostTree) -> None:
    tree.write("/etc/kata-containers/configuration.toml", VIOMMU.format("true"))
    assert create(tree, CONTROL, GROUP, pod=KATA) == ("", {})
    tree.write("/etc/oci-vfio-hooks/host.toml", "[nri]\nannotate = true")
    assert create(tree, CONTROL, GROUP, pod=KATA) == ("", {DEVICES_ANNOTATION: "id:8086:10d3"})
    assert create(tree, CONTROL, GROUP) == ("", {})
    assert create(tree, GROUP, pod=KATA, annotations={DEVICES_ANNOTATION: "auto"}) == ("", {})
    own = {f"{DEVICES_ANNOTATION}.web": "auto"}
    assert create(tree, CONTROL, GROUP, pod=KATA, name="web", annotations=own) == ("", {})
    named = {DEVICES_ANNOTATION: "id:8086:10d3"}
    assert create(tree, CONTROL, GROUP, pod=KATA, name="sidecar", annotations=own) == ("", named)


def test_many_errors_are_counted() -> None:
    found = [Finding("error", f"c{n}", "x", "is wrong") for n in range(5)]
    warning = Finding("warning", "w", "x", "is odd")
    assert plugin.format_veto([*found, warning]) == (
        "vfio-nri: error: [c0] x: is wrong | error: [c1] x: is wrong | error: [c2] x: is wrong"
        " | and 2 more errors, in the journal"
    )


def test_a_defect_is_a_finding(tree: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oci_hooks.nri.container.check", lambda *_: 1 // 0)
    assert "error: [internal] test_plugin.py" in create(tree, GROUP)[0]


# The conversation ----------------------------------------------------------------------------------------------------


def test_registration_asks_for_the_creation_of_containers_only() -> None:
    side = plugin.Plugin("42", "", Root())
    ((connection, stream, kind, data),) = Demultiplexer().feed(side.register())
    request = decode(data, messages.REQUEST)
    assert (connection, stream, kind, request["method"]) == (2, 1, 1, "RegisterPlugin")
    assert decode(request["payload"], messages.REGISTER) == {"plugin_name": "vfio-nri", "plugin_idx": "42"}
    payload = encode({"request_timeout": 800}, messages.CONFIGURE)
    assert decode(call(side, "Configure", payload)["payload"], messages.CONFIGURED) == {"events": 8}
    assert (side.is_configured, side.seconds) == (True, 0.8)


def test_parts_of_the_list_of_what_runs_are_taken() -> None:
    side = plugin.Plugin("42", "", Root())
    more = encode({"more": True}, messages.SYNCHRONIZE)
    assert decode(call(side, "Synchronize", more)["payload"], messages.SYNCHRONIZED) == {"more": True}


@pytest.mark.parametrize(("method", "code"), [("StopContainer", 0), ("Shutdown", 0), ("Later", 12)])
def test_other_methods_have_an_answer(method: str, code: int) -> None:
    status = call(plugin.Plugin("42", "", Root()), method, b"\xff")["status"]
    assert (status or {"code": 0})["code"] == code


def test_a_refused_registration_is_a_finding() -> None:
    side = plugin.Plugin("42", "", Root())
    refused = encode({"status": {"code": 2, "message": "no"}}, messages.RESPONSE)
    with pytest.raises(HookError, match=r"\[nri-refused\] plugin 42-vfio-nri: the runtime refused it: no"):
        side.feed(frame_message(2, 1, 2, refused))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from(["Configure", "Synchronize", "CreateContainer", "x"]), st.booleans())
def test_nonsense_is_answered_or_ends_the_connection(tree: HostTree, data: bytes, method: str, framed: bool) -> None:
    side = plugin.Plugin("42", "", Root(str(tree.top)))
    request = encode({"service": messages.PLUGIN_SERVICE, "method": method, "payload": data}, messages.REQUEST)
    try:
        side.feed(frame_message(1, 3, 1, request) if framed else data)
    except (ProtocolError, Malformed, HookError):
        return


# The executable ------------------------------------------------------------------------------------------------------


@pytest.fixture(name="listener")
def make_listener(tmp_path: Path) -> socket.socket:
    """Return a socket that listens, as a runtime's."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "nri.sock"))
    listener.listen()
    return listener


def start(path: str, *arguments: str) -> subprocess.Popen[str]:
    """Start the executable."""
    command = [str(REPOSITORY / "hooks/vfio-nri"), "--socket", path, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={})


@pytest.mark.parametrize(
    ("sent", "code", "line"),
    [
        (b"", 1, "error: [nri-refused] PATH: was closed before the plugin was registered; is NRI on?"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", 1, "error: [nri-protocol] PATH: violates the NRI protocol"),
        (frame_message(1, 3, 1, b"\xff\xff"), 1, "error: [nri-protocol] PATH: violates the NRI protocol"),
        (frame_message(2, 1, 3, b""), 1, "error: [nri-protocol] PATH: violates the NRI protocol"),
    ],
)
def test_bad_runtimes_get_a_line_and_no_traceback(listener: socket.socket, sent: bytes, code: int, line: str) -> None:
    path = listener.getsockname()
    process = start(path)
    connection, _ = listener.accept()
    # What was not read is lost with the connection, and so would be what was sent.
    assert connection.recv(4096)
    connection.sendall(sent)
    connection.close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith(f"vfio-nri: {line.replace('PATH', path)}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("--index", "9"), 2, "[bad-arguments] arguments: '9' is not an index"),
        (("--what",), 2, "[bad-arguments] arguments: unrecognized arguments: --what"),
        ((), 1, "[nri-unreachable] /nowhere/nri.sock: cannot connect to it: No such file or directory; is NRI on?"),
    ],
)
def test_what_cant_begin(arguments: tuple[str, ...], code: int, line: str) -> None:
    process = start("/nowhere/nri.sock", *arguments)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err[: len(line) + 17]) == (code, f"vfio-nri: error: {line}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(listener: socket.socket, number: int) -> None:
    process = start(listener.getsockname())
    connection, _ = listener.accept()
    assert connection.recv(1)
    os.kill(process.pid, number)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_an_answer_is_given_before_a_signal_ends_it(
    tree: HostTree, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while a container is being checked: the runtime has its answer all the same."""

    def check(*_: Any) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr("oci_hooks.nri.container.check", check)
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    got: list[bytes] = []

    def speak() -> None:
        connection, _ = listener.accept()
        connection.recv(4096)
        request = {"service": messages.PLUGIN_SERVICE, "method": "Configure"}
        connection.sendall(frame_message(1, 1, 1, encode(request, messages.REQUEST)))
        got.append(connection.recv(4096))
        request = {"service": messages.PLUGIN_SERVICE, "method": "CreateContainer"}
        connection.sendall(frame_message(1, 3, 1, encode(request, messages.REQUEST)))
        got.extend((connection.recv(4096), connection.recv(4096)))

    runtime = threading.Thread(target=speak)
    runtime.start()
    try:
        plugin.serve(listener.getsockname(), plugin.Plugin("90", "", Root(str(tree.top))))
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in kept.items():
            signal.signal(number, handler)
    runtime.join(timeout=60)
    assert got[1] == frame_message(1, 3, 2, b"")
    assert got[2] == b""
