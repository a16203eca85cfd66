# SPDX-License-Identifier: Apache-2.0
"""Handle signals: reset what the runtime left behind, and end the hook on the signals that stop it.

Loaded only if there is something to bind or to undo.
"""

from __future__ import annotations

from oci_hooks.findings import HookError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    # The same functions; the module `signal` converts them to enums, whose import costs as much as all of binding's.
    import _signal as signal

# The signals by which a runtime, a terminal or a service manager ends a program.
ENDING: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT", signal.SIGHUP: "SIGHUP"}


class Interrupted(HookError):
    """The hook received a signal to end. Raised inside the block whose changes are then undone."""


def reset_signals() -> None:
    """Reset what exec inherits: ignored children could not be waited for, a blocked alarm would not end a wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD, signal.SIGALRM, *ENDING))


def raise_interrupted(number: int, _: object) -> None:
    """Handle the first signal to end, and ignore further ones: they must not interrupt the undo."""
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)
    hint = "start the container again; if the runtime's timeout for hooks ended it, raise that"
    raise Interrupted("interrupted", "the hook", f"was ended by {ENDING[number]} before it had finished", hint)


class interruptible:  # noqa: N801 - reads as a statement
    """Raise Interrupted inside this block on a signal to end; once the block has failed, ignore such signals."""

    def __enter__(self) -> None:
        self.before = [(number, signal.signal(number, raise_interrupted)) for number in ENDING]

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self.before:
            signal.signal(number, handler if kind is None else signal.SIG_IGN)
