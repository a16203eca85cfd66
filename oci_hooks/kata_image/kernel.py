# SPDX-License-Identifier: Apache-2.0
"""Read a kernel's options from its configuration, or from an image that carries it (CONFIG_IKCONFIG).

Sources: kernel/configs.c (the gzip between IKCFG_ST and IKCFG_ED), Documentation/arch/x86/boot.rst (where a bzImage has
its compressed kernel).
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib

from oci_hooks.findings import InputError
from oci_hooks.frozen import Frozen
from oci_hooks.kata_image.compression import BZIP2, GZIP, XZ, ZSTD, find_format
from oci_hooks.kata_image.tools import run_filter
from oci_hooks.linux.kernel import decompress, parse_config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

START, END = b"IKCFG_ST", b"IKCFG_ED"
# A vmlinux with what debuggers want has several hundred MB.
FILE_LIMIT = 1 << 30
KERNEL_LIMIT = 256 << 20
# Of the x86 boot protocol: sectors of setup code, "HdrS", offset and length of the payload.
SETUP_SECTORS, HEADER_MAGIC, PAYLOAD = 0x1F1, 0x202, 0x248


class KernelFile(Frozen):
    """A kernel's options. path: of the file they were read from; options: name -> value."""

    path: str
    options: dict[str, str]


def read_kernel(file: BinaryIO) -> KernelFile:
    """Return the options of a kernel. Raises InputError [kernel-unreadable] if the file does not have them."""
    data = file.read(FILE_LIMIT)
    text = b""
    for content in (data, unpack_payload(data)):
        place = content.find(START)
        if place >= 0:
            text = decompress(content[place + len(START) : content.find(END, place)])
    options = parse_config((text or (decompress(data) if data[:2] == b"\x1f\x8b" else data)).decode("utf-8", "replace"))
    if not any(name in options for name in ("CONFIG_PCI", "CONFIG_VFIO", "CONFIG_64BIT")):
        hint = "name its config-* file: Kata's release has one for each kernel"
        raise InputError("kernel-unreadable", file.name, "has no configuration (it was built without IKCONFIG)", hint)
    return KernelFile(file.name, options)


def unpack_payload(data: bytes) -> bytes:
    """Return the kernel that a bzImage has compressed, b"" if it is none, or in a format that cannot be read here."""
    if data[HEADER_MAGIC : HEADER_MAGIC + 4] != b"HdrS" or len(data) < PAYLOAD + 8:
        return b""
    offset, length = struct.unpack_from("<II", data, PAYLOAD)
    start = ((data[SETUP_SECTORS] or 4) + 1) * 512 + offset
    packed = data[start : start + length]
    name = find_format(packed[:6])
    try:
        if name == GZIP:
            return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(packed, KERNEL_LIMIT)
        if name == XZ:
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(packed, KERNEL_LIMIT)
        if name == BZIP2:
            return bz2.BZ2Decompressor().decompress(packed, KERNEL_LIMIT)
        if name == ZSTD:
            # Behind the frame are four bytes with its size.
            return b"".join(run_filter(["zstd", "-q", "-d", "-c"], [packed[:-4]], "zstd"))
    except (zlib.error, lzma.LZMAError, OSError, ValueError):
        pass
    return b""
