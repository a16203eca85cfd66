# SPDX-License-Identifier: Apache-2.0
"""JSON from bytes, without `import json` where that is possible.

`import json` alone doubles the time of a bare interpreter, and every container would pay for it. CPython's scanner is
a C function that needs nothing of that package as long as the text is right; when it is not, or when this interpreter
has no such scanner, the package is loaded and says what is wrong.
"""

from __future__ import annotations

from oci_hooks.findings import InputError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class ScannerOptions:
    """What CPython's scanner asks its owner for; the same values as json.JSONDecoder's."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def parse_json(data: bytes, name: str) -> Any:
    """Return the value of a JSON text.

    name: what to call the text in an error. Raises InputError [bad-json] with line and column.
    """
    # Runtimes take strings that are not UTF-8: Go's replace the bytes, crun keeps them, as is done here (PEP 383).
    text = data.decode("utf-8", "surrogateescape")
    if not text.strip():
        raise InputError("bad-json", name, "is empty", "a JSON object is expected")
    try:
        return scan_text(text)
    except RecursionError:
        raise InputError("bad-json", name, "is nested too deeply", "no OCI document is") from None
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever the bare scanner stumbled over, json says it in words
        return parse_slowly(text, name)


def scan_text(text: str) -> Any:
    """Return the value, by the C scanner alone. Raises anything on a bad text, ValueError on text behind the value."""
    import _json

    start = len(text) - len(text.lstrip(" \t\n\r"))
    scan: Any = _json.make_scanner  # typeshed wants a JSONDecoder; the scanner is content with its attributes
    value, end = scan(ScannerOptions)(text, start)
    if text[end:].strip(" \t\n\r"):
        raise ValueError("text behind the value")
    return value


def parse_slowly(text: str, name: str) -> Any:
    """Return the value, by the json package. Raises InputError [bad-json] with line and column."""
    import json

    try:
        return json.loads(text)
    except RecursionError:
        raise InputError("bad-json", name, "is nested too deeply", "no OCI document is") from None
    except ValueError as error:
        raise InputError("bad-json", name, f"is not JSON: {error}", "a JSON object is expected") from None
