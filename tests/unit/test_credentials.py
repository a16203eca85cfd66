# SPDX-License-Identifier: Apache-2.0
"""What capabilities a container's first process has by its config.json; tests/vm/test_noiommu.py asks the kernel."""

from __future__ import annotations

from typing import Any

import pytest

from oci_hooks.credentials import Credentials, read_credentials
from oci_hooks.oci import make_spec

pytestmark = pytest.mark.unit

RAW, OWN = "CAP_SYS_RAWIO", "CAP_DAC_OVERRIDE"


def read(process: Any, **linux: Any) -> Credentials | None:
    """Return the credentials of a process."""
    return read_credentials(make_spec({"process": process, "linux": linux}, "config.json"))


@pytest.mark.parametrize(
    ("uid", "sealed", "sets", "effective", "gainable"),
    [
        # Root gets what is in the bounding set, whatever `effective` says,
        (0, False, {"bounding": [RAW]}, [RAW], [RAW]),
        (0, False, {"effective": [RAW], "permitted": [RAW]}, [], []),
        (0, False, {"inheritable": [RAW]}, [RAW], [RAW]),
        # but nothing new where it may get no new privileges.
        (0, True, {"bounding": [RAW, OWN], "permitted": [RAW]}, [RAW], [RAW]),
        (0, True, {"bounding": [RAW], "effective": [RAW]}, [], []),
        (0, True, {"permitted": [RAW]}, [], []),
        # A user keeps what is ambient.
        (7, False, {"bounding": [RAW], "effective": [RAW], "permitted": [RAW]}, [], [RAW]),
        (7, True, {"bounding": [RAW], "effective": [RAW], "permitted": [RAW]}, [], []),
        (7, True, {"permitted": [RAW], "inheritable": [RAW], "ambient": [RAW]}, [RAW], [RAW]),
        (7, True, {"inheritable": [RAW], "ambient": [RAW]}, [], []),
        (7, True, {"permitted": [RAW], "ambient": [RAW]}, [], []),
        (7, False, {"bounding": ["cap_sys_rawio"]}, [], [RAW]),
        # What is no list of names is the runtime's to refuse.
        (0, False, {"bounding": RAW}, [], []),
        (0, False, {"bounding": [7, None, RAW]}, [RAW], [RAW]),
    ],
)
def test_read_credentials_execve_rules(
    uid: int, sealed: bool, sets: dict[str, Any], effective: list[str], gainable: list[str]
) -> None:
    found = read({"user": {"uid": uid}, "capabilities": sets, "noNewPrivileges": sealed})
    assert found is not None
    assert (list(found.capabilities), list(found.gainable)) == (effective, gainable)
    assert found.gains == (uid != 0 and not sealed)


def test_read_credentials_ids() -> None:
    user = {"uid": 1000, "gid": 2000, "additionalGids": [5, "x", 6]}
    found = read({"user": user}, namespaces=[{"type": "user"}])
    assert found == Credentials(1000, 2000, (5, 6), (), True, (), True)
    assert read({"user": {"additionalGids": 5}, "capabilities": []}) == Credentials(0, 0, (), (), False, (), False)


def test_read_credentials_without_process() -> None:
    assert read({}) is None
    assert read_credentials(make_spec({}, "config.json")) is None
