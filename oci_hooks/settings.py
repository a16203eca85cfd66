# SPDX-License-Identifier: Apache-2.0
"""Settings of the machine: /etc/oci-vfio-hooks/host.toml and guest.toml.

Read only where the file exists and only after VFIO was asked for: tomllib and jsonschema cost more than a whole hook.
A file that is there must be right: a misspelt key that is silently ignored is a setting that is not in force.
"""

from __future__ import annotations

from oci_hooks.errors import InputError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.files import Root

HOST_SETTINGS = "/etc/oci-vfio-hooks/host.toml"


def read_settings(root: Root, path: str, schema_name: str, *, required: bool = False) -> dict[str, Any]:
    """Return the settings in a TOML file; empty where there is no such file.

    path: absolute, below the root; schema_name: the schema in schemas/ that says which keys there are, e.g.
    "host-settings"; required: a file that is not there is an error, for one that was named on the command line.
    Raises InputError [bad-settings] with every mistake, or [settings-unreadable].
    """
    try:
        data = root.read_bytes(path)
    except FileNotFoundError:
        if not required:
            return {}
        raise unreadable(path, "No such file or directory") from None
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from None
    values = parse_toml(data, path)
    check_settings(values, path, schema_name)
    return values


def unreadable(path: str, problem: str) -> InputError:
    """Return the error for a settings file that can't be read."""
    return InputError(
        "settings-unreadable", path, problem, f"make it readable for root: ls -lL {path}; or run without it"
    )


def parse_toml(data: bytes, name: str) -> dict[str, Any]:
    """Return the value of a TOML text. name: what to call it. Raises InputError [bad-settings] with the line."""
    try:
        return load_toml(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError("bad-settings", name, f"byte {error.start} is not UTF-8", "TOML must be UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError("bad-settings", name, f"is not TOML: {error}", "mend the line or remove the file") from None
    except ImportError:
        raise InputError(
            "settings-unreadable", name, "needs a TOML reader", "install it: pip install tomli, or use Python 3.11"
        ) from None


def load_toml(text: str) -> dict[str, Any]:
    """Return the value of a TOML text. Raises ValueError with the line; ImportError below 3.11 without tomli."""
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from oci_hooks.schema import load_site_packages

        load_site_packages()
        import tomli as tomllib
    values: dict[str, Any] = tomllib.loads(text, parse_float=read_float)
    return values


def read_float(text: str) -> float:
    """Return a number. Raises ValueError for nan and inf: no bound of a schema keeps nan out."""
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text} is no number here")
    return value


def check_settings(values: dict[str, Any], path: str, schema_name: str) -> None:
    """Raise InputError [bad-settings] unless the settings are as their schema says."""
    if not values:
        return
    try:
        from oci_hooks.schema import find_mistakes

        findings = find_mistakes(values, schema_name, path, "bad-settings", "mend it or take it out")
    except ImportError:
        raise InputError(
            "settings-unreadable", path, "can't be checked without jsonschema", "apt install python3-jsonschema"
        ) from None
    if findings:
        raise InputError.from_findings(findings)
