# SPDX-License-Identifier: Apache-2.0
"""List the tests that may be skipped, with the reason why that is no loss. Every other skip fails if CI=true.

tests/run prints at its end what was skipped, known or not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Skip:
    """A test that was skipped. test: its node id; reason: as pytest reports it."""

    test: str
    reason: str

    def __str__(self) -> str:
        """Return the line for the end of a run."""
        known = find_known(self)
        return f"SKIPPED {self.test}: {self.reason}{f' (known: {known.why})' if known else ' (NOT KNOWN)'}"


@dataclass(frozen=True)
class Known:
    """A skip that is no loss. test: beginning of the node id; reason: part of pytest's reason; why: our explanation."""

    test: str
    reason: str
    why: str


KNOWN = (
    Known(
        "tests/unit/test_fuzz.py::test_fuzz_with_atheris",
        "no atheris for this interpreter",
        "atheris has wheels for few interpreters; the same targets run without its guidance",
    ),
    Known(
        "tests/unit/guest/test_mount_ns.py::",
        "no user namespaces here",
        "the kernel makes none in a chroot, such as the Debian 11 root; elsewhere it runs",
    ),
    Known(
        "tests/unit/guest/test_container_user.py::",
        "no user namespaces here",
        "the kernel makes none in a chroot, such as the Debian 11 root; elsewhere it runs",
    ),
    Known(
        "tests/unit/record/test_writer.py::",
        "strace is not installed",
        "the Debian 11 root has none; on this machine tests/run installs it",
    ),
    Known(
        "tests/unit/test_executables.py::",
        "no character maps",
        "the Debian 11 root has no locales; on this machine tests/run installs them",
    ),
    Known(
        "tests/unit/test_libraries.py::",
        "this machine has no PCI function",
        "some virtual machines have no PCI at all; the rig's machines wait for a device with pyudev and without",
    ),
    Known(
        "tests/unit/nri/test_peer.py::",
        "no Go",
        "the Debian 11 root has none; on this machine Go builds the runtime's side of NRI",
    ),
    Known(
        "tests/unit/host/test_checks.py::",
        "needs a device that can be opened",
        "only root may open it; CI and the packaging tests are root",
    ),
)


def find_known(skip: Skip) -> Known | None:
    """Return why a skip is no loss; None for one that isn't known."""
    for known in KNOWN:
        if skip.test.startswith(known.test) and known.reason in skip.reason:
            return known
    return None


def find_unknown(skips: Iterable[Skip], environment: Mapping[str, str] = os.environ) -> list[Skip]:
    """Return the skips that fail the run: none on a developer's machine."""
    if environment.get("CI", "").lower() not in ("true", "1"):
        return []
    return [skip for skip in skips if find_known(skip) is None]
