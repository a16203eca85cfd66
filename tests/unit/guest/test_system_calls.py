# SPDX-License-Identifier: Apache-2.0
"""Calls of the C library without the package ctypes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oci_hooks.guest.apply.system_calls import call_libc, find_address

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]


def test_call_libc_result() -> None:
    assert call_libc("getpid") == os.getpid()


def test_call_libc_error_named() -> None:
    with pytest.raises(OSError, match="close") as caught:
        call_libc("close", -1)
    assert caught.value.errno == errno.EBADF


def test_call_libc_bytes_and_none_as_pointers(tmp_path: Path) -> None:
    fd = call_libc("open", os.fsencode(tmp_path), os.O_RDONLY)
    assert os.fstat(fd).st_ino == tmp_path.stat().st_ino
    os.close(fd)
    assert call_libc("time", None) > 0


def test_find_address_whole_address_and_memory_shared() -> None:
    """An address of more than 32 bits reaches the kernel whole, which writes into the memory itself."""
    reader, writer = os.pipe()
    os.write(writer, b"vfio")
    memory = bytearray(8)
    assert call_libc("read", reader, find_address(memory), len(memory)) == 4
    assert memory == b"vfio\0\0\0\0"
    os.close(reader)
    os.close(writer)


def test_system_calls_without_the_package_ctypes() -> None:
    code = f"import sys; sys.path.append({str(REPOSITORY)!r}); import oci_hooks.guest.apply.system_calls; "
    done = subprocess.run(
        [sys.executable, "-IS", "-c", f"{code}sys.exit('ctypes' in sys.modules)"], check=False, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
