# SPDX-License-Identifier: Apache-2.0
"""Parse JSON from bytes, without `import json` where possible.

`import json` alone doubles the time of a bare interpreter, for every container. CPython's scanner is a C function that
needs nothing of that package while the text is valid. If the text is invalid, or this interpreter has no such scanner,
the package is loaded and reports the error.
"""

from __future__ import annotations

from oci_hooks.findings import Finding, InputError
from oci_hooks.idle import scan_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def parse_json(data: bytes, name: str) -> Any:
    """Return the value of a JSON text.

    name: the document's name in errors. Raises InputError [bad-json] with line and column.
    """
    # Runtimes accept strings that are not UTF-8: Go's replace the bytes, crun keeps them, as done here (PEP 383).
    text = data.decode("utf-8", "surrogateescape")
    if not text.strip():
        raise InputError("bad-json", name, "is empty", "provide a JSON object")
    try:
        return scan_text(text)
    except RecursionError:
        raise InputError("bad-json", name, "is nested too deeply", "use a valid OCI document") from None
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - json reports any error of the scanner with its position
        return parse_slowly(text, name)


def parse_slowly(text: str, name: str) -> Any:
    """Return the value, by the json package. Raises InputError [bad-json] with line and column."""
    import json

    try:
        return json.loads(text)
    except RecursionError:
        raise InputError("bad-json", name, "is nested too deeply", "use a valid OCI document") from None
    except ValueError as error:
        raise InputError("bad-json", name, f"is not JSON: {error}", "provide a JSON object") from None


# Conversion of JSON values to the types that a reader expects ---------------------------------------------------------


class Mismatch(Exception):
    """A hand-written reader found a value of an unexpected type."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem


def get_member(owner: dict[str, Any], key: str, kind: str, where: str, *default: Any) -> Any:
    """Return a member of a JSON object; null counts as absent.

    kind: "string", "object", "array"; where: the owner's path with its dot; default: for an absent member, which is a
    Mismatch without one.
    """
    value = owner.get(key)
    if value is not None:
        return check_json_type(value, kind, where + key)
    if default:
        return default[0]
    if key in owner:
        raise Mismatch(where + key, f"expected {kind}, found null")
    raise Mismatch(where.rstrip(".") or "top level", f"missing required key {key}")


def get_int(
    owner: dict[str, Any], key: str, where: str, default: int | None, *, low: int | None = None, high: int | None = None
) -> int:
    """Return a member that is a whole number within bounds; null counts as absent. Raises Mismatch."""
    if owner.get(key) is None and default is not None:
        return default
    value: int = get_member(owner, key, "integer", where)
    if (low is not None and value < low) or (high is not None and value > high):
        raise Mismatch(where + key, f"expected a number {format_bounds(low, high)}, found {value}")
    return value


def format_bounds(low: int | None, high: int | None) -> str:
    """Return bounds as text."""
    return f"from {low} to {high}" if high is not None else f"not below {low}"


def get_strings(owner: dict[str, Any], key: str, where: str) -> dict[str, str]:
    """Return a member that maps names to strings; empty if absent. Raises Mismatch."""
    values: dict[str, str] = get_member(owner, key, "object", where, {})
    for name, value in values.items():
        check_json_type(value, "string", f"{where}{key}.{name}")
    return values


def check_json_type(value: Any, kind: str, where: str) -> Any:
    """Return the value if it is of this JSON kind. Raises Mismatch."""
    found = name_json_type(value)
    # JSON has one number type: 5.0 is a whole number.
    if kind == "integer" and found == "number" and value == value // 1:
        return int(value)
    if found != kind:
        raise Mismatch(where, f"expected {kind}, found {found}")
    return value


def is_valid_path(text: str) -> bool:
    """Return whether a file can have this name: JSON can encode NUL and lone surrogates, a path cannot contain them.

    A path can contain bytes that are not UTF-8, which are decoded as the surrogates of PEP 383.
    """
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def name_json_type(value: object) -> str:
    """Return the JSON name of a value's kind."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "number"
    names = {str: "string", int: "integer", dict: "object", list: "array", type(None): "null"}
    return names[type(value)]


def make_schema_error(
    document: object, mismatch: Mismatch, schema_name: str, subject: str, code: str, hint: str
) -> InputError:
    """Return the error for a document that a reader refused: jsonschema's whole list, or the reader's own message."""
    first = Finding("error", code, f"{subject}: {mismatch.path}", mismatch.problem, hint)
    try:
        from oci_hooks.schema import find_mistakes

        findings = find_mistakes(document, schema_name, subject, code, hint)
    except (ImportError, RecursionError):
        # A document nested as deep as the stack allowed cannot be serialized.
        findings = ()
    return InputError.from_findings(findings or (first,))
