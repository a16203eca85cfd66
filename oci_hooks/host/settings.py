# SPDX-License-Identifier: Apache-2.0
"""Read host.toml: its keys and their defaults."""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.system import USUAL_SECONDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.program import Run
    from oci_hooks.settings import Table
    from oci_hooks.system import Root

HOST_SETTINGS = "/etc/oci-vfio-hooks/host.toml"
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
CODE = LETTERS | frozenset("0123456789-")


class HostSettings(Frozen):
    """Settings of the host check; schemas/host-settings.json describes the file.

    mode: "enforce", or "warn" to report no errors; deadline: seconds; record: "failure", "always" or "never";
    checks: modes of single findings by code ("enforce", "warn", "ignore"); kata_mode: "auto", "always" or
    "never" check Kata's configuration; kata_config: path of Kata's configuration file, "" for Kata's own lookup;
    nri_annotate: whether vfio-nri gives a container in Kata the annotation that names its devices to the guest hook.
    """

    mode: str = "enforce"
    deadline: float = USUAL_SECONDS
    record: str = "failure"
    checks: tuple[tuple[str, str], ...] = ()
    kata_mode: str = "auto"
    kata_config: str = ""
    nri_annotate: bool = False

    def find_mode(self, code: str) -> str:
        """Return the mode of a single check by its code; "" if none is set."""
        return dict(self.checks).get(code, "")


def read_host_settings(root: Root, path: str) -> HostSettings:
    """Return the host's settings. path: named on the command line, "" for the usual file, which is optional.

    Raises InputError [bad-settings] or [settings-unreadable].
    """
    from oci_hooks.settings import read_settings

    return read_settings(root, path or HOST_SETTINGS, make_host_settings, required=bool(path))


def make_host_settings(table: Table) -> HostSettings:
    """Return the settings in host.toml; reads every key that schemas/host-settings.json defines."""
    usual = HostSettings()
    checks = table.table("checks", "keys of this table are codes of findings, e.g. group-busy")
    kata = table.table("kata")
    nri = table.table("nri")
    return HostSettings(
        mode=table.word("mode", usual.mode, "enforce", "warn"),
        deadline=table.number("deadline", usual.deadline, lambda s: 0.1 <= s <= 600, "a number from 0.1 to 600"),
        record=table.word("record", usual.record, "failure", "always", "never"),
        # A key that is not a code stays unknown.
        checks=tuple(
            (code, checks.word(code, "", "enforce", "warn", "ignore")) for code in filter(is_code, checks.values)
        ),
        kata_mode=kata.word("mode", usual.kata_mode, "auto", "always", "never"),
        kata_config=kata.text("config", usual.kata_config, is_path, "an absolute path"),
        nri_annotate=nri.switch("annotate", usual.nri_annotate),
    )


def is_code(text: str) -> bool:
    """Return whether a text has the form of a finding's code."""
    return text[:1] in LETTERS and CODE.issuperset(text)


def is_path(text: str) -> bool:
    """Return whether a text is an absolute path of a file."""
    return text.startswith("/") and "\0" not in text


def load_settings(run: Run) -> HostSettings:
    """Return the settings of host.toml, or of the file that the command line names. Raises InputError."""
    settings = read_host_settings(run.root, run.arguments.settings)
    run.deadline.extend(settings.deadline)
    run.record = settings.record
    return settings
