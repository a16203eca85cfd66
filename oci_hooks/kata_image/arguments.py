# SPDX-License-Identifier: Apache-2.0
"""The command line of vfio-kata-image."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from oci_hooks import __version__
from oci_hooks.findings import InputError
from oci_hooks.kata_image.model import PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

EPILOG = """\
An image is never changed: `add` and `remove` write a new file.

exit code: 0 done; 1 refused or failed, nothing written; 2 unusable input
"""


class Parser(ArgumentParser):
    """A parser that reports errors as findings."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError [bad-arguments]."""
        raise InputError("bad-arguments", "arguments", message, f"see {PROGRAM} --help")


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=PROGRAM,
        description="Put the guest hook into a copy of a Kata guest image or initrd.",
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    show = commands.add_parser("show", help="layout, add-on, kernel modules, lines for configuration.toml")
    show.add_argument("image", metavar="IMAGE", help="disk image or initrd")
    show.add_argument("--kernel", metavar="FILE", default="", help="kernel, or its config-* file: missing options")
    show.add_argument("--json", action="store_true", help="print JSON")
    add = commands.add_parser("add", help="write a copy with the add-on in it")
    remove = commands.add_parser("remove", help="write a copy as it was before `add`, byte by byte")
    for command in (add, remove):
        command.add_argument("image", metavar="IMAGE", help="disk image or initrd, which is not changed")
        command.add_argument("--output", metavar="NEW", required=True, help="file to write")
        command.add_argument("--force", action="store_true", help="replace NEW if it is a regular file")
    add.add_argument("--addon", metavar="PATH", default="", help="archive or directory of the add-on")
    add.add_argument("--settings", metavar="FILE", default="", help="guest.toml to put into the guest")
    add.add_argument("--no-undo", action="store_true", help="leave out of a disk image what `remove` needs")
    return parser
