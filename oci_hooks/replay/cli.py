# SPDX-License-Identifier: Apache-2.0
"""vfio-hook-replay: inspect the recordings of hooks, and run the hooks again on them.

A hook that failed keeps a recording of its reads and steps, below /var/lib/oci-vfio-hooks/records.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from oci_hooks import __version__
from oci_hooks.findings import Finding, make_one_line
from oci_hooks.log import write_stderr, write_stdout
from oci_hooks.record import timeline
from oci_hooks.record.bounds import RecordError, RecordTooLarge, bounded
from oci_hooks.record.encoding import NotationError
from oci_hooks.record.reader import Recording, read_record
from oci_hooks.record.writer import DIRECTORY, SPARE_DIRECTORY, SUFFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

PROGRAM = "vfio-hook-replay"
EXIT_SAME, EXIT_DIFFERENT, EXIT_UNUSABLE = 0, 1, 2
# Exceptions that an untrusted recording causes in code written for a hook's own: "errno": {}, an address as a list.
DAMAGE = (ArithmeticError, AttributeError, LookupError, NotationError, RecursionError, TypeError, ValueError)
EPILOG = """\
A failed hook leaves a record in /var/lib/oci-vfio-hooks/records. REC is a file,
the beginning of a name that `list` shows, or a container's id; without it, the
newest is meant. A record is never trusted, nor unpacked. It holds the values of
environment, arguments and foreign annotations only if it was taken with "full".

exit code: 0 done, or the same as recorded; 1 different; 2 unusable
"""


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code. argv: arguments without the program's name; None for this process's."""
    arguments = make_parser().parse_args(argv)
    # A reader that closes the pipe early (head) is not an error.
    command: Callable[[Namespace], int] = arguments.command
    name = getattr(arguments, "record", "") or "record"
    try:
        if getattr(arguments, "live", False):
            # A hook on this machine has its own deadline, and must not be interrupted between two steps.
            return command(arguments)
        with bounded():
            return command(arguments)
    except (RecordError, *DAMAGE) as error:
        return fail(describe_damage(name, error))
    except OSError as error:
        hint = (
            ": recordings are readable by root only; use sudo, or name a file"
            if isinstance(error, PermissionError)
            else ""
        )
        return fail(f"{error.filename or 'record'}: {error.strerror or error}{hint}")


def fail(problem: str) -> int:
    """Report why a recording cannot be used and return the exit code for that."""
    write_stderr(f"{PROGRAM}: {make_one_line(problem)}")
    return EXIT_UNUSABLE


def describe_damage(name: str, error: Exception) -> str:
    """Return why a recording cannot be used, in one line. name: of the recording, if the error does not have it."""
    name = getattr(error, "path", "") or name
    if isinstance(error, RecordTooLarge):
        hint = "hooks do not write such a recording: record the run again"
        return Finding("error", "recording-too-large", name, str(error), hint).as_line()
    if isinstance(error, (RecordError, NotationError)):
        return f"{name}: {error}"
    return f"{name}: is damaged: {type(error).__name__}: {error}"


class Parser(ArgumentParser):
    """A parser that reports errors in one line: a file name on the command line may come from an untrusted source."""

    def error(self, message: str) -> NoReturn:
        """Print the error and end the process."""
        sys.exit(fail(f"{message}; see {PROGRAM} --help"))


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=PROGRAM,
        description="Inspect recordings of OCI hook runs and replay them.",
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--directory", metavar="DIR", default="", help="directory with the recordings")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[Namespace], int], about: str, *records: str) -> ArgumentParser:
        sub = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        sub.set_defaults(command=command)
        for record in records:
            sub.add_argument(record, metavar="REC", nargs="?" if len(records) == 1 else None, default="")
        return sub

    add("list", list_records, "list the recordings, the newest last")
    add("explain", explain, "short report for a ticket: code, object, what to do", "record")
    show = add("show", show_record, "what the run read, decided and changed, with times", "record")
    show.add_argument("--reads", action="store_true", help="each read with its result")
    run = add("run", run_record, "run the hook again on the recorded machine", "record")
    run.add_argument("--live", action="store_true", help="use this machine instead of the recorded one, as a dry run")
    run.add_argument("--apply", action="store_true", help="with --live: apply the changes")
    run.add_argument(
        "--pid",
        type=int,
        metavar="PID",
        help="with --live: process id of the container's init, instead of the one in the state",
    )
    add("diff", diff_records, "compare two recordings", "record", "other")
    export = add("export", export_record, "write a pytest test that replays a recording", "record")
    export.add_argument("--test", metavar="DIR", required=True, help="directory for the test and its recording")
    return parser


# Finding recordings ---------------------------------------------------------------------------------------------------


def find_paths(arguments: Namespace) -> list[str]:
    """Return the paths of all recordings, the newest last. Raises OSError if their directory cannot be read."""
    directories = [arguments.directory] if arguments.directory else [DIRECTORY, SPARE_DIRECTORY]
    paths = []
    for directory in directories:
        try:
            paths += [f"{directory}/{name}" for name in os.listdir(directory) if name.endswith(SUFFIX)]
        except FileNotFoundError:
            if arguments.directory:
                raise
    return sorted((path for path in paths if not os.path.basename(path).startswith(".")), key=os.path.basename)


def find_record(arguments: Namespace, word: str) -> Recording:
    """Return the recording that a word on the command line names. Raises RecordError, OSError."""
    if os.path.isfile(word):
        return read_record(word)
    paths = find_paths(arguments)
    if not word and paths:
        return read_record(paths[-1])
    found = [path for path in paths if os.path.basename(path).startswith(word)]
    if len(found) == 1 and word:
        return read_record(found[0])
    # The newest of a container's runs is used.
    for path in reversed(paths):
        if word and name_container(path) == word:
            return read_record(path)
    if len(found) > 1:
        raise RecordError(f"{len(found)} recordings begin with this name; list them: {PROGRAM} list")
    raise RecordError(f"no such recording; list the recordings: {PROGRAM} list" if paths else "there is no recording")


def name_container(path: str) -> str:
    """Return the container's id in a recording; "" if the recording cannot be read."""
    try:
        return str(read_record(path).about["container"])
    except (RecordError, OSError):
        return ""


# Commands -------------------------------------------------------------------------------------------------------------


def list_records(arguments: Namespace) -> int:
    """Print a line for each recording."""
    rows = [("RECORD", "WHEN", "HOOK", "CONTAINER", "SAID")]
    for path in find_paths(arguments):
        try:
            rows.append(timeline.format_row(read_record(path)))  # type: ignore[arg-type]
        except OSError as error:
            rows.append((make_one_line(os.path.basename(path)), "-", "-", "-", f"unusable: {error.strerror}"))
        except (RecordError, *DAMAGE) as error:
            name = make_one_line(os.path.basename(path))
            rows.append((name, "-", "-", "-", f"unusable: {make_one_line(describe_damage('record', error))}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    write_stdout("".join(f"{line}\n" for line in lines) if len(rows) > 1 else "there is no recording\n")
    return EXIT_SAME


def explain(arguments: Namespace) -> int:
    """Print the summary of a run for a ticket."""
    write_stdout(timeline.format_explanation(find_record(arguments, arguments.record)))
    return EXIT_SAME


def show_record(arguments: Namespace) -> int:
    """Print the timeline of a run."""
    write_stdout(timeline.format_run(find_record(arguments, arguments.record), arguments.reads))
    return EXIT_SAME


def run_record(arguments: Namespace) -> int:
    """Run a recording's hook again and print the differences."""
    record = find_record(arguments, arguments.record)
    if arguments.live:
        return run_on_this_machine(record, arguments)
    if arguments.apply or arguments.pid is not None:
        return fail("--apply and --pid need --live: a replay on the recorded machine changes nothing")
    from oci_hooks.replay.rerun import compare, rerun

    again = rerun(record)
    different = compare(record, again)
    lines = [*(different or timeline.format_findings(record)), *(f"# {text}" for text in again.unexpected)]
    lines += [] if different else ["the same as recorded"]
    write_stdout("".join(f"{make_one_line(line, 10_000)}\n" for line in lines))
    return EXIT_DIFFERENT if different else EXIT_SAME


def run_on_this_machine(record: Recording, arguments: Namespace) -> int:
    """Run a recording's hook on this machine, and print its findings."""
    import tempfile

    from oci_hooks.replay.rerun import run_live

    if "config.json" not in record.documents:
        return fail("the recording has no config.json: the run ended before reading it")
    with tempfile.TemporaryDirectory(prefix="vfio-hook-replay-") as bundle:
        Path(bundle, "config.json").write_bytes(record.documents["config.json"])
        _, outcome = run_live(record, bundle, arguments.pid, arguments.apply)
    lines = [finding.as_line() for finding in outcome.findings]
    write_stdout("".join(f"{line}\n" for line in [*lines, f"exit {outcome.code}"]))
    return EXIT_SAME if outcome.code == record.about["exit"] else EXIT_DIFFERENT


def diff_records(arguments: Namespace) -> int:
    """Compare two recordings and print the differences."""
    import difflib

    one, other = find_record(arguments, arguments.record), find_record(arguments, arguments.other)
    lines = list(
        difflib.unified_diff(
            list(timeline.list_facts(one)),
            list(timeline.list_facts(other)),
            os.path.basename(one.path),
            os.path.basename(other.path),
            lineterm="",
            n=0,
        )
    )
    write_stdout("".join(f"{make_one_line(line)}\n" for line in lines))
    return EXIT_DIFFERENT if lines else EXIT_SAME


def export_record(arguments: Namespace) -> int:
    """Write a pytest case that replays a recording, and the recording into the same directory."""
    record = find_record(arguments, arguments.record)
    codes = [finding.code for finding in record.findings] or ["success"]
    name = "".join(c if c.isalnum() else "_" for c in f"{record.about['program']}_{codes[0]}")
    directory = Path(arguments.test)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}{SUFFIX}").write_bytes(Path(record.path).read_bytes())
    (directory / f"test_{name}.py").write_text(TEST.format(program=record.about["program"], code=codes[0], name=name))
    write_stdout(make_one_line(f"{directory / f'test_{name}.py'}") + "\n")
    return EXIT_SAME


TEST = '''\
"""A recorded run of {program}: {code}."""

from __future__ import annotations

from pathlib import Path

from oci_hooks.replay import find_differences, read_record


def test_{name}() -> None:
    record = read_record(Path(__file__).with_name("{name}.tar.gz"))
    assert find_differences(record) == []
'''

if __name__ == "__main__":
    sys.exit(main())
