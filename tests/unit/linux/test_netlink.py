# SPDX-License-Identifier: Apache-2.0
"""Dumps of rtnetlink: messages made by hand, as the kernel's headers have them. Real ones: tests/vm/test_uses.py."""

from __future__ import annotations

import socket
import struct

import pytest

from oci_hooks.linux import netlink
from oci_hooks.linux.netlink import NetworkUse, name_interfaces, read_dump

pytestmark = pytest.mark.unit

V4, V6, MPLS = 2, 10, 28
LOCAL_TABLE, MAIN_TABLE = 255, 254
UNICAST, LOCAL, BROADCAST, ANYCAST, MULTICAST = range(1, 6)


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes, flags: int = 2) -> bytes:
    """Return a message, padded."""
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body + bytes(-len(body) % 4)


def packed(address: str) -> bytes:
    """Return an address as the kernel writes it."""
    return socket.inet_pton(V6 if ":" in address else V4, address)


def address(index: int, text: str, label: str = "", scope: int = 0, own: str = "") -> bytes:
    """Return an address of an interface. own: where `text` is the other end's."""
    family = V6 if ":" in text else V4
    parts = attribute(1, packed(text)) + (attribute(2, packed(own)) if own else b"")
    parts += attribute(3, f"{label}\0".encode()) if label else b""
    return message(20, struct.pack("=BBBBI", family, 24, 0x80, scope, index) + parts)


def route(to: str, index: int = 7, table: int = MAIN_TABLE, kind: int = UNICAST, flags: int = 0) -> bytes:
    """Return a route. to: destination/length, or "default6"."""
    text, _, length = to.partition("/")
    family = V6 if ":" in text or text == "default6" else V4
    head = struct.pack("=BBBBBBBBI", family, int(length or 0), 0, 0, table, 3, 0, kind, flags)
    parts = attribute(15, struct.pack("=I", table)) + (attribute(1, packed(text)) if length else b"")
    return message(24, head + parts + (attribute(4, struct.pack("=I", index)) if index else b""))


DONE = message(3, bytes(4))


def read(*messages: bytes) -> NetworkUse:
    """Return what these messages come to."""
    found = NetworkUse()
    assert read_dump(iter([b"".join(messages), DONE]), found)
    return found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (address(7, "192.0.2.15"), "192.0.2.15"),
        # An ioctl by the interface's name does not see it.
        (address(7, "192.0.2.15", label="eth1:v"), "192.0.2.15"),
        (address(7, "192.0.2.1", own="192.0.2.15"), "192.0.2.15"),
        (address(7, "169.254.1.1", scope=253), "169.254.1.1"),
        (address(7, "2001:db8::5"), "2001:db8::5"),
        (address(7, "fe80::1", scope=253), ""),
        (message(20, struct.pack("=BBBBI", 45, 8, 0, 0, 7) + attribute(2, b"\x09")), "09 of family 45"),
        (message(20, struct.pack("=BBBBI", 45, 8, 0, 0, 7)), "? of family 45"),
    ],
)
def test_netlink_addresses(line: bytes, words: str) -> None:
    assert read(line).addresses == ({7: words} if words else {})


def test_netlink_first_address_reported() -> None:
    assert read(address(7, "192.0.2.15"), address(7, "192.0.2.16"), address(8, "10.0.0.1")).addresses == {
        7: "192.0.2.15",
        8: "10.0.0.1",
    }


@pytest.mark.parametrize(
    ("line", "used"),
    [
        (route("default4"), True),
        (route("192.0.2.0/24"), True),
        (route("192.0.2.0/24", table=100), True),
        (route("192.0.2.0/24", table=LOCAL_TABLE, kind=LOCAL), True),
        (route("192.0.2.0/24", index=0, kind=7), False),
        (route("default6"), True),
        (route("2001:db8::/64"), True),
        (route("2001:db8::/64", table=100), True),
        (route("2001:db8::/64", table=LOCAL_TABLE, kind=LOCAL), True),
        (route("fec0::/64"), True),
        # What every link has that is up, as seen on 6.1.
        (route("fe80::/64"), False),
        (route("febf::/64"), False),
        (route("fe80::5054:ff:fe12:3456/128", table=LOCAL_TABLE, kind=LOCAL), False),
        (route("fe80::/128", table=LOCAL_TABLE, kind=ANYCAST), False),
        (route("2001:db8::/128", table=LOCAL_TABLE, kind=ANYCAST), False),
        (route("ff00::/8", table=LOCAL_TABLE, kind=MULTICAST), False),
        # The kernel's own memory of a path's MTU.
        (route("2001:db8::9/128", flags=0x200), False),
    ],
)
def test_netlink_routes(line: bytes, used: bool) -> None:
    assert read(line).routed == ({7} if used else set())


def test_netlink_multipath_route() -> None:
    hops = [struct.pack("=HBBi", 16, 0, 0, 7) + attribute(5, packed("192.0.2.1")), struct.pack("=HBBi", 8, 0, 0, 9)]
    head = struct.pack("=BBBBBBBBI", V4, 0, 0, 0, 254, 3, 0, 1, 0)
    assert read(message(24, head + attribute(9, b"".join(hops)))).routed == {7, 9}


def test_netlink_other_families_and_nexthops() -> None:
    mpls = message(24, struct.pack("=BBBBBBBBI", MPLS, 20, 0, 0, 0, 4, 0, 1, 0) + attribute(4, struct.pack("=I", 7)))
    nexthop = message(104, struct.pack("=BBBBI", V4, 0, 0, 0, 0) + attribute(5, struct.pack("=I", 8)))
    group = message(104, bytes(8) + attribute(2, bytes(8)))
    assert read(mpls, nexthop, group).routed == {7, 8}


def test_netlink_dump_limit_counts_as_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router's interfaces are in use, whichever of the routes they are in."""
    monkeypatch.setattr(netlink, "MAX_DUMP_BYTES", 100)
    found = NetworkUse()
    line = route("192.0.2.0/24", index=7)
    assert read_dump(iter([line * 3, route("192.0.2.0/24", index=8), DONE]), found)
    assert found.routed == {0, 7}
    assert name_interfaces(found, {7: "eth1"}.__getitem__) == [["route", "", ""], ["route", "eth1", ""]]


def test_netlink_interrupted_dump_repeated() -> None:
    found = NetworkUse()
    interrupted = message(20, struct.pack("=BBBBI", V4, 24, 0, 0, 7) + attribute(2, packed("192.0.2.1")), 0x12)
    assert not read_dump(iter([interrupted, DONE]), found)
    assert found.addresses == {7: "192.0.2.1"}


def test_netlink_without_nexthop_support() -> None:
    assert read_dump(iter([message(2, struct.pack("=i", -95) + bytes(16))]), NetworkUse())


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (message(2, struct.pack("=i", -1)), 1),
        (b"\x00", 74),
        (message(24, bytes(4)), 74),
        (message(20, bytes(8) + b"\xff\xff\x01\x00"), 74),
        (message(20, bytes(8) + b"\x01\x00\x01\x00"), 74),
        (address(7, "192.0.2.1")[:-4], 74),
    ],
)
def test_netlink_malformed_answer_fails(data: bytes, code: int) -> None:
    with pytest.raises(OSError, match=r"^\[Errno") as caught:
        read_dump(iter([data, DONE]), NetworkUse())
    assert caught.value.errno == code


def test_netlink_removed_interface_ignored() -> None:
    found = read(address(7, "192.0.2.15"), route("192.0.2.0/24"))

    def name(_index: int) -> str:
        raise OSError(6, "No such device or address")

    assert name_interfaces(found, name) == []


def test_netlink_real_kernel() -> None:
    """Whatever it has: lo has its address wherever it is up."""
    lines = netlink.dump_network("/proc/net")
    assert all(kind in ("address", "route") and name for kind, name, _ in lines)
