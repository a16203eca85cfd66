# SPDX-License-Identifier: Apache-2.0
"""Settings files: what is read, what is refused, and where the error points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oci_hooks import settings
from oci_hooks.errors import EXIT_BAD_INPUT, InputError
from oci_hooks.files import Root
from oci_hooks.settings import HOST_SETTINGS, read_settings

pytestmark = pytest.mark.unit

WHOLE = """
mode = "warn"
deadline = 2.5
[checks]
group-busy = "ignore"
viommu-off = "enforce"
[kata]
mode = "always"
config = "/opt/kata/share/defaults/kata-containers/configuration-qemu.toml"
"""


def write(tmp_path: Path, text: str | bytes) -> Root:
    """Return a root with this host.toml."""
    path = tmp_path / HOST_SETTINGS.lstrip("/")
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Root(str(tmp_path))


def refused(root: Root, path: str = HOST_SETTINGS, *, required: bool = False) -> InputError:
    """Return the error that reading these settings raises."""
    with pytest.raises(InputError) as caught:
        read_settings(root, path, "host-settings", required=required)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return caught.value


def test_no_file_is_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "load_toml", lambda _text: pytest.fail("a TOML reader was loaded for nothing"))
    assert read_settings(Root(str(tmp_path)), HOST_SETTINGS, "host-settings") == {}


def test_no_file_is_an_error_where_it_was_named(tmp_path: Path) -> None:
    error = refused(Root(str(tmp_path)), "/x.toml", required=True)
    assert error.findings[0].code == "settings-unreadable"
    assert error.findings[0].subject == "/x.toml"


@pytest.mark.parametrize("text", ["", "# nothing\n", 'mode = "enforce"\n', "[kata]\n", "[checks]\n", WHOLE])
def test_right_settings_are_read(tmp_path: Path, text: str) -> None:
    values = read_settings(write(tmp_path, text), HOST_SETTINGS, "host-settings")
    if text is WHOLE:
        assert values["deadline"] == 2.5
        assert values["checks"] == {"group-busy": "ignore", "viommu-off": "enforce"}
        assert values["kata"]["mode"] == "always"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('moed = "warn"\n', "(the whole): unknown key moed; known are checks, deadline, kata, mode"),
        ('mode = "audit"\n', "mode: expected"),
        ("mode = true\n", "mode: expected"),
        ("deadline = 0\n", "deadline: expected"),
        ("deadline = 601\n", "deadline: expected"),
        ('deadline = "8"\n', "deadline: expected number"),
        ('[kata]\nmode = "sometimes"\n', "kata.mode: expected"),
        ('[kata]\nconfig = "configuration.toml"\n', "kata.config: expected an absolute path"),
        ("[kata]\nconfg = 1\n", "kata: unknown key confg"),
        ("kata = 3\n", "kata: expected object"),
        ('[checks]\ngroup-busy = "no"\n', "checks.group-busy: expected"),
        ("mode = warn\n", "is not TOML: "),
        ('a = 1\nmode = "warn\n', "line 2"),
        ('mode = "warn"\nmode = "warn"\n', "line 2"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
    ],
)
def test_wrong_settings_are_refused_with_the_place(tmp_path: Path, text: str | bytes, said: str) -> None:
    error = refused(write(tmp_path, text))
    assert error.findings[0].code == "bad-settings"
    assert HOST_SETTINGS in str(error)
    assert said in str(error)


def test_every_mistake_is_told(tmp_path: Path) -> None:
    error = refused(write(tmp_path, 'mode = 1\ndeadline = "x"\n'))
    assert len(error.findings) == 2


def test_a_directory_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / HOST_SETTINGS.lstrip("/")).mkdir(parents=True)
    assert refused(Root(str(tmp_path))).findings[0].code == "settings-unreadable"


def test_schemas_are_valid_and_closed() -> None:
    import jsonschema

    path = Path(settings.__file__).parent / "schemas/host-settings.json"
    schema = json.loads(path.read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["kata"]["additionalProperties"] is False
