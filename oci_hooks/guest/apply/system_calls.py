# SPDX-License-Identifier: Apache-2.0
"""Make system calls that Python lacks, by functions of the C library.

`_ctypes` in place of `ctypes`: that package takes half as long to import as a bare interpreter to start, nearly all of
it for types that are not needed here, and every run that allows a node in a cgroup of version 2 needs bpf(2).
"""

from __future__ import annotations

import os
from _ctypes import FUNCFLAG_CDECL, FUNCFLAG_USE_ERRNO, CFuncPtr, _SimpleCData, addressof, dlopen, dlsym, get_errno


class Int(_SimpleCData):  # type: ignore[type-arg]
    """C's int."""

    _type_ = "i"


class Long(_SimpleCData):  # type: ignore[type-arg]
    """C's long, in which an address has room."""

    _type_ = "l"


class Char(_SimpleCData):  # type: ignore[type-arg]
    """C's char."""

    _type_ = "c"


class Function(CFuncPtr):
    """A function of the C library that returns an int, or a long that is a descriptor or an error."""

    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = Int


def call_libc(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library and return its result. Raises OSError, named after the function."""
    # A plain number would be passed as C's int, in which an address has no room.
    function = Function(dlsym(dlopen(None, 0), name))  # type: ignore[arg-type] # None: what is loaded already
    result: int = function(*(Long(each) if type(each) is int else each for each in arguments))
    if result < 0:
        code = get_errno()
        raise OSError(code, os.strerror(code), name)
    return result


def find_address(memory: bytearray) -> int:
    """Return where a block of memory is. It must neither be freed nor change its size while the address is in use."""
    return addressof((Char * len(memory)).from_buffer(memory))
