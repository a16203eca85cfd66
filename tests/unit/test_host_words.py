# SPDX-License-Identifier: Apache-2.0
"""No message of the host check has words that Kata's shim turns into a gRPC status (isNotFound in utils.go)."""

from __future__ import annotations

import ast
import errno
import json
import os
from pathlib import Path

import oci_hooks

PACKAGE = Path(oci_hooks.__file__).parent
FORBIDDEN = ("not found", "not exist")
MODULES = sorted(
    path for part in (".", "host", "host/kata", "linux", "record") for path in (PACKAGE / part).glob("*.py")
)


def list_messages(path: Path) -> list[str]:
    """Return all strings of a module but its docstrings."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def test_host_messages_hold_no_words_of_a_grpc_status() -> None:
    messages = [(path.name, text) for path in MODULES for text in list_messages(path)]
    assert len(messages) > 1000
    assert [(name, text) for name, text in messages if any(word in text.lower() for word in FORBIDDEN)] == []


def test_texts_of_the_system_and_the_schemas_hold_none_either() -> None:
    """A finding quotes the system's words for an errno, and a schema's title for what it expected."""
    schemas = sorted((PACKAGE / "schemas").glob("*.json"))
    texts = [os.strerror(number) for number in errno.errorcode] + [str(json.loads(p.read_text())) for p in schemas]
    assert len(schemas) > 3
    assert len(texts) > 100
    assert [text for text in texts if any(word in text.lower() for word in FORBIDDEN)] == []
