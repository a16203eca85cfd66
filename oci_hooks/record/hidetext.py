# SPDX-License-Identifier: Apache-2.0
"""Redact texts: invalid JSON, TOML, a kernel command line.

The rest is enough for the hook's readers to get the same values, on the same lines, or the same error at the
same place. Every function takes time linear in the length of its text, which a tenant wrote.
"""

from __future__ import annotations

import json
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Keys = tuple[str, ...]

LEFT_OUT = "(left out)"
# Strings of invalid JSON by which oci.py and traces.py decide whether it could request VFIO.
TRACES = re.compile(
    r"annotations|linux|devices|path|type|major|minor|[cbup]|/dev/vfio[/\w-]{0,64}"
    r"|io\.katacontainers\.x\.vfio[\w.-]{0,100}"
    r"|io\.(katacontainers\.pkg\.oci|kubernetes\.cri(-o)?)\.[Cc]ontainer_?-?[Tt]ype"
    r"|pod_sandbox|sandbox"
)
# A string with its quotes, or to the end of the text. Any text after the opening quote matches, so that nothing is
# tried twice.
STRING = r'"([^"\\]*(?:\\.[^"\\]*)*)("|\\?\Z)'
# Text between strings. A literal or a number counts only at the beginning of a word.
WORD = r'[^\s{}\[\],:"]+'
TOKEN = re.compile(rf"{STRING}|{WORD}", re.DOTALL)
LITERAL = re.compile(r"true|false|null|NaN|-?Infinity|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
# A valid escape, an invalid one, the trace of a request, any other character.
PIECE = re.compile(r'\\u[0-9a-fA-F]{4}|\\["\\/bfnrt]|\\.|vfio|[^\\]', re.DOTALL)
BYTE_ORDER_MARK = "\ufeff"
# Words of a kernel command line that affect a decision here.
KERNEL_WORD = re.compile(r"[\w.-]*iommu[\w.]*(=[\w,.:+-]{0,80})?")
# The keys of Kata's tables that the host hook reads (host/kata/checks.py, host/kata/lookup.py, host/kata/config.py).
HYPERVISOR_KEYS = (
    "enable_iommu",
    "enable_annotations",
    "hot_plug_vfio",
    "cold_plug_vfio",
    "pcie_root_port",
    "pcie_switch_port",
    "machine_type",
    "kernel_params",
    "guest_hook_path",
    "path",
    "confidential_guest",
    "rootless",
)
RUNTIME_KEYS = ("hypervisor_name", "vfio_mode")
# Kata accepts no string for these, so a string affects no decision.
NO_TEXTS = ("enable_iommu", "pcie_root_port", "pcie_switch_port", "confidential_guest", "rootless")
ANY = "*"
# Values kept from the files of Kata and of container engines (host/kata/handlers.py), by their keys.
KEPT_KEYS = (
    *(("hypervisor", ANY, key) for key in HYPERVISOR_KEYS),
    *(("runtime", key) for key in RUNTIME_KEYS),
    ("imports",),
    ("plugins", ANY, "containerd", "runtimes", ANY, "runtime_type"),
    ("plugins", ANY, "containerd", "runtimes", ANY, "options", "ConfigPath"),
    ("crio", "runtime", "runtimes", ANY, "runtime_path"),
    ("crio", "runtime", "runtimes", ANY, "runtime_config_path"),
    ("runtimes", ANY, "runtimeType"),
    ("runtimes", ANY, "options", "ConfigPath"),
)
LINE_OF_MISTAKE = re.compile(r"at line (\d+)")


# Text that is nearly JSON ---------------------------------------------------------------------------------------------


def hide_text(data: bytes, count: Callable[[], object] = lambda: None) -> bytes:
    """Return invalid JSON with every string, word and number masked, and each error still in its place.

    count: called for each examined piece of the text, for the test that there are no more than these.
    """
    text = data.decode("utf-8", "surrogateescape")
    head = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""

    def hide(match: re.Match[str]) -> str:
        count()
        token = match[0]
        if token[0] != '"':
            return hide_word(token)
        if TRACES.fullmatch(match[1]):
            return token
        return '"' + PIECE.sub(hide_piece, match[1]) + match[2]

    def hide_piece(match: re.Match[str]) -> str:
        count()
        piece = match[0]
        if piece[0] != "\\":
            return piece if piece == "vfio" else mask(piece)
        if len(piece) > 2:
            return "\\u0078"
        if piece == "\\u":
            return piece
        return "\\/" if piece[1] in '"\\/bfnrt' else "\\" + mask(piece[1])

    hidden = TOKEN.sub(hide, text[len(head) :])
    return (head + hidden).encode("utf-8", "surrogateescape")


def hide_word(word: str) -> str:
    """Return a word outside of strings: a literal is kept, of a number its format."""
    literal = LITERAL.match(word)
    kept = literal[0] if literal else ""
    return re.sub("[1-9]", "1", kept) + "".join(map(mask, word[len(kept) :]))


def mask(character: str) -> str:
    """Return a substitute of as many bytes; a control character is kept, a byte that is not UTF-8 stays invalid."""
    if character < " ":
        return character
    if "\udc80" <= character <= "\udcff":
        return "\udcff"
    return ("x", "\u00bf", "\u2026", "\U00010000")[len(character.encode("utf-8", "surrogatepass")) - 1]


# Kernel parameters ----------------------------------------------------------------------------------------------------


def hide_kernel(text: str) -> str:
    """Return kernel parameters: those of the IOMMU, and a placeholder for others."""
    words = [word if KERNEL_WORD.fullmatch(word) else LEFT_OUT for word in text.split()]
    return " ".join(dict.fromkeys(words) if LEFT_OUT in words else words)


# Configuration --------------------------------------------------------------------------------------------------------


def hide_values(values: dict[str, Any], wanted: tuple[Keys, ...]) -> Iterator[tuple[Keys, Any]]:
    """Yield keys and value of the kept settings of a configuration. wanted: keys, "*" for any name."""
    for key, value in values.items():
        rests = tuple(keys[1:] for keys in wanted if keys and keys[0] in (key, ANY))
        if () in rests:
            kept = keep_setting(value, key)
            if kept is not None:
                yield (key,), kept
        elif rests and isinstance(value, dict):
            inner = [((key, *keys), item) for keys, item in hide_values(value, rests)]
            # The name of the hypervisor is that of its table.
            yield from inner or ([((key,), {})] if len(rests[0]) == 1 else [])


def keep_setting(value: Any, key: str) -> Any:
    """Return a redacted setting, None if it is left out: TOML has dates, which affect no decision here."""
    if isinstance(value, str):
        kept = LEFT_OUT if key in NO_TEXTS else value
        return hide_kernel(value) if key == "kernel_params" else kept
    if isinstance(value, list):
        return [item for item in value if isinstance(item, (str, int, float))]
    return value if isinstance(value, (bool, int, float)) else None


def hide_json_values(data: bytes) -> bytes:
    """Return a configuration in JSON (Docker's) with the kept values only."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return hide_text(data)
    kept: dict[str, Any] = {}
    for keys, value in hide_values(values, KEPT_KEYS) if isinstance(values, dict) else ():
        table = kept
        for key in keys[:-1]:
            table = table.setdefault(key, {})
        table[keys[-1]] = value
    return json.dumps(kept).encode()


def hide_toml(text: str, find: Callable[[dict[str, Any]], list[tuple[Keys, Keys, Any]]]) -> str:
    """Return a configuration in TOML with the kept values only, each on its line.

    find: returns the kept settings: keys in the text, redacted keys, value. Invalid TOML keeps its error on the
    same line.
    """
    from oci_hooks.plain_toml import read_toml
    from oci_hooks.settings import format_key
    from oci_hooks.toml_lines import find_line

    try:
        values = read_toml(text)
    except (ValueError, RecursionError, ImportError) as error:
        return hide_mistake(text, str(error))
    kept = find(values)
    lines = [""] * (text.count("\n") + 1)
    for keys, names, value in kept:
        location = max(find_line(text, keys) - 1, 0)
        # Of several on one line the later ones move down.
        while location < len(lines) and lines[location]:
            location += 1
        lines[location : location + 1] = [f"{'.'.join(map(format_key, names))} = {write_value(value)}"]
    hidden = "\n".join(lines)
    try:
        again = find(read_toml(hidden))
        same = sorted(repr(value) for *_, value in again) == sorted(repr(value) for *_, value in kept)
    except ValueError:
        same = False
    return hidden if same else "\n" * text.count("\n")


def hide_mistake(text: str, mistake: str) -> str:
    """Return invalid TOML with only the line of its error, masked."""
    lines = text.split("\n")
    found = LINE_OF_MISTAKE.search(mistake)
    number = min(int(found[1]) if found else len(lines), len(lines))
    return "\n" * (number - 1) + re.sub(r"[^\W\d_]", "x", re.sub(r"\d", "0", lines[number - 1]))


def write_text(text: str) -> str:
    """Return a text as TOML writes it between quotes."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_value(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(write_value, value))}]"
    return write_text(value) if isinstance(value, str) else json.dumps(value)
