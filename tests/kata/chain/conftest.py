# SPDX-License-Identifier: Apache-2.0
"""The host with Kata, one for all tests; and one retry a test, counted: emulated guests fail now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chain import host
from tests.kata.chain.stack import Stack
from tests.vm import guest

HERE = Path(__file__).resolve().parent
RETRIED: list[str] = []
# By case: how long it took, and what it saw.
SEEN: dict[str, tuple[float, str]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call a test, once more if it fails: what does not work fails twice."""
    if not guest.is_inside() or HERE not in pyfuncitem.path.parents:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    kata = arguments["kata"]
    assert isinstance(kata, Stack)
    started = time.monotonic()
    try:
        pyfuncitem.obj(**arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, the second call shows it
        words = str(error) or repr(error)
        print(f"RETRIED {pyfuncitem.name}: {words}")
        RETRIED.append(f"{pyfuncitem.name}: {words.splitlines()[0]}")
        kata.clear()
        started = time.monotonic()
        pyfuncitem.obj(**arguments)
    SEEN[pyfuncitem.name] = (time.monotonic() - started, kata.seen)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each case has seen, and which were tried twice."""
    if not SEEN:
        return
    terminalreporter.section("kata-chain")
    for name, (seconds, words) in SEEN.items():
        terminalreporter.line(f"{name} ({seconds:.0f} s): {words}")
    terminalreporter.line(f"cases that were tried twice: {len(RETRIED)}")
    for words in RETRIED:
        terminalreporter.line(f"  {words}")


@pytest.fixture(scope="session")
def nics() -> host.Nics:
    """Return the host's NICs, bound to vfio-pci as an administrator does."""
    found = host.find_nics()
    for address in found.list_all():
        guest.bind(address, "vfio-pci")
    return found


@pytest.fixture(scope="session", name="kata")
def start_kata() -> Iterator[Stack]:
    """Return the host with containerd and Kata."""
    made = Stack()
    yield made
    made.close()
