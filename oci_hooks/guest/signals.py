# SPDX-License-Identifier: Apache-2.0
"""Handle signals: reset what the runtime left behind, and end the hook on the signals that stop it.

Loaded only where there is something to bind or to put back.
"""

from __future__ import annotations

from oci_hooks.findings import HookError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    # The same functions; the module proper gives them enum, whose import costs as much as all of binding's.
    import _signal as signal

# What a runtime, a terminal, or a service manager sends to have a program end.
ENDING: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT", signal.SIGHUP: "SIGHUP"}


class Interrupted(HookError):
    """The hook was told to end. Raised inside the part that puts everything back."""


def reset_signals() -> None:
    """Undo what exec inherits: ignored children could not be waited for, a blocked alarm would not end a wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD, signal.SIGALRM, *ENDING))


def raise_interrupted(number: int, _: object) -> None:
    """Handle a signal to end, once: what puts things back is not to be interrupted by the next one."""
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)
    hint = "start the container again; if the runtime's timeout for hooks ended it, raise that"
    raise Interrupted("interrupted", "the hook", f"was ended by {ENDING[number]} before it had finished", hint)


class interruptible:  # noqa: N801 - reads as a statement
    """Have signals to end raise Interrupted inside this block; when it has failed, let none disturb what follows."""

    def __enter__(self) -> None:
        self.before = [(number, signal.signal(number, raise_interrupted)) for number in ENDING]

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self.before:
            signal.signal(number, handler if kind is None else signal.SIG_IGN)
