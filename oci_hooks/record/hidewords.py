# SPDX-License-Identifier: Apache-2.0
"""Redact Kata's reading of its configuration: leave out the words that a problem quotes from a document.

A problem's text keeps the words in the readers' own code: keys of Kata, their allowed values, plain English.
"""

from __future__ import annotations

import errno
import os
import re

from oci_hooks.annotations import AGENT_PREFIX, HYPERVISOR_PREFIX, RUNTIME_PREFIX
from oci_hooks.record.hidetext import HYPERVISOR_KEYS, LEFT_OUT, RUNTIME_KEYS, keep_setting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from oci_hooks.findings import Finding

READERS = (
    *("go", "go_annotations", "go_checks", "rust", "rust_annotations", "rust_checks", "rust_types"),
    *("model", "toml", "toml_go"),
)
TOKEN = re.compile(r"""[^\s,;:()\[\]'".=]+""")
FILE = re.compile(r"/[^\n]*")
# Questions inside a reading whose answers are kept. The configuration names the others.
READS = ("listdir", "read", "readlink")
# The codes of findings that quote a problem.
CODES = ("kata-config-refused", "kata-config-uncertain")


def hide_reading(answer: Any) -> Any:
    """Return the answer of read_kata (host/kata/config.py), as JSON, with only the parts that the host hook uses."""
    words = list_words()
    values = {key: keep_setting(value, key) for key, value in answer["values"].items()}
    return {
        **answer,
        "values": values,
        "marks": [[keys, locations] for keys, locations in answer["marks"] if is_kept(keys)],
        "tables": [
            [keys, value if value is None else keep_setting(value, keys[-1])]
            for keys, value in answer["tables"]
            if is_kept(keys)
        ],
        "refused": [hide_problem(problem, words) for problem in answer["refused"]],
        "uncertain": [hide_problem(problem, words) for problem in answer["uncertain"]],
    }


def is_kept(keys: list[str]) -> bool:
    """Return whether the hook uses a key."""
    if keys[0] == "runtime":
        return len(keys) == 2 and keys[1] in RUNTIME_KEYS
    return keys[0] == "hypervisor" and (len(keys) == 2 or (len(keys) == 3 and keys[2] in HYPERVISOR_KEYS))


def hide_problem(problem: dict[str, Any], words: frozenset[str]) -> dict[str, Any]:
    """Return a problem, as JSON, without its quotations."""
    return {**problem, "place": hide_place(problem["place"], words), "text": hide_words(problem["text"], words)}


def hide_place(location: str, words: frozenset[str]) -> str:
    """Return where a problem is: a file, which the recording names anyway, or an annotation known to Kata."""
    if location.startswith("annotation "):
        name = location.partition(" ")[2]
        known = name.startswith((RUNTIME_PREFIX, AGENT_PREFIX)) and name.rpartition(".")[2] in words
        return location if known or name.startswith(HYPERVISOR_PREFIX) else f"annotation {LEFT_OUT}"
    return location if FILE.fullmatch(location) else hide_words(location, words)


def hide_kata(finding: Finding) -> Finding:
    """Return a finding of CODES without the quotations in its problem; the release is at its end."""
    words = list_words()
    location = hide_place(finding.subject, words)
    head, mark, release = finding.problem.rpartition("; ")
    if mark and release.endswith(" refuses to start a sandbox with it"):
        return finding.replace(subject=location, problem=f"{hide_words(head, words)}{mark}{release}")
    return finding.replace(subject=location, problem=hide_words(finding.problem, words))


def hide_words(text: str, words: frozenset[str]) -> str:
    """Return a text with only these words."""
    return TOKEN.sub(lambda match: match[0] if match[0] in words else LEFT_OUT, text)


def list_words() -> frozenset[str]:
    """Return the words in the readers' code, and the system's errors. A single letter counts only if it is "a"."""
    from importlib.util import find_spec

    words = {"a", *TOKEN.findall(LEFT_OUT)}
    texts = [os.strerror(number) for number in errno.errorcode]
    for name in READERS:
        spec = find_spec(f"oci_hooks.host.kata.{name}")
        loader: Any = spec and spec.loader
        texts += list_texts(loader.get_code(f"oci_hooks.host.kata.{name}"))
    for text in texts:
        words.update(word for word in TOKEN.findall(text) if len(word) > 1)
    return frozenset(words)


def list_texts(value: Any) -> Iterator[str]:
    """Yield the strings of a compiled module."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, frozenset)):
        for item in value:
            yield from list_texts(item)
    elif hasattr(value, "co_consts"):
        yield from list_texts(value.co_consts)
