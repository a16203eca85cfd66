# SPDX-License-Identifier: Apache-2.0
"""Decide, before anything else is loaded, that a container surely asks for nothing.

Every container of a machine starts the hooks, and few ask for VFIO. This module reads the state and config.json as
bytes and has two answers: surely nothing, or go on. It answers "surely nothing" only where the readers in oci.py would
neither find a request nor refuse the input; tests/unit/test_idle.py compares the two. In any doubt it goes on.

`posix` replaces `os`, which takes a fifth of a bare interpreter's start to load, and annotations are quoted, because
`__future__` is a module too.
"""

import posix
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Every annotation and path of a request contains this word, as these bytes or with some of them escaped ...
WORD = "vfio"
ESCAPES = ("\\u0076", "\\u0066", "\\u0069", "\\u006f", "\\u006F")
# ... and none continues it so, as the names of the hooks do, which config.json has where it declares them.
OTHER_WORD = "vfio-"
# The command lines by which a runtime starts a hook.
USUAL_ARGUMENTS: "tuple[list[str], ...]" = ([], ["prestart"], ["createRuntime"], ["poststop"])
# With these the name of a claim's file begins where it is not the container's id (guest/claims.py).
HASH_OR_DOT = ("sha256-", ".")
# Seconds to wait for the rest of stdin. A runtime writes it before the interpreter has started.
PATIENCE = 0.1
# Bytes of a state or config.json that are read here. They rarely have a tenth of it.
LIMIT = 1 << 20
# crun's bundle where it does not know better (see runtime_command.py), and what Go writes for a byte that is not UTF-8.
WRONG_BUNDLES = ("", "\ufffd")


def begin(argv: "list[str]", claims: str) -> bytes:
    """End the process with exit code 0 if a container surely asks for nothing; else return as `look`."""
    begun = look(argv, claims)
    if begun is None:
        posix._exit(0)
    return begun


def look(argv: "list[str]", claims: str) -> "bytes | None":
    """Return None if a container surely asks for nothing; else what was read from stdin so far, for the hook itself.

    argv: the arguments; claims: the directory in which the hook keeps what it has to take back when a container ends,
    with its slash; "" if it never has to.
    """
    pieces: list[bytes] = []
    try:
        if argv in USUAL_ARGUMENTS and not posix.isatty(0):
            is_whole = read_stdin(pieces)
            if is_whole and asks_nothing(b"".join(pieces), argv == ["poststop"], claims):
                return None
    except Exception:  # noqa: BLE001, S110 - the hook itself finds the same problem, and reports it
        pass
    return b"".join(pieces)


def read_stdin(pieces: "list[bytes]") -> bool:
    """Add what comes from stdin soon to these pieces, and return whether that is all. Raises OSError."""
    import select

    poller = select.poll()
    poller.register(0, select.POLLIN)
    end = monotonic() + PATIENCE
    while sum(map(len, pieces)) <= LIMIT and poller.poll(max(0.0, end - monotonic()) * 1000):
        pieces.append(posix.read(0, 65536))
        if not pieces[-1]:
            return True
    return False


def asks_nothing(data: bytes, is_poststop: bool, claims: str) -> bool:
    """Return whether this state is without fault and its container surely asks for nothing. Raises any exception."""
    state = scan_text(data.decode())
    if not is_faultless(state) or not lacks_vfio(data):
        return False
    if is_poststop or state.get("status") == "stopped":
        return not claims or surely_lacks_claim(claims, state["id"])
    config = read_config(state["bundle"])
    return bool(config) and lacks_vfio(config)


def is_faultless(state: "Any") -> bool:
    """Return whether the hook's reader surely accepts a state: the usual members, each in its usual form.

    Raises any exception if not.
    """
    annotations = state.get("annotations", {})
    pid = state.get("pid", 0)
    # Nothing but strings can be joined, and half a surrogate pair cannot be encoded.
    words = "".join([state["id"], state["bundle"], *(state.get(key, "") for key in ("ociVersion", "status", "root"))])
    words.encode()
    return (
        type(pid) is int
        and pid >= 0
        and "\0" not in words
        and 0 < len(state["id"]) <= 1024
        and state["bundle"].startswith("/")
        and type(annotations) is dict
        and all(type(value) is str for value in annotations.values())
    )


def surely_lacks_claim(claims: str, container: str) -> bool:
    """Return whether there is no claim of a container whose id is its claim's file name, as most are.

    claims: their directory, with its slash. Raises OSError.
    """
    letters = container.replace("-", "").replace("_", "").replace(".", "")
    if not (letters.isalnum() and letters.isascii()) or container.startswith(HASH_OR_DOT) or len(container) > 200:
        return False
    try:
        posix.stat(claims + container)
    except FileNotFoundError:
        return True
    return False


def read_config(bundle: str) -> bytes:
    """Return a bundle's config.json; nothing if it is too long for this module. Raises OSError."""
    if bundle.rstrip("/") in WRONG_BUNDLES or "\ufffd" in bundle:
        return b""
    fd = posix.open(f"{bundle.rstrip('/')}/config.json", posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
    try:
        data = posix.read(fd, LIMIT)
        return b"" if posix.read(fd, 1) else data
    finally:
        posix.close(fd)


def lacks_vfio(data: bytes) -> bool:
    """Return whether a text surely has no request for VFIO in any string, whatever the text is. Pure.

    JSON has one other way to write a letter: its escape of six characters (RFC 8259, section 7).
    """
    # One character a byte. As text, because the code that searches bytes takes 150 KiB more of the interpreter's file.
    text = data.decode("latin-1")
    if text.count(WORD) != text.count(OTHER_WORD):
        return False
    return "\\u00" not in text or not any(escape in text for escape in ESCAPES)


class ScannerOptions:
    """The attributes that CPython's scanner reads from its owner; the same values as json.JSONDecoder's."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def scan_text(text: str) -> "Any":
    """Return the value, by the C scanner alone. Raises any exception for invalid text, ValueError for trailing text."""
    import _json

    start = len(text) - len(text.lstrip(" \t\n\r"))
    scan: Any = _json.make_scanner  # typeshed wants a JSONDecoder; the scanner is content with its attributes
    value, end = scan(ScannerOptions)(text, start)
    if text[end:].strip(" \t\n\r"):
        raise ValueError("unexpected text after the JSON value")
    return value
