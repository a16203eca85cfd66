# SPDX-License-Identifier: Apache-2.0
"""vfio-kata-image: the steps of its three commands, from top to bottom.

show reads; add and remove read, decide, write a copy under another name, verify it, and give it its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys

from oci_hooks import __version__
from oci_hooks.findings import EXIT_DONE, EXIT_REFUSED, Finding, HookError
from oci_hooks.guest.settings import read_guest_settings
from oci_hooks.kata_image import arguments, report
from oci_hooks.kata_image.addon import find_usual, read_addon
from oci_hooks.kata_image.apply import disk as disk_apply
from oci_hooks.kata_image.apply import initrd as initrd_apply
from oci_hooks.kata_image.apply.output import DRAFT, check_output, open_input, open_workspace, publish
from oci_hooks.kata_image.compression import MAGIC_BYTES, find_format
from oci_hooks.kata_image.decision import check_guest, make_settings_file
from oci_hooks.kata_image.disk import check_writable, read_at, read_image
from oci_hooks.kata_image.initrd import Initrd, read_initrd
from oci_hooks.kata_image.kernel import read_kernel
from oci_hooks.kata_image.model import PROGRAM, Record
from oci_hooks.log import write_stderr, write_stdout
from oci_hooks.system import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator
    from typing import BinaryIO

    from oci_hooks.kata_image.kernel import KernelFile
    from oci_hooks.kata_image.model import Addon, AddonFile


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code. argv: arguments without the program's name; None for this process's."""
    # So that what is half written is taken away.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_REFUSED))
    try:
        asked = arguments.make_parser().parse_args(argv)
        code: int = {"show": show, "add": add, "remove": remove}[asked.command](asked)
        return code
    except HookError as error:
        report_findings(list(error.findings))
        return error.exit_code
    except KeyboardInterrupt:
        return report_error("interrupted", PROGRAM, "interrupted by SIGINT", "nothing was written; run it again")
    except OSError as error:
        hint = "nothing was written; check that path and free space"
        return report_error("system", error.filename or "a system call", error.strerror or str(error), hint)
    finally:
        signal.signal(signal.SIGTERM, before)


def report_error(code: str, subject: str, problem: str, hint: str) -> int:
    """Print an error and return the exit code for it."""
    write_stderr(f"{PROGRAM}: {Finding('error', code, subject, problem, hint).as_line()}")
    return EXIT_REFUSED


def report_findings(findings: list[Finding]) -> None:
    """Print findings, a line each."""
    for finding in findings:
        write_stderr(f"{PROGRAM}: {finding.as_line()}")


def is_initrd(source: BinaryIO) -> bool:
    """Return whether a file begins as an initrd does."""
    return bool(find_format(read_at(source, 0, MAGIC_BYTES)))


@contextlib.contextmanager
def open_copy(asked: Namespace) -> Iterator[tuple[BinaryIO, str]]:
    """Open the image, and a directory in which to make DRAFT, which then gets the output's name. Raises HookError."""
    with open_input(asked.image) as source:
        check_output(asked.output, source, asked.force)
        mode = os.fstat(source.fileno()).st_mode & 0o777
        with open_workspace(asked.output) as work:
            yield source, work
            publish(f"{work}/{DRAFT}", asked.output, mode, asked.force)


# show -----------------------------------------------------------------------------------------------------------------


def show(asked: Namespace) -> int:
    """Print what an image is and has."""
    kernel = read_named_kernel(asked.kernel)
    with open_input(asked.image) as source:
        if is_initrd(source):
            initrd = read_initrd(source)
            print_report(asked, initrd, report.read_guest(initrd.tree), kernel)
            return EXIT_DONE
        image = read_image(source)
        with disk_apply.open_tree(source, image) as tree:
            print_report(asked, image, report.read_guest(tree) if tree is not None else None, kernel)
    return EXIT_DONE


def read_named_kernel(path: str) -> KernelFile | None:
    """Return the kernel that --kernel names, None without the option. Raises InputError."""
    if not path:
        return None
    with open_input(path) as file:
        return read_kernel(file)


def print_report(asked: Namespace, found: report.Found, guest: report.Guest | None, kernel: KernelFile | None) -> None:
    """Print what was found as text or JSON."""
    modules = guest.modules if guest is not None else ()
    lines = report.list_lines(os.path.abspath(asked.image), isinstance(found, Initrd), modules)
    if asked.json:
        write_stdout(json.dumps(report.make_document(found, guest, kernel, lines), indent=2) + "\n")
        return
    rows = report.describe_layout(found)
    if guest is not None:
        rows += report.describe_guest(guest, kernel)
    else:
        rows.append(("content", "not read: only ext4 and erofs are"))
    write_stdout(report.format_rows(rows) + report.format_lines(lines))


# add ------------------------------------------------------------------------------------------------------------------


def add(asked: Namespace) -> int:
    """Write a copy of an image with the add-on in it."""
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    addon = read_addon(asked.addon or find_usual(checkout))
    settings = read_settings(asked.settings, addon)
    record = Record(__version__, addon.version, addon.manifest, bool(settings), 0, "")
    files = (*addon.files, *settings)
    with open_copy(asked) as (source, work):
        draft, of_initrd = f"{work}/{DRAFT}", is_initrd(source)
        if of_initrd:
            initrd = read_initrd(source)
            check_guest(asked.image, initrd.tree, files)
            initrd_apply.add_to_initrd(source, initrd, addon, settings, draft, record)
            initrd_apply.verify_initrd(draft, addon, settings)
            modules = report.read_guest(initrd.tree).modules
        else:
            image = read_image(source)
            check_writable(image)
            report_findings(disk_apply.list_warnings(image))
            modules = disk_apply.add_to_image(source, image, files, work, record, not asked.no_undo)
        size, added = os.stat(draft).st_size, sum(len(file.data) for file in addon.files)
    lines = report.list_lines(os.path.abspath(asked.output), of_initrd, modules)
    version = f" {addon.version}" if addon.version else ""
    write_stdout(f"{asked.output}: add-on{version}, {len(addon.files)} files, {added} bytes; {size} bytes in all\n")
    write_stdout(report.format_lines(lines))
    return EXIT_DONE


def read_settings(path: str, addon: Addon) -> tuple[AddonFile, ...]:
    """Return guest.toml for the guest, nothing without --settings. Raises InputError as the hook would in the guest."""
    if not path:
        return ()
    root, place = Root(), os.path.abspath(path)
    read_guest_settings(root, place)
    return (make_settings_file(path, root.read_bytes(place), addon),)


# remove ---------------------------------------------------------------------------------------------------------------


def remove(asked: Namespace) -> int:
    """Write a copy of an image as it was before `add`."""
    with open_copy(asked) as (source, work):
        draft = f"{work}/{DRAFT}"
        if is_initrd(source):
            record = initrd_apply.remove_from_initrd(source, draft)
        else:
            record = disk_apply.remove_from_image(source, read_image(source), draft)
    write_stdout(f"{asked.output}: the original's {record.size} bytes, SHA-256 {record.sha256}\n")
    return EXIT_DONE
