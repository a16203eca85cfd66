# SPDX-License-Identifier: Apache-2.0
"""Traces of VFIO in a text that may not be JSON: never "surely nothing" where the full reader finds something."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hooks import json_input, oci, traces
from oci_hooks.findings import InputError
from oci_hooks.idle import lacks_vfio
from oci_hooks.json_input import parse_json
from oci_hooks.traces import file_lacks_vfio, read_traces
from tests.support.json_strategies import CONFIGS, REQUESTS, write_json

pytestmark = pytest.mark.unit


def find_request(data: bytes) -> bool | None:
    """Return whether a text requests VFIO, as the hooks decide it."""
    return traces.find_request(data, oci.is_traced)


def look_for_request(path: str) -> bool | None:
    """Return the same for a file."""
    return traces.read_request_traces(path, oci.is_traced)


STATE = oci.State("c1", "/b", 1, "", {})
# With and without a request, right and wrong in other places.
MIXED = st.one_of(
    CONFIGS, st.builds(lambda d, r: {**(d if isinstance(d, dict) else {}), **r}, CONFIGS, st.sampled_from(REQUESTS))
)


def read_fully(data: bytes) -> bool | None:
    """Return whether the full reader finds a request; None if it refuses."""
    try:
        return oci.asks_for_vfio(STATE, oci.make_spec(parse_json(data, "x"), "x"))
    except (InputError, json_input.Mismatch):
        return None


@settings(max_examples=300)
@given(MIXED, st.data())
def test_lacks_vfio_never_misses_request(document: object, data: st.DataObject) -> None:
    text = write_json(document, lambda ways: data.draw(st.sampled_from(ways)) if len(ways) > 1 else ways[0])
    found = read_fully(text)
    if found:
        assert not lacks_vfio(text)
    asks = find_request(text)
    assert asks is not None
    if found is not None:
        assert asks >= found


@given(
    st.sampled_from(REQUESTS),
    st.lists(st.sampled_from(["null", "{}", "[1e999]", '"\udcff"', "9" * 5000, "[" * 2000 + "]" * 2000])),
)
def test_find_request_in_invalid_json(request: dict[str, Any], odd: list[str]) -> None:
    members = [f'"odd {number}": {text}' for number, text in enumerate(odd)]
    text = "{" + ",".join([*members, json.dumps(request)[1:]]) + " and more"
    assert find_request(text.encode("utf-8", "surrogateescape"))


@given(
    st.binary(max_size=60),
    st.sampled_from([b"vfio", b"vfio-", b"vfio-x/vfio", b"\\u0076fio", b"v\\u0066io", b"vf\\u0069o", b"vfi\\u006F"]),
)
def test_file_lacks_vfio_in_pieces(tmp_path_factory: pytest.TempPathFactory, before: bytes, word: bytes) -> None:
    path = tmp_path_factory.mktemp("x") / "file"
    saved = traces.PIECE
    try:
        for size in range(1, 9):
            traces.PIECE = size
            for data in (before, before + word + before):
                path.write_bytes(data)
                assert file_lacks_vfio(str(path)) == lacks_vfio(data)
    finally:
        traces.PIECE = saved


@pytest.mark.parametrize(
    ("text", "free"),
    [
        (b"", True),
        (b"{}", True),
        (b"v f i o", True),
        (b"VFIO", True),
        (b"vfio", False),
        (b"/hooks/vfio-guest-bind", True),
        (b"/dev/vfio/vfio-guest-bind", False),
        (b"io.katacontainers.x.vfio.devices.vfio-1", False),
        (b"vfi\\u006f-", False),
        (b'"\\u0076"', False),
        (b'"\\u0066"', False),
        (b'"\\u0069"', False),
        (b'"\\u006f"', False),
        (b'"\\u006F"', False),
        (b'"\\u001b\\u00e9"', True),
        (b"\xff\xfe\0", True),
    ],
)
def test_lacks_vfio_free_texts(text: bytes, free: bool) -> None:
    assert lacks_vfio(text) == free


@pytest.mark.parametrize(
    ("text", "annotations", "paths"),
    [
        (b'{"annotations": {"a": "b", "c": null, "d": {"e": "f"}}}', {"a": "b", "c": "", "d": "", "f": "f"}, []),
        (b'{"Annotations": {"A": "B"}, "LINUX": {"devices": [{"Path": "/x"}]}}', {"A": "B"}, ["/x"]),
        (b'{"annotations": {"a": "1"}, "annotations": {"b": "2"}}', {"a": "1", "b": "2"}, []),
        (b'{"annotations": {"a\\u0062": "\\"\\\\"}}', {"ab": '"\\'}, []),
        (b'{"annotations": ["a"]}', {"a": "a"}, []),
        (b'{"annotations": "a"}', {"a": "a"}, []),
        (b'{"x": {"annotations": {"a": "b"}}, "linux": {"x": {"devices": ["/x"]}}}', {}, []),
        (b'{"linux": {"devices": ["/x", {"path": "/y"}, {"path": ["/z"]}]}}', {}, ["/x", "/y", "/z"]),
        (b'{"linux": {"devices": {"path": "/x"}}}', {}, ["/x"]),
        (b'{"annotations": {"a": "b"}} {"annotations": {"c": "d"}}', {"a": "b"}, []),
        (b'{/* "annotations": { */ "annotations" // {\n: {"a": "b"}}', {"a": "b"}, []),
        (b'{"annotations": {"\xff": "\xfe"}}', {"\udcff": "\udcfe"}, []),
        (b"[]", {}, []),
    ],
)
def test_read_traces_cases(text: bytes, annotations: dict[str, str], paths: list[str]) -> None:
    found = read_traces(text)
    assert found is not None
    assert (found.annotations, found.paths) == (annotations, paths)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"hello",
        b"{",
        b'{"a": [}',
        b'{"a": 1]',
        b"[}",
        b'{"a',
        b'{"a\\"}',
        b"{'a': 1}",
        b"{/ 1}",
        b"{/*",
        b"{// }",
        b"}",
    ]
    + [b'{"\\q": 1}', b"{: 1}", b"[1: 2]", b",", b'"a"'],
)
def test_read_traces_unreadable(text: bytes) -> None:
    assert read_traces(text) is None
    assert find_request(text + b"vfio") is None
    assert find_request(text) is False


def test_read_request_traces_missing_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert look_for_request(str(tmp_path / "empty")) is None
    assert look_for_request(str(tmp_path / "gone")) is None


def test_find_request_sandbox_none() -> None:
    text = (
        b'{"annotations": {"io.kubernetes.cri.container-type": "%s", "io.katacontainers.x.vfio.devices": "auto"}, "odd"'
    )
    assert find_request(text % b"sandbox" + b": []}") is False
    assert find_request(text % b"container" + b": []}") is True


@pytest.mark.parametrize("piece", [b'\\"', b"\\\\", b'"a",', b"[", b'{"a":', b'"/*",'])
def test_read_traces_linear_time(piece: bytes) -> None:
    text = b'{"annotations": {"vfio": "' + piece * ((2 << 20) // len(piece))
    begun = time.monotonic()
    read_traces(text)
    # On a quiet machine a second at most; were it quadratic, hours.
    assert time.monotonic() - begun < 60


def test_read_request_traces_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'{"annotations": {"io.katacontainers.x.vfio": "b"}}')
    assert look_for_request(str(path)) is True
    monkeypatch.setattr(traces, "MAX_TEXT_BYTES", 10)
    assert look_for_request(str(path)) is None
    path.write_bytes(b'{"annotations": {"a": "b"}}')
    assert look_for_request(str(path)) is False
    monkeypatch.setattr(traces, "MAX_FILE_BYTES", 10)
    assert look_for_request(str(path)) is None
