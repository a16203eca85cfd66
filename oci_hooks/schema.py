# SPDX-License-Identifier: Apache-2.0
"""Report every error in a document, with jsonschema.

Loaded only after a hand-written reader refused a document: jsonschema takes the time of ten bare interpreters.
"""

from __future__ import annotations

from oci_hooks.findings import Finding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

# Maximum of reported errors in one document: about a screen.
MAX_FINDINGS = 10
# Maximum of examined errors, of which the reported ones are a part.
MAX_ERRORS = 1000
# Descriptions of a schema's rules, for a value whose schema has no title.
RULES = {
    "minimum": "a number not below {}",
    "maximum": "a number not above {}",
    "exclusiveMinimum": "a number above {}",
    "enum": "one of {}",
    "pattern": "a value matching {}",
}


def load_site_packages() -> None:
    """Make the distribution's Python libraries importable: the hooks start without them (python3 -S).

    Only their directories: site.main() would also run sitecustomize and the lines of .pth files, as root.
    """
    import sys

    if sys.flags.no_site and "site" not in sys.modules:
        import site

        # A virtual environment's directory, if the interpreter belongs to one.
        own = f"{sys.executable.rpartition('/bin/')[0]}/lib/python{sys.version_info[0]}.{sys.version_info[1]}"
        sys.path += [
            location for location in (f"{own}/site-packages", *site.getsitepackages()) if location not in sys.path
        ]


def load_schema(name: str) -> dict[str, Any]:
    """Return one of the package's schemas, e.g. "state"."""
    import json
    import os

    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "schemas", f"{name}.json")
    with open(path, encoding="utf-8") as file:
        schema: dict[str, Any] = json.load(file)
    return schema


def find_mistakes(document: Any, schema_name: str, subject: str, code: str, hint: str) -> tuple[Finding, ...]:
    """Return a finding for each violation of the schema in the document.

    subject: the document's name for the findings; code, hint: theirs. Raises ImportError without jsonschema.
    """
    load_site_packages()
    from itertools import islice

    import jsonschema

    validator = jsonschema.Draft7Validator(load_schema(schema_name))
    # A document of a MiB can have a million errors, each of some kB.
    first = islice(validator.iter_errors(document), MAX_ERRORS)
    errors = sorted(first, key=lambda error: [str(step) for step in error.path])
    findings = (
        Finding("error", code, f"{subject}: {format_path(error.absolute_path)}", describe_schema_error(error), hint)
        for error in errors
    )
    # jsonschema reports each missing member separately; one finding names them all.
    return tuple(dict.fromkeys(findings))[:MAX_FINDINGS]


def format_path(steps: Iterable[object]) -> str:
    """Return a JSON path as `linux.devices[0].major`; "top level" for the document itself."""
    text = ""
    for step in steps:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else f"{step}"
    return text or "top level"


def describe_schema_error(error: Any) -> str:
    """Return one jsonschema ValidationError as text, in the words of the hooks."""
    found = describe_value(error.instance)
    rule, wanted = error.validator, error.validator_value
    if rule == "type":
        names = [wanted] if isinstance(wanted, str) else [name for name in wanted if name != "null"]
        return f"expected {' or '.join(names)}, found {found}"
    if rule == "required":
        missing = [name for name in wanted if name not in error.instance]
        return f"missing required key {', '.join(missing)}"
    if rule == "additionalProperties":
        known = ", ".join(sorted(error.schema.get("properties", {})))
        unknown = sorted(set(error.instance) - set(error.schema.get("properties", {})))
        return f"unknown key {', '.join(unknown)}; known keys: {known}"
    value = ", ".join(map(str, wanted)) if isinstance(wanted, list) else wanted
    words = "an absolute path" if wanted == "^/" else RULES.get(rule, f"{rule} {{}}").format(value)
    return f"expected {error.schema.get('title', words)}, found {found}"


def describe_value(value: object) -> str:
    """Return a short description of a JSON value, for an error message."""
    import json

    try:
        # TOML has dates and times, which JSON does not have.
        text = json.dumps(value, ensure_ascii=True, default=str)
    except (ValueError, RecursionError):
        # TOML can contain a hexadecimal number that Python refuses to print in decimal (sys.set_int_max_str_digits).
        return "a value too large to show"
    return text if len(text) <= 60 else text[:57] + "..."
