# SPDX-License-Identifier: Apache-2.0
"""Read the addresses and routes of this network namespace by rtnetlink.

The files in /proc/net show one routing table of IPv4, and ioctls show an address only under its own label. A dump shows
all of them. Sources: netlink(7), rtnetlink(7); include/uapi/linux/netlink.h, rtnetlink.h, if_addr.h, nexthop.h.
"""

from __future__ import annotations

import os
from errno import EBADMSG, EIO, EOPNOTSUPP
from struct import calcsize, pack, unpack_from

from oci_hooks.system import tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oci_hooks.system import Root

AF_INET6 = 10
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
RTM_NEWADDR, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE, RTM_NEWNEXTHOP, RTM_GETNEXTHOP = 20, 22, 24, 26, 104, 106
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_MULTIPATH = 1, 4, 9
NHA_OIF = 5
RTM_F_CLONED = 0x200
RTN_LOCAL, RTN_ANYCAST = 2, 4
RT_SCOPE_LINK = 253
# The two highest bits of an attribute's type are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
NLA_TYPE_MASK = 0x3FFF
HEADER, ATTRIBUTE, NEXTHOP = "=IHHII", "=HH", "=HBBi"
# Headers of the three kinds of messages: ifaddrmsg, rtmsg, nhmsg. A request has zeros in them: every family.
ADDRESS_HEADER, ROUTE_HEADER, NEXTHOP_HEADER = "=BBBBI", "=BBBBBBBBI", "=BBBBI"
# linux/err.h: error numbers end here.
MAX_ERRNO = 4095
# Some sixty thousand routes. A router with more counts as using all interfaces.
MAX_DUMP_BYTES = 4 << 20
# A dump may miss an entry if anything changes meanwhile, so an interrupted dump is repeated.
ATTEMPTS = 3


class NetworkUse:
    """The result of the dumps. addresses: interface's index -> its first address; routed: indexes, 0 for "any"."""

    def __init__(self) -> None:
        self.addresses: dict[int, str] = {}
        self.routed: set[int] = set()


def read_network(root: Root) -> list[list[str]]:
    """Return the result of dump_network: addresses and routes. Raises OSError."""
    return root.ask(dump_network, "/proc/net")


@tagged("network")
def dump_network(path: str) -> list[list[str]]:
    """Return what makes interfaces used: ["address", interface, address] and ["route", interface, ""].

    Omitted is what every interface gets when it is up: its link-local address, the routes to fe80::/10 and multicast.
    The interface "" stands for all of them, if there are more routes than are read. Raises OSError. path: /proc/net;
    any other is that of a test's tree, which has no network.
    """
    if path != "/proc/net":
        return []
    # The module `socket` imports enum and selectors.
    import _socket

    found = NetworkUse()
    sock = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _socket.NETLINK_ROUTE)
    try:
        for request, header in (
            (RTM_GETADDR, ADDRESS_HEADER),
            (RTM_GETROUTE, ROUTE_HEADER),
            (RTM_GETNEXTHOP, NEXTHOP_HEADER),
        ):
            for _ in range(ATTEMPTS):
                sock.send(make_request(request, calcsize(header)))
                if read_dump(iter(lambda: sock.recv(65536), b""), found):
                    break
    finally:
        sock.close()
    return name_interfaces(found, _socket.if_indextoname)


def make_request(kind: int, size: int) -> bytes:
    """Return the request for a dump. size: of the kind's header, in bytes."""
    return pack(HEADER, calcsize(HEADER) + size, kind, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + bytes(size)


def read_dump(chunks: Iterator[bytes], found: NetworkUse) -> bool:
    """Add the answers to one request to `found`, and return whether nothing changed meanwhile. Raises OSError.

    An older kernel does not support every request (nexthop objects before 5.3), and then has no such objects.
    """
    total, whole = 0, True
    for chunk in chunks:
        for kind, flags, body in split_messages(chunk):
            whole = whole and not flags & NLM_F_DUMP_INTR
            if kind == NLMSG_DONE:
                return whole
            if kind == NLMSG_ERROR:
                code = -unpack_head("=i", body)[0]
                if code == EOPNOTSUPP:
                    return True
                # Any other value is not an error number, or does not fit a C int.
                code = code if 0 < code <= MAX_ERRNO else EIO
                raise OSError(code, os.strerror(code), "netlink")
            if total <= MAX_DUMP_BYTES:
                add_message(kind, body, found)
        total += len(chunk)
        if total > MAX_DUMP_BYTES:
            # Read the dump to its end all the same: the next one comes through the same socket.
            found.routed.add(0)
    return whole


def unpack_head(form: str, data: bytes) -> tuple[int, ...]:
    """Return the numbers at the beginning of the data. Raises OSError [EBADMSG] if it is too short."""
    if len(data) < calcsize(form):
        raise OSError(EBADMSG, os.strerror(EBADMSG), "netlink")
    return unpack_from(form, data)


def split_messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield type, flags and body of each message. Raises OSError."""
    while data:
        length, kind, flags, _, _ = unpack_head(HEADER, data)
        if not calcsize(HEADER) <= length <= len(data):
            raise OSError(EBADMSG, os.strerror(EBADMSG), "netlink")
        yield kind, flags, data[calcsize(HEADER) : length]
        data = data[(length + 3) & ~3 :]


def split_attributes(data: bytes) -> dict[int, bytes]:
    """Return attributes by their types. Raises OSError."""
    attributes = {}
    while data:
        length, kind = unpack_head(ATTRIBUTE, data)
        if not calcsize(ATTRIBUTE) <= length <= len(data):
            raise OSError(EBADMSG, os.strerror(EBADMSG), "netlink")
        attributes[kind & NLA_TYPE_MASK] = data[calcsize(ATTRIBUTE) : length]
        data = data[(length + 3) & ~3 :]
    return attributes


def add_message(kind: int, body: bytes, found: NetworkUse) -> None:
    """Add one address, route or nexthop. Raises OSError."""
    if kind == RTM_NEWADDR:
        family, _, _, scope, index = unpack_head(ADDRESS_HEADER, body)
        if (family, scope) != (AF_INET6, RT_SCOPE_LINK):
            attributes = split_attributes(body[calcsize(ADDRESS_HEADER) :])
            address = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS) or b""
            found.addresses.setdefault(index, format_address(family, address))
    elif kind == RTM_NEWROUTE:
        add_route(body, found)
    elif kind == RTM_NEWNEXTHOP:
        attributes = split_attributes(body[calcsize(NEXTHOP_HEADER) :])
        if NHA_OIF in attributes:
            found.routed.add(unpack_head("=I", attributes[NHA_OIF])[0])


def format_address(family: int, address: bytes) -> str:
    """Return an address as text."""
    import _socket

    if len(address) in (4, 16):
        return _socket.inet_ntop(AF_INET6 if len(address) == 16 else _socket.AF_INET, address)
    return f"{address.hex() or '?'} of family {family}"


def add_route(body: bytes, found: NetworkUse) -> None:
    """Add the interfaces of one route, of any table and family. Raises OSError."""
    family, length, _, _, _, _, _, kind, flags = unpack_head(ROUTE_HEADER, body)
    attributes = split_attributes(body[calcsize(ROUTE_HEADER) :])
    if flags & RTM_F_CLONED or (family == AF_INET6 and is_automatic(kind, length, attributes.get(RTA_DST, b""))):
        return
    if RTA_OIF in attributes:
        found.routed.add(unpack_head("=I", attributes[RTA_OIF])[0])
    # struct rtnexthop: its length with its attributes, flags, hops, interface.
    hops = attributes.get(RTA_MULTIPATH, b"")
    while hops:
        size, _, _, index = unpack_head(NEXTHOP, hops)
        found.routed.add(index)
        hops = hops[max((size + 3) & ~3, calcsize(NEXTHOP)) :]


def is_automatic(kind: int, length: int, destination: bytes) -> bool:
    """Return whether an IPv6 route comes with a link: to fe80::/10, multicast, an own or anycast address."""
    link = destination[:1] == b"\xfe" and destination[1:2] >= b"\x80" and destination[1:2] < b"\xc0"
    return link or destination[:1] == b"\xff" or kind == RTN_ANYCAST or (kind == RTN_LOCAL and length == 128)


def name_interfaces(found: NetworkUse, name_index: Callable[[int], str]) -> list[list[str]]:
    """Return the addresses and routes by the interfaces' names. name_index: returns a name, or raises OSError."""
    lines = []
    for kind, index, words in (
        *(("address", index, address) for index, address in found.addresses.items()),
        *(("route", index, "") for index in sorted(found.routed)),
    ):
        try:
            lines.append([kind, name_index(index) if index else "", words])
        except OSError:
            # The interface is gone by now.
            continue
    return lines
